"""Dropout: its statistics, where its masks differ, and where they are the same."""

from __future__ import annotations

import dataclasses
import fractions

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES
from helpers import assert_close, assert_same, mostly_slow, randomized
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxlora
from jaxlora._dropout import Dropout

KEY = jax.random.key(7)


def identity(*names: str, n: int = 8, layers: int = 0, rate: float = 0.5):
    """Weights of zeros whose adapter is the identity: x @ w shows what was dropped of x."""
    eye = jnp.broadcast_to(jnp.eye(n), (layers, n, n)) if layers else jnp.eye(n)
    stacked = (layers,) if layers else ()
    return {
        name: jaxlora.LoraWeight(
            w=jnp.zeros_like(eye),
            a=eye,
            b=eye,
            scale=jnp.ones(stacked),
            roles="sio" if layers else "io",
            dropout=rate,
        )
        for name in names
    }


X = jnp.ones((4, 8))


def run(fn, lora, *args, key=KEY, jit=True):
    return jaxlora.lora_apply(fn, jit=jit)(jaxlora.with_dropout(lora, key), *args)


def all_differ(masks) -> bool:
    masks = [np.asarray(m) for m in masks]
    return all((m != n).any() for k, m in enumerate(masks) for n in masks[:k])


def test_statistics():
    """Kept with probability 1 - rate and divided by it, elementwise and independently."""
    for rate in (0.1, 0.5, 0.9):
        fn = lambda params, x: x @ params["w"]
        got = np.asarray(run(fn, identity("w", n=64, rate=rate), jnp.ones((512, 64))))
        assert set(np.unique(got)) == {0.0, np.float32(1 / np.float32(1 - rate))}
        kept = got != 0
        n = kept.size
        assert abs(kept.mean() - (1 - rate)) < 4 * np.sqrt(rate * (1 - rate) / n)
        rows, columns = kept.mean(1), kept.mean(0)
        assert abs(rows.std() - np.sqrt(rate * (1 - rate) / 64)) < 0.02
        assert abs(columns.std() - np.sqrt(rate * (1 - rate) / 512)) < 0.02


def test_no_key_and_rate_zero_are_the_deterministic_path():
    lora = identity("w")
    apply = jaxlora.lora_apply(lambda params, x: x @ params["w"])
    program = lambda lora: str(jax.make_jaxpr(apply)(lora, X))
    plain = {"w": dataclasses.replace(lora["w"], dropout=0.0)}
    assert program(lora) == program(plain)
    assert program(jaxlora.with_dropout(lora, KEY, 0.0)) == program(plain)
    assert program(jaxlora.with_dropout(plain, KEY)) == program(plain)
    dropped = jaxlora.with_dropout(lora, KEY)
    assert program(dropped) != program(plain)
    assert program(jaxlora.with_dropout(dropped, None)) == program(plain)


def test_equal_keys_give_equal_masks():
    """Eagerly, under jit, scan, remat, vmap and cond; another key gives another."""
    lora = identity("w")
    fn = lambda params, x: jax.nn.relu(x @ params["w"])
    expected = run(fn, lora, X)
    assert (run(fn, lora, X, key=jax.random.key(8)) != expected).any()
    same = lambda got: np.testing.assert_array_equal(got, expected)
    same(run(fn, lora, X, jit=False))
    dropped = jaxlora.with_dropout(lora, KEY)
    apply = jaxlora.lora_apply(fn)
    same(jax.jit(apply)(dropped, X))
    same(jax.checkpoint(apply)(dropped, X))
    same(jax.lax.cond(True, apply, lambda lora, x: x, dropped, X))
    for out in jax.lax.scan(lambda c, x: (c, apply(dropped, x)), 0, jnp.stack([X, X]))[1]:
        same(out)
    for out in jax.vmap(apply, (None, 0))(dropped, jnp.stack([X, X])):
        same(out)
    keys = jax.random.split(KEY, 3)
    got = jax.vmap(lambda key: apply(jaxlora.with_dropout(lora, key), X))(keys)
    for out, key in zip(got, keys, strict=True):
        np.testing.assert_array_equal(out, run(fn, lora, X, key=key))


def test_old_style_keys():
    fn = lambda params, x: x @ params["w"]
    got = run(fn, identity("w"), X, key=jax.random.PRNGKey(7))
    np.testing.assert_array_equal(got, run(fn, identity("w"), X))


