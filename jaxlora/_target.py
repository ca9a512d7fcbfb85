"""What an initializer is told, what it returns, and the one way in which it may move the base."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from jaxlora import _paths
from jaxlora._errors import TargetError
from jaxlora._matrix import factors_from_matrix, from_matrix, split_shape, to_matrix, widened
from jaxlora._quantized import as_before

HIGHEST = jax.lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """What an initializer is told of the weight whose adapter it makes.

    Attributes:
      path: its path in the params.
      roles: the role of each of its dimensions.
      rank: R.
      scale: alpha / rank, or alpha / sqrt(rank).
      dtype: of a and b.
      lookup: whether it is an embedding: the model looks its rows up. Random initializers then
        make a zero and b random, as PEFT does: a matmul with b may follow, with a never does.
    """

    path: str
    roles: str
    rank: int
    scale: float
    dtype: Any = jnp.float32
    lookup: bool = False


class Initializer(Protocol):
    """Fills the factors of one weight.

    Args:
      key: a key of this weight's own.
      w: the base weight.
      target: what is known of it.

    Returns:
      (w, a, b): the base, moved or not; a (stacked..., input..., R); b (stacked..., R, output...);
      such that w + scale * a b is the weight to start from.
    """

    def __call__(
        self, key: jax.Array, w: Any, target: Target
    ) -> tuple[Any, jax.Array, jax.Array]: ...


def factor_shapes(w: Any, target: Target) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of a, (stacked..., input..., R), and of b, (stacked..., R, output...).

    >>> factor_shapes(jnp.ones((12, 64, 8, 16)),
    ...               Target(path="query", roles="sioo", rank=4, scale=1.0))
    ((12, 64, 4), (12, 4, 8, 16))
    """
    stacked, inputs, outputs = split_shape(w.shape, target.roles)
    return (*stacked, *inputs, target.rank), (*stacked, target.rank, *outputs)


def wide_matrix(w: Any, target: Target) -> jax.Array:
    """W as (stacked..., I, O), in float32 or wider."""
    return to_matrix(w, target.roles).astype(widened(w.dtype))


def product(a: jax.Array, b: jax.Array, target: Target) -> jax.Array:
    """scale * a b of two matrices, in their dtype, with the scale that a `LoraWeight` keeps."""
    return jnp.float32(target.scale).astype(a.dtype) * jnp.matmul(a, b, precision=HIGHEST)


def factors(w: Any, a: jax.Array, b: jax.Array, target: Target) -> tuple[jax.Array, jax.Array]:
    """Matrices a (stacked..., I, R) and b (stacked..., R, O) as the factors of w."""
    return factors_from_matrix(
        a.astype(target.dtype), b.astype(target.dtype), w.shape, target.roles
    )


def moved(
    w: Any, a: jax.Array, b: jax.Array, target: Target
) -> tuple[jax.Array, jax.Array, jax.Array]:
    r"""(w - scale * a b, a, b) of matrices a (stacked..., I, R) and b (stacked..., R, O).

    The model starts where w was. What is taken from w is the product of a and b as they are kept,
    rounded to their dtype, so that the one error left is the rounding of the moved base to w's own
    dtype: half a unit in its last place. (No a and b of that rank could take it up, since it is
    noise of full rank.) A quantized w is quantized again: its error is that of its kind.
    """
    matrix = wide_matrix(w, target)
    kept_a, kept_b = (x.astype(target.dtype).astype(matrix.dtype) for x in (a, b))
    rest = from_matrix(matrix - product(kept_a, kept_b, target), w.shape, target.roles)
    return as_before(rest.astype(w.dtype), w, target.path), *factors(w, a, b, target)


def known(f: Callable[..., Any], *arrays: Any) -> float | None:
    """f(*arrays) as a number, also while something else is traced; None if one of them is."""
    if any(isinstance(x, jax.core.Tracer | jax.ShapeDtypeStruct) for x in arrays):
        return None
    with jax.ensure_compile_time_eval():
        return float(f(*arrays))


def check_rank(w: Any, target: Target, method: str, times: int = 1) -> None:
    """Raises unless the matrix of w has `times` the rank's number of singular vectors."""
    _, inputs, outputs = split_shape(w.shape, target.roles)
    least = min(math.prod(inputs), math.prod(outputs))
    if times * target.rank > least:
        vectors = "rank" if times == 1 else f"{times} * rank"
        remedy = (
            f"LoraConfig(rank_pattern={{{_paths.short(target.path)!r}: {least // times}}})"
            if least >= times
            else f"Leave it out, LoraConfig(..., exclude=[{_paths.short(target.path)!r}])"
        )
        raise TargetError(
            f"{target.path}: got rank {target.rank} for a weight of {math.prod(inputs)} inputs "
            f"and {math.prod(outputs)} outputs, expected {vectors} <= {least}, since {method} "
            f"takes so many of its singular vectors. {remedy}."
        )
