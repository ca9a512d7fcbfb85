"""Targets, halves, masks, merging, optimizers, counts."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState
from helpers import assert_close, assert_same, randomized

import jaxlora
from jaxlora import FullWeight, LoraConfig, LoraWeight
from jaxlora._paths import flatten_with_paths
from jaxlora._weight import is_node

KEY = jax.random.key(0)
PARAMS = {
    "params": {
        "layer_0": {
            "query": {"kernel": jnp.ones((4, 6)), "bias": jnp.ones(6)},
            "key": {"kernel": jnp.ones((4, 6)), "bias": jnp.ones(6)},
            "norm": {"scale": jnp.ones(4), "bias": jnp.ones(4)},
        },
        "layer_1": {"query": {"kernel": jnp.ones((4, 6)), "bias": jnp.ones(6)}},
        "head": {"proj": {"kernel": jnp.ones((6, 3)), "bias": jnp.ones(3)}},
        "embed": {"embedding": jnp.ones((9, 4))},
    }
}


def nodes(lora, kind=LoraWeight) -> set[str]:
    pairs, _ = flatten_with_paths(lora, is_leaf=is_node)
    return {path.removeprefix("params/") for path, leaf in pairs if isinstance(leaf, kind)}


def init(**config):
    return jaxlora.init(KEY, PARAMS, LoraConfig(**({"rank": 2} | config)))


QUERIES = {"layer_0/query/kernel", "layer_1/query/kernel"}


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["query"], QUERIES),
        (["query/kernel"], QUERIES),
        (["layer_0/query"], {"layer_0/query/kernel"}),
        (["params/layer_0/query/kernel"], {"layer_0/query/kernel"}),
        (("query", "key"), QUERIES | {"layer_0/key/kernel"}),
        (["embed"], {"embed/embedding"}),
        (r".*/query/kernel", QUERIES),
        (r"layer_0/(query|key)/kernel", {"layer_0/query/kernel", "layer_0/key/kernel"}),
        (r"params/layer_\d/query/kernel", QUERIES),
        (lambda path, leaf: leaf.shape == (6, 3), {"head/proj/kernel"}),
    ],
)
def test_targets(targets, expected):
    assert nodes(init(targets=targets)) == expected


def test_exclude():
    assert nodes(init(targets=["query", "proj"], exclude=["head"])) == QUERIES
    got = init(targets=r".*kernel", exclude=r".*layer_0.*")
    assert nodes(got) == {"layer_1/query/kernel", "head/proj/kernel"}


def test_train_and_bias():
    lora = init(targets=["query"], train=["norm", "head"])
    expected = {"layer_0/norm/scale", "layer_0/norm/bias", "head/proj/kernel", "head/proj/bias"}
    assert nodes(lora, FullWeight) == expected
    beside = init(targets=["query"], bias="lora_only")
    assert nodes(beside, FullWeight) == {"layer_0/query/bias", "layer_1/query/bias"}
    assert len(nodes(init(targets=["query"], bias="all"), FullWeight)) == 5


def test_a_target_called_b_is_no_bias():
    params = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 5)), "head": {"b": jnp.ones(5)}}
    config = LoraConfig(
        targets=["a", "b"], bias="all", roles={"a": "io", "b": "io"}, exclude=["head"]
    )
    lora = jaxlora.init(KEY, params, config)
    assert nodes(lora) == {"a", "b"}
    assert nodes(lora, FullWeight) == {"head/b"}


def test_keys_may_be_anchored_below_params():
    lora = init(targets=["query"], rank_pattern={"^layer_1/query": 3})
    assert lora["params"]["layer_1"]["query"]["kernel"].rank == 3


def test_ranks_and_scales():
    lora = init(targets=["query", "key"], rank=4, alpha=8, rank_pattern={"layer_1/query": 2})
    layers = lora["params"]
    assert layers["layer_0"]["query"]["kernel"].a.shape == (4, 4)
    assert float(layers["layer_0"]["query"]["kernel"].scale) == 2
    assert layers["layer_1"]["query"]["kernel"].b.shape == (2, 6)
    assert float(layers["layer_1"]["query"]["kernel"].scale) == 4
    config = LoraConfig(targets=["x"], rank=4, alpha_pattern={"q.*": 2}, rank_stabilized=True)
    assert config.scale("layer/query/kernel") == 1
    assert config.scale("layer/key/kernel") == 2
    assert LoraConfig(targets=["x"], rank=7).scale("any") == 1


def test_all_linear_leaves_tied_embeddings_out():
    params = {"e": jnp.ones((9, 4)), "w": jnp.ones((4, 4)), "lookup": jnp.ones((9, 4))}

    def fn(p, t):
        return jnp.tanh((p["e"][t] + p["lookup"][t]) @ p["w"]) @ p["e"].T

    roles = jaxlora.trace_roles(fn, params, jnp.array([1, 2]))
    assert dict(roles) == {"e": "io", "w": "io", "lookup": "io"}
    lora = jaxlora.init(KEY, params, LoraConfig(targets="all-linear"), roles=roles)
    assert nodes(lora) == {"w"}


def test_all_linear_skips_no_matmul():
    """A weight that is also regularized is a target; it raises where it is used so, not before."""
    params = {"w": jnp.ones((4, 4)), "v": jnp.ones((4, 4))}
    fn = lambda p, x: x @ p["w"] @ p["v"] + jnp.sum(p["w"] ** 2)
    roles = jaxlora.trace_roles(fn, params, jnp.ones((5, 4)))
    lora = jaxlora.init(KEY, params, LoraConfig(targets="all-linear"), roles=roles)
    assert nodes(lora) == {"w", "v"}


def test_all_linear_leaves_stacked_vectors_out():
    """Mamba-3's `mimo_o`: summed over one dim, elementwise along all others."""
    params = {
        "w": jnp.ones((4, 6)),
        "v": jnp.ones((2, 3)),
        "s": jnp.ones((2, 1)),
        "one": jnp.ones((6, 1)),
    }

    def fn(p, x):
        h = (x @ p["w"]).reshape(-1, 2, 3)
        h = jnp.einsum("thp,hp->th", h, p["v"]), jnp.einsum("thp,hq->th", h, p["s"])
        return h, x @ p["w"] @ p["one"]

    roles = jaxlora.trace_roles(fn, params, jnp.ones((5, 4)))
    lora = jaxlora.init(KEY, params, LoraConfig(targets="all-linear"), roles=roles)
    assert nodes(lora) == {"w", "one"}
    with pytest.raises(jaxlora.RolesError, match="'si'"):
        jaxlora.init(KEY, params, LoraConfig(targets=["v"]), roles=roles)


