"""Where what an adapter is made of goes: where its base weight is, sharded as that is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlora._errors import TargetError
from jaxlora._moves import RANK, project
from jaxlora._quantized import is_quantized
from jaxlora._quantized_array import QuantizedArray, others


def dims_of(name: str, roles: str) -> tuple[int, ...]:
    """The dims of a weight along the axes of a part of its adapter; RANK for the rank's.

    >>> dims_of("a", "oi"), dims_of("b", "oi"), dims_of("scale", "sio")
    ((1, -1), (-1, 0), (0,))
    """
    stacked, inputs, outputs = (
        tuple(d for d, role in enumerate(roles) if role == letter) for letter in "sio"
    )
    return {
        "a": (*stacked, *inputs, RANK),
        "b": (*stacked, RANK, *outputs),
        "scale": stacked,
        "magnitude": (*stacked, *outputs),
        "squared_norm": (*stacked, *outputs),
    }[name]


def place(x: np.ndarray, w: Any, dims: Sequence[int]) -> jax.Array:
    """An array on the devices of a weight, each axis sharded as the dim of w that it goes along.

    On one device or none (a NumPy array), it is as committed to it as w is. Sharded in a way that
    no PartitionSpec says, w's devices all have x.

    Args:
      x: whole, in every process.
      w: the weight; of a quantized one, how its codes are sharded counts.
      dims: for each axis of x a dim of w, or RANK: not sharded.

    Raises:
      TargetError: x has a dtype that JAX would narrow.
    """
    if jax.dtypes.canonicalize_dtype(x.dtype) != x.dtype:
        raise TargetError(
            f"got an array saved as {x.dtype}, which is not enabled. Call "
            'jax.config.update("jax_enable_x64", True) first.'
        )
    anchor = next(iter(jax.tree.leaves(w)), None) if is_quantized(w) else w
    if not isinstance(anchor, jax.Array) or not anchor.committed:
        return jnp.asarray(x)
    sharding = anchor.sharding
    if isinstance(sharding, NamedSharding):
        spec = _spec(w, tuple(sharding.spec))
        sharding = NamedSharding(sharding.mesh, project(spec, tuple(dims)))
    elif len(sharding.device_set) == 1:
        return jax.device_put(x, next(iter(sharding.device_set)))
    else:
        devices: list[Any] = list(sharding.device_set)
        devices.sort(key=lambda device: device.id)
        sharding = NamedSharding(jax.sharding.Mesh(np.array(devices), ("devices",)), P())
    # Not device_put, which has processes agree on the value first.
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


def _spec(w: Any, spec: tuple[Any, ...]) -> tuple[Any, ...]:
    """Of the dims of a weight, given that of the first of its leaves."""
    if not isinstance(w, QuantizedArray) or (w.is_rowwise and w.along is None):
        return spec
    spec = (*spec, *[None] * (w.codes.ndim - len(spec)))
    inner: list[Any] = [None] * len(w.inner)
    if w.along is not None and w.is_columnwise:
        along, *left = spec[w.stacked :]
        for d, axes in zip(others(w.inner, w.along), left, strict=True):
            inner[d] = axes
        if len(w.along) == 1:
            inner[w.along[0]] = along
    return (*spec[: w.stacked], *inner)
