"""An array in 4 or 8 bits: codes, and for each block of them the value that the largest means."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlora import _compat
from jaxlora._codebooks import FP4, NF4, dynamic_code, middles
from jaxlora._errors import TargetError
from jaxlora._pytrees import register, register_export

KINDS = ("nf4", "fp4", "int8")
TABLES = {"nf4": NF4, "fp4": FP4}
DTYPES = ("float16", "bfloat16", "float32")

GROUP = 256
"""With double quantisation: how many blocks share one scale."""

_LARGEST = float(np.finfo(np.float32).max)
_SMALLEST_NORMAL = float(np.finfo(np.float32).tiny)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class QuantizedArray:
    r"""An array W in 4 or 8 bits: element i is table[codes_i] * absmax_(i // block_size).

    Blocks run over the elements of one stacked element (layer, expert) in row-major order. With
    double quantisation, absmax_k is D[absmax_k] * absmax_scale_(k // 256) + absmax_offset, where D
    is the signed `dynamic_code`. In int8, table[c] is c / 127.

    If whole blocks fill a row of W, a row of W is a row of the codes, and W's leading dims are
    theirs: slicing, sharding or gathering rows of codes and absmax is doing it to W's. Otherwise
    the inner dims are flat, and the last block may be filled up. Either way the bytes are those of
    bitsandbytes.

    Nothing dequantises silently: this is no array for `jnp`. A stacked one may be sliced,
    vmapped or scanned over its leading dims, as a pytree.

    Attributes:
      codes: uint8, two a byte, element 2k in the high half: (stacked..., inner...) with the last
        dim halved, or (stacked..., ceil(n / 2)). int8: int8, one a byte.
      absmax: float32, the largest absolute value of each block: (stacked..., inner...) with the
        last dim divided by block_size, or (stacked..., blocks); without a block size (stacked...,
        the inner dims that `channels` names). With double quantisation, uint8 codes of it.
      absmax_scale: float32, (stacked..., groups): for each 256 blocks, the largest absolute
        difference from the offset. None without double quantisation.
      absmax_offset: float32, (stacked...): the mean of the absmaxes. None without.
      kind: "nf4", "fp4" or "int8".
      inner: the shape without its stacked dims.
      dtype: of W, and of what `dequantize` gives.
      block_size: elements that share an absmax; None: those of a channel do (int8 only).
      channels: the inner dims that have an absmax for each index, where there is no block size.

    References:
      Dettmers et al. 2023, QLoRA, arXiv 2305.14314, section 3.
    """

    codes: Any
    absmax: Any
    absmax_scale: Any = None
    absmax_offset: Any = None
    kind: str
    inner: tuple[int, ...]
    dtype: Any
    block_size: int | None
    channels: tuple[int, ...] | None = None

    @property
    def is_rowwise(self) -> bool:
        """Whether the codes have W's dims; else the inner ones are flat."""
        return is_rowwise(self.inner, self.block_size)

    @property
    def stacked(self) -> int:
        """The number of leading stacked dims."""
        return len(self.codes.shape) - (len(self.inner) if self.is_rowwise else 1)

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.codes.shape[: self.stacked], *self.inner)

    @property
    def ndim(self) -> int:
        return self.stacked + len(self.inner)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all leaves."""
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self))

    def dequantize(self, dtype: Any = None) -> jax.Array:
        """The array: code times absmax in float32, rounded once to `dtype` (default: its own)."""
        dtype = self.dtype if dtype is None else dtype
        absmax = absmax_of(self)
        if self.channels is not None:
            absmax = over_channels(absmax, self.inner, self.channels)
        values = decode(self.kind, self.codes, absmax, dtype, self.block_size)
        if not self.is_rowwise:
            values = values[..., : math.prod(self.inner)]
        return values.reshape(self.shape)

    def __repr__(self) -> str:
        shape = getattr(self.codes, "shape", None)
        dims = self.inner if shape is None else self.shape
        blocks = "by channel" if self.block_size is None else f"blocks of {self.block_size}"
        double = "" if self.absmax_scale is None else ", double"
        return f"QuantizedArray({self.kind}, {dims} {jnp.dtype(self.dtype).name}, {blocks}{double})"


_STATIC = ("kind", "inner", "dtype", "block_size", "channels")
register(QuantizedArray, ("codes", "absmax", "absmax_scale", "absmax_offset"), _STATIC)


def _to_json(aux: tuple) -> list:
    kind, inner, dtype, block_size, channels = aux
    return [kind, inner, jnp.dtype(dtype).name, block_size, channels]


def _from_json(found: list) -> tuple:
    kind, inner, dtype, block_size, channels = found
    channels = None if channels is None else tuple(channels)
    return kind, tuple(inner), jnp.dtype(dtype), block_size, channels


register_export(QuantizedArray, _to_json, _from_json)


def is_rowwise(inner: tuple[int, ...], block_size: int | None) -> bool:
    """Whether whole blocks fill a row, so that codes keep the dims of the array."""
    return block_size is None or (len(inner) > 0 and inner[-1] % block_size == 0)


# --------------------------------------------------------------------------------------------------
# To codes


def quantize_array(
    w: Any,
    kind: str = "nf4",
    *,
    block_size: int | None = 64,
    double_quant: bool = True,
    stacked: int = 0,
    channels: Sequence[int] | None = None,
) -> QuantizedArray:
    inner = tuple(w.shape[stacked:])
    dtype = jnp.dtype(w.dtype)
    codes, absmax, scale, offset = _encode(w, kind, block_size, double_quant, stacked, channels)
    return QuantizedArray(
        codes=codes,
        absmax=absmax,
        absmax_scale=scale,
        absmax_offset=offset,
        kind=kind,
        inner=inner,
        dtype=dtype,
        block_size=block_size,
        channels=channels,
    )


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4, 5), inline=_compat.INLINE)
def _encode(
    w: jax.Array,
    kind: str,
    block_size: int,
    double_quant: bool,
    stacked: int,
    channels: tuple[int, ...] | None,
) -> tuple[Any, ...]:
    """The four leaves. Jitted: the float32 of a whole matrix need not exist."""
    blocks, partial = _blocks(w, stacked, block_size)
    absmax = jnp.max(jnp.abs(blocks), axis=-1)
    codes = nearest(_relative(blocks, absmax, partial), TABLES[kind])
    codes = flattened(codes, codes.ndim - 2)
    if partial:
        codes = codes[..., : -(-math.prod(w.shape[stacked:]) // 2) * 2]
    codes = (codes[..., ::2] << 4) | codes[..., 1::2]
    return (codes, *(_double(absmax, stacked) if double_quant else (absmax, None, None)))


def _blocks(w: jax.Array, stacked: int, block_size: int) -> tuple[jax.Array, bool]:
    """w in float32, (..., blocks, block_size), and whether the last block was filled up by zeros.

    The dims before are all of w's but the last, or only the stacked ones.
    """
    inner = w.shape[stacked:]
    w = w.astype(jnp.float32)
    if is_rowwise(inner, block_size):
        return w.reshape(*w.shape[:-1], inner[-1] // block_size, block_size), False
    return _filled(flattened(w, stacked), block_size)


def flattened(x: jax.Array, keep: int) -> jax.Array:
    """All dims but the first `keep` as one. (-1 would not do: x may be empty.)"""
    return x.reshape(*x.shape[:keep], math.prod(x.shape[keep:]))


def _filled(x: jax.Array, block_size: int) -> tuple[jax.Array, bool]:
    missing = -x.shape[-1] % block_size
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)])
    return x.reshape(*x.shape[:-1], x.shape[-1] // block_size, block_size), missing > 0


def _relative(blocks: jax.Array, absmax: jax.Array, partial: bool) -> jax.Array:
    """Elements over their block's absmax, from -1 to 1; zero where all is zero (or subnormal).

    Rounded as bitsandbytes does on a CPU: times the inverse, but over it in a partial last block.
    """
    absmax = jnp.where(absmax < _SMALLEST_NORMAL, jnp.inf, absmax)[..., None]
    # The inverse of the largest numbers would be subnormal, and flushed to zero.
    shrunk = jnp.where((absmax > 2.0**100) & (absmax < jnp.inf), jnp.float32(2.0**-100), 1)
    relative = (blocks * shrunk) * (1 / (absmax * shrunk))
    if partial:
        last = jnp.arange(blocks.shape[-2])[:, None] == blocks.shape[-2] - 1
        relative = jnp.where(last, blocks / absmax, relative)
    return relative


def nearest(x: jax.Array, table: np.ndarray) -> jax.Array:
    """The codes, uint8, of the entries of `table` nearest to x; of the lower one in a tie."""
    order = np.argsort(table, kind="stable")
    index = jnp.zeros(x.shape, jnp.uint8)
    for middle in middles(table[order]):
        index += (x > middle).astype(jnp.uint8)
    return index if (order[1:] > order[:-1]).all() else lookup(index, order.astype(np.uint8))


def _double(absmax: jax.Array, stacked: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Codes of absmax, their scales by groups, and the offset."""
    flat = flattened(absmax, stacked)
    offset = _sum(flat) / max(flat.shape[-1], 1)
    groups, partial = _filled(flat - offset[..., None], GROUP)
    scale = jnp.max(jnp.abs(groups), axis=-1)
    bounds = middles(dynamic_code(signed=True))
    codes = jnp.searchsorted(bounds, _relative(groups, scale, partial)).astype(jnp.uint8)
    codes = flattened(codes, stacked)[..., : flat.shape[-1]]
    return codes.reshape(absmax.shape), scale, offset


def _sum(x: jax.Array) -> jax.Array:
    """The sum over the last dim in one order, that of a balanced tree, on every device."""
    if x.shape[-1] == 0:
        return jnp.zeros(x.shape[:-1], x.dtype)
    while x.shape[-1] > 1:
        half = -(-x.shape[-1] // 2)
        upper = x[..., half:]
        x = x[..., :half] + jnp.pad(upper, [(0, 0)] * (x.ndim - 1) + [(0, half - upper.shape[-1])])
    return x[..., 0]


# --------------------------------------------------------------------------------------------------
# From codes


def absmax_of(q: QuantizedArray) -> jax.Array:
    """The absmaxes in float32, in the shape of `q.absmax`."""
    if q.absmax_scale is None:
        return q.absmax
    stacked = q.absmax_offset.ndim
    flat = flattened(q.absmax, stacked)
    scale = spread(q.absmax_scale, GROUP, flat.shape[-1])
    return _undouble(flat, scale, q.absmax_offset[..., None]).reshape(q.absmax.shape)


def _undouble(codes: jax.Array, scale: jax.Array, offset: jax.Array) -> jax.Array:
    differences = jnp.asarray(dynamic_code(signed=True))[codes] * scale
    # Bounds that nothing reaches: without them, XLA would fuse multiply and add, and round once.
    return jnp.clip(differences, -_LARGEST, _LARGEST) + offset


def decode(
    kind: str, codes: jax.Array, absmax: jax.Array, dtype: Any, block_size: int | None
) -> jax.Array:
    """Codes times absmax, in float32, rounded once.

    Args:
      kind: "nf4", "fp4" or "int8".
      codes: (..., bytes); any rows of the codes.
      absmax: float32, (..., blocks), those rows' absmaxes; what broadcasts against the codes where
        there is no block size.
      dtype: of the result.
      block_size: elements for each absmax.

    Returns:
      (..., elements), two for each byte in 4 bits.
    """
    if kind == "int8":
        values = codes.astype(jnp.float32)
    else:
        values = lookup(unpack(codes), TABLES[kind])
    if block_size is not None:
        absmax = spread(absmax, block_size, values.shape[-1])
    return _product(kind, values, absmax, dtype)


def decode_at(q: QuantizedArray, indices: jax.Array, dtype: Any = None) -> jax.Array:
    """The elements at some indices of the flattened array, and no others.

    Args:
      q: in blocks, without stacked dims.
      indices: int32, any shape; clipped to the valid ones.
      dtype: of the result; default: that of q.

    Returns:
      An array of the shape of the indices.
    """
    take = lambda x, at: x.reshape(-1).at[at].get(mode="clip")
    indices = jnp.clip(indices, 0, max(math.prod(q.inner) - 1, 0))
    block = indices // q.block_size
    absmax = take(q.absmax, block)
    if q.absmax_scale is not None:
        absmax = _undouble(absmax, take(q.absmax_scale, block // GROUP), q.absmax_offset)
    if q.kind == "int8":
        values = take(q.codes, indices).astype(jnp.float32)
    else:
        byte = take(q.codes, indices // 2)
        values = lookup(jnp.where(indices % 2 == 0, byte >> 4, byte & 15), TABLES[q.kind])
    return _product(q.kind, values, absmax, q.dtype if dtype is None else dtype)


def _product(kind: str, values: jax.Array, absmax: jax.Array, dtype: Any) -> jax.Array:
    product = values * absmax
    return (product * np.float32(1 / 127) if kind == "int8" else product).astype(dtype)


def unpack(codes: jax.Array) -> jax.Array:
    """(..., bytes) to (..., elements): the high half of each byte, then the low one."""
    halves = jnp.stack([codes >> 4, codes & 15], axis=-1)
    return halves.reshape(*codes.shape[:-1], 2 * codes.shape[-1])


def spread(absmax: jax.Array, block_size: int, size: int) -> jax.Array:
    """(..., blocks) to (..., size): to each element its block's."""
    return jnp.repeat(absmax, block_size, axis=-1)[..., :size]


def over_channels(
    absmax: jax.Array, inner: tuple[int, ...], channels: tuple[int, ...]
) -> jax.Array:
    """The absmax of channels, (stacked..., channels...), so that it broadcasts against the codes."""
    stacked = absmax.shape[: absmax.ndim - len(channels)]
    return absmax.reshape(*stacked, *(n if i in channels else 1 for i, n in enumerate(inner)))


def lookup(codes: jax.Array, table: np.ndarray) -> jax.Array:
    """table[codes] of 16 entries, without a gather: each bit of the code halves what is left."""
    left = [jnp.asarray(entry) for entry in table]
    for bit in range(4):
        is_odd = (codes & (1 << bit)) != 0
        left = [jnp.where(is_odd, *pair[::-1]) for pair in zip(left[::2], left[1::2], strict=True)]
    return left[0]
