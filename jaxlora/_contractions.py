"""How a weight meets an activation: what a contraction is, and the commonest, the matmul.

Each contraction reads from its equation which dims of the weight it sums over. One factor spans
those (it comes first), the other spans the dims that stay: x meets the first factor, the result is
scaled, and meets the second.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import JaxprEqn

from jaxlora import _compat
from jaxlora._errors import RolesError
from jaxlora._moves import RANK, Dims, Labelled, Unfactorable, contract, times
from jaxlora._settled import settled

if TYPE_CHECKING:
    from jaxlora._factored import Factored
    from jaxlora._terms import Term


@dataclasses.dataclass(frozen=True)
class Contraction:
    """An equation that contracts a weight with an activation.

    Attributes:
      eqn: the equation.
      where: () -> the user's line.
      ndim: of the weight.
      summed: dims of the weight that are summed over.
      batch: dims of the weight that pair with dims of the activation and stay.
      window: those of `summed` that a convolution slides over; either factor may span them.
    """

    eqn: JaxprEqn
    where: Callable[[], str]
    ndim: int
    summed: Dims
    batch: Dims
    window: Dims = dataclasses.field(default=(), kw_only=True)

    @property
    def free(self) -> Dims:
        return tuple(d for d in range(self.ndim) if d not in (*self.summed, *self.batch))

    def base(self, x: Any, w: Any) -> Any:
        """The equation itself, of an activation and a plain weight."""
        return _compat.bind(self.eqn, [x, w])[0]

    @property
    def arrays(self) -> tuple[Any, ...]:
        """The arrays that it has besides the two."""
        return ()

    def given(self, *arrays: Any) -> Contraction:
        """The same with these in their place."""
        return self

    def base_of(self, t: Term, y: Any, x: Any, w: Any) -> Any:
        """The equation with what a term's window leaves of the plain weight; of y's shape."""
        return self.base(x, w)

    def sides(self, node: Factored) -> tuple[list[Term], list[Term]]:
        """DoRA's terms: those whose columns are summed over, and those whose columns stay.

        The first scale the activation, the others the result.

        Raises:
          Unfactorable: columns that are neither, or some of each.
        """
        on_x, on_y = [], []
        for t in node.terms:
            if t.excess is not None:
                spans = t.gain_spans()
                if spans <= {*self.batch, *self.free}:
                    on_y.append(t)
                elif spans <= {*self.batch, *self.summed} - {*self.window}:
                    on_x.append(t)
                else:
                    raise Unfactorable("DoRA's columns are partly summed over")
        if on_x and on_y:
            raise Unfactorable("DoRA's columns of some parts are summed over, of others not")
        return on_x, on_y

    def gain_on_x(self, node: Factored, t: Term, x: Any) -> Any:
        """The excess of a term, broadcast along the activation."""
        raise NotImplementedError

    def gain_on_y(self, node: Factored, t: Term, y: Any) -> Any:
        """The excess of a term, broadcast along the result."""
        raise NotImplementedError

    def share(self, node: Factored, t: Term, x: Any, y: Any) -> Any:
        """What term t of the weight adds to y, the contraction of the base with x.

        Raises:
          RolesError: the roles say that a contracted dim is an output or a free one an input.
          Unfactorable: nothing is contracted with the adapter.
        """
        raise NotImplementedError

    def met(self, node: Factored, t: Term, x: Any, y: Any) -> Labelled:
        """x as it meets the term's first factor: labelled by W's dims, RANK, and dims of its own.

        Raises:
          Unfactorable: the kind of contraction has no such form.
        """
        raise Unfactorable("its inputs have no form of their own")

    def operand(self, node: Factored, x: Any, y: Any) -> Any:
        """x in the dtype in which it meets the adapter.

        Narrow activations (integers, 8-bit floats) meet it in the result's dtype, as do those that
        meet a wider weight.
        """
        narrow = not jnp.issubdtype(x.dtype, jnp.inexact) or x.dtype.itemsize == 1
        narrow = narrow or x.dtype.itemsize < node.w.dtype.itemsize
        dtype = x.dtype if not narrow else y.dtype if y.dtype.itemsize > 1 else jnp.bfloat16
        return lax.convert_element_type(x, dtype)

    def order(self, node: Factored, t: Term) -> tuple[Labelled, Labelled]:
        """The factors, the one that spans summed dims first."""

        def spans(f: Labelled, other: Labelled) -> set[int]:
            return {d for d in f.dims if d != RANK and d not in other.dims and t.size(d) != 1}

        summed, left = set(self.summed) - set(self.window), set(self.free)
        by_a, by_b = spans(t.a, t.b) & summed, spans(t.b, t.a) & summed
        # Where no factor spans what is summed (one input channel), the other one goes last.
        last_a = not by_b and spans(t.a, t.b) & left and not spans(t.b, t.a) & left
        start, end = (t.b, t.a) if not by_a and (by_b or last_a) else (t.a, t.b)
        if (by_a and by_b) or ((by_a or by_b) and spans(start, end) & left):
            uses = "".join(letter_of(d, self.summed, self.batch) for d in range(self.ndim))
            raise RolesError(
                f"{node.path}: got roles {node.roles()!r} (of its dims as they reach "
                f"`{self.eqn.primitive.name}` at {self.where()}), but it is used as {uses!r}: "
                "that contracts all input dims or all output dims of a weight. Give the right "
                "roles in LoraConfig(roles={...}), or read them from the model: "
                "jaxlora.init(..., roles=jaxlora.trace_roles(fn, params, *args))."
            )
        if not (by_a or by_b or {*self.summed} & {*t.a.dims, *t.b.dims}):
            raise Unfactorable("it contracts no dim of the weight")
        return start, end


@dataclasses.dataclass(frozen=True)
class Dot(Contraction):
    """dot_general.

    Attributes:
      x_summed, x_batch: the dims of the activation that pair with `summed` and `batch`.
      first: whether the weight is the left operand.
    """

    x_summed: Dims
    x_batch: Dims
    first: bool

    @classmethod
    def of(cls, eqn: JaxprEqn, where: Callable[[], str], first: bool) -> Dot:
        summed, batch = eqn.params["dimension_numbers"]
        mine, its = (0, 1) if first else (1, 0)
        return cls(
            eqn,
            where,
            _compat.ndim(eqn.invars[mine]),
            tuple(summed[mine]),
            tuple(batch[mine]),
            tuple(summed[its]),
            tuple(batch[its]),
            first,
        )

    def base(self, x: Any, w: Any) -> Any:
        return _compat.bind(self.eqn, [w, x] if self.first else [x, w])[0]

    def _labels(self, x: Any) -> tuple[Dims, Dims]:
        """The dims of W along the axes of x and of the result; x's own are numbered past W's."""
        x_dims = list(range(self.ndim, self.ndim + x.ndim))
        for axes, dims in ((self.x_summed, self.summed), (self.x_batch, self.batch)):
            for axis, d in zip(axes, dims, strict=True):
                x_dims[axis] = d
        x_free = tuple(d for d in x_dims if d >= self.ndim)
        rest = (*self.free, *x_free) if self.first else (*x_free, *self.free)
        return tuple(x_dims), (*self.batch, *rest)

    def gain_on_x(self, node: Factored, t: Term, x: Any) -> Any:
        pairs = zip((*self.summed, *self.batch), (*self.x_summed, *self.x_batch), strict=True)
        return t.gain_along(dict(pairs), x.ndim)

    def _axes(self, y: Any) -> dict[int, int]:
        """{dim of W: axis of the result}."""
        # The batch comes first, then what is left of the left operand, then of the right.
        n_batch, n_free = len(self.batch), len(self.free)
        start = n_batch if self.first else y.ndim - n_free
        axes = dict(zip(self.batch, range(n_batch), strict=True))
        return axes | dict(zip(self.free, range(start, start + n_free), strict=True))

    def gain_on_y(self, node: Factored, t: Term, y: Any) -> Any:
        return t.gain_along(self._axes(y), y.ndim)

    def base_of(self, t: Term, y: Any, x: Any, w: Any) -> Any:
        part, widths = w, [(0, 0, 0)] * y.ndim
        for d, (start, total) in t.window:
            if d in self.free:
                end = start + t.size(d)
                part = lax.slice_in_dim(part, start, end, axis=d)
                widths[self._axes(y)[d]] = (start, total - end, 0)
        seen = self.base(x, part)
        return seen if part is w else lax.pad(seen, jnp.zeros((), seen.dtype), widths)

    def share(self, node: Factored, t: Term, x: Any, y: Any) -> Any:
        x_dims, out = self._labels(x)
        start, _ = self.order(node, t)
        return _dot_share(
            Labelled(self.operand(node, x, y), x_dims),
            t,
            start is t.a,
            (self.summed, self.batch, self.free),
            out,
            y.shape,
            self.first,
            self.eqn.params["precision"],
        )

    def met(self, node: Factored, t: Term, x: Any, y: Any) -> Labelled:
        x_dims, out = self._labels(x)
        start, end = self.order(node, t)
        x = Labelled(self.operand(node, x, y), x_dims)
        return _met(x, t, start, end, self.summed, out, self.first, self.eqn.params["precision"])


# Inlined where it is used, as `jax.numpy`'s own functions are: the layers of a model are alike, so
# that only the first one's is traced.
@functools.partial(jax.jit, static_argnums=range(2, 8), inline=_compat.INLINE)
def _dot_share(
    x: Labelled,
    t: Term,
    a_first: bool,
    dims: tuple[Dims, Dims, Dims],
    out: Dims,
    shape: tuple[int, ...],
    first: bool,
    precision: Any,
) -> Any:
    """`Dot.share` of a labelled activation.

    Args:
      x: labelled by W's dims where it meets W; its own are numbered past W's.
      t: the term.
      a_first: whether x meets a first, and b second.
      dims: the summed, batch and free dims of W.
      out: the labels of y.
      shape: of y.
      first: whether the weight is the left operand.
      precision: of the equation.
    """
    start, end = (t.a, t.b) if a_first else (t.b, t.a)
    summed, batch, free = dims
    h = _met(x, t, start, end, summed, out, first, precision)
    h = times(h, t.scale, h.array.dtype)
    part = _product(end, h, [d for d in out if d in h.dims or d in end.dims], first, precision)
    part = Labelled(settled(part.array), tuple(out.index(d) for d in part.dims))
    return t.placed(part, {d: out.index(d) for d in (*batch, *free)}, shape)


def _product(f: Labelled, y: Labelled, out: Sequence[int], first: bool, precision: Any) -> Labelled:
    f = Labelled(f.array.astype(y.array.dtype), f.dims)
    return contract(*((f, y) if first else (y, f)), out, precision)


def _met(
    x: Labelled,
    t: Term,
    start: Labelled,
    end: Labelled,
    summed: Dims,
    out: Dims,
    first: bool,
    precision: Any,
) -> Labelled:
    """x times the factor that it meets first."""
    array, x_dims = x.array, list(x.dims)
    for d, (at, _) in t.window:
        if d in x_dims:
            array = lax.slice_in_dim(array, at, at + t.size(d), axis=x_dims.index(d))
    # Dims that the term is constant along: W's equal columns meet the sum of x's rows.
    constant = [d for d in summed if d not in t.a.dims and d not in t.b.dims]
    if constant:
        array = array.sum([x_dims.index(d) for d in constant], dtype=array.dtype)
    x = Labelled(array, tuple(d for d in x_dims if d not in constant))

    later = {*end.dims, *out}  # stacked dims stay for the second factor even if contracted
    kept_x = [d for d in x.dims if d not in start.dims or d in later]
    kept_f = [d for d in start.dims if d not in kept_x and (d in later or d == RANK)]
    together = [d for d in kept_x if d in start.dims]
    alone = [d for d in kept_x if d not in start.dims]
    order = [*together, *(kept_f + alone if first else alone + kept_f)]
    return _product(start, x, order, first, precision)


def letter_of(d: int, summed: Dims, batch: Dims, window: Dims = ()) -> str:
    """How a dim is used, in one letter: as roles, and `k` for a window."""
    return "k" if d in window else "i" if d in summed else "s" if d in batch else "o"


def whole(f: Labelled, dims: Sequence[int], shape: Sequence[int]) -> Any:
    """A factor as an array with exactly these dims of W, repeated along those that it lacks."""
    extra = [k for k, d in enumerate(f.dims) if d not in dims]
    if any(f.array.shape[k] != 1 for k in extra):
        raise Unfactorable("the roles call stacked what it contracts or leaves")
    f = Labelled(lax.squeeze(f.array, extra), tuple(d for d in f.dims if d in dims))
    for d in dims:
        if d not in f.dims:
            f = f.spread(d, shape[d])
    return lax.transpose(f.array, [f.dims.index(d) for d in dims])
