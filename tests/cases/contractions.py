"""Plain functions: matmuls of every form."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax

from cases._registry import case, plain


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
