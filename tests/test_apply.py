"""`lora_apply` beyond the registry: arguments, caching, state, compositions."""

from __future__ import annotations

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import assert_close, assert_same, count_primitives, randomized
from jax.extend import source_info_util

import jaxlora
from jaxlora import FullWeight, LoraConfig, LoraWeight

KEY = jax.random.key(0)


def adapted(shape=(4, 6), **config):
    params = {"w": jax.random.normal(KEY, shape), "b": jnp.ones(shape[-1])}
    config = {"targets": ["w"], "roles": {"w": "io"}, "rank": 2} | config
    return randomized(jaxlora.init(KEY, params, LoraConfig(**config)))


def model(p, x):
    return x @ p["w"] + p["b"]


def numpy_model(p, x):
    """The same in NumPy float64: independent of the library, merge included."""
    w, a, b = (np.asarray(v, np.float64) for v in (p["w"].w, p["w"].a, p["w"].b))
    scale = float(p["w"].scale)
    x = np.asarray(x, np.float64)
    return x @ w + (x @ a) * scale @ b + np.asarray(p["b"], np.float64)


def test_against_numpy():
    lora, x = adapted(alpha=3), jax.random.normal(KEY, (5, 4))
    got = jaxlora.lora_apply(model)(lora, x)
    np.testing.assert_allclose(got, numpy_model(lora, x), rtol=1e-5, atol=1e-5)
    merged = jaxlora.merge(lora)
    np.testing.assert_allclose(model(merged, x), numpy_model(lora, x), rtol=1e-5, atol=1e-5)


def test_gradient_against_finite_differences():
    with jax.enable_x64(True):
        lora, x = adapted(dtype=jnp.float64), jax.random.normal(KEY, (5, 4), jnp.float64)
        lora = jax.tree.map(lambda v: v.astype(jnp.float64), lora)
        trainable, frozen = jaxlora.partition(lora)
        apply = jaxlora.lora_apply(lambda p, x: jnp.sum(jnp.sin(model(p, x))))
        loss = lambda t: apply(jaxlora.combine(t, frozen), x)
        gradient = jax.grad(loss)(trainable)
        assert gradient["w"].a.dtype == jnp.float64
        direction = jax.tree.map(lambda v: jnp.cos(jnp.arange(v.size)).reshape(v.shape), trainable)
        plus, minus = (
            loss(jax.tree.map(lambda v, d, h=h: v + h * d, trainable, direction))
            for h in (1e-6, -1e-6)
        )
        dots = jax.tree.map(lambda g, d: jnp.sum(g * d), gradient, direction)
        np.testing.assert_allclose((plus - minus) / 2e-6, sum(jax.tree.leaves(dots)), rtol=1e-6)


def test_no_base_gradient_is_computed():
    """The matmuls of a step cost twice the forward's, not three times."""
    lora, x = adapted((64, 96)), jax.random.normal(KEY, (32, 64))
    trainable, frozen = jaxlora.partition(lora)
    apply = jaxlora.lora_apply(lambda p, x: jnp.sum(jnp.sin(model(p, x))))

    def loss(x, trainable):
        return apply(jaxlora.combine(trainable, frozen), x)

    jaxpr = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(x, trainable)
    # x w, x a, h b; and backwards: dx (two parts), dh, da, db. A base gradient would be one more.
    assert count_primitives(jaxpr, "dot_general") == 8


def test_python_arguments_stay_python():
    seen = []

    def fn(p, x, *, train, act, mode):
        seen.append((train, mode))
        return act(model(p, x)) if train else model(p, x)

    apply, lora, x = jaxlora.lora_apply(fn), adapted(), jnp.ones((5, 4))
    on = apply(lora, x, train=True, act=jnp.tanh, mode=None)
    off = apply(lora, x, train=False, act=jnp.tanh, mode="a")
    assert_close(on, jnp.tanh(off))
    apply(lora, x, train=True, act=jnp.tanh, mode=None)
    assert seen == [(True, None), (False, "a")]


