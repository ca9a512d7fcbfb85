"""The adapters of a directory: a `LoraWeight` for each leaf that its modules are in."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxlora import _placement
from jaxlora._errors import AdapterFileError, TargetError
from jaxlora._matrix import factors_from_matrix
from jaxlora._svd_initializers import olora, pissa
from jaxlora._target import Target
from jaxlora._weight import LoraWeight
from jaxlora.peft._config import is_saved
from jaxlora.peft._layouts import Factors, from_tensors, keys, shapes, side_by_side
from jaxlora.peft._names import Place, Slot
from jaxlora.peft._reading import PREFIX, Reading, matrices

TYING = "ensure_weight_tying"


def adapters(r: Reading) -> dict[str, LoraWeight]:
    """The adapters, by path."""
    factors = {name: _factors(r, place) for name, place in r.targets.items()}
    _check_tied(r)
    found = {}
    for slot in r.names.slots.values():
        adapter = _adapter(r, slot, factors) if slot.is_matrix else None
        if adapter is not None:
            found[slot.path] = adapter
    return found


def _nested(r: Reading, place: Place) -> int:
    """How many parameters of one module come after this one, in the map's order."""
    if place.kind != "parameter":
        return 0
    siblings = [p.parameter for p in r.targets.values() if p.module == place.module]
    return len(siblings) - 1 - siblings.index(place.parameter)


def _factors(r: Reading, place: Place) -> Factors:
    rank, scale = r.strengths[place.name]
    most = max(64, math.prod(place.slot.inputs), place.outputs)
    if rank > most:  # padding the rest of a stack to it would be the larger part of the memory
        raise AdapterFileError(
            f"{r.config.file}: got rank {rank} for {place.name}, expected at most {most}, "
            "the larger of its inputs and outputs."
        )
    key, shape = keys(place, _nested(r, place)), shapes(place, rank)
    why = f"{place.name} is a target of rank {rank}, of {place.slot.path}"
    wanted = ["A", "B", "magnitude"] if r.config.dora else ["A", "B"]
    found = {x: r.tensors.take(key[x], shape[x], why) for x in wanted}
    if place.kind != "parameter":  # PEFT copies the base's beside adapters of embeddings and heads
        r.check_base(place, f"{PREFIX}{place.module}.base_layer.weight")
        bias = r.names.places.get((place.module, "bias"))
        if bias is not None and r.config.bias == "none":
            r.check_base(bias, f"{PREFIX}{place.module}.base_layer.bias")
    return from_tensors(place, rank, scale, found)


def _adapter(r: Reading, slot: Slot, factors: Mapping[str, Factors]) -> LoraWeight | None:
    each: dict[tuple[int, ...], Factors | None] = {}
    for index in np.ndindex(*slot.looped):
        parts: list[Factors | None] = []
        sizes = []
        for module in slot.modules[index]:
            place = r.names.places[module, slot.entry.parameter]
            piece = next(p for p in place.pieces if p.slot is slot and p.index == index)
            size = piece.stop - piece.start
            found = factors.get(place.name)
            parts.append(None if found is None else found.outputs(piece.at, piece.at + size))
            sizes.append(size)
        if r.config.dora and any(parts) and not all(parts):
            raise AdapterFileError(
                f"{r.config.file}: use_dora: {slot.modules[(*index, parts.index(None))]} has no "
                f"adapter and others of {slot.path} have one, expected all or none, since DoRA's "
                "magnitude is that of the whole weight."
            )
        each[index] = side_by_side(parts, sizes)
    some = next((f for f in each.values() if f is not None), None)
    if some is None:
        return None
    rank = max(f.rank for f in each.values() if f is not None)
    ranks = {0 if f is None else f.rank for f in each.values()}
    filled = {
        index: _none(r, slot, index, some, rank) if f is None else f.padded(rank)
        for index, f in each.items()
    }
    a, b = (_stacked(slot, {i: getattr(f, x) for i, f in filled.items()}) for x in "ab")
    scale = np.array([f.scale for f in filled.values()], np.float32).reshape(slot.looped)
    for size in slot.experts:
        scale = np.broadcast_to(scale[..., None], (*scale.shape, size))
    a, b = factors_from_matrix(a, b, slot.shape, slot.roles)
    w = r.leaves[slot.path]
    if r.config.init is not None:
        w = _moved(r, slot, w, ranks, scale)
    arrays = {"a": a, "b": b, "scale": np.array(scale)}
    if r.config.dora:
        rows = np.stack([f.magnitude for f in filled.values() if f.magnitude is not None])
        outs = [n for n, role in zip(slot.shape, slot.roles, strict=True) if role == "o"]
        arrays["magnitude"] = rows.reshape(*slot.looped, *outs)
    try:
        placed = {
            name: _placement.place(x, w, _placement.dims_of(name, slot.roles))
            for name, x in arrays.items()
        }
    except TargetError as error:
        raise AdapterFileError(f"{r.tensors.file}: {slot.path}: {error}") from None
    return LoraWeight(w=w, roles=slot.roles, dropout=r.config.dropout, **placed)


