"""Whether tensors with PyTorch's names are the base that an adapter of jaxlora was trained on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxlora.checkpoint._fingerprint import Leaf, checksum_of, sample_places
from jaxlora.peft._layouts import from_parameter
from jaxlora.peft._names import Map, Slot

_FLOATS = ("float16", "bfloat16", "float32", "float64")


def other_values(
    base: Mapping[str, Leaf],
    paths: Iterable[str],
    names: Map,
    read: Callable[[str], np.ndarray],
) -> list[str]:
    """The paths whose tensors have not the values of the base; by the fingerprint's samples.

    A base that was quantized has other values than its files, and parameters of experts have no
    layout in the map: those are not compared.

    Args:
      base: the fingerprint.
      paths: of the leaves to compare.
      names: the map, over leaves of the base's shapes.
      read: the tensor of a name, mapped.
    """
    return [path for path in paths if _differs(base[path], names.slots[path], names, read)]


def _differs(known: Leaf, slot: Slot, names: Map, read: Callable[[str], np.ndarray]) -> bool:
    if known.kind not in _FLOATS or slot.entry.kind == "parameter":
        return False
    places = sample_places(slot.shape)
    values = [_element(slot, index, names, read) for index in zip(*places, strict=True)]
    return checksum_of(np.array(values).astype(jnp.dtype(known.kind))) != known.checksum


def _element(
    slot: Slot, index: tuple[Any, ...], names: Map, read: Callable[[str], np.ndarray]
) -> Any:
    """One element of a leaf, from the tensor that it is in."""
    roles = slot.roles or "s" * len(slot.looped) + "o" * (len(slot.shape) - len(slot.looped))
    at = {
        letter: [
            (i, n) for i, n, role in zip(index, slot.shape, roles, strict=True) if role == letter
        ]
        for letter in "sio"
    }
    layer = tuple(int(i) for i, _ in at["s"])
    row, column = (_flat(at[letter]) for letter in "io")
    for module in slot.modules[layer]:
        place = names.places[module, slot.entry.parameter]
        for piece in place.pieces:
            if piece.slot is slot and piece.index == layer and piece.start <= column < piece.stop:
                matrix = from_parameter(place, read(f"{module}.{slot.entry.parameter}"))
                column += piece.at - piece.start
                return matrix[row, column] if slot.is_matrix else matrix[column]
    raise AssertionError(f"{slot.path}: no module has output {column}")


def _flat(pairs: list[tuple[Any, int]]) -> int:
    sizes = tuple(n for _, n in pairs)
    return (
        int(np.ravel_multi_index([i for i, _ in pairs], sizes)) if math.prod(sizes) and pairs else 0
    )
