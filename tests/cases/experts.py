"""Mixtures of experts: one a and one b for each expert, however the model picks them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from cases._registry import case, plain

SIZES = jnp.array([2, 0, 4])
IDS = jnp.array([0, 2, 1, 1, 0])


@case({"w": "sio", "v": "sio"})
def experts_ragged():
    """Tokens sorted by expert; one row belongs to none."""

    def fn(p, x, sizes):
        return lax.ragged_dot(jnp.tanh(lax.ragged_dot(x, p["w"], sizes)), p["v"], sizes)

    return plain(fn, {"w": (3, 11, 13), "v": (3, 13, 5)}, (7, 11), SIZES)


@case({"w": "soi"})
def experts_ragged_transposed():
    fn = lambda p, x, sizes: lax.ragged_dot(x, p["w"].swapaxes(1, 2), sizes)
    return plain(fn, {"w": (3, 13, 11)}, (7, 11), SIZES)


@case({"w": "iiso"})
def experts_ragged_general():
    """Two contracted dims, and the experts not in front."""
    numbers = lax.RaggedDotDimensionNumbers((((1, 2), (0, 1)), ((), ())), (0,), (2,))
    fn = lambda p, x, sizes: lax.ragged_dot_general(x, p["w"], sizes, numbers)
    return plain(fn, {"w": (5, 2, 3, 13)}, (7, 5, 2), SIZES)


@case({"w": "sio"})
def experts_ragged_gradient_inside():
    fn = lambda p, x, sizes: jax.grad(lambda x: jnp.sum(lax.ragged_dot(x, p["w"], sizes) ** 2))(x)
    return plain(fn, {"w": (3, 11, 13)}, (7, 11), SIZES)


@case({"w": "oio"}, declared={"w": "oio"})
def experts_ragged_shared_inputs():
    """One a for all experts, and a b for each."""
    return plain(
        lambda p, x, sizes: lax.ragged_dot(x, p["w"], sizes), {"w": (3, 11, 13)}, (7, 11), SIZES
    )


@case({"w": "ssio"})
def experts_ragged_scanned():
    def fn(p, x, sizes):
        body = lambda h, w: (jnp.tanh(lax.ragged_dot(h, w, sizes)), None)
        return lax.scan(body, x, p["w"])[0]

    return plain(fn, {"w": (2, 3, 11, 11)}, (7, 11), SIZES)


@case({"w": "sio", "v": "sio"})
def experts_routed():
    """A whole layer: top-1 routing, sorting, two ragged products, and back."""

    def fn(p, x):
        ids = jnp.argmax(x @ p["router"], axis=-1)
        order = jnp.argsort(ids)
        sizes = jnp.bincount(ids, length=3)
        h = jnp.tanh(lax.ragged_dot(x[order], p["w"], sizes))
        return jnp.zeros_like(x).at[order].set(lax.ragged_dot(h, p["v"], sizes))

    return plain(fn, {"w": (3, 11, 13), "v": (3, 13, 11), "router": (11, 3)}, (7, 11))


@case({"w": "sio"})
def experts_by_one_hot():
    """Dispatch by a one-hot einsum (Switch Transformers)."""

    def fn(p, x, ids):
        hot = jax.nn.one_hot(ids, 3)
        return jnp.einsum("te,etf->tf", hot, jnp.einsum("et,td,edf->etf", hot.T, x, p["w"]))

    return plain(fn, {"w": (3, 11, 13)}, (5, 11), IDS)
