"""From a `lora` tree to the configuration and tensors of an adapter's directory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import ml_dtypes
import numpy as np

from jaxlora import _paths
from jaxlora._errors import TargetError
from jaxlora._matrix import factors_to_matrix, to_matrix
from jaxlora._quantized import dense
from jaxlora._weight import FullWeight, LoraWeight, is_node
from jaxlora.peft._files import check_finite
from jaxlora.peft._layouts import (
    Factors,
    check_kind_in_full,
    keys,
    side_by_side,
    to_parameter,
    to_tensors,
    used_ranks,
)
from jaxlora.peft._names import Map, Place, Slot
from jaxlora.peft._strengths import alpha_of, fields_of

_PREFIX = "base_model.model."
_DTYPES = (np.float16, ml_dtypes.bfloat16, np.float32, np.float64)
_PEFT_VERSION = "0.21.2"  # whose format this is


def save_tree(
    pairs: Iterable[tuple[str, Any]], names: Map, for_serving: bool
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The fields of the configuration that depend on the tree, and the tensors."""
    leaves = dict(pairs)
    nodes = {path: leaf for path, leaf in leaves.items() if is_node(leaf)}
    if not nodes:
        raise TargetError(
            "peft.save: got a tree without adapters, expected one from jaxlora.init: "
            "peft.save(directory, jaxlora.combine(trainable, frozen), names)."
        )
    for path, node in nodes.items():
        node.check(path)
        slot = names.slots.get(path)
        if slot is None:
            raise TargetError(
                f"{path}: a {type(node).__name__} without an entry in `names`, expected every leaf "
                f"that trains to have one. {names.entry_hint()}"
            )
        _check_node(path, node, slot)
        names.check_tied(path)
    saver = _Saver(leaves, nodes, names, for_serving)
    return saver.config, saver.tensors


def _check_node(path: str, node: Any, slot: Slot) -> None:
    arrays = (
        {"value": node.value}
        if isinstance(node, FullWeight)
        else {"a": node.a, "b": node.b, "scale": node.scale, "magnitude": node.magnitude}
    )
    for name, x in arrays.items():
        if x is None:
            continue
        if isinstance(x, jax.core.Tracer | jax.ShapeDtypeStruct):
            raise TargetError(f"{path}: got a traced {name}, expected values, outside of jax.jit.")
        if not getattr(x, "is_fully_addressable", True):
            raise TargetError(
                f"{path}: got {name} spread over several processes, expected it whole: gather it "
                "with jax.experimental.multihost_utils.process_allgather first."
            )
        if not any(x.dtype == dtype for dtype in _DTYPES):
            raise TargetError(
                f"{path}: got {name} of dtype {x.dtype}, expected float16, bfloat16, float32 or "
                "float64, which other readers know."
            )
        check_finite(np.asarray(x), f"{path}: {name}")
    if not isinstance(node, LoraWeight):
        return
    if not slot.is_matrix:
        raise TargetError(
            f"{path}: an adapter on a leaf that `names` has of kind {slot.entry.kind!r}, expected "
            "the kind of a matrix."
        )
    if node.roles != slot.roles:
        raise TargetError(
            f"{path}: got roles {slot.roles!r} from `names` and {node.roles!r} in the adapter, "
            "expected the same."
        )


