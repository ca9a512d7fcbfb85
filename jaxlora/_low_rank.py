"""The best adapter of low rank: of the difference of two models, or of a larger adapter."""

from __future__ import annotations

import dataclasses
import functools
import numbers
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlora import _paths
from jaxlora._alike import check_alike, differing
from jaxlora._config import LoraConfig
from jaxlora._errors import TargetError
from jaxlora._init import init
from jaxlora._matrix import factors_from_matrix, factors_to_matrix, to_matrix, widened
from jaxlora._quantized import dense
from jaxlora._tree import map_nodes
from jaxlora._weight import FullWeight, LoraWeight, is_node, with_magnitude
from jaxlora.initializers import Target, factor_shapes

HIGHEST = jax.lax.Precision.HIGHEST


class Svd(NamedTuple):
    """A stack of matrices u diag(s) v, singular values falling.

    Attributes:
      u: (stacked..., I, K), orthonormal columns.
      s: (stacked..., K).
      v: (stacked..., K, O), orthonormal rows.
    """

    u: jax.Array
    s: jax.Array
    v: jax.Array


def svd(matrix: jax.Array) -> Svd:
    """The SVD of (stacked..., I, O), K = min(I, O)."""
    return Svd(*jnp.linalg.svd(matrix, full_matrices=False))


@jax.jit
def svd_of_product(a: jax.Array, b: jax.Array) -> Svd:
    """The SVD of a b, from QRs of a (stacked..., I, R) and b (stacked..., R, O).

    The largest array is as large as a or b; K = min(I, R, O).
    """
    left, a = jnp.linalg.qr(a)
    right, b = jnp.linalg.qr(jnp.matrix_transpose(b))
    u, s, v = svd(jnp.matmul(a, jnp.matrix_transpose(b), precision=HIGHEST))
    return Svd(
        jnp.matmul(left, u, precision=HIGHEST),
        s,
        jnp.matmul(v, jnp.matrix_transpose(right), precision=HIGHEST),
    )


@functools.partial(jax.jit, static_argnames="rank")
def halves(parts: Svd, rank: int) -> tuple[jax.Array, jax.Array]:
    """a = u sqrt(s) and b = sqrt(s) v of a rank, zero-padded where the matrices have a smaller."""
    root = jnp.sqrt(parts.s[..., :rank])
    a = parts.u[..., :, :rank] * root[..., None, :]
    b = parts.v[..., :rank, :] * root[..., :, None]
    pad = rank - root.shape[-1]
    if pad > 0:
        stack = [(0, 0)] * (a.ndim - 2)
        a = jnp.pad(a, [*stack, (0, 0), (0, pad)])
        b = jnp.pad(b, [*stack, (0, pad), (0, 0)])
    return a, b


def rank_holding(energy: float, parts: Svd, path: str) -> int:
    """The smallest rank that holds a part of the squared Frobenius norm, the largest of a stack.

    At least 1. Singular values that rounding alone may have made count as zero.
    """
    if isinstance(parts.s, jax.core.Tracer):
        raise TargetError(
            f"{path}: got energy={energy} under a transformation, where singular values, and so "
            "the rank, are not known. Call it outside of jax.jit, or give a rank."
        )
    s = np.asarray(parts.s, np.float64)
    size = max(parts.u.shape[-2], parts.v.shape[-1])
    noise = float(jnp.finfo(parts.s.dtype).eps) * size * s[..., :1]
    held = np.cumsum(np.square(np.where(s > noise, s, 0)), axis=-1)
    enough = held >= energy * held[..., -1:]
    return 1 + int(np.max(np.argmax(enough, axis=-1), initial=0))


def check_rank(rank: Any, who: str) -> None:
    """Raises a TargetError unless `rank` is a rank."""
    if isinstance(rank, bool) or not isinstance(rank, numbers.Integral) or int(rank) < 1:
        raise TargetError(f"{who}: got rank {rank!r}, expected an integer of at least 1.")


def _check_energy(energy: Any, who: str) -> None:
    if (
        isinstance(energy, bool)
        or not isinstance(energy, numbers.Real)
        or not 0 < float(energy) <= 1
    ):
        raise TargetError(
            f"{who}: got energy {energy!r}, expected a number in (0, 1]: the part of the squared "
            "Frobenius norm to keep, for instance 0.99."
        )


