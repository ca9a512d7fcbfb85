"""`input_moments`, against NumPy sums over inputs that are recorded by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases.sharded import MESH
from jax.sharding import PartitionSpec as P

import jaxlora
from jaxlora import LoraConfig, TargetError, initializers, input_moments

RNG = np.random.default_rng(0)
W = jnp.asarray(RNG.standard_normal((6, 6)), jnp.float32)
V = jnp.asarray(RNG.standard_normal((3, 6, 6)), jnp.float32)
X = jnp.asarray(RNG.standard_normal((2, 4, 6)), jnp.float32)


def collect(fn, params, roles, batches=(X,)):
    config = LoraConfig(rank=1, targets=list(roles), roles=roles)
    return input_moments(fn, jaxlora.init(jax.random.key(0), params, config), batches)


def check(moments, rows):
    """Moments of one matrix are those of these rows, (rows, n)."""
    rows = np.asarray(rows, np.float64)
    np.testing.assert_allclose(moments.count, len(rows))
    np.testing.assert_allclose(moments.total, rows.sum(0), atol=1e-4)
    np.testing.assert_allclose(moments.second, rows.T @ rows, atol=1e-4)


def flat(x):
    return np.asarray(x).reshape(-1, x.shape[-1])


def layer(x, w):
    return jnp.tanh(x @ w)


H = [X, layer(X, V[0]), layer(layer(X, V[0]), V[1])]  # what each layer of V sees

DENSE = {
    "plain": lambda p, x: x @ p["w"],
    "jit": lambda p, x: jax.jit(jnp.matmul)(x, p["w"]),
    "remat": lambda p, x: jax.checkpoint(layer)(x, p["w"]),
    "vmap": lambda p, x: jax.vmap(lambda x: x @ p["w"])(x),
    "cond": lambda p, x: jax.lax.cond(True, lambda x: x @ p["w"], lambda x: x, x),
    "heads": lambda p, x: jnp.einsum("btd,dhk->bthk", x, p["w"].reshape(6, 2, 3)),
    "transposed": lambda p, x: p["w"].T @ x[0].T + p["w"].T @ x[1].T,
    "a nan behind it": lambda p, x: (x @ p["w"]) * jnp.nan,
}


@pytest.mark.parametrize("name", DENSE)
def test_dense(name):
    check(collect(DENSE[name], {"w": W}, {"w": "io"})["w"], flat(X))


def test_two_uses_and_two_batches_add_up():
    fn = lambda p, x: x @ p["w"] + (2 * x) @ p["w"]
    got = collect(fn, {"w": W}, {"w": "io"}, [X, 3 * X, X[:1]])["w"]
    rows = [flat(x * k) for x in (X, 3 * X, X[:1]) for k in (1, 2)]
    check(got, np.concatenate(rows))


STACKED = {
    "scan": lambda p, x: jax.lax.scan(lambda x, w: (layer(x, w), None), x, p["v"])[0],
    "remat in scan": lambda p, x: jax.lax.scan(
        jax.checkpoint(lambda x, w: (layer(x, w), None)), x, p["v"]
    )[0],
    "unrolled": lambda p, x: layer(layer(layer(x, p["v"][0]), p["v"][1]), p["v"][2]),
}


@pytest.mark.parametrize("name", STACKED)
def test_stacked(name):
    got = collect(STACKED[name], {"v": V}, {"v": "sio"})["v"]
    assert got.count.shape == (3,)
    for k in range(3):
        check(jax.tree.map(lambda x, k=k: x[k], got), flat(H[k]))


@pytest.mark.parametrize("spec", ["bti,sio->bsto", "bti,sio->sbto"])
def test_layers_that_share_an_activation(spec):
    got = collect(lambda p, x: jnp.einsum(spec, x, p["v"]), {"v": V}, {"v": "sio"})["v"]
    for k in range(3):
        check(jax.tree.map(lambda x, k=k: x[k], got), flat(X))


def test_experts_see_their_own():
    x = jnp.stack([X[0], X[1], 2 * X[0]])
    got = collect(lambda p, x: jnp.einsum("sti,sio->sto", x, p["v"]), {"v": V}, {"v": "sio"}, [x])
    for k in range(3):
        check(jax.tree.map(lambda x, k=k: x[k], got["v"]), x[k])


def test_torch_style_and_several_input_dims():
    got = collect(lambda p, x: x @ p["w"].T, {"w": W}, {"w": "oi"})["w"]
    check(got, flat(X))
    x = X.reshape(2, 4, 2, 3)
    fn = lambda p, x: jnp.einsum("bthk,hkd->btd", x, p["w"])
    check(collect(fn, {"w": W.reshape(2, 3, 6)}, {"w": "iio"}, [x])["w"], flat(X))


@pytest.mark.parametrize("groups", [1, 2])
def test_convolution(groups):
    """The inputs are patches in the order of the kernel's dims; groups are inputs of their own."""
    kernel = jnp.asarray(RNG.standard_normal((2, 3, 4 // groups, 6)), jnp.float32)
    image = jnp.asarray(RNG.standard_normal((2, 5, 5, 4)), jnp.float32)

    def fn(p, x):
        return jax.lax.conv_general_dilated(
            x,
            p["w"],
            (1, 2),
            "VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )

    got = collect(fn, {"w": kernel}, {"w": "iiio"}, [image])["w"]
    windows = np.lib.stride_tricks.sliding_window_view(np.asarray(image), (2, 3), axis=(1, 2))
    windows = windows[:, :, ::2].transpose(0, 1, 2, 4, 5, 3)  # (B, H, W, 2, 3, C)
    split = np.split(windows, groups, axis=-1)
    check(got, np.concatenate([x.reshape(-1, 2 * 3 * 4 // groups) for x in split]))


def test_fused_weights_see_the_same():
    fn = lambda p, x: jnp.split(x @ jnp.concatenate([p["q"], p["k"]], axis=1), 2, axis=-1)[0]
    got = collect(fn, {"q": W, "k": 2 * W}, {"q": "io", "k": "io"})
    check(got["q"], flat(X))
    check(got["k"], flat(X))


def test_lookups_and_tied_heads_are_not_counted():
    fn = lambda p, t: p["e"][t] @ p["e"].T
    got = collect(fn, {"e": V[0, :5]}, {"e": "io"}, [jnp.array([0, 3])])["e"]
    assert float(got.count) == 0
    assert not np.any(got.second)


def test_half_precision_is_summed_in_float32():
    x = X.astype(jnp.bfloat16)
    got = collect(lambda p, x: x @ p["w"], {"w": W.astype(jnp.bfloat16)}, {"w": "io"}, [x])["w"]
    assert got.second.dtype == jnp.float32
    check(got, flat(x.astype(jnp.float32)))


def test_batches_of_several_arrays_and_adapters_do_not_count():
    fn = lambda p, batch: (batch["x"] * batch["mask"][..., None]) @ p["w"]
    mask = jnp.array([[1.0, 0, 1, 1], [1, 1, 1, 1]])
    lora = jaxlora.init(
        jax.random.key(0), {"w": W}, LoraConfig(rank=1, targets=["w"], roles={"w": "io"})
    )
    lora = jax.tree.map(lambda x: x + 1, lora, is_leaf=lambda x: x is W)
    got = input_moments(fn, lora, iter([{"x": X, "mask": mask}]))["w"]
    check(got, flat(X * mask[..., None]))


def test_errors():
    fn = lambda p, x: x @ p["w"]
    with pytest.raises(TargetError, match="got no batches"):
        collect(fn, {"w": W}, {"w": "io"}, [])
    with pytest.raises(TargetError, match="without adapted weights"):
        input_moments(fn, {"w": W}, [X])
    ragged = lambda p, x: jax.lax.ragged_dot(x, p["v"], jnp.array([2, 1, 1]))
    with pytest.raises(jaxlora.MaterializeError, match=r"v: .*`ragged_dot_general`.*input_moments"):
        collect(ragged, {"v": V}, {"v": "sio"}, [X[0]])


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("spec", [P("model", None), P(None, "model")])
def test_weights_split_over_devices(spec, check_vma):
    def fn(p, x):
        inputs, outputs = spec
        block = lambda w, x: jax.lax.psum(x @ w, inputs) if inputs else x @ w
        specs = {"in_specs": (spec, P(None, inputs)), "out_specs": P(None, outputs)}
        return jax.shard_map(block, mesh=MESH, check_vma=check_vma, **specs)(p["w"], x)

    with pytest.raises(jaxlora.MaterializeError, match=r"shard_map splits it|of 6 inputs"):
        collect(fn, {"w": W}, {"w": "io"}, [X[0]])


def test_batches_split_over_devices():
    def fn(p, x):
        specs = {"in_specs": (P(), P("data")), "out_specs": P("data")}
        return jax.shard_map(lambda w, x: x @ w, mesh=MESH, **specs)(p["w"], x)

    check(collect(fn, {"w": W}, {"w": "io"}, [X[0]])["w"], X[0])


def test_experts_split_over_devices():
    fn = lambda p, x: jax.shard_map(
        lambda w, x: jnp.einsum("sti,sio->sto", x, w),
        mesh=MESH,
        in_specs=(P("model"), P("model", "data")),
        out_specs=P("model", "data"),
    )(p["v"], x)
    x = jnp.stack([X[0], 2 * X[1]])
    got = collect(fn, {"v": V[:2]}, {"v": "sio"}, [x])["v"]
    for k in range(2):
        check(jax.tree.map(lambda x, k=k: x[k], got), x[k])


def test_a_part_of_the_inputs():
    fn = lambda p, x: x[..., :2] @ p["w"][:2] + x[..., 2:] @ p["w"][2:]
    with pytest.raises(jaxlora.MaterializeError, match="it meets 2 of 6 inputs"):
        collect(fn, {"w": W}, {"w": "io"})


def test_from_start_to_end():
    """What a user does: statistics, then an adapter made from them."""
    fn = lambda p, x: jax.lax.scan(lambda x, w: (layer(x, w), None), x, p["v"])[0]
    config = LoraConfig(rank=2, targets=["v"], roles={"v": "sio"})
    params = {"v": V}
    stats = input_moments(fn, jaxlora.init(jax.random.key(0), params, config), [X, -X])
    for initializer in (initializers.eva(stats), initializers.corda(stats)):
        config = LoraConfig(rank=2, targets=["v"], roles={"v": "sio"}, initializer=initializer)
        lora = jaxlora.init(jax.random.key(0), params, config)
        np.testing.assert_allclose(jaxlora.lora_apply(fn)(lora, X), fn(params, X), atol=2e-5)
    for k in range(3):  # EVA: the principal directions of each layer's inputs
        rows = np.concatenate([flat(H[k]), -flat(H[k])]).astype(np.float64)
        _, vectors = np.linalg.eigh(np.cov(rows.T, bias=True))
        stats_k = initializers.eva(stats)(
            jax.random.key(0),
            V,
            initializers.Target(path="v", roles="sio", rank=2, scale=1.0),
        )[1][k]
        overlap = np.linalg.svd(vectors[:, -2:].T @ np.asarray(stats_k, np.float64))[1]
        assert overlap.min() > 0.99 * overlap.max()
