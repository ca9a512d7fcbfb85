"""The train step of a transformer: jaxlora, LoRA written by hand, and full fine-tuning."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax.training.train_state import TrainState
from jax.flatten_util import ravel_pytree

import jaxlora
from benchmarks import models
from benchmarks.harness import TIME, Benchmark, Limit, train_contestant

PARTITION = "jaxlora, partition"
TRAIN_STATE = "jaxlora, TrainState"
HAND_WRITTEN = "hand-written LoRA"
FULL = "full fine-tuning"

RUN_ONCE: dict[str, str | bool] = {"xla_backend_optimization_level": "0"}
"""Compiler options for what is not timed: half the compile time, the same FLOPs and bytes."""


class Step(NamedTuple):
    """A train step, `(state, *constants) -> (state, loss)`, and what to call it with."""

    step: Callable[..., Any]
    state: Any
    constants: tuple[Any, ...]


def steps(
    model: models.Transformer,
    *,
    batch: int,
    length: int,
    rank: int = 8,
    alpha: float = 16.0,
    tx: optax.GradientTransformation | None = None,
    dora: bool = False,
) -> dict[str, Step]:
    """The same train step in four ways, from the same parameters, adapters and tokens.

    b is random, not zero, so that a gets a gradient too. The steps share arrays: copy a state
    before it is donated, as `train_contestant` does.
    """
    tx = optax.adamw(1e-3) if tx is None else tx
    keys = jax.random.split(jax.random.key(0), 4)
    tokens = jax.random.randint(keys[0], (batch, length + 1), 0, model.vocab)
    init = jax.jit(model.init, compiler_options=RUN_ONCE)
    params = init(keys[1], tokens[:, :-1])["params"]
    config = jaxlora.LoraConfig(rank=rank, alpha=alpha, targets=list(models.TARGETS), dora=dora)
    roles = jaxlora.trace_roles(_of_params(model.apply), params, tokens[:, :-1])
    lora = jaxlora.init(keys[2], params, config, roles=roles)
    trainable, frozen = jaxlora.partition(lora)
    flat, unravel = ravel_pytree(trainable)
    trainable = unravel(flat + 0.02 * jax.random.normal(keys[3], flat.shape))
    lora = jaxlora.combine(trainable, frozen)
    apply = _of_params(jaxlora.lora_apply(model.apply))
    rival = model.clone(dense=functools.partial(models.LoraDense, rank=rank, scale=alpha / rank))
    adapters, rest = models.split(models.hand_written(lora))

    def loss(apply: Callable[..., jax.Array], params: Any, tokens: jax.Array) -> jax.Array:
        logits = apply(params, tokens[:, :-1]).astype(jnp.float32)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        return losses.mean()

    def update(grads: Any, trained: Any, opt_state: Any) -> Any:
        updates, opt_state = tx.update(grads, opt_state, trained)
        return optax.apply_updates(trained, updates), opt_state

    def partition(state: Any, frozen: Any, tokens: jax.Array) -> Any:
        trainable, opt_state = state
        value, grads = jax.value_and_grad(
            lambda trainable: loss(apply, jaxlora.combine(trainable, frozen), tokens)
        )(trainable)
        return update(grads, trainable, opt_state), value

    def train_state(state: TrainState, tokens: jax.Array) -> Any:
        value, grads = jax.value_and_grad(lambda lora: loss(apply, lora, tokens))(state.params)
        return state.apply_gradients(grads=grads), value

    def hand_written(state: Any, rest: Any, tokens: jax.Array) -> Any:
        adapters, opt_state = state
        value, grads = jax.value_and_grad(
            lambda adapters: loss(_of_params(rival.apply), models.join(adapters, rest), tokens)
        )(adapters)
        return update(grads, adapters, opt_state), value

    def full(state: Any, tokens: jax.Array) -> Any:
        params, opt_state = state
        value, grads = jax.value_and_grad(
            lambda params: loss(_of_params(model.apply), params, tokens)
        )(params)
        return update(grads, params, opt_state), value

    whole = TrainState.create(apply_fn=apply, params=lora, tx=jaxlora.freeze_base(tx, lora))
    return {
        PARTITION: Step(partition, (trainable, tx.init(trainable)), (frozen, tokens)),
        TRAIN_STATE: Step(train_state, whole, (tokens,)),
        HAND_WRITTEN: Step(hand_written, (adapters, tx.init(adapters)), (rest, tokens)),
        FULL: Step(full, (params, tx.init(params)), (tokens,)),
    }


def scanned() -> Benchmark:
    """Layers under `nn.scan`; LoRA on the six matrices of each layer."""
    return _benchmark(models.Transformer(scan=True))


def remat() -> Benchmark:
    """Layers under `nn.scan` and `nn.remat`."""
    return _benchmark(models.Transformer(scan=True, remat=True))


def unrolled() -> Benchmark:
    """Layers in a Python loop."""
    return _benchmark(models.Transformer(scan=False))


def dora() -> Benchmark:
    """DoRA against LoRA, both jaxlora's, on a transformer 1,024 wide with scanned layers."""
    return _dora_benchmark(scan=True)


def dora_unrolled() -> Benchmark:
    """DoRA against LoRA, both jaxlora's, on a transformer 1,024 wide, layers in a Python loop."""
    return _dora_benchmark(scan=False)


def _dora_benchmark(scan: bool, batch: int = 4, length: int = 128) -> Benchmark:
    model = models.Transformer(scan=scan, n_layers=2, width=1024, heads=16)
    made = {
        name: steps(model, batch=batch, length=length, rank=16, alpha=32.0, dora=dora)[PARTITION]
        for name, dora in (("LoRA", False), ("DoRA", True))
    }
    return Benchmark(
        contestants={
            name: train_contestant(step.step, step.state, *step.constants)
            for name, step in made.items()
        },
        baseline="LoRA",
        limits=[
            Limit(figure=figure, contestant="DoRA", baseline="LoRA", at_most=1.08)
            for figure in (TIME, "flops")
        ],
        settings={
            "layers": model.n_layers,
            "width": model.width,
            "batch": batch,
            "tokens": length,
            "rank": 16,
            "targets": "+".join(models.TARGETS),
        },
    )


def _benchmark(model: models.Transformer, batch: int = 2, length: int = 128) -> Benchmark:
    rank = 8
    contestants = {
        name: train_contestant(step.step, step.state, *step.constants)
        for name, step in steps(model, batch=batch, length=length, rank=rank).items()
    }
    return Benchmark(
        contestants=contestants,
        baseline=HAND_WRITTEN,
        limits=[
            Limit(figure=figure, contestant=contestant, baseline=HAND_WRITTEN, at_most=at_most)
            for contestant in (PARTITION, TRAIN_STATE)
            for figure, at_most in ((TIME, 1.02), ("flops", 1.005), ("temp_bytes", 1.02))
        ],
        settings={
            "layers": model.n_layers,
            "width": model.width,
            "batch": batch,
            "tokens": length,
            "rank": rank,
            "targets": "+".join(models.TARGETS),
        },
    )


def _of_params(apply: Callable[..., Any]) -> Callable[..., Any]:
    """Linen's apply as a function of the parameters themselves."""
    return lambda params, *args: apply({"params": params}, *args)
