"""The two nodes that a `lora` tree has and a params tree has not, and the LoRA equation."""

from __future__ import annotations

import dataclasses
import numbers
from typing import Any

import jax
import jax.numpy as jnp

from jaxlora._dora import column_norm, squared_norm
from jaxlora._errors import RolesError, TargetError
from jaxlora._matrix import (
    ROLE_LETTERS,
    factors_to_matrix,
    from_matrix,
    split_shape,
    widened,
)
from jaxlora._not_an_array import NotAnArray
from jaxlora._pytrees import register, register_export
from jaxlora._quantized import dense


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class LoraWeight(NotAnArray):
    r"""A base weight and its low-rank adapter: the value W + scale * sum_r a[..., r] b[r, ...].

    With a magnitude m (DoRA), the value is (m / n) * (W + scale * a b), where n is the norm of
    W + scale * a b over the input dims, taken as a constant by the gradient.

    Only `a`, `b` and `magnitude` train; all else is frozen.

    Attributes:
      w: the base weight, untouched: an array, or a quantized one; None in the trainable half of a
        partitioned tree.
      a: the input side, (stacked..., input..., rank).
      b: the output side, (stacked..., rank, output...).
      scale: alpha / rank, or alpha / sqrt(rank): float32, (stacked...).
      magnitude: m, (stacked..., output...); None: plain LoRA.
      squared_norm: ||W||^2 over the input dims, (stacked..., output...), kept so that a step need
        not read W for it; computed here if it is not given. A new `w` needs a new one: None, or
        `jaxlora.with_base`. It is gathered, cast or marked as varying where `w` is; where a
        shard_map splits the inputs, that must be typed (`check_vma=True`, the default).
      dropout_key: a key for each stacked element, (stacked...), from `with_dropout`; None: no
        dropout.
      dropout: the rate at which elements of the adapter's input are dropped, where there is a key.
      roles: one letter for each dimension of w: `s` stacked (layers, experts: a matrix of its own
        for each index), `i` input, `o` output. A Dense kernel is "io", an attention query kernel
        (embed, heads, head_dim) "ioo", a scanned Dense kernel (layers, in, out) "sio", a
        convolution kernel (height, width, in, out) "iiio".

    Raises:
      RolesError: the roles are not one of `s`, `i`, `o` for each dimension of w.
      TargetError: the shapes of the parts do not fit; a dropout rate outside of [0, 1).

    >>> w = LoraWeight(w=jnp.ones((3, 4)), a=jnp.ones((3, 2)), b=jnp.ones((2, 4)),
    ...                scale=jnp.float32(0.5), roles="io")
    >>> w.shape, w.rank, float(jnp.max(delta(w)))
    ((3, 4), 2, 1.0)

    References:
      Hu et al. 2021, LoRA: Low-Rank Adaptation of Large Language Models, arXiv 2106.09685,
      section 4.1.
      Liu et al. 2024, DoRA: Weight-Decomposed Low-Rank Adaptation, arXiv 2402.09353, section 4.1
      and, for the norm as a constant, 4.3.
    """

    w: Any
    a: Any
    b: Any
    scale: Any
    roles: str
    magnitude: Any = None
    squared_norm: Any = None
    dropout_key: Any = None
    dropout: float = 0.0

    def __post_init__(self):
        if isinstance(self.scale, int | float):
            object.__setattr__(self, "scale", jnp.float32(self.scale))
        self.check()
        object.__setattr__(self, "dropout", float(self.dropout))  # static: hashed, and exported
        if self.magnitude is not None and self.squared_norm is None:
            object.__setattr__(self, "squared_norm", squared_norm(self.w, self.roles))

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
        for name, expected in (
            ("a", (*stacked, *inputs, rank)),
            ("b", (*stacked, rank, *outputs)),
            ("scale", stacked),
            ("magnitude", (*stacked, *outputs)),
            ("squared_norm", (*stacked, *outputs)),
            ("dropout_key", stacked),
        ):
            array = getattr(self, name)
            if array is not None and tuple(array.shape) != expected:
                raise TargetError(
                    f"{path}: got {name} of shape {tuple(array.shape)}, expected {expected} for w "
                    f"of shape {tuple(self.w.shape)}, roles {self.roles!r} and rank {rank}. Is the "
                    "adapter another model's? Make one for these params with jaxlora.init."
                )
        check_rate(self.dropout, path)

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
class FullWeight(NotAnArray):
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


