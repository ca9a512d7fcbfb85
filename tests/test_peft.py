"""PEFT's directories: what PEFT wrote loads and gives what PEFT gives, and comes back the same.

The references are PEFT's own (tests/oracle/peft_adapters.py), the models are written by hand in
tests/peft_models.py. That PEFT reloads what `save` wrote is checked in the oracle's
environment: python tests/oracle/peft_adapters.py --check.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peft_models
import pytest
from helpers import assert_close, assert_same, randomized
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from peft_models import ROOT, model
from safetensors.numpy import load_file, save_file

import jaxlora
from jaxlora import FullWeight, LoraConfig, LoraWeight, initializers, peft
from jaxlora._errors import AdapterFileError, RolesError, TargetError

NAMES = [*peft_models.MODELS]


def config_of(directory: pathlib.Path) -> dict[str, Any]:
    return json.loads((directory / "adapter_config.json").read_text())


def tensors_of(directory: pathlib.Path) -> dict[str, np.ndarray]:
    return load_file(directory / "adapter_model.safetensors")


def adapters_of(lora: Any) -> dict[str, Any]:
    leaves, _ = jaxlora._paths.flatten_with_paths(lora, is_leaf=jaxlora._weight.is_node)
    return {path: x for path, x in leaves if isinstance(x, LoraWeight | FullWeight)}


def made(params: Any, config: LoraConfig, **kwargs: Any) -> Any:
    fresh = jax.jit(lambda params: jaxlora.init(jax.random.key(0), params, config, **kwargs))
    return randomized(fresh(params))


@pytest.fixture
def copied(tmp_path):
    """A copy of a reference to change: its directory, with `change(config=..., tensors=...)`."""

    class Copy:
        def __init__(self, name: str):
            self.model = model(name)
            self.directory = tmp_path / name
            self.directory.mkdir()
            for file in ("adapter_config.json", "adapter_model.safetensors"):
                (self.directory / file).write_bytes((ROOT / name / file).read_bytes())

        def set(self, **fields: Any) -> None:
            file = self.directory / "adapter_config.json"
            file.write_text(json.dumps(config_of(self.directory) | fields))

        def tensors(self, change) -> None:
            tensors = tensors_of(self.directory)
            change(tensors)
            save_file(tensors, self.directory / "adapter_model.safetensors", {"format": "pt"})

        def load(self, **kwargs: Any) -> Any:
            return peft.load(self.directory, self.model.params, self.model.names, **kwargs)

    return Copy


# --------------------------------------------------------------------------------------------------
# PEFT's own


@pytest.mark.parametrize("name", NAMES)
def test_loads_what_peft_wrote(name):
    """The logits, or outputs, are PEFT's to 1e-5, and are not the base's."""
    m = model(name)
    lora = peft.load(ROOT / name, m.params, m.names)
    got = jax.jit(jaxlora.lora_apply(m.forward))(lora, m.tokens)
    bound = 1e-5 * max(1, np.abs(m.expected).max())
    np.testing.assert_allclose(got, m.expected, rtol=0, atol=bound)
    off = m.forward(m.params, m.tokens)
    assert np.abs(off - m.expected).max() > 0.05


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("pissa", "olora")])
def test_comes_back_the_same(name, tmp_path):
    """Load, save, load: bit for bit; and the tensors of the file are PEFT's."""
    m = model(name)
    lora = peft.load(ROOT / name, m.params, m.names)
    peft.save(tmp_path, lora, m.names, base_model_name="me/base", task_type="CAUSAL_LM")
    again = peft.load(tmp_path, m.params, m.names)
    assert_same(again, lora)
    ours, theirs = tensors_of(tmp_path), tensors_of(ROOT / name)
    copies = ("base_layer.weight", "original_module.bias", "modules_to_save.bias")
    if name == "lora_bias":  # it is in the bias now
        copies += ("lora_B.bias", "base_layer.bias")
        ours = {k: v for k, v in ours.items() if not k.endswith("base_layer.bias")}
    theirs = {k: v for k, v in theirs.items() if not k.endswith(copies)}
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        np.testing.assert_array_equal(value, theirs[key], err_msg=key)
    config = config_of(tmp_path)
    assert config["base_model_name_or_path"] == "me/base"
    assert config["task_type"] == "CAUSAL_LM"
    for field in (
        "use_rslora",
        "use_dora",
        "lora_dropout",
        "fan_in_fan_out",
        "ensure_weight_tying",
    ):
        assert config[field] == config_of(ROOT / name)[field], field


@pytest.mark.parametrize("name", ["pissa", "olora"])
def test_moved_bases_are_moved_again_and_exported_as_plain(name, tmp_path):
    m = model(name)
    lora = peft.load(ROOT / name, m.params, m.names)
    assert np.abs(lora["up"]["kernel"].w - m.params["up"]["kernel"]).max() > 0.05
    plain = jaxlora.rebase(lora, peft_models.initial(name, m), m.params)
    assert plain["up"]["kernel"].rank == 4
    peft.save(tmp_path, plain, m.names)
    again = peft.load(tmp_path, m.params, m.names)
    assert again["up"]["kernel"].w is m.params["up"]["kernel"]
    assert_close(jaxlora.merge(again), jaxlora.merge(lora))


def test_strengths_are_those_of_the_patterns():
    m = model("llama")
    layers = peft.load(ROOT / "llama", m.params, m.names)["layers"]
    query, down = layers["query"]["kernel"], layers["down"]["kernel"]
    np.testing.assert_allclose(query.scale, [6 / math.sqrt(4), 6 / math.sqrt(2)], rtol=1e-6)
    np.testing.assert_allclose(down.scale, [3 / math.sqrt(4)] * 2, rtol=1e-6)
    assert query.a.shape == (2, 16, 4)  # the second layer's rank is 2
    assert not np.any(query.a[1, :, 2:])
    assert not np.any(query.b[1, 2:])


def test_layers_without_an_adapter_are_zeros_that_stay():
    m = model("llama_layers")
    lora = peft.load(ROOT / "llama_layers", m.params, m.names)
    query = lora["layers"]["query"]["kernel"]
    assert not np.any(query.a[0])
    assert not np.any(query.b[0])
    assert np.any(query.a[1])

    def loss(trainable, frozen):
        full = jaxlora.combine(trainable, frozen)
        return jnp.sum(jaxlora.lora_apply(m.forward)(full, m.tokens) ** 2)

    gradient = jax.jit(jax.grad(loss))(*jaxlora.partition(lora))["layers"]["query"]["kernel"]
    assert not np.any(gradient.a[0])
    assert not np.any(gradient.b[0])
    assert np.any(gradient.b[1])


def test_fused_theirs_shares_a_and_ours_is_block_diagonal():
    m = model("gpt2")
    lora = peft.load(ROOT / "gpt2", m.params, m.names)["h_0"]
    assert_same(lora["q"]["kernel"].a, lora["v"]["kernel"].a)
    m = model("bert")
    qkv = peft.load(ROOT / "bert", m.params, m.names)["qkv"]["kernel"]
    assert qkv.rank == 2  # the query's alone
    assert np.any(qkv.b[:, :12])
    assert not np.any(qkv.b[:, 12:])


