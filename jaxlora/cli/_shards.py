"""A model in safetensors files: read where it lies, and written anew, a tensor at a time."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import pathlib
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from jaxlora import _paths
from jaxlora._errors import AdapterFileError, TargetError
from jaxlora.peft._files import safetensors_module

_INDEX = ".safetensors.index.json"
_DTYPES: dict[str, Any] = {
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F32": np.float32,
    "F64": np.float64,
    "BOOL": np.bool_,
    **{f"{kind}{bits}": f"{kind}{bits // 8}".lower() for kind in "IU" for bits in (8, 16, 32, 64)},
}  # what else there is, numbers of 8 bits and less, is copied as it is
_NAMES = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}
_NOT_COPIED = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".safetensors")
_CHUNK = 2**24


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where a tensor lies: bytes [start, stop) of a file."""

    file: pathlib.Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def is_known(self) -> bool:
        return self.dtype in _DTYPES

    def leaf(self) -> np.ndarray:
        """Its values, mapped: read when they are used.

        Raises:
          AdapterFileError: it has a dtype that is copied, and not computed with.
        """
        if not self.is_known:
            raise AdapterFileError(
                f"{self.file}: {self.name}: got dtype {self.dtype} for a tensor that the adapter "
                "changes, expected one of "
                f"{', '.join(_DTYPES)}. Merge it into a base of 16 or 32 bits."
            )
        if not self.stop - self.start:
            return np.zeros(self.shape, _DTYPES[self.dtype])
        mapped = np.memmap(self.file, np.uint8, "r", self.start, (self.stop - self.start,))
        return mapped.view(_DTYPES[self.dtype]).reshape(self.shape)


@dataclasses.dataclass(frozen=True)
class Shard:
    """A safetensors file: its tensors in the order in which they lie, and its metadata."""

    file: pathlib.Path
    tensors: dict[str, Tensor]
    metadata: dict[str, str] | None


@dataclasses.dataclass(frozen=True)
class Base:
    """A model's shards; `directory` is None for a single file."""

    shards: tuple[Shard, ...]
    directory: pathlib.Path | None
    index: pathlib.Path | None

    @functools.cached_property
    def tensors(self) -> dict[str, Tensor]:
        return {key: x for shard in self.shards for key, x in shard.tensors.items()}

    @property
    def nbytes(self) -> int:
        return sum(x.stop - x.start for x in self.tensors.values())

    def equal(self, key: str, other: str) -> bool:
        """Whether two tensors are the same, bit for bit."""
        x, y = self.tensors[key], self.tensors[other]
        if (x.dtype, x.shape) != (y.dtype, y.shape):
            return False
        with open(x.file, "rb") as f, open(y.file, "rb") as g:
            f.seek(x.start)
            g.seek(y.start)
            for at in range(0, x.stop - x.start, _CHUNK):
                size = min(_CHUNK, x.stop - x.start - at)
                if f.read(size) != g.read(size):
                    return False
        return True

    def leaves(self) -> dict[str, np.ndarray]:
        """The tensors, mapped; but those of dtypes that NumPy has not."""
        return {key: x.leaf() for key, x in self.tensors.items() if x.is_known}


def open_base(path: pathlib.Path) -> Base:
    """Reads the headers of a safetensors file, or of those in a directory.

    Raises:
      AdapterFileError: a file that is missing, damaged or not listed in the index.
    """
    if path.is_file():
        return Base((_open(path),), None, None)
    if not path.is_dir():
        raise AdapterFileError(
            f"{path}: not found, expected a safetensors file, or a directory with some."
        )
    indices = sorted(path.glob("*" + _INDEX))
    files = sorted(path.glob("*.safetensors"))
    files = [file for file in files if not file.name.startswith("adapter_")]
    if len(indices) > 1 or (not indices and len(files) != 1):
        listed = _paths.listing([file.name for file in [*indices, *files]] or ["none"])
        if (path / "_METADATA").exists():
            listed += (
                "\nIt is a checkpoint of orbax's: merge in Python, jaxlora.merge(lora), or write "
                "its params to a safetensors file whose keys are the paths."
            )
        raise AdapterFileError(
            f"{path}: expected one safetensors file, or one index ('*{_INDEX}') of several. Found:"
            f"{listed}"
        )
    if not indices:
        return Base((_open(files[0]),), path, None)
    weight_map = _weight_map(indices[0])
    shards = tuple(_open(path / name) for name in dict.fromkeys(weight_map.values()))
    for shard in shards:
        here = {key for key, name in weight_map.items() if name == shard.file.name}
        odd = sorted(here ^ shard.tensors.keys())
        if odd:
            raise AdapterFileError(
                f"{indices[0]}: got {odd[0][:200]} in one of the index and {shard.file.name}, "
                "expected the same tensors in both. Is a shard of another download?"
            )
    return Base(shards, path, indices[0])


