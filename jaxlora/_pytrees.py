"""How the nodes of a tree are made known to JAX."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import jax
import jax.export


def register(cls: type, data: tuple[str, ...], static: tuple[str, ...] = ()) -> type:
    """Registers a frozen dataclass as a pytree whose invariants are checked only where it is built.

    `jax.tree_util.register_dataclass` unflattens through `__init__`, and would check half trees,
    masks and in_axes, which rightly hold None, bools and integers in place of arrays.
    """

    def flatten_with_keys(node):
        keyed = tuple((jax.tree_util.GetAttrKey(f), getattr(node, f)) for f in data)
        return keyed, tuple(getattr(node, f) for f in static)

    def flatten(node):
        return tuple(getattr(node, f) for f in data), tuple(getattr(node, f) for f in static)

    def unflatten(aux, children):
        node: Any = object.__new__(cls)
        for name, value in zip(static + data, (*aux, *children), strict=True):
            object.__setattr__(node, name, value)
        return node

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    return cls


def register_export(
    cls: type,
    to_json: Callable[[tuple], Any] = list,
    from_json: Callable[[Any], tuple] = tuple,
) -> None:
    """Lets an exported function keep such a node in the structure of its arguments."""
    jax.export.register_pytree_node_serialization(
        cls,
        serialized_name=f"jaxlora.{cls.__name__}",
        serialize_auxdata=lambda aux: json.dumps(to_json(aux)).encode(),
        deserialize_auxdata=lambda data: from_json(json.loads(bytes(data))),
    )
