"""Nodes and quantized weights that code takes for arrays: they say what to call instead."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlora
from jaxlora import FullWeight, LoraWeight, MaterializeError, quantize_array

W = np.ones((64, 4), np.float32)
NODES = [
    quantize_array(W),
    LoraWeight(w=W, a=jnp.ones((64, 2)), b=jnp.ones((2, 4)), scale=1.0, roles="io"),
    FullWeight(w=W, value=W),
]
USES = {
    "jax @": lambda w: jnp.ones((3, 64)) @ w,
    "numpy @": lambda w: np.ones((3, 64)) @ w,
    "times": lambda w: 2 * w,
    "jnp.asarray": jnp.asarray,
    "np.asarray": np.asarray,
    "jnp.einsum": lambda w: jnp.einsum("bi,io->bo", jnp.ones((3, 64)), w),
    "astype": lambda w: w.astype(jnp.bfloat16),
    "index": lambda w: w[0],
    "iteration": list,
    "in jit": jax.jit(lambda w: jnp.sum(w)),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("node", NODES, ids=lambda node: type(node).__name__)
def test_says_what_to_call(node, use: str):
    remedy = "dequantize" if node is NODES[0] else "merge"
    with pytest.raises(MaterializeError, match=rf"lora_apply\(fn\).*jaxlora\.{remedy}"):
        USES[use](node)


def test_is_a_pytree_all_the_same():
    for node in NODES:
        assert type(jax.tree.map(lambda x: x, node)) is type(node)
        assert bool(node)
        assert jnp.shape(node) == (64, 4)
    assert jaxlora.lora_apply(lambda p, x: x @ p)(NODES[0], jnp.ones((3, 64))).shape == (3, 4)
