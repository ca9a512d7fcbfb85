"""`input_moments`: what meets each weight when the model runs, for initializers made from data.

Each weight carries an empty sum c beside it. Where it meets an activation x, the result is left as
it is, and the gradient with respect to c is defined to be the sum over x: whatever comes back from
above. So JAX's own differentiation adds up the uses, and carries the sums through scan, remat, cond
and vmap.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxlora import _paths
from jaxlora._apply import Arguments, Interpreter, as_array, as_value
from jaxlora._contractions import Contraction
from jaxlora._deferred import value_of
from jaxlora._errors import MaterializeError, TargetError
from jaxlora._factored import Factored, Node, frozen, met
from jaxlora._matrix import split_shape
from jaxlora._moments import Moments
from jaxlora._moves import RANK, Labelled, Unfactorable, contract
from jaxlora._terms import Term
from jaxlora._weight import LoraWeight, is_node


def input_moments(
    fn: Callable[[Any, Any], Any], lora: Any, batches: Iterable[Any]
) -> dict[str, Moments]:
    r"""Runs the base model on batches and sums up the inputs of each adapted weight.

    For a weight that contracts inputs x (n,), with n the product of its input dims in order (for a
    convolution: patches), count = sum 1, total = sum x and second = sum x x^T, in float32, over all
    rows of all batches, and for each index of a stacked weight. The memory is n^2 numbers a weight.

    `fn` is differentiated in reverse (nothing is trained): its loops must allow that, and uses that
    reach no floating-point output, or only through `stop_gradient`, `round`, `sign` and the like,
    are not seen. Lookups of rows and uses of the transposed weight (a tied head) have no such
    inputs and are not counted. A weight that is split along its outputs counts once for each part.

    Args:
      fn: (params, batch) -> outputs, for instance
        `lambda params, batch: model.apply(params, batch["tokens"])`.
      lora: what `init` made; says which weights, and their roles. The adapters are not applied;
        leaves trained in full have their present values.
      batches: what `fn` is called with; a compilation for each set of shapes.

    Returns:
      {path: Moments} of the adapted weights, for `initializers.eva` and `initializers.corda`.

    Raises:
      TargetError: no batches.
      MaterializeError: a weight is used where its inputs cannot be told: in `ragged_dot`, say, or
        elementwise; or where a matmul meets a part of them, as of a weight cut along its inputs, or
        split over devices by a shard_map.

    >>> from jaxlora import LoraConfig, init
    >>> params = {"kernel": jnp.ones((3, 4))}
    >>> lora = init(jax.random.key(0), params, LoraConfig(rank=2, targets=["kernel"]))
    >>> x = jnp.array([[1.0, 0.0, 2.0], [0.0, 0.0, 1.0]])
    >>> input_moments(lambda params, x: x @ params["kernel"], lora, [x])["kernel"].second
    Array([[1., 0., 2.],
           [0., 0., 0.],
           [2., 0., 5.]], dtype=float32)

    References:
      Paischer et al. 2024, EVA, arXiv 2410.07170, section 3.2.
      Yang et al. 2024, CorDA, arXiv 2406.05223, section 3.2.
    """
    pairs, _ = _paths.flatten_with_paths(lora, is_leaf=is_node)
    weights = {path: leaf for path, leaf in pairs if isinstance(leaf, LoraWeight)}
    sums = {path: _empty(leaf) for path, leaf in weights.items()}
    if not weights:
        raise TargetError(
            "input_moments: got a tree without adapted weights, expected what jaxlora.init made."
        )
    added = jax.jit(functools.partial(_added, fn), static_argnums=0)
    seen = 0
    for batch in batches:
        sums = added(*Arguments.split((lora, batch), {}), sums)
        seen += 1
    if not seen:
        raise TargetError(
            "input_moments: got no batches, expected at least one: input_moments(fn, lora, "
            "[batch]), which calls fn(params, batch). (An iterator can be used up only once.)"
        )
    return {path: _moments(sums[path], leaf) for path, leaf in weights.items()}


def _inputs(lw: LoraWeight) -> int:
    return math.prod(split_shape(lw.shape, lw.roles)[1])


def _empty(lw: LoraWeight) -> jax.Array:
    """The empty sum of a weight: (stacked..., 1 + n + n^2)."""
    n = _inputs(lw)
    return jnp.zeros((*lw.scale.shape, 1 + n + n * n), jnp.float32)


def _moments(c: jax.Array, lw: LoraWeight) -> Moments:
    n = _inputs(lw)
    second = c[..., 1 + n :].reshape(*c.shape[:-1], n, n)
    return Moments(count=c[..., 0], total=c[..., 1 : 1 + n], second=second)


def _added(fn: Callable[..., Any], arguments: Arguments, dynamic: list[Any], sums: Any) -> Any:
    """The sums after one more batch."""
    paths = arguments.paths(dynamic)
    arrays = [as_array(x, path) for x, path in zip(dynamic, paths, strict=True)]

    def flat(arrays: list[Any]) -> list[Any]:
        args, kwargs = arguments.rebuild(arrays)
        return jax.tree.leaves(fn(*args, **kwargs))

    closed = jax.make_jaxpr(flat)(arrays)

    def outputs(sums: Any) -> Any:
        # The tree's weights come before the batch's leaves, in the order of their paths.
        left = iter(sums.values())
        values = [
            _Gauge.over(x, next(left), path) if isinstance(x, LoraWeight) else as_value(x, path)
            for x, path in zip(dynamic, paths, strict=True)
        ]
        outs = Interpreter(_refuse).eval(closed, values)
        outs = [value_of(v.w) if isinstance(v, Node) else v for v in outs]
        floats = [v for v in outs if jnp.issubdtype(v.dtype, jnp.floating)]
        if not floats:
            raise TargetError(
                "input_moments: got a function without floating-point outputs, expected some, "
                "since it is differentiated: return the logits, not their argmax."
            )
        return sum(jnp.sum(v) for v in floats)

    return jax.tree.map(jnp.add, sums, jax.grad(outputs)(sums))


def _refuse(node: Node, use: str) -> Any:
    assert isinstance(node, Factored)
    if node.is_row or not node.terms:
        return node.sum()
    raise MaterializeError(
        f"{node.path}: {use}: input_moments cannot tell what its inputs are. Leave this weight out "
        f"of the targets: LoraConfig(..., exclude={[*map(_paths.short, node.path.split(', '))]})."
    )


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True, eq=False)
class _Sum(Term):
    """The identity of the inputs as a, the sums c as b."""

    def spread(self, d: int, n: int) -> Term:
        # One of a stack has a place there; outputs that are joined to others see the same inputs.
        return (
            self if n != 1 or d in self.b.dims else dataclasses.replace(self, b=self.b.spread(d, n))
        )


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True, eq=False)
class _Gauge(Factored):
    """A plain weight that tells what it meets.

    Its term's a is the identity of the inputs, which brings x into the order of W's input dims
    whatever became of W; its b is c, along W's stacked dims.
    """

    @classmethod
    def over(cls, lw: LoraWeight, c: Any, path: str) -> _Gauge:
        s, i = (tuple(d for d, r in enumerate(lw.roles) if r == letter) for letter in "si")
        n = _inputs(lw)
        eye = jnp.eye(n, dtype=jnp.float32).reshape(*(lw.shape[d] for d in i), n)
        term = _Sum(Labelled(eye, (*i, RANK)), Labelled(c, (*s, RANK)), Labelled(jnp.ones(()), ()))
        return cls(frozen(lw.w), (term,), path)

    def sum(self, valid: Labelled | None = None) -> jax.Array:
        return value_of(self.w)

    def materialized(self) -> jax.Array:
        return value_of(self.w)

    def contracted(self, x: Any, contraction: Contraction) -> Any:
        y = met(contraction, x, self.w)
        for t in self.terms:
            # A tied head contracts what the roles call outputs: no inputs are met.
            inputs = {d for d in t.a.dims if d != RANK and t.size(d) != 1}
            if not inputs or inputs & {*contraction.summed}:
                self._check_whole(t)
                h = contraction.met(self, t, lax.stop_gradient(x), y)
                y = _watched(h, t.filled([d for d, _ in t.window]).b, y)
        return y

    def _check_whole(self, t: Term) -> None:
        """Raises where a part of the inputs is met: it has not the products with the rest."""
        sizes = dict(zip(t.a.dims, t.a.array.shape, strict=True))
        n = sizes.pop(RANK)
        met = math.prod(sizes.values())
        if met < n:
            raise Unfactorable(f"it meets {met} of {n} inputs")
        split = {axis for d, axis in self.sharded if d in t.a.dims or d not in t.b.dims}
        split = {axis for axis in split if lax.axis_size(axis) > 1}
        if split:
            raise Unfactorable(f"a shard_map splits it over {', '.join(sorted(split))}")


def _watched(h: Labelled, c: Labelled, y: Any) -> Any:
    """y, such that the gradient with respect to c is what h adds to the sums, whatever y's is."""
    stacked = [d for d in c.dims if d != RANK]
    axes = {d: k for k, d in enumerate(h.dims)}
    h = Labelled(h.array.astype(jnp.float32), h.dims)
    shared = [d for d in stacked if d in h.dims]
    others = [d for d in h.dims if d not in (*shared, RANK)]

    def sums(h: Labelled) -> jax.Array:
        count = math.prod(h.array.shape[axes[d]] for d in others)
        total = jnp.sum(h.array, [axes[d] for d in others])
        total = lax.transpose(
            total, [[d for d in h.dims if d not in others].index(d) for d in (*shared, RANK)]
        )
        twin = Labelled(h.array, tuple(RANK - 1 if d == RANK else d for d in h.dims))
        second = contract(h, twin, [*shared, RANK, RANK - 1], lax.Precision.HIGHEST).array
        counts = jnp.full((*total.shape[:-1], 1), count, jnp.float32)
        found = jnp.concatenate([counts, total, second.reshape(*total.shape[:-1], -1)], axis=-1)
        # Layers that share one activation each see all of it.
        found = jnp.expand_dims(found, [k for k, d in enumerate(stacked) if d not in shared])
        at = c.dims.index(RANK)
        return jnp.moveaxis(jnp.broadcast_to(found, _last(c.array.shape, at)), -1, at)

    @jax.custom_vjp
    def watch(y: Any, c: Any, h: Any) -> Any:
        return y

    def forward(y: Any, c: Any, h: Any) -> Any:
        return y, h

    def backward(array: Any, ct: Any) -> Any:
        return ct, sums(Labelled(array, h.dims)), jnp.zeros_like(array)

    watch.defvjp(forward, backward)
    return watch(y, c.array, h.array)


def _last(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    """A shape with one axis moved to the end."""
    return (*shape[:axis], *shape[axis + 1 :], shape[axis])
