"""The primitive by which a weight is decoded anew in each pass, alone."""

from __future__ import annotations

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from cases.sharded import MESH
from helpers import assert_close
from jax import lax
from jax.sharding import PartitionSpec as P

from jaxlora._recomputed import recomputed

CODES = np.random.default_rng(0).integers(0, 9, (16, 4)).astype(np.uint8)
SCALES = np.random.default_rng(1).random((16, 1)).astype(np.float32)
X = np.random.default_rng(2).normal(size=(8, 16)).astype(np.float32)


def product(x, codes, scales):
    return x @ (codes.astype(x.dtype) * scales)


def remade(x, codes, scales):
    return recomputed(product, x, (codes, scales), None)


# Which of x, codes and scales differ between devices.
SPECS = {
    "x": (P("model"), P(), P()),
    "codes": (P(), P(None, "model"), P()),
    "x and codes": (P("data"), P(None, "model"), P()),
    "scales": (P(None, "model"), P("model"), P("model")),
    "none": (P(), P(), P()),
}


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("of", SPECS)
def test_within_shard_map(of: str, check_vma: bool):
    """As the product itself, and lowered for every platform."""

    def gradient(use):
        def block(x, codes, scales):
            y = use(x, codes, scales)
            y = lax.psum(y, "model") if of == "scales" else y
            total, axes = jnp.sum(jnp.tanh(y)), {"x": ("model",), "codes": ("model",)}
            axes |= {"x and codes": ("data", "model")}
            return lax.psum(total, axes[of]) if of in axes else total

        split = jax.shard_map(
            block, mesh=MESH, in_specs=SPECS[of], out_specs=P(), check_vma=check_vma
        )
        return jax.jit(jax.grad(split))

    args = (X, CODES, SCALES)
    assert_close(gradient(remade)(*args), gradient(product)(*args))
    jax.export.export(gradient(remade), platforms=("cpu", "cuda", "tpu"))(*args)


def test_derivatives_of_every_kind():
    at = lambda use: lambda x: jnp.sum(jnp.tanh(use(x, CODES, SCALES)))
    stack = jnp.stack([X, 2 * X])
    for f in (
        lambda use: jax.jvp(at(use), (X,), (X[::-1],)),
        lambda use: jax.hessian(at(use))(X[:1]),
        lambda use: jax.linearize(at(use), X)[1](X[::-1]),
        lambda use: jax.grad(lambda x: jnp.sum(jax.grad(at(use))(x) ** 2))(X),
        lambda use: jax.vmap(jax.grad(at(use)))(stack),
        lambda use: jax.vmap(lambda c: jax.grad(lambda x: jnp.sum(use(x, c, SCALES) ** 2))(X))(
            np.stack([CODES, CODES[::-1]])
        ),
        lambda use: jax.vmap(lambda s: use(X, CODES, s), 1, 2)(np.stack([SCALES, SCALES], 1)),
    ):
        assert_close(f(remade), f(product))