# --------------------------------------------------------------------------------------------------
# Ours, and back


SCANNED = {
    "layers": {"query": {"kernel": jnp.zeros((3, 4, 2, 5)), "bias": jnp.zeros((3, 2, 5))}},
    "head": {"kernel": jnp.zeros((4, 6))},
}
SCANNED_NAMES = {
    "layers/query/kernel": {"module": "model.layers.{}.q_proj", "roles": "sioo"},
    "layers/query/bias": {"module": "model.layers.{}.q_proj", "kind": "bias"},
    "head/kernel": "lm_head",
}
SCANNED_CONFIG = LoraConfig(rank=2, targets=["query", "head"], roles={"query": "sioo"})


def fresh(**kwargs: Any) -> Any:
    config = dataclasses.replace(SCANNED_CONFIG, **kwargs)
    params = jax.tree.map(
        lambda x: jnp.asarray(np.random.default_rng(0).standard_normal(x.shape), x.dtype), SCANNED
    )
    return params, made(params, config)


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"alpha": 3.3},
        {"alpha": 5, "rank_stabilized": True},
        {"rank_pattern": {"head": 1}, "alpha_pattern": {"query": 7}},
        {"dora": True},
        {"bias": "all"},
        {"bias": "lora_only", "dropout": 0.1},
        {"targets": ["query"], "train": ["head"]},
        {"dtype": jnp.bfloat16},
        {"dtype": jnp.float16},
    ],
    ids=str,
)
def test_round_trip(kwargs, tmp_path):
    params, lora = fresh(**kwargs)
    peft.save(tmp_path, lora, SCANNED_NAMES)
    assert_same(peft.load(tmp_path, params, SCANNED_NAMES), lora)


def test_a_fresh_adapter_comes_back(tmp_path):
    """b is zero, a is not: nothing of it is left out."""
    params, _ = fresh()
    lora = jaxlora.init(jax.random.key(0), params, SCANNED_CONFIG)
    peft.save(tmp_path, lora, SCANNED_NAMES)
    assert_same(peft.load(tmp_path, params, SCANNED_NAMES), lora)


def test_tensors_are_those_of_the_formula(tmp_path):
    _params, lora = fresh(rank_pattern={"head": 1}, alpha=3, alpha_pattern={"head": 5})
    peft.save(tmp_path, lora, SCANNED_NAMES)
    tensors, config = tensors_of(tmp_path), config_of(tmp_path)
    for i in range(3):
        a = tensors[f"base_model.model.model.layers.{i}.q_proj.lora_A.weight"]
        b = tensors[f"base_model.model.model.layers.{i}.q_proj.lora_B.weight"]
        delta = 3 / 2 * (b.astype(np.float64) @ a).T.reshape(4, 2, 5)
        got = jaxlora.delta(lora["layers"]["query"]["kernel"])[i]
        np.testing.assert_allclose(got, delta, atol=1e-5)
    a, b = (tensors[f"base_model.model.lm_head.lora_{x}.weight"] for x in "AB")
    np.testing.assert_allclose(jaxlora.delta(lora["head"]["kernel"]), 5 * (b @ a).T, atol=1e-5)
    assert (config["r"], config["lora_alpha"]) == (2, 3)
    assert config["rank_pattern"] == {"^lm_head": 1}
    assert config["alpha_pattern"] == {"^lm_head": 5}
    assert config["peft_type"] == "LORA"


def test_several_adapters_in_subfolders(tmp_path):
    params, lora = fresh()
    other = randomized(lora, seed=5)
    peft.save(tmp_path, lora, SCANNED_NAMES)
    peft.save(tmp_path, other, SCANNED_NAMES, adapter="other")
    assert_same(peft.load(tmp_path, params, SCANNED_NAMES), lora)
    assert_same(peft.load(tmp_path, params, SCANNED_NAMES, adapter="other"), other)
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(AdapterFileError, match=r"subfolders, 'other': .*adapter='other'"):
        peft.load(tmp_path, params, SCANNED_NAMES)
    for name in ("../other", "a/b", "..", "", 3):
        with pytest.raises(AdapterFileError, match="expected the name of a subfolder"):
            peft.load(tmp_path, params, SCANNED_NAMES, adapter=name)


def test_fused_both_ways(tmp_path):
    """Deltas, where ours is fused and theirs split with ranks and scales that differ, and back."""
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.standard_normal((4, 9)), jnp.float32)
    theirs = {"q": jnp.asarray(w[:, :4]), "k": jnp.asarray(w[:, 4:6]), "v": jnp.asarray(w[:, 6:])}
    params = {n: {"kernel": x} for n, x in theirs.items()}
    config = LoraConfig(rank=2, targets=["q", "v"], rank_pattern={"v": 3}, alpha_pattern={"v": 5})
    split = made(params, config)
    peft.save(tmp_path / "split", split, {f"{n}/kernel": f"attn.{n}" for n in "qkv"})
    fused_names = {"qkv/kernel": {"module": [f"attn.{n}" for n in "qkv"], "sizes": [4, 2, 3]}}
    fused = peft.load(tmp_path / "split", {"qkv": {"kernel": w}}, fused_names)["qkv"]["kernel"]
    assert fused.rank == 5
    whole = np.zeros((4, 9))
    whole[:, :4] = jaxlora.delta(split["q"]["kernel"])
    whole[:, 6:] = jaxlora.delta(split["v"]["kernel"])
    np.testing.assert_allclose(jaxlora.delta(fused), whole, atol=1e-5)
    # Saved from the fused leaf: three modules of it, each with its own ranks alone.
    peft.save(tmp_path / "again", {"qkv": {"kernel": fused}}, fused_names)
    a = {k: v.shape for k, v in tensors_of(tmp_path / "again").items() if "lora_A" in k}
    assert a == {
        "base_model.model.attn.q.lora_A.weight": (2, 4),
        "base_model.model.attn.v.lora_A.weight": (3, 4),
    }
    # Theirs fused, ours split, with different a: ranks add up, b is block diagonal.
    parts = {f"{n}/kernel": {"module": "attn.qkv", "part": k} for k, n in enumerate("qkv")}
    peft.save(tmp_path / "fused", split, parts)
    assert tensors_of(tmp_path / "fused")["base_model.model.attn.qkv.lora_B.weight"].shape == (9, 5)
    back = peft.load(tmp_path / "fused", params, parts)
    found = np.concatenate([jaxlora.delta(back[n]["kernel"]) for n in "qkv"], axis=1)
    np.testing.assert_allclose(found, whole, atol=1e-5)
    # And once more: a is shared now, so that the rank stays.
    peft.save(tmp_path / "shared", back, parts)
    for key, value in tensors_of(tmp_path / "fused").items():
        np.testing.assert_array_equal(tensors_of(tmp_path / "shared")[key], value)


