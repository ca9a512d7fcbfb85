"""What the commands read: adapters of either format, names from JSON, params."""

from __future__ import annotations

import json
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from jaxlora import _paths
from jaxlora._errors import AdapterFileError, TargetError
from jaxlora._matrix import split_shape
from jaxlora._weight import FullWeight, LoraWeight
from jaxlora.checkpoint import _description
from jaxlora.checkpoint._description import Adapter, Description
from jaxlora.checkpoint._item import DESCRIPTION, Handler, read_description
from jaxlora.checkpoint._packed import unpack
from jaxlora.checkpoint._versions import absolute, locate
from jaxlora.cli._shards import open_base

PEFT_CONFIG = "adapter_config.json"


def is_peft(directory: pathlib.Path) -> bool:
    """Whether a directory has PEFT's format; else it has jaxlora's.

    Raises:
      AdapterFileError: it has neither.
    """
    if not directory.exists():
        raise AdapterFileError(f"{directory}: not found, expected the directory of an adapter.")
    if (directory / PEFT_CONFIG).exists():
        return True
    if (locate(absolute(directory)) / DESCRIPTION).exists():
        return False
    patterns = (PEFT_CONFIG, DESCRIPTION, f"v*/{DESCRIPTION}")
    found = {
        str(file.parent.parent if file.match(patterns[2]) else file.parent)
        for depth in ("*/", "*/*/")
        for pattern in patterns
        for file in sorted(directory.glob(depth + pattern))
    }
    hint = f" Below it there are:{_paths.listing(sorted(found))}" if found else ""
    raise AdapterFileError(
        f"{directory}: got no adapter, expected {PEFT_CONFIG} (PEFT's) or {DESCRIPTION} "
        f"(jaxlora's).{hint}"
    )


def check_new(out: pathlib.Path) -> None:
    """Raises unless nothing is there, or an empty directory."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise TargetError(
            f"{out}: is there already, expected a new path. Remove it, or give another."
        )


def read_names(file: pathlib.Path) -> dict[str, Any]:
    """The map of `jaxlora.peft` as JSON."""
    try:
        names = json.loads(file.read_text())
    except (ValueError, RecursionError) as error:
        raise TargetError(f"{file}: expected JSON, got something else: {error}.") from None
    if not isinstance(names, dict):
        raise TargetError(
            f"{file}: got a {type(names).__name__}, expected an object: "
            '{"layers/query/kernel": "model.layers.{}.self_attn.q_proj"}.'
        )
    return names


class Saved(NamedTuple):
    """What `jaxlora.checkpoint` wrote: its description, and the arrays of each adapter."""

    description: Description
    arrays: dict[str, dict[str, np.ndarray]]


def read_saved(directory: pathlib.Path) -> Saved:
    """An adapter of jaxlora, without its base."""
    where = locate(absolute(directory))
    description = read_description(where)
    packed = Handler().read(where, description)
    arrays = {
        path: {name: unpack(packed, *part) for name, part in adapter.parts.items()}
        for path, adapter in description.adapters.items()
    }
    return Saved(description, arrays)


def lora_without_base(saved: Saved) -> dict[str, Any]:
    """{path: leaf}, a `lora` tree whose base has shapes alone."""
    base, adapters = saved.description.base, saved.description.adapters
    shapes = {path: x.shape for path, x in base.items() if x.shape is not None}
    tree: dict[str, Any] = {
        path: jax.ShapeDtypeStruct(shape, _dtype(base[path].kind)) for path, shape in shapes.items()
    }
    for path, adapter in adapters.items():
        tree[path] = _node(tree[path], adapter, saved.arrays[path])
    return tree


def _dtype(kind: str) -> Any:
    try:
        return jnp.dtype(kind)
    except TypeError:  # how it is quantized
        return jnp.float32


def _node(w: jax.ShapeDtypeStruct, adapter: Adapter, arrays: dict[str, np.ndarray]) -> Any:
    if adapter.kind == "full":
        return FullWeight(w=w, **arrays)
    stacked, _, outputs = split_shape(w.shape, adapter.roles)
    scale = _description.scale_from_json(adapter.scale, stacked, adapter.scale_dtype)
    parts: dict[str, Any] = {**arrays}
    if "magnitude" in parts:  # of a base that is not here; nothing is computed with it
        parts["squared_norm"] = np.ones((*stacked, *outputs), np.float32)
    return LoraWeight(w=w, roles=adapter.roles, dropout=adapter.dropout, scale=scale, **parts)


def read_params(path: pathlib.Path) -> dict[str, np.ndarray]:
    """The leaves of a base by their paths: of orbax's checkpoint, or of a safetensors file.

    Raises:
      TargetError: neither is there.
    """
    if path.is_file():
        leaves = open_base(path).leaves()
        joined = any("/" in key for key in leaves)
        return {key if joined else key.replace(".", "/"): x for key, x in leaves.items()}
    if any(path.glob("*.safetensors")):
        raise TargetError(
            f"{path}: got a directory with safetensors files, which is a PyTorch model's, expected "
            "the params in JAX, by their paths: a checkpoint of orbax's, or one safetensors file "
            "whose keys are the paths."
        )
    return _read_orbax(path)


def _read_orbax(path: pathlib.Path) -> dict[str, np.ndarray]:
    handler = ocp.PyTreeCheckpointHandler()
    where = absolute(path)
    try:
        metadata = handler.metadata(where)
        tree = metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        found = handler.restore(where, args=ocp.args.PyTreeRestore(restore_args=as_numpy))
    except Exception as error:  # whatever orbax makes of another directory
        items = sorted(str(x.parent) for d in ("*/", "*/*/") for x in path.glob(d + "_METADATA"))
        hint = f" Below it there are:{_paths.listing(items)}" if items else ""
        raise TargetError(
            f"{path}: got no params ({type(error).__name__}: {str(error)[:300]}), expected a "
            f"checkpoint of orbax's, or a safetensors file.{hint}"
        ) from None
    pairs, _ = _paths.flatten_with_paths(found)
    if all(key.endswith("/value") for key, _ in pairs):  # boxes of Flax's, saved as dicts
        pairs = [(key.removesuffix("/value"), x) for key, x in pairs]
    return dict(pairs)
