"""What a directory trains in full: modules_to_save, biases, rows of embeddings."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxlora._errors import AdapterFileError
from jaxlora._matrix import to_matrix
from jaxlora._quantized import dense
from jaxlora._weight import FullWeight
from jaxlora.peft._config import has_tail, is_saved, optional_heads
from jaxlora.peft._layouts import (
    check_kind_in_full,
    from_parameter,
    keys,
    parameter_shape,
    to_parameter,
)
from jaxlora.peft._names import Place, Slot
from jaxlora.peft._reading import PREFIX, Reading, matrices, vectors, whole


def full_weights(r: Reading) -> dict[str, FullWeight]:
    """The leaves that train in full, by path."""
    values = _saved(r) | _biases(r)
    _lora_biases(r, values)
    found = {}
    for slot in r.names.slots.values():
        full = _full(r, slot, values)
        if full is not None:
            found[slot.path] = full
    _check_bases(r, values)
    for slot, rows, value in _tokens(r):
        if slot.path in found:
            raise AdapterFileError(
                f"{r.config.file}: trainable_token_indices: {slot.path} is saved in full, or named "
                "twice, expected one of them."
            )
        w = r.leaves[slot.path]
        table = np.array(to_matrix(w, slot.roles)).astype(_wide(value))
        table[list(rows)] = value
        found[slot.path] = FullWeight(w=w, value=whole(slot, table, w))
    return found


def _check_bases(r: Reading, values: Mapping[tuple[str, str], np.ndarray]) -> None:
    """PEFT saves the embeddings of a model whose vocabulary was resized: they must be ours."""
    for at, place in r.names.places.items():
        if place.slot.is_matrix and len(place.pieces) == 1 and at not in values:
            r.check_base(place, f"{PREFIX}{place.module}.{place.parameter}")


def _saved(r: Reading) -> dict[tuple[str, str], np.ndarray]:
    """The parameters of modules_to_save."""
    values, hit = {}, set()
    for at, place in r.names.places.items():
        by = [n for n in r.config.saved if is_saved(place.module, n)]
        if not by:
            continue
        hit.update(by)
        stem = f"{PREFIX}{place.module}"
        check_kind_in_full(place, f"{r.config.file}: modules_to_save")
        why = f"{by[0]} is among modules_to_save"
        shape = parameter_shape(place)
        values[at] = r.tensors.take(f"{stem}.{place.parameter}", shape, why)
        again = f"{stem}.modules_to_save.{place.parameter}"  # which PEFT adds with bias="all"
        if again in r.tensors and not np.array_equal(r.tensors.take(again, shape, why), values[at]):
            raise AdapterFileError(
                f"{r.tensors.file}: {again}: got other values than in "
                f"{stem}.{place.parameter}, expected the same."
            )
        base = f"{stem}.original_module.{place.parameter}"
        if base in r.tensors:
            r.tensors.take(base, shape, why)  # the base's, which PEFT does not use
    hit |= {n for head in r.names.tied for n in r.config.saved if is_saved(head, n)}
    missing = [n for n in r.config.saved if n not in hit]
    if hit:
        missing = [n for n in missing if n not in optional_heads(missing)]
    if missing:
        raise AdapterFileError(
            f"{r.config.file}: modules_to_save: {missing[0][:200]!r} is no module that the "
            f"map leads to, expected each to be one. {r.names.entry_hint()}"
        )
    return values


def _biases(r: Reading) -> dict[tuple[str, str], np.ndarray]:
    values: dict[tuple[str, str], np.ndarray] = {}
    if r.config.bias == "none":
        return values
    for at, place in r.names.places.items():
        if place.kind != "bias" or any(is_saved(place.module, n) for n in r.config.saved):
            continue
        target = place.module in r.targets
        if not target and r.config.bias == "lora_only":
            continue
        inner = "base_layer." if target else ""
        key = f"{PREFIX}{place.module}.{inner}{place.parameter}"
        why = f"bias is {r.config.bias!r}"
        values[at] = r.tensors.take(key, parameter_shape(place), why)
    return values


def _lora_biases(r: Reading, values: dict[tuple[str, str], np.ndarray]) -> None:
    """lora_bias: scale times a vector is added to the outputs, so to the layer's bias."""
    if not r.config.lora_bias:
        return
    for name, place in r.targets.items():
        key = keys(place)["bias"]
        if place.kind in ("embedding", "parameter"):
            raise AdapterFileError(
                f"{r.config.file}: lora_bias with {name}, of kind {place.kind!r}, expected "
                "it on linear layers and convolutions alone, as PEFT does."
            )
        added = r.tensors.take(key, (place.outputs,), "lora_bias is set")
        bias = r.names.places.get((place.module, "bias"))
        if bias is None:
            raise AdapterFileError(
                f"{r.tensors.file}: {key}: {name} has a bias of its own (lora_bias), and "
                "the map leads to no bias of that layer to hold it. If the layer has one, give it "
                f"an entry: names[...] = {{'module': {name!r}, 'kind': 'bias'}}. If it has "
                "none, the adapter cannot be represented."
            )
        at = place.module, "bias"
        base = values[at] if at in values else _base_vector(r, bias)
        scale = np.float32(r.strengths[name][1])
        values[at] = np.asarray(base, _wide(base)) + scale * np.asarray(added, _wide(added))


