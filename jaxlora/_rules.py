"""One rule a primitive: what becomes of an equation that a weight enters.

A rule is a function (interpreter, equation, values) -> outputs, entered in `RULES` under the
primitive's name. A primitive that has none gets the materialized weight, if the caller allows it.
Structural rules only describe a `Move`; the weight carries it out. The rules of higher-order
primitives are in `_control_flow.py`, those of programs on several devices in `_sharded.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import JaxprEqn

from jaxlora import _compat
from jaxlora import _moves as moves
from jaxlora._contractions import Dot
from jaxlora._convolution import Conv
from jaxlora._deferred import Decoded, Deferred, bound, moved
from jaxlora._factored import Node, unmarked
from jaxlora._moves import Move, Unfactorable
from jaxlora._ragged import RaggedDot

if TYPE_CHECKING:
    from jaxlora._apply import Interpreter

Rule: TypeAlias = Callable[["Interpreter", JaxprEqn, list[Any]], Sequence[Any]]

RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    def enter(function: Rule) -> Rule:
        for name in names:
            RULES[name] = function
        return function

    return enter


def apply_rule(interpreter: Interpreter, eqn: JaxprEqn, values: list[Any]) -> Sequence[Any]:
    """The equation's rule; where there is none or it does not reach this case, materializes."""
    reason = "it has no factored form"
    found = RULES.get(eqn.primitive.name)
    if found is not None:
        try:
            return found(interpreter, eqn, values)
        except Unfactorable as error:
            reason = str(error)
    return bind_materialized(interpreter, eqn, values, reason)


def bind_materialized(
    interpreter: Interpreter, eqn: JaxprEqn, values: list[Any], reason: str
) -> Sequence[Any]:
    use = f"the primitive `{eqn.primitive.name}` ({reason}) at {interpreter.where()}"
    return _compat.bind(eqn, [interpreter.materialize(v, use) for v in values])


# --------------------------------------------------------------------------------------------------
# Contractions


@rule("dot_general")
def _dot_general(interpreter: Interpreter, eqn: JaxprEqn, values: list[Any]) -> Sequence[Any]:
    lhs, rhs = values
    if isinstance(lhs, Node) and isinstance(rhs, Node) and not lhs.only_records:
        # A row looked up from one is an activation to the other; so is, on request, a weight.
        row = min([v for v in values if v.is_row] or [rhs], key=lambda v: v.w.size)
        use = f"`dot_general` of two adapted weights at {interpreter.where()}"
        lhs, rhs = (interpreter.materialize(v, use) if v is row else v for v in (lhs, rhs))
    y = None
    if isinstance(lhs, Node):
        contraction = Dot.of(eqn, interpreter.where, first=True)
        y = interpreter.used(lhs).contracted(rhs, contraction)
    if isinstance(rhs, Node):  # both, if they only record
        contraction = Dot.of(eqn, interpreter.where, first=False)
        y = interpreter.used(rhs).contracted(lhs, contraction)
    return [y]


@rule("conv_general_dilated")
def _conv(interpreter: Interpreter, eqn: JaxprEqn, values: list[Any]) -> Sequence[Any]:
    x, kernel = _on_the_right(interpreter, eqn, values)
    contraction = Conv.of(eqn, interpreter.where)
    return [interpreter.used(kernel).contracted(x, contraction)]


@rule("ragged_dot_general")
def _ragged_dot(interpreter: Interpreter, eqn: JaxprEqn, values: list[Any]) -> Sequence[Any]:
    x, experts = _on_the_right(interpreter, eqn, values[:2])
    contraction = RaggedDot.of(eqn, interpreter.where, values[2])
    return [interpreter.used(experts).contracted(x, contraction)]


def _on_the_right(interpreter: Interpreter, eqn: JaxprEqn, values: list[Any]) -> Sequence[Any]:
    """Both operands, the left one an activation: also if it is a row looked up from a weight."""
    left, right = values
    if isinstance(left, Node) and isinstance(right, Node) and left.is_row:
        use = f"`{eqn.primitive.name}` of two adapted weights at {interpreter.where()}"
        left = interpreter.materialize(left, use)
    if isinstance(left, Node):
        raise Unfactorable("the weight is its left operand")
    return left, right


