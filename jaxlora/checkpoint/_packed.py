"""Many small arrays in few large ones: on disk, each array costs half a kilobyte by itself."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

LIMIT = 2**28
"""Bytes after which another array is begun."""


class Place(NamedTuple):
    """Where an array lies: elements offset, offset + 1, ... of the flat packed array `name`."""

    name: str
    offset: int
    shape: tuple[int, ...]


def pack(arrays: Sequence[Any]) -> tuple[dict[str, Any], list[Place]]:
    """Joins arrays end to end, those of one dtype; those spread over processes are stacked.

    Args:
      arrays: of any shapes; NumPy's or JAX's. Under `jax.distributed`, every process has to call
        it, with its parts of the same arrays.

    Returns:
      ({name: array}, the place of each of `arrays`). What all processes have is a flat NumPy array;
      what is sharded over several stays so, (n, *shape), n the number of alike ones.

    >>> packed, places = pack([np.ones((2, 3)), np.zeros(4)])
    >>> packed["float64_0"].shape, places[1]
    ((10,), Place(name='float64_0', offset=6, shape=(4,)))
    """
    groups: dict[Any, list[int]] = {}
    filled: dict[str, int] = {}
    for i, x in enumerate(arrays):
        if isinstance(x, jax.Array) and x.is_fully_addressable:
            x.copy_to_host_async()
        if is_whole(x):
            # A new group once the one of this dtype is full.
            filled[str(x.dtype)] = filled.get(str(x.dtype), 0) + math.prod(x.shape)
            part = filled[str(x.dtype)] * x.dtype.itemsize // LIMIT
            groups.setdefault((str(x.dtype), part), []).append(i)
        else:
            groups.setdefault((str(x.dtype), tuple(x.shape), x.sharding), []).append(i)
    packed: dict[str, Any] = {}
    places: list[Any] = [None] * len(arrays)
    count: dict[str, int] = {}
    for (dtype, *_), members in groups.items():
        name = f"{dtype}_{count.get(dtype, 0)}"
        count[dtype] = count.get(dtype, 0) + 1
        offset = 0
        for i in members:
            places[i] = Place(name, offset, tuple(arrays[i].shape))
            offset += math.prod(arrays[i].shape)
        if offset:
            packed[name] = _joined([arrays[i] for i in members])
    return packed, places


def is_whole(x: Any) -> bool:
    """Whether this process has all of an array."""
    return not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated


def _joined(arrays: list[Any]) -> Any:
    if is_whole(arrays[0]):
        return np.concatenate([np.asarray(x).reshape(-1) for x in arrays])
    sharding = arrays[0].sharding
    if isinstance(sharding, NamedSharding):
        return _stacking(NamedSharding(sharding.mesh, P(None, *sharding.spec)))(arrays)
    return _stacking(None)(arrays)


@functools.cache
def _stacking(sharding: NamedSharding | None) -> Callable[[list[jax.Array]], jax.Array]:
    return jax.jit(jnp.stack, out_shardings=sharding)


def unpack(packed: Mapping[str, np.ndarray], dtype: str, place: Place) -> np.ndarray:
    """One array, a copy.

    >>> packed, places = pack([np.ones((2, 3)), np.zeros(4)])
    >>> unpack(packed, "float64", places[1])
    array([0., 0., 0., 0.])
    """
    size = math.prod(place.shape)
    if not size:  # it is in no packed array
        return np.empty(place.shape, jnp.dtype(dtype))
    flat = packed[place.name].reshape(-1)
    return flat[place.offset : place.offset + size].reshape(place.shape).copy()


def checksum(x: Any) -> str:
    """A checksum of an array's bits, in hex digits: the same however it is sharded.

    With w_i the i-th word of it, in row-major order, the sum of w_i * (2 i + 1) modulo 2^32. A word
    is an element, or 32 bits of one. Any change of one word changes it.

    >>> checksum(np.arange(3, dtype=np.float32)) == checksum(jnp.arange(3, dtype=jnp.float32))
    True
    """
    if not is_whole(x):
        return f"{int(_sum_on_device(x)):08x}"
    flat = np.ascontiguousarray(np.asarray(x)).reshape(-1)
    words = flat.view(f"u{min(flat.dtype.itemsize, 4)}")
    # In parts, so that no second array of the size is there.
    step = 2**20
    total = sum(_sum(words[i : i + step], i) for i in range(0, words.size, step))
    return f"{total % 2**32:08x}"


def _sum(words: np.ndarray, start: int) -> int:
    index = np.arange(start, start + words.size, dtype=np.uint64).astype(np.uint32)
    weights = 2 * index + np.uint32(1)
    return int(np.sum(words.astype(np.uint32) * weights, dtype=np.uint32))


@jax.jit
def _sum_on_device(x: jax.Array) -> jax.Array:
    width = x.dtype.itemsize
    word = {1: jnp.uint8, 2: jnp.uint16}.get(width, jnp.uint32)
    words = jax.lax.bitcast_convert_type(x, word).astype(jnp.uint32)
    index = jnp.zeros(words.shape, jnp.uint32)
    for d, n in enumerate(words.shape):
        count = jax.lax.broadcasted_iota(jnp.uint32, words.shape, d)
        index = index * jnp.uint32(n) + count
    return jnp.sum(words * (2 * index + 1), dtype=jnp.uint32)
