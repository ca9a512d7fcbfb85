"""A quantized weight under interpretation: decoded where it is used, and only there.

What a model does to a weight before it uses it (casts, transposes, slices) is not done to an array
but remembered. Where it can be done to the codes it is: a layer of a stack, an expert, the rows of
an embedding are picked from the codes, and nothing else is decoded.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import JaxprEqn

from jaxlora import _compat
from jaxlora._moves import RANK, Dims, Labelled, Move, Unfactorable
from jaxlora._quantized import dense, stacked_dims
from jaxlora._quantized_array import (
    QuantizedArray,
    absmax_of,
    decode,
    decode_at,
    others,
    places,
)
from jaxlora._recomputed import recomputed


class Deferred:
    """An array that is not formed yet: codes (`Decoded`), or what is done to them later on."""

    shape: tuple[int, ...]
    dtype: Any

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def value(self) -> jax.Array:
        """The array."""
        raise NotImplementedError

    @property
    def is_constant(self) -> bool:
        """Whether it is made of nothing that could have a gradient."""
        return True

    def followed(self, move: Move, shape: tuple[int, ...]) -> Any:
        """What the move, to that shape, makes of it without decoding; None if it needs to."""
        return None

    def picked(self, eqn: JaxprEqn, operands: Sequence[Any], index: int = 0) -> Any:
        """The elements that an equation picks, decoded one by one; None if that is no less work."""
        return None

    def leaf_dims(self) -> list[Dims]:
        """For each leaf, the dims along its axes; RANK for axes that are no dim."""
        return [(RANK,) * leaf.ndim for leaf in jax.tree.leaves(self)]

    def spanning(self, d: int) -> Any:
        """The same, with every leaf either the same along dim d or sliced as d is.

        Raises:
          Unfactorable: that takes decoding.
        """
        raise Unfactorable(f"it cuts a quantized weight {self._history()}")

    def split_dims(self) -> list[Dims]:
        """The same, but that axes of blocks, which are packed, count as those of their dim."""
        return self.leaf_dims()

    def splitting(self, d: int) -> Any:
        """The same, with every leaf either the same along dim d or to be split where d is."""
        return self.spanning(d)

    def dropped(self, d: int) -> Any:
        """At one index of dim d: its leaves are sliced already."""
        raise Unfactorable(f"it cuts a quantized weight {self._history()}")

    def stacked(self) -> Any:
        """With a new leading dim, which its leaves have already."""
        raise Unfactorable(f"it stacks a quantized weight {self._history()}")

    def resized(self) -> Any:
        """With the shape that its leaves, blocks of what they were, now have."""
        raise Unfactorable(f"it cuts a quantized weight {self._history()}")

    def _history(self) -> str:
        """What came before, for messages."""
        raise NotImplementedError


# --------------------------------------------------------------------------------------------------
# Decoding


@dataclasses.dataclass(frozen=True)
class Whole:
    """Decodes the leaves of a quantized weight, whatever their leading dims."""

    treedef: Any

    def __call__(self, parts: Sequence[Labelled]) -> jax.Array:
        return dense(jax.tree.unflatten(self.treedef, [p.array for p in parts]))


@dataclasses.dataclass(frozen=True)
class Rows:
    """Decodes rows, all of whose other dims label the parts.

    The codes of a row are on the codes' axis RANK, its absmaxes on that of the absmaxes.

    Attributes:
      sizes: those of the dims that a row is made of, in order.
    """

    kind: str
    dtype: Any
    block_size: int
    sizes: tuple[int, ...]

    def __call__(self, parts: Sequence[Labelled]) -> jax.Array:
        codes, absmax = parts
        order = [absmax.dims.index(d) for d in codes.dims]
        axis = codes.dims.index(RANK)
        blocks = lax.transpose(absmax.array, order)
        rows = decode(self.kind, codes.array, blocks, self.dtype, self.block_size, axis)
        rows = jnp.moveaxis(rows, axis, -1)
        n = rows.shape[-1] // math.prod(self.sizes[1:])  # of a device's part of the first dim
        return rows.reshape(*rows.shape[:-1], n, *self.sizes[1:])


@dataclasses.dataclass(frozen=True)
class Channels:
    """Decodes integers whose scale is one for each channel."""

    dtype: Any

    def __call__(self, parts: Sequence[Labelled]) -> jax.Array:
        codes, absmax = parts
        sizes = zip(codes.dims, codes.array.shape, strict=True)
        shape = [n if d in absmax.dims else 1 for d, n in sizes]
        order = [absmax.dims.index(d) for d in codes.dims if d in absmax.dims]
        scale = lax.transpose(absmax.array, order).reshape(shape)
        return decode("int8", codes.array, scale, self.dtype, None)


@dataclasses.dataclass(frozen=True)
class Elements:
    """Decodes single elements of a flat layout: their indices, then the weight's leaves."""

    treedef: Any

    def __call__(self, parts: Sequence[Labelled]) -> jax.Array:
        indices, *leaves = parts
        return decode_at(jax.tree.unflatten(self.treedef, [p.array for p in leaves]), indices.array)


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True, eq=False)
class Decoded(Deferred):
    """Codes and what decodes them.

    Attributes:
      parts: arrays whose axes carry the dims that they span, or RANK: moved as factors are.
      inner: the dims that come out of decoding, after those that label the first part.
      decoder: makes the array from the parts: its axes are the first part's dims, then `inner`.
      shape, dtype: of the array.
    """

    parts: tuple[Labelled, ...]
    inner: Dims
    decoder: Callable[[Sequence[Labelled]], jax.Array]
    shape: tuple[int, ...]
    dtype: Any

    def tree_flatten(self):
        return (self.parts,), (self.inner, self.decoder, self.shape, self.dtype)

    @classmethod
    def tree_unflatten(cls, aux, children):
        return cls(*children, *aux)

    @classmethod
    def of(cls, w: Any) -> Decoded:
        """A quantized weight whose stacked dims can be sliced."""
        stack = tuple(range(stacked_dims(w)))
        leaves, treedef = jax.tree.flatten(w)
        parts = tuple(
            Labelled(lax.stop_gradient(x), (*stack, *[RANK] * (x.ndim - len(stack))))
            for x in leaves
        )
        inner = tuple(range(len(stack), len(w.shape)))
        return cls(parts, inner, Whole(treedef), tuple(w.shape), jnp.dtype(w.dtype))

    @property
    def _labels(self) -> Dims:
        return tuple(d for d in self.parts[0].dims if d != RANK)

    def value(self) -> jax.Array:
        return self._placed(self.decoder(self.parts), (*self._labels, *self.inner))

    def _placed(self, array: jax.Array, dims: Dims) -> jax.Array:
        """An array along some dims, in their order, and the same all along the others."""
        order = sorted(range(len(dims)), key=dims.__getitem__)
        return lax.broadcast_in_dim(lax.transpose(array, order), self.shape, sorted(dims))

    # A move carries the parts as it carries a term of factors.
    window = ()

    @property
    def factors(self) -> list[Labelled]:
        return list(self.parts)

    def filled(self, dims: Iterable[int]) -> Decoded:
        return self

    def spread(self, d: int, n: int) -> Decoded:
        return self

    def each(self, f: Callable[[Labelled], Labelled], window: Any = None) -> Decoded:
        return dataclasses.replace(self, parts=tuple(map(f, self.parts)))

    def followed(self, move: Move, shape: tuple[int, ...]) -> Decoded | None:
        def stays(d: int) -> bool:
            j = move.lone(d)
            return j is not None and shape[j] == self.shape[d]

        for make in (lambda: self, self._by_rows):
            source = make()
            if source is None or not all(map(stays, source.inner)):
                continue
            try:
                moved: Any = move.on_term(source, self.shape)  # type: ignore[arg-type]
            except Unfactorable:
                continue
            inner = tuple(j for j in map(move.lone, source.inner) if j is not None)
            return dataclasses.replace(moved, inner=inner, shape=shape)
        return None

    def picked(self, eqn: JaxprEqn, operands: Sequence[Any], index: int = 0) -> Decoded | None:
        shape = tuple(_aval(eqn, index).shape)
        if not isinstance(self.decoder, Whole) or self._labels or math.prod(shape) >= self.size:
            return None
        q = self._weight()
        if not isinstance(q, QuantizedArray) or q.block_size is None:
            return None
        at = self._placed(places(q), self.inner)
        at = _compat.bind(eqn, [at, *operands], **_without_fill(eqn))[index]
        parts = (Labelled(at, tuple(range(at.ndim))), *self.parts)
        decoder = Elements(self.decoder.treedef)
        return dataclasses.replace(self, parts=parts, inner=(), decoder=decoder, shape=shape)

    def _weight(self) -> Any:
        assert isinstance(self.decoder, Whole)
        return jax.tree.unflatten(self.decoder.treedef, [p.array for p in self.parts])

    def _by_rows(self) -> Decoded | None:
        """The same with a part for each row, or each channel, so that these can be picked."""
        if not isinstance(self.decoder, Whole):
            return None
        q = self._weight()
        if not isinstance(q, QuantizedArray):
            return None
        absmax, stack = absmax_of(q), self._labels
        if q.channels is not None:
            dims = (*stack, *self.inner)
            across = (*stack, *(self.inner[c] for c in q.channels))
            parts = (Labelled(q.codes, dims), Labelled(absmax, across))
            return dataclasses.replace(self, parts=parts, inner=(), decoder=Channels(q.dtype))
        if not q.is_rowwise:
            return None
        along = (len(q.inner) - 1,) if q.along is None else q.along
        rows = tuple(self.inner[i] for i in others(q.inner, along))
        codes = (*stack, *rows, RANK) if q.along is None else (*stack, RANK, *rows)
        parts = (Labelled(q.codes, codes), Labelled(absmax, (*stack, *rows, RANK)))
        assert q.block_size is not None
        decoder = Rows(q.kind, q.dtype, q.block_size, tuple(q.inner[i] for i in along))
        inner = tuple(self.inner[i] for i in along)
        return dataclasses.replace(self, parts=parts, inner=inner, decoder=decoder)

    def leaf_dims(self) -> list[Dims]:
        return [p.dims for p in self.parts]

    def split_dims(self) -> list[Dims]:
        if not isinstance(self.decoder, Rows):
            return self.leaf_dims()
        first = self.inner[0]  # of those that a row is made of: whole blocks of it, if any
        return [tuple(first if d == RANK else d for d in p.dims) for p in self.parts]

    def spanning(self, d: int) -> Decoded:
        rows = self.splitting(d)
        if d in rows.inner:
            raise Unfactorable("it cuts a quantized weight along a dim that its blocks run over")
        return rows

    def splitting(self, d: int) -> Decoded:
        if d not in self.inner:
            return self
        rows = self if isinstance(self.decoder, Rows) else self._by_rows()
        if rows is None:
            raise Unfactorable(
                "it cuts a quantized weight whose rows are not made of whole blocks along a dim "
                "that its blocks run over"
            )
        if d in rows.inner and isinstance(rows.decoder, Rows):
            if rows.decoder.kind != "int8":
                raise Unfactorable(
                    "it cuts a weight in 4 bits along a dim that its blocks run over, whose bytes "
                    "hold two halves: cut the others (outputs, by default), or quantize in int8"
                )
            if d != rows.inner[0]:
                raise Unfactorable("it cuts a quantized weight along a dim within its blocks")
        return rows

    def _history(self) -> str:
        return "as it is"

    def dropped(self, d: int) -> Decoded:
        def drop(f: Labelled) -> Labelled:
            left = tuple(e for e in f.dims if e != d)
            return Labelled(f.array, left).relabel(lambda e: e - (e > d))

        shape = (*self.shape[:d], *self.shape[d + 1 :])
        inner = tuple(e - (e > d) for e in self.inner)
        return dataclasses.replace(self.each(drop), inner=inner, shape=shape)

    def stacked(self) -> Decoded:
        def add(f: Labelled) -> Labelled:
            return Labelled(f.array, (0, *f.relabel(lambda e: e + 1).dims))

        shape = (self.parts[0].array.shape[0], *self.shape)
        inner = tuple(e + 1 for e in self.inner)
        return dataclasses.replace(self.each(add), inner=inner, shape=shape)

    def resized(self) -> Decoded:
        shape = list(self.shape)
        for d, n in zip(self.parts[0].dims, self.parts[0].array.shape, strict=True):
            if d != RANK:
                shape[d] = n
        if isinstance(self.decoder, Rows):
            blocks = self.parts[1].array.shape[self.parts[1].dims.index(RANK)]
            elements = blocks * self.decoder.block_size
            shape[self.inner[0]] = elements // math.prod(self.decoder.sizes[1:])
        return dataclasses.replace(self, shape=tuple(shape))

    @classmethod
    def stack(cls, weights: Sequence[Any]) -> Decoded | None:
        """Weights along a new leading dim, code by code; None if they are not of one form."""
        if not all(isinstance(w, cls) for w in weights):
            return None
        if len({jax.tree.structure(w) for w in weights}) > 1:
            return None
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *weights).stacked()


