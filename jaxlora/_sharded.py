"""Rules for programs over several devices: shard_map and its collectives, sharding constraints.

A factor is sharded as the weight is, along the dims that it spans; its rank is not sharded. A
device's block of W + a b is then its block of W plus the product of its blocks of a and b.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.extend.core import JaxprEqn
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlora import _compat, _moves
from jaxlora._deferred import Deferred, moved, value_of
from jaxlora._factored import Node
from jaxlora._moves import Unfactorable, project
from jaxlora._rules import rule

if TYPE_CHECKING:
    from jaxlora._apply import Interpreter


def constrained(value: Any, sharding: Any) -> Any:
    """A value, its factors too if it is a weight, under a sharding constraint."""
    if not isinstance(sharding, jax.sharding.Sharding):  # jit's word for "not given"
        return value
    if not isinstance(value, Node):
        return jax.lax.with_sharding_constraint(value, sharding)
    # A quantized weight stays as it lies: what is constrained is decoded later, where it is used.
    w = value.w
    if isinstance(w, Deferred):
        value = value.replace(w=jax.ShapeDtypeStruct(w.shape, w.dtype))
    placed = _each(value, sharding, _constrain, P.UNCONSTRAINED)
    return placed.replace(w=w) if isinstance(w, Deferred) else placed


def _constrain(x: Any, sharding: Any) -> Any:
    if isinstance(x, jax.ShapeDtypeStruct):
        return x
    return jax.lax.with_sharding_constraint(x, sharding)


def _each(node: Node, sharding: Any, place: Callable[[Any, Any], Any], rank: Any) -> Any:
    """A weight and its factors, placed by its sharding."""
    placed = []
    if isinstance(sharding, NamedSharding):
        node = _filled(node, tuple(sharding.spec))
    for leaf, dims in zip(jax.tree.leaves(node), node.split_dims(), strict=True):
        where = sharding
        if isinstance(sharding, NamedSharding):
            spec = project(tuple(sharding.spec), dims, rank)
            where = NamedSharding(sharding.mesh, spec, memory_kind=sharding.memory_kind)
        placed.append(place(leaf, where))
    return jax.tree.unflatten(jax.tree.structure(node.replace()), placed)


@rule("sharding_constraint")
def _constraint(interpreter: Interpreter, eqn: JaxprEqn, values: list[Any]) -> Sequence[Any]:
    (node,) = values
    placed = constrained(node, eqn.params["sharding"])
    if isinstance(node.w, Deferred):
        return [placed]
    return [placed.replace(w=_compat.bind(eqn, [node.w])[0])]


@rule("reshard", "mesh_cast")
def _reshard(interpreter: Interpreter, eqn: JaxprEqn, values: list[Any]) -> Sequence[Any]:
    (node,) = values
    placed = _each(node, eqn.params["dst_sharding"], jax.sharding.reshard, None)
    if isinstance(node.w, Deferred):
        return [placed]
    return [placed.replace(w=_compat.bind(eqn, [node.w])[0])]


@rule("device_put")
def _device_put(interpreter: Interpreter, eqn: JaxprEqn, values: list[Any]) -> Sequence[Any]:
    # What is decoded later is put there as codes, and here as nothing.
    plain = [v.w if isinstance(v, Node) else v for v in values]
    outs = _compat.bind(eqn, [jnp.zeros(()) if isinstance(w, Deferred) else w for w in plain])
    placed = []
    for v, w, target in zip(values, outs, eqn.params["devices"], strict=True):
        if isinstance(v, Node):
            there = _each(v, target, jax.device_put, None)
            w = there if isinstance(v.w, Deferred) else there.replace(w=w)
        placed.append(w)
    return placed


@rule("shard_map")
def _shard_map(interpreter: Interpreter, eqn: JaxprEqn, values: list[Any]) -> Sequence[Any]:
    params = eqn.params
    in_specs = [tuple(spec) for spec in params["in_specs"]]
    nodes, leaves, specs = [], [], []
    for k, (v, spec) in enumerate(zip(values, in_specs, strict=True)):
        node = None
        if isinstance(v, Node):
            node = _filled(v.after(interpreter.position).into(0).replace(origin=k), spec)
        nodes.append(node)
        if node is None:
            leaves.append([v])
            specs.append([P(*spec)])
        else:
            specs.append([project(spec, dims) for dims in node.split_dims()])
            _check_blocks(node, specs[-1], params["mesh"])
            pairs = zip(jax.tree.leaves(node), specs[-1], strict=True)
            leaves.append([_typed(x, p, params["mesh"]) for x, p in pairs])

    nested = interpreter.manual > 0
    unchanged: dict[int, int] = {}
    use = f"an output of `shard_map` at {interpreter.where()}"

    def body(*blocks: Any) -> list[Any]:
        inside = [
            xs[0] if node is None else node.blocks(xs, spec, nested)
            for node, xs, spec in zip(nodes, blocks, in_specs, strict=True)
        ]
        interpreter.manual += 1
        try:
            outs = interpreter.eval(params["jaxpr"], inside)
        finally:
            interpreter.manual -= 1
        for k, v in enumerate(outs):
            if isinstance(v, Node):
                if v.origin is not None and _same(in_specs[v.origin], params["out_specs"][k]):
                    unchanged[k] = v.origin
                    outs[k] = value_of(v.w)
                else:
                    outs[k] = interpreter.materialize(v, use)
        return outs

    outs = jax.shard_map(
        body,
        mesh=params["mesh"],
        in_specs=tuple(specs),
        out_specs=list(params["out_specs"]),
        axis_names=_compat.manual_axes(eqn),
        check_vma=params["check_vma"],
    )(*leaves)
    return [values[unchanged[k]] if k in unchanged else v for k, v in enumerate(outs)]


def _check_blocks(node: Node, specs: Sequence[P], mesh: Any) -> None:
    """Raises unless each device gets whole blocks of a quantized weight."""
    if not isinstance(node.w, Deferred):
        return
    for leaf, spec in zip(jax.tree.leaves(node.w), specs, strict=False):
        for n, entry in zip(leaf.shape, spec, strict=False):
            names = entry if isinstance(entry, tuple) else () if entry is None else (entry,)
            devices = math.prod(mesh.shape[name] for name in names)
            if n % devices:
                raise Unfactorable(f"it splits {n} blocks of a quantized weight on {devices}")


def _filled(node: Node, spec: Sequence[Any]) -> Any:
    """The node without windows on sharded dims: a window of the whole is none of a block."""
    for d, axes in enumerate(spec[: len(node.shape)]):
        if axes is not None:
            node = node.splitting(d)
    return node


def _typed(leaf: Any, spec: P, mesh: Any) -> Any:
    """A leaf, typed as the spec says if the mesh's axes are explicit: factors need not be."""
    explicit = AxisType.Explicit in mesh.axis_types
    if not explicit or _same(_compat.explicit_spec(leaf), tuple(spec)):
        return leaf
    return jax.sharding.reshard(leaf, NamedSharding(mesh, spec))


