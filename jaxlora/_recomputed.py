"""`recomputed`: a linear operation whose other operand is made anew in each pass, and never kept.

y = x D(codes) is linear in x, so that its derivatives need D(codes) again and nothing else. It must
be made again: kept, it would be the whole weight in floats. Three things would keep it.

- JAX would save it for the backward pass. So the operation is one primitive, whose derivative and
  whose transpose are operations of the same kind, on the codes.
- XLA would merge equal computations of the two passes. So each depends on what it is used with, the
  activation in one pass and its cotangent in the other.
- XLA's scheduler would begin all that depends on parameters alone early. The same remedy serves.

Within `jax.checkpoint`, XLA's scheduler still does the last; and a checkpoint is not linear, so
that what it needs of x would be kept, for nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import JaxprEqn, Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlora import _compat


def recomputed(f: Callable[..., Any], x: Any, leaves: Sequence[Any], of: JaxprEqn | None) -> Any:
    """f(x, *leaves), whose intermediates are not kept for the backward pass.

    Args:
      f: linear in x.
      leaves: what the other operand is made of; constants to any derivative.
      of: the equation that this is in place of, for policies of `jax.checkpoint`.
    """
    # Within `shard_map`: as one type, so that nothing is cast where f is lowered.
    axes = frozenset[str]().union(*map(_compat.varying, (x, *leaves)))
    x, *leaves = (_compat.vary(each, axes) for each in (x, *leaves))
    return _bind(jax.make_jaxpr(f)(x, *leaves), x, leaves, of)


def _bind(jaxpr: Any, x: Any, leaves: Sequence[Any], of: JaxprEqn | None = None) -> Any:
    return _recomputed.bind(x, *leaves, jaxpr=jaxpr, of=of)


_recomputed = Primitive("recomputed")


def _evaluated(x: Any, *leaves: Any, jaxpr: Any, of: Any) -> Any:
    (y,) = jaxpr_as_fun(jaxpr)(x, *leaves)
    return y


def _behind_a_barrier(x: Any, *leaves: Any, jaxpr: Any, of: Any) -> Any:
    return _evaluated(*lax.optimization_barrier((x, *leaves)), jaxpr=jaxpr, of=of)


def _behind_a_zero(x: Any, *codes_and_more: Any, jaxpr: Any, of: Any) -> Any:
    """On a CPU, XLA takes barriers out before it merges: there the codes get a zero made of x."""
    leaves = [*codes_and_more]
    codes = [k for k, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.integer)]
    if codes and x.size:
        first = _first(x)
        first = lax.bitcast_convert_type(jnp.real(first), f"u{first.real.dtype.itemsize}")
        # An integer has at most 64 leading zeros, which XLA does not know.
        zero = lax.shift_right_logical(lax.clz(first), first.dtype.type(7))
        k = codes[0]
        leaves[k] = leaves[k] ^ zero.astype(leaves[k].dtype)
    return _evaluated(x, *leaves, jaxpr=jaxpr, of=of)


def _first(x: Any) -> Any:
    """One element; sharded dims of explicit meshes cannot be sliced as such."""

    def sliced(x: Any) -> Any:
        return lax.slice(x, (0,) * x.ndim, (1,) * x.ndim).reshape(())

    if not any(_compat.explicit_spec(x)):
        return sliced(x)
    whole = NamedSharding(jax.typeof(x).sharding.mesh, P())
    return jax.sharding.auto_axes(sliced, out_sharding=whole)(x)


def _batch(args: Sequence[Any], dims: Sequence[Any], *, jaxpr: Any, of: Any) -> tuple[Any, int]:
    x, *leaves = args
    f = jaxpr_as_fun(jaxpr)
    if dims[0] is None:  # linear in x: it must depend on it as the others do
        size = next(
            leaf.shape[d] for leaf, d in zip(leaves, dims[1:], strict=True) if d is not None
        )
        x, dims = jnp.broadcast_to(x, (size, *x.shape)), (0, *dims[1:])
    batched = jax.vmap(lambda *args: f(*args)[0], in_axes=tuple(dims))
    return recomputed(batched, x, leaves, of), 0


def _jvp(primals: Sequence[Any], tangents: Sequence[Any], *, jaxpr: Any, of: Any) -> Any:
    (x, *leaves), (dx, *_) = primals, tangents  # the leaves' own are zero, symbolic or not
    return _bind(jaxpr, x, leaves, of), _bind(jaxpr, ad.instantiate_zeros(dx), leaves, of)


def _transpose(ct: Any, x: Any, *leaves: Any, jaxpr: Any, of: Any) -> list[Any]:
    if isinstance(ct, ad.Zero):
        return [ad.Zero(x.aval), *[None] * len(leaves)]

    def transposed(ct: Any, *leaves: Any) -> Any:
        (out,) = jax.linear_transpose(lambda x: jaxpr_as_fun(jaxpr)(x, *leaves)[0], x.aval)(ct)
        return out

    return [recomputed(transposed, ct, leaves, None), *[None] * len(leaves)]


_recomputed.def_impl(_evaluated)
_recomputed.def_abstract_eval(lambda *avals, jaxpr, of: jaxpr.out_avals[0])
batching.primitive_batchers[_recomputed] = _batch
ad.primitive_jvps[_recomputed] = _jvp
ad.primitive_transposes[_recomputed] = _transpose
for platform, lowered in ((None, _behind_a_barrier), ("cpu", _behind_a_zero)):
    mlir.register_lowering(
        _recomputed, mlir.lower_fun(lowered, multiple_results=False), platform=platform
    )


def through(policy: Callable[..., Any] | None) -> Callable[..., Any] | None:
    """A policy of `jax.checkpoint` that sees what a `recomputed` is in place of."""
    if policy is None:
        return None

    def seeing(primitive: Any, *avals: Any, **params: Any) -> Any:
        of = params.get("of") if primitive is _recomputed else None
        if of is None:
            return policy(primitive, *avals, **params)
        return policy(of.primitive, *(v.aval for v in of.invars), **of.params)

    return seeing
