"""A Llama with LoRA in its layers, written by hand: what a train step costs without a library.

Plain JAX, layers under a scan, float32 norms and rotations, whole logits, nothing computed again.
Params are those of examples/models/llama.py; no padding, no packing, no cache, no biases.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

Factors = dict[str, tuple[jax.Array, jax.Array]]  # "self_attn/q_proj": (L, I, R), (L, R, O)


class State(NamedTuple):
    factors: Factors
    opt: Any


def factors(params: Any, targets: list[str], rank: int, key: jax.Array) -> Factors:
    """A normal, B zero, in float32."""
    found = {}
    for block in ("self_attn", "mlp"):
        for name in sorted(set(targets) & set(params["layers"][block])):
            layers, rows, columns = params["layers"][block][name]["kernel"].shape
            key, now = jax.random.split(key)
            a = jax.random.normal(now, (layers, rows, rank)) * rows**-0.5
            found[f"{block}/{name}"] = a, jnp.zeros((layers, rank, columns))
    return found


def make_step(
    config: Any, tx: optax.GradientTransformation, scale: float, dtype: Any
) -> Callable[[State, Any, jax.Array, jax.Array], tuple[State, jax.Array]]:
    """(state, params, tokens, labels) -> (state, loss), jitted, the state donated."""
    heads, size, eps = config.num_attention_heads, config.head_dim, config.rms_norm_eps
    frequencies = config.rope_theta ** -(jnp.arange(0, size, 2) / size)

    def norm(x: jax.Array, weights: Any) -> jax.Array:
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
        return wide.astype(dtype) * weights["scale"].astype(dtype)

    def linear(x: jax.Array, weights: Any, path: str, lora: Factors) -> jax.Array:
        block, name = path.split("/")
        y = x @ weights[block][name]["kernel"].astype(dtype)
        if path not in lora:
            return y
        a, b = (z.astype(dtype) for z in lora[path])
        return y + (x @ a) @ b * scale

    def loss_of(lora: Factors, params: Any, tokens: jax.Array, labels: jax.Array) -> jax.Array:
        batch, length = tokens.shape
        angles = jnp.arange(length)[:, None, None] * frequencies
        cos, sin = jnp.cos(angles), jnp.sin(angles)

        def rotate(x: jax.Array) -> jax.Array:
            a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
            return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(dtype)

        def layer(x: jax.Array, each: Any) -> tuple[jax.Array, None]:
            weights, lora = each
            y = norm(x, weights["input_layernorm"])
            q, k, v = (
                linear(y, weights, f"self_attn/{n}_proj", lora).reshape(batch, length, -1, size)
                for n in "qkv"
            )
            y = jax.nn.dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
            y = y.reshape(batch, length, heads * size)
            x = x + linear(y, weights, "self_attn/o_proj", lora)
            y = norm(x, weights["post_attention_layernorm"])
            y = jax.nn.silu(linear(y, weights, "mlp/gate_proj", lora)) * linear(
                y, weights, "mlp/up_proj", lora
            )
            return x + linear(y, weights, "mlp/down_proj", lora), None

        x = params["embed_tokens"]["embedding"].astype(dtype)[tokens]
        x, _ = jax.lax.scan(layer, x, (params["layers"], lora))
        x = norm(x, params["norm"])
        head = (
            params["lm_head"]["kernel"]
            if "lm_head" in params
            else params["embed_tokens"]["embedding"].T
        )
        logits = jnp.matmul(x, head.astype(dtype), preferred_element_type=jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def step(
        state: State, params: Any, tokens: jax.Array, labels: jax.Array
    ) -> tuple[State, jax.Array]:
        loss, gradient = jax.value_and_grad(loss_of)(state.factors, params, tokens, labels)
        updates, opt = tx.update(gradient, state.opt, state.factors)
        return State(optax.apply_updates(state.factors, updates), opt), loss

    return jax.jit(step, donate_argnums=0)
