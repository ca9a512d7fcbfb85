"""`python -m jaxlora`: what PEFT trained, merged into files, is PEFT's model; there and back."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import peft_models
import pytest
from helpers import assert_same, randomized
from peft_models import ROOT, model
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import jaxlora
from jaxlora import LoraConfig, checkpoint, peft
from jaxlora.cli import _shards, main

TIED = {"llama_tied": {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True}}


def base_tensors(name: str) -> dict[str, np.ndarray]:
    found = peft_models.load_base(name)
    return {k: x for k, x in found.items() if not k.startswith("=")}


def write_base(directory: pathlib.Path, tensors: dict[str, np.ndarray], shards: int = 1) -> None:
    """As Hugging Face has it: one file, or several with an index."""
    directory.mkdir(exist_ok=True)
    keys = [*tensors]
    if shards == 1:
        save_file(tensors, directory / "model.safetensors", {"format": "pt"})
        return
    weight_map = {}
    for k in range(shards):
        file = f"model-{k + 1:05}-of-{shards:05}.safetensors"
        mine = keys[k::shards]
        weight_map |= dict.fromkeys(mine, file)
        save_file({key: tensors[key] for key in mine}, directory / file, {"format": "pt"})
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def run(capsys, *arguments: Any, code: int = 0) -> str:
    got = main([str(x) for x in arguments])
    out, err = capsys.readouterr()
    assert got == code, err
    assert not (code and out)
    return err if code else out


# --------------------------------------------------------------------------------------------------
# merge


@pytest.mark.parametrize("name", peft_models.MODELS)
def test_merged_is_what_peft_trained(name, tmp_path, capsys):
    """The logits of the merged files are PEFT's to 1e-5."""
    tensors = base_tensors(name)
    write_base(tmp_path / "base", tensors, shards=2)
    config = TIED.get(name, {"tie_word_embeddings": False})
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    said = run(capsys, "merge", tmp_path / "base", ROOT / name, tmp_path / "out", "--quiet")
    out = tmp_path / "out"
    index = json.loads((out / "model.safetensors.index.json").read_text())
    merged: dict[str, np.ndarray] = {}
    for file in sorted({*index["weight_map"].values()}):
        merged |= load_file(out / file)
    assert merged.keys() == tensors.keys() == index["weight_map"].keys()
    changed = {k for k in tensors if not np.array_equal(merged[k], tensors[k])}
    assert f"{len(changed)} of {len(tensors)} tensors merged" in said
    m = model(name)
    params, _, forward = peft_models.MODELS[name](merged)
    got = jax.jit(forward)(params, m.tokens)
    bound = 1e-5 * max(1, np.abs(m.expected).max())
    np.testing.assert_allclose(got, m.expected, rtol=0, atol=bound)


def formula(directory: pathlib.Path, module: str) -> np.ndarray:
    """scale B A of a linear layer, in float64, from the files."""
    config = json.loads((directory / "adapter_config.json").read_text())
    tensors = load_file(directory / "adapter_model.safetensors")
    a, b = (tensors[f"base_model.model.{module}.lora_{x}.weight"].astype(np.float64) for x in "AB")
    return config["lora_alpha"] / config["r"] * b @ a


def test_one_file(tmp_path, capsys):
    """In bfloat16: rounded once. What is no target, of any dtype, is copied bit for bit."""
    rng = np.random.default_rng(0)
    tensors = {k: x.astype(ml_dtypes.bfloat16) for k, x in base_tensors("tokens").items()}
    tensors["steps"] = np.arange(3)
    tensors["none"] = np.zeros((0, 4), np.float32)
    tensors["flags"] = rng.random(5) < 0.5
    save_file(tensors, tmp_path / "base.safetensors", {"format": "pt", "by": "me"})
    run(capsys, "merge", tmp_path / "base.safetensors", ROOT / "tokens", tmp_path / "o.safetensors")
    merged = load_file(tmp_path / "o.safetensors")
    with safe_open(tmp_path / "o.safetensors", "np") as f:
        assert f.metadata() == {"format": "pt", "by": "me"}
    for name in ("up", "down"):
        want = tensors[f"{name}.weight"].astype(np.float64) + formula(ROOT / "tokens", name)
        want = want.astype(np.float32).astype(ml_dtypes.bfloat16)
        np.testing.assert_array_equal(merged.pop(f"{name}.weight"), want)
    delta = load_file(ROOT / "tokens" / "adapter_model.safetensors")
    delta = delta["base_model.model.emb.token_adapter.trainable_tokens_delta"]
    table = tensors["emb.weight"].copy()
    table[[5, 1]] = delta.astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(merged.pop("emb.weight"), table)
    for key, x in merged.items():
        assert x.dtype == tensors[key].dtype
        np.testing.assert_array_equal(x, tensors[key])


def test_configuration_and_tokenizer_come_along(tmp_path, capsys):
    write_base(tmp_path / "base", base_tensors("tokens"))
    kept, left = ["config.json", "tokenizer.model", "chat.jinja"], ["pytorch_model.bin", "x.gguf"]
    for name in kept + left:
        (tmp_path / "base" / name).write_text("{}")
    run(capsys, "merge", tmp_path / "base", ROOT / "tokens", tmp_path / "out")
    found = {file.name for file in (tmp_path / "out").iterdir()}
    assert found == {"model.safetensors", *kept}
    assert {*os.listdir(tmp_path)} == {"base", "out"}


