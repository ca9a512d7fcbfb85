"""Training under each framework: only adapters change, state comes back, the loss falls."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from helpers import assert_close, assert_same, randomized

import jaxlora
from jaxlora import LoraConfig, LoraWeight, TargetError
from jaxlora._weight import is_node

KEY = jax.random.key(0)
X = jax.random.normal(KEY, (16, 4))
Y = jnp.sin(X @ jnp.arange(12.0).reshape(4, 3))
STEPS = 30


def squared(out: jax.Array) -> jax.Array:
    return jnp.mean((out - Y) ** 2)


def assert_only_adapters_change(before: Any, after: Any) -> None:
    """Frozen leaves keep their bits; every a and b moves."""
    (old, frozen), (new, still) = jaxlora.partition(before), jaxlora.partition(after)
    arrays = lambda tree: [x for x in jax.tree.leaves(tree) if eqx.is_array(x)]
    assert_same(arrays(still), arrays(frozen))
    assert jax.tree.structure(new) == jax.tree.structure(old)
    for x, y in zip(jax.tree.leaves(new), jax.tree.leaves(old), strict=True):
        assert jnp.any(x != y)


def assert_changed(before: Any, after: Any) -> None:
    for x, y in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        assert jnp.any(x != y)


# --- Linen ----------------------------------------------------------------------------------------


class LinenModel(nn.Module):
    def setup(self):
        self.up, self.down, self.norm = nn.Dense(8), nn.Dense(3), nn.BatchNorm(momentum=0.9)
        self.drop = nn.Dropout(0.1)

    def encode(self, x, train=False):
        return nn.relu(self.norm(self.up(x), use_running_average=not train))

    def __call__(self, x, train=False):
        h = self.encode(x, train)
        self.sow("intermediates", "hidden", h)
        return self.down(self.drop(h, deterministic=not train))


class State(TrainState):
    batch_stats: Any
    key: jax.Array


def linen_lora():
    model = LinenModel()
    variables = model.init(KEY, X)
    config = LoraConfig(targets=["up", "down"], rank=2)
    return model, jaxlora.init(KEY, variables["params"], config), variables["batch_stats"]


def test_linen_train_state_with_statistics_and_dropout():
    model, lora, batch_stats = linen_lora()
    state = State.create(
        apply_fn=jaxlora.lora_apply(model.apply),
        params=lora,
        tx=jaxlora.freeze_base(optax.adamw(3e-2), lora),
        batch_stats=batch_stats,
        key=KEY,
    )

    @jax.jit
    def step(state):
        def loss(params):
            out, updated = state.apply_fn(
                {"params": params, "batch_stats": state.batch_stats},
                X,
                train=True,
                mutable=["batch_stats"],
                rngs={"dropout": jax.random.fold_in(state.key, state.step)},
            )
            return squared(out), updated["batch_stats"]

        grads, batch_stats = jax.grad(loss, has_aux=True)(state.params)
        return state.apply_gradients(grads=grads, batch_stats=batch_stats)

    def evaluated(state):
        return squared(
            state.apply_fn({"params": state.params, "batch_stats": state.batch_stats}, X)
        )

    before = evaluated(state)
    for _ in range(STEPS):
        state = step(state)
    assert evaluated(state) < 0.8 * before
    assert_only_adapters_change(lora, state.params)
    assert_changed(batch_stats, state.batch_stats)
    # The merged params are a checkpoint of the plain model.
    variables = {"params": jaxlora.merge(state.params), "batch_stats": state.batch_stats}
    assert_close(squared(model.apply(variables, X)), evaluated(state))


@pytest.mark.parametrize(
    "options",
    [
        {"train": True, "mutable": ["batch_stats"], "rngs": {"dropout": KEY}},
        {"train": True, "mutable": nn.DenyList("params"), "rngs": {"dropout": KEY}},
        {"mutable": ["intermediates"], "capture_intermediates": True},
        {"method": "encode"},
        {"method": LinenModel.encode, "train": True, "mutable": ["batch_stats"]},
    ],
    ids=["mutable_and_rngs", "deny_list", "intermediates", "method_name", "method"],
)
def test_linen_apply_passes_everything_through(options):
    model, lora, batch_stats = linen_lora()
    lora = randomized(lora)
    got = jaxlora.lora_apply(model.apply)(
        {"params": lora, "batch_stats": batch_stats}, X, **options
    )
    expected = model.apply(
        {"params": jaxlora.merge(lora), "batch_stats": batch_stats}, X, **options
    )
    assert_close(got, expected)


# --- NNX ------------------------------------------------------------------------------------------


class NnxModel(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.up, self.norm = nnx.Linear(4, 8, rngs=rngs), nnx.BatchNorm(8, momentum=0.9, rngs=rngs)
        self.drop, self.down = nnx.Dropout(0.1, rngs=rngs), nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        return self.down(self.drop(nnx.relu(self.norm(self.up(x)))))


NNX_CONFIG = LoraConfig(targets=["up", "down"], rank=2)


def nnx_parts():
    model = NnxModel(nnx.Rngs(0))
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def forward(params, rest, x):
        module = nnx.merge(graphdef, params, rest)
        return module(x), nnx.state(module, nnx.Not(nnx.Param))

    def evaluated(lora, rest):
        module = nnx.merge(graphdef, jaxlora.merge(lora), rest, copy=True)
        module.eval()
        return squared(module(X))

    lora = jaxlora.init(KEY, params, NNX_CONFIG)
    return lora, rest, jaxlora.lora_apply(forward), evaluated


@pytest.mark.parametrize("way", ["partition", "freeze_base"])
def test_nnx_functional_loop(way):
    lora, rest, apply, evaluated = nnx_parts()
    tx = optax.adamw(3e-2)
    if way == "partition":
        train, frozen = jaxlora.partition(lora)
        whole = lambda train: jaxlora.combine(train, frozen)
    else:
        train, whole, tx = lora, lambda lora: lora, jaxlora.freeze_base(tx, lora)

    @jax.jit
    def step(train, rest, opt_state):
        def loss(train):
            out, new = apply(whole(train), rest, X)
            return squared(out), new

        grads, rest = jax.grad(loss, has_aux=True)(train)
        updates, opt_state = tx.update(grads, opt_state, train)
        return optax.apply_updates(train, updates), rest, opt_state

    before, opt_state, first = evaluated(lora, rest), tx.init(train), rest
    for _ in range(STEPS):
        train, rest, opt_state = step(train, rest, opt_state)
    assert evaluated(whole(train), rest) < 0.8 * before
    assert_only_adapters_change(lora, whole(train))
    assert int(rest["drop"]["rngs"]["count"][...]) == STEPS
    assert_same(first["drop"]["rngs"]["key"], rest["drop"]["rngs"]["key"])
    assert_changed(first["norm"], rest["norm"])


def test_nnx_optimizer():
    """The trainable half is what the optimizer holds; `optax.flatten` hides its nodes from NNX.

    (`nnx.Optimizer` makes a State of every pytree in its own state, which the next step would find
    in place of a LoraWeight.)
    """
    lora, rest, apply, evaluated = nnx_parts()
    trainable, frozen = jaxlora.partition(lora)
    first = jax.tree.map(jnp.copy, lora)
    optimizer = nnx.Optimizer(trainable, optax.flatten(optax.adamw(3e-2)), wrt=nnx.Param)

    @nnx.jit
    def step(trainable, rest, optimizer):
        def loss(trainable):
            out, new = apply(jaxlora.combine(trainable, frozen), rest, X)
            return squared(out), new

        grads, new = nnx.grad(loss, has_aux=True)(trainable)
        optimizer.update(trainable, grads)
        nnx.update(rest, new)

    before = evaluated(lora, rest)
    for _ in range(STEPS):
        step(trainable, rest, optimizer)
    lora = jaxlora.combine(trainable, frozen)
    assert evaluated(lora, rest) < 0.8 * before
    assert_only_adapters_change(first, lora)
    assert int(rest["drop"]["rngs"]["count"][...]) == STEPS == int(optimizer.step[...])
    states = [x.size for x in jax.tree.leaves(optimizer.opt_state)]
    assert sum(states) == 2 * jaxlora.count_params(lora).trainable + 1


def test_nnx_module_as_params():
    """A module is a pytree: it can be adapted as it is, and merged to a module again."""
    model = NnxModel(nnx.Rngs(0))
    model.eval()
    lora = jaxlora.init(KEY, model, NNX_CONFIG)
    assert isinstance(lora, NnxModel)
    assert isinstance(lora.up.kernel.get_value(), LoraWeight)
    assert eqx.is_array(model.up.kernel.get_value())  # the model itself is as it was
    lora = randomized(lora)
    got = jaxlora.lora_apply(lambda model, x: model(x))(lora, X)
    assert_close(got, jaxlora.merge(lora)(X))
    assert_close(jaxlora.base_params(lora)(X), model(X))


class NnxTied(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.one, self.two = nnx.Linear(4, 4, rngs=rngs), nnx.Linear(4, 4, rngs=rngs)
        self.two.kernel = self.one.kernel

    def __call__(self, x):
        return self.two(nnx.tanh(self.one(x)))


def test_nnx_shared_variables():
    """A state holds a shared Variable once; a module as a tree would part its two places."""
    model = NnxTied(nnx.Rngs(0))
    config = LoraConfig(targets=["kernel"], rank=2)
    with pytest.raises(TargetError, match=r"one/kernel, two/kernel.*nnx\.split"):
        jaxlora.init(KEY, model, config)
    with pytest.raises(TargetError, match=r"two/kernel"):
        jaxlora.init(KEY, model, LoraConfig(targets=["one"], exclude=["two"], rank=2))
    graphdef, state = nnx.split(model)
    lora = randomized(jaxlora.init(KEY, state, config))
    assert len([x for x in jax.tree.leaves(lora, is_leaf=is_node) if is_node(x)]) == 1
    got = jaxlora.lora_apply(lambda state, x: nnx.merge(graphdef, state)(x))(lora, X)
    assert_close(got, nnx.merge(graphdef, jaxlora.merge(lora))(X))


# --- Equinox --------------------------------------------------------------------------------------


def test_equinox_whole_module():
    """Functions and numbers of a module stay where they are, under Equinox's own loop."""
    model = eqx.nn.MLP(4, 3, 8, 2, key=KEY)
    fn = lambda model, x: jax.vmap(model)(x)
    roles = jaxlora.trace_roles(fn, model, X)
    lora = jaxlora.init(KEY, model, LoraConfig(targets="all-linear", rank=2), roles=roles)
    apply, tx = jaxlora.lora_apply(fn), optax.adamw(3e-2)
    assert isinstance(lora, eqx.nn.MLP)
    assert lora.activation is model.activation
    assert jaxlora.count_params(lora).base == sum(
        x.size for x in jax.tree.leaves(eqx.filter(model, eqx.is_array))
    )

    trainable, frozen = jaxlora.partition(lora)
    theirs = eqx.partition(lora, jaxlora.trainable_mask(lora))
    assert jax.tree.structure(theirs) == jax.tree.structure((trainable, frozen))

    @eqx.filter_jit
    def step(trainable, frozen, opt_state):
        @eqx.filter_value_and_grad
        def loss(trainable):
            return squared(apply(eqx.combine(trainable, frozen), X))

        value, grads = loss(trainable)
        updates, opt_state = tx.update(grads, opt_state, trainable)
        return eqx.apply_updates(trainable, updates), opt_state, value

    opt_state, losses = tx.init(trainable), []
    for _ in range(STEPS):
        trainable, opt_state, value = step(trainable, frozen, opt_state)
        losses.append(value)
    assert losses[-1] < 0.8 * losses[0]
    after = jaxlora.combine(trainable, frozen)
    assert_only_adapters_change(lora, after)
    assert_close(fn(jaxlora.merge(after), X), apply(after, X))