def test_fused_with_dora_and_biases(tmp_path):
    """Magnitudes and biases are cut and joined as the outputs are."""
    merged_of = jax.jit(jaxlora.merge)
    rng = np.random.default_rng(0)
    params = {
        n: {
            "kernel": jnp.asarray(rng.standard_normal((4, 2, k)), jnp.float32),
            "bias": jnp.zeros((2, k)),
        }
        for n, k in {"q": 3, "k": 1, "v": 2}.items()
    }
    config = LoraConfig(
        rank=2, targets=[*"qkv"], dora=True, bias="lora_only", roles={"q|k|v": "ioo"}
    )
    lora = made(params, config)
    names = {}
    for k, n in enumerate("qkv"):
        names[f"{n}/kernel"] = {"module": "c_attn", "kind": "conv1d", "part": k, "roles": "ioo"}
        names[f"{n}/bias"] = {"module": "c_attn", "kind": "bias", "part": k}
    peft.save(tmp_path, lora, names)
    shapes = {k.partition("c_attn.")[2]: v.shape for k, v in tensors_of(tmp_path).items()}
    assert shapes == {
        "lora_A.weight": (6, 4),
        "lora_B.weight": (12, 6),
        "lora_magnitude_vector": (12,),
        "base_layer.bias": (12,),
    }
    again = peft.load(tmp_path, params, names)
    assert_close(merged_of(again), merged_of(lora))
    whole = {
        "kernel": jnp.concatenate([params[n]["kernel"].reshape(4, -1) for n in "qkv"], axis=1),
        "bias": jnp.zeros(12),
    }
    split = {"kernel": {"module": [*"qkv"], "sizes": [6, 2, 4]}}
    split |= {"bias": split["kernel"] | {"kind": "bias"}}
    apart = {
        f"(.)/{x}": "{1}" if x == "kernel" else {"module": "{1}", "kind": "bias"} for x in whole
    }
    apart["(.)/kernel"] = {"module": "{1}", "roles": "ioo"}
    peft.save(tmp_path, lora, apart)
    fused = merged_of(peft.load(tmp_path, whole, split))
    merged = merged_of(lora)
    expected = jnp.concatenate([merged[n]["kernel"].reshape(4, -1) for n in "qkv"], axis=1)
    assert_close(fused["kernel"], expected)
    assert_close(fused["bias"], jnp.concatenate([merged[n]["bias"].ravel() for n in "qkv"]))


@pytest.mark.parametrize("order", ["HWIO", "OIHW", "IOHW", None])
def test_convolutions_in_any_order(order, tmp_path):
    """The delta is PEFT's: conv of the factors, B (O, R, 1, 1) after A (R, I, H, W)."""
    shape = {"O": 3, "I": 2, "H": 4, "W": 5}
    letters = order or "OIHW"
    roles = "".join("o" if c == "O" else "i" for c in letters)
    params = {"conv": {"kernel": jnp.ones([shape[c] for c in letters])}}
    lora = made(params, LoraConfig(rank=2, alpha=2, targets=["conv"], roles={"conv": roles}))
    entry = {"module": "c", "kind": "conv", "roles": roles} | ({"order": order} if order else {})
    peft.save(tmp_path, lora, {"conv/kernel": entry})
    tensors = tensors_of(tmp_path)
    a, b = (tensors[f"base_model.model.c.lora_{x}.weight"] for x in "AB")
    assert (a.shape, b.shape) == ((2, 2, 4, 5), (3, 2, 1, 1))
    delta = np.einsum("or,rihw->oihw", b[..., 0, 0], a)
    expected = np.einsum(f"oihw->{letters.lower()}", delta)
    np.testing.assert_allclose(jaxlora.delta(lora["conv"]["kernel"]), expected, atol=1e-5)
    assert_same(peft.load(tmp_path, params, {"conv/kernel": entry}), lora)


def test_stacked_experts_within_layers(tmp_path):
    """Layers outside of a module, experts within: the delta of PEFT's einsum, and `swap`."""
    params = {"up": jnp.ones((2, 3, 4, 5))}
    lora = made(params, LoraConfig(rank=2, alpha=4, targets=["up"], roles={"up": "ssio"}))
    names = {"up": {"module": "layers.{}.experts.up", "kind": "parameter", "roles": "ssio"}}
    for swap in (False, True):
        given = {"up": names["up"] | {"swap": swap}}
        peft.save(tmp_path, lora, given)
        assert_same(peft.load(tmp_path, params, given), lora)
        for layer in range(2):
            stem = f"base_model.model.layers.{layer}.experts.lora_"
            a, b = (tensors_of(tmp_path)[f"{stem}{x}.weight"] for x in "AB")
            delta = 2 * np.einsum(
                "ore,eri->eio", b.reshape(b.shape[0], 2, 3), a.reshape(3, 2, a.shape[1])
            )
            delta = delta.swapaxes(1, 2) if swap else delta
            np.testing.assert_allclose(jaxlora.delta(lora["up"])[layer], delta, atol=1e-5)
    dropping = jaxlora.with_dropout(lora, None, rate=0.5)
    with pytest.raises(TargetError, match=r"got dropout 0.5 with parameters"):
        peft.save(tmp_path, dropping, names)
    uneven = {"up": dataclasses.replace(lora["up"], scale=jnp.arange(6.0).reshape(2, 3))}
    with pytest.raises(TargetError, match="up: got other scales for some experts"):
        peft.save(tmp_path, uneven, names)
    assert config_of(tmp_path)["target_modules"] == []
    assert config_of(tmp_path)["target_parameters"] == [
        "layers.0.experts.up",
        "layers.1.experts.up",
    ]


def test_quantized_bases(tmp_path):
    params, lora = fresh()
    peft.save(tmp_path, lora, SCANNED_NAMES)
    base = jaxlora.quantize(params, ["query"], roles={"layers/query/kernel": "sioo"}, block_size=4)
    loaded = peft.load(tmp_path, base, SCANNED_NAMES)
    assert jaxlora._quantized.is_quantized(loaded["layers"]["query"]["kernel"].w)
    assert_same(loaded["layers"]["query"]["kernel"].a, lora["layers"]["query"]["kernel"].a)


def test_roles_that_were_traced(tmp_path):
    m = model("llama")
    roles = jaxlora.trace_roles(m.forward, m.params, m.tokens)
    names = {}
    for path, entry in m.names.items():
        given = {"module": entry} if isinstance(entry, str) else entry
        names[path] = {k: v for k, v in given.items() if k != "roles"}
    lora = peft.load(ROOT / "llama", m.params, names, roles=roles)
    assert_same(lora, peft.load(ROOT / "llama", m.params, m.names))
    peft.save(tmp_path, lora, names, roles=roles)
    assert_same(peft.load(tmp_path, m.params, m.names), lora)


