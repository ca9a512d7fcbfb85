"""Leaves and their paths: how a leaf is named, how a pattern finds it, what is near a name."""

from __future__ import annotations

import difflib
import hashlib
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
from flax.core.meta import AxisMetadata

from jaxlora._quantized import is_quantized

Pattern: TypeAlias = str | Sequence[str] | Callable[[str, Any], bool]
"""A regex of the whole path, a sequence of names, or a function of (path, leaf)."""


def flatten_with_paths(
    tree: Any, is_leaf: Callable[[Any], bool] = lambda _: False
) -> tuple[list[tuple[str, Any]], Any]:
    """Flattens a tree into [(path, leaf)] and its treedef.

    A path is the leaf's keys joined by '/'. The key between a box and what it holds is left out,
    so that `nnx.Param` and Linen's `Partitioned` do not show in paths. Boxes are recognised by
    their type: a dict key or a field that happens to be called `value` stays. A quantized weight
    is one leaf.

    Args:
      tree: any pytree.
      is_leaf: what else to treat as a leaf.

    Returns:
      The leaves with their paths, and the treedef that `jax.tree.unflatten` takes.

    >>> flatten_with_paths({"dense": {"kernel": 1, "bias": 2}})[0]
    [('dense/bias', 2), ('dense/kernel', 1)]
    """
    boxes = _box_types()

    def whole(x: Any) -> bool:
        return is_leaf(x) or is_quantized(x)

    def walk(node: Any, prefix: tuple[str, ...]) -> Iterable[tuple[str, Any]]:
        keyed, _ = jax.tree_util.tree_flatten_with_path(
            node, is_leaf=lambda x: whole(x) or (x is not node and isinstance(x, boxes))
        )
        inside_box = isinstance(node, boxes)
        for keys, leaf in keyed:
            names = prefix + tuple(_key_name(k) for k in keys[inside_box:])
            if isinstance(leaf, boxes) and not whole(leaf):
                yield from walk(leaf, names)
            else:
                yield "/".join(names), leaf

    return list(walk(tree, ())), jax.tree.structure(tree, is_leaf=whole)


def shared_variables(tree: Any) -> list[list[str]]:
    """The paths of each NNX variable that is in several places of a tree."""
    nnx = sys.modules.get("flax.nnx")
    if nnx is None:
        return []
    places: dict[int, list[str]] = {}
    pairs, _ = flatten_with_paths(tree, is_leaf=lambda x: isinstance(x, nnx.Variable))
    for path, leaf in pairs:
        if isinstance(leaf, nnx.Variable):
            places.setdefault(id(leaf), []).append(path)
    return [paths for paths in places.values() if len(paths) > 1]


def _box_types() -> tuple[type, ...]:
    # A tree can hold NNX variables only if NNX was imported; importing it here would cost 0.3 s.
    nnx = sys.modules.get("flax.nnx")
    return (AxisMetadata, nnx.Variable) if nnx else (AxisMetadata,)


def _key_name(key: Any) -> str:
    for attribute in ("key", "idx", "name"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def short(path: str) -> str:
    """The path without a leading `params/`, which patterns may leave out.

    >>> short("params/dense/kernel"), short("dense/kernel")
    ('dense/kernel', 'dense/kernel')
    """
    return path.removeprefix("params/")


def lookup(table: Mapping[str, Any], path: str) -> Any:
    """The entry of a path, a leading `params/` on either side left out; None if there is none.

    >>> lookup({"dense/kernel": 1}, "params/dense/kernel")
    1
    """
    if path in table:
        return table[path]
    return next((v for p, v in table.items() if short(p) == short(path)), None)


def key_of(key: jax.Array, path: str) -> jax.Array:
    """A random key of the path's own: other paths, whether there or not, change none."""
    digest = hashlib.sha256(short(path).encode()).digest()
    return jax.random.fold_in(key, int.from_bytes(digest[:4], "big"))


def leaf_name(path: str) -> str:
    """The last segment of a path."""
    return path.rpartition("/")[2]


def module_path(path: str) -> str:
    """The path without the leaf's own name."""
    return path.rpartition("/")[0]


def _ends_with(path: str, name: str) -> bool:
    return path == name or path.endswith("/" + name)


def matches_regex(path: str, regex: str) -> bool:
    """Whether the regex matches the whole path, with or without a leading `params/`.

    >>> matches_regex("params/layer_0/query/kernel", r"layer_\\d+/query/.*")
    True
    >>> matches_regex("params/layer_0/query/kernel", "query")
    False
    """
    return any(re.fullmatch(regex, p) for p in {path, short(path)})


def matches_leaf(path: str, name: str) -> bool:
    """Whether the name is the path or its trailing segments.

    >>> matches_leaf("layer_0/query/kernel", "query/kernel")
    True
    """
    return _ends_with(path, name)


def matches_module(path: str, name: str) -> bool:
    """Whether the name is the path or its trailing segments, the leaf's own name left out.

    >>> matches_module("layer_0/query/kernel", "query")
    True
    >>> matches_module("layer_0/my_query/kernel", "query")
    False
    """
    return _ends_with(module_path(path), name)


def matches_key(path: str, key: str) -> bool:
    """Whether a key of `rank_pattern`, `alpha_pattern` or `roles` applies to a path.

    PEFT's meaning: the key is a regex, and matches the whole path or its trailing segments, with
    or without the leaf's own name.

    >>> matches_key("layer_0/query/kernel", "query"), matches_key("layer_0/query/kernel", ".*_0/.*")
    (True, True)
    """
    regex = re.compile(rf"(?:.*/)?(?:{key})")
    whole = {path, short(path)}
    return any(regex.fullmatch(p) for p in whole | {module_path(p) for p in whole} if p)


def nearest(pattern: str, paths: Iterable[str], n: int = 5) -> list[str]:
    """The paths most like a pattern, best first: what an error offers to a mistyped name.

    >>> nearest("qeury", ["layer_0/query/kernel", "layer_0/out/kernel", "head/kernel"], n=1)
    ['layer_0/query/kernel']
    """

    def score(path: str) -> float:
        segments = path.split("/")
        depth = pattern.count("/") + 1
        tails = ["/".join(segments[i : i + depth]) for i in range(len(segments))]
        return max(difflib.SequenceMatcher(None, pattern, tail).ratio() for tail in [path, *tails])

    return sorted(dict.fromkeys(paths), key=score, reverse=True)[:n]


def listing(paths: Iterable[str], n: int = 5) -> str:
    """Paths as an indented list, the rest counted."""
    paths = list(paths)
    more = [f"... and {len(paths) - n} more"] if len(paths) > n else []
    return "".join(f"\n    {p}" for p in paths[:n] + more)
