"""Flax NNX modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from cases._registry import TOKENS, case


def flax_nnx(build: Callable[[nnx.Rngs], nnx.Module], *args: Any, returns: Any = ()):
    """The params are the Params; statistics and random streams are an argument beside them.

    `returns` filters the state that comes out beside the output.
    """
    graphdef, *_ = nnx.split(nnx.eval_shape(lambda: build(nnx.Rngs(0))), nnx.Param, ...)

    def fn(params: Any, rest: Any, *arrays: Any) -> Any:
        module = nnx.merge(graphdef, params, rest, copy=True)  # `rest` would be written to
        out = module(*arrays)
        return (out, nnx.state(module, returns)) if returns else out

    def make(key: jax.Array) -> tuple[Any, tuple[Any, ...]]:
        arrays = tuple(jax.random.normal(key, a) if isinstance(a, tuple) else a for a in args)
        _, params, rest = nnx.split(build(nnx.Rngs(key)), nnx.Param, ...)
        return params, (rest, *arrays)

    return fn, make


@case({"kernel": "io"})
def nnx_linear():
    return flax_nnx(lambda rngs: nnx.Linear(11, 13, rngs=rngs), (5, 11))


@case({"kernel": "iioo"})
def nnx_linear_general():
    return flax_nnx(
        lambda rngs: nnx.LinearGeneral((11, 2), (3, 5), axis=(-2, -1), rngs=rngs), (4, 11, 2)
    )


@case({f"{name}/kernel": "ioo" for name in ("query", "key", "value")} | {"out/kernel": "iio"})
def nnx_attention():
    return flax_nnx(lambda rngs: nnx.MultiHeadAttention(2, 14, decode=False, rngs=rngs), (3, 5, 14))


@case({"kernel": "oio"})
def nnx_einsum():
    return flax_nnx(lambda rngs: nnx.Einsum("td,hdk->thk", (3, 11, 5), rngs=rngs), (4, 11))


class _NnxTied(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(17, 11, rngs=rngs)
        self.dense = nnx.Linear(11, 11, rngs=rngs)

    def __call__(self, tokens):
        return self.embed.attend(jnp.tanh(self.dense(self.embed(tokens))))


@case({"embed": "io", "dense": "io"})
def nnx_tied_embedding():
    return flax_nnx(_NnxTied, TOKENS)


class _NnxBlock(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.norm = nnx.LayerNorm(11, rngs=rngs)
        self.up = nnx.Linear(11, 13, rngs=rngs)
        self.down = nnx.Linear(13, 11, rngs=rngs)

    def __call__(self, x):
        return x + self.down(jnp.tanh(self.up(self.norm(x))))


class _NnxScanned(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, remat: bool = False):
        self.remat = remat

        @nnx.split_rngs(splits=3)
        @nnx.vmap
        def blocks(rngs):
            return _NnxBlock(rngs)

        self.blocks = blocks(rngs)

    def __call__(self, x):
        step = lambda x, block: block(x)
        step = nnx.remat(step) if self.remat else step
        return nnx.scan(step, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.blocks)


@case({"up": "sio", "down": "sio"})
def nnx_scan():
    return flax_nnx(_NnxScanned, (5, 11))


@case({"up": "sio", "down": "sio"})
def nnx_scan_remat():
    return flax_nnx(lambda rngs: _NnxScanned(rngs, remat=True), (5, 11))


def _nnx_rnn(cell: type[nnx.Module]):
    return flax_nnx(lambda rngs: nnx.RNN(cell(5, 7, rngs=rngs), rngs=rngs), (2, 3, 5))


@case({f"cell/{gate}": "io" for gate in ("ii", "if_", "ig", "io", "hi", "hf", "hg", "ho")})
def nnx_lstm():
    return _nnx_rnn(nnx.LSTMCell)


@case({"cell/dense_i": "io", "cell/dense_h": "io"})
def nnx_lstm_optimized():
    return _nnx_rnn(nnx.OptimizedLSTMCell)


@case({"cell/dense_i": "io", "cell/dense_h": "io"})
def nnx_gru():
    return _nnx_rnn(nnx.GRUCell)


class _NnxNormed(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.up, self.norm = nnx.Linear(11, 13, rngs=rngs), nnx.BatchNorm(13, rngs=rngs)
        self.drop, self.down = nnx.Dropout(0.5, rngs=rngs), nnx.Linear(13, 7, rngs=rngs)

    def __call__(self, x):
        return self.down(self.drop(nnx.relu(self.norm(self.up(x)))))


@case({"up": "io", "down": "io"})
def nnx_state_and_rngs():
    """The new statistics and the count of the random stream come out."""
    return flax_nnx(_NnxNormed, (5, 11), returns=(nnx.BatchStat, nnx.RngCount))


class _NnxExperts(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        @nnx.split_rngs(splits=3)
        @nnx.vmap
        def experts(rngs):
            return nnx.Linear(11, 13, rngs=rngs)

        self.experts = experts(rngs)

    def __call__(self, x):
        return nnx.vmap(lambda expert, x: expert(x))(self.experts, x)


@case({"experts": "sio"})
def nnx_experts():
    return flax_nnx(_NnxExperts, (3, 2, 11))
