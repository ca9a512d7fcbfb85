"""Which leaf of the params is which parameter of which PyTorch module."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlora import _paths
from jaxlora._errors import RolesError, TargetError
from jaxlora._matrix import split_shape
from jaxlora._weight import check_roles, is_node
from jaxlora.peft._entries import MATRICES, VECTORS, Entry, Names, entries

_IO_NAMES = ("kernel", "embedding")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slot:
    """A leaf and the modules that its matrices, or vectors, are in.

    Attributes:
      path: the leaf's.
      shape: the leaf's.
      entry: of the map.
      roles: of a matrix; "" for a vector.
      modules: (looped..., number of fused modules), the names.
      experts: the stacked dim that lies within a module, of kind 'parameter'; () or (E,).
      inputs: the sizes of the input dims; () for a vector.
      outputs: how many.
    """

    path: str
    shape: tuple[int, ...]
    entry: Entry
    roles: str
    modules: np.ndarray
    experts: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: int

    @property
    def looped(self) -> tuple[int, ...]:
        return self.modules.shape[:-1]

    @property
    def is_matrix(self) -> bool:
        return self.entry.kind in MATRICES

    @property
    def channel(self) -> int:
        """Which of the input dims of a convolution is that of the channels."""
        order = self.entry.order
        if order is not None:
            ins = [c for c, role in zip(order, self.roles, strict=True) if role == "i"]
            return ins.index("I")
        rest = self.roles.replace("s", "")
        return len(self.inputs) - 1 if rest.endswith("o") else 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Piece:
    """Outputs [start, stop) of one matrix of a leaf are [at, at + stop - start) of a parameter."""

    slot: Slot
    index: tuple[int, ...]
    start: int
    stop: int
    at: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """A parameter of a PyTorch module, and the leaves that its outputs are in."""

    module: str
    parameter: str
    pieces: tuple[Piece, ...]

    @property
    def slot(self) -> Slot:
        return self.pieces[0].slot

    @property
    def kind(self) -> str:
        return self.slot.entry.kind

    @property
    def name(self) -> str:
        """What PEFT's config calls it: a module, or a parameter of `target_parameters`."""
        return f"{self.module}.{self.parameter}" if self.kind == "parameter" else self.module

    @property
    def adaptable(self) -> bool:
        """Whether PEFT can adapt it: the weight of a module, or a parameter by its name."""
        return self.kind == "parameter" or self.parameter == "weight"

    @property
    def outputs(self) -> int:
        return sum(p.stop - p.start for p in self.pieces)

    @functools.cached_property
    def order(self) -> np.ndarray | None:
        """For each output of theirs which of ours it is, our parts end to end; None: the same.

        GPT-NeoX has query, key and value of the first head, then of the second, and so on.
        """
        groups = self.slot.entry.interleaved
        if groups == 1:
            return None
        parts = [np.arange(p.at, p.at + p.stop - p.start).reshape(groups, -1) for p in self.pieces]
        return np.concatenate(parts, axis=1).reshape(-1)


class Map:
    """The slots and places of some params."""

    def __init__(self, names: Names, leaves: Mapping[str, Any], roles: Mapping[str, str] | None):
        found: dict[str, tuple[Entry, re.Match]] = {}
        literal: dict[str, list[str]] = {}  # so that a map of n plain paths takes n steps, not n^2
        for path in leaves:
            for name in {path, _paths.short(path)}:
                literal.setdefault(re.escape(name), []).append(path)
        for entry in entries(names):
            matched = False
            for path in literal.get(entry.pattern, leaves):
                match = _match(entry.pattern, path)
                if match is None:
                    continue
                matched = True
                if path in found:
                    raise TargetError(
                        f"names: {path} is matched by {found[path][0].pattern!r} and by "
                        f"{entry.pattern!r}, expected one of them. Narrow one of the patterns."
                    )
                found[path] = entry, match
            if not matched:
                near = _paths.listing(_paths.nearest(entry.pattern, leaves))
                raise TargetError(
                    f"names: {entry.pattern!r} matches nothing, expected a regex of the whole path "
                    f"of a leaf. Of the {len(leaves)} paths, the nearest are:{near}"
                )
        for path in found:
            if not jnp.issubdtype(leaves[path].dtype, jnp.floating):
                raise TargetError(
                    f"names: {found[path][0].pattern!r} matches {path}, of dtype "
                    f"{leaves[path].dtype}, expected floating-point leaves alone."
                )
        self.slots = {
            path: _slot(path, tuple(leaves[path].shape), entry, match, roles)
            for path, (entry, match) in found.items()
        }
        self.places = _places(self.slots)
        self._shapes = {path: tuple(leaf.shape) for path, leaf in leaves.items()}
        self.tied = {
            filled: slot
            for slot in self.slots.values()
            for template in slot.entry.tied or ()
            for filled in [_fill(template, found[slot.path][1], (), slot.path)]
        }

    def check_tied(self, path: str) -> None:
        """Raises unless it is known whether a table that trains is the model's head too.

        PEFT adapts lookup and head by themselves. Where a head has a leaf of its own, of the
        table's size, they are not tied; where none has, the map has to say it.
        """
        slot = self.slots[path]
        entry = slot.entry
        if entry.kind != "embedding" or entry.tied is not None or entry.tokens is not None:
            return
        size = math.prod(slot.inputs)
        if any(size in shape for other, shape in self._shapes.items() if other != path):
            return
        raise TargetError(
            f"{path}: trains, and no other leaf has the {size:,} rows of this table, so that it "
            "may be the model's head too. PEFT adapts lookup and head by themselves: say which "
            f"module shares it, names[{entry.pattern!r}]['tied'] = 'lm_head', or [] if none does."
        )

    def entry_hint(self) -> str:
        return f"The map leads to:{_paths.listing(sorted({p.name for p in self.places.values()}))}"


