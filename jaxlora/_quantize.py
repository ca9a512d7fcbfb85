"""`quantize` and what goes with it: a base in 4 or 8 bits, that stays in them while it is used."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlora import _paths
from jaxlora._errors import RolesError, TargetError
from jaxlora._init import (
    check_shared,
    find_targets,
    is_below,
    is_looked_up,
    no_match,
    select,
)
from jaxlora._matrix import dims_of, leading_stacked
from jaxlora._quantized import as_before, dense, is_quantized
from jaxlora._quantized_array import KINDS, QuantizedArray, quantize_array
from jaxlora._roles import TracedRoles
from jaxlora._target import known
from jaxlora._tree import map_nodes, merged_weight
from jaxlora._weight import FullWeight, LoraWeight, check_roles, is_node


def quantize(
    tree: Any,
    targets: _paths.Pattern | None = None,
    exclude: _paths.Pattern | None = None,
    kind: str = "nf4",
    block_size: int | None = 64,
    double_quant: bool = True,
    *,
    roles: Mapping[str, str] | None = None,
    donate: bool = False,
) -> Any:
    r"""The same tree with weights in 4 or 8 bits: QLoRA's base.

    Each block of `block_size` consecutive elements of a weight is divided by its absmax, and each
    quotient is kept as the code of the nearest of 16 values (256 in int8). With double
    quantization the absmaxes are kept in 8 bits as well. With nf4, block_size 64 and double
    quantization that is 0.516 bytes a parameter, 0.5 + 1/64 + 4/(64 * 256).

    Blocks run along a weight's inputs, as its roles have them, which is what bitsandbytes does to
    the same layer of PyTorch, whose weight is (out, in). Those of an embedding that is looked up
    run along its rows, also as there; those of a weight without roles along its last dim.

    `lora_apply(fn)` takes the result where `fn` takes params: a use of a weight decodes it, and the
    backward pass decodes it again, so that the decoded weights are never there as a whole. Weights
    without adapters may be quantized too. Stacked weights (scanned layers, experts) are quantized
    one by one. Leaves are quantized one after another.

    Args:
      tree: params, or a `lora` tree, before or after training.
      targets: which weights, as in `LoraConfig`: a regex of the whole path, a sequence of names, a
        function of (path, leaf), or "all-linear" with traced `roles`. None, on a `lora` tree: the
        bases of all its adapters.
      exclude: which to leave out, for instance ["lm_head", "classifier"].
      kind: "nf4" (values spaced as the quantiles of a normal distribution), "fp4" (a 4-bit float),
        or "int8" (evenly spaced).
      block_size: elements that share an absmax; an even number in 4 bits. None, with "int8": one
        absmax for each output of the weight.
      double_quant: whether the absmaxes of blocks are quantized too.
      roles: {path: roles} of weights of three and more dimensions that have no adapter, and with
        `block_size=None` of all but Flax's two-dimensional `kernel`s and `embedding`s; best
        `jaxlora.trace_roles(fn, params, *args)`.
      donate: delete each float weight once it is quantized, so that there is never a second copy
        of the model. The tree that was given cannot be used after that. An array that is also
        elsewhere in the tree, where it stays a float, is kept.

    Returns:
      The tree with a `QuantizedArray` in place of each weight that was found.

    Raises:
      TargetError: a pattern that matches nothing; a leaf that is quantized already, is not
        floating-point, is trained in full, or is a vector; NaN or infinity in a weight (under
        `jit`, where values cannot be seen, they give NaN); an unknown kind or a block size that
        does not fit it.
      RolesError: a weight without roles that needs them (see `roles`).

    >>> params = {"kernel": jnp.ones((64, 128)), "head": jnp.ones((128, 10))}
    >>> quantize(params, ["kernel"])["kernel"]
    QuantizedArray(nf4, (64, 128) float32, blocks of 64, double)

    References:
      Dettmers et al. 2023, QLoRA, arXiv 2305.14314, section 3.
      Dettmers et al. 2022, LLM.int8(), arXiv 2208.07339, section 2.
    """
    _check_kind(kind, block_size)
    block_size = None if block_size is None else int(block_size)
    pairs, treedef = _paths.flatten_with_paths(tree, is_leaf=is_node)
    leaves = {path: leaf for path, leaf in pairs if hasattr(leaf, "shape")}
    adapted = [path for path, leaf in leaves.items() if isinstance(leaf, LoraWeight)]
    if targets is None:
        if not adapted:
            raise TargetError(
                "quantize: got params without adapters and no targets, expected to know which "
                'weights: jaxlora.quantize(params, targets=["kernel"]), or targets="all-linear" '
                "with roles=jaxlora.trace_roles(fn, params, *args)."
            )
        found = adapted
    else:
        found = find_targets(targets, leaves, roles)
    excluded = select(exclude, leaves, "exclude", is_below)
    chosen = [path for path in found if path not in excluded]
    if not chosen:
        raise TargetError(
            "quantize: every target is left out by `exclude`, expected at least one weight."
        )
    check_shared(tree, {*chosen})
    if roles is not None and not isinstance(roles, TracedRoles):
        for path in roles:
            if _paths.lookup(leaves, path) is None:
                raise no_match("roles", path, leaves)
    for path in chosen:  # all of them before the first is quantized, and perhaps deleted
        _check(path, leaves[path], double_quant)

    # What stays a float elsewhere in the tree (a tied weight, a FullWeight's w) is not donated.
    rest = [leaf for path, leaf in pairs if path not in chosen]
    staying = {id(x) for x in jax.tree.leaves(rest)}
    done: dict[int, QuantizedArray] = {}  # one array in two places is quantized once
    floats: dict[int, Any] = {}

    def place(path: str, leaf: Any) -> Any:
        if path not in chosen:
            return leaf
        w = leaf.w if isinstance(leaf, LoraWeight) else leaf
        if id(w) not in done:
            of = (
                leaf.roles
                if isinstance(leaf, LoraWeight)
                else _roles_of(path, w, roles, block_size is None)
            )
            lookup = is_looked_up(path, roles)
            done[id(w)] = _quantized(path, w, of, lookup, kind, block_size, double_quant)
            floats[id(w)] = w  # kept, so that no other array gets its id
            donated = donate and isinstance(w, jax.Array) and not isinstance(w, jax.core.Tracer)
            if donated and id(w) not in staying:
                jax.block_until_ready(done[id(w)])
                w.delete()
        q = done[id(w)]
        if not isinstance(leaf, LoraWeight):
            return q
        return dataclasses.replace(leaf, w=q, squared_norm=None)

    return jax.tree.unflatten(treedef, [place(path, leaf) for path, leaf in pairs])


def _quantized(
    path: str,
    w: Any,
    roles: str | None,
    lookup: bool,
    kind: str,
    block_size: int | None,
    double_quant: bool,
) -> QuantizedArray:
    w = jnp.asarray(w)
    # Each of a stack has its own absmax, also if the stacked dims are not the first.
    channels = None if roles is None else sorted(dims_of("o", roles) + dims_of("s", roles))
    return quantize_array(
        w,
        kind,
        block_size=block_size,
        double_quant=double_quant,
        stacked=0 if roles is None else leading_stacked(roles),
        channels=channels if block_size is None else None,
        along=None if roles is None or lookup else dims_of("i", roles),
    )


def _roles_of(path: str, w: Any, given: Mapping[str, str] | None, by_output: bool) -> str | None:
    """The roles of a weight without adapter, for which dims are stacked; None: no dim is."""
    found = _paths.lookup(given or {}, path)
    if found is not None:
        check_roles(found, w.shape, path)
        return found
    if len(w.shape) == 2 and _paths.leaf_name(path) in ("kernel", "embedding"):
        return "io"
    if len(w.shape) == 2 and not by_output:
        return None
    traced = isinstance(given, TracedRoles)
    why = "the traced function shows none that serve all of its uses" if traced else "got none"
    reason, example = "each element of a stack (layers, experts) is quantized by itself", "sio"
    if len(w.shape) == 2:
        reason, example = "block_size=None is one absmax for each output", "io"
    raise RolesError(
        f"{path}: {why}, expected roles for a weight of shape {tuple(w.shape)}, since "
        f"{reason}. Read them from the model, "
        "jaxlora.quantize(..., roles=jaxlora.trace_roles(fn, params, *args)), or say "
        f"roles={{{_paths.short(path)!r}: {example!r}}}; or leave it out: exclude=[...]."
    )


def _check_kind(kind: Any, block_size: Any) -> None:
    if kind not in KINDS:
        raise TargetError(f"quantize: got kind {kind!r}, expected one of {', '.join(KINDS)}.")
    if block_size is None:
        if kind != "int8":
            raise TargetError(
                f"quantize: got block_size None for {kind!r}, expected a number, for instance 64. "
                "One absmax for each output is for kind='int8'."
            )
        return
    whole = isinstance(block_size, numbers.Integral) and not isinstance(block_size, bool)
    if not whole or int(block_size) < 2 or (kind != "int8" and int(block_size) % 2):
        raise TargetError(
            f"quantize: got block_size {block_size!r} for {kind!r}, expected a number from 2 up, "
            "even in 4 bits, for instance 64."
        )


def _check(path: str, leaf: Any, double_quant: bool) -> None:
    name = _paths.short(path)
    if isinstance(leaf, FullWeight):
        raise TargetError(
            f"{path}: got a leaf that is trained in full, expected a frozen one. "
            f"Leave it out: jaxlora.quantize(..., exclude=[{name!r}])."
        )
    w = leaf.w if isinstance(leaf, LoraWeight) else leaf
    if is_quantized(w):
        raise TargetError(
            f"{path}: got a weight that is quantized already, {w!r}, expected floats. Leave it "
            f"out, exclude=[{name!r}], or start from jaxlora.dequantize(tree)."
        )
    if w.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise TargetError(
            f"{path}: got a leaf of dtype {w.dtype}, expected float32, bfloat16 or float16. "
            f"Leave it out: jaxlora.quantize(..., exclude=[{name!r}])."
        )
    if len(w.shape) < 2:
        raise TargetError(
            f"{path}: got a leaf of shape {tuple(w.shape)}, expected a weight of two or more "
            f"dimensions. Leave it out: jaxlora.quantize(..., exclude=[{name!r}])."
        )
    if isinstance(w, jax.ShapeDtypeStruct):
        raise TargetError(
            f"{path}: got a shape without data, expected an array. For the shapes of the result: "
            "jax.eval_shape(lambda params: jaxlora.quantize(params, ...), params)."
        )
    largest = _largest(np, w) if isinstance(w, np.ndarray) else known(partial(_largest, jnp), w)
    if largest is not None and not math.isfinite(largest):
        raise TargetError(
            f"{path}: got NaN or infinity in a weight, expected finite numbers: one of them would "
            "spoil all of its block. Where do the params come from?"
        )
    if double_quant and largest is not None and largest > jnp.finfo(jnp.float32).max / w.size:
        raise TargetError(
            f"{path}: got a weight of {largest:.3g}, expected numbers whose absmaxes have a finite "
            f"sum, since double quantization takes their mean. Leave it out, exclude=[{name!r}], "
            "or use double_quant=False."
        )


def _largest(numpy: Any, w: Any) -> Any:
    """Of the absolute values; infinity if one is NaN, which a maximum may lose on its way."""
    largest = numpy.max(numpy.abs(w), initial=0)
    return numpy.where(numpy.all(numpy.isfinite(w)), largest, numpy.inf)


def dequantize(tree: Any) -> Any:
    """The same tree, or half of one, with floats in place of quantized weights; adapters stay.

    >>> params = quantize({"kernel": jnp.ones((64, 128))}, ["kernel"])
    >>> dequantize(params)["kernel"].dtype
    dtype('float32')
    """
    return jax.tree.map(
        lambda leaf: dense(leaf) if is_quantized(leaf) else leaf, tree, is_leaf=is_quantized
    )


def merge_quantized(lora: Any) -> tuple[Any, dict[str, float]]:
    r"""Params with the adapters merged and each quantized base quantized again, and what that lost.

    The sum W + scale * a b is formed in float32, rounded once to W's dtype, and quantized as its
    base was. Rounding to 4 bits anew costs about what the first time did, which for a small
    adapter can be more than the adapter: look at the errors, or keep floats with `merge`.

    Args:
      lora: the tree.

    Returns:
      (params, errors): the params, and for each weight that was quantized again its relative
      error, ||quantized - merged|| / ||merged|| in the Frobenius norm.

    Raises:
      TargetError: a base quantized by another library.

    >>> from jaxlora import LoraConfig, init
    >>> params = {"kernel": jax.random.normal(jax.random.key(0), (64, 128))}
    >>> lora = quantize(init(jax.random.key(1), params, LoraConfig(targets=["kernel"])))
    >>> params, errors = merge_quantized(lora)
    >>> params["kernel"]
    QuantizedArray(nf4, (64, 128) float32, blocks of 64, double)
    >>> errors["kernel"] < 1e-3  # nothing was trained: the codes are the same
    True
    """
    errors: dict[str, Any] = {}

    def merged(path: str, leaf: Any) -> Any:
        if isinstance(leaf, FullWeight):
            return leaf.value
        if not isinstance(leaf, LoraWeight):
            return leaf
        w = merged_weight(leaf)
        if not is_quantized(leaf.w):
            return w
        q = as_before(w, leaf.w, path)
        errors[path] = relative_error(q, w)
        return q

    return map_nodes(merged, lora), errors


def relative_error(q: Any, w: Any) -> Any:
    """||q - w|| / ||w||, in float32; 0 where both are zero."""
    w = dense(w).astype(jnp.float32)
    lost = jnp.linalg.norm(jnp.ravel(dense(q).astype(jnp.float32) - w))
    size = jnp.linalg.norm(jnp.ravel(w))
    error = jnp.where(lost > 0, lost / size, 0)
    return error if isinstance(error, jax.core.Tracer) else float(error)


def prepare_for_training(tree: Any, dtype: Any = jnp.float32, max_size: int = 2**20) -> Any:
    """The same tree with norms, biases and other small leaves in float32.

    Rounding in a norm's scale or a bias is felt by all that follows, and their memory is small. So
    each leaf of at most `max_size` elements that is a narrower float, not quantized and without
    adapter is widened, and so is whatever trains in full. All else stays: nothing but adapters and
    leaves trained in full ever trains here, so that there is nothing to freeze. (For gradient
    checkpointing wrap the model's layers in `jax.checkpoint` or `nn.remat`.)

    A norm with a float32 scale gives float32 activations unless the model casts, as Flax's modules
    with `dtype=jnp.bfloat16` do.

    Args:
      tree: params, or a `lora` tree.
      dtype: of the small leaves.
      max_size: in elements.

    >>> params = {"kernel": jnp.ones((64, 128)), "scale": jnp.ones(128, jnp.bfloat16)}
    >>> prepare_for_training(quantize(params, ["kernel"]))["scale"].dtype
    dtype('float32')

    References:
      PEFT's `prepare_model_for_kbit_training`, which widens every leaf that is not quantized,
      embeddings and heads too: `max_size=2**40`.
    """

    def widened(leaf: Any) -> Any:
        narrow = hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)
        narrow = narrow and jnp.dtype(leaf.dtype).itemsize < jnp.dtype(dtype).itemsize
        return jnp.asarray(leaf, dtype) if narrow and not is_quantized(leaf) else leaf

    def prepared(path: str, leaf: Any) -> Any:
        if isinstance(leaf, FullWeight):
            return FullWeight(w=widened(leaf.w), value=widened(leaf.value))
        if isinstance(leaf, LoraWeight) or not hasattr(leaf, "size") or leaf.size > max_size:
            return leaf
        return widened(leaf)

    return map_nodes(prepared, tree)
