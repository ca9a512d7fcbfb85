"""Does LoRA learn as much on a quantized base? `python -m benchmarks.quantized_quality [task ...]`.

One base is trained in float32, and LoRA is tuned on it and on the same base quantized, with the
same initial factors on the same batches. Everything is drawn anew for each seed, the base too. A
control tunes the float base once more with other factors and other batches: what it differs by is
what a run differs by when nothing is changed, the noise that a quantized base is held against.

Printed for each figure, before tuning (the base as it is) and after: mean and standard deviation
over the seeds; the mean of the paired difference to the float base, its standard error, and the
standard deviation of the control's. A quantized base is within noise if the mean of its differences
after tuning is at most that: then a run does not tell it from the float one.

Tasks:

- `mnist`: examples/mnist_digit9.py: the same networks, data and settings, and for each seed the
  same figures in the float rows. It needs the `examples` extra. None of the kernels' inputs (784,
  1,000, 2,000) are whole blocks of 64: their codes are flat.
- `language`: a transformer of Llama's kind, layers scanned, that reads bytes, trained on the first
  half of a text; then LoRA of rank 8 on all linear layers, tuned on what follows; the loss is that
  on the last tenth, which neither has seen. `--text FILE`: a long one, tinyshakespeare say.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import io
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

import jaxlora
from benchmarks.quantized import Llama

FLOAT, CONTROL = "float32", "float32, other draws"
NF4 = functools.partial(jaxlora.quantize, kind="nf4")
FP4 = functools.partial(jaxlora.quantize, kind="fp4")
INT8 = functools.partial(jaxlora.quantize, kind="int8", block_size=None)  # one absmax per output

Loss = Callable[[Any, Any], jax.Array]  # (params or lora tree, one batch) -> loss
Figures = dict[str, float]
Bases = dict[str, "Base"]
Run = Callable[["Base", bool], dict[str, Figures]]  # (base, whether again) -> by when


@dataclasses.dataclass(frozen=True, kw_only=True)
class Base:
    """What the adapter sits on.

    Attributes:
      quantize: makes it of a `lora` tree on floats.
      initializer: of the adapter, where it is not the task's.
    """

    quantize: Callable[[Any], Any] = lambda lora: lora
    initializer: jaxlora.initializers.Initializer | None = None


def trainer(loss: Loss, tx: optax.GradientTransformation) -> Callable[[Any, Any], Any]:
    """(params, batches) -> params after a step for each batch, in one `lax.scan`.

    Of a `lora` tree the trainable half is trained. Compiled once for all seeds.
    """

    @jax.jit
    def train(trainable: Any, frozen: Any, batches: Any) -> Any:
        def step(carry: Any, batch: Any) -> Any:
            trainable, state = carry
            gradient = jax.grad(lambda t: loss(joined(t, frozen), batch))(trainable)
            updates, state = tx.update(gradient, state, trainable)
            return (optax.apply_updates(trainable, updates), state), None

        (trainable, _), _ = jax.lax.scan(step, (trainable, tx.init(trainable)), batches)
        return trainable

    def joined(trainable: Any, frozen: Any) -> Any:
        return trainable if frozen is None else jaxlora.combine(trainable, frozen)

    def trained(params: Any, batches: Any) -> Any:
        nodes = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, jaxlora.LoraWeight))
        is_lora = any(isinstance(x, jaxlora.LoraWeight) for x in nodes)
        trainable, frozen = jaxlora.partition(params) if is_lora else (params, None)
        return joined(train(trainable, frozen, batches), frozen)

    return trained


# --------------------------------------------------------------------------------------------------
# The tasks: each is built once, and gives a function of a seed


def mnist(options: argparse.Namespace) -> tuple[Bases, Callable[[int], Run]]:
    """The example's base, and what it does with LoRA."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
    os.environ.setdefault("TQDM_DISABLE", "1")
    import mnist_data
    import mnist_digit9 as example

    digits = mnist_data.load(options.data_dir)
    images, labels = digits.test_images, digits.test_labels
    base_steps = 100 if options.quick else len(digits.train_labels) // example.BATCH
    steps = 10 if options.quick else 100
    model = example.Network()
    apply = jaxlora.lora_apply(model.apply)

    def loss(apply: Callable[..., Any], params: Any, batch: Any) -> jax.Array:
        logits = apply({"params": params}, batch[0])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

    def batches(rows: np.ndarray, steps: int, rng: np.random.Generator) -> Any:
        rows = rows[np.resize(rng.permutation(len(rows)), (steps, example.BATCH))]
        return digits.train_images[rows], digits.train_labels[rows]

    sgd = optax.sgd(optax.linear_schedule(0.02, 0.0, base_steps))
    pretrain = trainer(lambda params, batch: loss(model.apply, params, batch), sgd)
    train = trainer(
        lambda lora, batch: loss(apply, lora, batch),
        optax.adamw(1.5e-3, b2=0.9, weight_decay=20.0),
    )

    def figures(params: Any) -> Figures:
        errors = example.errors(apply, params, images, labels)
        return {
            "errors on nine": float(errors[example.DIGIT]),
            "accuracy, %": float(100 * (1 - errors.sum() / len(labels))),
        }

    def start(seed: int) -> Run:
        rng = np.random.default_rng(seed)
        base_key, lora_key = jax.random.split(jax.random.key(seed))
        with contextlib.redirect_stdout(io.StringIO()):
            example.svd_demonstration(rng)  # the example's first draws
        params = jax.jit(model.init)(base_key, images[:1])["params"]
        everything = np.arange(len(digits.train_labels))
        params = pretrain(params, batches(everything, base_steps, rng))
        nines = np.flatnonzero(digits.train_labels == example.DIGIT)

        def run(base: Base, again: bool) -> dict[str, Figures]:
            draws = np.random.default_rng([seed, 1]) if again else copy_of(rng)
            config = jaxlora.LoraConfig(
                rank=1,
                alpha=1,
                targets=["Dense_0", "Dense_1", "Dense_2"],
                initializer=base.initializer or jaxlora.initializers.normal(1.0),
            )
            key = jax.random.fold_in(lora_key, 1) if again else lora_key
            lora = base.quantize(jaxlora.init(key, params, config))
            after = figures(train(lora, batches(nines, steps, draws)))
            return {"after": after} if again else {"before": figures(lora), "after": after}

        return run

    bases = {"nf4, double": Base(quantize=NF4), "int8": Base(quantize=INT8)}
    return bases, start


