"""DoRA against PEFT and NumPy. That factored is merged is in the registry: cases/family.py."""

from __future__ import annotations

import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import randomized

import jaxlora
from jaxlora._dropout import Dropout

REFERENCE = np.load(
    pathlib.Path(__file__).parent / "references" / "dora.npz"
)  # tests/oracle/dora.py


def linear(params, x):
    return x @ params["w"].T


def conv(params, x):
    layout = ("NCHW", "OIHW", "NCHW")
    return jax.lax.conv_general_dilated(
        x, params["w"], (1, 1), "SAME", dimension_numbers=layout, precision="highest"
    )


def embedding(params, x):
    return params["w"][x]


LAYERS = {  # fn, roles, PEFT's A and B as a and b
    "linear": (linear, "oi", lambda a, b: (a.T, b.T)),
    "conv": (conv, "oiii", lambda a, b: (np.moveaxis(a, 0, -1), b[:, :, 0, 0].T)),
    "embedding": (embedding, "io", lambda a, b: (a.T, b.T)),
}


@pytest.mark.parametrize("name", ["linear", "conv", "embedding", "linear_dropout", "conv_dropout"])
def test_is_pefts(name, monkeypatch):
    """The output, the merged weight, and the gradients of A, B and the magnitude."""
    want = {k.split("/")[1]: v for k, v in REFERENCE.items() if k.startswith(f"{name}/")}
    fn, roles, ours = LAYERS[name.removesuffix("_dropout")]
    f32 = lambda x: jnp.asarray(x, jnp.float32)
    a, b = map(f32, ours(want["a"], want["b"]))
    weight = jaxlora.LoraWeight(
        w=f32(want["w"]), a=a, b=b, scale=1.5, roles=roles, magnitude=f32(want["m"].ravel())
    )
    lora = {"w": weight}
    if "mask" in want:
        kept = lambda self, x: x * want["mask"].astype(np.float32)
        monkeypatch.setattr(Dropout, "kept", kept)
        lora = jaxlora.with_dropout(lora, jax.random.key(0), 0.5)
    x = jnp.asarray(want["x"], None if name == "embedding" else jnp.float32)
    apply = jaxlora.lora_apply(fn)

    @jax.jit
    def outputs(lora):
        trainable, frozen = jaxlora.partition(lora)
        loss = lambda trainable: jnp.sin(apply(jaxlora.combine(trainable, frozen), x)).sum()
        return apply(lora, x), jaxlora.merge(lora)["w"], jax.grad(loss)(trainable)["w"]

    y, merged, grads = outputs(lora)
    da, db = ours(want["da"], want["db"])
    close = lambda got, to: np.testing.assert_allclose(got, to, atol=2e-5 * np.abs(to).max())
    close(y, want["y"])
    close(grads.a, da)
    close(grads.b, db)
    close(grads.magnitude, want["dm"].ravel())
    if "merged" in want:
        close(merged, want["merged"])


