"""The rules of higher-order primitives: the interpreter runs on their sub-jaxprs, inside the same
control flow.

Inside, a node is marked with the index of the value that it is (its origin), so that one which
comes out as it went in is the caller's own node again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import JaxprEqn

from jaxlora import _compat
from jaxlora._factored import Node, unmarked
from jaxlora._recomputed import through
from jaxlora._rules import behind_barrier, rule

if TYPE_CHECKING:
    from jaxlora._apply import Interpreter


def _after(values: Sequence[Any], uses: int) -> list[Any]:
    """The values after so many uses of weights."""
    return [v.after(uses) if isinstance(v, Node) else v for v in values]


def _enter(interpreter: Interpreter, values: Sequence[Any]) -> list[Any]:
    inside = _after(values, interpreter.position)
    return [v.replace(origin=k) if isinstance(v, Node) else v for k, v in enumerate(inside)]


def _leave(outs: Sequence[Any], values: Sequence[Any]) -> list[Any]:
    return [
        (v.replace() if v.origin is None else values[v.origin]) if isinstance(v, Node) else v
        for v in outs
    ]


@rule("jit", "pjit")
def _jit(interpreter: Interpreter, eqn: JaxprEqn, values: list[Any]) -> Sequence[Any]:
    params = eqn.params
    if params["inline"] is True:
        outs = interpreter.eval(params["jaxpr"], _enter(interpreter, values))
        return _leave(outs, values)
    run = interpreter.jitted(
        params["jaxpr"],
        name=params["name"],
        shardings=(params["in_shardings"], params["out_shardings"]),
        inline=params["inline"],  # since JAX 0.12 more than a flag
        donate_argnums=tuple(
            k
            for k, donated in enumerate(params["donated_invars"])
            if donated and not isinstance(values[k], Node)
        ),
    )
    inside = _after(values, interpreter.position)
    inside = [v.entered(k) if isinstance(v, Node) else v for k, v in enumerate(inside)]
    outs = [v.left(values) if isinstance(v, Node) and v.origin is None else v for v in run(*inside)]
    return _leave(outs, values)


@rule("closed_call", "core_call", "core_closed_call", "call")
def _call(interpreter: Interpreter, eqn: JaxprEqn, values: list[Any]) -> Sequence[Any]:
    outs = interpreter.eval(eqn.params["call_jaxpr"], _enter(interpreter, values))
    return _leave(outs, values)


@rule("remat", "remat2", "checkpoint")
def _remat(interpreter: Interpreter, eqn: JaxprEqn, values: list[Any]) -> Sequence[Any]:
    params = eqn.params
    inside = _enter(interpreter, values)
    if params["differentiated"]:
        # Part of a backward pass: recompute here, and let the barrier keep XLA from sharing it.
        if params["prevent_cse"]:
            inside = behind_barrier(inside)
        outs = interpreter.eval(params["jaxpr"], inside)
    else:
        run = jax.checkpoint(
            lambda *args: interpreter.eval(params["jaxpr"], args),
            policy=through(params["policy"]),
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
    use = f"an output of `cond` that its branches make differently, at {interpreter.where()}"
    made: list[list[Any]] = []  # for each branch, its outputs that are nodes, else None

    def run(jaxpr: Any, *args: Any) -> list[Any]:
        outs = interpreter.eval(jaxpr, args)
        outs = [interpreter.materialize(v, use) if k in summed else v for k, v in enumerate(outs)]
        outs = [v.varying() if isinstance(v, Node) else v for v in outs]
        made.append([v.skeleton() if isinstance(v, Node) else None for v in outs])
        for k, (one, other) in enumerate(zip(made[0], made[-1], strict=True)):
            alike = one.like(other) if one is not None and other is not None else one is other
            if not alike:
                summed.add(k)
                raise _Again
        return [jax.tree.leaves(v) for v in outs]

    inside = [v.into(0) if isinstance(v, Node) else v for v in _enter(interpreter, operands)]
    while True:
        made.clear()
        # New functions each time: JAX keeps the traces of those that it has seen.
        branches = [lambda *args, j=j: run(j, *args) for j in eqn.params["branches"]]
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
    carry = _Carry(interpreter, eqn, values[n_cond + n_body :])
    inside = unmarked(_after(values, interpreter.position))
    cond_consts, body_consts = inside[:n_cond], inside[n_cond : n_cond + n_body]
    count = _Count(values)

    def cond(state: Any) -> Any:
        step, state = state
        args = count.at([*cond_consts, *carry.inside(state)], step)
        (out,) = interpreter.eval(eqn.params["cond_jaxpr"], args)
        return out

    def body(state: Any) -> Any:
        step, state = state
        args = count.at([*body_consts, *carry.inside(state)], step)
        outs = interpreter.eval(eqn.params["body_jaxpr"], args)
        return count.next(step), carry.outside(outs)

    return carry.run(lambda init: lax.while_loop(cond, body, (count.first, init))[1])


@rule("scan")
def _scan(interpreter: Interpreter, eqn: JaxprEqn, values: list[Any]) -> Sequence[Any]:
    params = eqn.params
    jaxpr, _ = _compat.split_jaxpr(params["jaxpr"])

    # What is scanned over has one dim less inside; what is carried comes out as it went in.
    def same_ndim(outer: Sequence[Any], inner: Sequence[Any]) -> int:
        return sum(_compat.ndim(o) == _compat.ndim(i) for o, i in zip(outer, inner, strict=True))

    n_xs = len(values) - same_ndim(eqn.invars, jaxpr.invars)
    n_carry = same_ndim(eqn.outvars, jaxpr.outvars)
    n_consts = len(values) - n_carry - n_xs
    xs, inside = values[n_consts + n_carry :], _after(values, interpreter.position)
    consts = unmarked(inside[:n_consts])
    carry = _Carry(interpreter, eqn, values[n_consts : n_consts + n_carry])
    sliced = [_Sliced(v, n_carry + k) for k, v in enumerate(inside[n_consts + n_carry :])]
    count = _Count(values)

    def body(state: Any, slices: Any) -> Any:
        step, state = state
        args = [*consts, *carry.inside(state)]
        args += [s.inside(x) for s, x in zip(sliced, slices, strict=True)]
        outs = interpreter.eval(params["jaxpr"], count.at(args, step))
        stacked = outs[n_carry:]
        forwarded.clear()
        for k, v in enumerate(stacked):
            if isinstance(v, Node) and v.origin is not None and v.origin >= n_carry:
                forwarded[k] = v.origin - n_carry
        nodes[:] = [v.skeleton() if isinstance(v, Node) else None for v in stacked]
        ys = [None if k in forwarded else jax.tree.leaves(v) for k, v in enumerate(stacked)]
        return (count.next(step), carry.outside(outs[:n_carry])), ys

    forwarded: dict[int, int] = {}
    nodes: list[Any] = []

    def loop(init: Any) -> Any:
        (_, state), ys = lax.scan(
            body,
            (count.first, init),
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


class _Count:
    """The number of a loop's step, if a weight that goes into it draws dropout masks."""

    def __init__(self, values: Sequence[Any]):
        self.first = None
        if any(isinstance(v, Node) and v.drops for v in values):
            self.first = jnp.uint32(0)

    def at(self, values: Sequence[Any], step: Any) -> list[Any]:
        if step is None:
            return list(values)
        return [v.into(step) if isinstance(v, Node) else v for v in values]

    def next(self, step: Any) -> Any:
        return None if step is None else step + 1


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
        self.position = interpreter.position
        self.use = f"the carry of `{eqn.primitive.name}` at {interpreter.where()}"
        self.fixed = {k for k, v in enumerate(init) if isinstance(v, Node)}
        self.summed: set[int] = set()

    def inside(self, state: Sequence[Any]) -> list[Any]:
        return [
            self.init[k].after(self.position).replace(origin=k) if k in self.fixed else v
            for k, v in enumerate(state)
        ]

    def outside(self, outs: Sequence[Any]) -> list[Any]:
        """The state that a step's outputs are, or `_Again` with weaker assumptions."""
        again = False
        for k, (v, init) in enumerate(zip(outs, self.init, strict=True)):
            if k in self.fixed:
                if not (isinstance(v, Node) and v.origin == k):
                    self.fixed.discard(k)
                    again = True
            elif isinstance(init, Node) and not (isinstance(v, Node) and init.like(v)):
                self.summed.add(k)
                again = True
            elif isinstance(init, Node):
                both = init.either([init, v], jax.tree.leaves(init))
                form: Any = jax.tree.structure(both)
                if form != jax.tree.structure(init.replace()):
                    self.init[k] = both
                    again = True
        if again:
            raise _Again

        def state(k: int, v: Any) -> Any:
            init = self.init[k]
            if k in self.fixed:
                return None
            if isinstance(v, Node) and isinstance(init, Node):
                return init.either([init], jax.tree.leaves(v.varying()))
            return self.interpreter.materialize(v, self.use)

        return [state(k, v) for k, v in enumerate(outs)]

    def run(self, loop: Callable[[list[Any]], Sequence[Any]]) -> list[Any]:
        while True:
            for k in self.summed:
                self.init[k] = self.interpreter.materialize(self.init[k], self.use)
            init = [
                None if k in self.fixed else v.varying() if isinstance(v, Node) else v
                for k, v in enumerate(self.init)
            ]
            try:
                outs = loop(unmarked(init))
            except _Again:
                continue
            return [self.init[k] if k in self.fixed else v for k, v in enumerate(outs)]
