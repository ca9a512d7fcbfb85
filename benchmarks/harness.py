"""Contestants that run by turns in one process and are compared round by round.

A shared machine's speed drifts. Two steps timed one after the other drift together, so the ratio of
a round is steadier than either time; the ratio reported is the median over the rounds. What the
compiler counts (FLOPs, bytes) does not drift at all and stands beside the times.
"""

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

TIME = "time"
"""The figure of a `Limit` on time. Any other is a key of `compiled_figures` or of `figures`."""


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """One way to do the work.

    Args:
        run: does it once and returns arrays to wait for; None where only figures are compared.
        prepare: called before each run, and not timed.
        compiled: the program, for its FLOPs and bytes; None where there is none.
        figures: what else is compared (`{"bytes_per_param": 0.52}`).
    """

    run: Callable[[], object] | None = None
    prepare: Callable[[], object] | None = None
    compiled: jax.stages.Compiled | None = None
    figures: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Limit:
    """A claim: `figure` of `contestant`, over that of `baseline` if one is named, is `at_most`."""

    figure: str
    contestant: str
    baseline: str | None = None
    at_most: float


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """Contestants by name, the one that ratios are taken to, and what is claimed.

    `settings` says what was run (sizes, ranks, targets); it is printed and goes into the JSON.
    """

    contestants: Mapping[str, Contestant]
    baseline: str
    limits: Sequence[Limit] = ()
    settings: Mapping[str, object] = field(default_factory=dict)
    rounds: int = 30


def train_contestant(step: Callable[..., Any], state: Any, *constants: Any) -> Contestant:
    """A contestant whose every run takes one train step, compiled ahead of time.

    Args:
        step: `(state, *constants) -> (state, loss)`.
        state: what the step updates. It is copied here, and each step donates it to the next.
        constants: the other arguments, the same at every step.
    """
    state = jax.tree.map(jnp.copy, state)
    compiled = jax.jit(step, donate_argnums=0).lower(state, *constants).compile()

    def run() -> object:
        nonlocal state
        state, loss = compiled(state, *constants)
        return state, loss

    return Contestant(run=run, compiled=compiled)


def compiled_figures(compiled: jax.stages.Compiled) -> dict[str, float]:
    """FLOPs, bytes moved and bytes held, as XLA counts them: a loop's body once."""
    cost: Any = compiled.cost_analysis() or {}
    memory: Any = compiled.memory_analysis()
    figures = {
        "flops": cost.get("flops"),
        "bytes_accessed": cost.get("bytes accessed"),
        "temp_bytes": getattr(memory, "temp_size_in_bytes", None),
        "argument_bytes": getattr(memory, "argument_size_in_bytes", None),
        "output_bytes": getattr(memory, "output_size_in_bytes", None),
        "alias_bytes": getattr(memory, "alias_size_in_bytes", None),
    }
    return {name: float(value) for name, value in figures.items() if value is not None}


def time_rounds(contestants: Mapping[str, Contestant], rounds: int) -> dict[str, list[float]]:
    """Seconds of each contestant that runs, in each round, after two rounds that are not counted.

    A round runs each once, in an order drawn anew: in a fixed one the same contestant would always
    find the caches as full fine-tuning left them.
    """
    runs = {name: (c.run, c.prepare) for name, c in contestants.items() if c.run is not None}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    order, shuffle = list(runs), random.Random(0).shuffle
    for _ in range(rounds + 2):
        shuffle(order)
        for name in order:
            run, prepare = runs[name]
            if prepare is not None:
                prepare()
            start = time.perf_counter()
            jax.block_until_ready(run())
            seconds[name].append(time.perf_counter() - start)
    return {name: taken[2:] for name, taken in seconds.items()}


def quartiles(values: Sequence[float]) -> tuple[float, float] | None:
    """The lower and the upper one; None of fewer than two values."""
    if len(values) < 2:
        return None
    lower, _, upper = statistics.quantiles(values, n=4)
    return lower, upper


def measure(benchmark: Benchmark, rounds: int | None = None) -> dict[str, Any]:
    """Run `benchmark`; its figures, ratios and limits, ready for `report`."""
    rounds = rounds or benchmark.rounds
    seconds = time_rounds(benchmark.contestants, rounds)
    figures = {
        name: {**(compiled_figures(c.compiled) if c.compiled else {}), **c.figures}
        for name, c in benchmark.contestants.items()
    }

    def by_round(name: str, base: str | None) -> list[float]:
        """Seconds, or the ratios to those of `base`; [] where one of them is not timed."""
        ours, theirs = seconds.get(name, []), seconds.get(base, []) if base else [1.0] * rounds
        return [a / b for a, b in zip(ours, theirs, strict=True)] if ours and theirs else []

    def value(figure: str, name: str, base: str | None = None) -> float | None:
        """The figure, or its ratio to that of `base`; None where one of them lacks it."""
        if figure == TIME:
            taken = by_round(name, base)
            return statistics.median(taken) if taken else None
        ours, theirs = figures[name].get(figure), figures[base].get(figure) if base else 1.0
        return ours / theirs if ours is not None and theirs else None

    return {
        "settings": dict(benchmark.settings),
        "rounds": rounds,
        "baseline": benchmark.baseline,
        "contestants": {
            name: {
                "seconds": seconds.get(name, []),
                "figures": figures[name],
                "ratios": {f: value(f, name, benchmark.baseline) for f in (TIME, *figures[name])},
                "time_quartiles": quartiles(by_round(name, benchmark.baseline)),
            }
            for name in benchmark.contestants
        },
        "limits": [
            {**asdict(claim), "value": value(claim.figure, claim.contestant, claim.baseline)}
            for claim in benchmark.limits
        ],
    }
