"""An array in 4 or 8 bits: codes, and for each block of them the value that the largest means."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlora import _compat
from jaxlora._codebooks import FP4, NF4, dynamic_code, middles
from jaxlora._errors import TargetError
from jaxlora._not_an_array import NotAnArray
from jaxlora._pytrees import register, register_export

KINDS = ("nf4", "fp4", "int8")
TABLES: dict[str, np.ndarray] = {"nf4": NF4, "fp4": FP4}
DTYPES = ("float16", "bfloat16", "float32")

GROUP = 256
"""With double quantisation: how many blocks share one scale."""

_HUGE = 2.0**100
_LARGEST = float(np.finfo(np.float32).max)
_SMALLEST_NORMAL = float(np.finfo(np.float32).tiny)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class QuantizedArray(NotAnArray):
    r"""An array W in 4 or 8 bits: element i is table[codes_i] * absmax_(i // block_size).

    Blocks run over the elements of one stacked element (layer, expert) in row-major order. With
    double quantisation, absmax_k is D[absmax_k] * absmax_scale_(k // 256) + absmax_offset, where D
    is the signed `dynamic_code`. In int8, table[c] is c / 127.

    If whole blocks fill a row of W, a row of W is a row of the codes, and W's leading dims are
    theirs: slicing, sharding or gathering rows of codes and absmax is doing it to W's. Otherwise
    the inner dims are flat, and the last block may be filled up.

    Either way codes and absmaxes are those of bitsandbytes. Two codes share a byte as they do
    there, but not the same two: a byte holds one of the first half of a row and one of the second
    (bitsandbytes: two neighbours). Taking neighbours apart makes a TPU move single lanes: decoding
    a matrix takes it seven times as long.

    Nothing dequantises silently: this is no array for `jnp`. A stacked one may be sliced,
    vmapped or scanned over its leading dims, as a pytree.

    Attributes:
      codes: uint8, two a byte, of a row the first half in the high bits: (stacked..., inner...)
        with the last dim halved, or (stacked..., ceil(n / 2)). int8: int8, one a byte.
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
      along: the inner dims that blocks run along, one after the other; None: all, the last dim
        first. With (0,), a Dense kernel (in, out) has the codes of PyTorch's (out, in).

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
    along: tuple[int, ...] | None = None

    def __post_init__(self):
        self.check()

    def check(self, path: str = "this array") -> None:
        """Raises if the parts do not fit each other; `path` is named in the message."""
        _check_kind(self.kind, self.block_size, self.channels)
        outer = tuple(self.codes.shape[: self.stacked])
        codes, absmax = _shapes(self.inner, self.kind, self.block_size, self.channels, self.along)
        groups = None if self.absmax_scale is None else (*outer, -(-math.prod(absmax) // GROUP))
        for name, expected in (
            ("codes", (*outer, *codes)),
            ("absmax", (*outer, *absmax)),
            ("absmax_scale", groups),
            ("absmax_offset", None if groups is None else outer),
        ):
            array = getattr(self, name)
            got = None if array is None else tuple(array.shape)
            if got != expected:
                raise TargetError(
                    f"{path}: got {name} of shape {got}, expected {expected} for {self!r}. Slice "
                    "or stack all of its leaves alike, jax.tree.map(lambda x: x[0], q), or make "
                    "one with jaxlora.quantize."
                )

    @property
    def is_rowwise(self) -> bool:
        """Whether the codes have W's dims; else the inner ones are flat."""
        return is_rowwise(turned(self.inner, self.along), self.block_size)

    @property
    def is_columnwise(self) -> bool:
        """Whether codes lie along the first of their inner dims, and absmaxes along the last."""
        return self.is_rowwise and self.along is not None

    @property
    def stacked(self) -> int:
        """The number of leading stacked dims."""
        rows = turned(self.inner, self.along) if self.is_rowwise else (1,)
        return len(self.codes.shape) - len(rows)

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
        plain = self.is_rowwise and self.along is None
        spec = P(*_compat.explicit_spec(self.codes)) if plain else P()
        dequantize = _in_any_layout(_dequantize, self.codes, spec)
        return dequantize(self, jnp.dtype(self.dtype if dtype is None else dtype))

    def __repr__(self) -> str:
        shape = getattr(self.codes, "shape", None)
        dims = self.inner if shape is None else self.shape
        blocks = "by channel" if self.block_size is None else f"blocks of {self.block_size}"
        blocks += "" if self.is_rowwise else " over rows"
        double = "" if self.absmax_scale is None else ", double"
        return f"QuantizedArray({self.kind}, {dims} {jnp.dtype(self.dtype).name}, {blocks}{double})"


_STATIC = ("kind", "inner", "dtype", "block_size", "channels", "along")
register(QuantizedArray, ("codes", "absmax", "absmax_scale", "absmax_offset"), _STATIC)


def _to_json(aux: tuple) -> list:
    kind, inner, dtype, block_size, channels, along = aux
    return [kind, inner, jnp.dtype(dtype).name, block_size, channels, along]


def _from_json(found: list) -> tuple:
    kind, inner, dtype, block_size, *dims = found
    channels, along = (None if x is None else tuple(x) for x in dims)
    return kind, tuple(inner), jnp.dtype(dtype), block_size, channels, along


register_export(QuantizedArray, _to_json, _from_json)


def others(inner: tuple[int, ...], along: tuple[int, ...] | None) -> tuple[int, ...]:
    """The dims that blocks do not run along."""
    return tuple(i for i in range(len(inner)) if i not in (along or ()))


def turned(inner: tuple[int, ...], along: tuple[int, ...] | None) -> tuple[int, ...]:
    """The shape with rows of what blocks run along: (others..., product of those along)."""
    if along is None:
        return inner
    rows = (inner[i] for i in others(inner, along))
    return (*rows, math.prod(inner[i] for i in along))


def is_rowwise(rows: tuple[int, ...], block_size: int | None) -> bool:
    """Whether whole blocks fill a row, so that codes keep the dims of the array."""
    return block_size is None or (len(rows) > 0 and rows[-1] % block_size == 0)


def _shapes(
    inner: tuple[int, ...],
    kind: str,
    block_size: int | None,
    channels: tuple[int, ...] | None,
    along: tuple[int, ...] | None,
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of the codes and of the absmaxes, without stacked dims."""
    if block_size is None:
        return inner, tuple(inner[i] for i in channels or ())
    rows, whole = turned(inner, along), is_rowwise(turned(inner, along), block_size)
    rows = rows if whole else (math.prod(inner),)
    last = -(-rows[-1] // (1 if kind == "int8" else 2))
    codes = (last, *rows[:-1]) if whole and along is not None else (*rows[:-1], last)
    return codes, (*rows[:-1], -(-rows[-1] // block_size))


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
    along: Sequence[int] | None = None,
) -> QuantizedArray:
    r"""An array in 4 or 8 bits, as bitsandbytes stores it.

    Each block of `block_size` consecutive elements is divided by the largest absolute value in it,
    and becomes the codes of the nearest table entries; a tie goes to the lower one. In int8, it is
    round(127 w / absmax), half to even. With double quantisation the absmaxes of the blocks, less
    their mean, become 8-bit codes likewise, in groups of 256.

    Codes and absmaxes are bit for bit those of bitsandbytes on a CPU, and for `channels` those of
    its `int8_vectorwise_quant`, but for two things. The mean is a float32 sum, and bitsandbytes'
    order of summation varies with the device: the last bit may differ, and where it does, so may a
    few 8-bit codes by one. And the 8-bit codes are nearest ones, as in its CUDA and its portable
    kernels; its compiled CPU kernel rounds to 65,536 steps before it looks them up.

    Args:
      w: float16, bfloat16 or float32, any shape; finite.
      kind: "nf4" or "fp4", 4 bits an element, or "int8".
      block_size: elements that share an absmax, even. A last block is filled up if need be. None
        (int8 only): those of a channel share one.
      double_quant: also quantise the absmaxes of blocks. Those of channels never are.
      stacked: how many leading dims count layers or experts, each of which is quantised alone.
      channels: without a block size, the dims (counted after the stacked ones) that have an absmax
        for each index: of a Dense kernel (in, out), (1,).
      along: the dims (counted likewise) that blocks run along, the last one fastest; then the
        others. Of a Dense kernel (0,), its inputs: what bitsandbytes does to the same layer of
        PyTorch, whose weight is (out, in). None: as bitsandbytes does to this array, along its last
        dim and then the others. On a TPU, matmuls with the first kind decode much faster.

    Returns:
      A `QuantizedArray`.

    Raises:
      TargetError: one of these is not as said here.

    >>> q = quantize_array(jnp.ones((32, 128), jnp.bfloat16))
    >>> q, q.codes.shape, q.absmax.shape
    (QuantizedArray(nf4, (32, 128) bfloat16, blocks of 64, double), (32, 64), (32, 2))

    References:
      Dettmers et al. 2023, QLoRA, arXiv 2305.14314, section 3. Dettmers et al. 2022, LLM.int8(),
      arXiv 2208.07339, section 2.1.
    """
    _check_array(w)
    if isinstance(w, jax.ShapeDtypeStruct):
        raise TargetError(
            "quantize_array: got a shape without data, expected an array. For the shapes of the "
            "result: jax.eval_shape(lambda w: jaxlora.quantize_array(w, ...), w)."
        )
    _check_kind(kind, block_size, channels)
    if isinstance(stacked, bool) or not isinstance(stacked, int) or not 0 <= stacked <= w.ndim:
        raise TargetError(
            f"quantize_array: got stacked={stacked!r} for an array of shape {tuple(w.shape)}, "
            f"expected an integer from 0 to {w.ndim}: how many leading dims count layers."
        )
    inner = tuple(w.shape[stacked:])
    named = None if channels is None else _dims(channels, inner, "channels")
    if along is not None and block_size is not None:
        along = None if not inner else _dims(along, inner, "along")
    else:
        along = None
    options = (block_size, double_quant, stacked, named, along)
    encode = _in_any_layout(_encode, w, _specs(w, *options))
    codes, absmax, scale, offset = encode(w, kind, *options)
    return QuantizedArray(
        codes=codes,
        absmax=absmax,
        absmax_scale=scale,
        absmax_offset=offset,
        kind=kind,
        inner=inner,
        dtype=jnp.dtype(w.dtype),
        block_size=block_size,
        channels=named,
        along=along,
    )


def _check_array(w: Any) -> None:
    if isinstance(w, QuantizedArray):
        raise TargetError(
            f"quantize_array: got {w!r}, expected a float array: this one is quantised already. "
            "To store it another way: quantize_array(w.dequantize(), ...)."
        )
    name = getattr(getattr(w, "dtype", None), "name", type(w).__name__)
    if name not in DTYPES:
        raise TargetError(
            f"quantize_array: got {name}, expected an array of {', '.join(DTYPES[:-1])} or "
            f"{DTYPES[-1]}. Convert it first: w.astype(jnp.float32)."
        )


def _check_kind(kind: Any, block_size: Any, channels: Any) -> None:
    if kind not in KINDS:
        raise TargetError(
            f"quantize_array: got kind={kind!r}, expected one of {', '.join(map(repr, KINDS))}."
        )
    if block_size is None:
        if kind != "int8" or channels is None:
            raise TargetError(
                f"quantize_array: got block_size=None with kind={kind!r} and channels={channels!r},"
                " expected a block size, for instance block_size=64, or int8 by channel: "
                "kind='int8', block_size=None, channels=(1,)."
            )
        return
    if channels is not None:
        raise TargetError(
            f"quantize_array: got channels={channels!r} and block_size={block_size!r}, expected "
            "one of them. By channel: kind='int8', block_size=None, channels=(1,)."
        )
    is_integer = isinstance(block_size, int) and not isinstance(block_size, bool)
    if not is_integer or block_size < 2 or (kind != "int8" and block_size % 2):
        raise TargetError(
            f"quantize_array: got block_size={block_size!r} for {kind!r}, expected an integer from "
            "2 up, even in 4 bits. bitsandbytes knows 32, 64 (the default), 128, 256, 512, 1024, "
            "2048 and 4096."
        )


def _dims(dims: Sequence[int], inner: tuple[int, ...], name: str) -> tuple[int, ...]:
    """Ascending, from 0."""
    if all(isinstance(i, int) and -len(inner) <= i < len(inner) for i in dims):
        found = sorted(i % len(inner) for i in dims)
        if len(set(found)) == len(found) and (found or name == "channels"):
            return tuple(found)
    example = "One absmax for each column of a matrix: channels=(1,)"
    if name == "along":
        example = "Blocks along the inputs of a Dense kernel (in, out): along=(0,)"
    raise TargetError(
        f"quantize_array: got {name}={dims!r}, expected distinct dims of {inner}, the shape "
        f"without its stacked dims. {example}."
    )


def _in_any_layout(fn: Callable[..., Any], x: Any, specs: Any) -> Callable[..., Any]:
    """`fn(array, *static)`, also where types say how x is sharded: there repeats are refused."""
    if isinstance(x, np.ndarray) or not any(_compat.explicit_spec(x)):
        return fn
    mesh = jax.typeof(x).sharding.mesh
    out = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    return lambda array, *static: jax.sharding.auto_axes(
        lambda array: fn(array, *static), out_sharding=out
    )(array)


def _specs(
    w: Any, block_size: int | None, double_quant: bool, stacked: int, channels: Any, along: Any
) -> tuple[Any, ...]:
    """Of the four leaves: codes as w, absmaxes too but for its last dim, the small ones whole."""
    spec = (None,) * w.ndim if isinstance(w, np.ndarray) else _compat.explicit_spec(w)
    if block_size is None:
        return P(*spec), P(*spec[:stacked], *(spec[stacked + i] for i in channels)), None, None
    small = (P(), P()) if double_quant else (None, None)
    inner = w.shape[stacked:]
    if is_rowwise(turned(inner, along), block_size):
        if along is not None:
            left = [spec[stacked + i] for i in others(inner, along)]
            return P(*spec[:stacked], None, *left), P(*spec[:stacked], *left), *small
        return P(*spec), P(*spec[:-1]), *small
    return P(), P(), *small


@functools.partial(jax.jit, static_argnums=range(1, 7), inline=_compat.INLINE)
def _encode(
    w: jax.Array,
    kind: str,
    block_size: int | None,
    double_quant: bool,
    stacked: int,
    channels: tuple[int, ...] | None,
    along: tuple[int, ...] | None,
) -> tuple[Any, ...]:
    """The four leaves, layer by layer; compiled, so that no more than a layer is in float32."""

    def encode(w: jax.Array) -> tuple[Any, ...]:
        if block_size is None:
            return _by_channel(w, channels or ())
        rows = w
        if along is not None:
            rows = jnp.transpose(w, (*others(w.shape, along), *along))
            rows = rows.reshape(turned(w.shape, along))
        codes, absmax = _by_block(rows, kind, block_size)
        if along is not None and is_rowwise(rows.shape, block_size):
            codes = jnp.moveaxis(codes, -1, 0)
        return codes, *(_double(absmax) if double_quant else (absmax, None, None))

    for _ in range(stacked):
        encode = functools.partial(jax.lax.map, encode)
    return encode(w)


def _by_channel(w: jax.Array, channels: tuple[int, ...]) -> tuple[Any, ...]:
    others = tuple(i for i in range(w.ndim) if i not in channels)
    absmax = _absmax(w, others)
    each = over_channels(absmax, w.shape, channels)
    return _rounded(_relative(w.astype(jnp.float32), each, None, 127)), absmax, None, None


def _by_block(w: jax.Array, kind: str, block_size: int) -> tuple[jax.Array, jax.Array]:
    if not is_rowwise(w.shape, block_size):
        w = w.reshape(w.size)
    absmax = _block_absmax(w, block_size)
    w = w.astype(jnp.float32)
    if kind == "int8":
        return _rounded(_relative(w, absmax, block_size, 127)), absmax
    return _packed(nearest(_relative(w, absmax, block_size), TABLES[kind]), TABLES[kind]), absmax


def _packed(codes: jax.Array, table: np.ndarray) -> jax.Array:
    """(..., elements) to (..., bytes), with a last zero if their number is odd."""
    half = -(-codes.shape[-1] // 2)
    if codes.shape[-1] % 2:
        codes = jnp.pad(codes, (0, 1), constant_values=np.flatnonzero(table == 0)[0])
    return (codes[..., :half] << 4) | codes[..., half:]


def _block_absmax(x: jax.Array, block_size: int) -> jax.Array:
    """(..., elements) to (..., blocks), of which the last may be short."""
    blocks = -(-x.shape[-1] // block_size)
    if blocks * block_size > x.shape[-1]:
        x = jnp.pad(x, (0, blocks * block_size - x.size))
    return _absmax(x.reshape(*x.shape[:-1], blocks, block_size), -1)


def _absmax(x: jax.Array, axes: Any) -> jax.Array:
    """In float32; NaN if there is one. Found in x's own dtype: a float32 copy would be kept."""
    absmax = jnp.max(jnp.abs(x), axis=axes, initial=0).astype(jnp.float32)
    # On CPUs, XLA's maximum of many float32 numbers may pass over a NaN.
    return jnp.where(jnp.any(jnp.isnan(x), axis=axes), jnp.nan, absmax)


def _relative(x: jax.Array, absmax: jax.Array, block_size: int | None, top: int = 1) -> jax.Array:
    """top * x / absmax; zero where absmax is zero, or so small that its inverse is no number.

    Rounded as bitsandbytes does on a CPU: times the inverse, but over absmax in a short last block.
    """
    size = x.shape[-1] if x.ndim else 1
    each = functools.partial(spread, block_size=block_size, size=size)
    absmax = jnp.where(absmax < top * _SMALLEST_NORMAL, jnp.inf, absmax)
    # The inverse of the very largest would be subnormal, and flushed to zero.
    shrink = jnp.where((absmax > _HUGE) & (absmax < jnp.inf), jnp.float32(1 / _HUGE), 1)
    relative = (x * each(shrink)) * each(top / (absmax * shrink))
    if block_size and size % block_size and top == 1:
        is_short = jnp.arange(size) >= size - size % block_size
        relative = jnp.where(is_short, x / each(absmax), relative)
    return relative


def _rounded(x: jax.Array) -> jax.Array:
    return jnp.round(x).astype(jnp.int8)


def nearest(x: jax.Array, table: np.ndarray) -> jax.Array:
    """The codes, uint8, of the entries of `table` nearest to x; of the lower one in a tie."""
    order = np.argsort(table, kind="stable")
    index = jnp.zeros(x.shape, jnp.uint8)
    for middle in middles(table[order]):
        index += (x > middle).astype(jnp.uint8)
    return index if np.array_equal(order, np.arange(16)) else lookup(index, order.astype(np.uint8))


def _double(absmax: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Codes of absmax, their scales by groups, and the offset."""
    flat = absmax.reshape(absmax.size)
    total = _sum(flat)
    # By a constant, XLA would divide as times its inverse, and fuse that with the subtraction.
    offset = total / jnp.where(jnp.isnan(total), jnp.nan, jnp.float32(max(flat.size, 1)))
    difference = flat - offset
    scale = _block_absmax(difference, GROUP)
    bounds = middles(dynamic_code(signed=True))
    relative = _relative(difference, scale, GROUP)
    codes = jnp.searchsorted(bounds, relative, method="scan_unrolled").astype(jnp.uint8)
    return codes.reshape(absmax.shape), scale, offset


def _sum(x: jax.Array) -> jax.Array:
    """The sum of a vector in one order, that of a balanced tree, on every device."""
    x = jnp.pad(x, (0, 2 ** max(x.size - 1, 0).bit_length() - x.size))
    while x.size > 1:
        x = x[: x.size // 2] + x[x.size // 2 :]
    return x[0]


# --------------------------------------------------------------------------------------------------
# From codes


@functools.partial(jax.jit, static_argnums=1, inline=_compat.INLINE)
def _dequantize(q: QuantizedArray, dtype: Any) -> jax.Array:
    absmax = absmax_of(q, blocks_first=q.is_columnwise)
    if q.channels is not None:
        absmax = over_channels(absmax, q.inner, q.channels)
    if q.along is None:
        values = decode(q.kind, q.codes, absmax, dtype, q.block_size)
        if not q.is_rowwise:
            values = values[..., : math.prod(q.inner)]
        return values.reshape(q.shape)
    left, k = others(q.inner, q.along), q.stacked
    if q.is_columnwise:
        values = decode(q.kind, q.codes, absmax, dtype, q.block_size, axis=k)
        order = (*q.along, *left)
    else:
        values = decode(q.kind, q.codes, absmax, dtype, q.block_size)[..., : math.prod(q.inner)]
        order = (*left, *q.along)
    stack = q.shape[:k]
    values = values.reshape(*stack, *(q.inner[i] for i in order))
    return jnp.transpose(values, (*range(k), *(k + order.index(i) for i in range(len(order)))))


def absmax_of(q: QuantizedArray, blocks_first: bool = False) -> jax.Array:
    """The absmaxes in float32, in the shape of `q.absmax`; or (stacked..., blocks, others...).

    What each code means is worked out for each group, and looked up last, in the order wanted:
    XLA:CPU would fuse arithmetic on what was looked up, or a transpose, with the product by it, and
    do it again for every element.
    """
    order = (lambda x: jnp.moveaxis(x, -1, q.stacked)) if blocks_first else lambda x: x
    if q.absmax_scale is None:
        return order(q.absmax)
    stacked, inner = q.absmax.shape[: q.stacked], q.absmax.shape[q.stacked :]
    values = jnp.asarray(dynamic_code(signed=True))
    table = _undouble(values, q.absmax_scale[..., None], q.absmax_offset[..., None, None])
    group = jax.lax.iota(jnp.int32, math.prod(inner)).reshape(inner) // GROUP
    places = order(group * values.size + q.absmax)
    absmax = jnp.take_along_axis(
        table.reshape(*stacked, q.absmax_scale.shape[-1] * values.size),
        places.reshape(*stacked, group.size),
        axis=-1,
        mode="promise_in_bounds",
    )
    return absmax.reshape(places.shape)


def _undouble(values: jax.Array, scale: jax.Array, offset: jax.Array) -> jax.Array:
    """The absmaxes that entries of the dynamic code stand for, in a group of that scale."""
    # Bounds that nothing reaches: without them, XLA would fuse multiply and add, and round once.
    return jnp.clip(values * scale, -_LARGEST, _LARGEST) + offset


def decode(
    kind: str,
    codes: jax.Array,
    absmax: jax.Array,
    dtype: Any,
    block_size: int | None,
    axis: int = -1,
) -> jax.Array:
    """Codes times absmax, in float32, rounded once.

    Args:
      kind: "nf4", "fp4" or "int8".
      codes: (..., bytes); any rows of the codes.
      absmax: float32, (..., blocks), those rows' absmaxes; what broadcasts against the codes where
        there is no block size.
      dtype: of the result.
      block_size: elements for each absmax.
      axis: which axis, of both, the bytes and blocks are on.

    Returns:
      (..., elements), two for each byte in 4 bits.
    """
    if kind == "int8":
        values = codes.astype(jnp.float32)
    else:
        values = lookup(unpack(codes, axis), TABLES[kind])
    absmax = spread(absmax, block_size, values.shape[axis] if values.ndim else 1, axis)
    return _product(kind, values, absmax, dtype)


def decode_at(q: QuantizedArray, indices: jax.Array, dtype: Any = None) -> jax.Array:
    """The elements at some indices, in the order of blocks (`places`), and no others.

    Args:
      q: in blocks, without stacked dims.
      indices: int32, any shape; clipped to the valid ones.
      dtype: of the result; default: that of q.

    Returns:
      An array of the shape of the indices.
    """

    def take(x: jax.Array, at: jax.Array) -> jax.Array:
        return x.reshape(x.size).at[at].get(mode="clip")

    assert q.block_size is not None
    indices = jnp.clip(indices, 0, max(math.prod(q.inner) - 1, 0))
    block = indices // q.block_size
    absmax = take(q.absmax, block)
    if q.absmax_scale is not None:
        values = take(jnp.asarray(dynamic_code(signed=True)), absmax.astype(jnp.int32))
        absmax = _undouble(values, take(q.absmax_scale, block // GROUP), q.absmax_offset)

    bytes_of_row = q.codes.shape[0 if q.is_columnwise else -1]
    elements = bytes_of_row * (1 if q.kind == "int8" else 2)
    row, at = indices // elements, indices % elements
    byte = at % bytes_of_row
    rows = q.codes.size // max(bytes_of_row, 1)
    code = take(q.codes, byte * rows + row if q.is_columnwise else row * bytes_of_row + byte)
    if q.kind == "int8":
        values = code.astype(jnp.float32)
    else:
        values = lookup(jnp.where(at < bytes_of_row, code >> 4, code & 15), TABLES[q.kind])
    return _product(q.kind, values, absmax, q.dtype if dtype is None else dtype)


def places(q: QuantizedArray) -> jax.Array:
    """Where each element of an unstacked array is in the order of blocks: int32, in its shape."""
    count = jax.lax.iota(jnp.int32, q.size)
    if q.along is None:
        return count.reshape(q.inner)
    order = (*others(q.inner, q.along), *q.along)
    count = count.reshape([q.inner[i] for i in order])
    return jnp.transpose(count, [order.index(i) for i in range(len(order))])


def _product(kind: str, values: jax.Array, absmax: jax.Array, dtype: Any) -> jax.Array:
    if kind == "int8":
        # bitsandbytes' values * absmax / 127, both factors scaled by 2^7: it would overflow.
        return (values * (absmax * 2.0**-7) * np.float32(128 / 127)).astype(dtype)
    return (values * absmax).astype(dtype)


def unpack(codes: jax.Array, axis: int = -1) -> jax.Array:
    """(..., bytes) to (..., elements): the high halves of all bytes, then the low ones."""
    return jnp.concatenate([codes >> 4, codes & 15], axis=axis)


def spread(absmax: jax.Array, block_size: int | None, size: int, axis: int = -1) -> jax.Array:
    """(..., blocks) to (..., size): to each element its block's. No block size: as it is."""
    if block_size is None:
        return absmax
    return jax.lax.slice_in_dim(jnp.repeat(absmax, block_size, axis=axis), 0, size, axis=axis)


def over_channels(
    absmax: jax.Array, inner: tuple[int, ...], channels: tuple[int, ...]
) -> jax.Array:
    """Absmaxes of channels, (stacked..., channels...), that broadcast against the codes."""
    stacked = absmax.shape[: absmax.ndim - len(channels)]
    return absmax.reshape(*stacked, *(n if i in channels else 1 for i, n in enumerate(inner)))


def lookup(codes: jax.Array, table: np.ndarray) -> jax.Array:
    """table[codes] of 16 entries.

    As a gather, which XLA:TPU makes compares and selects of, and XLA:CPU vector instructions. By
    hand, selects or arithmetic on the codes' bits are slower on both; and selects need constants in
    the size of the weight, which a scan keeps for all of its steps.
    """
    return jnp.asarray(table).at[codes].get(mode="promise_in_bounds")
