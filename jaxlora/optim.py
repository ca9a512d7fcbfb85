"""Optimizers (optax) that know what trains in a `lora` tree."""

from __future__ import annotations

import numbers
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxlora import _paths
from jaxlora._adamw_8bit import adamw_8bit
from jaxlora._errors import TargetError
from jaxlora._init import is_below, select
from jaxlora._tree import trainable_mask
from jaxlora._weight import FullWeight, LoraWeight, is_node

__all__ = ["adamw_8bit", "freeze_base", "labels", "lora_plus"]


def freeze_base(
    tx: optax.GradientTransformation, lora: Any
) -> optax.GradientTransformationExtraArgs:
    """`tx` on what trains in `lora`; zero updates, and no optimizer state, for all else.

    For loops that hold the whole tree, such as Flax's `TrainState`. `optax.masked` alone would pass
    the raw gradients of the frozen leaves through. Under `jax.jit` the gradients of frozen leaves
    are not computed, because nothing uses them, and their bits stay what they are (outside of it,
    a CPU flushes denormal numbers to zero).

    Wrappers of the optimizer go inside, `freeze_base(optax.MultiSteps(tx, 4), lora)`: outside, they
    would keep accumulators for frozen leaves.

    Args:
      tx: any optax transformation.
      lora: a tree of the structure that will be trained; only its structure is kept.

    Raises:
      TargetError: a tree in which nothing trains, or with leaves that are no numbers; (from `init`
        or `update`) a tree of another structure.

    >>> from jaxlora import LoraConfig, init
    >>> params = {"kernel": jnp.ones((3, 4))}
    >>> lora = init(jax.random.key(0), params, LoraConfig(rank=2, targets=["kernel"]))
    >>> tx = freeze_base(optax.adam(1e-3), lora)
    >>> sum(x.size for x in jax.tree.leaves(tx.init(lora))) == 2 * (3 * 2 + 2 * 4) + 1
    True
    """
    for path, leaf in _paths.flatten_with_paths(lora)[0]:
        dtype = getattr(leaf, "dtype", None)
        numeric = dtype is not None or isinstance(leaf, numbers.Number)
        if not numeric or (dtype is not None and jnp.issubdtype(dtype, jax.dtypes.extended)):
            kind = f"dtype {dtype}" if numeric else f"type {type(leaf).__name__}"
            raise TargetError(
                f"{path}: got a leaf of {kind}, expected numbers, since optax adds an "
                "update to every leaf. Train the halves instead, jaxlora.partition(lora), or keep "
                "functions and random keys out of the tree."
            )
    mask = trainable_mask(lora)
    if not any(jax.tree.leaves(mask)):
        raise TargetError(
            "freeze_base: got a tree in which nothing trains, expected one from jaxlora.init: "
            "jaxlora.freeze_base(tx, lora), with lora = jaxlora.init(key, params, config)."
        )
    masked = optax.masked(tx, mask)

    def check(tree: Any, what: str) -> None:
        got: Any = jax.tree.structure(tree)
        expected: Any = jax.tree.structure(mask)
        if got != expected:
            raise TargetError(
                f"freeze_base: got {what} of another structure than the tree it was made for, "
                "expected the same. Make one for this tree: jaxlora.freeze_base(tx, lora).\n"
                f"    got      {got}\n    expected {expected}"
            )

    def init(params: Any) -> optax.OptState:
        check(params, "params")
        return masked.init(params)

    def update(
        updates: Any, state: optax.OptState, params: Any = None, **extra: Any
    ) -> tuple[Any, optax.OptState]:
        check(updates, "updates")
        updates, state = masked.update(updates, state, params, **extra)
        return jax.tree.map(lambda m, u: u if m else _nothing(u), mask, updates), state

    return optax.GradientTransformationExtraArgs(init, update)


def _nothing(update: Any) -> jax.Array:
    # x + -0.0 is x for every float x, while -0.0 + 0.0 is 0.0: frozen bits stay frozen.
    if jnp.issubdtype(update.dtype, jnp.inexact):
        return jnp.full(update.shape, -0.0, update.dtype)
    return jnp.zeros(update.shape, bool)  # gradients of integers are float0; bools never promote


FROZEN = "frozen"
_LABELS: dict[type, dict[str, str]] = {
    LoraWeight: {"a": "a", "b": "b", "magnitude": "magnitude"},
    FullWeight: {"value": "full"},
}


def labels(lora: Any) -> Any:
    """What each leaf is: "a", "b", "magnitude", "full" (a `FullWeight`'s value) or "frozen".

    For an optimizer of your own for each, `optax.partition({...}, labels)`: it takes the function.

    Args:
      lora: the tree, one half of it, its gradients, or what `optax.masked` leaves of any of them.

    Returns:
      A tree of that structure with strings as leaves.

    >>> from jaxlora import LoraConfig, init
    >>> params = {"kernel": jnp.ones((3, 4)), "bias": jnp.ones(4)}
    >>> tree = labels(init(jax.random.key(0), params, LoraConfig(targets=["kernel"], bias="all")))
    >>> tree["kernel"].b, tree["kernel"].w, tree["bias"].value
    ('b', 'frozen', 'full')
    """

    def label(leaf: Any) -> Any:
        if not is_node(leaf):
            return FROZEN
        names = _LABELS[type(leaf)]
        return jax.tree_util.tree_map_with_path(
            lambda keys, _: names.get(keys[0].name, FROZEN), leaf
        )

    return jax.tree.map(label, lora, is_leaf=is_node)


