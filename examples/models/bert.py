"""One encoder for BERT, RoBERTa, DistilBERT and MiniLM, with its heads, in Flax Linen.

The layers are stacked and scanned over, so that params are few leaves with BERT's names in Hugging
Face's files, whichever of them it is:

    embeddings/{word,position,token_type}_embeddings/embedding   (V, D), (P, D), (2, D)
    embeddings/LayerNorm/{scale,bias}                            (D,)
    layer/attention/self/{query,key,value}/{kernel,bias}         (L, D, D), (L, D)
    layer/attention/output/{dense,LayerNorm}/...                 (L, D, D), (L, D)
    layer/intermediate/dense/{kernel,bias}                       (L, D, F), (L, F)
    layer/output/{dense,LayerNorm}/...                           (L, F, D), (L, D)
    pooler/dense/{kernel,bias}                                   (D, D), (D,)

and with a head all of that is under `encoder/`, beside `classifier` or `qa_outputs`.

L layers, D hidden, F of the MLP, V vocabulary, P positions; B batch, T tokens, H heads, K their
size, C classes.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

HEADS = (None, "classifier", "norm_classifier", "qa")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """An architecture and its head, under BERT's names where they have one; see `hf.read_config`.

    Attributes:
      model_type: "bert", "roberta" or "distilbert".
      type_vocab_size: how many token types; 0: there are none, DistilBERT.
      hidden_dropout_prob: after the embeddings, and at the end of each half of a layer.
      classifier_dropout, qa_dropout: before the last linear layer of a head.
      pad_token_id: RoBERTa counts the positions of other tokens alone, from pad_token_id + 1 on.
      head: None, the encoder alone; "classifier", Transformers' for this architecture;
        "norm_classifier", LayerNorm, dropout and a linear layer on the first token; "qa", the
        start and end of an answer.
      num_labels: outputs of a classifier; 1: a regression.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    classifier_dropout: float = 0.1
    qa_dropout: float = 0.0
    pad_token_id: int = 0
    head: str | None = None
    num_labels: int = 2

    def __post_init__(self):
        if self.head not in HEADS:
            raise ValueError(f"head: got {self.head!r}, expected one of {HEADS}.")
        labels = self.num_labels
        if isinstance(labels, bool) or not isinstance(labels, int) or labels < 1:
            raise ValueError(f"num_labels: got {labels!r}, expected a positive integer.")

    @property
    def has_pooler(self) -> bool:
        """Where Transformers' model has one; and under "norm_classifier", which does not use it."""
        if self.model_type == "distilbert":
            return False
        return self.head in (None, "norm_classifier") or (
            self.head == "classifier" and self.model_type == "bert"
        )

    @property
    def first_position(self) -> int:
        return self.pad_token_id + 1 if self.model_type == "roberta" else 0

    @property
    def longest(self) -> int:
        """How many tokens a row can have."""
        return self.max_position_embeddings - self.first_position


# --------------------------------------------------------------------------------------------------
# Names

_EMBEDDINGS = (
    "embeddings.word_embeddings",
    "embeddings.position_embeddings",
    "embeddings.token_type_embeddings",
    "embeddings.LayerNorm",
)
# Of a layer: BERT's name, which is ours too, and DistilBERT's.
_LAYER = {
    "attention.self.query": "attention.q_lin",
    "attention.self.key": "attention.k_lin",
    "attention.self.value": "attention.v_lin",
    "attention.output.dense": "attention.out_lin",
    "attention.output.LayerNorm": "sa_layer_norm",
    "intermediate.dense": "ffn.lin1",
    "output.dense": "ffn.lin2",
    "output.LayerNorm": "output_layer_norm",
}

# For `LoraConfig(roles=ROLES)`, or `roles=ROLES` elsewhere, in place of `trace_roles`: the layers
# are stacked.
ROLES = {
    f"layer/{name.replace('.', '/')}/kernel": "sio"
    for name in _LAYER
    if not name.endswith("LayerNorm")
}


def modules(config: Config) -> dict[str, str]:
    """{path of a module here: its name in Transformers}, of the encoder and of the head."""
    found = {name: name for name in _EMBEDDINGS}
    if not config.type_vocab_size:
        del found["embeddings.token_type_embeddings"]
    for ours, theirs in _LAYER.items():
        if config.model_type == "distilbert":
            found[f"layer.{ours}"] = f"transformer.layer.{{}}.{theirs}"
        else:
            found[f"layer.{ours}"] = f"encoder.layer.{{}}.{ours}"
    if config.has_pooler:
        found["pooler.dense"] = "pooler.dense"
    if config.head is not None:
        found = {f"encoder.{o}": f"{config.model_type}.{t}" for o, t in found.items()}
        found |= {name: name for name in _head_modules(config)}
    return {ours.replace(".", "/"): theirs for ours, theirs in found.items()}