def _same(one: Sequence[Any], other: Sequence[Any]) -> bool:
    """Whether two PartitionSpecs shard alike: dims that are not named are not sharded."""
    n = max(len(one), len(other))
    first, second = ((*spec, *[None] * (n - len(spec))) for spec in (one, other))
    return first == second


@rule("all_gather")
def _all_gather(interpreter: Interpreter, eqn: JaxprEqn, values: list[Any]) -> Sequence[Any]:
    (node,) = values
    params = eqn.params
    axis, names = params["all_gather_dimension"], params["axis_name"]
    names = names if isinstance(names, tuple) else (names,)
    if params["tiled"] and not node.same_over(names, axis):
        raise Unfactorable("its devices may hold other factors along the dims that stay")
    groups = params["axis_index_groups"]
    move = _moves.all_gather(len(node.shape), axis, names, groups, params["tiled"])
    return [node.moved(move, moved(eqn, node.w, [], move))]


@rule("ppermute")
def _ppermute(interpreter: Interpreter, eqn: JaxprEqn, values: list[Any]) -> Sequence[Any]:
    node = values[0].varying().replace()
    moved = [_compat.bind(eqn, [x])[0] for x in jax.tree.leaves(node)]
    return [node.either([node], moved)]


@rule("pvary", "pcast")
def _pvary(interpreter: Interpreter, eqn: JaxprEqn, values: list[Any]) -> Sequence[Any]:
    (node,) = values
    if isinstance(node.w, Deferred):
        leaves, treedef = jax.tree.flatten(node.w)
        w = jax.tree.unflatten(treedef, [_compat.bind(eqn, [leaf])[0] for leaf in leaves])
        return [node.replace(w=w).varying()]
    return [node.replace(w=_compat.bind(eqn, [node.w])[0]).varying()]
