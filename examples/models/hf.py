"""Hugging Face's directories and hub names -> (config, params), and back.

    config, params = hf.load("Qwen/Qwen2.5-0.5B-Instruct", dtype=jnp.bfloat16)
    logits = Llama(config, dtype=jnp.bfloat16).apply({"params": params}, tokens)
    hf.save("out/model", config, params)             # a directory that Transformers opens

    config, params = hf.load("roberta-base", head="classifier", num_labels=3)
    logits = bert.Classifier(config).apply({"params": params}, tokens, mask)

Leaf by leaf, straight from the shards of safetensors files to the devices: beside the params, one
leaf at most is in memory, and of a sharded one each device's part. What does not fit is an error:
an architecture or a setting that `llama.py` or `bert.py` has not, tensors that miss, are too many,
or have other shapes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax
import numpy as np

from models import bert, bert_files, config_file, leaves, llama, llama_files, shards
from models.errors import ModelError
from models.hub import fetch
from models.leaves import Shardings, Tensors

__all__ = [
    "Config",
    "ModelError",
    "config_json",
    "fetch",
    "load",
    "load_tensors",
    "read_config",
    "save",
]

Config = llama.Config | bert.Config
# What each says: MODEL_TYPES, read_config, config_json, init, names, rename, new_groups, surplus,
# described.
_FAMILIES: tuple[Any, ...] = (llama_files, bert_files)


def _family(kind: str) -> Any:
    return next(family for family in _FAMILIES if kind in family.MODEL_TYPES)


def read_config(source: str | os.PathLike[str] | Mapping[str, Any], **changes: Any) -> Any:
    """The architecture that a config.json, or a directory with one, describes.

    Args:
      source: the directory, the file, or its fields.
      changes: fields of the config to have otherwise: `head="classifier", num_labels=3`.

    Raises:
      ModelError: a `model_type`, or a value of a field, that `llama.py` or `bert.py` does not
        compute; fields that miss or have no sense.
    """
    fields = config_file.read(source)
    known = [kind for family in _FAMILIES for kind in family.MODEL_TYPES]
    kind: Any = fields.raw.get("model_type")
    if kind not in known:
        raise fields.wrong("model_type", f"one of {', '.join(known)}")
    config = _family(kind).read_config(fields)
    odd = sorted({*changes} - {field.name for field in dataclasses.fields(config)})
    if odd:
        raise ModelError(
            f"{fields.where}: got {', '.join(odd)} to change, which the config of a {kind} has not."
        )
    try:
        return dataclasses.replace(config, **changes)
    except ValueError as error:
        raise ModelError(f"{fields.where}: {error}") from None


def config_json(config: Config, dtype: Any = np.float32) -> dict[str, Any]:
    """The fields of config.json, as all of Transformers' versions read them."""
    found = _family(config.model_type).config_json(config)
    return found | {"torch_dtype": np.dtype(dtype).name}


def load(
    model: str | os.PathLike[str],
    *,
    dtype: Any = None,
    sharding: Shardings = None,
    revision: str | None = None,
    key: jax.Array | None = None,
    say: Callable[[str], None] = print,
    **changes: Any,
) -> tuple[Any, Any]:
    """(config, params) of a directory or a hub name.

    Args:
      model: a directory with config.json and safetensors files, or a name on the hub.
      dtype: of all leaves; None: the file's.
      sharding: one for all leaves, or a function of (path, shape), for instance
        `lambda path, shape: NamedSharding(mesh, specs[path])`; None: the default device.
      revision: of the hub's model, a branch, tag or commit.
      key: of a head that the file does not have; None: jax.random.key(0).
      say: gets a line on what the file does not have, and on what of it was skipped.
      changes: fields of the config to have otherwise: `head="classifier", num_labels=3`.

    Raises:
      ModelError: it is no model of `llama.py` or `bert.py`; the message says in what.
    """
    directory = fetch(model, revision)
    config = read_config(directory, **changes)
    with contextlib.ExitStack() as stack:
        source = shards.Safetensors(directory, stack)
        return config, load_tensors(config, source, dtype, sharding, key=key, say=say)


