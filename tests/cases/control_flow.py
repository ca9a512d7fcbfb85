"""Plain functions: scan, while, cond, remat, jit, custom gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from cases._registry import case, plain


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


@case({"up": "sio", "down": "sio", "shared": "io"})
def scan_over_several_trees():
    """Two stacked trees are scanned together, a third weight is closed over."""

    def fn(p, x):
        def body(h, layer):
            (up, bias), down = layer
            return jnp.tanh((h @ up + bias) @ down + h @ p["shared"]), h[0]

        return lax.scan(body, x, ((p["up"], p["bias"]), p["down"]))

    shapes = {"up": (3, 11, 13), "bias": (3, 13), "down": (3, 13, 11), "shared": (11, 11)}
    return plain(fn, shapes, (5, 11))


@case({"w": "ssio"})
def scan_reversed_in_scan_with_remat():
    def fn(p, x):
        @jax.checkpoint
        def outer(h, w):
            step = lambda h, w: (jnp.tanh(h @ w), None)
            return lax.scan(step, h, w, reverse=True)[0], None

        return lax.scan(outer, x, p["w"], reverse=True, unroll=2)[0]

    return plain(fn, {"w": (2, 3, 11, 11)}, (5, 11))


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


@case({"w": "io"})
def associative_scan_of_activations():
    fn = lambda p, x: lax.associative_scan(lambda a, b: jnp.tanh(a) + b, x @ p["w"])
    return plain(fn, {"w": (11, 13)}, (5, 11))


@case({"w": "io"})
def solvers_of_activations():
    """A linear solve and a root, with their implicit derivatives."""

    def fn(p, x):
        h = jnp.exp(jnp.tanh(x @ p["w"]))
        h = lax.custom_linear_solve(lambda v: 2 * v, h, lambda _, b: b / 2, symmetric=True)
        newton = lambda f, v: lax.fori_loop(0, 20, lambda _, v: (v + h / v) / 2, v)
        root = lambda g, y: y / g(jnp.ones_like(y))
        return lax.custom_root(lambda v: v**2 - h, jnp.ones_like(h), newton, root)

    return plain(fn, {"w": (11, 13)}, (5, 11))
