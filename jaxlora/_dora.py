"""The norms of DoRA: those of a weight's columns, with its adapter and without."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxlora import _compat
from jaxlora._matrix import ROLE_LETTERS, widened
from jaxlora._quantized import by_stack, is_quantized


def _letters(roles: str) -> tuple[str, str, str, str]:
    """An einsum's letters of w, and of its stacked, input and output dims."""
    w = "".join(chr(ord("a") + d) for d in range(len(roles)))
    stacked, inputs, outputs = (
        "".join(x for x, role in zip(w, roles, strict=True) if role == letter)
        for letter in ROLE_LETTERS
    )
    return w, stacked, inputs, outputs


def squared_norm(w: Any, roles: str) -> jax.Array:
    """||W||^2 over the input dims, in float32 or wider: (stacked..., output...)."""
    if is_quantized(w):
        return by_stack(lambda w: squared_norm(w, roles[-w.ndim :]), w)
    letters, stacked, _, outputs = _letters(roles)
    squares = jnp.square(jnp.asarray(w).astype(widened(w.dtype)))
    return jnp.einsum(f"{letters}->{stacked}{outputs}", squares)


def column_norm(w: Any, a: Any, b: Any, scale: Any, squared: Any, roles: str) -> jax.Array:
    r"""n = ||W + scale * a b|| over the input dims, as a constant: (stacked..., output...).

    n^2 = ||W||^2 + 2 scale <W, a b> + scale^2 ||a b||^2, of which the first is kept, and the others
    need a^T W and a^T a alone: nothing of W's size is formed. a meets W in W's dtype.

    Args:
      w, a, b, scale: the parts of a `LoraWeight`.
      squared: ||W||^2, `squared_norm(w, roles)`.
      roles: of w.

    References:
      Liu et al. 2024, DoRA, arXiv 2402.09353, section 4.3.
    """
    w, a, b, scale, squared = map(jax.lax.stop_gradient, (w, a, b, scale, squared))
    if is_quantized(w):

        def of_one(w: jax.Array, a: Any, b: Any, scale: Any, squared: Any) -> jax.Array:
            return column_norm(w, a, b, scale, squared, roles[-w.ndim :])

        return by_stack(of_one, w, a, b, scale, squared)
    dtype = jnp.result_type(*(widened(x.dtype) for x in (w, a, b)))
    letters, s, i, o = _letters(roles)

    def einsum(spec: str, x: Any, y: Any) -> jax.Array:
        ins, out = spec.split("->")
        along: dict[str, Any] = {}
        for letters, array in zip(ins.split(","), (x, y), strict=True):
            named = zip(letters, _compat.explicit_spec(array), strict=True)
            along |= {letter: axis for letter, axis in named if axis is not None}
        # JAX asks for the sharding of what is summed over sharded dims: that of what is left.
        ambiguous = set(along) - set(out)
        return jnp.einsum(
            spec,
            x,
            y,
            precision=jax.lax.Precision.HIGHEST,
            preferred_element_type=dtype,
            out_sharding=P(*(along.get(letter) for letter in out)) if ambiguous else None,
        )

    split = _compat.varying(w) & _compat.varying(a)
    w = jnp.asarray(w) if w.dtype.itemsize > 1 else w.astype(jnp.bfloat16)  # 8-bit floats
    aw = einsum(f"{s}{i}y,{letters}->{s}y{o}", a.astype(w.dtype), w)
    a, b = a.astype(dtype), b.astype(dtype)
    aa = einsum(f"{s}{i}y,{s}{i}z->{s}yz", a, a)
    # Within a shard_map over the inputs, where the norm that is kept is of all of them, both W and
    # a have blocks. An adapter that varies by itself is a device's own, or marked as varying so
    # that its gradients are not summed yet; W by itself was gathered from its blocks.
    blocks = tuple(sorted(split - _compat.varying(squared)))
    if blocks:
        aw, aa = jax.lax.psum((aw, aa), blocks)
    aab = einsum(f"{s}yz,{s}z{o}->{s}y{o}", aa, b)
    scale = scale.astype(dtype).reshape(*scale.shape, *(1,) * (len(o) + 1))
    added = jnp.sum(scale * (2 * aw + scale * aab) * b, axis=len(s))
    # Where W and a b all but cancel, their norm is lost in rounding; it does not become NaN.
    return jnp.sqrt(jnp.maximum(squared + added, jnp.finfo(dtype).eps * squared))
