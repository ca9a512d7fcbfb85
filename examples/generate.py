"""Text from a decoder with a KV cache, on plain params, merged ones, or adapters as they are.

    python examples/generate.py "The capital of France?" "And of Norway, please?"
        [--model DIR_OR_HUB_NAME] [--adapter DIR] [--merge] [--system TEXT] [--plain]
        [--max-new-tokens 128] [--temperature 0.7] [--top-k 50] [--top-p 0.9] [--seed 0]

One compiled program: a prefill of all prompts, padded on the left, then a `lax.while_loop` that
ends when all rows have ended.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from models.llama import Config, init_cache

import jaxlora

ROUND = 32  # prompts are padded to multiples of this, so that few programs are compiled


class Sampling(NamedTuple):
    """How the next token is drawn.

    Attributes:
      temperature: divides the logits; 0: the likeliest token, and the others do not matter.
      top_k: among the k likeliest; None: all.
      top_p: among the fewest likeliest whose probabilities sum to p; 1: all.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0

    def check(self) -> Sampling:
        wrong = {
            "temperature": (self.temperature, self.temperature >= 0, "0 (greedy) or more"),
            "top_k": (self.top_k, self.top_k is None or self.top_k >= 1, "1 or more, or None"),
            "top_p": (self.top_p, 0 < self.top_p <= 1, "in (0, 1]"),
        }
        for name, (got, good, expected) in wrong.items():
            if not good:
                raise ValueError(f"Sampling: {name}: got {got!r}, expected {expected}.")
        return self


GREEDY = Sampling()


class Generated(NamedTuple):
    """New tokens.

    Attributes:
      tokens: for each prompt, those up to its end, the stop token left out.
      stopped: for each, whether a stop token came.
      steps: how many times the decoder ran.
    """

    tokens: list[np.ndarray]
    stopped: np.ndarray
    steps: int


def filtered(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """Logits (..., V) after temperature, top-k and top-p, in this order; -inf for what is out.

    Tokens that are as likely as the last one within stay in.

    >>> filtered(jnp.log(jnp.array([0.5, 0.3, 0.2])), Sampling(1.0, top_p=0.6)).tolist()[2]
    -inf
    """
    logits = logits / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        least = jax.lax.top_k(logits, sampling.top_k)[0][..., -1:]
        logits = jnp.where(logits >= least, logits, -jnp.inf)
    if sampling.top_p < 1:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        p = jax.nn.softmax(ordered, axis=-1)
        within = jnp.cumsum(p, axis=-1) - p < sampling.top_p
        least = jnp.min(jnp.where(within, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits >= least, logits, -jnp.inf)
    return logits


def choose(logits: jax.Array, keys: jax.Array, sampling: Sampling) -> jax.Array:
    """The next token of each row: logits (B, V), keys (B,) -> (B,)."""
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    draw = jax.vmap(jax.random.categorical)
    return draw(keys, filtered(logits, sampling)).astype(jnp.int32)


class Generator:
    """Generates with one model.

    Attributes:
      model: `models.llama.Llama`, or a module with its `hidden_states` and `head`.
      stop: ids at which a row ends.
      pad: an id to fill up with.
      dtype: of the cache.
    """

    def __init__(self, model: Any, stop: Sequence[int], pad: int = 0, dtype: Any = None):
        self.model, self.stop, self.pad = model, tuple(stop), pad
        config, dtype = model.config, dtype or model.dtype
        run = partial(_run, _next_logits(model), config, dtype, self.stop)
        self._run = jax.jit(run, static_argnames=("limit", "sampling"))

    def __call__(
        self,
        params: Any,
        prompts: Sequence[np.ndarray],
        max_new_tokens: int,
        sampling: Sampling = GREEDY,
        seed: int = 0,
    ) -> Generated:
        """Continues each prompt; a row's result depends on no other row, but for its key's index.

        Args:
          params: plain ones, or `lora`, quantized or not.
          prompts: tokens, of any lengths of 1 or more.
          max_new_tokens: at most as many for each.
          sampling: greedy unless given.
          seed: of what is drawn.
        """
        sampling = sampling.check()
        empty = [i for i, prompt in enumerate(prompts) if len(prompt) == 0]
        if empty or max_new_tokens < 1:
            raise ValueError(
                f"generate: got empty prompts at {empty}, max_new_tokens {max_new_tokens}, "
                "expected at least a token in each, and one to generate."
            )
        if not prompts:
            return Generated([], np.zeros(0, bool), 0)
        longest = max(len(p) for p in prompts)
        width = -(-longest // ROUND) * ROUND
        tokens = np.full((len(prompts), width), self.pad, np.int32)
        real = np.zeros_like(tokens)
        for i, prompt in enumerate(prompts):
            tokens[i, width - len(prompt) :] = prompt
            real[i, width - len(prompt) :] = 1
        keys = jax.random.split(jax.random.key(seed), len(prompts))
        found, steps = self._run(
            params, tokens, real, keys, limit=max_new_tokens, sampling=sampling
        )
        found, steps = np.asarray(found), int(steps)
        ends = np.isin(found, self.stop) & (np.arange(max_new_tokens) < steps)
        stopped = np.any(ends, axis=1)
        lengths = np.where(stopped, ends.argmax(axis=1), steps)
        return Generated([row[:n] for row, n in zip(found, lengths, strict=True)], stopped, steps)


def _next_logits(model: Any) -> Callable[..., Any]:
    """(params, tokens, real, cache) -> (logits after the last token (B, V), cache)."""

    def last(params: Any, tokens: Any, real: Any, cache: Any) -> Any:
        variables = {"params": params}
        hidden, cache = model.apply(variables, tokens, real, cache=cache, method="hidden_states")
        return model.apply(variables, hidden[:, -1], method="head"), cache

    return jaxlora.lora_apply(last)


def _run(
    next_logits: Callable[..., Any],
    config: Config,
    dtype: Any,
    stop: tuple[int, ...],
    params: Any,
    tokens: jax.Array,
    real: jax.Array,
    keys: jax.Array,
    *,
    limit: int,
    sampling: Sampling,
) -> tuple[jax.Array, jax.Array]:
    """(tokens (B, limit), steps made)."""
    batch, width = tokens.shape
    cache = init_cache(config, batch, width + limit, dtype)
    logits, cache = next_logits(params, tokens, real, cache)
    ends = jnp.array(stop, jnp.int32)

    def draw(logits: jax.Array, i: jax.Array) -> jax.Array:
        return choose(logits, jax.vmap(jax.random.fold_in, (0, None))(keys, i), sampling)

    def more(carry: Any) -> jax.Array:
        i, _, done, _, _ = carry
        return (i < limit) & ~jnp.all(done)

    def step(carry: Any) -> Any:
        i, token, done, found, cache = carry
        logits, cache = next_logits(params, token[:, None], jnp.ones_like(token)[:, None], cache)
        return put(i, draw(logits, i), done, found, cache)

    def put(i: jax.Array, token: jax.Array, done: jax.Array, found: jax.Array, cache: Any) -> Any:
        found = jax.lax.dynamic_update_slice(found, token[:, None], (0, i))
        done = done | jnp.any(token[:, None] == ends, axis=1)
        return i + 1, token, done, found, cache

    first = jnp.int32(0)
    found = jnp.zeros((batch, limit), jnp.int32)
    carry = put(first, draw(logits, first), jnp.zeros(batch, bool), found, cache)
    steps, _, _, found, _ = jax.lax.while_loop(more, step, carry)
    return found, steps
