"""Leaves of params and the PyTorch tensors that they are made of: by one map of names.

The map is that of `jaxlora.peft`: {regex of a leaf's path: module}, or {...: {"module": ...,
"kind": ...}}, with `{}` for the layer in a module's name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol, TypeAlias

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from models.errors import ModelError

Part: TypeAlias = tuple[slice, ...]
Shardings: TypeAlias = Sharding | Callable[[str, tuple[int, ...]], Sharding] | None


class Leaf(NamedTuple):
    """A leaf of the params, and the PyTorch tensors that it is a stack of.

    Attributes:
      path: its keys joined by '/'.
      shape: with the layers first, if it is stacked.
      tensors: their names; a single one if it is not stacked.
      stacked: whether the first dim is that of the layers.
      transposed: whether theirs are (out, in) where ours are (in, out).
    """

    path: str
    shape: tuple[int, ...]
    tensors: tuple[str, ...]
    stacked: bool
    transposed: bool

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        shape = self.shape[self.stacked :]
        return shape[::-1] if self.transposed else shape


class Tensors(Protocol):
    """Where tensors come from: safetensors files, a GGUF file."""

    where: str

    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    def dtype(self, name: str) -> Any: ...

    def read(self, name: str, part: Part) -> np.ndarray: ...


class Renamed:
    """The same tensors under other names."""

    def __init__(self, source: Tensors, rename: Callable[[str], str]):
        self.where, self._source = source.where, source
        self._theirs: dict[str, str] = {}
        for name in source.shapes():
            other = self._theirs.setdefault(rename(name), name)
            if other != name:
                raise ModelError(
                    f"{self.where}: {name}: is {rename(name)}, as {other} is, expected it once."
                )

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        shapes = self._source.shapes()
        return {ours: shapes[theirs] for ours, theirs in self._theirs.items()}

    def dtype(self, name: str) -> Any:
        return self._source.dtype(self._theirs[name])

    def read(self, name: str, part: Part) -> np.ndarray:
        return self._source.read(self._theirs[name], part)


def leaves(shapes: Any, names: Mapping[str, Any]) -> list[Leaf]:
    """All leaves of a tree of shapes, with the names that the map gives their tensors."""
    found = []
    for path, leaf in flax.traverse_util.flatten_dict(shapes, sep="/").items():
        ((module, kind),) = (pair for p in names.items() if (pair := _match(*p, path)))
        stacked = "{}" in module
        parameter = "bias" if kind == "bias" else "weight"
        filled = [module.replace("{}", str(i)) for i in range(leaf.shape[0] if stacked else 1)]
        tensors = tuple(f"{name}.{parameter}" for name in filled)
        found.append(Leaf(path, tuple(leaf.shape), tensors, stacked, kind == "linear"))
    return found


def _match(pattern: str, value: str | Mapping[str, Any], path: str) -> tuple[str, str] | None:
    """(module with {} for the layer, kind), if the pattern is the path's."""
    match = re.fullmatch(pattern, path)
    if match is None:
        return None
    entry: Mapping[str, Any] = {"module": value} if isinstance(value, str) else value
    module = re.sub(r"\{(\d)\}", lambda group: match[int(group[1])], entry["module"])
    return module, entry.get("kind", "linear")


def check(
    wanted: list[Leaf], source: Tensors, surplus: Callable[[str], bool], expected: str
) -> list[str]:
    """Each tensor is there, in its shape, and no other is but those that are surplus: these.

    Raises:
      ModelError: it is not so; with `expected`, what the tensors should be those of.
    """
    shapes = dict(source.shapes())
    want = {name: leaf.tensor_shape for leaf in wanted for name in leaf.tensors}
    missing = [name for name in want if name not in shapes]
    skipped = [name for name in shapes if name not in want and surplus(name)]
    extra = [name for name in shapes if name not in want and name not in skipped]
    for what, some in (("has no", missing), ("has more than it should,", extra)):
        if some:
            listed = "\n  ".join(some[:8]) + (f"\n  and {len(some) - 8} more" * (len(some) > 8))
            raise ModelError(
                f"{source.where}: {what}\n  {listed}\nExpected the {len(want)} tensors of "
                f"{expected}."
            )
    for name, shape in want.items():
        if tuple(shapes[name]) != shape:
            raise ModelError(
                f"{source.where}: {name}: got shape {tuple(shapes[name])}, expected {shape}, those "
                f"of {expected}."
            )
        source.dtype(name)
    return skipped


def load(leaf: Leaf, source: Tensors, dtype: Any, sharding: Shardings) -> jax.Array:
    """A leaf in its dtype on its devices; of a sharded one, part by part.

    With None, the source's dtype: for layers of several, the one that holds them all.
    """
    if dtype is None:
        dtype = jnp.result_type(*{source.dtype(tensor) for tensor in leaf.tensors})

    def read(tensor: str, part: Part) -> np.ndarray:
        return source.read(tensor, part[::-1]).T if leaf.transposed else source.read(tensor, part)

    def part(index: Part | None) -> np.ndarray:
        index = index or (slice(None),) * len(leaf.shape)
        if not leaf.stacked:
            return np.ascontiguousarray(read(leaf.tensors[0], index), dtype)
        layers, within = leaf.tensors[index[0]], index[1:]
        first = read(layers[0], within)
        stack = np.empty((len(layers), *first.shape), dtype)
        for i, tensor in enumerate(layers):
            stack[i] = read(tensor, within) if i else first
        return stack

    there = sharding_of(leaf.path, leaf.shape, sharding)
    if there is None:
        return jax.device_put(part(None))
    return jax.make_array_from_callback(leaf.shape, there, part)


def sharding_of(path: str, shape: tuple[int, ...], sharding: Shardings) -> Sharding | None:
    if callable(sharding) and not isinstance(sharding, Sharding):
        return sharding(path, shape)
    return sharding


def hosted(
    wanted: list[Leaf], flat: Mapping[str, Any], dtypes: Mapping[str, np.dtype]
) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of the leaves, one after the other, a leaf at a time on the host."""
    for leaf in wanted:
        whole = np.asarray(flat[leaf.path])
        for i, name in enumerate(leaf.tensors):
            one = whole[i] if leaf.stacked else whole
            one = one.T if leaf.transposed else one
            yield name, np.ascontiguousarray(one, dtypes[leaf.path])