def _loop(step):
    """step(k) of four steps, in a while loop that fills an array."""

    def fn(params, x):
        out = jnp.zeros((4, *x.shape))
        body = lambda s: (s[0] + 1, s[1].at[s[0]].set(step(params, x)))
        return jax.lax.while_loop(lambda s: s[0] < 4, body, (0, out))[1]

    return fn


MATMUL = lambda params, x: x @ params["w"]
_jitted = jax.jit(lambda w, x: x @ w)
_twice = {
    "two uses": lambda p, x: jnp.stack([x @ p["w"], x @ p["w"]]),
    "two weights": lambda p, x: jnp.stack([x @ p["w"], x @ p["v"]]),
    "inner jit": lambda p, x: jnp.stack([_jitted(p["w"], x), _jitted(p["w"], x)]),
    "remat": lambda p, x: jnp.stack([jax.checkpoint(MATMUL)(p, x), jax.checkpoint(MATMUL)(p, x)]),
    "scan": lambda p, x: jax.lax.scan(lambda c, _: (c, x @ p["w"]), 0, None, length=4)[1],
    "nested scan": lambda p, x: jax.lax.scan(
        lambda c, _: (c, jax.lax.scan(lambda c, _: (c, x @ p["w"]), 0, None, length=2)[1]),
        0,
        None,
        length=2,
    )[1].reshape(4, *x.shape),
    "while": _loop(MATMUL),
    "carried": lambda p, x: jax.lax.scan(lambda w, _: (w * 1.0, x @ w), p["w"], None, length=3)[1],
    "one batched matmul": lambda p, x: jnp.stack([x, x]) @ p["w"],
    "copies": lambda p, x: jnp.einsum("sti,sio->sto", jnp.stack([x, x]), jnp.stack([p["w"]] * 2)),
}
_layers = {
    "scan over layers": lambda p, x: jax.lax.scan(lambda c, w: (c, x @ w), 0, p["w"])[1],
    "unrolled": lambda p, x: jnp.stack([x @ p["w"][k] for k in range(3)]),
    "batched": lambda p, x: jnp.einsum("ti,sio->sto", x, p["w"]),
    "vmap inside": lambda p, x: jax.vmap(lambda w: x @ w)(p["w"]),
}


@pytest.mark.parametrize("name", [*_twice, *_layers])
def test_masks_differ(name):
    """Per use, step, layer and adapter. Of some: the gradient sees what the forward saw."""
    layered = name in _layers
    fn = (_layers if layered else _twice)[name]
    lora = identity("w", "v", layers=3) if layered else identity("w", "v")
    if name in ("batched", "vmap inside"):
        # One activation for all layers: it is dropped once, before it meets any of them.
        several = fn
        fn = lambda p, x: jnp.stack([several(p, x)[0], x @ p["v"][0]])
    got = run(fn, lora, X)
    assert all_differ(got)
    if name not in ("two uses", "inner jit", "remat", "nested scan", "carried", "scan over layers"):
        return
    dropped = jaxlora.with_dropout(lora, KEY)
    trainable, frozen = jaxlora.partition(dropped)
    apply = jaxlora.lora_apply(fn)
    loss = lambda t: (apply(jaxlora.combine(t, frozen), X) ** 2).sum()
    grads = jax.jit(jax.grad(loss))(trainable)
    # The loss is a quadratic form of a, and of b, if both see the same mask: Euler's theorem.
    leaves = lambda tree, factor: [getattr(lw, factor) for lw in tree.values()]
    for factor in ("a", "b"):
        pairs = zip(leaves(grads, factor), leaves(trainable, factor), strict=True)
        total = sum(float((g * t).sum()) for g, t in pairs)
        np.testing.assert_allclose(total, 2 * float(loss(trainable)), rtol=1e-5)


@pytest.mark.parametrize(
    "stack",
    [
        lambda p: jnp.pad(p["w"], ((1, 0), (0, 0), (0, 0))),
        lambda p: jnp.concatenate([p["w"], p["v"]])[::-1],
    ],
)
def test_padded_stacks_draw_from_their_keys(stack):
    """Where a stack starts with elements that an adapter has none of, masks depend on its key."""
    fn = lambda params, x: jnp.einsum("sti,sio->sto", jnp.stack([x] * n), stack(params))[-2]
    lora = identity("w", "v", layers=2)
    n = stack({name: lw.w for name, lw in lora.items()}).shape[0]
    assert all_differ([run(fn, lora, X, key=jax.random.key(k)) for k in range(3)])