def test_roles_from_the_model_and_without(tmp_path):
    params, lora = fresh(targets=["query"])
    names = {"layers/query/kernel": "model.layers.{}.q_proj"}
    peft.save(tmp_path, lora, names)
    assert_same(peft.load(tmp_path, params, names, roles={"layers/query/kernel": "sioo"}), lora)
    with pytest.raises(
        RolesError, match=r"layers/query/kernel: got no roles for shape \(3, 4, 2, 5\)"
    ):
        peft.load(tmp_path, params, names)


# --------------------------------------------------------------------------------------------------
# For serving


def test_for_serving_is_one_rank_and_one_alpha(tmp_path):
    m = model("llama")
    lora = peft.load(ROOT / "llama", m.params, m.names)
    peft.save(tmp_path, lora, m.names, for_serving=True)
    config = config_of(tmp_path)
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (4, 4, False)
    assert not config["rank_pattern"]
    assert not config["alpha_pattern"]
    assert {v.shape[0] for k, v in tensors_of(tmp_path).items() if "lora_A" in k} == {4}
    # By vLLM's rule, alpha / r for each module, the deltas are the same.
    for i in range(2):
        for path, name, cut in (
            ("query", "self_attn.q_proj", (16, 4, 4)),
            ("down", "mlp.down_proj", (20, 16)),
        ):
            stem = f"base_model.model.model.layers.{i}.{name}.lora_"
            a, b = (tensors_of(tmp_path)[f"{stem}{x}.weight"] for x in "AB")
            delta = (config["lora_alpha"] / config["r"] * (b @ a).T).reshape(cut)
            got = jaxlora.delta(lora["layers"][path]["kernel"])[i]
            np.testing.assert_allclose(got, delta, atol=1e-5)


def test_for_serving_keeps_a_scale_that_all_share(tmp_path):
    _, lora = fresh(alpha=3)
    peft.save(tmp_path, lora, SCANNED_NAMES, for_serving=True)
    assert (config_of(tmp_path)["r"], config_of(tmp_path)["lora_alpha"]) == (2, 3)
    b = tensors_of(tmp_path)["base_model.model.lm_head.lora_B.weight"]
    assert_same(jnp.asarray(b), lora["head"]["kernel"].b.T)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("dora", r"got DoRA \(emb\), which vLLM does not load"),
        ("bert", r"leaves trained in full \(.*which vLLM does not load"),
        ("tokens", r"leaves trained in full \(emb/embedding\)"),
        ("layers", r"conv1, of kind 'conv', which vLLM"),
        ("experts", r"experts\.up, of kind 'parameter', which vLLM"),
    ],
)
def test_for_serving_refuses(name, text, tmp_path):
    m = model(name)
    lora = peft.load(ROOT / name, m.params, m.names)
    with pytest.raises(TargetError, match=text):
        peft.save(tmp_path, lora, m.names, for_serving=True)
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------------------------
# Tied embeddings


def test_tied_embeddings_need_an_adapter_of_both(copied):
    c = copied("llama_tied")
    c.set(ensure_weight_tying=False)
    text = r"is not set, and model.embed_tokens or lm_head is trained.*are one leaf"
    with pytest.raises(AdapterFileError, match=text):
        c.load()
    with pytest.raises(AdapterFileError, match=r"lm_head.lora_A.weight.*not used"):
        c.load(allow=["ensure_weight_tying"])
    c.tensors(lambda t: [t.pop(k) for k in [*t] if "lm_head" in k])
    lora = c.load(allow=["ensure_weight_tying"])
    assert isinstance(lora["embed"]["embedding"], LoraWeight)
    with pytest.raises(TargetError, match=r"allow: got .*expected names among"):
        c.load(allow=["anything"])


def test_dora_on_a_tied_table_is_refused(tmp_path):
    m = model("llama_tied")
    lora = made(m.params, LoraConfig(rank=2, targets=["embed"], dora=True))
    with pytest.raises(
        TargetError, match="embed/embedding: DoRA on a table that is tied to lm_head"
    ):
        peft.save(tmp_path, lora, m.names)


def test_a_tied_table_in_full(tmp_path):
    m = model("llama_tied")
    config = LoraConfig(rank=2, targets=["query"], train=["embed"], roles={"query": "sioo"})
    lora = made(m.params, config)
    peft.save(tmp_path, lora, m.names)
    assert config_of(tmp_path)["ensure_weight_tying"]
    found = tensors_of(tmp_path)
    head, table = (f"base_model.model.{n}.weight" for n in ("lm_head", "model.embed_tokens"))
    np.testing.assert_array_equal(found[head], found[table])
    assert_same(peft.load(tmp_path, m.params, m.names), lora)


def test_tied_copies_must_agree(copied):
    c = copied("llama_tied")

    def change(t):
        t["base_model.model.lm_head.lora_A.weight"] = (
            t["base_model.model.lm_head.lora_A.weight"] + 1
        )

    c.tensors(change)
    with pytest.raises(AdapterFileError, match=r"lm_head.lora_A.weight: got other values"):
        c.load()


def test_another_base_embedding_is_refused(copied):
    c = copied("llama_tied")

    def change(t):
        t["base_model.model.model.embed_tokens.base_layer.weight"] = 1 + t.pop(
            "base_model.model.model.embed_tokens.base_layer.weight"
        )

    c.tensors(change)
    with pytest.raises(AdapterFileError, match="got another table than embed/embedding"):
        c.load()


def test_an_embedding_that_peft_saved_beside(copied):
    """Of a resized vocabulary: refused unless it is the params'."""
    c = copied("llama")
    table = np.asarray(c.model.params["embed"]["embedding"])
    key = "base_model.model.model.embed_tokens.weight"
    c.tensors(lambda t: t.update({key: table}))
    c.load()
    c.tensors(lambda t: t.update({key: table + 1}))
    with pytest.raises(AdapterFileError, match=r"embed_tokens.weight: got another table"):
        c.load()


