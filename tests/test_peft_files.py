"""PEFT's directories, damaged or hostile: the right result, or an error that names the file.

And what `save` leaves behind when it cannot finish.
"""

from __future__ import annotations

import json
import os
import pathlib
import resource
import struct
import tracemalloc
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_same
from peft_models import ROOT, model
from safetensors.numpy import load_file

import jaxlora
from jaxlora import LoraConfig, peft
from jaxlora._errors import AdapterFileError
from jaxlora.peft import _files
from jaxlora.peft._safe_regex import Texts

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
STEM = "base_model.model."


def copy(name: str, to: pathlib.Path) -> pathlib.Path:
    to.mkdir(exist_ok=True)
    for file in to.iterdir():
        file.unlink()
    for file in (CONFIG, WEIGHTS):
        (to / file).write_bytes((ROOT / name / file).read_bytes())
    return to


def raw(header: Any, payload: bytes = b"") -> bytes:
    """A safetensors file, whatever its header says."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + payload


def outcome(f: Callable[[], Any]) -> tuple[Any, str | None]:
    """What f returns, or the message of the error that it raises."""
    try:
        return f(), None
    except AdapterFileError as error:
        return None, str(error)


def load(directory: pathlib.Path, name: str = "tokens") -> Any:
    m = model(name)
    return peft.load(directory, m.params, m.names)


# --------------------------------------------------------------------------------------------------
# Files


def _one(shape, offsets, dtype="F32"):
    return {"x": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x00" * 7,
        struct.pack("<Q", 2**60),
        struct.pack("<Q", 2**60) + b"{}",
        struct.pack("<Q", 2**64 - 1) + b"{}" * 100,
        raw(b""),
        raw(b"{"),
        raw(b"[1, 2]"),
        raw(b"\xff\xfe"),
        raw(b"[" * 100_000),
        raw(_one([2], [0, 8])),  # no payload
        raw(_one([2], [0, 8]), b"\0" * 4),  # a part of it
        raw(_one([2], [0, 8]), b"\0" * 12),  # more than it
        raw(_one([2**31, 2**31], [0, 8]), b"\0" * 8),
        raw(_one([2**62], [0, 2**63]), b"\0" * 8),
        raw(_one([-2], [0, 8]), b"\0" * 8),
        raw(_one([2], [8, 0]), b"\0" * 8),
        raw(_one([2], [0, 8], "F33"), b"\0" * 8),
        raw(_one([8], [0, 8], "I8"), b"\0" * 8),
        raw({"__metadata__": {"a": 3}}),
        raw({"__metadata__": {"format": "pt"}}),
        raw(
            b'{"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},'
            b' "x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}',
            b"\0" * 8,
        ),
        raw(
            {
                "x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
                "y": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
            },
            b"\0" * 12,
        ),
        raw(
            {"../../etc/passwd": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, b"\0" * 8
        ),
        b"PK\x03\x04" + b"\0" * 100,  # a zip, as torch.save writes
        b"\x80\x02}q\x00." + b"\0" * 100,  # a pickle
    ],
    ids=range(26),
)
def test_weights_that_are_no_adapter(data, tmp_path):
    directory = copy("tokens", tmp_path / "a")
    (directory / WEIGHTS).write_bytes(data)
    tracemalloc.start()
    with pytest.raises(AdapterFileError, match=r"adapter_model\.safetensors"):
        load(directory)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 * 2**20
    assert not (tmp_path / "etc").exists()


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "expected JSON"),
        (b"{", "expected JSON"),
        (b"[]", "got a list, expected an object"),
        (b"3", "got a int, expected an object"),
        (b"\xff{}", "expected JSON"),
        (b"[" * 100_000, "expected JSON"),
        (b'{"r": ' + b"9" * 5000 + b"}", "expected JSON"),
        (b'{"r": 2, "r": 4}', "got the key 'r' twice"),
        (b'{"lora_alpha": NaN}', "got the number NaN"),
        (b'{"lora_alpha": -Infinity}', "got the number -Infinity"),
        (b'{"peft_type": "LORA", "lora_alpha": 1e999}', "expected a number"),
        (b'{"a": "' + b"x" * 5 * 2**20 + b'"}', "got 5,242,889 bytes, expected at most 4,194,304"),
    ],
    ids=range(12),
)
def test_configurations_that_are_none(data, text, tmp_path):
    directory = copy("tokens", tmp_path / "a")
    (directory / CONFIG).write_bytes(data)
    with pytest.raises(AdapterFileError, match=f"adapter_config.json: .*{text}"):
        load(directory)


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(AdapterFileError, match=r"adapter_config.json: not found\. Expected a dir"):
        load(tmp_path)
    with pytest.raises(AdapterFileError, match=r"nowhere.adapter_config.json: not found"):
        load(tmp_path / "nowhere")
    with pytest.raises(AdapterFileError, match="expected the name of a subfolder"):
        peft.load(tmp_path, {}, {}, adapter="a\0b")
    directory = copy("tokens", tmp_path / "a")
    (directory / WEIGHTS).rename(directory / "adapter_model.bin")
    with pytest.raises(AdapterFileError, match=r"adapter_model.bin: a pickle, which can run code"):
        load(directory)
    (directory / "adapter_model.bin").unlink()
    with pytest.raises(AdapterFileError, match=r"adapter_model.safetensors: not found"):
        load(directory)


def test_links_are_followed_to_regular_files_alone(tmp_path):
    """A snapshot of the Hub is links into a cache; a pipe or a device is no adapter."""
    blobs = copy("tokens", tmp_path / "blobs")
    linked = tmp_path / "snapshot"
    linked.mkdir()
    for file in (CONFIG, WEIGHTS):
        (linked / file).symlink_to(blobs / file)
    load(linked)
    for file in (CONFIG, WEIGHTS):
        for target in ("/dev/zero", str(tmp_path), str(linked / file), str(tmp_path / "gone")):
            (linked / file).unlink()
            (linked / file).symlink_to(target)
            with pytest.raises(AdapterFileError, match=file):
                load(linked)
        (linked / file).unlink()
        os.mkfifo(linked / file)
        with pytest.raises(AdapterFileError, match="expected a regular file"):
            load(linked)
        (linked / file).unlink()
        (linked / file).symlink_to(blobs / file)


def test_huge_but_legal_configurations_end(tmp_path):
    """As large as the limit allows: an error, and no product of sizes."""
    directory = copy("tokens", tmp_path / "a")
    before = json.loads((directory / CONFIG).read_text())
    for fields in (
        {"target_modules": [f"m{i}" for i in range(100_000)]},
        {"rank_pattern": {f"m{i}": 1 for i in range(100_000)}},
        {"exclude_modules": [f"m{i}" for i in range(100_000)], "modules_to_save": ["x"] * 100_000},
        {"target_modules": "(a|b)*" * 1000},
        {"target_modules": "(" * 900 + "a*" + ")*" * 900},
        {"target_modules": "((a{0,1000}){0,1000}){0,1000}x"},
        {"target_modules": "(.*)*" * 40 + "x"},
        {"alpha_pattern": {f"(a+)+{i}": 1 for i in range(50_000)}},
        {"trainable_token_indices": list(range(100_000))},
        {"layers_to_transform": list(range(100_000))},
    ):
        (directory / CONFIG).write_text(json.dumps(before | fields))
        with pytest.raises(AdapterFileError, match=rf"{CONFIG}: ({'|'.join(fields)})"):
            load(directory)


# --------------------------------------------------------------------------------------------------
# Regexes without backtracking

PATTERNS = [
    "a*b", "(a|b)*", "(?:a+)+b", "a{2}", "a{1,2}b?", "[^a]*", r"\w+\.\d+", r"(x\.)?a$", "^ab",
    r".*\bab\b.*", r"\Bb", "(?!a).*", "(?=.*b)a.*", "a*?b", "(|a)(b|)", "((a*)*)*b", "[a-c]+", "",
    r"a\.0", "(a{0,3}){2}", r"[\d.]+", "a|ab|b", "(ab){2,}",
]  # fmt: skip


def test_a_regex_matches_what_re_matches():
    import itertools
    import re

    texts = ["".join(t) for n in range(5) for t in itertools.product("ab.0", repeat=n)]
    known = Texts(texts)
    for pattern in PATTERNS:
        known._left = 10**9
        assert known.full(pattern) == {t for t in texts if re.fullmatch(pattern, t)}, pattern
        tail = {t for t in texts if re.fullmatch(rf"(.*\.)?({pattern})", t)}
        assert known.tail(pattern) == tail, pattern


# --------------------------------------------------------------------------------------------------
# Writing


@pytest.fixture
def saved(tmp_path):
    """A directory with an adapter, and another adapter of the same base."""
    params = {"head": {"kernel": jnp.ones((30, 40))}}
    lora = jaxlora.init(jax.random.key(0), params, LoraConfig(rank=2, targets=["head"]))
    other = jaxlora.init(jax.random.key(1), params, LoraConfig(rank=4, targets=["head"]))
    names = {"head/kernel": "lm_head"}
    peft.save(tmp_path / "a", lora, names)
    return tmp_path / "a", params, names, lora, other


def contents(directory: pathlib.Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in directory.iterdir()}


def test_what_cannot_be_written_changes_nothing(saved, monkeypatch):
    """Each call to the file system fails once: the old adapter is whole, nothing lies about."""
    directory, params, names, lora, other = saved
    before = contents(directory)
    for name in ("open", "fsync", "replace"):
        for nth in range(6):
            real, calls = getattr(os, name), []

            def failing(*args, **kwargs):
                calls.append(args)
                if len(calls) == nth + 1:
                    raise OSError(28, "No space left on device")
                return real(*args, **kwargs)

            with monkeypatch.context() as m:
                m.setattr(_files.os, name, failing)
                _, error = outcome(lambda: peft.save(directory, other, names))
            if error is not None:
                assert "no space while writing the adapter: No space left" in error
                assert contents(directory) == before, (name, nth)
                continue
            assert_same(peft.load(directory, params, names), other)
            assert {*contents(directory)} == {CONFIG, WEIGHTS}
            peft.save(directory, lora, names)
            assert contents(directory) == before


def test_a_full_disk_changes_nothing(saved):
    """The system's own refusal, here of files above a size."""
    directory, params, names, lora, other = saved
    before = contents(directory)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, limits[1]))
    try:
        with pytest.raises(AdapterFileError, match=r"no space while writing .* is unchanged"):
            peft.save(directory, other, names)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert contents(directory) == before
    assert_same(peft.load(directory, params, names), lora)


