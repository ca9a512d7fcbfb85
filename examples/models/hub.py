"""A model's directory, from a path or from the hub."""

from __future__ import annotations

import os
import re
from pathlib import Path

from models.errors import ModelError

# No folders, and no second copies of the weights, such as Mistral's consolidated.safetensors.
_WEIGHTS = "model*.safetensors"
_PATTERNS = [
    _WEIGHTS,
    "model.safetensors.index.json",
    "*config.json",
    "tokenizer.json",
    "special_tokens_map.json",
    "chat_template.jinja",
]
_NOT = ["*/*"]


def fetch(model: str | os.PathLike[str], revision: str | None = None) -> Path:
    """The directory itself, or, of a hub name, one in the cache with that model's files.

    Raises:
      ModelError: it is neither, the hub cannot be reached, or its model has no such weights.
    """
    directory = Path(model)
    if directory.is_dir():
        return directory
    name = str(model)
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith("."):
        raise ModelError(
            f"{name}: is no directory, and no hub name, expected for instance "
            "'HuggingFaceTB/SmolLM2-135M-Instruct'."
        )
    import huggingface_hub

    try:
        directory = Path(
            huggingface_hub.snapshot_download(
                name, revision=revision, allow_patterns=_PATTERNS, ignore_patterns=_NOT
            )
        )
        if any(directory.glob(_WEIGHTS)):
            return directory
        listed = huggingface_hub.HfApi().list_repo_files(name, revision=revision)
    except Exception as error:  # of the network, of the hub, of the cache: theirs are many
        raise ModelError(
            f"{name}: is no directory here, and the hub gave none: {type(error).__name__}: {error}"
        ) from error
    more = f" and {len(listed) - 20} more" if len(listed) > 20 else ""
    raise ModelError(
        f"{name}: has no {_WEIGHTS}, expected the files that Transformers' save_pretrained writes. "
        f"It has {', '.join(listed[:20])}{more}."
    )