def truncate(lora: Any, rank: int | None = None, energy: float | None = None) -> Any:
    r"""The same adapters at a lower rank: for each, the nearest a b in the Frobenius norm.

        a b = U S V,    a' = U_r sqrt(S_r),    b' = sqrt(S_r) V_r,

    from QRs of a and b: nothing of W's size is formed. The scale stays, and so do DoRA's
    magnitude, the dropout rate and leaves trained in full. An adapter whose rank is small enough
    already stays as it is. Two numbers given: the smaller rank.

    Args:
      lora: the tree.
      rank: the largest rank to leave.
      energy: in (0, 1]: the smallest rank of which a' b' holds this part of ||a b||^2; of a
        stacked weight (layers, experts), the largest that one of its matrices needs. At least 1.
        Not under jit, since the rank depends on the values.

    Returns:
      The tree with smaller a and b, in their dtypes.

    Raises:
      TargetError: neither number given, or one out of range; `energy` under jit.

    >>> from jaxlora import LoraConfig, init
    >>> params = {"kernel": jnp.ones((6, 4))}
    >>> lora = init(jax.random.key(0), params, LoraConfig(rank=3, targets=["kernel"]))
    >>> truncate(lora, 2)["kernel"].rank, truncate(lora, 8)["kernel"].rank
    (2, 3)

    References:
      Eckart and Young 1936, The approximation of one matrix by another of lower rank,
      Psychometrika 1, 211-218.
      Hu et al. 2021, LoRA, arXiv 2106.09685, section 7.2, on how little rank adapters use.
    """
    if rank is None and energy is None:
        raise TargetError(
            "truncate: got neither rank nor energy, expected one of them: "
            "jaxlora.truncate(lora, rank=4), or energy=0.99."
        )
    if rank is not None:
        check_rank(rank, "truncate")
    if energy is not None:
        _check_energy(energy, "truncate")

    def cut(path: str, lw: Any) -> Any:
        if not isinstance(lw, LoraWeight):
            return lw
        most = lw.rank if rank is None else rank
        if energy is None and most >= lw.rank:
            return lw
        parts = svd_of_product(*wide_factors(lw))
        if energy is not None:
            most = min(most, rank_holding(energy, parts, path))
        if most >= lw.rank:
            return lw
        a, b = halves(parts, most)
        a, b = factors_from_matrix(a, b, lw.shape, lw.roles)
        return dataclasses.replace(lw, a=a.astype(lw.a.dtype), b=b.astype(lw.b.dtype))

    return map_nodes(cut, lora)


def wide_factors(lw: LoraWeight) -> tuple[jax.Array, jax.Array]:
    """a as (stacked..., I, R) and b as (stacked..., R, O), in float32 or wider."""
    dtype = jnp.result_type(widened(lw.a.dtype), widened(lw.b.dtype))
    return factors_to_matrix(jnp.asarray(lw.a, dtype), jnp.asarray(lw.b, dtype), lw.shape, lw.roles)


def extract(
    base: Any,
    tuned: Any,
    config: LoraConfig,
    *,
    roles: Any = None,
    energy: float | None = None,
) -> Any:
    r"""A fully tuned model as an adapter of its base: the best that the config's ranks allow.

    At each target, found as `init` finds it, a and b are the truncated SVD of the difference,

        (tuned - base) / scale = U S V,    a = U_r sqrt(S_r),    b = sqrt(S_r) V_r,

    so that `merge` gives the nearest weight of that rank to the tuned one. With `config.dora` the
    magnitude is the norm of the tuned weight's columns, m = ||tuned|| over the inputs, which is
    then exact at any rank, and at full rank the merged weight is the tuned one. Every other leaf
    that differs, and each that `config.train` and `config.bias` name, becomes a `FullWeight` with
    the tuned value: nothing is lost outside of the targets.

    Where the two models agree, a and b are both zero, and would not train further.

    Args:
      base: the params that were tuned: any pytree of arrays.
      tuned: the same tree after tuning.
      config: the targets, their rank and scale, the dtype of a and b, DoRA. Its initializer is not
        used. A target of fewer inputs or outputs than the rank gets zeros in the rest of a and b.
      roles: as in `init`.
      energy: in (0, 1]: in place of the config's ranks, the smallest rank that holds this part of
        the squared Frobenius norm of the difference; of a stacked weight, the largest that one of
        its matrices needs. At least 1. The scale is alpha over this rank. The rounding of a tuned
        weight is a part of the difference, and of full rank: take less than 1.

    Returns:
      A tree like `init(key, base, config)`.

    Raises:
      TargetError: `tuned` has other leaves, shapes or dtypes than `base`; a leaf that differs and
        is not floating-point; traced leaves (under jit), of which it is not known whether they
        differ; an energy outside of (0, 1]; and what `init` raises.
      RolesError: as in `init`.

    >>> from jaxlora import delta
    >>> base = {"kernel": jnp.zeros((3, 4)), "bias": jnp.zeros(4)}
    >>> tuned = {"kernel": jnp.ones((3, 4)), "bias": jnp.ones(4)}
    >>> lora = extract(base, tuned, LoraConfig(rank=1, targets=["kernel"]))
    >>> bool(jnp.allclose(delta(lora["kernel"]), 1)), float(lora["bias"].value[0])
    (True, 1.0)

    References:
      Hu et al. 2021, LoRA, arXiv 2106.09685, section 4.1.
      Liu et al. 2024, DoRA, arXiv 2402.09353, section 4.1.
      Ilharco et al. 2022, Editing Models with Task Arithmetic, arXiv 2212.04089, section 2, of the
      difference as a task vector.
    """
    if energy is not None:
        _check_energy(energy, "extract")
    _check_values(base, tuned)
    built = init(
        jax.random.key(0),
        base,
        dataclasses.replace(config, initializer=_zeros, dora=False),
        roles=roles,
    )
    check_alike(
        tuned, base, "tuned", "Give the params that the base became: extract(base, tuned, config)."
    )
    changed = {*differing(tuned, base)}
    values = dict(_paths.flatten_with_paths(tuned)[0])
    odd = [f"{p} ({_kind(x)})" for p, x in values.items() if p in changed and not _can_train(x)]
    if odd:
        raise TargetError(
            "tuned: got leaves that differ from the base's and are not floating-point, expected "
            f"others alone, since an adapter holds what can train. They are:{_paths.listing(odd)}\n"
            "Give both trees one value there, the base's or the tuned one."
        )

    def place(path: str, leaf: Any) -> Any:
        value = values[path]
        if isinstance(leaf, LoraWeight):
            return _nearest(path, leaf, value, config, energy)
        if isinstance(leaf, FullWeight):
            return FullWeight(w=leaf.w, value=jnp.array(dense(value)))
        if path not in changed:
            return leaf
        return FullWeight(w=leaf, value=jnp.array(dense(value)))  # a copy: both can be donated

    return map_nodes(place, built)


