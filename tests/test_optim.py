"""Optimizers: LoRA+ against PEFT's, 8-bit AdamW against bitsandbytes' and against float64."""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from helpers import assert_close, assert_same, randomized
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxlora
from jaxlora import FullWeight, LoraConfig, LoraWeight, TargetError
from jaxlora._adamw_8bit import (
    BLOCK_SIZE,
    Moment8bit,
    ScaleByAdam8bitState,
    _code_book,
    _nearest,
)
from jaxlora._codebooks import dynamic_code
from jaxlora.optim import adamw_8bit, freeze_base, labels, lora_plus

KEY = jax.random.key(0)
PARAMS = {
    "params": {
        "embed": {"embedding": jnp.ones((11, 6))},
        "up": {"kernel": jnp.ones((6, 8)), "bias": jnp.ones(8)},
        "down": {"kernel": jnp.ones((8, 6)), "bias": jnp.ones(6)},
    }
}
CONFIG = LoraConfig(rank=2, targets=["embed", "up"], bias="lora_only")
LORA = randomized(jaxlora.init(KEY, PARAMS, CONFIG))
TRAINABLE, FROZEN = jaxlora.partition(LORA)


def gradients_of(tree: Any, seed: int = 0) -> Any:
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), x.dtype), tree)


def stacked(trees: Any) -> Any:
    return jax.tree.map(lambda *xs: jnp.stack(xs), *trees)


def run(tx: Any, params: Any, steps: int = 3, gradient_of: Any = gradients_of) -> Any:
    """The params and the state after some steps along fixed random gradients: one `lax.scan`."""

    def step(carry: Any, gradient: Any) -> Any:
        params, state = carry
        updates, state = tx.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), None

    gradients = stacked([gradient_of(params, seed) for seed in range(steps)])
    start = lambda params: (params, tx.init(params))
    return jax.jit(lambda p, g: jax.lax.scan(step, start(p), g)[0])(params, gradients)


@pytest.fixture(scope="module")
def references() -> Any:
    """See tests/oracle/optim.py."""
    with np.load(pathlib.Path(__file__).parent / "references" / "optim.npz") as file:
        return dict(file)


# --- Labels ---------------------------------------------------------------------------------------


def test_labels_name_what_trains():
    tree = labels(LORA)["params"]
    assert {f: getattr(tree["up"]["kernel"], f) for f in ("w", "a", "b", "scale")} == {
        "w": "frozen",
        "a": "a",
        "b": "b",
        "scale": "frozen",
    }
    assert (tree["up"]["bias"].w, tree["up"]["bias"].value) == ("frozen", "full")
    assert tree["down"] == {"kernel": "frozen", "bias": "frozen"}


def test_labels_agree_with_the_mask():
    trains = jax.tree.map(lambda label: label != "frozen", labels(LORA))
    assert jax.tree.leaves(trains) == jax.tree.leaves(jaxlora.trainable_mask(LORA))
    assert jax.tree.structure(trains) == jax.tree.structure(LORA)


def test_labels_of_a_half():
    assert set(jax.tree.leaves(labels(TRAINABLE))) == {"a", "b", "full"}
    assert set(jax.tree.leaves(labels(FROZEN))) == {"frozen"}
    assert jax.tree.structure(labels(TRAINABLE)) == jax.tree.structure(TRAINABLE)


def test_a_partition_of_ones_own():
    rates = {"a": 0.0, "b": 0.5, "full": 0.25}
    tx = optax.partition({name: optax.sgd(rate) for name, rate in rates.items()}, labels)
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, TRAINABLE), tx.init(TRAINABLE))
    expected = jax.tree.map(
        lambda x, label: jnp.full_like(x, -rates[label]), TRAINABLE, labels(TRAINABLE)
    )
    assert_same(jax.tree.map(jnp.abs, updates), jax.tree.map(jnp.abs, expected))


# --- LoRA+ ----------------------------------------------------------------------------------------