class EquinoxModel(eqx.Module):
    up: eqx.nn.Linear
    norm: eqx.nn.BatchNorm
    drop: eqx.nn.Dropout
    down: eqx.nn.Linear

    def __init__(self, key):
        up, down = jax.random.split(key)
        self.up, self.down = eqx.nn.Linear(4, 8, key=up), eqx.nn.Linear(8, 3, key=down)
        self.norm, self.drop = eqx.nn.BatchNorm(8, "batch", mode="batch"), eqx.nn.Dropout(0.1)

    def __call__(self, x, state, key):
        x, state = self.norm(self.up(x), state)
        return self.down(self.drop(jax.nn.relu(x), key=key)), state


def test_equinox_state_and_dropout():
    model, first = eqx.nn.make_with_state(EquinoxModel)(KEY)

    def fn(model, x, state, key):
        batched = jax.vmap(model, axis_name="batch", in_axes=(0, None, 0), out_axes=(0, None))
        return batched(x, state, jax.random.split(key, len(x)))

    roles = jaxlora.trace_roles(fn, model, X, first, KEY)
    lora = jaxlora.init(KEY, model, LoraConfig(targets=["up", "down"], rank=2), roles=roles)
    apply, tx = jaxlora.lora_apply(fn), optax.adamw(3e-2)
    trainable, frozen = jaxlora.partition(lora)

    @jax.jit
    def step(trainable, state, opt_state, key):
        def loss(trainable):
            out, new = apply(jaxlora.combine(trainable, frozen), X, state, key)
            return squared(out), new

        grads, state = jax.grad(loss, has_aux=True)(trainable)
        updates, opt_state = tx.update(grads, opt_state, trainable)
        return eqx.apply_updates(trainable, updates), state, opt_state

    def evaluated(lora, state):
        return squared(apply(eqx.nn.inference_mode(lora), X, state, KEY)[0])

    state, opt_state = first, tx.init(trainable)
    trainable, state, opt_state = step(trainable, state, opt_state, KEY)
    assert_changed(jax.tree.leaves(first), jax.tree.leaves(state))
    before = evaluated(jaxlora.combine(trainable, frozen), state)
    for k in range(STEPS):
        key = jax.random.fold_in(KEY, k)
        trainable, state, opt_state = step(trainable, state, opt_state, key)
    after = jaxlora.combine(trainable, frozen)
    assert evaluated(after, state) < 0.8 * before
    assert_only_adapters_change(lora, after)
    expected = fn(jaxlora.merge(after), X, state, KEY)
    assert_close(apply(after, X, state, KEY)[0], expected[0])


