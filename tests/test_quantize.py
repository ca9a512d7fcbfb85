"""`quantize` on trees, and what a quantized tree goes through: partition, init, merge, export."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import assert_close, assert_same, randomized

import jaxlora
from jaxlora import LoraConfig, QuantizedArray, TargetError, initializers, quantize_array
from jaxlora._errors import RolesError
from jaxlora._quantized import is_quantized
from jaxlora._weight import LoraWeight, is_node

KEY = jax.random.key(0)


def normal(*shape, dtype=jnp.float32):
    rng = np.random.default_rng(sum(shape))
    return jnp.asarray(rng.standard_normal(shape), dtype)


def params(dtype=jnp.float32):
    return {
        "embed": {"embedding": normal(20, 64, dtype=dtype)},
        "layer": {"kernel": normal(64, 128, dtype=dtype), "bias": normal(128, dtype=dtype)},
        "norm": {"scale": normal(128, dtype=dtype)},
        "head": {"kernel": normal(128, 10, dtype=dtype)},
    }


def model(p, ids):
    h = p["embed"]["embedding"][ids]
    h = jnp.tanh(h @ p["layer"]["kernel"] + p["layer"]["bias"]) * p["norm"]["scale"]
    return h @ p["head"]["kernel"]


IDS = jnp.array([[1, 5, 19]])
apply = jaxlora.lora_apply(model)


def quantized_paths(tree):
    pairs, _ = jaxlora._paths.flatten_with_paths(tree, is_leaf=is_node)
    return {path for path, x in pairs if is_quantized(x.w if is_node(x) else x)}


# --------------------------------------------------------------------------------------------------
# Which weights


@pytest.mark.parametrize(
    ("targets", "exclude", "expected"),
    [
        (["layer"], None, {"layer/kernel"}),
        (r".*kernel", ["head"], {"layer/kernel"}),
        (r".*(kernel|embedding)", None, {"embed/embedding", "layer/kernel", "head/kernel"}),
        (lambda path, leaf: leaf.ndim == 2, r"head/.*", {"embed/embedding", "layer/kernel"}),
    ],
)
def test_targets_of_params(targets, exclude, expected):
    q = jaxlora.quantize(params(), targets, exclude)
    assert quantized_paths(q) == expected
    rest = {"norm/scale", "layer/bias"}
    for path in rest:
        a, b = path.split("/")
        assert_same(q[a][b], params()[a][b])


def test_all_linear_leaves_embeddings_out():
    p = params()
    roles = jaxlora.trace_roles(model, p, IDS)
    assert quantized_paths(jaxlora.quantize(p, "all-linear", roles=roles)) == {
        "layer/kernel",
        "head/kernel",
    }
    with pytest.raises(TargetError, match=r"all-linear.*trace_roles"):
        jaxlora.quantize(p, "all-linear")


def test_a_lora_tree_before_and_after_init():
    config = LoraConfig(rank=2, targets=["layer"])
    after = jaxlora.quantize(jaxlora.init(KEY, params(), config))
    before = jaxlora.init(KEY, jaxlora.quantize(params(), ["layer"]), config)
    assert quantized_paths(after) == {"layer/kernel"}
    assert_same(after, before)
    more = jaxlora.quantize(jaxlora.init(KEY, params(), config), r".*(kernel|embedding)", ["head"])
    assert quantized_paths(more) == {"layer/kernel", "embed/embedding"}
    assert isinstance(more["layer"]["kernel"], LoraWeight)
    assert_close(apply(more, IDS), model(jaxlora.merge(more), IDS))


def test_stacked_weights_are_quantized_one_by_one():
    w = normal(3, 32, 64)
    p = {"w": w}
    for roles in ({"w": "sio"}, jaxlora.trace_roles(_scanned, p, jnp.ones(32))):
        q = jaxlora.quantize(p, ["w"], roles=roles)["w"]
        assert q.stacked == 1
        for k in range(3):
            assert_same(jax.tree.map(lambda x, k=k: x[k], q), quantize_array(w[k], along=(0,)))
    with pytest.raises(RolesError, match=r"w: .*\(3, 32, 64\).*trace_roles"):
        jaxlora.quantize(p, ["w"])
    lora = jaxlora.init(KEY, p, LoraConfig(targets=["w"], roles={"w": "sio"}))
    assert jaxlora.quantize(lora)["w"].w.stacked == 1


def _scanned(p, x):
    return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w @ w.T), None), x, p["w"])[0]


def test_int8_by_channel_takes_the_outputs_from_the_roles():
    p = {"torch": normal(24, 32), "kernel": normal(32, 24), "query": normal(32, 4, 8)}
    q = jaxlora.quantize(
        p, [*p], kind="int8", block_size=None, roles={"torch": "oi", "query": "ioo"}
    )
    assert q["torch"].absmax.shape == (24,)
    assert q["kernel"].absmax.shape == (24,)
    assert q["query"].absmax.shape == (4, 8)
    for name in p:
        error = jnp.abs(q[name].dequantize() - p[name]).max()
        assert float(error) <= float(jnp.abs(p[name]).max()) / 253


def test_one_array_in_two_places_is_quantized_once():
    w = normal(32, 64)
    p = {"a": {"kernel": w}, "b": {"kernel": w}}
    q = jaxlora.quantize(p, ["kernel"], donate=True)
    assert q["a"]["kernel"] is q["b"]["kernel"]
    assert w.is_deleted()


def test_donating_frees_each_weight_as_it_goes():
    p = params()
    q = jaxlora.quantize(p, ["layer"], donate=True)
    assert p["layer"]["kernel"].is_deleted()
    assert not p["head"]["kernel"].is_deleted()
    assert not any(x.is_deleted() for x in jax.tree.leaves(q))
    p = params()
    jaxlora.quantize(p, ["layer"])
    assert not p["layer"]["kernel"].is_deleted()


def test_donating_keeps_what_stays_in_the_tree():
    w = normal(32, 64)
    q = jaxlora.quantize({"layer": {"kernel": w}, "head": w}, ["layer"], donate=True)
    assert q["head"] is w
    assert not w.is_deleted()


def test_a_stack_behind_gets_absmaxes_of_its_own():
    q = jaxlora.quantize(
        {"w": normal(4, 6, 3)}, ["w"], kind="int8", block_size=None, roles={"w": "ios"}
    )
    assert q["w"].absmax.shape == (6, 3)


def test_outputs_of_a_matrix_must_be_known():
    with pytest.raises(RolesError, match=r"w: got none.*each output.*roles=\{'w': 'io'\}"):
        jaxlora.quantize({"w": normal(4, 6)}, ["w"], kind="int8", block_size=None)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_nan_under_jit_gives_nan(kind: str):
    p = {"w": normal(64, 64).at[0, 0].set(jnp.nan)}
    run = jax.jit(lambda p: jaxlora.quantize(p, ["w"], kind=kind, double_quant=False))
    found = jnp.isnan(run(p)["w"].dequantize())
    assert found[0].all()
    assert not found[1:].any()


def test_numpy_params_and_jit():
    p = jax.tree.map(np.asarray, params())
    q = jaxlora.quantize(p, ["layer"])
    assert_same(q, jaxlora.quantize(params(), ["layer"]))
    jitted = jax.jit(lambda p: jaxlora.quantize(p, ["layer"]))(p)
    assert_same(jitted["layer"], q["layer"])


def test_storage():
    """0.53 bytes a parameter and less."""
    q = quantize_array(normal(256, 1024, dtype=jnp.bfloat16))
    assert q.nbytes == 256 * 1024 // 2 + 256 * 1024 // 64 + 4 * (256 * 1024 // 64 // 256) + 4
    assert q.nbytes / q.size <= 0.53


@pytest.mark.parametrize(
    ("change", "options", "text"),
    [
        ({}, {"targets": ["nothing"]}, "targets: 'nothing' matches nothing"),
        ({}, {"targets": None}, "no targets.*targets="),
        ({}, {"targets": ["layer"], "exclude": ["nope"]}, "exclude: 'nope' matches nothing"),
        ({}, {"targets": ["layer"], "exclude": ["layer"]}, "every target is left out"),
        ({}, {"targets": ["layer"], "kind": "nf3"}, "kind.*'nf3'.*nf4.*fp4.*int8"),
        ({}, {"targets": ["layer"], "block_size": 7}, "block_size.*7.*even"),
        ({}, {"targets": ["layer"], "block_size": 0}, "block_size.*0.*even"),
        ({}, {"targets": ["layer"], "block_size": True}, "block_size.*True"),
        ({}, {"targets": ["layer"], "block_size": None}, "block_size.*None.*int8"),
        ({}, {"targets": r"norm/scale"}, r"norm/scale.*\(128,\).*two or more.*exclude"),
        ({"kernel": normal(64, 128).at[3, 4].set(jnp.nan)}, {}, "layer/kernel: got NaN or inf"),
        ({"kernel": normal(64, 128).at[3, 4].set(-jnp.inf)}, {}, "layer/kernel: got NaN or inf"),
        ({"kernel": jnp.full((64, 128), 3e38)}, {}, "layer/kernel: .*3e.38.*double_quant=False"),
        ({"kernel": jnp.ones((64, 128), int)}, {}, "layer/kernel: .*int32.*float32.*exclude"),
        ({"kernel": quantize_array(normal(64, 128))}, {}, "layer/kernel: .*already.*exclude"),
    ],
)
def test_bad_input(change, options, text):
    p = params()
    p["layer"] |= change
    with pytest.raises(TargetError, match=text):
        jaxlora.quantize(p, **({"targets": ["layer"]} | options))


def test_leaves_trained_in_full_are_not_quantized():
    lora = jaxlora.init(KEY, params(), LoraConfig(targets=["layer"], train=["head"]))
    with pytest.raises(TargetError, match=r"head/kernel: .*trained in full.*exclude"):
        jaxlora.quantize(lora, r".*kernel")
    assert quantized_paths(jaxlora.quantize(lora)) == {"layer/kernel"}
    full = jaxlora.init(
        KEY, jaxlora.quantize(params(), ["head"]), LoraConfig(targets=["layer"], train=["head"])
    )
    head = full["head"]["kernel"]
    assert_same(head.value, head.w.dequantize())  # a quantized leaf may train: as floats
    assert_close(apply(full, IDS), model(jaxlora.merge(full), IDS))


# --------------------------------------------------------------------------------------------------
# What a quantized tree goes through


def tree(**config):
    lora = jaxlora.init(KEY, params(), LoraConfig(rank=2, targets=["layer", "embed"], **config))
    return jaxlora.quantize(randomized(lora))


def test_halves():
    lora = tree()
    trainable, frozen = jaxlora.partition(lora)
    assert trainable["layer"]["kernel"].w is None
    assert not jax.tree.leaves(frozen["layer"]["kernel"].a)
    assert_same(jaxlora.combine(trainable, frozen), lora)
    with pytest.raises(TargetError, match="both halves have"):
        jaxlora.combine(lora, frozen)
    mask = jaxlora.trainable_mask(lora)
    assert jax.tree.structure(mask) == jax.tree.structure(lora)
    assert sum(jax.tree.leaves(mask)) == 4


@pytest.mark.parametrize("tx", [optax.adamw(0.1), jaxlora.optim.lora_plus(0.1)])
def test_training_moves_the_adapters_alone(tx):
    lora = tree()
    trainable, frozen = jaxlora.partition(lora)

    @jax.jit
    def step(trainable, state):
        loss = lambda t: jnp.mean(apply(jaxlora.combine(t, frozen), IDS) ** 2)
        value, gradient = jax.value_and_grad(loss)(trainable)
        updates, state = tx.update(gradient, state, trainable)
        return optax.apply_updates(trainable, updates), state, value

    state, losses = tx.init(trainable), []
    for _ in range(10):
        trainable, state, value = step(trainable, state)
        losses.append(float(value))
    assert losses[-1] < losses[0] / 2

    # The whole tree, for loops that hold it: gradients of codes are float0.
    tx = jaxlora.freeze_base(optax.sgd(0.1), lora)
    gradient = jax.grad(lambda l: jnp.mean(apply(l, IDS) ** 2), allow_int=True)(lora)
    updates, _ = tx.update(gradient, tx.init(lora), lora)
    moved = optax.apply_updates(lora, updates)
    assert_same(jaxlora.partition(moved)[1], frozen)
    assert not np.array_equal(moved["layer"]["kernel"].b, lora["layer"]["kernel"].b)


def test_counts_and_summary():
    lora = tree()
    count = jaxlora.count_params(lora)
    assert count == jaxlora.count_params(jaxlora.dequantize(lora))
    text = jaxlora.summary(lora)
    weights = [lora["layer"]["kernel"].w, lora["embed"]["embedding"].w]
    nbytes, size = sum(w.nbytes for w in weights), sum(w.size for w in weights)
    assert f"2 weights are quantized (nf4): {nbytes:,} bytes, {nbytes / size:.3f} a param" in text


@pytest.mark.parametrize("dora", [False, True])
def test_merging(dora: bool):
    lora = tree(dora=dora)
    floats = jaxlora.dequantize(lora)
    assert not quantized_paths(floats)
    assert_same(jaxlora.merge(lora), jaxlora.merge(floats))
    assert_close(apply(lora, IDS), apply(floats, IDS))
    assert_close(apply(lora, IDS), model(jaxlora.merge(lora), IDS))

    merged, errors = jaxlora.merge_quantized(lora)
    assert quantized_paths(merged) == {"layer/kernel", "embed/embedding"} == errors.keys()
    for path, error in errors.items():
        a, b = path.split("/")
        exact, kept = jaxlora.merge(lora)[a][b], merged[a][b].dequantize()
        w, q = (np.asarray(x, np.float64) for x in (exact, kept))
        assert error == pytest.approx(np.linalg.norm(w - q) / np.linalg.norm(w), rel=1e-3)
        assert 0.02 < error < 0.2
    assert_close(apply(merged, IDS), model(jaxlora.dequantize(merged), IDS))


def test_merging_what_was_not_trained_keeps_the_codes():
    q = jaxlora.quantize(params(), ["layer"])
    merged, errors = jaxlora.merge_quantized(jaxlora.init(KEY, q, LoraConfig(targets=["layer"])))
    assert np.array_equal(merged["layer"]["kernel"].codes, q["layer"]["kernel"].codes)
    assert errors["layer/kernel"] < 2e-3


def test_dora_on_a_quantized_stack_decodes_a_layer_at_a_time():
    from test_quantized import largest_floats

    w = normal(5, 32, 64)
    config = LoraConfig(rank=2, targets=["w"], roles={"w": "sio"}, dora=True)
    lora = randomized(jaxlora.init(KEY, {"w": quantize_array(w, stacked=1)}, config))
    norms = jnp.linalg.norm(lora["w"].w.dequantize(), axis=1)
    assert_close(jnp.sqrt(lora["w"].squared_norm), norms)
    scanned, x = jaxlora.lora_apply(_scanned), jnp.ones((3, 32))
    both = jax.jit(lambda l: (scanned(l, x), scanned(jaxlora.dequantize(l), x)))
    assert_close(*both(lora), factor=5)
    assert largest_floats(scanned, lora, x) <= 2 * 32 * 64


def test_loftq_and_pissa():
    """LoftQ starts nearer than NF4 alone; PiSSA's rest quantizes better than the weight."""
    w = {"kernel": normal(64, 128)}
    error = lambda merged: float(jnp.linalg.norm(merged["kernel"] - w["kernel"]))
    config = LoraConfig(rank=8, alpha=16, targets=["kernel"])
    nf4 = error(jaxlora.dequantize(jaxlora.quantize(w, ["kernel"])))

    start = lambda initializer: dataclasses.replace(config, initializer=initializer)
    loftq = jaxlora.init(KEY, w, start(initializers.loftq(iterations=5)))
    assert quantized_paths(loftq) == {"kernel"}
    assert error(jaxlora.merge(loftq)) < 0.8 * nf4

    pissa = jaxlora.quantize(jaxlora.init(KEY, w, start(initializers.pissa())))
    assert quantized_paths(pissa) == {"kernel"}
    assert error(jaxlora.merge(pissa)) < 0.95 * nf4
    x = normal(3, 64)
    run = jaxlora.lora_apply(lambda p, x: x @ p["kernel"])
    for lora in (loftq, pissa):
        assert_close(run(lora, x), x @ jaxlora.merge(lora)["kernel"])

    # On a base that is quantized already, the moved one is quantized again, the same way.
    q = jaxlora.quantize(w, ["kernel"], kind="fp4", block_size=32)
    again = jaxlora.init(KEY, q, start(initializers.pissa()))
    assert (again["kernel"].w.kind, again["kernel"].w.block_size) == ("fp4", 32)
    with pytest.raises(TargetError, match=r"kernel: .*quantized already.*original"):
        jaxlora.init(KEY, q, start(initializers.loftq(quantize_array)))


