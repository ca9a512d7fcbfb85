"""One decoder for Llama, Mistral, Qwen2, Qwen3 and SmolLM2, in Flax Linen.

The layers are stacked and scanned over, so that params are few leaves with Hugging Face's names:

    embed_tokens/embedding                   (V, D)
    layers/self_attn/{q,k,v,o}_proj/kernel   (L, D, H*K), (L, D, G*K), (L, D, G*K), (L, H*K, D)
    layers/self_attn/{q,k,v}_proj/bias       (L, ...), Qwen2
    layers/self_attn/{q,k}_norm/scale        (L, K), Qwen3
    layers/mlp/{gate,up,down}_proj/kernel    (L, D, F), (L, D, F), (L, F, D)
    layers/{input,post_attention}_layernorm/scale, norm/scale
    lm_head/kernel                           (D, V), unless the embedding is the head

L layers, D hidden, F of the MLP, H heads, G of them for keys and values, K their size, V
vocabulary; B batch, T tokens, S slots of a cache.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

# What `Llama(remat=...)` can keep for the backward pass, by name: outputs of the layer's matmuls
# (before norm and rotation), of the attention, and the sum of the input with it.
SAVEABLE = (
    "q_proj",
    "k_proj",
    "v_proj",
    "attention",
    "residual",
    "gate_proj",
    "up_proj",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched for longer contexts: "linear", or "llama3"."""

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """An architecture, under Hugging Face's names where they have one; see `hf.read_config`.

    Attributes:
      model_type: "llama", "mistral", "qwen2" or "qwen3".
      qkv_bias, o_bias, mlp_bias: which projections have biases.
      qk_norm: RMSNorm of each head's query and key.
      sliding_window: a token sees itself and as many before it, less one; None: all.
      sliding_layers: for each layer, whether it has the window; None: all of them.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    sliding_layers: tuple[bool, ...] | None = None
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None

    def __post_init__(self):
        slides, layers = self.sliding_layers, self.num_hidden_layers
        if slides is not None and len(slides) != layers:
            raise ValueError(
                f"sliding_layers: got {len(slides)} of them, expected one for each of "
                f"{layers} layers."
            )

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The window of each layer."""
        slides = self.sliding_layers or (True,) * self.num_hidden_layers
        return tuple(self.sliding_window if s else None for s in slides)


def names(config: Config) -> dict[str, Any]:
    r"""Which leaf is which PyTorch module: for `jaxlora.peft`, and for `hf.load` and `hf.save`.

    >>> from models import hf
    >>> config = hf.read_config({"model_type": "llama", "vocab_size": 8, "hidden_size": 4,
    ...     "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2})
    >>> names(config)["lm_head/kernel"]
    'lm_head'
    """
    linear = {"module": "model.layers.{}.{1}.{2}", "roles": "sio"}
    embedding = {"module": "model.embed_tokens", "kind": "embedding"}
    if config.tie_word_embeddings:
        embedding["tied"] = "lm_head"
    found: dict[str, Any] = {
        "embed_tokens/embedding": embedding,
        r"layers/(self_attn|mlp)/(\w+_proj)/kernel": linear,
        r"layers/(\w+_layernorm)/scale": {"module": "model.layers.{}.{1}", "kind": "vector"},
        "norm/scale": {"module": "model.norm", "kind": "vector"},
    }
    if config.qkv_bias or config.o_bias or config.mlp_bias:
        bias = {"module": "model.layers.{}.{1}.{2}", "kind": "bias"}
        found[r"layers/(self_attn|mlp)/(\w+_proj)/bias"] = bias
    if config.qk_norm:
        norm = {"module": "model.layers.{}.self_attn.{1}", "kind": "vector"}
        found[r"layers/self_attn/([qk]_norm)/scale"] = norm
    if not config.tie_word_embeddings:
        found["lm_head/kernel"] = "lm_head"
    return found