def test_equal_python_arguments_of_other_types_are_not_mixed_up():
    apply = jaxlora.lora_apply(lambda p, k: p["w"] @ jnp.ones(6) * k)
    lora = adapted()
    lora = {"w": jax.tree.map(lambda v: v.astype(jnp.float32), lora["w"])}
    results = [apply(lora, k).dtype for k in (1, 1.0, True)]
    assert results == [jnp.float32] * 3
    identity = jaxlora.lora_apply(lambda p, k: (p["w"] @ jnp.ones(6), jnp.asarray(k)))
    dtypes = [identity(lora, k)[1].dtype for k in (1, 1.0, True)]
    assert dtypes == [jnp.int32, jnp.float32, jnp.bool_]


def test_numpy_arrays_are_traced():
    traces = []

    def fn(p, x):
        traces.append(x)
        return model(p, x)

    apply, lora = jaxlora.lora_apply(fn), adapted()
    for k in range(3):
        apply(lora, np.full((5, 4), k, np.float32))
    assert len(traces) == 1
    assert isinstance(traces[0], jax.core.Tracer)


def test_random_keys_pass():
    def fn(p, x, key):
        return model(p, x) * jax.random.bernoulli(key, 0.5, (6,))

    lora, x = adapted(), jnp.ones((5, 4))
    expected = fn(jaxlora.merge(lora), x, KEY)
    assert_close(jaxlora.lora_apply(fn)(lora, x, KEY), expected)


def test_float64():
    with jax.enable_x64(True):
        lora = jax.tree.map(lambda v: v.astype(jnp.float64), adapted())
        x = jax.random.normal(KEY, (5, 4), jnp.float64)
        got = jaxlora.lora_apply(model)(lora, x)
        assert got.dtype == jnp.float64
        np.testing.assert_allclose(got, numpy_model(lora, x), rtol=1e-13)


def test_bfloat16_is_as_near_as_bfloat16_can_be():
    """Against float64: the error of the factored product is that of a bfloat16 matmul."""
    lora, x = adapted((256, 128), rank=8), jax.random.normal(KEY, (64, 256))
    low = jax.tree.map(lambda v: v.astype(jnp.bfloat16), (lora["w"].w, x))
    lora["w"] = LoraWeight(
        w=low[0], a=lora["w"].a, b=lora["w"].b, scale=lora["w"].scale, roles="io"
    )
    lora["b"] = lora["b"].astype(jnp.bfloat16)
    exact = numpy_model(lora, low[1])
    got = np.asarray(jaxlora.lora_apply(model)(lora, low[1]), np.float64)
    merged = np.asarray(model(jaxlora.merge(lora), low[1]), np.float64)
    worst = np.abs(merged - exact).max()
    assert np.abs(got - exact).max() < 2 * worst


def test_rows_out_of_bounds_do_not_reach_the_gradient():
    """Padding ids that `take` fills with NaN, masked by the loss: a table's gradient is finite."""
    lora, ids = adapted(), jnp.array([0, 3, 99])

    def fn(p, ids):
        return jnp.tanh(jnp.take(p["w"], ids, axis=0, mode="fill"))

    def gradient(apply, params_of):
        trainable, frozen = jaxlora.partition(lora)
        loss = lambda t: jnp.sum(
            jnp.where(ids[:, None] < 4, apply(params_of(jaxlora.combine(t, frozen)), ids), 0)
        )
        return jax.grad(loss)(trainable)

    got = gradient(jaxlora.lora_apply(fn), lambda lora: lora)
    assert_close(got, gradient(fn, jaxlora.merge))
    assert all(jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(got))


def test_flags_and_signed_zeros_are_static():
    apply = jaxlora.lora_apply(lambda p, x, train, y: model(p, x) if train else jnp.asarray(1 / y))
    lora, x = adapted(), jnp.ones((5, 4))
    assert apply(lora, x, np.True_, 1.0).shape == (5, 6)
    eighth = apply(lora, x, np.False_, 8.0)
    assert eighth == 0.125
    sign = jaxlora.lora_apply(lambda p, y: jnp.copysign(1.0, y))
    assert (sign(lora, 0.0), sign(lora, -0.0)) == (1, -1)


