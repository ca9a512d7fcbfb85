"""The two nodes that a `lora` tree has and a params tree has not, and the LoRA equation."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.export
import jax.numpy as jnp

from jaxlora._errors import RolesError, TargetError

ROLE_LETTERS = "sio"


def _register(cls: type, data: tuple[str, ...], static: tuple[str, ...] = ()) -> type:
    """Registers a frozen dataclass as a pytree whose invariants are checked only where it is built.

    `jax.tree_util.register_dataclass` unflattens through `__init__`, and would check half trees,
    masks and in_axes, which rightly hold None, bools and integers in place of arrays.
    """

    def flatten_with_keys(node):
        keyed = tuple((jax.tree_util.GetAttrKey(f), getattr(node, f)) for f in data)
        return keyed, tuple(getattr(node, f) for f in static)

    def flatten(node):
        return tuple(getattr(node, f) for f in data), tuple(getattr(node, f) for f in static)

    def unflatten(aux, children):
        node: Any = object.__new__(cls)
        for name, value in zip(static + data, (*aux, *children), strict=True):
            object.__setattr__(node, name, value)
        return node

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    return cls


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class LoraWeight:
    r"""A base weight and its low-rank adapter: the value W + scale * sum_r a[..., r] b[r, ...].

    Only `a` and `b` train; `w` and `scale` are frozen.

    Attributes:
      w: the base weight, untouched; None in the trainable half of a partitioned tree.
      a: the input side, (stacked..., input..., rank).
      b: the output side, (stacked..., rank, output...).
      scale: alpha / rank, or alpha / sqrt(rank): float32, (stacked...).
      roles: one letter for each dimension of w: `s` stacked (layers, experts: a matrix of its own
        for each index), `i` input, `o` output. A Dense kernel is "io", an attention query kernel
        (embed, heads, head_dim) "ioo", a scanned Dense kernel (layers, in, out) "sio", a
        convolution kernel (height, width, in, out) "iiio".

    Raises:
      RolesError: the roles are not one of `s`, `i`, `o` for each dimension of w.
      TargetError: the shapes of w, a, b and scale do not fit.

    >>> w = LoraWeight(w=jnp.ones((3, 4)), a=jnp.ones((3, 2)), b=jnp.ones((2, 4)),
    ...                scale=jnp.float32(0.5), roles="io")
    >>> w.shape, w.rank, float(jnp.max(delta(w)))
    ((3, 4), 2, 1.0)

    References:
      Hu et al. 2021, LoRA: Low-Rank Adaptation of Large Language Models, arXiv 2106.09685,
      section 4.1.
    """

    w: Any
    a: Any
    b: Any
    scale: Any
    roles: str

    def __post_init__(self):
        if isinstance(self.scale, int | float):
            object.__setattr__(self, "scale", jnp.float32(self.scale))
        self.check()

    def check(self, path: str = "this weight") -> None:
        """Raises if the parts do not fit each other; `path` is named in the message."""
        if self.w is None or self.a is None or self.b is None or self.scale is None:
            missing = [f for f in ("w", "a", "b", "scale") if getattr(self, f) is None]
            raise TargetError(
                f"{path}: got half of a LoraWeight ({', '.join(missing)} missing), expected a "
                "whole one. Rejoin the halves first: jaxlora.combine(trainable, frozen)."
            )
        check_roles(self.roles, self.w.shape, path)
        stacked, inputs, outputs = split_shape(self.w.shape, self.roles)
        rank = self.a.shape[-1] if self.a.ndim else 0
        for name, array, expected in (
            ("a", self.a, (*stacked, *inputs, rank)),
            ("b", self.b, (*stacked, rank, *outputs)),
            ("scale", self.scale, stacked),
        ):
            if tuple(array.shape) != expected:
                raise TargetError(
                    f"{path}: got {name} of shape {tuple(array.shape)}, expected {expected} for w "
                    f"of shape {tuple(self.w.shape)}, roles {self.roles!r} and rank {rank}. Is the "
                    "adapter another model's? Make one for these params with jaxlora.init."
                )

    @property
    def rank(self) -> int:
        return self.a.shape[-1]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.w.shape)

    @property
    def dtype(self) -> Any:
        return self.w.dtype

    @property
    def ndim(self) -> int:
        return len(self.roles)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class FullWeight:
    """A leaf that trains in full, beside the base's: a bias, a norm, a new head.

    Attributes:
      w: the base leaf, untouched; None in the trainable half of a partitioned tree.
      value: what trains and what the model sees; same shape and dtype.

    Raises:
      TargetError: `value` has not the shape of `w`.

    >>> FullWeight(w=jnp.zeros(3), value=jnp.ones(3)).shape
    (3,)
    """

    w: Any
    value: Any

    def __post_init__(self):
        self.check()

    def check(self, path: str = "this weight") -> None:
        """Raises if the parts do not fit each other; `path` is named in the message."""
        if self.w is None or self.value is None:
            raise TargetError(
                f"{path}: got half of a FullWeight, expected a whole one. "
                "Rejoin the halves first: jaxlora.combine(trainable, frozen)."
            )
        if self.w.shape != self.value.shape:
            raise TargetError(
                f"{path}: got a value of shape {self.value.shape}, expected {self.w.shape}, "
                "that of w. Is it another model's? Make one for these params with jaxlora.init."
            )

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.w.shape)

    @property
    def dtype(self) -> Any:
        return self.w.dtype

    @property
    def ndim(self) -> int:
        return len(self.w.shape)


_register(LoraWeight, ("w", "a", "b", "scale"), ("roles",))
_register(FullWeight, ("w", "value"))

# An exported function keeps its `lora` argument's structure when it is serialized.
jax.export.register_pytree_node_serialization(
    LoraWeight,
    serialized_name="jaxlora.LoraWeight",
    serialize_auxdata=lambda aux: aux[0].encode(),
    deserialize_auxdata=lambda data: (bytes(data).decode(),),
)
jax.export.register_pytree_node_serialization(
    FullWeight,
    serialized_name="jaxlora.FullWeight",
    serialize_auxdata=lambda aux: b"",
    deserialize_auxdata=lambda data: (),
)


def is_node(x: Any) -> bool:
    """Whether x is one of the two nodes; the `is_leaf` of every walk over a `lora` tree."""
    return isinstance(x, LoraWeight | FullWeight)


def check_roles(roles: Any, shape: tuple[int, ...], path: str) -> None:
    """Raises a RolesError unless `roles` fits an array of that shape."""
    hint = "One letter for each dimension: s stacked, i input, o output; for instance 'io'."
    if not isinstance(roles, str) or set(roles) - set(ROLE_LETTERS):
        raise RolesError(f"{path}: got roles {roles!r}, expected letters of 's', 'i', 'o'. {hint}")
    if len(roles) != len(shape):
        raise RolesError(
            f"{path}: got roles {roles!r} for {len(shape)} dimensions {tuple(shape)}, "
            f"expected {len(shape)} letters. {hint}"
        )
    if not {"i", "o"} <= set(roles):
        raise RolesError(f"{path}: got roles {roles!r}, expected at least one i and one o. {hint}")


def split_shape(
    shape: tuple[int, ...], roles: str
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """The stacked, input and output sizes of a shape.

    >>> split_shape((12, 64, 8, 16), "sioo")
    ((12,), (64,), (8, 16))
    """
    stacked, inputs, outputs = (
        tuple(n for n, role in zip(shape, roles, strict=True) if role == letter)
        for letter in ROLE_LETTERS
    )
    return stacked, inputs, outputs


def widened(dtype: Any) -> Any:
    """float32, or dtype if that is as wide."""
    wide = jnp.issubdtype(dtype, jnp.inexact) and jnp.dtype(dtype).itemsize >= 4
    return dtype if wide else jnp.float32


def delta(lw: LoraWeight) -> jax.Array:
    r"""The adapter as an array of W's shape: scale * sum_r a[..., r] b[r, ...].

    Computed in float32 (float64 for float64 parts) at the highest precision, whatever the dtypes
    of a and b. `lora_apply` never calls this; `merge` does.

    Args:
      lw: the weight; `a` (stacked..., input..., rank), `b` (stacked..., rank, output...).

    Returns:
      An array of the shape of `lw.w`.

    References:
      Hu et al. 2021, arXiv 2106.09685, section 4.1.
    """
    stacked, inputs, outputs = split_shape(lw.shape, lw.roles)
    dtype = jnp.result_type(*(widened(x.dtype) for x in (lw.w, lw.a, lw.b)))
    a = lw.a.astype(dtype).reshape(*stacked, math.prod(inputs), lw.rank)
    b = lw.b.astype(dtype).reshape(*stacked, lw.rank, math.prod(outputs))
    product = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
    product = product.reshape(*stacked, *inputs, *outputs)
    product = product * lw.scale.astype(dtype).reshape(*stacked, *(1,) * len(inputs + outputs))
    order = sorted(range(lw.ndim), key=lambda d: ROLE_LETTERS.index(lw.roles[d]))
    return jnp.transpose(product, [order.index(d) for d in range(lw.ndim)])
