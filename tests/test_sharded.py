"""Meshes beyond the registry: what a gather may not do in factored form, and typed shardings."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from cases.sharded import MESH, sharded
from helpers import assert_close, randomized
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxlora
from jaxlora import LoraConfig, MaterializeError

KEY = jax.random.key(0)
BOTH = P(("data", "model"))


def adapted(shape=(4, 6), roles="io", **config):
    params = {"w": jax.random.normal(KEY, shape)}
    config = {"targets": ["w"], "roles": {"w": roles}, "rank": 2} | config
    return randomized(jaxlora.init(KEY, params, LoraConfig(**config)))


def gathered(w, axis):
    return lax.all_gather(w, "model", axis=axis, tiled=True)


# --- Gathers of factors that differ between devices -----------------------------------------------


UNSOUND = {
    "along another dim": ((4, 6), "io", P("model"), (6, 2), lambda w, x: x @ gathered(w, 1)),
    "of stacked matrices": (
        (2, 3, 5),
        "sio",
        P("model"),
        (4, 6),
        lambda w, x: x @ gathered(w[0], 0),
    ),
    "of a reshaped stack": (
        (2, 3, 5),
        "sio",
        P("model"),
        (4, 6),
        lambda w, x: x @ gathered(w.reshape(3, 5), 0),
    ),
    "after a transpose": ((4, 6), "oi", P("model"), (6, 12), lambda w, x: x @ gathered(w.T, 0)),
    "after a shift": (
        (4, 6),
        "io",
        P("model"),
        (6, 4),
        lambda w, x: x @ gathered(lax.ppermute(w, "model", [(0, 1)]), 0),
    ),
    "after a slice of one's own": (
        (8, 6),
        "io",
        P("model"),
        (6, 4),
        lambda w, x: x @ gathered(lax.dynamic_slice_in_dim(w, 2 * lax.axis_index("model"), 2), 0),
    ),
    "after a factor of one's own": (
        (4, 6),
        "io",
        P("model"),
        (6, 4),
        lambda w, x: x @ gathered(w * (1.0 + lax.axis_index("model")), 0),
    ),
    "after a branch of one's own": (
        (4, 6),
        "io",
        P("model"),
        (6, 4),
        lambda w, x: (
            x @ gathered(lax.cond(lax.axis_index("model") == 0, lambda w: w, lambda w: 2 * w, w), 0)
        ),
    ),
    "of scanned layers": (
        (2, 4, 4),
        "sio",
        P("model"),
        (4, 8),
        lambda w, x: _through_layers(w, x),
    ),
}


def _through_layers(w, x):
    start = x[:, :4] * (1.0 + lax.axis_index("model"))
    return lax.scan(lambda h, w: (h + x @ gathered(w, 0), None), start, w)[0]


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("use", UNSOUND)
def test_a_gather_of_other_factors_materializes(use, check_vma):
    shape, roles, spec, x_shape, layer = UNSOUND[use]
    lora, x = adapted(shape, roles), jax.random.normal(KEY, x_shape)

    def fn(p, x):
        return sharded(layer, (spec, P("data")), BOTH, check_vma=check_vma)(p["w"], x)

    with pytest.raises(MaterializeError, match=r"w: the primitive `all_gather` .*other factors"):
        jaxlora.lora_apply(fn)(lora, x)
    got = jaxlora.lora_apply(fn, materialize="allow")(lora, x)
    assert_close(got, fn(jaxlora.merge(lora), x), 2)


def test_a_gather_under_pmap():
    def fn(p, x):
        layer = lambda w, x: x @ lax.all_gather(w, "i", axis=1, tiled=True)
        return jax.pmap(layer, axis_name="i")(p["w"].reshape(2, 2, 6), x)

    lora, x = adapted(), jnp.ones((2, 3, 2))
    with pytest.raises(MaterializeError, match="`all_gather`"):
        jaxlora.lora_apply(fn)(lora, x)


def test_a_gather_of_a_weight_scaled_outside():
    fn = lambda p, x: sharded(
        lambda w, x: x @ gathered(w, 0), (P("model"), P("data")), BOTH, check_vma=False
    )(p["w"] * x[0, 0], x)
    lora, x = adapted(), jax.random.normal(KEY, (6, 4))
    assert_close(jaxlora.lora_apply(fn)(lora, x), fn(jaxlora.merge(lora), x))


def test_a_weight_comes_back_from_shard_map():
    same = sharded(lambda w: w, (P("model"),), P("model", None))
    fn = lambda p, x: x @ same(p["w"])
    lora, x = adapted(), jax.random.normal(KEY, (6, 4))
    assert_close(jaxlora.lora_apply(fn)(lora, x), fn(jaxlora.merge(lora), x))


def test_the_devices_are_there():
    assert MESH.size == 4


# --- Explicitly sharded types ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x_spec", "w_spec", "out"),
    [
        (P("data", None), P(None, None), None),
        (P("data", None), P(None, "model"), None),
        (P("data", "model"), P("model", None), P("data", None)),
        (P(None, ("data", "model")), P(("data", "model"), None), P(None, None)),
        (P("data", "model"), P("model", None), P("data", "model")),
    ],
)
@pytest.mark.parametrize("alike", [False, True])
def test_explicit_meshes(x_spec, w_spec, out, alike):
    """The types of JAX's explicit sharding: results typed as without adapters."""
    mesh = jax.make_mesh((2, 2), ("data", "model"))
    with jax.set_mesh(mesh):
        lora, x = adapted((8, 4)), jax.random.normal(KEY, (4, 8))
        place = lambda v, *spec: jax.device_put(v, NamedSharding(mesh, P(*spec)))
        node = lora["w"]
        rows, columns = w_spec
        parts = {"w": place(node.w, rows, columns), "a": node.a, "b": node.b}
        if alike:  # a and b sharded as w is
            parts |= {"a": place(node.a, rows, None), "b": place(node.b, None, columns)}
        lora = {"w": jaxlora.LoraWeight(**parts, scale=node.scale, roles="io")}
        x = place(x, *x_spec)
        fn = lambda p, x: jnp.einsum("bi,io->bo", x, p["w"], out_sharding=out)
        got, expected = jaxlora.lora_apply(fn)(lora, x), fn(jaxlora.merge(lora), x)
        assert_close(got, expected)
        assert jax.typeof(got) == jax.typeof(expected)

        trainable, frozen = jaxlora.partition(lora)
        loss = lambda apply, p: jnp.sum(jnp.sin(apply(p, x)))
        got = jax.jit(jax.grad(lambda t: loss(jaxlora.lora_apply(fn), jaxlora.combine(t, frozen))))(
            trainable
        )
        expected = jax.jit(jax.grad(lambda t: loss(fn, jaxlora.merge(jaxlora.combine(t, frozen)))))(
            trainable
        )
        assert_close(got, expected, 4)