def test_fresh_trees_can_be_donated():
    lora = jaxlora.init(
        KEY, {"kernel": jnp.ones((4, 6)), "bias": jnp.ones(6)},
        LoraConfig(targets=["kernel"], train=["bias"]),
    )  # fmt: skip
    out = jax.jit(lambda lora: jax.tree.map(lambda x: x + 1, lora), donate_argnums=0)(lora)
    assert float(out["bias"].value[0]) == 2


def test_a_wider_weight_widens_the_adapter():
    lora, x = adapted((64, 48)), jax.random.normal(KEY, (5, 64)).astype(jnp.bfloat16)
    fn = lambda p, x: x @ p["w"]
    assert_close(jaxlora.lora_apply(fn)(lora, x), fn(jaxlora.merge(lora), x))


# --- Nodes that come out --------------------------------------------------------------------------


def test_an_unchanged_node_comes_out_as_itself():
    lora = adapted(train=["b"])

    @jax.jit
    def inner(p, x):
        return p, model(p, x)

    def fn(p, x):
        def body(carry, x):
            p, h = carry
            p, y = inner(p, x)
            return (p, h + y.sum()), y

        (p, h), ys = jax.lax.scan(body, (p, 0.0), x)
        p = jax.lax.cond(h > 0, lambda p: p, lambda p: p, p)
        return {"state": p, "out": ys}

    out = jaxlora.lora_apply(fn)(lora, jnp.ones((3, 5, 4)))
    assert isinstance(out["state"]["w"], LoraWeight)
    assert_same(out["state"]["w"], lora["w"])
    bare = jaxlora.lora_apply(fn, jit=False)(lora, jnp.ones((3, 5, 4)))
    assert bare["state"]["w"] is lora["w"]


def test_scanned_weights_come_out_as_themselves():
    params = {"w": jax.random.normal(KEY, (3, 4, 4))}
    config = LoraConfig(targets=["w"], roles={"w": "sio"}, rank=2)
    lora = randomized(jaxlora.init(KEY, params, config))

    def fn(p, x):
        return jax.lax.scan(lambda h, w: (h @ w, w), x, p["w"])

    _, out = jaxlora.lora_apply(fn, jit=False)(lora, jnp.ones((5, 4)))
    assert out is lora["w"]


def test_a_full_weight_is_its_value():
    lora = adapted(train=["b"])
    assert isinstance(lora["b"], FullWeight)
    x = jnp.ones((5, 4))
    assert_close(jaxlora.lora_apply(model)(lora, x), model(jaxlora.merge(lora), x))
    out = jaxlora.lora_apply(lambda p: (p["b"], p["b"] + 1), jit=False)(lora)
    assert out[0] is lora["b"]
    assert_same(out[1], lora["b"].value + 1)


class Classifier(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(6)(x))
        return nn.Dense(3)(nn.Dropout(0.5, deterministic=not train)(x))


def test_linen_mutable_collections_and_rngs():
    x = jax.random.normal(KEY, (8, 4))
    module = Classifier()
    variables = module.init(KEY, x, train=False)
    config = LoraConfig(targets=["Dense_0", "Dense_1"], rank=2)
    lora = randomized(jaxlora.init(KEY, variables["params"], config))
    options = {"train": True, "mutable": ["batch_stats"], "rngs": {"dropout": KEY}}
    apply = jaxlora.lora_apply(module.apply)
    got, state = apply({"params": lora, "batch_stats": variables["batch_stats"]}, x, **options)
    merged = {"params": jaxlora.merge(lora), "batch_stats": variables["batch_stats"]}
    expected, expected_state = module.apply(merged, x, **options)
    assert_close(got, expected)
    assert_close(state, expected_state)