def test_other_transforms_of_trees():
    lora = jaxlora.init(KEY, params(), LoraConfig(rank=2, targets=["layer"]))
    q = jaxlora.quantize(randomized(lora))
    d = jaxlora.dequantize(q)
    stats = [jaxlora.input_moments(model, t, [IDS]) for t in (q, d)]
    assert_close(stats[0]["layer/kernel"].second, stats[1]["layer/kernel"].second)
    assert_same(jaxlora.with_base(q, jaxlora.base_params(d)), d)
    assert_same(jaxlora.with_base(d, jaxlora.base_params(q)), q)
    assert_close(
        jaxlora.merge(jaxlora.weighted_sum([q, q], [0.3, 0.7])), jaxlora.merge(q), factor=2
    )
    assert quantized_paths(jaxlora.truncate(q, 1)) == {"layer/kernel"}
    config = LoraConfig(rank=64, targets=["layer"])
    extracted = jaxlora.extract(jaxlora.base_params(q), jaxlora.merge(q), config)
    assert quantized_paths(extracted) == {"layer/kernel"}
    assert_close(jaxlora.merge(extracted), jaxlora.merge(q), factor=5)
    assert dict(jaxlora.trace_roles(model, q, IDS)) == dict(jaxlora.trace_roles(model, d, IDS))