def test_a_directory_that_cannot_be_made(saved, tmp_path):
    _, _, names, lora, _ = saved
    (tmp_path / "file").write_text("")
    with pytest.raises(AdapterFileError, match="failed while writing the adapter"):
        peft.save(tmp_path / "file" / "a", lora, names)
    read_only = tmp_path / "read_only"
    read_only.mkdir()
    read_only.chmod(0o500)
    if os.geteuid() != 0:  # to whom no directory is read-only
        with pytest.raises(AdapterFileError, match="Permission denied"):
            peft.save(read_only, lora, names)


def test_killed_between_any_two_calls(saved, monkeypatch):
    """Nothing runs after the n-th call: the old adapter, the new one, or a refusal; no mixture."""
    directory, params, names, lora, other = saved

    class Killed(BaseException):
        pass

    found = set()
    for nth in range(20):
        for file in directory.iterdir():
            file.unlink()
        peft.save(directory, lora, names)
        count = 0

        def counted(real: Callable) -> Callable:
            def call(*args, **kwargs):
                nonlocal count
                count += 1
                if count > nth:
                    raise Killed
                return real(*args, **kwargs)

            return call

        with monkeypatch.context() as m:
            for name in ("open", "fsync", "replace", "unlink"):
                m.setattr(_files.os, name, counted(getattr(os, name)))
            try:
                peft.save(directory, other, names)
                done = True
            except Killed:
                done = False
        again, error = outcome(lambda: peft.load(directory, params, names))
        if error is not None:
            assert "Saving was interrupted" in error
            for file in directory.glob("*.previous"):  # as the message says
                file.replace(file.with_suffix(""))
            assert_same(peft.load(directory, params, names), lora)
            found.add("refused")
            continue
        is_old = again["head"]["kernel"].rank == 2
        assert_same(again, lora if is_old else other)
        found.add("old" if is_old else "new")
        if done:
            break
    assert found == {"old", "new", "refused"}


