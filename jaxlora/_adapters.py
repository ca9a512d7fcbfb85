"""Adapter arithmetic: several adapters of one base as one, and an adapter times a factor."""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp

from jaxlora import _merging, _paths
from jaxlora._alike import base_of, check_alike, differing
from jaxlora._errors import TargetError
from jaxlora._low_rank import check_rank
from jaxlora._tree import map_nodes
from jaxlora._weight import FullWeight, is_node

Method: TypeAlias = Literal[
    "cat",
    "linear",
    "svd",
    "ties",
    "ties_svd",
    "dare_linear",
    "dare_linear_svd",
    "dare_ties",
    "dare_ties_svd",
    "magnitude_prune",
    "magnitude_prune_svd",
]
MajoritySign: TypeAlias = Literal["total", "frequency"]


def weighted_sum(
    loras: Sequence[Any],
    weights: Any,
    method: Method = "cat",
    *,
    rank: int | None = None,
    density: float | None = None,
    majority_sign: MajoritySign = "total",
    key: jax.Array | None = None,
) -> Any:
    r"""Several adapters of one base as a single one, by the formulas of PEFT's.

    With adapter i's scale s_i, weight c_i and factors a_i, b_i, at each weight of the model:

        cat           a = [c_1 s_1 a_1, c_2 s_2 a_2, ...],  b = [b_1; b_2; ...]
        linear        a = sum_i sign(c_i s_i) |c_i s_i|^(1/2) a_i,  b = sum_i |c_i s_i|^(1/2) b_i
        svd           a b = the best of the given rank to D = sum_i c_i D_i,  D_i = s_i a_i b_i

    `cat` is the exact sum sum_i c_i D_i, of rank sum_i r_i, and `svd` its best approximation.
    `linear` is cheap and rough: with it come the products a_i b_j of different adapters. The
    others thin each tensor t_i out before they add, with its weight c_i (as in `linear`), and
    d the density:

        magnitude_prune   keep the floor(d n) largest of the n elements of t_i, by magnitude; add
        ties              the same; then elect each element's sign, that of sum_i t_i (or of
                          sum_i sign(t_i): `majority_sign="frequency"`; + for 0), and average the
                          c_i t_i of that sign
        dare_linear       keep each element with probability d, divided by d; add
        dare_ties         the same; then as `ties`

    They do so to a_i and to b_i, and with `_svd` to D_i, of which an SVD then gives a and b. A
    matrix of a stacked weight (a layer, an expert) is thinned out by itself, as modules are in
    PEFT. Adapters may be on different weights: each takes part where it is. A `FullWeight` becomes
    w + sum_i c_i (value_i - w), or what the method makes of these differences, as one tensor.

    The results have scale 1 in every case; a and b carry all of it. (PEFT 0.21 gives
    rank-stabilized ones the scale sqrt(r): its sums come out sqrt(r) times too large. It also
    falls back to `linear` for one adapter; here the method is always applied.) Factors from an SVD
    are split evenly, a = U sqrt(S), where PEFT's a is orthonormal: the product is the same.

    Args:
      loras: trees with adapters, on one base; values too are compared where they are known.
      weights: c, one number for each; negative too (task negation). May be traced.
      method: see above.
      rank: of the result, for `svd` and `_svd` alone; None: the largest at that weight. Zero-padded
        where a weight has fewer inputs or outputs.
      density: d in (0, 1], for the methods that thin out. 1 keeps everything.
      majority_sign: how `ties` elects signs: by their "total" mass, or by "frequency".
      key: for `dare`: each path derives a key of its own.

    Returns:
      A lora tree on the base of the first, with no dropout keys and the first's dropout rates; a
      and b in the dtype of a, computed in float32 or wider.

    Raises:
      TargetError: adapters of different bases (naming the paths); unequal ranks where factors are
        added elementwise; a weight with DoRA's magnitude, whose value is not linear in a and b
        (the `svd` methods take it, through `delta`); one adapter that trains a weight in full where
        another has factors; numbers that the method needs, does not use, or that are out of range.

    >>> from jaxlora import LoraConfig, init, merge
    >>> config = LoraConfig(rank=2, targets=["kernel"])
    >>> params = {"kernel": jnp.ones((3, 4))}
    >>> first, second = (init(jax.random.key(k), params, config) for k in (0, 1))
    >>> weighted_sum([first, second], [0.5, 0.5])["kernel"].rank
    4

    References:
      Ilharco et al. 2022, Editing Models with Task Arithmetic, arXiv 2212.04089, section 2.
      Yadav et al. 2023, TIES-Merging, arXiv 2306.01708, section 4.
      Yu et al. 2023, Language Models are Super Mario (DARE), arXiv 2311.03099, section 3.
      Hu et al. 2021, LoRA, arXiv 2106.09685, section 4.1.
      Liu et al. 2024, DoRA, arXiv 2402.09353, section 4.
    """
    loras = list(loras)
    how = _check_options(method, rank, density, majority_sign, key)
    weights = _check_weights(weights, len(loras))
    _check_bases(loras)

    def summed(path: str, leaf: Any) -> Any:
        here = [(lora[path], c) for lora, c in zip(leaves, weights, strict=True)]
        nodes = [node for node, _ in here if is_node(node)]
        if not nodes:
            return leaf
        job = _merging.Job(
            path=path,
            nodes=nodes,
            weights=[c for node, c in here if is_node(node)],
            name=method,
            method=how,
            rank=rank,
            density=density,
            majority_sign=majority_sign,
            key=None if key is None else _paths.key_of(key, path),
        )
        kinds = {type(node) for node in nodes}
        if len(kinds) > 1:
            raise TargetError(
                f"{path}: got an adapter that trains it in full and one that adapts it, expected "
                "one kind. Make both low-rank: jaxlora.extract(base, jaxlora.merge(lora), config)."
            )
        if kinds == {FullWeight}:
            return _merging.sum_full(job, base_of(leaf))
        return _merging.sum_lora(job, base_of(leaf))

    leaves = [dict(_paths.flatten_with_paths(lora, is_leaf=is_node)[0]) for lora in loras]
    return map_nodes(summed, loras[0])


