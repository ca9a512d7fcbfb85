"""From the tensors of an adapter's directory to a `lora` tree."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlora import _paths
from jaxlora._errors import AdapterFileError, TargetError
from jaxlora._matrix import factors_from_matrix, from_matrix, to_matrix
from jaxlora._peft_config import (
    Config,
    has_tail,
    is_within,
    optional_heads,
    selected,
    strengths,
)
from jaxlora._peft_layouts import (
    Factors,
    check_kind_in_full,
    from_parameter,
    from_tensors,
    keys,
    parameter_shape,
    shapes,
    side_by_side,
)
from jaxlora._peft_names import Map, Place, Slot
from jaxlora._quantized import dense
from jaxlora._svd_initializers import olora, pissa
from jaxlora._target import Target
from jaxlora._weight import FullWeight, LoraWeight

_PREFIX = "base_model.model."
_TYING = "ensure_weight_tying"


class Tensors:
    """The tensors of a file, each to be used once."""

    def __init__(self, file: str, tensors: dict[str, np.ndarray]):
        self.file = file
        self._all = tensors
        self._left = dict.fromkeys(tensors)

    def __contains__(self, key: str) -> bool:
        return key in self._all

    def take(self, key: str, shape: tuple[int, ...], why: str) -> np.ndarray:
        """The tensor of a key, of that shape."""
        if key not in self._all:
            near = _paths.listing(_paths.nearest(key, self._left, 3))
            raise AdapterFileError(
                f"{self.file}: {key}: missing, expected it of shape {shape}, since {why}. "
                f"The nearest keys are:{near}"
            )
        found = self._all[key]
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
            raise AdapterFileError(
                f"{self.file}: {', '.join([*self._left][:5])}: not used by any module of the map "
                f"and the configuration ({len(self._left)} such keys), expected every key to be "
                f"used. {known.entry_hint()}"
            )


def load_tree(
    config: Config,
    file: str,
    tensors: dict[str, np.ndarray],
    pairs: Sequence[tuple[str, Any]],
    names: Map,
    allow: frozenset[str],
) -> list[Any]:
    """The leaves of the tree, in the order of `pairs`."""
    loader = _Loader(config, Tensors(file, tensors), dict(pairs), names, allow)
    nodes = loader.nodes()
    loader.tensors.done(names)
    return [nodes.get(path, leaf) for path, leaf in pairs]


class _Loader:
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
        weights = [p for p in names.places.values() if p.slot.is_matrix and _adaptable(p)]
        modules = [p.name for p in weights if p.kind != "parameter"]
        parameters = [p.name for p in weights if p.kind == "parameter"]
        chosen = selected(config, [*modules, *names.tied], parameters)
        self.targets = {p.name: p for p in weights if p.name in chosen}
        self.tied_targets = chosen & {*names.tied}
        self.strengths = strengths(config, self.targets)

    def nodes(self) -> dict[str, Any]:
        factors = {name: self._factors(place) for name, place in self.targets.items()}
        if not factors and not self.config.saved and self.config.tokens is None:
            raise AdapterFileError(
                f"{self.config.file}: got neither target_modules nor anything else that trains, "
                "expected an adapter."
            )
        self._check_tied()
        nodes: dict[str, Any] = {}
        for slot in self.names.slots.values():
            adapter = self._adapter(slot, factors) if slot.is_matrix else None
            if adapter is not None:
                nodes[slot.path] = adapter
        values = self._saved() | self._biases()
        self._lora_biases(values)
        for slot in self.names.slots.values():
            full = self._full(slot, values)
            if full is not None:
                if slot.path in nodes:
                    raise AdapterFileError(
                        f"{self.config.file}: {slot.path} has an adapter and is saved in full, "
                        "expected one of them."
                    )
                nodes[slot.path] = full
        for slot, rows, value in self._tokens():
            if slot.path in nodes:
                raise AdapterFileError(
                    f"{self.config.file}: trainable_token_indices: {slot.path} has an adapter, or "
                    "is saved in full, expected one of them. Both on one table cannot be "
                    "represented here."
                )
            w = self.leaves[slot.path]
            table = np.array(to_matrix(w, slot.roles)).astype(_wide(value))
            table[list(rows)] = value
            nodes[slot.path] = FullWeight(w=w, value=_whole(slot, table, w))
        return nodes

    # ----------------------------------------------------------------------------------------------
    # Factors

    def _nested(self, place: Place) -> int:
        """How many parameters of one module come after this one, in the map's order."""
        if place.kind != "parameter":
            return 0
        siblings = [p.parameter for p in self.targets.values() if p.module == place.module]
        return len(siblings) - 1 - siblings.index(place.parameter)

    def _factors(self, place: Place) -> Factors:
        rank, scale = self.strengths[place.name]
        key, shape = keys(place, self._nested(place)), shapes(place, rank)
        why = f"{place.name} is a target of rank {rank}, of {place.slot.path}"
        wanted = ["A", "B", "magnitude"] if self.config.dora else ["A", "B"]
        found = {x: self.tensors.take(key[x], shape[x], why) for x in wanted}
        if place.kind == "embedding":
            self._check_base(place, f"{_PREFIX}{place.module}.base_layer.weight")
        return from_tensors(place, rank, scale, found)

    def _check_base(self, place: Place, key: str) -> None:
        """A copy of the base that PEFT puts in the file must be our base."""
        if key not in self.tensors:
            return
        found = self.tensors.take(key, parameter_shape(place), "it is the base's weight")
        (piece,) = place.pieces
        w = self.leaves[piece.slot.path]
        ours = np.asarray(_matrices(piece.slot, w)[piece.index])
        theirs = from_parameter(place, found)
        if not np.array_equal(np.asarray(theirs, ours.dtype), ours):
            raise AdapterFileError(
                f"{self.tensors.file}: {key}: got another table than {piece.slot.path} of the "
                "params, expected the same, since the adapter was trained on it. Put that table "
                "in the params first."
            )

    def _adapter(self, slot: Slot, factors: Mapping[str, Factors]) -> LoraWeight | None:
        each: dict[tuple[int, ...], Factors | None] = {}
        for index in np.ndindex(*slot.looped):
            parts: list[Factors | None] = []
            sizes = []
            for module in slot.modules[index]:
                place = self.names.places[module, slot.entry.parameter]
                piece = next(p for p in place.pieces if p.slot is slot and p.index == index)
                size = piece.stop - piece.start
                found = factors.get(place.name)
                parts.append(None if found is None else found.outputs(piece.at, piece.at + size))
                sizes.append(size)
            if self.config.dora and any(parts) and not all(parts):
                parts = [p or self._still(slot, index, k) for k, p in enumerate(parts)]
            each[index] = side_by_side(parts, sizes)
        some = next((f for f in each.values() if f is not None), None)
        if some is None:
            return None
        rank = max(f.rank for f in each.values() if f is not None)
        ranks = {0 if f is None else f.rank for f in each.values()}
        filled = {
            index: self._none(slot, index, some, rank) if f is None else f.padded(rank)
            for index, f in each.items()
        }
        a, b = (self._stacked(slot, {i: getattr(f, x) for i, f in filled.items()}) for x in "ab")
        scale = np.array([f.scale for f in filled.values()], np.float32).reshape(slot.looped)
        for size in slot.experts:
            scale = np.broadcast_to(scale[..., None], (*scale.shape, size))
        a, b = factors_from_matrix(a, b, slot.shape, slot.roles)
        w = self.leaves[slot.path]
        if self.config.init is not None:
            w = self._moved(slot, w, ranks, scale)
        magnitude = None
        if self.config.dora:
            rows = np.stack([f.magnitude for f in filled.values() if f.magnitude is not None])
            outs = [n for n, role in zip(slot.shape, slot.roles, strict=True) if role == "o"]
            magnitude = jnp.asarray(rows.reshape(*slot.looped, *outs))
        return LoraWeight(
            w=w,
            a=jnp.asarray(a),
            b=jnp.asarray(b),
            scale=jnp.array(scale),
            roles=slot.roles,
            magnitude=magnitude,
            dropout=self.config.dropout,
        )

    def _stacked(self, slot: Slot, each: Mapping[tuple[int, ...], np.ndarray]) -> np.ndarray:
        rows = np.stack(list(each.values()))
        return rows.reshape(*slot.looped, *rows.shape[1:])

    def _still(self, slot: Slot, index: tuple[int, ...], k: int) -> Factors:
        raise AdapterFileError(
            f"{self.config.file}: use_dora: {slot.modules[(*index, k)]} has no adapter and others "
            f"of {slot.path} have one, expected all or none, since DoRA's magnitude is that of the "
            "whole weight."
        )

    def _none(self, slot: Slot, index: tuple[int, ...], like: Factors, rank: int) -> Factors:
        """No change of one matrix of a stack: zeros, which do not train, and its own norms."""
        some = like.padded(rank)
        magnitude = None
        if some.magnitude is not None:
            matrix = np.asarray(_matrices(slot, self.leaves[slot.path])[index], np.float32)
            magnitude = np.linalg.norm(matrix, axis=0).astype(some.magnitude.dtype)
        return some._replace(a=some.a * 0, b=some.b * 0, magnitude=magnitude)

    def _moved(self, slot: Slot, w: Any, ranks: set[int], scale: np.ndarray) -> Any:
        """The base as PEFT moves it when it loads such an adapter."""
        init = {"pissa": pissa(), "olora": olora}[str(self.config.init)]
        plain = slot.entry.kind in ("linear", "conv1d") and slot.entry.part is None
        if len(ranks) > 1 or len({*scale.flat}) > 1 or not plain or slot.entry.fused:
            raise AdapterFileError(
                f"{self.config.file}: init_lora_weights: {self.config.init} on {slot.path}, "
                "expected linear layers, none of them fused, all of a stack with one rank and "
                "scale, since the base has to be moved as PEFT moves it. Convert the adapter in "
                "PEFT: save_pretrained(..., path_initial_model_for_weight_conversion=...)."
            )
        target = Target(
            path=slot.path, roles=slot.roles, rank=max(ranks), scale=float(scale.flat[0])
        )
        return init(jax.random.key(0), w, target)[0]

    # ----------------------------------------------------------------------------------------------
    # Tied embeddings

    def _check_tied(self) -> None:
        """A tied table is one leaf here: an adapter of the lookup alone would change the head."""
        for head, slot in self.names.tied.items():
            table = next(iter(slot.modules.flat))
            saved = any(is_within(table, name) for name in self.config.saved)
            if not (table in self.targets or head in self.tied_targets or saved):
                continue
            if not self.config.tying and _TYING not in self.allow:
                raise AdapterFileError(
                    f"{self.config.file}: {_TYING} is not set, and {table} is trained, which "
                    f"here is one leaf with {head} ({slot.path}), expected an adapter of both. To take "
                    f"it as one of both, which is another model: "
                    f"peft.load(..., allow=[{_TYING!r}])."
                )
            if self.config.tying:
                self._check_tied_keys(head, table, saved)

    def _check_tied_keys(self, head: str, table: str, saved: bool) -> None:
        place = self.names.places[table, "weight"]
        stem, head_stem = _PREFIX + table, _PREFIX + head
        pairs = {
            head_stem + ".weight": (stem + ".weight", False),
            head_stem + ".lora_A.weight": (stem + ".lora_embedding_B", True),
            head_stem + ".lora_B.weight": (stem + ".lora_embedding_A", True),
        }
        for key, (first, transposed) in pairs.items():
            if key not in self.tensors or first not in self.tensors:
                continue
            other = self.tensors._all[first]
            other = other.T if transposed else other
            found = self.tensors.take(key, other.shape, f"{head} is tied to {table}")
            if not np.array_equal(found, other):
                raise AdapterFileError(
                    f"{self.tensors.file}: {key}: got other values than in {first}, expected the "
                    f"same, since {_TYING} is set."
                )
        self._check_base(place, head_stem + ".base_layer.weight")

    # ----------------------------------------------------------------------------------------------
    # What is trained in full

    def _saved(self) -> dict[tuple[str, str], np.ndarray]:
        """The parameters of modules_to_save."""
        values, hit = {}, set()
        for at, place in self.names.places.items():
            by = [n for n in self.config.saved if is_within(place.module, n)]
            if not by:
                continue
            hit.update(by)
            stem = f"{_PREFIX}{place.module}"
            check_kind_in_full(place, f"{self.config.file}: modules_to_save")
            why = f"{by[0]} is among modules_to_save"
            shape = parameter_shape(place)
            values[at] = self.tensors.take(f"{stem}.{place.parameter}", shape, why)
            again = f"{stem}.modules_to_save.{place.parameter}"  # which PEFT adds with bias="all"
            if again in self.tensors and not np.array_equal(
                self.tensors.take(again, shape, why), values[at]
            ):
                raise AdapterFileError(
                    f"{self.tensors.file}: {again}: got other values than in "
                    f"{stem}.{place.parameter}, expected the same."
                )
            base = f"{stem}.original_module.{place.parameter}"
            if base in self.tensors:
                self.tensors.take(base, shape, why)  # the base's, which PEFT does not use
        missing = [n for n in self.config.saved if n not in hit]
        if hit:
            missing = [n for n in missing if n not in optional_heads(missing)]
        if missing:
            raise AdapterFileError(
                f"{self.config.file}: modules_to_save: {missing[0][:200]!r} is no module that the "
                f"map leads to, expected each to be one. {self.names.entry_hint()}"
            )
        return values

    def _biases(self) -> dict[tuple[str, str], np.ndarray]:
        values: dict[tuple[str, str], np.ndarray] = {}
        if self.config.bias == "none":
            return values
        for at, place in self.names.places.items():
            if place.kind != "bias" or any(is_within(place.module, n) for n in self.config.saved):
                continue
            target = place.module in self.targets
            if not target and self.config.bias == "lora_only":
                continue
            inner = "base_layer." if target else ""
            key = f"{_PREFIX}{place.module}.{inner}{place.parameter}"
            why = f"bias is {self.config.bias!r}"
            values[at] = self.tensors.take(key, parameter_shape(place), why)
        return values

    def _lora_biases(self, values: dict[tuple[str, str], np.ndarray]) -> None:
        """lora_bias: scale times a vector is added to the outputs, so to the layer's bias."""
        if not self.config.lora_bias:
            return
        for name, place in self.targets.items():
            key = keys(place)["bias"]
            if place.kind in ("embedding", "parameter"):
                raise AdapterFileError(
                    f"{self.config.file}: lora_bias with {name}, of kind {place.kind!r}, expected "
                    "it on linear layers and convolutions alone, as PEFT does."
                )
            added = self.tensors.take(key, (place.outputs,), "lora_bias is set")
            bias = self.names.places.get((place.module, "bias"))
            if bias is None:
                raise AdapterFileError(
                    f"{self.tensors.file}: {key}: {name} has a bias of its own (lora_bias), and "
                    "the map leads to no bias of that layer to hold it. If the layer has one, give it "
                    f"an entry: names[...] = {{'module': {name!r}, 'kind': 'bias'}}. If it has "
                    "none, the adapter cannot be represented."
                )
            at = place.module, "bias"
            base = values[at] if at in values else self._base_vector(bias)
            scale = np.float32(self.strengths[name][1])
            values[at] = np.asarray(base, _wide(base)) + scale * np.asarray(added, _wide(added))

    def _base_vector(self, place: Place) -> np.ndarray:
        found = []
        for p in place.pieces:
            vectors = _vectors(p.slot, np.asarray(dense(self.leaves[p.slot.path])))
            found.append(vectors[p.index][p.start : p.stop])
        return np.concatenate(found)

    def _full(self, slot: Slot, values: Mapping[tuple[str, str], np.ndarray]) -> FullWeight | None:
        """A FullWeight of the parameters that the file has, the rest as in the base."""
        wanted = [(m, slot.entry.parameter) for m in slot.modules.flat]
        if not any(at in values for at in wanted):
            return None
        w = self.leaves[slot.path]
        base = np.asarray(dense(w))
        table = np.array(_matrices(slot, w)) if slot.is_matrix else _vectors(slot, base).copy()
        for at in wanted:
            if at not in values:
                continue
            place = self.names.places[at]
            found = from_parameter(place, values[at]) if slot.is_matrix else values[at]
            table = table.astype(np.result_type(table, found))
            for p in place.pieces:
                if p.slot is slot:
                    size = p.stop - p.start
                    table[p.index][..., p.start : p.stop] = found[..., p.at : p.at + size]
        return FullWeight(w=w, value=_whole(slot, table, w))

    def _tokens(self) -> list[tuple[Slot, tuple[int, ...], np.ndarray]]:
        """Rows of embeddings that the adapter replaces."""
        tokens = self.config.tokens
        if tokens is None:
            return []
        tables = [p for p in self.names.places.values() if p.kind == "embedding"]
        suffix = ".token_adapter.trainable_tokens_delta"
        if isinstance(tokens, dict):
            chosen = []
            for name, rows in tokens.items():
                hit = [p for p in tables if has_tail(p.module, name)]
                if len(hit) != 1:
                    raise AdapterFileError(
                        f"{self.config.file}: trainable_token_indices: {name[:200]!r} is "
                        f"{len(hit)} embeddings of the map, expected one. Entries of kind "
                        "'embedding' count."
                    )
                chosen.append((hit[0], rows))
        else:
            hit = [p for p in tables if f"{_PREFIX}{p.module}{suffix}" in self.tensors]
            if len(hit) != 1:
                raise AdapterFileError(
                    f"{self.tensors.file}: trainable_token_indices: got {len(hit)} embeddings of "
                    f"the map with a key that ends in {suffix}, expected one."
                )
            chosen = [(hit[0], tokens)]
        found = []
        for place, rows in chosen:
            size = math.prod(place.slot.inputs)
            if len({*rows}) < len(rows) or max(rows, default=0) >= size or place.slot.looped:
                raise AdapterFileError(
                    f"{self.config.file}: trainable_token_indices: expected different rows of "
                    f"{place.module}, below {size}, got {str(rows)[:200]}."
                )
            key = f"{_PREFIX}{place.module}{suffix}"
            shape = len(rows), place.outputs
            found.append((place.slot, rows, self.tensors.take(key, shape, f"{rows} train"[:200])))
        return found