def lora_plus(
    learning_rate: optax.ScalarOrSchedule,
    ratio: float = 16.0,
    *,
    optimizer: Callable[..., optax.GradientTransformation] = optax.adamw,
    embeddings: _paths.Pattern | None = None,
    embedding_learning_rate: optax.ScalarOrSchedule = 1e-6,
    **kwargs: Any,
) -> optax.GradientTransformationExtraArgs:
    """LoRA+: b learns `ratio` times as fast as a.

    b starts at zero and a does not, so that in wide models with one learning rate for both, the
    output moves by b's steps far less than by a's. `learning_rate` is that of a, and of everything
    else that trains (the magnitudes of DoRA, leaves trained in full); b has ratio * learning_rate.
    Frozen leaves, if the tree has any, get zero updates.

    It takes the trainable half of `jaxlora.partition`, or goes inside of `freeze_base` for the
    whole tree. What has a state for all leaves at once goes outside:
    `optax.chain(optax.clip_by_global_norm(1.0), lora_plus(1e-4))`.

    Args:
      learning_rate: of all but b: a number or a schedule.
      ratio: of b's learning rate to a's. Values above 1 make sense; then a somewhat smaller
        `learning_rate` than without.
      optimizer: makes the optimizer of each group, `optimizer(learning_rate, **kwargs)`: any of
        optax, or `adamw_8bit`.
      embeddings: which adapters train with `embedding_learning_rate` instead, a and b alike: a
        regex of the whole path, a sequence of names, or a function of (path, node), as in
        `LoraConfig(exclude=...)`.
      embedding_learning_rate: a number or a schedule.
      kwargs: go to the optimizer: `weight_decay=0.01`, `b2=0.99`.

    Returns:
      An optax transformation: `optax.partition` over groups of `labels`.

    Raises:
      TargetError: a ratio that is not positive; (from `init` or `update`) a tree without a
        `LoraWeight`, or with none that `embeddings` matches.

    >>> from jaxlora import LoraConfig, init, partition
    >>> params = {"kernel": jnp.ones((3, 4))}
    >>> trainable, _ = partition(init(jax.random.key(0), params, LoraConfig(targets=["kernel"])))
    >>> tx = lora_plus(0.01, ratio=4, optimizer=optax.sgd)
    >>> updates, _ = tx.update(jax.tree.map(jnp.ones_like, trainable), tx.init(trainable))
    >>> bool(jnp.allclose(updates["kernel"].a, -0.01) & jnp.allclose(updates["kernel"].b, -0.04))
    True

    References:
      Hayou et al. 2024, LoRA+: Efficient Low Rank Adaptation of Large Models, arXiv 2402.12354,
      section 4. The names are those of PEFT's `create_loraplus_optimizer`, which gives the ratio to
      vectors too (biases, norms, magnitudes).
    """
    if isinstance(ratio, numbers.Real) and not ratio > 0:
        raise TargetError(
            f"lora_plus: got ratio={ratio}, expected a positive number: that of b's learning rate "
            "to a's. For instance lora_plus(1e-4, ratio=16)."
        )

    def groups(tree: Any) -> Any:
        pairs, treedef = _paths.flatten_with_paths(tree, is_leaf=is_node)
        adapters = {path: leaf for path, leaf in pairs if isinstance(leaf, LoraWeight)}
        if pairs and not adapters:
            raise TargetError(
                f"lora_plus: got a {type(tree).__name__} of {len(pairs)} leaves without a "
                "LoraWeight, expected a tree made by jaxlora.init, which tells a from b. Call "
                "tx.init(trainable) with (trainable, frozen) = jaxlora.partition(lora), or use "
                "jaxlora.freeze_base(tx, lora) for the whole tree; wrappers that flatten it "
                "(optax.flatten) go inside: lora_plus(..., optimizer=...)."
            )
        chosen = select(embeddings, adapters, "embeddings", is_below) if adapters else set()

        def group(path: str, leaf: Any) -> Any:
            slow, fast = ("embedding", "embedding") if path in chosen else ("rest", "b")
            to_group = {FROZEN: FROZEN, "b": fast}
            return jax.tree.map(lambda label: to_group.get(label, slow), labels(leaf))

        return jax.tree.unflatten(treedef, [group(path, leaf) for path, leaf in pairs])

    transforms = {
        "rest": optimizer(learning_rate, **kwargs),
        "b": optimizer(_times(ratio, learning_rate), **kwargs),
        FROZEN: optax.set_to_zero(),
    }
    if embeddings is not None:
        transforms["embedding"] = optimizer(embedding_learning_rate, **kwargs)
    return optax.partition(transforms, groups)


def _times(ratio: float, learning_rate: Any) -> Any:
    if callable(learning_rate):
        return lambda count: ratio * learning_rate(count)
    return ratio * learning_rate
