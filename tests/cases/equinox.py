"""Equinox modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax

from cases._registry import TOKENS, case


def equinox(build: Callable[[jax.Array], Any], call: Callable[..., Any], *args: Any):
    """The params are the module's arrays; its functions and numbers stay with `fn`.

    (The properties put params through `jax.jit`. Whole modules are in `test_frameworks.py`.)
    """
    _, static = eqx.partition(eqx.filter_eval_shape(build, jax.random.key(0)), _is_array)

    def fn(params: Any, *arrays: Any) -> Any:
        return call(eqx.combine(params, static), *arrays)

    def make(key: jax.Array) -> tuple[Any, tuple[Any, ...]]:
        arrays = tuple(jax.random.normal(key, a) if isinstance(a, tuple) else a for a in args)
        return eqx.filter(build(key), eqx.is_array), arrays

    return fn, make


def _is_array(x: Any) -> bool:
    return eqx.is_array(x) or isinstance(x, jax.ShapeDtypeStruct)


def each(module, x):
    return jax.vmap(module)(x)


@case({"weight": "oi"})
def equinox_linear():
    return equinox(lambda key: eqx.nn.Linear(11, 13, key=key), each, (5, 11))


@case({"layers/0/weight": "oi", "layers/1/weight": "oi", "layers/2/weight": "oi"})
def equinox_mlp():
    return equinox(lambda key: eqx.nn.MLP(11, 7, 13, 2, key=key), each, (5, 11))


@case({f"{name}_proj/weight": "oi" for name in ("query", "key", "value", "output")})
def equinox_attention():
    def call(attention, x):
        return jax.vmap(lambda x: attention(x, x, x))(x)

    return equinox(lambda key: eqx.nn.MultiheadAttention(2, 14, key=key), call, (3, 5, 14))


@case({"weight": "io"})
def equinox_embedding():
    def call(embedding, tokens):
        return jnp.tanh(jax.vmap(jax.vmap(embedding))(tokens))

    return equinox(lambda key: eqx.nn.Embedding(13, 11, key=key), call, TOKENS)


@case({"weight_ih": "oi", "weight_hh": "oi"})
def equinox_lstm_scan():
    def call(cell, xs):
        state = jnp.zeros(7), jnp.zeros(7)
        return lax.scan(lambda state, x: (cell(x, state), state[0]), state, xs)

    return equinox(lambda key: eqx.nn.LSTMCell(5, 7, key=key), call, (4, 5))


class _Block(eqx.Module):
    norm: eqx.nn.LayerNorm
    up: eqx.nn.Linear
    down: eqx.nn.Linear

    def __init__(self, key):
        up, down = jax.random.split(key)
        self.norm = eqx.nn.LayerNorm(11)
        self.up = eqx.nn.Linear(11, 13, key=up)
        self.down = eqx.nn.Linear(13, 11, key=down)

    def __call__(self, x):
        return x + self.down(jnp.tanh(self.up(self.norm(x))))


def _stack(key):
    return eqx.filter_vmap(_Block)(jax.random.split(key, 3))


def _scan(blocks, x, wrap=lambda f: f):
    """Equinox's own idiom: the arrays are scanned over, the rest is closed over."""
    arrays, static = eqx.partition(blocks, eqx.is_array)
    body = lambda x, block: (jax.vmap(eqx.combine(block, static))(x), None)
    return lax.scan(wrap(body), x, arrays)[0]


@case({"up/weight": "soi", "down/weight": "soi"})
def equinox_scan():
    return equinox(_stack, _scan, (5, 11))


@case({"up/weight": "soi", "down/weight": "soi"})
def equinox_scan_remat():
    return equinox(_stack, lambda blocks, x: _scan(blocks, x, eqx.filter_checkpoint), (5, 11))


def _members(key):
    return eqx.filter_vmap(lambda key: eqx.nn.Linear(11, 13, key=key))(jax.random.split(key, 3))


@case({"weight": "soi"})
def equinox_ensemble():
    call = lambda members, x: eqx.filter_vmap(each)(members, x)
    return equinox(_members, call, (3, 2, 11))


@case({"weight": "soi"}, declared={"weight": "soi"})
def equinox_ensemble_of_one_input():
    """vmap makes one matmul of it, outputs (members, out): only the user knows the members."""
    call = lambda members, x: eqx.filter_vmap(each, in_axes=(eqx.if_array(0), None))(members, x)
    return equinox(_members, call, (2, 11))


class _Tied(eqx.Module):
    shared: eqx.nn.Shared

    def __init__(self, key):
        embed, head = jax.random.split(key)
        embed, head = eqx.nn.Embedding(17, 11, key=embed), eqx.nn.Linear(11, 17, key=head)
        self.shared = eqx.nn.Shared(
            (embed, head), where=lambda pair: pair[1].weight, get=lambda pair: pair[0].weight
        )

    def __call__(self, token):
        embed, head = self.shared()
        return head(jnp.tanh(embed(token)))


@case({"shared/pytree/0/weight": "io"})
def equinox_tied_embedding():
    return equinox(_Tied, lambda model, tokens: jax.vmap(jax.vmap(model))(tokens), TOKENS)
