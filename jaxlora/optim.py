"""Optimizers (optax) that know what trains in a `lora` tree."""

from __future__ import annotations

import numbers
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxlora import _paths
from jaxlora._errors import TargetError
from jaxlora._tree import trainable_mask


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
      TargetError: (from `init` or `update`) a tree of another structure.

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
