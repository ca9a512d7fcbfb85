"""The train step of a language model with adapters, its evaluation, its checkpoints.

    trainable, frozen = jaxlora.partition(lora)
    state = start(tx, trainable)
    step = make_step(model, tx, seed=0)
    state, report = step(state, frozen, batch)      # batch: (accumulate, rows, T) arrays

`model` is `models.llama.Llama`, or any Flax module with its `hidden_states` and `head`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from batches import Batch
from chunked_loss import Sums, cross_entropy, scores

import jaxlora
from jaxlora import checkpoint


class State(NamedTuple):
    """What a step changes: how many were made, the adapter, the optimizer's state."""

    step: jax.Array
    trainable: Any
    opt: Any


class Report(NamedTuple):
    """Of one step.

    Attributes:
      loss: nats a token, before the update.
      accuracy: the share of tokens predicted, before it too.
      norm: of the gradient.
      size: the norm of what trains, after the update: no number if the update went wrong.
    """

    loss: jax.Array
    accuracy: jax.Array
    norm: jax.Array
    size: jax.Array


def start(tx: optax.GradientTransformation, trainable: Any) -> State:
    return State(jnp.zeros((), jnp.int32), trainable, jax.jit(tx.init)(trainable))


# The parts of the params that `head` reads: the loss keeps a gradient of all that it is given.
HEAD = ("embed_tokens", "lm_head")


