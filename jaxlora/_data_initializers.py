"""Initializers from data: from the inputs of each weight, or from its gradient."""

from __future__ import annotations

import math
import numbers
import re
from collections.abc import Mapping
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from jaxlora import _paths
from jaxlora._errors import TargetError
from jaxlora._moments import Moments, check_statistics, moments_of
from jaxlora._svd_initializers import balanced, check_niter, truncated_svd
from jaxlora._target import (
    Initializer,
    Target,
    check_rank,
    factor_shapes,
    known,
    moved,
    wide_matrix,
)

Mode = Literal["ipm", "kpm"]
Direction = Literal["ArBr", "A2rBr", "ArB2r", "random"]
Scale = Literal["stable", "weight_svd", "gd_scale", "unit", "paper"]


def _check_choice(name: str, got: Any, choices: Any) -> None:
    if got not in get_args(choices):
        listed = ", ".join(map(repr, get_args(choices)))
        raise TargetError(f"{name}: got {got!r}, expected one of {listed}.")


# --------------------------------------------------------------------------------------------------
# EVA


def eva(stats: Mapping[str, Moments], whiten: bool = False) -> Initializer:
    r"""EVA: a holds the principal directions of the weight's inputs; b = 0, w stays.

        sum of (x - mean) (x - mean)^T = V diag(d) V^T,    a = V_R,

    with d descending and the largest element of each direction positive. As in PEFT, whose
    incremental PCA centres the inputs, where the paper speaks of the singular vectors of the inputs
    as they are. PEFT's is a randomised, truncated sum over batches until the directions settle;
    this is exact for all that `stats` has seen.

    Args:
      stats: {path: Moments}, of `jaxlora.input_moments(fn, lora, batches)`.
      whiten: divide direction k by d_k^(1/4), the root of its singular value, as in PEFT (whose d
        grows, for all k alike, with each pass that it makes over the data).

    Returns:
      The initializer; it raises a TargetError for an embedding, for a path that `stats` lacks, for
      fewer inputs seen than the rank, and for a rank above the number of inputs of the weight.

    >>> x = jnp.array([[3.0, 4.0], [-3.0, -4.0], [0.4, -0.3], [-0.4, 0.3]])
    >>> stats = {"kernel": Moments(count=jnp.float32(4), total=x.sum(0), second=x.T @ x)}
    >>> w, a, b = eva(stats)(jax.random.key(0), jnp.ones((2, 3)),
    ...                      Target(path="kernel", roles="io", rank=1, scale=1.0))
    >>> bool(jnp.allclose(a, jnp.array([[0.6], [0.8]]), atol=1e-6))
    True

    References:
      Paischer et al. 2024, Parameter Efficient Fine-tuning via Explained Variance Adaptation,
      arXiv 2410.07170, section 3.
    """

    def init(key: jax.Array, w: Any, target: Target) -> tuple[Any, jax.Array, jax.Array]:
        del key  # nothing is drawn
        moments = moments_of(stats, w, target, "EVA")
        scatter = moments.scatter()
        n = scatter.shape[-1]
        if target.rank > n:
            raise TargetError(
                f"{target.path}: got rank {target.rank} for a weight of {n} inputs, expected at "
                f"most {n}, since EVA takes a direction of the inputs for each. "
                f"LoraConfig(rank_pattern={{{_paths.short(target.path)!r}: {n}}})."
            )
        with jax.default_matmul_precision("highest"):
            values, vectors = jnp.linalg.eigh(scatter)
        values, vectors = (jnp.flip(x, -1)[..., : target.rank] for x in (values, vectors))
        varies = known(
            lambda d, xx: jnp.min(d[..., 0] / jnp.trace(xx, axis1=-2, axis2=-1)),
            values,
            moments.second,
        )
        if varies is not None and varies <= 4 * float(jnp.finfo(values.dtype).eps):
            raise TargetError(
                f"{target.path}: got inputs that are all but equal (of their squares, {varies:.2g} "
                "is variance, which rounding hides), expected some that vary, since EVA takes the "
                "directions in which they do. Give more batches, or leave it out, "
                f"LoraConfig(..., exclude=[{_paths.short(target.path)!r}])."
            )
        largest = jnp.argmax(jnp.abs(vectors), axis=-2, keepdims=True)
        a = vectors * jnp.sign(jnp.take_along_axis(vectors, largest, axis=-2))
        if whiten:
            floor = jnp.finfo(values.dtype).eps * values[..., :1]  # below it, d is rounding
            a = a / jnp.maximum(values, floor)[..., None, :] ** 0.25
        shape_of_a, shape_of_b = factor_shapes(w, target)
        return (
            w,
            a.astype(target.dtype).reshape(shape_of_a),
            jnp.zeros(shape_of_b, target.dtype),
        )

    return init


