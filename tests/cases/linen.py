"""Flax Linen modules."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from cases._registry import TOKENS, case


def linen(module: nn.Module, *args: Any):
    def make(key: jax.Array) -> tuple[Any, tuple[Any, ...]]:
        arrays = tuple(jax.random.normal(key, a) if isinstance(a, tuple) else a for a in args)
        return module.init(key, *arrays), arrays

    return module.apply, make


@case({"params/kernel": "io"})
def linen_dense():
    return linen(nn.Dense(13), (5, 11))


@case({"params/kernel": "io"})
def linen_dense_bfloat16():
    return linen(nn.Dense(13, dtype=jnp.bfloat16), (5, 11))


@case({"params/kernel": "iioo"})
def linen_dense_general():
    return linen(nn.DenseGeneral((3, 5), axis=(-2, -1)), (4, 11, 2))


@case({"params/kernel": "sioo"})
def linen_dense_general_batched():
    return linen(nn.DenseGeneral((3, 5), axis=-1, batch_dims=(0,)), (2, 4, 11))


@case({f"{name}/kernel": "ioo" for name in ("query", "key", "value")} | {"out/kernel": "iio"})
def linen_attention():
    return linen(nn.MultiHeadDotProductAttention(num_heads=2), (3, 5, 14))


@case({"params/kernel": "oio"})
def linen_einsum():
    return linen(nn.Einsum((3, 11, 5), "td,hdk->thk"), (4, 11))


@case({"params/embedding": "io"})
def linen_embed():
    return linen(nn.Embed(13, 11), TOKENS)


class _Tied(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(17, 11)
        return embed.attend(jnp.tanh(nn.Dense(11)(embed(tokens))))


@case({"Embed_0/embedding": "io", "Dense_0": "io"})
def linen_tied_embedding():
    return linen(_Tied(), TOKENS)


class _Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        return x + nn.Dense(11)(jnp.tanh(nn.Dense(13)(nn.LayerNorm()(x)))), None


class _Scanned(nn.Module):
    remat: bool = False

    @nn.compact
    def __call__(self, x):
        block = nn.remat(_Block, prevent_cse=False) if self.remat else _Block
        stack = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return stack()(x, None)[0]


@case({"Dense_0": "sio", "Dense_1": "sio"})
def linen_scan():
    return linen(_Scanned(), (5, 11))


@case({"Dense_0": "sio", "Dense_1": "sio"})
def linen_scan_remat():
    return linen(_Scanned(remat=True), (5, 11))


@case({"params/kernel": "io"})
def linen_partitioned():
    init = nn.with_partitioning(nn.initializers.normal(), ("embed", "mlp"))
    return linen(nn.Dense(13, kernel_init=init), (5, 11))


def _rnn(cell: nn.RNNCellBase):
    return linen(nn.RNN(cell), (2, 3, 5))


@case({f"cell/{gate}": "io" for gate in ("ii", "if", "ig", "io", "hi", "hf", "hg", "ho")})
def linen_lstm():
    return _rnn(nn.LSTMCell(7))


@case({f"cell/{gate}": "io" for gate in ("ii", "if", "ig", "io", "hi", "hf", "hg", "ho")})
def linen_lstm_optimized():
    """The cell joins its kernels before the matmul."""
    return _rnn(nn.OptimizedLSTMCell(7))


@case({f"cell/{gate}": "io" for gate in ("ir", "iz", "in", "hr", "hz", "hn")})
def linen_gru():
    return _rnn(nn.GRUCell(7))


class _Normed(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(13)(x))
        return nn.Dense(7)(nn.Dropout(0.5, deterministic=not train)(nn.relu(x)))


@case({"params/Dense_0/kernel": "io", "params/Dense_1/kernel": "io"})
def linen_mutable_and_rngs():
    """Whole variables go in, with a key; the output and the new statistics come out."""
    module = _Normed()

    def fn(variables, x, key):
        return module.apply(
            variables, x, train=True, mutable=["batch_stats"], rngs={"dropout": key}
        )

    def make(key):
        x = jax.random.normal(key, (5, 11))
        return module.init(key, x, train=False), (x, key)

    return fn, make


def _experts(in_axes: int | None) -> nn.Module:
    """Of one input each, or all of one."""
    lifted = nn.vmap(
        nn.Dense,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=in_axes,
        axis_size=3,
    )
    return lifted(13)


@case({"params/kernel": "sio"})
def linen_experts():
    return linen(_experts(0), (3, 2, 11))


@case({"params/kernel": "sio"}, declared={"kernel": "sio"})
def linen_experts_of_one_input():
    """vmap makes one matmul of it, outputs (experts, out): only the user knows the experts."""
    return linen(_experts(None), (2, 11))
