"""Plain functions: weights that are reshaped, sliced, joined before they are used."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from cases._registry import case, plain


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
def tiled_and_summed_over_a_unit_dim():
    def fn(p, x):
        return jnp.einsum("td,adf->tf", x, p["w"][None]) + x @ jnp.tile(p["w"], (1, 2))[:, :13]

    return plain(fn, {"w": (11, 13)}, (5, 11))


@case({"w": "io"})
def cast_and_rounded():
    def fn(p, x):
        w = lax.reduce_precision(p["w"], 8, 20).astype(jnp.float32)
        return jnp.tanh(x @ w)

    return plain(fn, {"w": (11, 13)}, (5, 11))
