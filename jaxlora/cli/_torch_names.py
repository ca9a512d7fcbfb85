"""The map of `jaxlora.peft` for a base that has PyTorch's names already: read off an adapter."""

from __future__ import annotations

import itertools
import json
import math
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from jaxlora import _paths
from jaxlora._errors import AdapterFileError
from jaxlora.cli._tied import check_apart, is_head, is_table, may_be_tied, tied_heads
from jaxlora.peft._config import Config, has_tail, is_saved
from jaxlora.peft._strengths import strengths

_STEM = "base_model.model."
_A, _B = ".lora_A.weight", ".lora_B.weight"
_EMBEDDING = ".lora_embedding_A"
_TOKENS = ".token_adapter.trainable_tokens_delta"
_INNER = (".base_layer", ".modules_to_save", ".original_module")

_CONV1D = ("c_attn", "c_proj", "c_fc", "q_attn")  # GPT-2's and its kin's

Shapes = Mapping[str, tuple[int, ...]]


class Found(NamedTuple):
    """What an adapter changes in a base that has PyTorch's names.

    Attributes:
      names: the map of `jaxlora.peft`, in the adapter's words.
      keys: {what the adapter calls a tensor: what the base calls it}.
      new: {name: shape} of those that the base lacks: modules that are saved in full, such as a
        head for another task.
      prefix: how the base calls any tensor of the adapter's model.
    """

    names: dict[str, Any]
    keys: dict[str, str]
    new: Shapes
    prefix: Prefix


def torch_names(
    config: Config,
    adapter: Shapes,
    base: Shapes,
    model: Mapping[str, Any],
    equal: Callable[[str, str], bool],
    known: Mapping[str, dict[str, Any]] | None = None,
) -> Found:
    """The map for the tensors that an adapter changes.

    Args:
      config: the adapter's.
      adapter: the shapes of the adapter's tensors, by key.
      base: the shapes of the base's, by key.
      model: the base's `config.json`, or {}.
      equal: whether two tensors of the base are the same, bit for bit.
      known: {what the adapter calls a tensor: its entry}, where it need not be found out.

    Raises:
      AdapterFileError: a module that the base has not, a layout that shapes do not tell.
    """
    known = known or {}
    keys = {key.removeprefix(_STEM): shape for key, shape in adapter.items()}
    wanted = _tensors(config, keys)
    if not wanted:
        raise AdapterFileError(f"{config.file}: got an adapter of nothing, expected some tensors.")
    named = {f"{head}.weight" for entry in known.values() for head in entry.get("tied", ())}
    rest = [name for name in wanted if not (is_head(name) or name in named)]
    prefix = _prefix(config, rest, base) if rest else _prefix_of_heads(wanted, base)
    found = {name: prefix.of(name) for name in wanted}
    absent = [name for name, key in found.items() if key not in base]
    heads = [x for x in absent if x in named or _is_tied_head(x, keys, base, model)]
    found = {name: key for name, key in found.items() if name not in heads}
    new = {name: wanted[name] for name in absent if name not in heads}
    for name in new:
        _check_new(config, name, found[name], keys, base)
    shapes = {name: new.get(name) or base[key] for name, key in found.items()}
    tables = {n for n in found if n not in new and _looks_up(n, keys, shapes[n], model)}
    trained = [head for head in heads if _is_trained(config, head, keys)]
    if trained and not tables:
        raise AdapterFileError(
            f"{config.file}: {trained[0]} is no tensor of the base, whose head is the table of its "
            "embedding: an adapter of the head alone has no merged form. Untie the base first."
        )
    for name in shapes.keys() - new.keys():
        if name in tables or is_head(name):
            check_apart(config.file, found[name], base, model, equal)
    layout = _Layout(config, keys, shapes, base, {*known})
    names: dict[str, Any] = {}
    for name in sorted(found, key=layout.order):
        entry = known.get(name) or layout.entry(name)
        if name in tables and "tied" not in entry:
            tied = tied_heads(found[name], base, model, [x.removesuffix(".weight") for x in heads])
            entry = {**entry, "kind": "embedding", "roles": "io", "tied": tied}
        names[re.escape(name)] = entry
    return Found(names, found, new, prefix)


