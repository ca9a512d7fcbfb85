"""The factors of one PyTorch module, between matrices and PEFT's tensors. All in NumPy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxlora._errors import AdapterFileError
from jaxlora.peft._names import Place, Slot


class Factors(NamedTuple):
    """A low-rank change of a matrix: scale * a b, with DoRA's magnitude or without.

    Attributes:
      a: (experts..., I, R).
      b: (experts..., R, O).
      scale: a float32.
      magnitude: (O,), or None.
    """

    a: np.ndarray
    b: np.ndarray
    scale: np.float32
    magnitude: np.ndarray | None = None

    @property
    def rank(self) -> int:
        return self.a.shape[-1]

    def outputs(self, start: int, stop: int) -> Factors:
        """The change of some of the outputs."""
        magnitude = None if self.magnitude is None else self.magnitude[start:stop]
        return self._replace(b=self.b[..., start:stop], magnitude=magnitude)

    def ranks(self, kept: np.ndarray) -> Factors:
        """Some of the ranks, by a mask."""
        return self._replace(a=self.a[..., kept], b=self.b[..., kept, :])

    def at_scale(self, scale: Any) -> Factors:
        """The same change with another scale, the rest of it folded into b."""
        scale = np.float32(scale)
        if scale == self.scale:
            return self
        wide = self.b.astype(np.float64) * (np.float64(self.scale) / np.float64(scale))
        with np.errstate(over="ignore"):
            b = wide.astype(self.b.dtype)
        if self.b.dtype.itemsize == 2:  # which may not have the range
            close = np.abs(b.astype(np.float64) - wide) <= 2.0**-8 * np.abs(wide)
            b = b if close.all() else wide.astype(np.float32)
        return self._replace(b=b, scale=scale)

    def padded(self, rank: int) -> Factors:
        """The same change at a larger rank, the rest of it zeros."""
        more = [(0, 0)] * (self.a.ndim - 2)
        pad = (0, rank - self.rank)
        return self._replace(
            a=np.pad(self.a, [*more, (0, 0), pad]), b=np.pad(self.b, [*more, pad, (0, 0)])
        )


def used_ranks(factors: Factors) -> np.ndarray:
    """Which ranks have anything in a or b: the others add nothing, and cannot train."""
    axes = tuple(range(factors.a.ndim - 2))
    return np.any(factors.a != 0, axis=(*axes, -2)) | np.any(factors.b != 0, axis=(*axes, -1))


def side_by_side(parts: Sequence[Factors | None], sizes: Sequence[int]) -> Factors | None:
    """One change of all the outputs from changes of parts of them; None: that part stays.

    Where all have the same a, the rank stays; else a has the ranks of all, and b is block diagonal.
    """
    some = [p for p in parts if p is not None]
    if not some:
        return None
    first = some[0]
    magnitude = None
    if first.magnitude is not None:
        magnitude = np.concatenate([p.magnitude for p in some if p.magnitude is not None])
    dtype_a, dtype_b = (np.result_type(*(getattr(p, x) for p in some)) for x in "ab")
    parts = [None if p is None else p.at_scale(first.scale) for p in parts]
    shared = all(np.array_equal(p.a, first.a) for p in some)
    rank = first.rank if shared else sum(p.rank for p in some)
    experts = first.a.shape[:-2]
    b = np.zeros((*experts, rank, sum(sizes)), dtype_b)
    row = column = 0
    for part, size in zip(parts, sizes, strict=True):
        if part is not None:
            b[..., row : row + part.rank, column : column + size] = part.b
            row += 0 if shared else part.rank
        column += size
    a = first.a if shared else np.concatenate([p.a for p in some], axis=-1)
    return Factors(a.astype(dtype_a), b, first.scale, magnitude)


# --------------------------------------------------------------------------------------------------
# Factors and tensors


def keys(place: Place, nested: int = 0) -> dict[str, str]:
    """The keys of a module's tensors: A, B, magnitude, bias.

    `nested`: how many parameters of the module, after this one, have adapters too.
    """
    stem = "base_model.model." + place.module + ".base_layer" * nested
    if place.kind == "embedding":
        a, b = "lora_embedding_A", "lora_embedding_B"
    else:
        a, b = "lora_A.weight", "lora_B.weight"
    return {
        "A": f"{stem}.{a}",
        "B": f"{stem}.{b}",
        "magnitude": f"{stem}.lora_magnitude_vector",
        "bias": f"{stem}.lora_B.bias",
    }


def shapes(place: Place, rank: int) -> dict[str, tuple[int, ...]]:
    """The shapes of those tensors at a rank."""
    slot = place.slot
    inputs, outputs = math.prod(slot.inputs), place.outputs
    if place.kind == "conv":
        spatial = _spatial(slot)
        ones = (1,) * len(spatial)
        return {
            "A": (rank, slot.inputs[slot.channel], *spatial),
            "B": (outputs, rank, *ones),
            "magnitude": (1, outputs, *ones),
        }
    if slot.entry.swap:
        inputs, outputs = outputs, inputs
    every = rank * math.prod(slot.experts)
    return {"A": (every, inputs), "B": (outputs, every), "magnitude": (outputs,)}


def _spatial(slot: Slot) -> tuple[int, ...]:
    return slot.inputs[: slot.channel] + slot.inputs[slot.channel + 1 :]


def to_tensors(place: Place, factors: Factors) -> dict[str, np.ndarray]:
    """PEFT's A, B and magnitude."""
    slot = place.slot
    shape = shapes(place, factors.rank)
    factors = factors._replace(b=_theirs(place, factors.b))
    a, b = np.swapaxes(factors.a, -1, -2), np.swapaxes(factors.b, -1, -2)  # (E, R, I), (E, O, R)
    if place.kind == "conv":
        a = np.moveaxis(a.reshape(factors.rank, *slot.inputs), 1 + slot.channel, 1)
    if slot.entry.swap:
        a, b = np.swapaxes(b, -1, -2), np.swapaxes(a, -1, -2)
    if slot.experts:
        b = np.moveaxis(b, 0, -1)  # (O, R, E): PEFT has the rank before the expert in B's columns
    found = {"A": a.reshape(shape["A"]), "B": b.reshape(shape["B"])}
    if factors.magnitude is not None:
        found["magnitude"] = _theirs(place, factors.magnitude).reshape(shape["magnitude"])
    return {name: np.ascontiguousarray(x) for name, x in found.items()}


