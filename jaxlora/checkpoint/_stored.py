"""A `lora` tree as a description and a few arrays, and back, on a base."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxlora import __version__, _paths
from jaxlora._dora import squared_norm
from jaxlora._errors import CheckpointError, RolesError, TargetError
from jaxlora._placement import dims_of, place
from jaxlora._tree import base_params
from jaxlora._weight import FullWeight, LoraWeight, is_node
from jaxlora.checkpoint import _description
from jaxlora.checkpoint._description import Adapter, Description
from jaxlora.checkpoint._fingerprint import Difference, Leaf, differences, fingerprint
from jaxlora.checkpoint._packed import checksum, is_whole, pack, unpack


def described(lora: Any, config: Any) -> tuple[Description, dict[str, Any]]:
    """The description, without checksums of arrays that are whole here, and the packed arrays."""
    base = fingerprint(base_params(lora))
    pairs, _ = _paths.flatten_with_paths(lora, is_leaf=is_node)
    nodes = {path: leaf for path, leaf in pairs if is_node(leaf)}
    if not nodes:
        raise TargetError(
            "checkpoint.save: got a tree without adapters, expected one from jaxlora.init: "
            "jaxlora.combine(trainable, frozen)."
        )
    for path, node in nodes.items():
        _check_values(path, node)
    parts = {path: _parts(node) for path, node in nodes.items()}
    flat = [(path, name, x) for path, named in parts.items() for name, x in named.items()]
    packed, places = pack([x for _, _, x in flat])
    where: dict[str, dict[str, Any]] = {path: {} for path in nodes}
    for (path, name, x), at in zip(flat, places, strict=True):
        where[path][name] = (str(x.dtype), at)
    # Those over several processes take part now; the rest can wait for the thread that writes.
    sums = {name: "" if is_whole(x) else checksum(x) for name, x in packed.items()}
    is_settings = dataclasses.is_dataclass(config) and not isinstance(config, type)
    if not (config is None or isinstance(config, Mapping) or is_settings):
        raise TargetError(
            f"checkpoint.save: got a config of type {type(config).__name__}, expected a "
            "jaxlora.LoraConfig or a dict."
        )
    description = Description(
        versions={"jaxlora": __version__, "jax": jax.__version__},
        config=None if config is None else _description.config_to_json(config),
        arrays={name: (str(x.dtype), tuple(x.shape), sums[name]) for name, x in packed.items()},
        adapters={path: _adapter(node, where[path]) for path, node in nodes.items()},
        base=base,
    )
    return description, packed


def _parts(node: Any) -> dict[str, Any]:
    """The arrays that are written of a node."""
    if isinstance(node, FullWeight):
        return {"value": node.value}
    parts = {"a": node.a, "b": node.b}
    if node.magnitude is not None:
        parts["magnitude"] = node.magnitude
        # Made anew from w; but if `init` was compiled, its sums may have been rounded otherwise.
        if not _same(node.squared_norm, squared_norm(node.w, node.roles)):
            parts["squared_norm"] = node.squared_norm
    return parts


def _same(x: Any, y: Any) -> bool:
    return x.dtype == y.dtype and bool(np.array_equal(_everywhere(x), _everywhere(y)))


def _everywhere(x: Any) -> np.ndarray:
    """A small array, as every process has it."""
    return np.asarray(x if is_whole(x) else multihost_utils.process_allgather(x, tiled=True))


def _check_values(path: str, node: Any) -> None:
    for name, x in vars(node).items():
        if name != "w" and isinstance(x, jax.core.Tracer | jax.ShapeDtypeStruct):
            raise TargetError(
                f"{path}: got {name} without values ({type(x).__name__}), expected one with data. "
                "Call jaxlora.checkpoint outside of jax.jit and jax.eval_shape."
            )


def _adapter(node: Any, parts: Mapping[str, Any]) -> Adapter:
    if isinstance(node, FullWeight):
        return Adapter(kind="full", parts=parts)
    return Adapter(
        kind="lora" if node.magnitude is None else "dora",
        parts=parts,
        roles=node.roles,
        scale=_description.scale_to_json(_everywhere(node.scale)),
        scale_dtype=str(node.scale.dtype),
        dropout=node.dropout,
    )


# --------------------------------------------------------------------------------------------------
# Back


def check_base(where: str, description: Description, params: Any, allow: bool) -> set[str]:
    """The paths at which the base is the same. Raises if it may not differ elsewhere."""
    for path, leaf in _paths.flatten_with_paths(params, is_leaf=is_node)[0]:
        if is_node(leaf):
            raise TargetError(
                f"{path}: got a {type(leaf).__name__}, expected plain params: "
                "jaxlora.checkpoint.restore(path, jaxlora.base_params(lora))."
            )
    found = fingerprint(params)
    odd = differences(description.base, found)
    adapted = description.adapters.keys()
    fatal = [d for d in odd if d.path in adapted and (d.what != "values") and not _fits(d, found)]
    if fatal or (odd and not allow):
        shown = fatal if allow else odd
        hint = _under_params(description.base, found) or _hint(odd, adapted, bool(fatal))
        error = CheckpointError(
            f"{where}: got params that are not this adapter's base. They differ at:"
            f"{_paths.listing([f'{d.path}: {d.text}' for d in shown], n=20)}\n{hint}"
        )
        error.paths = tuple(d.path for d in shown)
        raise error
    return found.keys() - {d.path for d in odd}


def _under_params(base: Mapping[str, Leaf], found: Mapping[str, Leaf]) -> str:
    """A remedy, if the two differ by Flax's outermost key alone."""
    alike = {_paths.short(path) for path in base} == {_paths.short(path) for path in found}
    if base.keys() == found.keys() or not alike:
        return ""
    if all(path.startswith("params/") for path in found):
        return "The adapter's base has no 'params/' in front: give variables['params']."
    return "The adapter's base has 'params/' in front of all: give {'params': params}."


