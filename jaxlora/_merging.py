"""What becomes of one weight's adapters when several are summed: a method is a row of a table."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxlora._errors import TargetError
from jaxlora._low_rank import halves, svd, svd_of_product, wide_factors
from jaxlora._matrix import factors_from_matrix, to_matrix, widened
from jaxlora._quantized import dense
from jaxlora._weight import FullWeight, LoraWeight, delta


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """The adapters that one weight has, and what to do with them.

    Attributes:
      path: the weight's.
      nodes: those of its adapters, all of one kind.
      weights: a scalar for each.
      name: the method's, for messages.
      method: how to merge.
      rank: of the result of an SVD; None: the largest.
      density: which part of the elements to keep.
      majority_sign: how signs are elected.
      key: this path's, or None.
    """

    path: str
    nodes: list[Any]
    weights: list[jax.Array]
    name: str
    method: Method
    rank: int | None
    density: float | None
    majority_sign: str
    key: jax.Array | None

    def merged(self, x: jax.Array, weights: jax.Array, tensor: int = 0) -> jax.Array:
        """Tensors (n, stacked..., I, J) of the adapters as one, thinned out per matrix.

        Args:
          x: the tensors.
          weights: (n, stacked...), or dims of size one.
          tensor: tells tensors of one adapter apart, which draw masks of their own.
        """
        key = None if self.key is None else jax.random.fold_in(self.key, tensor)
        flat = x.reshape(*x.shape[:-2], -1)
        flat = self.method.thin(flat, self.density, key)
        total = self.method.add(flat, weights[..., None], self.majority_sign)
        return total.reshape(x.shape[1:])

    def strengths(self, dtype: Any) -> jax.Array:
        """Each weight times its adapter's scale: (n, stacked...)."""
        pairs = zip(self.nodes, self.weights, strict=True)
        return jnp.stack([jnp.asarray(lw.scale, dtype) * c.astype(dtype) for lw, c in pairs])


def sum_lora(job: Job, w: Any) -> LoraWeight:
    """The sum of adapters with factors, on the base weight w."""
    first = job.nodes[0]
    if any(lw.magnitude is not None for lw in job.nodes) and not job.method.takes_rank:
        raise TargetError(
            f"{job.path}: got a weight with DoRA's magnitude for method={job.name!r}, expected "
            "plain adapters, since its value is not linear in a and b. Take method='svd' with a "
            "rank, which sums the differences that the adapters make."
        )
    a, b = factors_from_matrix(*job.method.merge(job), first.shape, first.roles)
    dtype = jnp.result_type(*(lw.a.dtype for lw in job.nodes))
    return LoraWeight(
        w=w,
        a=a.astype(dtype),
        b=b.astype(dtype),
        scale=jnp.ones(first.scale.shape, jnp.float32),
        roles=first.roles,
        dropout=first.dropout,
    )


def sum_full(job: Job, w: Any) -> FullWeight:
    """The sum of leaves trained in full, on the base leaf w: each is one matrix of one row."""
    x = jnp.stack([difference(node).reshape(1, -1) for node in job.nodes])
    return moved(job.nodes[0], w, job.merged(x, jnp.stack(job.weights).astype(x.dtype)))


def difference(node: FullWeight) -> jax.Array:
    """What training has added to the base leaf, in float32 or wider."""
    dtype = jnp.result_type(widened(node.value.dtype), widened(node.w.dtype))
    return jnp.asarray(node.value, dtype) - dense(node.w).astype(dtype)


def moved(node: FullWeight, w: Any, by: jax.Array) -> FullWeight:
    """A leaf trained in full with the value w + by."""
    value = dense(w).astype(by.dtype) + by.reshape(w.shape)
    return FullWeight(w=w, value=value.astype(node.value.dtype))


def _cat(job: Job) -> tuple[jax.Array, jax.Array]:
    """All factors side by side."""
    factors = [wide_factors(lw) for lw in job.nodes]
    strengths = job.strengths(factors[0][0].dtype)
    a = [a * strength[..., None, None] for (a, _), strength in zip(factors, strengths, strict=True)]
    return jnp.concatenate(a, axis=-1), jnp.concatenate([b for _, b in factors], axis=-2)


