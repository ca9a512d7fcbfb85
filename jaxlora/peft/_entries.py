"""The map from paths to PyTorch modules, one entry at a time: what may be said, and its checks."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeAlias

from jaxlora import _paths
from jaxlora._errors import TargetError

Names: TypeAlias = Mapping[str, "str | Mapping[str, Any]"]

MATRICES = ("linear", "conv1d", "embedding", "conv", "parameter")
VECTORS = ("bias", "vector")
_FIELDS = {
    "module": "the name of the PyTorch module, or a list of them",
    "kind": f"one of {', '.join(MATRICES + VECTORS)}",
    "roles": "as in LoraConfig(roles=...)",
    "sizes": "the outputs of each module of a list",
    "part": "which part, from 0, of the outputs of a fused module this is",
    "interleaved": "of a part: in how many groups their module deals out the outputs of its parts",
    "order": "the dims of a convolution, for instance 'HWIO'",
    "parameter": "the name of the parameter, 'weight' or 'bias' if not given",
    "swap": "of kind 'parameter': PEFT's A acts on our outputs",
    "tied": "modules that share an embedding's weight, 'lm_head' for instance; [] if none does",
    "tokens": "of an embedding trained in full: the rows that train",
    "groups": "of a convolution",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """One entry of the map, checked."""

    pattern: str
    modules: tuple[str, ...]
    fused: bool
    kind: str = "linear"
    parameter: str = "weight"
    roles: str | None = None
    sizes: tuple[int, ...] | None = None
    part: int | None = None
    interleaved: int = 1
    order: str | None = None
    swap: bool = False
    tied: tuple[str, ...] | None = None  # not said
    tokens: tuple[int, ...] | None = None


def entries(names: Any) -> list[Entry]:
    """All of a map's, checked."""
    return [_entry(pattern, value) for pattern, value in _items(names)]


def _items(names: Any) -> list[tuple[str, Any]]:
    if not isinstance(names, Mapping) or not names:
        raise TargetError(
            f"names: got {names!r}, expected a map from path patterns to module names, for "
            "instance {'layers/query/kernel': 'model.layers.{}.self_attn.q_proj'}."
        )
    return list(names.items())


def _entry(pattern: str, value: Any) -> Entry:
    given = {"module": value} if isinstance(value, str) else value
    here = f"names[{pattern!r}]"

    def wrong(field: str, expected: str) -> TargetError:
        return TargetError(f"{here}: got {field} {given[field]!r}, expected {expected}.")

    if not isinstance(given, Mapping) or "module" not in given:
        raise TargetError(
            f"{here}: got {value!r}, expected the name of a module, or a mapping with `module` and "
            f"any of {', '.join(f for f in _FIELDS if f != 'module')}."
        )
    unknown = [field for field in given if field not in _FIELDS]
    if unknown:
        fields = _paths.listing((f"{k}: {v}" for k, v in _FIELDS.items()), len(_FIELDS))
        raise TargetError(f"{here}: got {unknown[0]!r}, expected fields among:{fields}")
    module = given["module"]
    fused = not isinstance(module, str)
    modules = tuple(module) if isinstance(module, list | tuple) else (module,)
    if not modules or not all(isinstance(m, str) and m for m in modules):
        raise wrong("module", _FIELDS["module"])
    kind = given.get("kind", "linear")
    if kind != "parameter" and any(m.endswith((".weight", ".bias")) for m in modules):
        raise wrong("module", "a module's name, without the parameter's ('.weight')")
    if kind not in MATRICES + VECTORS:
        raise wrong("kind", _FIELDS["kind"])
    parameter = given.get("parameter", "bias" if kind == "bias" else "weight")
    if not isinstance(parameter, str) or not parameter:
        raise wrong("parameter", _FIELDS["parameter"])
    if kind == "parameter":
        if fused or "parameter" in given or "." not in modules[0]:
            raise wrong("module", "of kind 'parameter': one name, module and parameter, 'moe.w1'")
        stem, _, parameter = modules[0].rpartition(".")
        modules = (stem,)
    sizes, part, order = given.get("sizes"), given.get("part"), given.get("order")
    if sizes is not None and not (
        fused and _is_list(sizes) and len(sizes) == len(modules) and all(map(_is_count, sizes))
    ):
        raise wrong("sizes", "one positive number for each module of the list")
    if part is not None and (fused or not isinstance(part, int) or kind in ("embedding", "conv")):
        raise wrong("part", _FIELDS["part"] + ", of a linear layer or a bias")
    interleaved = given.get("interleaved", 1)
    if "interleaved" in given and (part is None or not _is_count(interleaved)):
        raise wrong("interleaved", "a positive number, of a leaf that is a 'part', 0, 1, ...")
    if fused and kind in ("embedding", "conv"):
        raise wrong("module", f"a single one of kind {kind!r}")
    if order is not None and (kind != "conv" or not isinstance(order, str)):
        raise wrong("order", "it of kind 'conv' alone")
    if given.get("groups", 1) != 1:
        raise wrong(
            "groups",
            "1: PEFT's factors of a grouped convolution see all of its inputs, which no change of "
            "its kernel does. Leave the layer out of the targets",
        )
    if given.get("swap", False) not in (True, False) or ("swap" in given and kind != "parameter"):
        raise wrong("swap", "a bool, of kind 'parameter' alone")
    tied = given.get("tied")
    tied = (tied,) if isinstance(tied, str) else () if tied is None else tied
    if not _is_list(tied) or not all(isinstance(x, str) and x for x in tied):
        raise wrong("tied", "names of modules")
    if tied and kind != "embedding":
        raise wrong("tied", "it of kind 'embedding' alone")
    tokens = given.get("tokens")
    if tokens is not None and not (
        kind == "embedding"
        and _is_list(tokens)
        and all(_is_count(t) or t == 0 for t in tokens)
        and len(tokens) == len({*tokens}) > 0
    ):
        raise wrong("tokens", "different rows, of kind 'embedding' alone")
    return Entry(
        pattern=pattern,
        modules=modules,
        fused=fused,
        kind=kind,
        parameter=parameter,
        roles=given.get("roles"),
        sizes=None if sizes is None else (*sizes,),
        part=part,
        interleaved=int(interleaved),
        order=order,
        swap=bool(given.get("swap", False)),
        tied=(*tied,) if "tied" in given else None,
        tokens=None if tokens is None else (*tokens,),
    )


def _is_list(x: Any) -> bool:
    return isinstance(x, list | tuple)


def _is_count(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and x > 0
