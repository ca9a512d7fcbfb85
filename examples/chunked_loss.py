"""Cross-entropy of a large vocabulary, some tokens at a time.

With 49,152 words, the logits of 1,024 tokens are 201 MB, and their gradient as much again. Here a
chunk's logits are made, turned into its loss and its gradients, and forgotten; tokens without loss
(prompts, padding) have none made at all.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

# (trainable, frozen, hidden states (N, D)) -> logits (N, V)
Head = Callable[[Any, Any, jax.Array], jax.Array]
CHUNK = 128


class Sums(NamedTuple):
    """Over tokens, each times its weight.

    Attributes:
      loss: of -log p(label), in nats.
      hits: of those whose label is the likeliest token, or as likely as it.
    """

    loss: jax.Array
    hits: jax.Array


def cross_entropy(
    head: Head,
    trainable: Any,
    frozen: Any,
    hidden: jax.Array,
    labels: ArrayLike,
    weights: ArrayLike,
    chunk: int = CHUNK,
) -> Sums:
    """sum_t weight_t * -log softmax(head(hidden_t))[label_t], differentiable in one pass.

    The gradients are computed in the forward pass, where the logits are, so that no logits are
    computed twice; the backward pass only scales them. A head with an adapter is
    `jaxlora.lora_apply(...)` of the plain one, and the halves are those of `jaxlora.partition`.
    Call this outside of `lora_apply`: a weight that enters a custom gradient has to be whole.

    Args:
      head: (trainable, frozen, hidden states (N, D)) -> logits (N, V), of nothing else that is
        traced.
      trainable: what the head has to train: give it no more than that, gradients of all of it are
        kept. May be empty.
      frozen: the rest of what the head needs; gets no gradient.
      hidden: (..., D).
      labels: (...), integers.
      weights: (...), floats; a token of weight 0 costs nothing, whatever its label.
      chunk: how many tokens' logits are there at a time.

    Returns:
      The sums. Only that of the losses has gradients: with respect to `trainable` and `hidden`.

    >>> h, table = jnp.eye(3), 2 * jnp.eye(3)
    >>> of = jax.jit(lambda t: cross_entropy(
    ...     lambda t, _, h: h @ t, t, None, h, jnp.array([0, 1, 0]), jnp.ones(3), chunk=2))
    >>> [round(float(x), 3) for x in of(table)]
    [2.719, 2.0]
    """
    flat = _flat(hidden, labels, weights)
    chunk = max(1, min(chunk, flat[1].size))
    return _cross_entropy(head, chunk, trainable, frozen, *flat)


def scores(
    head: Callable[[Any, jax.Array], jax.Array],
    params: Any,
    hidden: jax.Array,
    labels: ArrayLike,
    weights: ArrayLike,
    chunk: int = CHUNK,
) -> tuple[jax.Array, jax.Array]:
    """Of each token -log p(label), and whether its label is the likeliest; no gradients.

    Args:
      head: (params, hidden states (N, D)) -> logits (N, V).
      params: what it needs.
      hidden, labels, weights, chunk: as in `cross_entropy`.

    Returns:
      (losses, hits), floats of the shape of `labels`; 0 for tokens of weight 0.
    """
    shape, flat = jnp.shape(labels), _flat(hidden, labels, weights)
    size = flat[1].size
    chunk = max(1, min(chunk, size))
    order, take, count = _chunks(chunk, *flat)

    def put(i: jax.Array, found: Any) -> Any:
        start, part = take(i)
        new = _scores(head(params, part[0]), part[1])
        old = [jax.lax.dynamic_slice_in_dim(x, start, chunk) for x in found]
        both = [jnp.where(part[2] != 0, x, y) for x, y in zip(new, old, strict=True)]
        return [
            jax.lax.dynamic_update_slice_in_dim(x, y, start, 0)
            for x, y in zip(found, both, strict=True)
        ]

    nothing = [jnp.zeros(size, jnp.float32)] * 2
    found = jax.lax.fori_loop(0, count, put, nothing)
    losses, hits = (jnp.zeros_like(x).at[order].set(x).reshape(shape) for x in found)
    return losses, hits


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _cross_entropy(
    head: Head,
    chunk: int,
    trainable: Any,
    frozen: Any,
    hidden: jax.Array,
    labels: jax.Array,
    weights: jax.Array,
) -> Sums:
    losses, hits = scores(partial(head, trainable), frozen, hidden, labels, weights, chunk)
    return Sums(jnp.sum(weights * losses), jnp.sum(weights * hits))


def _forward(
    head: Head,
    chunk: int,
    trainable: Any,
    frozen: Any,
    hidden: jax.Array,
    labels: jax.Array,
    weights: jax.Array,
) -> tuple[Sums, Any]:
    order, take, count = _chunks(chunk, hidden, labels, weights)

    def loss(trainable: Any, hidden: jax.Array, labels: Any, weights: Any) -> tuple[Any, Sums]:
        sums = _sums(head, trainable, frozen, hidden, labels, weights)
        return sums.loss, sums

    def add(i: jax.Array, carry: Any) -> Any:
        sums, d_trainable, d_hidden = carry
        start, part = take(i)
        grads, more = jax.grad(loss, argnums=(0, 1), has_aux=True)(trainable, *part)
        more = more, jax.tree.map(lambda g, to: g.astype(to.dtype), grads[0], d_trainable)
        sums, d_trainable = jax.tree.map(jnp.add, (sums, d_trainable), more)
        # The last chunk may begin among the tokens of the one before, with weights of 0 there.
        here = jax.lax.dynamic_slice_in_dim(d_hidden, start, chunk) + grads[1]
        return sums, d_trainable, jax.lax.dynamic_update_slice_in_dim(d_hidden, here, start, 0)

    # Added up in float32: over many chunks, bfloat16 would lose digits.
    wide = jax.tree.map(
        lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32)), trainable
    )
    start = Sums(jnp.float32(0), jnp.float32(0)), wide, jnp.zeros_like(hidden)
    sums, d_trainable, d_hidden = jax.lax.fori_loop(0, count, add, start)
    d_trainable = jax.tree.map(lambda g, like: g.astype(like.dtype), d_trainable, trainable)
    return sums, (d_trainable, jnp.zeros_like(hidden).at[order].set(d_hidden))


def _backward(head: Head, chunk: int, gradients: Any, cotangent: Sums) -> tuple[Any, ...]:
    scaled = jax.tree.map(lambda g: (g * cotangent.loss).astype(g.dtype), gradients)
    return scaled[0], None, scaled[1], None, None


_cross_entropy.defvjp(_forward, _backward)


def _sums(head: Head, trainable: Any, frozen: Any, hidden: Any, labels: Any, weights: Any) -> Sums:
    losses, hits = _scores(head(trainable, frozen, hidden), labels)
    return Sums(jnp.sum(weights * losses), jnp.sum(weights * hits))


def _scores(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    logits = logits.astype(jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    picked = jnp.take_along_axis(logits, labels[:, None], axis=-1)[:, 0]
    likeliest = picked >= jax.lax.stop_gradient(logits).max(-1)  # argmax would cost more
    return losses, likeliest.astype(jnp.float32)


def _flat(
    hidden: jax.Array, labels: ArrayLike, weights: ArrayLike
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Tokens in one row; labels of weight 0, -100 say, are 0."""
    labels, weights = jnp.asarray(labels), jnp.asarray(weights, jnp.float32)
    if not labels.shape == weights.shape == hidden.shape[:-1] or labels.size == 0:
        raise ValueError(
            f"chunked_loss: got hidden {hidden.shape}, labels {labels.shape} and weights "
            f"{weights.shape}, expected (..., D) and twice (...), of one token at least."
        )
    labels = jnp.where(weights != 0, labels, 0)
    return hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1), weights.reshape(-1)


def _chunks(chunk: int, *arrays: jax.Array) -> tuple[jax.Array, Callable[..., Any], jax.Array]:
    """An order of tokens, those with loss first; chunk i of it; how many chunks have any loss."""
    weights = arrays[-1]
    order = jnp.argsort(weights == 0, stable=True)
    ordered = [x[order] for x in arrays]
    count = (jnp.sum(weights != 0) + chunk - 1) // chunk

    def take(i: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        start = jnp.minimum(i * chunk, weights.size - chunk)
        hidden, labels, w = (jax.lax.dynamic_slice_in_dim(x, start, chunk) for x in ordered)
        w = jnp.where(start + jnp.arange(chunk) >= i * chunk, w, 0)
        return start, [hidden, labels, w]

    return order, take, count