class _Saver:
    def __init__(
        self,
        leaves: Mapping[str, Any],
        nodes: Mapping[str, Any],
        names: Map,
        for_serving: bool,
    ):
        self.leaves, self.nodes, self.names = leaves, nodes, names
        self.tensors: dict[str, np.ndarray] = {}
        self.each = {
            path: _factors(names.slots[path], node)
            for path, node in nodes.items()
            if isinstance(node, LoraWeight)
        }
        found = {at: self._of_place(place) for at, place in names.places.items()}
        adapted = {at: factors for at, factors in found.items() if factors is not None}
        self._check_dora(adapted)
        if for_serving:
            adapted = self._for_serving(adapted)
        self.adapted = adapted
        self._write_factors()
        kinds = {names.places[at].kind for at in adapted}
        if "parameter" in kinds and self._dropout():
            raise TargetError(
                f"peft.save: got dropout {self._dropout()} with parameters of kind 'parameter', "
                "which PEFT adapts without dropout alone: jaxlora.with_dropout(lora, None, rate=0)."
            )
        self.config: dict[str, Any] = {
            "use_dora": any(f.magnitude is not None for f in adapted.values()),
            "lora_dropout": self._dropout(),
            "fan_in_fan_out": "conv1d" in kinds and "parameter" not in kinds,  # PEFT finds out
            **self._targets(),
            **fields_of(
                {names.places[at].name: (f.rank, float(f.scale)) for at, f in adapted.items()},
                plain=for_serving,
            ),
            **self._full(),
        }

    # ----------------------------------------------------------------------------------------------
    # Factors

    def _of_place(self, place: Place) -> Factors | None:
        parts: list[Factors | None] = []
        for p in place.pieces:
            each = self.each.get(p.slot.path)
            part = None if each is None else each[p.index]
            if part is not None and (p.start, p.stop) != (0, p.slot.outputs):
                whole, part = part, part.outputs(p.start, p.stop)
                others = np.any(whole.b != 0, axis=(*range(whole.b.ndim - 2), -1))
                mine = np.any(part.b != 0, axis=(*range(part.b.ndim - 2), -1))
                if part.magnitude is None:
                    part = part.ranks(mine | ~others)  # without the ranks of other modules
                part = part if part.rank else None
            parts.append(part)
        if any(p is not None for p in parts) and not place.adaptable:
            raise TargetError(
                f"{place.slot.path}: an adapter on the parameter {place.parameter!r} of "
                f"{place.module}, which PEFT can adapt as a parameter alone, expected 'kind': "
                "'parameter'."
            )
        sizes = [p.stop - p.start for p in place.pieces]
        if any(p is not None and p.magnitude is not None for p in parts) and not all(parts):
            paths = _paths.listing(p.slot.path for p in place.pieces)
            raise TargetError(
                f"{place.module}: DoRA on some of its parts alone, expected all or none:{paths}"
            )
        return side_by_side(parts, sizes)

    def _check_dora(self, adapted: Mapping[tuple[str, str], Factors]) -> None:
        plain = [self.names.places[at].name for at, f in adapted.items() if f.magnitude is None]
        dora = [at for at, f in adapted.items() if f.magnitude is not None]
        if plain and dora:
            raise TargetError(
                "peft.save: got DoRA and plain LoRA in one tree, expected one of them, since "
                f"use_dora is of all. Plain are:{_paths.listing(plain)}"
            )
        for at in dora:
            if self.names.places[at].kind == "parameter":
                raise TargetError(
                    f"{self.names.places[at].name}: DoRA on a parameter of kind 'parameter', which "
                    "PEFT has not. Leave DoRA out."
                )

    def _for_serving(
        self, adapted: Mapping[tuple[str, str], Factors]
    ) -> dict[tuple[str, str], Factors]:
        """One rank and one scale, as vLLM reads them from the configuration."""

        def refused(what: str, remedy: str) -> TargetError:
            return TargetError(
                f"for_serving: got {what}, which vLLM does not load, expected plain LoRA on linear "
                f"layers and embeddings. {remedy}"
            )

        full = [path for path, node in self.nodes.items() if isinstance(node, FullWeight)]
        if full:
            raise refused(
                f"leaves trained in full ({', '.join(full[:5])})",
                "Merge them into the base that is served, jaxlora.merge, or train without them.",
            )
        for at, factors in adapted.items():
            place = self.names.places[at]
            if factors.magnitude is not None:
                raise refused(
                    f"DoRA ({place.name})",
                    "Give the nearest plain adapter: jaxlora.extract(base, jaxlora.merge(lora), "
                    "config, roles=roles).",
                )
            if place.kind in ("conv", "parameter"):
                raise refused(f"{place.name}, of kind {place.kind!r}", "Leave it out.")
        rank = max(f.rank for f in adapted.values())
        first = next(iter(adapted.values())).scale
        alike = all(f.scale == first for f in adapted.values())
        whole = isinstance(alpha_of(rank, float(first), rslora=False), int)
        scale = first if alike and whole else np.float32(1)
        return {at: f.at_scale(scale).padded(rank) for at, f in adapted.items()}

    def _write_factors(self) -> None:
        for at, factors in self.adapted.items():
            place = self.names.places[at]
            key = keys(place, self._nested(place))
            for x, array in to_tensors(place, factors).items():
                self.tensors[key[x]] = array
            for head in self._heads(place):
                if factors.magnitude is not None:
                    raise TargetError(
                        f"{place.slot.path}: DoRA on a table that is tied to {head}, which in PEFT "
                        "would have a magnitude of its own. Leave DoRA out there."
                    )
                self.tensors[f"{_PREFIX}{head}.lora_A.weight"] = _copy(self.tensors[key["B"]].T)
                self.tensors[f"{_PREFIX}{head}.lora_B.weight"] = _copy(self.tensors[key["A"]].T)

    def _nested(self, place: Place) -> int:
        if place.kind != "parameter":
            return 0
        places = (self.names.places[at] for at in self.adapted)
        siblings = [p.parameter for p in places if p.module == place.module]
        return len(siblings) - 1 - siblings.index(place.parameter)

    def _heads(self, place: Place) -> list[str]:
        heads = [head for head, slot in self.names.tied.items() if slot is place.slot]
        if heads and place.module.rpartition(".")[2] == "shared":
            raise TargetError(
                f"{place.slot.path}: a table that {place.module} shares with encoder, decoder and "
                f"{heads[0]}, of which PEFT would adapt one alone. Merge it into the base, "
                "jaxlora.merge, or leave it out."
            )
        return heads

    def _dropout(self) -> float:
        rates = {node.dropout for node in self.nodes.values() if isinstance(node, LoraWeight)}
        if len(rates) > 1:
            raise TargetError(
                f"peft.save: got dropout rates {sorted(rates)}, expected one, since lora_dropout "
                "is of all: jaxlora.with_dropout(lora, None, rate=0.1)."
            )
        return rates.pop() if rates else 0.0

    def _targets(self) -> dict[str, Any]:
        places = [self.names.places[at] for at in self.adapted]
        modules = [p.name for p in places if p.kind != "parameter"]
        parameters = [p.name for p in places if p.kind == "parameter"]
        heads = [head for p in places for head in self._heads(p)]  # which PEFT ties if it is named
        return {
            "target_modules": sorted(modules + heads),
            "target_parameters": parameters or None,
            "ensure_weight_tying": bool(heads),
        }

    # ----------------------------------------------------------------------------------------------
    # What is trained in full

    def _full(self) -> dict[str, Any]:
        trained = {
            at: place
            for at, place in self.names.places.items()
            if any(isinstance(self.nodes.get(p.slot.path), FullWeight) for p in place.pieces)
        }
        tokens = {at: p for at, p in trained.items() if p.slot.entry.tokens is not None}
        whole = {at: p for at, p in trained.items() if p.kind != "bias" and at not in tokens}
        saved = {p.module for p in whole.values()}
        for place in self.names.places.values():
            if place.module in saved:
                if (place.module, place.parameter) in self.adapted:
                    raise TargetError(
                        f"{place.slot.path}: has an adapter, and {place.module} has another leaf "
                        "that trains in full, expected one of them, since modules_to_save holds a "
                        "whole module."
                    )
                check_kind_in_full(place, place.slot.path)
                self.tensors[f"{_PREFIX}{place.module}.{place.parameter}"] = self._value(place)
        biases = {at: p for at, p in trained.items() if p.kind == "bias" and p.module not in saved}
        tied = []
        for place in whole.values():
            for head in self._heads(place):
                tied.append(head)
                self.tensors[f"{_PREFIX}{head}.weight"] = _copy(self._value(place))
        found: dict[str, Any] = {
            "modules_to_save": sorted({*saved, *tied}) or None,
            "bias": self._bias(biases, saved),
        }
        if tied:
            found["ensure_weight_tying"] = True
        if tokens:
            found["trainable_token_indices"] = {
                place.module: self._rows(place) for place in tokens.values()
            }
        return found

    def _value(self, place: Place) -> np.ndarray:
        """A parameter, the parts of it that are frozen as in the base."""
        parts = []
        for p in place.pieces:
            leaf = self.leaves[p.slot.path]
            x = leaf.value if isinstance(leaf, FullWeight) else leaf
            if isinstance(leaf, LoraWeight):
                raise TargetError(
                    f"{p.slot.path}: has an adapter, and another part of {place.module} trains in "
                    "full, expected one of them."
                )
            x = dense(x)
            slot = p.slot
            if slot.is_matrix:
                matrix = np.asarray(to_matrix(x, slot.roles))[p.index]
            else:
                matrix = np.asarray(x).reshape(*slot.looped, slot.outputs)[p.index]
            parts.append(matrix[..., p.start : p.stop])
        return to_parameter(place, np.concatenate(parts, axis=-1))

    def _bias(self, biases: Mapping[tuple[str, str], Place], saved: set[str]) -> str:
        if not biases:
            return "none"
        targets = {self.names.places[at].name for at in self.adapted}
        all_of_them = {
            at for at, p in self.names.places.items() if p.kind == "bias" and p.module not in saved
        }
        of_targets = {at for at in all_of_them if at[0] in targets}
        if {*biases} not in (all_of_them, of_targets):
            odd = sorted(".".join(at) for at in {*biases} ^ of_targets)
            raise TargetError(
                "peft.save: got biases that train and are neither those of all layers of the map "
                "nor those of all adapted layers, expected one of them, PEFT's bias='all' or "
                "'lora_only'. Against the adapted layers', these differ:"
                f"{_paths.listing(odd)}\nTrain them so: LoraConfig(..., bias='lora_only')."
            )
        for place in biases.values():
            inner = "base_layer." if place.module in targets else ""
            key = f"{_PREFIX}{place.module}.{inner}{place.parameter}"
            self.tensors[key] = self._value(place)
        return "lora_only" if {*biases} == of_targets else "all"

    def _rows(self, place: Place) -> list[int]:
        slot = place.slot
        rows = list(slot.entry.tokens or ())
        node = self.nodes[slot.path]
        value, base = (np.asarray(to_matrix(dense(x), slot.roles)) for x in (node.value, node.w))
        changed = {int(k) for k in np.flatnonzero(np.any(value != base, axis=-1))}
        if changed - {*rows} or max(rows) >= len(base):
            raise TargetError(
                f"{slot.path}: got rows that differ from the base's, {sorted(changed)[:8]}, "
                f"expected some of `tokens`, {rows[:8]}, each once. To save the whole table, leave "
                "`tokens` out of its entry."
            )
        key = f"{_PREFIX}{place.module}.token_adapter.trainable_tokens_delta"
        self.tensors[key] = np.ascontiguousarray(value[rows])
        return rows