def test_roles_are_traced_without_arrays():
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), PARAMS["params"])
    fn = lambda p, x: x @ p["head"]["proj"]["kernel"]
    roles = jaxlora.trace_roles(fn, shapes, jax.ShapeDtypeStruct((5, 6), jnp.float32))
    assert dict(roles) == {"head/proj/kernel": "io"}


@pytest.mark.parametrize("inner", [True, False])
def test_traced_roles_serve_with_and_without_params(inner):
    params = {"params": {"q": jnp.ones((4, 2, 3))}}
    fn = lambda p, x: jnp.einsum("td,dhk->thk", x, p["params"]["q"])
    roles = jaxlora.trace_roles(fn, params, jnp.ones((5, 4)))
    if not inner:
        bare = lambda p, x: fn({"params": p}, x)
        roles = jaxlora.trace_roles(bare, params["params"], jnp.ones((5, 4)))
    tree = params["params"] if inner else params
    for targets in (["q"], "all-linear"):
        lora = jaxlora.init(KEY, tree, LoraConfig(targets=targets), roles=roles)
        assert nodes(lora) == {"q"}


def test_init_under_eval_shape_and_jit():
    config = LoraConfig(targets=["query"], rank=2)
    shapes = jax.eval_shape(lambda: jaxlora.init(KEY, PARAMS, config))
    assert shapes["params"]["layer_0"]["query"]["kernel"].a.shape == (4, 2)
    assert_close(jax.jit(lambda p: jaxlora.init(KEY, p, config))(PARAMS), init(targets=["query"]))


def test_keys_belong_to_paths():
    few, many = init(targets=["query"]), init(targets=["query", "key", "head/proj"])
    pick = lambda lora: lora["params"]["layer_0"]["query"]["kernel"].a
    assert_same(pick(few), pick(many))
    assert_same(pick(few), pick(init(targets=["query"])))
    bare = jaxlora.init(KEY, PARAMS["params"], LoraConfig(targets=["query"], rank=2))
    assert_same(bare["layer_0"]["query"]["kernel"].a, pick(few))
    layers = many["params"]["layer_0"]
    assert not jnp.allclose(layers["query"]["kernel"].a, layers["key"]["kernel"].a)


def test_stacked_weights_get_factors_and_scales_of_their_own():
    params = {"w": jnp.ones((3, 4, 5, 6))}
    config = LoraConfig(targets=["w"], roles={"w": "siio"}, rank=2, alpha=1)
    w = jaxlora.init(KEY, params, config)["w"]
    assert w.a.shape == (3, 4, 5, 2)
    assert w.b.shape == (3, 2, 6)
    assert w.scale.shape == (3,)
    assert not jnp.allclose(w.a[0], w.a[1])
    assert float(jnp.abs(w.a).max()) <= 1 / np.sqrt(20)


