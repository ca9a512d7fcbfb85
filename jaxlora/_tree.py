"""What can be done with a `lora` tree: halves, masks, merging, counting. All pure."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlora import _paths
from jaxlora._errors import TargetError
from jaxlora._quantized import dense, is_quantized
from jaxlora._weight import FullWeight, LoraWeight, check_rate, delta, is_node


def map_nodes(f: Callable[[str, Any], Any], lora: Any) -> Any:
    """f(path, leaf or node) over a tree; nodes are checked first."""
    pairs, treedef = _paths.flatten_with_paths(lora, is_leaf=is_node)
    for path, leaf in pairs:
        if is_node(leaf):
            leaf.check(path)
    return jax.tree.unflatten(treedef, [f(path, leaf) for path, leaf in pairs])


def merge(lora: Any) -> Any:
    r"""Plain params again: W + scale * sum_r a b in place of each `LoraWeight`.

    Computed in float32 (float64 for float64 params) and rounded once to W's dtype. A `FullWeight`
    gives its value, a quantized weight is dequantized. The input is not changed.

    >>> from jaxlora import LoraConfig, init
    >>> params = {"kernel": jnp.ones((3, 4))}
    >>> lora = init(jax.random.key(0), params, LoraConfig(rank=2, targets=["kernel"]))
    >>> bool(jnp.all(merge(lora)["kernel"] == params["kernel"]))
    True

    References:
      Hu et al. 2021, LoRA, arXiv 2106.09685, section 4.1 ("no additional inference latency").
    """

    def merged(path: str, leaf: Any) -> Any:
        if isinstance(leaf, FullWeight):
            return leaf.value
        if isinstance(leaf, LoraWeight):
            return merged_weight(leaf)
        return dense(leaf) if is_quantized(leaf) else leaf

    return map_nodes(merged, lora)


def merged_weight(lw: LoraWeight) -> jax.Array:
    """The value of a weight, in W's dtype."""
    wide = delta(lw)
    return (dense(lw.w).astype(wide.dtype) + wide).astype(lw.dtype)


def base_params(lora: Any) -> Any:
    """The params that `init` was given, untouched: LoRA off.

    After an initializer that moves the base (`pissa`, say), the moved ones: LoRA off is then
    `base_params(rebase(lora, initial, params))`.

    >>> from jaxlora import LoraConfig, init
    >>> params = {"kernel": jnp.ones((3, 4))}
    >>> lora = init(jax.random.key(0), params, LoraConfig(rank=2, targets=["kernel"]))
    >>> base_params(lora)["kernel"] is params["kernel"]
    True
    """
    return map_nodes(lambda _, leaf: leaf.w if is_node(leaf) else leaf, lora)


def with_base(lora: Any, params: Any) -> Any:
    """The same adapters on other base params: of another precision, moved, or tuned on.

    What is kept of the base beside it, the norm that DoRA needs, is computed anew. A `FullWeight`
    keeps its value.

    Args:
      lora: the tree.
      params: of the same structure and shapes as `base_params(lora)`.

    Raises:
      TargetError: another structure, or other shapes.

    >>> from jaxlora import LoraConfig, init
    >>> params = {"kernel": jnp.ones((3, 4))}
    >>> lora = init(jax.random.key(0), params, LoraConfig(rank=2, targets=["kernel"], dora=True))
    >>> half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    >>> with_base(lora, half)["kernel"].dtype
    dtype(bfloat16)
    """
    pairs, treedef = _paths.flatten_with_paths(lora, is_leaf=is_node)
    others, _ = _paths.flatten_with_paths(params)
    if [path for path, _ in pairs] != [path for path, _ in others]:
        odd = sorted({path for path, _ in pairs} ^ {path for path, _ in others})
        raise TargetError(
            "with_base: got params of another structure, expected that of "
            f"jaxlora.base_params(lora). They differ at:{_paths.listing(odd)}"
        )

    def based(path: str, leaf: Any, w: Any) -> Any:
        if not is_node(leaf):
            return w
        if tuple(w.shape) != leaf.shape:
            raise TargetError(
                f"{path}: got a base of shape {tuple(w.shape)}, expected {leaf.shape}, that of "
                "the adapter's. Make an adapter for these params with jaxlora.init."
            )
        if isinstance(leaf, FullWeight):
            return dataclasses.replace(leaf, w=w)
        return dataclasses.replace(leaf, w=w, squared_norm=None)

    both = zip(pairs, others, strict=True)
    return jax.tree.unflatten(treedef, [based(path, leaf, w) for (path, leaf), (_, w) in both])


