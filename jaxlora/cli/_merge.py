"""W + scale B A in place of W, in the safetensors files of a model."""

from __future__ import annotations

import contextlib
import pathlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

import jaxlora
from jaxlora import _paths, checkpoint, peft
from jaxlora._errors import CheckpointError, TargetError
from jaxlora._weight import is_node
from jaxlora.cli._compare import other_values
from jaxlora.cli._read import check_new, is_peft, lora_without_base, read_names, read_saved
from jaxlora.cli._shards import Base, open_base, write_base
from jaxlora.cli._torch_names import read_model_config, torch_names
from jaxlora.peft import _config, _files
from jaxlora.peft._names import Map


def merge(
    base: pathlib.Path,
    adapter: pathlib.Path,
    out: pathlib.Path,
    *,
    names: pathlib.Path | None,
    allow_base_mismatch: bool,
    quiet: bool,
) -> str:
    """Writes the merged model; returns what to say of it."""
    check_new(out)
    model = open_base(base)
    if model.directory is None and out.suffix != ".safetensors":
        raise TargetError(
            f"{out}: expected the name of a file that ends in .safetensors, since {base} is one."
        )
    mapping = None if names is None else read_names(names)
    if is_peft(adapter):
        found = _of_peft(model, adapter) if mapping is None else _mapped(model, adapter, mapping)
    elif mapping is not None:
        found = _renamed(model, adapter, mapping, allow_base_mismatch)
    else:
        found = _of_checkpoint(model, adapter, allow_base_mismatch)
    nodes, added = found.nodes, found.added
    changed = {key: _merged(nodes, key) for key in nodes}
    total = model.nbytes + sum(x.nbytes for x in added.values())
    with _bar(total, quiet) as progress:
        write_base(model, out, changed, added, progress)
    count = len(model.tensors) + len(added)
    more = f", {len(added)} added" if added else ""
    return f"{out}: {len(changed)} of {count} tensors merged{more}; {total / 1e9:.3f} GB"


class _Found(NamedTuple):
    """What an adapter does to a base.

    Attributes:
      nodes: {key of the base: node}.
      added: the tensors of modules that the base has not.
      keys: {what the adapter calls a tensor: what the base calls it}.
    """

    nodes: dict[str, Any]
    added: dict[str, np.ndarray]
    keys: dict[str, str]


def _of_peft(model: Base, directory: pathlib.Path) -> _Found:
    """PEFT's adapter: both have PyTorch's names."""
    raw = _files.read_config(directory)
    config = _config.parse(raw, str(directory / _files.CONFIG))
    tensors = _files.read_tensors(directory)
    shapes = {key: x.shape for key, x in model.tensors.items()}
    settings = read_model_config(model.directory)
    adapter = {key: x.shape for key, x in tensors.items()}
    names, keys, new = torch_names(config, adapter, shapes, settings)
    leaves = {name: model.tensors[key].leaf() for name, key in keys.items() if name not in new}
    blank = {name: np.broadcast_to(np.float32(0), shape) for name, shape in new.items()}
    lora = peft.load(directory, {**leaves, **blank}, names)
    nodes = {keys[name]: node for name, node in lora.items() if is_node(node)}
    added = {keys[name]: np.asarray(nodes.pop(keys[name]).value) for name in new}
    return _Found(nodes, added, keys)


def _mapped(model: Base, directory: pathlib.Path, names: Mapping[str, Any]) -> _Found:
    """PEFT's adapter, by a map from the base's keys."""
    lora = peft.load(directory, model.leaves(), names)
    return _Found({key: node for key, node in lora.items() if is_node(node)}, {}, {})


def _renamed(model: Base, directory: pathlib.Path, names: Mapping[str, Any], allow: bool) -> _Found:
    """jaxlora's adapter on a base with PyTorch's names: by way of PEFT's format."""
    saved = read_saved(directory)
    lora = lora_without_base(saved)
    whole = {pattern: _without_tokens(entry) for pattern, entry in names.items()}
    with tempfile.TemporaryDirectory() as temporary:
        peft.save(temporary, lora, whole)
        found = _of_peft(model, pathlib.Path(temporary))
    roles = {path: node.roles for path, node in lora.items() if hasattr(node, "roles")}
    known = Map(whole, lora, roles)
    odd = other_values(
        saved.description.base,
        saved.description.adapters,
        known,
        lambda name: model.tensors[found.keys[name]].leaf(),
    )
    if odd and not allow:
        raise CheckpointError(
            f"{directory}: got a base that is not this adapter's. It has other values at:"
            f"{_paths.listing(odd)}\nAfter an initializer that moves the base (pissa, olora, ...) "
            "make it one of the original first: jaxlora.rebase(lora, initial, params). To merge "
            "it all the same: --allow-base-mismatch."
        )
    return found


def _without_tokens(entry: Any) -> Any:
    if not isinstance(entry, Mapping):
        return entry
    return {key: value for key, value in entry.items() if key != "tokens"}


def _of_checkpoint(model: Base, directory: pathlib.Path, allow: bool) -> _Found:
    """jaxlora's adapter, the base's keys being the paths, joined by "/" or by "."."""
    leaves = model.leaves()
    joined = any("/" in key for key in leaves)
    paths = {key: key if joined else key.replace(".", "/") for key in leaves}
    params = {paths[key]: x for key, x in leaves.items()}
    try:
        lora = checkpoint.restore(directory, params, allow_base_mismatch=allow)
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}\nHere: --allow-base-mismatch. If the base has PyTorch's names: --names FILE, "
            "the map of jaxlora.peft."
        ) from None
    return _Found({key: lora[path] for key, path in paths.items() if is_node(lora[path])}, {}, {})


def _merged(nodes: dict[str, Any], key: str) -> Callable[[], np.ndarray]:
    """A function that gives the merged value, once: the node and its mapped base go with it."""

    def value() -> np.ndarray:
        node = nodes.pop(key)
        found = np.asarray(jaxlora.merge({key: node})[key])
        base = np.asarray(node.w)
        found = found.astype(base.dtype)
        bad = np.flatnonzero(~np.isfinite(found) & np.isfinite(base))
        if bad.size:
            raise TargetError(
                f"{key}: got {bad.size:,} values beyond {base.dtype}'s range, expected finite "
                "ones. Is the adapter this base's?"
            )
        return found

    return value


@contextlib.contextmanager
def _bar(total: int, quiet: bool) -> Iterator[Callable[[int], Any]]:
    if quiet:
        yield lambda _: None
        return
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError(
            "the progress bar is tqdm's, which is not installed: pip install 'jaxlora[cli]', or "
            "--quiet."
        ) from error
    with tqdm(total=total, unit="B", unit_scale=True, desc="merging") as bar:
        yield bar.update
