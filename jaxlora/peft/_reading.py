"""One directory that is being read: its configuration, its tensors, and what they lead to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxlora._errors import AdapterFileError
from jaxlora._matrix import from_matrix, to_matrix
from jaxlora._placement import place
from jaxlora.peft._config import Config, nearest, selected
from jaxlora.peft._layouts import from_parameter, parameter_shape
from jaxlora.peft._names import Map, Place, Slot
from jaxlora.peft._strengths import strengths

PREFIX = "base_model.model."


class Tensors:
    """The tensors of a file, each to be used once."""

    def __init__(self, file: str, tensors: dict[str, np.ndarray]):
        self.file = file
        self.all = tensors
        self._left = dict.fromkeys(tensors)

    def __contains__(self, key: str) -> bool:
        return key in self.all

    def modules(self) -> set[str]:
        """The modules of which there is anything."""
        return {key.removeprefix(PREFIX).partition(".lora_")[0] for key in self.all}

    def has_any_of(self, module: str) -> bool:
        """Whether there is anything of a module."""
        return any(key.startswith(f"{PREFIX}{module}.") for key in self.all)

    def take(self, key: str, shape: tuple[int, ...], why: str) -> np.ndarray:
        """The tensor of a key, of that shape."""
        if key not in self.all:
            near = nearest(key, self._left, 3)
            raise AdapterFileError(
                f"{self.file}: {key}: missing, expected it of shape {shape}, since {why}. "
                f"The nearest keys are:{near}"
            )
        found = self.all[key]
        if found.shape != shape:
            raise AdapterFileError(
                f"{self.file}: {key}: got shape {found.shape}, expected {shape}, since {why}. Is "
                "it an adapter of another model, or the map another's?"
            )
        self._left.pop(key, None)
        return found

    def done(self, known: Map) -> None:
        """Raises if a tensor was not used."""
        if self._left:
            whole = all(
                key.endswith((".weight", ".bias")) and ".lora_" not in key for key in self._left
            )
            hint = (
                " These are whole weights; if they are copies of the base's, as PEFT's "
                "save_embedding_layers makes them, entries of `names` let them be compared."
                if whole
                else ""
            )
            first = ", ".join([key[:200] for key in self._left][:5])
            raise AdapterFileError(
                f"{self.file}: {first}: not used by any module of the map "
                f"and the configuration ({len(self._left)} such keys), expected every key to be "
                f"used.{hint} {known.entry_hint()}"
            )


class Reading:
    """What the parts of `load` share.

    Attributes:
      config: the configuration.
      tensors: those of the weights' file.
      leaves: the params, by path.
      names: the map.
      allow: what to take otherwise than the file says.
      targets: the places that the configuration adapts, by PEFT's name.
      tied_targets: the tied heads that it adapts.
      strengths: the rank and scale of each target.
    """

    def __init__(
        self,
        config: Config,
        tensors: Tensors,
        leaves: Mapping[str, Any],
        names: Map,
        allow: frozenset[str],
    ):
        self.config, self.tensors, self.leaves, self.names = config, tensors, leaves, names
        self.allow = allow
        weights = [p for p in names.places.values() if p.slot.is_matrix and p.adaptable]
        modules = [p.name for p in weights if p.kind != "parameter"]
        parameters = [p.name for p in weights if p.kind == "parameter"]
        chosen = selected(config, [*modules, *names.tied], parameters, tensors.modules())
        self.targets = {p.name: p for p in weights if p.name in chosen}
        self.tied_targets = chosen & {*names.tied}
        self.strengths = strengths(config, self.targets)

    def check_base(self, place: Place, key: str) -> None:
        """A copy of the base that PEFT puts in the file must be our base."""
        if key not in self.tensors:
            return
        found = self.tensors.take(key, parameter_shape(place), "it is the base's weight")
        piece = place.pieces[0]
        if (piece.start, piece.stop) != (0, piece.slot.outputs):
            raise AdapterFileError(
                f"{self.tensors.file}: {key}: a whole weight of a module that is fused with others "
                "here, expected none, since the configuration does not ask for it."
            )
        w = self.leaves[piece.slot.path]
        ours = np.asarray(matrices(piece.slot, w)[piece.index])
        theirs = from_parameter(place, found)
        if not np.array_equal(np.asarray(theirs, ours.dtype), ours):
            raise AdapterFileError(
                f"{self.tensors.file}: {key}: got another table than {piece.slot.path} of the "
                "params, expected the same, since the adapter was trained on it. Put that table "
                "in the params first."
            )


def matrices(slot: Slot, w: Any) -> np.ndarray:
    """(looped..., experts..., I, O) of a leaf."""
    return np.asarray(to_matrix(w, slot.roles))


def vectors(slot: Slot, w: np.ndarray) -> np.ndarray:
    """(looped..., O) of a leaf of vectors."""
    return w.reshape(*slot.looped, slot.outputs)


def whole(slot: Slot, table: np.ndarray, w: Any) -> jax.Array:
    """The leaf of such matrices, or vectors, in w's dtype, where w is."""
    value = from_matrix(table, slot.shape, slot.roles) if slot.is_matrix else table
    return place(np.asarray(value).reshape(slot.shape).astype(w.dtype), w, range(len(slot.shape)))