def _weight_map(index: pathlib.Path) -> dict[str, str]:
    try:
        whole = json.loads(index.read_text())
        found = whole["weight_map"]
        if not isinstance(whole.get("metadata", {}), dict):
            raise TypeError("metadata is no object")
        plain = all(isinstance(x, str) and pathlib.Path(x).name == x for x in found.values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise AdapterFileError(f"{index}: expected an index of shards: {error!r}.") from None
    if not plain or not found:
        raise AdapterFileError(
            f"{index}: expected the names of files in the same directory in weight_map."
        )
    return found


def _open(file: pathlib.Path) -> Shard:
    try:
        with safetensors_module().safe_open(file, framework="np") as checked:
            metadata = checked.metadata()
    except FileNotFoundError:
        raise AdapterFileError(f"{file}: not found, expected a shard of the model.") from None
    except Exception as error:  # SafetensorError
        raise AdapterFileError(f"{file}: expected a whole safetensors file: {error}.") from None
    with open(file, "rb") as f:
        length = int.from_bytes(f.read(8), "little")
        header = json.loads(f.read(length))  # it was checked above
    header.pop("__metadata__", None)
    tensors = {
        key: Tensor(
            file,
            key,
            x["dtype"],
            tuple(x["shape"]),
            *(8 + length + offset for offset in x["data_offsets"]),
        )
        for key, x in header.items()
    }
    ordered = dict(sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)))
    return Shard(file, ordered, metadata)


# --------------------------------------------------------------------------------------------------
# Writing


def write_base(
    base: Base,
    out: pathlib.Path,
    changed: Mapping[str, Callable[[], np.ndarray]],
    added: Mapping[str, np.ndarray],
    progress: Callable[[int], Any],
) -> list[str]:
    """Writes the model anew: what is `changed` from its function, what is `added` last.

    All of it is written beside `out` and put there once it is whole.

    Args:
      base: what to copy.
      out: a file if the base is one, else a directory.
      changed: {key: the new values, of the shape and dtype of the old}.
      added: {key: values} of tensors that the base has not.
      progress: told the number of bytes that were written, in steps.

    Returns:
      The files of the base that were left out: weights in other formats.

    Raises:
      TargetError: the disk has no room for it.
      OSError: it cannot be written.
    """
    parent = out.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    needed = base.nbytes + sum(x.nbytes for x in added.values())
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise TargetError(
            f"{out}: got {free / 1e9:.2f} GB of room, expected {needed / 1e9:.2f} GB, what the "
            "model takes. Give a path on another disk."
        )
    left: list[str] = []
    partial = parent / f".{out.name}-{secrets.token_hex(4)}.part"
    try:
        if base.directory is None:
            _write_shard(base.shards[0], partial, changed, added, progress)
        else:
            partial.mkdir()
            for shard in base.shards:
                more = added if shard is base.shards[-1] else {}
                _write_shard(shard, partial / shard.file.name, changed, more, progress)
            left = _copy_rest(base, partial, added)
        if out.is_dir():
            out.rmdir()  # which is empty
        os.replace(partial, out)
        return left
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        partial.unlink(missing_ok=True)
        raise


def _write_shard(
    shard: Shard,
    out: pathlib.Path,
    changed: Mapping[str, Callable[[], np.ndarray]],
    added: Mapping[str, np.ndarray],
    progress: Callable[[int], Any],
) -> None:
    with open(out, "xb") as f:
        f.write(_header(shard, added))
        for key, tensor in shard.tensors.items():
            chunks = _bytes_of(changed[key]()) if key in changed else _copied(tensor)
            for chunk in chunks:
                f.write(chunk)
                progress(len(chunk))
        for value in added.values():
            for chunk in _bytes_of(value):
                f.write(chunk)
                progress(len(chunk))
        f.flush()
        os.fsync(f.fileno())
    shutil.copymode(shard.file, out)


def _header(shard: Shard, added: Mapping[str, np.ndarray]) -> bytes:
    entries: dict[str, Any] = {}
    if shard.metadata is not None:
        entries["__metadata__"] = shard.metadata
    forms = [(key, x.dtype, x.shape, x.stop - x.start) for key, x in shard.tensors.items()]
    forms += [(key, _NAMES[x.dtype], x.shape, x.nbytes) for key, x in added.items()]
    at = 0
    for key, dtype, shape, size in forms:
        entries[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _bytes_of(value: np.ndarray) -> Iterator[memoryview]:
    flat = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
    for start in range(0, flat.size, _CHUNK):
        yield flat[start : start + _CHUNK].data


def _copied(tensor: Tensor) -> Iterator[bytes]:
    with open(tensor.file, "rb") as f:
        f.seek(tensor.start)
        left = tensor.stop - tensor.start
        while left:
            chunk = _read(f, min(left, _CHUNK), tensor.file)
            left -= len(chunk)
            yield chunk


def _read(f: BinaryIO, size: int, file: pathlib.Path) -> bytes:
    chunk = f.read(size)
    if not chunk:
        raise AdapterFileError(f"{file}: got fewer bytes than a moment ago. Is it being written?")
    return chunk


def _copy_rest(base: Base, out: pathlib.Path, added: Mapping[str, np.ndarray]) -> list[str]:
    """Configuration, tokenizer and the like; the names of what is not copied, other weights."""
    root = base.directory
    assert root is not None
    left: list[str] = []
    written = {shard.file for shard in base.shards} | {base.index}
    for at, folders, files in os.walk(root):
        here = pathlib.Path(at)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for file in sorted(here / name for name in files):
            name = file.relative_to(root)
            if file in written or not file.is_file():
                continue
            if file.suffix in _NOT_COPIED or file.name.startswith("adapter_"):
                left.append(str(name))
                continue
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, out / name)
    if base.index is not None:
        index = json.loads(base.index.read_text())
        index["weight_map"] |= dict.fromkeys(added, base.shards[-1].file.name)
        metadata = index.setdefault("metadata", {})
        metadata["total_size"] = base.nbytes + sum(x.nbytes for x in added.values())
        if isinstance(metadata.get("total_parameters"), int):
            metadata["total_parameters"] += sum(math.prod(x.shape) for x in added.values())
        (out / base.index.name).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return left