class NnxClassifier(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.up, self.norm = nnx.Linear(4, 6, rngs=rngs), nnx.BatchNorm(6, rngs=rngs)
        self.drop, self.head = nnx.Dropout(0.5, rngs=rngs), nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(self.drop(self.norm(self.up(x))))


def test_nnx_state_comes_back():
    graphdef, state = nnx.split(NnxClassifier(nnx.Rngs(0)))
    lora = randomized(jaxlora.init(KEY, state, LoraConfig(targets=["up", "head"], rank=2)))

    def fn(state, x):
        module = nnx.merge(graphdef, state)
        return module(x), nnx.state(module)

    x = jax.random.normal(KEY, (8, 4))
    got, new = jaxlora.lora_apply(fn)(lora, x)
    expected, expected_new = fn(jaxlora.merge(lora), x)
    assert_close(got, expected)
    assert jax.tree.structure(new) == jax.tree.structure(lora)
    assert_close(jaxlora.merge(new), expected_new)


# --- Compositions ---------------------------------------------------------------------------------


def test_vmap_axes_over_inputs_and_strengths():
    lora, xs = adapted(), jax.random.normal(KEY, (3, 5, 4))
    apply = jaxlora.lora_apply(model)
    batched = jax.vmap(apply, in_axes=(None, 0))(lora, xs)
    assert_close(batched, jnp.stack([apply(lora, x) for x in xs]))
    strengths = jnp.array([0.0, 0.5, 2.0])
    swept = jax.vmap(lambda s: apply(jaxlora.with_scale(lora, s), xs[0]))(strengths)
    each = [model(jaxlora.merge(jaxlora.with_scale(lora, s)), xs[0]) for s in strengths]
    assert_close(swept, jnp.stack(each))


def test_vmap_over_adapters_keeps_one_base_matmul():
    lora, x = adapted((64, 96)), jnp.ones((5, 64))
    trainable, frozen = jaxlora.partition(lora)
    stacked = jax.tree.map(lambda v: jnp.stack([v] * 3), trainable)
    apply = jaxlora.lora_apply(model)
    jaxpr = jax.make_jaxpr(jax.vmap(lambda t: apply(jaxlora.combine(t, frozen), x)))(stacked)
    assert "f32[3,5,64]" not in str(jaxpr)
    assert "f32[5,96] = dot_general" in str(jaxpr)


def test_grad_remat_scan_outside():
    lora, xs = adapted(), jax.random.normal(KEY, (3, 5, 4))
    trainable, frozen = jaxlora.partition(lora)

    def total(apply, params_of):
        @jax.checkpoint
        def step(t, x):
            return jnp.sum(jnp.sin(apply(params_of(t), x)))

        def loss(t):
            return jax.lax.scan(lambda s, x: (s + step(t, x), None), 0.0, xs)[0]

        return jax.jit(jax.grad(loss))(trainable)

    combined = functools.partial(jaxlora.combine, frozen=frozen)
    got = total(jaxlora.lora_apply(model), combined)
    assert_close(got, total(model, lambda t: jaxlora.merge(combined(t))), 2)


def test_hessian_and_jacobians():
    lora, x = adapted(), jax.random.normal(KEY, (5, 4))
    trainable, frozen = jaxlora.partition(lora)

    def of(apply, params_of):
        loss = lambda t: jnp.sum(jnp.sin(apply(params_of(t), x)))
        return jax.hessian(loss)(trainable), jax.jacfwd(loss)(trainable)

    got = of(jaxlora.lora_apply(model), lambda t: jaxlora.combine(t, frozen))
    expected = of(model, lambda t: jaxlora.merge(jaxlora.combine(t, frozen)))
    assert_close(got, expected, 5)


def test_no_tracer_leaks():
    with jax.checking_leaks():
        lora, x = adapted(), jnp.ones((3, 5, 4))

        def fn(p, x):
            return jax.lax.scan(lambda p, x: (p, model(p, x)), p, x)[1]

        trainable, frozen = jaxlora.partition(lora)
        apply = jaxlora.lora_apply(fn)
        jax.jit(jax.grad(lambda t: apply(jaxlora.combine(t, frozen), x).sum()))(trainable)


def test_two_uses_of_one_weight_under_one_jit_share_its_trace():
    """A layer called many times is lowered once, as it is without adapters."""

    @jax.jit
    def layer(w, x):
        return jnp.tanh(x @ w)

    def fn(p, x):
        for _ in range(4):
            x = layer(p["w"], x)
        return x

    lora = adapted((4, 4))
    text = jax.jit(jaxlora.lora_apply(fn)).lower(lora, jnp.ones((5, 4))).as_text()
    assert text.count("func.func private @layer") == 1


def test_equations_of_adapters_carry_the_models_line_and_scope():
    """Of each layer its own, although like layers share their trace."""

    def fn(p, x):
        with jax.named_scope("first"):
            x = jnp.tanh(x @ p["w"])
        with jax.named_scope("second"):
            return jnp.tanh(x @ p["v"])

    key = jax.random.split(KEY)
    params = {"w": jax.random.normal(key[0], (4, 4)), "v": jax.random.normal(key[1], (4, 4))}
    lora = jaxlora.init(KEY, params, LoraConfig(rank=2, targets=["w", "v"], roles={".": "io"}))
    jaxpr = jax.make_jaxpr(jaxlora.lora_apply(fn, jit=False))(lora, jnp.ones((5, 4)))
    dots = [eqn.source_info for eqn in jaxpr.eqns if eqn.primitive.name == "dot_general"]
    scopes = [str(info.name_stack) for info in dots]
    assert scopes == ["first", *["first/lora"] * 2, "second", *["second/lora"] * 2]
    line = fn.__code__.co_firstlineno
    for info, expected in zip(dots, [line + 2] * 3 + [line + 4] * 3, strict=True):
        where = source_info_util.summarize(info)
        assert f"test_apply.py:{expected}" in where
        assert "fn" in where
    text = jax.jit(jaxlora.lora_apply(fn)).lower(lora, jnp.ones((5, 4))).compile().as_text()
    names = re.findall(r' dot\(.*op_name="([^"]*)"', text)
    assert len(names) == 6
    assert all("first" in name or "second" in name for name in names)


def test_plain_params_pass_through():
    """LoRA off: the same function takes the base params."""
    lora, x = adapted(), jnp.ones((5, 4))
    base = jaxlora.base_params(lora)
    assert_same(jaxlora.lora_apply(model)(base, x), jax.jit(model)(base, x))


@pytest.mark.parametrize("shape", [(1, 6), (4, 1), (1, 1)])
def test_unit_sizes(shape):
    lora, x = adapted(shape, rank=5), jax.random.normal(KEY, (5, shape[0]))
    assert_close(jaxlora.lora_apply(model)(lora, x), model(jaxlora.merge(lora), x))


def test_empty_batch():
    lora, x = adapted(), jnp.ones((0, 4))
    assert jaxlora.lora_apply(model)(lora, x).shape == (0, 6)


def test_empty_images():
    lora = adapted((3, 3, 2, 5), roles={"w": "iiio"})
    fn = lambda p, x: jax.lax.conv_general_dilated(
        x, p["w"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    assert jaxlora.lora_apply(fn)(lora, jnp.ones((0, 4, 4, 2))).shape == (0, 4, 4, 5)


@pytest.mark.parametrize("factor", [lambda w: w * 0.1, lambda w: w / 3, lambda w: w * w.shape[0]])
def test_factors_keep_float64(factor):
    with jax.enable_x64(True):
        lora = adapted((4, 6))  # its a, b and scale are float32, as the config has them
        node = lora["w"]
        lora["w"] = LoraWeight(
            w=node.w.astype(jnp.float64), a=node.a, b=node.b, scale=node.scale, roles="io"
        )
        x = jax.random.normal(KEY, (5, 4), jnp.float64)
        fn = lambda p, x: x @ factor(p["w"]) * jnp.linspace(0.1, 0.7, 6)
        got = jaxlora.lora_apply(fn)(lora, x)
        np.testing.assert_allclose(got, fn(jaxlora.merge(lora), x), rtol=1e-12)
