"""How a weight meets an activation in a convolution."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
from jax import lax
from jax.extend.core import JaxprEqn

from jaxlora._contractions import Contraction, whole
from jaxlora._moves import RANK, Dims, Labelled, Unfactorable, contract, times

if TYPE_CHECKING:
    from jaxlora._factored import Factored
    from jaxlora._terms import Term


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
