"""The safetensors files of a directory: one, or several with an index."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from models.config_file import read_json, write_json
from models.errors import ModelError
from models.leaves import Leaf, Part

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
}


class Safetensors:
    """The tensors of the shards of a directory, opened, read in part."""

    def __init__(self, directory: Path, stack: contextlib.ExitStack):
        self.where = str(directory)
        self._files: dict[str, Any] = {}
        for file in _files(directory):
            try:
                opened = stack.enter_context(safetensors.safe_open(str(file), "numpy"))
            except Exception as error:  # its own SafetensorError, or of the file system
                raise ModelError(f"{file}: expected a safetensors file: {error}.") from None
            for name in opened.keys():  # noqa: SIM118, it is no dict
                if name in self._files:
                    raise ModelError(f"{file}: {name}: is in another shard too, expected it once.")
                self._files[name] = opened
        self._shapes = {
            name: tuple(file.get_slice(name).get_shape()) for name, file in self._files.items()
        }

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._shapes

    def dtype(self, name: str) -> Any:
        got = self._files[name].get_slice(name).get_dtype()
        if got not in _DTYPES:
            raise ModelError(
                f"{self.where}: {name}: got dtype {got}, expected one of {', '.join(_DTYPES)}: "
                "quantized files are not read. Load the plain model, and jaxlora.quantize it."
            )
        return _DTYPES[got]

    def read(self, name: str, part: Part) -> np.ndarray:
        tensor = self._files[name].get_slice(name)
        return tensor[part or slice(None)]


def _files(directory: Path) -> list[Path]:
    index = directory / INDEX
    if (directory / WEIGHTS).is_file():
        return [directory / WEIGHTS]
    if not index.is_file():
        raise ModelError(
            f"{directory}: has neither {WEIGHTS} nor {INDEX}. Expected a directory that "
            "Transformers' save_pretrained(..., safe_serialization=True) or hf.save wrote."
        )
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise ModelError(f"{index}: weight_map: got {listed!r}, expected {{tensor: file}}.")
    files = sorted({str(file) for file in listed.values()})
    for file in files:
        if Path(file).name != file or not (directory / file).is_file():
            raise ModelError(f"{index}: {file!r} is no file of {directory}, expected each to be.")
    return [directory / file for file in files]


def write(
    directory: Path,
    wanted: list[Leaf],
    dtypes: Mapping[str, np.dtype],
    tensors: Iterator[tuple[str, np.ndarray]],
    limit: int,
) -> None:
    """Writes the tensors, those of `wanted` in order, in files of up to `limit` bytes.

    What an earlier call wrote is replaced; other files stay.
    """
    plan, sizes = _plan(wanted, dtypes, limit)
    files = [f"model-{i + 1:05}-of-{len(plan):05}.safetensors" for i in range(len(plan))]
    if len(plan) == 1:
        files = [WEIGHTS]
    for file, shard in zip(files, plan, strict=True):
        part = directory / f"{file}.part"
        safetensors.numpy.save_file(_next(shard, tensors), part, {"format": "pt"})
        part.chmod(directory.stat().st_mode & 0o666)  # else only the owner can read it
        os.replace(part, directory / file)
    for old in (*directory.glob("model-*-of-*.safetensors"), *directory.glob("model.safetensors*")):
        if old.name not in files:
            old.unlink()
    if len(plan) > 1:
        index = {name: file for file, shard in zip(files, plan, strict=True) for name in shard}
        whole = {"metadata": {"total_size": sum(sizes)}, "weight_map": index}
        write_json(directory / INDEX, whole)


def _next(shard: list[str], tensors: Iterator[tuple[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: array for _, (name, array) in zip(shard, tensors, strict=False)}


def _plan(
    wanted: list[Leaf], dtypes: Mapping[str, np.dtype], limit: int
) -> tuple[list[list[str]], list[int]]:
    """The names of the tensors of each shard, leaf after leaf, and the shards' sizes in bytes."""
    plan: list[list[str]] = [[]]
    sizes = [0]
    for leaf in wanted:
        size = int(np.prod(leaf.tensor_shape)) * dtypes[leaf.path].itemsize
        for name in leaf.tensors:
            if plan[-1] and sizes[-1] + size > limit:
                plan.append([])
                sizes.append(0)
            plan[-1].append(name)
            sizes[-1] += size
    return plan, sizes
