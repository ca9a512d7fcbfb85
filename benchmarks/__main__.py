"""`python -m benchmarks [name ...] [--quick] [--out DIR]`."""

import argparse
from collections.abc import Callable
from pathlib import Path

from benchmarks import harness, quantized, report, trace, train_step

BENCHMARKS: dict[str, Callable[[], harness.Benchmark]] = {
    "train_step": train_step.scanned,
    "train_step_remat": train_step.remat,
    "train_step_unrolled": train_step.unrolled,
    "dora": train_step.dora,
    "dora_unrolled": train_step.dora_unrolled,
    "quantized": quantized.nf4,
    "trace": trace.linen,
    "trace_grad": trace.gradient,
    "trace_nnx": trace.flax_nnx,
    "trace_jnp": trace.plain_jnp,
}
"""A new benchmark is a new entry: a function that builds it, described by its docstring."""

QUICK_ROUNDS = 3
SMALLER: dict[str, Callable[[], harness.Benchmark]] = {"quantized": quantized.nf4_small}
"""What `--quick` takes for those that are too large for it."""


def main() -> None:
    """Run the benchmarks named, or all. Over a limit is printed; it is no failure."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=harness.__doc__)
    parser.add_argument("names", nargs="*", metavar="name", help="which ones; all if none is named")
    parser.add_argument("--list", action="store_true", help="list the benchmarks and stop")
    parser.add_argument("--quick", action="store_true", help="few rounds: does it run at all")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results", help="where the JSON goes"
    )
    options = parser.parse_args()
    if options.list:
        for name, build in BENCHMARKS.items():
            print(f"{name}: {(build.__doc__ or '').splitlines()[0]}")
        return
    for name in options.names:
        if name not in BENCHMARKS:
            parser.error(f"no benchmark {name!r}; there are {', '.join(BENCHMARKS)}")
    for name in options.names or BENCHMARKS:
        build = SMALLER.get(name, BENCHMARKS[name]) if options.quick else BENCHMARKS[name]
        benchmark = build()
        measured = harness.measure(benchmark, QUICK_ROUNDS if options.quick else None)
        settings = ", ".join(f"{key} {value}" for key, value in benchmark.settings.items())
        print(f"\n{name}: {settings}; {measured['rounds']} rounds; ratios to {benchmark.baseline}")
        print(report.table(measured), flush=True)
        report.save(name, measured, options.out)


if __name__ == "__main__":
    main()
