"""`init`: finds the targets, their roles, and puts the nodes where the leaves stood."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxlora import _paths
from jaxlora._config import ALL_LINEAR, LoraConfig
from jaxlora._errors import RolesError, TargetError
from jaxlora._matrix import split_shape
from jaxlora._quantized import dense
from jaxlora._roles import LOOKUP, OTHER, TracedRoles, agree, swapped
from jaxlora._target import Target
from jaxlora._weight import (
    FullWeight,
    LoraWeight,
    check_roles,
    is_node,
    with_magnitude,
)

_IO_NAMES = ("kernel", "embedding")  # Flax's own names for (in, out) matrices
_BIAS_NAMES = ("bias", "b")


def init(
    key: jax.Array,
    params: Any,
    config: LoraConfig,
    *,
    roles: Mapping[str, str] | None = None,
) -> Any:
    """Puts an adapter on every target of `params`.

    Each target leaf W is replaced by a `LoraWeight(w=W, a, b, scale)`, and each leaf that the
    config trains in full by a `FullWeight(w=W, value=W)`; all others stay. With the default
    initializer b = 0, so that the model starts where the base is. Some initializers move the base
    instead: w + scale * a b = W.

    Args:
      key: of the random factors. Each path derives its own, so that another target changes none.
      params: any pytree of arrays: Flax, Haiku, Equinox, a dict. It is not changed.
      config: what to adapt.
      roles: {path: roles} for weights other than two-dimensional `kernel`s and `embedding`s; best
        read from the model, `jaxlora.trace_roles(fn, params, *args)`.

    Returns:
      The same tree with nodes in it: give it to `lora_apply(fn)` in place of the params.

    Raises:
      TargetError: a pattern (or one name of several) that matches nothing; a target that is a
        vector, not floating-point, already adapted, or never used by the traced model; with DoRA,
        one with a column of zeros (under `jit`, where that cannot be seen, it makes NaN).
      RolesError: a target whose roles are unknown, malformed, or contradict the traced use.

    >>> params = {"query": {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)}}
    >>> lora = init(jax.random.key(0), params, LoraConfig(rank=2, targets=["query"]))
    >>> lora["query"]["kernel"].a.shape, lora["query"]["kernel"].roles
    ((4, 2), 'io')
    """
    pairs, treedef = _paths.flatten_with_paths(params, is_leaf=is_node)
    for path, leaf in pairs:
        if is_node(leaf):
            raise TargetError(
                f"{path}: got a {type(leaf).__name__}, expected plain params. "
                "Start from the base: jaxlora.init(key, jaxlora.base_params(lora), config)."
            )
    leaves = {path: leaf for path, leaf in pairs if hasattr(leaf, "shape")}
    if len(leaves) < sum(hasattr(leaf, "shape") for _, leaf in pairs):
        raise TargetError("params: two leaves have the same path. Rename one of them.")

    excluded = select(config.exclude, leaves, "exclude", is_below)
    full = select(config.train, leaves, "train", is_below)
    found = find_targets(config.targets, leaves, roles)
    targets = [p for p in found if p not in excluded]
    if config.targets == ALL_LINEAR:
        targets = [p for p in targets if p not in full]
    if not targets:
        raise TargetError(
            "targets: every match is left out by `exclude`, expected at least one adapted weight. "
            "Narrow LoraConfig(exclude=...)."
        )
    for path in targets:
        _check_target(path, leaves[path], path in full)
    full |= _biases(config, leaves, targets)
    for path in full:
        _check_floating(path, leaves[path])
    check_shared(params, full.union(targets))
    if roles is not None and not isinstance(roles, TracedRoles):
        for path in roles:
            if _paths.lookup(leaves, path) is None:
                raise no_match("roles", path, leaves)
    for field in ("rank_pattern", "alpha_pattern", "roles"):
        among = leaves if field == "roles" else targets
        for pattern in getattr(config, field):
            if not any(_paths.matches_key(path, pattern) for path in among):
                raise no_match(field, pattern, among)

    def place(path: str, leaf: Any) -> Any:
        if path in full:
            return FullWeight(w=leaf, value=jnp.array(dense(leaf)))  # a copy: both can be donated
        if path not in adapted:
            return leaf
        target = Target(
            path=path,
            roles=adapted[path],
            rank=config.rank_of(path),
            scale=config.scale(path),
            dtype=config.dtype,
            lookup=is_looked_up(path, roles),
        )
        w, a, b = config.initializer(_paths.key_of(key, path), leaf, target)
        stacked, _, _ = split_shape(w.shape, target.roles)
        lw = LoraWeight(
            w=w,
            a=a,
            b=b,
            scale=jnp.full(stacked, target.scale, jnp.float32),
            roles=target.roles,
            dropout=config.dropout,
        )
        return with_magnitude(lw, path) if config.dora else lw

    adapted = {path: _roles_of(path, leaves[path], config, roles) for path in targets}
    return jax.tree.unflatten(treedef, [place(path, leaf) for path, leaf in pairs])


def is_looked_up(path: str, roles: Mapping[str, str] | None) -> bool:
    """Whether the model looks rows of a weight up; untraced, whether it has an embedding's name."""
    if isinstance(roles, TracedRoles):
        return any(use.kind == LOOKUP for use in _paths.lookup(roles.uses, path) or ())
    return _paths.leaf_name(path) == "embedding"


