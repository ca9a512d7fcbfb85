"""`lora_apply`: runs any function on a `lora` tree, its adapters kept in factored form."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax.extend.core import JaxprEqn

from jaxlora import (
    _compat,
    _control_flow,  # noqa: F401  (enters its rules)
    _paths,
)
from jaxlora._deferred import Deferred
from jaxlora._dropout import uses
from jaxlora._errors import MaterializeError, TargetError
from jaxlora._factored import Factored, Node
from jaxlora._quantized import is_quantized
from jaxlora._rules import apply_rule
from jaxlora._sharded import constrained
from jaxlora._weight import FullWeight, LoraWeight, is_node

Materialize = Literal["error", "allow"]


class Interpreter:
    """Evaluates a jaxpr in which some values are weights (`Node`s).

    An equation that no weight enters is bound as it is; any other goes to its primitive's rule.

    Args:
      materialize: (node, use) -> array: what to do with a use that has no factored form.
    """

    def __init__(self, materialize: Callable[[Node, str], Any]):
        self._materialize = materialize
        self.manual = 0  # within how many shard_maps
        # The equations being evaluated, outermost first, and how many uses of weights come before.
        self._entered: list[tuple[JaxprEqn, int]] = []
        self._jitted: dict[Any, Callable[..., Any]] = {}

    def materialize(self, value: Any, use: str) -> Any:
        return self._materialize(value, use) if isinstance(value, Node) else value

    def where(self) -> str:
        """The user's line that is being evaluated: JAX's own functions have none inside."""
        lines = (_compat.source_line(eqn) for eqn, _ in reversed(self._entered))
        return next(filter(None, lines), "an unknown line")

    @property
    def position(self) -> int:
        """How many uses of weights come before the present equation, in its jaxpr."""
        return self._entered[-1][1]

    def used(self, node: Any) -> Any:
        """A weight as the present contraction meets it.

        Raises:
          TargetError: it would drop in one pass of a gradient what it keeps in the other.
        """
        if node.drops and any(_compat.is_differentiated(eqn) for eqn, _ in self._entered):
            raise TargetError(
                f"{node.path}: dropout in a gradient that the function itself takes, at "
                f"{self.where()}: its forward and its backward pass would drop other elements. "
                "Take the gradient outside, jax.grad of jaxlora.lora_apply(fn), or call it without "
                "dropout: jaxlora.with_dropout(lora, None)."
            )
        return node.after(self.position)

    def eval(self, jaxpr: Any, args: Sequence[Any]) -> list[Any]:
        """The outputs of a jaxpr, open or closed, on values that may be nodes."""
        inner, consts = _compat.split_jaxpr(jaxpr)
        env = dict(zip([*inner.constvars, *inner.invars], [*consts, *args], strict=True))

        def read(var: Any) -> Any:
            return var.val if isinstance(var, _compat.Literal) else env[var]

        scopes, position, drops = _compat.name_stack(), 0, _any_drops(args)
        for context, eqns in _compat.by_context(inner.eqns):
            with context:
                for eqn in eqns:
                    values = [read(v) for v in eqn.invars]
                    with _compat.source_context(eqn, scopes):
                        if any(isinstance(v, Node) for v in values):
                            outs = self._rule(eqn, values, position)
                        else:
                            outs = _compat.bind(eqn, values)
                    env.update(zip(eqn.outvars, outs, strict=True))
                    position += uses(eqn) if drops else 0
        return [read(v) for v in inner.outvars]

    def _rule(self, eqn: JaxprEqn, values: list[Any], position: int) -> Sequence[Any]:
        self._entered.append((eqn, position))
        try:
            return apply_rule(self, eqn, values)
        finally:
            self._entered.pop()

    def jitted(
        self,
        jaxpr: Any,
        name: str,
        shardings: tuple[Sequence[Any], Sequence[Any]],
        donate_argnums: tuple[int, ...],
        inline: Any,
    ) -> Callable[..., Any]:
        """`jax.jit` of `eval`, one for each jaxpr, so that its calls share their trace.

        Shardings become constraints: which of the outputs are weights, with factors of their own,
        shows only inside.
        """
        key = id(jaxpr), shardings, donate_argnums, inline
        if key not in self._jitted:

            def run(*args: Any) -> list[Any]:
                args = tuple(map(constrained, args, shardings[0]))
                return list(map(constrained, self.eval(jaxpr, args), shardings[1]))

            run.__name__ = run.__qualname__ = name
            self._jitted[key] = jax.jit(run, donate_argnums=donate_argnums, inline=inline)
        return self._jitted[key]


def _any_drops(values: Sequence[Any]) -> bool:
    return any(isinstance(v, Node) and v.drops for v in values)


def lora_apply(
    fn: Callable[..., Any], *, jit: bool = True, materialize: Materialize = "error"
) -> Callable[..., Any]:
    r"""The same function, for params whose weights carry adapters.

    Wherever `fn` multiplies by a weight W, the result computes

        y = x W + ((x a) * scale) b

    in that order, a and b cast to x's dtype, the sum in y's dtype. W + scale * a b is never formed:
    not in the forward pass, nor in the backward pass, under scan, remat or jit. `fn` is traced once
    for each set of shapes and is not changed.

    Array leaves of the arguments (JAX and NumPy arrays, tracers) are traced; all else (bools, ints,
    strings, callables, None) stays Python, so that `train=True` works; a number that changes from
    call to call is best passed as an array, since each Python value compiles anew. Apply once,
    outside of the training loop: what is compiled is kept with the returned function.

    Args:
      fn: any JAX function; its `LoraWeight`s and `FullWeight`s may sit anywhere in its arguments.
      jit: compile the result, keyed on shapes and on the non-array leaves (which must be hashable).
        It inlines under an outer `jax.jit`. False gives the bare transform.
      materialize: "error" raises where a weight is used in a way that has no factored form; "allow"
        forms W + scale * a b there, in float32, rounded to W's dtype.

    Returns:
      A function of the same signature. A node that `fn` returns unchanged comes out as that node.

    Raises:
      MaterializeError: (from the returned function) a weight is used in a way that would form
        W + scale * a b. The message names the primitive, the path, the line, and the ways out.
      RolesError: a matmul contracts dims that the roles call outputs.
      TargetError: the parts of a node do not fit each other, or half of one is missing.

    >>> import jax, jax.numpy as jnp, jaxlora
    >>> params = {"kernel": jnp.ones((3, 4))}
    >>> config = jaxlora.LoraConfig(rank=2, targets=["kernel"])
    >>> lora = jaxlora.init(jax.random.key(0), params, config)
    >>> apply = jaxlora.lora_apply(lambda params, x: x @ params["kernel"])
    >>> apply(lora, jnp.ones((5, 3))).shape
    (5, 4)

    References:
      Hu et al. 2021, LoRA: Low-Rank Adaptation of Large Language Models, arXiv 2106.09685,
      section 4.1 and figure 1.
    """
    if materialize not in ("error", "allow"):
        raise ValueError(f"materialize: got {materialize!r}, expected 'error' or 'allow'.")

    def on_materialize(node: Node, use: str) -> Any:
        assert isinstance(node, Factored)
        if node.is_row:
            return node.sum()
        if materialize == "allow":
            return node.materialized()
        names = [*map(_paths.short, node.path.split(", "))]
        call, form, ways = "LoraConfig", "form W + BA", "leave this weight out of the targets"
        if isinstance(node.w, Deferred):
            call, form = "jaxlora.quantize", "dequantize a quantized weight as a whole"
        raise MaterializeError(
            f"{node.path}: {use} would have to {form}, of shape {node.shape}. Either allow that "
            f'with jaxlora.lora_apply(fn, materialize="allow"), or {ways}: {call}(..., '
            f"exclude={names})."
        )

    def run(arguments: Arguments, dynamic: list[Any]) -> Any:
        nodes = [x if is_node(x) or is_quantized(x) else None for x in dynamic]
        paths = arguments.paths(dynamic)
        arrays = [as_array(x, path) for x, path in zip(dynamic, paths, strict=True)]
        out_tree = None

        def flat(arrays: list[Any]) -> list[Any]:
            nonlocal out_tree
            args, kwargs = arguments.rebuild(arrays)
            leaves, out_tree = jax.tree.flatten(fn(*args, **kwargs))
            return leaves

        closed = jax.make_jaxpr(flat)(arrays)
        inner, _ = _compat.split_jaxpr(closed)
        pairs = zip(dynamic, paths, strict=True)
        values = [as_value(x, path, k) for k, (x, path) in enumerate(pairs)]
        outs = Interpreter(on_materialize).eval(closed, values)
        inputs = {v: k for k, v in enumerate(inner.invars)}

        def returned(var: Any, out: Any) -> Any:
            k = out.origin if isinstance(out, Node) else None
            if k is None and not isinstance(var, _compat.Literal):
                k = inputs.get(var)  # a FullWeight's value, handed through
            if k is not None and nodes[k] is not None:
                return nodes[k]
            return on_materialize(out, "returning it changed") if isinstance(out, Node) else out

        outs = [returned(v, out) for v, out in zip(inner.outvars, outs, strict=True)]
        assert out_tree is not None
        return jax.tree.unflatten(out_tree, outs)

    compiled = jax.jit(run, static_argnums=0) if jit else run

    @functools.wraps(fn)
    def applied(*args: Any, **kwargs: Any) -> Any:
        arguments, dynamic = Arguments.split(args, kwargs)
        if jit:
            arguments.check_hashable()
        return compiled(arguments, dynamic)

    return applied


def as_array(x: Any, path: str) -> Any:
    """What `fn` is traced with in place of a leaf: an array, or its form."""
    if is_node(x):
        x.check(path)
        x = x.w if isinstance(x, LoraWeight) else x.value
    return jax.ShapeDtypeStruct(x.shape, x.dtype) if is_quantized(x) else x


def as_value(x: Any, path: str, origin: int | None = None) -> Any:
    """What the interpreter has in place of a leaf."""
    if isinstance(x, LoraWeight):
        return Factored.of(x, path, origin)
    x = x.value if isinstance(x, FullWeight) else x
    return Factored.plain(x, path, origin) if is_quantized(x) else x


def _is_whole(x: Any) -> bool:
    """Whether x is a leaf to us and none to JAX."""
    return is_node(x) or is_quantized(x)


class _Array:
    """Where an array stood."""


_ARRAY = _Array()


def is_array(x: Any) -> bool:
    """Whether a leaf is traced. NumPy's bools are flags, as Python's are."""
    return isinstance(x, jax.Array | np.ndarray | np.generic) and not isinstance(x, np.bool_)


class Arguments:
    """The arguments of a call without their arrays: hashable, the key of its compilation."""

    def __init__(self, treedef: Any, static: tuple[Any, ...]):
        self.treedef, self.static = treedef, static
        # 1, 1.0 and True are equal, and are not the same argument.
        # So are 0.0 and -0.0; and no NaN equals itself.
        self._key = (
            treedef,
            tuple((type(x), x.hex() if isinstance(x, float) else x) for x in static),
        )

    @classmethod
    def split(
        cls, args: Any, kwargs: Any, is_dynamic: Callable[[Any], bool] = is_array
    ) -> tuple[Arguments, list[Any]]:
        """(the rest, the arrays and nodes) of a call's arguments."""
        leaves, treedef = jax.tree.flatten((args, kwargs), is_leaf=_is_whole)
        dynamic = [is_dynamic(x) or _is_whole(x) for x in leaves]
        static = tuple(_ARRAY if d else x for d, x in zip(dynamic, leaves, strict=True))
        return cls(treedef, static), [x for d, x in zip(dynamic, leaves, strict=True) if d]

    def paths(self, dynamic: list[Any]) -> list[str]:
        """Of each array or node, the path within its argument."""
        stand_ins = [_ARRAY if _is_whole(x) else x for x in dynamic]
        pairs, _ = _paths.flatten_with_paths(self.rebuild(stand_ins))
        # The first two keys say which argument a leaf is in; the rest is the params' own path.
        return [
            path.split("/", 2)[-1]
            for (path, _), x in zip(pairs, self.static, strict=True)
            if x is _ARRAY
        ]

    def rebuild(self, arrays: Sequence[Any]) -> Any:
        rest = iter(arrays)
        return jax.tree.unflatten(
            self.treedef, [next(rest) if x is _ARRAY else x for x in self.static]
        )

    def check_hashable(self) -> None:
        for x in self.static:
            try:
                hash(x)
            except TypeError:
                raise TypeError(
                    f"lora_apply: got an argument of type {type(x).__name__}, which is neither an "
                    "array nor hashable, expected one or the other. Bind it with functools.partial "
                    "before lora_apply, or use lora_apply(fn, jit=False)."
                ) from None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Arguments) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)