def scaled(lora: Any, factor: Any) -> Any:
    r"""The adapters times a factor, relative to their present strength.

        W + scale * a b  ->  W + factor * scale * a b,    value  ->  w + factor * (value - w)

    Negative factors negate what was learnt; 0 is the base. To set alpha / rank itself, whatever it
    is now, and for adapters alone: `with_scale`.

    Args:
      lora: the tree.
      factor: a number or a scalar array; traced too, so that it can be swept with vmap.

    Raises:
      TargetError: a factor that is not a scalar; a weight with DoRA's magnitude, unless the factor
        is 1.

    >>> from jaxlora import LoraConfig, init
    >>> config = LoraConfig(rank=2, alpha=8, targets=["kernel"])
    >>> lora = init(jax.random.key(0), {"kernel": jnp.ones((3, 4))}, config)
    >>> float(lora["kernel"].scale), float(scaled(lora, -0.5)["kernel"].scale)
    (4.0, -2.0)

    References:
      Ilharco et al. 2022, Editing Models with Task Arithmetic, arXiv 2212.04089, section 2:
      forgetting by negation, and the factor of a task vector.
    """
    if jnp.shape(factor):
        raise TargetError(
            f"scaled: got a factor of shape {jnp.shape(factor)}, expected a scalar; for several, "
            "jax.vmap(lambda f: ...jaxlora.scaled(lora, f))(factors)."
        )
    known_one = not isinstance(factor, jax.core.Tracer) and bool(factor == 1)

    def multiplied(path: str, leaf: Any) -> Any:
        if not is_node(leaf) or known_one:
            return leaf
        if isinstance(leaf, FullWeight):
            return _merging.moved(leaf, leaf.w, factor * _merging.difference(leaf))
        if leaf.magnitude is not None:
            raise TargetError(
                f"{path}: got a factor of {factor} for a weight with DoRA's magnitude, expected 1, "
                "since its value is not linear in a and b. Make it a plain adapter first: "
                "jaxlora.extract(base, jaxlora.merge(lora), config), without dora, and of a larger "
                "rank, since the difference is not of low rank."
            )
        scale = jnp.asarray(leaf.scale * factor, jnp.float32)
        return dataclasses.replace(leaf, scale=scale)

    return map_nodes(multiplied, lora)


# --------------------------------------------------------------------------------------------------
# What is refused


def _check_options(
    method: str, rank: Any, density: Any, majority_sign: str, key: jax.Array | None
) -> _merging.Method:
    if method not in _merging.METHODS:
        raise TargetError(
            f"weighted_sum: got method {method!r}, expected one of {', '.join(_merging.METHODS)}. "
            "For the exact sum: method='cat'."
        )
    how, what = _merging.METHODS[method], f"weighted_sum(..., method={method!r})"
    if rank is not None:
        if not how.takes_rank:
            raise TargetError(
                f"{what}: got rank={rank!r}, expected none, since only the svd methods choose a "
                "rank. Take method='svd', or jaxlora.truncate(result, rank)."
            )
        check_rank(rank, what)
    if not how.takes_density:
        if density is not None:
            raise TargetError(
                f"{what}: got density={density!r}, expected none, since it keeps every element. "
                "Those that thin out are ties, dare_linear, dare_ties and magnitude_prune."
            )
    elif (
        isinstance(density, bool)
        or not isinstance(density, numbers.Real)
        or not 0 < float(density) <= 1
    ):
        raise TargetError(
            f"{what}: got density={density!r}, expected a number in (0, 1]: the part of the "
            "elements to keep, for instance density=0.5."
        )
    if how.takes_key and key is None:
        raise TargetError(
            f"{what}: got no key, expected one, since it drops elements at random: "
            "key=jax.random.key(0)."
        )
    if majority_sign not in get_args(MajoritySign):
        raise TargetError(
            f"{what}: got majority_sign {majority_sign!r}, expected 'total' or 'frequency'."
        )
    return how


def _check_weights(weights: Any, count: int) -> list[jax.Array]:
    weights = jnp.asarray(weights)
    if not count or weights.shape != (count,):
        raise TargetError(
            f"weighted_sum: got {count} adapters and weights of shape {weights.shape}, expected at "
            "least one adapter and a number for each: weighted_sum([one, two], [0.5, 0.5])."
        )
    return list(weights)


def _check_bases(loras: list[Any]) -> None:
    for k, lora in enumerate(loras):
        what = f"weighted_sum: loras[{k}]"
        if not any(map(is_node, jax.tree.leaves(lora, is_leaf=is_node))):
            raise TargetError(
                f"{what}: got a tree without adapters, expected one from jaxlora.init. Of a tuned "
                "model: jaxlora.extract(base, tuned, config)."
            )
        map_nodes(lambda _, leaf: leaf, lora)  # which checks that they are whole
        check_alike(lora, loras[0], what, "Make all adapters with jaxlora.init on one base.")
        odd = differing(lora, loras[0])
        if odd:
            raise TargetError(
                f"{what}: got a base with other values than that of loras[0], expected one base, "
                f"since an adapter is a difference to it. They differ at:{_paths.listing(odd)}\n"
                "If its initializer moved it: jaxlora.rebase(lora, initial, params). For another "
                "model on this base: jaxlora.extract(base, jaxlora.merge(lora), config)."
            )