@pytest.mark.parametrize("roles", ["io", "oi", "ioo", "oio", "iio", "sio", "ois", "soi", "ssioi"])
def test_merge_against_numpy(roles):
    shape = tuple(range(2, 2 + len(roles)))
    w = np.asarray(jax.random.normal(KEY, shape))
    config = LoraConfig(targets=["w"], roles={"w": roles}, rank=3, alpha=2)
    lora = randomized(jaxlora.init(KEY, {"w": jnp.asarray(w)}, config))
    letters = "defgh"[: len(roles)]
    s, i, o = ("".join(x for x, r in zip(letters, roles, strict=True) if r == k) for k in "sio")
    a, b = (np.asarray(v, np.float64) for v in (lora["w"].a, lora["w"].b))
    expected = w + 2 / 3 * np.einsum(f"{s}{i}r,{s}r{o}->{letters}", a, b)
    np.testing.assert_allclose(jaxlora.merge(lora)["w"], expected, rtol=1e-6, atol=1e-6)


def test_merge_rounds_once():
    w = jnp.full((8, 8), 256.0, jnp.bfloat16)  # its neighbours are 2 apart
    lora = jaxlora.init(KEY, {"kernel": w}, LoraConfig(targets=["kernel"], rank=8))
    trainable, frozen = jaxlora.partition(lora)
    halves = jax.tree.map(lambda x: jnp.full(x.shape, 0.41), trainable)  # a b = 8 * 0.1681 = 1.34
    merged = jaxlora.merge(jaxlora.combine(halves, frozen))["kernel"]
    assert merged.dtype == jnp.bfloat16
    assert float(merged[0, 0]) == 258


def test_partition_and_combine():
    lora = randomized(init(targets=["query"], train=["norm"]))
    trainable, frozen = jaxlora.partition(lora)
    assert_same(jaxlora.combine(trainable, frozen), lora)
    counts = sum(x.size for x in jax.tree.leaves(trainable))
    assert counts == jaxlora.count_params(lora).trainable == 2 * (4 * 2 + 2 * 6) + 8
    masked = jax.tree.leaves(jaxlora.trainable_mask(lora))
    assert sum(masked) == len(jax.tree.leaves(trainable))


def test_base_params_are_untouched():
    lora = init(targets=["query"], train=["norm"])
    base = jaxlora.base_params(lora)
    for x, y in zip(jax.tree.leaves(base), jax.tree.leaves(PARAMS), strict=True):
        assert x is y


def test_with_scale():
    lora = randomized(init(targets=["query"]))
    off = jaxlora.merge(jaxlora.with_scale(lora, 0))
    assert_same(off, PARAMS)


def loss(apply, params, x):
    h = apply(params, x)
    return jnp.mean((h - 1) ** 2)


def model(p, x):
    p = p["params"]
    h = jnp.tanh(x @ p["layer_0"]["query"]["kernel"] + p["layer_0"]["query"]["bias"])
    return h @ p["head"]["proj"]["kernel"] + p["head"]["proj"]["bias"]


ODD = jnp.array([-0.0, jnp.nan, jnp.inf, 1e-40, 3.0, -0.0], jnp.float32)


@pytest.mark.parametrize(
    "tx",
    [
        optax.adamw(1e-2, weight_decay=0.1),
        optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(0.1, momentum=0.9)),
        optax.MultiSteps(optax.adam(1e-2), 2),
    ],
    ids=["adamw", "clipped", "multi_steps"],
)
def test_freeze_base_in_a_train_state(tx):
    """Frozen leaves keep their bits, negative zeros and NaNs included, and have no state."""
    params = jax.tree.map(lambda x: x, PARAMS)
    params["params"]["layer_1"]["query"]["bias"] = ODD
    params["params"]["layer_0"]["query"]["kernel"] = jnp.full((4, 6), -0.0).at[0].set(0.3)
    lora = jaxlora.init(
        KEY, params, LoraConfig(targets=["query", "proj"], rank=2, bias="lora_only")
    )
    lora["params"]["layer_1"]["query"]["bias"] = ODD  # frozen after all
    trainable, frozen = jaxlora.partition(lora)
    state = TrainState.create(
        apply_fn=jaxlora.lora_apply(model), params=lora, tx=jaxlora.freeze_base(tx, lora)
    )
    arrays = [x.size for x in jax.tree.leaves(state.opt_state) if x.ndim]
    sizes = sum(x.size for x in jax.tree.leaves(trainable))
    assert sum(arrays) % sizes == 0
    assert max(arrays) <= max(x.size for x in jax.tree.leaves(trainable))

    @jax.jit
    def step(state, x):
        gradients = jax.grad(lambda p: loss(state.apply_fn, p, x))(state.params)
        return state.apply_gradients(grads=gradients)

    before = loss(state.apply_fn, state.params, jnp.ones((5, 4)))
    for _ in range(8):
        state = step(state, jnp.ones((5, 4)))
    assert_same(jaxlora.partition(state.params)[1], frozen)
    assert loss(state.apply_fn, state.params, jnp.ones((5, 4))) < before