def _prefix_of_heads(wanted: Iterable[str], base: Shapes) -> Prefix:
    """Of an adapter of heads alone: what the base puts in front of them, if it has them."""
    found = {key.removesuffix(name) for name in wanted for key in base if has_tail(key, name)}
    return Prefix(on=found.pop()) if len(found) == 1 else Prefix()


def _looks_up(name: str, keys: Shapes, shape: tuple[int, ...], model: Mapping[str, Any]) -> bool:
    """Whether the adapter changes a table that tokens are looked up in."""
    module = name.removesuffix(".weight")
    if module + _EMBEDDING in keys or module + _TOKENS in keys:
        return True
    whole = module + _A not in keys
    return name.endswith(".weight") and whole and is_table(name, shape, model)


def _is_tied_head(name: str, keys: Shapes, base: Shapes, model: Mapping[str, Any]) -> bool:
    """Whether a head that the base has no tensor of has its shape from some table of it."""
    module = name.removesuffix(".weight")
    a, b = keys.get(module + _A), keys.get(module + _B)
    shape = keys.get(name) if a is None or b is None else (b[0], a[-1])
    return is_head(name) and may_be_tied(model) and shape in base.values()


def _is_trained(config: Config, name: str, keys: Shapes) -> bool:
    module = name.removesuffix(".weight")
    return module + _A in keys or any(is_saved(module, saved) for saved in config.saved)


def _check_new(config: Config, name: str, key: str, keys: Shapes, base: Shapes) -> None:
    """Raises unless a tensor that the base lacks may be one of a head for another task."""
    parts = key.split(".")
    backbone = {x.partition(".")[0] for x in base}
    if name not in keys or parts[0] in backbone or any(part.isdecimal() for part in parts):
        raise _missing(config.file, name, base)


def _tensors(config: Config, keys: Shapes) -> dict[str, tuple[int, ...]]:
    """The parameters of the PyTorch model that the adapter's keys are about.

    Each with the shape of its key: that is its own where it is saved in full.
    """
    found: dict[str, tuple[int, ...]] = {}
    for key, shape in keys.items():
        suffix = next((x for x in (_A, _EMBEDDING, _TOKENS) if key.endswith(x)), None)
        if suffix is not None:
            module = _outer(key.removesuffix(suffix))
            parameters = _parameters_of(config, module) if suffix == _A else []
            found |= dict.fromkeys((f"{module}.{p}" for p in parameters or ["weight"]), shape)
            if config.lora_bias and suffix == _A:
                found[f"{module}.bias"] = shape
        elif ".lora_" not in key:
            module, _, parameter = key.rpartition(".")
            found[f"{_outer(module)}.{parameter}".removeprefix(".")] = shape
    return found


def _parameters_of(config: Config, module: str) -> list[str]:
    """The names of a module's parameters that are among `target_parameters`."""
    pairs = [p.rpartition(".") for p in config.parameters]
    return [name for parent, _, name in pairs if has_tail(module, parent)]


def _outer(module: str) -> str:
    for inner in _INNER:
        while module.endswith(inner):
            module = module.removesuffix(inner)
    return module


class Prefix(NamedTuple):
    """How names of the adapter's model begin, and those of the base do not, or the other way."""

    off: str = ""
    on: str = ""

    def of(self, name: str) -> str:
        """What the base calls a tensor of the adapter's model."""
        return self.on + name.removeprefix(self.off)

    def back(self, key: str) -> str:
        """The inverse."""
        return self.off + key.removeprefix(self.on)


def _prefix(config: Config, wanted: Iterable[str], base: Shapes) -> Prefix:
    must = [n for n in wanted if not any(is_saved(n, saved) for saved in config.saved)]
    try:
        return prefix_of(config.file, must or wanted, base)
    except AdapterFileError as error:
        if any(f"{p} is no tensor" in str(error) for p in config.parameters):
            raise AdapterFileError(
                f"{error}\nIf the base keeps each expert apart, it cannot be merged here: do it in "
                "PEFT, model.merge_and_unload()."
            ) from None
        raise


