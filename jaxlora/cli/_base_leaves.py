"""Leaves of a base from tensors with PyTorch's names: some elements, to compare, or all of one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlora._errors import AdapterFileError
from jaxlora._matrix import from_matrix
from jaxlora._weight import FullWeight
from jaxlora.checkpoint._fingerprint import Leaf, checksum_of, sample_places
from jaxlora.peft._layouts import from_parameter, parameter_shape
from jaxlora.peft._names import Map, Piece, Place, Slot

_FLOATS = ("float16", "bfloat16", "float32", "float64")
Read = Callable[[str], "np.ndarray | None"]
"""The tensor of a name, mapped; None if there is none."""


def other_values(base: Mapping[str, Leaf], names: Map, read: Read) -> list[str]:
    """The paths of a map whose tensors have not the values of the base, by its fingerprint.

    A base that was quantized has other values than its files, and parameters of experts have no
    layout in the map: those are not compared.
    """
    return [path for path, slot in names.slots.items() if _differs(base[path], slot, names, read)]


def frozen_beside(names: Map, lora: Mapping[str, Any]) -> list[str]:
    """Frozen leaves of modules of which another leaf trains in full."""
    full = {path for path, leaf in lora.items() if isinstance(leaf, FullWeight)}
    places = [p for p in names.places.values() if any(x.slot.path in full for x in p.pieces)]
    modules = {place.module for place in places if place.kind != "bias"}
    places += [place for place in names.places.values() if place.module in modules]
    beside = [piece.slot.path for place in places for piece in place.pieces]
    return [p for p in dict.fromkeys(beside) if isinstance(lora[p], jax.ShapeDtypeStruct)]


def leaf_of(slot: Slot, names: Map, read: Read, dtype: Any) -> np.ndarray:
    """A whole leaf."""
    inputs = (math.prod(slot.inputs),) if slot.is_matrix else ()
    table = np.empty((*slot.looped, *inputs, slot.outputs), dtype)
    for place, piece in _pieces(slot, names):
        part = _part(place, piece, read)
        if part is None:
            raise AdapterFileError(
                f"{slot.path}: is frozen, and {place.module}.{place.parameter} is no tensor of the "
                f"base, expected it of shape {parameter_shape(place)}, since another leaf of that "
                "module trains in full."
            )
        table[piece.index][..., piece.start : piece.stop] = part
    value = from_matrix(table, slot.shape, slot.roles) if slot.is_matrix else table
    return np.asarray(value).reshape(slot.shape)


def _pieces(slot: Slot, names: Map) -> list[tuple[Place, Piece]]:
    places = (names.places[module, slot.entry.parameter] for module in slot.modules.flat)
    return [(place, piece) for place in places for piece in place.pieces if piece.slot is slot]


def _part(place: Place, piece: Piece, read: Read) -> np.ndarray | None:
    """(I, outputs of the piece), or a vector of them."""
    found = read(f"{place.module}.{place.parameter}")
    if found is None or found.shape != parameter_shape(place):
        return None
    return from_parameter(place, found)[..., piece.at : piece.at + piece.stop - piece.start]


def _differs(known: Leaf, slot: Slot, names: Map, read: Read) -> bool:
    if known.kind not in _FLOATS or slot.entry.kind == "parameter":
        return False
    index = sample_places(slot.shape)
    roles = slot.roles or "s" * len(slot.looped) + "o" * (len(slot.shape) - len(slot.looped))
    layer, row, column = (_flat(index, slot.shape, roles, letter) for letter in "sio")
    values = np.zeros(len(column), jnp.dtype(known.kind))
    for place, piece in _pieces(slot, names):
        at = int(np.ravel_multi_index(piece.index, slot.looped)) if slot.looped else 0
        here = (layer == at) & (piece.start <= column) & (column < piece.stop)
        if not here.any():
            continue
        part = _part(place, piece, read)
        if part is None:
            return True
        column_of = column[here] - piece.start
        values[here] = part[row[here], column_of] if slot.is_matrix else part[column_of]
    return checksum_of(values) != known.checksum


def _flat(index: Any, shape: tuple[int, ...], roles: str, letter: str) -> np.ndarray:
    """Row-major over the dims of one role."""
    dims = [d for d, role in enumerate(roles) if role == letter]
    if not dims:
        return np.zeros(len(index[0]), np.int64)
    return np.ravel_multi_index([index[d] for d in dims], [shape[d] for d in dims])