def test_saving_after_a_kill(saved, monkeypatch):
    """Set aside is the last whole adapter, however often saving is interrupted."""
    directory, params, names, lora, other = saved

    def kill_at(nth: int, tree: Any) -> None:
        calls = []
        real = os.replace

        def replace(*args):
            calls.append(args)
            if len(calls) == nth:
                raise KeyboardInterrupt
            real(*args)

        with monkeypatch.context() as m:
            m.setattr(_files.os, "replace", replace)
            with pytest.raises(KeyboardInterrupt):
                peft.save(directory, tree, names)

    kill_at(4, other)  # new weights are there, the new configuration is not
    kill_at(2, other)
    for file in directory.glob("*.previous"):
        file.replace(file.with_suffix(""))
    assert_same(peft.load(directory, params, names), lora)
    kill_at(3, other)
    peft.save(directory, other, names)
    assert_same(peft.load(directory, params, names), other)
    assert {*contents(directory)} == {CONFIG, WEIGHTS}


def test_new_weights_of_the_same_configuration_are_one_rename(saved, monkeypatch):
    directory, params, names, lora, _ = saved
    calls = []
    real = os.replace
    monkeypatch.setattr(_files.os, "replace", lambda *a: (calls.append(a), real(*a)))
    double = jaxlora.combine(
        jax.tree.map(lambda x: 2 * x, jaxlora.partition(lora)[0]), jaxlora.partition(lora)[1]
    )
    peft.save(directory, double, names)
    assert len(calls) == 1
    assert_same(peft.load(directory, params, names), double)


