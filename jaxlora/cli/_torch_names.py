"""The map of `jaxlora.peft` for a base that has PyTorch's names already: read off an adapter."""

from __future__ import annotations

import itertools
import json
import math
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from jaxlora import _paths
from jaxlora._errors import AdapterFileError
from jaxlora.peft._config import Config, has_tail, is_within
from jaxlora.peft._strengths import strengths

_STEM = "base_model.model."
_A, _B = ".lora_A.weight", ".lora_B.weight"
_EMBEDDING = ".lora_embedding_A"
_TOKENS = ".token_adapter.trainable_tokens_delta"
_INNER = (".base_layer", ".modules_to_save", ".original_module")
_HEADS = {  # of the classes with such an ending, what shares the table of the embedding
    "CausalLM": ("lm_head",),
    "LMHeadModel": ("lm_head",),
    "ConditionalGeneration": ("lm_head",),
    "MaskedLM": ("lm_head.decoder", "cls.predictions.decoder"),
}

Shapes = Mapping[str, tuple[int, ...]]


def torch_names(
    config: Config, adapter: Shapes, base: Shapes, model: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, str], Shapes]:
    """The map for the tensors that an adapter changes.

    Args:
      config: the adapter's.
      adapter: the shapes of the adapter's tensors, by key.
      base: the shapes of the base's, by key.
      model: the base's `config.json`, or {}.

    Returns:
      (names, {what the adapter calls a tensor: what the base calls it}, {name: shape} of those that
      the base lacks: modules that are saved in full, such as a head for another task). The names
      are in the adapter's words.

    Raises:
      AdapterFileError: a module that the base has not, a layout that shapes do not tell.
    """
    keys = {key.removeprefix(_STEM): shape for key, shape in adapter.items()}
    heads = _tied_heads(model, base)
    wanted = _tensors(config, keys)
    wanted = {name: x for name, x in wanted.items() if name.removesuffix(".weight") not in heads}
    prefix = _prefix(config, wanted, base)
    found = {name: prefix.of(name) for name in wanted}
    new = {name: wanted[name] for name, key in found.items() if key not in base}
    layout = _Layout(
        config, keys, {name: base.get(key, new.get(name, ())) for name, key in found.items()}
    )
    names: dict[str, Any] = {}
    for name in sorted(found, key=layout.order):
        entry = layout.entry(name)
        if entry["kind"] == "embedding" and heads:
            entry["tied"] = heads
        names[re.escape(name)] = entry
    return names, found, new


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


class _Prefix:
    """How names of the adapter's model begin, and those of the base do not, or the other way."""

    def __init__(self, off: str, on: str):
        self.off, self.on = off, on

    def of(self, name: str) -> str:
        return self.on + name.removeprefix(self.off)


def _prefix(config: Config, wanted: Iterable[str], base: Shapes) -> _Prefix:
    """A model with a head, and its base without one, name the same layers differently."""
    must = [n for n in wanted if not any(is_within(n, saved) for saved in config.saved)]
    must = must or list(wanted)
    if all(name in base for name in must):
        return _Prefix("", "")
    stems = {name.partition(".")[0] + "." for name in must}
    off = [s for s in sorted(stems) if all(n.removeprefix(s) in base for n in must)]
    on = sorted({key.partition(".")[0] + "." for key in base})
    found = [_Prefix(s, "") for s in off] + [
        _Prefix("", s) for s in on if all(s + n in base for n in must)
    ]
    if len(found) == 1:
        return found[0]
    missing = next(name for name in must if name not in base)
    near = _paths.listing(_paths.nearest(missing, base))
    raise AdapterFileError(
        f"{config.file}: {missing} is no tensor of the base, expected every module that the "
        f"adapter changes to be there. Is it another model's? The nearest are:{near}"
    )


def _tied_heads(model: Mapping[str, Any], base: Shapes) -> list[str]:
    """The heads that share the embedding's table: they have no tensor of their own."""
    if model.get("tie_word_embeddings") is False:
        return []
    classes = [x for x in model.get("architectures") or () if isinstance(x, str)]
    heads = [h for end, hs in _HEADS.items() for h in hs if any(c.endswith(end) for c in classes)]
    return [h for h in dict.fromkeys(heads) if f"{h}.weight" not in base]


class _Layout:
    """Which dims of a tensor are inputs and outputs, from the shapes of its factors."""

    def __init__(self, config: Config, keys: Shapes, shapes: Shapes):
        self.config, self.keys, self.shapes = config, keys, shapes
        self.conv1d = self._conv1d()
        self.parameters = self._parameters()

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
            kind, roles = ("conv1d", "io") if module in self.conv1d else ("linear", "oi")
            return {"module": module, "kind": kind, "roles": roles, **extra}
        groups = self._groups(module, shape)
        roles = "o" + "i" * (len(shape) - 1)
        return {"module": module, "kind": "conv", "roles": roles, "groups": groups, **extra}

    def _groups(self, module: str, shape: tuple[int, ...]) -> int:
        a = self.keys.get(module + _A)
        return 1 if a is None or len(a) < 2 or not shape[1] else a[1] // shape[1]

    def _conv1d(self) -> set[str]:
        """The modules with (in, out), as GPT-2's have it; shapes tell, but for square ones."""
        transposed, plain, square = set(), set(), set()
        for name, shape in self.shapes.items():
            module = name.rpartition(".")[0]
            a, b = self.keys.get(module + _A), self.keys.get(module + _B)
            if a is None or b is None or len(shape) != 2 or not name.endswith(".weight"):
                continue
            inputs, outputs = a[-1], b[0]
            if inputs == outputs:
                square.add(module)
            elif shape == (inputs, outputs):
                transposed.add(module)
            else:  # or it does not fit, which `load` says
                plain.add(module)
        flag = self.config.fan_in_fan_out
        if square and ((flag and plain) or (not flag and transposed)):
            raise AdapterFileError(
                f"{self.config.file}: fan_in_fan_out is {flag}, and the shapes of "
                f"{sorted(plain if flag else transposed)[0]} say otherwise, so that the layout of "
                f"{sorted(square)[0]}, which is square, is not known. Set fan_in_fan_out right."
            )
        return transposed | (square if flag else set())

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
