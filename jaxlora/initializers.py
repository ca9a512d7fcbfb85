"""How an adapter starts: functions that fill a and b, and may move the base."""

from __future__ import annotations

import math
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from jaxlora._weight import split_shape


class Initializer(Protocol):
    """Fills the factors of one weight.

    Args:
      key: a key of this weight's own.
      w: the base weight.
      roles: the role of each of its dimensions.
      rank: R.
      scale: alpha / rank, or alpha / sqrt(rank).
      dtype: of a and b.

    Returns:
      (w, a, b): the base, moved or not; a (stacked..., input..., R); b (stacked..., R, output...);
      such that w + scale * a b is the weight to start from.
    """

    def __call__(
        self, key: jax.Array, w: Any, *, roles: str, rank: int, scale: float, dtype: Any
    ) -> tuple[Any, jax.Array, jax.Array]: ...


def _zero_b(w: Any, a: jax.Array, roles: str, rank: int) -> tuple[Any, jax.Array, jax.Array]:
    stacked, _, outputs = split_shape(w.shape, roles)
    return w, a, jnp.zeros((*stacked, rank, *outputs), a.dtype)


def kaiming_uniform(
    key: jax.Array, w: Any, *, roles: str, rank: int, scale: float, dtype: Any
) -> tuple[Any, jax.Array, jax.Array]:
    r"""a ~ U(-1/sqrt(n), 1/sqrt(n)), n the number of inputs; b = 0. The default, and PEFT's.

    >>> w, a, b = kaiming_uniform(jax.random.key(0), jnp.ones((100, 3)), roles="io", rank=2,
    ...                           scale=1.0, dtype=jnp.float32)
    >>> a.shape, b.shape, bool(jnp.max(jnp.abs(a)) <= 0.1), float(jnp.max(jnp.abs(b)))
    ((100, 2), (2, 3), True, 0.0)

    References:
      He et al. 2015, Delving Deep into Rectifiers, arXiv 1502.01852, section 2.2, with PyTorch's
      gain for a = sqrt(5), which is what torch.nn.Linear and PEFT's LoRA layers use.
    """
    stacked, inputs, _ = split_shape(w.shape, roles)
    bound = 1 / math.sqrt(max(1, math.prod(inputs)))
    a = jax.random.uniform(key, (*stacked, *inputs, rank), dtype, -bound, bound)
    return _zero_b(w, a, roles, rank)


def normal(stddev: float = 1.0) -> Initializer:
    r"""a ~ N(0, stddev^2), b = 0.

    Args:
      stddev: the standard deviation of a.

    >>> w, a, b = normal(0.02)(jax.random.key(0), jnp.ones((8, 4)), roles="io", rank=2, scale=1.0,
    ...                        dtype=jnp.float32)
    >>> a.shape
    (8, 2)

    References:
      Hu et al. 2021, LoRA, arXiv 2106.09685, section 4.1.
    """

    def init(
        key: jax.Array, w: Any, *, roles: str, rank: int, scale: float, dtype: Any
    ) -> tuple[Any, jax.Array, jax.Array]:
        stacked, inputs, _ = split_shape(w.shape, roles)
        a = stddev * jax.random.normal(key, (*stacked, *inputs, rank), dtype)
        return _zero_b(w, a, roles, rank)

    return init
