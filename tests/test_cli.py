"""`python -m jaxlora`: what PEFT trained, merged into files, is PEFT's model; there and back."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import jax
import numpy as np
import peft_models
import pytest
from peft_models import ROOT, model
from safetensors.numpy import load_file, save_file

from jaxlora.cli import main

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
    """The logits of the merged files are PEFT's to 1e-5; other tensors are bit for bit the base's."""
    tensors = base_tensors(name)
    write_base(tmp_path / "base", tensors, shards=2)
    (tmp_path / "base" / "config.json").write_text(json.dumps(TIED.get(name, {})))
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