# --------------------------------------------------------------------------------------------------
# Which leaves


def select(
    pattern: _paths.Pattern | None,
    leaves: Mapping[str, Any],
    field: str,
    matches_name: Callable[[str, Any, str], bool],
) -> set[str]:
    """The paths that a pattern matches; raises if it, or one name of it, matches none."""
    if pattern is None:
        return set()
    if callable(pattern):
        found = {path for path, leaf in leaves.items() if pattern(path, leaf)}
        if not found:
            raise no_match(field, getattr(pattern, "__name__", "the function"), leaves)
        return found
    if isinstance(pattern, str):
        try:
            found = {path for path in leaves if _paths.matches_regex(path, pattern)}
        except re.error as error:
            raise TargetError(
                f"{field}: got {pattern!r}, expected a regex of the whole path ({error}). "
                f"For the name of a module, give a list: {field}=[{pattern!r}]."
            ) from None
        if not found:
            raise no_match(field, pattern, leaves)
        return found
    names = list(pattern)
    if not all(isinstance(name, str) for name in names):
        raise TargetError(
            f"{field}: got {names!r}, expected a regex, a sequence of names, or a function of "
            "(path, leaf)."
        )
    if not names:
        raise no_match(field, "()", leaves)
    selected = set()
    for name in names:
        found = {path for path, leaf in leaves.items() if matches_name(path, leaf, name)}
        if not found:
            vectors = [path for path, leaf in leaves.items() if is_below(path, leaf, name)]
            if field == "targets" and any(len(leaves[path].shape) >= 2 for path in vectors):
                raise TargetError(
                    f"targets: {name!r} is above modules, expected the name of a weight or of the "
                    f"module right above it. It holds:{_paths.listing(vectors)}\n"
                    f"For everything below it, a regex: targets=r'(.*/)?{name}/.*kernel'."
                )
            if field == "targets" and vectors:
                raise TargetError(
                    f"targets: {name!r} matches only leaves that no adapter fits, expected weights "
                    f"of two or more dimensions:{_paths.listing(vectors)}\n"
                    f"To train them in full: LoraConfig(train=[{name!r}])."
                )
            raise no_match(field, name, leaves, "names")
        selected |= found
    return selected


def _weight_of(path: str, leaf: Any, name: str) -> bool:
    """A target's name is a leaf's, or a module's, and then means the module's weights."""
    if _paths.matches_leaf(path, name):
        return True
    is_weight = len(leaf.shape) >= 2 and _paths.leaf_name(path) not in _BIAS_NAMES
    return is_weight and _paths.matches_module(path, name)


def is_below(path: str, leaf: Any, name: str) -> bool:
    """A name is a leaf's, or that of a module that it is anywhere below."""
    parts = path.split("/")
    return any(_paths.matches_leaf("/".join(parts[:k]), name) for k in range(1, len(parts) + 1))


def find_targets(
    targets: _paths.Pattern, leaves: Mapping[str, Any], roles: Mapping[str, str] | None
) -> list[str]:
    """The paths of the weights that `targets` names, in the order of the leaves."""
    if targets == ALL_LINEAR:
        if not isinstance(roles, TracedRoles):
            raise TargetError(
                'targets: got "all-linear" without traced roles, expected to know the model\'s '
                "matmuls: roles=jaxlora.trace_roles(fn, params, *args)."
            )
        linear = {_paths.short(path) for path in roles.uses if roles.is_linear(path)}
        found = {p for p, x in leaves.items() if len(x.shape) >= 2 and _paths.short(p) in linear}
        if not found:
            raise no_match("targets", ALL_LINEAR, leaves)
    else:
        found = select(targets, leaves, "targets", _weight_of)
    return [path for path in leaves if path in found]


def _check_target(path: str, leaf: Any, trains_in_full: bool) -> None:
    if len(leaf.shape) < 2:
        raise TargetError(
            f"{path}: got a target of shape {tuple(leaf.shape)}, expected a weight of two or more "
            "dimensions. To train a vector in full: LoraConfig(train=[...]), or bias='all'."
        )
    _check_floating(path, leaf)
    if trains_in_full:
        raise TargetError(
            f"{path}: matched by `targets` and by `train`, expected one of them. "
            f"Leave it out of the targets: LoraConfig(..., exclude=[{_paths.short(path)!r}])."
        )


