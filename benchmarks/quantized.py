"""The train step of LoRA on an NF4 base, against one on floats and against QLoRA written by hand.

The model has the shape of SmolLM2-135M: a plain function, layers under `lax.scan`, float32
activations. Its weights are random, since time does not depend on them. Quantized are the seven
projections of each layer; the embedding, which is the head too, stays in floats.

Shapes: B batch, T tokens, D width, F hidden, H heads, K KV heads, V vocabulary, L layers, R rank.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import optax

import jaxlora
from benchmarks.harness import TIME, Benchmark, Contestant, Limit, train_contestant
from benchmarks.train_step import RUN_ONCE
from jaxlora._codebooks import NF4 as TABLE
from jaxlora._codebooks import dynamic_code

FLOAT32 = "jaxlora, float32"
BFLOAT16 = "jaxlora, bfloat16"
NF4 = "jaxlora, nf4"
HAND_WRITTEN = "hand-written, nf4"
NAIVE = "naive, nf4"
TARGETS = ("query", "key", "value", "out", "gate", "up", "down")
Dense = Callable[[Any, jax.Array], jax.Array]  # (weight, x) -> x times the weight


@dataclass(frozen=True, kw_only=True)
class Llama:
    """A causal language model of Llama's kind: tokens (B, T) to logits (B, T, V)."""

    n_layers: int = 30
    width: int = 576
    hidden: int = 1536
    heads: int = 9
    kv_heads: int = 3
    head_dim: int = 64
    vocab: int = 49_152

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Random params, in float32; those of layers stacked."""
        width, queries, keys = self.width, self.heads * self.head_dim, self.kv_heads * self.head_dim
        shapes = {
            "query": (width, queries),
            "key": (width, keys),
            "value": (width, keys),
            "out": (queries, width),
            "gate": (width, self.hidden),
            "up": (width, self.hidden),
            "down": (self.hidden, width),
        }
        of = dict(zip((*shapes, "embed"), jax.random.split(key, len(shapes) + 1), strict=True))
        layers = {
            name: jax.random.normal(of[name], (self.n_layers, *shape)) / math.sqrt(shape[0])
            for name, shape in shapes.items()
        }
        norms = {name: jnp.ones((self.n_layers, width)) for name in ("norm_1", "norm_2")}
        embed = 0.02 * jax.random.normal(of["embed"], (self.vocab, width))
        return {"embed": embed, "layers": layers | norms, "norm": jnp.ones(width)}

    def apply(self, params: Any, tokens: jax.Array, dense: Dense | None = None) -> jax.Array:
        """`dense` replaces the multiplication with a layer's weights."""
        dense = dense or (lambda w, x: x @ w.astype(x.dtype))

        def layer(x: jax.Array, p: Any) -> tuple[jax.Array, None]:
            h = rms_norm(x, p["norm_1"])
            query, key, value = (
                dense(p[name], h).reshape(*h.shape[:-1], -1, self.head_dim)
                for name in ("query", "key", "value")
            )
            h = jax.nn.dot_product_attention(rotary(query), rotary(key), value, is_causal=True)
            x = x + dense(p["out"], h.reshape(*x.shape[:-1], -1))
            h = rms_norm(x, p["norm_2"])
            h = jax.nn.silu(dense(p["gate"], h)) * dense(p["up"], h)
            return x + dense(p["down"], h), None

        embed = params["embed"]
        x, _ = jax.lax.scan(layer, embed[tokens].astype(jnp.float32), params["layers"])
        return rms_norm(x, params["norm"]) @ embed.astype(x.dtype).T


def rms_norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-5) * scale.astype(x.dtype)


def rotary(x: jax.Array, theta: float = 1e5) -> jax.Array:
    """(B, T, H, D/H), the halves of the last dim rotated by the position's angles."""
    half = x.shape[-1] // 2
    angles = jnp.arange(x.shape[1])[:, None, None] / theta ** (jnp.arange(half) / half)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = x[..., :half], x[..., half:]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


# --------------------------------------------------------------------------------------------------
# QLoRA by hand


def decoded(q: dict[str, jax.Array]) -> jax.Array:
    """NF4 with double quantization, blocks of 64 along the inputs: codes (I / 2, O)."""
    index = q["absmax"].reshape(-1)
    absmax = jnp.asarray(dynamic_code(signed=True))[index]
    absmax = absmax * jnp.repeat(q["absmax_scale"], 256)[: index.size] + q["absmax_offset"]
    absmax = jnp.repeat(absmax.reshape(q["absmax"].shape).T, 64, axis=0)  # (I, O)
    codes = jnp.concatenate([q["codes"] >> 4, q["codes"] & 15])
    return jnp.asarray(TABLE)[codes] * absmax


def dense_by_hand(p: Any, x: jax.Array, *, scale: float, remat: bool) -> jax.Array:
    def times(x: jax.Array, q: Any) -> jax.Array:
        return x @ decoded(q)

    base = (jax.checkpoint(times) if remat else times)(x, p["q"])
    return base + ((x @ p["a"]) * scale) @ p["b"]


