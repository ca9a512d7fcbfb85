"""A quantized base in `lora_apply`: what a dequantized one gives, decoding no more than is used."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, Case
from helpers import assert_close, assert_same, mostly_slow, randomized
from test_properties import NOT_DIFFERENTIABLE, ROUNDED, scalar

import jaxlora
from jaxlora import MaterializeError, QuantizedArray, quantize_array
from jaxlora._weight import LoraWeight, is_node

KEY = jax.random.key(0)
NAMES = sorted(CASES)

# Weights that a loop or a branch changes, or that are cut after they were joined.
ALWAYS_REFUSED = {
    "scan_with_changing_params",
    "cond_chooses_a_weight",
    "shard_map_of_joined_weights",
    "joined_weights_put_on_devices",
    "shard_map_branches",
}
# Blocks that are not whole on every device.
REFUSED = {
    "flat": {
        "shard_map_tensor_parallel",
        "shard_map_unchecked",
        "shard_map_gathered",
        "shard_map_gathered_columns",
        "shard_map_ring_of_rows",
        "shard_map_convolution",
        "shard_map_ragged",
        "dora_shard_map_tensor_parallel",
    },
    "rows": {},
    "inputs": {"shard_map_gathered"},  # over four devices
    "channels": {},
}


def flat(lw: LoraWeight) -> QuantizedArray:
    """Blocks that run over rows."""
    return quantize_array(lw.w, "nf4", block_size=2, stacked=_stacked(lw))


def by_rows(lw: LoraWeight) -> QuantizedArray:
    """A block or two to each row, so that the codes have W's dims."""
    n = lw.shape[-1]
    block = n // 2 if n % 2 == 0 and n > 2 else max(n, 2)
    return quantize_array(lw.w, "int8", block_size=block, stacked=_stacked(lw))


def along_inputs(lw: LoraWeight) -> QuantizedArray:
    """As `jaxlora.quantize` does: blocks along the inputs, whose codes lie on the first axis."""
    k = _stacked(lw)
    along = [d - k for d, role in enumerate(lw.roles) if role == "i"]
    n = math.prod(lw.shape[k + d] for d in along)
    block = n // 2 if lw.shape[k + along[0]] % 2 == 0 and n > 2 else max(n, 2)
    return quantize_array(lw.w, "int8", block_size=block, stacked=k, along=along)


def by_channel(lw: LoraWeight) -> QuantizedArray:
    """An absmax for each output."""
    k = _stacked(lw)
    channels = [d - k for d, role in enumerate(lw.roles) if role == "o"]
    return quantize_array(lw.w, "int8", block_size=None, stacked=k, channels=channels)


FORMS = {"flat": flat, "rows": by_rows, "inputs": along_inputs, "channels": by_channel}


def _stacked(lw: LoraWeight) -> int:
    return len(lw.roles) - len(lw.roles.lstrip("s"))


def with_form(lora, form):
    return jax.tree.map(
        lambda x: (
            dataclasses.replace(x, w=FORMS[form](x), squared_norm=None)
            if isinstance(x, LoraWeight)
            else x
        ),
        lora,
        is_leaf=is_node,
    )


def sweep():
    """Every case in one form, a fourth of them in the quick part; plain ones in every form."""
    for k, name in enumerate(NAMES):
        for j, form in enumerate(FORMS):
            if j == k % len(FORMS) or CASES[name].is_plain:
                quick = j == k % len(FORMS) and k % 4 == 0
                marks = [pytest.mark.xdist_group(name), *([] if quick else [pytest.mark.slow])]
                yield pytest.param(CASES[name], form, id=f"{name}-{form}", marks=marks)


