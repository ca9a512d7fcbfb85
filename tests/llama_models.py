"""The small models of tests/references/llama.npz: weights that Transformers and we both make.

    python tests/oracle/llama.py                     # writes the references, with Transformers
    python tests/llama_models.py DIRECTORY           # exports each, with an adapter
    python tests/oracle/llama.py --check DIRECTORY   # Transformers and PEFT open them

Weights are drawn by name from NumPy's RandomState, whose streams never change, so that the file
holds names, shapes, inputs and logits alone. Transformers' environment has no JAX: it is imported
where it is needed.
"""

from __future__ import annotations

import json
import pathlib
import sys
import zlib
from typing import Any, NamedTuple

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent
FILE = ROOT / "references" / "llama.npz"


class Reference(NamedTuple):
    """What Transformers has and gives.

    Attributes:
      config: its config.json.
      shapes: {name: shape} of the tensors it saves.
      tokens: (2, T).
      logits: (2, T, V) float32, of all tokens.
      start: how many tokens of the second row are padding, in `padded`.
      padded: (T - start, V), the second row's logits with that padding on its left.
    """

    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    tokens: np.ndarray
    logits: np.ndarray
    start: int
    padded: np.ndarray


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The values of a tensor, by its name."""
    draw = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    if "norm" in name:
        return (1 + 0.2 * draw).astype(np.float32)
    return (0.25 * draw).astype(np.float32)


def references() -> dict[str, Reference]:
    with np.load(FILE) as saved:
        cases = json.loads(str(saved["cases"]))
        return {
            name: Reference(
                case["config"],
                {k: tuple(v) for k, v in case["shapes"].items()},
                saved[f"{name}/tokens"],
                saved[f"{name}/logits"],
                case["start"],
                saved[f"{name}/padded"],
            )
            for name, case in cases.items()
        }


def write(reference: Reference, directory: pathlib.Path) -> pathlib.Path:
    """The directory that Transformers' save_pretrained would have written."""
    from safetensors.numpy import save_file

    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(reference.config))
    tensors = {name: weight(name, shape) for name, shape in reference.shapes.items()}
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


def export(directory: pathlib.Path) -> None:
    """Each model as `hf.save` writes it, with an adapter that `jaxlora.peft` saved."""
    import jax

    sys.path[:0] = [str(ROOT.parent), str(ROOT.parent / "examples")]
    from helpers import randomized
    from models import hf, llama

    import jaxlora
    from jaxlora import peft

    for name, reference in references().items():
        here = directory / name
        config, params = hf.load(write(reference, here / "source"))
        model = llama.Llama(config)
        targets = "all-linear" if config.tie_word_embeddings else ["q_proj", "down_proj", "lm_head"]
        roles = jaxlora.trace_roles(model.apply, {"params": params}, reference.tokens)
        if name == "qwen3":  # an adapter of the tied table: of lookup and head
            targets = ["embed_tokens", "v_proj"]
        lora_config = jaxlora.LoraConfig(rank=2, alpha=3, targets=targets)
        lora = jaxlora.init(jax.random.key(0), params, lora_config, roles=roles)
        lora = randomized(lora)
        limit = 20_000 if name == "mistral" else 10**9  # shards and an index
        hf.save(here, config, params, max_shard_bytes=limit)
        peft.save(here / "adapter", lora, llama.names(config), task_type="CAUSAL_LM")
        apply = jax.jit(jaxlora.lora_apply(model.apply))
        np.savez(
            here / "expected.npz",
            tokens=reference.tokens,
            logits=apply({"params": params}, reference.tokens),
            adapted=apply({"params": lora}, reference.tokens),
        )
        print(f"{here}: {sorted(p.name for p in here.iterdir())}")


if __name__ == "__main__":
    export(pathlib.Path(sys.argv[1]))