def _adaptable(place: Place) -> bool:
    return place.kind == "parameter" or place.parameter == "weight"


def _wide(x: np.ndarray) -> Any:
    return np.float64 if x.dtype == np.float64 else np.float32


def _matrices(slot: Slot, w: Any) -> np.ndarray:
    """(looped..., experts..., I, O) of a leaf."""
    return np.asarray(to_matrix(w, slot.roles))


def _vectors(slot: Slot, w: np.ndarray) -> np.ndarray:
    """(looped..., O) of a leaf of vectors."""
    return w.reshape(*slot.looped, slot.outputs)


def _whole(slot: Slot, table: np.ndarray, w: Any) -> jax.Array:
    """The leaf of such matrices, or vectors, in w's dtype."""
    value = jnp.asarray(table)
    value = from_matrix(value, slot.shape, slot.roles) if slot.is_matrix else value
    return value.reshape(slot.shape).astype(w.dtype)


def check_allow(allow: Any) -> frozenset[str]:
    """What `load` is told to take otherwise than the file says."""
    given = frozenset([allow] if isinstance(allow, str) else allow)
    if given - {_TYING}:
        raise TargetError(
            f"allow: got {sorted(given)}, expected names among [{_TYING!r}]: "
            f"peft.load(..., allow=[{_TYING!r}])."
        )
    return given