def eva_ranks(
    stats: Mapping[str, Moments], rank: int, rho: float = 2.0, least: int = 1
) -> dict[str, int]:
    r"""EVA's redistribution of ranks: more where few directions explain little of the inputs.

    Direction k of a weight's inputs explains d_k / sum(d) of their variance (see `eva`). Of the
    first round(rho * rank) directions of every weight, those that explain most each get a rank,
    until `rank` for each weight is spent on average. A stacked weight has one rank, from the mean
    over its stack, and costs as many as it has elements.

        ranks = jaxlora.initializers.eva_ranks(stats, rank=8)
        config = LoraConfig(targets=..., rank=8, rank_pattern=ranks,
                            initializer=jaxlora.initializers.eva(stats))

    With alpha left at None, the scale is 1 for any rank. With another, `alpha_pattern={p: alpha * r
    / 8 for p, r in ranks.items()}` keeps alpha / 8 for all, which PEFT does.

    Args:
      stats: {path: Moments} of the targets, and of nothing else: all of them share the ranks.
      rank: how many ranks a weight gets on average.
      rho: at least 1, which redistributes nothing; a weight gets round(rho * rank) at the most.
      least: how many each weight keeps. PEFT's is 0, and takes out the adapters that are left with
        none: then give those to `LoraConfig(exclude=...)`, which knows no rank 0.

    Returns:
      {regex of the path: rank}, for `LoraConfig(rank_pattern=...)`.

    Raises:
      TargetError: no statistics, or statistics without inputs; a rank, rho or least out of range.

    >>> narrow, wide = jnp.diag(jnp.array([9.0, 1.0, 0.0])), jnp.eye(3)
    >>> stats = {k: Moments(count=jnp.float32(4), total=jnp.zeros(3), second=v)
    ...          for k, v in {"up/kernel": narrow, "down/kernel": wide}.items()}
    >>> eva_ranks(stats, rank=2)
    {'^up/kernel': 1, '^down/kernel': 3}

    References:
      Paischer et al. 2024, EVA, arXiv 2410.07170, section 3.
    """
    if isinstance(rank, bool) or not isinstance(rank, numbers.Integral) or rank < 1:
        raise TargetError(f"eva_ranks: got rank {rank!r}, expected an integer of at least 1.")
    if not rho >= 1:
        raise TargetError(f"eva_ranks: got rho {rho!r}, expected a number of at least 1.")
    if least not in range(rank + 1):
        raise TargetError(f"eva_ranks: got least {least!r}, expected an integer of 0 to {rank}.")
    if not stats:
        raise TargetError(
            "eva_ranks: got no statistics, expected {path: Moments} of the targets, from "
            "jaxlora.input_moments(fn, lora, batches)."
        )
    cost: dict[str, int] = {}
    ranks: dict[str, int] = {}
    candidates: list[tuple[float, str]] = []
    check_statistics(stats, "eva_ranks")
    for path, moments in stats.items():
        if not np.all(np.asarray(moments.count) > 0):
            raise TargetError(
                f"{path}: EVA without data: got statistics of 0 inputs, expected some. Give "
                "batches that reach this weight, jaxlora.input_moments(fn, lora, batches)."
            )
        precise = jax.tree.map(lambda x: np.asarray(x, np.float64), moments)
        values = np.linalg.eigvalsh(precise.scatter())[..., ::-1]
        whole = np.maximum(values.sum(-1, keepdims=True), np.finfo(np.float32).tiny)
        explained = (values / whole).reshape(-1, values.shape[-1])
        cost[path] = len(explained)
        mean = explained.mean(0)[: round(rank * rho)].tolist()
        ranks[path] = min(least, len(mean))
        candidates += [(x, path) for x in mean[least:]]

    left = rank * sum(cost.values()) - sum(cost[path] * ranks[path] for path in stats)
    # What does not fit for a path will not fit later either: its ranks are its first directions.
    for _, path in sorted(candidates, key=lambda candidate: -candidate[0]):
        if cost[path] <= left:
            ranks[path] += 1
            left -= cost[path]
    return {f"^{re.escape(_paths.short(path))}": r for path, r in ranks.items()}


# --------------------------------------------------------------------------------------------------
# CorDA


