"""A weight under interpretation: an array plus low-rank terms, moved, contracted, never summed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from jaxlora import _compat
from jaxlora._contractions import Contraction
from jaxlora._moves import RANK, Dims, Labelled, Move, Unfactorable, contract, times
from jaxlora._weight import LoraWeight, widened


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True, eq=False)
class Term:
    """One low-rank term: scale * sum_r a b, over a window of W's dims.

    Attributes:
      a, b: factors; a dim of W spanned by both is stacked, by a alone an input, by b alone an
        output, by neither constant (unit and broadcast dims).
      scale: over stacked dims, float32.
      window: {dim: (start, size of W's dim)} for dims of which the term covers only a part, as in a
        concatenation of weights; as sorted items, to be hashable.
    """

    a: Labelled
    b: Labelled
    scale: Labelled
    window: tuple[tuple[int, tuple[int, int]], ...] = ()

    def tree_flatten(self):
        return (self.a, self.b, self.scale), self.window

    @classmethod
    def tree_unflatten(cls, window, children):
        a, b, scale = children
        return cls(a, b, scale, window)

    @property
    def factors(self) -> tuple[Labelled, Labelled, Labelled]:
        return self.a, self.b, self.scale

    def size(self, d: int) -> int:
        """How much of dim d the term covers; 1 where it is constant."""
        for f in self.factors:
            if d in f.dims:
                return f.array.shape[f.dims.index(d)]
        return 1

    def each(self, f: Callable[[Labelled], Labelled], window: dict | None = None) -> Term:
        kept = self.window if window is None else tuple(sorted(window.items()))
        return Term(f(self.a), f(self.b), f(self.scale), kept)

    def filled(self, dims: Iterable[int]) -> Term:
        """The same term with no window on `dims`: its factors padded with zeros."""
        window, term = dict(self.window), self
        for d in dims:
            if d not in window:
                continue
            start, total = window.pop(d)
            widths = (start, total - start - term.size(d), 0)

            def padded(f: Labelled, d=d, widths=widths) -> Labelled:
                if d not in f.dims:
                    return f
                config = [widths if e == d else (0, 0, 0) for e in f.dims]
                return Labelled(lax.pad(f.array, jnp.zeros((), f.array.dtype), config), f.dims)

            term = term.each(padded, window)
        return term

    def spread(self, d: int, n: int) -> Term:
        """The same term, with dim d of size n in its factors if it was constant along d."""
        if d in self.a.dims or d in self.b.dims:
            return self
        return dataclasses.replace(self, a=self.a.spread(d, n), b=self.b.spread(d, n))

    def value(self, shape: Sequence[int], dtype: Any, precision: Any) -> jax.Array:
        """scale * a b as an array of `shape`; only for looked-up rows, and on request."""
        dims = tuple(d for d in range(len(shape)) if d in self.a.dims or d in self.b.dims)
        scaled = times(self.a, self.scale, dtype)
        b = Labelled(self.b.array.astype(dtype), self.b.dims)
        array = contract(scaled, b, dims, precision).array
        return self.placed(Labelled(array, dims), {d: d for d in range(len(shape))}, shape)

    def placed(self, part: Labelled, at: dict[int, int], shape: Sequence[int]) -> jax.Array:
        """`part`, labelled by output axes, broadcast to `shape`; zero outside of the window.

        Args:
          at: {dim of W: output axis}.
        """
        window = {at[d]: span for d, span in self.window if d in at}
        inner = list(shape)
        for axis, d in ((axis, d) for d, axis in at.items()):
            if axis in window:
                inner[axis] = self.size(d)
        array = lax.broadcast_in_dim(part.array, inner, part.dims)
        if window:
            config = [(0, 0, 0)] * len(shape)
            for axis, (start, total) in window.items():
                config[axis] = (start, total - start - inner[axis], 0)
            array = lax.pad(array, jnp.zeros((), array.dtype), config)
        return array


ANY = "*"
"""In place of a mesh axis: it is not known which."""


class Static(str):
    """A text that takes part in no comparison, so that it never causes a second trace."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Static)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return 0


class Node:
    """A value of the interpreter that stands for a weight: a `Factored`, or a `Probe`.

    `w` is an array of the weight's present shape; `origin` says which input of the enclosing
    function this node is, unchanged, if it is one.
    """

    w: Any
    origin: int | None
    only_records: ClassVar[bool] = False  # it has no terms, and two of them may meet

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.w.shape)

    @property
    def is_row(self) -> bool:
        """Whether this is a looked-up part of the weight, which may be summed up."""
        return False

    def replace(self, **changes: Any):
        """The same node with some fields changed; what is changed is no input any more."""
        return dataclasses.replace(self, **{"origin": None, **changes})  # type: ignore[type-var]

    def leaf_dims(self) -> list[Dims]:
        """For each leaf of this node as a pytree, the dims of W along its axes."""
        raise NotImplementedError

    def moved(self, move: Move, w: Any) -> Any:
        raise NotImplementedError

    def contracted(self, y: Any, x: Any, contraction: Contraction) -> Any:
        """What the model sees of a contraction with x; y is that of w."""
        raise NotImplementedError

    def scaled(self, w: Any, factor: Any) -> Any:
        """This times `factor`; w is that already."""
        raise NotImplementedError

    @classmethod
    def joined(cls, w: Any, parts: Sequence[Any], axis: int) -> Any:
        """The concatenation w of nodes and arrays."""
        raise NotImplementedError

    def dropped(self, d: int, leaves: Sequence[Any]) -> Any:
        """This node at one index of dim d, its leaves given."""
        raise NotImplementedError

    def stacked(self, leaves: Sequence[Any]) -> Any:
        """This node with a new leading dim on every leaf."""
        raise NotImplementedError

    def filled(self, d: int) -> Any:
        """This node with every leaf spanning dim d spanning all of it."""
        return self

    def entered(self, k: int) -> Any:
        """This node as argument k of a jit whose trace others may share."""
        return self.replace(origin=k)

    def left(self, values: Sequence[Any]) -> Any:
        """This node outside of the jit whose arguments were `values`."""
        return self.replace()

    def blocks(self, leaves: Sequence[Any], spec: Sequence[Any], nested: bool) -> Any:
        """This node as one device of a shard_map sees it, its leaves given."""
        raise NotImplementedError

    def same_over(self, names: Iterable[str], dim: int) -> bool:
        """Whether factors that do not span `dim` are the same on all devices along these axes."""
        return True

    def varying(self) -> Any:
        """This node, all of its leaves typed as varying over the manual axes that w varies over."""
        axes = _compat.varying(self.w)
        node = jax.tree.map(lambda leaf: _compat.vary(leaf, axes), self)
        return node.replace(origin=self.origin)

    def like(self, other: Node) -> bool:
        """Whether control flow may choose between the two, leaf by leaf."""

        def form(node: Node) -> Any:
            node = node.replace()
            return jax.tree.structure(node), [(x.shape, x.dtype) for x in jax.tree.leaves(node)]

        return form(self) == form(other)

    def skeleton(self) -> Any:
        """This node without its arrays: what may outlive a trace."""
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), self)

    def either(self, nodes: Sequence[Any], leaves: Sequence[Any]) -> Any:
        """The node, with these leaves, that is one of `nodes`, all alike."""
        return jax.tree.unflatten(jax.tree.structure(self.replace()), leaves)


