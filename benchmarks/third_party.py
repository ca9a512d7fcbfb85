"""The models of other packages that `real_models` checks: built tiny, with random weights."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import importlib.util
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

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
      quick: whether it is among the tests that are run every time; the others are marked slow.
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


@model("gated linear RNN", "flax-gated-linear-rnn", "flax_gated_linear_rnn", "Linen", quick=False)
def _gated_linear_rnn(key: jax.Array):
    return _gated_rnn(key, recurrent=False)


@model("gated RNN, nn.scan", "flax-gated-linear-rnn", "flax_gated_linear_rnn", "Linen", quick=False)
def _gated_scanned_rnn(key: jax.Array):
    return _gated_rnn(key, recurrent=True)


@model("mixture of experts", "nano-moe-jax", "nano_moe", "Linen", quick=False)
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


@model("Mamba-2", "mamba2-jax", "mamba2_jax", "NNX", quick=False)
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


@model("Mamba-3", "mamba3-jax", "mamba3_jax", "NNX", quick=False)
def _mamba3(key: jax.Array):
    return _mamba3_of(key)


@model("Mamba-3, MIMO", "mamba3-jax", "mamba3_jax", "NNX", quick=False)
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


@model("GraphSAGE, LSTM over layers", "jraphx", "jraphx", "NNX", quick=False)
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