def from_tensors(place: Place, rank: int, scale: float, found: dict[str, np.ndarray]) -> Factors:
    """The factors of PEFT's A, B and magnitude, whose shapes have been checked."""
    slot = place.slot
    a, b = found["A"], found["B"]
    if place.kind == "conv":
        a = np.moveaxis(a, 1, 1 + slot.channel).reshape(rank, -1)
        b = b.reshape(-1, rank)
    if slot.experts:
        (experts,) = slot.experts
        a = a.reshape(experts, rank, -1)
        b = np.moveaxis(b.reshape(b.shape[0], rank, experts), -1, 0)
    if slot.entry.swap:
        a, b = np.swapaxes(b, -1, -2), np.swapaxes(a, -1, -2)
    magnitude = found.get("magnitude")
    return Factors(
        np.swapaxes(a, -1, -2),
        _ours(place, np.swapaxes(b, -1, -2)),
        np.float32(scale),
        None if magnitude is None else _ours(place, magnitude.reshape(-1)),
    )


def _theirs(place: Place, x: np.ndarray) -> np.ndarray:
    """Outputs, the last axis, in the order of their module."""
    return x if place.order is None else x[..., place.order]


def _ours(place: Place, x: np.ndarray) -> np.ndarray:
    """The inverse: our parts end to end."""
    return x if place.order is None else x[..., np.argsort(place.order)]


# --------------------------------------------------------------------------------------------------
# Whole parameters: modules_to_save, biases


def parameter_shape(place: Place) -> tuple[int, ...]:
    """The shape of the PyTorch parameter."""
    slot = place.slot
    if not slot.is_matrix:
        return (place.outputs,)
    inputs, outputs = math.prod(slot.inputs), place.outputs
    if place.kind == "conv":
        return (outputs, slot.inputs[slot.channel], *_spatial(slot))
    if place.kind in ("conv1d", "embedding"):
        return (inputs, outputs)
    return (outputs, inputs)


def to_parameter(place: Place, matrix: np.ndarray) -> np.ndarray:
    """(I, O), or a vector (O,), as PyTorch has it."""
    slot = place.slot
    matrix = _theirs(place, matrix)
    if place.kind == "conv":
        whole = matrix.T.reshape(place.outputs, *slot.inputs)
        found = np.moveaxis(whole, 1 + slot.channel, 1)
    elif place.kind in ("conv1d", "embedding") or not slot.is_matrix:
        found = matrix
    else:
        found = matrix.T
    return np.ascontiguousarray(found.reshape(parameter_shape(place)))


def from_parameter(place: Place, found: np.ndarray) -> np.ndarray:
    """The inverse."""
    slot = place.slot
    if place.kind == "conv":
        return np.moveaxis(found, 1, 1 + slot.channel).reshape(place.outputs, -1).T
    if place.kind in ("conv1d", "embedding") or not slot.is_matrix:
        return _ours(place, found)
    return _ours(place, found.T)


def check_kind_in_full(place: Place, what: str) -> None:
    if place.kind == "parameter":
        raise AdapterFileError(
            f"{what}: a parameter of kind 'parameter' ({place.name}) in full, which PEFT's "
            "modules_to_save holds with all of its module. That is not supported: adapt it, or "
            "leave it frozen."
        )