def _on_factors(job: Job) -> tuple[jax.Array, jax.Array]:
    """The arithmetic on a, and on b, each with the root of the strength."""
    ranks = [lw.rank for lw in job.nodes]
    if len({*ranks}) > 1:
        raise TargetError(
            f"{job.path}: got adapters of ranks {', '.join(map(str, ranks))}, expected equal ranks "
            f"for method={job.name!r}, which adds factors elementwise. Take method='cat' or "
            "method='svd', or bring them to one rank: jaxlora.truncate(lora, rank)."
        )
    factors = [wide_factors(lw) for lw in job.nodes]
    a, b = (jnp.stack(column) for column in zip(*factors, strict=True))
    strengths = job.strengths(a.dtype)
    root = jnp.sqrt(jnp.abs(strengths))
    signed = jnp.where(strengths < 0, -root, root)  # on one side alone, or two would cancel
    return job.merged(a, signed, 0), job.merged(b, root, 1)


def _on_products(job: Job) -> tuple[jax.Array, jax.Array]:
    """The arithmetic on what the adapters add to W; then an SVD."""
    x = jnp.stack([to_matrix(delta(lw), lw.roles) for lw in job.nodes])
    weights = jnp.stack(job.weights).astype(x.dtype).reshape(-1, *[1] * (x.ndim - 3))
    return halves(svd(job.merged(x, weights)), _svd_rank(job))


def _svd_of_sum(job: Job) -> tuple[jax.Array, jax.Array]:
    """The same for a plain sum, where factors suffice."""
    if any(lw.magnitude is not None for lw in job.nodes):
        return _on_products(job)
    return halves(svd_of_product(*_cat(job)), _svd_rank(job))


def _svd_rank(job: Job) -> int:
    return max(lw.rank for lw in job.nodes) if job.rank is None else job.rank


# --------------------------------------------------------------------------------------------------
# The arithmetic, on tensors (n, stacked..., elements) and weights that broadcast to them


def _keep(x: jax.Array, density: float | None, key: jax.Array | None) -> jax.Array:
    return x


def _trim(x: jax.Array, density: Any, key: jax.Array | None) -> jax.Array:
    """The floor(d n) largest of the n elements, by magnitude; zero elsewhere."""
    if density == 1:
        return x
    largest = jax.lax.top_k(jnp.abs(x), math.floor(density * x.shape[-1]))[1]
    kept = jnp.put_along_axis(jnp.zeros(x.shape, bool), largest, True, axis=-1, inplace=False)
    return jnp.where(kept, x, 0)


def _drop(x: jax.Array, density: Any, key: Any) -> jax.Array:
    """Each element with probability d, divided by d; zero elsewhere."""
    return jnp.where(_kept(key, density, x.shape), x / density, 0)


def _kept(key: jax.Array, density: float, shape: tuple[int, ...]) -> jax.Array:
    return jax.random.bernoulli(key, density, shape)


def _add(x: jax.Array, weights: jax.Array, majority_sign: str) -> jax.Array:
    return jnp.sum(weights * x, axis=0)


def _elect(x: jax.Array, weights: jax.Array, majority_sign: str) -> jax.Array:
    """The mean of the weighted elements whose own sign is the majority's, by unweighted votes."""
    sign = jnp.sign(x)
    votes = jnp.sum(x if majority_sign == "total" else sign, axis=0)
    agrees = sign == jnp.where(votes >= 0, 1, -1)
    count = jnp.maximum(jnp.sum(agrees, axis=0), 1)
    return jnp.sum(jnp.where(agrees, weights * x, 0), axis=0) / count


@dataclasses.dataclass(frozen=True)
class Method:
    """How to merge: from adapters to a and b, as matrices; how tensors are thinned out; added."""

    merge: Callable[[Job], tuple[jax.Array, jax.Array]]
    thin: Callable[[jax.Array, float | None, jax.Array | None], jax.Array] = _keep
    add: Callable[[jax.Array, jax.Array, str], jax.Array] = _add

    @property
    def takes_rank(self) -> bool:
        """Whether an SVD gives the factors."""
        return self.merge in (_on_products, _svd_of_sum)

    @property
    def takes_density(self) -> bool:
        return self.thin is not _keep

    @property
    def takes_key(self) -> bool:
        return self.thin is _drop


METHODS: dict[str, Method] = {
    "cat": Method(_cat),
    "linear": Method(_on_factors),
    "svd": Method(_svd_of_sum),
    "ties": Method(_on_factors, _trim, _elect),
    "ties_svd": Method(_on_products, _trim, _elect),
    "dare_linear": Method(_on_factors, _drop),
    "dare_linear_svd": Method(_on_products, _drop),
    "dare_ties": Method(_on_factors, _drop, _elect),
    "dare_ties_svd": Method(_on_products, _drop, _elect),
    "magnitude_prune": Method(_on_factors, _trim),
    "magnitude_prune_svd": Method(_on_products, _trim),
}
