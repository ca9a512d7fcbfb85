"""`Case`, and how functions enter the registry."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxlora
from jaxlora.initializers import Target, factor_shapes


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """A function, its params, and what is known of them.

    Attributes:
      fn: (params, *args) -> arrays.
      make: (key) -> (params, args).
      roles: {path: roles} of what is adapted, as `trace_roles` should find them.
      declared: roles that only the user can know, for LoraConfig(roles=...).
      dora: whether the adapters are DoRA's.
      is_plain: whether its params are made by NumPy.
    """

    name: str
    fn: Callable[..., Any]
    make: Callable[[jax.Array], tuple[Any, tuple[Any, ...]]]
    roles: Mapping[str, str]
    declared: Mapping[str, str] = dataclasses.field(default_factory=dict)
    dora: bool = False
    is_plain: bool = False
    traces: list[int] = dataclasses.field(default_factory=list)

    @functools.cached_property
    def apply(self) -> Callable[..., Any]:
        """`fn` on lora trees; what is compiled serves every property. Its traces are counted."""

        def counted(*args: Any) -> Any:
            self.traces.append(1)
            return self.fn(*args)

        return jaxlora.lora_apply(counted)

    @functools.cache  # noqa: B019  (cases live as long as the tests)
    def lora(self) -> tuple[Any, tuple[Any, ...]]:
        """(a lora tree with fresh adapters, args)"""
        if self.is_plain and not self.dora:
            return self._build()  # there is nothing to compile
        return jax.jit(self._build)()  # one program to compile, not one for each operation

    def abstract(self, dtype: Any) -> tuple[Any, tuple[Any, ...]]:
        """The same without data, its floating-point leaves of another dtype."""
        return jax.eval_shape(lambda: self._build(dtype))

    def _build(self, dtype: Any = None) -> tuple[Any, tuple[Any, ...]]:
        params, args = self.make(jax.random.key(0))
        if dtype is not None:
            params, args = cast((params, args), dtype)
        config = jaxlora.LoraConfig(
            rank=2,
            alpha=3,
            targets=list(self.roles),
            roles=self.declared,
            dora=self.dora,
            initializer=_zero,  # the properties put numbers in
        )
        roles = jaxlora.trace_roles(self.fn, params, *args)
        return jaxlora.init(jax.random.key(1), params, config, roles=roles), args


def _zero(key: jax.Array, w: Any, target: Target) -> Any:
    a, b = factor_shapes(w, target)
    return w, np.zeros(a, target.dtype), np.zeros(b, target.dtype)


def cast(tree: Any, dtype: Any) -> Any:
    return jax.tree.map(
        lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree
    )


CASES: dict[str, Case] = {}


def case(roles: Mapping[str, str], declared: Mapping[str, str] | None = None):
    """Registers a function () -> (fn, make) under its name."""

    def enter(define: Callable[[], tuple[Any, Any]]) -> None:
        fn, make = define()
        is_plain = make.__module__ == __name__
        CASES[define.__name__] = Case(
            define.__name__, fn, make, roles, declared or {}, is_plain=is_plain
        )

    return enter


def plain(fn: Callable[..., Any], shapes: Mapping[str, tuple[int, ...]], *args: Any):
    """A plain function of a dict of weights; args are shapes, or arrays."""

    def make(key: jax.Array) -> tuple[Any, tuple[Any, ...]]:
        rng = np.random.default_rng(0)  # nothing to compile
        normal = lambda shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
        params = {name: normal(shape) / 4 for name, shape in shapes.items()}
        return params, tuple(normal(a) if isinstance(a, tuple) else a for a in args)

    return fn, make


TOKENS = jnp.array([[1, 5, 0], [3, 3, 12]])