def with_scale(lora: Any, scale: Any) -> Any:
    """The same adapters at another strength: 0 is the base, alpha / rank what was trained.

    It sets the scale itself, and leaves a `FullWeight` alone. To multiply what adapters and leaves
    trained in full add, relative to their present strength: `scaled(lora, factor)`.

    A DoRA weight keeps its magnitude: at scale 0 it is W with the columns' norms changed. For the
    base take `base_params(lora)`.

    Args:
      lora: the tree.
      scale: a number or a scalar array; traced too, so that strengths can be swept with vmap.

    >>> from jaxlora import LoraConfig, init
    >>> params = {"kernel": jnp.ones((3, 4))}
    >>> lora = init(jax.random.key(0), params, LoraConfig(rank=2, targets=["kernel"]))
    >>> float(with_scale(lora, 0.5)["kernel"].scale)
    0.5
    """

    def scaled(path: str, leaf: Any) -> Any:
        if not isinstance(leaf, LoraWeight):
            return leaf
        value = jnp.broadcast_to(jnp.asarray(scale, jnp.float32), jnp.shape(leaf.scale))
        return dataclasses.replace(leaf, scale=value)

    return map_nodes(scaled, lora)


def with_dropout(lora: Any, key: jax.Array | None, rate: float | None = None) -> Any:
    r"""The same tree with a random key in each adapter, so that the next call drops.

    Where a weight then meets an activation x, its adapter sees

        drop(x) = x * keep / (1 - rate),    keep ~ Bernoulli(1 - rate), elementwise,

    in y = x W + ((drop(x) a) * scale) b. Each adapter, each layer of a stack, each use of a weight
    and each step of a loop draws a mask of its own; equal keys give equal masks, under jit, scan,
    remat and vmap too, and also if `jit` or `remat` is put around layers of the model. (What counts
    is which of the model's matmuls and loops a use is: a layer put before it, or layers unrolled
    that were scanned, do change its masks; and `vmap` over rbg keys differs in JAX itself.)
    Looked-up rows (embeddings), matmuls with the transposed weight (a tied head) and what
    `materialize="allow"` forms drop nothing; a matmul of one-hot rows is a matmul. With DoRA,

        y = x W + (m / n - 1) (drop(x) W) + (m / n) ((drop(x) a) * scale) b.

    Call it within the loss, on the whole tree, with a new key each step; leave it out to evaluate.
    In a shard_map of the model, shards of an activation draw their own masks if it is typed as
    varying (`check_vma=True`, the default). Elsewhere (`check_vma=False`, pmap) fold the device's
    index into the key. A gradient that the model takes itself (a force, a penalty) is refused,
    since its two passes would not see the same mask: take it outside of `lora_apply`.

    Args:
      lora: the tree.
      key: a key, new or old style; None takes the keys out again.
      rate: which part to drop, in [0, 1), for all adapters; None: `LoraConfig.dropout`. With rate 0
        no key is attached: the path without dropout, exactly.

    Raises:
      TargetError: a rate outside of [0, 1); a key that is not a single one; (from `lora_apply`) a
        gradient within the function.

    >>> from jaxlora import LoraConfig, init, lora_apply
    >>> config = LoraConfig(rank=2, targets=["kernel"], dropout=0.5)
    >>> lora = init(jax.random.key(0), {"kernel": jnp.ones((3, 4))}, config)
    >>> apply = lora_apply(lambda params, x: x @ params["kernel"])
    >>> apply(with_dropout(lora, jax.random.key(1)), jnp.ones((5, 3))).shape
    (5, 4)

    References:
      Srivastava et al. 2014, Dropout, JMLR 15, section 4, scaled at training time; PEFT's
      `lora_dropout`.
      Liu et al. 2024, DoRA, arXiv 2402.09353.
    """
    if rate is not None:
        check_rate(rate, "with_dropout")
    if key is not None:
        if not hasattr(key, "dtype"):
            raise TargetError(
                f"with_dropout: got a key of type {type(key).__name__}, expected a random key: "
                "jaxlora.with_dropout(lora, jax.random.key(0))."
            )
        if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
            key = jax.random.wrap_key_data(key)
        if key.shape:
            raise TargetError(
                f"with_dropout: got keys of shape {key.shape}, expected a single key; for many "
                "adapters, jax.vmap(jaxlora.with_dropout)(loras, keys)."
            )

    def keyed(path: str, leaf: Any) -> Any:
        if not isinstance(leaf, LoraWeight):
            return leaf
        own = leaf.dropout if rate is None else float(rate)
        if key is None or own == 0:
            return dataclasses.replace(leaf, dropout_key=None, dropout=own)
        mine = _paths.key_of(key, path)
        stacked = leaf.scale.shape
        keys = jax.random.split(mine, stacked) if stacked else mine
        return dataclasses.replace(leaf, dropout_key=keys, dropout=own)

    if not any(isinstance(x, LoraWeight) for x in jax.tree.leaves(lora, is_leaf=is_node)):
        raise TargetError(
            "with_dropout: got a tree without adapters, expected one from jaxlora.init: "
            "jaxlora.with_dropout(jaxlora.combine(trainable, frozen), key)."
        )
    return map_nodes(keyed, lora)