def _base_vector(r: Reading, place: Place) -> np.ndarray:
    found = []
    for p in place.pieces:
        table = vectors(p.slot, np.asarray(dense(r.leaves[p.slot.path])))
        found.append(table[p.index][p.start : p.stop])
    return to_parameter(place, np.concatenate(found))


def _full(
    r: Reading, slot: Slot, values: Mapping[tuple[str, str], np.ndarray]
) -> FullWeight | None:
    """A FullWeight of the parameters that the file has, the rest as in the base."""
    wanted = [(m, slot.entry.parameter) for m in slot.modules.flat]
    if not any(at in values for at in wanted):
        return None
    w = r.leaves[slot.path]
    base = np.asarray(dense(w))
    table = np.array(matrices(slot, w)) if slot.is_matrix else vectors(slot, base).copy()
    for at in wanted:
        if at not in values:
            continue
        place = r.names.places[at]
        found = from_parameter(place, values[at])
        table = table.astype(np.result_type(table, found))
        for p in place.pieces:
            if p.slot is slot:
                size = p.stop - p.start
                table[p.index][..., p.start : p.stop] = found[..., p.at : p.at + size]
    return FullWeight(w=w, value=whole(slot, table, w))


def _tokens(r: Reading) -> list[tuple[Slot, tuple[int, ...], np.ndarray]]:
    """Rows of embeddings that the adapter replaces."""
    tokens = r.config.tokens
    if tokens is None:
        return []
    tables = [p for p in r.names.places.values() if p.kind == "embedding"]
    suffix = ".token_adapter.trainable_tokens_delta"
    if isinstance(tokens, dict):
        chosen = []
        for name, rows in tokens.items():
            hit = [p for p in tables if has_tail(p.module, name)]
            if len(hit) != 1:
                raise AdapterFileError(
                    f"{r.config.file}: trainable_token_indices: {name[:200]!r} is "
                    f"{len(hit)} embeddings of the map, expected one. Entries of kind "
                    "'embedding' count."
                )
            chosen.append((hit[0], rows))
    else:
        hit = [p for p in tables if f"{PREFIX}{p.module}{suffix}" in r.tensors]
        if len(hit) != 1:
            raise AdapterFileError(
                f"{r.tensors.file}: trainable_token_indices: got {len(hit)} embeddings of "
                f"the map with a key that ends in {suffix}, expected one."
            )
        chosen = [(hit[0], tokens)]
    found = []
    for place, rows in chosen:
        size = math.prod(place.slot.inputs)
        if len({*rows}) < len(rows) or max(rows, default=0) >= size or place.slot.looped:
            raise AdapterFileError(
                f"{r.config.file}: trainable_token_indices: expected different rows of "
                f"{place.module}, below {size}, got {str(rows)[:200]}."
            )
        key = f"{PREFIX}{place.module}{suffix}"
        shape = len(rows), place.outputs
        found.append((place.slot, rows, r.tensors.take(key, shape, f"{rows} train"[:200])))
    return found


def _wide(x: np.ndarray) -> Any:
    return np.float64 if x.dtype == np.float64 else np.float32