def corda(stats: Mapping[str, Moments], mode: Mode = "ipm") -> Initializer:
    r"""CorDA: the parts of W that its inputs excite most (or least) train, the rest is frozen.

    With C the mean of x x^T over the inputs, divided by the mean of its diagonal, and W as
    (inputs, outputs),

        C W = V S U^T,    a = C^-1 V_R (S_R / scale)^(1/2),    b = (S_R / scale)^(1/2) U_R^T,
        w = W - scale * a b,

    where R stands for the R largest singular values ("ipm") or the R smallest ("kpm"). For inputs
    without structure, C = 1, and "ipm" is `pissa`. C gets 0.01 of its mean diagonal on the
    diagonal, doubled until |C C^-1 - 1| < 0.05 in the Frobenius norm, as in PEFT.

    C's own scale changes neither a b nor w, only how their size is shared: PEFT divides each
    batch's inputs by their largest, sums, and divides by the number of batches, so that a and b
    depend on how the data is cut up; there a is smaller by the root of PEFT's mean diagonal, and b
    larger.

    The base moves, as with `pissa`.

    Args:
      stats: {path: Moments}, of `jaxlora.input_moments(fn, lora, batches)`.
      mode: "ipm", instruction-previewed: adapts best to what the inputs show. "kpm",
        knowledge-preserved: what the inputs show stays in the base.

    Returns:
      The initializer; it raises a TargetError for an embedding, for a path that `stats` lacks, for
      fewer inputs seen than the rank, and for a rank above min(inputs, outputs).

    >>> x, w = jax.random.normal(jax.random.key(0), (9, 4)), jnp.ones((4, 3)).at[0, 0].set(3)
    >>> stats = {"kernel": Moments(count=jnp.float32(9), total=x.sum(0), second=x.T @ x)}
    >>> rest, a, b = corda(stats)(jax.random.key(0), w,
    ...                           Target(path="kernel", roles="io", rank=2, scale=0.5))
    >>> bool(jnp.allclose(rest + 0.5 * a @ b, w, atol=1e-5)), bool(jnp.allclose(rest, 0, atol=1e-4))
    (True, True)

    References:
      Yang et al. 2024, CorDA, arXiv 2406.05223, section 3.
    """
    _check_choice("corda mode", mode, Mode)

    def init(key: jax.Array, w: Any, target: Target) -> tuple[Any, jax.Array, jax.Array]:
        del key  # nothing is drawn
        moments = moments_of(stats, w, target, "CorDA")
        check_rank(w, target, "corda")
        matrix = wide_matrix(w, target)
        with jax.default_matmul_precision("highest"):
            second, inverse = _damped(jnp.asarray(moments.second, matrix.dtype))
            v, s, ut = jnp.linalg.svd(second @ matrix, full_matrices=False)
            first = 0 if mode == "ipm" else s.shape[-1] - target.rank
            kept = slice(first, first + target.rank)
            a, b = balanced(inverse @ v[..., :, kept], s[..., kept], ut[..., kept, :], target)
        return moved(w, a, b, target)

    return init


def _damped(second: jax.Array) -> tuple[jax.Array, jax.Array]:
    """C of mean diagonal 1 and enough on it to be inverted, and its inverse: (..., n, n)."""
    n = second.shape[-1]
    eye = jnp.eye(n, dtype=second.dtype)
    mean = jnp.trace(second, axis1=-2, axis2=-1) / n
    second = second / mean[..., None, None]

    def damped(damp: jax.Array) -> jax.Array:
        return second + damp[..., None, None] * eye

    def singular(damp: jax.Array) -> jax.Array:
        error = damped(damp) @ jnp.linalg.inv(damped(damp)) - eye
        return jnp.sqrt(jnp.sum(error**2, axis=(-2, -1))) >= 0.05

    damp = jax.lax.while_loop(
        lambda damp: jnp.any(singular(damp)),
        lambda damp: jnp.where(singular(damp), 2 * damp, damp),
        jnp.full(mean.shape, 0.01, second.dtype),
    )
    return damped(damp), jnp.linalg.inv(damped(damp))


# --------------------------------------------------------------------------------------------------
# LoRA-GA


