"""The registry: every kind of layer and use, once. `test_properties.py` runs over all of it.

Sizes are chosen so that no activation has as many elements as an adapted weight or a layer of it:
an equation that makes so many elements from an adapter has formed W + BA.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name

import jaxlora


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """A function, its params, and what is known of them.

    Attributes:
      fn: (params, *args) -> arrays.
      make: (key) -> (params, args).
      roles: {path: roles} of what is adapted, as `trace_roles` should find them.
      declared: roles that only the user can know, for LoraConfig(roles=...).
    """

    name: str
    fn: Callable[..., Any]
    make: Callable[[jax.Array], tuple[Any, tuple[Any, ...]]]
    roles: Mapping[str, str]
    declared: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @functools.cache  # noqa: B019  (cases live as long as the tests)
    def lora(self, rank: int = 2, seed: int = 0, dtype: Any = None) -> tuple[Any, tuple[Any, ...]]:
        """(a lora tree with fresh adapters, args)"""
        params, args = self.make(jax.random.key(seed))
        if dtype is not None:
            params, args = cast((params, args), dtype)
        config = jaxlora.LoraConfig(
            rank=rank, alpha=3, targets=list(self.roles), roles=self.declared
        )
        roles = jaxlora.trace_roles(self.fn, params, *args)
        return jaxlora.init(jax.random.key(seed + 1), params, config, roles=roles), args


def cast(tree: Any, dtype: Any) -> Any:
    return jax.tree.map(
        lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree
    )


CASES: dict[str, Case] = {}


def case(roles: Mapping[str, str], declared: Mapping[str, str] | None = None):
    """Registers a function () -> (fn, make) under its name."""

    def enter(define: Callable[[], tuple[Any, Any]]) -> None:
        fn, make = define()
        CASES[define.__name__] = Case(define.__name__, fn, make, roles, declared or {})

    return enter


def plain(fn: Callable[..., Any], shapes: Mapping[str, tuple[int, ...]], *args: Any):
    """A plain function of a dict of weights; args are shapes, or arrays."""

    def make(key: jax.Array) -> tuple[Any, tuple[Any, ...]]:
        keys = iter(jax.random.split(key, len(shapes) + len(args)))
        params = {name: jax.random.normal(next(keys), shape) / 4 for name, shape in shapes.items()}
        arrays = (jax.random.normal(next(keys), a) if isinstance(a, tuple) else a for a in args)
        return params, tuple(arrays)

    return fn, make


def linen(module: nn.Module, *args: Any):
    def make(key: jax.Array) -> tuple[Any, tuple[Any, ...]]:
        arrays = tuple(jax.random.normal(key, a) if isinstance(a, tuple) else a for a in args)
        return module.init(key, *arrays), arrays

    return module.apply, make


def flax_nnx(build: Callable[[nnx.Rngs], nnx.Module], *args: Any):
    graphdef, _ = nnx.split(build(nnx.Rngs(0)))

    def fn(state: Any, *arrays: Any) -> Any:
        return nnx.merge(graphdef, state)(*arrays)

    def make(key: jax.Array) -> tuple[Any, tuple[Any, ...]]:
        arrays = tuple(jax.random.normal(key, a) if isinstance(a, tuple) else a for a in args)
        return nnx.state(build(nnx.Rngs(key))), arrays

    return fn, make


TOKENS = jnp.array([[1, 5, 0], [3, 3, 12]])

# --------------------------------------------------------------------------------------------------
# Plain functions: contractions


@case({"w": "io"})
def matmul():
    return plain(lambda p, x: jnp.tanh(x @ p["w"]), {"w": (11, 13)}, (5, 11))


@case({"w": "oi"})
def matmul_transposed():
    return plain(lambda p, x: jnp.tanh(x @ p["w"].T), {"w": (13, 11)}, (5, 11))


@case({"w": "oi"})
def weight_on_the_left():
    return plain(lambda p, x: jnp.tanh(p["w"] @ x), {"w": (13, 11)}, (11, 5))


@case({"w": "io"})
def vector_input():
    return plain(lambda p, x: jnp.tanh(x @ p["w"]), {"w": (11, 13)}, (11,))


@case({"w": "io"})
def both_ways():
    """An autoencoder with one weight: one use contracts its inputs, the other its outputs."""
    return plain(lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"].T, {"w": (11, 13)}, (5, 11))


@case({"q": "ioo", "o": "iio"})
def attention_kernels():
    def fn(p, x):
        q = jnp.einsum("btd,dhk->bthk", x, p["q"])
        return jnp.einsum("bthk,hkd->btd", jnp.tanh(q), p["o"])

    return plain(fn, {"q": (11, 3, 5), "o": (3, 5, 11)}, (2, 4, 11))


@case({"w": "oio"})
def middle_contracted():
    return plain(lambda p, x: jnp.einsum("td,hdk->htk", x, p["w"]), {"w": (3, 11, 5)}, (4, 11))


@case({"w": "sio", "v": "sio"})
def experts_batched():
    def fn(p, x):
        h = jnp.tanh(jnp.einsum("etd,edf->etf", x, p["w"]))
        return jnp.einsum("etf,efd->etd", h, p["v"])

    return plain(fn, {"w": (3, 11, 13), "v": (3, 13, 11)}, (3, 5, 11))


@case({"w": "ois"})
def experts_batched_last():
    return plain(lambda p, x: jnp.einsum("tde,fde->etf", x, p["w"]), {"w": (13, 11, 3)}, (5, 11, 3))


@case({"w": "sio"}, declared={"w": "sio"})
def declared_stacked_free():
    """The model leaves the expert dim free; the user wants an adapter for each expert."""
    return plain(lambda p, x: jnp.einsum("td,edf->tef", x, p["w"]), {"w": (3, 11, 13)}, (5, 11))


@case({"w": "sio"}, declared={"w": "sio"})
def declared_stacked_contracted():
    """The model contracts heads and head dim; the user wants an adapter for each head."""
    return plain(lambda p, x: jnp.einsum("thk,hkd->td", x, p["w"]), {"w": (3, 7, 11)}, (5, 3, 7))


@case({"w": "oi"}, declared={"w": "oi"})
def declared_the_other_way():
    return plain(lambda p, x: x @ p["w"], {"w": (11, 13)}, (5, 11))


@case({"w": "io", "u": "io"})
def unit_dims():
    return plain(lambda p, x: jnp.tanh(x @ p["w"]) @ p["u"], {"w": (11, 1), "u": (1, 13)}, (5, 11))


@case({"w": "io"})
def mixed_precision():
    def fn(p, x):
        w = p["w"].astype(jnp.bfloat16)
        return lax.dot(x.astype(jnp.bfloat16), w, preferred_element_type=jnp.float32)

    return plain(fn, {"w": (11, 13)}, (5, 11))


# --------------------------------------------------------------------------------------------------
# Plain functions: lookups


@case({"e": "io"})
def lookup():
    return plain(lambda p, t: jnp.tanh(p["e"][t]), {"e": (13, 11)}, TOKENS)


@case({"e": "io"})
def lookup_take_with_fill():
    tokens = jnp.array([[1, 99, 0], [-1, 3, 12]])
    fn = lambda p, t: jnp.tanh(jnp.take(p["e"], t, axis=0, mode="fill", fill_value=0.5))
    return plain(fn, {"e": (13, 11)}, tokens)


@case({"e": "io"})
def lookup_and_tied_head():
    def fn(p, t):
        h = p["e"][t] * jnp.sqrt(11.0)
        return jnp.tanh(h) @ p["e"].T

    return plain(fn, {"e": (17, 11)}, TOKENS)


@case({"e": "ioo", "w": "iio"})
def lookup_then_matmul():
    fn = lambda p, t: jnp.einsum("bthk,hkd->btd", p["e"][t], p["w"])
    return plain(fn, {"e": (13, 3, 5), "w": (3, 5, 7)}, TOKENS)


@case({"e": "oi"})
def lookup_of_columns():
    return plain(lambda p, t: jnp.tanh(p["e"][:, t]), {"e": (11, 13)}, TOKENS)


@case({"w": "oi"})
def sampled_softmax():
    """Scores against looked-up columns: rows of an embedding, as far as anyone can tell."""
    return plain(lambda p, x, t: x @ p["w"][:, t], {"w": (11, 17)}, (5, 11), jnp.array([1, 4, 4]))


@case({"w": "io"}, declared={"w": "io"})
def sampled_softmax_declared():
    """Looked up along the outputs, and still a weight."""
    return plain(lambda p, x, t: x @ p["w"][:, t], {"w": (11, 17)}, (5, 11), jnp.array([1, 4, 4]))


@case({"w": "sio"})
def expert_by_token():
    def fn(p, x, ids):
        return jnp.einsum("td,tdf->tf", x, p["w"][ids])

    return plain(fn, {"w": (3, 11, 13)}, (5, 11), jnp.array([0, 2, 1, 1, 0]))


@case({"w": "sio"})
def expert_by_take():
    def fn(p, x, ids):
        return jnp.einsum("td,tdf->tf", x, jnp.take(p["w"], ids, axis=0))

    return plain(fn, {"w": (3, 11, 13)}, (5, 11), jnp.array([0, 2, 1, 1, 0]))


@case({"w": "sio"})
def vmapped_lookup():
    """Each table of a stack is looked up with indices of its own."""
    fn = lambda p, t: jnp.tanh(jax.vmap(lambda e, i: e[i])(p["w"], t))
    return plain(fn, {"w": (2, 13, 11)}, TOKENS)


@case({"w": "sio"})
def layers_by_dynamic_index():
    def fn(p, x):
        def body(k, h):
            return jnp.tanh(h @ lax.dynamic_index_in_dim(p["w"], k, keepdims=False))

        return lax.fori_loop(0, 3, body, x)

    return plain(fn, {"w": (3, 11, 11)}, (5, 11))


@case({"w": "sio"})
def layers_by_static_index():
    def fn(p, x):
        for k in range(3):
            x = jnp.tanh(x @ p["w"][k])
        return x

    return plain(fn, {"w": (3, 11, 11)}, (5, 11))


@case({"e": "io"})
def row_by_dynamic_slice():
    fn = lambda p, k: jnp.tanh(lax.dynamic_slice(p["e"], (k, 0), (1, 11)))
    return plain(fn, {"e": (13, 11)}, jnp.array(4))


# --------------------------------------------------------------------------------------------------
# Plain functions: structure


@case({"w": "io"})
def reshaped_to_heads():
    def fn(p, x):
        return jnp.einsum("td,dhk->thk", x, p["w"].reshape(11, 3, 5))

    return plain(fn, {"w": (11, 15)}, (4, 11))


@case({"w": "ioo"})
def heads_fused():
    return plain(lambda p, x: x @ p["w"].reshape(11, 15), {"w": (11, 3, 5)}, (4, 11))


@case({"w": "ois"})
def transposed_and_reshaped():
    def fn(p, x):
        w = jnp.moveaxis(p["w"], 0, 1).reshape(11, 3, 5, 2)
        return jnp.einsum("std,dhks->sthk", x, w)

    return plain(fn, {"w": (15, 11, 2)}, (2, 4, 11))


@case({"w": "io"})
def unit_dims_added():
    def fn(p, x):
        w = jnp.expand_dims(p["w"], (0, 2))
        return jnp.einsum("td,adbf->abtf", x, w).squeeze(0)

    return plain(fn, {"w": (11, 13)}, (5, 11))


@case({"w": "io"})
def broadcast_over_a_batch():
    def fn(p, x):
        return jnp.matmul(x, jnp.broadcast_to(p["w"], (2, 11, 13)))

    return plain(fn, {"w": (11, 13)}, (2, 5, 11))


@case({"qkv": "io"})
def fused_qkv_split():
    def fn(p, x):
        q, k, v = jnp.split(p["qkv"], 3, axis=1)
        return jnp.tanh(x @ q) * (x @ k) + x @ v

    return plain(fn, {"qkv": (11, 21)}, (5, 11))


@case({"w": "io"})
def sliced_outputs():
    return plain(lambda p, x: x @ p["w"][:, 2:12:3], {"w": (11, 13)}, (5, 11))


@case({"w": "io"})
def sliced_inputs():
    return plain(lambda p, x: x @ p["w"][3:9], {"w": (11, 13)}, (5, 6))


@case({"q": "io", "k": "io", "v": "io"})
def concatenated_outputs():
    def fn(p, x):
        return jnp.tanh(x @ jnp.concatenate([p["q"], p["k"], p["v"]], axis=1))

    return plain(fn, {"q": (11, 5), "k": (11, 7), "v": (11, 3)}, (4, 11))


@case({"q": "io", "k": "io"})
def concatenated_with_plain_and_split_again():
    def fn(p, x):
        w = jnp.concatenate([p["q"], jnp.ones((11, 2)), p["k"]], axis=1)
        left, right = w[:, :6], w[:, 6:]
        return x @ left, jnp.tanh(x @ right)

    return plain(fn, {"q": (11, 5), "k": (11, 7)}, (4, 11))


@case({"u": "io", "v": "io"})
def concatenated_inputs():
    def fn(p, x):
        return jnp.tanh(x @ jnp.concatenate([p["u"], p["v"]], axis=0))

    return plain(fn, {"u": (5, 11), "v": (7, 11)}, (4, 12))


@case({"q": "io", "k": "io"})
def concatenated_transposed_reshaped():
    """A window that a reshape splits is filled first."""

    def fn(p, x):
        w = jnp.concatenate([p["q"], p["k"]], axis=1).T.reshape(3, 4, 11)
        return jnp.einsum("td,hkd->thk", x, w)

    return plain(fn, {"q": (11, 5), "k": (11, 7)}, (6, 11))


@case({"u": "io", "v": "io"})
def stacked_weights():
    def fn(p, x):
        return jnp.einsum("etd,edf->etf", x, jnp.stack([p["u"], p["v"]]))

    return plain(fn, {"u": (11, 13), "v": (11, 13)}, (2, 5, 11))


@case({"u": "io", "v": "io"})
def stacked_weights_scanned():
    def fn(p, x):
        body = lambda h, w: (jnp.tanh(h @ w), None)
        return lax.scan(body, x, jnp.stack([p["u"], p["v"]]))[0]

    return plain(fn, {"u": (11, 11), "v": (11, 11)}, (5, 11))


@case({"u": "io", "v": "io"})
def broadcast_then_concatenated():
    """Weights that are the same along a batch, in windows along that batch."""

    def fn(p, x):
        u, v = (jnp.broadcast_to(p[k], (n, 7, 11)) for k, n in (("u", 2), ("v", 3)))
        return jnp.einsum("etd,edf->etf", x, jnp.concatenate([u, v]))

    return plain(fn, {"u": (7, 11), "v": (7, 11)}, (5, 4, 7))


@case({"w": "ioo"})
def transposed_then_fused():
    """The factor's own order of dims is not the weight's any more when they fuse."""

    def fn(p, x):
        return x @ p["w"].transpose(0, 2, 1).reshape(11, 15)

    return plain(fn, {"w": (11, 3, 5)}, (4, 11))


@case({"w": "oi"}, declared={"w": "oi"})
def columns_permuted():
    return plain(
        lambda p, x: jnp.tanh(x @ p["w"][:, jnp.arange(12, -1, -1)]), {"w": (11, 13)}, (5, 11)
    )


@case({"w": "io"}, declared={"w": "io"})
def rows_permuted():
    """As many rows as there are: still a weight, when it meets a matmul."""
    return plain(
        lambda p, x: jnp.tanh(x @ p["w"][jnp.arange(10, -1, -1)]), {"w": (11, 13)}, (5, 11)
    )


@case({"w": "io"})
def padded_along_a_new_dim():
    def fn(p, x):
        w = jnp.pad(p["w"][None], ((1, 2), (0, 0), (0, 0)))
        return jnp.einsum("td,edf->etf", x, w)

    return plain(fn, {"w": (11, 13)}, (5, 11))


@case({"w": "ioo"})
def heads_repeated():
    """Grouped-query attention: each key head serves two query heads."""

    def fn(p, x):
        w = jnp.broadcast_to(p["w"][:, :, None], (11, 3, 2, 5)).reshape(11, 6, 5)
        return jnp.einsum("td,dhk->thk", x, w)

    return plain(fn, {"w": (11, 3, 5)}, (4, 11))


@case({"w": "io"})
def padded_and_reversed():
    def fn(p, x):
        w = jnp.pad(p["w"], ((0, 0), (1, 2)), constant_values=0.5)
        return jnp.tanh(x @ w[:, ::-1])

    return plain(fn, {"w": (11, 13)}, (5, 11))


@case({"w": "io"})
def scaled_by_literals_and_arrays():
    def fn(p, x, c, d):
        w = -(p["w"] * 2.0) / c
        w = lax.optimization_barrier(w * d)
        return jnp.tanh(x @ checkpoint_name(w.copy(), "w"))

    return plain(fn, {"w": (11, 13)}, (5, 11), jnp.array(3.0), (13,))


@case({"w": "io"})
def cast_and_rounded():
    def fn(p, x):
        w = lax.reduce_precision(p["w"], 8, 20).astype(jnp.float32)
        return jnp.tanh(x @ w)

    return plain(fn, {"w": (11, 13)}, (5, 11))


# --------------------------------------------------------------------------------------------------
# Plain functions: control flow


@case({"w": "sio"})
def scan_over_layers():
    def fn(p, x):
        def body(h, layer):
            return jnp.tanh(h @ layer["w"] + layer["b"]), h.sum()

        return lax.scan(body, x, p)

    return plain(fn, {"w": (3, 11, 11), "b": (3, 11)}, (5, 11))


@case({"w": "sio"})
def scan_reversed_unrolled():
    def fn(p, x):
        return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["w"], reverse=True, unroll=2)[0]

    return plain(fn, {"w": (3, 11, 11)}, (5, 11))


@case({"w": "io"})
def scan_with_closed_over():
    def fn(p, xs):
        return lax.scan(lambda h, x: (jnp.tanh(h + x @ p["w"]), h), jnp.zeros(13), xs)

    return plain(fn, {"w": (11, 13)}, (5, 11))


@case({"w": "io"})
def scan_with_carried_params():
    """The weight rides in the carry, unchanged."""

    def fn(p, xs):
        def body(state, x):
            p, h = state
            return (p, jnp.tanh(h + x @ p["w"])), h

        (_, h), ys = lax.scan(body, (p, jnp.zeros(13)), xs)
        return h, ys

    return plain(fn, {"w": (11, 13)}, (5, 11))


@case({"w": "io"})
def scan_with_changing_params():
    """The weight rides in the carry and shrinks at each step."""

    def fn(p, xs):
        def body(state, x):
            w, h = state
            return (w * 0.5, jnp.tanh(h + x @ w)), None

        (_, h), _ = lax.scan(body, (p["w"], jnp.zeros(13)), xs)
        return h

    return plain(fn, {"w": (11, 13)}, (5, 11))


@case({"w": "io", "v": "io"})
def scan_that_swaps_weights():
    def fn(p, xs):
        def body(state, x):
            w, v, h = state
            return (v, w, jnp.tanh(h + x @ w)), None

        return lax.scan(body, (p["w"], p["v"], jnp.zeros(13)), xs)[0][2]

    return plain(fn, {"w": (11, 13), "v": (11, 13)}, (5, 11))


@case({"w": "ssio"})
def scan_in_scan():
    def fn(p, x):
        def outer(h, w):
            return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h, w)[0], None

        return lax.scan(outer, x, p["w"])[0]

    return plain(fn, {"w": (2, 3, 11, 11)}, (5, 11))


@case({"w": "sio"})
def scan_hands_weights_out():
    """The body returns transposed layers, which come out stacked and are used afterwards."""

    def fn(p, x):
        h, ws = lax.scan(lambda h, w: (jnp.tanh(h @ w), w.T), x, p["w"])
        return jnp.einsum("td,lfd->ltf", h, ws)

    return plain(fn, {"w": (3, 11, 11)}, (5, 11))


@case({"w": "sio"})
def remat_in_scan():
    def fn(p, x):
        @jax.checkpoint
        def layer(h, w):
            return jnp.tanh(h @ w)

        return lax.scan(lambda h, w: (layer(h, w), None), x, p["w"])[0]

    return plain(fn, {"w": (3, 11, 11)}, (5, 11))


@case({"w": "io"})
def remat_with_policy():
    def fn(p, x):
        layer = jax.checkpoint(
            lambda p, h: jnp.sin(jnp.tanh(h @ p["w"])), policy=jax.checkpoint_policies.dots_saveable
        )
        return layer(p, x)

    return plain(fn, {"w": (11, 13)}, (5, 11))


@case({"w": "io"})
def jit_inside():
    def fn(p, x):
        layer = jax.jit(lambda p, h: jnp.tanh(h @ p["w"]))
        return layer(p, layer(p, x))

    return plain(fn, {"w": (11, 11)}, (5, 11))


@case({"w": "io", "e": "io"})
def while_decode():
    """Greedy decoding with the params closed over."""

    def fn(p, tokens):
        def step(state):
            k, tokens = state
            h = jnp.tanh(p["e"][tokens[k]] @ p["w"])
            return k + 1, tokens.at[k + 1].set(jnp.argmax(h @ p["e"].T))

        return lax.while_loop(lambda s: s[0] < 6, step, (0, tokens))[1]

    return plain(fn, {"w": (11, 11), "e": (17, 11)}, jnp.array([3, 0, 0, 0, 0, 0, 0]))


@case({"w": "io"})
def while_with_carried_params():
    def fn(p, x):
        def step(state):
            k, p, h = state
            return k + 1, p, jnp.tanh(h @ p["w"])

        return lax.while_loop(lambda s: s[0] < 4, step, (0, p, x))[2]

    return plain(fn, {"w": (11, 11)}, (5, 11))


@case({"w": "io", "v": "io"})
def cond_branches():
    def fn(p, x, flag):
        return lax.cond(flag, lambda: jnp.tanh(x @ p["w"]), lambda: jnp.sin(x @ p["v"]))

    return plain(fn, {"w": (11, 13), "v": (11, 13)}, (5, 11), jnp.array(True))


@case({"w": "io", "v": "io"})
def cond_chooses_a_weight():
    def fn(p, x, k):
        w = lax.switch(k, [lambda: p["w"], lambda: p["v"], lambda: p["w"] * 2])
        return jnp.tanh(x @ w)

    return plain(fn, {"w": (11, 13), "v": (11, 13)}, (5, 11), jnp.array(1))


@jax.custom_vjp
def _clipped(x):
    return jnp.sin(x)


_clipped.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (jnp.clip(g, -0.01, 0.01) * 3,))


@jax.custom_jvp
def _odd(x):
    return jnp.sin(x)


_odd.defjvp(lambda primals, tangents: (jnp.sin(primals[0]), 7 * tangents[0]))


@case({"w": "io"})
def custom_vjp_of_an_activation():
    return plain(lambda p, x: _clipped(x @ p["w"]), {"w": (11, 13)}, (5, 11))


@case({"w": "io"})
def custom_jvp_of_an_activation():
    return plain(lambda p, x: _odd(x @ p["w"]), {"w": (11, 13)}, (5, 11))


@case({"w": "io"})
def gradient_inside():
    """The function itself differentiates (an input gradient, as in a physics-informed loss)."""
    fn = lambda p, x: jax.grad(lambda x: jnp.sum(jnp.sin(x @ p["w"]) ** 2))(x)
    return plain(fn, {"w": (11, 13)}, (5, 11))


@case({"w": "sio"})
def gradient_through_remat_inside():
    def fn(p, x):
        @jax.checkpoint
        def layer(h, w):
            return jnp.sin(h @ w)

        def loss(x):
            return jnp.sum(lax.scan(lambda h, w: (layer(h, w), None), x, p["w"])[0])

        return jax.grad(loss)(x)

    return plain(fn, {"w": (3, 11, 11)}, (5, 11))


@case({"w": "io"})
def vmap_inside():
    return plain(
        lambda p, x: jax.vmap(lambda x: jnp.tanh(p["w"].T @ x))(x), {"w": (11, 13)}, (5, 11)
    )


@case({"w": "sio"})
def vmap_over_weights_inside():
    fn = lambda p, x: jax.vmap(lambda w, x: jnp.tanh(x @ w))(p["w"], x)
    return plain(fn, {"w": (3, 11, 13)}, (3, 5, 11))


# --------------------------------------------------------------------------------------------------
# Flax Linen


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


# --------------------------------------------------------------------------------------------------
# Flax NNX


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
