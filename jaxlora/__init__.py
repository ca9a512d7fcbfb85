"""LoRA for any JAX function: a pytree transform and a function transform."""

from jaxlora import initializers, optim
from jaxlora._adapters import scaled, weighted_sum
from jaxlora._apply import lora_apply
from jaxlora._collect import input_moments
from jaxlora._config import LoraConfig
from jaxlora._errors import (
    AdapterFileError,
    CheckpointError,
    MaterializeError,
    RolesError,
    TargetError,
)
from jaxlora._init import init
from jaxlora._low_rank import extract, truncate
from jaxlora._quantize import dequantize, merge_quantized, prepare_for_training, quantize
from jaxlora._quantized_array import QuantizedArray, quantize_array
from jaxlora._rebase import rebase
from jaxlora._roles import TracedRoles, trace_roles
from jaxlora._tree import (
    ParamCount,
    base_params,
    combine,
    count_params,
    merge,
    partition,
    summary,
    trainable_mask,
    with_base,
    with_dropout,
    with_scale,
)
from jaxlora._weight import FullWeight, LoraWeight, delta
from jaxlora.optim import freeze_base

__version__ = "0.1.0"

__all__ = [
    "AdapterFileError",
    "CheckpointError",
    "FullWeight",
    "LoraConfig",
    "LoraWeight",
    "MaterializeError",
    "ParamCount",
    "QuantizedArray",
    "RolesError",
    "TargetError",
    "TracedRoles",
    "base_params",
    "combine",
    "count_params",
    "delta",
    "dequantize",
    "extract",
    "freeze_base",
    "init",
    "initializers",
    "input_moments",
    "lora_apply",
    "merge",
    "merge_quantized",
    "optim",
    "partition",
    "prepare_for_training",
    "quantize",
    "quantize_array",
    "rebase",
    "scaled",
    "summary",
    "trace_roles",
    "trainable_mask",
    "truncate",
    "weighted_sum",
    "with_base",
    "with_dropout",
    "with_scale",
]