# --- Haiku ----------------------------------------------------------------------------------------


def haiku_model(x, train=False):
    norm = hk.BatchNorm(create_scale=True, create_offset=True, decay_rate=0.9)
    x = jax.nn.relu(norm(hk.Linear(8, name="up")(x), is_training=train))
    x = hk.dropout(hk.next_rng_key(), 0.1, x) if train else x
    return hk.Linear(3, name="down")(x)


def test_haiku_transform_with_state():
    model = hk.transform_with_state(haiku_model)
    params, first = model.init(KEY, X, train=True)
    _, first = model.apply(params, first, KEY, X, train=True)
    roles = jaxlora.trace_roles(model.apply, params, first, None, X)
    config = LoraConfig(targets=["up", "down"], rank=2)
    lora = jaxlora.init(KEY, params, config, roles=roles)
    apply, tx = jaxlora.lora_apply(model.apply), optax.adamw(3e-2)
    trainable, frozen = jaxlora.partition(lora)

    @jax.jit
    def step(trainable, state, opt_state, key):
        def loss(trainable):
            lora = jaxlora.combine(trainable, frozen)
            out, new = apply(lora, state, key, X, train=True)
            return squared(out), new

        grads, state = jax.grad(loss, has_aux=True)(trainable)
        updates, opt_state = tx.update(grads, opt_state, trainable)
        return optax.apply_updates(trainable, updates), state, opt_state

    state, opt_state = first, tx.init(trainable)
    before = squared(apply(lora, state, None, X)[0])
    for k in range(STEPS):
        key = jax.random.fold_in(KEY, k)
        trainable, state, opt_state = step(trainable, state, opt_state, key)
    after = jaxlora.combine(trainable, frozen)
    assert squared(apply(after, state, None, X)[0]) < 0.8 * before
    assert_only_adapters_change(lora, after)
    assert_changed(first, state)
    expected = model.apply(jaxlora.merge(after), state, KEY, X, train=True)
    assert_close(apply(after, state, KEY, X, train=True), expected)


