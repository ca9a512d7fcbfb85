"""A model's directory, from a path or from the hub."""

from __future__ import annotations

import os
import re
from pathlib import Path

from models.errors import ModelError

# No folders, and no second copies of the weights, such as Mistral's consolidated.safetensors.
_PATTERNS = [
    "model*.safetensors",
    "model.safetensors.index.json",
    "*config.json",
    "tokenizer.json",
    "special_tokens_map.json",
    "chat_template.jinja",
]
_NOT = ["*/*"]


def fetch(model: str | os.PathLike[str], revision: str | None = None) -> Path:
    """The directory itself, or, of a hub name, one in the cache with that model's files."""
    directory = Path(model)
    if directory.is_dir():
        return directory
    name = str(model)
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith("."):
        raise ModelError(
            f"{name}: is no directory, and no hub name, expected for instance "
            "'HuggingFaceTB/SmolLM2-135M-Instruct'."
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                name, revision=revision, allow_patterns=_PATTERNS, ignore_patterns=_NOT
            )
        )
    except Exception as error:  # of the network, of the hub, of the cache: theirs are many
        raise ModelError(
            f"{name}: is no directory here, and the hub gave none: {type(error).__name__}: {error}"
        ) from error
