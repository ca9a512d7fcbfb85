"""Do 8-bit moments change what is learned? `python -m benchmarks.optimizers [task ...]`.

LoRA is trained twice from the same start on the same batches, with `optax.adamw` and with
`jaxlora.optim.adamw_8bit`. Printed are both losses, the largest relative deviation of the one curve
from the other, and the bytes of both states. Curves are smoothed, a mean over a tenth of the steps,
so that a single batch does not count; the deviation over a twentieth is printed too.

Tasks (those on MNIST need the `examples` extra, as examples/mnist_digit9.py does):

- `mnist`: the example's fine-tuning, on nines alone. Its factors, of rank 1, are all smaller than
  `min_8bit_size`, and by default have float32 moments; here that is 0, and all are in 8 bits.
- `mnist_rank_16`: the same base, all ten digits, ten times the steps, the default initializer.
- `language`: a transformer that reads bytes, trained on Python's own sources; then LoRA of rank 16
  on its six matrices, on English text: `--text FILE`, or the manual inside Python's `pydoc`.
"""

from __future__ import annotations

import argparse
import ast
import csv
import dataclasses
import inspect
import pydoc_data.topics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxlora
from benchmarks import models
from jaxlora.optim import adamw_8bit

LIMIT = 0.02  # of the smoothed curve
Loss = Callable[[Any, Any], jax.Array]  # (what trains, one batch) -> loss


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """A fine-tuning run.

    Attributes:
      lora: the tree to start from.
      loss: of (lora, batch).
      batches: arrays with a leading axis of steps.
      settings: arguments of both optimizers.
      min_8bit_size: of the 8-bit one.
    """

    lora: Any
    loss: Loss
    batches: Any
    settings: dict[str, Any]
    min_8bit_size: int = 4096


def train(loss: Loss, params: Any, tx: Any, batches: Any) -> tuple[Any, Any, np.ndarray]:
    """(params, optimizer state, loss of each step), all steps in one `lax.scan`."""

    def step(carry: Any, batch: Any) -> Any:
        params, state = carry
        value, gradient = jax.value_and_grad(loss)(params, batch)
        updates, state = tx.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), value

    scan = jax.jit(lambda params, batches: jax.lax.scan(step, (params, tx.init(params)), batches))
    (params, state), losses = scan(params, batches)
    return params, state, np.asarray(losses, np.float64)


# --------------------------------------------------------------------------------------------------
# The tasks