# --------------------------------------------------------------------------------------------------
# The contestants


def nf4() -> Benchmark:
    """LoRA on an NF4 base, against float32 and bfloat16 ones and QLoRA by hand."""
    return _benchmark(Llama())


def nf4_small() -> Benchmark:
    """The same on a small model."""
    small = Llama(n_layers=4, width=128, hidden=256, heads=4, kv_heads=2, head_dim=32, vocab=512)
    return _benchmark(small)


def _benchmark(model: Llama, batch: int = 4, length: int = 64, rank: int = 16) -> Benchmark:
    alpha, tx = 2.0 * rank, optax.adamw(1e-3)
    keys = jax.random.split(jax.random.key(0), 3)
    tokens = jax.random.randint(keys[0], (batch, length + 1), 0, model.vocab)
    params = jax.jit(model.init, compiler_options=RUN_ONCE)(keys[1])
    config = jaxlora.LoraConfig(rank=rank, alpha=alpha, targets=list(TARGETS))
    roles = jaxlora.trace_roles(model.apply, params, tokens[:, :-1])
    wide = jaxlora.init(keys[2], params, config, roles=roles)
    narrow = jaxlora.with_base(wide, jax.tree.map(lambda w: w.astype(jnp.bfloat16), params))
    quantized = jaxlora.quantize(wide)

    def step(apply: Callable[..., jax.Array]) -> Callable[..., Any]:
        def loss(trainable: Any, frozen: Any, tokens: jax.Array) -> jax.Array:
            logits = apply(jaxlora.combine(trainable, frozen), tokens[:, :-1])
            return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

        return functools.partial(_step, loss, tx)

    def ours(lora: Any) -> Contestant:
        trainable, frozen = jaxlora.partition(lora)
        state = trainable, tx.init(trainable)
        made = train_contestant(step(jaxlora.lora_apply(model.apply)), state, frozen, tokens)
        return replace(made, figures=_storage(jaxlora.base_params(lora)))

    def by_hand(remat: bool) -> Contestant:
        adapters, rest = split(quantized)
        dense = functools.partial(dense_by_hand, scale=alpha / rank, remat=remat)

        def loss(adapters: Any, rest: Any, tokens: jax.Array) -> jax.Array:
            logits = model.apply(joined(adapters, rest), tokens[:, :-1], dense)
            return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

        made = train_contestant(
            functools.partial(_step, loss, tx), (adapters, tx.init(adapters)), rest, tokens
        )
        return replace(made, figures=_storage(jaxlora.base_params(quantized)))

    return Benchmark(
        contestants={
            FLOAT32: ours(wide),
            BFLOAT16: ours(narrow),
            NF4: ours(quantized),
            HAND_WRITTEN: by_hand(remat=True),
            NAIVE: by_hand(remat=False),
        },
        baseline=FLOAT32,
        limits=[
            Limit(figure=TIME, contestant=NF4, baseline=FLOAT32, at_most=1.0),
            Limit(figure=TIME, contestant=NF4, baseline=HAND_WRITTEN, at_most=1.02),
            Limit(figure="temp_bytes", contestant=NF4, baseline=HAND_WRITTEN, at_most=1.02),
            Limit(figure="bytes a parameter", contestant=NF4, at_most=0.53),
        ],
        settings={
            "layers": model.n_layers,
            "width": model.width,
            "batch": batch,
            "tokens": length,
            "rank": rank,
            "targets": "+".join(TARGETS),
        },
        rounds=20,
    )


def _step(loss: Callable[..., jax.Array], tx: Any, state: Any, *constants: Any) -> Any:
    trained, opt_state = state
    value, grads = jax.value_and_grad(loss)(trained, *constants)
    updates, opt_state = tx.update(grads, opt_state, trained)
    return (optax.apply_updates(trained, updates), opt_state), value


def _storage(params: Any) -> dict[str, float]:
    """Bytes a parameter of the targets' weights."""
    weights = [params["layers"][name] for name in TARGETS]
    return {"bytes a parameter": sum(w.nbytes for w in weights) / sum(w.size for w in weights)}


def split(lora: Any) -> tuple[Any, Any]:
    """The rival's params from jaxlora's quantized tree: adapters, and the rest."""
    layers = lora["layers"]
    adapters = {name: {"a": layers[name].a, "b": layers[name].b} for name in TARGETS}
    parts = ("codes", "absmax", "absmax_scale", "absmax_offset")
    quantized = {name: {p: getattr(layers[name].w, p) for p in parts} for name in TARGETS}
    norms = {name: leaf for name, leaf in layers.items() if name not in TARGETS}
    return adapters, {**lora, "layers": norms, "quantized": quantized}


def joined(adapters: Any, rest: Any) -> Any:
    """The inverse of `split`."""
    targets = {name: {**adapters[name], "q": rest["quantized"][name]} for name in TARGETS}
    return {**rest, "layers": {**rest["layers"], **targets}}