KINDS = {
    "dense": ("io", (7, 5)),
    "torch": ("oi", (5, 7)),
    "attention": ("iio", (2, 3, 5)),
    "conv": ("iiio", (3, 3, 2, 4)),
    "scanned": ("sioo", (3, 5, 2, 2)),
    "stacked_last": ("ois", (4, 5, 2)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_value_is_numpys(kind):
    """merge, against (m / n) (W + scale a b) in float64, matrix by matrix."""
    roles, shape = KINDS[kind]
    rng = np.random.default_rng(0)
    dims = {r: [d for d, x in enumerate(roles) if x == r] for r in "sio"}
    size = {r: [shape[d] for d in dims[r]] for r in "sio"}
    w = rng.standard_normal(shape)
    a = rng.standard_normal((*size["s"], *size["i"], 2))
    b = rng.standard_normal((*size["s"], 2, *size["o"]))
    m = rng.standard_normal((*size["s"], *size["o"]))
    scale = rng.standard_normal(size["s"])
    order = [*dims["s"], *dims["i"], *dims["o"]]
    n, i, o = (math.prod(size[r]) for r in "sio")
    expected = np.empty((n, i, o))
    parts = w.transpose(order).reshape(n, i, o), a.reshape(n, i, 2), b.reshape(n, 2, o)
    for k, (w_k, a_k, b_k) in enumerate(zip(*parts, strict=True)):
        tuned = w_k + np.ravel(scale)[k] * a_k @ b_k
        expected[k] = m.reshape(n, o)[k] / np.linalg.norm(tuned, axis=0) * tuned
    expected = expected.reshape([shape[d] for d in order]).transpose(np.argsort(order))

    f32 = lambda x: jnp.asarray(x, jnp.float32)
    weight = jaxlora.LoraWeight(
        w=f32(w), a=f32(a), b=f32(b), scale=f32(scale), roles=roles, magnitude=f32(m)
    )
    got = jax.jit(jaxlora.merge)({"w": weight})["w"]
    np.testing.assert_allclose(got, expected, atol=2e-5 * np.abs(expected).max())


def test_starts_at_the_base_and_trains_the_magnitude():
    params = {"w": jax.random.normal(jax.random.key(0), (6, 4))}
    config = jaxlora.LoraConfig(rank=2, targets=["w"], roles={"w": "io"}, dora=True)
    lora = jaxlora.init(jax.random.key(1), params, config)
    norms = np.linalg.norm(np.asarray(params["w"], np.float64), axis=0)
    np.testing.assert_allclose(lora["w"].magnitude, norms, rtol=1e-6)
    np.testing.assert_allclose(lora["w"].squared_norm, norms**2, rtol=1e-6)
    np.testing.assert_array_equal(jaxlora.merge(lora)["w"], params["w"])
    trainable, frozen = jaxlora.partition(lora)
    assert trainable["w"].magnitude is not None
    assert trainable["w"].squared_norm is None
    assert frozen["w"].magnitude is None
    assert jaxlora.count_params(lora).trainable == 2 * (6 + 4) + 4
    assert "DoRA" in jaxlora.summary(lora)


def test_the_norm_is_kept():
    """||W||^2 is not computed in a step: what squares W is not in its program."""
    params = {"w": jnp.ones((6, 4))}
    config = jaxlora.LoraConfig(rank=2, targets=["w"], roles={"w": "io"}, dora=True)
    lora = randomized(jaxlora.init(jax.random.key(1), params, config))
    apply = jaxlora.lora_apply(lambda params, x: x @ params["w"])
    text = str(jax.make_jaxpr(jax.grad(lambda lora: apply(lora, jnp.ones((3, 6))).sum()))(lora))
    assert "f32[6,4] = square" not in text
    assert "f32[6,4] = integer_pow" not in text
    assert "f32[6,4] = mul" not in text


def test_zero_column():
    params = {"w": jnp.ones((6, 4)).at[:, 2].set(0)}
    config = jaxlora.LoraConfig(rank=2, targets=["w"], roles={"w": "io"}, dora=True)
    with pytest.raises(jaxlora.TargetError, match=r"w: got a weight of which 1 of 4 columns"):
        jaxlora.init(jax.random.key(0), params, config)


def test_magnitude_of_the_wrong_shape():
    with pytest.raises(
        jaxlora.TargetError, match=r"got magnitude of shape \(6,\), expected \(4,\)"
    ):
        jaxlora.LoraWeight(
            w=jnp.ones((6, 4)),
            a=jnp.ones((6, 2)),
            b=jnp.ones((2, 4)),
            scale=1.0,
            roles="io",
            magnitude=jnp.ones(6),
        )


def test_columns_of_two_norms_materialize():
    """Rows of two DoRA weights joined: columns of each have a norm of their own."""
    params = {k: jax.random.normal(jax.random.key(0), (3, 4)) for k in ("u", "v")}
    roles = {"u": "io", "v": "io"}
    config = jaxlora.LoraConfig(rank=2, targets=["u", "v"], roles=roles, dora=True)
    lora = randomized(jaxlora.init(jax.random.key(1), params, config))
    fn = lambda params, x: x @ jnp.concatenate([params["u"], params["v"]])
    x = jnp.ones((2, 6))
    with pytest.raises(jaxlora.MaterializeError, match="DoRA's columns are partly summed over"):
        jaxlora.lora_apply(fn)(lora, x)
    got = jaxlora.lora_apply(fn, materialize="allow")(lora, x)
    np.testing.assert_allclose(got, fn(jaxlora.merge(lora), x), atol=1e-5)


def test_exact_where_filled():
    """Numbers other than zero that a pad puts in are not scaled: refused."""
    params = {"w": jax.random.normal(jax.random.key(0), (3, 4))}
    config = jaxlora.LoraConfig(rank=2, targets=["w"], roles={"w": "io"}, dora=True)
    lora = randomized(jaxlora.init(jax.random.key(1), params, config))
    x = jnp.ones((2, 5))
    around = ((1, 1, 0), (0, 0, 0))
    zeros = lambda params, x: x @ jax.lax.pad(params["w"], 0.0, around)
    got = jaxlora.lora_apply(zeros)(lora, x)
    np.testing.assert_allclose(got, zeros(jaxlora.merge(lora), x), atol=1e-5)
    twos = lambda params, x: x @ jax.lax.pad(params["w"], 2.0, around)
    with pytest.raises(jaxlora.MaterializeError, match="fills up a weight"):
        jaxlora.lora_apply(twos)(lora, x)
    got = jaxlora.lora_apply(twos, materialize="allow")(lora, x)
    np.testing.assert_allclose(got, twos(jaxlora.merge(lora), x), atol=1e-5)


def test_a_norm_that_cancels_is_no_nan():
    w = jax.random.normal(jax.random.key(0), (64, 3))
    lora = {
        "w": jaxlora.LoraWeight(
            w=w, a=w, b=-(1 - 1e-5) * jnp.eye(3), scale=1.0, roles="io", magnitude=jnp.ones(3)
        )
    }
    got = jaxlora.lora_apply(lambda params, x: x @ params["w"])(lora, jnp.ones((2, 64)))
    assert np.all(np.isfinite(got))


def test_another_base():
    """`with_base` keeps the adapter, and takes the norm of the new weights."""
    params = {"w": jax.random.normal(jax.random.key(0), (6, 4)), "c": jnp.ones(2)}
    config = jaxlora.LoraConfig(rank=2, targets=["w"], roles={"w": "io"}, dora=True, train=["c"])
    lora = randomized(jaxlora.init(jax.random.key(1), params, config))
    other = jax.tree.map(lambda x: 2 * x + 1, params)
    got = jaxlora.with_base(lora, other)
    w, a, b = (np.asarray(x, np.float64) for x in (other["w"], lora["w"].a, lora["w"].b))
    tuned = w + a @ b
    expected = np.asarray(lora["w"].magnitude) / np.linalg.norm(tuned, axis=0) * tuned
    np.testing.assert_allclose(jaxlora.merge(got)["w"], expected, rtol=2e-5, atol=1e-5)
    np.testing.assert_array_equal(got["c"].value, lora["c"].value)
    assert jaxlora.base_params(got)["c"] is other["c"]
    with pytest.raises(jaxlora.TargetError, match=r"w: got a base of shape \(4, 6\)"):
        jaxlora.with_base(lora, {"w": params["w"].T, "c": params["c"]})
    with pytest.raises(jaxlora.TargetError, match="params of another structure"):
        jaxlora.with_base(lora, {"w": params["w"]})
