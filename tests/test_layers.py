"""The shape of the package: imports point down the list, and importing it is cheap."""

from __future__ import annotations

import ast
import pathlib
import subprocess
import sys

import pytest

import jaxlora

PACKAGE = pathlib.Path(jaxlora.__file__).parent

# A module imports only from those above it.
ORDER = [
    "_errors",
    "_not_an_array",
    "_compat",
    "_settled",
    "_pytrees",
    "_codebooks",
    "_quantized_array",
    "_quantized",
    "_paths",
    "_matrix",
    "_dora",
    "_weight",
    "_target",
    "_moments",
    "_random_initializers",
    "_svd_initializers",
    "_data_initializers",
    "initializers",
    "_config",
    "_looped",
    "_moves",
    "_recomputed",
    "_deferred",
    "_dropout",
    "_terms",
    "_contractions",
    "_convolution",
    "_ragged",
    "_factored",
    "_rules",
    "_sharded",
    "_control_flow",
    "_apply",
    "_collect",
    "_roles",
    "_init",
    "_tree",
    "_quantize",
    "_alike",
    "_rebase",
    "_low_rank",
    "_merging",
    "_adapters",
    "_adamw_8bit",
    "optim",
    "__init__",
    # Imported by the user.
    "_placement",
    "checkpoint._fingerprint",
    "checkpoint._packed",
    "checkpoint._description",
    "checkpoint._stored",
    "checkpoint._item",
    "checkpoint._versions",
    "checkpoint",
    "peft._safe_regex",
    "peft._files",
    "peft._entries",
    "peft._names",
    "peft._layouts",
    "peft._config",
    "peft._strengths",
    "peft._reading",
    "peft._adapters",
    "peft._full",
    "peft._load",
    "peft._save",
    "peft",
    "cli._shards",
    "cli._read",
    "cli._table",
    "cli._inspect",
    "cli._base_leaves",
    "cli._convert",
    "cli._tied",
    "cli._torch_names",
    "cli._merge",
    "cli",
    "__main__",
]


def name_of(path: pathlib.Path) -> str:
    """What a module is called in ORDER."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports_of(path: pathlib.Path) -> set[str]:
    """The modules of the package that a module imports when it runs."""
    found = set()
    tree = ast.parse(path.read_text())
    for_types = {
        id(node)
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and getattr(branch.test, "id", "") == "TYPE_CHECKING"
        for node in ast.walk(branch)
    }
    for node in ast.walk(tree):
        if id(node) in for_types or not isinstance(node, ast.ImportFrom):
            continue
        if (node.module or "").partition(".")[0] == "jaxlora":
            parent = (node.module or "").partition(".")[2]
            names = [f"{parent}.{alias.name}".removeprefix(".") for alias in node.names]
            modules = {name for name in names if name in MODULES}
            found |= modules if len(modules) == len(names) else modules | {parent}
    return found & MODULES.keys()


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_down_the_list(name: str):
    assert name in ORDER, f"{name} has no place in the order of modules"
    assert imports_of(MODULES[name]) <= set(ORDER[: ORDER.index(name)])


def test_every_name_is_exported_once():
    assert len(set(jaxlora.__all__)) == len(jaxlora.__all__)
    assert all(hasattr(jaxlora, name) for name in jaxlora.__all__)


def run(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout


def test_import_adds_no_dependency():
    """`import jaxlora` loads nothing but itself on top of jax, flax and optax."""
    loaded = run(
        "import sys, jax, flax, optax\n"
        "import jax.extend.core, jax.extend.source_info_util\n"
        "before = set(sys.modules)\n"
        "import jaxlora\n"
        "print(*sorted({m.split('.')[0] for m in set(sys.modules) - before}))"
    ).split()
    assert set(loaded) <= {"jaxlora", "difflib", "hashlib", "_hashlib", "_blake2"}


@pytest.mark.parametrize(("module", "needs"), [("checkpoint", "orbax"), ("peft", "safetensors")])
def test_optional_modules_are_imported_by_the_user(module: str, needs: str):
    code = "import sys, jaxlora{}\nprint(*{{m.split('.')[0] for m in sys.modules}})"
    assert not {needs} & set(run(code.format("")).split())
    assert needs in run(code.format(f".{module}")).split()
