"""What the transform must not disturb: effects, names, scopes, donation, shardings, export."""

from __future__ import annotations

import contextlib
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, count_primitives, randomized
from jax import lax
from jax.ad_checkpoint import checkpoint_name, print_saved_residuals
from jax.experimental import io_callback
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxlora
from jaxlora import LoraConfig

KEY = jax.random.key(0)


def adapted(shape=(4, 6), roles="io", **config):
    params = {"w": jax.random.normal(KEY, shape)}
    config = {"targets": ["w"], "roles": {"w": roles}, "rank": 2} | config
    return randomized(jaxlora.init(KEY, params, LoraConfig(**config)))


# --- Effects --------------------------------------------------------------------------------------


def test_effects_happen_in_order_and_once():
    seen = []

    def note(value):
        jax.debug.callback(lambda v: seen.append(float(v)), value, ordered=True)

    def fn(p, x):
        note(1.0)

        def body(h, k):
            note(k)
            return jnp.tanh(h @ p["w"]), None

        h, _ = lax.scan(body, x, jnp.arange(2.0, 5.0))

        @jax.jit
        def inner(p, h):
            note(5.0)
            return h @ p["w"]

        h = inner(p, h)
        h = jax.checkpoint(lambda p, h: (note(6.0), h @ p["w"])[1])(p, h)
        note(7.0)
        return h

    lora, x = adapted((4, 4)), jnp.ones((3, 4))
    for jit in (True, False):
        got = jaxlora.lora_apply(fn, jit=jit)(lora, x)
        jax.effects_barrier()
        assert seen == [1, 2, 3, 4, 5, 6, 7]
        seen.clear()
        assert_close(got, fn(jaxlora.merge(lora), x))
        jax.effects_barrier()
        seen.clear()


def test_ordered_callbacks_stay_in_order():
    seen = []
    note = lambda v: io_callback(lambda v: seen.append(float(v)), None, v, ordered=True)

    def fn(p, x):
        note(1.0)
        h, _ = lax.scan(lambda h, k: (note(k), (h @ p["w"], None))[1], x, jnp.arange(2.0, 4.0))
        note(4.0)
        return h

    jaxlora.lora_apply(fn)(adapted((4, 4)), jnp.ones((3, 4)))
    jax.effects_barrier()
    assert seen == [1, 2, 3, 4]


def test_what_a_callback_returns_is_used():
    shape = jax.ShapeDtypeStruct((5, 4), jnp.float32)
    fn = lambda p, x: io_callback(lambda x: np.asarray(x) * 2, shape, x, ordered=True) @ p["w"]
    lora, x = adapted(), jnp.ones((5, 4))
    assert_close(jaxlora.lora_apply(fn)(lora, x), 2 * x @ jaxlora.merge(lora)["w"])


# --- Checkpointing --------------------------------------------------------------------------------