def test_other_files_stay(saved):
    directory, _, names, _, other = saved
    (directory / "README.md").write_text("mine")
    peft.save(directory, other, names)
    assert (directory / "README.md").read_text() == "mine"


# --------------------------------------------------------------------------------------------------
# A fuzz: mutated directories

FUZZED = ("tokens", "layers", "experts")


def expected_values(directory: pathlib.Path, name: str) -> dict[str, np.ndarray]:
    """What PEFT's formulas make of a directory, {path: what is added, or the value}, in float64.

    An independent reader: scale from the configuration, B A of each module.
    """
    config = json.loads((directory / CONFIG).read_text())
    tensors = {k: v.astype(np.float64) for k, v in load_file(directory / WEIGHTS).items()}

    def scale(module: str) -> float:
        rank = config.get("r") or 8
        for key, value in (config.get("rank_pattern") or {}).items():
            rank = value if module.endswith(key) else rank
        alpha = 8 if config.get("lora_alpha") is None else config["lora_alpha"]
        return alpha / (np.sqrt(rank) if config.get("use_rslora") else rank)

    def get(key: str) -> np.ndarray:
        return tensors[STEM + key]

    def linear(module: str) -> np.ndarray:
        a, b = get(f"{module}.lora_A.weight"), get(f"{module}.lora_B.weight")
        return scale(module) * (b @ a).T

    if name == "tokens":
        rows = config["trainable_token_indices"]["emb"]
        delta = get("emb.token_adapter.trainable_tokens_delta")
        return {"up/kernel": linear("up"), "down/kernel": linear("down")} | {
            f"emb/embedding[{row}]": x for row, x in zip(rows, delta, strict=True)
        }
    if name == "layers":
        a, b = get("emb.lora_embedding_A"), get("emb.lora_embedding_B")
        found = {"emb/embedding": scale("emb") * (b @ a).T, "lin/kernel": linear("lin")}
        for module, spec in (("conv1", "or,riw->wio"), ("conv2", "or,rihw->hwio")):
            a, b = get(f"{module}.lora_A.weight"), get(f"{module}.lora_B.weight")
            b = b.reshape(b.shape[:2])
            found[f"{module}/kernel"] = scale(module) * np.einsum(spec, b, a)
        return found
    found = {}
    for parameter, stem in (("down", "experts."), ("up", "experts.base_layer.")):
        a, b = get(f"{stem}lora_A.weight"), get(f"{stem}lora_B.weight")
        a, b = a.reshape(3, -1, a.shape[1]), b.reshape(b.shape[0], -1, 3)
        found[parameter] = scale(f"experts.{parameter}") * np.einsum("ore,eri->eio", b, a)
    return found