def _head_modules(config: Config) -> tuple[str, ...]:
    if config.head == "qa":
        return ("qa_outputs",)
    if config.head == "norm_classifier":
        return ("classifier.norm", "classifier.out_proj")
    return {
        "bert": ("classifier",),
        "roberta": ("classifier.dense", "classifier.out_proj"),
        "distilbert": ("pre_classifier", "classifier"),
    }[config.model_type]


def names(config: Config) -> dict[str, Any]:
    """Which leaf is which PyTorch module: for `jaxlora.peft`, and for `hf.load` and `hf.save`.

    >>> config = Config(model_type="distilbert", vocab_size=8, hidden_size=4, intermediate_size=8,
    ...     num_hidden_layers=2, num_attention_heads=2, type_vocab_size=0, head="qa")
    >>> names(config)["encoder/layer/attention/self/query/kernel"]["module"]
    'distilbert.transformer.layer.{}.attention.q_lin'
    >>> names(config)["qa_outputs/kernel"]["module"]
    'qa_outputs'
    """
    found: dict[str, Any] = {}
    for path, module in modules(config).items():
        if path.endswith("_embeddings"):
            found[f"{path}/embedding"] = {"module": module, "kind": "embedding"}
            if path.endswith("word_embeddings"):
                found[f"{path}/embedding"]["tied"] = []
            continue
        if path.endswith(("LayerNorm", "norm")):
            found[f"{path}/scale"] = {"module": module, "kind": "vector"}
        else:
            roles = "sio" if "{}" in module else "io"
            found[f"{path}/kernel"] = {"module": module, "roles": roles}
        found[f"{path}/bias"] = {"module": module, "kind": "bias"}
    return found


# --------------------------------------------------------------------------------------------------
# The encoder

_INIT = nn.initializers.normal(0.02)


class LayerNorm(nn.LayerNorm):
    """(x - mean) / sqrt(var + eps) * scale + bias, in float32 whatever the dtype of x."""

    dtype: Any = jnp.float32
    use_fast_variance: bool = False


def positions_of(config: Config, tokens: jax.Array) -> jax.Array:
    """The row of the table for each token, (1, T), or (B, T) for RoBERTa.

    RoBERTa's padding has the row of pad_token_id, and does not count.

    >>> config = Config(model_type="roberta", vocab_size=8, hidden_size=4, intermediate_size=8,
    ...     num_hidden_layers=2, num_attention_heads=2, pad_token_id=1)
    >>> positions_of(config, jnp.array([[1, 1, 0, 5, 2]])).tolist()
    [[1, 1, 2, 3, 4]]
    """
    if config.model_type != "roberta":
        return jnp.arange(tokens.shape[1])[None]
    real = (tokens != config.pad_token_id).astype(jnp.int32)
    return jnp.cumsum(real, axis=1) * real + config.pad_token_id


class Embeddings(nn.Module):
    """Word, position and token type, summed; LayerNorm; dropout."""

    config: Config
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(
        self, tokens: jax.Array, token_types: jax.Array | None, deterministic: bool
    ) -> jax.Array:
        c = self.config

        def look_up(name: str, size: int, rows: jax.Array) -> jax.Array:
            table = nn.Embed(
                size, c.hidden_size, embedding_init=_INIT, param_dtype=self.param_dtype, name=name
            )
            return table(rows)

        x = look_up("word_embeddings", c.vocab_size, tokens)
        rows = positions_of(c, tokens)
        x = x + look_up("position_embeddings", c.max_position_embeddings, rows)
        if c.type_vocab_size:
            types = jnp.zeros_like(tokens) if token_types is None else token_types
            x = x + look_up("token_type_embeddings", c.type_vocab_size, types)
        x = LayerNorm(c.layer_norm_eps, param_dtype=self.param_dtype, name="LayerNorm")(x)
        return nn.Dropout(c.hidden_dropout_prob)(x.astype(self.dtype), deterministic)


class SelfAttention(nn.Module):
    """softmax(q k^T / sqrt(K)) v, each token with all that are not padding."""

    config: Config
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None, deterministic: bool) -> jax.Array:
        c = self.config
        dense = partial(
            nn.Dense,
            c.hidden_size,
            kernel_init=_INIT,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
        )
        size = c.hidden_size // c.num_attention_heads
        q, k, v = (
            dense(name=name)(x).reshape(*x.shape[:-1], c.num_attention_heads, size)
            for name in ("query", "key", "value")
        )
        if deterministic or not c.attention_probs_dropout_prob:
            out = jax.nn.dot_product_attention(q, k, v, mask=mask)
        else:
            drop = nn.Dropout(c.attention_probs_dropout_prob, deterministic=False)
            out = _attention_with_dropout(q, k, v, mask, drop)
        return out.reshape(x.shape)