def test_lora_plus_is_pefts(references):
    def tree(prefix: str) -> Any:
        def node(layer: str) -> Any:
            a, b = (jnp.asarray(references[f"loraplus/{prefix}/{layer}/{f}"]) for f in "ab")
            w = jnp.zeros((a.shape[0], b.shape[1]))
            return LoraWeight(w=w, a=a, b=b, scale=0.5, roles="io")

        nodes = {"embed": {"embedding": node("embed")}, "up": {"kernel": node("up")}}
        return jaxlora.partition(nodes)[0]

    settings = {"embedding_learning_rate": 0.003, "weight_decay": 0.1}
    tx = lora_plus(0.01, 8.0, embeddings=["embed"], **settings)
    params = tree("start")
    state, update = tx.init(params), jax.jit(tx.update)
    for k in range(1, 4):
        updates, state = update(tree(f"{k}/gradient"), state, params)
        params = optax.apply_updates(params, updates)
    assert_close(params, tree("end"))


@pytest.mark.parametrize(
    ("optimizer", "settings"), [(optax.sgd, {"momentum": 0.9}), (optax.lion, {"weight_decay": 0.3})]
)
def test_lora_plus_of_any_optimizer_and_schedule(optimizer, settings):
    rate = optax.linear_schedule(0.1, 0.01, 3)
    got, _ = run(lora_plus(rate, 4.0, optimizer=optimizer, **settings), TRAINABLE)
    slow, _ = run(optimizer(rate, **settings), TRAINABLE)
    fast, _ = run(optimizer(lambda t: 4.0 * rate(t), **settings), TRAINABLE)
    names = labels(TRAINABLE)
    assert_close(got, jax.tree.map(lambda s, f, l: f if l == "b" else s, slow, fast, names))


