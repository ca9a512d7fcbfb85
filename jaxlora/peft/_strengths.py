"""Ranks and scales of modules, from a configuration's patterns and back."""

from __future__ import annotations

import collections
import functools
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from jaxlora._errors import AdapterFileError
from jaxlora.peft._config import Config, guarded
from jaxlora.peft._safe_regex import Texts


def strengths(config: Config, modules: Iterable[str]) -> dict[str, tuple[int, float]]:
    """The rank and the scale of each module.

    Raises:
      AdapterFileError: patterns of which two fit one module with different values, since PEFT
        takes the first and sorts them on disk.
    """
    modules = list(modules)
    ranks = _by_pattern(config, "rank_pattern", config.rank_pattern, modules)
    alphas = _by_pattern(config, "alpha_pattern", config.alpha_pattern, modules)
    found = {}
    for m in modules:
        rank, alpha = ranks.get(m, config.rank), alphas.get(m, config.alpha)
        found[m] = rank, alpha / (math.sqrt(rank) if config.rslora else rank)
    return found


def _by_pattern(
    config: Config, field: str, patterns: dict[str, Any], modules: list[str]
) -> dict[str, Any]:
    if not patterns:
        return {}
    texts = Texts(modules)
    exactly = {exact(module): module for module in modules}  # which are many, and need no regex
    found: dict[str, tuple[str, Any]] = {}
    for key, value in patterns.items():
        fits = functools.partial(texts.tail, key)
        for module in [exactly[key]] if key in exactly else guarded(config, field, fits):
            if module in found and found[module][1] != value:
                raise AdapterFileError(
                    f"{config.file}: {field}: {found[module][0][:200]!r} and {key[:200]!r} both "
                    f"fit {module}, with {found[module][1]} and {value}, expected one value. PEFT "
                    "takes the first, and sorts them when it saves, so that the one that was meant "
                    "is lost: give exact names."
                )
            found.setdefault(module, (key, value))
    return {module: value for module, (_, value) in found.items()}


# --------------------------------------------------------------------------------------------------
# Back


def alpha_of(rank: int, scale: float, rslora: bool) -> float | int:
    """The alpha whose scale is that one: an integer if there is one."""
    by = math.sqrt(rank) if rslora else rank
    alpha = scale * by
    if np.float32(round(alpha) / by) == np.float32(scale):
        return round(alpha)
    return alpha


def fields_of(each: Mapping[str, tuple[int, float]], plain: bool) -> dict[str, Any]:
    """r, alpha and the patterns; rsLoRA if its alphas are integers and plain ones are not."""

    def alphas(rslora: bool) -> dict[str, float | int]:
        return {name: alpha_of(rank, scale, rslora) for name, (rank, scale) in each.items()}

    rslora, found = False, alphas(False)
    if not plain and not all(isinstance(x, int) for x in found.values()):
        other = alphas(True)
        if all(isinstance(x, int) for x in other.values()):
            rslora, found = True, other
    rank = _commonest(rank for rank, _ in each.values())
    alpha = _commonest(found.values())
    return {
        "r": 8 if rank is None else rank,
        "lora_alpha": 8 if alpha is None else alpha,
        "use_rslora": rslora,
        "rank_pattern": {exact(n): r for n, (r, _) in each.items() if r != rank},
        "alpha_pattern": {exact(n): x for n, x in found.items() if x != alpha},
    }


def _commonest(values: Iterable[Any]) -> Any:
    counted = collections.Counter(values).most_common(1)
    return counted[0][0] if counted else None


def exact(name: str) -> str:
    """The regex that PEFT matches to this module and no other."""
    return "^" + re.escape(name)