@pytest.mark.parametrize(("case", "form"), [*sweep()])
def test_is_as_dequantized(case: Case, form: str):
    """Outputs and gradients; without adapters too."""
    lora, args = case.lora()
    lora = with_form(randomized(lora), form)

    def outputs(lora):
        trainable, frozen = jaxlora.partition(lora)
        loss = lambda t: scalar(case.apply(jaxlora.combine(t, frozen), *args))
        gradient = None if case.name in NOT_DIFFERENTIABLE else jax.grad(loss)(trainable)
        plain = case.apply(jaxlora.base_params(lora), *args)
        return case.apply(lora, *args), gradient, plain

    both = jax.jit(lambda lora: (outputs(lora), outputs(jaxlora.dequantize(lora))))
    if case.name in ALWAYS_REFUSED or case.name in REFUSED[form]:
        with pytest.raises(MaterializeError, match="quantized"):
            both(lora)
        return
    got, expected = both(lora)
    assert_close(got, expected, max(20, ROUNDED.get(case.name, 1)))


# --------------------------------------------------------------------------------------------------
# What is decoded


def largest_floats(fn, *args) -> int:
    """The size of the largest array of floats that any equation makes."""
    most = 0

    def walk(jaxpr):
        nonlocal most
        jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
        for eqn in jaxpr.eqns:
            subs = [v for p in eqn.params.values() for v in (p if isinstance(p, tuple) else (p,))]
            for sub in subs:
                if hasattr(getattr(sub, "jaxpr", sub), "eqns"):
                    walk(sub)
            for v in eqn.outvars:
                if jnp.issubdtype(getattr(v.aval, "dtype", jnp.int32), jnp.floating):
                    most = max(most, math.prod(v.aval.shape))

    walk(jax.make_jaxpr(fn)(*args))
    return most


def weight(*shape, **options):
    w = jax.random.normal(KEY, shape)
    return quantize_array(w, **{"block_size": 16, **options})


LAYOUTS = {
    "rows": ((96, 32), {}),
    "flat": ((96, 33), {}),
    "inputs": ((96, 32), {"along": (0,)}),
    "flat inputs": ((95, 32), {"along": (0,)}),
}
TOKENS = jnp.array([[3, 1], [0, 94]])
LOOKUPS = {
    "indexed": lambda p: p["e"][TOKENS],
    "taken": lambda p: jnp.take(p["e"], TOKENS, axis=0),
    "taken with a fill": lambda p: jnp.take(p["e"], TOKENS + 1, axis=0, mode="fill", fill_value=7),
    "one": lambda p: p["e"][TOKENS[0, 0]],
    "cast first": lambda p: p["e"].astype(jnp.bfloat16)[TOKENS],
    "scaled first": lambda p: (p["e"] * 8.0)[TOKENS],
    "sliced": lambda p: jnp.ones((4, 7)) @ p["e"][2:9],
    "columns of the transposed": lambda p: p["e"].T[:, TOKENS],
    "vmapped": lambda p: jax.vmap(lambda t: p["e"][t])(TOKENS),
}


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("how", LOOKUPS)
def test_lookups_decode_the_rows_alone(how: str, layout: str, adapted: bool):
    shape, options = LAYOUTS[layout]
    q = weight(*shape, **options)
    if not adapted:
        leaf = q
    else:
        parts = {"a": jnp.ones((shape[0], 2)), "b": jnp.ones((2, shape[1])) / 8}
        leaf = LoraWeight(w=q, **parts, scale=jnp.float32(1), roles="io")
    fn = LOOKUPS[how]
    apply = jaxlora.lora_apply(fn)
    got, expected = jax.jit(lambda p: (apply(p), apply(jaxlora.dequantize(p))))({"e": leaf})
    assert_close(got, expected)
    if not adapted:
        assert_same(got, jax.jit(fn)({"e": q.dequantize()}))
        assert np.isnan(np.asarray(got)).sum() == 0
    assert largest_floats(apply, {"e": leaf}) < 1000 < q.size


