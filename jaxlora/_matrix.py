"""A weight of any shape as a stack of matrices, (stacked..., inputs, outputs), and back."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxlora._quantized import dense

ROLE_LETTERS = "sio"


def split_shape(
    shape: tuple[int, ...], roles: str
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """The stacked, input and output sizes of a shape.

    >>> split_shape((12, 64, 8, 16), "sioo")
    ((12,), (64,), (8, 16))
    """
    stacked, inputs, outputs = (
        tuple(n for n, role in zip(shape, roles, strict=True) if role == letter)
        for letter in ROLE_LETTERS
    )
    return stacked, inputs, outputs


def leading_stacked(roles: str) -> int:
    """How many of the first dims are stacked.

    >>> leading_stacked("ssio")
    2
    """
    return len(roles) - len(roles.lstrip("s"))


def dims_of(letter: str, roles: str) -> tuple[int, ...]:
    """The dims of a role, counted after the leading stacked ones.

    >>> dims_of("i", "siio")
    (0, 1)
    """
    k = leading_stacked(roles)
    return tuple(d - k for d, role in enumerate(roles) if role == letter and d >= k)


def _order(roles: str) -> list[int]:
    """The dims of a weight, stacked ones first, then inputs, then outputs."""
    return sorted(range(len(roles)), key=lambda d: ROLE_LETTERS.index(roles[d]))


def to_matrix(w: Any, roles: str) -> jax.Array:
    """W as (stacked..., I, O), its input dims fused in order, and its output dims.

    >>> to_matrix(jnp.ones((5, 2, 3)), "oii").shape
    (6, 5)
    """
    stacked, inputs, outputs = split_shape(w.shape, roles)
    ordered = jnp.transpose(dense(w), _order(roles))
    return ordered.reshape(*stacked, math.prod(inputs), math.prod(outputs))


def from_matrix(matrix: Any, shape: tuple[int, ...], roles: str) -> jax.Array:
    """The weight of that shape whose `to_matrix` this is."""
    order = _order(roles)
    ordered = matrix.reshape([shape[d] for d in order])
    return jnp.transpose(ordered, [order.index(d) for d in range(len(shape))])


def factors_to_matrix(a: Any, b: Any, shape: tuple[int, ...], roles: str) -> tuple[Any, Any]:
    """a and b of a weight of that shape as (stacked..., I, R) and (stacked..., R, O)."""
    stacked, inputs, outputs = split_shape(shape, roles)
    rank = a.shape[-1]
    return (
        a.reshape(*stacked, math.prod(inputs), rank),
        b.reshape(*stacked, rank, math.prod(outputs)),
    )


def factors_from_matrix(a: Any, b: Any, shape: tuple[int, ...], roles: str) -> tuple[Any, Any]:
    """a (stacked..., input..., R) and b (stacked..., R, output...) of such matrices."""
    stacked, inputs, outputs = split_shape(shape, roles)
    rank = a.shape[-1]
    return a.reshape(*stacked, *inputs, rank), b.reshape(*stacked, rank, *outputs)


def widened(dtype: Any) -> Any:
    """float32, or dtype if that is as wide."""
    wide = jnp.issubdtype(dtype, jnp.inexact) and jnp.dtype(dtype).itemsize >= 4
    return dtype if wide else jnp.float32
