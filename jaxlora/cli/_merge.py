"""W + scale B A in place of W, in the safetensors files of a model."""

from __future__ import annotations

import contextlib
import pathlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

import jaxlora
from jaxlora import _paths, checkpoint, peft
from jaxlora._errors import CheckpointError, TargetError
from jaxlora._weight import FullWeight, LoraWeight, is_node
from jaxlora.cli._base_leaves import frozen_beside, leaf_of, other_values
from jaxlora.cli._read import check_new, is_peft, lora_without_base, read_names, read_saved
from jaxlora.cli._shards import Base, open_base, write_base
from jaxlora.cli._torch_names import Prefix, prefix_of, read_model_config, torch_names
from jaxlora.peft import _config, _files
from jaxlora.peft._names import Map, Place


def merge(
    base: pathlib.Path,
    adapter: pathlib.Path,
    out: pathlib.Path,
    *,
    names: pathlib.Path | None,
    allow: Sequence[str],
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
        found = (
            _of_peft(model, adapter, allow)
            if mapping is None
            else _mapped(model, adapter, mapping, allow)
        )
    elif mapping is not None:
        found = _renamed(model, adapter, mapping, allow, allow_base_mismatch)
    else:
        found = _of_checkpoint(model, adapter, allow_base_mismatch)
    nodes, added = found.nodes, found.added
    changed = {key: _merged(nodes, key) for key in nodes}
    total = model.nbytes + sum(x.nbytes for x in added.values())
    with _bar(total, quiet) as progress:
        left = write_base(model, out, changed, added, progress)
    lines = [
        f"{out}: {len(changed) + len(added)} of {len(model.tensors) + len(added)} tensors merged; "
        f"{total:,} bytes"
    ]
    if added:
        lines.append(
            f"{', '.join(sorted(added))}: added, since the base has none. config.json is the "
            "base's: give it the architecture and the number of labels that go with them."
        )
    if left:
        lines.append(f"not copied, other weights: {', '.join(left)}")
    return "\n".join(lines)


class _Merging(NamedTuple):
    """What an adapter does to a base.

    Attributes:
      nodes: {key of the base: node}.
      added: the tensors of modules that the base has not.
      prefix: how the base calls the tensors of the adapter's model.
    """

    nodes: dict[str, Any]
    added: dict[str, np.ndarray]
    prefix: Prefix


def _of_peft(
    model: Base,
    directory: pathlib.Path,
    allow: Sequence[str],
    known: Mapping[str, dict[str, Any]] | None = None,
) -> _Merging:
    """PEFT's adapter: both have PyTorch's names."""
    raw = _files.read_config(directory)
    config = _config.parse(raw, str(directory / _files.CONFIG))
    tensors = _files.read_tensors(directory)
    shapes = {key: x.shape for key, x in model.tensors.items()}
    settings = read_model_config(model.directory)
    adapter = {key: x.shape for key, x in tensors.items()}
    names, keys, new, prefix = torch_names(config, adapter, shapes, settings, model.equal, known)
    leaves = {name: model.tensors[key].leaf() for name, key in keys.items() if name not in new}
    blank = {name: np.broadcast_to(np.float32(0), shape) for name, shape in new.items()}
    lora = peft.load(directory, {**leaves, **blank}, names, allow=allow)
    nodes = {keys[name]: node for name, node in lora.items() if is_node(node)}
    added = {keys[name]: np.asarray(nodes.pop(keys[name]).value) for name in new}
    return _Merging(nodes, added, prefix)


def _mapped(
    model: Base, directory: pathlib.Path, names: Mapping[str, Any], allow: Sequence[str]
) -> _Merging:
    """PEFT's adapter, by a map from the base's keys."""
    lora = peft.load(directory, model.leaves(), names, allow=allow)
    return _Merging({key: node for key, node in lora.items() if is_node(node)}, {}, Prefix())


def _renamed(
    model: Base,
    directory: pathlib.Path,
    names: Mapping[str, Any],
    allow: Sequence[str],
    allow_base_mismatch: bool,
) -> _Merging:
    """jaxlora's adapter on a base with PyTorch's names: by way of PEFT's format."""
    saved = read_saved(directory)
    lora = lora_without_base(saved)
    whole = {pattern: _without_tokens(entry) for pattern, entry in names.items()}
    known = Map(whole, lora, {path: x.roles for path, x in lora.items() if hasattr(x, "roles")})
    adapted = [path for path, leaf in lora.items() if isinstance(leaf, LoraWeight)]
    must = [p for p in known.places.values() if p.slot.path in adapted or not adapted]
    shapes = {key: x.shape for key, x in model.tensors.items()}
    prefix = prefix_of(str(directory), {f"{p.module}.{p.parameter}" for p in must}, shapes)

    def read(name: str) -> np.ndarray | None:
        tensor = model.tensors.get(prefix.of(name))
        return None if tensor is None else tensor.leaf()

    new = {  # a head for another task
        p.slot.path
        for p in known.places.values()
        if isinstance(lora[p.slot.path], FullWeight) and read(f"{p.module}.{p.parameter}") is None
    }
    odd = [p for p in other_values(saved.description.base, known, read) if p not in new]
    if odd and not allow_base_mismatch:
        raise CheckpointError(
            f"{directory}: got a base that is not this adapter's. It has other values, or none, "
            f"at:{_paths.listing(odd)}\nAfter an initializer that moves the base (pissa, olora, "
            "...) make it one of the original first: jaxlora.rebase(lora, initial, params). To "
            "merge it all the same: --allow-base-mismatch."
        )
    for path in frozen_beside(known, lora):  # PEFT's format holds modules that train as a whole
        lora[path] = leaf_of(known.slots[path], known, read, lora[path].dtype)
    with tempfile.TemporaryDirectory() as temporary:
        peft.save(temporary, lora, whole)
        entries = {f"{p.module}.{p.parameter}": _entry(p, known) for p in known.places.values()}
        entries = {name: entry for name, entry in entries.items() if entry["kind"] != "parameter"}
        return _of_peft(model, pathlib.Path(temporary), allow, entries)


def _entry(place: Place, known: Map) -> dict[str, Any]:
    """Of a map from PyTorch's names to themselves, as a map from ours has it."""
    kind = place.kind
    found: dict[str, Any] = {"module": place.module, "kind": kind, "parameter": place.parameter}
    if place.slot.is_matrix:
        spatial = "i" * (len(place.slot.inputs) - 1)
        roles = {"linear": "oi", "conv1d": "io", "embedding": "io", "conv": f"oi{spatial}"}
        found["roles"] = roles.get(kind, "")
    if kind == "embedding" and place.slot.entry.tied is not None:
        found["tied"] = [head for head, slot in known.tied.items() if slot is place.slot]
    return found


def _without_tokens(entry: Any) -> Any:
    if not isinstance(entry, Mapping):
        return entry
    return {key: value for key, value in entry.items() if key != "tokens"}


def _of_checkpoint(model: Base, directory: pathlib.Path, allow: bool) -> _Merging:
    """jaxlora's adapter, the base's keys being the paths, joined by "/" or by "."."""
    leaves = model.leaves()
    joined = any("/" in key for key in leaves)
    paths = {key: key if joined else key.replace(".", "/") for key in leaves}
    params = {paths[key]: x for key, x in leaves.items()}
    if not {*params} & {*read_saved(directory).description.adapters}:
        raise TargetError(
            f"{directory}: none of its paths is a key of the base, expected the map from them to "
            "PyTorch's names: --names FILE, the map of jaxlora.peft."
        )
    try:
        lora = checkpoint.restore(directory, params, allow_base_mismatch=allow)
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}" + ("" if allow else "\nOn the command line: --allow-base-mismatch.")
        ) from None
    nodes = {key: lora[path] for key, path in paths.items() if is_node(lora[path])}
    return _Merging(nodes, {}, Prefix())


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