def _attention_with_dropout(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None, drop: nn.Module
) -> jax.Array:
    """As jax.nn.dot_product_attention, which has no dropout of the probabilities."""
    scores = jnp.einsum("bthk,bshk->bhts", q, k, preferred_element_type=jnp.float32)
    scores = scores * q.shape[-1] ** -0.5
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    probabilities = drop(jax.nn.softmax(scores, axis=-1).astype(v.dtype))
    return jnp.einsum("bhts,bshk->bthk", probabilities, v)


class Output(nn.Module):
    """LayerNorm(residual + dropout(dense(x)))."""

    config: Config
    dropout: float
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, residual: jax.Array, deterministic: bool) -> jax.Array:
        c = self.config
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = nn.Dense(c.hidden_size, kernel_init=_INIT, name="dense", **dtypes)(x)
        x = nn.Dropout(self.dropout)(x, deterministic) + residual
        norm = LayerNorm(c.layer_norm_eps, param_dtype=self.param_dtype, name="LayerNorm")
        return norm(x).astype(self.dtype)


class Attention(nn.Module):
    """Self-attention and its output, added to x."""

    config: Config
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None, deterministic: bool) -> jax.Array:
        c = self.config
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        y = SelfAttention(c, name="self", **dtypes)(x, mask, deterministic)
        dropout = 0.0 if c.model_type == "distilbert" else c.hidden_dropout_prob
        return Output(c, dropout, name="output", **dtypes)(y, x, deterministic)


class Intermediate(nn.Module):
    """gelu(dense(x)), with the error function."""

    config: Config
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        size = self.config.intermediate_size
        x = nn.Dense(size, kernel_init=_INIT, name="dense", **dtypes)(x)
        return jax.nn.gelu(x, approximate=False)


class Layer(nn.Module):
    """One layer, as the body of a scan over all."""

    config: Config
    deterministic: bool
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None) -> tuple[jax.Array, None]:
        c = self.config
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = Attention(c, name="attention", **dtypes)(x, mask, self.deterministic)
        y = Intermediate(c, name="intermediate", **dtypes)(x)
        output = Output(c, c.hidden_dropout_prob, name="output", **dtypes)
        return output(y, x, self.deterministic), None


class Pooler(nn.Module):
    """tanh(dense(the first token))."""

    config: Config
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, hidden: jax.Array) -> jax.Array:
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        dense = nn.Dense(self.config.hidden_size, kernel_init=_INIT, name="dense", **dtypes)
        return jnp.tanh(dense(hidden[:, 0]))


class Bert(nn.Module):
    """The encoder: tokens to hidden states, and the pooled first one.

    Attributes:
      config: the architecture.
      dtype: of the arithmetic, float32 or bfloat16. LayerNorm and softmax are float32 in any case.
      param_dtype: of params that `init` makes; `apply` takes them in any.
      remat: keep each layer's input alone for the backward pass, and compute the rest again.

    >>> config = Config(model_type="bert", vocab_size=8, hidden_size=4, intermediate_size=8,
    ...     num_hidden_layers=2, num_attention_heads=2)
    >>> model, tokens = Bert(config), jnp.array([[1, 2, 3]])
    >>> variables = jax.eval_shape(model.init, jax.random.key(0), tokens)
    >>> hidden, pooled = jax.eval_shape(model.apply, variables, tokens)
    >>> hidden.shape, pooled.shape
    ((1, 3, 4), (1, 4))
    """

    config: Config
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        mask: jax.Array | None = None,
        token_types: jax.Array | None = None,
        *,
        deterministic: bool = True,
    ) -> tuple[jax.Array, jax.Array | None]:
        """Hidden states and the pooled first one.

        What comes out at padding means nothing, and is finite.

        Args:
          tokens: (B, T).
          mask: (B, T), 0 at padding, 1 elsewhere; None: no padding. Positions do not depend on it:
            padding on the left moves BERT's, as in Transformers; RoBERTa's are those of `tokens`
            that are not pad_token_id.
          token_types: (B, T), of each token's sentence; None: zeros.
          deterministic: without dropout; else `apply(..., rngs={"dropout": key})`.

        Returns:
          (B, T, D), and (B, D), or None where there is no pooler.
        """
        c = self.config
        _check(c, tokens, mask, token_types)
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = Embeddings(c, name="embeddings", **dtypes)(tokens, token_types, deterministic)
        layer: Any = nn.remat(Layer, prevent_cse=False) if self.remat else Layer
        scanned = nn.scan(
            layer,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=nn.broadcast,
            length=c.num_hidden_layers,
            check_constancy_invariants=False,  # traces the layer once, not twice
        )
        seen = None if mask is None else (mask != 0)[:, None, None]
        x, _ = scanned(c, deterministic, name="layer", **dtypes)(x, seen)
        return x, Pooler(c, name="pooler", **dtypes)(x) if c.has_pooler else None