def load_tensors(
    config: Config,
    source: Tensors,
    dtype: Any = None,
    sharding: Shardings = None,
    *,
    key: jax.Array | None = None,
    say: Callable[[str], None] = print,
) -> Any:
    """Params from named tensors; each is checked before any is read.

    Args:
      config: the architecture.
      source: the tensors.
      dtype, sharding, key, say: as in `load`.

    Raises:
      ModelError: tensors that miss, are too many, or have other shapes.
    """
    family = _family(config.model_type)
    source = leaves.Renamed(source, partial(family.rename, config))
    wanted = _leaves(config)
    new = _lacking(wanted, source, family.new_groups(config))
    there = [leaf for leaf in wanted if leaf.path not in new]
    surplus = partial(family.surplus, config, source)
    skipped = leaves.check(there, source, surplus, family.described(config))
    if skipped:
        say(f"{source.where}: skipped {_listing(skipped)}")
    if new:
        say(f"{source.where}: has no {_listing(new)}: new, at random")
    params = _new(config, new, jax.random.key(0) if key is None else key, dtype, sharding)
    params |= {leaf.path: leaves.load(leaf, source, dtype, sharding) for leaf in there}
    ordered = {leaf.path: params[leaf.path] for leaf in wanted}
    return flax.traverse_util.unflatten_dict(ordered, sep="/")


def _leaves(config: Config) -> list[leaves.Leaf]:
    family = _family(config.model_type)
    shapes = jax.eval_shape(partial(family.init, config), jax.random.key(0))
    return leaves.leaves(shapes, family.names(config))


def _lacking(
    wanted: list[leaves.Leaf], source: Tensors, groups: tuple[str, ...]
) -> dict[str, leaves.Leaf]:
    """The leaves of those groups (regexes of paths) of which the source has no tensor at all."""
    shapes = source.shapes()
    found: dict[str, leaves.Leaf] = {}
    for group in groups:
        members = [leaf for leaf in wanted if re.fullmatch(group, leaf.path)]
        if not any(name in shapes for leaf in members for name in leaf.tensors):
            found |= {leaf.path: leaf for leaf in members}
    return found


def _new(
    config: Config,
    wanted: Mapping[str, leaves.Leaf],
    key: jax.Array,
    dtype: Any,
    sharding: Shardings,
) -> dict[str, jax.Array]:
    """These leaves alone, as the model's `init` draws them."""
    if not wanted:
        return {}

    def make(key: jax.Array) -> dict[str, jax.Array]:
        made = _family(config.model_type).init(config, key)
        flat = flax.traverse_util.flatten_dict(made, sep="/")
        return {path: flat[path].astype(dtype or flat[path].dtype) for path in wanted}

    drawn = jax.jit(make)(key)
    return {
        path: jax.device_put(drawn[path], leaves.sharding_of(path, leaf.shape, sharding))
        for path, leaf in wanted.items()
    }


def _listing(names: Any, limit: int = 6) -> str:
    listed = list(names)
    more = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return ", ".join(listed[:limit]) + more


def save(
    directory: str | os.PathLike[str],
    config: Config,
    params: Any,
    *,
    dtype: Any = None,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Writes a directory that Transformers opens, and `load`: config.json and the weights.

    A leaf at a time comes to the host, and a shard is in memory. An earlier save's weights in the
    directory are replaced; other files stay.

    Args:
      directory: made if it is not there.
      config: the architecture.
      params: plain ones, `jaxlora.merge(lora)` of a tree with adapters.
      dtype: of the files; None: the params'.
      max_shard_bytes: more than that goes to several files with an index.

    Raises:
      ModelError: params that are not those of the config.
    """
    directory = Path(directory)
    wanted = _leaves(config)
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    expected = {leaf.path: leaf.shape for leaf in wanted}
    for path in (*expected, *flat):
        leaf = flat.get(path)
        got = tuple(leaf.shape) if isinstance(leaf, jax.Array | np.ndarray) else None
        if got is None or got != expected.get(path):
            raise ModelError(
                f"{path}: got {f'shape {got}' if got else type(leaf).__name__}, expected "
                f"{f'shape {expected[path]}' if path in expected else 'nothing'}: the plain arrays "
                f"of a {config.model_type}. Of a tree with adapters, hf.save(directory, config, "
                "jaxlora.merge(lora)); of a quantized one, jaxlora.dequantize(params)."
            )
    dtypes = {path: np.dtype(dtype or leaf.dtype) for path, leaf in flat.items()}
    directory.mkdir(parents=True, exist_ok=True)
    file = directory / config_file.CONFIG
    file.unlink(missing_ok=True)  # until all is there, it is no model
    tensors = leaves.hosted(wanted, flat, dtypes)
    shards.write(directory, wanted, dtypes, tensors, max_shard_bytes)
    largest = max(flat, key=lambda path: flat[path].size)
    config_file.write_json(file, config_json(config, dtypes[largest]))
