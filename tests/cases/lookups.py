"""Plain functions: embeddings, experts by index, layers by index."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from cases._registry import TOKENS, case, plain


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
def layers_by_small_integers():
    fn = lambda p, x, k: jnp.tanh(x @ lax.dynamic_index_in_dim(p["w"], k, keepdims=False))
    return plain(fn, {"w": (3, 11, 13)}, (5, 11), jnp.uint8(1))


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