def _without_fill(eqn: JaxprEqn) -> dict[str, Any]:
    """What makes a lookup of indices out of bounds harmless; who does it fills in later."""
    if eqn.params.get("mode") != lax.GatherScatterMode.FILL_OR_DROP:
        return {}
    return {"fill_value": 0}


# --------------------------------------------------------------------------------------------------
# What is done after decoding

POINTWISE = {"convert_element_type", "mul", "div", "neg", "reduce_precision", "copy", "copy_p"}
"""Equations that commute with moves if their other operands are scalars."""


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True, eq=False)
class Call(Deferred):
    """An equation on arrays of which some are deferred.

    Attributes:
      operands: arrays and deferred arrays.
      eqn: the equation.
      index: which of its outputs this is.
      shape: of that output; after a move of a pointwise one, the moved.
    """

    operands: tuple[Any, ...]
    eqn: JaxprEqn
    index: int
    shape: tuple[int, ...]

    def tree_flatten(self):
        return (self.operands,), (self.eqn, self.index, self.shape)

    @classmethod
    def tree_unflatten(cls, aux, children):
        return cls(*children, *aux)

    @property
    def dtype(self) -> Any:
        return _aval(self.eqn, self.index).dtype

    def value(self) -> jax.Array:
        return _compat.bind(self.eqn, [value_of(v) for v in self.operands])[self.index]

    @property
    def is_constant(self) -> bool:
        return all(
            v.is_constant if isinstance(v, Deferred) else not isinstance(v, jax.core.Tracer)
            for v in self.operands
        )

    @property
    def _child(self) -> int | None:
        """Which operand it is pointwise in; None if it is not."""
        if self.eqn.primitive.name not in POINTWISE:
            return None
        large = [k for k, v in enumerate(self.operands) if isinstance(v, Deferred) or jnp.ndim(v)]
        return large[0] if len(large) == 1 else None

    def _on_child(self, f: Callable[[Any], Any]) -> Any:
        """The same equation of what f makes of the operand; None if it does not commute with f."""
        k = self._child
        if k is None:
            return None
        child = f(self.operands[k])
        if child is None:
            return None
        operands = (*self.operands[:k], child, *self.operands[k + 1 :])
        return dataclasses.replace(self, operands=operands, shape=child.shape)

    def followed(self, move: Move, shape: tuple[int, ...]) -> Call | None:
        return self._on_child(lambda v: v.followed(move, shape))

    def picked(self, eqn: JaxprEqn, operands: Sequence[Any], index: int = 0) -> Call | None:
        return self._on_child(lambda v: v.picked(eqn, operands, index))

    def leaf_dims(self) -> list[Dims]:
        if self._child is None:
            return super().leaf_dims()
        each = [v.leaf_dims() if isinstance(v, Deferred) else [()] for v in self.operands]
        return [dims for found in each for dims in found]

    def split_dims(self) -> list[Dims]:
        if self._child is None:
            return super().split_dims()
        each = [v.split_dims() if isinstance(v, Deferred) else [()] for v in self.operands]
        return [dims for found in each for dims in found]

    def splitting(self, d: int) -> Call:
        return self._on_child(lambda v: v.splitting(d)) or super().splitting(d)

    def spanning(self, d: int) -> Call:
        return self._on_child(lambda v: v.spanning(d)) or super().spanning(d)

    def dropped(self, d: int) -> Call:
        return self._on_child(lambda v: v.dropped(d)) or super().dropped(d)

    def stacked(self) -> Call:
        alone = len(self.operands) == 1  # a scalar would be one for each of the stack
        return (alone and self._on_child(lambda v: v.stacked())) or super().stacked()

    def resized(self) -> Call:
        return self._on_child(lambda v: v.resized()) or super().resized()

    def _history(self) -> str:
        return f"after `{self.eqn.primitive.name}` of it"


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True, eq=False)
class Filled(Deferred):
    """What a lookup gives that fills in where its indices are out of bounds.

    Attributes:
      found: what it finds elsewhere.
      valid: where that is.
      fill: what it fills in.
    """

    found: Any
    valid: Labelled
    fill: float

    def tree_flatten(self):
        return (self.found, self.valid), self.fill

    @classmethod
    def tree_unflatten(cls, fill, children):
        found, valid = children
        return cls(found, valid, fill)

    @classmethod
    def of(cls, found: Deferred, valid: Labelled, eqn: JaxprEqn) -> Filled:
        fill = eqn.params.get("fill_value")
        return cls(found, valid, float("nan") if fill is None else float(fill))

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.found.shape

    @property
    def dtype(self) -> Any:
        return self.found.dtype

    def value(self) -> jax.Array:
        mask = lax.broadcast_in_dim(self.valid.array, self.shape, self.valid.dims)
        return jnp.where(mask, self.found.value(), jnp.asarray(self.fill, self.dtype))

    def _history(self) -> str:
        return "after a lookup that fills"