@pytest.mark.parametrize("shards", [1, 2])
def test_a_head_that_the_base_lacks_is_added(shards, tmp_path, capsys):
    """And the base is that of a model without `bert.` in front of its names."""
    whole = base_tensors("bert")
    base = {k.removeprefix("bert."): x for k, x in whole.items() if not k.startswith("classifier")}
    write_base(tmp_path / "base", base, shards)
    said = run(capsys, "merge", tmp_path / "base", ROOT / "bert", tmp_path / "out", "--quiet")
    assert "classifier.bias, classifier.weight: added" in said
    merged: dict[str, np.ndarray] = {}
    for file in (tmp_path / "out").glob("*.safetensors"):
        merged |= load_file(file)
    assert merged.keys() == {*base, "classifier.weight", "classifier.bias"}
    if shards > 1:
        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
        assert index["weight_map"].keys() == merged.keys()
        assert index["metadata"]["total_size"] == sum(x.nbytes for x in merged.values())
    named = {k if k.startswith("classifier") else f"bert.{k}": x for k, x in merged.items()}
    m = model("bert")
    params, _, forward = peft_models.MODELS["bert"](named)
    np.testing.assert_allclose(forward(params, m.tokens), m.expected, rtol=0, atol=1e-5)


def test_a_base_with_a_prefix(tmp_path, capsys):
    base = {f"language_model.{k}": x for k, x in base_tensors("tokens").items()}
    write_base(tmp_path / "base", base)
    run(capsys, "merge", tmp_path / "base", ROOT / "tokens", tmp_path / "out", "--quiet")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    change = merged["language_model.up.weight"] - base["language_model.up.weight"]
    np.testing.assert_allclose(change, formula(ROOT / "tokens", "up"), atol=1e-6)


LLAMA_CHANGED = ("q_proj", "v_proj", "gate_proj", "down_proj")


def llama_checkpoint(directory: pathlib.Path) -> tuple[Any, Any]:
    """An adapter of jaxlora on the small Llama."""
    m = model("llama")
    lora = peft.load(ROOT / "llama", m.params, m.names)
    checkpoint.save(directory / "adapter", lora)
    (directory / "names.json").write_text(json.dumps(m.names))
    return m, lora


def test_a_checkpoint_merges_into_pytorchs_files(tmp_path, capsys):
    m, _ = llama_checkpoint(tmp_path)
    write_base(tmp_path / "base", base_tensors("llama"), shards=2)
    arguments = [tmp_path / "base", tmp_path / "adapter", tmp_path / "out", "--quiet"]
    run(capsys, "merge", *arguments, "--names", tmp_path / "names.json")
    merged: dict[str, np.ndarray] = {}
    for file in (tmp_path / "out").glob("*.safetensors"):
        merged |= load_file(file)
    params, _, forward = peft_models.MODELS["llama"](merged)
    np.testing.assert_allclose(forward(params, m.tokens), m.expected, rtol=0, atol=1e-5)


