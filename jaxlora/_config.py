"""`LoraConfig`: which leaves train, and how."""

from __future__ import annotations

import dataclasses
import inspect
import math
import numbers
import re
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

import jax.numpy as jnp

from jaxlora import _paths
from jaxlora._errors import TargetError
from jaxlora._weight import check_rate
from jaxlora.initializers import Initializer, kaiming_uniform

T = TypeVar("T")
ALL_LINEAR = "all-linear"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Which leaves train, and how. Its patterns mean what PEFT's do.

    A pattern is a str, a regex that must match a leaf's whole path ("encoder/.*/query/kernel"); a
    sequence of names, each the path or its trailing segments, with or without the leaf's own name
    ("query" finds ".../query/kernel", not its bias); or a function of (path, leaf). A path is the
    leaf's keys joined by '/'; a leading `params/` may be left out. What matches nothing raises.

    Attributes:
      targets: the weights that get an adapter; or "all-linear", every weight that the traced model
        uses in matmuls alone (`init` then needs `roles=trace_roles(...)`).
      rank: R, the rank of the adapters.
      alpha: scale = alpha / rank; None: alpha = rank, scale 1.
      rank_stabilized: scale = alpha / sqrt(rank) instead.
      exclude: a pattern of weights to leave out of the targets.
      rank_pattern, alpha_pattern: {regex of the trailing segments of a path: rank or alpha}; the
        first that matches wins.
      train: a pattern of leaves that train in full: norms, a new head. A name also stands for
        everything below it ("classifier").
      bias: "none"; "all" trains every bias; "lora_only" those beside an adapted weight. A bias is a
        leaf called `bias` or `b`.
      dora: give each adapter a magnitude for each output, which trains beside a and b.
      dropout: the rate, in [0, 1), at which elements of the adapters' inputs are dropped once
        `with_dropout(lora, key)` has given them a key.
      initializer: fills a and b; see `jaxlora.initializers`.
      dtype: of a and b.
      roles: {regex of the trailing segments of a path: roles}; wins over traced ones.

    Raises:
      TargetError: a rank below 1, an alpha that is not a positive number, a dropout rate outside
        of [0, 1), an initializer that is no function of (key, w, target).

    >>> LoraConfig(rank=8, alpha=16, targets=["query", "value"]).scale("encoder/query/kernel")
    2.0

    References:
      Hu et al. 2021, LoRA, arXiv 2106.09685, section 4.1 (alpha / rank).
      Kalajdzievski 2023, rsLoRA, arXiv 2312.03732, section 3 (alpha / sqrt(rank)).
      Liu et al. 2024, DoRA, arXiv 2402.09353, section 4.
    """

    targets: _paths.Pattern
    rank: int = 8
    alpha: float | None = None
    rank_stabilized: bool = False
    exclude: _paths.Pattern | None = None
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)
    train: _paths.Pattern | None = None
    bias: Literal["none", "all", "lora_only"] = "none"
    dora: bool = False
    dropout: float = 0.0
    initializer: Initializer = kaiming_uniform
    dtype: Any = jnp.float32
    roles: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if self.targets is None:
            raise TargetError(
                "LoraConfig: got targets None, expected a pattern, for instance "
                'targets=["query", "value"], or targets="all-linear".'
            )
        for name, rank in (("rank", self.rank), *self.rank_pattern.items()):
            if isinstance(rank, bool) or not isinstance(rank, numbers.Integral) or rank < 1:
                raise TargetError(
                    f"LoraConfig: got rank {rank!r} ({name}), expected an integer of at least 1, "
                    "for instance LoraConfig(rank=8, ...)."
                )
        for name, alpha in (("alpha", self.alpha), *self.alpha_pattern.items()):
            is_number = isinstance(alpha, numbers.Real) and math.isfinite(alpha)
            if alpha is not None and not (is_number and alpha > 0):
                raise TargetError(
                    f"LoraConfig: got alpha {alpha!r} ({name}), expected a positive number, or "
                    "None for alpha = rank. For another strength: jaxlora.with_scale(lora, scale)."
                )
        for name in ("rank_pattern", "alpha_pattern", "roles"):
            for key in getattr(self, name):
                try:
                    re.compile(key)
                except re.error as error:
                    raise TargetError(
                        f"LoraConfig: got key {key!r} in {name}, expected a regex ({error})."
                    ) from None
        if self.bias not in ("none", "all", "lora_only"):
            raise TargetError(
                f"LoraConfig: got bias {self.bias!r}, expected 'none', 'all' or 'lora_only'."
            )
        check_rate(self.dropout, "LoraConfig")
        self._check_initializer()
        if not jnp.issubdtype(self.dtype, jnp.floating):
            raise TargetError(
                f"LoraConfig: got dtype {self.dtype}, expected a floating-point type."
            )

    def _check_initializer(self) -> None:
        f = self.initializer
        try:
            inspect.signature(f).bind("key", "w", "target")
            return
        except ValueError:  # a callable whose signature is not known
            return
        except TypeError:
            name = f if isinstance(f, str) else getattr(f, "__name__", repr(f))
        raise TargetError(
            f"LoraConfig: got initializer {name!r}, expected a function (key, w, target) -> "
            "(w, a, b), for instance jaxlora.initializers.olora; those that have settings or need "
            "data make one when they are called: jaxlora.initializers.pissa(), eva(stats)."
        )

    def rank_of(self, path: str) -> int:
        """The rank of the adapter at a path."""
        return _first(self.rank_pattern, path, self.rank)

    def scale(self, path: str) -> float:
        """alpha / rank, or alpha / sqrt(rank) when rank_stabilized: the one place that says so."""
        rank = self.rank_of(path)
        alpha = _first(self.alpha_pattern, path, self.alpha)
        alpha = rank if alpha is None else alpha
        return alpha / (math.sqrt(rank) if self.rank_stabilized else rank)

    def roles_of(self, path: str) -> str | None:
        """The roles that this config declares for a path."""
        return _first(self.roles, path, None)


def _first(table: Mapping[str, T], path: str, default: T) -> T:
    return next((v for key, v in table.items() if _paths.matches_key(path, key)), default)
