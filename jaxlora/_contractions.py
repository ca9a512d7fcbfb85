"""How a weight meets an activation: what a term adds to a matmul, a convolution, a ragged matmul.

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
from jax.sharding import PartitionSpec as P

from jaxlora import _compat
from jaxlora._errors import RolesError
from jaxlora._looped import looped
from jaxlora._moves import RANK, Dims, Labelled, Unfactorable, contract, times

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

    def gain_on_y(self, node: Factored, t: Term, y: Any) -> Any:
        # The result's axes: the batch, then what is left of the left operand, then of the right.
        n_batch, n_free = len(self.batch), len(self.free)
        start = n_batch if self.first else y.ndim - n_free
        axes = dict(zip(self.batch, range(n_batch), strict=True))
        axes |= dict(zip(self.free, range(start, start + n_free), strict=True))
        return t.gain_along(axes, y.ndim)

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
    part = Labelled(part.array, tuple(out.index(d) for d in part.dims))
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


@dataclasses.dataclass(frozen=True)
class Conv(Contraction):
    """conv_general_dilated, the weight being its kernel.

    Usually x is convolved with a, to rank channels, which b then mixes. The gradient with respect
    to x goes the other way round: b mixes first and a is the kernel. So each step slides over the
    window dims that its factor spans. In a grouped convolution each group has rank channels of its
    own, and all share the factor that meets the input, as the weight's shape says.
    """

    @classmethod
    def of(cls, eqn: JaxprEqn, where: Callable[[], str]) -> Conv:
        if eqn.params["batch_group_count"] != 1:
            raise Unfactorable("it groups its batch")
        _, in_dim, *window = eqn.params["dimension_numbers"].rhs_spec
        return cls(eqn, where, len(window) + 2, (in_dim, *window), (), window=tuple(window))

    def gain_on_x(self, node: Factored, t: Term, x: Any) -> Any:
        lhs, rhs, _ = self.eqn.params["dimension_numbers"]
        if self.eqn.params["feature_group_count"] != 1:
            raise Unfactorable("it groups the columns of DoRA")
        return t.gain_along({rhs[1]: lhs[1]}, x.ndim)

    def gain_on_y(self, node: Factored, t: Term, y: Any) -> Any:
        _, rhs, out = self.eqn.params["dimension_numbers"]
        return t.gain_along({rhs[0]: out[1]}, y.ndim)

    def share(self, node: Factored, t: Term, x: Any, y: Any) -> Any:
        t, shape = t.filled(d for d, _ in t.window), node.shape
        (out_dim, *_), out = self.eqn.params["dimension_numbers"][1:]
        _, end = self.order(node, t)
        h, second = self._first(node, t, x, y)
        scale = whole(t.scale, [], shape)
        h = times(Labelled(h, tuple(range(h.ndim))), Labelled(scale, ()), x.dtype).array
        return self._step(h, out, end, (RANK, out_dim), second, shape)

    def _first(self, node: Factored, t: Term, x: Any, y: Any) -> tuple[Any, list[int]]:
        """x through the factor that it meets first, and the window dims left for the second."""
        start, end = self.order(node, t)
        x, lhs = self.operand(node, x, y), self.eqn.params["dimension_numbers"].lhs_spec
        in_dim = self.eqn.params["dimension_numbers"].rhs_spec[1]
        first = [d for d in self.window if d in start.dims or d not in end.dims]
        second = [d for d in self.window if d not in first]
        return self._step(x, lhs, start, (in_dim, RANK), first, node.shape), second

    def met(self, node: Factored, t: Term, x: Any, y: Any) -> Labelled:
        t = t.filled(d for d, _ in t.window)
        h, _ = self._first(node, t, x, y)
        # Each group's channels are inputs of their own.
        c, groups = self.eqn.params["dimension_numbers"].out_spec[1], -1
        rank = t.a.array.shape[t.a.dims.index(RANK)]
        h = h.reshape(*h.shape[:c], groups, rank, *h.shape[c + 1 :])
        labels = list(range(self.ndim, self.ndim + h.ndim))
        labels[c + 1] = RANK
        return Labelled(h, tuple(labels))

    def _step(
        self, x: Any, spec: Dims, f: Labelled, channels: Dims, slide: Sequence[int], shape: Any
    ) -> Any:
        """x through one factor, to the layout of the output.

        Args:
          x: an activation whose batch, channel and window axes are given by `spec`.
          f: the factor.
          channels: what it sums and what it makes: dims of the weight, or RANK.
          slide: the window dims that it slides over.
        """
        params, (source, target) = self.eqn.params, channels
        (out_dim, in_dim, *window), out_spec = params["dimension_numbers"][1:]
        groups = params["feature_group_count"]
        if all(self._trivial(d, shape) for d in slide):
            return self._mixed(x, spec, f, channels, shape)

        labels: list[int | None] = [None] * self.ndim
        labels[in_dim], labels[out_dim] = source, target
        for d in slide:
            labels[d] = d
        kernel = whole(f, [d for d in labels if d is not None], shape).astype(x.dtype)
        kernel = jnp.expand_dims(kernel, [k for k, d in enumerate(labels) if d is None])
        if groups > 1 and target == RANK:
            kernel = jnp.repeat(jnp.expand_dims(kernel, out_dim), groups, out_dim)
            kernel = lax.collapse(kernel, out_dim, out_dim + 2)

        def own(name: str, other: Any) -> Any:
            pairs = zip(window, params[name], strict=True)
            return tuple(v if d in slide else other for d, v in pairs)

        y = lax.conv_general_dilated(
            x,
            kernel,
            window_strides=own("window_strides", 1),
            padding=own("padding", (0, 0)),
            lhs_dilation=own("lhs_dilation", 1),
            rhs_dilation=own("rhs_dilation", 1),
            dimension_numbers=lax.ConvDimensionNumbers(
                spec, params["dimension_numbers"].rhs_spec, out_spec
            ),
            feature_group_count=groups,
            precision=params["precision"],
            preferred_element_type=params["preferred_element_type"],
        )
        return y.astype(x.dtype)

    def _mixed(self, x: Any, spec: Dims, f: Labelled, channels: Dims, shape: Any) -> Any:
        """A step that slides over nothing: a matmul of the channels."""
        source, target = channels
        out_spec = self.eqn.params["dimension_numbers"].out_spec
        groups = self.eqn.params["feature_group_count"]
        # Labels past W's dims: of a group, and of the k-th axis in the specs.
        group, axis = self.ndim, self.ndim + 1
        before = [axis + k for k in sorted(range(x.ndim), key=lambda k: spec[k])]
        after = [axis + k for k in sorted(range(x.ndim), key=lambda k: out_spec[k])]
        c, into = spec[1], out_spec[1]
        before[c : c + 1], after[into : into + 1] = [group, source], [group, target]
        split = x.reshape(*x.shape[:c], groups, x.shape[c] // groups, *x.shape[c + 1 :])
        array, dims = whole(f, [source, target], shape).astype(x.dtype), channels
        if target != RANK:  # each group has output channels of its own
            rank, total = array.shape
            array, dims = array.reshape(rank, groups, total // groups), (source, group, target)
        pair = Labelled(split, tuple(before)), Labelled(array, dims)
        y = contract(*pair, after, self.eqn.params["precision"]).array
        return lax.collapse(y, into, into + 2)

    def _trivial(self, d: int, shape: Any) -> bool:
        """Whether sliding over window dim d changes nothing."""
        params, k = self.eqn.params, self.window.index(d)
        ones = (shape[d], params["window_strides"][k], params["lhs_dilation"][k])
        return ones == (1, 1, 1) and tuple(params["padding"][k]) == (0, 0)


@dataclasses.dataclass(frozen=True)
class RaggedDot(Contraction):
    """ragged_dot_general, the weight having a matrix for each group of the activation's rows.

    Attributes:
      x_summed, x_batch: the dims of the activation that pair with `summed` and `batch`.
      group: the dim of the weight that counts the groups; the last of `batch`.
      ragged: the dim of the activation whose rows are grouped.
      sizes: how many rows each group has.
    """

    x_summed: Dims
    x_batch: Dims
    group: int
    ragged: int
    sizes: Any

    @classmethod
    def of(cls, eqn: JaxprEqn, where: Callable[[], str], sizes: Any) -> RaggedDot:
        numbers = eqn.params["ragged_dot_dimension_numbers"]
        (x_summed, summed), (x_batch, batch) = numbers.dot_dimension_numbers
        (ragged,) = numbers.lhs_ragged_dimensions
        if ragged in (*x_summed, *x_batch):
            raise Unfactorable("its groups are of contracted or of batched rows")
        (group,) = numbers.rhs_group_dimensions
        dims = (tuple(summed), (*batch, group), tuple(x_summed), tuple(x_batch))
        return cls(eqn, where, _compat.ndim(eqn.invars[1]), *dims, group, ragged, sizes)

    def base(self, x: Any, w: Any) -> Any:
        return ragged_product(self.eqn, x, w, self.sizes)

    def gain_on_x(self, node: Factored, t: Term, x: Any) -> Any:
        axes = [*self.x_batch, self.ragged, *self.x_summed]
        rows = [x.shape[k] for k in axes[: len(self.x_batch) + 1]]
        gain = self._of_rows(node, t, self.summed, rows, len(self.x_batch))
        gain = lax.transpose(gain, sorted(range(len(axes)), key=axes.__getitem__))
        return lax.expand_dims(gain, [k for k in range(x.ndim) if k not in axes])

    def gain_on_y(self, node: Factored, t: Term, y: Any) -> Any:
        rows = y.shape[: y.ndim - len(self.free)]
        return self._of_rows(node, t, self.free, rows, self._row())

    def _of_rows(
        self, node: Factored, t: Term, dims: Dims, rows: Sequence[int], ragged: int
    ) -> Any:
        """A term's excess over `dims`, of each row its group's: (rows..., dims...).

        A ragged product with a single one picks it.
        """
        groups = [*self.batch, *dims]
        gain = t.gain_along({d: k for k, d in enumerate(groups)}, len(groups))
        gain = jnp.broadcast_to(gain, [node.shape[d] for d in groups])
        gain = jnp.expand_dims(gain, len(self.batch))
        batch = tuple(range(len(self.x_batch)))
        exact = {"precision": lax.Precision.HIGHEST, "preferred_element_type": gain.dtype}
        ones = jnp.ones((*rows, 1), gain.dtype)
        return self._meet(ones, gain, (len(rows),), batch, ragged, 1, None, **exact)

    def _row(self) -> int:
        """The axis of the result that is ragged."""
        used = (*self.x_summed, *self.x_batch)
        before = [k for k in range(self.ragged) if k not in used]
        return len(self.x_batch) + len(before)

    def share(self, node: Factored, t: Term, x: Any, y: Any) -> Any:
        t = t.filled(d for d, _ in t.window)
        start, end = self.order(node, t)
        x = self.operand(node, x, y)
        f = whole(start, [*self.batch, *self.summed, RANK], node.shape)
        n_batch, n_summed = len(self.x_batch), len(self.summed)
        # JAX infers no explicit shardings here: where the equation gives one, so do the steps.
        out = self.eqn.params["out_sharding"]
        kept = _compat.explicit_spec(y)[: y.ndim - len(self.free)]
        between = None if out is None else P(*kept, None)
        h = self._meet(x, f, self.x_summed, self.x_batch, self.ragged, n_summed, between)
        # h: its batch, what x had left, the rank.
        scale = whole(t.scale, self.batch, node.shape)  # rows differ in theirs: it goes with b
        b = whole(end, [*self.batch, RANK, *self.free], node.shape)
        b = times(
            Labelled(b, tuple(range(b.ndim))), Labelled(scale, tuple(range(scale.ndim))), b.dtype
        )
        return self._meet(h, b.array, (h.ndim - 1,), tuple(range(n_batch)), self._row(), 1, out)

    def _meet(
        self,
        x: Any,
        f: Any,
        x_summed: Dims,
        x_batch: Dims,
        ragged: int,
        n_summed: int,
        sharding: Any,
        **changes: Any,
    ) -> Any:
        """The ragged product of x with f: (batch..., group, summed..., free...)."""
        n_batch = len(x_batch)
        numbers = lax.RaggedDotDimensionNumbers(
            (
                (x_summed, tuple(range(n_batch + 1, n_batch + 1 + n_summed))),
                (x_batch, tuple(range(n_batch))),
            ),
            (ragged,),
            (n_batch,),
        )
        changes = {"ragged_dot_dimension_numbers": numbers, "out_sharding": sharding} | changes
        out = ragged_product(self.eqn, x, f.astype(x.dtype), self.sizes, **changes)
        return out.astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class _Ragged:
    """ragged_dot_general with its parameters: hashable, so that `looped` takes it."""

    params: tuple[tuple[str, Any], ...]

    def __call__(self, x: Any, w: Any, sizes: Any) -> Any:
        return lax.ragged_dot_general(x, w, sizes, **dict(self.params))


def ragged_product(eqn: JaxprEqn, x: Any, w: Any, sizes: Any, **changes: Any) -> Any:
    """The equation's ragged_dot_general of other operands, with some parameters changed."""
    return looped(_Ragged(tuple(sorted((eqn.params | changes).items()))), x, w, sizes)


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