def test_another_base_is_refused(tmp_path, capsys):
    """By its values: here, that of PiSSA, which the adapter was trained on, is a moved one."""
    m = model("pissa")
    lora = peft.load(ROOT / "pissa", m.params, m.names)
    checkpoint.save(tmp_path / "adapter", lora)
    (tmp_path / "names.json").write_text(json.dumps(m.names))
    write_base(tmp_path / "base", base_tensors("pissa"))
    arguments = ["merge", tmp_path / "base", tmp_path / "adapter", tmp_path / "out", "--quiet"]
    arguments += ["--names", tmp_path / "names.json"]
    err = run(capsys, *arguments, code=1)
    assert "It has other values, or none, at:" in err
    assert "up/kernel" in err
    assert "jaxlora.rebase" in err
    plain = jaxlora.rebase(lora, peft_models.initial("pissa", m), m.params)
    checkpoint.save(tmp_path / "adapter", plain)
    run(capsys, *arguments)
    merged = load_file(tmp_path / "out" / "model.safetensors")
    params, _, forward = peft_models.MODELS["pissa"](merged)
    np.testing.assert_allclose(forward(params, m.tokens), m.expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("separator", [".", "/"])
def test_a_base_whose_keys_are_the_paths(separator, tmp_path, capsys):
    m, lora = llama_checkpoint(tmp_path)
    pairs = jaxlora._paths.flatten_with_paths(m.params)[0]
    base = {path.replace("/", separator): np.array(x) for path, x in pairs}
    save_file(base, tmp_path / "base.safetensors")
    arguments = [tmp_path / "adapter", tmp_path / "out.safetensors", "--quiet"]
    run(capsys, "merge", tmp_path / "base.safetensors", *arguments)
    merged = load_file(tmp_path / "out.safetensors")
    want = dict(jaxlora._paths.flatten_with_paths(jaxlora.merge(lora))[0])
    assert merged.keys() == base.keys()
    for key, x in merged.items():
        np.testing.assert_array_equal(x, want[key.replace(separator, "/")])
    base[min(base)] += 1
    save_file(base, tmp_path / "other.safetensors")
    arguments[1] = tmp_path / "more.safetensors"
    err = run(capsys, "merge", tmp_path / "other.safetensors", *arguments, code=1)
    assert "not this adapter's base" in err
    run(capsys, "merge", tmp_path / "other.safetensors", *arguments, "--allow-base-mismatch")


def test_a_model_larger_than_what_is_used_of_memory(tmp_path):
    """The peak grows by a few tensors, not by the model: 24 of 12 MB, half of them adapted."""
    size, count = 1774, 24
    base = tmp_path / "base"
    base.mkdir()
    names = [f"layers.{k}.proj.weight" for k in range(count)]
    for part in range(2):  # a file of zeros has no blocks on the disk
        keys = names[part::2]
        nbytes = 4 * size * size
        header = {
            key: {
                "dtype": "F32",
                "shape": [size, size],
                "data_offsets": [k * nbytes, (k + 1) * nbytes],
            }
            for k, key in enumerate(keys)
        }
        text = json.dumps(header).encode()
        with open(base / f"m{part}.safetensors", "wb") as f:
            f.write(len(text).to_bytes(8, "little") + text)
            f.truncate(8 + len(text) + len(keys) * nbytes)
    weight_map = {key: f"m{k % 2}.safetensors" for k, key in enumerate(names)}
    (base / "m.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    params = {f"layers_{k}": {"kernel": jnp.ones((size, size))} for k in range(0, count, 2)}
    lora = jax.eval_shape(
        lambda: jaxlora.init(jax.random.key(0), params, LoraConfig(rank=2, targets=["kernel"]))
    )
    lora = jax.tree.map(lambda x: np.broadcast_to(np.ones((), x.dtype), x.shape), lora)
    pattern = {"layers_(\\d+)/kernel": "layers.{1}.proj"}
    peft.save(tmp_path / "adapter", lora, pattern)
    code = (
        "import resource, sys\nfrom jaxlora.cli import main\nimport jax.numpy as jnp\n"
        "jnp.ones((8, 8)) @ jnp.ones((8, 8))\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024\n"
        "before = peak()\nassert main(sys.argv[1:]) == 0\nprint(peak() - before)"
    )
    arguments = ["merge", str(base), str(tmp_path / "adapter"), str(tmp_path / "out"), "--quiet"]
    found = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True
    )
    grown = float(found.stdout.split()[-1])
    assert grown < 8 * 12, f"{grown:.0f} MB for a model of 288"
    merged = load_file(tmp_path / "out" / "m0.safetensors")
    np.testing.assert_allclose(merged["layers.0.proj.weight"], 2, rtol=1e-6)
    assert not load_file(tmp_path / "out" / "m1.safetensors")["layers.1.proj.weight"].any()


def write_adapter(
    directory: pathlib.Path, tensors: dict[str, np.ndarray], **fields: Any
) -> pathlib.Path:
    directory.mkdir(exist_ok=True)
    named = {f"base_model.model.{key}": x for key, x in tensors.items()}
    save_file(named, directory / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, **fields}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def decoder(tied: bool = False, **config: Any) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Tensors of a decoder, and its config.json."""
    tensors = {
        "model.embed_tokens.weight": normal(12, 6),
        "model.pos.weight": normal(5, 6, seed=1),
        "model.layers.0.q_proj.weight": normal(6, 6, seed=2),
        "lm_head.weight": normal(12, 6, seed=3),
    }
    if tied:
        del tensors["lm_head.weight"]
    return tensors, {"architectures": ["LlamaForCausalLM"], "vocab_size": 12, **config}


def lookup(module: str, rows: int) -> dict[str, np.ndarray]:
    return {
        f"{module}.lora_embedding_A": normal(2, rows, seed=4),
        f"{module}.lora_embedding_B": normal(6, 2, seed=5),
    }


def linear(module: str, outputs: int) -> dict[str, np.ndarray]:
    return {
        f"{module}.lora_A.weight": normal(2, 6, seed=6),
        f"{module}.lora_B.weight": normal(outputs, 2, seed=7),
    }


@pytest.mark.parametrize("prefix", ["", "language_model."])
def test_heads_and_other_tables(prefix, tmp_path, capsys):
    """An own head, with PEFT's copy of it beside the adapter; a table of positions is no head."""
    tensors, config = decoder()
    write_base(tmp_path / "base", {prefix + key: x for key, x in tensors.items()})
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    copy = {"lm_head.base_layer.weight": tensors["lm_head.weight"]}
    changes = linear("lm_head", 12) | lookup("model.pos", 5) | copy
    adapter = write_adapter(tmp_path / "adapter", changes, target_modules=["lm_head", "pos"])
    run(capsys, "merge", tmp_path / "base", adapter, tmp_path / "out", "--quiet")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    a, b = changes["lm_head.lora_A.weight"], changes["lm_head.lora_B.weight"]
    change = merged[f"{prefix}lm_head.weight"] - tensors["lm_head.weight"]
    np.testing.assert_allclose(change, b @ a, atol=1e-5)
    a, b = changes["model.pos.lora_embedding_A"], changes["model.pos.lora_embedding_B"]
    change = merged[f"{prefix}model.pos.weight"] - tensors["model.pos.weight"]
    np.testing.assert_allclose(change, (b @ a).T, atol=1e-5)
    changes["lm_head.base_layer.weight"] = copy["lm_head.base_layer.weight"] + 1
    write_adapter(tmp_path / "adapter", changes, target_modules=["lm_head", "pos"])
    assert "got another table" in refused(capsys, tmp_path / "base", adapter)


@pytest.mark.parametrize("how", ["lora", "full", "head", "no config", "flag alone"])
def test_of_a_tied_table_one_use_alone_is_refused(how, tmp_path, capsys):
    tensors, config = decoder(tied=True)
    write_base(tmp_path / "base", tensors)
    if how != "no config":
        (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    changes, fields = lookup("model.embed_tokens", 12), {"target_modules": ["embed_tokens"]}
    if how == "full":
        changes = {"model.embed_tokens.weight": normal(12, 6, seed=8)}
        fields = {"target_modules": [], "modules_to_save": ["embed_tokens"]}
    if how == "head":
        changes, fields = linear("lm_head", 12), {"target_modules": ["lm_head"]}
    if how == "flag alone":  # PEFT leaves it as it was asked for, where it has tied nothing
        fields["ensure_weight_tying"] = True
    adapter = write_adapter(tmp_path / "adapter", changes, **fields)
    err = refused(capsys, tmp_path / "base", adapter)
    if how == "head":
        assert "an adapter of the head alone has no merged form" in err
    else:
        assert "model.embed_tokens or lm_head is trained" in err
        assert "'ensure_weight_tying'" in err
        arguments = [tmp_path / "base", adapter, tmp_path / "out", "--quiet"]
        run(capsys, "merge", *arguments, "--allow", "ensure_weight_tying")
        merged = load_file(tmp_path / "out" / "model.safetensors")
        assert not np.array_equal(
            merged["model.embed_tokens.weight"], tensors["model.embed_tokens.weight"]
        )


@pytest.mark.parametrize("said", [True, False])
def test_a_tied_head_that_is_on_the_disk(said, tmp_path, capsys):
    """As config.json says, or as both are the same."""
    tensors, config = decoder(**({"tie_word_embeddings": True} if said else {}))
    if not said:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    write_base(tmp_path / "base", tensors)
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    adapter = write_adapter(tmp_path / "adapter", linear("lm_head", 12), target_modules=["lm_head"])
    assert "the base has model.embed_tokens.weight too" in refused(
        capsys, tmp_path / "base", adapter
    )
    write_adapter(adapter, linear("model.layers.0.q_proj", 6), target_modules=["q_proj"])
    run(capsys, "merge", tmp_path / "base", adapter, tmp_path / "out", "--quiet")


def test_square_weights_of_gpt2(tmp_path, capsys):
    """PEFT's flag is that of the module that came last, a head here; the base's biases tell."""
    base = {
        "h.0.attn.c_proj.weight": normal(4, 4),
        "h.0.attn.c_proj.bias": normal(4),
        "h.0.mlp.c_proj.weight": normal(8, 4),
        "h.0.mlp.c_proj.bias": normal(4),
        "score.weight": normal(3, 4),
    }
    write_base(tmp_path / "base", base)
    changes = {
        "h.0.attn.c_proj.lora_A.weight": normal(2, 4, seed=1),
        "h.0.attn.c_proj.lora_B.weight": normal(4, 2, seed=2),
        "score.lora_A.weight": normal(2, 4, seed=3),
        "score.lora_B.weight": normal(3, 2, seed=4),
    }
    fields = {"target_modules": ["attn.c_proj", "score"], "fan_in_fan_out": False}
    adapter = write_adapter(tmp_path / "adapter", changes, **fields)
    run(capsys, "merge", tmp_path / "base", adapter, tmp_path / "out", "--quiet")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    for name, transposed in (("h.0.attn.c_proj", True), ("score", False)):
        want = formula(adapter, name)
        change = merged[f"{name}.weight"] - base[f"{name}.weight"]
        np.testing.assert_allclose(change, want.T if transposed else want, atol=1e-5)
    del base["h.0.mlp.c_proj.weight"]
    write_base(tmp_path / "less", base)
    assert "c_proj is square" in refused(capsys, tmp_path / "less", adapter)


def test_numbers_of_8_bits_are_copied_and_not_computed_with(tmp_path, capsys):
    base = {"q.weight": normal(6, 6).astype(ml_dtypes.float8_e4m3fn), "r.weight": normal(6, 6)}
    write_base(tmp_path / "base", base)
    adapter = write_adapter(tmp_path / "adapter", linear("q", 6), target_modules=["q"])
    assert "q.weight: got dtype F8_E4M3" in refused(capsys, tmp_path / "base", adapter)
    write_adapter(adapter, linear("r", 6), target_modules=["r"])
    run(capsys, "merge", tmp_path / "base", adapter, tmp_path / "out", "--quiet")
    data = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert base["q.weight"].tobytes() in data


def test_subfolders_come_along_and_other_weights_are_named(tmp_path, capsys):
    write_base(tmp_path / "base", base_tensors("tokens"))
    for name in ("1_Pooling/config.json", ".cache/x", "onnx/model.onnx", "pytorch_model.bin"):
        (tmp_path / "base" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "base" / name).write_text("{}")
    (tmp_path / "base" / "model.safetensors").chmod(0o600)
    out = tmp_path / "base" / "merged"  # within the base
    said = run(capsys, "merge", tmp_path / "base", ROOT / "tokens", out, "--quiet")
    found = {str(x.relative_to(out)) for x in out.rglob("*") if x.is_file()}
    assert found == {"model.safetensors", "1_Pooling/config.json"}
    assert "not copied, other weights: pytorch_model.bin, onnx/model.onnx" in said
    assert (out / "model.safetensors").stat().st_mode & 0o777 == 0o600


def test_a_checkpoint_with_leaves_in_full(tmp_path, capsys):
    """What lies frozen beside them in their modules is the base's; every leaf is compared."""
    params = {
        "norm": {"scale": normal(6), "bias": normal(6, seed=1)},
        "q": {"kernel": normal(6, 6, seed=2)},
        "other": {"kernel": normal(6, 6, seed=3)},
    }
    config = LoraConfig(rank=2, targets=["q"], train=["norm/scale"])
    lora = randomized(jaxlora.init(jax.random.key(0), params, config))
    checkpoint.save(tmp_path / "adapter", lora)
    names = {
        "norm/scale": {"module": "norm", "kind": "vector"},
        "norm/bias": {"module": "norm", "kind": "vector", "parameter": "bias"},
        "(q|other)/kernel": "{1}",
    }
    (tmp_path / "names.json").write_text(json.dumps(names))
    base = {
        "norm.weight": params["norm"]["scale"],
        "norm.bias": params["norm"]["bias"],
        "q.weight": params["q"]["kernel"].T.copy(),
        "other.weight": params["other"]["kernel"].T.copy(),
    }
    save_file(base, tmp_path / "base.safetensors")
    more = ["--names", tmp_path / "names.json"]
    err = run(capsys, "convert", tmp_path / "adapter", tmp_path / "peft", *more, code=1)
    assert "norm/bias: is frozen" in err
    arguments = [tmp_path / "adapter", tmp_path / "out.safetensors", "--quiet", *more]
    run(capsys, "merge", tmp_path / "base.safetensors", *arguments)
    merged = load_file(tmp_path / "out.safetensors")
    want = jaxlora.merge(lora)
    np.testing.assert_array_equal(merged["norm.weight"], want["norm"]["scale"])
    np.testing.assert_array_equal(merged["norm.bias"], params["norm"]["bias"])
    np.testing.assert_array_equal(merged["q.weight"], np.asarray(want["q"]["kernel"]).T)
    base["other.weight"][0, 0] += 1
    save_file(base, tmp_path / "other.safetensors")
    arguments[1] = tmp_path / "none.safetensors"
    err = run(capsys, "merge", tmp_path / "other.safetensors", *arguments, code=1)
    assert "other/kernel" in err
    run(capsys, "merge", tmp_path / "other.safetensors", *arguments, "--allow-base-mismatch")


# --------------------------------------------------------------------------------------------------
# What cannot be merged


@pytest.fixture
def bases(tmp_path):
    write_base(tmp_path / "base", base_tensors("tokens"), shards=2)
    return tmp_path / "base"


def refused(capsys, base: pathlib.Path, adapter: pathlib.Path = ROOT / "tokens", *more: Any) -> str:
    """The message; and that nothing was left behind."""
    out = base.parent / "never"
    before = {*os.listdir(base.parent)}
    err = run(capsys, "merge", base, adapter, out, "--quiet", *more, code=1)
    assert {*os.listdir(base.parent)} == before
    assert err.startswith("jaxlora: ")
    return err


def test_bases_that_cannot_be_read(bases, capsys):
    assert "nowhere: not found" in refused(capsys, bases.parent / "nowhere")
    index = bases / "model.safetensors.index.json"
    good = index.read_text()
    for bad, said in [
        ("{", "expected an index"),
        ('{"weight_map": {"a": "../x.safetensors"}}', "same directory"),
        (good.replace("emb.weight", "emb.other"), "the same tensors in both"),
        (good.replace("model-00002", "model-00003"), "model-00003-of-00002.safetensors: not found"),
    ]:
        index.write_text(bad)
        assert said in refused(capsys, bases)
    index.write_text(good)
    shard = bases / "model-00001-of-00002.safetensors"
    data = shard.read_bytes()
    for damaged in (data[:-1], data[:20], b"", (2**60).to_bytes(8, "little") + data[8:]):
        shard.write_bytes(damaged)
        assert "expected a whole safetensors file" in refused(capsys, bases)
    shard.unlink()
    index.unlink()
    (bases / "model-00002-of-00002.safetensors").unlink()
    (bases / "pytorch_model.bin").write_text("")
    assert "expected one safetensors file" in refused(capsys, bases)


def test_another_model_is_refused(bases, capsys):
    assert "is no tensor of the base" in refused(capsys, bases, ROOT / "llama")
    tensors = base_tensors("tokens")
    tensors["up.weight"] = tensors["up.weight"][:, :-1].copy()
    write_base(bases.parent / "other", tensors)
    assert "up.lora_A.weight: got shape" in refused(capsys, bases.parent / "other")


def test_the_way_out_has_to_be_new(bases, capsys):
    out = bases.parent / "out"
    out.mkdir()
    (out / "mine").write_text("")
    err = run(capsys, "merge", bases, ROOT / "tokens", out, "--quiet", code=1)
    assert "is there already" in err
    (out / "mine").unlink()
    run(capsys, "merge", bases, ROOT / "tokens", out, "--quiet")


def test_a_full_disk(bases, capsys, monkeypatch):
    real = shutil.disk_usage(bases)
    with monkeypatch.context() as m:
        m.setattr(_shards.shutil, "disk_usage", lambda _: real._replace(free=10))
        assert "GB of room" in refused(capsys, bases)

    def failing(number: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as m:
        m.setattr(_shards.os, "fsync", failing)
        assert "No space left on device" in refused(capsys, bases)

    def stopped(number: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(_shards.os, "fsync", stopped)
        err = run(
            capsys, "merge", bases, ROOT / "tokens", bases.parent / "out", "--quiet", code=130
        )
        assert "interrupted" in err
        assert not (bases.parent / "out").exists()


def test_values_beyond_the_dtype(tmp_path, capsys):
    tensors = {k: x.astype(np.float16) for k, x in base_tensors("tokens").items()}
    write_base(tmp_path / "base", tensors)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for file in (ROOT / "tokens").iterdir():
        (adapter / file.name).write_bytes(file.read_bytes())
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 1e7}))
    assert "beyond float16's range" in refused(capsys, tmp_path / "base", adapter)


def test_layouts_that_shapes_do_not_tell(tmp_path, capsys):
    """Of a square weight of GPT-2's the flag says it; of experts, nothing."""
    base = {"wide.weight": normal(4, 6), "square.weight": normal(4, 4)}
    write_base(tmp_path / "base", base)
    tensors = {
        "wide.lora_A.weight": normal(2, 4),
        "wide.lora_B.weight": normal(6, 2),
        "square.lora_A.weight": normal(2, 4),
        "square.lora_B.weight": normal(4, 2),
    }
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    tensors = {f"base_model.model.{k}": x for k, x in tensors.items()}
    save_file(tensors, adapter / "adapter_model.safetensors")
    fields = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["wide", "square"]}
    (adapter / "adapter_config.json").write_text(json.dumps(fields))
    assert "square is square" in refused(capsys, tmp_path / "base", adapter)
    names = {
        f"{name}\\.weight": {"module": name, "kind": "conv1d", "roles": "io"}
        for name in ("wide", "square")
    }
    (tmp_path / "names.json").write_text(json.dumps(names))
    arguments = [tmp_path / "base", adapter, tmp_path / "right", "--quiet"]
    run(capsys, "merge", *arguments, "--names", tmp_path / "names.json")
    merged = load_file(tmp_path / "right" / "model.safetensors")
    for name in ("wide", "square"):
        change = merged[f"{name}.weight"] - base[f"{name}.weight"]
        np.testing.assert_allclose(change, formula(adapter, name).T, atol=1e-6)

    base = {"moe.w": normal(3, 4, 4)}
    write_base(tmp_path / "moe", base)
    tensors = {"base_model.model.moe.lora_A.weight": normal(6, 4)}
    tensors["base_model.model.moe.lora_B.weight"] = normal(4, 6)
    save_file(tensors, adapter / "adapter_model.safetensors")
    fields = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_parameters": ["moe.w"]}
    (adapter / "adapter_config.json").write_text(json.dumps(fields))
    assert "--names FILE" in refused(capsys, tmp_path / "moe", adapter)
    names = {"moe\\.w": {"module": "moe.w", "kind": "parameter", "roles": "soi"}}
    (tmp_path / "names.json").write_text(json.dumps(names))
    arguments = [tmp_path / "moe", adapter, tmp_path / "experts", "--quiet"]
    run(capsys, "merge", *arguments, "--names", tmp_path / "names.json")
    change = load_file(tmp_path / "experts" / "model.safetensors")["moe.w"] - base["moe.w"]
    a, b = (tensors[f"base_model.model.moe.lora_{x}.weight"] for x in "AB")
    want = np.einsum("ore,eri->eoi", b.reshape(4, 2, 3), a.reshape(3, 2, 4))
    np.testing.assert_allclose(change, want, atol=1e-5)