def _check(
    c: Config, tokens: jax.Array, mask: jax.Array | None, token_types: jax.Array | None
) -> None:
    for name, given in (("mask", mask), ("token_types", token_types)):
        if given is not None and given.shape != tokens.shape:
            raise ValueError(
                f"{name}: got shape {given.shape}, expected that of tokens, {tokens.shape}."
            )
    if token_types is not None and not c.type_vocab_size:
        raise ValueError(f"token_types: a {c.model_type} has none, expected None.")
    if tokens.shape[1] > c.longest:
        raise ValueError(
            f"tokens: got rows of {tokens.shape[1]}, expected at most {c.longest}: there are no "
            "more positions."
        )


# --------------------------------------------------------------------------------------------------
# Heads


class NormHead(nn.Module):
    """out_proj(dropout(norm(x))), the head of a network that is trained from scratch."""

    config: Config
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool) -> jax.Array:
        c = self.config
        x = LayerNorm(1e-5, param_dtype=self.param_dtype, name="norm")(x).astype(self.dtype)
        x = nn.Dropout(c.classifier_dropout)(x, deterministic)
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        return nn.Dense(c.num_labels, kernel_init=_INIT, name="out_proj", **dtypes)(x)


class RobertaHead(nn.Module):
    """out_proj(dropout(tanh(dense(dropout(x)))))."""

    config: Config
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool) -> jax.Array:
        c = self.config
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        dense: Any = partial(nn.Dense, kernel_init=_INIT, **dtypes)
        x = nn.Dropout(c.classifier_dropout)(x, deterministic)
        x = jnp.tanh(dense(c.hidden_size, name="dense")(x))
        x = nn.Dropout(c.classifier_dropout)(x, deterministic)
        return dense(c.num_labels, name="out_proj")(x)


class Classifier(nn.Module):
    """The encoder with "classifier" or "norm_classifier": tokens to logits (B, C) in float32.

    With num_labels 1 they are a regression's values. Attributes and arguments are those of `Bert`.
    """

    config: Config
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        mask: jax.Array | None = None,
        token_types: jax.Array | None = None,
        *,
        deterministic: bool = True,
    ) -> jax.Array:
        c = self.config
        _check_head(c, ("classifier", "norm_classifier"))
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        encoder = Bert(c, remat=self.remat, name="encoder", **dtypes)
        hidden, pooled = encoder(tokens, mask, token_types, deterministic=deterministic)
        x = hidden[:, 0]
        if c.head == "norm_classifier":
            logits = NormHead(c, name="classifier", **dtypes)(x, deterministic)
        elif c.model_type == "roberta":
            logits = RobertaHead(c, name="classifier", **dtypes)(x, deterministic)
        else:
            dense: Any = partial(nn.Dense, kernel_init=_INIT, **dtypes)
            if c.model_type == "distilbert":
                pooled = nn.relu(dense(c.hidden_size, name="pre_classifier")(x))
            assert pooled is not None
            pooled = nn.Dropout(c.classifier_dropout)(pooled, deterministic)
            logits = dense(c.num_labels, name="classifier")(pooled)
        return logits.astype(jnp.float32)


class QuestionAnswering(nn.Module):
    """The encoder with "qa": tokens to logits of an answer's start and end, (B, T) each, float32.

    At padding they are the least float32. Attributes and arguments are those of `Bert`.
    """

    config: Config
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        mask: jax.Array | None = None,
        token_types: jax.Array | None = None,
        *,
        deterministic: bool = True,
    ) -> tuple[jax.Array, jax.Array]:
        c = self.config
        _check_head(c, ("qa",))
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        encoder = Bert(c, remat=self.remat, name="encoder", **dtypes)
        x, _ = encoder(tokens, mask, token_types, deterministic=deterministic)
        x = nn.Dropout(c.qa_dropout)(x, deterministic)
        logits = nn.Dense(2, kernel_init=_INIT, name="qa_outputs", **dtypes)(x).astype(jnp.float32)
        if mask is not None:
            logits = jnp.where((mask != 0)[..., None], logits, jnp.finfo(jnp.float32).min)
        return logits[..., 0], logits[..., 1]


def _check_head(config: Config, heads: tuple[str, ...]) -> None:
    if config.head not in heads:
        raise ValueError(
            f"config.head: got {config.head!r}, expected {' or '.join(map(repr, heads))}: "
            f"hf.load(..., head={heads[0]!r})."
        )


def model_of(config: Config, **options: Any) -> nn.Module:
    """`Bert`, `Classifier` or `QuestionAnswering`, by the config's head."""
    kinds: dict[str | None, Any] = {None: Bert, "qa": QuestionAnswering}
    return kinds.get(config.head, Classifier)(config, **options)