def test_a_weight_that_is_resharded():
    mesh = jax.make_mesh((4,), ("data",))
    with jax.set_mesh(mesh):
        lora = adapted((8, 4))
        put = lambda v: jax.device_put(v, NamedSharding(mesh, P("data", None)))
        node = lora["w"]
        lora = {
            "w": jaxlora.LoraWeight(w=put(node.w), a=put(node.a), b=node.b, scale=1, roles="io")
        }
        x = put(jax.random.normal(KEY, (4, 8)))
        fn = lambda p, x: x @ jax.sharding.reshard(p["w"], P(None, None))
        got, expected = jaxlora.lora_apply(fn)(lora, x), fn(jaxlora.merge(lora), x)
        assert_close(got, expected)
        assert jax.typeof(got) == jax.typeof(expected)


def test_shard_map_in_an_explicit_mesh():
    """a and b are typed as replicated, as `init` makes them, and the weight is not."""
    mesh = jax.make_mesh((2, 2), ("data", "model"))
    with jax.set_mesh(mesh):
        lora, x = adapted((8, 4)), jax.random.normal(KEY, (4, 8))
        place = lambda v, *spec: jax.device_put(v, NamedSharding(mesh, P(*spec)))
        node = lora["w"]
        lora = {
            "w": jaxlora.LoraWeight(
                w=place(node.w, "model", None), a=node.a, b=node.b, scale=node.scale, roles="io"
            )
        }
        x = place(x, "data", "model")
        layer = lambda w, x: lax.psum(x @ w, "model")
        specs = (P("model", None), P("data", "model"))
        fn = lambda p, x: jax.shard_map(layer, in_specs=specs, out_specs=P("data"))(p["w"], x)
        assert_close(jaxlora.lora_apply(fn)(lora, x), fn(jaxlora.merge(lora), x))


