"""What every test needs: a tolerance, random adapters, and a reader of jaxprs."""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import Literal

import jaxlora
from jaxlora._weight import LoraWeight, is_node

# Relative to the largest value: sums of a few hundred products, in another order.
TOLERANCE = {"float64": 1e-12, "float32": 2e-5, "bfloat16": 4e-2, "float16": 8e-3}


def assert_close(got: Any, expected: Any, factor: float = 1.0) -> None:
    """Two trees of arrays are equal up to rounding in the dtype of the expected ones."""
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for x, y in zip(_arrays(got), _arrays(expected), strict=True):
        assert x.dtype == y.dtype, (x.dtype, y.dtype)
        if not jnp.issubdtype(y.dtype, jnp.inexact):
            np.testing.assert_array_equal(x, y)
            continue
        # In NumPy, where nothing is compiled for each new shape.
        got64, expected64 = np.asarray(x, np.float64), np.asarray(y, np.float64)
        scale = max(1.0, np.abs(expected64).max(initial=0.0))
        tolerance = factor * TOLERANCE[y.dtype.name] * scale
        np.testing.assert_allclose(got64, expected64, rtol=0, atol=tolerance)


def assert_same(got: Any, expected: Any) -> None:
    """Two trees are equal, bit for bit."""
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for x, y in zip(_arrays(got), _arrays(expected), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        assert x.dtype == y.dtype
        assert x.tobytes() == y.tobytes()


def _arrays(tree: Any) -> list[Any]:
    """The leaves, random keys as the integers that they are."""
    return [
        jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        for x in jax.tree.leaves(tree)
    ]


def randomized(lora: Any, seed: int = 1) -> Any:
    """The same tree with random a, b (and values), so that the adapters count."""
    trainable, frozen = jaxlora.partition(lora)
    rng = np.random.default_rng(seed)
    noise = lambda x: jnp.asarray(0.3 * rng.standard_normal(x.shape), x.dtype)
    return jaxlora.combine(jax.tree.map(noise, trainable), frozen)


def base_sizes(lora: Any) -> set[int]:
    """The sizes of the adapted weights and of their layers: what must not be formed."""
    sizes = set()
    for leaf in jax.tree.leaves(lora, is_leaf=is_node):
        if isinstance(leaf, LoraWeight):
            size = math.prod(leaf.shape)
            sizes |= {size, size // math.prod(leaf.scale.shape)}
    return sizes


def formed(jaxpr: Any, tainted: Sequence[bool], sizes: Iterable[int]) -> list[str]:
    """The equations that make an array of one of `sizes` from a tainted input.

    Args:
      jaxpr: closed.
      tainted: for each input, whether it is of an adapter.
      sizes: what to look for.
    """
    found: list[str] = []
    _walk(jaxpr, list(tainted), set(sizes), found)
    return found


def _walk(jaxpr: Any, tainted: list[bool], sizes: set[int], found: list[str]) -> list[bool]:
    inner = getattr(jaxpr, "jaxpr", jaxpr)
    bad = dict(zip(inner.invars, tainted, strict=True))

    def read(var: Any) -> bool:
        return False if isinstance(var, Literal) else bad.get(var, False)

    for eqn in inner.eqns:
        ins = [read(v) for v in eqn.invars]
        outs = [any(ins)] * len(eqn.outvars)
        name = eqn.primitive.name
        subs = list(_sub_jaxprs(eqn))
        if any(ins) and subs:
            if name == "scan":
                outs = _fixpoint(eqn, subs[0], ins, sizes, found)
            elif name == "while":
                cond, body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
                carry = ins[cond + body :]
                while True:
                    new = _walk(subs[-1], [*ins[cond : cond + body], *carry], sizes, found)
                    new = [a or b for a, b in zip(new, carry, strict=True)]
                    if new == carry:
                        break
                    carry = new
                outs = carry
            elif name == "cond":
                columns = [_walk(sub, ins[1:], sizes, found) for sub in subs]
                outs = [any(column) for column in zip(*columns, strict=True)]
            else:
                inner_vars = getattr(subs[0], "jaxpr", subs[0]).invars
                n = len(inner_vars)
                # Under shard_map, what must not be formed is as small as a block of it.
                blocks = {
                    math.prod(i.aval.shape)
                    for o, i in zip(eqn.invars[-n:], inner_vars, strict=True)
                    if name == "shard_map" and math.prod(o.aval.shape) in sizes
                }
                outs = _walk(subs[0], ins[-n:], sizes | blocks, found)
        elif name == "optimization_barrier":
            outs = ins
        elif any(ins):
            found += [
                f"{name} -> {v.aval.shape}" for v in eqn.outvars if math.prod(v.aval.shape) in sizes
            ]
        bad.update(zip(eqn.outvars, outs, strict=True))
    return [read(v) for v in inner.outvars]


def _fixpoint(
    eqn: Any, body: Any, ins: list[bool], sizes: set[int], found: list[str]
) -> list[bool]:
    inner = getattr(body, "jaxpr", body)
    n_xs = sum(o.aval.ndim != i.aval.ndim for o, i in zip(eqn.invars, inner.invars, strict=True))
    n_carry = sum(
        o.aval.ndim == i.aval.ndim for o, i in zip(eqn.outvars, inner.outvars, strict=True)
    )
    n_consts = len(ins) - n_carry - n_xs
    while True:
        outs = _walk(body, ins, sizes, found)
        carry = [a or b for a, b in zip(ins[n_consts:], outs[:n_carry], strict=False)]
        if carry == ins[n_consts : n_consts + n_carry]:
            return outs
        ins = [*ins[:n_consts], *carry, *ins[n_consts + n_carry :]]


def _sub_jaxprs(eqn: Any) -> Iterable[Any]:
    for key in ("branches", "cond_jaxpr", "body_jaxpr", "jaxpr", "call_jaxpr"):
        value = eqn.params.get(key)
        if value is not None:
            yield from value if isinstance(value, tuple) else (value,)


def count_primitives(jaxpr: Any, name: str) -> int:
    """How many equations of a primitive a jaxpr has, at any depth."""
    inner = getattr(jaxpr, "jaxpr", jaxpr)
    return sum(
        (eqn.primitive.name == name) + sum(count_primitives(s, name) for s in _sub_jaxprs(eqn))
        for eqn in inner.eqns
    )


def mostly_slow(values: Iterable[Any], quick: Container[Any]) -> list[Any]:
    """Parameters of a test, those that are not `quick` marked as slow."""
    slow = pytest.mark.slow
    return [v if v in quick else pytest.param(v, marks=slow) for v in values]
