"""What compiles anew: other shapes and other ranks. Other values, scales and adapters do not.

XLA's own compilations are counted, of whatever runs while they are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax.training.train_state import TrainState
from helpers import assert_close, randomized

import jaxlora
from jaxlora import LoraConfig

KEY = jax.random.key(0)
X = jnp.ones((5, 8))


@contextlib.contextmanager
def compiled() -> Iterator[list[str]]:
    """The names of the programs that XLA compiles meanwhile."""
    names: list[str] = []

    def listen(event: str, _: float, **info: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(str(info.get("fun_name")))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield names
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def adapted(seed: int = 1, rank: int = 2) -> Any:
    params = {
        f"layer_{k}": {"kernel": jax.random.normal(key, (8, 8)), "bias": jnp.ones(8)}
        for k, key in enumerate(jax.random.split(KEY, 3))
    }
    config = LoraConfig(rank=rank, targets=["kernel"], roles={"kernel": "io"}, train=["bias"])
    return jax.block_until_ready(randomized(jaxlora.init(KEY, params, config), seed))


def model(params: Any, x: jax.Array) -> jax.Array:
    for p in params.values():
        x = jnp.tanh(x @ p["kernel"] + p["bias"])
    return x


@jax.jit
def jitted_layer(p: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ p["kernel"] + p["bias"])


def model_of_jits(params: Any, x: jax.Array) -> jax.Array:
    for p in params.values():
        x = jitted_layer(p, x)
    return x


APPLIES = {
    "lora_apply": lambda fn: jaxlora.lora_apply(fn),
    "under jit": lambda fn: jax.jit(jaxlora.lora_apply(fn)),
    "bare, under jit": lambda fn: jax.jit(jaxlora.lora_apply(fn, jit=False)),
}


@pytest.fixture(params=APPLIES)
def apply(request: pytest.FixtureRequest) -> Any:
    return APPLIES[request.param](model)


def test_the_counter_counts() -> None:
    with compiled() as names:
        jax.jit(lambda x: x * 3)(X)
        jax.jit(lambda x: x * 3)(X)
    assert len(names) == 2


def test_other_values_do_not_compile_anew(apply: Any) -> None:
    trees = [adapted(seed) for seed in range(4)]
    with compiled() as names:
        outs = [apply(lora, X) for lora in trees]
    assert len(names) == 1
    assert not jnp.allclose(outs[0], outs[1])


def test_other_scales_do_not_compile_anew(apply: Any) -> None:
    lora = adapted()
    trees = [lora, *(jaxlora.with_scale(lora, s) for s in (0, 0.5, jnp.float32(3)))]
    with compiled() as names:
        outs = [apply(lora, X) for lora in trees]
    assert len(names) == 1
    assert not jnp.allclose(outs[0], outs[1])


def test_other_inputs_do_not_compile_anew(apply: Any) -> None:
    lora, inputs = adapted(), [k * X for k in range(3)]
    with compiled() as names:
        for x in inputs:
            apply(lora, x)
    assert len(names) == 1


def test_numpy_adapters_do_not_compile_anew(apply: Any) -> None:
    lora, other = adapted(1), adapted(2)
    numpy = jax.tree.map(np.asarray, other)
    with compiled() as names:
        apply(lora, X)
        outs = [apply(tree, X) for tree in (other, numpy)]
    assert len(names) == 1
    assert_close(outs[1], outs[0])


def test_restored_adapters_share_a_program(apply: Any, tmp_path: Path) -> None:
    """Orbax commits what it restores to its device, which compiles once more, LoRA or not."""
    adapters = [jaxlora.partition(adapted(seed)) for seed in range(3)]
    like, frozen = adapters[0]
    restored = []
    with ocp.StandardCheckpointer() as checkpointer:
        for k, (trainable, _) in enumerate(adapters):
            checkpointer.save(tmp_path / str(k), trainable)
            checkpointer.wait_until_finished()
            trees = checkpointer.restore(tmp_path / str(k), like)
            restored.append(jaxlora.combine(trees, frozen))
    fresh = [jaxlora.combine(*halves) for halves in adapters]
    with compiled() as names:
        outs = [apply(lora, X) for lora in restored]
    assert len(names) == 1
    for out, lora in zip(outs, fresh, strict=True):
        assert_close(out, apply(lora, X))

    def programs(fn: Any, trees: list[Any]) -> int:
        with compiled() as names:
            for tree in trees:
                fn(tree, X)
        return len(names)

    ours = programs(APPLIES["lora_apply"](model), [fresh[0], restored[0]])
    plain = [jax.block_until_ready(jaxlora.merge(tree)) for tree in (fresh[0], restored[0])]
    assert ours == programs(jax.jit(lambda *args: model(*args)), plain)


def test_another_rank_compiles_once_more(apply: Any) -> None:
    trees = [adapted(rank=2), adapted(rank=3), adapted(2, rank=2), adapted(2, rank=3)]
    with compiled() as names:
        for lora in trees:
            apply(lora, X)
    assert len(names) == 2


@pytest.mark.parametrize("wrap", APPLIES.values(), ids=APPLIES)
def test_inner_jits_compile_with_the_whole(wrap: Any) -> None:
    trees, apply = [adapted(seed) for seed in range(3)], wrap(model_of_jits)
    with compiled() as names:
        for lora in trees:
            apply(lora, X)
    assert len(names) == 1


@pytest.mark.parametrize("fn", [model, model_of_jits])
def test_steps_of_a_train_state_compile_once(fn: Any) -> None:
    lora = adapted()
    tx = jaxlora.freeze_base(optax.adam(1e-2), lora)
    state = TrainState.create(apply_fn=jaxlora.lora_apply(fn), params=lora, tx=tx)

    @jax.jit
    def init(state: TrainState) -> TrainState:
        return state.replace(step=jnp.zeros((), jnp.int32))  # a Python 0 is another type than 0 + 1

    @jax.jit
    def step(state: TrainState, x: jax.Array) -> TrainState:
        grads = jax.grad(lambda lora: jnp.sum(state.apply_fn(lora, x) ** 2))(state.params)
        return state.apply_gradients(grads=grads)

    state = jax.block_until_ready(init(state))
    with compiled() as names:
        for _ in range(4):
            state = step(state, X)
    assert len(names) == 1
    assert state.step == 4


@pytest.mark.parametrize("fn", [model, model_of_jits])
def test_steps_of_a_trainable_half_compile_once(fn: Any) -> None:
    trainable, frozen = jaxlora.partition(adapted())
    apply, tx = jaxlora.lora_apply(fn), optax.adam(1e-2)
    opt_state = jax.block_until_ready(tx.init(trainable))

    @jax.jit
    def step(trainable: Any, opt_state: Any, frozen: Any, x: jax.Array) -> Any:
        def loss(trainable: Any) -> jax.Array:
            return jnp.sum(apply(jaxlora.combine(trainable, frozen), x) ** 2)

        updates, opt_state = tx.update(jax.grad(loss)(trainable), opt_state, trainable)
        return optax.apply_updates(trainable, updates), opt_state

    with compiled() as names:
        for _ in range(4):
            trainable, opt_state = step(trainable, opt_state, frozen, X)
    assert len(names) == 1
    lora = jaxlora.combine(trainable, frozen)
    apply(lora, X)
    with compiled() as names:
        apply(lora, X)  # what was trained is of the same types as what training began with
    assert names == []
