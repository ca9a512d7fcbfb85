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
from jaxlora._deferred import Decoded, Deferred, used, value_of
from jaxlora._dropout import Dropout
from jaxlora._matrix import widened
from jaxlora._moves import RANK, Dims, Labelled, Move, Unfactorable, times
from jaxlora._quantized import is_quantized
from jaxlora._terms import Term
from jaxlora._weight import LoraWeight, excess

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

    `w` is an array of the weight's present shape, or will be (`Deferred`); `origin` says which
    input of the enclosing function this node is, unchanged, if it is one.
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
        return [tuple(range(len(self.shape)))]

    def split_dims(self) -> list[Dims]:
        """The same for splitting dims over devices, where blocks of a quantized one stay whole."""
        return self.leaf_dims()

    def moved(self, move: Move, w: Any) -> Any:
        raise NotImplementedError

    def contracted(self, x: Any, contraction: Contraction) -> Any:
        """What the model sees of a contraction with x."""
        raise NotImplementedError

    def after(self, uses: int) -> Any:
        """This node after so many uses."""
        return self

    def into(self, step: Any) -> Any:
        """This node within that step of a loop."""
        return self

    @property
    def drops(self) -> bool:
        """Whether what it does depends on where it is used."""
        return False

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

    def splitting(self, d: int) -> Any:
        """The same, if d is to be split over devices."""
        return self.filled(d)

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
        axes = frozenset().union(*map(_compat.varying, jax.tree.leaves(self.w)))
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
    """W + the sum of its terms, times 1 + the sum of their excesses.

    Without terms it is a quantized weight that has no adapter.

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
        drop = None
        if lw.dropout_key is not None and lw.dropout:
            drop = Dropout.of(lw.dropout_key, lw.dropout, s)
        term = Term(
            a=Labelled(lw.a, (*s, *i, RANK)),
            b=Labelled(lw.b, (*s, RANK, *o)),
            # Frozen, as w is: no gradient is computed that freeze_base would throw away.
            scale=Labelled(lax.stop_gradient(lw.scale.astype(widened(lw.w.dtype))), s),
            # Once a call, before any slicing: a part of the inputs has not the norm of all.
            excess=None if lw.magnitude is None else Labelled(excess(lw), (*s, *o)),
            dropout=drop,
        )
        return cls(frozen(lw.w), (term,), path, origin)

    @classmethod
    def plain(cls, w: Any, path: str, origin: int | None = None) -> Factored:
        """A quantized weight without an adapter."""
        return cls(frozen(w), (), path, origin)

    def after(self, uses: int) -> Factored:
        return self._dropping(lambda drop: drop.after(uses))

    def into(self, step: Any) -> Factored:
        return self._dropping(lambda drop: drop.into(step))

    def _dropping(self, f: Callable[[Dropout], Dropout]) -> Factored:
        if not self.drops:
            return self
        return self.replace(origin=self.origin, terms=tuple(t.dropping(f) for t in self.terms))

    @property
    def drops(self) -> bool:
        return any(t.dropout is not None for t in self.terms)

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
            w=node.w.resized() if isinstance(node.w, Deferred) else node.w,
            sharded=frozenset(pairs) | (self.sharded if nested else frozenset()),
            varied=self.varied if nested else frozenset(),
        )

    def same_over(self, names: Iterable[str], dim: int) -> bool:
        others = {axis for d, axis in self.sharded if d != dim} | self.varied
        return ANY not in others and not others & {*names}

    @property
    def is_row(self) -> bool:
        if not self.terms:  # which dims are its inputs is not known
            return bool(self.sides)
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
            size = part.shape[axis]
            for t in part.terms if isinstance(part, Factored) else ():
                terms.append(t.windowed(axis, size, (at, w.shape[axis])))
            at += size
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
        if not self.terms:
            return "i" * len(self.shape)
        term = self.terms[0]
        letters = {(True, True): "s", (True, False): "i", (False, True): "o"}
        return "".join(
            letters.get((d in term.a.dims, d in term.b.dims), "1") for d in range(len(self.shape))
        )

    def leaf_dims(self) -> list[Dims]:
        own = self.w.leaf_dims() if isinstance(self.w, Deferred) else super().leaf_dims()
        return [*own, *(f.dims for t in self.terms for f in t.factors)]

    def split_dims(self) -> list[Dims]:
        own = self.w.split_dims() if isinstance(self.w, Deferred) else super().leaf_dims()
        return [*own, *(f.dims for t in self.terms for f in t.factors)]

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
        rows = bool(self.terms) and node._all_picked("i") and w.size < self.w.size
        if not rows and any(t.grows_along(d) for t in self.terms for d in move.fills):
            raise Unfactorable("it fills up a weight whose columns DoRA scales")
        gone = bool(self.terms) and not node.terms and not isinstance(w, Deferred)
        return node.sum(move.valid) if gone or rows else node

    def dropped(self, d: int, leaves: Sequence[Any]) -> Factored:
        old = jax.tree.structure(self)
        node: Factored = jax.tree.unflatten(old, leaves)

        def drop(f: Labelled) -> Labelled:
            left = tuple(e for e in f.dims if e != d)
            return Labelled(f.array, left).relabel(lambda e: e - (e > d))

        terms = tuple(t.each(drop, {e - (e > d): span for e, span in t.window}) for t in node.terms)
        return node.replace(
            w=node.w.dropped(d) if isinstance(node.w, Deferred) else node.w,
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
            w=node.w.stacked() if isinstance(node.w, Deferred) else node.w,
            terms=terms,
            picked=frozenset(e + 1 for e in self.picked),
            sharded=frozenset((e + 1, axis) for e, axis in self.sharded),
            varied=self.varied | {ANY},
        )

    def filled(self, d: int) -> Factored:
        terms = tuple(t.filled([d]) for t in self.terms)
        w = self.w.spanning(d) if isinstance(self.w, Deferred) else self.w
        return self.replace(w=w, terms=terms, origin=self.origin)

    def splitting(self, d: int) -> Factored:
        terms = tuple(t.filled([d]) for t in self.terms)
        w = self.w.splitting(d) if isinstance(self.w, Deferred) else self.w
        return self.replace(w=w, terms=terms, origin=self.origin)

    def sum(self, valid: Labelled | None = None) -> jax.Array:
        """The value in W's dtype: rows of a looked-up weight.

        A row out of bounds may be NaN, and so may be what comes back to it; neither may reach the
        gradient of the factor that all rows share. It does not reach a table's either.
        """
        total, mask = value_of(self.w), None
        if valid is not None:
            mask = lax.broadcast_in_dim(valid.array, self.shape, valid.dims)
        for t in self.terms:
            delta = t.value(self.shape, total.dtype, precision=None)
            total = total + (delta if mask is None else jnp.where(mask, delta, 0))
        return self._grown(total, mask)

    def materialized(self) -> jax.Array:
        """The value in float32 arithmetic at the highest precision, rounded once."""
        wide = widened(self.w.dtype)
        total = value_of(self.w).astype(wide)
        for t in self.terms:
            total = total + t.value(self.shape, wide, lax.Precision.HIGHEST)
        return self._grown(total).astype(self.w.dtype)

    def _grown(self, total: jax.Array, mask: Any = None) -> jax.Array:
        """W + the deltas, times 1 + the excesses."""
        ndim = len(self.shape)
        axes = {d: d for d in range(ndim)}
        gains = [t.gain_along(axes, ndim) for t in self.terms if t.excess is not None]
        if mask is not None:
            gains = [jnp.where(mask, gain, 0) for gain in gains]
        return grown(total, [(gain, total) for gain in gains])

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

    def contracted(self, x: Any, contraction: Contraction) -> Any:
        on_x, on_y = contraction.sides(self)
        x = grown(x, [(contraction.gain_on_x(self, t, x), x) for t in on_x])
        y = met(contraction, x, self.w)
        with jax.named_scope("lora"):  # for profiles
            shares, bases = [], {}
            for k, t in enumerate(self.terms):
                seen = x
                if t.dropout is not None and contraction.order(self, t)[0] is t.a:
                    # One weight may be here twice, beside itself.
                    drop = t.dropout.into(k) if k else t.dropout
                    kept = drop.kept(x)
                    seen = drop.grown(contraction.operand(self, kept, y))
                    if t in on_y:  # DoRA sees what is dropped too
                        bases[t] = drop.grown(met(contraction, kept, self.w, t, y))
                shares.append(contraction.share(self, t, seen, y))
            total = _added(y, shares)
            seen = [_added(bases[t], shares) if t in bases else total for t in on_y]
            gains = [contraction.gain_on_y(self, t, y) for t in on_y]
            return grown(total, list(zip(gains, seen, strict=True)))


def met(contraction: Contraction, x: Any, w: Any, t: Any = None, y: Any = None) -> Any:
    """A contraction of the base; of a term's window of it, if one is given, in the shape of y."""

    def base(x: Any, w: Any, *arrays: Any) -> Any:
        here = contraction.given(*arrays)
        return here.base(x, w) if t is None else here.base_of(t, y, x, w)

    return used(base, x, w, contraction.arrays, contraction.eqn if t is None else None)


def frozen(w: Any) -> Any:
    """A base weight as the interpreter has it: an array, or what will be one."""
    return Decoded.of(w) if is_quantized(w) else lax.stop_gradient(w)


def _added(y: Any, shares: Iterable[Any]) -> Any:
    for share in shares:
        y = lax.add(y, lax.convert_element_type(share, y.dtype))
    return y


def grown(y: Any, gains: Sequence[tuple[Any, Any]]) -> Any:
    """y + the sum of gain * x over the pairs (gain, x), in float32 or wider, in y's dtype."""
    wide = widened(y.dtype)

    def sum_up(y: Any, gains: Sequence[tuple[Any, Any]]) -> Any:
        total = y.astype(wide)
        for gain, x in gains:
            total = total + gain.astype(wide) * x.astype(wide)
        return total.astype(y.dtype)

    if not gains:
        return y
    if wide == y.dtype:
        return sum_up(y, gains)
    # What the gain's gradient needs is kept as it is, not in float32.
    return jax.checkpoint(sum_up, prevent_cse=False)(y, gains)
