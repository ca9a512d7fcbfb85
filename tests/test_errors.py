"""Bad input: each error says what, where, got, expected, and the call that would be right."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
import pytest

import jaxlora
from jaxlora import LoraConfig, LoraWeight, MaterializeError, RolesError, TargetError

KEY = jax.random.key(0)
PARAMS = {
    "layer_0": {
        "query": {"kernel": jnp.ones((4, 6)), "bias": jnp.ones(6)},
        "norm": {"scale": jnp.ones(4)},
    },
    "head": {"kernel": jnp.ones((6, 3))},
    "heads": {"kernel": jnp.ones((4, 2, 3))},
    "table": jnp.ones((4, 4), jnp.int32),
}


def init(**config):
    roles = config.pop("traced", None)
    return jaxlora.init(KEY, PARAMS, LoraConfig(**config), roles=roles)


def message(error: type[Exception], call) -> str:
    with pytest.raises(error) as info:
        call()
    assert isinstance(info.value, ValueError)
    return str(info.value)


# --- Patterns -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"targets": ["qeury"]}, ["targets: 'qeury' matches nothing", "layer_0/query/kernel"]),
        ({"targets": ["query", "vlaue"]}, ["targets: 'vlaue' matches nothing"]),
        ({"targets": "query"}, ["targets: 'query' matches nothing", "regex of the whole path"]),
        ({"targets": []}, ["targets: '()' matches nothing"]),
        ({"targets": lambda path, leaf: False}, ["targets: '<lambda>' matches nothing"]),
        ({"targets": ["query"], "exclude": ["hed"]}, ["exclude: 'hed' matches nothing", "head"]),
        ({"targets": ["query"], "exclude": "hed"}, ["exclude: 'hed' matches", 'exclude=["query"]']),
        ({"targets": ["query"], "train": ["nrom"]}, ["train: 'nrom' matches nothing", "norm"]),
        ({"targets": ["query"], "rank_pattern": {"head": 2}}, ["rank_pattern: 'head' matches"]),
        ({"targets": ["query"], "alpha_pattern": {"x": 2}}, ["alpha_pattern: 'x' matches nothing"]),
        ({"targets": ["query"], "roles": {"x": "io"}}, ["roles: 'x' matches nothing"]),
        ({"targets": ["head"], "bias": "lora_only"}, ["bias: 'lora_only' matches nothing"]),
        ({"targets": ["query"], "exclude": ["query"]}, ["every match is left out by `exclude`"]),
    ],
)
def test_what_matches_nothing_raises(config, words):
    text = message(TargetError, lambda: init(**config))
    assert all(word in text for word in words), text


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"targets": ["norm/scale"]}, ["layer_0/norm/scale", "(4,)", "LoraConfig(train="]),
        ({"targets": ["query/bias"]}, ["layer_0/query/bias", "(6,)", "two or more dimensions"]),
        ({"targets": ".*query.*"}, ["layer_0/query/bias", "two or more dimensions"]),
        ({"targets": ["norm"]}, ["targets: 'norm' matches only leaves", "train=['norm']"]),
        ({"targets": ["table"], "roles": {"table": "io"}}, ["table", "int32", "floating-point"]),
        ({"targets": ["head"], "train": ["head"]}, ["head/kernel", "`targets` and by `train`"]),
        ({"targets": "*query"}, ["targets: got '*query'", "expected a regex"]),
        ({"targets": [3]}, ["targets: got [3]", "a sequence of names"]),
        ({"targets": None}, ["got targets None", "all-linear"]),
        ({"targets": ["query"], "rank_pattern": {"*": 2}}, ["got key '*' in rank_pattern"]),
        ({"targets": "all-linear"}, ["all-linear", "jaxlora.trace_roles(fn, params, *args)"]),
    ],
)
def test_what_cannot_carry_an_adapter_raises(config, words):
    text = message(TargetError, lambda: init(**config))
    assert all(word in text for word in words), text


@pytest.mark.parametrize("rank", [0, -1, 2.0, True, None])
def test_rank_is_a_positive_integer(rank):
    text = message(TargetError, lambda: LoraConfig(targets=["query"], rank=rank))
    assert f"got rank {rank!r}" in text
    assert "expected an integer of at least 1" in text


@pytest.mark.parametrize("alpha", [0, -1.0, float("nan"), float("inf"), "16"])
def test_alpha_is_a_positive_number(alpha):
    text = message(TargetError, lambda: LoraConfig(targets=["query"], alpha=alpha))
    assert "expected a positive number" in text


def test_unknown_bias_and_dtype():
    assert "'lora_only'" in message(TargetError, lambda: LoraConfig(targets=["q"], bias="some"))
    assert "int32" in message(TargetError, lambda: LoraConfig(targets=["q"], dtype=jnp.int32))


def test_a_tree_that_is_adapted_already():
    lora = init(targets=["query"])
    text = message(TargetError, lambda: jaxlora.init(KEY, lora, LoraConfig(targets=["head"])))
    assert "layer_0/query/kernel" in text
    assert "jaxlora.base_params(lora)" in text


# --- Roles ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("roles", "words"),
    [
        ("ix", ["head/kernel", "got roles 'ix'", "'s', 'i', 'o'"]),
        ("ioo", ["head/kernel", "'ioo' for 2 dimensions (6, 3)"]),
        ("ii", ["head/kernel", "at least one i and one o"]),
        ("so", ["head/kernel", "at least one i and one o"]),
        (3, ["head/kernel", "got roles 3"]),
    ],
)
def test_malformed_roles(roles, words):
    text = message(RolesError, lambda: init(targets=["head"], roles={"head": roles}))
    assert all(word in text for word in words), text


def test_missing_roles():
    text = message(RolesError, lambda: init(targets=["heads"]))
    assert "heads/kernel: got no roles for shape (4, 2, 3)" in text
    assert "jaxlora.trace_roles(fn, params, *args)" in text
    assert "LoraConfig(..., roles={'heads/kernel': '...'})" in text
    assert "'sio' for a scanned Dense kernel" in text


def test_roles_that_contradict_the_traced_use():
    fn = lambda p, x: jnp.einsum("td,dhk->thk", x, p["heads"]["kernel"])
    traced = jaxlora.trace_roles(fn, PARAMS, jnp.ones((5, 4)))
    call = lambda: init(targets=["heads"], roles={"heads": "iio"}, traced=traced)
    text = message(RolesError, call)
    assert "heads/kernel: got roles 'iio'" in text
    assert "matmul 'ioo'" in text
    assert "test_errors.py" in text


def test_roles_that_contradict_the_use():
    """Without a trace, the matmul itself finds out."""
    lora = init(targets=["heads"], roles={"heads": "iio"})
    apply = jaxlora.lora_apply(lambda p, x: jnp.einsum("td,dhk->thk", x, p["heads"]["kernel"]))
    text = message(RolesError, lambda: apply(lora, jnp.ones((5, 4))))
    assert "heads/kernel: got roles 'iio'" in text
    assert "used as 'ioo'" in text


def test_roles_that_contradict_the_use_on_both_sides():
    lora = init(targets=["heads"], roles={"heads": "ioi"})
    apply = jaxlora.lora_apply(lambda p, x: jnp.einsum("tdh,dhk->tk", x, p["heads"]["kernel"]))
    text = message(RolesError, lambda: apply(lora, jnp.ones((5, 4, 2))))
    assert "got roles 'ioi'" in text


def test_uses_that_no_roles_serve():
    def fn(p, x):
        w = p["heads"]["kernel"]
        return jnp.einsum("td,dhk->thk", x, w).sum() + jnp.einsum("dh,dhk->k", x[:, :2].T @ x, w)

    def conflicting(p, x):
        w = p["heads"]["kernel"]
        y = jnp.einsum("td,dhk->thk", x, w)
        return y, jnp.einsum("tdh,dhk->tk", jnp.ones((5, 4, 2)), w)

    traced = jaxlora.trace_roles(conflicting, PARAMS, jnp.ones((5, 4)))
    text = message(RolesError, lambda: init(targets=["heads"], traced=traced))
    assert "heads/kernel: no roles for shape (4, 2, 3) serve all of its uses" in text
    assert "matmul 'ioo'" in text
    assert "matmul 'iio'" in text


def test_a_target_that_is_never_used():
    traced = jaxlora.trace_roles(lambda p, x: x @ p["head"]["kernel"], PARAMS, jnp.ones((5, 6)))
    text = message(TargetError, lambda: init(targets=["query"], traced=traced))
    assert "layer_0/query/kernel" in text
    assert "never uses" in text
    assert "exclude=['layer_0/query/kernel']" in text


def test_roles_traced_for_other_params():
    traced = jaxlora.trace_roles(lambda p, x: x @ p["w"], {"w": jnp.ones((6, 3))}, jnp.ones((5, 6)))
    text = message(TargetError, lambda: init(targets=["query"], traced=traced))
    assert "layer_0/query/kernel" in text
    assert "jaxlora.trace_roles(fn, params, *args)" in text


# --- Trees of other models ------------------------------------------------------------------------


def node(**changes) -> dict:
    parts = {"w": (4, 6), "a": (4, 2), "b": (2, 6), "scale": ()} | changes
    return {name: jnp.ones(shape) for name, shape in parts.items()} | {"roles": "io"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"a": (5, 2)}, ["got a of shape (5, 2), expected (4, 2)", "jaxlora.init"]),
        ({"b": (3, 6)}, ["got b of shape (3, 6), expected (2, 6)"]),
        ({"b": (2, 7)}, ["got b of shape (2, 7), expected (2, 6)"]),
        ({"scale": (2,)}, ["got scale of shape (2,), expected ()"]),
        ({"w": (8, 6)}, ["got a of shape (4, 2), expected (8, 2)", "(8, 6)"]),
    ],
)
def test_parts_that_do_not_fit(changes, words):
    text = message(TargetError, lambda: LoraWeight(**node(**changes)))
    assert all(word in text for word in words), text


def grafted():
    """One model's adapters on another model's base, as a careless tree surgery makes it."""
    mine = jaxlora.init(KEY, {"w": {"kernel": jnp.ones((4, 6))}}, LoraConfig(targets=["w"], rank=2))
    other = jaxlora.init(
        KEY, {"w": {"kernel": jnp.ones((8, 6))}}, LoraConfig(targets=["w"], rank=2)
    )
    return jaxlora.combine(jaxlora.partition(other)[0], jaxlora.partition(mine)[1])


@pytest.mark.parametrize(
    "use",
    [
        lambda lora: jaxlora.lora_apply(lambda p, x: x @ p["w"]["kernel"])(lora, jnp.ones((5, 4))),
        jaxlora.merge,
        lambda lora: jaxlora.with_scale(lora, 1.0),
    ],
)
def test_adapters_of_another_model(use):
    text = message(TargetError, lambda: use(grafted()))
    assert "w/kernel: got a of shape (8, 2), expected (4, 2)" in text


def test_half_a_tree():
    trainable, _ = jaxlora.partition(init(targets=["head"]))
    apply = jaxlora.lora_apply(lambda p, x: x @ p["head"]["kernel"])
    text = message(TargetError, lambda: apply(trainable, jnp.ones((5, 6))))
    assert "head/kernel: got half of a LoraWeight (w, scale missing)" in text
    assert "jaxlora.combine(trainable, frozen)" in text


def test_combine_of_two_trees():
    trainable, _ = jaxlora.partition(init(targets=["head"]))
    _, frozen = jaxlora.partition(init(targets=["query"]))
    text = message(TargetError, lambda: jaxlora.combine(trainable, frozen))
    assert "head/kernel/a (only in the trainable half)" in text
    whole = init(targets=["head"])
    assert "both halves have" in message(TargetError, lambda: jaxlora.combine(whole, whole))


def test_halves_of_other_roles():
    one, other = (init(targets=["heads"], roles={"heads": roles}) for roles in ("ioo", "iio"))
    call = lambda: jaxlora.combine(jaxlora.partition(one)[0], jaxlora.partition(other)[1])
    assert "halves of two different trees" in message(TargetError, call)


def test_roles_given_for_no_leaf():
    text = message(TargetError, lambda: init(targets=["head"], traced={"haed/kernel": "io"}))
    assert "roles: 'haed/kernel' matches nothing" in text
    assert "head/kernel" in text


def test_an_integer_that_is_to_train():
    text = message(TargetError, lambda: init(targets=["head"], train=["table"]))
    assert "table: got a leaf of dtype int32 to train" in text


def test_a_random_key_among_the_leaves():
    lora = init(targets=["head"]) | {"rng": KEY}
    text = message(TargetError, lambda: jaxlora.freeze_base(optax.sgd(1.0), lora))
    assert "rng: got a leaf of dtype key" in text
    assert "jaxlora.partition(lora)" in text


def test_a_function_among_the_leaves():
    lora = init(targets=["head"]) | {"activation": jnp.tanh}
    text = message(TargetError, lambda: jaxlora.freeze_base(optax.sgd(1.0), lora))
    assert "activation: got a leaf of type" in text
    assert "jaxlora.partition(lora)" in text


def test_an_optimizer_for_another_tree():
    tx = jaxlora.freeze_base(optax.sgd(1.0), init(targets=["head"]))
    text = message(TargetError, lambda: tx.init(init(targets=["query"])))
    assert "jaxlora.freeze_base(tx, lora)" in text


# --- Materializing --------------------------------------------------------------------------------

MATERIALIZING = {
    "sin": lambda p, x: x @ jnp.sin(p["w"]),
    "add": lambda p, x: x @ (p["w"] + 1),
    "mul": lambda p, x: x @ (p["w"] * p["w"]),
    "div": lambda p, x: x @ (1 / p["w"]),
    "reduce_sum": lambda p, x: x @ p["w"] + p["w"].sum(),
    "convert_element_type": lambda p, x: x + p["w"].astype(jnp.int32).sum(),
    "reshape": lambda p, x: x @ p["w"].reshape(-1)[:24].reshape(4, 6),
    "dot_general": lambda p, x: x @ (p["w"] @ p["w"].T) @ p["w"],
    "custom_vjp_call": lambda p, x: x @ _straight_through(p["w"]),
    "custom_jvp_call": lambda p, x: x @ jax.nn.relu(p["w"]),
    "cond": lambda p, x: x @ jax.lax.cond(x.sum() > 0, lambda: p["w"], lambda: jnp.ones((4, 6))),
    "custom_linear_solve": lambda p, x: _solved(p["w"], x),
    "sort": lambda p, x: x @ jnp.sort(p["w"], axis=0),
    "cumsum": lambda p, x: x @ jnp.cumsum(p["w"], axis=0),
    "scatter": lambda p, x: x @ p["w"].at[0].set(1.0),
    "select_n": lambda p, x: x @ jnp.where(x[0, 0] > 0, p["w"], 1.0),
    "reduce_max": lambda p, x: x / jnp.max(p["w"]),
    "conv_general_dilated": lambda p, x: jax.lax.conv(
        p["w"][None, None], jnp.ones((1, 1, 2, 2)), (1, 1), "SAME"
    ),
    "ragged_dot_general": lambda p, x: jax.lax.ragged_dot(
        p["w"], jnp.ones((1, 6, 3)), jnp.array([4])
    ),
    "scan": lambda p, x: jax.lax.scan(lambda w, _: (w + 1, None), p["w"], length=2)[0].sum() * x,
}


def _solved(w, x):
    """x / 2, by a solver whose matvec also reads the weight."""
    matvec = lambda v: 2 * v + 0 * jnp.sum(w @ jnp.ones(6))
    return jax.lax.custom_linear_solve(matvec, x, lambda _, b: b / 2)


@jax.custom_vjp
def _straight_through(w):
    return jnp.round(w)


_straight_through.defvjp(lambda w: (jnp.round(w), None), lambda _, g: (g,))


SHAPES = {"dot_general": "(6, 4)", "conv_general_dilated": "(1, 1, 4, 6)"}  # as they reach it


@pytest.mark.parametrize("primitive", MATERIALIZING)
def test_what_would_form_the_weight_raises(primitive):
    params = {"w": jax.random.normal(KEY, (4, 6))}
    lora = jaxlora.init(KEY, params, LoraConfig(targets=["w"], roles={"w": "io"}))
    apply = jaxlora.lora_apply(MATERIALIZING[primitive])
    text = message(MaterializeError, lambda: apply(lora, jnp.ones((5, 4))))
    for word in (
        "w: ",
        "`" if primitive != "scan" else "add",
        primitive if primitive != "scan" else "`add`",
        "test_errors.py",
        SHAPES.get(primitive, "(4, 6)"),
        'materialize="allow"',
        "exclude=['w']",
    ):
        assert word in text, (word, text)


@pytest.mark.parametrize("primitive", MATERIALIZING)
def test_and_on_request_it_is_formed_right(primitive):
    fn = MATERIALIZING[primitive]
    params = {"w": 1 + jax.random.uniform(KEY, (4, 6))}
    config = LoraConfig(
        targets=["w"], roles={"w": "io"}, initializer=jaxlora.initializers.normal(0.1)
    )
    lora = jaxlora.init(KEY, params, config)
    trainable, frozen = jaxlora.partition(lora)
    trainable["w"] = jax.tree.map(lambda x: x + 0.1, trainable["w"])
    lora = jaxlora.combine(trainable, frozen)
    x = jax.random.normal(KEY, (5, 4))
    got = jaxlora.lora_apply(fn, materialize="allow")(lora, x)
    assert jnp.allclose(got, fn(jaxlora.merge(lora), x), rtol=1e-4, atol=1e-4)


def test_unknown_materialize():
    with pytest.raises(ValueError, match="expected 'error' or 'allow'"):
        jaxlora.lora_apply(lambda p: p, materialize="yes")  # type: ignore[arg-type]


def test_unhashable_argument():
    class Thing:
        __hash__ = None  # type: ignore[assignment]

    with pytest.raises(TypeError, match=r"type Thing, .* functools.partial"):
        jaxlora.lora_apply(lambda p, thing: p)({"w": jnp.ones(3)}, Thing())


def test_one_head_of_a_kernel_is_no_row():
    """Only rows or columns of the whole weight may be summed up unasked."""
    lora = init(targets=["heads"], roles={"heads": "ioo"})
    fn = lambda p, x: x @ jnp.sin(p["heads"]["kernel"][:, 0])
    text = message(MaterializeError, lambda: jaxlora.lora_apply(fn)(lora, jnp.ones((5, 4))))
    assert "heads/kernel: the primitive `sin`" in text
    column = lambda p: jnp.sin(p["heads"]["kernel"][:, 0, 1])
    assert jaxlora.lora_apply(column)(lora).shape == (4,)


def test_the_path_is_the_weights_own_though_inner_jits_share_a_trace():
    turned = jax.jit(lambda w: w.T)
    fn = lambda p, x: (x @ turned(p["u"]), jnp.sin(turned(p["v"])))
    params = {"u": jnp.ones((4, 6)), "v": jnp.ones((4, 6))}
    lora = jaxlora.init(
        KEY, params, LoraConfig(targets=["u", "v"], roles={"u": "io", "v": "io"}, rank=2)
    )
    text = message(MaterializeError, lambda: jaxlora.lora_apply(fn)(lora, jnp.ones((5, 6))))
    assert text.startswith("v: the primitive `sin`")
    assert "exclude=['v']" in text


@pytest.mark.parametrize(
    "initializer", ["pissa", None, jaxlora.initializers.pissa, jaxlora.initializers.eva]
)
def test_initializers_that_are_no_functions(initializer):
    with pytest.raises(TargetError, match=r"got initializer .*jaxlora\.initializers\.pissa\(\)"):
        LoraConfig(targets=["w"], initializer=initializer)


def test_statistics_of_another_kind():
    config = LoraConfig(
        targets=["w"], roles={"w": "io"}, initializer=jaxlora.initializers.eva([jnp.ones(3)])
    )
    with pytest.raises(TargetError, match=r"statistics of type list, expected \{path: Moments\}"):
        jaxlora.init(jax.random.key(0), {"w": jnp.ones((3, 3))}, config)


def test_a_name_above_modules():
    params = {"layers": {"0": {"kernel": jnp.ones((3, 3))}}}
    with pytest.raises(TargetError, match=r"'layers' is above modules") as error:
        jaxlora.init(jax.random.key(0), params, LoraConfig(targets=["layers"]))
    regex = str(error.value).split("targets=r'")[1].split("'")[0]
    lora = jaxlora.init(jax.random.key(0), params, LoraConfig(targets=regex))
    assert lora["layers"]["0"]["kernel"].rank == 8


def test_trees_without_adapters():
    params = {"w": jnp.ones((3, 3))}
    with pytest.raises(TargetError, match="with_dropout: got a tree without adapters"):
        jaxlora.with_dropout(params, jax.random.key(0))
    with pytest.raises(TargetError, match="freeze_base: got a tree in which nothing trains"):
        jaxlora.freeze_base(optax.sgd(1.0), params)