# --------------------------------------------------------------------------------------------------
# The configuration


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("alora_invocation_tokens", [1, 2]),
        ("arrow_config", {"top_k": 2}),
        ("kasa_config", {"beta": 1.0}),
        ("layer_replication", [[0, 1]]),
        ("megatron_config", {"a": 1}),
        ("monteclora_config", {"num_samples": 8}),
        ("use_bdlora", {"nblocks": 2}),
        ("use_qalora", True),
        ("velora_config", {"num_groups": 64}),
        ("some_new_method", {"a": 1}),
        ("use_something", True),
    ],
)
def test_fields_that_are_no_lora_are_refused_by_name(field, value, copied):
    c = copied("tokens")
    c.set(**{field: value})
    with pytest.raises(AdapterFileError, match=rf"adapter_config.json: {field} is set"):
        c.load()
    for neutral in (None, False, {}, []):
        c.set(**{field: neutral})
        c.load()


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"peft_type": "LOHA"}, "got peft_type 'LOHA', expected 'LORA'"),
        ({"peft_type": None}, "got peft_type None, expected 'LORA'"),
        ({"r": 0}, "got r 0, expected a rank"),
        ({"r": True}, "got r True, expected a rank"),
        ({"r": 2**40}, "expected a rank"),
        (
            {"r": 3},
            r"lora_embedding_A: got shape \(2, 11\), expected \(3, 11\), since emb is a target",
        ),
        ({"r": 10**6}, "got rank 1000000 for emb, expected at most 64"),
        ({"lora_alpha": "3"}, "got lora_alpha '3', expected a number"),
        ({"lora_alpha": 10**400}, "expected a number"),
        ({"lora_dropout": 1.0}, r"expected a rate in \[0, 1\)"),
        ({"use_rslora": 1}, "got use_rslora 1, expected a bool"),
        ({"bias": "some"}, "got bias 'some', expected none, all or lora_only"),
        ({"rank_pattern": {"lin": "2"}}, "got rank_pattern .*values that are ranks"),
        ({"rank_pattern": {"lin": 2, "l.n": 1}}, "rank_pattern: 'lin' and 'l.n' both fit lin"),
        ({"alpha_pattern": {"lin": 1, ".*": 2}}, r"alpha_pattern: 'lin' and '\.\*' both fit lin"),
        ({"rank_pattern": {"(": 1}}, "rank_pattern: got no regex"),
        ({"rank_pattern": {"(?i:lin)": 2}}, "rank_pattern: got a regex with"),
        ({"rank_pattern": {r"(l)\1": 2}}, "rank_pattern: got a regex with groupref"),
        ({"target_modules": ["linn"]}, "target_modules: 'linn' is no module"),
        ({"target_modules": "linn"}, "target_modules: 'linn' is no module"),
        ({"target_modules": "all-linear"}, "expected the names that it stands for"),
        ({"target_modules": 3}, "got target_modules 3"),
        ({"target_modules": []}, "got neither target_modules nor"),
        ({"target_modules": ["lin", "conv1"]}, r"emb.lora_embedding_A.*not used by any module"),
        ({"exclude_modules": ["lin"]}, "lin.lora_A.weight.*not used"),
        ({"layers_to_transform": [1]}, "layers_to_transform: 1 is the layer of no target"),
        ({"layers_to_transform": [-1]}, "got layers_to_transform"),
        ({"layers_pattern": "a(b"}, "got layers_pattern"),
        ({"modules_to_save": ["norm"]}, "modules_to_save: 'norm' is no module"),
        ({"modules_to_save": ["a(b"]}, "got modules_to_save"),
        ({"modules_to_save": ["lin"]}, "base_model.model.lin.weight: missing"),
        ({"target_parameters": ["lin.weight"]}, "target_parameters: 'lin.weight' is no module"),
        ({"bias": "lora_only"}, "lin.base_layer.bias: missing, .*bias is 'lora_only'"),
        ({"lora_bias": True}, "lora_bias with emb, of kind 'embedding'"),
        ({"use_dora": True}, "lora_magnitude_vector: missing"),
        ({"use_dora": True, "lora_bias": True}, "got use_dora True, expected it without lora_bias"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices: got 0 embeddings"),
        ({"trainable_token_indices": {"emb": [99]}}, "expected different rows of emb, below 11"),
        ({"trainable_token_indices": {"lin": [1]}}, "'lin' is 0 embeddings of the map"),
        ({"trainable_token_indices": "x"}, "got trainable_token_indices 'x'"),
        ({"init_lora_weights": "pissa_niter_16"}, "got init_lora_weights 'pissa_niter_16'"),
        ({"init_lora_weights": "loftq"}, "Convert the adapter in PEFT"),
        ({"init_lora_weights": "corda"}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "mica"}, "got init_lora_weights 'mica'"),
        (
            {"init_lora_weights": "pissa"},
            "init_lora_weights: pissa on emb/embedding, expected linear",
        ),
        ({"init_lora_weights": 3}, "got init_lora_weights '3'"),
    ],
    ids=str,
)
def test_what_the_configuration_says_is_checked(fields, text, copied):
    c = copied("layers")
    c.set(**fields)
    with pytest.raises(AdapterFileError, match=text):
        c.load()


@pytest.mark.parametrize("value", [True, False, "gaussian", "eva", "orthogonal"])
def test_inits_that_leave_the_base_do_not_matter(value, copied):
    c = copied("layers")
    c.set(init_lora_weights=value, eva_config={"rho": 2.0}, peft_version="0.9", extra=None)
    c.load()


@pytest.mark.parametrize(
    ("targets", "found"),
    [
        (["q_proj"], {"query"}),
        (["self_attn.q_proj", "model.layers.1.mlp.up_proj"], {"query", "up"}),
        (r"model\.layers\.(0|1)\.self_attn\.[qk]_proj", {"query", "key"}),
        (r"^(?!.*mlp).*\b(q|v)_proj$", {"query", "value"}),
        (
            r"(?:.*?(?:layers).*?(?:self_attn|mlp).*?(?:q_proj|gate_proj))|(?:lm_head)",
            {"query", "gate", "head"},
        ),
    ],
)
def test_targets_are_those_of_peft(targets, found, tmp_path):
    """Names, tails of names, and regexes, as PEFT takes them."""
    m = model("llama")
    lora = made(
        m.params,
        LoraConfig(targets=[*found], rank=2, roles={"query|key|value": "sioo", "gate|up": "sio"}),
    )
    if targets[1:2] == ["model.layers.1.mlp.up_proj"]:
        up = lora["layers"]["up"]["kernel"]
        keep = lambda x: x.at[0].set(0)
        lora["layers"]["up"]["kernel"] = dataclasses.replace(up, a=keep(up.a), b=keep(up.b))
    peft.save(tmp_path, lora, m.names)
    config = config_of(tmp_path) | {"target_modules": targets, "peft_version": "0.1"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    again = peft.load(tmp_path, m.params, m.names)
    assert_same(again, lora)


# --------------------------------------------------------------------------------------------------
# The tensors


def _replace(key, f):
    return lambda t: t.update({key: f(t[key])})


LIN_A = "base_model.model.lin.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda t: t.pop(LIN_A), rf"{LIN_A}: missing, expected it of shape \(2, 4\), since lin"),
        (lambda t: t.update(x=np.zeros(2)), "x: not used by any module"),
        (
            lambda t: t.update({"base_model.model.other.lora_A.weight": np.zeros((2, 4))}),
            "other.lora_A.weight: not used by any module of the map",
        ),
        (
            lambda t: t.update({"base_model.model.lin.lora_diag": np.zeros(2)}),
            "lin.lora_diag: not used",
        ),
        (
            lambda t: t.update({"base_model.model.lin.lora_magnitude_vector": np.zeros(6)}),
            "lin.lora_magnitude_vector: not used",
        ),
        (_replace(LIN_A, lambda x: x.T), rf"{LIN_A}: got shape \(4, 2\), expected \(2, 4\)"),
        (_replace(LIN_A, lambda x: x[:1]), rf"{LIN_A}: got shape \(1, 4\), expected \(2, 4\)"),
        (_replace(LIN_A, lambda x: x[:0]), rf"{LIN_A}: got shape \(0, 4\), expected \(2, 4\)"),
        (
            _replace(LIN_A, lambda x: x.astype(np.int32)),
            rf"{LIN_A}: got dtype I32, expected one of",
        ),
        (_replace(LIN_A, lambda x: x * np.nan), rf"{LIN_A}: got 8 of 8 values that are NaN"),
        (_replace(LIN_A, lambda x: x + np.inf), rf"{LIN_A}: got 8 of 8 values that are NaN"),
        (
            _replace("base_model.model.conv2.lora_A.weight", lambda x: np.repeat(x, 2, 1)),
            r"conv2.lora_A.weight: got shape \(2, 4, 3, 2\), expected \(2, 2, 3, 2\)",
        ),
    ],
)
def test_every_tensor_fits_and_is_used(change, text, copied):
    c = copied("layers")
    c.tensors(change)
    with pytest.raises(AdapterFileError, match=text):
        c.load()


