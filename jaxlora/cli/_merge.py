"""W + scale B A in place of W, in the safetensors files of a model."""

from __future__ import annotations

import contextlib
import pathlib
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

import jaxlora
from jaxlora import checkpoint, peft
from jaxlora._errors import TargetError
from jaxlora._weight import is_node
from jaxlora.cli._convert import to_peft
from jaxlora.cli._read import check_new, is_peft, read_names
from jaxlora.cli._shards import Base, open_base, write_base
from jaxlora.cli._torch_names import read_model_config, torch_names
from jaxlora.peft import _config, _files


def merge(
    base: pathlib.Path,
    adapter: pathlib.Path,
    out: pathlib.Path,
    *,
    names: pathlib.Path | None,
    quiet: bool,
) -> str:
    """Writes the merged model; returns what to say of it."""
    check_new(out)
    model = open_base(base)
    if model.directory is None and out.suffix != ".safetensors":
        raise TargetError(
            f"{out}: expected the name of a file that ends in .safetensors, since {base} is one."
        )
    with contextlib.ExitStack() as stack:
        if is_peft(adapter):
            if names is not None:
                raise TargetError(
                    f"--names: {adapter} is PEFT's, which has PyTorch's names as the base does. "
                    "Leave --names out."
                )
            nodes, added = _of_peft(model, adapter)
        elif names is not None:
            directory = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
            to_peft(adapter, directory, read_names(names))
            nodes, added = _of_peft(model, directory)
        else:
            nodes, added = _of_checkpoint(model, adapter), {}
        changed = {key: _merged(key, node) for key, node in nodes.items()}
        total = model.nbytes + sum(x.nbytes for x in added.values())
        with _bar(total, quiet) as progress:
            write_base(model, out, changed, added, progress)
    count = len(model.tensors) + len(added)
    more = f", {len(added)} added" if added else ""
    return f"{out}: {len(changed)} of {count} tensors merged{more}; {total / 1e9:.3f} GB"


def _of_peft(model: Base, directory: pathlib.Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """{key of the base: node}, and the tensors of modules that the base has not."""
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
    return nodes, added


def _of_checkpoint(model: Base, directory: pathlib.Path) -> dict[str, Any]:
    """{key of the base: node}, the base's keys being the paths, joined by "/" or by "."."""
    leaves = model.leaves()
    joined = any("/" in key for key in leaves)
    paths = {key: key if joined else key.replace(".", "/") for key in leaves}
    try:
        lora = checkpoint.restore(directory, {paths[key]: x for key, x in leaves.items()})
    except jaxlora.CheckpointError as error:
        raise jaxlora.CheckpointError(
            f"{error}\nOr, if the base has PyTorch's names: --names FILE, the map of jaxlora.peft."
        ) from None
    return {key: lora[path] for key, path in paths.items() if is_node(lora[path])}


def _merged(key: str, node: Any) -> Callable[[], np.ndarray]:
    def value() -> np.ndarray:
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
