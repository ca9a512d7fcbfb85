"""Every property, over every case of the registry."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, Case
from helpers import assert_close, assert_same, base_sizes, formed, randomized

import jaxlora
from jaxlora._weight import LoraWeight, is_node

# Gradients of integers (argmax of a decode) do not exist; reverse mode through `while` neither.
NOT_DIFFERENTIABLE = {"while_decode", "while_with_carried_params"}
ONE_BRANCH = {"cond_branches", "cond_chooses_a_weight"}

# bfloat16 inside a float32 function: rounded at other places by another compilation.
ROUNDED = {"mixed_precision": 1000, "conv_mixed_precision": 1000, "linen_dense_bfloat16": 1}
ROUNDED["dora_linen_dense_bfloat16"] = 1

# Evaluated op by op too, each of which is compiled: a fourth of the cases, of all kinds.
EAGER = set(sorted(CASES)[::4])


def over(cases):
    """All properties of a case run in one worker, which makes and compiles it once."""
    marks = {c.name: pytest.mark.xdist_group(c.name) for c in cases}
    return pytest.mark.parametrize(
        "case", [pytest.param(c, id=c.name, marks=marks[c.name]) for c in cases]
    )


everywhere = over(CASES.values())
differentiable = over([c for c in CASES.values() if c.name not in NOT_DIFFERENTIABLE])


def scalar(out) -> jax.Array:
    return sum(
        jnp.sum(jnp.sin(x.astype(jnp.float32)))
        for x in jax.tree.leaves(out)
        if jnp.issubdtype(x.dtype, jnp.floating)
    )


@everywhere
def test_roles_are_traced(case: Case):
    lora, _ = case.lora()
    pairs, _ = jaxlora._paths.flatten_with_paths(lora, is_leaf=is_node)
    got = {path: leaf.roles for path, leaf in pairs if isinstance(leaf, LoraWeight)}
    assert len(got) == len(case.roles)
    for name, roles in case.roles.items():
        matching = [r for path, r in got.items() if path == name or f"/{name}" in f"/{path}"]
        assert matching == [roles]


@everywhere
def test_forward(case: Case):
    """Starts at the base; factored is merged; compiled once; warm, and eager (EAGER), agree."""
    lora, args = case.lora()
    merged, apply = jax.jit(lambda lora, *args: case.fn(jaxlora.merge(lora), *args)), case.apply
    case.traces.clear()
    factor = ROUNDED.get(case.name, 1)
    base = merged(lora, *args)  # b is zero
    assert_close(apply(lora, *args), base)

    lora = randomized(lora)
    got = apply(lora, *args)
    assert_close(got, merged(lora, *args), factor)
    assert_same(apply(lora, *args), got)
    assert len(case.traces) <= 1
    if case.name in EAGER:
        assert_close(jaxlora.lora_apply(case.fn, jit=False)(lora, *args), got, factor)
    if case.name != "while_decode":  # its tokens may agree
        assert any(
            np.abs(np.asarray(x, np.float64) - np.asarray(y, np.float64)).max() > 0.01
            for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(base), strict=True)
        )


@differentiable
def test_gradients(case: Case):
    """Those of a and b are those through merged; those of w and scale are zero."""
    lora, args = case.lora()
    lora = randomized(lora)
    trainable, frozen = jaxlora.partition(lora)
    apply = case.apply

    def merged(trainable):
        return scalar(case.fn(jaxlora.merge(jaxlora.combine(trainable, frozen)), *args))

    whole = jax.jit(jax.grad(lambda lora: scalar(apply(lora, *args))))(lora)
    got, _ = jaxlora.partition(whole)
    expected = jax.jit(jax.grad(merged))(trainable)
    assert_close(got, expected, 2000 if case.name in ROUNDED else 2)
    for leaf in jax.tree.leaves(whole, is_leaf=is_node):
        if isinstance(leaf, LoraWeight):
            assert not np.any(leaf.w)
            assert not np.any(leaf.scale)
            if case.name not in ONE_BRANCH:
                assert np.any(leaf.a)
                assert np.any(leaf.b)


@everywhere
def test_never_forms_the_weight(case: Case):
    lora, args = case.lora()
    trainable, frozen = jaxlora.partition(randomized(lora))
    apply = case.apply

    def loss(trainable):
        return scalar(apply(jaxlora.combine(trainable, frozen), *args))

    transformed = loss if case.name in NOT_DIFFERENTIABLE else jax.grad(loss)
    jaxpr = jax.make_jaxpr(transformed)(trainable)
    tainted = [True] * len(jax.tree.leaves(trainable))
    assert formed(jaxpr, tainted, base_sizes(lora)) == []

    def naive(trainable):  # the check itself must see it
        return scalar(case.fn(jaxlora.merge(jaxlora.combine(trainable, frozen)), *args))

    assert formed(jax.make_jaxpr(naive)(trainable), tainted, base_sizes(lora))


@everywhere
def test_vmap_over_adapters_is_a_loop(case: Case):
    lora, args = case.lora()
    halves = [jaxlora.partition(randomized(lora, seed)) for seed in (1, 2)]
    frozen = halves[0][1]
    stacked = jax.tree.map(lambda *xs: np.stack(xs), *(trainable for trainable, _ in halves))
    apply = case.apply

    def one(trainable):
        return apply(jaxlora.combine(trainable, frozen), *args)

    got = jax.jit(jax.vmap(one))(stacked)
    expected = jax.tree.map(lambda *xs: np.stack(xs), *(one(t) for t, _ in halves))
    assert_close(got, expected, ROUNDED.get(case.name, 2))


@everywhere
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_dtypes_are_the_models(case: Case, dtype):
    lora, args = case.abstract(dtype)
    got = jax.eval_shape(jaxlora.lora_apply(case.fn), lora, *args)
    expected = jax.eval_shape(case.fn, jaxlora.base_params(lora), *args)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), got) == jax.tree.map(
        lambda x: (x.shape, x.dtype), expected
    )
