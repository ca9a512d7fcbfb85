"""Adapters on disk: every bit comes back, on the right base, or an error says why not."""

from __future__ import annotations

import gzip
import json
import os
import pathlib
import pickle
import shutil
import socket
import subprocess
import sys
import tempfile
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import processes
import pytest
from cases import CASES
from flax import nnx
from helpers import assert_close, assert_same, randomized
from jax._src.sharding_impls import GSPMDSharding
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxlora
from jaxlora import (
    FullWeight,
    LoraConfig,
    LoraWeight,
    _placement,
    checkpoint,
)
from jaxlora._errors import CheckpointError, TargetError
from jaxlora.checkpoint import _fingerprint, _item, _packed, _versions

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
TESTS = pathlib.Path(__file__).parent


def normal(*shape: int, dtype: Any = jnp.float32) -> jax.Array:
    return jnp.asarray(RNG.standard_normal(shape), dtype)


def mlp() -> dict[str, Any]:
    return {
        "up": {"kernel": normal(6, 8), "bias": normal(8)},
        "down": {"kernel": normal(8, 6), "bias": normal(6)},
    }


def adapted(params: Any, targets: Any = ("kernel",), **config: Any) -> Any:
    config = {"rank": 2, "targets": list(targets)} | config
    return randomized(jaxlora.init(KEY, params, LoraConfig(**config)))


def assert_round_trip(directory: Any, lora: Any, params: Any = None) -> Any:
    checkpoint.save(directory, lora)
    params = jaxlora.base_params(lora) if params is None else params
    again = checkpoint.restore(directory, params)
    assert_same(again, lora)
    return again


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[pathlib.Path, dict[str, Any], Any]:
    """(a directory that nobody changes, params, the lora tree in it)"""
    directory = tmp_path_factory.mktemp("saved") / "adapter"
    params = mlp()
    lora = adapted(params, bias="lora_only")
    checkpoint.save(directory, lora)
    return directory, params, lora


def item(directory: pathlib.Path) -> pathlib.Path:
    (found,) = directory.glob("v*")
    return found