# --------------------------------------------------------------------------------------------------
# convert


def same_adapter(x: Any, y: Any) -> None:
    assert_same(jaxlora.partition(x)[0], jaxlora.partition(y)[0])


def test_there_and_back(tmp_path, capsys):
    m, lora = llama_checkpoint(tmp_path)
    names = ["--names", tmp_path / "names.json"]
    more = ["--base-model-name", "me/llama", "--task-type", "CAUSAL_LM"]
    run(capsys, "convert", tmp_path / "adapter", tmp_path / "peft", *names, *more)
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["task_type"]) == ("me/llama", "CAUSAL_LM")
    same_adapter(peft.load(tmp_path / "peft", m.params, m.names), lora)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "params", m.params)
    base = ["--base", tmp_path / "params"]
    run(capsys, "convert", tmp_path / "peft", tmp_path / "again", *names, *base)
    same_adapter(checkpoint.restore(tmp_path / "again", m.params), lora)
    pairs = jaxlora._paths.flatten_with_paths(m.params)[0]
    save_file({path: np.asarray(x) for path, x in pairs}, tmp_path / "params.safetensors")
    base = ["--base", tmp_path / "params.safetensors"]
    run(capsys, "convert", tmp_path / "peft", tmp_path / "more", *names, *base)
    same_adapter(checkpoint.restore(tmp_path / "more", m.params), lora)