def _check_floating(path: str, leaf: Any) -> None:
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise TargetError(
            f"{path}: got a leaf of dtype {leaf.dtype} to train, expected a floating-point one. "
            f"Leave it out of the pattern, or: LoraConfig(..., exclude=[{_paths.short(path)!r}])."
        )


def check_shared(params: Any, chosen: set[str]) -> None:
    """Raises if a chosen leaf is an NNX variable that an unsplit module has in several places."""
    for paths in _paths.shared_variables(params):
        if chosen & {*paths}:
            raise TargetError(
                f"{', '.join(paths)}: got one nnx.Variable in several places of a module, expected "
                "it once, since each place would get an adapter of its own. A split module has it "
                "once: graphdef, state = nnx.split(module), and jaxlora.init(key, state, config)."
            )


def _biases(config: LoraConfig, leaves: Mapping[str, Any], targets: list[str]) -> set[str]:
    if config.bias == "none":
        return set()
    biases = {path for path in leaves if _paths.leaf_name(path) in _BIAS_NAMES} - set(targets)
    if config.bias == "lora_only":
        modules = {_paths.module_path(path) for path in targets}
        biases = {path for path in biases if _paths.module_path(path) in modules}
    if not biases:
        raise no_match("bias", config.bias, leaves)
    return biases


def no_match(field: str, pattern: str, paths: Iterable[str], kind: str = "") -> TargetError:
    paths = list(paths)
    shape = "the path of a weight, its trailing segments, or a regex of the whole path"
    if field == "bias":
        shape = "a leaf called `bias` or `b`"
    elif field in ("targets", "exclude", "train"):
        shape = f'a regex of the whole path (for a module\'s name, a list: {field}=["query"])'
        if kind == "names":
            shape = "the name of a module or of a leaf: whole segments of a path, no wildcards"
    return TargetError(
        f"{field}: {pattern!r} matches nothing, expected {shape}. "
        f"Of the {len(paths)} paths, the nearest are:"
        f"{_paths.listing(_paths.nearest(pattern, paths))}"
    )


# --------------------------------------------------------------------------------------------------
# Which roles


def _roles_of(path: str, leaf: Any, config: LoraConfig, given: Mapping[str, str] | None) -> str:
    """Declared roles, else given ones, else Flax's own for a two-dimensional kernel."""
    traced = given if isinstance(given, TracedRoles) else None
    uses = _paths.lookup(traced.uses, path) if traced is not None else None
    if traced is not None and uses is None:
        raise TargetError(
            f"{path}: not among the {len(traced.uses)} leaves of the traced params, expected the "
            "same params. Trace these: jaxlora.trace_roles(fn, params, *args)."
        )
    if uses == ():
        raise TargetError(
            f"{path}: a target that the traced function never uses, so that its adapter could not "
            f"train. Leave it out: LoraConfig(..., exclude=[{_paths.short(path)!r}])."
        )
    declared = config.roles_of(path)
    found = declared or _paths.lookup(given or {}, path)
    example = f"LoraConfig(..., roles={{{_paths.short(path)!r}: '...'}})"
    if found is None and uses:
        seen = _paths.listing(dict.fromkeys(str(use) for use in uses))
        raise RolesError(
            f"{path}: no roles for shape {tuple(leaf.shape)} serve all of its uses, expected one "
            f"letter for each dimension, s stacked, i input, o output. It is used as:{seen}\n"
            f"Leave it out, LoraConfig(..., exclude=[{_paths.short(path)!r}]), or say what is "
            f"meant, {example}."
        )
    if found is None:
        if len(leaf.shape) == 2 and _paths.leaf_name(path) in _IO_NAMES:
            return "io"
        raise RolesError(
            f"{path}: got no roles for shape {tuple(leaf.shape)}, expected one letter for each "
            "dimension: s stacked, i input, o output. Read them from the model, "
            f"jaxlora.init(..., roles=jaxlora.trace_roles(fn, params, *args)), or say {example}: "
            "'ioo' for a query kernel (embed, heads, head_dim), 'iiio' for a convolution (height, "
            "width, in, out), 'sio' for a scanned Dense kernel (layers, in, out)."
        )
    check_roles(found, leaf.shape, path)
    for use in uses or ():
        if use.kind != OTHER and declared is not None and not _fits(declared, use.letters):
            raise RolesError(
                f"{path}: got roles {declared!r} for shape {tuple(leaf.shape)}, but the model uses "
                f"it otherwise: {use}. Leave the entry out of LoraConfig(roles=...) to take the "
                "traced roles."
            )
    return found


def _fits(declared: str, use: str) -> bool:
    """Whether declared roles serve a use; a stacked dim, in either, serves as any role."""
    relaxed = "".join("1" if "s" in (r, u) else u for r, u in zip(declared, use, strict=True))
    return agree(declared, relaxed) or agree(declared, swapped(relaxed))
