"""The small models of tests/references/bert.npz: weights that Transformers and we both make.

    python tests/oracle/bert.py                      # writes the references, with Transformers
    python tests/bert_models.py DIRECTORY            # exports each, with an adapter
    python tests/oracle/bert.py --check DIRECTORY    # Transformers and PEFT open them

Weights are drawn by name from NumPy's RandomState, so that the file holds names, shapes, inputs and
outputs alone. Transformers' environment has no JAX: it is imported where it is needed.
"""

from __future__ import annotations

import json
import pathlib
import sys
import zlib
from typing import Any, NamedTuple

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent
FILE = ROOT / "references" / "bert.npz"


class Reference(NamedTuple):
    """What Transformers has and gives.

    Attributes:
      config: its config.json.
      shapes: {name: shape} of the tensors it saves.
      inputs: tokens, mask, and token_types where there are some, each (3, T): a whole row, one
        padded on the right, one padded on the left.
      outputs: logits (3, C); or start and end, (3, T); or hidden (3, T, D), and pooled (3, D).
    """

    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    inputs: dict[str, np.ndarray]
    outputs: dict[str, np.ndarray]


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The values of a tensor, by its name."""
    draw = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    if "norm" in name.lower():
        return (1 + 0.2 * draw).astype(np.float32)
    return (0.3 * draw).astype(np.float32)


def references() -> dict[str, Reference]:
    with np.load(FILE) as saved:
        cases = json.loads(str(saved["cases"]))

        def arrays(start: str) -> dict[str, np.ndarray]:
            return {k.removeprefix(start): saved[k] for k in saved.files if k.startswith(start)}

        return {
            name: Reference(
                case["config"],
                {k: tuple(v) for k, v in case["shapes"].items()},
                arrays(f"{name}/in/"),
                arrays(f"{name}/out/"),
            )
            for name, case in cases.items()
        }


def write(
    reference: Reference, directory: pathlib.Path, more: dict[str, Any] | None = None
) -> pathlib.Path:
    """The directory that Transformers' save_pretrained would have written, with more tensors.

    Of those that are None, there are none.
    """
    from safetensors.numpy import save_file

    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(reference.config))
    tensors = {name: weight(name, shape) for name, shape in reference.shapes.items()}
    tensors |= more or {}
    kept = {name: value for name, value in tensors.items() if value is not None}
    save_file(kept, directory / "model.safetensors", {"format": "pt"})
    return directory


def named(config: Any, found: Any) -> dict[str, Any]:
    """What a model returned, as in `Reference.outputs`."""
    if config.head == "qa":
        return {"start": found[0], "end": found[1]}
    if config.head is not None:
        return {"logits": found}
    return {"hidden": found[0]} | ({} if found[1] is None else {"pooled": found[1]})


def adapter_config(name: str, config: Any) -> Any:
    """Of each model another: by the recipes' kinds of leaves, and by some of their own."""
    import encoder_recipes
    from models.bert import ROLES

    import jaxlora

    head = encoder_recipes.head_of(config)
    if name.endswith("_qa"):
        return encoder_recipes.peft(config)
    if name == "bert":  # the table and the pooler
        targets = ["word_embeddings", "pooler/dense", "key"]
        return jaxlora.LoraConfig(rank=2, targets=targets, roles=ROLES)
    if name == "distilbert":
        return jaxlora.LoraConfig(rank=3, targets=["query"], bias="lora_only", roles=ROLES)
    if name == "roberta_classifier":
        return encoder_recipes.from_scratch(config, rank=2)
    return jaxlora.LoraConfig(rank=2, targets=["query", "value"], train=head or None, roles=ROLES)


def export(directory: pathlib.Path) -> None:
    """Each model as `hf.save` writes it, with an adapter that `jaxlora.peft` saved."""
    import jax

    sys.path[:0] = [str(ROOT.parent), str(ROOT.parent / "examples")]
    from helpers import randomized
    from models import bert, hf

    import jaxlora
    from jaxlora import peft

    for name, reference in references().items():
        here = directory / name
        config, params = hf.load(write(reference, here / "source"))
        model = bert.model_of(config)
        lora = jaxlora.init(jax.random.key(0), params, adapter_config(name, config))
        lora = randomized(lora)
        hf.save(here, config, params)
        peft.save(here / "adapter", lora, bert.names(config))
        apply = jax.jit(jaxlora.lora_apply(model.apply))
        before = named(config, apply({"params": params}, **reference.inputs))
        after = named(config, apply({"params": lora}, **reference.inputs))
        np.savez(
            here / "expected.npz",
            **{f"in/{key}": value for key, value in reference.inputs.items()},
            **{f"out/{key}": value for key, value in before.items()},
            **{f"adapted/{key}": value for key, value in after.items()},
        )
        print(f"{here}: {sorted(p.name for p in here.iterdir())}")


if __name__ == "__main__":
    export(pathlib.Path(sys.argv[1]))