@pytest.mark.parametrize("name", ["dora", "bert", "lora_bias", "experts", "gpt2"])
def test_a_checkpoint_needs_no_base(name, tmp_path, capsys):
    m = model(name)
    lora = peft.load(ROOT / name, m.params, m.names)
    checkpoint.save(tmp_path / "adapter", lora)
    (tmp_path / "names.json").write_text(json.dumps(m.names))
    names = ["--names", tmp_path / "names.json"]
    run(capsys, "convert", tmp_path / "adapter", tmp_path / "peft", *names)
    same_adapter(peft.load(tmp_path / "peft", m.params, m.names), lora)


def test_rows_of_a_table_need_one(tmp_path, capsys):
    m = model("tokens")
    lora = peft.load(ROOT / "tokens", m.params, m.names)
    checkpoint.save(tmp_path / "adapter", lora)
    (tmp_path / "names.json").write_text(json.dumps(m.names))
    arguments = ["convert", tmp_path / "adapter", tmp_path / "peft"]
    arguments += ["--names", tmp_path / "names.json"]
    assert "emb/embedding: `tokens`" in run(capsys, *arguments, code=1)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "params", m.params)
    run(capsys, *arguments, "--base", tmp_path / "params")
    same_adapter(peft.load(tmp_path / "peft", m.params, m.names), lora)


