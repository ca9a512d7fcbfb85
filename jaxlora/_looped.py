"""`looped`: a bilinear operation that JAX cannot batch, with a loop for its batching rule.

JAX batches `ragged_dot` only if activations, weights and group sizes are all batched alike. Many
adapters over one base are none of that: here each goes through in turn, and the base is shared.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir


def looped(f: Callable[..., Any], x: Any, y: Any, *rest: Any) -> Any:
    """f(x, y, *rest), which `vmap` runs one element after the other.

    Args:
      f: linear in x and in y, hashable; its derivatives are bilinear operations of the same kind.
      rest: integers.
    """
    return _looped.bind(x, y, *rest, f=f)


@dataclasses.dataclass(frozen=True)
class _Transposed:
    """(ct, other, *rest) -> the cotangent of operand k of f."""

    f: Callable[..., Any]
    k: int
    aval: Any

    def __call__(self, ct: Any, other: Any, *rest: Any) -> Any:
        def linear(v: Any) -> Any:
            return self.f(*((v, other) if self.k == 0 else (other, v)), *rest)

        (out,) = jax.linear_transpose(linear, self.aval)(ct)
        return out


_looped = Primitive("looped")
_looped.def_impl(lambda *args, f: f(*args))


_looped.def_abstract_eval(lambda *avals, f: jax.make_jaxpr(f)(*avals).out_avals[0])


def _batch(args: Sequence[Any], dims: Sequence[Any], *, f: Callable[..., Any]) -> tuple[Any, int]:
    batched = [k for k, d in enumerate(dims) if d is not None]

    def one(slices: Sequence[Any]) -> Any:
        full = list(args)
        for k, part in zip(batched, slices, strict=True):
            full[k] = part
        return looped(f, *full)

    return lax.map(one, [jnp.moveaxis(args[k], dims[k], 0) for k in batched]), 0


def _jvp(primals: Sequence[Any], tangents: Sequence[Any], *, f: Callable[..., Any]) -> Any:
    x, y, *rest = primals
    dx, dy, *_ = tangents
    out = looped(f, x, y, *rest)
    parts = [] if isinstance(dx, ad.Zero) else [looped(f, dx, y, *rest)]
    parts += [] if isinstance(dy, ad.Zero) else [looped(f, x, dy, *rest)]
    return out, sum(parts[1:], parts[0])


def _transpose(ct: Any, x: Any, y: Any, *rest: Any, f: Callable[..., Any]) -> list[Any]:
    k = 0 if ad.is_undefined_primal(x) else 1
    undefined, other = (x, y) if k == 0 else (y, x)
    out = looped(_Transposed(f, k, undefined.aval), ct, other, *rest)
    return [out if j == k else None for j in range(2 + len(rest))]


mlir.register_lowering(_looped, mlir.lower_fun(lambda *args, f: f(*args), multiple_results=False))
batching.primitive_batchers[_looped] = _batch
ad.primitive_jvps[_looped] = _jvp
ad.primitive_transposes[_looped] = _transpose