def _stacked(slot: Slot, each: Mapping[tuple[int, ...], np.ndarray]) -> np.ndarray:
    rows = np.stack(list(each.values()))
    return rows.reshape(*slot.looped, *rows.shape[1:])


def _none(r: Reading, slot: Slot, index: tuple[int, ...], like: Factors, rank: int) -> Factors:
    """No change of one matrix of a stack: zeros, which do not train, and its own norms."""
    some = like.padded(rank)
    magnitude = None
    if some.magnitude is not None:
        matrix = np.asarray(matrices(slot, r.leaves[slot.path])[index], np.float32)
        magnitude = np.linalg.norm(matrix, axis=0).astype(some.magnitude.dtype)
    return some._replace(a=np.zeros_like(some.a), b=np.zeros_like(some.b), magnitude=magnitude)


def _moved(r: Reading, slot: Slot, w: Any, ranks: set[int], scale: np.ndarray) -> Any:
    """The base as PEFT moves it when it loads such an adapter."""
    init = {"pissa": pissa(), "olora": olora}[str(r.config.init)]
    kinds = ("linear",) if init is olora else ("linear", "conv1d")
    plain = slot.entry.kind in kinds and slot.entry.part is None
    if len(ranks) > 1 or len({*scale.flat}) > 1 or not plain or slot.entry.fused:
        raise AdapterFileError(
            f"{r.config.file}: init_lora_weights: {r.config.init} on {slot.path}, "
            "expected linear layers, none of them fused, all of a stack with one rank and "
            "scale, since the base has to be moved as PEFT moves it. Convert the adapter in "
            "PEFT: save_pretrained(..., path_initial_model_for_weight_conversion=...)."
        )
    target = Target(path=slot.path, roles=slot.roles, rank=max(ranks), scale=float(scale.flat[0]))
    return init(jax.random.key(0), w, target)[0]


def _check_tied(r: Reading) -> None:
    """A tied table is one leaf here: an adapter of the lookup alone would change the head."""
    for head, slot in r.names.tied.items():
        table = next(iter(slot.modules.flat))
        saved = any(is_saved(table, name) for name in r.config.saved)
        saved_head = any(is_saved(head, name) for name in r.config.saved)
        if not (table in r.targets or head in r.tied_targets or saved or saved_head):
            for copy in (".weight", ".base_layer.weight"):  # PEFT's save_embedding_layers
                r.check_base(r.names.places[table, "weight"], PREFIX + head + copy)
            continue
        # PEFT ties "embed_tokens" and "lm_head" alone: else it warns, and adapts one of the two.
        both = r.config.tying and r.tensors.has_any_of(head) and r.tensors.has_any_of(table)
        if not both and TYING not in r.allow:
            why = f"{TYING} is not set" if not r.config.tying else "the file has one of two"
            raise AdapterFileError(
                f"{r.config.file}: {why}, and {table} or {head} is trained, which here are one "
                f"leaf ({slot.path}), expected an adapter of both. To take one of the lookup as "
                f"one of both, which is another model: allow {TYING!r} "
                f"(peft.load(..., allow=[{TYING!r}]))."
            )
        if both:
            _check_tied_keys(r, head, table, saved)


def _check_tied_keys(r: Reading, head: str, table: str, saved: bool) -> None:
    place = r.names.places[table, "weight"]
    stem, head_stem = PREFIX + table, PREFIX + head
    pairs = {
        head_stem + ".weight": (stem + ".weight", False),
        head_stem + ".lora_A.weight": (stem + ".lora_embedding_B", True),
        head_stem + ".lora_B.weight": (stem + ".lora_embedding_A", True),
    }
    for key, (first, transposed) in pairs.items():
        if key not in r.tensors or first not in r.tensors:
            continue
        other = r.tensors.all[first]
        other = other.T if transposed else other
        found = r.tensors.take(key, other.shape, f"{head} is tied to {table}")
        if not np.array_equal(found, other):
            raise AdapterFileError(
                f"{r.tensors.file}: {key}: got other values than in {first}, expected the "
                f"same, since {TYING} is set."
            )
    r.check_base(place, head_stem + ".base_layer.weight")