OPTIMIZERS = {
    "clipped": lambda: optax.chain(
        optax.clip_by_global_norm(0.1),
        lora_plus(0.1, embeddings=["embed"], embedding_learning_rate=0.01),
    ),
    "8bit": lambda: adamw_8bit(0.1, min_8bit_size=10),
    "multi_steps": lambda: optax.MultiSteps(
        lora_plus(0.1, optimizer=adamw_8bit, min_8bit_size=10), 2
    ),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_the_whole_tree_trains_as_its_half(make):
    def whole_gradient(lora: Any, seed: int) -> Any:
        half, rest = jaxlora.partition(lora)
        return jaxlora.combine(gradients_of(half, seed), jax.tree.map(jnp.ones_like, rest))

    half, _ = run(make(), TRAINABLE, steps=4)
    whole, _ = run(freeze_base(make(), LORA), LORA, steps=4, gradient_of=whole_gradient)
    assert_close(jaxlora.partition(whole)[0], half)
    assert_same(jaxlora.partition(whole)[1], FROZEN)
    moved = jax.tree.map(lambda x, y: np.any(np.asarray(x) != np.asarray(y)), half, TRAINABLE)
    assert all(jax.tree.leaves(moved))


def test_lora_plus_on_the_whole_tree_leaves_the_base():
    whole, _ = run(lora_plus(0.1, optimizer=optax.sgd), LORA)
    assert_same(jaxlora.partition(whole)[1], FROZEN)


@pytest.mark.parametrize("ratio", [0, -1.0, float("nan")])
def test_a_ratio_that_is_not_positive(ratio):
    with pytest.raises(TargetError, match=r"lora_plus: got ratio=.*expected a positive number"):
        lora_plus(1e-3, ratio)


@pytest.mark.parametrize(
    "tree", [PARAMS, jax.tree.leaves(LORA), {"head": FullWeight(w=jnp.ones(3), value=jnp.ones(3))}]
)
def test_lora_plus_of_a_tree_without_adapters(tree):
    with pytest.raises(TargetError, match=r"leaves without a LoraWeight.*jaxlora\.partition"):
        lora_plus(1e-3).init(tree)


def test_lora_plus_inside_of_flatten():
    with pytest.raises(TargetError, match=r"go inside: lora_plus\(..., optimizer=...\)"):
        optax.flatten(lora_plus(1e-3)).init(TRAINABLE)
    run(lora_plus(1e-3, optimizer=lambda rate: optax.flatten(optax.adamw(rate))), TRAINABLE)


def test_embeddings_that_match_nothing():
    with pytest.raises(TargetError, match=r"(?s)embeddings: 'embde' matches nothing.*embed"):
        lora_plus(1e-3, embeddings=["embde"]).init(TRAINABLE)


def test_the_state_of_lora_plus_can_be_mapped():
    """What gives optimizer states their shardings; it calls `init` with a placeholder."""
    tx = lora_plus(1e-3)
    state = tx.init(TRAINABLE)
    named = optax.tree.map_params(tx, lambda _: "moment", state, transform_non_params=lambda _: 0)
    sizes = len(jax.tree.leaves(TRAINABLE))
    assert jax.tree.leaves(named).count("moment") == 2 * sizes


# --- The code book and the nearest entry ----------------------------------------------------------


@pytest.mark.parametrize("name", ["signed", "unsigned"])
def test_the_code_book_is_that_of_bitsandbytes(references, name):
    assert dynamic_code(signed=name == "signed").tobytes() == references[f"code/{name}"].tobytes()


@pytest.mark.parametrize("signed", [True, False])
def test_the_code_book_follows_its_definition(signed):
    """Seven decades, each of twice as many equal parts as the one below."""
    middles = [
        10.0 ** (k - 6) * (0.1 + 0.9 * (np.arange(n) + 0.5) / n)
        for k, n in ((k, 2 ** (k + (not signed))) for k in range(7))
    ]
    values = np.concatenate([[0.0, 1.0], *middles, *([-m for m in middles] if signed else [])])
    np.testing.assert_allclose(dynamic_code(signed), np.sort(values), rtol=3e-7)


@pytest.mark.parametrize("signed", [True, False])
def test_the_nearest_code_is_nearest(signed):
    """Against all distances in float64; at the midpoints, beside them, and at random."""
    code = dynamic_code(signed).astype(np.float64)
    middles = ((code[1:] + code[:-1]) / 2).astype(np.float32)
    rng = np.random.default_rng(0)
    spread = np.exp(-20 * rng.uniform(size=5000)) * rng.choice([-1, 1] if signed else [1], 5000)
    down, up = (np.nextafter(middles, np.float32(end)) for end in (-2, 2))
    edges = [-1, -0.0, 0, 1] if signed else [0, 1]
    x = np.concatenate([code, middles, down, up, spread, edges]).astype(np.float32)
    got = np.asarray(jax.jit(_nearest)(x, _code_book(signed)))
    distances = np.abs(x[:, None].astype(np.float64) - code)
    if not signed:
        distances[x > 0, 0] = np.inf  # what is positive does not become zero
    np.testing.assert_array_equal(got, distances.argmin(axis=1))  # argmin: the lower one of a tie


@pytest.mark.parametrize("signed", [True, False])
def test_no_two_thresholds_share_the_leading_half_of_a_float(signed):
    """On which the search rests."""
    halves = _code_book(signed).thresholds.view(np.uint32) >> 16
    assert len(set(halves)) == 256


# --- Steps of 8-bit AdamW -------------------------------------------------------------------------


def test_steps_are_those_of_bitsandbytes(references):
    """Each step from the state that bitsandbytes had, since one rounding is not its own."""

    def tree(prefix: str) -> Any:
        get = lambda name: jnp.asarray(references[f"adamw/{prefix}/{name}"])
        return {"large": get("large"), "small": get("small")}

    def moment(k: int, name: str) -> Any:
        stored = tree(f"{k}/{name}")
        absmax = jnp.asarray(references[f"adamw/{k}/{name}_absmax/large"])
        return stored | {"large": Moment8bit(stored["large"], absmax)}

    tx = adamw_8bit(0.02, b1=0.9, b2=0.99, eps=1e-8, weight_decay=0.1, min_8bit_size=512)
    params, update, zeros = tree("start"), jax.jit(tx.update), 0
    state = tx.init(params)
    for k in range(1, 4):
        updates, state = update(tree(f"{k}/gradient"), state, params)
        assert_close(optax.apply_updates(params, updates), tree(f"{k}/param"))
        for got, expected in ((state[0].mu, moment(k, "mu")), (state[0].nu, moment(k, "nu"))):
            np.testing.assert_allclose(got["small"], expected["small"], rtol=1e-6, atol=1e-30)
            got, expected = got["large"], expected["large"]
            np.testing.assert_allclose(got.absmax, expected.absmax, rtol=1e-6)
            differ = np.asarray(got.codes != expected.codes)
            assert np.all(expected.codes[differ] == 0)
            assert np.all(got.codes[differ] == 1)
            zeros += differ.sum()
        params = tree(f"{k}/param")
        state = (ScaleByAdam8bitState(jnp.int32(k), moment(k, "mu"), moment(k, "nu")), *state[1:])
    assert zeros > 100  # a positive second moment that bitsandbytes stores as zero


def dequantized(moment: Any, signed: bool) -> np.ndarray:
    if not isinstance(moment, Moment8bit):
        return np.asarray(moment, np.float64)
    codes, absmax = np.asarray(moment.codes), np.asarray(moment.absmax, np.float64)
    scales = np.repeat(absmax, BLOCK_SIZE)[: codes.size].reshape(codes.shape)
    return dynamic_code(signed).astype(np.float64)[codes] * scales


def check_stored(moment: Any, exact: np.ndarray, error: np.ndarray, signed: bool) -> None:
    """Each entry is the nearest one to `exact`, which is known up to `error`."""
    if not isinstance(moment, Moment8bit):
        np.testing.assert_array_less(np.abs(np.asarray(moment) - exact), error + 1e-30)
        return
    flat = np.pad(exact.reshape(-1), (0, -exact.size % BLOCK_SIZE)).reshape(-1, BLOCK_SIZE)
    np.testing.assert_allclose(moment.absmax, np.abs(flat).max(axis=1, initial=0), rtol=1e-6)
    scales = np.repeat(np.asarray(moment.absmax, np.float64), BLOCK_SIZE)[: exact.size]
    entries = scales[:, None] * dynamic_code(signed)
    distances = np.abs(entries - exact.reshape(-1, 1))
    if not signed:
        distances[exact.reshape(-1) > 0, 0] = np.inf
    best = distances.min(axis=1)
    off = np.abs(dequantized(moment, signed) - exact).reshape(-1)
    assert np.all(off <= best + 2 * error.reshape(-1) + 1e-30)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_steps_are_those_of_float64(dtype):
    """Each step from the state that the last one stored; odd sizes, zeros, and tiny gradients."""
    lr, b1, b2, eps, decay = 0.01, 0.8, 0.95, 1e-8, 0.3
    rng = np.random.default_rng(0)
    shapes = {"odd": (3, 7, 31), "block": (256,), "few": (5,), "none": (0, 4), "zero": (2, 200)}
    params = {name: jnp.asarray(rng.standard_normal(s), dtype) for name, s in shapes.items()}
    tx = adamw_8bit(optax.linear_schedule(lr, 0.0, 10), b1, b2, eps, decay, min_8bit_size=100)
    state, update = tx.init(params), jax.jit(tx.update)
    for t in range(1, 5):
        spread = {name: 10 ** rng.uniform(-6, 1, s) for name, s in shapes.items()}
        spread["zero"][:, 50:] = 0  # a block with zeros, one of zeros alone
        gradients = {
            name: jnp.asarray(rng.standard_normal(s) * spread[name], dtype)
            for name, s in shapes.items()
        }
        old = state[0]
        updates, state = update(gradients, state, params)
        rate = lr * (1 - (t - 1) / 10)
        for name, gradient in gradients.items():
            g, p = (np.asarray(x, np.float64) for x in (gradient, params[name]))
            m, v = dequantized(old.mu[name], True), dequantized(old.nu[name], False)
            terms = b1 * np.abs(m) + (1 - b1) * np.abs(g)
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
            check_stored(state[0].mu[name], m, 1e-6 * terms, signed=True)
            check_stored(state[0].nu[name], v, 1e-6 * v, signed=False)
            denominator = np.sqrt(v / (1 - b2**t)) + eps
            expected = -rate * (m / (1 - b1**t) / denominator + decay * p)
            rounding = 2**-8 if dtype == "bfloat16" else 0
            size = rate * (terms / (1 - b1**t) / denominator + decay * np.abs(p))
            off = np.abs(np.asarray(updates[name], np.float64) - expected)
            assert updates[name].dtype == dtype
            assert np.all(off <= 4e-6 * size + rounding * np.abs(expected))
        params = optax.apply_updates(params, updates)


def test_zero_gradients_from_the_start():
    params = {"w": jnp.ones((20, 20))}
    tx = adamw_8bit(0.1, weight_decay=0.0, min_8bit_size=1)
    updates, state = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    assert not np.any(updates["w"])
    assert np.all(dequantized(state[0].mu["w"], True) == 0)


def test_a_gradient_that_stops_is_no_explosion():
    """A small gradient, then none, beside a large one: bitsandbytes steps 12,731 times lr."""
    params = {"w": jnp.zeros(512)}
    tx, update = quick_tx(1.0), jax.jit(quick_tx(1.0).update)
    state = tx.init(params)
    for small in (3e-4, 0.0, 0.0):
        gradient = jnp.full(512, small).at[0].set(1.0)
        updates, state = update({"w": gradient}, state, params)
        assert np.all(np.abs(updates["w"]) <= 1.0 + 1e-4)
    assert np.all(updates["w"] < 0)


def test_a_gradient_that_is_not_finite_shows():
    params = {"w": jnp.ones((20, 20))}
    tx = adamw_8bit(0.1, min_8bit_size=1)
    gradients = {"w": jnp.ones((20, 20)).at[0, 0].set(jnp.nan)}
    _, state = tx.update(gradients, tx.init(params), params)
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
    assert np.isnan(updates["w"][0, 0])
    assert np.all(np.isfinite(updates["w"].reshape(-1)[BLOCK_SIZE:]))


def test_leaves_stay_in_float32_below_the_smallest_size():
    params = {"below": jnp.ones(4095), "at": jnp.ones(4096)}
    moments = adamw_8bit(0.1).init(params)[0].nu
    assert moments["below"].dtype == jnp.float32
    assert moments["at"].codes.dtype == jnp.uint8


def bytes_of(tree: Any) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(tree))


