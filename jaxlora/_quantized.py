"""What a base weight may be: an array, a `QuantizedArray`, or another library's (qwix)."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxlora._errors import TargetError
from jaxlora._quantized_array import QuantizedArray, quantize_array


def is_quantized(x: Any) -> bool:
    """Whether x is a quantized weight: a pytree that stands for one array."""
    return isinstance(x, QuantizedArray) or _is_qwix(x)


def _is_qwix(x: Any) -> bool:
    # A tree can hold qwix's arrays only if qwix was imported.
    qwix = sys.modules.get("qwix")
    return qwix is not None and isinstance(x, qwix.QArray)


def dense(w: Any) -> jax.Array:
    """A base weight as an array, of its own dtype: dequantized if it is quantized."""
    if isinstance(w, QuantizedArray):
        return w.dequantize()
    if _is_qwix(w):
        return sys.modules["qwix"].dequantize(w)
    return jnp.asarray(w)


def stacked_dims(w: Any) -> int:
    """How many leading dims of a quantized weight can be sliced without decoding it."""
    if isinstance(w, QuantizedArray):
        return w.stacked
    parts = jax.tree.leaves(w)
    sizes = zip(w.shape, *(x.shape for x in parts), strict=True)
    return next((d for d, (n, *others) in enumerate(sizes) if {*others} != {n}), w.ndim)


def by_stack(f: Callable[..., Any], w: Any, *others: Any) -> Any:
    """f(w, *others) of arrays whose leading dims are w's stacked ones, one matrix at a time.

    A quantized weight is then decoded layer by layer, never as a whole.

    Args:
      f: a function of a dense w without stacked dims and of the others without theirs.
    """
    if is_quantized(w) and stacked_dims(w):
        return jax.lax.map(lambda each: by_stack(f, *each), (w, *others))
    return f(dense(w), *others)


def as_before(w: jax.Array, like: Any, path: str) -> Any:
    """A weight in the form that another of its shape has: quantized the same way, or as it is.

    Raises:
      TargetError: that form is another library's.
    """
    if not is_quantized(like):
        return w
    if not isinstance(like, QuantizedArray):
        raise TargetError(
            f"{path}: got a {type(like).__name__} to quantize anew, expected jaxlora's own "
            "quantized weights, since how it was made is not known. Take floats, "
            "jaxlora.dequantize(params), and quantize after."
        )
    return quantize_array(
        w.astype(like.dtype),
        like.kind,
        block_size=like.block_size,
        double_quant=like.absmax_scale is not None,
        stacked=like.stacked,
        channels=like.channels,
        along=like.along,
    )
