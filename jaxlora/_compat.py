"""What differs between JAX versions, and nothing else."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
from jax.extend import source_info_util
from jax.extend.core import JaxprEqn, Literal
from jax.extend.source_info_util import current_name_stack as name_stack

__all__ = [
    "INLINE",
    "Literal",
    "bind",
    "by_context",
    "explicit_spec",
    "is_differentiated",
    "manual_axes",
    "name_stack",
    "ndim",
    "placed_like",
    "source_context",
    "source_line",
    "split_jaxpr",
    "vary",
    "varying",
]

INLINE: Any = jax.Inline.JAX_EARLY if hasattr(jax, "Inline") else True
"""The option `inline` of `jax.jit` by which nothing is left of it in a jaxpr: since JAX 0.12 True
means something else."""


def bind(eqn: JaxprEqn, args: Sequence[Any], **changes: Any) -> list[Any]:
    """Runs an equation as it is, or with some parameters changed; always returns a list."""
    params = eqn.params | changes if changes else eqn.params
    out = eqn.primitive.bind(*args, **eqn.primitive.get_bind_params(params))
    return list(out) if eqn.primitive.multiple_results else [out]


def split_jaxpr(jaxpr: Any) -> tuple[Any, list[Any]]:
    """(jaxpr, its constants), of an open or a closed jaxpr: since JAX 0.12 they are one class."""
    inner = getattr(jaxpr, "jaxpr", jaxpr)
    return inner, list(getattr(jaxpr, "consts", ()))


def ndim(var: Any) -> int:
    """The number of dimensions of a variable's value; 0 for tokens."""
    return len(getattr(var.aval, "shape", ()))


def source_context(eqn: JaxprEqn, outer: Any) -> Any:
    """The equation's own source line and name scopes, the latter within `outer`.

    Entered for each equation, so no generator is.
    """
    info = eqn.source_info
    stack = outer + info.name_stack if len(outer) else info.name_stack
    return source_info_util.user_context(info.traceback, name_stack=stack)


def by_context(eqns: Iterable[JaxprEqn]) -> Iterator[tuple[Any, Iterable[JaxprEqn]]]:
    """(a context manager, equations in a row that share it): compute_on, meshes, ...

    JAX keeps one object for equal contexts, and nearly always a jaxpr has but one.
    """
    for context, same in itertools.groupby(eqns, key=lambda eqn: eqn.ctx):
        yield context.manager, same


def source_line(eqn: JaxprEqn) -> str:
    """`file.py:12:8 (function)`: where the user wrote this equation."""
    return source_info_util.summarize(eqn.source_info)


def is_differentiated(eqn: JaxprEqn) -> bool:
    """Whether an equation is of a derivative, either pass of it."""
    return "jvp(" in str(eqn.source_info.name_stack)


def manual_axes(eqn: JaxprEqn) -> frozenset[str]:
    """The mesh axes over which a shard_map equation is manual."""
    found = eqn.params.get("newly_manual_axes", eqn.params.get("manual_axes"))
    return frozenset(eqn.params["mesh"].axis_names if found is None else found)


def varying(array: Any) -> frozenset[str]:
    """The manual mesh axes over which an array's type says that it varies; none if unchecked."""
    return getattr(getattr(jax.typeof(array), "mat", None), "varying", frozenset())


def vary(array: Any, axes: frozenset[str]) -> Any:
    """The same array, its type varying over these manual axes too."""
    missing = tuple(sorted(axes - varying(array)))
    return jax.lax.pcast(array, missing, to="varying") if missing else array


def explicit_spec(array: Any) -> tuple[Any, ...]:
    """How an array's axes are sharded as its type says, in meshes of explicit axes; else Nones."""
    sharding = getattr(jax.typeof(array), "sharding", None)
    spec = tuple(getattr(sharding, "spec", None) or ())
    return (*spec, *[None] * (array.ndim - len(spec)))


def placed_like(array: Any, other: Any) -> Any:
    """An array sharded as another of its shape is, in meshes of explicit axes."""
    if not any(explicit_spec(other)):
        return array
    return jax.sharding.reshard(array, jax.typeof(other).sharding)
