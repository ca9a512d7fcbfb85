"""qwix's arrays as bases."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
from helpers import assert_close, assert_same, randomized

import jaxlora
from jaxlora import LoraConfig, MaterializeError, TargetError

KEY = jax.random.key(0)
STACKED = {"channelwise_axes": [0, 2]}
HOW = {
    "int8 by channel": ("int8", {"channelwise_axes": [1]}, {"channelwise_axes": [0, 2]}),
    "int4 in tiles": (
        "int4",
        {"tiled_axes": {0: 16}},
        {"channelwise_axes": [0], "tiled_axes": {1: 16}},
    ),
    "nf4": ("nf4", {"tiled_axes": {0: 16}}, {"channelwise_axes": [0], "tiled_axes": {1: 16}}),
    "float8": ("float8_e4m3fn", {"channelwise_axes": [1]}, {"channelwise_axes": [0, 2]}),
}


def normal(*shape):
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)


def model(p, x):
    h = jnp.tanh(x @ p["kernel"]) @ p["kernel"].T
    return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h, p["layers"])[0]


@pytest.mark.parametrize("how", HOW)
def test_as_dequantized(how: str):
    qtype, flat, stacked = HOW[how]
    floats = {"kernel": normal(32, 48), "layers": normal(3, 32, 32)}
    params = {
        "kernel": qwix.quantize(floats["kernel"], qtype, **flat),
        "layers": qwix.quantize(floats["layers"], qtype, **stacked),
    }
    dense = jax.tree.map(qwix.dequantize, params, is_leaf=lambda x: isinstance(x, qwix.QArray))
    assert_same(jaxlora.dequantize(params), dense)
    x = normal(5, 32)
    roles = jaxlora.trace_roles(model, params, x)
    config = LoraConfig(rank=2, targets=["kernel", "layers"])
    lora = randomized(jaxlora.init(KEY, params, config, roles=roles))
    trainable, frozen = jaxlora.partition(lora)
    apply = jaxlora.lora_apply(model)

    @jax.jit
    def outputs(trainable, frozen):
        loss = lambda t: jnp.sum(apply(jaxlora.combine(t, frozen), x))
        return loss(trainable), jax.grad(loss)(trainable)

    assert_close(
        outputs(trainable, frozen), outputs(trainable, jaxlora.dequantize(frozen)), factor=10
    )
    assert_close(apply(params, x), model(dense, x), factor=2)
    assert_close(jaxlora.merge(lora), jaxlora.merge(jaxlora.dequantize(lora)))
    assert "quantized (QArray)" in jaxlora.summary(lora)
    with pytest.raises(TargetError, match=r"kernel: got a QArray to quantize anew"):
        jaxlora.merge_quantized(lora)
    with pytest.raises(TargetError, match=r"kernel: .*quantized already"):
        jaxlora.quantize(params, ["kernel"])


def test_a_stack_with_one_scale_cannot_be_sliced():
    q = qwix.quantize(normal(3, 32, 32), "int8", channelwise_axes=[2])
    with pytest.raises(MaterializeError, match=r"layers: .*`scan`.*blocks run over"):
        jaxlora.lora_apply(model)({"kernel": normal(32, 48), "layers": q}, normal(5, 32))