register(
    LoraWeight,
    ("w", "a", "b", "scale", "magnitude", "squared_norm", "dropout_key"),
    ("roles", "dropout"),
)
register(FullWeight, ("w", "value"))
register_export(LoraWeight)
register_export(FullWeight)


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


def check_rate(rate: Any, path: str) -> None:
    """Raises a TargetError unless `rate` is a dropout rate."""
    if isinstance(rate, bool) or not isinstance(rate, numbers.Real) or not 0 <= float(rate) < 1:
        raise TargetError(
            f"{path}: got a dropout rate of {rate!r}, expected a number in [0, 1): the part of the "
            "adapter's input that is dropped, for instance 0.1."
        )


def delta(lw: LoraWeight) -> jax.Array:
    r"""What the adapter adds to W, as an array of W's shape: scale * sum_r a[..., r] b[r, ...].

    With a magnitude m (DoRA), (m / n) * (W + scale * a b) - W, n the norm over the input dims.

    Computed in float32 (float64 for float64 parts) at the highest precision, whatever the dtypes
    of a and b. `lora_apply` never calls this; `merge` does.

    Args:
      lw: the weight; `a` (stacked..., input..., rank), `b` (stacked..., rank, output...).

    Returns:
      An array of the shape of `lw.w`.

    References:
      Hu et al. 2021, arXiv 2106.09685, section 4.1.
      Liu et al. 2024, DoRA, arXiv 2402.09353, equation 5.
    """
    dtype = jnp.result_type(*(widened(x.dtype) for x in (lw.w, lw.a, lw.b)))
    a, b = factors_to_matrix(lw.a.astype(dtype), lw.b.astype(dtype), lw.shape, lw.roles)
    product = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
    product = lw.scale.astype(dtype)[..., None, None] * product
    product = from_matrix(product, lw.shape, lw.roles)
    if lw.magnitude is None:
        return product
    each = excess(lw).astype(dtype)
    units = tuple(1 if role == "i" else n for n, role in zip(lw.shape, lw.roles, strict=True))
    each = from_matrix(each, units, lw.roles)
    return product + each * (dense(lw.w).astype(dtype) + product)


def _norm(lw: LoraWeight) -> jax.Array:
    return column_norm(lw.w, lw.a, lw.b, lw.scale, lw.squared_norm, lw.roles)


def excess(lw: LoraWeight) -> jax.Array:
    """m / n - 1: by how much, relatively, DoRA grows each column: (stacked..., output...)."""
    norm = _norm(lw)
    return lw.magnitude.astype(norm.dtype) / norm - 1


def with_magnitude(lw: LoraWeight, path: str) -> LoraWeight:
    """The same weight with DoRA's magnitude, m = n, so that its value stays.

    Raises:
      TargetError: a column of W + scale * a b is zero, and has no direction.
    """
    lw = dataclasses.replace(lw, squared_norm=squared_norm(lw.w, lw.roles))
    norm = _norm(lw)
    if not isinstance(norm, jax.core.Tracer | jax.ShapeDtypeStruct):
        zeros = int(jnp.sum(~(norm > 0)))
        if zeros:
            raise TargetError(
                f"{path}: got a weight of which {zeros} of {norm.size} columns (over the inputs of "
                f"roles {lw.roles!r}) are zero, expected columns with a direction, since DoRA "
                f"divides by their norm. Leave it out, LoraConfig(..., exclude=[{path!r}]), or use "
                "LoraConfig(..., dora=False)."
            )
    return dataclasses.replace(lw, magnitude=norm)