@pytest.mark.parametrize("shape", [(64, 64), (4097,), (3, 1000, 7)])
def test_the_state_is_at_most_three_tenths(shape):
    params = {"w": jnp.ones(shape)}
    assert bytes_of(adamw_8bit(0.1).init(params)) <= 0.3 * bytes_of(optax.adamw(0.1).init(params))


def quick_tx(rate: Any = 0.1) -> Any:
    return adamw_8bit(rate, min_8bit_size=100)


def test_a_scan_of_steps_is_a_loop_of_steps():
    params, tx = {"w": jnp.ones((20, 20)), "b": jnp.ones(3)}, quick_tx()
    scanned, state = run(tx, params, steps=4)
    looped, looped_state, update = params, tx.init(params), jax.jit(tx.update)
    for seed in range(4):
        updates, looped_state = update(gradients_of(params, seed), looped_state, looped)
        looped = optax.apply_updates(looped, updates)
    assert_same(state[0].mu["w"].codes, looped_state[0].mu["w"].codes)
    assert_close(scanned, looped)


def test_adapters_side_by_side_are_adapters_one_by_one():
    """vmap: blocks and the smallest size are those of each adapter."""
    tx = quick_tx()
    adapters = [gradients_of({"a": jnp.ones((9, 31)), "b": jnp.ones((3, 9))}, k) for k in range(3)]
    state = jax.vmap(tx.init)(stacked(adapters))
    assert state[0].mu["a"].absmax.shape == (3, 2)
    assert state[0].mu["b"].dtype == jnp.float32
    one, many = jax.jit(tx.update), jax.jit(jax.vmap(tx.update))
    updates, state = many(stacked(adapters), state, stacked(adapters))
    singles = [one(adapter, tx.init(adapter), adapter) for adapter in adapters]
    assert_close((updates, state), stacked(singles))