# For `LoraConfig(roles=ROLES)`, or `roles=ROLES` elsewhere, in place of `trace_roles`: the layers
# are stacked.
ROLES = {
    f"layers/{block}/{name}_proj/kernel": "sio"
    for block, names_ in (("self_attn", "qkvo"), ("mlp", ("gate", "up", "down")))
    for name in names_
}


class Cache(NamedTuple):
    """Keys and values of the tokens so far; made by `init_cache`, filled by the model.

    Attributes:
      k, v: (L, B, S, G, K).
      positions: (B, S), of the token in each slot; -1: none, or padding.
      next: (B,), the position of each row's next token.
      length: (), how many slots are filled; the same for all rows.
    """

    k: jax.Array
    v: jax.Array
    positions: jax.Array
    next: jax.Array
    length: jax.Array


def init_cache(config: Config, batch: int, slots: int, dtype: Any = jnp.float32) -> Cache:
    """An empty cache for `slots` tokens a row, padding included."""
    shape = (config.num_hidden_layers, batch, slots, config.num_key_value_heads, config.head_dim)
    return Cache(
        k=jnp.zeros(shape, dtype),
        v=jnp.zeros(shape, dtype),
        positions=jnp.full((batch, slots), -1, jnp.int32),
        next=jnp.zeros(batch, jnp.int32),
        length=jnp.zeros((), jnp.int32),
    )


def positions_of(segment_ids: jax.Array) -> jax.Array:
    """The position of each token since its segment began.

    >>> jax.jit(positions_of)(jnp.array([[0, 0, 1, 1, 1, 2, 2]])).tolist()
    [[0, 1, 0, 1, 2, 0, 1]]
    """
    index = jnp.arange(segment_ids.shape[1])
    begins = jnp.diff(segment_ids, axis=1, prepend=-1) != 0
    return index - jax.lax.cummax(jnp.where(begins, index, 0), axis=1)


def inverse_frequencies(config: Config) -> np.ndarray:
    """Rotary frequencies in radians a token, (K / 2,), after the config's scaling.

    1 / theta^(2i / K). "llama3" divides those of long wavelengths by the factor, leaves those of
    short ones, and blends in between.

    References:
      Su et al. 2021, RoFormer, arXiv 2104.09864, section 3.2.2.
      Dubey et al. 2024, The Llama 3 Herd of Models, arXiv 2407.21783, section 3.4.2.
    """
    plain = config.rope_theta ** -(np.arange(0, config.head_dim, 2) / config.head_dim)
    scaling = config.rope_scaling
    if scaling is None:
        return plain.astype(np.float32)
    if scaling.kind == "linear":
        return (plain / scaling.factor).astype(np.float32)
    turns = scaling.original_max_position_embeddings * plain / (2 * np.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return (plain * (kept + (1 - kept) / scaling.factor)).astype(np.float32)


def rotate(x: jax.Array, rope: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates each pair (i, i + K / 2) of a head by its angle; x is (B, T, H, K)."""
    cos, sin = rope
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def sees(
    queries: tuple[jax.Array, jax.Array], keys: tuple[jax.Array, jax.Array], window: int | None
) -> jax.Array:
    """Which key each query attends to, (B, 1, T, S): of its own segment, not after it, not padding.

    Each is (positions, segment_ids), both (B, T) or (B, S).
    """
    (at, segment), (key_at, key_segment) = queries, keys
    ahead = at[:, :, None] - key_at[:, None, :]
    same = (segment[:, :, None] == key_segment[:, None, :]) & (key_segment[:, None, :] > 0)
    mask = same & (ahead >= 0)
    if window is not None:
        mask &= ahead < window
    return mask[:, None]


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * scale, in float32; then in the dtype of x."""

    eps: float
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), self.param_dtype)
        norm: Callable[[jax.Array], jax.Array] = partial(_normalized, eps=self.eps)
        if x.dtype != jnp.float32:  # else the float32 copy would live until the backward pass
            norm = jax.checkpoint(norm, prevent_cse=False)
        return norm(x) * scale.astype(self.dtype)