# --- Plain functions ------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["partition", "freeze_base"])
def test_plain_function(way):
    keys = jax.random.split(KEY, 2)
    params = {
        "up": {"w": jax.random.normal(keys[0], (4, 8)) / 2, "b": jnp.zeros(8)},
        "down": {"w": jax.random.normal(keys[1], (8, 3)) / 3, "b": jnp.zeros(3)},
    }

    def model(p, x):
        return jnp.tanh(x @ p["up"]["w"] + p["up"]["b"]) @ p["down"]["w"] + p["down"]["b"]

    roles = jaxlora.trace_roles(model, params, X)
    lora = jaxlora.init(KEY, params, LoraConfig(targets="all-linear", rank=2), roles=roles)
    apply, tx = jaxlora.lora_apply(model), optax.adamw(3e-2)
    if way == "partition":
        train, frozen = jaxlora.partition(lora)
        whole = lambda train: jaxlora.combine(train, frozen)
    else:
        train, whole, tx = lora, lambda lora: lora, jaxlora.freeze_base(tx, lora)

    @jax.jit
    def step(train, opt_state):
        value, grads = jax.value_and_grad(lambda train: squared(apply(whole(train), X)))(train)
        updates, opt_state = tx.update(grads, opt_state, train)
        return optax.apply_updates(train, updates), opt_state, value

    opt_state, losses = tx.init(train), []
    for _ in range(STEPS):
        train, opt_state, value = step(train, opt_state)
        losses.append(value)
    assert losses[-1] < 0.8 * losses[0]
    assert_only_adapters_change(lora, whole(train))