def test_both_ways_of_training_agree():
    lora = randomized(init(targets=["query", "proj"]))
    apply, tx, x = jaxlora.lora_apply(model), optax.adamw(1e-2), jnp.ones((5, 4))

    trainable, frozen = jaxlora.partition(lora)
    opt_state = tx.init(trainable)
    whole_tx = jaxlora.freeze_base(tx, lora)
    whole, whole_state = lora, whole_tx.init(lora)
    for _ in range(3):
        gradients = jax.grad(lambda t: loss(apply, jaxlora.combine(t, frozen), x))(trainable)
        updates, opt_state = tx.update(gradients, opt_state, trainable)
        trainable = optax.apply_updates(trainable, updates)
        gradients = jax.grad(lambda p: loss(apply, p, x))(whole)
        updates, whole_state = whole_tx.update(gradients, whole_state, whole)
        whole = optax.apply_updates(whole, updates)
    assert_close(whole, jaxlora.combine(trainable, frozen))


def test_integer_leaves_survive_training():
    params = {"kernel": jnp.ones((4, 6)), "steps": jnp.array([3, 4])}
    lora = jaxlora.init(KEY, params, LoraConfig(targets=["kernel"], rank=2))
    tx = jaxlora.freeze_base(optax.sgd(0.1), lora)
    apply = jaxlora.lora_apply(lambda p, x: jnp.sum(x @ p["kernel"]))
    gradients = jax.grad(apply, allow_int=True)(lora, jnp.ones((5, 4)))
    updates, _ = tx.update(gradients, tx.init(lora), lora)
    new = optax.apply_updates(lora, updates)
    assert_same(new["steps"], params["steps"])


def test_the_table():
    text = jaxlora.summary(init(targets=["query"], train=["norm"], alpha=3))
    lines = text.splitlines()
    columns = ["path", "shape", "trains", "roles", "rank", "scale", "parameters"]
    assert lines[0].split() == columns
    assert "params/layer_0/query/kernel" in text
    assert sum("  LoRA  " in line for line in lines) == 2
    assert sum("  in full  " in line for line in lines) == len(lines) - 4
    assert "1.5" in text
    assert lines[-1].startswith("48 of ")


def test_counts():
    count = jaxlora.count_params(init(targets=["query"]))
    assert count.base == sum(x.size for x in jax.tree.leaves(PARAMS))
    assert count.total == count.base + count.trainable
    assert count.percent == pytest.approx(100 * 40 / count.base)


def test_functions_and_numbers_are_no_parameters():
    """An Equinox module holds its activation, a dict of params perhaps a setting."""
    params = {"kernel": jnp.ones((4, 6)), "bias": jnp.ones(6), "act": jnp.tanh, "p": 0.1}
    lora = jaxlora.init(KEY, params, LoraConfig(targets=["kernel"], rank=2))
    assert jaxlora.count_params(lora) == (20, 30, 50)
    assert jaxlora.summary(lora).endswith("1 leaf is frozen")


def test_paths_leave_boxes_out_by_type():
    import flax.linen as nn
    from flax import nnx

    tree = {
        "value": {"kernel": jnp.ones((2, 2))},
        "boxed": nn.Partitioned(jnp.ones((2, 2)), names=("a", "b")),
        "variable": {"kernel": nnx.Param(jnp.ones((2, 2)))},
        "list": [jnp.ones(2), (jnp.ones(2),)],
    }
    paths = [path for path, _ in flatten_with_paths(tree)[0]]
    assert paths == ["boxed", "list/0", "list/1/0", "value/kernel", "variable/kernel"]


@pytest.mark.parametrize(
    ("einsum", "shape", "roles"),
    [
        ("bij,ij->b", (5, 1), "io"),
        ("bij,ij->b", (1, 5), "oi"),
        ("bij,ij->b", (1, 1), "io"),
        ("bi,io->bo", (1, 5), "io"),
        ("bi,io->bo", (5, 1), "io"),
        ("bo,io->bi", (1, 5), "oi"),
    ],
)
def test_roles_of_unit_dims(einsum, shape, roles):
    """A weight needs both sides: a dim of size one takes the one that is missing."""
    sizes = dict(zip("bij" if "j" in einsum else "bio", (3, *shape), strict=True))
    x = jnp.ones([sizes[d] for d in einsum.split(",")[0]])
    fn = lambda p, x: jnp.einsum(einsum, x, p["w"])
    assert jaxlora.trace_roles(fn, {"w": jnp.ones(shape)}, x)["w"] == roles
