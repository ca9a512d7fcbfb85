"""Haiku functions and modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp

from cases._registry import TOKENS, case


def haiku(fn: Callable[..., Any], *args: Any):
    transformed = hk.without_apply_rng(hk.transform(fn))

    def make(key: jax.Array) -> tuple[Any, tuple[Any, ...]]:
        arrays = tuple(jax.random.normal(key, a) if isinstance(a, tuple) else a for a in args)
        return transformed.init(key, *arrays), arrays

    return transformed.apply, make


@case({"linear/w": "io"})
def haiku_linear():
    return haiku(lambda x: hk.Linear(13)(x), (5, 11))


@case({"linear_0": "io", "linear_1": "io"})
def haiku_mlp():
    return haiku(lambda x: hk.nets.MLP([13, 7])(x), (5, 11))


@case({"embed": "io"})
def haiku_embed():
    return haiku(lambda tokens: jnp.tanh(hk.Embed(13, 11)(tokens)), TOKENS)


@case({"embed": "io"})
def haiku_embed_one_hot():
    def fn(tokens):
        return hk.Embed(13, 11, lookup_style="ONE_HOT")(tokens)

    return haiku(fn, TOKENS)


@case(dict.fromkeys(("query", "key", "value", "multi_head_attention/linear"), "io"))
def haiku_attention():
    def fn(x):
        w_init = hk.initializers.VarianceScaling(1.0)
        return hk.MultiHeadAttention(2, 7, model_size=14, w_init=w_init)(x, x, x)

    return haiku(fn, (3, 5, 14))


@case({"lstm/linear": "io"})
def haiku_lstm_dynamic():
    def fn(xs):
        core = hk.LSTM(7)
        return hk.dynamic_unroll(core, xs, core.initial_state(None))

    return haiku(fn, (4, 5))


@case({"lstm/linear": "io"})
def haiku_lstm_static():
    def fn(xs):
        core = hk.LSTM(7)
        return hk.static_unroll(core, xs, core.initial_state(2))

    return haiku(fn, (3, 2, 5))


@case({"gru/w_i": "io", "gru/w_h": "io"})
def haiku_gru():
    def fn(xs):
        core = hk.GRU(7)
        return hk.dynamic_unroll(core, xs, core.initial_state(None))

    return haiku(fn, (4, 5))


def _block(x):
    norm = hk.LayerNorm(-1, create_scale=True, create_offset=True)
    return x + hk.Linear(11, name="down")(jnp.tanh(hk.Linear(13, name="up")(norm(x))))


@case({"up": "sio", "down": "sio"})
def haiku_layer_stack():
    return haiku(lambda x: hk.experimental.layer_stack(3)(_block)(x), (5, 11))


@case({"up": "sio", "down": "sio"})
def haiku_layer_stack_remat():
    return haiku(lambda x: hk.experimental.layer_stack(3)(hk.remat(_block))(x), (5, 11))
