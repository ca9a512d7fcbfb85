"""How an adapter starts: functions that fill a and b, and may move the base."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from jaxlora._matrix import split_shape


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


def _random_a(
    w: Any, target: Target, draw: Callable[[tuple[int, ...]], jax.Array], key: jax.Array
) -> tuple[Any, jax.Array, jax.Array]:
    """a drawn, b zero; for an embedding a zero and b of the standard normal distribution."""
    a, b = factor_shapes(w, target)
    if target.lookup:
        return w, jnp.zeros(a, target.dtype), jax.random.normal(key, b, target.dtype)
    return w, draw(a), jnp.zeros(b, target.dtype)


def kaiming_uniform(key: jax.Array, w: Any, target: Target) -> tuple[Any, jax.Array, jax.Array]:
    r"""a ~ U(-1/sqrt(n), 1/sqrt(n)), n the number of inputs; b = 0. The default, and PEFT's.

    For an embedding a = 0, b ~ N(0, 1), as in PEFT.

    >>> w, a, b = kaiming_uniform(jax.random.key(0), jnp.ones((100, 3)),
    ...                           Target(path="kernel", roles="io", rank=2, scale=1.0))
    >>> a.shape, b.shape, bool(jnp.max(jnp.abs(a)) <= 0.1), float(jnp.max(jnp.abs(b)))
    ((100, 2), (2, 3), True, 0.0)

    References:
      He et al. 2015, Delving Deep into Rectifiers, arXiv 1502.01852, section 2.2, with PyTorch's
      gain for a = sqrt(5), which is what torch.nn.Linear and PEFT's LoRA layers use.
    """
    _, inputs, _ = split_shape(w.shape, target.roles)
    bound = 1 / math.sqrt(max(1, math.prod(inputs)))

    def draw(shape: tuple[int, ...]) -> jax.Array:
        return jax.random.uniform(key, shape, target.dtype, -bound, bound)

    return _random_a(w, target, draw, key)


def normal(stddev: float = 1.0) -> Initializer:
    r"""a ~ N(0, stddev^2), b = 0; for an embedding a = 0, b ~ N(0, 1).

    Args:
      stddev: the standard deviation of a.

    >>> w, a, b = normal(0.02)(jax.random.key(0), jnp.ones((8, 4)),
    ...                        Target(path="kernel", roles="io", rank=2, scale=1.0))
    >>> a.shape
    (8, 2)

    References:
      Hu et al. 2021, LoRA, arXiv 2106.09685, section 4.1.
    """

    def init(key: jax.Array, w: Any, target: Target) -> tuple[Any, jax.Array, jax.Array]:
        def draw(shape: tuple[int, ...]) -> jax.Array:
            return stddev * jax.random.normal(key, shape, target.dtype)

        return _random_a(w, target, draw, key)

    return init