def test_prepare_for_training():
    p = params(jnp.bfloat16)
    lora = jaxlora.init(KEY, p, LoraConfig(rank=2, targets=["layer"], train=["head"]))
    lora = jaxlora.prepare_for_training(jaxlora.quantize(lora), max_size=1000)
    assert lora["norm"]["scale"].dtype == lora["layer"]["bias"].dtype == jnp.float32
    assert lora["head"]["kernel"].value.dtype == jnp.float32
    assert lora["embed"]["embedding"].dtype == jnp.bfloat16  # 1,280 elements
    assert lora["layer"]["kernel"].w.dtype == jnp.bfloat16
    assert_same(lora["norm"]["scale"], p["norm"]["scale"].astype(jnp.float32))
    whole = jaxlora.prepare_for_training(jaxlora.quantize(p, ["layer"]))
    assert whole["embed"]["embedding"].dtype == jnp.float32
    assert is_quantized(whole["layer"]["kernel"])
    other = {"n": 3, "i": jnp.ones(2, int)}
    assert jaxlora.prepare_for_training(other)["i"] is other["i"]


def test_flax_nnx():
    dense = nnx.Linear(64, 128, rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(dense)
    lora = jaxlora.quantize(jaxlora.init(KEY, state, LoraConfig(rank=2, targets=["kernel"])))
    run = jaxlora.lora_apply(lambda state, x: nnx.merge(graphdef, state)(x))
    x = normal(3, 64)
    assert_close(run(lora, x), run(jaxlora.dequantize(lora), x))


def test_export():
    lora = tree()
    exported = jax.export.export(jax.jit(apply))(lora, IDS)
    again = jax.export.deserialize(exported.serialize())
    assert_close(again.call(lora, IDS), apply(lora, IDS))


def test_loftq_quantizes_a_stack_one_by_one():
    config = LoraConfig(rank=2, targets=["w"], roles={"w": "sio"}, initializer=initializers.loftq())
    w = jaxlora.init(KEY, {"w": normal(3, 32, 64)}, config)["w"].w
    assert (w.stacked, w.kind, w.block_size) == (1, "nf4", 64)


def test_loftq_takes_any_quantizer():
    quantizer = functools.partial(quantize_array, kind="int8", block_size=32)
    config = LoraConfig(rank=2, targets=["layer"], initializer=initializers.loftq(quantizer))
    q = jaxlora.init(KEY, params(), config)["layer"]["kernel"].w
    assert isinstance(q, QuantizedArray)
    assert (q.kind, q.block_size) == ("int8", 32)


def test_nothing_is_deleted_before_all_is_checked():
    p = {"a": normal(4, 64), "b": normal(4, 64).at[0, 0].set(jnp.nan)}
    with pytest.raises(TargetError, match="b: got NaN"):
        jaxlora.quantize(p, ["a", "b"], donate=True)
    assert not p["a"].is_deleted()
    with pytest.raises(TargetError, match="b: got NaN"):
        jaxlora.quantize(jax.tree.map(np.asarray, p), ["b"])


def test_more_bad_input():
    p = params()
    with pytest.raises(TargetError, match="roles: 'typo' matches nothing"):
        jaxlora.quantize(p, ["layer"], roles={"typo": "io"})
    with pytest.raises(TargetError, match=r"layer/kernel: got a shape without data.*eval_shape"):
        jaxlora.quantize(jax.eval_shape(lambda: p), ["layer"])
    with pytest.raises(TargetError, match=r"loftq: got 'nf8', expected one of 'nf4'"):
        initializers.loftq("nf8")