def _copy(x: np.ndarray) -> np.ndarray:
    return np.array(x, order="C", copy=True)


def _factors(slot: Slot, lw: LoraWeight) -> dict[tuple[int, ...], Factors | None]:
    """The factors of each matrix of a leaf; of a stack, without ranks that are zeros.

    A layer of a stack without any is no target: that is how `load` fills a stack of which some
    layers have an adapter.
    """
    a, b = factors_to_matrix(np.asarray(lw.a), np.asarray(lw.b), slot.shape, slot.roles)
    scale = np.asarray(lw.scale, np.float32)
    if slot.experts and scale.size and np.any(scale != scale[..., :1]):
        raise TargetError(
            f"{slot.path}: got other scales for some experts, expected one for all of a layer, "
            "since they share a parameter. Give them one: jaxlora.with_scale(lora, scale)."
        )
    magnitude = None
    if lw.magnitude is not None:
        magnitude = np.asarray(lw.magnitude).reshape(*slot.looped, -1)
    plain = {}
    for index in np.ndindex(*slot.looped):
        s = scale[index]
        plain[index] = Factors(
            a[index],
            b[index],
            np.float32(s.flat[0] if slot.experts else s),
            None if magnitude is None else magnitude[index],
        )
    found: dict[tuple[int, ...], Factors | None] = {**plain}
    used = {index: used_ranks(f) for index, f in plain.items()}
    if slot.looped and any(mask.any() for mask in used.values()):
        for index, f in plain.items():
            last = int(np.max(np.flatnonzero(used[index]), initial=-1)) + 1
            if f.magnitude is not None:
                last = max(last, 1)
            found[index] = f.ranks(np.arange(f.rank) < last) if last else None
    return found


def whole_config(fields: Mapping[str, Any], base_model_name: str | None, task: str | None) -> dict:
    """A configuration with every field that PEFT, or vLLM, reads."""
    return {
        "peft_type": "LORA",
        "peft_version": _PEFT_VERSION,
        "task_type": task,
        "auto_mapping": None,
        "base_model_name_or_path": base_model_name,
        "revision": None,
        "inference_mode": True,
        "init_lora_weights": True,
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "lora_bias": False,
        "trainable_token_indices": None,
        **fields,
    }