@pytest.mark.parametrize(
    ("kind", "spec"),
    [
        (AxisType.Auto, P(None, "x")),
        (AxisType.Auto, P("x", "y")),
        (AxisType.Explicit, P(None, "x")),
        (AxisType.Explicit, P("x", "y")),
    ],
    ids=str,
)
def test_sharded_params(kind, spec):
    params = {"w": jnp.ones((8, 100))}
    gradients, tx = gradients_of(params), quick_tx()
    update = jax.jit(tx.update)
    expected, expected_state = update(gradients, tx.init(params), params)
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(kind, kind))
    with jax.set_mesh(mesh):
        as_params = NamedSharding(mesh, spec)
        params, gradients = jax.device_put((params, gradients), as_params)
        updates, state = update(gradients, tx.init(params), params)
        assert updates["w"].sharding.is_equivalent_to(as_params, 2)
    for moment in ("mu", "nu"):
        got, single = (getattr(s[0], moment)["w"] for s in (state, expected_state))
        assert got.codes.sharding.is_equivalent_to(as_params, 2)
        assert_same(got.codes, single.codes)
        assert_close(jax.device_get(got.absmax), jax.device_get(single.absmax))
    assert_close(jax.device_get(updates), jax.device_get(expected))


def test_checkpoints(tmp_path):
    """A run that was saved and restored goes on bit for bit."""
    params, tx = {"w": jnp.ones((20, 20)), "b": jnp.ones(3)}, quick_tx(optax.constant_schedule(0.1))
    update = jax.jit(tx.update)
    _, state = update(gradients_of(params), tx.init(params), params)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", jax.eval_shape(tx.init, params))
    assert_same(restored, state)
    gradients = gradients_of(params, 1)
    assert_same(update(gradients, restored, params), update(gradients, state, params))


