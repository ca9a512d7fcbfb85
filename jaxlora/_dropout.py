"""Dropout of an adapter's input: a key that travels with the weight, and where it is used."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import JaxprEqn

from jaxlora import _compat
from jaxlora._moves import RANK, Labelled

_ODD = 0x9E3779B1  # 2^32 over the golden ratio: spreads small integers over all words


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True, eq=False)
class Dropout:
    """What an adapter draws its masks from.

    The key is one for each index of W's stacked dims and is moved as the factors are, so that a
    layer of a stack has its own. The position is where the weight is used: two uses differ, and a
    repeated run does not. It counts contractions and loops, through `jit` and `remat`, so that
    neither these nor other equations around a layer change its masks.

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

    def after(self, uses: int) -> Dropout:
        """The same, that many uses on."""
        return self._moved(1, uses)

    def into(self, step: Any) -> Dropout:
        """The same, within that step of a loop, or that branch."""
        return self._moved(_ODD, step + 1)

    def _moved(self, factor: int, more: Any) -> Dropout:
        position = self.position.array
        if isinstance(position, np.generic | np.ndarray) and isinstance(more, int):
            words = np.asarray(position, np.uint64) * np.uint64(factor) + np.uint64(more)
            moved: Any = (words & np.uint64(0xFFFFFFFF)).astype(np.uint32)
        else:
            moved = jnp.uint32(position) * jnp.uint32(factor) + jnp.asarray(more, jnp.uint32)
        return dataclasses.replace(self, position=Labelled(moved, self.position.dims))

    def kept(self, x: jax.Array) -> jax.Array:
        """x * keep, keep ~ Bernoulli(1 - rate), elementwise: still to be divided by 1 - rate.

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
        # In float32 also where float64 is on: the same masks.
        keep = jax.random.bernoulli(key, jnp.float32(1 - self.rate), x.shape)
        return jnp.where(_compat.placed_like(keep, x), x, jnp.zeros_like(x))

    def grown(self, x: jax.Array) -> jax.Array:
        """x / (1 - rate): what was made of the elements that are left, for all of them."""
        return (x / (1 - self.rate)).astype(x.dtype)


_USES = {"dot_general", "conv_general_dilated", "ragged_dot_general"}
_USES |= {"scan", "while", "cond", "shard_map"}
_WRAPPERS = {"jit", "pjit", "closed_call", "core_call", "core_closed_call", "call"}
_WRAPPERS |= {"remat", "remat2", "checkpoint"}


def uses(eqn: JaxprEqn) -> int:
    """How many positions an equation takes: those of its inside, if it only wraps that."""
    name = eqn.primitive.name
    if name in _WRAPPERS:
        found = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
        return sum(map(uses, _compat.split_jaxpr(found)[0].eqns))
    return int(name in _USES)