def copy_of(rng: np.random.Generator) -> np.random.Generator:
    """One that gives the same draws."""
    other = np.random.default_rng()
    other.bit_generator.state = rng.bit_generator.state
    return other


def language(options: argparse.Namespace) -> tuple[Bases, Callable[[int], Run]]:
    """Bytes in, bytes out: 2 layers, all dims multiples of the blocks' 64."""
    model = Llama(n_layers=2, width=128, hidden=256, heads=4, kv_heads=2, head_dim=32, vocab=128)
    batch, length = 8, 64
    steps, tune_steps = (20, 10) if options.quick else (600, 100)
    apply = jaxlora.lora_apply(model.apply)
    text = np.frombuffer(options.text.read_bytes(), np.uint8).astype(np.int32)
    assert text.max() < model.vocab, "the text is not ASCII"
    first, second, last = np.split(text, [len(text) * 5 // 10, len(text) * 9 // 10])
    unseen = last[: len(last) // (length + 1) * (length + 1)].reshape(-1, length + 1)
    unseen = unseen[: 64 if options.quick else 1024]

    def loss(apply: Callable[..., Any], params: Any, tokens: Any) -> jax.Array:
        logits = apply(params, tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    def batches(text: np.ndarray, steps: int, rng: np.random.Generator) -> np.ndarray:
        starts = rng.integers(0, len(text) - length - 1, (steps, batch, 1))
        return text[starts + np.arange(length + 1)]

    pretrain = trainer(
        lambda params, tokens: loss(model.apply, params, tokens),
        optax.adamw(optax.cosine_decay_schedule(3e-3, steps)),
    )
    train = trainer(
        lambda lora, tokens: loss(apply, lora, tokens),
        optax.adamw(optax.cosine_decay_schedule(2e-3, tune_steps)),
    )
    held_out = jax.jit(lambda params: loss(apply, params, unseen))

    def figures(lora: Any) -> Figures:
        return {"loss, nats a byte": float(held_out(lora))}

    def start(seed: int) -> Run:
        rng = np.random.default_rng(seed)
        base_key, lora_key = jax.random.split(jax.random.key(seed))
        params = jax.jit(model.init)(base_key)
        params = pretrain(params, batches(first, steps, rng))
        roles = jaxlora.trace_roles(model.apply, params, unseen[:1, :-1])

        def run(base: Base, again: bool) -> dict[str, Figures]:
            draws = np.random.default_rng([seed, 1]) if again else copy_of(rng)
            config = jaxlora.LoraConfig(rank=8, alpha=16, targets="all-linear", exclude=["embed"])
            if base.initializer is not None:
                config = dataclasses.replace(config, initializer=base.initializer)
            key = jax.random.fold_in(lora_key, 1) if again else lora_key
            lora = base.quantize(jaxlora.init(key, params, config, roles=roles))
            after = figures(train(lora, batches(second, tune_steps, draws)))
            return {"after": after} if again else {"before": figures(lora), "after": after}

        return run

    return {
        "nf4, double": Base(quantize=NF4),
        "nf4, double, LoftQ": Base(initializer=jaxlora.initializers.loftq("nf4")),
        "fp4, double": Base(quantize=FP4),
        "int8": Base(quantize=INT8),
    }, start


TASKS = {"mnist": (mnist, 6), "language": (language, 3)}
"""How a task is built, and over how many seeds it is run."""


# --------------------------------------------------------------------------------------------------
# The comparison


HIGHER_IS_BETTER = {"accuracy, %"}


def compare(name: str, bases: Bases, start: Callable[[int], Run], seeds: list[int]) -> bool:
    """Runs all seeds and prints the table; returns whether all is within noise."""
    began = time.perf_counter(), time.process_time()
    found: dict[tuple[str, str], dict[str, list[float]]] = {}  # (figure, when) -> base -> seeds
    rows = {FLOAT: (Base(), False), CONTROL: (Base(), True)}
    rows |= {name: (base, False) for name, base in bases.items()}
    for seed in seeds:
        run = start(seed)
        for row, (base, again) in rows.items():
            for when, figures in run(base, again).items():
                for figure, value in figures.items():
                    found.setdefault((figure, when), {}).setdefault(row, []).append(value)

    seconds = time.perf_counter() - began[0], time.process_time() - began[1]
    print(
        f"\n{name}: seeds {', '.join(map(str, seeds))}; {seconds[0]:.0f} s, "
        f"{seconds[1]:.0f} s of processor time"
    )
    within = True
    for (figure, when), by_row in found.items():
        print(f"\n{f'{figure}, {when}':28}{'mean':>10}{'sd':>9}{'difference':>12}{'error':>9}")
        noise = deviation(np.subtract(by_row.get(CONTROL, by_row[FLOAT]), by_row[FLOAT]))
        for row, values in by_row.items():
            line = f"{row:28}{np.mean(values):10.4f}{deviation(values):9.4f}"
            if row != FLOAT:
                paired = np.subtract(values, by_row[FLOAT])
                error = deviation(paired) / math.sqrt(len(paired))
                line += f"{paired.mean():+12.4f}{error:9.4f}"
                if row == CONTROL:
                    line += f"  noise {noise:.4f}"
                elif when == "after":
                    worse = paired.mean() * (-1 if figure in HIGHER_IS_BETTER else 1)
                    holds = bool(abs(worse) <= noise)  # not of a single seed, which has no noise
                    within &= holds or bool(worse < 0)
                    verdict = "better" if worse < -noise else "WORSE" if worse > noise else "-"
                    line += f"  {'within noise' if holds else verdict}"
            print(line, flush=True)
    return within


def deviation(values: Any) -> float:
    return float(np.std(values, ddof=1)) if len(values) > 1 else math.nan


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quantized_quality")
    parser.add_argument("names", nargs="*", metavar="task", help=f"of {', '.join(TASKS)}; or all")
    parser.add_argument("--seeds", type=int, help="how many runs of each task")
    parser.add_argument("--first-seed", type=int, default=101, help="they count up from here")
    parser.add_argument("--text", type=Path, help="what the language model is trained and tuned on")
    parser.add_argument("--data-dir", type=Path, help="a folder with MNIST's four IDX files")
    parser.add_argument("--quick", action="store_true", help="few steps: does it run at all")
    options = parser.parse_args()
    for name in options.names:
        if name not in TASKS:
            parser.error(f"no task {name!r}; there are {', '.join(TASKS)}")
    for name in options.names or TASKS:
        if name == "language" and options.text is None:
            print("\nlanguage: skipped, since there is no text: --text FILE")
            continue
        build, runs = TASKS[name]
        seeds = [options.first_seed + k for k in range(options.seeds or runs)]
        within = compare(name, *build(options), seeds)
        print(f"{name}: {'all within noise or better' if within else 'NOT all within noise'}")


if __name__ == "__main__":
    main()