def test_ragged_dot_in_an_explicit_mesh():
    mesh = jax.make_mesh((2, 2), ("data", "model"))
    with jax.set_mesh(mesh):
        lora, x = adapted((3, 8, 4), "sio"), jax.random.normal(KEY, (6, 8))
        numbers = lax.RaggedDotDimensionNumbers((((1,), (1,)), ((), ())), (0,), (0,))
        fn = lambda p, x: lax.ragged_dot_general(
            x, p["w"], jnp.array([2, 1, 3]), numbers, out_sharding=P(None, None)
        )
        assert_close(jaxlora.lora_apply(fn)(lora, x), fn(jaxlora.merge(lora), x))


# --- DoRA and dropout -----------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [P("model", None), P(None, "model"), P("data", "model"), P()])
def test_dora_inside_a_shard_map(spec):
    """`lora_apply` within the shard_map: the norm is that of all inputs, not of a block's."""
    lora = adapted((8, 6), dora=True)
    inputs, outputs = (*spec, None, None)[:2]
    leaves, treedef = jax.tree.flatten(lora["w"])
    by_field = [P(inputs, outputs), P(inputs, None), P(None, outputs), P(), P(outputs), P(outputs)]
    assert len(leaves) == len(by_field)  # w, a, b, scale, magnitude, squared_norm
    specs = {"w": jax.tree.unflatten(treedef, by_field)}
    apply = jaxlora.lora_apply(lambda params, x: x @ params["w"])

    def block(lora, x):
        y = apply(lora, x)
        return y if inputs is None else jax.lax.psum(y, inputs)

    x = jax.random.normal(jax.random.key(2), (3, 8))
    got = jax.shard_map(
        block, mesh=MESH, in_specs=(specs, P(None, inputs)), out_specs=P(None, outputs)
    )(lora, x)
    assert_close(got, x @ jaxlora.merge(lora)["w"])


@pytest.mark.parametrize("varies", ["trainable", "w"])
def test_dora_that_varies_for_other_reasons(varies):
    """Adapters of each device's own, and a gathered base, are not blocks: no sum over devices."""
    lora = adapted((8, 6), dora=True)
    apply = jaxlora.lora_apply(lambda params, x: x @ params["w"])

    def block(lora, x):
        if varies == "w":
            w = lax.dynamic_slice_in_dim(lora["w"].w, 4 * lax.axis_index("model"), 4)
            w = gathered(w, 0)
            return apply({"w": dataclasses.replace(lora["w"], w=w)}, x)
        trainable, frozen = jaxlora.partition(lora)
        trainable = jax.tree.map(lambda t: lax.pcast(t, ("model",), to="varying"), trainable)
        return apply(jaxlora.combine(trainable, frozen), x)

    x = jax.random.normal(jax.random.key(2), (4, 8))
    spec = P("model")
    got = jax.shard_map(block, mesh=MESH, in_specs=(P(), spec), out_specs=spec)(lora, x)
    assert_close(got, x @ jaxlora.merge(lora)["w"])


@pytest.mark.parametrize("w_spec", [P("model", None), P("data", "model"), P()])
def test_dora_and_dropout_in_an_explicit_mesh(w_spec):
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    fn = lambda params, x: jnp.dot(x, params["w"], out_sharding=P("data", "model"))
    plain, x = adapted((8, 6), dora=True, dropout=0.5), jax.random.normal(KEY, (4, 8))
    expected = x @ jaxlora.merge(plain)["w"]
    dropped = jaxlora.lora_apply(lambda params, x: x @ params["w"])(
        jaxlora.with_dropout(plain, jax.random.key(2)), x
    )
    with jax.set_mesh(mesh):
        place = lambda array, spec: jax.device_put(array, NamedSharding(mesh, spec))
        lora = {
            "w": dataclasses.replace(
                plain["w"],
                w=place(plain["w"].w, w_spec),
                a=place(plain["w"].a, P((*w_spec, None)[0], None)),
                b=place(plain["w"].b, P(None, (*w_spec, None, None)[1])),
            )
        }
        x = place(x, P("data", None))
        apply = jaxlora.lora_apply(fn)
        assert_close(apply(lora, x), expected)
        assert_close(apply(jaxlora.with_dropout(lora, jax.random.key(2)), x), dropped)
        loss = lambda lora: apply(jaxlora.with_dropout(lora, jax.random.key(2)), x).sum()
        assert jax.tree.structure(jax.grad(loss)(lora)) == jax.tree.structure(lora)