def test_lora_bias_is_added_to_the_bias(copied):
    c = copied("lora_bias")
    c.set(bias="none")
    c.tensors(lambda t: [t.pop(k) for k in [*t] if "base_layer" in k])
    added = tensors_of(c.directory)["base_model.model.lin.lora_B.bias"]
    value = c.load()["lin"]["bias"].value
    np.testing.assert_allclose(value - c.model.params["lin"]["bias"], 1.5 * added, atol=1e-6)


def test_lora_bias_needs_a_bias(copied):
    c = copied("lora_bias")
    names = {k: v for k, v in c.model.names.items() if k != "lin/bias"}
    with pytest.raises(AdapterFileError, match=r"lin.lora_B.bias: lin has a bias of its own"):
        peft.load(c.directory, c.model.params, names)


def test_both_in_full_and_adapted_is_refused(copied):
    c = copied("tokens")
    c.set(target_modules=["up", "down", "emb"])

    def change(t):
        t["base_model.model.emb.lora_embedding_A"] = np.ones((2, 11), np.float32)
        t["base_model.model.emb.lora_embedding_B"] = np.ones((6, 2), np.float32)

    c.tensors(change)
    with pytest.raises(AdapterFileError, match="emb/embedding has an adapter and trains in full"):
        c.load()


# --------------------------------------------------------------------------------------------------
# The map, and what cannot be saved


@pytest.mark.parametrize(
    ("names", "text"),
    [
        ({}, "names: got {}, expected a map"),
        ({"hed/kernel": "lm_head"}, r"'hed/kernel' matches nothing.*\n.*head/kernel"),
        ({"(": "x"}, r"names: got '\(', expected a regex"),
        ({"head/kernel": "a", ".*kernel": "b.{}"}, "head/kernel is matched by"),
        ({"head/kernel": 3}, "expected the name of a module"),
        ({"head/kernel": {"kind": "linear"}}, "expected the name of a module, or a mapping"),
        ({"head/kernel": {"module": "a", "knd": "x"}}, "got 'knd', expected fields among"),
        (
            {"head/kernel": {"module": "a", "kind": "lstm"}},
            "got kind 'lstm', expected one of linear",
        ),
        ({"head/kernel": {"module": "a", "groups": 2}}, "got groups 2, expected 1: PEFT's factors"),
        ({"head/kernel": {"module": "a", "part": 1}}, "a.weight is that of several leaves"),
        ({"head/kernel": {"module": ["a", "b"], "sizes": [1, 2]}}, "got 6 outputs for 2 modules"),
        ({"head/kernel": {"module": ["a", "b"], "sizes": [6]}}, "got sizes"),
        (
            {"head/kernel": {"module": "a", "tied": "b"}},
            "got tied 'b', expected it of kind 'embedding'",
        ),
        ({"head/kernel": {"module": "a", "tokens": [1]}}, "got tokens"),
        ({"head/kernel": {"module": "a", "swap": True}}, "got swap True"),
        ({"head/kernel": {"module": "a", "kind": "parameter"}}, "one name, module and parameter"),
        ({"head/kernel": {"module": "a", "kind": "conv", "order": "IHO"}}, "got order 'IHO'"),
        ({"head/kernel": "layers.{}"}, "more {} in 'layers.{}' than stacked dims"),
        ({"head/kernel": "layers.{1}"}, "asks for group 1"),
        ({"layers/query/kernel": {"module": "q", "roles": "sioo"}}, "got 0 {} in 'q', expected 1"),
        ({"layers/query/bias": {"module": "q.{}.{}.{}", "kind": "bias"}}, "expected a stacked dim"),
        (
            {"head/kernel": "a", "layers/query/kernel": {"module": "a.{}", "roles": "sixo"}},
            "got roles",
        ),
    ],
)
def test_a_wrong_map_is_refused(names, text, tmp_path):
    _, lora = fresh()
    with pytest.raises((TargetError, RolesError), match=text):
        peft.save(tmp_path, lora, names)


def test_every_leaf_that_trains_is_written(tmp_path):
    _, lora = fresh()
    names = {k: v for k, v in SCANNED_NAMES.items() if k != "head/kernel"}
    with pytest.raises(TargetError, match=r"head/kernel: a LoraWeight without an entry in `names`"):
        peft.save(tmp_path, lora, names)
    _, lora = fresh(train=["bias"])
    names = {k: v for k, v in SCANNED_NAMES.items() if "bias" not in k}
    with pytest.raises(TargetError, match=r"query/bias: a FullWeight without an entry in `names`"):
        peft.save(tmp_path, lora, names)


def test_what_peft_cannot_hold_is_refused(tmp_path):
    params, lora = fresh()
    head = lora["head"]["kernel"]

    def save(lora, names=SCANNED_NAMES, **kwargs):
        peft.save(tmp_path, lora, names, **kwargs)

    replace = dataclasses.replace
    _, dora = fresh(dora=True)
    with pytest.raises(TargetError, match="got DoRA and plain LoRA in one tree"):
        save(lora | {"layers": dora["layers"]})
    with pytest.raises(TargetError, match=r"got dropout rates \[0.0, 0.5\], expected one"):
        save(lora | {"head": {"kernel": replace(head, dropout=0.5)}})
    nan = replace(head, b=head.b.at[0, 0].set(jnp.nan))
    with pytest.raises(AdapterFileError, match="head/kernel: b: got 1 of 12 values that are NaN"):
        save(lora | {"head": {"kernel": nan}})
    with pytest.raises(TargetError, match="without adapters"):
        save(params)
    with pytest.raises(TargetError, match="got half of a LoraWeight"):
        save(jaxlora.partition(lora)[0])
    with pytest.raises(TargetError, match="got a traced a, expected values"):
        jax.jit(lambda x: save(x))(lora)
    with pytest.raises(TargetError, match="an adapter on a leaf that `names` has of kind 'vector'"):
        save(lora, SCANNED_NAMES | {"head/kernel": {"module": "lm_head", "kind": "vector"}})
    with pytest.raises(TargetError, match="task_type: got 3"):
        save(lora, task_type=3)
    with pytest.raises(TargetError, match="head/kernel: got a LoraWeight, expected plain params"):
        peft.load(tmp_path, lora, SCANNED_NAMES)
    odd = replace(head, a=head.a.astype(jnp.float8_e4m3fn))
    with pytest.raises(TargetError, match="got a of dtype float8_e4m3fn"):
        save(lora | {"head": {"kernel": odd}})
    assert not list(tmp_path.iterdir())


