"""Whether two trees are of one model, and where their values differ."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxlora import _paths
from jaxlora._errors import TargetError
from jaxlora._quantized import dense, is_quantized
from jaxlora._weight import LoraWeight, is_node


def check_alike(other: Any, first: Any, what: str, way_out: str) -> None:
    """Raises unless two trees have the same paths, containers, shapes, dtypes and roles.

    Nodes count as their base weights. Values are not looked at.

    Args:
      other: what is checked.
      first: what it should be like.
      what: names `other` in the message.
      way_out: the end of the message.
    """
    (others, other_def), (firsts, first_def) = (
        _paths.flatten_with_paths(tree, is_leaf=is_node) for tree in (other, first)
    )
    got, expected = dict(others), dict(firsts)
    odd = [f"{path} (missing)" for path in expected if path not in got]
    odd += [f"{path} (not expected)" for path in got if path not in expected]
    if odd:
        raise TargetError(
            f"{what}: got a tree with other leaves, expected the same model's. They differ at:"
            f"{_paths.listing(odd)}\n{way_out}"
        )
    if other_def != first_def:
        raise TargetError(
            f"{what}: got a tree of other containers, {other_def}, expected {first_def}. {way_out}"
        )
    for (path, x), (_, y) in zip(others, firsts, strict=True):
        if _form(x) != _form(y):
            odd.append(f"{path}: got {_text(x)}, expected {_text(y)}")
        elif isinstance(x, LoraWeight) and isinstance(y, LoraWeight) and x.roles != y.roles:
            odd.append(f"{path}: got roles {x.roles!r}, expected {y.roles!r}")
    if odd:
        raise TargetError(
            f"{what}: got leaves of another form, expected the same model's. They differ at:"
            f"{_paths.listing(odd)}\n{way_out}"
        )


def differing(others: Any, firsts: Any) -> list[str]:
    """The paths at which the values of two alike trees differ, as far as they are known.

    A node counts as its base weight. Values that are being traced are not compared, nor are
    functions.
    """
    pairs = zip(_flat(others), _flat(firsts), strict=True)
    return [path for (path, x), (_, y) in pairs if _differ(base_of(x), base_of(y))]


def base_of(leaf: Any) -> Any:
    """The base's leaf, of a node or of a leaf that has none."""
    return leaf.w if is_node(leaf) else leaf


def _flat(tree: Any) -> list[tuple[str, Any]]:
    return _paths.flatten_with_paths(tree, is_leaf=is_node)[0]


def _form(leaf: Any) -> Any:
    return (tuple(leaf.shape), leaf.dtype) if hasattr(leaf, "shape") else None


def _text(leaf: Any) -> str:
    shape, dtype = _form(leaf) or ("no array", type(leaf).__name__)
    return f"{dtype} {shape}"


def _differ(x: Any, y: Any) -> bool:
    if is_quantized(x) != is_quantized(y):
        x, y = dense(x), dense(y)
    # A quantized weight is a pytree of its codes.
    return x is not y and any(map(_arrays_differ, jax.tree.leaves(x), jax.tree.leaves(y)))


def _arrays_differ(x: Any, y: Any) -> bool:
    if not hasattr(x, "shape"):
        return not callable(x) and bool(x != y)
    if x is y or any(isinstance(z, jax.core.Tracer | jax.ShapeDtypeStruct) for z in (x, y)):
        return False
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x, y = jax.random.key_data(x), jax.random.key_data(y)
    elif isinstance(x, jax.Array):
        y = jax.device_put(y, x.sharding)  # one base may lie on other devices than another
    return not jnp.array_equal(x, y, equal_nan=True)
