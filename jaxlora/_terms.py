"""A low-rank term of a weight under interpretation, and its part in DoRA."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxlora._dropout import Dropout
from jaxlora._moves import Labelled, contract, times


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True, eq=False)
class Term:
    """One low-rank term: scale * sum_r a b, over a window of W's dims.

    Attributes:
      a, b: factors; a dim of W spanned by both is stacked, by a alone an input, by b alone an
        output, by neither constant (unit and broadcast dims).
      scale: over stacked dims, float32.
      excess: DoRA's m / n - 1, over stacked and output dims: within the window, W + all terms
        grows by 1 + excess. It is zero where nothing changes, so that padding with zeros is right.
      dropout: what the adapter's input is dropped by; its keys follow W too.
      window: {dim: (start, size of W's dim)} for dims of which the term covers only a part, as in a
        concatenation of weights; as sorted items, to be hashable.
    """

    a: Labelled
    b: Labelled
    scale: Labelled
    excess: Labelled | None = None
    dropout: Dropout | None = None
    window: tuple[tuple[int, tuple[int, int]], ...] = ()

    def tree_flatten(self):
        return (self.a, self.b, self.scale, self.excess, self.dropout), self.window

    @classmethod
    def tree_unflatten(cls, window, children):
        a, b, scale, excess, dropout = children
        return cls(a, b, scale, excess, dropout, window)

    @property
    def factors(self) -> list[Labelled]:
        """All that follows W, in the order of the leaves."""
        optional = [] if self.excess is None else [self.excess]
        if self.dropout is not None:
            optional += [self.dropout.key, self.dropout.position]
        return [self.a, self.b, self.scale, *optional]

    def size(self, d: int) -> int:
        """How much of dim d the term covers; 1 where it is constant."""
        for f in (self.a, self.b, self.scale):
            if d in f.dims:
                return f.array.shape[f.dims.index(d)]
        return 1

    def each(self, f: Callable[[Labelled], Labelled], window: dict | None = None) -> Term:
        kept = self.window if window is None else tuple(sorted(window.items()))
        excess = None if self.excess is None else f(self.excess)
        dropout = None if self.dropout is None else self.dropout.each(f)
        return type(self)(f(self.a), f(self.b), f(self.scale), excess, dropout, kept)

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
        term = dataclasses.replace(self, a=self.a.spread(d, n), b=self.b.spread(d, n))
        return term.gained(d, n)

    def gained(self, d: int, n: int) -> Term:
        """The same term, with dim d of size n in its excess."""
        if self.excess is None or d in self.excess.dims:
            return self
        return dataclasses.replace(self, excess=self.excess.spread(d, n))

    def windowed(self, d: int, n: int, window: tuple[int, int]) -> Term:
        """The same term as the window (start, size of the whole) of dim d, itself of size n."""
        term = self.filled([d]).spread(d, n).gained(d, n)
        return term.each(lambda f: f, dict(term.window) | {d: window})

    def dropping(self, f: Callable[[Dropout], Dropout]) -> Term:
        """The same term with another dropout, if it has one."""
        if self.dropout is None:
            return self
        return dataclasses.replace(self, dropout=f(self.dropout))

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

    def gain_spans(self) -> set[int]:
        """The dims of W along which its excess varies."""
        dims = () if self.excess is None else self.excess.dims
        return {d for d in dims if self.size(d) != 1 or d in dict(self.window)}

    def grows_along(self, d: int) -> bool:
        """Whether numbers put in along dim d, which are not W's, would grow as W does."""
        return self.excess is not None and d in self.a.dims and d not in self.excess.dims

    def gain_along(self, axes: Mapping[int, int], ndim: int) -> jax.Array:
        """The excess as an array of `ndim` axes, 1 long where it is constant.

        Args:
          axes: {dim of W: axis}, of all dims along which it varies.
        """
        whole = self.filled([d for d, _ in self.window]).excess
        assert whole is not None
        units = [k for k, d in enumerate(whole.dims) if d not in axes]
        array, dims = lax.squeeze(whole.array, units), [d for d in whole.dims if d in axes]
        array = lax.transpose(array, sorted(range(len(dims)), key=lambda k: axes[dims[k]]))
        used = [axes[d] for d in dims]
        return lax.expand_dims(array, [k for k in range(ndim) if k not in used])
