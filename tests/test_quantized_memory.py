"""What a train step on a quantized base takes, as the compiler counts it.

The bar: at most two layers' dequantized weights more than the same step on a float base, scanned
and unrolled, with and without remat of the layer.
For TPUs: `python -m benchmarks.quantized_memory`.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from helpers import mostly_slow
from jax import lax

import jaxlora
from benchmarks.train_step import RUN_ONCE

pytestmark = pytest.mark.xdist_group("quantized memory")
WIDTH, HIDDEN, LAYERS, HEADS = 128, 512, 5, 2
SHAPES = dict.fromkeys("qkvo", (WIDTH, WIDTH)) | {
    "gate": (WIDTH, HIDDEN),
    "up": (WIDTH, HIDDEN),
    "down": (HIDDEN, WIDTH),
}
LAYER = 4 * sum(math.prod(shape) for shape in SHAPES.values())  # bytes, in float32


def block(p, x):
    norm = lambda x: x * lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6)
    h = norm(x)
    q, k, v = ((h @ p[name]).reshape(*x.shape[:2], HEADS, -1) for name in "qkv")
    x = x + jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(x.shape) @ p["o"]
    h = norm(x)
    return x + (jax.nn.silu(h @ p["gate"]) * (h @ p["up"])) @ p["down"]


def model(p, x, *, remat: bool):
    layer = jax.checkpoint(block) if remat else block
    if isinstance(p, dict):
        return lax.scan(lambda x, p: (layer(p, x), None), x, p)[0]
    for each in p:
        x = layer(each, x)
    return x


@functools.cache
def temp_bytes(scan: bool, remat: bool, base: str) -> int:
    """Temporary memory of a train step on a "float", "nf4" or, decoded up front, "naive" base."""
    fn = functools.partial(model, remat=remat)
    x = jax.ShapeDtypeStruct((1, 16, WIDTH), jnp.float32)

    def start() -> Any:
        one = {name: jnp.zeros(shape) for name, shape in SHAPES.items()}
        stacked = {name: jnp.zeros((LAYERS, *shape)) for name, shape in SHAPES.items()}
        params = stacked if scan else [one] * LAYERS
        config = jaxlora.LoraConfig(rank=4, targets="all-linear")
        roles = jaxlora.trace_roles(fn, params, x)
        lora = jaxlora.init(jax.random.key(0), params, config, roles=roles)
        return lora if base == "float" else jaxlora.quantize(lora)

    trainable, frozen = jaxlora.partition(jax.eval_shape(start))
    apply = jaxlora.lora_apply(fn)

    def loss(trainable, frozen, x):
        frozen = jaxlora.dequantize(frozen) if base == "naive" else frozen
        return jnp.sum(apply(jaxlora.combine(trainable, frozen), x))

    lowered = jax.jit(jax.value_and_grad(loss)).lower(trainable, frozen, x)
    step = lowered.compile(compiler_options=RUN_ONCE)
    return step.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("remat", [False, True], ids=["", "remat"])
@pytest.mark.parametrize("scan", mostly_slow([True, False], (True,)), ids=["scanned", "unrolled"])
def test_at_most_two_layers_are_decoded_at_a_time(scan: bool, remat: bool):
    more = temp_bytes(scan, remat, "nf4") - temp_bytes(scan, remat, "float")
    assert more / LAYER <= 2


@pytest.mark.parametrize("scan", mostly_slow([True, False], (True,)), ids=["scanned", "unrolled"])
def test_the_bar_tells_a_base_that_is_kept(scan: bool):
    more = temp_bytes(scan, False, "naive") - temp_bytes(scan, False, "float")
    assert more / LAYER > LAYERS / 2
