"""`rebase`: from an adapter of a moved base to one of the base as it was."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxlora import _paths
from jaxlora._errors import TargetError
from jaxlora._quantized import dense
from jaxlora._target import known
from jaxlora._weight import LoraWeight, delta, is_node


def rebase(lora: Any, initial: Any, params: Any = None) -> Any:
    r"""The same model as an adapter of the original base, of twice the rank.

    An initializer like `pissa` moves the base, w = W - s a0 b0, so that an adapter trained from
    there fits no other's base. Since w + s a b = W + s (a b - a0 b0), it is also

        W + s a' b',    a' = [a, a0],    b' = [b; -b0],

    a plain adapter of W, to share, to stack with others, or to switch off. A DoRA weight keeps its
    magnitude, and leaves trained in full stay as they are.

    Args:
      lora: the tree after training.
      initial: the tree that `init` returned, before training.
      params: the tree that `init` was given, whose weights are taken as they are; None: W is
        computed, w + s a0 b0, rounded to w's dtype.

    Returns:
      A tree like `lora`; its merge is that of `lora` up to rounding.

    Raises:
      TargetError: trees of other paths, shapes, roles, ranks or scales; params from which the
        adapter did not start.

    >>> from jaxlora import LoraConfig, base_params, init, initializers, merge
    >>> params = {"kernel": jax.random.normal(jax.random.key(0), (6, 4))}
    >>> config = LoraConfig(rank=2, targets=["kernel"], initializer=initializers.pissa())
    >>> initial = init(jax.random.key(1), params, config)
    >>> lora = jax.tree.map(lambda x: x, initial)  # train it here
    >>> plain = rebase(lora, initial, params)
    >>> base_params(plain)["kernel"] is params["kernel"], plain["kernel"].rank
    (True, 4)
    >>> bool(jnp.allclose(merge(plain)["kernel"], merge(lora)["kernel"], atol=1e-5))
    True

    References:
      Meng et al. 2024, PiSSA, arXiv 2404.02948, appendix on converting PiSSA to LoRA; PEFT's
      `subtract_mutated_init`.
    """
    pairs, treedef = _paths.flatten_with_paths(lora, is_leaf=is_node)
    before = dict(_paths.flatten_with_paths(initial, is_leaf=is_node)[0])
    originals = None if params is None else dict(_paths.flatten_with_paths(params)[0])

    def plain(path: str, leaf: Any) -> Any:
        if not isinstance(leaf, LoraWeight):
            return leaf
        first = _partner(path, leaf, before.get(path))
        # Where the adapter started from: w + s a0 b0.
        change = delta(dataclasses.replace(first, w=leaf.w, magnitude=None, squared_norm=None))
        start = dense(leaf.w).astype(change.dtype) + change
        if originals is None:
            w = start.astype(leaf.w.dtype)
        else:
            w = _paths.lookup(originals, path)
            _check_original(path, w, leaf.w, start)
        return dataclasses.replace(
            leaf,
            w=w,
            a=jnp.concatenate([leaf.a, first.a.astype(leaf.a.dtype)], axis=-1),
            b=jnp.concatenate([leaf.b, -first.b.astype(leaf.b.dtype)], axis=leaf.roles.count("s")),
            squared_norm=None,  # that of the new w
        )

    return jax.tree.unflatten(treedef, [plain(path, leaf) for path, leaf in pairs])


def _check_original(path: str, original: Any, w: Any, start: jax.Array) -> None:
    if original is None or (original.shape, original.dtype) != (w.shape, w.dtype):
        got = "nothing" if original is None else f"{original.dtype}{tuple(original.shape)}"
        raise TargetError(
            f"{path}: got {got} in `params`, expected {w.dtype}{tuple(w.shape)}: the params that "
            "jaxlora.init was given."
        )

    def largest(*arrays: Any) -> jax.Array:
        each = [jnp.max(jnp.abs(dense(x)), initial=0) for x in arrays]
        return jnp.max(jnp.array(each, start.dtype))

    error = known(lambda x, y: largest(x - dense(y)), start, original)
    size = known(largest, w, original, start)
    if error is None or size is None:
        return
    if not error <= 4 * float(jnp.finfo(w.dtype).eps) * size:
        raise TargetError(
            f"{path}: got a weight in `params` that differs by {error:.3g} from what the adapter "
            "started from, expected the same: the params that jaxlora.init was given. After an "
            "initializer that starts near them (loftq), or if the base was quantized after, leave "
            "`params` out: "
            "jaxlora.rebase(lora, initial)."
        )


def _partner(path: str, after: LoraWeight, before: Any) -> LoraWeight:
    """The weight before training, if it is the one that became `after`."""
    after.check(path)
    hint = "Give the tree that jaxlora.init returned: jaxlora.rebase(lora, initial)."
    if not isinstance(before, LoraWeight):
        got = "nothing" if before is None else f"a {type(before).__name__}"
        raise TargetError(
            f"{path}: got {got} in `initial`, expected the LoraWeight before training. {hint}"
        )
    before.check(path)
    for what in ("shape", "roles", "rank"):
        x, y = getattr(before, what), getattr(after, what)
        if x != y:
            raise TargetError(
                f"{path}: got {what} {x!r} in `initial`, expected {y!r}, as in `lora`. {hint}"
            )
    if known(lambda x, y: jnp.any(x != y), before.scale, after.scale):
        raise TargetError(
            f"{path}: got a scale of {before.scale} in `initial` and of {after.scale} in `lora`, "
            "expected the same. Rebase first, and change the strength of the plain adapter: "
            "jaxlora.with_scale(jaxlora.rebase(lora, initial), scale)."
        )
    return before