def saved_names(fn, *args) -> list[str]:
    """What a gradient saves under a name, in order."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        print_saved_residuals(fn, *args)
    return [
        line.split("named ")[1].split()[0]
        for line in out.getvalue().splitlines()
        if "named " in line
    ]


@pytest.mark.parametrize(
    ("policy", "names"),
    [
        (jax.checkpoint_policies.save_only_these_names("h"), ["'h'"]),
        (jax.checkpoint_policies.save_only_these_names("h", "y"), ["'h'", "'y'"]),
        (jax.checkpoint_policies.save_any_names_but_these("h"), ["'y'"]),
        (jax.checkpoint_policies.nothing_saveable, []),
    ],
)
def test_the_same_names_are_saved(policy, names):
    @lambda f: jax.checkpoint(f, policy=policy)
    def layer(p, x):
        h = checkpoint_name(jnp.tanh(x @ p["w"]), "h")
        y = checkpoint_name(jnp.sin(h @ p["w"]), "y")
        return jnp.cos(y)

    fn = lambda p, x: jnp.sum(layer(p, x))
    lora, x = adapted((4, 4)), jnp.ones((5, 4))
    assert saved_names(fn, jaxlora.merge(lora), x) == names
    trainable, frozen = jaxlora.partition(lora)
    apply = jaxlora.lora_apply(fn, jit=False)  # a jit hides the names from the printer
    assert saved_names(lambda t: apply(jaxlora.combine(t, frozen), x), trainable) == names


def test_a_policy_on_a_weight_cast_inside():
    """Saved by name: the base in the compute dtype, as without adapters."""
    policy = jax.checkpoint_policies.save_only_these_names("cast")

    @lambda f: jax.checkpoint(f, policy=policy)
    def layer(p, x):
        w = checkpoint_name(p["w"].astype(jnp.bfloat16), "cast")
        return jnp.sin(x.astype(jnp.bfloat16) @ w).astype(jnp.float32)

    lora, x = adapted(), jnp.ones((5, 4))
    got = jax.grad(lambda x: jnp.sum(jaxlora.lora_apply(layer)(lora, x)))(x)
    assert_close(got, jax.grad(lambda x: jnp.sum(layer(jaxlora.merge(lora), x)))(x), 3000)


# --- Metadata -------------------------------------------------------------------------------------


def test_source_lines_and_scopes_are_in_the_compiled_program():
    def fn(p, x):
        with jax.named_scope("my_scope"):
            return jnp.sin(x @ p["w"])

    text = jax.jit(jaxlora.lora_apply(fn)).lower(adapted(), jnp.ones((5, 4))).compile().as_text()
    assert "my_scope/dot_general" in text
    assert "my_scope/lora/dot_general" in text
    assert "my_scope/sin" in text
    assert "test_transparent.py" in text


def test_names_of_inner_functions_are_kept():
    @jax.jit
    def my_layer(w, x):
        return x @ w

    text = jax.jit(jaxlora.lora_apply(lambda p, x: my_layer(p["w"], x))).lower(
        adapted(), jnp.ones((5, 4))
    )
    assert "my_layer" in text.as_text()


# --- jit's own options ----------------------------------------------------------------------------


def inner_jits(fn, *args):
    jaxpr = jax.make_jaxpr(fn)(*args)
    return [eqn for eqn in jaxpr.eqns if eqn.primitive.name in ("jit", "pjit")]


def test_donations_of_inner_jits_are_kept_but_not_of_weights():
    inner = jax.jit(lambda p, x, y: (x @ p["w"] + y, p), donate_argnums=(0, 2))
    fn = lambda p, x, y: inner(p, x, y)[0]
    lora, x = adapted(), jnp.ones((5, 4))
    (eqn,) = inner_jits(jaxlora.lora_apply(fn, jit=False), lora, x, jnp.ones((5, 6)))
    names = dict(zip(eqn.invars, eqn.params["donated_invars"], strict=True))
    assert [v.aval.shape for v, donated in names.items() if donated] == [(5, 6)]

    y = jnp.ones((5, 6))
    jaxlora.lora_apply(fn, jit=False)(lora, x, y)
    assert y.is_deleted()
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(lora))


@pytest.mark.parametrize("inline", [False, *getattr(jax, "Inline", ())])
def test_inlining_of_inner_jits_is_kept(inline):
    inner = jax.jit(lambda p, x: x @ p["w"], inline=inline)
    lora, x = adapted(), jnp.ones((5, 4))
    plain = inner_jits(inner, jaxlora.base_params(lora), x)
    ours = inner_jits(jaxlora.lora_apply(inner, jit=False), lora, x)
    assert [e.params["inline"] for e in ours] == [e.params["inline"] for e in plain]


def test_out_shardings_of_an_inner_jit_are_kept():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = NamedSharding(mesh, P("data"))
    inner = jax.jit(lambda p, x: x @ p["w"], out_shardings=sharding)
    lora, x = adapted(), jnp.ones((8, 4))
    for jit in (True, False):
        got = jaxlora.lora_apply(inner, jit=jit)(lora, x)
        assert got.sharding.is_equivalent_to(sharding, 2)
        assert_close(got, inner(jaxlora.merge(lora), x))


# --- Export ---------------------------------------------------------------------------------------


def test_an_exported_function_takes_the_lora_tree():
    lora, x = adapted(), jax.random.normal(KEY, (5, 4))
    apply = jaxlora.lora_apply(lambda p, x: jnp.tanh(x @ p["w"]))
    exported = jax.export.export(jax.jit(apply))(lora, x)
    again = jax.export.deserialize(exported.serialize())
    assert_close(again.call(lora, x), apply(lora, x))


def test_export_with_a_symbolic_batch():
    lora = adapted()
    apply = jaxlora.lora_apply(lambda p, x: jnp.tanh(x @ p["w"]))
    (batch,) = jax.export.symbolic_shape("batch")
    spec = jax.ShapeDtypeStruct((batch, 4), jnp.float32)
    exported = jax.export.export(jax.jit(apply))(lora, spec)
    for n in (1, 5):
        x = jax.random.normal(KEY, (n, 4))
        assert_close(exported.call(lora, x), apply(lora, x))


def test_an_exported_function_inside_is_left_alone():
    inner = jax.export.export(jax.jit(jnp.sin))(jax.ShapeDtypeStruct((5, 6), jnp.float32))
    fn = lambda p, x: inner.call(x @ p["w"])
    lora, x = adapted(), jnp.ones((5, 4))
    assert_close(jaxlora.lora_apply(fn)(lora, x), fn(jaxlora.merge(lora), x))


# --- Equations that no weight enters --------------------------------------------------------------


@pytest.mark.parametrize("jit", [True, False])
def test_untouched_equations_are_the_same_equations(jit):
    def fn(p, x):
        h = lax.associative_scan(jnp.add, jnp.sort(x @ p["w"], axis=0))
        h = lax.custom_linear_solve(lambda v: 2 * v, h, lambda _, b: b / 2)
        root = lax.custom_root(
            lambda v: v**2 - h,
            h,
            lambda f, v: jnp.sqrt(jnp.abs(h)),
            lambda g, y: y / g(jnp.ones_like(y)),
        )
        return jnp.linalg.qr(h)[0], root, jax.random.normal(KEY, (3,))

    lora, x = adapted(), jax.random.normal(KEY, (7, 4))
    plain = jax.make_jaxpr(fn)(jaxlora.base_params(lora), x)
    ours = jax.make_jaxpr(jaxlora.lora_apply(fn, jit=jit))(lora, x)
    for name in ("custom_linear_solve", "sort", "geqrf", "random_bits"):
        assert count_primitives(ours, name) == count_primitives(plain, name)
    for name in ("add", "custom_jvp_call"):  # the adapter's own: its sum, and `settled`
        assert count_primitives(ours, name) == count_primitives(plain, name) + 1
    assert_close(jaxlora.lora_apply(fn, jit=jit)(lora, x), fn(jaxlora.merge(lora), x), 5)