def _halves(model: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """(params, batch) -> hidden states, and (params, hidden states) -> logits; params or `lora`."""

    def hidden(params: Any, batch: Batch) -> Any:
        variables = {"params": params}
        return model.apply(variables, batch.tokens, batch.segment_ids, method="hidden_states")

    def head(params: Any, hidden: Any) -> Any:
        return model.apply({"params": params}, hidden, method="head")

    return jaxlora.lora_apply(hidden), jaxlora.lora_apply(head)


def make_step(
    model: Any, tx: optax.GradientTransformation, *, seed: int = 0, dropout: bool = False
) -> Callable[[State, Any, Batch], tuple[State, Report]]:
    """The jitted step: gradients of each microbatch, added up in a scan, and one update.

    Losses and gradients are sums over tokens, divided once by the tokens of the whole batch: equal
    to one large batch, however the tokens with loss are spread. Masks of dropout follow from the
    seed, the step's number and the microbatch's, so that a resumed run draws the same.

    Args:
      model: the module.
      tx: of `trainable` alone.
      seed: of the dropout.
      dropout: whether the adapters have a rate.

    Returns:
      (state, frozen, batch) -> (state, report). The state that goes in is donated.
    """

    hidden_of, logits_of = _halves(model)

    def head(trainable: Any, frozen: Any, hidden: Any) -> Any:
        return logits_of(jaxlora.combine(trainable, frozen), hidden)

    def loss(trainable: Any, frozen: Any, batch: Batch, key: jax.Array) -> tuple[jax.Array, Sums]:
        lora = jaxlora.combine(trainable, frozen)
        if dropout:
            lora = jaxlora.with_dropout(lora, key)
        part = jaxlora.partition({name: lora[name] for name in HEAD if name in lora})
        hidden = hidden_of(lora, batch)
        found = cross_entropy(head, *part, hidden, batch.labels, batch.weights)
        return found.loss, found

    @partial(jax.jit, donate_argnums=0)
    def step(state: State, frozen: Any, batch: Batch) -> tuple[State, Report]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)

        def add(total: Any, xs: Any) -> tuple[Any, None]:
            i, microbatch = xs
            key_i = jax.random.fold_in(key, i)
            more = jax.grad(loss, has_aux=True)(state.trainable, frozen, microbatch, key_i)
            return jax.tree.map(jnp.add, total, more), None

        count = batch.tokens.shape[0]
        zeros = jax.tree.map(jnp.zeros_like, state.trainable)
        nothing = zeros, Sums(jnp.float32(0), jnp.float32(0))
        (gradient, found), _ = jax.lax.scan(add, nothing, (jnp.arange(count), batch))
        tokens = jnp.sum(batch.weights)
        gradient = jax.tree.map(lambda g: g / tokens, gradient)
        updates, opt = tx.update(gradient, state.opt, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        norms = optax.tree.norm(gradient), optax.tree.norm(trainable)
        report = Report(found.loss / tokens, found.hits / tokens, *norms)
        return State(state.step + 1, trainable, opt), report

    return step


class Evaluation(NamedTuple):
    """Of held-out examples.

    Attributes:
      loss: nats a token.
      accuracy: the share of tokens that are the likeliest, after the right ones before them.
      exact: the share of examples of which all tokens are. It is what greedy generation gets right
        from end to end: as long as it has, what came before is the same.
      examples: how many there were.
    """

    loss: float
    accuracy: float
    exact: float
    examples: int


def make_evaluation(model: Any) -> Callable[[Any, Any], Evaluation]:
    """(params or lora, batches of (rows, T)) -> the means over all of them."""
    hidden_of, logits_of = _halves(model)

    @jax.jit
    def of(params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        part = {name: params[name] for name in HEAD if name in params}
        hidden = hidden_of(params, batch)
        return scores(logits_of, part, hidden, batch.labels, batch.weights)

    def evaluate(params: Any, batches: Any) -> Evaluation:
        loss = hits = tokens = exact = 0.0
        examples = 0
        for batch in batches:
            losses, right = (np.asarray(x) for x in of(params, batch))
            learned = batch.weights != 0
            loss, hits = loss + float(losses.sum()), hits + float(right.sum())
            tokens += float(learned.sum())
            for segments, wrong in zip(batch.segment_ids, learned & (right == 0), strict=True):
                ids = np.unique(segments[segments > 0])
                examples += len(ids)
                exact += len(np.setdiff1d(ids, segments[wrong]))
        return Evaluation(loss / tokens, hits / tokens, exact / examples, examples)

    return evaluate


def schedule(kind: str, rate: float, steps: int, warmup: int) -> optax.Schedule:
    """The learning rate: up linearly over `warmup` steps, then down to 0 as `kind` says."""
    rest = max(1, steps - warmup)
    down: dict[str, optax.Schedule] = {
        "cosine": optax.cosine_decay_schedule(rate, rest),
        "linear": optax.linear_schedule(rate, 0.0, rest),
        "constant": optax.constant_schedule(rate),
    }
    up = optax.linear_schedule(rate / max(1, warmup), rate, max(1, warmup - 1))
    return optax.join_schedules([up, down[kind]], [warmup]) if warmup else down[kind]


# --------------------------------------------------------------------------------------------------
# Checkpoints


class Checkpoints:
    """Steps on disk, through orbax: the adapter, the optimizer's state, grain's iterator, notes."""

    def __init__(self, directory: str | os.PathLike[str], keep: int = 2):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep)
        self._manager = ocp.CheckpointManager(Path(directory).absolute(), options=options)

    def latest(self) -> int | None:
        return self._manager.latest_step()

    def save(self, state: State, frozen: Any, data: Any, notes: Mapping[str, Any]) -> None:
        """Begins to write; the next call, or `close`, waits until it is done.

        When this returns, orbax has its own copy of all: the next step may donate the state.
        """
        args = ocp.args.Composite(
            lora=checkpoint.Save(jaxlora.combine(state.trainable, frozen)),
            opt=ocp.args.StandardSave({"step": state.step, "opt": state.opt}),
            data=grain.checkpoint.CheckpointSave(data),
            notes=ocp.args.JsonSave(dict(notes)),
        )
        self._manager.save(int(state.step), args=args)

    def notes(self, step: int) -> dict[str, Any]:
        args = ocp.args.Composite(notes=ocp.args.JsonRestore())
        return self._manager.restore(step, args=args).notes

    def restore(self, step: int, state: State, params: Any, data: Any) -> State:
        """The state at that step; `data` is moved there.

        Args:
          step: of `latest`.
          state: of the same shapes, as `start` makes it.
          params: the base, quantized if it was.
          data: grain's iterator.
        """
        like = {"step": state.step, "opt": state.opt}
        args = ocp.args.Composite(
            lora=checkpoint.Restore(params),
            opt=ocp.args.StandardRestore(like),
            data=grain.checkpoint.CheckpointRestore(data),
        )
        found = self._manager.restore(step, args=args)
        trainable, _ = jaxlora.partition(found.lora)
        return State(found.opt["step"], trainable, found.opt["opt"])

    def close(self) -> None:
        self._manager.wait_until_finished()
        self._manager.close()