def test_a_lookup_out_of_bounds_is_that_of_the_array():
    q = weight(10, 32)
    fn = lambda p, t: p["e"].at[t].get(mode="fill")
    t = jnp.array([3, 77, -1])
    assert_same(jaxlora.lora_apply(fn)({"e": q}, t), jax.jit(fn)({"e": q.dequantize()}, t))


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("layout", mostly_slow(["rows", "flat", "inputs"], ("inputs",)))
@pytest.mark.parametrize("how", ["scan", "scan of a cast", "fori", "indexed", "unstacked"])
def test_a_layer_is_decoded_at_a_time(how: str, layout: str, adapted: bool):
    def layer(h, w):
        return jnp.tanh(h @ w @ w.T)

    def fn(p, x):
        w = p["w"].astype(jnp.float16).astype(jnp.float32) if how == "scan of a cast" else p["w"]
        if "scan" in how:
            return jax.lax.scan(lambda h, w: (layer(h, w), None), x, w)[0]
        if how == "fori":
            return jax.lax.fori_loop(0, 6, lambda k, h: layer(h, w[k]), x)
        for k in range(6):
            x = layer(x, w[k] if how == "indexed" else jax.lax.index_in_dim(w, k, keepdims=False))
        return x

    outputs_of_layer = 63 if layout == "flat" else 64
    along = (0,) if layout == "inputs" else None
    q = weight(6, 32, outputs_of_layer, stacked=1, along=along)
    parts = {"a": jnp.ones((6, 32, 2)) / 9, "b": jnp.ones((6, 2, outputs_of_layer)) / 9}
    leaf = LoraWeight(w=q, **parts, scale=jnp.ones(6), roles="sio") if adapted else q
    x, apply = jnp.ones((3, 32)) / 8, jaxlora.lora_apply(fn)

    def outputs(p):
        return apply(p, x), None if how == "fori" else jax.grad(lambda x: scalar(apply(p, x)))(x)

    got, expected = jax.jit(lambda p: (outputs(p), outputs(jaxlora.dequantize(p))))({"w": leaf})
    assert_close(got, expected, 5)
    assert largest_floats(outputs, {"w": leaf}) < 2 * q.size // 6


def test_experts_are_picked_before_they_are_decoded():
    q = weight(8, 32, 48, stacked=1)
    fn = lambda p, x, ids: jnp.einsum("td,tdf->tf", x, p["w"][ids])
    x, ids = jax.random.normal(KEY, (2, 32)), jnp.array([5, 2])
    apply = jaxlora.lora_apply(fn)
    assert_close(apply({"w": q}, x, ids), jax.jit(fn)({"w": q.dequantize()}, x, ids))
    assert largest_floats(apply, {"w": q}, x, ids) == 2 * 32 * 48


def test_vmapped_adapters_share_one_decode_and_one_matmul():
    q = weight(32, 64)
    x = jax.random.normal(KEY, (3, 5, 32))
    a, b = jax.random.normal(KEY, (3, 32, 2)), jax.random.normal(KEY, (3, 2, 64))
    apply = jaxlora.lora_apply(lambda p, x: x @ p["w"])

    def one(q, a, b, x):
        return apply({"w": LoraWeight(w=q, a=a, b=b, scale=jnp.float32(1), roles="io")}, x)

    many = jax.vmap(one, in_axes=(None, 0, 0, 0))
    assert_close(jax.jit(many)(q, a, b, x), jax.jit(many)(q.dequantize(), a, b, x))
    assert largest_floats(many, q, a, b, x) == q.size

    bases = jax.tree.map(lambda *xs: jnp.stack(xs), q, weight(32, 64, double_quant=True))
    each = jax.vmap(one, in_axes=0)  # a base of its own for each: stacked codes
    bases = jax.tree.map(lambda x: jnp.concatenate([x, x[:1]]), bases)
    assert_close(jax.jit(each)(bases, a, b, x), jax.jit(many)(q, a, b, x))


def test_the_backward_pass_decodes_again():
    """No residual is as large as a weight."""
    q = weight(64, 64)
    leaf = LoraWeight(
        w=q, a=jnp.ones((64, 2)), b=jnp.ones((2, 64)), scale=jnp.float32(1), roles="io"
    )
    apply = jaxlora.lora_apply(lambda p, x: jnp.tanh(jnp.tanh(x @ p["w"]) @ p["w"].T))
    trainable, frozen = jaxlora.partition({"w": leaf})
    x = jnp.ones((3, 64))
    _, pullback = jax.vjp(lambda t: apply(jaxlora.combine(t, frozen), x), trainable)
    kept = [v for v in jax.tree.leaves(pullback) if jnp.issubdtype(v.dtype, jnp.floating)]
    assert kept
    assert max(v.size for v in kept) < q.size