# --------------------------------------------------------------------------------------------------
# Structure


def structural(*names: str):
    """A rule from a function (shape, parameters, *other operands) -> Move."""

    def enter(describe: Callable[..., Move]) -> Callable[..., Move]:
        def run(interpreter: Interpreter, eqn: JaxprEqn, values: list[Any]) -> Sequence[Any]:
            node, *others = values
            if any(isinstance(v, Node) for v in others) or not isinstance(node, Node):
                raise Unfactorable("the weight is not its operand")
            move = describe(node.shape, eqn.params, *others)
            return [node.moved(move, moved(eqn, node.w, others, move))]

        rule(*names)(run)
        return describe

    return enter


@structural("transpose")
def _transpose(shape, params) -> Move:
    return moves.transpose(params["permutation"])


@structural("squeeze")
def _squeeze(shape, params) -> Move:
    return moves.squeeze(len(shape), params["dimensions"])


@structural("reduce_sum")
def _reduce_sum(shape, params) -> Move:
    if any(shape[d] != 1 for d in params["axes"]):
        raise Unfactorable("it sums over the weight")
    return moves.squeeze(len(shape), params["axes"])


@structural("broadcast_in_dim")
def _broadcast_in_dim(shape, params, *dynamic) -> Move:
    return moves.broadcast_in_dim(shape, params["shape"], params["broadcast_dimensions"])


@structural("reshape")
def _reshape(shape, params, *dynamic) -> Move:
    if params.get("dimensions") is not None:
        raise Unfactorable("it reshapes in another order of dimensions")
    return moves.reshape(shape, params["new_sizes"])


@structural("slice")
def _slice(shape, params) -> Move:
    strides = params["strides"] or (1,) * len(shape)
    return moves.cut(params["start_indices"], params["limit_indices"], strides, shape)


@structural("dynamic_slice")
def _dynamic_slice(shape, params, *starts) -> Move:
    return moves.dynamic_slice(starts, params["slice_sizes"], shape)


@structural("rev")
def _rev(shape, params) -> Move:
    return moves.reverse(len(shape), params["dimensions"])


@structural("pad")
def _pad(shape, params, value) -> Move:
    return moves.pad(params["padding_config"], value)


@structural("gather")
def _gather(shape, params, indices) -> Move:
    return moves.gather(params["dimension_numbers"], params["slice_sizes"], indices, shape, params)


@rule("tile")
def _tile(interpreter: Interpreter, eqn: JaxprEqn, values: list[Any]) -> Sequence[Any]:
    """A broadcast along new dims, each fused with the one that it repeats."""
    (node,), w = values, bound(eqn, [values[0].w])
    reps, shape = eqn.params["reps"], node.shape
    spread = [n for pair in zip(reps, shape, strict=True) for n in pair]
    dims = range(1, 2 * len(shape), 2)
    repeated = jax.ShapeDtypeStruct(spread, w.dtype)
    node = node.moved(moves.broadcast_in_dim(shape, spread, dims), repeated)
    return [node.moved(moves.reshape(spread, w.shape), w)]


@rule("split")
def _split(interpreter: Interpreter, eqn: JaxprEqn, values: list[Any]) -> Sequence[Any]:
    (node,) = values
    axis, out, at = eqn.params["axis"], [], 0
    ones = (1,) * len(node.shape)
    for k, size in enumerate(eqn.params["sizes"]):
        lo, hi = [0] * len(ones), list(node.shape)
        lo[axis], hi[axis], at = at, at + size, at + size
        move = moves.cut(lo, hi, ones, node.shape)
        out.append(node.moved(move, moved(eqn, node.w, [], move, k)))
    return out


@rule("concatenate")
def _concatenate(interpreter: Interpreter, eqn: JaxprEqn, values: list[Any]) -> Sequence[Any]:
    w = bound(eqn, [v.w if isinstance(v, Node) else v for v in values])
    return [_join(w, values, eqn.params["dimension"])]


