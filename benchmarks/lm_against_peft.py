"""A language model's train step: jaxlora's beside PEFT's, on the same weights and the same batch.

Each side is a process of its own, PEFT's with another interpreter (torch, peft, transformers); they
step by turns, so that both see the same drift of a shared machine, and the ratio is the median over
the rounds. The first loss of both must agree: a and b begin so that the model is the base.

    python -m benchmarks.lm_against_peft --peft-python oracle/bin/python
    python -m benchmarks.lm_against_peft --peft-python ... --cell qv-4x64-float32 --rounds 20

A cell is TARGETS-ROWSxTOKENS-DTYPE: `qv` is rank 8 on q and v, `all` rank 16 on all seven. Memory
is the process's peak of resident bytes while it steps, weights included, and what that is above the
libraries and the weights: what it had before its first step.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
TARGETS = {
    "qv": (8, ["q_proj", "v_proj"]),
    "all": (16, [f"{x}_proj" for x in ("q", "k", "v", "o", "gate", "up", "down")]),
}
CELLS = [
    f"{targets}-4x{tokens}-{dtype}"
    for dtype in ("float32", "bfloat16")
    for tokens in (64, 256)
    for targets in TARGETS
]
RATE = 2e-4
# jaxlora's differ in what `Llama(remat=...)` keeps for the backward pass: all, `SAVEABLE`, nothing.
OURS = ("jaxlora", "jaxlora, remat of some", "jaxlora, remat")
CONTESTANTS = ("PEFT", "PEFT, checkpointing", "by hand", *OURS)


# --------------------------------------------------------------------------------------------------
# One side: a process that steps when it is told to


def serve(step: Callable[[], float]) -> None:
    """Answers each line of stdin with a line of JSON."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = _resident("VmRSS")  # the libraries and the weights
    first_loss = step()
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here on: no compilation
    print(json.dumps({"loss": first_loss}), flush=True)
    for _ in sys.stdin:
        began = time.perf_counter()
        loss = step()
        seconds = time.perf_counter() - began
        peak = _resident("VmHWM")
        answer = {"seconds": seconds, "loss": loss, "peak": peak, "above": peak - before}
        print(json.dumps(answer), flush=True)