def test_some_of_the_biases_alone_are_refused(tmp_path):
    params = {n: {"kernel": jnp.ones((3, 3)), "bias": jnp.ones(3)} for n in "abc"}
    names = {"./kernel": "{1}", "./bias": {"module": "{1}", "kind": "bias"}}
    names = {f"(.)/{k.split('/')[1]}": v for k, v in names.items()}
    lora = made(params, LoraConfig(rank=1, targets=["a", "b"], train=["a/bias"]))
    with pytest.raises(TargetError, match=r"neither those of all layers.*\n.*b.bias"):
        peft.save(tmp_path, lora, names)
    for bias in ("all", "lora_only"):
        lora = made(params, LoraConfig(rank=1, targets=["a", "b"], bias=bias))
        peft.save(tmp_path, lora, names)
        assert config_of(tmp_path)["bias"] == bias
        assert_same(peft.load(tmp_path, params, names), lora)


def test_a_module_is_saved_whole(tmp_path):
    """The bias of a layer whose kernel trains in full goes with it, frozen or not."""
    params = {n: {"kernel": jnp.ones((3, 3)), "bias": jnp.ones(3)} for n in "ab"}
    names = {"(.)/kernel": "{1}", "(.)/bias": {"module": "{1}", "kind": "bias"}}
    lora = made(params, LoraConfig(rank=1, targets=["a"], train=["b/kernel"]))
    peft.save(tmp_path, lora, names)
    assert config_of(tmp_path)["modules_to_save"] == ["b"]
    assert_same(tensors_of(tmp_path)["base_model.model.b.bias"], np.ones(3, np.float32))
    again = peft.load(tmp_path, params, names)
    assert isinstance(again["b"]["bias"], FullWeight)
    assert_same(again["b"]["kernel"], lora["b"]["kernel"])


def test_tokens_are_the_rows_that_the_map_names(tmp_path):
    m = model("tokens")
    lora = peft.load(ROOT / "tokens", m.params, m.names)
    names = m.names | {"emb/embedding": m.names["emb/embedding"] | {"tokens": [5]}}
    with pytest.raises(TargetError, match=r"got rows that differ from the base's, \[1, 5\]"):
        peft.save(tmp_path, lora, names)
    plain = {k: v for k, v in m.names["emb/embedding"].items() if k != "tokens"} | {"tied": []}
    peft.save(tmp_path, lora, m.names | {"emb/embedding": plain})  # the whole table
    assert config_of(tmp_path)["modules_to_save"] == ["emb"]
    assert_same(peft.load(tmp_path, m.params, m.names), lora)


def test_pytrees_of_other_kinds(tmp_path):
    nnx = pytest.importorskip("flax.nnx")
    state = nnx.State({"head": {"kernel": nnx.Param(jnp.ones((3, 4)))}})
    lora = made(state, LoraConfig(rank=2, targets=["head"]))
    peft.save(tmp_path, lora, {"head/kernel": "lm_head"})
    again = peft.load(tmp_path, state, {"head/kernel": "lm_head"})
    assert jax.tree.structure(again) == jax.tree.structure(lora)
    assert_same(jax.tree.leaves(again), jax.tree.leaves(lora))
    again = peft.load(
        tmp_path, {"params": {"head": {"kernel": jnp.ones((3, 4))}}}, {"head/kernel": "lm_head"}
    )
    assert isinstance(again["params"]["head"]["kernel"], LoraWeight)


def test_pissa_is_initialized_as_here(tmp_path):
    """What `init` with pissa gives, declared as PEFT does, is moved back to where it was."""
    params, _ = fresh()
    config = LoraConfig(rank=2, targets=["head"], initializer=initializers.pissa())
    lora = jaxlora.init(jax.random.key(0), params, config)
    peft.save(tmp_path, lora, SCANNED_NAMES)
    raw = config_of(tmp_path) | {"init_lora_weights": "pissa"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(raw))
    again = peft.load(tmp_path, params, SCANNED_NAMES)
    assert_close(again["head"]["kernel"].w, lora["head"]["kernel"].w)


