"""A table of an adapter: what it is, and how large."""

from __future__ import annotations

import collections
import json
import math
import pathlib
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxlora._errors import AdapterFileError
from jaxlora._matrix import factors_to_matrix
from jaxlora.cli._read import is_peft, read_saved
from jaxlora.cli._table import table
from jaxlora.peft import _config, _files
from jaxlora.peft._config import has_tail
from jaxlora.peft._strengths import strengths

_STEM = "base_model.model."
_PAIRS = {".lora_A.weight": ".lora_B.weight", ".lora_embedding_A": ".lora_embedding_B"}
_BESIDE = (".lora_magnitude_vector", ".lora_B.bias")
_MOST = 12  # names in a line
_ESCAPES = re.compile(r"^\^|\\(?=[^\w\s])")  # of a pattern that is an exact name
_INNER = re.compile(r"\.(base_layer|modules_to_save|original_module)(?=\.|$)")


class Row(NamedTuple):
    """One tensor, or pair of factors.

    Attributes:
      name: of the weight.
      kind: LoRA, DoRA, in full, or a copy of what is elsewhere.
      shape: of the change, inputs and outputs, or of the value.
      rank: None in full.
      scale: None in full; (least, largest).
      dtype: of the arrays.
      parameters: how many train.
      nbytes: what they take.
      norms: |A|, |B| and |scale A B| (Frobenius), or of a value its own as the last.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    rank: int | None
    scale: tuple[float, float] | None
    dtype: str
    parameters: int
    nbytes: int
    norms: tuple[float | None, float | None, float | None]


def inspect(directory: pathlib.Path, *, every: bool, as_json: bool) -> str:
    """The table, or JSON with the same.

    Raises:
      AdapterFileError: it is damaged, or no plain LoRA.
    """
    header, rows = _of_peft(directory) if is_peft(directory) else _of_checkpoint(directory)
    header["parameters"] = sum(row.parameters for row in rows)
    header["bytes"] = sum(row.nbytes for row in rows)
    if as_json:
        return json.dumps({**header, "weights": [row._asdict() for row in rows]}, indent=2)
    said = {key: value for key, value in header.items() if value not in (None, {}, [])}
    lines = [f"{key}: {_text(value)}" for key, value in said.items()]
    return "\n".join([*lines, "", _table(rows, every)])


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return _text([f"{re.sub(_ESCAPES, '', str(key))} {_text(x)}" for key, x in value.items()])
    if isinstance(value, list | tuple):
        alike = collections.Counter(_any_layer(_text(x)) for x in value)
        named = [_text(x) for x in value] if len(value) <= _MOST else [*alike]
        more = f", and {len(named) - _MOST} more" if len(named) > _MOST else ""
        return ", ".join(named[:_MOST]) + more
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _table(rows: list[Row], every: bool) -> str:
    head = ("weight", "kind", "shape", "rank", "scale", "dtype", "parameters", "|A|", "|B|", "|dW|")
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        name = row.name if every else _any_layer(row.name)
        groups.setdefault((name, *row[1:6]), []).append(row)
    lines = []
    for (name, kind, shape, rank, scale, dtype), alike in groups.items():
        lines.append(
            (
                alike[0].name if len(alike) == 1 else f"{name} ({len(alike)})",
                kind,
                str(shape),
                "" if rank is None else str(rank),
                "" if scale is None else _range(scale),
                dtype,
                f"{sum(row.parameters for row in alike):,}",
                *(_range([row.norms[k] for row in alike]) for k in range(3)),
            )
        )
    return table([head, *lines], right=range(3, 10))


def _any_layer(name: str) -> str:
    """A name with its numbers left open.

    >>> _any_layer("model.layers.12.mlp.w1")
    'model.layers.*.mlp.w1'
    """
    return re.sub(r"(?<![^./])\d+(?![^./])", "*", name)


def _range(values: Sequence[float | None]) -> str:
    known = [x for x in values if x is not None]
    if not known:
        return ""
    low, high = f"{min(known):.4g}", f"{max(known):.4g}"
    return low if low == high else f"{low}..{high}"


def _norm(x: np.ndarray) -> float:
    return float(np.linalg.norm(x.astype(np.float64).reshape(-1)))


def _norm_of_product(a: np.ndarray, b: np.ndarray, scale: Any) -> float:
    """|scale a b| of (..., I, R) and (..., R, O), by the R x R matrices a^T a and b b^T."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    grams = np.swapaxes(a, -1, -2) @ a * (b @ np.swapaxes(b, -1, -2))
    squared = np.sum(grams, axis=(-1, -2)) * np.asarray(scale, np.float64) ** 2
    return math.sqrt(max(0.0, float(np.sum(squared))))


# --------------------------------------------------------------------------------------------------
# PEFT's


def _of_peft(directory: pathlib.Path) -> tuple[dict[str, Any], list[Row]]:
    raw = _files.read_config(directory)
    config = _config.parse(raw, str(directory / _files.CONFIG))
    tensors = _files.read_tensors(directory)
    targets = config.targets or ()
    header = {
        "format": f"PEFT {raw.get('peft_version') or ''}".rstrip(),
        "base": raw.get("base_model_name_or_path"),
        "task": raw.get("task_type"),
        "rank": config.rank,
        "alpha": config.alpha,
        "scaling": "rsLoRA, alpha / sqrt(rank)" if config.rslora else "alpha / rank",
        "ranks of some": config.rank_pattern,
        "alphas of some": config.alpha_pattern,
        "dropout": config.dropout or None,
        "bias": None if config.bias == "none" else config.bias,
        "targets": targets if isinstance(targets, str) else sorted(targets),
        "target parameters": sorted(config.parameters),
        "modules to save": sorted(config.saved),
        "initialization": config.init,
    }  # fmt: skip
    return header, _rows(config, str(directory / _files.WEIGHTS), tensors)