def prefix_of(file: str, names: Iterable[str], base: Shapes) -> Prefix:
    """A model with a head, and its base without one, name the same layers differently.

    Raises:
      AdapterFileError: a name that is no tensor of the base; `file` is named in the message.
    """
    must = sorted(names)
    if all(name in base for name in must):
        return Prefix()
    stems = {name.partition(".")[0] + "." for name in must}
    off = [s for s in sorted(stems) if all(n.removeprefix(s) in base for n in must)]
    on = sorted({key.partition(".")[0] + "." for key in base})
    found = [Prefix(off=s) for s in off] + [
        Prefix(on=s) for s in on if all(s + n in base for n in must)
    ]
    if len(found) == 1:
        return found[0]
    raise _missing(file, next(name for name in must if name not in base), base)


def _missing(file: str, name: str, base: Shapes) -> AdapterFileError:
    near = _paths.listing(_paths.nearest(name, base))
    return AdapterFileError(
        f"{file}: {name} is no tensor of the base, expected every module that the adapter changes "
        f"to be there. Is it another model's? The nearest are:{near}"
    )


class _Layout:
    """Which dims of a tensor are inputs and outputs, from the shapes of its factors."""

    def __init__(
        self,
        config: Config,
        keys: Shapes,
        shapes: Shapes,
        base: Shapes,
        known: set[str],
    ):
        self.config, self.keys, self.shapes = config, keys, shapes
        self._alike = _transposed(base)
        for last, ways in self._of_targets().items():
            self._alike.setdefault(last, set()).update(ways)
        self._others = {way for ways in self._of_targets().values() for way in ways}
        self.parameters = {} if shapes.keys() <= known else self._parameters()

    def order(self, name: str) -> tuple[int, int]:
        """Where an entry stands: parameters of a module as the module has them."""
        chain = self.parameters.get(name)
        return (0, 0) if chain is None else (1, chain[0])

    def entry(self, name: str) -> dict[str, Any]:
        module, _, parameter = name.rpartition(".")
        shape = self.shapes[name]
        if name in self.parameters:
            return {"module": name, "kind": "parameter", "roles": self.parameters[name][1]}
        if len(shape) <= 1:
            kind = "bias" if parameter == "bias" else "vector"
            return {"module": module, "kind": kind, "parameter": parameter}
        extra = {} if parameter == "weight" else {"parameter": parameter}
        if module + _EMBEDDING in self.keys or module + _TOKENS in self.keys:
            return {"module": module, "kind": "embedding", "roles": "io", **extra}
        if len(shape) == 2:
            kind, roles = ("conv1d", "io") if self._is_conv1d(name) else ("linear", "oi")
            return {"module": module, "kind": kind, "roles": roles, **extra}
        groups = self._groups(module, shape)
        roles = "o" + "i" * (len(shape) - 1)
        return {"module": module, "kind": "conv", "roles": roles, "groups": groups, **extra}

    def _groups(self, module: str, shape: tuple[int, ...]) -> int:
        a = self.keys.get(module + _A)
        return 1 if a is None or len(a) < 2 or not shape[1] else a[1] // shape[1]

    def _of_targets(self) -> dict[str, set[bool]]:
        """{last segment of a name: whether its targets that are not square are (in, out)}."""
        found: dict[str, set[bool]] = {}
        for name, shape in self.shapes.items():
            module = name.removesuffix(".weight")
            a, b = self.keys.get(module + _A), self.keys.get(module + _B)
            if a is not None and b is not None and len(shape) == 2 and a[-1] != b[0]:
                found.setdefault(module.rpartition(".")[2], set()).add(shape == (a[-1], b[0]))
        return found

    def _is_conv1d(self, name: str) -> bool:
        """Whether a matrix is (in, out), as GPT-2's; shapes tell, but for square ones.

        Of those, modules of the same name do, by their biases. PEFT's `fan_in_fan_out` does not: it
        is that of the module that came last.
        """
        module = name.removesuffix(".weight")
        a, b = self.keys.get(module + _A), self.keys.get(module + _B)
        shape = self.shapes[name]
        if a is None or b is None or not name.endswith(".weight"):
            return False  # saved in full: as it lies
        if a[-1] != b[0]:
            return shape == (a[-1], b[0])
        last = module.rpartition(".")[2]
        alike = self._alike.get(last, set())
        if len(alike) == 1:
            return next(iter(alike))
        if last in _CONV1D:  # which are alike in a model
            alike = {way for name in _CONV1D for way in self._alike.get(name, ())}
            if len(alike) == 1:
                return next(iter(alike))
        elif not self.config.fan_in_fan_out and True not in self._others:
            return False
        raise AdapterFileError(
            f"{self.config.file}: {module} is square, so that its shape does not tell whether it "
            "is (in, out), as GPT-2's Conv1D, or (out, in), and no other module of the base does. "
            f'Say it in a map, --names FILE: {{"{re.escape(name)}": {{"module": "{module}", '
            '"kind": "conv1d", "roles": "io"}, ...}, or "linear" and "oi".'
        )

    def _parameters(self) -> dict[str, tuple[int, str]]:
        """{name: (its place in its module, roles)} of `target_parameters`.

        A module with several has one adapter around the next, the last parameter's outermost; in
        which order the module has them is not on the disk, but their shapes tell, or it raises.
        """
        modules: dict[str, list[str]] = {}
        for parameter in self.config.parameters:
            for name in self.shapes:
                if has_tail(name, parameter):
                    modules.setdefault(name.rpartition(".")[0], []).append(name)
        found: dict[str, tuple[int, str]] = {}
        for module, names in modules.items():
            fits = []
            for ordered in itertools.permutations(dict.fromkeys(names)):
                roles = [
                    self._roles(name, module + ".base_layer" * (len(ordered) - 1 - k))
                    for k, name in enumerate(ordered)
                ]
                fits += [
                    dict(zip(ordered, enumerate(each), strict=True))
                    for each in itertools.product(*roles)
                ]
            if len(fits) != 1:
                what = "several ways to read" if fits else "no way to read"
                raise AdapterFileError(
                    f"{self.config.file}: target_parameters: got {what} the shapes of {module}'s "
                    f"({', '.join(n.rpartition('.')[2] for n in names)}), expected one: which of "
                    "its factors are which parameter's, or which dim is the inputs', is not on the "
                    f'disk. Say it in a map, --names FILE: {{"{re.escape(names[0])}": {{'
                    f'"module": "{names[0]}", "kind": "parameter", "roles": "soi"}}, ...}}.'
                )
            found |= fits[0]
        return found

    def _roles(self, name: str, stem: str) -> list[str]:
        """The roles that the shapes of the factors below a key allow."""
        a, b = self.keys.get(stem + _A), self.keys.get(stem + _B)
        shape = self.shapes[name]
        if a is None or b is None or len(a) != 2 or len(b) != 2 or len(shape) not in (2, 3):
            return []
        first, last = shape[-2:]
        ((rank, _),) = strengths(self.config, [name]).values()
        if a[0] != rank * math.prod(shape[:-2]):
            return []
        stacked = "s" * (len(shape) - 2)
        found = []
        if (a[1], b[0]) == (last, first):
            found.append(stacked + "oi")
        if (a[1], b[0]) == (first, last) and len(shape) == 3:  # of a 2-D one PEFT takes (out, in)
            found.append(stacked + "io")
        return found


def _transposed(base: Shapes) -> dict[str, set[bool]]:
    """{last segment of a module's name: whether those that are not square are (in, out)}."""
    found: dict[str, set[bool]] = {}
    for key, shape in base.items():
        module = key.removesuffix(".weight")
        bias = base.get(f"{module}.bias")
        if key.endswith(".weight") and bias is not None and len(shape) == 2 and len({*shape}) == 2:
            found.setdefault(module.rpartition(".")[2], set()).add(bias == shape[1:])
    return found


def read_model_config(directory: pathlib.Path | None) -> dict[str, Any]:
    """A Hugging Face directory's `config.json`; {} if there is none."""
    file = None if directory is None else directory / "config.json"
    if file is None or not file.exists():
        return {}
    try:
        found = json.loads(file.read_text())
    except (ValueError, RecursionError) as error:
        raise AdapterFileError(f"{file}: expected JSON, got something else: {error}.") from None
    return found if isinstance(found, dict) else {}