def check_values(lora: Any, directory: pathlib.Path, name: str) -> None:
    pairs = jaxlora._paths.flatten_with_paths(lora, is_leaf=jaxlora._weight.is_node)[0]
    leaves = dict(pairs)
    expected = expected_values(directory, name)
    trained = {p for p, x in leaves.items() if jaxlora._weight.is_node(x)}
    assert trained == {key.partition("[")[0] for key in expected}
    for key, value in expected.items():
        path, _, row = key.partition("[")
        leaf = leaves[path]
        if row:
            got = np.asarray(leaf.value)[int(row[:-1])]
        else:
            a, b = (np.asarray(x, np.float64) for x in (leaf.a, leaf.b))
            with np.errstate(over="ignore", invalid="ignore"):
                if leaf.roles == "sio":
                    got = np.einsum("sir,sro->sio", a, b) * np.asarray(leaf.scale)[:, None, None]
                else:
                    got = np.tensordot(a, b, 1) * np.float64(leaf.scale)
        np.testing.assert_allclose(got, value, rtol=1e-5, atol=1e-5 * np.abs(value).max())


def _header(data: bytes) -> tuple[dict[str, Any], bytes]:
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def mutate(directory: pathlib.Path, rng: np.random.Generator) -> tuple[str, bool | None]:
    """Damages a directory: what was done, and whether it must be refused (None: it depends)."""
    weights, config = directory / WEIGHTS, directory / CONFIG
    data, text = weights.read_bytes(), config.read_bytes()
    header, payload = _header(data)
    keys = [k for k in header if k != "__metadata__"]
    key = str(rng.choice(keys))
    kinds = {
        "flip weights": 5, "flip header": 5, "flip config": 5, "truncate": 3, "truncate config": 1,
        "shape": 2, "dtype": 2, "duplicate": 1, "missing": 1, "extra": 1, "nan": 1, "length": 2,
        "offsets": 2, "traversal": 1, "link": 1, "huge": 1, "field": 3, "swap": 1, "append": 1,
    }  # fmt: skip
    weight = np.array([*kinds.values()], float)
    kind = str(rng.choice([*kinds], p=weight / weight.sum()))

    def flipped(data: bytes, low: int, high: int) -> bytes:
        changed = bytearray(data)
        for _ in range(int(rng.integers(1, 4))):
            changed[int(rng.integers(low, high))] ^= 1 << int(rng.integers(8))
        return bytes(changed)

    start = len(data) - len(payload)
    if kind == "flip weights":
        weights.write_bytes(flipped(data, start, len(data)))
        return kind, None
    if kind == "flip header":
        weights.write_bytes(flipped(data, 0, start))
        return kind, None
    if kind == "flip config":
        config.write_bytes(flipped(text, 0, len(text)))
        return kind, None
    if kind == "truncate":
        weights.write_bytes(data[: int(rng.integers(len(data)))])
        return kind, True
    if kind == "truncate config":
        config.write_bytes(text[: int(rng.integers(len(text) - 2))])
        return kind, True
    if kind == "append":
        weights.write_bytes(data + bytes(int(rng.integers(1, 9))))
        return kind, True
    if kind == "length":
        weights.write_bytes(
            struct.pack("<Q", int(rng.choice([2**60, 2**63, start, 0, 1]))) + data[8:]
        )
        return kind, True
    if kind in ("link", "huge"):
        file = weights if rng.random() < 0.5 else config
        file.unlink()
        if kind == "link":
            file.symlink_to(str(rng.choice(["/dev/zero", "/nowhere", "/", str(file)])))
        elif file == config:
            file.write_bytes(b'{"a": "' + b"x" * (4 * 2**20) + b'"}')
        else:
            file.write_bytes(struct.pack("<Q", 2**24 + 1) + b" " * (2**24 + 1))
        return kind, True
    if kind == "field":
        field, value = [
            ("r", 3), ("use_dora", True), ("lora_bias", True), ("bias", "all"),
            ("kasa_config", {"a": 1}),
            ("target_modules", ["nothing"]), ("modules_to_save", ["emb"]), ("peft_type", "IA3"),
            ("init_lora_weights", "corda"), ("rank_pattern", {".*": 7}), ("new_field", 1),
            ("layers_to_transform", [3]), ("target_parameters", ["x"]), ("lora_dropout", 2),
        ][int(rng.integers(14))]  # fmt: skip
        config.write_text(json.dumps(json.loads(text) | {field: value}))
        if field == "bias":  # which a model without biases may have
            return f"{kind} {field}", None
        return f"{kind} {field}", True
    entry = header[key]
    if kind == "shape":
        entry["shape"] = [*entry["shape"][::-1], *([1] if rng.random() < 0.5 else [])]
        refused = entry["shape"] != _header(data)[0][key]["shape"]
        weights.write_bytes(raw(header, payload))
        return kind, refused
    if kind == "dtype":
        entry["dtype"] = str(rng.choice(["I32", "U32", "F64", "BF16", "F16", "BOOL", "C64", "?"]))
    elif kind == "missing":
        del header[key]
    elif kind == "extra":
        header[f"{STEM}x{int(rng.integers(99))}"] = {
            "dtype": "F32",
            "shape": [0],
            "data_offsets": [0, 0],
        }
    elif kind == "traversal":
        header["../" * int(rng.integers(1, 9)) + key] = header.pop(key)
    elif kind == "offsets":
        entry["data_offsets"][int(rng.integers(2))] += int(rng.choice([-4, 4, 2**40, -1]))
    elif kind == "duplicate":
        again = json.dumps(header)
        again = again[:-1] + f", {json.dumps(key)}: {json.dumps(entry)}}}"
        weights.write_bytes(raw(again.encode(), payload))
        return kind, True
    elif kind == "nan":
        low, high = entry["data_offsets"]
        at = low + 4 * int(rng.integers((high - low) // 4))
        value = struct.pack("<f", float(rng.choice([np.nan, np.inf, -np.inf])))
        weights.write_bytes(raw(header, payload[:at] + value + payload[at + 4 :]))
        return kind, True
    elif kind == "swap":
        other = str(rng.choice(keys))
        header[key], header[other] = header[other], header[key]
        weights.write_bytes(raw(header, payload))
        return kind, None
    weights.write_bytes(raw(header, payload))
    return kind, True


def fuzz(count: int, seed: int, directory: pathlib.Path) -> dict[str, int]:
    rng = np.random.default_rng(seed)
    models = {name: model(name) for name in FUZZED}
    ends = {"loaded": 0, "refused": 0}
    for k in range(count):
        name = FUZZED[k % len(FUZZED)]
        copy(name, directory)
        what, refused = mutate(directory, rng)
        m = models[name]
        lora, error = outcome(lambda: peft.load(directory, m.params, m.names))
        if error is not None:
            assert str(directory) in error, (k, what, error)
            assert refused is not False, (k, what, error)
            ends["refused"] += 1
            continue
        assert not refused, (k, what)
        check_values(lora, directory, name)
        ends["loaded"] += 1
    return ends


def test_fuzz(tmp_path):
    ends = fuzz(300, 0, tmp_path / "a")
    assert min(ends.values()) > 20


@pytest.mark.slow
def test_fuzz_at_length(tmp_path):
    ends = fuzz(10_000, 1, tmp_path / "a")
    assert sum(ends.values()) == 10_000
