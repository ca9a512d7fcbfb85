"""Dropout of an adapter's input: a key that travels with the weight, and where it is used."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxlora import _compat
from jaxlora._moves import RANK, Labelled

_ODD = 0x9E3779B1  # 2^32 over the golden ratio: spreads small integers over all words


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True, eq=False)
class Dropout:
    """What an adapter draws its masks from.

    The key is one for each index of W's stacked dims and is moved as the factors are, so that a
    layer of a stack has its own. The position grows with each equation that the weight goes into,
    and with each step of a loop: two uses of a weight differ, and a repeated run does not.

    Attributes:
      key: the words of the keys, (stacked..., words), the last axis labelled RANK.
      position: a uint32; where a stack of weights was made, one for each.
      rate: which part is dropped, in (0, 1).
      impl: the name of the random number generator.
    """

    key: Labelled
    position: Labelled
    rate: float
    impl: Any

    def tree_flatten(self):
        return (self.key, self.position), (self.rate, self.impl)

    @classmethod
    def tree_unflatten(cls, aux, children):
        return cls(*children, *aux)

    @classmethod
    def of(cls, key: jax.Array, rate: float, dims: tuple[int, ...]) -> Dropout:
        """Dropout from keys that lie along these dims of W."""
        words = Labelled(jax.random.key_data(key), (*dims, RANK))
        return cls(words, Labelled(np.uint32(0), ()), rate, jax.random.key_impl(key))

    def each(self, f: Callable[[Labelled], Labelled]) -> Dropout:
        return dataclasses.replace(self, key=f(self.key), position=f(self.position))

    def at(self, index: Any) -> Dropout:
        """The same, one equation or one step further in."""
        position = self.position.array
        if isinstance(position, np.generic | np.ndarray) and isinstance(index, int):
            words = np.asarray(position, np.uint64) * np.uint64(_ODD) + np.uint64(index + 1)
            mixed: Any = (words & np.uint64(0xFFFFFFFF)).astype(np.uint32)
        else:
            mixed = jnp.uint32(position) * jnp.uint32(_ODD) + jnp.uint32(index) + jnp.uint32(1)
        return dataclasses.replace(self, position=Labelled(mixed, self.position.dims))

    def drop(self, x: jax.Array) -> jax.Array:
        """x * keep / (1 - rate), keep ~ Bernoulli(1 - rate), elementwise.

        Where x has W's stacked dims too (experts in one matmul), one mask covers all of it.
        """
        if 0 in self.key.array.shape or x.size == 0:
            return x
        # Of all keys: where a stack was padded, in a join of stacks say, there are some of zeros.
        words = jnp.sum(self.key.array, axis=range(self.key.array.ndim - 1), dtype=np.uint32)
        position = self.position.array[(0,) * self.position.array.ndim]
        key = jax.random.fold_in(jax.random.wrap_key_data(words, impl=self.impl), position)
        for axis in sorted(_compat.varying(x)):  # each device has rows of its own
            key = jax.random.fold_in(key, lax.axis_index(axis))
        keep = jax.random.bernoulli(key, 1 - self.rate, x.shape)
        keep = _compat.placed_like(keep, x)
        return jnp.where(keep, x / (1 - self.rate), jnp.zeros_like(x)).astype(x.dtype)
