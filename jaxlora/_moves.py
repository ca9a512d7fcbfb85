"""Structural primitives, dimension by dimension: how a weight's factors follow the weight.

`Labelled` arrays are the whole trick. Each axis of a factor names the dimension of W that it spans
(or `RANK`), so that transposing W relabels its factors, slicing W slices the factors that span the
sliced dimension, and a contraction reads off the labels which factor to contract first.

A `Move` is one structural primitive. The same move carries the factors of a `Factored` weight and
the bookkeeping of a `Probe`, which has no factors and only records how it is used.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from jaxlora import _compat
from jaxlora._matrix import widened

if TYPE_CHECKING:
    from jaxlora._terms import Term

RANK = -1
Dims: TypeAlias = tuple[int, ...]


class Unfactorable(Exception):
    """This move or use has no factored form; its text says why."""


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True, eq=False)
class Labelled:
    """An array whose axes carry labels: dims of W, or RANK."""

    array: Any
    dims: Dims

    def tree_flatten(self):
        return (self.array,), self.dims

    @classmethod
    def tree_unflatten(cls, dims, children):
        return cls(children[0], dims)

    def spread(self, d: int, n: int) -> Labelled:
        """The same all along a new dim d of size n."""
        shape = (n, *self.array.shape)
        array = lax.broadcast_in_dim(self.array, shape, range(1, len(shape)))
        return Labelled(array, (d, *self.dims))

    def relabel(self, new: Callable[[int], int]) -> Labelled:
        return Labelled(self.array, tuple(d if d == RANK else new(d) for d in self.dims))


def contract(x: Labelled, y: Labelled, out: Sequence[Any], precision: Any) -> Labelled:
    """Sums over the labels that x and y share and `out` lacks; one dot_general."""
    shared = [d for d in x.dims if d in y.dims]
    batch = [d for d in shared if d in out]
    summed = [d for d in shared if d not in out]
    dnums = (
        ([x.dims.index(d) for d in summed], [y.dims.index(d) for d in summed]),
        ([x.dims.index(d) for d in batch], [y.dims.index(d) for d in batch]),
    )
    free = [d for d in (*x.dims, *y.dims) if d not in shared]
    got = (*batch, *free)
    specs = [dict(zip(f.dims, _compat.explicit_spec(f.array), strict=True)) for f in (x, y)]
    sharding = None
    if any(spec[d] is not None for d in summed for spec in specs):
        # Summed over a sharded dim: JAX asks for the sharding, which is that of what is left.
        sharding = P(*(specs[0].get(d) or specs[1].get(d) for d in got))
    array = lax.dot_general(x.array, y.array, dnums, precision=precision, out_sharding=sharding)
    order = [got.index(d) for d in out]
    if order != list(range(len(order))):
        array = lax.transpose(array, order)
    return Labelled(array, tuple(out))


def times(f: Labelled, factor: Labelled, dtype: Any) -> Labelled:
    """f * factor, aligned by labels, in float32 or wider, rounded to dtype."""
    wide = widened(dtype)
    axes = [f.dims.index(d) for d in factor.dims]
    order = sorted(range(len(axes)), key=axes.__getitem__)
    array = lax.transpose(factor.array, order).astype(wide)
    if axes:
        sizes = dict(zip(sorted(axes), array.shape, strict=True))
        array = array.reshape([sizes.get(k, 1) for k in range(len(f.dims))])
    # Not broadcast to f's shape: under scan, a broadcast scale would be saved for each layer.
    return Labelled((f.array.astype(wide) * array).astype(dtype), f.dims)


@dataclasses.dataclass(frozen=True)
class Move:
    """What a structural primitive does to the dims of W and to an array that spans some of them.

    Attributes:
      sources: for each output dim, the input dims that it is made of (none for a new dim).
      apply: the primitive on one labelled array, restricted to the dims that it spans.
      picked: dims of which one index is picked: gathered or sliced down to one.
      batched: dims that pair with a batch dim of the indices.
      changed: dims whose content changes, so that a window on them cannot be kept.
      valid: where a lookup that fills is within bounds, labelled by output dims; None: everywhere.
      traced: whether a traced value decides what is moved.
      fills: dims along which it may put in numbers other than zero that are not W's.
    """

    sources: tuple[tuple[int, ...], ...]
    apply: Callable[[Labelled], Labelled]
    picked: frozenset[int] = frozenset()
    batched: frozenset[int] = frozenset()
    changed: frozenset[int] = frozenset()
    valid: Labelled | None = None
    traced: bool = False
    fills: frozenset[int] = frozenset()

    def lone(self, d: int) -> int | None:
        """The output dim that is dim d as it was and nothing else; None if there is no such."""
        found = [j for j, s in enumerate(self.sources) if d in s]
        same = len(found) == 1 and self.sources[found[0]] == (d,) and d not in self.changed
        return found[0] if same else None

    def on_term(self, term: Term, shape: Sequence[int]) -> Term | None:
        """Carries a term of a weight of that shape; None if nothing is left of it."""
        term = term.filled(d for d, _ in term.window if self.lone(d) is None)
        for d in self.changed:  # what was the same all along will not be so
            term = term.spread(d, shape[d])
        return term.each(self.apply, {self.lone(d): span for d, span in term.window})


def relabelling(sources: tuple[tuple[int, ...], ...], drop: frozenset[int] = frozenset()) -> Move:
    """A move that renames dims and squeezes the unit dims in `drop`; no data moves."""
    new = {s[0]: j for j, s in enumerate(sources) if s}

    def apply(f: Labelled) -> Labelled:
        axes = tuple(k for k, d in enumerate(f.dims) if d in drop)
        array = lax.squeeze(f.array, axes) if axes else f.array
        return Labelled(array, tuple(d for d in f.dims if d not in drop)).relabel(new.__getitem__)

    return Move(sources, apply)


def transpose(permutation: Sequence[int]) -> Move:
    return relabelling(tuple((p,) for p in permutation))


def squeeze(ndim: int, drop: Iterable[int]) -> Move:
    dropped = frozenset(drop)
    return relabelling(tuple((d,) for d in range(ndim) if d not in dropped), dropped)


def broadcast_in_dim(shape: Sequence[int], out: Sequence[int], dims: Sequence[int]) -> Move:
    """Dims that grow from 1 to n are absent from the factors: their delta is the same all along."""
    sources = tuple((dims.index(j),) if j in dims else () for j in range(len(out)))
    grown = frozenset(d for d, j in enumerate(dims) if shape[d] != out[j])
    move = relabelling(tuple(() if set(s) & grown else s for s in sources), grown)
    return dataclasses.replace(move, sources=sources)


def reshape(shape: Sequence[int], out: Sequence[int]) -> Move:
    """Splits and fuses dims within groups; a factor must span all of a fused group or none of it.

    Unit dims are in no group: factors lose theirs and the delta is broadcast along new ones.
    """
    if math.prod(shape) == 0:
        raise Unfactorable("it reshapes an empty array")
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(shape) or j < len(out):
        ins: list[int] = []
        outs: list[int] = []
        n = m = 1
        while n != m or not (ins or outs):
            if n <= m and i < len(shape):
                n, i = n * shape[i], i + 1
                if shape[i - 1] != 1:
                    ins.append(i - 1)
            elif j < len(out):
                m, j = m * out[j], j + 1
                if out[j - 1] != 1:
                    outs.append(j - 1)
            else:
                break
        groups.append((ins, outs))
    units = frozenset(d for d, n in enumerate(shape) if n == 1)
    sources: list[tuple[int, ...]] = [()] * len(out)
    for ins, outs in groups:
        for k in outs:
            sources[k] = tuple(ins)

    def apply(f: Labelled) -> Labelled:
        axes = tuple(k for k, d in enumerate(f.dims) if d in units)
        array, dims = lax.squeeze(f.array, axes), [d for d in f.dims if d not in units]
        for ins, outs in groups:
            held = [d for d in ins if d in dims]
            if not held:
                continue
            if held != ins:
                raise Unfactorable("it fuses input dims with output dims")
            at = sum(d not in ins for d in dims[: dims.index(ins[0])])
            rest = [d for d in dims if d not in ins]
            order = [*rest[:at], *ins, *rest[at:]]
            array = lax.transpose(array, [dims.index(d) for d in order])
            sizes = [out[k] for k in outs]
            array = array.reshape(*array.shape[:at], *sizes, *array.shape[at + len(ins) :])
            # Output dims are marked apart (as ~k) until all groups are done.
            dims = [*rest[:at], *(-2 - k for k in outs), *rest[at:]]
        return Labelled(array, tuple(d if d == RANK else -2 - d for d in dims))

    class Reshape(Move):
        def on_term(self, term: Term, shape: Sequence[int]) -> Term | None:
            # A dim that the weight was broadcast along fuses with one that a factor spans.
            for ins, _ in groups:
                here = {d for f in term.factors for d in f.dims} & set(ins)
                for d in set(ins) - here if here else ():

                    def spread(f: Labelled, d: int = d, here: set[int] = here) -> Labelled:
                        return f.spread(d, shape[d]) if here & {*f.dims} else f

                    term = term.filled([d]).each(spread)
            return super().on_term(term, shape)

    return Reshape(tuple(sources), apply)


def cut(
    starts: Sequence[int], limits: Sequence[int], strides: Sequence[int], shape: Sequence[int]
) -> Move:
    """A static slice of each dim; a window is cut with it, and may vanish."""

    class Cut(Move):
        def on_term(self, term: Term, shape: Sequence[int]) -> Term | None:
            term = term.filled(d for d, _ in term.window if strides[d] != 1)
            lo, hi = list(starts), list(limits)
            window = {}
            for d, (start, _) in term.window:
                first, last = max(starts[d], start), min(limits[d], start + term.size(d))
                if first >= last:
                    return None
                lo[d], hi[d] = first - start, last - start
                if last - first < limits[d] - starts[d]:
                    window[d] = (first - starts[d], limits[d] - starts[d])

            def apply(f: Labelled) -> Labelled:
                bounds = [
                    (0, n, 1) if d == RANK else (lo[d], hi[d], strides[d])
                    for d, n in zip(f.dims, f.array.shape, strict=True)
                ]
                return Labelled(lax.slice(f.array, *zip(*bounds, strict=True)), f.dims)

            return term.each(lambda f: apply(f) if f.dims else f, window)

    picked = frozenset(
        d
        for d, (lo, hi, n) in enumerate(zip(starts, limits, shape, strict=True))
        if hi - lo == 1 and n != 1
    )
    return Cut(tuple((d,) for d in range(len(starts))), lambda f: f, picked)


def dynamic_slice(starts: Sequence[Any], sizes: Sequence[int], shape: Sequence[int]) -> Move:
    def apply(f: Labelled) -> Labelled:
        start = [jnp.zeros_like(starts[0]) if d == RANK else starts[d] for d in f.dims]
        size = [n if d == RANK else sizes[d] for d, n in zip(f.dims, f.array.shape, strict=True)]
        return Labelled(lax.dynamic_slice(f.array, start, size), f.dims)

    picked = frozenset(d for d, n in enumerate(sizes) if n == 1 and shape[d] != 1)
    changed = frozenset(d for d, n in enumerate(sizes) if n != shape[d])
    return Move(tuple((d,) for d in range(len(sizes))), apply, picked, changed=changed, traced=True)


def reverse(ndim: int, flipped: Iterable[int]) -> Move:
    flip = frozenset(flipped)

    def apply(f: Labelled) -> Labelled:
        return Labelled(lax.rev(f.array, [k for k, d in enumerate(f.dims) if d in flip]), f.dims)

    return Move(tuple((d,) for d in range(ndim)), apply, changed=flip)


def pad(config: Sequence[tuple[int, int, int]], value: Any) -> Move:
    """The factors are padded with zeros, whatever W is padded with: the delta is zero there."""

    def apply(f: Labelled) -> Labelled:
        padding = [(0, 0, 0) if d == RANK else config[d] for d in f.dims]
        return Labelled(lax.pad(f.array, jnp.zeros((), f.array.dtype), padding), f.dims)

    changed = frozenset(d for d, widths in enumerate(config) if any(widths))
    zero = not isinstance(value, jax.core.Tracer) and value == 0
    fills = frozenset() if zero else changed
    return Move(tuple((d,) for d in range(len(config))), apply, changed=changed, fills=fills)


def gather(
    dn: lax.GatherDimensionNumbers,
    sizes: Sequence[int],
    indices: Any,
    shape: Sequence[int],
    params: dict[str, Any],
) -> Move:
    """Each factor is gathered along the indexed dims that it spans, if any."""
    out_ndim = len(dn.offset_dims) + indices.ndim - 1
    batch_out = [j for j in range(out_ndim) if j not in dn.offset_dims]
    paired = dict(zip(dn.operand_batching_dims, dn.start_indices_batching_dims, strict=True))
    dropped = {*dn.collapsed_slice_dims, *paired}
    kept = [d for d in range(len(sizes)) if d not in dropped]
    offset_of = dict(zip(kept, dn.offset_dims, strict=True))
    picked = frozenset(d for d in dn.start_index_map if sizes[d] == 1)

    sources: list[tuple[int, ...]] = [()] * out_ndim
    for d, j in offset_of.items():
        sources[j] = (d,)
    for k, j in enumerate(batch_out):
        pairs = tuple(d for d, axis in paired.items() if axis == k)
        sources[j] = pairs or tuple(sorted(picked))

    def apply(f: Labelled) -> Labelled:
        indexed = [c for c, d in enumerate(dn.start_index_map) if d in f.dims]
        axis = {d: k for k, d in enumerate(f.dims)}
        size = [n if d == RANK else sizes[d] for d, n in zip(f.dims, f.array.shape, strict=True)]
        offsets = [d for d in f.dims if d == RANK or d in offset_of]
        labels = [d if d == RANK else offset_of[d] for d in offsets]
        if not indexed:
            # Batch dims pair with batch dims of the indices and stay whole; slices start at 0.
            whole = [
                n if d in paired else s for d, n, s in zip(f.dims, f.array.shape, size, strict=True)
            ]
            array = lax.slice(f.array, [0] * len(whole), whole)
            ones = tuple(k for k, d in enumerate(f.dims) if d in dn.collapsed_slice_dims)
            left = [d for d in f.dims if d not in dn.collapsed_slice_dims]
            new = {d: batch_out[k] for d, k in paired.items()} | offset_of
            return Labelled(lax.squeeze(array, ones), tuple(left)).relabel(new.__getitem__)
        batching = [d for d in paired if d in f.dims]
        partial = len(indexed) < len(dn.start_index_map)
        array = lax.gather(
            f.array,
            jnp.stack([indices[..., c] for c in indexed], axis=-1) if partial else indices,
            lax.GatherDimensionNumbers(
                offset_dims=tuple(range(indices.ndim - 1, indices.ndim - 1 + len(offsets))),
                collapsed_slice_dims=tuple(
                    sorted(axis[d] for d in dn.collapsed_slice_dims if d in f.dims)
                ),
                start_index_map=tuple(axis[dn.start_index_map[c]] for c in indexed),
                operand_batching_dims=tuple(axis[d] for d in batching),
                start_indices_batching_dims=tuple(paired[d] for d in batching),
            ),
            slice_sizes=[1 if d in paired else s for d, s in zip(f.dims, size, strict=True)],
            mode=params["mode"],
            fill_value=0,  # out of bounds W brings the fill value, and the delta is zero
            indices_are_sorted=params["indices_are_sorted"] and not partial,
            unique_indices=False,
        )
        return Labelled(array, (*batch_out, *labels))

    changed = {*dn.start_index_map, *(d for d, n in enumerate(sizes) if n != shape[d])}
    valid = None
    if params["mode"] == lax.GatherScatterMode.FILL_OR_DROP:
        limit = jnp.array([shape[d] - sizes[d] for d in dn.start_index_map], indices.dtype)
        valid = Labelled(jnp.all((indices >= 0) & (indices <= limit), axis=-1), tuple(batch_out))
    fill = params.get("fill_value")  # None is NaN, which DoRA's columns do not change
    known = valid is None or fill is None or fill == 0 or fill != fill
    return Move(
        tuple(sources),
        apply,
        picked,
        frozenset(paired),
        frozenset(changed),
        valid,
        traced=True,
        fills=frozenset() if known else frozenset(dn.start_index_map),
    )


def all_gather(ndim: int, axis: int, names: Any, groups: Any, tiled: bool) -> Move:
    """Joins the devices' blocks along a dim (tiled), or stacks them along a new one."""

    def apply(f: Labelled) -> Labelled:
        if tiled and axis not in f.dims:
            return f
        at = f.dims.index(axis) if tiled else 0
        array = lax.all_gather(f.array, names, axis_index_groups=groups, axis=at, tiled=tiled)
        return Labelled(array, f.dims) if tiled else Labelled(array, (axis, *shifted(f.dims)))

    def shifted(dims: Iterable[int]) -> Dims:
        return tuple(d + (d >= axis) for d in dims)

    if tiled:
        return Move(tuple((d,) for d in range(ndim)), apply, changed=frozenset([axis]))
    sources = [(d,) for d in range(ndim)]
    return Move((*sources[:axis], (), *sources[axis:]), apply)


def project(spec: Sequence[Any], dims: Dims, rank: Any = None) -> P:
    """The PartitionSpec of a factor with these dims, W's being `spec`."""
    return P(*(rank if d == RANK else spec[d] if d < len(spec) else None for d in dims))
