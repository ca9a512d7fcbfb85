"""The files of an adapter's directory: read without trust, written without a half-way."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pathlib
import secrets
import stat
from typing import Any

import ml_dtypes
import numpy as np

from jaxlora._errors import AdapterFileError

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
_ASIDE = ".previous"
_CONFIG_LIMIT = 4 * 2**20
_HEADER_LIMIT = 16 * 2**20
_DTYPES: dict[str, Any] = {
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F32": np.float32,
    "F64": np.float64,
}


def safetensors_module() -> Any:
    """The optional dependency, or an error that names the extra."""
    try:
        import safetensors.numpy
    except ImportError as error:
        raise ImportError(
            "jaxlora.peft reads and writes safetensors files, and safetensors is not installed: "
            "pip install 'jaxlora[peft]'"
        ) from error
    return safetensors


def adapter_directory(directory: Any, adapter: str | None) -> pathlib.Path:
    """The directory of an adapter: the given one, or that of a name within it."""
    root = pathlib.Path(directory).expanduser()
    if adapter is None:
        return root
    plain = isinstance(adapter, str) and adapter not in ("", ".", "..")
    if not plain or "/" in adapter or "\\" in adapter or "\0" in adapter:
        raise AdapterFileError(
            f"adapter: got {adapter!r}, expected the name of a subfolder of {root}, without "
            "slashes: peft.load(directory, params, names, adapter='name')."
        )
    return root / adapter


def _read(file: pathlib.Path, limit: int | None = None) -> bytes:
    """The bytes of a regular file; never waits for a pipe, never reads beyond the file's size."""
    try:
        number = os.open(file, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        with open(number, "rb") as f:
            status = os.fstat(f.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise AdapterFileError(f"{file}: expected a regular file, got something else.")
            if limit is not None and status.st_size > limit:
                raise AdapterFileError(
                    f"{file}: got {status.st_size:,} bytes, expected at most {limit:,}. "
                    "It is no adapter's configuration."
                )
            return f.read(status.st_size)
    except (OSError, ValueError) as error:
        if isinstance(error, AdapterFileError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise AdapterFileError(f"{file}: cannot be read: {reason}.") from None


def _parse(text: bytes, what: str) -> Any:
    """JSON, strictly: no duplicate keys, no NaN, bounded nesting."""

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        for key, value in items:
            if key in seen:
                raise AdapterFileError(
                    f"{what}: got the key {key[:200]!r} twice, expected it once."
                )
            seen[key] = value
        return seen

    def constant(name: str) -> Any:
        raise AdapterFileError(f"{what}: got the number {name}, expected finite numbers.")

    try:
        return json.loads(text.decode(), object_pairs_hook=pairs, parse_constant=constant)
    except AdapterFileError:
        raise
    except (ValueError, RecursionError) as error:
        raise AdapterFileError(f"{what}: expected JSON, got something else: {error}.") from None


def read_config(directory: pathlib.Path) -> dict[str, Any]:
    """`adapter_config.json` as it is."""
    file = directory / CONFIG
    if not os.path.lexists(file):
        raise AdapterFileError(f"{file}: not found. {_missing(directory)}")
    config = _parse(_read(file, _CONFIG_LIMIT), str(file))
    if not isinstance(config, dict):
        raise AdapterFileError(
            f"{file}: got a {type(config).__name__}, expected an object with the fields of PEFT's "
            "LoraConfig."
        )
    return config


def _missing(directory: pathlib.Path) -> str:
    if os.path.lexists(directory / (CONFIG + _ASIDE)):
        return (
            "Saving was interrupted. The adapter from before is there: take the ending "
            f"{_ASIDE!r} off the files that have it. Or save again."
        )
    try:
        found = sorted(p.name for p in directory.iterdir() if os.path.lexists(p / CONFIG))
    except OSError:
        found = []
    if found:
        names = ", ".join(map(repr, found[:8]))
        return (
            f"The directory holds adapters in subfolders, {names}: "
            f"peft.load(directory, params, names, adapter={found[0]!r})."
        )
    if any(directory.glob("**/jaxlora.json.gz")):
        return (
            "These are checkpoints of jaxlora: jaxlora.checkpoint.restore(path, params), or "
            "python -m jaxlora convert."
        )
    return "Expected a directory that PEFT's save_pretrained or jaxlora.peft.save wrote."


def read_tensors(directory: pathlib.Path) -> dict[str, np.ndarray]:
    """The tensors of `adapter_model.safetensors`, all floating-point and finite."""
    file = directory / WEIGHTS
    if not os.path.lexists(file):
        if os.path.lexists(directory / PICKLE):
            raise AdapterFileError(
                f"{directory / PICKLE}: a pickle, which can run code when it is read, so that it "
                "is not read here. Convert it in PyTorch: safetensors.torch.save_file("
                f"torch.load('{PICKLE}', weights_only=True), '{WEIGHTS}')."
            )
        raise AdapterFileError(f"{file}: not found, expected the adapter's weights.")
    data = _read(file)
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > min(len(data) - 8, _HEADER_LIMIT):
        raise AdapterFileError(
            f"{file}: got a header of {length:,} bytes in a file of {len(data):,}, expected a "
            f"whole safetensors file with a header of at most {_HEADER_LIMIT:,}. Is it truncated?"
        )
    _parse(data[8 : 8 + length], str(file))  # for duplicate keys, of which safetensors takes one
    safetensors = safetensors_module()
    try:
        found = safetensors.deserialize(data)
    except Exception as error:  # its own SafetensorError, or what Rust makes of a wrong header
        raise AdapterFileError(f"{file}: expected a safetensors file: {error}.") from None
    del data
    return {key: _tensor(file, key, view) for key, view in found}


def _tensor(file: pathlib.Path, key: str, view: dict[str, Any]) -> np.ndarray:
    dtype = _DTYPES.get(view["dtype"])
    if dtype is None:
        raise AdapterFileError(
            f"{file}: {key}: got dtype {view['dtype']}, expected one of {', '.join(_DTYPES)}."
        )
    empty = 0 in view["shape"]
    array = np.zeros(0, dtype) if empty else np.frombuffer(view["data"], dtype)
    array = array.reshape(view["shape"])
    check_finite(array, f"{file}: {key}")
    return array


def check_finite(array: np.ndarray, what: str) -> None:
    """Raises if there is a NaN or an infinity."""
    bad = int(array.size - np.count_nonzero(np.isfinite(array)))
    if bad:
        raise AdapterFileError(
            f"{what}: got {bad:,} of {array.size:,} values that are NaN or infinite, expected "
            "finite ones. The adapter is broken: take an earlier one."
        )


def write_adapter(
    directory: pathlib.Path, config: dict[str, Any], tensors: dict[str, np.ndarray]
) -> None:
    """Writes both files; until both are whole on disk, what was there stays as it was.

    Each is written beside its place and flushed to the disk, then renamed. If the configuration
    changes too, that takes more than one rename: the old files are set aside first, so that a
    process killed in between leaves a directory that is refused, with the old adapter in it, and
    never new weights with an old configuration.
    """
    safetensors = safetensors_module()
    for key, x in tensors.items():
        check_finite(x, f"{directory / WEIGHTS}: {key}")
    weights = safetensors.numpy.save(tensors, metadata={"format": "pt"})
    text = (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()
    final = [directory / CONFIG, directory / WEIGHTS]
    aside = [file.with_name(file.name + _ASIDE) for file in final]
    made: list[str] = []
    moved: list[tuple[pathlib.Path, pathlib.Path]] = []
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for left in directory.glob(".adapter-*.part"):  # by a process that was killed
            left.unlink()
        new = [_beside(directory, data, made) for data in (text, weights)]
        if final[0].is_file() and final[0].read_bytes() == text:
            os.replace(new[1], final[1])
            os.unlink(new[0])
        else:
            if os.path.lexists(final[0]):  # else what is set aside already is the last whole one
                _forget(aside)
                for old, there in zip(final, aside, strict=True):
                    if os.path.lexists(old):
                        os.replace(old, there)
                        moved.append((there, old))
            os.replace(new[1], final[1])
            os.replace(new[0], final[0])
            moved.clear()
        _forget(aside)
        _flush_directory(directory)
    except OSError as error:
        for there, old in reversed(moved):
            os.replace(there, old)
        for name in made:
            with contextlib.suppress(OSError):
                os.unlink(name)
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        raise AdapterFileError(
            f"{directory}: {'no space' if full else 'failed'} while writing the adapter: "
            f"{error.strerror or error}. What was there before is unchanged. Give another "
            "directory: peft.save(directory, ...)."
        ) from error


def _forget(files: list[pathlib.Path]) -> None:
    for file in files:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(file)


def _beside(directory: pathlib.Path, data: bytes, made: list[str]) -> str:
    name = str(directory / f".adapter-{secrets.token_hex(8)}.part")
    number = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    made.append(name)
    with open(number, "wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())
    return name


def _flush_directory(directory: pathlib.Path) -> None:
    with contextlib.suppress(OSError):  # not every file system can
        number = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)