def test_items_of_a_manager_and_flax_boxes(tmp_path, capsys):
    nnx = pytest.importorskip("flax.nnx")
    params = nnx.state(nnx.Linear(3, 4, rngs=nnx.Rngs(0)))
    lora = randomized(
        jaxlora.init(jax.random.key(0), params, LoraConfig(rank=2, targets=["kernel"]))
    )
    with ocp.CheckpointManager(tmp_path / "run") as manager:
        saves = {"lora": checkpoint.Save(lora), "params": ocp.args.StandardSave(params)}
        manager.save(7, args=ocp.args.Composite(**saves))
    (tmp_path / "names.json").write_text(json.dumps({"kernel": "proj"}))
    names = ["--names", tmp_path / "names.json"]
    run(capsys, "convert", tmp_path / "run" / "7" / "lora", tmp_path / "peft", *names)
    err = run(capsys, "convert", tmp_path / "run", tmp_path / "new", *names, code=1)
    assert str(tmp_path / "run" / "7" / "lora") in err
    arguments = ["convert", tmp_path / "peft", tmp_path / "back", *names]
    assert "--base: missing" in run(capsys, *arguments, code=1)
    err = run(capsys, *arguments, "--base", tmp_path / "run", code=1)
    assert str(tmp_path / "run" / "7" / "params") in err
    run(capsys, *arguments, "--base", tmp_path / "run" / "7" / "params")
    same_adapter(checkpoint.restore(tmp_path / "back", params), lora)


