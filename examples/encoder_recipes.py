"""How an encoder is fine-tuned: which leaves train, and what is quantized.

    recipe = encoder_recipes.from_scratch(config)           # or encoder_recipes.peft(config)
    lora = jaxlora.init(key, params, recipe)

For RoBERTa-base with "norm_classifier" of 2 labels, `from_scratch` trains 420,098 parameters.
"""

from __future__ import annotations

from typing import Any

from models.bert import ROLES, Config

import jaxlora
from jaxlora import LoraConfig


def head_of(config: Config) -> list[str]:
    """The names of the head's modules."""
    if config.head == "qa":
        return ["qa_outputs"]
    if config.head == "classifier" and config.model_type == "distilbert":
        return ["pre_classifier", "classifier"]
    return [] if config.head is None else ["classifier"]


def from_scratch(config: Config, rank: int = 8) -> LoraConfig:
    """Query and value of all layers; every bias, norm, and the head train in full.

    a ~ N(0, 1), b = 0, scale 1. The pooler's bias is one of the biases.
    """
    return LoraConfig(
        rank=rank,
        targets=["query", "value"],
        train=["LayerNorm", *head_of(config)],
        bias="all",
        initializer=jaxlora.initializers.normal(1.0),
        roles=ROLES,
    )


def peft(config: Config) -> LoraConfig:
    """All linear layers at rank 2, scale 4; every bias, norm, and the head train in full."""
    return LoraConfig(
        rank=2,
        alpha=8,
        targets=["query", "key", "value", "intermediate/dense", "output/dense"],
        train=["LayerNorm", *head_of(config)],
        bias="all",
        dropout=0.1,
        roles=ROLES,
    )


def quantized(params: Any, kind: str = "nf4", donate: bool = False) -> Any:
    """The layers' kernels in "nf4" (double quantization) or "int8"; head, pooler and tables stay.

    With `donate` the floats are deleted.
    """
    encoder = "encoder/" if "encoder" in params else ""
    roles = {encoder + path: role for path, role in ROLES.items()}
    return jaxlora.quantize(params, list(roles), roles=roles, kind=kind, donate=donate)