_TRAIN = {LoraWeight: {"a", "b", "magnitude"}, FullWeight: {"value"}}


def trainable_mask(lora: Any) -> Any:
    """A tree of bools, True where something trains.

    That is `a`, `b` and the magnitude of a `LoraWeight`, and the value of a `FullWeight`.

    >>> from jaxlora import LoraConfig, init
    >>> params = {"kernel": jnp.ones((3, 4)), "bias": jnp.ones(4)}
    >>> mask = trainable_mask(init(jax.random.key(0), params, LoraConfig(targets=["kernel"])))
    >>> mask["bias"], mask["kernel"].w, mask["kernel"].a
    (False, False, True)
    """

    def mask(leaf: Any) -> Any:
        if not is_node(leaf):
            return False
        trains = _TRAIN[type(leaf)]
        return jax.tree_util.tree_map_with_path(lambda keys, _: keys[0].name in trains, leaf)

    return jax.tree.map(mask, lora, is_leaf=is_node)


def partition(lora: Any) -> tuple[Any, Any]:
    """(trainable, frozen): the same tree twice, None where the other half has the leaf.

    `jax.grad` with respect to the trainable half computes no gradient of the base.

    >>> from jaxlora import LoraConfig, init
    >>> params = {"kernel": jnp.ones((3, 4))}
    >>> lora = init(jax.random.key(0), params, LoraConfig(targets=["kernel"]))
    >>> trainable, frozen = partition(lora)
    >>> trainable["kernel"].w is None, frozen["kernel"].a is None
    (True, True)
    """

    def half(trains: bool) -> Any:
        def kept(leaf: Any) -> Any:
            names = _TRAIN.get(type(leaf))
            if names is None:
                return None if trains else leaf
            return jax.tree_util.tree_map_with_path(
                lambda keys, x: x if (keys[0].name in names) == trains else None,
                leaf,
                is_leaf=is_quantized,
            )

        return jax.tree.map(kept, lora, is_leaf=lambda x: is_node(x) or is_quantized(x))

    return half(True), half(False)


def combine(trainable: Any, frozen: Any) -> Any:
    """Rejoins the halves that `partition` made.

    Raises:
      TargetError: the halves are not of one tree.

    >>> from jaxlora import LoraConfig, init
    >>> params = {"kernel": jnp.ones((3, 4))}
    >>> lora = init(jax.random.key(0), params, LoraConfig(targets=["kernel"]))
    >>> combine(*partition(lora))["kernel"].w is params["kernel"]
    True
    """
    halves: list[dict[str, Any]] = [
        dict(_paths.flatten_with_paths(half, is_leaf=lambda x: x is None)[0])
        for half in (trainable, frozen)
    ]
    if halves[0].keys() != halves[1].keys():
        odd = [
            f"{path} (only in the {name} half)"
            for name, mine, other in (
                ("trainable", halves[0], halves[1]),
                ("frozen", halves[1], halves[0]),
            )
            for path in mine.keys() - other.keys()
        ]
        raise TargetError(
            f"combine: got halves of two different trees, expected both from one "
            f"jaxlora.partition(lora). They differ at:{_paths.listing(sorted(odd))}"
        )
    both = [p for p in halves[0] if halves[0][p] is not None and halves[1][p] is not None]
    if both:
        raise TargetError(
            "combine: got leaves that both halves have, expected None in one of them: "
            f"(trainable, frozen) = jaxlora.partition(lora). They are:{_paths.listing(both)}"
        )
    try:
        joined = jax.tree.map(
            lambda t, f: f if t is None else t, trainable, frozen, is_leaf=lambda x: x is None
        )
    except ValueError as error:  # other containers, or other roles
        raise TargetError(
            "combine: got halves of two different trees, expected both from one "
            f"jaxlora.partition(lora). {error}"
        ) from None
    return map_nodes(lambda _, leaf: leaf, joined)  # which checks that they fit