def files(directory: pathlib.Path) -> list[pathlib.Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


# --- Every bit comes back -------------------------------------------------------------------------

KINDS = sorted(CASES)[::16]


@pytest.mark.parametrize("name", [pytest.param(k, marks=pytest.mark.xdist_group(k)) for k in KINDS])
def test_cases_come_back(name: str, tmp_path):
    lora, _ = CASES[name].lora()
    assert_round_trip(tmp_path, randomized(lora))


def test_settings_come_back(tmp_path):
    params = {
        "embed": {"embedding": normal(11, 4)},
        "layers": {"query": normal(3, 4, 2, 5), "out": normal(3, 2, 5, 4)},
        "experts": normal(2, 3, 4, 6),
        "norm": {"scale": normal(4)},
        "head": {"kernel": normal(4, 3), "bias": normal(3)},
    }
    config = LoraConfig(
        rank=2,
        alpha=3,
        rank_stabilized=True,
        targets=["query", "out", "experts", "embed"],
        rank_pattern={"out": np.int64(3), "experts": 1},
        alpha_pattern={"query": 5},
        train=["head", "norm"],
        dropout=0.25,
        dtype=jnp.bfloat16,
        roles={"query": "sioo", "out": "siio", "experts": "ssio"},
    )
    lora = randomized(jaxlora.init(KEY, params, config))
    # Strengths that differ from layer to layer, as with adapters read from elsewhere.
    query = lora["layers"]["query"]
    lora["layers"]["query"] = LoraWeight(
        **{**vars(query), "scale": jnp.float32([0.1, 1 / 3, jnp.pi])}
    )
    checkpoint.save(tmp_path, jaxlora.with_dropout(lora, KEY), config=config)
    again = checkpoint.restore(tmp_path, params)
    assert_same(again, lora)
    assert again["layers"]["query"].dropout == 0.25
    assert isinstance(again["head"]["bias"], FullWeight)
    found = checkpoint.describe(tmp_path)
    assert found["config"]["initializer"].endswith("kaiming_uniform")
    assert found["config"]["dtype"] == "bfloat16"
    assert found["config"]["rank_pattern"] == {"out": 3, "experts": 1}
    assert found["jax"] == jax.__version__
    assert found["adapters"]["layers/out"]["roles"] == "siio"
    assert found["adapters"]["layers/out"]["rank"] == 3


@pytest.mark.parametrize("compiled", [False, True])
def test_dora_comes_back(compiled: bool, tmp_path):
    """Its norms too, to the bit, which compiled sums round otherwise."""
    params = {"kernel": normal(301, 7), "bias": normal(7)}
    build = lambda params: jaxlora.init(KEY, params, LoraConfig(targets=["kernel"], dora=True))
    lora = jax.jit(build)(params) if compiled else build(params)
    off = np.nextafter(lora["kernel"].squared_norm, np.inf)
    assert_round_trip(tmp_path / "as made", lora)
    lora["kernel"] = LoraWeight(**{**vars(lora["kernel"]), "squared_norm": jnp.asarray(off)})
    assert_round_trip(tmp_path / "rounded otherwise", lora)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_quantized_bases(kind: str, tmp_path):
    params = {"kernel": normal(64, 32, dtype=jnp.bfloat16), "bias": normal(32)}
    lora = jaxlora.quantize(adapted(params), kind=kind)
    base = jaxlora.base_params(lora)
    assert_round_trip(tmp_path, lora)
    with pytest.raises(CheckpointError, match=r"(?s)kernel: got bfloat16, expected .*quantize\("):
        checkpoint.restore(tmp_path, params)
    onto = checkpoint.restore(tmp_path, params, allow_base_mismatch=True)
    assert_same(onto["kernel"].a, lora["kernel"].a)
    other = jaxlora.quantize({**params, "kernel": params["kernel"] + 1}, ["kernel"], kind=kind)
    with pytest.raises(CheckpointError, match="kernel: other values"):
        checkpoint.restore(tmp_path, {**base, "kernel": other["kernel"]})


def test_nnx_state(tmp_path):
    class Net(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.first = nnx.Linear(4, 5, rngs=rngs)
            self.drop = nnx.Dropout(0.1, rngs=rngs)  # which keeps a random key

    _, state = nnx.split(Net(nnx.Rngs(0)))
    lora = adapted(state)
    assert_round_trip(tmp_path, lora)
    assert isinstance(checkpoint.restore(tmp_path, state), nnx.State)


def test_linen_boxes(tmp_path):
    init = nn.with_partitioning(nn.initializers.ones, (None, "model"))
    variables = nn.Dense(5, kernel_init=init).init(KEY, jnp.ones((1, 4)))
    assert isinstance(variables["params"]["kernel"], nn.Partitioned)
    assert_round_trip(tmp_path, adapted(variables))


def test_equinox(tmp_path):
    model = eqx.nn.MLP(3, 2, 4, 1, key=KEY)
    lora = adapted(model, [r"layers/0/weight"], roles={"weight": "oi"})
    checkpoint.save(tmp_path, lora)
    again = checkpoint.restore(tmp_path, model)
    assert_same(eqx.filter(again, eqx.is_array), eqx.filter(lora, eqx.is_array))
    assert again.activation is model.activation  # no array, and the model's


def test_numpy_params(tmp_path):
    params = jax.tree.map(np.asarray, mlp())
    lora = adapted(params)
    again = assert_round_trip(tmp_path, lora, params)
    assert again["up"]["kernel"].w is params["up"]["kernel"]


def test_wide_floats(tmp_path):
    with jax.enable_x64(True):
        lora = adapted({"kernel": jnp.ones((3, 4), jnp.float64)}, dtype=jnp.float64)
        assert_round_trip(tmp_path, lora)
    base = {"kernel": np.ones((3, 4))}
    with pytest.raises(CheckpointError, match="enable_x64"):
        checkpoint.restore(tmp_path, base)


def test_what_nothing_has_changed_is_written_again(tmp_path):
    """Saving is deterministic, and a version follows on another."""
    lora = adapted(mlp())
    checkpoint.save(tmp_path, lora)
    (first,) = tmp_path.glob(f"*/{checkpoint.DESCRIPTION}")
    before = first.read_bytes()
    checkpoint.save(tmp_path, lora)
    (second,) = tmp_path.glob(f"*/{checkpoint.DESCRIPTION}")
    assert second.parent.name == "v2"
    assert second.read_bytes() == before


# --- The base ------------------------------------------------------------------------------------


def test_another_base_is_refused(saved):
    directory, params, lora = saved
    other = jax.tree.map(lambda x: x, params)
    other["up"]["kernel"] = normal(6, 8)
    other["up"]["bias"] = params["up"]["bias"].astype(jnp.bfloat16)
    other["down"] = {"kernel": params["down"]["kernel"], "scale": normal(6)}
    with pytest.raises(CheckpointError) as error:
        checkpoint.restore(directory, other)
    assert error.value.paths == ("down/bias", "down/scale", "up/bias", "up/kernel")
    for line in (
        "down/bias: not in these params",
        "down/scale: not in the adapter's base",
        "up/bias: got bfloat16, expected float32",
        "up/kernel: other values",
        "jaxlora.rebase(lora, initial)",
        str(directory),
    ):
        assert line in str(error.value)

    # An adapted leaf that is missing cannot be insisted on; what else differs can.
    with pytest.raises(CheckpointError) as error:
        checkpoint.restore(directory, other, allow_base_mismatch=True)
    assert error.value.paths == ("down/bias",)
    other["down"]["bias"] = params["down"]["bias"]
    onto = checkpoint.restore(directory, other, allow_base_mismatch=True)
    assert_same(jaxlora.base_params(onto), other)
    assert_same(onto["up"]["kernel"].b, lora["up"]["kernel"].b)
    assert_same(onto["up"]["bias"].value, lora["up"]["bias"].value)


def test_shapes_cannot_be_insisted_on(saved):
    directory, params, _ = saved
    other = {**params, "up": {**params["up"], "kernel": normal(7, 8)}}
    for allow in (False, True):
        with pytest.raises(CheckpointError, match=r"up/kernel: got \(7, 8\), expected \(6, 8\)"):
            checkpoint.restore(directory, other, allow_base_mismatch=allow)
    integers = {**params, "up": {**params["up"], "kernel": jnp.zeros((6, 8), jnp.int32)}}
    with pytest.raises(CheckpointError, match="up/kernel: got int32"):
        checkpoint.restore(directory, integers, allow_base_mismatch=True)


def test_a_norm_of_another_base_is_not_kept(tmp_path):
    params = {"kernel": normal(30, 4)}
    lora = adapted(params, dora=True)
    wrong = 2 * lora["kernel"].squared_norm
    lora["kernel"] = LoraWeight(**{**vars(lora["kernel"]), "squared_norm": wrong})
    checkpoint.save(tmp_path, lora)
    assert_same(checkpoint.restore(tmp_path, params)["kernel"].squared_norm, wrong)
    other = {"kernel": normal(30, 4)}
    got = checkpoint.restore(tmp_path, other, allow_base_mismatch=True)["kernel"].squared_norm
    np.testing.assert_allclose(got, np.sum(np.square(other["kernel"]), 0), rtol=1e-6)


def test_one_changed_bit_is_seen_where_it_is_sampled():
    base = {"kernel": normal(300, 70)}
    first = _fingerprint.fingerprint(base)
    last = base["kernel"].at[-1, -1].set(jnp.nextafter(base["kernel"][-1, -1], jnp.inf))
    (odd,) = _fingerprint.differences(first, _fingerprint.fingerprint({"kernel": last}))
    assert (odd.path, odd.what) == ("kernel", "values")


@pytest.mark.parametrize("spec", [P(), P("x"), P(None, "y"), P(("x", "y")), P("x", "y")])
@pytest.mark.parametrize("explicit", [False, True])
def test_fingerprints_know_no_sharding(spec: P, explicit: bool, monkeypatch):
    kind = jax.sharding.AxisType.Explicit if explicit else jax.sharding.AxisType.Auto
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(kind, kind))
    base = {"w": normal(8, 12), "s": normal(8, 4).astype(jnp.bfloat16), "n": jnp.int32(3)}
    expected = _fingerprint.fingerprint(base)
    placed = jax.device_put(base, {k: NamedSharding(mesh, P() if k == "n" else spec) for k in base})
    assert _fingerprint.fingerprint(placed) == expected
    # As on accelerators, where a sample is taken on the devices.
    monkeypatch.setattr(_fingerprint, "_is_near", lambda x: False)
    assert _fingerprint.fingerprint(placed) == expected
    assert _fingerprint.fingerprint(base) == expected


def test_what_is_no_array_counts_too():
    base = {"w": normal(2, 2), "rate": 0.1, "name": "mlp", "act": jnp.tanh}
    found = _fingerprint.fingerprint(base)
    other = _fingerprint.fingerprint({**base, "rate": 0.2, "act": jnp.sin})
    assert [odd.path for odd in _fingerprint.differences(found, other)] == ["rate"]


# --- What is no lora tree ------------------------------------------------------------------------


def test_bad_trees(saved, tmp_path):
    directory, params, lora = saved
    trainable, _ = jaxlora.partition(lora)
    with pytest.raises(TargetError, match="combine"):
        checkpoint.save(tmp_path, trainable)
    with pytest.raises(TargetError, match="without adapters"):
        checkpoint.save(tmp_path, params)
    with pytest.raises(TargetError, match=r"jaxlora\.base_params"):
        checkpoint.restore(directory, lora)
    with pytest.raises(TargetError, match=r"outside of jax\.jit"):
        jax.eval_shape(lambda lora: checkpoint.save(tmp_path, lora), lora)
    with pytest.raises(TargetError, match="with data"):
        checkpoint.restore(directory, jax.eval_shape(lambda: params))
    with pytest.raises(TargetError, match=r"outside of jax\.jit"):
        jax.eval_shape(lambda s: checkpoint.save(tmp_path, jaxlora.with_scale(lora, s)), 1.0)
    with pytest.raises(TargetError, match="config of type str"):
        checkpoint.save(tmp_path, lora, config="rank 8")
    stacked = jax.tree.map(lambda x: x[None], lora)
    with pytest.raises(jaxlora.RolesError, match="kernel: got roles"):
        checkpoint.save(tmp_path, stacked)
    with pytest.raises(TargetError, match="same path"):
        checkpoint.save(tmp_path, {**lora, "up/kernel": jnp.ones(2)})
    assert not list(tmp_path.iterdir())  # nothing half-made is left


# --- Packing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "bfloat16", "float32", "float64"])
def test_checksums_see_every_word(dtype: str):
    with jax.enable_x64(dtype == "float64"):
        x = np.asarray(RNG.standard_normal((5, 7)), jnp.dtype(dtype))
        words = np.frombuffer(x.tobytes(), f"u{min(x.itemsize, 4)}")
        index = np.arange(words.size, dtype=object)  # integers without a size
        expected = sum(int(w) * (2 * int(i) + 1) for w, i in zip(words, index, strict=True))
        assert _packed.checksum(x) == f"{expected % 2**32:08x}"
        assert int(_packed._sum_on_device(jnp.asarray(x))) == expected % 2**32


def test_packs_are_split(monkeypatch):
    monkeypatch.setattr(_packed, "LIMIT", 100)
    arrays = [np.float32(normal(n)) for n in (10, 10, 40, 0, 3)]
    packed, places = _packed.pack(arrays)
    assert {name: x.size for name, x in packed.items()} == {"float32_0": 20, "float32_1": 43}
    for x, at in zip(arrays, places, strict=True):
        np.testing.assert_array_equal(_packed.unpack(packed, "float32", at), x)


def test_size(tmp_path):
    """The adapter and less than 64 KiB: 420 arrays in 30 layers, a base of 1,000 leaves."""
    sizes = {"q": (16, 16), "k": (16, 8), "v": (16, 8), "o": (16, 16), "up": (16, 40)}
    sizes |= {"gate": (16, 40), "down": (40, 16)}
    params = {
        f"model_layers_{i}": {
            **{f"self_attention_{n}_projection": {"kernel": normal(*s)} for n, s in sizes.items()},
            **{f"normalization_layer_{j}": {"scale": normal(16)} for j in range(27)},
        }
        for i in range(30)
    }
    params["embedding"] = normal(99, 16)
    lora = adapted(params, dtype=jnp.bfloat16)
    trainable, _ = jaxlora.partition(lora)
    assert len(jax.tree.leaves(trainable)) == 420
    assert len(jax.tree.leaves(params)) > 1000
    checkpoint.save(tmp_path, lora)
    adapter = sum(x.nbytes for x in jax.tree.leaves(trainable))
    written = sum(path.stat().st_size for path in files(tmp_path))
    assert written < adapter + 64 * 1024, written - adapter
    assert_same(checkpoint.restore(tmp_path, params), lora)


# --- Meshes --------------------------------------------------------------------------------------


def mesh_of(shape: tuple[int, ...], names: tuple[str, ...]) -> jax.sharding.Mesh:
    kinds = (jax.sharding.AxisType.Auto,) * len(names)
    return jax.make_mesh(
        shape, names, devices=jax.devices()[: int(np.prod(shape))], axis_types=kinds
    )


def on_mesh(params: Any, mesh: Any, specs: dict[str, P]) -> Any:
    return {k: jax.device_put(x, NamedSharding(mesh, specs[k])) for k, x in params.items()}


MESHES = {
    "four": mesh_of((2, 2), ("data", "model")),
    "two": mesh_of((2,), ("model",)),
    "one": mesh_of((1,), ("model",)),
}
SPECS = {
    "query": P(None, "model"),
    "out": P("model"),
    "layers": P(None, None, "model"),
    "norm": P(),
}


def sharded_adapter(params: Any) -> Any:
    config = LoraConfig(
        rank=2,
        targets=["query", "out", "layers"],
        train=["norm"],
        dora=True,
        roles={"query": "ioo", "out": "iio", "layers": "soi"},
    )
    return jaxlora.init(KEY, params, config)


@pytest.mark.parametrize("where", ["nowhere", "device", *MESHES])
def test_restored_on_other_devices(where: str, tmp_path):
    """Saved on four devices; on any others a goes along W's inputs, b along its outputs."""
    params = {
        "query": normal(8, 4, 6),
        "out": normal(4, 6, 8),
        "layers": normal(2, 6, 4),
        "norm": normal(8),
    }
    lora = jax.jit(sharded_adapter)(on_mesh(params, MESHES["four"], SPECS))
    lora = jax.tree.map(lambda x: x, randomized(lora))
    assert len(lora["query"].w.sharding.device_set) == 4
    checkpoint.save(tmp_path, lora)
    if where == "nowhere":
        base = jax.tree.map(np.asarray, params)
    elif where == "device":
        base = jax.device_put(params, jax.devices()[3])
    else:
        base = on_mesh(params, MESHES[where], SPECS)
    again = checkpoint.restore(tmp_path, base)
    assert_same(jaxlora.partition(again)[0], jaxlora.partition(lora)[0])
    assert_same(jaxlora.base_params(again), base)
    assert_close(again, lora)  # the norms too, which are summed there
    if where == "four":
        assert_same(again, lora)
    if where in MESHES:
        specs = {
            "query": {
                "a": P(None, None),
                "b": P(None, "model", None),
                "magnitude": P("model", None),
            },
            "out": {"a": P("model", None, None), "b": P(None, None), "magnitude": P(None)},
            "layers": {"a": P(None, "model", None), "b": P(None, None, None), "scale": P(None)},
            "norm": {"value": P(None)},
        }
        for path, parts in specs.items():
            for name, spec in parts.items():
                got = getattr(again[path], name).sharding
                assert got.is_equivalent_to(NamedSharding(MESHES[where], spec), len(spec)), path
    else:
        device = jax.devices()[3 if where == "device" else 0]
        trainable = jax.tree.leaves(jaxlora.partition(again)[0])
        assert {d for x in trainable for d in x.devices()} == {device}
        assert all(x.committed == (where == "device") for x in trainable)


@pytest.mark.parametrize("block_size", [64, 32])
@pytest.mark.parametrize("along", [None, (0,)])
def test_quantized_weights_on_a_mesh(block_size: int, along: Any):
    """An adapter follows the codes: rows or columns of blocks. Flat ones say nothing."""
    w = jaxlora.quantize_array(
        normal(2, 32, 128), "nf4", block_size=block_size, stacked=1, along=along
    )
    spec = P(None, None, "model") if along is not None and w.is_columnwise else P(None, "model")
    spread = NamedSharding(MESHES["two"], spec)
    w = jax.tree.map(lambda x: jax.device_put(x, spread) if x is w.codes else x, w)
    a = _placement.place(np.ones((2, 32, 3), np.float32), w, _placement.dims_of("a", "sio"))
    b = _placement.place(np.ones((2, 3, 128), np.float32), w, _placement.dims_of("b", "sio"))
    rows, columns = (P(None, "model"), P()), (P(), P(None, None, "model"))
    expected = rows if along is None else columns if w.is_columnwise else (P(), P())
    for x, spec in zip((a, b), expected, strict=True):
        assert x.sharding.is_equivalent_to(NamedSharding(MESHES["two"], spec), 3)


def test_a_sharding_without_a_spec():
    """As some compiled programs give their outputs: on all of its devices."""
    everywhere = GSPMDSharding.get_replicated(jax.devices())
    w = jax.device_put(normal(4, 6), everywhere)
    a = _placement.place(np.ones((4, 2), np.float32), w, _placement.dims_of("a", "io"))
    assert a.sharding.is_equivalent_to(everywhere, 2)


# --- In a CheckpointManager -----------------------------------------------------------------------


def train_state(lora: Any) -> tuple[Any, Any, Any, Any]:
    tx = optax.adam(0.1)
    trainable, frozen = jaxlora.partition(lora)
    return tx, trainable, frozen, tx.init(trainable)


@jax.jit
def loss_of(trainable: Any, frozen: Any, x: jax.Array) -> jax.Array:
    def model(params, x):
        h = jnp.tanh(x @ params["up"]["kernel"] + params["up"]["bias"])
        return jnp.mean((h @ params["down"]["kernel"] + params["down"]["bias"] - x) ** 2)

    return jaxlora.lora_apply(model)(jaxlora.combine(trainable, frozen), x)


def test_manager(tmp_path):
    """Steps, max_to_keep, asynchronous, the best one kept; and a run that goes on as it would."""
    params = mlp()
    lora = adapted(params, bias="lora_only")
    tx, trainable, frozen, state = train_state(lora)
    step_of = jax.jit(jax.value_and_grad(loss_of))

    def train(trainable, state, step):
        loss, gradient = step_of(trainable, frozen, jax.random.normal(jax.random.key(step), (4, 6)))
        updates, state = tx.update(gradient, state, trainable)
        return optax.apply_updates(trainable, updates), state, float(loss)

    options = ocp.CheckpointManagerOptions(
        max_to_keep=2, best_fn=lambda metrics: metrics["loss"], best_mode="min"
    )
    metrics = {1: 3.0, 2: 1.0, 3: 2.0, 4: 9.0}
    at = {}
    with ocp.CheckpointManager(tmp_path, options=options) as manager:
        for step, loss in metrics.items():
            trainable, state, _ = train(trainable, state, step)
            at[step] = trainable, state
            items = ocp.args.Composite(
                lora=checkpoint.Save(jaxlora.combine(trainable, frozen)),
                opt=ocp.args.StandardSave(state),
                data=ocp.args.JsonSave({"next": step + 1}),
                start=checkpoint.Save(lora),  # a second adapter
            )
            assert manager.save(step, args=items, metrics={"loss": loss})
        manager.wait_until_finished()
    expected = [train(*at[2], 3)[2]]

    with ocp.CheckpointManager(tmp_path, options=options) as manager:
        assert sorted(manager.all_steps()) == [2, 3]
        assert manager.best_step() == 2
        found = manager.restore(
            2,
            args=ocp.args.Composite(
                lora=checkpoint.Restore(params),
                opt=ocp.args.StandardRestore(tx.init(at[2][0])),
                start=checkpoint.Restore(params),
                data=ocp.args.JsonRestore(),
            ),
        )
        description = manager.item_metadata(2).lora
    assert description["adapters"]["up/kernel"]["rank"] == 2
    assert found.data == {"next": 3}
    assert_same(found.start, lora)
    again, frozen = jaxlora.partition(found.lora)
    assert_same(again, at[2][0])
    assert_same(found.opt, at[2][1])
    assert [train(again, found.opt, 3)[2]] == expected

    # An item by itself; and where to find one.
    assert_same(checkpoint.restore(tmp_path / "2" / "lora", params), found.lora)
    for place in (tmp_path, tmp_path / "2"):
        with pytest.raises(CheckpointError, match=f"{tmp_path}/2/lora"):
            checkpoint.restore(place, params)
    with ocp.CheckpointManager(tmp_path) as manager, pytest.raises(CheckpointError, match="other"):
        manager.restore(
            2, args=ocp.args.Composite(lora=checkpoint.Restore(jax.tree.map(jnp.ones_like, params)))
        )


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_manager_of_adapters_alone(asynchronous: bool, tmp_path):
    lora = adapted(mlp())
    options = ocp.CheckpointManagerOptions(enable_async_checkpointing=asynchronous)
    with ocp.CheckpointManager(tmp_path, options=options) as manager:
        manager.save(0, args=checkpoint.Save(lora))
        manager.wait_until_finished()
        found = manager.restore(0, args=checkpoint.Restore(jaxlora.base_params(lora)))
    assert_same(found, lora)


def test_buffers_can_be_donated_while_they_are_written(tmp_path):
    lora = adapted(mlp())
    expected = jax.tree.map(np.array, lora)
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(0, args=checkpoint.Save(lora))
        trainable, _ = jaxlora.partition(lora)
        trainable = jax.jit(lambda t: jax.tree.map(lambda x: 0 * x, t), donate_argnums=0)(trainable)
        jax.block_until_ready(trainable)
        manager.wait_until_finished()
    params = jax.tree.map(np.asarray, jaxlora.base_params(expected))
    assert_same(checkpoint.restore(tmp_path / "0" / "default", params), expected)


# --- Damaged files -------------------------------------------------------------------------------


def outcome(directory: pathlib.Path, params: Any, lora: Any) -> str:
    """The right adapter, or an error that names a file; anything else fails."""
    try:
        again = checkpoint.restore(directory, params)
    except CheckpointError as error:
        return "refused" if str(directory) in str(error) else str(error)
    assert_same(again, lora)
    return "right"


def damage(directory: pathlib.Path, rng: np.random.Generator) -> None:
    """One file is changed, cut, extended, emptied, exchanged, or taken away."""
    path = rng.choice(files(directory))
    data = bytearray(path.read_bytes())
    kind = rng.choice(["bits", "zeros", "cut", "more", "gone", "swapped", "link"])
    if kind in ("gone", "link"):
        path.unlink()
        if kind == "link":
            target = rng.choice(["/dev/zero", "/etc/hostname", path.name, ".", "nowhere", "pipe"])
            path.symlink_to(target) if target != "pipe" else os.mkfifo(path)
        return
    if kind == "cut":
        data = data[: rng.integers(len(data) + 1)]
    elif kind == "more":
        data += rng.bytes(rng.integers(1, 100))
    elif kind == "swapped":
        data = bytearray(rng.choice(files(directory)).read_bytes())
    elif data:
        at = rng.integers(len(data), size=rng.integers(1, 4))
        for i in at:
            data[i] = 0 if kind == "zeros" else data[i] ^ (1 << rng.integers(8))
    path.write_bytes(bytes(data))


def survive(saved: Any, tmp_path: pathlib.Path, count: int) -> None:
    directory, params, lora = saved
    rng = np.random.default_rng(0)
    seen = {"refused": 0, "right": 0}
    for i in range(count):
        copy = tmp_path / str(i)
        shutil.copytree(directory, copy)
        damage(copy, rng)
        seen[outcome(copy, params, lora)] += 1
        shutil.rmtree(copy)
    assert seen["refused"] > count / 3  # and of the others, what was damaged is never read


def test_damage(saved, tmp_path):
    survive(saved, tmp_path, 60)


@pytest.mark.parametrize("kind", ["pipe", "/dev/zero"])
def test_what_is_no_file_is_not_read(kind: str, saved, tmp_path):
    """Reading it would not end."""
    directory, params, lora = saved
    for i, path in enumerate(files(directory)):
        copy = tmp_path / str(i)
        shutil.copytree(directory, copy)
        changed = copy / path.relative_to(directory)
        changed.unlink()
        os.mkfifo(changed) if kind == "pipe" else changed.symlink_to(kind)
        assert outcome(copy, params, lora) == "refused"


@pytest.mark.slow
def test_much_damage(saved, tmp_path):
    survive(saved, tmp_path, 1_000)


def rewritten(saved: Any, tmp_path: pathlib.Path, change: Any) -> Any:
    """Restores the adapter with its description changed by hand."""
    directory, params, _ = saved
    copy = tmp_path / "copy"
    shutil.copytree(directory, copy)
    file = item(copy) / checkpoint.DESCRIPTION
    found = json.loads(gzip.decompress(file.read_bytes()))
    text = change(found)
    text = json.dumps(found if text is None else text) if not isinstance(text, bytes) else text
    file.write_bytes(gzip.compress(text if isinstance(text, bytes) else text.encode()))
    return checkpoint.restore(copy, params)


def set_at(*keys: Any, value: Any) -> Any:
    def change(found: Any) -> None:
        for key in keys[:-1]:
            found = found[key]
        if value is None:
            del found[keys[-1]]
        else:
            found[keys[-1]] = value

    return change


UP = ("adapters", "up/kernel")
CHANGES = {
    "a newer format": (set_at("format", value=2), "got format 2, expected 1"),
    "no format": (set_at("format", value=None), "damaged or not"),
    "no json": (lambda _: b"{", "damaged or not"),
    "no object": (lambda _: b"[1]", "damaged or not"),
    "deep json": (lambda _: b"[" * 100_000, "damaged or not"),
    "another rank": (set_at(*UP, "a", value=["float32", "float32_0", 0, [6, 3]]), "up/kernel"),
    "huge": (set_at(*UP, "a", value=["float32", "float32_0", 0, [2**30, 2**30]]), "outside"),
    "a huge file": (
        set_at("arrays", "float32_0", value=["float32", [2**60], "00000000"]),
        "bytes of files",
    ),
    "another array": (set_at(*UP, "b", value=["float32", "../other", 0, [2, 8]]), "other"),
    "a negative place": (set_at(*UP, "b", value=["float32", "float32_0", -1, [2, 8]]), "place"),
    "no dtype": (set_at(*UP, "b", value=["object", "float32_0", 0, [2, 8]]), "dtype"),
    "another dtype": (set_at(*UP, "b", value=["int32", "float32_0", 0, [2, 8]]), "dtype"),
    "other roles": (set_at(*UP, "roles", value="oi"), "up/kernel.*expected"),
    "no roles": (set_at(*UP, "roles", value="ix"), "up/kernel.*letters"),
    "many scales": (set_at(*UP, "scale", value=[1.0, 2.0]), "a scale"),
    "a scale in words": (set_at(*UP, "scale", value="big"), "damaged or not"),
    "a rate": (set_at(*UP, "dropout", value=1.5), "up/kernel.*dropout"),
    "a kind": (set_at(*UP, "kind", value="lokr"), "kind"),
    "a missing part": (set_at(*UP, "b", value=None), "'b'"),
    "a missing base": (set_at("base", "up/kernel", value=None), "without a base"),
    "a missing array": (set_at("arrays", "float32_0", value=None), "float32_0"),
    "another sum": (set_at("arrays", "float32_0", 2, value="00000000"), "has checksum"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_descriptions_that_somebody_else_wrote(name: str, saved, tmp_path):
    change, message = CHANGES[name]
    with pytest.raises(CheckpointError, match=message) as error:
        rewritten(saved, tmp_path, change)
    assert str(tmp_path) in str(error.value)


def test_a_description_that_grows_without_end(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(jaxlora.checkpoint._description, "LIMIT", 10_000)
    with pytest.raises(CheckpointError, match="more than 10,000 bytes"):
        rewritten(saved, tmp_path, lambda _: b" " * 1_000_000)
    lora = adapted({f"layer_{i}": {"kernel": normal(2, 2)} for i in range(100)})
    with pytest.raises(CheckpointError, match="too many leaves"):
        checkpoint.save(tmp_path / "new", lora)


def test_foreign_directories(saved, tmp_path):
    _, params, _ = saved
    (tmp_path / "a file").write_text("hello")
    for path, message in (
        (tmp_path / "nowhere", "no such directory"),
        (tmp_path, "expected the description"),
        (tmp_path / "a file", "expected the description"),
    ):
        with pytest.raises(CheckpointError, match=message):
            checkpoint.restore(path, params)
        with pytest.raises(CheckpointError, match=message):
            checkpoint.describe(path)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "foreign", params)
    with pytest.raises(CheckpointError, match=r"foreign.*expected the description"):
        checkpoint.restore(tmp_path / "foreign", params)
    with pytest.raises(CheckpointError, match="cannot be written"):
        checkpoint.save(tmp_path / "a file", adapted(params))


def test_a_version_is_no_place_to_save(saved):
    directory, _, lora = saved
    with pytest.raises(CheckpointError, match="one version of an adapter"):
        checkpoint.save(item(directory), lora)


def test_a_version_may_go_while_it_is_read(tmp_path, monkeypatch):
    params = mlp()
    first, second = adapted(params), randomized(adapted(params), seed=2)
    checkpoint.save(tmp_path, first)
    read = checkpoint.Handler.read

    def read_late(*args: Any) -> Any:
        monkeypatch.setattr(checkpoint.Handler, "read", read)
        checkpoint.save(tmp_path, second)
        return read(*args)

    monkeypatch.setattr(checkpoint.Handler, "read", read_late)
    assert_same(checkpoint.restore(tmp_path, params), second)


def test_older_versions_that_cannot_be_removed(tmp_path, monkeypatch):
    params = mlp()
    first, second = adapted(params), randomized(adapted(params), seed=2)
    checkpoint.save(tmp_path, first)

    def fail(root: Any) -> None:
        raise PermissionError("not yours")

    monkeypatch.setattr(_versions, "_remove_temporary", fail)
    with pytest.raises(CheckpointError, match="The adapter is saved"):
        checkpoint.save(tmp_path, second)
    monkeypatch.undo()
    assert_same(checkpoint.restore(tmp_path, params), second)
    checkpoint.save(tmp_path, second)
    assert [path.name for path in tmp_path.iterdir()] == ["v3"]


def test_others_files_are_left_alone(tmp_path):
    (tmp_path / "v1").mkdir()
    (tmp_path / "v1" / "mine").write_text("hello")
    (tmp_path / "notes.txt").write_text("hello")
    lora = adapted(mlp())
    for _ in range(2):
        assert_round_trip(tmp_path, lora)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", "v1", "v3"]
    assert (tmp_path / "v1" / "mine").read_text() == "hello"


def test_no_pickle(tmp_path, monkeypatch):
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("pickled")

    for name in ("dump", "dumps", "load", "loads", "Pickler", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    lora = adapted(mlp(), bias="all", dora=True)
    assert_round_trip(tmp_path, lora)
    for path in files(tmp_path):
        data = path.read_bytes()
        assert not any(data.startswith(bytes([0x80, k])) for k in range(6)), path  # its opcode


# --- Writing that fails --------------------------------------------------------------------------


def environment() -> dict[str, str]:
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(TESTS.parent)}
    return {k: v for k, v in env.items() if k not in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")}


def run_python(*args: Any) -> str:
    """What a process of its own prints."""
    command = [sys.executable, *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


FAILING = """
import os, resource, sys
import jax, jax.numpy as jnp, jaxlora
from jaxlora import checkpoint
directory = sys.argv[1]
params = {"kernel": jnp.ones((300, 400))}
config = jaxlora.LoraConfig(rank=4, targets=["kernel"])
first, second = (jaxlora.init(jax.random.key(i), params, config) for i in range(2))
checkpoint.save(directory, first)

def fails(why):
    try:
        checkpoint.save(directory, second)
    except checkpoint.CheckpointError as error:
        print(why, error)
    again = checkpoint.restore(directory, params)
    assert bool(jnp.all(again["kernel"].a == first["kernel"].a))
    print(*sorted(os.listdir(directory)))

limits = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))  # no file may grow further
fails("full")
resource.setrlimit(resource.RLIMIT_FSIZE, limits)
os.chmod(directory, 0o555)
if os.geteuid() == 0:
    os.chown(directory, 65534, -1)
    os.seteuid(65534)  # whom permissions bind
fails("read-only")
"""


def test_the_old_adapter_survives_a_failed_save():
    """On a full disk, and in a directory that may not be written to."""
    with tempfile.TemporaryDirectory(prefix="jaxlora-test-") as directory:
        os.chmod(directory, 0o755)
        got = run_python("-c", FAILING, pathlib.Path(directory) / "adapter")
    assert "full" in got
    assert "File too large" in got
    assert "read-only" in got
    assert "Permission denied" in got
    assert got.count("What was there before is untouched") == 2
    assert got.splitlines().count("v1") == 2


def test_a_failed_save_is_tidied_up(tmp_path, monkeypatch):
    lora = adapted(mlp())
    checkpoint.save(tmp_path, lora)

    def fail(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(_item, "_write", fail)
    with pytest.raises(CheckpointError, match="No space left"):
        checkpoint.save(tmp_path, lora)
    assert [path.name for path in tmp_path.iterdir()] == ["v1"]
    with ocp.CheckpointManager(tmp_path / "run") as manager:
        manager.save(0, args=checkpoint.Save(lora))
        with pytest.raises(OSError, match="space"):
            manager.wait_until_finished()
        assert manager.latest_step() is None


# --- Runs that are killed; several processes ------------------------------------------------------


@pytest.mark.parametrize(("kills", "seed"), [(2, 0), pytest.param(20, 1, marks=pytest.mark.slow)])
def test_killed_at_any_moment(kills: int, seed: int, tmp_path):
    """The previous step is whole, and the run goes on with bitwise the same losses."""
    assert "the same losses" in run_python(TESTS / "interrupted.py", tmp_path, kills, seed)


@pytest.mark.slow
def test_two_processes(tmp_path):
    """Each has a part of the arrays; then one process on one device has all of them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    commands = [
        [sys.executable, str(TESTS / "processes.py"), str(tmp_path), str(port), str(index)]
        for index in range(2)
    ]
    running = [
        subprocess.Popen(c, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment())
        for c in commands
    ]
    try:
        said = [process.communicate(timeout=300)[0].decode() for process in running]
    finally:
        for process in running:
            process.kill()
    assert all(text.rstrip().endswith("done") for text in said), said
    params = processes.base()
    expected = jaxlora.partition(processes.adapter(params))[0]
    for path in (tmp_path / "adapter", tmp_path / "run" / "1" / "lora"):
        assert_same(jaxlora.partition(checkpoint.restore(path, params))[0], expected)


@pytest.mark.parametrize("inside", [False, True])
def test_flax_outermost_key(inside: bool, tmp_path):
    params = {"kernel": jnp.ones((3, 4))}
    saved, given = ({"params": params}, params) if inside else (params, {"params": params})
    checkpoint.save(tmp_path, adapted(saved))
    remedy = "give {'params': params}" if inside else r"give variables\['params'\]"
    with pytest.raises(CheckpointError, match=remedy):
        checkpoint.restore(tmp_path, given)


def test_peft_s_directories_are_known(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"It is PEFT's: jaxlora\.peft\.load"):
        checkpoint.restore(tmp_path, {"kernel": jnp.ones((3, 4))})


def test_a_manager_s_restore_without_params(tmp_path):
    with ocp.CheckpointManager(tmp_path) as manager:
        lora = checkpoint.Save(adapted({"kernel": jnp.ones((3, 4))}))
        manager.save(1, args=ocp.args.Composite(lora=lora))
    handlers = ocp.args.Composite(lora=checkpoint.Restore())
    with (
        ocp.CheckpointManager(tmp_path) as manager,
        pytest.raises(TargetError, match=r"got no params, expected those.*Restore\(params\)"),
    ):
        manager.restore(1, args=handlers)