def plain_leaves(params: Any, who: str) -> tuple[list[tuple[str, Any]], Any]:
    """The leaves of params without adapters."""
    pairs, treedef = _paths.flatten_with_paths(params, is_leaf=is_node)
    for path, leaf in pairs:
        if is_node(leaf):
            raise TargetError(
                f"{path}: got a {type(leaf).__name__}, expected plain params. Start from the base: "
                f"{who}(directory, jaxlora.base_params(lora), names)."
            )
        if isinstance(leaf, jax.core.Tracer):
            raise TargetError(
                f"{path}: got a traced array, expected one with values: {who} reads files, outside "
                "of jax.jit."
            )
    return pairs, treedef


def _match(pattern: str, path: str) -> re.Match | None:
    try:
        return re.fullmatch(pattern, path) or re.fullmatch(pattern, _paths.short(path))
    except re.error as error:
        raise TargetError(
            f"names: got {pattern!r}, expected a regex of the whole path of a leaf ({error})."
        ) from None


def _fill(template: str, match: re.Match, index: tuple[int, ...], path: str) -> str:
    """A module's name: {} is the next stacked index, {1} a group of the pattern."""
    left = list(index)

    def one(found: re.Match) -> str:
        if found[1]:
            try:
                group = match[int(found[1])]
            except IndexError:
                group = None
            if group is None:
                raise TargetError(
                    f"names: {template!r} asks for group {found[1]} of {match.re.pattern!r}, "
                    f"expected one that it has, at {path}."
                )
            return group
        if not left:
            raise TargetError(
                f"{path}: got more {{}} in {template!r} than stacked dims that lie outside of a "
                f"module ({len(index)}), expected one for each."
            )
        return str(left.pop(0))

    name = re.sub(r"\{(\d*)\}", one, template)
    if not all(name.split(".")) or re.search(r"[/\\\0\s]", name):
        raise TargetError(
            f"{path}: got {name!r} for a module, expected a name as in named_modules(): segments "
            "joined by single dots, without slashes and spaces."
        )
    if left:
        raise TargetError(
            f"{path}: got {len(index) - len(left)} {{}} in {template!r}, expected {len(index)}: "
            "one for each stacked dim (layers, experts), for instance "
            "'model.layers.{}.self_attn.q_proj'."
        )
    return name