def test_never_on_lookups_nor_on_transposed_uses():
    lora = identity("w")
    rows = lambda params, tokens: params["w"][tokens]
    tokens = jnp.array([0, 3, 3])
    np.testing.assert_array_equal(run(rows, lora, tokens), jnp.eye(8)[tokens])
    head = lambda params, x: x @ params["w"].T
    np.testing.assert_array_equal(run(head, lora, X), X)


KINDS = ["linen_attention", "linen_conv", "linen_scan", "linen_embed"]


@pytest.mark.parametrize("name", mostly_slow(KINDS, ("linen_conv", "linen_embed")))
@pytest.mark.parametrize("dora", [False, True])
def test_every_kind(name, dora):
    """Other keys give other results, if no embedding's; equal keys equal ones."""
    case = dataclasses.replace(CASES[name], dora=dora, traces=[])
    lora, args = case.lora()
    lora = randomized(lora)
    run = jax.jit(lambda key: case.apply(jaxlora.with_dropout(lora, key, 0.3), *args))
    several = [run(key) for key in jax.random.split(jax.random.key(0), 3)]
    assert_same(run(jax.random.split(jax.random.key(0), 3)[0]), several[0])
    if name == "linen_embed":
        assert_close(several[0], case.apply(lora, *args))
        return
    assert all_differ(several)
    if name == "linen_conv":  # linear in the mask: the mean is what nothing is dropped from
        many = jax.jit(jax.vmap(run))(jax.random.split(KEY, 512))
        error = np.abs(many.mean(0) - case.apply(lora, *args)).max()
        assert error < 6 * np.asarray(many).std(0).max() / np.sqrt(len(many))


def test_integers_and_narrow_activations_keep_their_dtypes():
    lora = identity("w")
    for dtype in (jnp.bfloat16, jnp.float16):
        assert run(MATMUL, lora, X.astype(dtype)).dtype == jnp.float32
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), lora)
    assert run(MATMUL, half, X.astype(jnp.bfloat16)).dtype == jnp.bfloat16
    assert run(MATMUL, lora, jnp.zeros((0, 8))).shape == (0, 8)


def test_shards_draw_their_own():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    spec = P("data")

    def fn(params, x):
        return jax.shard_map(
            lambda w, x: x @ w,
            mesh=mesh,
            in_specs=(P(), spec),
            out_specs=spec,
        )(params["w"], x)

    got = run(fn, identity("w"), X)
    assert (got[:2] != got[2:]).any()


def test_rate_and_key_are_checked():
    lora = identity("w")
    for rate in (-0.1, 1.0, 1, True, "0.1", float("nan")):
        with pytest.raises(jaxlora.TargetError, match="expected a number in \\[0, 1\\)"):
            jaxlora.with_dropout(lora, KEY, rate)
        with pytest.raises(jaxlora.TargetError, match="expected a number in \\[0, 1\\)"):
            jaxlora.LoraConfig(targets=["w"], dropout=rate)
    with pytest.raises(jaxlora.TargetError, match="expected a single key"):
        jaxlora.with_dropout(lora, jax.random.split(KEY, 2))
    with pytest.raises(jaxlora.TargetError, match="got a key of type int, expected a random key"):
        jaxlora.with_dropout(lora, 0)


def test_any_real_number_is_a_rate():
    """As a plain float in the node, so that its structure can be compared and exported."""
    for rate in (np.float32(0.5), fractions.Fraction(1, 2)):
        config = jaxlora.LoraConfig(rank=2, targets=["w"], roles={"w": "io"}, dropout=rate)
        lora = jaxlora.init(KEY, {"w": jnp.ones((8, 8))}, config)
        assert type(lora["w"].dropout) is float
        exported = jax.export.export(jax.jit(jaxlora.merge))(lora)
        assert jax.export.deserialize(exported.serialize()).in_tree == exported.in_tree