def test_maps_that_are_wrong(tmp_path, capsys):
    llama_checkpoint(tmp_path)
    file = tmp_path / "names.json"
    for text, said in [
        ("[]", "expected an object"),
        ("{", "expected JSON"),
        ('{"nothing": "x"}', "'nothing' matches nothing"),
        ('{"layers/query/kernel": {"modul": "x"}}', "`module`"),
    ]:
        file.write_text(text)
        arguments = ["convert", tmp_path / "adapter", tmp_path / "out", "--names", file]
        assert said in run(capsys, *arguments, code=1)
    assert not (tmp_path / "out").exists()


# --------------------------------------------------------------------------------------------------
# inspect


@pytest.mark.parametrize("name", peft_models.MODELS)
def test_figures_of_peft(name, capsys):
    found = json.loads(run(capsys, "inspect", ROOT / name, "--json"))
    tensors = load_file(ROOT / name / "adapter_model.safetensors")
    assert found["bytes"] == sum(x.nbytes for x in tensors.values())
    if name in ("layers", "dora", "pissa", "olora", "experts"):  # alike here and there
        lora = peft.load(ROOT / name, *model(name)[:2])
        assert found["parameters"] == jaxlora.count_params(lora).trainable
    else:
        copies = ("base_layer.weight", "original_module.bias", "modules_to_save.bias")
        counted = [x.size for key, x in tensors.items() if not key.endswith(copies)]
        assert found["parameters"] == sum(counted)
    assert run(capsys, "inspect", ROOT / name).startswith("format: PEFT")


def test_figures_of_a_linear_layer(capsys):
    found = json.loads(run(capsys, "inspect", ROOT / "tokens", "--json"))
    row = next(row for row in found["weights"] if row["name"] == "up")
    tensors = load_file(ROOT / "tokens" / "adapter_model.safetensors")
    a, b = (tensors[f"base_model.model.up.lora_{x}.weight"] for x in "AB")
    norms = [np.linalg.norm(x) for x in (a, b, formula(ROOT / "tokens", "up"))]
    np.testing.assert_allclose(row["norms"], norms, rtol=1e-6)
    assert (row["kind"], row["rank"], row["scale"], row["dtype"]) == (
        "LoRA",
        2,
        [1.5, 1.5],
        "float32",
    )
    assert (row["shape"], row["parameters"], row["nbytes"]) == ([6, 8], 28, 112)


