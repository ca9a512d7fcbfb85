"""Flax NNX modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from cases._registry import TOKENS, case


def flax_nnx(build: Callable[[nnx.Rngs], nnx.Module], *args: Any):
    graphdef, _ = nnx.split(build(nnx.Rngs(0)))

    def fn(state: Any, *arrays: Any) -> Any:
        return nnx.merge(graphdef, state)(*arrays)

    def make(key: jax.Array) -> tuple[Any, tuple[Any, ...]]:
        arrays = tuple(jax.random.normal(key, a) if isinstance(a, tuple) else a for a in args)
        return nnx.state(build(nnx.Rngs(key))), arrays

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