def test_what_decays_can_be_chosen():
    params = {"w": jnp.ones((20, 20)), "b": jnp.ones(3)}
    zeros = jax.tree.map(jnp.zeros_like, params)
    tx = adamw_8bit(0.1, weight_decay=0.5, mask={"w": True, "b": False}, min_8bit_size=100)
    updates, _ = tx.update(zeros, tx.init(params), params)
    assert_close(updates, {"w": jnp.full((20, 20), -0.05), "b": jnp.zeros(3)})


def test_hyperparameters_can_be_injected():
    params = {"w": jnp.ones((20, 20))}
    tx = optax.inject_hyperparams(adamw_8bit)(0.1, min_8bit_size=100)
    state = tx.init(params)
    assert state.inner_state[0].mu["w"].codes.dtype == jnp.uint8
    state.hyperparams["learning_rate"] = jnp.float32(0.3)
    got, _ = jax.jit(tx.update)(gradients_of(params), state, params)
    expected, _ = quick_tx(0.3).update(gradients_of(params), quick_tx().init(params), params)
    assert_close(got, expected, factor=10)  # 1 - b2^t of a b2 in float32


@pytest.mark.parametrize(
    "bad",
    [{"b1": 1.0}, {"b2": -0.1}, {"eps": -1e-8}, {"weight_decay": -1.0}, {"min_8bit_size": -1}],
)
def test_numbers_that_no_optimizer_has(bad):
    ((name, value),) = bad.items()
    with pytest.raises(TargetError, match=rf"adamw_8bit: got {name}={value}, expected 0 <= {name}"):
        adamw_8bit(1e-3, **bad)


def smoothed(losses: Any, window: int = 20) -> np.ndarray:
    return np.convolve(np.asarray(losses, np.float64), np.ones(window) / window, mode="valid")


def test_the_loss_falls_as_with_float32_moments():
    """300 noisy steps of a small fit; `python -m benchmarks.optimizers` does real ones."""
    keys = jax.random.split(KEY, 3)
    base, teacher = 0.2 * jax.random.normal(keys[0], (2, 64, 64))
    config = LoraConfig(rank=64, targets=["kernel"])
    trainable, frozen = jaxlora.partition(jaxlora.init(keys[1], {"kernel": base}, config))
    apply = jaxlora.lora_apply(lambda params, x: jnp.tanh(x @ params["kernel"]))

    def losses_of(tx: Any) -> Any:
        def loss(trainable: Any, x: jax.Array) -> jax.Array:
            y = jnp.tanh(x @ teacher)
            return jnp.mean((apply(jaxlora.combine(trainable, frozen), x) - y) ** 2)

        def step(carry: Any, x: jax.Array) -> Any:
            trainable, state = carry
            value, gradient = jax.value_and_grad(loss)(trainable, x)
            updates, state = tx.update(gradient, state, trainable)
            return (optax.apply_updates(trainable, updates), state), value

        batches = jax.random.normal(keys[2], (300, 16, 64))
        (_, state), losses = jax.lax.scan(step, (trainable, tx.init(trainable)), batches)
        return state, smoothed(losses)

    smoothed = lambda losses: jnp.convolve(losses, jnp.ones(20) / 20, mode="valid")
    train = jax.jit(losses_of, static_argnums=0)
    state, ours = train(adamw_8bit(1e-3))
    _, theirs = train(optax.adamw(1e-3))
    assert state[0].mu["kernel"].b.codes.dtype == jnp.uint8
    assert theirs[-1] < 0.5 * theirs[0]
    assert np.max(np.abs(ours / theirs - 1)) <= 0.02
