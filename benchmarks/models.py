"""One transformer, twice: plain Flax Linen, and with LoRA written into its Dense layers by hand.

Both are the same `Transformer`; only the `dense` that its blocks are built from differs. That is
how an expert adds LoRA to a model whose source is at hand, and it is what jaxlora has to equal
without touching the model:

    plain = Transformer(n_layers=4)
    rival = Transformer(n_layers=4, dense=functools.partial(LoraDense, rank=8, scale=2.0))
    rival.apply({"params": hand_written(lora)}, tokens)   # lora: jaxlora's tree for `plain`

Shapes: B batch, T tokens, D width, H heads, F = 4 D hidden, V vocabulary, L layers, R rank.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util
from flax.linen.dtypes import promote_dtype

import jaxlora

Dtype = Any
Path = tuple[str, ...]

TARGETS = ("query", "key", "value", "out", "up", "down")
"""The layers that `dense` builds: every matrix of a block; neither the embedding nor the head."""


class LoraDense(nn.Module):
    """`nn.Dense` with LoRA in it: y = x W + ((x a) scale) b + bias.

    W needs no `stop_gradient`: the gradient is taken of a and b alone. (Inside a scan it would even
    cost memory: the stopped W becomes a residual, so that each layer's W is saved once more.)
    """

    features: int
    rank: int
    scale: float
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        inputs, init = x.shape[-1], nn.initializers
        kernel = self.param("kernel", init.lecun_normal(), (inputs, self.features))
        bias = self.param("bias", init.zeros_init(), (self.features,))
        a = self.param("a", init.lecun_normal(), (inputs, self.rank))
        b = self.param("b", init.zeros_init(), (self.rank, self.features))
        x, kernel, bias, a, b = promote_dtype(x, kernel, bias, a, b, dtype=self.dtype)
        return x @ kernel + ((x @ a) * self.scale) @ b + bias


class Block(nn.Module):
    """Causal attention and an MLP, each after a LayerNorm and added to its input. (B, T, D)."""

    heads: int
    dense: Callable[..., nn.Module]
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array, _: None = None) -> tuple[jax.Array, None]:
        width = x.shape[-1]
        h = nn.LayerNorm(dtype=self.dtype, name="attention_norm")(x)
        query, key, value = (
            self.dense(width, name=name)(h).reshape(*x.shape[:-1], self.heads, -1)  # (B, T, H, D/H)
            for name in ("query", "key", "value")
        )
        h = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        x = x + self.dense(width, name="out")(h.reshape(x.shape))
        h = nn.LayerNorm(dtype=self.dtype, name="mlp_norm")(x)
        h = nn.gelu(self.dense(4 * width, name="up")(h))
        return x + self.dense(width, name="down")(h), None


class Transformer(nn.Module):
    """A causal language model: tokens (B, T) to logits (B, T, V). Deterministic, no dropout.

    Args:
        scan: layers under one `nn.scan` with stacked parameters; else a Python loop over layers.
        remat: recompute each layer in the backward pass.
        dtype: of the computation; parameters are float32.
        dense: builds the linear layers of the blocks (`TARGETS`).
    """

    n_layers: int = 4
    width: int = 256
    heads: int = 4
    vocab: int = 512
    scan: bool = True
    remat: bool = False
    dtype: Dtype = jnp.float32
    dense: Callable[..., nn.Module] = nn.Dense

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        block: Any = nn.remat(Block, prevent_cse=not self.scan) if self.remat else Block
        options = {
            "heads": self.heads,
            "dense": functools.partial(self.dense, dtype=self.dtype),
            "dtype": self.dtype,
        }
        x = nn.Embed(self.vocab, self.width, dtype=self.dtype, name="embed")(tokens)
        if self.scan:
            layers: Any = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=self.n_layers,
            )
            x, _ = layers(**options, name="layers")(x, None)
        else:
            for i in range(self.n_layers):
                x, _ = block(**options, name=f"layer_{i}")(x, None)
        x = nn.LayerNorm(dtype=self.dtype, name="norm")(x)
        return nn.Dense(self.vocab, dtype=self.dtype, name="head")(x)


def hand_written(lora: Mapping[str, Any]) -> dict[str, Any]:
    """The rival's params, from jaxlora's tree for the plain model.

    Each `kernel: LoraWeight(w, a, b)` becomes `kernel: w, a: a, b: b`; other leaves stay. What
    is None (in half a tree: `partition`'s, or gradients) is left out.
    """
    flat: dict[Path, Any] = {}
    for path, leaf in traverse_util.flatten_dict(dict(lora)).items():
        if isinstance(leaf, jaxlora.LoraWeight):
            flat |= {path: leaf.w, (*path[:-1], "a"): leaf.a, (*path[:-1], "b"): leaf.b}
        else:
            flat[path] = leaf
    return traverse_util.unflatten_dict({p: leaf for p, leaf in flat.items() if leaf is not None})


def split(params: Mapping[str, Any]) -> tuple[dict[Path, jax.Array], dict[Path, jax.Array]]:
    """The rival's params as (adapters, the rest), flat; `join` puts them together again."""
    flat: dict[Path, Any] = traverse_util.flatten_dict(dict(params))  # pyright: ignore
    adapters = {path: leaf for path, leaf in flat.items() if path[-1] in ("a", "b")}
    return adapters, {path: leaf for path, leaf in flat.items() if path not in adapters}


def join(adapters: Mapping[Path, jax.Array], rest: Mapping[Path, jax.Array]) -> dict[str, Any]:
    """The inverse of `split`."""
    return traverse_util.unflatten_dict({**adapters, **rest})
