"""What is written beside an adapter's arrays: what each is, and the fingerprint of its base."""

from __future__ import annotations

import dataclasses
import functools
import gzip
import json
import math
import zlib
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias

import jax.numpy as jnp
import numpy as np

from jaxlora._errors import CheckpointError
from jaxlora.checkpoint._fingerprint import Leaf
from jaxlora.checkpoint._packed import Place

FORMAT = 1
LIMIT = 2**26
"""Bytes of JSON; a thousand leaves have 0.1 MB. More are neither written nor read."""

Part: TypeAlias = tuple[str, Place]
"""The dtype of an array, and where it lies."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adapter:
    """What is kept of one node.

    Attributes:
      kind: "lora", "dora", or "full" for a leaf that trains in full.
      parts: its arrays, by their names in the node.
      roles, scale, scale_dtype, dropout: of a `LoraWeight`; the scale of stacked weights is one
        number if theirs are alike, else a nested list.
    """

    kind: Literal["lora", "dora", "full"]
    parts: Mapping[str, Part]
    roles: str = ""
    scale: Any = None
    scale_dtype: str = "float32"
    dropout: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Description:
    """What is written beside the arrays.

    Attributes:
      versions: of jaxlora and JAX.
      config: the `LoraConfig` as JSON, if it was given.
      arrays: {name: (dtype, shape, checksum)} of the packed arrays.
      adapters: {path: `Adapter`}.
      base: {path: `Leaf`} of the base.
    """

    versions: Mapping[str, str]
    config: Mapping[str, Any] | None
    arrays: Mapping[str, tuple[str, tuple[int, ...], str]]
    adapters: Mapping[str, Adapter]
    base: Mapping[str, Leaf]


def scale_to_json(scale: Any) -> Any:
    """A number if all are the same; else as nested as it is stacked. Exact: JSON has doubles."""
    wide = np.asarray(scale).astype(np.float64)
    same = wide.size and np.all(wide == wide.reshape(-1)[0])
    return float(wide.reshape(-1)[0]) if same else wide.tolist()


def scale_from_json(found: Any, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """The inverse of `scale_to_json`.

    >>> scale_from_json(0.5, (2,), "float32")
    array([0.5, 0.5], dtype=float32)
    """
    return np.broadcast_to(np.asarray(found, np.float64), shape).astype(jnp.dtype(dtype))


def config_to_json(config: Any) -> Any:
    """A config's settings, functions and dtypes by their names."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        fields = dataclasses.fields(config)
        return {f.name: config_to_json(getattr(config, f.name)) for f in fields}
    if isinstance(config, Mapping):
        return {str(key): config_to_json(value) for key, value in config.items()}
    if isinstance(config, list | tuple | set | frozenset):
        return [config_to_json(value) for value in config]
    if config is None or isinstance(config, str | bool | int | float):
        return config
    if isinstance(config, np.generic):
        return config.item()
    try:
        return jnp.dtype(config).name
    except TypeError:
        pass
    if isinstance(config, functools.partial):
        config = config.func
    name = getattr(config, "__qualname__", type(config).__qualname__)
    return f"{getattr(config, '__module__', None) or type(config).__module__}.{name}"


# --------------------------------------------------------------------------------------------------
# To bytes


def encode(found: Description) -> bytes:
    """Compressed JSON, the same bytes for the same description."""
    text = json.dumps(to_json(found), separators=(",", ":")).encode()
    if len(text) > LIMIT:
        raise CheckpointError(
            f"got a description of {len(text):,} bytes, expected at most {LIMIT:,}: the tree has "
            "too many leaves. Stack the layers, or save parts of it."
        )
    return gzip.compress(text, mtime=0)


def to_json(found: Description) -> dict[str, Any]:
    """The description as JSON has it."""
    return {
        "format": FORMAT,
        **found.versions,
        "config": found.config,
        "arrays": {name: list(array) for name, array in found.arrays.items()},
        "adapters": {path: _adapter_to_json(x) for path, x in found.adapters.items()},
        "base": {path: list(leaf) for path, leaf in found.base.items()},
    }


def _adapter_to_json(x: Adapter) -> dict[str, Any]:
    parts = {name: [dtype, *place] for name, (dtype, place) in x.parts.items()}
    if x.kind == "full":
        return {"kind": x.kind, **parts}
    rank = x.parts["a"][1].shape[-1]
    how = {"roles": x.roles, "rank": rank, "scale": x.scale, "dropout": x.dropout}
    dtype = {} if x.scale_dtype == "float32" else {"scale_dtype": x.scale_dtype}
    return {"kind": x.kind, **how, **dtype, **parts}