def _fits(difference: Difference, found: Mapping[str, Leaf]) -> bool:
    """Whether an adapter can be put on a leaf that differs so: another dtype, or quantized."""
    return difference.what == "kind" and "float" in found[difference.path].kind


def _hint(odd: list[Difference], adapted: Any, fatal: bool) -> str:
    hints = ["Give the params that it was trained on, jaxlora.base_params(lora)."]
    if any(d.what == "kind" for d in odd):
        hints.append("A quantized base has to be quantized again: jaxlora.quantize(params, ...).")
    if any(d.what == "values" and d.path in adapted for d in odd):
        hints.append(
            "After an initializer that moves the base (pissa, olora, ...) those are the moved "
            "ones; to have an adapter of the original ones, save jaxlora.rebase(lora, initial)."
        )
    if fatal:
        hints.append("Shapes have to fit, and weights that are adapted have to be there.")
    else:
        hints.append(
            "To use other params all the same: jaxlora.checkpoint.restore(path, params, "
            "allow_base_mismatch=True)."
        )
    return " ".join(hints)


def on_base(
    where: str,
    description: Description,
    packed: Mapping[str, np.ndarray],
    params: Any,
    same: set[str],
) -> Any:
    """The params with nodes where there are adapters."""

    def node(path: str, w: Any) -> Any:
        adapter = description.adapters.get(path)
        if adapter is None:
            return w
        try:
            if adapter.kind == "full":
                value = unpack(packed, *adapter.parts["value"])
                return FullWeight(w=w, value=place(value, w, range(value.ndim)))
            return _lora_weight(adapter, packed, w, keep_norm=path in same)
        except (TargetError, RolesError) as error:
            raise CheckpointError(f"{where}: {path}: {error}") from error

    pairs, treedef = _paths.flatten_with_paths(params)
    return jax.tree.unflatten(treedef, [node(path, leaf) for path, leaf in pairs])


def _lora_weight(
    adapter: Adapter, packed: Mapping[str, np.ndarray], w: Any, keep_norm: bool
) -> LoraWeight:
    arrays = {name: unpack(packed, *part) for name, part in adapter.parts.items()}
    if not keep_norm:
        arrays.pop("squared_norm", None)
    stacked = tuple(n for n, role in zip(w.shape, adapter.roles, strict=False) if role == "s")
    arrays["scale"] = _description.scale_from_json(adapter.scale, stacked, adapter.scale_dtype)
    return LoraWeight(
        w=w,
        roles=adapter.roles,
        dropout=adapter.dropout,
        **{name: place(x, w, dims_of(name, adapter.roles)) for name, x in arrays.items()},
    )