def _joined_paths(nodes: Iterable[Factored]) -> str:
    each = (path for node in nodes for path in node.path.split(", "))
    return ", ".join(dict.fromkeys(each))


def unmarked(values: Iterable[Any]) -> list[Any]:
    """The values, whose nodes are no input of the function that gets them."""
    return [v.replace() if isinstance(v, Node) else v for v in values]


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True, eq=False)
class Factored(Node):
    """W + the sum of its terms.

    Attributes:
      w: the base array, in its present shape and dtype.
      terms: the adapters.
      path: for messages.
      origin: see Node.
      picked: present dims that count picked indices (the tokens of an embedding lookup).
      sides: the sides, `i` or `o`, of which a dim was picked.
      sharded: pairs (dim, mesh axis): under shard_map, a device has a block of that dim.
      varied: mesh axes over which the factors may differ between devices in other ways: along dims
        that are gone, or by what was traced (ANY axis).
      inputs: which arguments of the enclosing jit it was made from.
    """

    w: Any
    terms: tuple[Term, ...]
    path: str
    origin: int | None = None
    picked: frozenset[int] = frozenset()
    sides: frozenset[str] = frozenset()
    sharded: frozenset[tuple[int, str]] = frozenset()
    varied: frozenset[str] = frozenset()
    inputs: frozenset[int] = frozenset()

    def tree_flatten(self):
        aux = (Static(self.path), self.origin, self.picked, self.sides)
        return (self.w, self.terms), (*aux, self.sharded, self.varied, self.inputs)

    @classmethod
    def tree_unflatten(cls, aux, children):
        return cls(*children, *aux)

    @classmethod
    def of(cls, lw: LoraWeight, path: str, origin: int | None = None) -> Factored:
        s, i, o = (tuple(d for d, r in enumerate(lw.roles) if r == letter) for letter in "sio")
        term = Term(
            a=Labelled(lw.a, (*s, *i, RANK)),
            b=Labelled(lw.b, (*s, RANK, *o)),
            # Frozen, as w is: no gradient is computed that freeze_base would throw away.
            scale=Labelled(lax.stop_gradient(lw.scale.astype(widened(lw.w.dtype))), s),
        )
        return cls(lax.stop_gradient(lw.w), (term,), path, origin)

    def like(self, other: Node) -> bool:
        alike: dict[str, Any] = {
            "sharded": frozenset(),
            "varied": frozenset(),
            "inputs": frozenset(),
        }
        mine: Node = self.replace(**alike)
        return Node.like(mine, other.replace(**alike) if type(other) is Factored else other)

    def either(self, nodes: Sequence[Any], leaves: Sequence[Any]) -> Factored:
        return Node.either(self, nodes, leaves).replace(
            sharded=frozenset().union(*(n.sharded for n in nodes)),
            varied=frozenset([ANY]).union(*(n.varied for n in nodes)),
            inputs=frozenset().union(*(n.inputs for n in nodes)),
        )

    def entered(self, k: int) -> Factored:
        return self.replace(origin=k, inputs=frozenset([k]))

    def left(self, values: Sequence[Any]) -> Factored:
        made_from = [values[k] for k in sorted(self.inputs)]
        inputs = frozenset().union(*(v.inputs for v in made_from))
        return self.replace(path=_joined_paths(made_from), inputs=inputs)

    def blocks(self, leaves: Sequence[Any], spec: Sequence[Any], nested: bool) -> Factored:
        node: Factored = jax.tree.unflatten(jax.tree.structure(self), leaves)
        axes = [
            (d, entry if isinstance(entry, tuple) else (entry,)) for d, entry in enumerate(spec)
        ]
        pairs = {(d, axis) for d, names in axes for axis in names if axis is not None}
        return node.replace(
            origin=self.origin,
            sharded=frozenset(pairs) | (self.sharded if nested else frozenset()),
            varied=self.varied if nested else frozenset(),
        )

    def same_over(self, names: Iterable[str], dim: int) -> bool:
        others = {axis for d, axis in self.sharded if d != dim} | self.varied
        return ANY not in others and not others & {*names}

    @property
    def is_row(self) -> bool:
        return self._all_picked("i") or self._all_picked("o")

    def _all_picked(self, side: str) -> bool:
        """Whether single inputs (or outputs) were picked: these are rows (or columns) of W."""
        own = {d for d, r in enumerate(self.roles()) if r == side and self.shape[d] != 1}
        return side in self.sides and own <= self.picked

    @classmethod
    def joined(cls, w: Any, parts: Sequence[Any], axis: int) -> Factored:
        """The concatenation w of nodes and arrays: each term keeps to its own window."""
        terms, at = [], 0
        for part in parts:
            for t in part.terms if isinstance(part, Factored) else ():
                t = t.filled([axis]).spread(axis, part.shape[axis])
                terms.append(t.each(lambda f: f, dict(t.window) | {axis: (at, w.shape[axis])}))
            at += part.shape[axis]
        nodes = [p for p in parts if isinstance(p, Factored)]
        return cls(
            w,
            tuple(terms),
            _joined_paths(nodes),
            sharded=frozenset().union(*(n.sharded for n in nodes)),
            varied=frozenset().union(*(n.varied for n in nodes)),
            inputs=frozenset().union(*(n.inputs for n in nodes)),
        )

    def roles(self) -> str:
        """The roles of the present dims, of the first term; '1' for dims that it does not span."""
        term = self.terms[0]
        letters = {(True, True): "s", (True, False): "i", (False, True): "o"}
        return "".join(
            letters.get((d in term.a.dims, d in term.b.dims), "1") for d in range(len(self.shape))
        )

    def leaf_dims(self) -> list[Dims]:
        return [tuple(range(len(self.shape))), *(f.dims for t in self.terms for f in t.factors)]

    def moved(self, move: Move, w: Any) -> Any:
        picked = self.picked | move.picked
        node = self.replace(
            w=w,
            terms=tuple(
                t for t in (move.on_term(t, self.shape) for t in self.terms) if t is not None
            ),
            picked=frozenset(j for j, s in enumerate(move.sources) if picked & set(s)),
            sides=self.sides | ({self.roles()[d] for d in picked} & {"i", "o"}),
            sharded=frozenset(
                (j, axis)
                for d, axis in self.sharded
                for j, source in enumerate(move.sources)
                if d in source
            ),
            varied=self.varied
            | {axis for d, axis in self.sharded if not any(d in s for s in move.sources)}
            | ({ANY} if move.traced else set()),
        )
        # A lookup of some rows (an embedding) is an activation from here on. As many rows as there
        # are may be a permutation of the weight, and stay one until they are used.
        rows = node._all_picked("i") and w.size < self.w.size
        return node.sum(move.valid) if not node.terms or rows else node

    def dropped(self, d: int, leaves: Sequence[Any]) -> Factored:
        old = jax.tree.structure(self)
        node: Factored = jax.tree.unflatten(old, leaves)

        def drop(f: Labelled) -> Labelled:
            left = tuple(e for e in f.dims if e != d)
            return Labelled(f.array, left).relabel(lambda e: e - (e > d))

        terms = tuple(t.each(drop, {e - (e > d): span for e, span in t.window}) for t in node.terms)
        return node.replace(
            terms=terms,
            picked=frozenset(e - (e > d) for e in self.picked if e != d),
            sides=self.sides | ({self.roles()[d]} & {"i", "o"}),
            sharded=frozenset((e - (e > d), axis) for e, axis in self.sharded if e != d),
            varied=self.varied | {axis for e, axis in self.sharded if e == d},
        )

    def stacked(self, leaves: Sequence[Any]) -> Factored:
        node: Factored = jax.tree.unflatten(jax.tree.structure(self), leaves)

        def add(f: Labelled) -> Labelled:
            return Labelled(f.array, (0, *f.relabel(lambda e: e + 1).dims))

        terms = tuple(t.each(add, {e + 1: span for e, span in t.window}) for t in node.terms)
        return node.replace(
            terms=terms,
            picked=frozenset(e + 1 for e in self.picked),
            sharded=frozenset((e + 1, axis) for e, axis in self.sharded),
            varied=self.varied | {ANY},
        )

    def filled(self, d: int) -> Factored:
        return self.replace(terms=tuple(t.filled([d]) for t in self.terms), origin=self.origin)

    def sum(self, valid: Labelled | None = None) -> jax.Array:
        """W + the deltas, in W's dtype: rows of a looked-up weight.

        A row out of bounds may be NaN, and so may be what comes back to it; neither may reach the
        gradient of the factor that all rows share. It does not reach a table's either.
        """
        total = self.w
        for t in self.terms:
            delta = t.value(self.shape, total.dtype, precision=None)
            if valid is not None:
                mask = lax.broadcast_in_dim(valid.array, self.shape, valid.dims)
                delta = jnp.where(mask, delta, 0)
            total = total + delta
        return total

    def materialized(self) -> jax.Array:
        """W + the deltas in float32 arithmetic at the highest precision, rounded once."""
        wide = widened(self.w.dtype)
        total = self.w.astype(wide)
        for t in self.terms:
            total = total + t.value(self.shape, wide, lax.Precision.HIGHEST)
        return total.astype(self.w.dtype)

    def scaled(self, w: Any, factor: Any) -> Factored:
        """This times `factor`, which is a scalar or varies along dims that one factor spans."""
        ndim = len(self.shape)
        factor = jnp.asarray(factor)
        along = [d for d in range(ndim) if factor.ndim == ndim and factor.shape[d] != 1]
        flat = factor.reshape([factor.shape[d] for d in along])

        def scale(t: Term) -> Term:
            for name in ("scale", "a", "b"):
                f: Labelled = getattr(t, name)
                if set(along) <= set(f.dims):
                    window = dict(t.window)
                    part = flat
                    for k, d in enumerate(along):
                        if d in window:
                            part = lax.slice_in_dim(
                                part, window[d][0], window[d][0] + t.size(d), axis=k
                            )
                    wide = jnp.promote_types(f.array.dtype, part.dtype)
                    product = times(f, Labelled(part, tuple(along)), wide)
                    changes: dict[str, Any] = {name: product}
                    return dataclasses.replace(t, **changes)
            raise Unfactorable("its factor varies along input dims and output dims alike")

        varied = self.varied | ({ANY} if isinstance(factor, jax.core.Tracer) else set())
        return self.replace(w=w, terms=tuple(map(scale, self.terms)), varied=varied)

    def contracted(self, y: Any, x: Any, contraction: Contraction) -> Any:
        with jax.named_scope("lora"):  # for profiles
            for t in self.terms:
                share = contraction.share(self, t, x, y)
                y = lax.add(y, lax.convert_element_type(share, y.dtype))
        return y
