"""config.json: read, and checked field by field."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from models.errors import ModelError

CONFIG = "config.json"


class Fields(NamedTuple):
    """What a config.json says.

    Attributes:
      raw: its fields.
      where: its path, for errors.
    """

    raw: Mapping[str, Any]
    where: str

    def wrong(self, field: str, expected: str) -> ModelError:
        got = self.raw.get(field)
        return ModelError(f"{self.where}: {field}: got {got!r}, expected {expected}.")

    def check_only(self, allowed: Mapping[str, tuple[Any, ...]], file: str) -> None:
        """Fields that change the arithmetic have values that the model of `file` computes."""
        for field, values in allowed.items():
            if field in self.raw and self.raw[field] not in values:
                raise self.wrong(field, f"{values[0]!r}, which is all that models/{file} computes")

    def check_sizes(self, fields: Iterable[str]) -> None:
        for field in fields:
            if not is_size(self.raw.get(field)):
                raise self.wrong(field, "a positive integer")

    def check(self, field: str, kind: Kind) -> None:
        """A field that is there, and not null, is of that kind."""
        value = self.raw.get(field)
        if value is not None and not kind.holds(value):
            raise self.wrong(field, kind.expected)


class Kind(NamedTuple):
    """What a field may be, and how that is said."""

    holds: Callable[[Any], bool]
    expected: str


def is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_size(value: Any) -> bool:
    return is_integer(value) and value > 0


def is_positive(value: Any) -> bool:
    return (is_integer(value) or isinstance(value, float)) and 0 < value < math.inf


SIZE = Kind(is_size, "a positive integer")
COUNT = Kind(lambda value: is_integer(value) and value >= 0, "0 or a positive integer")
POSITIVE = Kind(is_positive, "a positive number")
FLAG = Kind(lambda value: isinstance(value, bool), "true or false")
NAMES = Kind(
    lambda value: isinstance(value, list | tuple) and all(isinstance(v, str) for v in value),
    "a list of names",
)
TOKEN = Kind(is_integer, "the number of a token")
TOKENS = Kind(
    lambda value: all(map(is_integer, value if isinstance(value, list | tuple) else [value])),
    "the number of a token, or a list of them",
)


def read(source: str | os.PathLike[str] | Mapping[str, Any]) -> Fields:
    """Of a config.json, of a directory with one, or of a mapping."""
    if isinstance(source, Mapping):
        return Fields(source, CONFIG)
    path = Path(source) / CONFIG if Path(source).is_dir() else Path(source)
    return Fields(read_json(path), str(path))


def read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise ModelError(f"{path}: expected JSON, got something else: {error}.") from None
    if not isinstance(found, dict):
        raise ModelError(f"{path}: got a {type(found).__name__}, expected an object.")
    return found


def write_json(path: Path, value: Any) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(part, path)