def test_forward_mode_and_hessians():
    q = weight(16, 32)
    apply = jaxlora.lora_apply(lambda p, x: jnp.sum(jnp.tanh(x @ p["w"]) ** 2))
    x = jax.random.normal(KEY, (16,))

    @jax.jit
    def both(q):
        return [
            (jax.jvp(lambda x: apply({"w": w}, x), (x,), (x,)), jax.hessian(apply, 1)({"w": w}, x))
            for w in (q, q.dequantize())
        ]

    got, expected = both(q)
    assert_close(got, expected, 5)


def test_a_trained_scale_of_a_weight_gets_its_gradient():
    q = weight(16, 32)
    apply = jaxlora.lora_apply(lambda p, x: jnp.sum(jnp.tanh(x @ (p["w"] * p["g"]))))
    x = jax.random.normal(KEY, (4, 16))

    @jax.jit
    def both(g):
        return [jax.grad(lambda g, w=w: apply({"w": w, "g": g}, x))(g) for w in (q, q.dequantize())]

    for g in (jnp.float32(0.3), jnp.linspace(0.1, 1, 32)):
        got, expected = both(g)
        assert_close(got, expected, 5)


def test_split_columns():
    """Of blocks that run over them: each part picks its own elements."""
    config = jaxlora.LoraConfig(rank=2, targets=["w"])
    lora = jaxlora.init(KEY, {"w": jax.random.normal(KEY, (4, 6))}, config, roles={"w": "io"})
    lora = jaxlora.quantize(lora, block_size=4)
    apply = jaxlora.lora_apply(lambda p, x: [x @ w for w in jnp.split(p["w"], 3, axis=1)])
    x = jnp.ones((2, 4))
    assert_close(apply(lora, x), apply(jaxlora.dequantize(lora), x))


def test_an_explicitly_sharded_batch():
    config = jaxlora.LoraConfig(rank=2, targets=["w"])
    lora = jaxlora.init(KEY, {"w": jax.random.normal(KEY, (4, 6))}, config, roles={"w": "io"})
    lora = jaxlora.quantize(lora, block_size=2)
    x = jax.random.normal(KEY, (4, 4))
    apply = jaxlora.lora_apply(lambda p, x: x @ p["w"])
    run = jax.jit(jax.value_and_grad(lambda x: scalar(apply(lora, x))))
    mesh = jax.make_mesh((2,), ("a",), axis_types=(jax.sharding.AxisType.Explicit,))
    expected = run(x)
    with jax.set_mesh(mesh):
        got = run(jax.device_put(x, jax.P("a")))
    assert_close(jax.device_get(got), jax.device_get(expected))


def test_uses_that_would_decode_the_whole_are_refused():
    q = weight(16, 32)
    apply = jaxlora.lora_apply(lambda p: p["w"] + 1)
    with pytest.raises(
        MaterializeError, match=r"w: .*`add`.* would have to dequantize a quantized"
    ):
        apply({"w": q})
    allowed = jaxlora.lora_apply(lambda p: p["w"] + 1, materialize="allow")
    assert_same(allowed({"w": q}), q.dequantize() + 1)


def test_a_weight_handed_through_comes_out_as_it_is():
    q = weight(16, 32)
    out = jaxlora.lora_apply(lambda p, x: (p, x @ p["w"]))({"w": q}, jnp.ones(16))[0]
    assert_same(out, {"w": q})


def test_one_compilation_for_other_values():
    traces = []

    def fn(p, x):
        traces.append(1)
        return x @ p["w"]

    apply = jaxlora.lora_apply(fn)
    for scale in (1, 2):
        apply({"w": quantize_array(scale * jax.random.normal(KEY, (16, 32)))}, jnp.ones(16))
    assert len(traces) == 1
