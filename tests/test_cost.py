"""What a train step costs: no more than LoRA written into the model by hand; no base gradient.

Everything here is counted by the compiler or read from the program, so nothing depends on the
machine's speed. XLA counts a loop's body once: scanned is compared with scanned only.
"""

import functools
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import count_primitives, mostly_slow
from jax import lax

import jaxlora
from benchmarks import models
from benchmarks.harness import compiled_figures
from benchmarks.train_step import (
    FULL,
    HAND_WRITTEN,
    PARTITION,
    RUN_ONCE,
    TRAIN_STATE,
    Step,
    steps,
)

JAXLORA = (PARTITION, TRAIN_STATE)
pytestmark = pytest.mark.xdist_group("cost")  # one worker compiles the programs once
SIZES: dict[str, Any] = {"n_layers": 4, "width": 64, "vocab": 128}
MODELS = {
    "unrolled": models.Transformer(scan=False, **SIZES),
    "scanned": models.Transformer(scan=True, **SIZES),
    "scanned remat": models.Transformer(scan=True, remat=True, **SIZES),
}


class Program(NamedTuple):
    """A step, compiled, and what one call of it gave."""

    step: Step
    compiled: jax.stages.Compiled
    state: Any
    loss: jax.Array

    @property
    def figures(self) -> dict[str, float]:
        return compiled_figures(self.compiled)


@pytest.fixture(params=mostly_slow(MODELS, ("scanned", "unrolled")))
def programs(request: pytest.FixtureRequest) -> dict[str, Program]:
    return _programs(request.param)


@functools.cache  # a fixture of the module is made again when tests come in another order
def _programs(name: str) -> dict[str, Program]:
    """The four steps. No activation has the shape of a kernel, nor any adapter."""
    built = steps(MODELS[name], batch=4, length=24, rank=2, tx=optax.adam(1e-2))
    with ThreadPoolExecutor() as pool:  # compiling leaves Python's lock
        return dict(zip(built, pool.map(_run, built.values()), strict=True))


def _run(step: Step) -> Program:
    jitted = jax.jit(step.step, donate_argnums=0)
    compiled = jitted.lower(step.state, *step.constants).compile(compiler_options=RUN_ONCE)
    state, loss = compiled(jax.tree.map(jnp.copy, step.state), *step.constants)
    return Program(step, compiled, state, loss)


@pytest.mark.parametrize("name", JAXLORA)
def test_flops_are_at_most_those_of_the_hand_written(
    programs: dict[str, Program], name: str
) -> None:
    ours, theirs = (programs[n].figures["flops"] for n in (name, HAND_WRITTEN))
    assert ours <= 1.005 * theirs


@pytest.mark.parametrize("name", JAXLORA)
def test_temp_memory_is_at_most_that_of_the_hand_written(
    programs: dict[str, Program], name: str
) -> None:
    ours, theirs = (programs[n].figures["temp_bytes"] for n in (name, HAND_WRITTEN))
    assert ours <= 1.02 * theirs


@pytest.mark.parametrize("name", JAXLORA)
def test_loss_and_updated_adapters_are_those_of_the_hand_written(
    programs: dict[str, Program], name: str
) -> None:
    theirs, _ = programs[HAND_WRITTEN].state
    before, _ = programs[HAND_WRITTEN].step.state
    ours = _adapters(name, programs[name].state)
    np.testing.assert_allclose(programs[name].loss, programs[HAND_WRITTEN].loss, rtol=1e-6)
    assert ours
    assert ours.keys() == theirs.keys()
    for path, expected in theirs.items():
        assert np.abs(expected - before[path]).min() > 0, path
        np.testing.assert_allclose(ours[path], expected, rtol=0, atol=1e-5, err_msg=str(path))


def test_the_step_leaves_the_base_bit_for_bit(programs: dict[str, Program]) -> None:
    program = programs[TRAIN_STATE]
    _, before = jaxlora.partition(program.step.state.params)
    _, after = jaxlora.partition(program.state.params)
    jax.tree.map(np.testing.assert_array_equal, after, before)


def test_lora_costs_less_than_full_fine_tuning(programs: dict[str, Program]) -> None:
    """2x the forward's matmuls and the adapters' own, not 3x."""
    for name in JAXLORA:
        assert programs[name].figures["flops"] < 0.8 * programs[FULL].figures["flops"]


@pytest.mark.parametrize("name", JAXLORA)
def test_no_compiled_dot_forms_a_kernel(programs: dict[str, Program], name: str) -> None:
    """Neither a base gradient nor W + ab; full fine-tuning shows that the search finds them."""
    layer, whole = _kernel_shapes(programs[FULL].step.state[0])
    assert layer <= {_sorted(shape) for shape in _hlo_dots(programs[FULL].compiled)}
    found = {_sorted(shape) for shape in _hlo_dots(programs[name].compiled)}
    assert found
    assert not found & (layer | whole)


def test_no_traced_dot_forms_a_kernel(programs: dict[str, Program]) -> None:
    """Through `partition` the base's gradient is not even traced."""
    layer, whole = _kernel_shapes(programs[FULL].step.state[0])
    traced = {}
    for name in (PARTITION, FULL):
        step = programs[name].step
        jaxpr = jax.make_jaxpr(step.step)(step.state, *step.constants)
        traced[name] = {_sorted(shape) for shape in _traced_dots(jaxpr)}
    assert layer <= traced[FULL]
    assert traced[PARTITION]
    assert not traced[PARTITION] & (layer | whole)