def test_figures_of_a_checkpoint(tmp_path, capsys):
    _, lora = llama_checkpoint(tmp_path)
    found = json.loads(run(capsys, "inspect", tmp_path / "adapter", "--json"))
    assert found["parameters"] == jaxlora.count_params(lora).trainable
    nodes = dict(jaxlora._paths.flatten_with_paths(lora, is_leaf=jaxlora._weight.is_node)[0])
    for row in found["weights"]:
        change = np.asarray(jaxlora.delta(nodes[row["name"]]), np.float64)
        np.testing.assert_allclose(row["norms"][2], np.linalg.norm(change), rtol=1e-5)
    text = run(capsys, "inspect", tmp_path / "adapter")
    assert "format: jaxlora" in text
    assert "layers/query/kernel  LoRA" in text


def test_layers_share_a_row(capsys):
    short, long = (
        run(capsys, "inspect", ROOT / "llama"),
        run(capsys, "inspect", ROOT / "llama", "--all"),
    )
    assert "model.layers.*.mlp.down_proj (2)" in short
    assert "model.layers.1.mlp.down_proj " in long
    assert "*" not in long


def test_what_is_no_adapter(tmp_path, capsys):
    assert "not found" in run(capsys, "inspect", tmp_path / "nowhere", code=1)
    assert "got no adapter" in run(capsys, "inspect", tmp_path, code=1)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text('{"peft_type": "VERA"}')
    assert str(tmp_path / "b") in run(capsys, "inspect", tmp_path, code=1)
    assert "peft_type 'VERA'" in run(capsys, "inspect", tmp_path / "a", code=1)
    fields = '{"peft_type": "LORA", "kasa_config": {"rank": 3}}'
    (tmp_path / "a" / "adapter_config.json").write_text(fields)
    assert "kasa_config is set" in run(capsys, "inspect", tmp_path / "a", code=1)


# --------------------------------------------------------------------------------------------------
# The command line itself


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "jaxlora", *arguments],
        capture_output=True,
        text=True,
    )


def test_as_a_module():
    assert command("--version").stdout == f"jaxlora {jaxlora.__version__}\n"
    wrong = command("inspekt")
    assert wrong.returncode == 2
    assert "invalid choice: 'inspekt'" in wrong.stderr
    failed = command("inspect", "nowhere")
    assert (failed.returncode, failed.stdout) == (1, "")
    assert failed.stderr == "jaxlora: nowhere: not found, expected the directory of an adapter.\n"


def test_the_extra_is_named(bases, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    err = run(capsys, "merge", bases, ROOT / "tokens", bases.parent / "out", code=1)
    assert "pip install 'jaxlora[cli]'" in err


def test_a_head_of_another_part_is_not_the_table_s(tmp_path, capsys):
    tensors, config = decoder(tied=True)
    tensors["mtp.lm_head.weight"] = normal(12, 6, seed=9)
    write_base(tmp_path / "base", tensors)
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    changes = lookup("model.embed_tokens", 12)
    adapter = write_adapter(tmp_path / "adapter", changes, target_modules=["embed_tokens"])
    assert "model.embed_tokens or lm_head is trained" in refused(capsys, tmp_path / "base", adapter)


def test_what_the_base_calls_otherwise_is_not_added(tmp_path, capsys):
    """A module that trains in full, of the backbone, and that the base has not by that name."""
    tensors, _ = decoder()
    write_base(tmp_path / "base", tensors)
    changes = linear("model.layers.0.q_proj", 6) | {"model.layers.0.gate.weight": normal(3, 6)}
    fields = {"target_modules": ["q_proj"], "modules_to_save": ["gate"]}
    adapter = write_adapter(tmp_path / "adapter", changes, **fields)
    assert "gate.weight is no tensor of the base" in refused(capsys, tmp_path / "base", adapter)


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_the_map_says_what_shapes_do_not(kind, tmp_path, capsys):
    """Of a checkpoint: a square weight, whose layout its map knows."""
    params = {"proj": {"kernel": normal(4, 4)}}
    lora = randomized(jaxlora.init(jax.random.key(0), params, LoraConfig(rank=2, targets=["proj"])))
    checkpoint.save(tmp_path / "adapter", lora)
    names = {"proj/kernel": {"module": "h.c_proj", "kind": kind}}
    (tmp_path / "names.json").write_text(json.dumps(names))
    turn = (lambda x: x.T) if kind == "linear" else (lambda x: x)
    base = {"h.c_proj.weight": np.ascontiguousarray(turn(params["proj"]["kernel"]))}
    save_file(base, tmp_path / "base.safetensors")
    arguments = [tmp_path / "base.safetensors", tmp_path / "adapter", tmp_path / "o.safetensors"]
    run(capsys, "merge", *arguments, "--quiet", "--names", tmp_path / "names.json")
    want = turn(np.asarray(jaxlora.merge(lora)["proj"]["kernel"]))
    np.testing.assert_array_equal(load_file(tmp_path / "o.safetensors")["h.c_proj.weight"], want)