def test_the_extra_is_named():
    code = (
        "import sys; sys.modules['safetensors'] = None\n"
        "import jaxlora\n"
        "assert 'jaxlora.peft' not in sys.modules\n"
        "try:\n    import jaxlora.peft\n"
        "except ImportError as e:\n    print(e)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'jaxlora[peft]'" in found.stdout


def test_adapters_go_where_the_base_is(tmp_path):
    mesh = jax.make_mesh((2, 2), ("x", "y"))
    params = {
        "up": {"kernel": jnp.ones((2, 8, 4)), "bias": jnp.zeros((2, 4))},
        "alone": {"kernel": jax.device_put(jnp.ones((4, 4)), jax.devices()[1])},
    }
    config = LoraConfig(rank=2, targets=["kernel"], bias="lora_only", roles={"up/kernel": "sio"})
    names = {
        "up/kernel": {"module": "layers.{}.up", "roles": "sio"},
        "up/bias": {"module": "layers.{}.up", "kind": "bias"},
        "alone/kernel": "alone",
    }
    peft.save(tmp_path, made(params, config), names)
    spread = NamedSharding(mesh, P(None, "x", "y"))
    params["up"] = {
        "kernel": jax.device_put(params["up"]["kernel"], spread),
        "bias": jax.device_put(params["up"]["bias"], NamedSharding(mesh, P(None, "y"))),
    }
    loaded = peft.load(tmp_path, params, names)
    assert loaded["up"]["kernel"].a.sharding.spec == P(None, "x", None)
    assert loaded["up"]["kernel"].b.sharding.spec == P(None, None, "y")
    assert loaded["up"]["bias"].value.sharding.spec == P(None, "y")
    assert loaded["alone"]["kernel"].a.devices() == {jax.devices()[1]}


def test_float64_without_x64_is_refused_rather_than_narrowed(copied):
    copy = copied("bert")
    copy.tensors(lambda found: found.update({k: x.astype(np.float64) for k, x in found.items()}))
    with pytest.raises(AdapterFileError, match=r"adapter_model\.safetensors: .*jax_enable_x64"):
        copy.load()


@pytest.mark.parametrize("dora", [False, True])
def test_interleaved_parts(dora, tmp_path):
    """Falcon's: for each of 2 groups 3 heads of queries, one of keys, one of values."""
    groups, size, width = 2, 4, 6
    heads = {"query": 3, "key": 1, "value": 1}
    rng = np.random.default_rng(0)
    params = {
        name: {
            "kernel": jnp.asarray(rng.normal(size=(width, groups * n, size)), jnp.float32),
            "bias": jnp.asarray(rng.normal(size=(groups * n, size)), jnp.float32),
        }
        for name, n in heads.items()
    }
    names: dict[str, Any] = {}
    for part, name in enumerate(heads):
        place = {"module": "h.qkv", "part": part, "interleaved": groups}
        names[f"{name}/kernel"] = {**place, "roles": "ioo"}
        names[f"{name}/bias"] = {**place, "kind": "bias"}
    config = LoraConfig(rank=2, targets=["kernel"], bias="all", roles={"kernel": "ioo"}, dora=dora)
    lora = made(params, config)
    peft.save(tmp_path, lora, names)
    assert_same(jax.jit(jaxlora.merge)(peft.load(tmp_path, params, names)), jaxlora.merge(lora))
    tensors = tensors_of(tmp_path)
    get = lambda key: tensors[f"base_model.model.h.qkv.{key}"].astype(np.float64)
    alpha, rank = (config_of(tmp_path)[x] for x in ("lora_alpha", "r"))

    def theirs(leaf: str) -> np.ndarray:
        """Ours as one tensor, outputs first, dealt out by hand."""
        rows = []
        for group in range(groups):
            for name, n in heads.items():
                x = np.asarray(params[name][leaf], np.float64)
                x = x[..., group * n : (group + 1) * n, :].reshape(*x.shape[:-2], -1)
                rows.append(x.T)
        return np.concatenate(rows)

    merged = theirs("kernel") + alpha / rank * get("lora_B.weight") @ get("lora_A.weight")
    if dora:
        norm = np.linalg.norm(merged, axis=1, keepdims=True)
        merged = get("lora_magnitude_vector")[:, None] * merged / norm
    params = jaxlora.merge(lora)
    np.testing.assert_allclose(theirs("kernel"), merged, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(theirs("bias"), get("base_layer.bias"))
    wrong = {**names, "key/kernel": {**names["key/kernel"], "interleaved": 1}}
    with pytest.raises(TargetError, match="'interleaved' \\[1, 2\\]"):
        peft.save(tmp_path, lora, wrong)
    with pytest.raises(TargetError, match="interleaved"):
        peft.save(tmp_path, lora, {"query/kernel": {"module": "q", "interleaved": 2}})


def test_folded_scales_stay_within_the_dtype(tmp_path):
    """Of float16, what would overflow or vanish is written in float32; nothing is overwritten."""
    params = {name: {"kernel": jnp.ones((4, 4))} for name in ("up", "down")}
    lora = made(params, LoraConfig(rank=2, targets=["up", "down"], dtype=jnp.float16))
    scales = {"up": 4e6, "down": 2e-6}
    lora = {
        name: {"kernel": dataclasses.replace(x["kernel"], scale=jnp.float32(scales[name]))}
        for name, x in lora.items()
    }
    names = {"(up|down)/kernel": "{1}"}
    peft.save(tmp_path, lora, names, for_serving=True)
    found = tensors_of(tmp_path)
    again = peft.load(tmp_path, params, names)
    for name in params:
        assert found[f"base_model.model.{name}.lora_B.weight"].dtype == np.float32
        assert_close(jaxlora.delta(again[name]["kernel"]), jaxlora.delta(lora[name]["kernel"]))


def test_a_head_of_its_own_with_the_copy_that_peft_makes(copied):
    c = copied("llama")
    table = np.asarray(c.model.params["head"]["kernel"]).T.copy()
    rank = config_of(c.directory)["r"]
    rng = np.random.default_rng(0)
    stem = "base_model.model.lm_head"
    more = {
        f"{stem}.lora_A.weight": rng.normal(size=(rank, table.shape[1])).astype(np.float32),
        f"{stem}.lora_B.weight": rng.normal(size=(table.shape[0], rank)).astype(np.float32),
        f"{stem}.base_layer.weight": table,
    }
    c.tensors(lambda found: found.update(more))
    c.set(target_modules=[*config_of(c.directory)["target_modules"], "lm_head", "nowhere"])
    lora = c.load()
    np.testing.assert_array_equal(
        lora["head"]["kernel"].a, more[f"{stem}.lora_A.weight"].T, strict=False
    )
    c.tensors(lambda found: found.update({f"{stem}.base_layer.weight": table + 1}))
    with pytest.raises(AdapterFileError, match=r"lm_head\.base_layer\.weight: got another table"):
        c.load()


def test_it_has_to_be_said_whether_a_table_is_the_head_too(tmp_path):
    params = {"embed": {"embedding": jnp.ones((11, 4))}, "up": {"kernel": jnp.ones((4, 8))}}
    lora = made(params, LoraConfig(rank=2, targets=["embed"]))
    entry = {"module": "model.embed_tokens", "kind": "embedding"}
    with pytest.raises(
        TargetError, match=r"embed/embedding: trains, and no other leaf.*\['tied'\]"
    ):
        peft.save(tmp_path, lora, {"embed/embedding": entry})
    peft.save(tmp_path, lora, {"embed/embedding": {**entry, "tied": []}})
    with pytest.raises(TargetError, match="no other leaf has the 11 rows"):
        peft.load(tmp_path, params, {"embed/embedding": entry})
    own = {**params, "head": {"kernel": jnp.ones((4, 11))}}
    peft.load(tmp_path, own, {"embed/embedding": entry})
    shared = {"embed/embedding": {**entry, "module": "shared", "tied": "lm_head"}}
    with pytest.raises(TargetError, match="PEFT would adapt one alone"):
        peft.save(tmp_path, lora, shared)


@pytest.mark.parametrize(
    ("field", "value"),
    [("sizes", 5), ("tied", 5), ("tied", [1]), ("tokens", 5), ("tokens", [[1]]), ("order", 5)],
)
def test_maps_of_the_wrong_types(field, value, tmp_path):
    params = {"embed": {"embedding": jnp.ones((11, 4))}}
    entry = {"module": "embed", "kind": "embedding", field: value}
    with pytest.raises(TargetError, match=f"got {field}"):
        peft.load(ROOT / "tokens", params, {"embed/embedding": entry})
    with pytest.raises(TargetError, match="without the parameter's"):
        peft.load(ROOT / "tokens", params, {"embed/embedding": "embed.weight"})


def test_not_under_jit():
    m = model("tokens")
    with pytest.raises(TargetError, match=r"peft\.load reads files, outside of jax\.jit"):
        jax.jit(lambda params: peft.load(ROOT / "tokens", params, m.names))(m.params)
