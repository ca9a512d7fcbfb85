"""What differs between JAX versions, and nothing else."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import jax
from jax.extend import source_info_util
from jax.extend.core import JaxprEqn, Literal

__all__ = [
    "Literal",
    "bind",
    "eqn_context",
    "explicit_spec",
    "manual_axes",
    "ndim",
    "source_line",
    "split_jaxpr",
]


def bind(eqn: JaxprEqn, args: Sequence[Any], **changes: Any) -> list[Any]:
    """Runs an equation as it is, or with some parameters changed; always returns a list."""
    out = eqn.primitive.bind(*args, **eqn.primitive.get_bind_params(eqn.params | changes))
    return list(out) if eqn.primitive.multiple_results else [out]


def split_jaxpr(jaxpr: Any) -> tuple[Any, list[Any]]:
    """(jaxpr, its constants), of an open or a closed jaxpr: since JAX 0.12 they are one class."""
    inner = getattr(jaxpr, "jaxpr", jaxpr)
    return inner, list(getattr(jaxpr, "consts", ()))


def ndim(var: Any) -> int:
    """The number of dimensions of a variable's value; 0 for tokens."""
    return len(getattr(var.aval, "shape", ()))


@contextlib.contextmanager
def eqn_context(eqn: JaxprEqn):
    """The equation's own source line, name scopes and context (compute_on, meshes, ...)."""
    info = eqn.source_info
    stack = source_info_util.current_name_stack() + info.name_stack
    with source_info_util.user_context(info.traceback, name_stack=stack), eqn.ctx.manager:
        yield


def source_line(eqn: JaxprEqn) -> str:
    """`file.py:12:8 (function)`: where the user wrote this equation."""
    return source_info_util.summarize(eqn.source_info)


def manual_axes(eqn: JaxprEqn) -> frozenset[str]:
    """The mesh axes over which a shard_map equation is manual."""
    found = eqn.params.get("newly_manual_axes", eqn.params.get("manual_axes"))
    return frozenset(eqn.params["mesh"].axis_names if found is None else found)


def explicit_spec(array: Any) -> tuple[Any, ...]:
    """How an array's axes are sharded as its type says, in meshes of explicit axes; else Nones."""
    sharding = getattr(jax.typeof(array), "sharding", None)
    spec = tuple(getattr(sharding, "spec", None) or ())
    return (*spec, *[None] * (array.ndim - len(spec)))
