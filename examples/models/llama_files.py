"""Llama's files: config.json of Llama, Mistral, Qwen2 and Qwen3, and what beside has no leaf.

`hf.py` has the rest: this is what it asks of a family of models.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models.config_file import (
    CONFIG,
    COUNT,
    FLAG,
    NAMES,
    POSITIVE,
    SIZE,
    TOKEN,
    TOKENS,
    Fields,
    Kind,
    is_positive,
    is_size,
)
from models.errors import ModelError
from models.leaves import Tensors
from models.llama import Config, Llama, RopeScaling, names

__all__ = [
    "MODEL_TYPES",
    "config_json",
    "described",
    "init",
    "names",
    "new_groups",
    "read_config",
    "rename",
    "surplus",
]

# What Transformers takes where config.json says nothing.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28},
    "qwen3": {
        "num_key_value_heads": 32,
        "head_dim": 128,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
}
MODEL_TYPES = {  # and the classes that Transformers has for them
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
# Fields that change the arithmetic, and the only values of them that `llama.py` computes.
_ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_dropout": (0.0, None),
    "partial_rotary_factor": (1.0, None),
    "rope_interleaved": (False, None),
    "quantization_config": (None,),
}
_KINDS: dict[str, Kind] = {
    **dict.fromkeys(("tie_word_embeddings", "attention_bias", "mlp_bias"), FLAG),
    **dict.fromkeys(("rope_theta", "rms_norm_eps"), POSITIVE),
    **dict.fromkeys(("bos_token_id", "pad_token_id"), TOKEN),
    "use_sliding_window": FLAG,
    **dict.fromkeys(("max_position_embeddings", "original_max_position_embeddings"), SIZE),
    "max_window_layers": COUNT,
    "layer_types": NAMES,
    "eos_token_id": TOKENS,
}
_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)


def read_config(given: Fields) -> Config:
    """The architecture.

    Raises:
      ModelError: a value of a field that `llama.py` does not compute; fields that miss or have no
        sense.
    """
    raw, where = given
    wrong = given.wrong
    kind = raw["model_type"]
    given.check_only(_ONLY, "llama.py")
    for field, each in _KINDS.items():
        given.check(field, each)
    fields = {**_DEFAULTS[kind], **raw}
    for field in ("rms_norm_eps", "max_window_layers"):  # which Transformers does not replace
        if field in raw and raw[field] is None:
            raise wrong(field, _KINDS[field].expected)
    sizes = [f for f in ("num_key_value_heads", "head_dim") if fields.get(f) is not None]
    Fields(fields, where).check_sizes([*_REQUIRED, *sizes])
    heads = fields["num_attention_heads"]
    groups = fields.get("num_key_value_heads") or heads
    if heads % groups:
        raise wrong("num_key_value_heads", f"a divisor of num_attention_heads, {heads}")
    head_dim = fields.get("head_dim") or fields["hidden_size"] // heads
    if head_dim % 2:
        raise wrong("head_dim", "an even size, whose halves are rotated")
    longest = fields.get("max_position_embeddings") or 2048
    theta, scaling = _rope(fields, longest, where)
    window, slides = _windows(kind, fields, where)
    bias = bool(fields.get("attention_bias"))
    if kind in ("mistral", "qwen2") and bias:
        expected = {"mistral": "no bias", "qwen2": "the biases of q, k and v alone"}[kind]
        raise wrong("attention_bias", f"False or nothing: Transformers gives {kind} {expected}")
    if fields.get("mlp_bias") and kind != "llama":
        raise wrong("mlp_bias", f"False or nothing: Transformers gives {kind} no such bias")
    eos = fields.get("eos_token_id")
    return Config(
        model_type=kind,
        vocab_size=fields["vocab_size"],
        hidden_size=fields["hidden_size"],
        intermediate_size=fields["intermediate_size"],
        num_hidden_layers=fields["num_hidden_layers"],
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=head_dim,
        max_position_embeddings=longest,
        rms_norm_eps=float(fields.get("rms_norm_eps", 1e-6)),
        rope_theta=theta,
        rope_scaling=scaling,
        tie_word_embeddings=bool(fields.get("tie_word_embeddings", False)),
        qkv_bias=bias or kind == "qwen2",
        o_bias=bias,
        mlp_bias=bool(fields.get("mlp_bias")),
        qk_norm=kind == "qwen3",
        sliding_window=window,
        sliding_layers=slides,
        bos_token_id=fields.get("bos_token_id"),
        eos_token_id=tuple(eos) if isinstance(eos, list | tuple) else eos,
        pad_token_id=fields.get("pad_token_id"),
    )


def _rope(fields: Mapping[str, Any], longest: int, where: str) -> tuple[float, RopeScaling | None]:
    """theta and the scaling, from `rope_parameters` (Transformers 5) or `rope_scaling`."""
    names = [name for name in ("rope_parameters", "rope_scaling") if fields.get(name) is not None]
    odd = [name for name in names if not isinstance(fields[name], Mapping)]
    if odd:
        raise ModelError(f"{where}: {odd[0]}: got {fields[odd[0]]!r}, expected an object or null.")
    names = [name for name in names if fields[name]]
    if len(names) == 2 and fields[names[0]] != fields[names[1]]:
        raise ModelError(
            f"{where}: rope_parameters: got {fields[names[0]]!r}, and rope_scaling "
            f"{fields[names[1]]!r}, expected one of the two."
        )
    name = names[0] if names else "rope_scaling"
    given = fields.get(name) or {}
    by_layer = [value for value in given.values() if isinstance(value, Mapping)]
    if by_layer:  # by type of layer
        if len(by_layer) < len(given) or any(value != by_layer[0] for value in by_layer):
            raise ModelError(
                f"{where}: {name}: got {given!r}, expected the same for all types of layers, "
                "which is all that models/llama.py computes."
            )
        given = by_layer[0]
    for key, each in (("rope_theta", POSITIVE), ("original_max_position_embeddings", SIZE)):
        if given.get(key) is not None and not each.holds(given[key]):
            raise ModelError(f"{where}: {name}: got {given!r}, expected {each.expected} as {key}.")
    theta = float(given.get("rope_theta") or fields.get("rope_theta") or 10000.0)
    kind = given.get("rope_type", given.get("type", "default"))
    if given.get("partial_rotary_factor", 1.0) != 1.0:
        raise ModelError(f"{where}: {name}: got {given!r}, expected no partial_rotary_factor.")
    if kind == "default":
        return theta, None
    keys = {"linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor")}
    if not isinstance(kind, str) or kind not in keys:
        raise ModelError(
            f"{where}: {name}: got type {kind!r}, expected one of default, {', '.join(keys)}."
        )
    missing = [key for key in keys[kind] if not is_positive(given.get(key))]
    if missing:
        missing = [f"a positive {key}" for key in missing]
        raise ModelError(f"{where}: {name}: got {given!r}, expected {', '.join(missing)}.")
    if kind == "llama3" and given["low_freq_factor"] >= given["high_freq_factor"]:
        raise ModelError(
            f"{where}: {name}: got {given!r}, expected low_freq_factor below high_freq_factor."
        )
    if kind == "linear":
        return theta, RopeScaling(kind=kind, factor=float(given["factor"]))
    key = "original_max_position_embeddings"  # Transformers prefers the one beside, as in Phi's
    return theta, RopeScaling(
        kind=kind,
        original_max_position_embeddings=fields.get(key) or given.get(key) or longest,
        **{field: float(given[field]) for field in keys[kind]},
    )


def _windows(
    kind: str, fields: Mapping[str, Any], where: str
) -> tuple[int | None, tuple[bool, ...] | None]:
    """The sliding window, and which layers have it (None: all)."""
    window = fields.get("sliding_window")
    if kind == "llama" or (kind != "mistral" and not fields.get("use_sliding_window")):
        return None, None
    if window is None:
        return None, None
    if not is_size(window):
        raise ModelError(
            f"{where}: sliding_window: got {window!r}, expected a positive integer or null."
        )
    layers = fields["num_hidden_layers"]
    types = fields.get("layer_types")
    if kind == "mistral":
        if types is not None and set(types) != {"sliding_attention"}:
            raise ModelError(
                f"{where}: layer_types: got {types!r}, expected none: Transformers gives all "
                "layers of mistral the window."
            )
        return window, None
    if types is None:
        types = [
            "sliding_attention" if i >= fields["max_window_layers"] else "full_attention"
            for i in range(layers)
        ]
    odd = [t for t in types if t not in ("sliding_attention", "full_attention")]
    if odd or len(types) != layers:
        raise ModelError(
            f"{where}: layer_types: got {types!r}, expected {layers} of sliding_attention and "
            "full_attention."
        )
    slides = tuple(t == "sliding_attention" for t in types)
    if not any(slides):
        return None, None
    return window, None if all(slides) else slides


def config_json(config: Config) -> dict[str, Any]:
    """The fields of config.json, but for the dtype."""
    same = (
        "model_type",
        *_REQUIRED,
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
        "rms_norm_eps",
        "rope_theta",
        "tie_word_embeddings",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
    )
    found: dict[str, Any] = {"architectures": [MODEL_TYPES[config.model_type]]}
    found |= {"hidden_act": "silu"} | {field: getattr(config, field) for field in same}
    scaling = config.rope_scaling
    if scaling is not None:
        found["rope_scaling"] = {"rope_type": scaling.kind, "factor": scaling.factor}
        if scaling.kind == "llama3":
            rest = dataclasses.asdict(scaling)
            found["rope_scaling"] |= {k: v for k, v in rest.items() if k not in ("kind", "factor")}
    if config.model_type in ("llama", "qwen3"):
        found["attention_bias"] = config.o_bias
    if config.model_type == "llama":
        found["mlp_bias"] = config.mlp_bias
    if config.model_type == "mistral":
        found["sliding_window"] = config.sliding_window
    elif config.model_type != "llama":
        found["use_sliding_window"] = config.sliding_window is not None
        if config.sliding_window is not None:
            kinds = ("full_attention", "sliding_attention")
            found["sliding_window"] = config.sliding_window
            found["layer_types"] = [kinds[w is not None] for w in config.windows]
    return found


def init(config: Config, key: jax.Array) -> Any:
    """Random params, of the shapes that all have."""
    return Llama(config).init(key, jnp.zeros((1, 2), jnp.int32))["params"]


def rename(config: Config, name: str) -> str:
    return name


def new_groups(config: Config) -> tuple[str, ...]:
    """Leaves that a file may lack: none."""
    return ()


def surplus(config: Config, source: Tensors, name: str) -> bool:
    """Tensors that say nothing new: the frequencies, or the tied head, of older files."""
    if name.endswith("rotary_emb.inv_freq"):
        return True
    tied = "model.embed_tokens.weight"
    if name != "lm_head.weight" or not config.tie_word_embeddings or tied not in source.shapes():
        return False
    if not np.array_equal(source.read(name, ()), source.read(tied, ())):
        raise ModelError(
            f"{source.where}: {name}: got other values than in {tied}, expected the same, since "
            f"{CONFIG} has tie_word_embeddings true. Set it to false to keep the head."
        )
    return True


def described(config: Config) -> str:
    return (
        f"a {config.model_type} of {config.num_hidden_layers} layers, tie_word_embeddings "
        f"{config.tie_word_embeddings}"
    )