def mnist(options: argparse.Namespace, seed: int, *, rank: int) -> Task:
    """The base and, of rank 1, the settings are those of examples/mnist_digit9.py."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
    import mnist_data
    import mnist_digit9

    digits = mnist_data.load(options.data_dir)
    model, rng = mnist_digit9.Network(), np.random.default_rng(seed)
    keys = jax.random.split(jax.random.key(seed))

    def loss(apply: Callable[..., Any], params: Any, rows: Any) -> jax.Array:
        logits = apply({"params": params}, jnp.asarray(digits.train_images)[rows])
        labels = jnp.asarray(digits.train_labels)[rows].astype(jnp.int32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def rows(candidates: np.ndarray, steps: int) -> np.ndarray:
        return np.resize(rng.permutation(candidates), (steps, mnist_digit9.BATCH))

    steps = 100 if options.quick else 6000
    params = model.init(keys[0], digits.train_images[:1])["params"]
    sgd = optax.sgd(optax.linear_schedule(0.02, 0.0, steps))
    everything = rows(np.arange(len(digits.train_labels)), steps)
    params, _, _ = train(lambda p, r: loss(model.apply, p, r), params, sgd, everything)

    layers = ["Dense_0", "Dense_1", "Dense_2"]
    apply = jaxlora.lora_apply(model.apply)
    if rank == 1:
        config = jaxlora.LoraConfig(
            rank=1, alpha=1, targets=layers, initializer=jaxlora.initializers.normal(1.0)
        )
        candidates = np.flatnonzero(digits.train_labels == mnist_digit9.DIGIT)
        settings = {"learning_rate": 1.5e-3, "b2": 0.9, "weight_decay": 20.0}
    else:
        config = jaxlora.LoraConfig(rank=rank, targets=layers)
        candidates = np.arange(len(digits.train_labels))
        settings = {"learning_rate": 1e-3, "weight_decay": 1e-2}
    return Task(
        lora=jaxlora.init(keys[1], params, config),
        loss=lambda lora, r: loss(apply, lora, r),
        batches=rows(candidates, 20 if options.quick else 100 if rank == 1 else 1000),
        settings=settings,
        min_8bit_size=0 if rank == 1 else 4096,
    )


def language(options: argparse.Namespace, seed: int) -> Task:
    """Bytes in, bytes out: 2 layers, width 128."""
    model = models.Transformer(n_layers=2, width=128, vocab=256)
    batch, length, rng = 16, 64, np.random.default_rng(seed)
    keys = jax.random.split(jax.random.key(seed))
    source = "".join(inspect.getsource(module) for module in (argparse, ast, csv, inspect))
    manual = "".join(pydoc_data.topics.topics.values())
    text = manual if options.text is None else options.text.read_text()

    def loss(apply: Callable[..., Any], params: Any, tokens: jax.Array) -> jax.Array:
        logits = apply({"params": params}, tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    def batches(text: str, steps: int) -> np.ndarray:
        tokens = np.frombuffer(text.encode(), np.uint8).astype(np.int32)
        starts = rng.integers(0, len(tokens) - length - 1, (steps, batch, 1))
        return tokens[starts + np.arange(length + 1)]

    steps = 20 if options.quick else 600
    before = batches(source, steps)
    params = jax.jit(model.init)(keys[0], before[0][:, :-1])["params"]
    adamw = optax.adamw(3e-3)
    params, _, _ = train(lambda p, tokens: loss(model.apply, p, tokens), params, adamw, before)

    roles = jaxlora.trace_roles(model.apply, {"params": params}, before[0][:, :-1])
    config = jaxlora.LoraConfig(rank=16, alpha=32, targets=list(models.TARGETS))
    apply = jaxlora.lora_apply(model.apply)
    return Task(
        lora=jaxlora.init(keys[1], params, config, roles=roles),
        loss=lambda lora, tokens: loss(apply, lora, tokens),
        batches=batches(text, steps),
        settings={"learning_rate": 1e-3, "weight_decay": 1e-2},
    )


TASKS: dict[str, Callable[[argparse.Namespace, int], Task]] = {
    "mnist": lambda options, seed: mnist(options, seed, rank=1),
    "mnist_rank_16": lambda options, seed: mnist(options, seed, rank=16),
    "language": language,
}

# --------------------------------------------------------------------------------------------------
# The comparison


def smoothed(losses: np.ndarray, windows: int) -> np.ndarray:
    window = max(1, len(losses) // windows)
    return np.convolve(losses, np.ones(window) / window, mode="valid")


def bytes_of(state: Any) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(state))


def compare(name: str, task: Task, seed: int) -> float:
    """Trains both ways and prints the table; returns the largest relative deviation."""
    trainable, frozen = jaxlora.partition(task.lora)

    def run(tx: Any) -> tuple[Any, np.ndarray]:
        loss = lambda t, batch: task.loss(jaxlora.combine(t, frozen), batch)  # noqa: E731
        _, state, losses = train(loss, trainable, tx, task.batches)
        return state, losses

    wide_state, wide = run(optax.adamw(**task.settings))
    small_state, small = run(adamw_8bit(**task.settings, min_8bit_size=task.min_8bit_size))
    curves = smoothed(wide, 10), smoothed(small, 10)
    deviation = np.abs(curves[1] / curves[0] - 1)
    finer = np.abs(smoothed(small, 20) / smoothed(wide, 20) - 1)
    sizes = [x.size for x in jax.tree.leaves(trainable)]
    codes = [x.size for x in jax.tree.leaves(small_state[0].mu) if x.dtype == jnp.uint8]

    print(f"\n{name}, seed {seed}: {len(wide)} steps, {task.settings}")
    print(f"{'step':>6}{'adamw':>12}{'adamw_8bit':>12}{'deviation':>12}")
    for k in np.linspace(0, len(deviation) - 1, 9).astype(int):
        step = k + len(wide) - len(deviation) + 1
        print(f"{step:6,}{curves[0][k]:12.5f}{curves[1][k]:12.5f}{deviation[k]:12.3%}")
    print(
        f"largest deviation {deviation.max():.3%} (limit {LIMIT:.0%}: "
        f"{'holds' if deviation.max() <= LIMIT else 'FAILED'}), mean {deviation.mean():.3%}; "
        f"over a twentieth: largest {finer.max():.3%}"
    )
    print(
        f"in 8 bits: {len(codes)} of {len(sizes)} leaves, {sum(codes):,} of {sum(sizes):,} "
        f"parameters; state {bytes_of(small_state):,} bytes of {bytes_of(wide_state):,}, "
        f"ratio {bytes_of(small_state) / bytes_of(wide_state):.3f}",
        flush=True,
    )
    return float(deviation.max())


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.optimizers")
    parser.add_argument("names", nargs="*", metavar="task", help=f"of {', '.join(TASKS)}; or all")
    parser.add_argument("--seeds", type=int, default=1, help="how many runs of each task")
    parser.add_argument("--text", type=Path, help="what the language model is tuned on")
    parser.add_argument("--data-dir", type=Path, help="a folder with MNIST's four IDX files")
    parser.add_argument("--quick", action="store_true", help="few steps: does it run at all")
    options = parser.parse_args()
    for name in options.names:
        if name not in TASKS:
            parser.error(f"no task {name!r}; there are {', '.join(TASKS)}")
    for name in options.names or TASKS:
        worst = [compare(name, TASKS[name](options, k), k) for k in range(options.seeds)]
        if len(worst) > 1:
            print(f"{name}: largest deviations {', '.join(f'{w:.3%}' for w in worst)}")


if __name__ == "__main__":
    main()