# --------------------------------------------------------------------------------------------------
# From bytes that anyone may have written


def decode(data: bytes, file: str) -> Description:
    """The description in a file's bytes.

    Raises:
      CheckpointError: they are none; the message names the file.
    """
    try:
        return _from_json(json.loads(_inflated(data)))
    except _Newer as error:
        raise CheckpointError(f"{file}: {error}") from None
    except (ValueError, TypeError, KeyError, RecursionError, OverflowError, zlib.error) as error:
        raise CheckpointError(
            f"{file}: got a file that is damaged or not jaxlora's ({type(error).__name__}: "
            f"{str(error)[:200]}), expected what jaxlora.checkpoint.save writes. Restore another "
            "step, or save the adapter again."
        ) from None


class _Newer(ValueError):
    pass


def _inflated(data: bytes) -> bytes:
    stream = zlib.decompressobj(wbits=31)
    text = stream.decompress(data, LIMIT)
    _expect(not stream.unconsumed_tail, f"more than {LIMIT:,} bytes of JSON")
    _expect(stream.eof and not stream.unused_data, "a truncated or extended file")
    return text


def _expect(holds: Any, what: str) -> None:
    if not holds:
        raise ValueError(what)


def _from_json(found: Any) -> Description:
    _expect(isinstance(found, dict) and "format" in found, "no description")
    if found["format"] != FORMAT:
        raise _Newer(
            f"got format {found['format']!r}, expected {FORMAT}. It was written by jaxlora "
            f"{found.get('jaxlora')!r}; install that or a newer one."
        )
    arrays = {name: _array(x) for name, x in found["arrays"].items()}
    adapters = {path: _adapter(x, arrays) for path, x in found["adapters"].items()}
    base = {path: _base_leaf(x) for path, x in found["base"].items()}
    _expect(adapters.keys() <= base.keys(), "adapters without a base")
    config = found["config"]
    _expect(config is None or isinstance(config, dict), "config")
    versions = {name: found[name] for name in ("jaxlora", "jax")}
    _expect(all(isinstance(v, str) for v in versions.values()), "versions")
    return Description(
        versions=versions, config=config, arrays=arrays, adapters=adapters, base=base
    )


def _array(x: Any) -> tuple[str, tuple[int, ...], str]:
    dtype, shape, checksum = x
    _expect(isinstance(checksum, str), "an array's checksum")
    return _dtype(dtype), _shape(shape), checksum


def _dtype(x: Any) -> str:
    _expect(isinstance(x, str) and jnp.issubdtype(jnp.dtype(x), jnp.number), "a dtype")
    return x


def _shape(x: Any) -> tuple[int, ...]:
    _expect(isinstance(x, list) and all(type(n) is int and n >= 0 for n in x), "a shape")
    return tuple(x)


def _part(x: Any, arrays: Mapping[str, tuple[str, tuple[int, ...], str]]) -> Part:
    dtype, name, offset, shape = x
    place = Place(name, offset, _shape(shape))
    _expect(type(offset) is int and offset >= 0, "an array's place")
    size = math.prod(place.shape)
    if size:
        _expect(arrays[name][0] == dtype, "an array's dtype")
        _expect(offset + size <= math.prod(arrays[name][1]), "an array outside of its file")
    return _dtype(dtype), place


def _adapter(x: Any, arrays: Mapping[str, tuple[str, tuple[int, ...], str]]) -> Adapter:
    kind = x["kind"]
    part: Callable[[str], Part] = lambda name: _part(x[name], arrays)  # noqa: E731
    if kind == "full":
        return Adapter(kind=kind, parts={"value": part("value")})
    _expect(kind in ("lora", "dora"), "a kind of adapter")
    names = ["a", "b"]
    if kind == "dora":
        names += ["magnitude", *(["squared_norm"] if "squared_norm" in x else [])]
    roles, dropout, dtype = x["roles"], x["dropout"], x.get("scale_dtype", "float32")
    _expect(isinstance(roles, str) and type(dropout) is float, "roles and dropout")
    scale = np.asarray(x["scale"], np.float64)
    _expect(scale.ndim <= roles.count("s"), "a scale")
    return Adapter(
        kind=kind,
        parts={name: part(name) for name in names},
        roles=roles,
        scale=x["scale"],
        scale_dtype=_dtype(dtype),
        dropout=dropout,
    )


def _base_leaf(x: Any) -> Leaf:
    kind, shape, checksum = x
    _expect(isinstance(kind, str) and isinstance(checksum, str), "a leaf of the base")
    return Leaf(kind, None if shape is None else _shape(shape), checksum)