def _rows(config: _config.Config, file: str, tensors: dict[str, np.ndarray]) -> list[Row]:
    left = {key.removeprefix(_STEM): x for key, x in tensors.items()}
    keys = [key.removesuffix(first) for first in _PAIRS for key in left if key.endswith(first)]
    strength = strengths(config, {name for key in keys for name in _names(config, key)})
    rows = []
    for first, second in _PAIRS.items():
        for key in sorted(key for key in left if key.endswith(first)):
            name = key.removesuffix(first)
            if name + second not in left:
                raise AdapterFileError(
                    f"{file}: {_STEM}{name}{second}: missing, expected it beside {first[1:]}."
                )
            pair = left.pop(key), left.pop(name + second)
            extra = [left.pop(name + end, None) for end in _BESIDE]
            of = [strength[x] for x in _names(config, name)]
            rows.append(_pair(config, f"{file}: {_STEM}{name}", name, of, *pair, *extra))
    return rows + [_full(config, key, x) for key, x in sorted(left.items())]


def _full(config: _config.Config | None, key: str, x: np.ndarray) -> Row:
    """What is not of a pair: trained in full, or a copy that PEFT puts beside what it trained."""
    name = _INNER.sub("", key)
    biases = config is not None and config.bias != "none" and name.endswith(".bias")
    again = bool(re.search(r"\.(original_module|modules_to_save)\.", key))
    copy = again or (".base_layer." in key and not biases)
    kind = "a copy" if copy else "in full"
    norms = None, None, _norm(x)
    return Row(
        name, kind, x.shape, None, None, str(x.dtype), 0 if copy else x.size, x.nbytes, norms
    )


def _names(config: _config.Config, key: str) -> list[str]:
    """What the configuration may call a pair: a module, or one of its parameters."""
    name = _INNER.sub("", key)
    parameters = [p.rpartition(".") for p in config.parameters]
    return [f"{name}.{p}" for parent, _, p in parameters if has_tail(name, parent)] or [name]


def _pair(
    config: _config.Config,
    where: str,
    key: str,
    strength: list[tuple[int, float]],
    a: np.ndarray,
    b: np.ndarray,
    magnitude: np.ndarray | None,
    bias: np.ndarray | None,
) -> Row:
    if a.ndim < 2 or b.ndim != a.ndim or a.shape[0] != b.shape[1]:
        raise AdapterFileError(
            f"{where}: got A of shape {a.shape} and B of {b.shape}, expected (rank, in) and (out, "
            "rank)."
        )
    name = _INNER.sub("", key)
    many = any(has_tail(name, p.rpartition(".")[0]) for p in config.parameters)  # experts in a row
    known = {(r, s) for r, s in strength if a.shape[0] == r or (many and a.shape[0] % r == 0)}
    if not known:
        raise AdapterFileError(
            f"{where}: got rank {a.shape[0]} in A, expected that of {_files.CONFIG}, "
            f"{strength[0][0]}."
        )
    rank, scale = known.pop() if len(known) == 1 else (None, None)  # which parameter's it is
    change = None
    if rank is not None:
        experts = a.shape[0] // rank
        each = a.reshape(experts, rank, -1), b.reshape(b.shape[0], rank, experts)
        change = _norm_of_product(each[0].swapaxes(1, 2), each[1].transpose(2, 1, 0), scale)
    arrays = [x for x in (a, b, magnitude, bias) if x is not None]
    return Row(
        name=name,
        kind="LoRA" if magnitude is None else "DoRA",
        shape=(*a.shape[1:], b.shape[0]),
        rank=rank,
        scale=None if scale is None else (scale, scale),
        dtype=str(a.dtype),
        parameters=sum(x.size for x in arrays),
        nbytes=sum(x.nbytes for x in arrays),
        norms=(_norm(a), _norm(b), change),
    )


# --------------------------------------------------------------------------------------------------
# jaxlora's


def _of_checkpoint(directory: pathlib.Path) -> tuple[dict[str, Any], list[Row]]:
    description, arrays = read_saved(directory)
    adapters = description.adapters
    config = description.config or {}
    header = {
        "format": f"jaxlora {description.versions['jaxlora']} (JAX {description.versions['jax']})",
        "base": f"{len(description.base):,} leaves",
        "config": {k: v for k, v in config.items() if v not in (None, [], {}, "", False)},
        "dropout": sorted({x.dropout for x in adapters.values() if x.dropout}),
    }
    rows = []
    for path, adapter in adapters.items():
        found = arrays[path]
        if adapter.kind == "full":
            rows.append(_full(None, path, found["value"]))
            continue
        shape = description.base[path].shape or ()
        a, b = factors_to_matrix(found["a"], found["b"], shape, adapter.roles)
        scale = np.asarray(adapter.scale, np.float64)
        trained = [found[name] for name in ("a", "b", "magnitude") if name in found]
        rows.append(
            Row(
                name=path,
                kind="LoRA" if adapter.kind == "lora" else "DoRA",
                shape=shape,
                rank=a.shape[-1],
                scale=(float(scale.min()), float(scale.max())) if scale.size else None,
                dtype=str(a.dtype),
                parameters=sum(x.size for x in trained),
                nbytes=sum(x.nbytes for x in trained),
                norms=(_norm(a), _norm(b), _norm_of_product(a, b, scale)),
            )
        )
    return header, rows
