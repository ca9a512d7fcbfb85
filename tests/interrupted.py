"""A training run that is killed again and again: `python interrupted.py DIRECTORY KILLS SEED`.

What JAX and orbax import takes seconds, so children are forked, before JAX starts anything. Each
goes on from what the killed one left, checks it against what was logged, and says what it finds in
lines of the log:

    computed STEP LOSS DIGEST    before anything of that step is saved
    saved STEP                   the adapter, once checkpoint.save has returned
    resumed STEP DIGEST          from the manager
    adapter STEP DIGEST          that checkpoint.restore gave
"""

from __future__ import annotations

import hashlib
import os
import pathlib
import random
import signal
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp

import jaxlora
from jaxlora import checkpoint


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def base() -> dict[str, Any]:
    return {
        "up": {"kernel": normal(0, 16, 32) / 4, "bias": np.ones(32, np.float32)},
        "down": {"kernel": normal(1, 32, 16) / 6},
    }


def model(params: Any, x: jax.Array) -> jax.Array:
    h = jnp.tanh(x @ params["up"]["kernel"] + params["up"]["bias"])
    return h @ params["down"]["kernel"]


def digest(tree: Any) -> str:
    data = b"".join(np.asarray(x).tobytes() for x in jax.tree.leaves(tree))
    return hashlib.sha256(data).hexdigest()[:16]


def train(directory: pathlib.Path, end: int, ready: int) -> None:
    jax.config.update("jax_disable_most_optimizations", True)
    jax.config.update("jax_compilation_cache_dir", str(directory.parent / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
    log = open(directory / "log", "a", buffering=1)  # noqa: SIM115  (until the process is killed)
    params = base()
    config = jaxlora.LoraConfig(rank=4, targets=["kernel"], bias="all", dora=True)
    apply, tx = jaxlora.lora_apply(model), optax.adam(1e-2)

    @jax.jit
    def step_of(trainable: Any, state: Any, frozen: Any, x: jax.Array) -> Any:
        def loss(trainable: Any) -> jax.Array:
            lora = jaxlora.combine(trainable, frozen)
            return jnp.mean((apply(lora, x) - x) ** 2)

        value, gradient = jax.value_and_grad(loss)(trainable)
        updates, state = tx.update(gradient, state, trainable)
        return optax.apply_updates(trainable, updates), state, value

    options = ocp.CheckpointManagerOptions(max_to_keep=2)
    with ocp.CheckpointManager(directory / "run", options=options) as manager:
        # Compiled, whose sums of squares a restored one could have otherwise.
        lora = jax.jit(lambda params: jaxlora.init(jax.random.key(1), params, config))(params)
        trainable, frozen = jaxlora.partition(lora)
        state, step = jax.jit(tx.init)(trainable), 0
        if manager.latest_step() is not None:
            step = manager.latest_step()
            found = manager.restore(
                step,
                args=ocp.args.Composite(
                    lora=checkpoint.Restore(params),
                    opt=ocp.args.StandardRestore(state),
                    data=ocp.args.JsonRestore(),
                ),
            )
            trainable, frozen = jaxlora.partition(found.lora)
            state = found.opt
            assert found.data == {"next": step + 1}
            log.write(f"resumed {step} {digest(trainable)}\n")
        if (directory / "adapter").exists() and os.listdir(directory / "adapter"):
            try:
                again = checkpoint.restore(directory / "adapter", params)
            except checkpoint.CheckpointError:
                assert "saved" not in (directory / "log").read_text()  # it was the first one
            else:
                at = checkpoint.describe(directory / "adapter")["config"]["step"]
                log.write(f"adapter {at} {digest(jaxlora.partition(again)[0])}\n")
        while step < end:
            step += 1
            x = normal(step, 8, 16)
            trainable, state, value = step_of(trainable, state, frozen, x)
            log.write(f"computed {step} {float(value).hex()} {digest(trainable)}\n")
            lora = jaxlora.combine(trainable, frozen)
            items = {
                "lora": checkpoint.Save(lora),
                "opt": ocp.args.StandardSave(state),
                "data": ocp.args.JsonSave({"next": step + 1}),
            }
            manager.save(step, args=ocp.args.Composite(**items))
            checkpoint.save(directory / "adapter", lora, config={"step": step})
            log.write(f"saved {step}\n")
            if ready:
                os.write(ready, b".")
                os.close(ready)
                ready = 0


def child(directory: pathlib.Path, end: int, kill_after: float | None) -> int:
    """Runs `train` in a process of its own, killed so many seconds after its first step.

    Returns:
      Its status, as os.waitpid gives it.
    """
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        status = 1
        try:
            train(directory, end, writer)
            status = 0
        finally:
            sys.stderr.flush()
            os._exit(status)
    os.close(writer)
    os.read(reader, 1)  # empty if it has died
    os.close(reader)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(pid, signal.SIGKILL)
    return os.waitpid(pid, 0)[1]


def check(lines: list[list[str]]) -> dict[int, tuple[str, ...]]:
    """{step: (loss, digest)}; every run computed the same, and nothing that was saved is lost."""
    computed: dict[int, tuple[str, ...]] = {}
    saved = 0
    for kind, step, *rest in lines:
        if kind == "computed":
            assert computed.setdefault(int(step), tuple(rest)) == tuple(rest), step
        elif kind == "saved":
            saved = int(step)
        else:
            assert computed[int(step)][-1] == rest[0], (kind, step)
            # The manager writes while the next step is computed: that step it may lose.
            assert int(step) >= saved - (kind == "resumed"), (kind, step, saved)
    return computed


def lines_of(directory: pathlib.Path) -> list[list[str]]:
    return [line.split() for line in (directory / "log").read_text().splitlines()]


def main(directory: pathlib.Path, kills: int, seed: int) -> None:
    rng = random.Random(seed)
    end = 3 * kills + 12
    whole, killed = directory / "whole", directory / "killed"
    for path in (whole, killed):
        path.mkdir()
    assert child(whole, end, None) == 0  # which also fills the cache of compiled programs
    expected = check(lines_of(whole))
    assert len(expected) == end

    count = 0
    status = None
    while status != 0:
        status = child(killed, end, rng.uniform(0, 0.4) if count < kills else None)
        assert status == 0 or os.WIFSIGNALED(status), "it failed"
        count += status != 0
    assert count, "it was too quick to be killed"
    assert check(lines_of(killed)) == expected
    print(f"{count} kills, {end} steps, the same losses")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