@rule("stack")
def _stack(interpreter: Interpreter, eqn: JaxprEqn, values: list[Any]) -> Sequence[Any]:
    axis, each = eqn.params["axis"], [v.w if isinstance(v, Node) else v for v in values]
    w = Decoded.stack(each) if axis == 0 else None
    w = bound(eqn, each) if w is None else w
    dims = [d for d in range(w.ndim) if d != axis]
    shape = (*w.shape[:axis], 1, *w.shape[axis + 1 :])

    def unit(v: Any) -> Any:
        if not isinstance(v, Node):
            return lax.broadcast_in_dim(v, shape, dims)
        form = jax.ShapeDtypeStruct(shape, v.w.dtype)  # the whole is stacked already
        return v.moved(moves.broadcast_in_dim(v.shape, shape, dims), form)

    return [_join(w, [unit(v) for v in values], axis)]


def _join(w: Any, parts: list[Any], axis: int) -> Any:
    """The concatenation of weights and arrays: each adapter keeps to its own window."""
    kinds = {type(v) for v in parts if isinstance(v, Node)}
    return kinds.pop().joined(w, parts, axis)


# --------------------------------------------------------------------------------------------------
# Elementwise, linear


@rule("convert_element_type")
def _convert(interpreter: Interpreter, eqn: JaxprEqn, values: list[Any]) -> Sequence[Any]:
    (node,) = values
    if not jnp.issubdtype(eqn.params["new_dtype"], jnp.floating):
        raise Unfactorable(f"it converts to {eqn.params['new_dtype']}")
    return [node.replace(w=bound(eqn, [node.w]))]


@rule("copy", "copy_p", "name", "reduce_precision")
def _as_it_is(interpreter: Interpreter, eqn: JaxprEqn, values: list[Any]) -> Sequence[Any]:
    (node,) = values
    if isinstance(node.w, Deferred) and eqn.primitive.name != "reduce_precision":
        return [node.replace()]  # a policy that saves by name is not to save what is decoded
    return [node.replace(w=bound(eqn, [node.w]))]


@rule("stop_gradient")
def _stop_gradient(interpreter: Interpreter, eqn: JaxprEqn, values: list[Any]) -> Sequence[Any]:
    return [jax.tree.map(lax.stop_gradient, values[0].replace())]


@rule("optimization_barrier")
def _barrier(interpreter: Interpreter, eqn: JaxprEqn, values: list[Any]) -> Sequence[Any]:
    return behind_barrier(unmarked(values))


def behind_barrier(values: Sequence[Any]) -> list[Any]:
    # A barrier gives all its operands a tangent if one has it. Bases go through barriers of their
    # own, so that no gradient of theirs is computed.
    rest = [v.replace(w=None, origin=v.origin) if isinstance(v, Node) else v for v in values]
    rest = lax.optimization_barrier(rest)
    return [
        r.replace(w=lax.optimization_barrier(v.w), origin=v.origin) if isinstance(v, Node) else r
        for v, r in zip(values, rest, strict=True)
    ]


@rule("neg")
def _neg(interpreter: Interpreter, eqn: JaxprEqn, values: list[Any]) -> Sequence[Any]:
    (node,) = values
    return [node.scaled(bound(eqn, [node.w]), -1.0)]


@rule("mul", "div")
def _scale(interpreter: Interpreter, eqn: JaxprEqn, values: list[Any]) -> Sequence[Any]:
    left, right = values
    if isinstance(left, Node) and isinstance(right, Node):
        raise Unfactorable("both operands are weights")
    if isinstance(right, Node) and eqn.primitive.name == "div":
        raise Unfactorable("it divides by the weight")
    node: Node
    factor: Any
    node, factor = (left, right) if isinstance(left, Node) else (right, left)
    w = bound(eqn, [v.w if v is node else v for v in values])
    if w.shape != node.shape:
        raise Unfactorable("it grows the weight")
    return [node.scaled(w, 1 / factor if eqn.primitive.name == "div" else factor)]
