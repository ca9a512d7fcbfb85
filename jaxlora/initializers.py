"""How an adapter starts: functions that fill a and b, and may move the base.

An initializer is `f(key, w, target) -> (w, a, b)`; give one to `LoraConfig(initializer=...)`.

Drawn: `kaiming_uniform` (the default), `normal`, `gaussian`, `orthogonal`. From the weight:
`pissa`, `olora`, `loftq`. From data: `eva` and `corda` (of the weight's inputs), `lora_ga` (of its
gradient). `pissa`, `olora`, `corda` and `lora_ga` move the base so that the model starts where it
was; `jaxlora.rebase` gives an adapter of the original base again.
"""

from jaxlora._data_initializers import corda, eva, eva_ranks, lora_ga
from jaxlora._moments import Moments
from jaxlora._random_initializers import gaussian, kaiming_uniform, normal, orthogonal
from jaxlora._svd_initializers import loftq, olora, pissa
from jaxlora._target import Initializer, Target, factor_shapes

__all__ = [
    "Initializer",
    "Moments",
    "Target",
    "corda",
    "eva",
    "eva_ranks",
    "factor_shapes",
    "gaussian",
    "kaiming_uniform",
    "loftq",
    "lora_ga",
    "normal",
    "olora",
    "orthogonal",
    "pissa",
]