# --------------------------------------------------------------------------------------------------
# Weights that may be deferred


def value_of(w: Any) -> Any:
    """The array of a weight."""
    return w.value() if isinstance(w, Deferred) else w


def bound(eqn: JaxprEqn, operands: Sequence[Any], index: int = 0) -> Any:
    """An output of an equation, deferred if one of its operands is."""
    if any(isinstance(v, Deferred) for v in operands):
        return Call(tuple(operands), eqn, index, tuple(_aval(eqn, index).shape))
    return _compat.bind(eqn, operands)[index]


def moved(eqn: JaxprEqn, w: Any, operands: Sequence[Any], move: Move, index: int = 0) -> Any:
    """What a structural equation makes of a weight."""
    if isinstance(w, Deferred) and eqn.primitive.name != "pad":  # which puts in what is no code
        shape = tuple(_aval(eqn, index).shape)
        found = w.followed(move, shape)
        if found is None and shape != w.shape:
            found = w.picked(eqn, operands, index)
        if found is not None:
            return found if move.valid is None else Filled.of(found, move.valid, eqn)
    return bound(eqn, [w, *operands], index)


def _aval(eqn: JaxprEqn, index: int) -> Any:
    return eqn.outvars[index].aval


def used(
    f: Callable[..., Any], x: Any, w: Any, arrays: Sequence[Any] = (), of: JaxprEqn | None = None
) -> Any:
    """f(x, w, *arrays) of an activation and a weight, which is decoded again in the backward pass.

    Args:
      f: linear in x; closes over no arrays.
      arrays: what has no gradient.
      of: the equation that f is, for policies of `jax.checkpoint`.
    """
    if not isinstance(w, Deferred):
        return f(x, w, *arrays)
    if not w.is_constant or not jnp.issubdtype(x.dtype, jnp.inexact):
        return jax.checkpoint(lambda x, w, *arrays: f(x, w.value(), *arrays))(x, w, *arrays)
    leaves, treedef = jax.tree.flatten((w, *arrays))

    def decoded(x: Any, *leaves: Any) -> Any:
        w, *arrays = jax.tree.unflatten(treedef, leaves)
        return f(x, w.value(), *arrays)

    return recomputed(decoded, x, leaves, of)
