"""`adapter_config.json`: every field known, and each either obeyed or refused by its name."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable
from typing import Any

from jaxlora import _paths
from jaxlora._errors import AdapterFileError
from jaxlora.peft._safe_regex import Texts

_EMPTY: tuple[Any, ...] = (None, False, {}, [], "")

# What says where an adapter comes from, or how it was trained, and changes nothing of what it is.
_NO_MATTER = {
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "eva_config",
    "inference_mode",
    "loftq_config",
    "lora_ga_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
}
# What PEFT knows and no pair of factors is.
_REFUSED = {
    "alora_invocation_tokens": "activated LoRA, whose adapter acts on some tokens alone",
    "arrow_config": "Arrow, which routes tokens between adapters",
    "kasa_config": "KaSA, which truncates the base and has a diagonal between A and B",
    "layer_replication": "layer replication, which builds another model",
    "megatron_config": "Megatron's parallel layers",
    "monteclora_config": "MonteCLoRA, which samples around the factors",
    "use_bdlora": "BD-LoRA, whose factors are block diagonal",
    "use_qalora": "QALoRA, which pools its inputs",
    "velora_config": "VeLoRA, whose backward pass is another",
}
_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
_MOVING_INITS = ("pissa", "olora")
_HEADS = {"classifier", "score", "qa_outputs"}  # PEFT adds these by task, whichever the model has
_SEGMENTS = re.compile(r"[\w-]+(\.[\w-]+)*")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What a configuration says of the weights."""

    file: str
    rank: int = 8
    alpha: float = 8.0
    rslora: bool = False
    rank_pattern: dict[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: dict[str, float] = dataclasses.field(default_factory=dict)
    dropout: float = 0.0
    targets: str | tuple[str, ...] | None = None
    excluded: str | tuple[str, ...] = ()
    layers: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()
    saved: tuple[str, ...] = ()
    bias: str = "none"
    lora_bias: bool = False
    dora: bool = False
    tokens: tuple[int, ...] | dict[str, tuple[int, ...]] | None = None
    tying: bool = False
    fan_in_fan_out: bool = False  # of the base's weights; A and B are alike either way
    init: str | None = None  # "pissa", "olora", or None: the base is where it was


def parse(raw: dict[str, Any], file: str) -> Config:
    """Checks every field of a configuration.

    Raises:
      AdapterFileError: a field that is unknown and set, one of a method that is no LoRA, one of a
        wrong type.
    """
    left = dict(raw)

    def wrong(field: str, expected: str) -> AdapterFileError:
        value = repr(raw.get(field))
        return AdapterFileError(f"{file}: got {field} {value[:200]}, expected {expected}.")

    def take(field: str, default: Any, fits: Callable[[Any], bool], expected: str) -> Any:
        value = left.pop(field, None)
        value = default if value is None else value
        if not fits(value):
            raise wrong(field, expected)
        return value

    def flag(field: str) -> bool:
        return take(field, False, lambda x: isinstance(x, bool), "a bool")

    def listed(field: str) -> tuple[str, ...]:
        return tuple(take(field, [], _are(str), "a list of strings"))

    peft_type = left.pop("peft_type", None)
    if peft_type != "LORA":
        raise wrong("peft_type", "'LORA', the one method of PEFT that jaxlora holds")
    for field in _NO_MATTER:
        left.pop(field, None)
    for field, what in _REFUSED.items():
        if left.pop(field, None) not in _EMPTY:
            raise AdapterFileError(
                f"{file}: {field} is set: {what}. That is not plain LoRA, and cannot be "
                "represented here."
            )
    take("task_type", "", lambda x: isinstance(x, str), "a string")
    patterns = {
        field: take(field, {}, _is_map(fits), f"an object with values that are {what}")
        for field, fits, what in (
            ("rank_pattern", _is_rank, "ranks"),
            ("alpha_pattern", _is_number, "numbers"),
        )
    }
    layers = take(
        "layers_to_transform",
        None,
        lambda x: x is None or _is_index(x) or _are(int)(x),
        "a number or a list of numbers",
    )
    layers_pattern = take(
        "layers_pattern", [], lambda x: isinstance(x, str) or _are(str)(x), "a list of strings"
    )
    layers_pattern = (layers_pattern,) if isinstance(layers_pattern, str) else layers_pattern
    layers_pattern = tuple(x for x in layers_pattern if x)
    if not all(_SEGMENTS.fullmatch(x) for x in layers_pattern):
        raise wrong("layers_pattern", "plain names, for instance 'layers'")
    config = Config(
        file=file,
        rank=take("r", 8, _is_rank, "a rank, at least 1"),
        alpha=float(take("lora_alpha", 8, _is_number, "a number")),
        rslora=flag("use_rslora"),
        **patterns,
        dropout=float(
            take("lora_dropout", 0.0, lambda x: _is_number(x) and 0 <= x < 1, "a rate in [0, 1)")
        ),
        targets=_modules(take("target_modules", [], _are_modules, "a list of names or a regex")),
        excluded=_modules(take("exclude_modules", [], _are_modules, "a list of names or a regex")),
        layers=None if layers is None or layers == [] else _numbers(layers),
        layers_pattern=layers_pattern,
        parameters=listed("target_parameters"),
        saved=tuple(dict.fromkeys(listed("modules_to_save"))),
        bias=take(
            "bias", "none", lambda x: x in ("none", "all", "lora_only"), "none, all or lora_only"
        ),
        lora_bias=flag("lora_bias"),
        dora=flag("use_dora"),
        tokens=_tokens(
            take("trainable_token_indices", None, _are_tokens, "a list of rows, or lists by module")
        ),
        tying=flag("ensure_weight_tying"),
        fan_in_fan_out=flag("fan_in_fan_out"),
        init=_init(left.pop("init_lora_weights", True), file),
    )
    if not all(_SEGMENTS.fullmatch(name) for name in config.saved):
        raise wrong("modules_to_save", "plain names of modules")
    if config.targets == "all-linear":
        raise wrong("target_modules", "the names that it stands for, which PEFT writes on saving")
    unknown = sorted(field for field, value in left.items() if value not in _EMPTY)
    if unknown:
        raise AdapterFileError(
            f"{file}: {unknown[0][:200]} is set, a field that jaxlora does not know, expected none "
            "such: it may change what the weights mean. Take it out if it does not."
        )
    if config.dora and (config.lora_bias or config.parameters):
        raise wrong("use_dora", "it without lora_bias and target_parameters, as PEFT does")
    return config


def _init(value: Any, file: str) -> str | None:
    value = value.lower() if isinstance(value, str) else value
    if any(value is x for x in (True, False, None)) or value in _PLAIN_INITS[3:]:
        return None
    if value in _MOVING_INITS:
        return value
    raise AdapterFileError(
        f"{file}: got init_lora_weights {str(value)[:200]!r}, expected one of true, false, "
        "gaussian, eva, orthogonal, pissa, olora. Others move the base in a way that cannot be "
        "repeated from the base alone. Convert the adapter in PEFT, to plain LoRA of twice the "
        "rank: model.save_pretrained(..., path_initial_model_for_weight_conversion=...)."
    )


def _is_index(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and 0 <= x < 2**31


def _is_rank(x: Any) -> bool:
    return _is_index(x) and x >= 1


def _is_number(x: Any) -> bool:
    if isinstance(x, bool) or not isinstance(x, int | float):
        return False
    return abs(x) < 1e30 and math.isfinite(x)


def _are(kind: type) -> Callable[[Any], bool]:
    def fits(x: Any) -> bool:
        each = _is_index if kind is int else lambda y: isinstance(y, kind)
        return isinstance(x, list) and all(map(each, x))

    return fits


def _is_map(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda x: isinstance(x, dict) and all(map(fits, x.values()))


def _are_modules(x: Any) -> bool:
    return isinstance(x, str) or _are(str)(x)


def _modules(x: str | list[str]) -> str | tuple[str, ...]:
    return x if isinstance(x, str) else tuple(dict.fromkeys(x))


def _numbers(x: int | list[int]) -> tuple[int, ...]:
    return (x,) if isinstance(x, int) else tuple(x)


def _are_tokens(x: Any) -> bool:
    return x is None or _are(int)(x) or _is_map(_are(int))(x)


def _tokens(x: Any) -> tuple[int, ...] | dict[str, tuple[int, ...]] | None:
    if not x:
        return None
    return {k: tuple(v) for k, v in x.items()} if isinstance(x, dict) else tuple(x)


def optional_heads(names: Iterable[str]) -> set[str]:
    """Which of modules_to_save PEFT may have added without the model having them."""
    return {*names} & _HEADS


# --------------------------------------------------------------------------------------------------
# Which modules, at which rank and strength


def has_tail(name: str, tail: str) -> bool:
    """Whether a module's name is `tail`, or ends with its segments."""
    return name == tail or name.endswith("." + tail)


def is_within(name: str, outer: str) -> bool:
    """Whether `outer` is a run of the segments of a module's name."""
    return f".{outer}." in f".{name}."


def is_saved(module: str, saved: str) -> bool:
    """Whether an entry of modules_to_save means this module, or one that it is in.

    PEFT compares the ends of names as they are: "norm" means every "post_attention_layernorm" too.
    """
    parts = module.split(".")
    return any(".".join(parts[: k + 1]).endswith(saved) for k in range(len(parts)))


def selected(
    config: Config, modules: Iterable[str], parameters: Iterable[str], present: Iterable[str]
) -> set[str]:
    """The modules, and parameters, that the configuration targets, by PEFT's rules.

    A name among the targets that no module has is passed over, as PEFT does, if the file has
    nothing of it either.

    Args:
      config: the adapter's.
      modules: those of the map.
      parameters: those of the map.
      present: the modules of which the file has tensors.

    Raises:
      AdapterFileError: an entry of the targets that leads to no known one.
    """
    modules, parameters, present = list(modules), list(parameters), list(present)
    found = _targets(config, "target_modules", config.targets or (), modules, present)
    out = _targets(config, "exclude_modules", config.excluded, modules, None)
    found = {m for m in found - out if not any(is_within(m, saved) for saved in config.saved)}
    if config.layers is not None:
        of = {m: _layer(config, m) for m in found}
        found = {m for m in found if of[m] in config.layers or m in (config.targets or ())}
        missing = {*config.layers} - {*of.values()}
        if missing:
            raise AdapterFileError(
                f"{config.file}: layers_to_transform: {sorted(missing)[0]} is the layer of no "
                "target that the map leads to, expected a layer of the model."
            )
    return found | _targets(config, "target_parameters", config.parameters, parameters, present)


def _targets(
    config: Config,
    field: str,
    wanted: str | tuple[str, ...],
    among: list[str],
    present: list[str] | None,
) -> set[str]:
    """Those among some names; `present` is None where none need be there."""
    if isinstance(wanted, str):
        found = guarded(config, field, lambda: Texts(among).full(wanted))
        if not found and present is not None:
            raise _unknown(config, field, wanted, among)
        return found
    tails = _tails(among)
    found = {module for name in wanted for module in tails.get(name, ())}
    if present is not None:
        # Of a parameter the file has its module's name alone, so that none may be passed over.
        there = _tails(present) if field == "target_modules" else wanted
        for name in wanted:
            if name not in tails and (name in there or not found):
                raise _unknown(config, field, name, among)
    return found


def _tails(names: Iterable[str]) -> dict[str, set[str]]:
    """The names that end with each run of segments."""
    found: dict[str, set[str]] = {}
    for name in names:
        parts = name.split(".")
        for k in range(len(parts)):
            found.setdefault(".".join(parts[k:]), set()).add(name)
    return found


def _unknown(config: Config, field: str, name: str, among: list[str]) -> AdapterFileError:
    listed = nearest(name, among) if among else " none"
    return AdapterFileError(
        f"{config.file}: {field}: {name[:200]!r} is no module that the map leads to, expected each "
        f"target to be one. Give it an entry of `names`. The nearest are:{listed}"
    )


def nearest(name: str, among: Iterable[str], n: int = 5) -> str:
    """The names most like one, of those with its last segment if there are any; in bounded time."""
    among = list(among)
    last = name.rpartition(".")[2]
    alike = [x for x in among if has_tail(x, last)] or among
    return _paths.listing(_paths.nearest(name[:200], [x[:200] for x in alike[:200]], n))


def guarded(config: Config, field: str, run: Callable[[], Any]) -> Any:
    try:
        return run()
    except ValueError as error:
        raise AdapterFileError(f"{config.file}: {field}: got {error}.") from None


def _layer(config: Config, module: str) -> int | None:
    """The layer that a module is in: the first number after a name, or after `layers_pattern`."""
    parts = module.split(".")
    for k in range(1, len(parts) - 1):
        if not parts[k].isdecimal():
            continue
        if config.layers_pattern:
            before = ".".join(parts[:k])
            if any(has_tail(before, p) for p in config.layers_pattern):
                return int(parts[k])
        elif k >= 2:  # PEFT's own pattern wants a name and a prefix before the number
            return int(parts[k])
    return None