def _resident(field: str) -> float:
    """MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def batch_of(cell: str, vocabulary: int) -> tuple[int, list[str], Any, str]:
    import numpy as np

    name, shape, dtype = cell.split("-")
    rank, targets = TARGETS[name]
    rows, tokens = map(int, shape.split("x"))
    rng = np.random.default_rng(0)
    return rank, targets, rng.integers(0, vocabulary, (rows, tokens + 1)), dtype


def peft_side(model: str, cell: str, checkpointing: bool) -> None:
    """PEFT's own recipe: get_peft_model, AdamW of torch, the labels given to the model."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    rank, targets, tokens, dtype = batch_of(cell, json.loads(_config(model))["vocab_size"])
    base = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
    base.config.use_cache = False
    tuned = get_peft_model(base, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets))
    if checkpointing:
        tuned.gradient_checkpointing_enable({"use_reentrant": False})
        tuned.enable_input_require_grads()
    tuned.train()
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=RATE)
    inputs = torch.tensor(tokens[:, :-1])
    labels = torch.tensor(tokens[:, 1:])

    def step() -> float:
        # `shift_labels`: the loss of every token, as the other side has it.
        loss = tuned(input_ids=inputs, labels=labels, shift_labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    serve(step)


def _config(model: str) -> str:
    return (Path(model) / "config.json").read_text()


def by_hand_side(model: str, cell: str) -> None:
    """The step of lm_by_hand."""
    import jax
    import jax.numpy as jnp
    import optax
    from models import hf

    from benchmarks import lm_by_hand

    rank, targets, tokens, dtype = batch_of(cell, json.loads(_config(model))["vocab_size"])
    config, params = hf.load(model, dtype=getattr(jnp, dtype))
    tx, key = optax.adamw(RATE, weight_decay=0.01), jax.random.key(0)
    factors = jax.jit(lambda params: lm_by_hand.factors(params, targets, rank, key))(params)
    state: Any = None
    step_of = lm_by_hand.make_step(config, tx, 2.0, getattr(jnp, dtype))
    inputs, labels = (jnp.asarray(x, jnp.int32) for x in (tokens[:, :-1], tokens[:, 1:]))

    def step() -> float:
        nonlocal state
        if state is None:  # after the memory before it was read, as PEFT's
            state = lm_by_hand.State(factors, jax.jit(tx.init)(factors))
        state, loss = jax.block_until_ready(step_of(state, params, inputs, labels))
        return float(loss)

    serve(step)


def jaxlora_side(model: str, cell: str, name: str) -> None:
    """The step of examples/training.py."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
    from batches import Batch
    from models import hf, llama
    from training import make_step, start

    import jaxlora

    rank, targets, tokens, of = batch_of(cell, json.loads(_config(model))["vocab_size"])
    dtype, remat = getattr(jnp, of), dict(zip(OURS, (None, llama.SAVEABLE, ()), strict=True))[name]
    config, params = hf.load(model, dtype=dtype)
    settings = jaxlora.LoraConfig(
        rank=rank, alpha=2 * rank, targets=targets, roles=llama.ROLES, dtype=jnp.float32
    )
    lora = jaxlora.init(jax.random.key(0), params, settings)
    trainable, frozen = jaxlora.partition(lora)
    del lora
    tx = optax.adamw(RATE, weight_decay=0.01)
    state: Any = None
    step_of = make_step(llama.Llama(config, dtype=dtype, remat=remat), tx)
    ones = np.ones(tokens[:, :-1].shape)
    batch = Batch(
        tokens[None, :, :-1].astype(np.int32),
        tokens[None, :, 1:].astype(np.int32),
        ones[None].astype(np.float32),
        ones[None].astype(np.int32),
    )

    def step() -> float:
        nonlocal state
        if state is None:
            state = start(tx, trainable)
        state, report = jax.block_until_ready(step_of(state, frozen, batch))
        return float(report.loss)

    serve(step)


# --------------------------------------------------------------------------------------------------
# The turns


class Side:
    """A process that steps."""

    def __init__(self, python: str, *arguments: str):
        self._process = subprocess.Popen(
            [python, str(Path(__file__).resolve()), "--side", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.first = self._answer()["loss"]

    def step(self) -> dict[str, float]:
        assert self._process.stdin is not None
        self._process.stdin.write("step\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, float]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise SystemExit(f"a side ended with code {self._process.wait()}; see above")

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def measure(
    model: str, peft_python: str, cell: str, rounds: int, contestants: Sequence[str]
) -> dict[str, Any]:
    """{contestant: time, its ratio to PEFT's, memory, the losses}."""
    sides = {}
    for name in dict.fromkeys(["PEFT", *contestants]):
        python = peft_python if name.startswith("PEFT") else sys.executable
        sides[name] = Side(python, name, model, cell)
    steps: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            steps[name].append(side.step())
    found = {}
    for name, side in sides.items():
        pairs = zip(steps[name], steps["PEFT"], strict=True)
        last = steps[name][-1]
        found[name] = {
            "time": statistics.median(x["seconds"] / y["seconds"] for x, y in pairs),
            "seconds": statistics.median(x["seconds"] for x in steps[name]),
            "peak": last["peak"],
            "above": last["above"],
            "first loss": side.first,
            "last loss": last["loss"],
        }
        side.close()
    return found


def table(cells: dict[str, dict[str, Any]]) -> str:
    head = (
        "| cell | contestant | time | s a step | peak MiB | of PEFT's | above weights "
        "| of PEFT's | first loss | last |"
    )
    lines = [head, "| --- | --- " + "| ---: " * 8 + "|"]
    for cell, found in cells.items():
        for name, x in found.items():
            peak, above = (x[field] / found["PEFT"][field] for field in ("peak", "above"))
            lines.append(
                f"| {cell} | {name} | {x['time']:.2f} | {x['seconds']:.2f} | {x['peak']:.0f} | "
                f"{peak:.2f} | {x['above']:.0f} | {above:.2f} | "
                f"{x['first loss']:.4f} | {x['last loss']:.4f} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peft-python", required=True, help="an interpreter with torch and peft")
    parser.add_argument("--model", help="a directory of Hugging Face's; SmolLM2-135M if not given")
    parser.add_argument("--cell", nargs="+", choices=CELLS, default=CELLS, metavar="CELL")
    parser.add_argument(
        "--contestants", nargs="+", choices=CONTESTANTS, default=CONTESTANTS, metavar="NAME"
    )
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        model = options.model or _smollm2(temporary)
        cells = {}
        for cell in options.cell:
            cells[cell] = measure(
                model, options.peft_python, cell, options.rounds, options.contestants
            )
            print(table({cell: cells[cell]}), flush=True)
    print("\n" + table(cells))
    if options.out:
        options.out.write_text(json.dumps(cells, indent=1) + "\n")


def _smollm2(directory: str) -> str:
    sys.path.insert(0, str(EXAMPLES))
    from models import hf, smollm2

    config, params, text = smollm2.load()
    hf.save(directory, config, params)
    text.save(directory)
    return directory


if __name__ == "__main__":
    if sys.argv[1:2] == ["--side"]:
        sys.path[:0] = [str(EXAMPLES), str(ROOT)]
        side, model, cell = sys.argv[2:]
        if side.startswith("PEFT"):
            peft_side(model, cell, checkpointing=side == "PEFT, checkpointing")
        elif side == "by hand":
            by_hand_side(model, cell)
        else:
            jaxlora_side(model, cell, side)
    else:
        main()
