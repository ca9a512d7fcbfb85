"""Initializers from the weight itself: its principal parts, or what its quantization loses."""

from __future__ import annotations

import functools
import numbers
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlora._errors import TargetError
from jaxlora._matrix import dims_of, from_matrix, leading_stacked
from jaxlora._quantized import is_quantized
from jaxlora._quantized_array import KINDS, quantize_array
from jaxlora._target import (
    Initializer,
    Target,
    check_rank,
    factors,
    moved,
    product,
    wide_matrix,
)


def truncated_svd(
    matrix: jax.Array,
    rank: int,
    key: jax.Array,
    niter: int | None = None,
    oversample: int = 0,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    r"""The largest singular triplets: U (..., I, R), S (..., R), V^T (..., R, O).

    Exact, or by randomised subspace iteration: Q spans (M M^T)^niter M N with N a random (O, q),
    q = rank + oversample, orthonormalised at each half step; then the SVD of the small Q^T M.

    Args:
      matrix: M, (..., I, O).
      rank: R, at most min(I, O).
      key: of N.
      niter: the number of iterations; None: exact.
      oversample: by how many columns N is wider than the rank, as far as min(I, O) allows.

    References:
      Halko et al. 2009, Finding structure with randomness, arXiv 0909.4061, algorithms 4.4
      and 5.1.
    """
    with jax.default_matmul_precision("highest"):
        if niter is None:
            u, s, vt = jnp.linalg.svd(matrix, full_matrices=False)
        else:
            *stacked, n_in, n_out = matrix.shape
            width = min(rank + oversample, n_in, n_out)
            transposed = jnp.matrix_transpose(matrix)

            def step(_: Any, q: jax.Array) -> jax.Array:
                return jnp.linalg.qr(matrix @ jnp.linalg.qr(transposed @ q)[0])[0]

            noise = jax.random.normal(key, (*stacked, n_out, width), matrix.dtype)
            q = jax.lax.fori_loop(0, niter, step, jnp.linalg.qr(matrix @ noise)[0])
            u, s, vt = jnp.linalg.svd(jnp.matrix_transpose(q) @ matrix, full_matrices=False)
            u = q @ u
    return u[..., :rank], s[..., :rank], vt[..., :rank, :]


def check_niter(niter: Any, name: str) -> None:
    """Raises unless `niter` is a number of iterations, or None."""
    whole = isinstance(niter, numbers.Integral) and not isinstance(niter, bool)
    if niter is not None and not (whole and niter >= 0):
        raise TargetError(
            f"{name}: got niter {niter!r}, expected None for an exact SVD or the number of "
            "subspace iterations of a randomised one, for instance 16."
        )


def balanced(
    u: jax.Array, s: jax.Array, vt: jax.Array, target: Target
) -> tuple[jax.Array, jax.Array]:
    """a and b such that scale * a b = U S V^T, with the root of S / scale in each."""
    root = jnp.sqrt(s / target.scale)
    return u * root[..., None, :], root[..., :, None] * vt


def pissa(niter: int | None = None, oversample: int = 0) -> Initializer:
    r"""PiSSA: the R largest singular triplets of W train, the rest is frozen.

        W = U S V^T,   a = U_R (S_R / scale)^(1/2),   b = (S_R / scale)^(1/2) V_R^T,
        w = W - scale * a b.

    The base moves: `merge` gives W back at the start; `jaxlora.rebase` turns what was trained into
    an adapter of W itself. a and b are PEFT's transposed, up to the signs of singular vectors.

    Args:
      niter: None: an exact SVD. A number: a randomised one with so many subspace iterations,
        PEFT's "pissa_niter_16"; much faster on large weights. What it misses stays in the base.
      oversample: by how many columns the randomised one's sketch is wider than the rank. PEFT has
        0; Halko et al. advise 5 or 10 (section 4.2).

    Returns:
      The initializer; it raises a TargetError if the rank is above min(inputs, outputs).

    >>> w = jax.random.normal(jax.random.key(0), (6, 4))
    >>> rest, a, b = pissa()(jax.random.key(1), w,
    ...                      Target(path="kernel", roles="io", rank=2, scale=0.5))
    >>> bool(jnp.allclose(rest + 0.5 * a @ b, w, atol=1e-5))
    True
    >>> int(jnp.linalg.matrix_rank(rest, rtol=1e-5))
    2

    References:
      Meng et al. 2024, PiSSA, arXiv 2404.02948, section 3 (equations 2 to 4).
      Halko et al. 2009, Finding structure with randomness, arXiv 0909.4061, algorithms 4.4
      and 5.1.
    """
    check_niter(niter, "pissa")

    def init(key: jax.Array, w: Any, target: Target) -> tuple[Any, jax.Array, jax.Array]:
        check_rank(w, target, "pissa")
        triplets = truncated_svd(wide_matrix(w, target), target.rank, key, niter, oversample)
        return moved(w, *balanced(*triplets, target), target)

    return init


def olora(key: jax.Array, w: Any, target: Target) -> tuple[Any, jax.Array, jax.Array]:
    r"""OLoRA: b has orthonormal rows, from the QR decomposition of the weight.

    With M the weight as (outputs, inputs),

        M = Q T,    a = (first R rows of T)^T,    b = (first R columns of Q)^T,
        w = W - scale * a b.

    The base moves, as with `pissa`. As in PEFT, a and b are not divided by the scale, so that scale
    times that part of W is taken out of it; the model starts at W anyway.

    Raises:
      TargetError: the rank is above min(inputs, outputs).

    >>> w = jax.random.normal(jax.random.key(0), (6, 4))
    >>> rest, a, b = olora(jax.random.key(1), w,
    ...                    Target(path="kernel", roles="io", rank=2, scale=0.5))
    >>> bool(jnp.allclose(rest + 0.5 * a @ b, w, atol=1e-5))
    True
    >>> bool(jnp.allclose(b @ b.T, jnp.eye(2), atol=1e-5))
    True

    References:
      Büyükakyüz 2024, OLoRA, arXiv 2406.01775, section 3 and algorithm 1.
    """
    del key  # nothing is drawn
    check_rank(w, target, "olora")
    with jax.default_matmul_precision("highest"):
        q, t = jnp.linalg.qr(jnp.matrix_transpose(wide_matrix(w, target)))
    a = jnp.matrix_transpose(t[..., : target.rank, :])
    b = jnp.matrix_transpose(q[..., :, : target.rank])
    return moved(w, a, b, target)


def loftq(quantize: str | Callable[[jax.Array], Any] = "nf4", iterations: int = 1) -> Initializer:
    r"""LoftQ: a quantized base, and the adapter that makes up best for what it loses.

    From a b = 0, so many times over,

        w = quantize(W - scale * a b),
        U S V^T = W - w,   a = U_R (S_R / scale)^(1/2),   b = (S_R / scale)^(1/2) V_R^T.

    The model starts near W, not at it: at w plus the best approximation of rank R of W - w. PEFT
    leaves the scale out and is right for alpha = rank alone; this is right for any.

    Args:
      quantize: a function of an array of W's shape and dtype. It gives the base as it will be kept:
        a quantized one (`jaxlora.quantize_array` with options), or an array that stands for
        quantized values (its error is measured after rounding to W's dtype, in which it is kept).
        A str is a kind, "nf4" or "fp4" or "int8": what `jaxlora.quantize(lora, kind=...)` makes,
        in blocks of 64, with double quantization, each of a stack by itself.
      iterations: how often.

    Returns:
      The initializer; it raises a TargetError if the rank is above min(inputs, outputs), or if
      `quantize` changes the shape.

    >>> w = jax.random.normal(jax.random.key(0), (6, 4))
    >>> coarse = lambda w: jnp.round(w * 2) / 2
    >>> base, a, b = loftq(coarse, iterations=5)(
    ...     jax.random.key(1), w, Target(path="kernel", roles="io", rank=3, scale=0.5))
    >>> bool(jnp.all(coarse(base) == base))
    True
    >>> bool(jnp.linalg.norm(base + 0.5 * a @ b - w) < jnp.linalg.norm(coarse(w) - w) / 3)
    True

    References:
      Li et al. 2023, LoftQ, arXiv 2310.08659, sections 3.1 and 3.2, algorithm 1.
    """
    if isinstance(quantize, str) and quantize not in KINDS:
        raise TargetError(
            f"loftq: got {quantize!r}, expected one of {', '.join(map(repr, KINDS))}, or a "
            "function of an array, for instance jaxlora.quantize_array."
        )
    if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 1:
        raise TargetError(
            f"loftq: got iterations {iterations!r}, expected an integer of at least 1, for "
            "instance loftq(quantize, iterations=5)."
        )

    def init(key: jax.Array, w: Any, target: Target) -> tuple[Any, jax.Array, jax.Array]:
        check_rank(w, target, "loftq")
        if is_quantized(w):
            raise TargetError(
                f"{target.path}: got a weight that is quantized already, expected the original, "
                "since loftq makes up for what quantization loses: call jaxlora.init on the "
                "params as they were."
            )
        w = jnp.asarray(w)
        matrix = wide_matrix(w, target)
        by: Any = quantize
        if isinstance(quantize, str):
            by = functools.partial(
                quantize_array,
                kind=quantize,
                stacked=leading_stacked(target.roles),
                along=None if target.lookup else dims_of("i", target.roles),
            )
        left = w
        for _ in range(iterations):
            base, kept = _quantized(by, left, w, target)
            a, b = balanced(*truncated_svd(matrix - kept, target.rank, key), target)
            left = from_matrix(matrix - product(a, b, target), w.shape, target.roles)
            left = left.astype(w.dtype)
        return base, *factors(w, a, b, target)

    return init


def _quantized(
    quantize: Callable[[jax.Array], Any], left: jax.Array, w: jax.Array, target: Target
) -> tuple[Any, jax.Array]:
    """The quantized base as it will be kept, and the matrix that it stands for."""
    base = quantize(left)
    is_array = is_quantized(base) or isinstance(base, (jax.Array, np.ndarray))
    if not is_array or base.shape != w.shape:
        raise TargetError(
            f"{target.path}: got {type(base).__name__} of shape {getattr(base, 'shape', None)} "
            f"from loftq's `quantize`, expected an array of shape {w.shape}, or what "
            "jaxlora.quantize_array makes of one."
        )
    if not is_quantized(base):
        base = jnp.asarray(base).astype(w.dtype)
    return base, wide_matrix(base, target).astype(wide_matrix(w, target).dtype)
