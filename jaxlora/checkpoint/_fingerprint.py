"""By what a saved adapter knows its base again: each leaf's form, and a checksum of a sample."""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlora import _compat, _paths
from jaxlora._errors import TargetError
from jaxlora._quantized import is_quantized
from jaxlora._quantized_array import QuantizedArray

SAMPLES = 64
"""So many elements of an array are looked at, evenly spaced, the first and the last among them."""


class Leaf(NamedTuple):
    """What is kept of one leaf.

    Attributes:
      kind: the dtype of an array, how a weight is quantized, or the type of anything else.
      shape: None if it is no array.
      checksum: CRC-32 of the sampled elements' bits; of what is no array, of its text. Empty for
        functions and objects whose text is an address, which are not compared.
    """

    kind: str
    shape: tuple[int, ...] | None
    checksum: str


class Difference(NamedTuple):
    """Where two bases differ: in `what`, one of "path", "shape", "kind", "values"."""

    path: str
    what: str
    text: str


def fingerprint(params: Any) -> dict[str, Leaf]:
    """{path: `Leaf`} of a tree. The same for any sharding and number of devices.

    Every process of a `jax.distributed` program has to call it, with its part of the params.

    Raises:
      TargetError: a leaf has no values (it is traced, or abstract), or two have the same path.

    >>> fingerprint({"kernel": jnp.ones((3, 4)), "name": "mlp"})["kernel"]
    Leaf(kind='float32', shape=(3, 4), checksum='20b2143b')
    """
    pairs, _ = _paths.flatten_with_paths(params)
    found = {path: _leaf(path, leaf) for path, leaf in pairs}
    if len(found) < len(pairs):
        raise TargetError("params: two leaves have the same path. Rename one of them.")
    return found


def differences(saved: Mapping[str, Leaf], found: Mapping[str, Leaf]) -> list[Difference]:
    """Where a base differs from the one that an adapter was saved with; by path, sorted."""
    odd = []
    for path in sorted(saved.keys() | found.keys()):
        if path not in found:
            odd.append(Difference(path, "path", "not in these params"))
        elif path not in saved:
            odd.append(Difference(path, "path", "not in the adapter's base"))
        else:
            mine, theirs = found[path], saved[path]
            for what in ("shape", "kind"):
                got, expected = getattr(mine, what), getattr(theirs, what)
                if got != expected:
                    odd.append(Difference(path, what, f"got {got}, expected {expected}"))
                    break
            else:
                if mine.checksum != theirs.checksum:
                    odd.append(Difference(path, "values", "other values"))
    return odd


def _leaf(path: str, leaf: Any) -> Leaf:
    if isinstance(leaf, jax.core.Tracer | jax.ShapeDtypeStruct) or any(
        isinstance(x, jax.core.Tracer | jax.ShapeDtypeStruct) for x in jax.tree.leaves(leaf)
    ):
        raise TargetError(
            f"{path}: got an array without values ({type(leaf).__name__}), expected one with data. "
            "Call jaxlora.checkpoint outside of jax.jit and jax.eval_shape."
        )
    if is_quantized(leaf):
        parts = [_sample(x) for x in jax.tree.leaves(leaf)]
        return Leaf(_quantized_kind(leaf), tuple(leaf.shape), checksum_of(*parts))
    if hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
        return Leaf(str(leaf.dtype), tuple(leaf.shape), checksum_of(_sample(leaf)))
    if callable(leaf):
        return Leaf("function", None, "")
    text = repr(leaf)
    known = "" if " at 0x" in text else f"{zlib.crc32(text.encode()):08x}"
    return Leaf(type(leaf).__name__, None, known)


def _quantized_kind(w: Any) -> str:
    if not isinstance(w, QuantizedArray):
        parts = ", ".join(f"{x.dtype}{list(x.shape)}" for x in jax.tree.leaves(w))
        return f"{type(w).__name__} of {jnp.dtype(w.dtype).name} ({parts})"
    along = "" if w.along is None else f", along {list(w.along)}"
    blocks = f"by {w.channels}" if w.block_size is None else f"blocks of {w.block_size}"
    double = "" if w.absmax_scale is None else ", double"
    return f"{w.kind} of {jnp.dtype(w.dtype).name}, {blocks}{along}{double}"


def checksum_of(*samples: np.ndarray) -> str:
    """Of the bits of such samples."""
    crc = 0
    for sample in samples:
        crc = zlib.crc32(np.ascontiguousarray(sample).tobytes(), crc)
    return f"{crc:08x}"


def sample_places(shape: tuple[int, ...]) -> tuple[np.ndarray, ...]:
    """The indices, along each dim, of the elements that are looked at."""
    size = math.prod(shape)
    flat = np.linspace(0, size - 1, min(size, SAMPLES)).astype(np.int64)
    return tuple(p.astype(np.int32) for p in np.unravel_index(flat, shape)) if shape else ()


def _sample(x: Any) -> np.ndarray:
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    places = sample_places(x.shape)
    return np.asarray(x)[places] if _is_near(x) else np.asarray(_gathered(x, places))


def _is_near(x: Any) -> bool:
    """Whether an array is in this host's memory."""
    if not isinstance(x, jax.Array):
        return True
    kind = x.sharding.memory_kind or ""
    on_host = "host" in kind or all(d.platform == "cpu" for d in x.devices())
    return x.is_fully_addressable and on_host


def _gathered(x: jax.Array, places: tuple[np.ndarray, ...]) -> jax.Array:
    """x[places], of which every process has a copy; no more of x goes anywhere."""
    sharding = x.sharding
    if not isinstance(sharding, NamedSharding):
        return _take(x, places)
    return _replicating(sharding.mesh, any(_compat.explicit_spec(x)))(x, places)


@jax.jit
def _take(x: jax.Array, places: tuple[jax.Array, ...]) -> jax.Array:
    return x[places]


@functools.cache
def _replicating(mesh: Any, explicit: bool) -> Any:
    """`_take` of arrays on a mesh."""
    everywhere = NamedSharding(mesh, P())
    if explicit:
        return jax.jit(jax.sharding.auto_axes(_take, out_sharding=everywhere))
    return jax.jit(_take, out_shardings=everywhere)
