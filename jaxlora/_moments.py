"""`Moments`: what is kept of a weight's inputs, and what initializers read from it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxlora import _paths
from jaxlora._errors import TargetError
from jaxlora._matrix import split_shape
from jaxlora._target import Target, known


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Moments:
    r"""Sums over the inputs x that met a weight; those of several batches add up.

    n is the number of inputs: the product of W's input dims, flattened in W's order. A stacked
    weight has sums of its own for each index.

    Attributes:
      count: how many x there were, float32: (stacked...) or a scalar.
      total: sum of x, (stacked..., n).
      second: sum of x x^T, (stacked..., n, n).

    >>> x = jnp.array([[1.0, 0.0], [3.0, 0.0]])
    >>> moments = Moments(count=jnp.float32(2), total=x.sum(0), second=x.T @ x)
    >>> moments.scatter()
    Array([[2., 0.],
           [0., 0.]], dtype=float32)
    """

    count: Any
    total: Any
    second: Any

    def scatter(self) -> Any:
        r"""sum of (x - mean) (x - mean)^T: (stacked..., n, n)."""
        outer = self.total[..., :, None] * self.total[..., None, :]
        return self.second - outer / self.count[..., None, None]


jax.tree_util.register_dataclass(Moments, data_fields=["count", "total", "second"], meta_fields=[])


def check_statistics(stats: Any, method: str) -> None:
    """Raises a TargetError unless `stats` maps paths to `Moments`."""
    if not isinstance(stats, Mapping) or not all(isinstance(m, Moments) for m in stats.values()):
        raise TargetError(
            f"{method}: got statistics of type {type(stats).__name__}, expected {{path: Moments}} "
            "of the weights' inputs, from jaxlora.input_moments(fn, lora, batches)."
        )


def moments_of(stats: Mapping[str, Moments], w: Any, target: Target, method: str) -> Moments:
    """The moments of a target's inputs.

    Raises:
      TargetError: an embedding; a path that `stats` lacks; other shapes; no inputs, or fewer than
        the rank.
    """
    path = target.path
    exclude = f"LoraConfig(..., exclude=[{_paths.short(path)!r}])"
    if target.lookup:
        raise TargetError(
            f"{path}: got an embedding, expected a weight with inputs, from which {method} is "
            f"made: rows are looked up by number. Leave it out, {exclude}."
        )
    call = "jaxlora.input_moments(fn, lora, batches)"
    check_statistics(stats, method)
    moments = _paths.lookup(stats, path)
    if moments is None:
        raise TargetError(
            f"{path}: got no statistics of its inputs for {method}, expected an entry of that "
            f"path in `stats`, from {call} with an adapter on the same targets. "
            f"It has {len(stats)} paths:{_paths.listing(_paths.nearest(path, stats))}"
        )
    stacked, inputs, _ = split_shape(w.shape, target.roles)
    n = math.prod(inputs)
    got = (tuple(jnp.shape(moments.total)), tuple(jnp.shape(moments.second)))
    expected = ((*stacked, n), (*stacked, n, n))
    if got != expected or jnp.shape(moments.count) not in ((), stacked):
        raise TargetError(
            f"{path}: got statistics of shapes {jnp.shape(moments.count)}, {got[0]} and {got[1]} "
            f"for {method}, expected count {stacked or ()} or (), total {expected[0]} and second "
            f"{expected[1]} for w of shape {tuple(w.shape)} and roles {target.roles!r}. "
            f"Collect them with the same params: {call}."
        )
    count = known(jnp.min, moments.count)
    if count == 0:
        raise TargetError(
            f"{path}: {method} without data: got statistics of 0 inputs, expected some. Give "
            f"batches that reach this weight, {call}, or leave it out, {exclude}."
        )
    if count is not None and count < target.rank:
        raise TargetError(
            f"{path}: got statistics of {count:g} inputs for {method}, expected as many as the "
            f"rank, {target.rank}, at the least. Give more batches: {call}."
        )
    least = known(lambda x: jnp.min(jnp.trace(x, axis1=-2, axis2=-1)), moments.second)
    if least is not None and not 0 < least < math.inf:
        raise TargetError(
            f"{path}: got a sum of squared inputs of {least:g} for {method}, expected a finite "
            "one above zero. Look for NaNs, or for a layer that is off, in the batches that "
            f"{call} was given, or leave the weight out, {exclude}."
        )
    return moments
