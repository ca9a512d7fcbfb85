"""Text from a decoder with a KV cache, on plain params, merged ones, or adapters as they are.

    python examples/generate.py "What is the capital of France?" "Name three of its cities."
    python examples/generate.py --adapter out/finetune_lm/peft --system "Order to JSON" \
        "Two tents to Rome by May 4, please."

One compiled program: a prefill of all prompts, padded on the left, then a `lax.while_loop` that
ends when all rows have ended.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import chat_template
import jax
import jax.numpy as jnp
import numpy as np
import pretrained
from models import hf
from models.llama import Config, Llama, init_cache, names

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
    largest = jnp.max(logits, axis=-1, keepdims=True)
    logits = (logits - largest) / sampling.temperature  # no overflow, however cold
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


# --------------------------------------------------------------------------------------------------
# From the command line


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        return run(args)
    except (chat_template.TemplateError, hf.ModelError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def run(args: argparse.Namespace) -> int:
    dtype = pretrained.dtype_of(args.dtype)
    base = pretrained.load(args.model, dtype)
    params = base.params
    if args.quantize != "none":
        params = pretrained.quantized(params, args.quantize)
    if args.adapter is not None:
        params = with_adapter(params, base.config, args.adapter)
        print(*(s for s in jaxlora.summary(params).splitlines() if " parameters train" in s))
        if args.merge:
            params = jaxlora.merge(params)
    tokenizer = base.tokenizer
    if args.plain or tokenizer.template is None:
        prompts = [tokenizer.text(text)[0][:-1] for text in args.prompts]
    else:
        system = [{"role": "system", "content": args.system}] if args.system else []
        asked = [[*system, {"role": "user", "content": text}] for text in args.prompts]
        prompts = [tokenizer.prompt(messages) for messages in asked]
    generator = Generator(Llama(base.config, dtype=dtype), tokenizer.stop, tokenizer.pad)
    sampling = Sampling(args.temperature, args.top_k, args.top_p)
    for _ in range(1 + args.time):  # the first time it compiles
        began = time.time()
        made = generator(params, prompts, args.max_new_tokens, sampling, args.seed)
        seconds = time.time() - began
    for text, tokens, stopped in zip(args.prompts, made.tokens, made.stopped, strict=True):
        print(f"\n> {text}\n{tokenizer.decode(tokens)}{'' if stopped else ' ...'}")
    count = sum(len(tokens) for tokens in made.tokens)
    compiled = "" if args.time else ", compiling included"
    print(f"\n{count} tokens in {seconds:.1f} s, {count / seconds:.1f} tokens/s{compiled}")
    return 0


def with_adapter(params: Any, config: Config, adapter: Path) -> Any:
    """`lora`, of PEFT's directory or of `jaxlora.checkpoint`'s."""
    from jaxlora import checkpoint, peft

    if (adapter / "adapter_config.json").is_file():
        return peft.load(adapter, params, names(config))
    return checkpoint.restore(adapter, params)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Generates text with a language model.")
    parser.add_argument("prompts", nargs="+", metavar="PROMPT")
    parser.add_argument("--model", default=pretrained.DEFAULT, help="a directory or a hub name")
    parser.add_argument("--adapter", type=Path, help="a directory of PEFT, or of jaxlora")
    parser.add_argument("--merge", action="store_true", help="the adapter, first")
    parser.add_argument("--quantize", choices=("nf4", "int8", "none"), default="none")
    parser.add_argument("--system", help="what is said before the prompts")
    parser.add_argument("--plain", action="store_true", help="continue the texts, without a chat")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0, help="0: greedy")
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--time", action="store_true", help="twice, to time it without compiling")
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(main())
