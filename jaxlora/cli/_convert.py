"""An adapter of `jaxlora.checkpoint` as PEFT's directory, and back."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from jaxlora import checkpoint, peft
from jaxlora._errors import TargetError
from jaxlora._weight import FullWeight
from jaxlora.cli._base_leaves import frozen_beside
from jaxlora.cli._read import (
    check_new,
    is_peft,
    lora_without_base,
    read_names,
    read_params,
    read_saved,
)
from jaxlora.peft._names import Map


def convert(
    source: pathlib.Path,
    out: pathlib.Path,
    names: pathlib.Path,
    *,
    base: pathlib.Path | None,
    allow: Sequence[str],
    base_model_name: str | None,
    task_type: str | None,
    for_serving: bool,
) -> str:
    """Writes the adapter in the other format; returns what to say of it."""
    check_new(out)
    mapping = read_names(names)
    params = None if base is None else read_params(base)
    if not is_peft(source):
        how = {
            "base_model_name": base_model_name,
            "task_type": task_type,
            "for_serving": for_serving,
        }
        to_peft(source, out, mapping, params, **how)
        return f"{out}: PEFT's directory, from a checkpoint of jaxlora"
    if params is None:
        raise TargetError(
            "--base: missing, expected the params that the adapter goes on: a checkpoint of "
            "jaxlora knows its base by a fingerprint."
        )
    if base_model_name or task_type or for_serving:
        raise TargetError(
            "--base-model-name, --task-type, --for-serving: are of PEFT's directories, expected "
            f"none of them, since {source} is one and becomes a checkpoint."
        )
    checkpoint.save(out, peft.load(source, params, mapping, allow=allow))
    return f"{out}: a checkpoint of jaxlora, from PEFT's directory"


def to_peft(
    source: pathlib.Path,
    out: pathlib.Path,
    names: Mapping[str, Any],
    params: Mapping[str, Any] | None = None,
    **how: Any,
) -> None:
    """Writes a checkpoint's adapter as PEFT's directory; without params, from its shapes alone."""
    if params is not None:
        lora = checkpoint.restore(source, params)
    else:
        lora = lora_without_base(read_saved(source))
        _check_values(lora, names)
    peft.save(out, lora, names, **how)


def _check_values(lora: Mapping[str, Any], names: Mapping[str, Any]) -> None:
    """Raises where the base's values have to be known."""
    known = Map(names, lora, _roles(lora))
    for path in frozen_beside(known, lora):
        raise TargetError(
            f"{path}: is frozen, and another leaf of its module trains in full, which PEFT saves "
            "as a whole, expected the base to take it from: --base PARAMS."
        )
    for path, slot in known.slots.items():
        if slot.entry.tokens and isinstance(lora[path], FullWeight):
            raise TargetError(
                f"{path}: `tokens` of the map says that some rows alone train, expected the base "
                "to compare the others with: --base PARAMS."
            )


def _roles(lora: Mapping[str, Any]) -> dict[str, str]:
    return {path: leaf.roles for path, leaf in lora.items() if hasattr(leaf, "roles")}
