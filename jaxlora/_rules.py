"""One rule a primitive: what becomes of an equation that a weight enters.

A rule is a function (interpreter, equation, values) -> outputs, entered in `RULES` under the
primitive's name. A primitive that has none gets the materialized weight, if the caller allows it.
Structural rules only describe a `Move`; the weight carries it out. The rules of control flow run
the interpreter on the equation's sub-jaxprs, inside the same control flow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import JaxprEqn

from jaxlora import _compat
from jaxlora import _factored as moves
from jaxlora._factored import Move, Node, Unfactorable

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
    use = f"the primitive `{eqn.primitive.name}` ({reason}) at {_compat.source_line(eqn)}"
    return _compat.bind(eqn, [interpreter.materialize(v, use) for v in values])


# --------------------------------------------------------------------------------------------------
# Contractions


@rule("dot_general")
def _dot_general(interpreter: Interpreter, eqn: JaxprEqn, values: list[Any]) -> Sequence[Any]:
    lhs, rhs = values
    if isinstance(lhs, Node) and isinstance(rhs, Node) and not lhs.only_records:
        # A row looked up from one is an activation to the other; so is, on request, a weight.
        row = lhs if lhs.is_row else rhs
        use = f"`dot_general` of two adapted weights at {_compat.source_line(eqn)}"
        lhs, rhs = (interpreter.materialize(v, use) if v is row else v for v in (lhs, rhs))
    (lhs_c, rhs_c), (lhs_b, rhs_b) = eqn.params["dimension_numbers"]
    left, right = (lhs_c, lhs_b), (rhs_c, rhs_b)
    (y,) = _compat.bind(eqn, [v.w if isinstance(v, Node) else v for v in (lhs, rhs)])
    if isinstance(lhs, Node):
        y = lhs.dot(y, rhs, left, right, True, eqn)
    if isinstance(rhs, Node):
        y = rhs.dot(y, lhs, right, left, False, eqn)
    return [y]


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
            (w,) = _compat.bind(eqn, [node.w, *others])
            return [node.moved(move, w)]

        rule(*names)(run)
        return describe

    return enter


@structural("transpose")
def _transpose(shape, params) -> Move:
    return moves.transpose(params["permutation"])


@structural("squeeze")
def _squeeze(shape, params) -> Move:
    return moves.squeeze(len(shape), params["dimensions"])


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
    return moves.cut(params["start_indices"], params["limit_indices"], strides)


@structural("dynamic_slice")
def _dynamic_slice(shape, params, *starts) -> Move:
    return moves.dynamic_slice(starts, params["slice_sizes"], shape)


@structural("rev")
def _rev(shape, params) -> Move:
    return moves.reverse(len(shape), params["dimensions"])


@structural("pad")
def _pad(shape, params, value) -> Move:
    return moves.pad(params["padding_config"])


@structural("gather")
def _gather(shape, params, indices) -> Move:
    return moves.gather(params["dimension_numbers"], params["slice_sizes"], indices, shape, params)


@rule("split")
def _split(interpreter: Interpreter, eqn: JaxprEqn, values: list[Any]) -> Sequence[Any]:
    (node,) = values
    axis, out, at = eqn.params["axis"], [], 0
    ones = (1,) * len(node.shape)
    for w, size in zip(_compat.bind(eqn, [node.w]), eqn.params["sizes"], strict=True):
        lo, hi = [0] * len(ones), list(node.shape)
        lo[axis], hi[axis], at = at, at + size, at + size
        out.append(node.moved(moves.cut(lo, hi, ones), w))
    return out


@rule("concatenate")
def _concatenate(interpreter: Interpreter, eqn: JaxprEqn, values: list[Any]) -> Sequence[Any]:
    (w,) = _compat.bind(eqn, [v.w if isinstance(v, Node) else v for v in values])
    return [_join(w, values, eqn.params["dimension"])]


@rule("stack")
def _stack(interpreter: Interpreter, eqn: JaxprEqn, values: list[Any]) -> Sequence[Any]:
    (w,) = _compat.bind(eqn, [v.w if isinstance(v, Node) else v for v in values])
    axis = eqn.params["axis"]
    dims = [d for d in range(w.ndim) if d != axis]
    shape = (*w.shape[:axis], 1, *w.shape[axis + 1 :])

    def unit(v: Any) -> Any:
        array = lax.broadcast_in_dim(v.w if isinstance(v, Node) else v, shape, dims)
        if not isinstance(v, Node):
            return array
        return v.moved(moves.broadcast_in_dim(v.shape, shape, dims), array)

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
    return [node.replace(w=_compat.bind(eqn, [node.w])[0])]


@rule("copy", "copy_p", "name", "reduce_precision", "sharding_constraint")
def _as_it_is(interpreter: Interpreter, eqn: JaxprEqn, values: list[Any]) -> Sequence[Any]:
    (node,) = values
    return [node.replace(w=_compat.bind(eqn, [node.w])[0])]


@rule("stop_gradient")
def _stop_gradient(interpreter: Interpreter, eqn: JaxprEqn, values: list[Any]) -> Sequence[Any]:
    return [jax.tree.map(lax.stop_gradient, values[0].replace())]


@rule("optimization_barrier")
def _barrier(interpreter: Interpreter, eqn: JaxprEqn, values: list[Any]) -> Sequence[Any]:
    return _behind_barrier(_no_origin(values))


def _behind_barrier(values: Sequence[Any]) -> list[Any]:
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
    return [node.scaled(_compat.bind(eqn, [node.w])[0], -1.0)]


@rule("mul", "div")
def _scale(interpreter: Interpreter, eqn: JaxprEqn, values: list[Any]) -> Sequence[Any]:
    left, right = values
    if isinstance(left, Node) and isinstance(right, Node):
        raise Unfactorable("both operands are weights")
    if isinstance(right, Node) and eqn.primitive.name == "div":
        raise Unfactorable("it divides by the weight")
    node, factor = (left, right) if isinstance(left, Node) else (right, left)
    (w,) = _compat.bind(eqn, [v.w if v is node else v for v in values])
    if w.shape != node.shape:
        raise Unfactorable("it grows the weight")
    return [node.scaled(w, 1 / factor if eqn.primitive.name == "div" else factor)]


# --------------------------------------------------------------------------------------------------
# Higher-order. Inside, a node is marked with the index of the value that it is (its origin), so
# that one which comes out as it went in is the caller's own node again.


def _enter(values: Sequence[Any]) -> list[Any]:
    return [v.replace(origin=k) if isinstance(v, Node) else v for k, v in enumerate(values)]


def _leave(outs: Sequence[Any], values: Sequence[Any]) -> list[Any]:
    return [
        (v.replace() if v.origin is None else values[v.origin]) if isinstance(v, Node) else v
        for v in outs
    ]


@rule("jit", "pjit")
def _jit(interpreter: Interpreter, eqn: JaxprEqn, values: list[Any]) -> Sequence[Any]:
    params = eqn.params
    if params["inline"] is True:
        return interpreter.eval(params["jaxpr"], values)
    shardings = params["in_shardings"], params["out_shardings"]
    run = interpreter.jitted(
        params["jaxpr"],
        name=params["name"],
        donate_argnums=tuple(
            k
            for k, donated in enumerate(params["donated_invars"])
            if donated and not isinstance(values[k], Node)
        ),
        in_shardings=None
        if not any(map(_compat.is_specified, shardings[0]))
        else tuple(
            None if isinstance(v, Node) or not _compat.is_specified(s) else s
            for v, s in zip(values, shardings[0], strict=True)
        ),
    )
    return _leave(run(*_enter(values)), values)


@rule("closed_call", "core_call", "core_closed_call", "call")
def _call(interpreter: Interpreter, eqn: JaxprEqn, values: list[Any]) -> Sequence[Any]:
    return interpreter.eval(eqn.params["call_jaxpr"], values)


@rule("remat", "remat2", "checkpoint")
def _remat(interpreter: Interpreter, eqn: JaxprEqn, values: list[Any]) -> Sequence[Any]:
    params = eqn.params
    inside = _enter(values)
    if params["differentiated"]:
        # Part of a backward pass: recompute here, and let the barrier keep XLA from sharing it.
        if params["prevent_cse"]:
            inside = _behind_barrier(inside)
        outs = interpreter.eval(params["jaxpr"], inside)
    else:
        run = jax.checkpoint(
            lambda *args: interpreter.eval(params["jaxpr"], args),
            policy=params["policy"],
            prevent_cse=params["prevent_cse"],
        )
        outs = run(*inside)
    return _leave(outs, values)


class _Again(Exception):
    """What the body of a control-flow equation returns does not fit what was assumed of it."""


@rule("cond")
def _cond(interpreter: Interpreter, eqn: JaxprEqn, values: list[Any]) -> Sequence[Any]:
    index, *operands = values
    summed: set[int] = set()  # outputs that the branches make too differently to stay weights
    use = f"an output of `cond` that its branches make differently, at {_compat.source_line(eqn)}"
    made: list[list[Any]] = []  # for each branch, its outputs that are nodes, else None

    def run(jaxpr: Any, *args: Any) -> list[Any]:
        outs = interpreter.eval(jaxpr, args)
        outs = [interpreter.materialize(v, use) if k in summed else v for k, v in enumerate(outs)]
        made.append([v if isinstance(v, Node) else None for v in outs])
        for k, (one, other) in enumerate(zip(made[0], made[-1], strict=True)):
            alike = one.like(other) if one is not None and other is not None else one is other
            if not alike:
                summed.add(k)
                raise _Again
        return [jax.tree.leaves(v) for v in outs]

    branches = [lambda *args, j=j: run(j, *args) for j in eqn.params["branches"]]
    inside = _enter(operands)
    while True:
        made.clear()
        try:
            outs = lax.switch(index, branches, *inside)
            break
        except _Again:
            continue

    def chosen(leaves: list[Any], nodes: tuple[Any, ...]) -> Any:
        if nodes[0] is None:
            return leaves[0]
        origins = {node.origin for node in nodes}
        if len(origins) == 1 and None not in origins:
            return operands[origins.pop()]
        return nodes[0].either(nodes, leaves)

    return [chosen(*pair) for pair in zip(outs, zip(*made, strict=True), strict=True)]


@rule("while")
def _while(interpreter: Interpreter, eqn: JaxprEqn, values: list[Any]) -> Sequence[Any]:
    n_cond, n_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    cond_consts, body_consts = values[:n_cond], values[n_cond : n_cond + n_body]
    carry = _Carry(interpreter, eqn, values[n_cond + n_body :])

    def cond(state: Any) -> Any:
        (out,) = interpreter.eval(eqn.params["cond_jaxpr"], [*cond_consts, *carry.inside(state)])
        return out

    def body(state: Any) -> Any:
        outs = interpreter.eval(
            eqn.params["body_jaxpr"], [*_no_origin(body_consts), *carry.inside(state)]
        )
        return carry.outside(outs)

    return carry.run(lambda init: lax.while_loop(cond, body, init))


@rule("scan")
def _scan(interpreter: Interpreter, eqn: JaxprEqn, values: list[Any]) -> Sequence[Any]:
    params = eqn.params
    jaxpr, _ = _compat.split_jaxpr(params["jaxpr"])
    # What is scanned over has one dim less inside; what is carried comes out as it went in.
    n_xs = sum(o.aval.ndim != i.aval.ndim for o, i in zip(eqn.invars, jaxpr.invars, strict=True))
    n_carry = sum(
        o.aval.ndim == i.aval.ndim for o, i in zip(eqn.outvars, jaxpr.outvars, strict=True)
    )
    n_consts = len(values) - n_carry - n_xs
    consts, xs = values[:n_consts], values[n_consts + n_carry :]
    carry = _Carry(interpreter, eqn, values[n_consts : n_consts + n_carry])
    sliced = [_Sliced(v, n_carry + k) for k, v in enumerate(xs)]

    def body(state: Any, slices: Any) -> Any:
        args = [*_no_origin(consts), *carry.inside(state)]
        args += [s.inside(x) for s, x in zip(sliced, slices, strict=True)]
        outs = interpreter.eval(params["jaxpr"], args)
        stacked = outs[n_carry:]
        forwarded.clear()
        for k, v in enumerate(stacked):
            if isinstance(v, Node) and v.origin is not None and v.origin >= n_carry:
                forwarded[k] = v.origin - n_carry
        nodes[:] = [v if isinstance(v, Node) else None for v in stacked]
        ys = [None if k in forwarded else jax.tree.leaves(v) for k, v in enumerate(stacked)]
        return carry.outside(outs[:n_carry]), ys

    forwarded: dict[int, int] = {}
    nodes: list[Any] = []

    def loop(init: Any) -> Any:
        state, ys = lax.scan(
            body,
            init,
            [s.leaves for s in sliced],
            length=params["length"],
            reverse=params["reverse"],
            unroll=params["unroll"],
        )
        for k, y in enumerate(ys):
            if k in forwarded:
                ys[k] = xs[forwarded[k]]
            else:
                ys[k] = nodes[k].stacked(y) if nodes[k] is not None else y[0]
        return state, ys

    ys: list[Any] = []

    def run(init: Any) -> Any:
        state, ys[:] = loop(init)
        return state

    return [*carry.run(run), *ys]


def _no_origin(values: Sequence[Any]) -> list[Any]:
    return [v.replace() if isinstance(v, Node) else v for v in values]


class _Sliced:
    """A scanned-over value: the leaves that span its leading dim are sliced, the others are not."""

    def __init__(self, value: Any, origin: int):
        self.value, self.origin = value, origin
        self.leaves = value
        if isinstance(value, Node):
            self.value = value = value.filled(0)
            pairs = list(zip(jax.tree.leaves(value), value.leaf_dims(), strict=True))
            self.whole = [None if 0 in dims else leaf for leaf, dims in pairs]
            self.leaves = [
                jnp.moveaxis(leaf, dims.index(0), 0) if 0 in dims else None for leaf, dims in pairs
            ]

    def inside(self, x: Any) -> Any:
        if not isinstance(self.value, Node):
            return x
        leaves = [w if s is None else s for w, s in zip(self.whole, x, strict=True)]
        return self.value.dropped(0, leaves).replace(origin=self.origin)


class _Carry:
    """The carry of a loop that may hold weights.

    A weight that every step hands on unchanged is no state: it is closed over, and comes out as it
    went in. One that changes but keeps its form is carried leaf by leaf. Anything else is
    materialized before the loop, if the caller allows it. Which of these holds shows only when the
    body is traced, so the best is assumed and the loop traced again when that fails.
    """

    def __init__(self, interpreter: Interpreter, eqn: JaxprEqn, init: Sequence[Any]):
        self.interpreter, self.init = interpreter, list(init)
        self.use = f"the carry of `{eqn.primitive.name}` at {_compat.source_line(eqn)}"
        self.fixed = {k for k, v in enumerate(init) if isinstance(v, Node)}

    def inside(self, state: Sequence[Any]) -> list[Any]:
        return [
            self.init[k].replace(origin=k) if k in self.fixed else v for k, v in enumerate(state)
        ]

    def outside(self, outs: Sequence[Any]) -> list[Any]:
        """The state that a step's outputs are, or `_Again` with weaker assumptions."""
        again = False
        for k, (v, init) in enumerate(zip(outs, self.init, strict=True)):
            if k in self.fixed:
                if not (isinstance(v, Node) and v.origin == k):
                    self.fixed.discard(k)
                    again = True
            elif isinstance(init, Node) and not self._same_form(v, init):
                self.init[k] = self.interpreter.materialize(init, self.use)
                again = True
        if again:
            raise _Again
        outs = [None if k in self.fixed else v for k, v in enumerate(outs)]
        return [
            self.interpreter.materialize(v, self.use)
            if isinstance(v, Node) and not isinstance(self.init[k], Node)
            else (v.replace() if isinstance(v, Node) else v)
            for k, v in enumerate(outs)
        ]

    @staticmethod
    def _same_form(v: Any, init: Node) -> bool:
        return isinstance(v, Node) and init.like(v)

    def run(self, loop: Callable[[list[Any]], Sequence[Any]]) -> list[Any]:
        while True:
            init = [None if k in self.fixed else v for k, v in enumerate(self.init)]
            try:
                outs = loop(_no_origin(init))
            except _Again:
                continue
            return [self.init[k] if k in self.fixed else v for k, v in enumerate(outs)]