def _normalized(x: jax.Array, eps: float) -> jax.Array:
    wide = x.astype(jnp.float32)
    mean = jnp.mean(wide * wide, axis=-1, keepdims=True)
    return (wide * jax.lax.rsqrt(mean + eps)).astype(x.dtype)


@partial(jax.checkpoint, prevent_cse=False)  # keeps its two inputs, not five intermediates
def _swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    return jax.nn.silu(gate) * up


class Embedding(nn.Module):
    """A table of rows; its transpose is the head, where the two are tied."""

    size: int
    features: int
    dtype: Any
    param_dtype: Any

    def setup(self):
        shape, init = (self.size, self.features), nn.initializers.normal(0.02)
        self.embedding = self.param("embedding", init, shape, self.param_dtype)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        return jnp.take(self.embedding, tokens, axis=0).astype(self.dtype)

    def attend(self, x: jax.Array) -> jax.Array:
        return _head(x, self.embedding.astype(self.dtype), 1)


class Head(nn.Module):
    """Logits in float32."""

    size: int
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape, init = (x.shape[-1], self.size), nn.initializers.normal(0.02)
        return _head(x, self.param("kernel", init, shape, self.param_dtype).astype(self.dtype), 0)


def _head(x: jax.Array, w: jax.Array, axis: int) -> jax.Array:
    dims = (((x.ndim - 1,), (axis,)), ((), ()))
    return jax.lax.dot_general(x, w, dims, preferred_element_type=jnp.float32)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions."""

    config: Config
    dtype: Any
    param_dtype: Any
    implementation: str | None

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        rope: tuple[jax.Array, jax.Array],
        mask: jax.Array | None,
        cache: Cache | None,
        layer: jax.Array,
    ) -> tuple[jax.Array, Cache | None]:
        c = self.config
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}

        def heads(name: str, count: int) -> jax.Array:
            dense = nn.Dense(count * c.head_dim, use_bias=c.qkv_bias, name=f"{name}_proj", **dtypes)
            y = checkpoint_name(dense(x), f"{name}_proj")
            y = y.reshape(*x.shape[:-1], count, c.head_dim)
            if c.qk_norm and name != "v":
                y = RMSNorm(c.rms_norm_eps, name=f"{name}_norm", **dtypes)(y)
            return y if name == "v" else rotate(y, rope)

        q = heads("q", c.num_attention_heads)
        k = heads("k", c.num_key_value_heads)
        v = heads("v", c.num_key_value_heads)
        if cache is not None:
            at = (layer, 0, cache.length, 0, 0)
            put = jax.lax.dynamic_update_slice
            cache = cache._replace(
                k=put(cache.k, k[None].astype(cache.k.dtype), at),
                v=put(cache.v, v[None].astype(cache.v.dtype), at),
            )
            k, v = (
                jax.lax.dynamic_index_in_dim(z, layer, keepdims=False).astype(self.dtype)
                for z in (cache.k, cache.v)
            )
        window = c.windows[0] if mask is None else None  # without a mask, all layers' is the same
        attend: Any = partial(
            jax.nn.dot_product_attention,
            is_causal=mask is None,
            local_window_size=None if window is None else (window - 1, 0),
            implementation=self.implementation,
        )
        if self.implementation != "cudnn":  # which keeps no (T, S) array for the backward pass
            attend = jax.checkpoint(attend, prevent_cse=False)
        out = attend(q, k, v, mask=mask)
        out = checkpoint_name(out.reshape(*x.shape[:-1], -1), "attention")
        dense = nn.Dense(c.hidden_size, use_bias=c.o_bias, name="o_proj", **dtypes)
        return dense(out), cache


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    config: Config
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dense = partial(
            nn.Dense,
            use_bias=self.config.mlp_bias,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
        )
        size = self.config.intermediate_size
        gate = checkpoint_name(dense(size, name="gate_proj")(x), "gate_proj")
        up = checkpoint_name(dense(size, name="up_proj")(x), "up_proj")
        return dense(self.config.hidden_size, name="down_proj")(_swiglu(gate, up))


class Layer(nn.Module):
    """One layer, as the body of a scan over all."""

    config: Config
    dtype: Any
    param_dtype: Any
    implementation: str | None

    @nn.compact
    def __call__(self, carry: Any, each: Any, shared: Any) -> tuple[Any, None]:
        x, cache = carry
        layer, slides = each
        rope, mask, window_mask = shared
        if window_mask is not None:
            mask = jnp.where(slides, window_mask, mask)
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        norm = partial(RMSNorm, self.config.rms_norm_eps, **dtypes)
        attention = Attention(
            self.config, implementation=self.implementation, name="self_attn", **dtypes
        )
        y, cache = attention(norm(name="input_layernorm")(x), rope, mask, cache, layer)
        x = checkpoint_name(x + y, "residual")
        y = MLP(self.config, name="mlp", **dtypes)(norm(name="post_attention_layernorm")(x))
        return (x + y, cache), None


class Llama(nn.Module):
    """The decoder: tokens to logits; `method="hidden_states"` and `method="head"` are its halves.

    Attributes:
      config: the architecture.
      dtype: of the arithmetic, float32 or bfloat16. Norms, rotations, the softmax and the logits
        are float32 in any case.
      param_dtype: of params that `init` makes; `apply` takes them in any.
      remat: what a layer keeps for the backward pass: None, all that it needs; a sequence of names
        of `SAVEABLE`, those (`()`: its input alone), the rest being computed again; or a policy of
        `jax.checkpoint_policies`.
      implementation: of `jax.nn.dot_product_attention`. "cudnn" is the flash kernel of NVIDIA's
        GPUs, for 16-bit dtypes.

    >>> from models import hf
    >>> config = hf.read_config({"model_type": "llama", "vocab_size": 8, "hidden_size": 4,
    ...     "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2})
    >>> model, tokens = Llama(config), jnp.array([[1, 2, 3]])
    >>> variables = jax.jit(model.init)(jax.random.key(0), tokens)
    >>> jax.jit(model.apply)(variables, tokens).shape
    (1, 3, 8)
    """

    config: Config
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat: Sequence[str] | Callable[..., bool] | None = None
    implementation: str | None = None

    def setup(self):
        c = self.config
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.embed_tokens = Embedding(c.vocab_size, c.hidden_size, **dtypes)
        layer: Any = Layer
        if self.remat is not None:
            layer = nn.remat(Layer, prevent_cse=False, policy=_policy(self.remat))
        scanned = nn.scan(
            layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast),
            length=c.num_hidden_layers,
            check_constancy_invariants=False,  # traces the layer once, not twice
        )
        self.layers = scanned(c, implementation=self.implementation, **dtypes)
        self.norm = RMSNorm(c.rms_norm_eps, **dtypes)
        if not c.tie_word_embeddings:
            self.lm_head = Head(c.vocab_size, **dtypes)

    def __call__(self, tokens: jax.Array, *args: Any, **kwargs: Any) -> Any:
        """`head(hidden_states(...))`, (B, T, V) in float32; with a cache, a pair of it and that."""
        found = self.hidden_states(tokens, *args, **kwargs)
        if isinstance(found, tuple):
            return self.head(found[0]), found[1]
        return self.head(found)

    def head(self, hidden: jax.Array) -> jax.Array:
        """Logits (..., V) in float32, from hidden states (..., D)."""
        tied = self.config.tie_word_embeddings
        return self.embed_tokens.attend(hidden) if tied else self.lm_head(hidden)

    def hidden_states(
        self,
        tokens: jax.Array,
        segment_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
        cache: Cache | None = None,
    ) -> Any:
        """What the head takes, (B, T, D): after the last norm.

        A token attends to those of its segment that are not after it. What comes out at padding
        means nothing, and is finite.

        Args:
          tokens: (B, T).
          segment_ids: (B, T) integers: 0 is padding, each other value a sequence of its own, in one
            piece. An attention mask of zeros and ones is one sequence a row, padded on either side.
            None: no padding. With a cache, anything but 0 continues the row's sequence.
          positions: (B, T), increasing within a segment; None: from 0 at each segment's first
            token, or from where the cache has got to.
          cache: what came before. More than fits into its slots makes all of the output NaN.

        Returns:
          The hidden states; with a cache, a pair of them and the new cache.
        """
        c = self.config
        batch, length = tokens.shape
        for name, given in (("segment_ids", segment_ids), ("positions", positions)):
            if given is not None and given.shape != tokens.shape:
                raise ValueError(
                    f"{name}: got shape {given.shape}, expected that of tokens, {tokens.shape}."
                )
        windowed = {w for w in c.windows if w is not None}
        mixed = bool(windowed) and None in c.windows
        mask = window_mask = None
        if segment_ids is None and positions is None and cache is None and not mixed:
            positions = jnp.arange(length)[None]
        else:
            if segment_ids is None:
                segment_ids = jnp.ones((batch, length), jnp.int32)
            if cache is not None:
                cache, positions, keys = _extended(cache, segment_ids, positions)
                queries = positions, jnp.ones_like(positions)
            else:
                if positions is None:
                    positions = positions_of(segment_ids)
                queries = keys = positions, segment_ids
            whole, window = (None, c.sliding_window) if mixed else (c.windows[0], None)
            mask = sees(queries, keys, whole)
            if mixed:
                window_mask = sees(queries, keys, window)
        angles = positions[..., None, None] * inverse_frequencies(c)  # (B or 1, T, 1, K / 2)
        shared = (jnp.cos(angles), jnp.sin(angles)), mask, window_mask
        each = np.arange(c.num_hidden_layers), np.array([w is not None for w in c.windows])
        (x, cache), _ = self.layers((self.embed_tokens(tokens), cache), each, shared)
        x = self.norm(x)
        if cache is None:
            return x
        cache = cache._replace(length=cache.length + length)
        return jnp.where(cache.length <= cache.k.shape[2], x, jnp.nan), cache


def _extended(
    cache: Cache, segment_ids: jax.Array, positions: jax.Array | None
) -> tuple[Cache, jax.Array, tuple[jax.Array, jax.Array]]:
    """The cache with the positions of new tokens, these positions, and all keys for `sees`."""
    (batch, length), (rows, slots) = segment_ids.shape, cache.positions.shape
    if batch != rows or length > slots:
        raise ValueError(
            f"cache: got {rows} rows of {slots} slots for {batch} rows of {length} tokens, "
            f"expected as many rows, and slots for all: init_cache(config, {batch}, slots)."
        )
    real = segment_ids > 0
    if positions is None:
        positions = jnp.maximum(cache.next[:, None] + jnp.cumsum(real, axis=1) - 1, 0)
    filled = jax.lax.dynamic_update_slice(
        cache.positions, jnp.where(real, positions, -1).astype(jnp.int32), (0, cache.length)
    )
    last = jnp.max(jnp.where(real, positions + 1, cache.next[:, None]), axis=1)
    cache = cache._replace(positions=filled, next=last.astype(jnp.int32))
    return cache, positions, (filled, (filled >= 0).astype(jnp.int32))


def _policy(remat: Sequence[str] | Callable[..., bool]) -> Callable[..., bool]:
    if callable(remat):
        return remat
    unknown = [name for name in remat if name not in SAVEABLE]
    if isinstance(remat, str) or unknown:
        raise ValueError(
            f"remat: got {remat!r}, expected None, a policy of jax.checkpoint_policies, or a "
            f"sequence of {', '.join(SAVEABLE)}."
        )
    return jax.checkpoint_policies.save_only_these_names(*remat)
