"""Initializers that draw: they need neither data nor the weight's values."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxlora import _paths
from jaxlora._errors import TargetError
from jaxlora._matrix import split_shape
from jaxlora._target import HIGHEST, Initializer, Target, factor_shapes, factors


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


def gaussian(key: jax.Array, w: Any, target: Target) -> tuple[Any, jax.Array, jax.Array]:
    r"""a ~ N(0, 1/R^2), b = 0: PEFT's "gaussian". For an embedding a = 0, b ~ N(0, 1).

    The paper draws a from a Gaussian too, and names no standard deviation; 1/R is PEFT's.

    >>> w, a, b = gaussian(jax.random.key(0), jnp.ones((8, 4)),
    ...                    Target(path="kernel", roles="io", rank=2, scale=1.0))
    >>> a.shape, float(jnp.max(jnp.abs(b)))
    ((8, 2), 0.0)

    References:
      Hu et al. 2021, LoRA, arXiv 2106.09685, section 4.1.
    """
    return normal(1 / target.rank)(key, w, target)


def orthogonal(key: jax.Array, w: Any, target: Target) -> tuple[Any, jax.Array, jax.Array]:
    r"""a and b both random, in orthogonal halves of the rank's space: a b = 0, w stays.

    With Q a random orthogonal matrix (R, R), and Q_0, Q_1 its even and its odd rows,

        a = N_a Q_0 / 10,    b = Q_1^T N_b / 10,    N_a (I, R/2), N_b (R/2, O) ~ N(0, 1),

    so that a b = N_a (Q_0 Q_1^T) N_b / 100 = 0 up to rounding in the dtype of a and b: keep that
    at float32. Unlike with b = 0, both train from the first step. The numbers are PEFT's. (Any
    kind of weight will do; PEFT's is for linear layers.)

    Raises:
      TargetError: the rank is odd.

    >>> w, a, b = orthogonal(jax.random.key(0), jnp.ones((8, 4)),
    ...                      Target(path="kernel", roles="io", rank=2, scale=1.0))
    >>> bool(jnp.max(jnp.abs(a @ b)) < 1e-7), bool(jnp.min(jnp.abs(b)) > 0)
    (True, True)

    References:
      Datta Nimmaturi, Rethinking LoRA initialisation,
      https://datta0.github.io/posts/rethink-lora-init, which is PEFT's source.
    """
    if target.rank % 2:
        raise TargetError(
            f"{target.path}: got rank {target.rank}, expected an even one, since `orthogonal` "
            "gives one half of the rank to a and one to b. "
            f"LoraConfig(rank_pattern={{{_paths.short(target.path)!r}: {target.rank + 1}}})."
        )
    stacked, inputs, outputs = split_shape(w.shape, target.roles)
    n_in, n_out, half = math.prod(inputs), math.prod(outputs), target.rank // 2
    for_q, for_a, for_b = jax.random.split(key, 3)
    with jax.default_matmul_precision("highest"):
        q, _ = jnp.linalg.qr(jax.random.normal(for_q, (*stacked, target.rank, target.rank)))
    even, odd = q[..., 0::2, :], q[..., 1::2, :]
    noise_a = jax.random.normal(for_a, (*stacked, n_in, half))
    noise_b = jax.random.normal(for_b, (*stacked, half, n_out))
    a = jnp.matmul(noise_a, even, precision=HIGHEST) / 10
    b = jnp.matmul(jnp.matrix_transpose(odd), noise_b, precision=HIGHEST) / 10
    return w, *factors(w, a, b, target)