def test_config_and_grad():
    """The rate of the config; a loss that draws; keys take part in no gradient."""
    params = {"w": jnp.ones((8, 8))}
    config = jaxlora.LoraConfig(rank=2, targets=["w"], roles={"w": "io"}, dropout=0.5)
    lora = randomized(jaxlora.init(KEY, params, config))
    apply = jaxlora.lora_apply(MATMUL)
    loss = lambda lora, key: apply(jaxlora.with_dropout(lora, key), X).sum()
    step = jax.jit(jax.grad(loss))
    one, other, again = step(lora, KEY), step(lora, jax.random.key(8)), step(lora, KEY)
    assert (one["w"].a != other["w"].a).any()
    assert_close(one, again)
    assert step._cache_size() == 1


def test_wrappers_around_layers_change_no_mask():
    """remat or jit around a layer, and other equations before it: the same masks."""
    lora = identity("w", "v")
    two = lambda w, v, x: jnp.stack([x @ w, (x @ v) * 1.0])
    plain = lambda p, x: two(p["w"], p["v"], x) @ p["w"]
    expected = run(plain, lora, X)
    for wrap in (jax.checkpoint, jax.jit, lambda f: jax.jit(jax.checkpoint(f))):
        wrapped = lambda p, x, wrap=wrap: wrap(two)(p["w"], p["v"], jnp.abs(x)) @ p["w"]
        np.testing.assert_array_equal(run(wrapped, lora, X), expected)


def test_gradients_within_the_function_are_refused():
    energy = lambda p, x: jnp.sum(jnp.tanh(x @ p["w"]))
    force = lambda p, x: jax.grad(energy, 1)(p, x)
    penalty = lambda p, x: jax.grad(jax.checkpoint(energy), 1)(p, x)
    tangent = lambda p, x: jax.jvp(lambda x: x @ p["w"], (x,), (x,))
    for fn in (force, penalty, tangent):
        with pytest.raises(jaxlora.TargetError, match="a gradient that the function itself takes"):
            run(fn, identity("w"), X)
        jaxlora.lora_apply(fn)(identity("w"), X)
    # One that is taken outside is not, also of the bare transform.
    for jit in (True, False):
        jax.grad(lambda x, jit=jit: run(energy, identity("w"), x, jit=jit))(X)


def test_a_weight_beside_itself():
    fn = lambda p, x: jnp.split(x @ jnp.concatenate([p["w"], p["w"]], 1), 2, axis=1)
    assert all_differ(run(fn, identity("w"), X))


def test_dora_of_integer_activations():
    """What is divided by 1 - rate is the result: integers stay what they are."""
    lora = {
        "w": dataclasses.replace(
            identity("w", rate=0.3)["w"], w=jnp.eye(8), magnitude=3 * jnp.ones(8)
        )
    }
    fn = lambda p, x: jax.lax.dot_general(
        x, p["w"], (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32
    )
    got, expected = (run(fn, lora, X.astype(dtype)) for dtype in (jnp.int8, jnp.float32))
    assert_close(got, expected)


def test_dora_of_fused_weights(monkeypatch):
    """Each part of a fused weight meets what it drops alone, at no more FLOPs than by itself."""
    rng = np.random.default_rng(0)
    lora = {
        name: dataclasses.replace(
            lw, w=jnp.asarray(rng.standard_normal((8, 8)), jnp.float32), magnitude=jnp.full(8, 2.0)
        )
        for name, lw in identity("q", "k", "v").items()
    }
    dropped = jaxlora.with_dropout(lora, KEY)
    fused = lambda p, x: x @ jnp.concatenate([p["q"], p["k"], p["v"]], 1)
    parts = lambda p, x: jnp.concatenate([x @ p["q"], x @ p["k"], x @ p["v"]], 1)
    text = str(jax.make_jaxpr(jaxlora.lora_apply(fused))(dropped, X))
    assert text.count("f32[4,24] = dot_general") == 1
    mask = jnp.asarray(rng.random(X.shape) < 0.5)
    monkeypatch.setattr(Dropout, "kept", lambda self, x: jnp.where(mask, x, 0))
    assert_close(*(jaxlora.lora_apply(fn)(dropped, X) for fn in (fused, parts)))


def test_the_table_says_whether_it_is_on():
    lora = identity("w", rate=0.25)
    assert jaxlora.summary(lora).splitlines()[-1].startswith("dropout 0.25: off")
    assert jaxlora.summary(jaxlora.with_dropout(lora, KEY)).endswith("dropout 0.25: on")
    assert "dropout" not in jaxlora.summary(identity("w", rate=0.0))