def test_freeze_base_holds_state_for_what_trains_only(programs: dict[str, Program]) -> None:
    state = programs[TRAIN_STATE].step.state
    trainable, _ = jaxlora.partition(state.params)
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if jnp.ndim(leaf)]
    counters = [leaf for leaf in jax.tree.leaves(state.opt_state) if not jnp.ndim(leaf)]
    trained = jax.tree.leaves(trainable)
    assert sorted(leaf.shape for leaf in moments) == sorted(leaf.shape for leaf in 2 * trained)
    assert sum(leaf.size for leaf in moments) == 2 * sum(leaf.size for leaf in trained)
    assert len(counters) <= 2


# --- One layer of each other kind -----------------------------------------------------------------


def _conv(x, w, stride=1):
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, w, (stride, stride), "SAME", dimension_numbers=numbers)


SIZES_OF_GROUPS = jnp.array([20, 30, 14])
LAYERS = {
    "convolution": (
        lambda p, x: _conv(x, p["w"]),
        lambda w, a, b, s, x: _conv(x, w) + (_conv(x, a) * s) @ b,
        {"w": (3, 3, 32, 48)},
        "iiio",
        (2, 16, 16, 32),
    ),
    "strided convolution": (
        lambda p, x: _conv(x, p["w"], 2),
        lambda w, a, b, s, x: _conv(x, w, 2) + (_conv(x, a, 2) * s) @ b,
        {"w": (3, 3, 32, 48)},
        "iiio",
        (2, 16, 16, 32),
    ),
    "experts": (
        lambda p, x: lax.ragged_dot(x, p["w"], SIZES_OF_GROUPS),
        lambda w, a, b, s, x: (
            lax.ragged_dot(x, w, SIZES_OF_GROUPS)
            + lax.ragged_dot(lax.ragged_dot(x, a, SIZES_OF_GROUPS), b * s, SIZES_OF_GROUPS)
        ),
        {"w": (3, 32, 48)},
        "sio",
        (64, 32),
    ),
}


@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_costs_what_it_does_by_hand(layer: str) -> None:
    """FLOPs of the gradient with respect to a, b and the input."""
    fn, by_hand, shapes, roles, x_shape = LAYERS[layer]
    params = {"w": jnp.ones(shapes["w"])}
    config = jaxlora.LoraConfig(rank=4, alpha=8, targets=["w"], roles={"w": roles})
    lora = jaxlora.init(jax.random.key(0), params, config)
    trainable, frozen = jaxlora.partition(lora)
    x, node, apply = jnp.ones(x_shape), lora["w"], jaxlora.lora_apply(fn)

    def flops(loss: Any, *args: Any) -> float:
        compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*args).compile()
        return compiled_figures(compiled)["flops"]

    ours = flops(lambda t, x: jnp.sum(jnp.sin(apply(jaxlora.combine(t, frozen), x))), trainable, x)
    theirs = flops(
        lambda ab, x: jnp.sum(jnp.sin(by_hand(node.w, *ab, 2.0, x))), (node.a, node.b), x
    )
    assert ours <= 1.005 * theirs


def _adapters(name: str, state: Any) -> dict[models.Path, jax.Array]:
    """a and b of a jaxlora step's state, keyed as the hand-written step's."""
    trainable = jaxlora.partition(state.params)[0] if name == TRAIN_STATE else state[0]
    return models.split(models.hand_written(trainable))[0]


def _sorted(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A matrix and its transpose alike."""
    return tuple(sorted(shape))


def _kernel_shapes(params: Any) -> tuple[set[tuple[int, ...]], set[tuple[int, ...]]]:
    """The shapes of the kernels: of one layer's, and of those that are stacked as a whole."""
    flat = jax.tree_util.tree_flatten_with_path(params)[0]
    shapes = {leaf.shape for path, leaf in flat if path[-1].key == "kernel"}
    return {_sorted(shape[-2:]) for shape in shapes}, {_sorted(shape) for shape in shapes}


def _hlo_dots(compiled: jax.stages.Compiled) -> list[tuple[int, ...]]:
    """The shape of every dot in the compiled program, inside fusions and loops too."""
    shapes = re.findall(r"= \w+\[([\d,]*)\]\S* dot\(", compiled.as_text() or "")
    return [tuple(int(size) for size in shape.split(",") if size) for shape in shapes]


def _traced_dots(jaxpr: Any) -> Iterator[tuple[int, ...]]:
    """The shape of every dot_general in a jaxpr and in those within it."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            yield eqn.outvars[0].aval.shape
        for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_jaxpr):
            if _is_jaxpr(value):
                yield from _traced_dots(value)


def _is_jaxpr(value: Any) -> bool:
    return hasattr(value, "eqns") or hasattr(value, "jaxpr")


@pytest.mark.parametrize("transform", [jax.jit, jax.checkpoint, jax.vmap])
def test_a_cotangent_is_computed_before_the_adapters_use_it(transform: Any) -> None:
    """Else XLA on CPUs computes it again for the gradient of b, in transposed order: `settled`."""
    x, params = jnp.ones((2, 5, 4)), {"kernel": jnp.ones((4, 6))}
    config = jaxlora.LoraConfig(rank=2, targets=["kernel"])
    lora = jaxlora.init(jax.random.key(0), params, config)

    def loss(lora: Any, x: jax.Array) -> jax.Array:
        apply = jaxlora.lora_apply(lambda p, x: jax.nn.silu(x @ p["kernel"]))
        return transform(functools.partial(apply, lora))(x).sum()

    here, gradient = jax.make_jaxpr(loss)(lora, x), jax.make_jaxpr(jax.grad(loss))(lora, x)
    count = functools.partial(count_primitives, name="optimization_barrier")
    assert (count(here), count(gradient)) == (0, 1)
