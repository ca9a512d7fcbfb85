"""An encoder's tokenizer, without the padding and truncation that its file may ask for."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from models.errors import ModelError


def read(path: str | os.PathLike[str]) -> Any:
    """The `tokenizers.Tokenizer` of a tokenizer.json, or of a directory with one.

    Its `encode(text, pair)` gives `ids`, `type_ids`, `offsets`, as long as the text is.

    Raises:
      ModelError: there is no such file, or it is no tokenizer.
    """
    from tokenizers import Tokenizer

    path = Path(path)
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        raise ModelError(
            f"{path}: is not there, expected the file that Transformers' fast tokenizers save: "
            "AutoTokenizer.from_pretrained(...).save_pretrained(directory)."
        )
    try:
        found = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exceptions
        raise ModelError(f"{path}: expected a tokenizer.json: {error}.") from None
    found.no_padding()
    found.no_truncation()
    return found