def _zeros(key: jax.Array, w: Any, target: Target) -> tuple[Any, Any, Any]:
    a, b = factor_shapes(w, target)
    return w, np.zeros(a, target.dtype), np.zeros(b, target.dtype)


def _kind(leaf: Any) -> str:
    return str(getattr(leaf, "dtype", type(leaf).__name__))


def _can_train(leaf: Any) -> bool:
    return hasattr(leaf, "shape") and jnp.issubdtype(leaf.dtype, jnp.floating)


def _check_values(base: Any, tuned: Any) -> None:
    for path, leaf in _paths.flatten_with_paths(tuned, is_leaf=is_node)[0]:
        if is_node(leaf):
            raise TargetError(
                f"{path}: got a {type(leaf).__name__} in the tuned tree, expected plain params: "
                "extract(base, jaxlora.merge(lora), config)."
            )
    for tree in (base, tuned):
        for path, leaf in _paths.flatten_with_paths(tree)[0]:
            if isinstance(leaf, jax.core.Tracer):
                raise TargetError(
                    f"{path}: got a traced leaf, expected values, since a leaf that differs "
                    "becomes a FullWeight and another one does not. Call extract outside of "
                    "jax.jit."
                )


def _nearest(
    path: str, lw: LoraWeight, tuned: Any, config: LoraConfig, energy: float | None
) -> LoraWeight:
    """The adapter at a target that takes its base nearest to the tuned weight."""
    parts, norms = _difference(tuned, lw.w, lw.roles)
    rank = lw.rank
    if energy is not None:
        rank = rank_holding(energy, parts, path)
        config = dataclasses.replace(config, rank=rank, rank_pattern={})
    scale = config.scale(path)
    a, b = halves(parts._replace(s=parts.s / scale), rank)
    a, b = factors_from_matrix(a.astype(config.dtype), b.astype(config.dtype), lw.shape, lw.roles)
    lw = dataclasses.replace(lw, a=a, b=b, scale=jnp.full(lw.scale.shape, scale, jnp.float32))
    if not config.dora:
        return lw
    lw = with_magnitude(lw, path)  # which refuses columns of zeros
    return dataclasses.replace(lw, magnitude=norms.reshape(lw.magnitude.shape))


@functools.partial(jax.jit, static_argnames="roles")
def _difference(tuned: Any, w: Any, roles: str) -> tuple[Svd, jax.Array]:
    """The SVD of tuned - w, and the norms of the tuned weight's columns: (stacked..., O)."""
    dtype = jnp.result_type(widened(w.dtype), widened(tuned.dtype))
    target = to_matrix(tuned, roles).astype(dtype)
    parts = svd(target - to_matrix(w, roles).astype(dtype))
    return parts, jnp.linalg.norm(target, axis=-2)