class ParamCount(NamedTuple):
    """Numbers of parameters.

    Attributes:
      trainable: what trains.
      base: the params without adapters.
      total: base and adapters; a leaf trained in full counts once.
    """

    trainable: int
    base: int
    total: int

    @property
    def percent(self) -> float:
        """100 * trainable / base: what the adapter adds, or tunes, relative to the base."""
        return 100 * self.trainable / max(1, self.base)


def _count(leaf: Any) -> ParamCount:
    if isinstance(leaf, LoraWeight):
        adapter = sum(math.prod(x.shape) for x in (leaf.a, leaf.b, leaf.magnitude) if x is not None)
        base = math.prod(leaf.shape)
        return ParamCount(adapter, base, base + adapter)
    # A module's functions and numbers (Equinox, a dict of settings) are no parameters.
    size = math.prod(leaf.shape) if hasattr(leaf, "shape") else 0
    return ParamCount(size if isinstance(leaf, FullWeight) else 0, size, size)


def count_params(lora: Any) -> ParamCount:
    """How many parameters train, and how many there are.

    >>> from jaxlora import LoraConfig, init
    >>> params = {"kernel": jnp.ones((30, 40))}
    >>> count_params(init(jax.random.key(0), params, LoraConfig(rank=2, targets=["kernel"])))
    ParamCount(trainable=140, base=1200, total=1340)
    """
    counts = jax.tree.leaves(
        map_nodes(lambda _, leaf: _count(leaf), lora), is_leaf=lambda x: isinstance(x, ParamCount)
    )
    return ParamCount(*(sum(column) for column in zip(*counts, strict=True)))


def summary(lora: Any) -> str:
    """A table of what trains and how: LoRA, DoRA or in full.

    Then the totals, and dropout and quantized weights if there are any.

    >>> from jaxlora import LoraConfig, init
    >>> params = {"kernel": jnp.ones((30, 40)), "bias": jnp.ones(40)}
    >>> print(summary(init(jax.random.key(0), params, LoraConfig(rank=2, targets=["kernel"]))))
    path    shape     trains  roles  rank  scale  parameters
    kernel  (30, 40)  LoRA    io        2      1         140
    140 of 1,240 parameters train (11.290%); 1 leaf is frozen
    """
    rows = [("path", "shape", "trains", "roles", "rank", "scale", "parameters")]
    total = count_params(lora)
    pairs, _ = _paths.flatten_with_paths(lora, is_leaf=is_node)
    for path, leaf in pairs:
        count = f"{_count(leaf).trainable:,}"
        if isinstance(leaf, LoraWeight):
            kind = "LoRA" if leaf.magnitude is None else "DoRA"
            how = kind, leaf.roles, str(leaf.rank), _scale_text(leaf.scale)
        elif isinstance(leaf, FullWeight):
            how = "in full", "", "", ""
        else:
            continue
        rows.append((path, str(leaf.shape), *how, count))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if k < 4 else cell.rjust(width)
            for k, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    frozen = sum(hasattr(leaf, "shape") and not is_node(leaf) for _, leaf in pairs)
    lines.append(
        f"{total.trainable:,} of {total.base:,} parameters train ({total.percent:.3f}%); "
        f"{frozen} {'leaf is' if frozen == 1 else 'leaves are'} frozen"
    )
    dropping = [x for _, x in pairs if isinstance(x, LoraWeight) and x.dropout]
    if dropping:
        rates = ", ".join(f"{rate:g}" for rate in sorted({x.dropout for x in dropping}))
        off = all(x.dropout_key is None for x in dropping)
        lines.append(
            f"dropout {rates}: {'off; with_dropout(lora, key) turns it on' if off else 'on'}"
        )
    bases = [x.w if is_node(x) else x for _, x in pairs]
    quantized = [w for w in bases if is_quantized(w)]
    if quantized:
        kinds = sorted({str(getattr(w, "kind", type(w).__name__)) for w in quantized})
        nbytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(quantized))
        each = nbytes / max(1, sum(math.prod(w.shape) for w in quantized))
        are = "weight is" if len(quantized) == 1 else "weights are"
        lines.append(
            f"{len(quantized)} {are} quantized ({', '.join(kinds)}): {nbytes:,} bytes, {each:.3f} "
            "a parameter"
        )
    return "\n".join(lines)


def _scale_text(scale: Any) -> str:
    if isinstance(scale, jax.core.Tracer | jax.ShapeDtypeStruct) or scale.size == 0:
        return "?"
    low, high = float(scale.min()), float(scale.max())
    return f"{low:g}" if low == high else f"{low:g}..{high:g}"
