"""How a weight meets an activation in a ragged matmul: a matrix for each group of rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
from jax import lax
from jax.extend.core import JaxprEqn
from jax.sharding import PartitionSpec as P

from jaxlora import _compat
from jaxlora._contractions import Contraction, whole
from jaxlora._looped import looped
from jaxlora._moves import RANK, Dims, Labelled, Unfactorable, times

if TYPE_CHECKING:
    from jaxlora._factored import Factored
    from jaxlora._terms import Term


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

    @property
    def arrays(self) -> tuple[Any, ...]:
        return (self.sizes,)

    def given(self, *arrays: Any) -> RaggedDot:
        return dataclasses.replace(self, sizes=arrays[0])

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