def lora_ga(
    gradients: Any,
    direction: Direction = "ArB2r",
    scale: Scale = "stable",
    stable_gamma: float = 16,
    niter: int | None = 4,
) -> Initializer:
    r"""LoRA-GA: a and b along the gradient of the full weight, so that the first step is its.

    With G = U S V^T the gradient as (inputs, outputs), in the notation of "ArB2r",

        a = U_[1:R],    b = S_[R+1:2R] V_[R+1:2R]^T * c,    w = W - scale * a b.

    direction: which triplets go where. "ArB2r": the first R to a, the next to b. "A2rBr": the
    other way. "ArBr": the 2nd, 4th, ... to a, the 1st, 3rd, ... to b. "random": R of the 2R, the
    same to both.

    scale: "stable": c = outputs^(1/4) / stable_gamma^(1/2). "weight_svd": c = |W|_2 / (b's first
    singular value). "gd_scale": c = 1/scale, and a is divided by the scale as well. "unit": c = 1.
    These are PEFT's. "paper": a and b as in the paper, without singular values,

        a = U_[1:R] * outputs^(1/4) / stable_gamma^(1/2),
        b = V_[R+1:2R]^T * outputs^(1/4) / stable_gamma^(1/2).

    PEFT departs from the paper in that b, and b alone, has the gradient's singular values and the
    factor c: with small gradients, its b is nearly zero.

    The base moves, as with `pissa`.

    Args:
      gradients: `jax.grad(loss)(params)`, of the full params and of as much data as will go; or any
        tree that has the targets' gradients at their paths.
      direction, scale: as above.
      stable_gamma: gamma, for "stable" and "paper".
      niter: subspace iterations of the randomised SVD, of a sketch of 4R columns as in PEFT (it is
        exact on smaller weights); None: exact.

    Returns:
      The initializer; it raises a TargetError for a path that the gradients lack, for a gradient of
      another shape, of zeros alone or with NaNs, and for 2 * rank above min(inputs, outputs).

    >>> loss = lambda params, x: jnp.mean(jnp.tanh(x @ params["kernel"]) ** 2)
    >>> params = {"kernel": jax.random.normal(jax.random.key(0), (6, 4))}
    >>> gradients = jax.grad(loss)(params, jnp.eye(6))
    >>> w, a, b = lora_ga(gradients)(jax.random.key(1), params["kernel"],
    ...                              Target(path="kernel", roles="io", rank=2, scale=0.5))
    >>> bool(jnp.allclose(w + 0.5 * a @ b, params["kernel"], atol=1e-5))
    True

    References:
      Wang et al. 2024, LoRA-GA, arXiv 2407.05000, section 3.
      Halko et al. 2009, Finding structure with randomness, arXiv 0909.4061, algorithms 4.4
      and 5.1.
    """
    _check_choice("lora_ga direction", direction, Direction)
    _check_choice("lora_ga scale", scale, Scale)
    check_niter(niter, "lora_ga")
    if not stable_gamma > 0:
        raise TargetError(f"lora_ga: got stable_gamma {stable_gamma!r}, expected a number above 0.")
    found = dict(_paths.flatten_with_paths(gradients)[0])

    def init(key: jax.Array, w: Any, target: Target) -> tuple[Any, jax.Array, jax.Array]:
        gradient = _gradient_of(found, w, target)
        check_rank(w, target, "lora_ga", times=2)
        for_svd, for_order, for_weight = jax.random.split(key, 3)
        r = target.rank
        u, s, vt = truncated_svd(wide_matrix(gradient, target), 2 * r, for_svd, niter, 2 * r)
        order = jnp.arange(2 * r)
        if direction == "random":
            for_a = for_b = jax.random.permutation(for_order, order)[:r]
        else:
            for_a, for_b = {
                "ArB2r": (order[:r], order[r:]),
                "A2rBr": (order[r:], order[:r]),
                "ArBr": (order[1::2], order[0::2]),
            }[direction]
        a, b, s = u[..., :, for_a], vt[..., for_b, :], s[..., for_b]
        factor = b.shape[-1] ** 0.25 / stable_gamma**0.5
        if scale == "paper":
            return moved(w, factor * a, factor * b, target)
        b = s[..., :, None] * b
        if scale == "stable":
            b = factor * b
        elif scale == "weight_svd":
            _, largest, _ = truncated_svd(wide_matrix(w, target), r, for_weight, niter)
            first = s[..., :1]
            b = b * jnp.where(first > 0, largest[..., :1] / first, 1)[..., None]
        elif scale == "gd_scale":
            a, b = a / target.scale, b / target.scale
        return moved(w, a, b, target)

    return init


def _gradient_of(found: Mapping[str, Any], w: Any, target: Target) -> Any:
    gradient = _paths.lookup(found, target.path)
    if gradient is None:
        raise TargetError(
            f"{target.path}: got no gradient, expected one at that path, for instance "
            "lora_ga(jax.grad(loss)(params)) of the params that `init` is given. "
            f"There are {len(found)} paths:{_paths.listing(_paths.nearest(target.path, found))}"
        )
    if jnp.shape(gradient) != tuple(w.shape):
        raise TargetError(
            f"{target.path}: got a gradient of shape {jnp.shape(gradient)}, expected "
            f"{tuple(w.shape)}, the weight's. Take it of these params: jax.grad(loss)(params)."
        )
    size = known(lambda g: jnp.sum(jnp.abs(g.astype(jnp.float32))), jnp.asarray(gradient))
    if size is not None and not 0 < size < math.inf:
        raise TargetError(
            f"{target.path}: got a gradient whose absolute values sum to {size:g}, expected a "
            "finite number above zero. Is the weight used in the loss? If not, leave it out, "
            f"LoraConfig(..., exclude=[{_paths.short(target.path)!r}])."
        )
    return gradient