def _slot(
    path: str,
    shape: tuple[int, ...],
    entry: Entry,
    match: re.Match,
    given: Mapping[str, str] | None,
) -> Slot:
    braces = entry.modules[0].count("{}")
    roles = ""
    experts: tuple[int, ...] = ()
    inputs: tuple[int, ...] = ()
    if entry.kind in VECTORS:
        looped, outputs = shape[:braces], math.prod(shape[braces:])
        if braces >= len(shape):
            raise TargetError(
                f"{path}: got shape {shape} for {entry.modules[0]!r}, expected a stacked dim for "
                f"each {{}} and one more. To give the kind of a matrix: names={{...: "
                "{'module': ..., 'kind': 'linear'}}."
            )
    else:
        roles = _roles(path, shape, entry, given)
        looped, inputs, sizes = split_shape(shape, roles)
        outputs = math.prod(sizes)
        if entry.kind == "parameter" and len(looped) == braces + 1:
            looped, experts = looped[:-1], looped[-1:]
    if entry.kind == "conv":
        _check_order(path, shape, roles, entry)
    modules = np.empty((*looped, len(entry.modules)), object)
    for index in np.ndindex(*looped):
        for k, template in enumerate(entry.modules):
            modules[(*index, k)] = _fill(template, match, index, path)
    if entry.fused:
        sizes = entry.sizes or (outputs // len(entry.modules),) * len(entry.modules)
        if sum(sizes) != outputs:
            raise TargetError(
                f"{path}: got {outputs} outputs for {len(entry.modules)} modules, expected "
                f"`sizes` that sum up to them: names[{entry.pattern!r}]['sizes']."
            )
    return Slot(
        path=path,
        shape=shape,
        entry=entry,
        roles=roles,
        modules=modules,
        experts=experts,
        inputs=inputs,
        outputs=outputs,
    )


def _roles(path: str, shape: tuple[int, ...], entry: Entry, given: Mapping[str, str] | None) -> str:
    found = entry.roles or _paths.lookup(given or {}, path)
    if found is None and len(shape) == 2 and _paths.leaf_name(path) in _IO_NAMES:
        found = "io"
    if found is None:
        raise RolesError(
            f"{path}: got no roles for shape {shape}, expected one letter for each dimension: s "
            "stacked, i input, o output. Read them from the model, "
            "roles=jaxlora.trace_roles(fn, params, *args), or say them: "
            f"names[{entry.pattern!r}] = {{'module': {entry.modules[0]!r}, 'roles': '...'}}."
        )
    check_roles(found, shape, path)
    return found


def _check_order(path: str, shape: tuple[int, ...], roles: str, entry: Entry) -> None:
    order = entry.order
    here = f"{path}: got order {order!r} for shape {shape} and roles {roles!r}"
    if order is None:
        rest = roles.replace("s", "")
        if rest.count("o") != 1 or not (rest.startswith("o") or rest.endswith("o")):
            raise TargetError(
                f"{path}: got roles {roles!r} for a convolution, expected one output dim, first or "
                f"last, or its order: names[{entry.pattern!r}]['order'] = 'HWIO'."
            )
        return
    spatial = [c for c in order if c in "DHW"]
    fits = len(order) == len(shape) and all(
        {"s": "S", "o": "O", "i": "IDHW"}[role].count(c) == 1
        for c, role in zip(order, roles, strict=True)
    )
    if not fits or order.count("I") != 1 or spatial != sorted(spatial):
        raise TargetError(
            f"{here}, expected a letter for each dim: I and O the channels, S stacked, and D, H, W "
            "in this order, for instance 'HWIO'."
        )


def _places(slots: Mapping[str, Slot]) -> dict[tuple[str, str], Place]:
    found: dict[tuple[str, str], list[tuple[int | None, Slot, tuple[int, ...], int, int]]] = {}
    for slot in slots.values():
        n = slot.modules.shape[-1]
        sizes = slot.entry.sizes or (slot.outputs // n,) * n
        for index in np.ndindex(*slot.looped):
            start = 0
            for k, size in enumerate(sizes):
                key = str(slot.modules[(*index, k)]), slot.entry.parameter
                entry = slot.entry.part, slot, index, start, start + size
                found.setdefault(key, []).append(entry)
                start += size
    places = {}
    for (module, parameter), parts in found.items():
        numbers = [part for part, *_ in parts]
        if numbers != [None] and sorted(-1 if k is None else k for k in numbers) != [
            *range(len(parts))
        ]:
            paths = _paths.listing(slot.path for _, slot, *_ in parts)
            raise TargetError(
                f"names: {module}.{parameter} is that of several leaves, expected one, or the "
                f"parts of a fused one with 'part': 0, 1, ... They are:{paths}"
            )
        pieces, at = [], 0
        for _, slot, index, start, stop in sorted(parts, key=lambda x: x[0] or 0):
            pieces.append(Piece(slot=slot, index=index, start=start, stop=stop, at=at))
            at += stop - start
        if len({p.slot.inputs for p in pieces}) > 1 or len({p.slot.entry.kind for p in pieces}) > 1:
            raise TargetError(
                f"names: the parts of {module} have other inputs or kinds, expected the same."
            )
        dealt = {p.slot.entry.interleaved for p in pieces}
        if len(dealt) > 1 or any((p.stop - p.start) % max(dealt) for p in pieces):
            sizes = ", ".join(str(p.stop - p.start) for p in pieces)
            raise TargetError(
                f"names: {module}: got 'interleaved' {sorted(dealt)} for parts of {sizes} outputs, "
                "expected the same number for all, one that divides each."
            )
        places[module, parameter] = Place(module=module, parameter=parameter, pieces=tuple(pieces))
    return places
