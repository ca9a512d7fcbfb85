"""Sums of adapters, extraction, truncation: against NumPy in float64, and against PEFT."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, assert_same, formed

import jaxlora
from jaxlora import FullWeight, LoraConfig, LoraWeight, TargetError, _merging
from jaxlora._weight import is_node

pytestmark = pytest.mark.xdist_group("adapters")  # one worker: they share what they compile
KEY = jax.random.key(0)

# One weight of each kind: its shape and roles. All are (6, 4) as matrices, compiled once for all.
KINDS = {
    "dense": ((6, 4), "io"),
    "query": ((6, 2, 2), "ioo"),
    "out": ((2, 3, 4), "iio"),
    "conv": ((3, 1, 2, 4), "iiio"),
    "embedding": ((6, 4), "io"),
    "scanned": ((3, 6, 4), "sio"),
}
RNG = np.random.default_rng(0)
BASE = {
    name: jnp.asarray(RNG.standard_normal(shape), jnp.float32) for name, (shape, _) in KINDS.items()
}
BASE["bias"] = jnp.asarray(RNG.standard_normal(5), jnp.float32)
BASE["steps"] = jnp.arange(3)
FEW = ("dense", "scanned")
ROLES = {name: roles for name, (_, roles) in KINDS.items()}


def make(
    seed: int,
    rank: int = 3,
    names: tuple[str, ...] = tuple(BASE),
    missing: tuple[str, ...] = (),
    alpha: float | None = None,
    dora: bool = False,
    dtype: str = "float32",
) -> dict:
    """A random adapter on each kind of weight, and a bias trained in full; all from NumPy."""
    lora = {name: BASE[name] for name in names}
    for k, name in enumerate(BASE):
        rng = np.random.default_rng((seed, k))
        random = lambda shape: jnp.asarray(0.3 * rng.standard_normal(shape), dtype)
        if name not in names or name in missing:
            continue
        if name == "bias":
            lora[name] = FullWeight(w=BASE[name], value=random(BASE[name].shape))
        elif name in KINDS:
            lora[name] = adapter(name, rank, random, alpha)
            if dora:
                lora[name] = with_dora(lora[name])
    if isinstance(lora.get("scanned"), LoraWeight) and not dora:
        # A scale for each layer, as from PEFT files of unequal alphas.
        lora["scanned"] = dataclasses.replace(
            lora["scanned"], scale=np.float32([0.5, 2.0, 1.0]) * seed
        )
    return lora


def adapter(name: str, rank: int, random, alpha: float | None) -> LoraWeight:
    shape, roles = KINDS[name]
    stacked, inputs, outputs = (
        [n for n, r in zip(shape, roles, strict=True) if r == role] for role in "sio"
    )
    return LoraWeight(
        w=BASE[name],
        a=random((*stacked, *inputs, rank)),
        b=random((*stacked, rank, *outputs)),
        scale=np.full(stacked, (alpha or rank) / rank, np.float32),
        roles=roles,
        dropout=0.1,
    )


def with_dora(lw: LoraWeight) -> LoraWeight:
    """With magnitudes 1, 2, 3, ..., one for each output."""
    inputs = tuple(d for d, r in enumerate(lw.roles) if r == "i")
    squared = np.square(np.asarray(lw.w)).sum(inputs)
    magnitude = np.arange(1, squared.size + 1, dtype=np.float32).reshape(squared.shape)
    return dataclasses.replace(lw, magnitude=magnitude, squared_norm=squared)


def message(call) -> str:
    with pytest.raises(TargetError) as info:
        call()
    return str(info.value)


# --- NumPy, in float64: a weight as a list of matrices --------------------------------------------


def matrices(w, roles: str) -> list[np.ndarray]:
    """(I, O) for each index of the stacked dims."""
    w = np.asarray(w, np.float64)
    order = [d for role in "sio" for d, r in enumerate(roles) if r == role]
    sizes = [math.prod(n for n, r in zip(w.shape, roles, strict=True) if r == k) for k in "sio"]
    return list(w.transpose(order).reshape(sizes))


def factors(lw: LoraWeight) -> list[tuple[np.ndarray, np.ndarray, float]]:
    """a (I, R), b (R, O) and the scale for each index of the stacked dims."""
    scales = np.asarray(lw.scale, np.float64).reshape(-1)
    rank = lw.a.shape[-1]
    a = np.asarray(lw.a, np.float64).reshape(len(scales), -1, rank)
    b = np.asarray(lw.b, np.float64).reshape(len(scales), rank, -1)
    return list(zip(a, b, scales, strict=True))


def added(lw: LoraWeight) -> list[np.ndarray]:
    return [scale * a @ b for a, b, scale in factors(lw)]


def value_of(lw: LoraWeight) -> list[np.ndarray]:
    """The value, DoRA's magnitude included."""
    parts = list(zip(matrices(lw.w, lw.roles), added(lw), strict=True))
    if lw.magnitude is None:
        return [w + ab for w, ab in parts]
    magnitudes = np.asarray(lw.magnitude, np.float64).reshape(len(parts), -1)
    return [
        (w + ab) * m / np.linalg.norm(w + ab, axis=0)
        for (w, ab), m in zip(parts, magnitudes, strict=True)
    ]


def best(matrix: np.ndarray, rank: int) -> np.ndarray:
    u, s, v = np.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


def trimmed(x: np.ndarray, density: float) -> np.ndarray:
    count = int(density * x.size)
    smallest = np.sort(np.abs(x), axis=None)[::-1][:count].min(initial=np.inf)
    return np.where(np.abs(x) >= smallest, x, 0)


def elected(xs: list[np.ndarray], weights: list[float], majority_sign: str) -> np.ndarray:
    out = np.zeros(xs[0].shape)
    for index in np.ndindex(out.shape):
        values = [x[index] for x in xs]
        votes = sum(values) if majority_sign == "total" else sum(map(np.sign, values))
        sign = 1 if votes >= 0 else -1
        kept = [c * v for c, v in zip(weights, values, strict=True) if np.sign(v) == sign]
        out[index] = sum(kept) / max(len(kept), 1)
    return out


def mixed(method: str, xs, weights, density: float, majority_sign: str, masks=None) -> np.ndarray:
    """The arithmetic of a method on the adapters' tensors."""
    if "dare" in method:
        xs = [x * mask / density for x, mask in zip(xs, masks, strict=True)]
    elif "ties" in method or "prune" in method:
        xs = [trimmed(x, density) for x in xs]
    if "ties" in method:
        return elected(xs, weights, majority_sign)
    return sum(c * x for c, x in zip(weights, xs, strict=True))


def expected_sum(nodes, weights, method, density, majority_sign, masks=None) -> list[np.ndarray]:
    """What the result adds to W, for each index of the stacked dims, before an SVD."""
    totals = []
    for k, parts in enumerate(zip(*map(factors, nodes), strict=True)):
        strengths = [c * scale for c, (_, _, scale) in zip(weights, parts, strict=True)]
        if method in ("cat", "svd"):
            totals.append(sum(s * a @ b for s, (a, b, _) in zip(strengths, parts, strict=True)))
            continue
        options = (density, majority_sign)
        chosen = lambda i: None if masks is None else masks[i][:, k]
        if method.endswith("_svd"):
            xs = [scale * a @ b for a, b, scale in parts]
            shaped = None if masks is None else chosen(0).reshape(-1, *xs[0].shape)
            totals.append(mixed(method, xs, weights, *options, shaped))
            continue
        roots = [math.sqrt(abs(s)) for s in strengths]
        signed = [math.copysign(r, s) for r, s in zip(roots, strengths, strict=True)]
        sides = []
        for i, cs in enumerate((signed, roots)):
            xs = [part[i] for part in parts]
            shaped = None if masks is None else chosen(i).reshape(-1, *xs[0].shape)
            sides.append(mixed(method, xs, cs, *options, shaped))
        totals.append(sides[0] @ sides[1])
    return totals


METHODS = [
    ("cat", {}),
    ("linear", {}),
    ("svd", {"rank": 4}),
    ("ties", {"density": 0.6}),
    ("ties", {"density": 0.45, "majority_sign": "frequency"}),
    ("ties_svd", {"density": 0.6, "rank": 2}),
    ("ties_svd", {"density": 1.0, "rank": 2, "majority_sign": "frequency"}),
    ("dare_linear", {"density": 0.6}),
    ("dare_linear_svd", {"density": 0.6, "rank": 2}),
    ("dare_ties", {"density": 0.6}),
    ("dare_ties_svd", {"density": 0.6, "rank": 2, "majority_sign": "frequency"}),
    ("magnitude_prune", {"density": 0.6}),
    ("magnitude_prune_svd", {"density": 0.6, "rank": 2}),
]


@pytest.mark.parametrize(("method", "options"), METHODS)
def test_weighted_sum_against_numpy(method, options, monkeypatch):
    """Negative weights, a scale for each layer, adapters that not every weight has."""
    loras = [
        make(1, alpha=4.5),
        make(2, missing=("query", "bias")),
        make(3, alpha=2, missing=("embedding",)),
    ]
    weights = [0.7, -0.4, 1.2]
    rng = np.random.default_rng(4)
    drawn: list[np.ndarray] = []

    def kept(key, density, shape):
        drawn.append(rng.random(shape) < density)
        return drawn[-1]

    monkeypatch.setattr(_merging, "_kept", kept)
    dare = "dare" in method
    given = options | ({"key": KEY} if dare else {})
    result = jaxlora.weighted_sum(loras, weights, method, **given)

    density, majority = options.get("density"), options.get("majority_sign", "total")
    assert_same(result["steps"], BASE["steps"])
    for name in ["bias", *sorted(KINDS)]:  # the order of paths
        here = [(lora[name], c) for lora, c in zip(loras, weights, strict=True)]
        nodes, cs = zip(*[(node, c) for node, c in here if is_node(node)], strict=True)
        assert_same(result[name].w, BASE[name])
        if name == "bias":
            moved = [np.asarray(n.value, np.float64) - np.asarray(n.w) for n in nodes]
            masks = drawn.pop(0) if dare else None
            plain = method in ("cat", "svd")
            by = mixed("linear" if plain else method, moved, cs, density, majority, masks)
            assert_close(np.asarray(result[name].value), np.float32(np.asarray(BASE[name]) + by))
            continue
        count = 0 if not dare else 1 if method.endswith("_svd") else 2
        masks = [drawn.pop(0) for _ in range(count)]
        if masks and "s" not in ROLES[name]:
            masks = [mask[:, None] for mask in masks]
        totals = expected_sum(nodes, cs, method, density, majority, masks or None)
        if "rank" in options:
            totals = [best(total, options["rank"]) for total in totals]
        rank = 3 * len(nodes) if method == "cat" else options.get("rank", 3)
        assert result[name].rank == rank
        assert_same(result[name].scale, np.ones(nodes[0].scale.shape, np.float32))
        for got, total in zip(added(result[name]), totals, strict=True):
            assert_close(np.float32(got), np.float32(total))
    assert not drawn


def test_the_exact_sum_is_the_default():
    """Of unequal ranks too; `svd` gives its best approximation."""
    loras, weights = [make(1, 2, FEW), make(2, 3, FEW)], [0.5, -1.5]
    exact = jaxlora.weighted_sum(loras, weights)
    closest = jaxlora.weighted_sum(loras, weights, "svd")
    for name in FEW:
        assert exact[name].w is BASE[name]
        assert (exact[name].rank, closest[name].rank) == (5, 3)
        totals = expected_sum([x[name] for x in loras], weights, "cat", None, "total")
        for got, total in zip(added(exact[name]), totals, strict=True):
            assert_close(np.float32(got), np.float32(total))
        for got, total in zip(added(closest[name]), totals, strict=True):
            assert_close(np.float32(got), np.float32(best(total, 3)))


BIG = LoraWeight(
    w=np.ones((40, 50), np.float32),
    a=np.ones((40, 4), np.float32),
    b=np.ones((4, 50), np.float32),
    scale=np.float32(1),
    roles="io",
)


@pytest.mark.parametrize(
    "fn",
    [
        lambda lw: jaxlora.weighted_sum([{"w": lw}, {"w": lw}], [1, -2], "svd", rank=3),
        lambda lw: jaxlora.truncate({"w": lw}, 2),
    ],
    ids=["svd", "truncate"],
)
def test_nothing_of_the_weights_size_is_formed(fn):
    jaxpr = jax.make_jaxpr(lambda lw: (fn(lw)["w"].a, fn(lw)["w"].b))(BIG)
    assert not formed(jaxpr, [True] * len(jaxpr.in_avals), {BIG.w.size})


@pytest.mark.parametrize(("method", "options"), METHODS)
def test_every_method_can_be_traced(method, options):
    loras = [make(1, names=(*FEW, "bias")), make(2, names=(*FEW, "bias"))]
    fn = lambda loras, weights, key: jaxlora.weighted_sum(
        loras, weights, method, key=key, **options
    )
    traced = jax.eval_shape(fn, loras, jnp.ones(2), KEY)
    expected = options.get("rank", 6 if method == "cat" else 3)
    assert {traced[name].rank for name in FEW} == {expected}


def test_jit_and_vmap_over_weights():
    """One compilation for all weights: strengths can be swept."""
    loras = [make(1, names=("dense", "bias")), make(2, names=("dense", "bias"))]
    swept = jnp.array([[0.5, 0.5], [1.0, -2.0]])
    options = {"method": "dare_ties", "density": 0.5, "key": KEY}
    fn = lambda weights, loras: jaxlora.weighted_sum(loras, weights, **options)
    got = jax.jit(jax.vmap(fn, in_axes=(0, None)))(swept, loras)
    for k in range(2):
        alone = fn([float(x) for x in swept[k]], loras)
        for part in ("a", "b"):
            assert_close(getattr(got["dense"], part)[k], getattr(alone["dense"], part))
        assert_close(got["bias"].value[k], alone["bias"].value)


def test_keys_are_the_paths_own():
    """Another weight changes no mask; another key all."""
    options = {"method": "dare_linear", "density": 0.5}
    alone, both = (
        jaxlora.weighted_sum([make(1, names=n), make(2, names=n)], [1, 1], key=KEY, **options)
        for n in (("dense",), ("dense", "bias"))
    )
    for part in ("a", "b"):
        assert_same(getattr(both["dense"], part), getattr(alone["dense"], part))
    dense = [make(seed, names=("dense",)) for seed in (1, 2)]
    other = jaxlora.weighted_sum(dense, [1, 1], key=jax.random.key(1), **options)
    assert not np.array_equal(other["dense"].a, both["dense"].a)


def test_dare_keeps_the_mean():
    w = jnp.zeros((100, 100))
    lw = LoraWeight(w=w, a=jnp.ones((100, 50)), b=jnp.ones((50, 100)), scale=1.0, roles="io")
    total = jaxlora.weighted_sum([{"w": lw}], [1], "dare_linear", density=0.25, key=KEY)["w"]
    for x in (total.a, total.b):
        assert {*np.unique(x)} == {0, 4}
        assert float(x.mean()) == pytest.approx(1, abs=0.1)  # 4 standard deviations
    assert not np.array_equal(np.ravel(total.a), np.ravel(total.b))  # each has its own mask


def test_dora_is_summed_by_its_differences():
    lora, plain = make(1, names=FEW, dora=True), make(2, names=FEW)
    total = jaxlora.weighted_sum([lora, plain], [0.5, -1.0], "svd", rank=4)
    for name in FEW:
        assert total[name].magnitude is None
        ours = zip(value_of(lora[name]), matrices(BASE[name], ROLES[name]), strict=True)
        parts = zip(added(total[name]), ours, added(plain[name]), strict=True)
        for got, (value, w), other in parts:
            assert_close(np.float32(got), np.float32(0.5 * (value - w) - other))


def test_a_narrow_dtype_is_kept():
    loras = [make(seed, names=("dense",), dtype="bfloat16") for seed in (1, 2)]
    for method in ("linear", "svd"):
        total = jaxlora.weighted_sum(loras, [0.5, 0.5], method)["dense"]
        assert total.a.dtype == total.b.dtype == jnp.bfloat16
        assert total.scale.dtype == jnp.float32
        assert total.dropout == 0.1


def test_float64_is_not_narrowed():
    with jax.enable_x64(True):
        wide = lambda *shape: jnp.asarray(RNG.standard_normal(shape))
        scale = np.float32(0.7)
        loras = [
            {"w": LoraWeight(w=BASE["dense"], a=wide(6, 2), b=wide(2, 4), scale=scale, roles="io")}
            for _ in range(2)
        ]
        total = jaxlora.weighted_sum(loras, [0.3, -0.2], "svd", rank=4)["w"]
        expected = expected_sum([x["w"] for x in loras], [0.3, -0.2], "cat", None, "total")
        assert total.a.dtype == jnp.float64
        assert_close(added(total)[0], expected[0])


# --- PEFT -----------------------------------------------------------------------------------------


def peft_reference() -> dict[str, np.ndarray]:
    path = pathlib.Path(__file__).parent / "references" / "adapters.npz"
    with np.load(path) as file:
        values, shapes = file["values"], json.loads(str(file["shapes"]))
    ends = np.cumsum([math.prod(shape) for shape in shapes.values()])
    parts = np.split(values, ends[:-1])
    return {k: x.reshape(s) for (k, s), x in zip(shapes.items(), parts, strict=True)}


PEFT = peft_reference()
LAYERS = {"linear": ((4, 6), "oi"), "conv": ((4, 2, 3, 1), "oiii"), "embedding": ((6, 4), "io")}
THREE = (("one", "two", "three"), (0.7, -0.4, 1.2))
UNEQUAL = (("one", "small"), (1.5, -0.8))
STABLE = (("stable_one", "stable_two"), (0.6, 0.9))
FREQUENCY = {"density": 0.6, "majority_sign": "frequency"}
PEFT_CASES = [
    ("cat", THREE, "cat", {}),
    ("linear", THREE, "linear", {}),
    ("svd", THREE, "svd", {"rank": 2}),
    ("ties", THREE, "ties", {"density": 0.6}),
    ("ties_frequency", THREE, "ties", FREQUENCY),
    ("ties_svd", THREE, "ties_svd", {"density": 0.6, "rank": 2}),
    ("ties_svd_frequency", THREE, "ties_svd", FREQUENCY | {"rank": 2}),
    ("dare_linear", THREE, "dare_linear", {"density": 0.6}),
    ("dare_linear_svd", THREE, "dare_linear_svd", {"density": 0.6, "rank": 2}),
    ("dare_ties", THREE, "dare_ties", {"density": 0.6}),
    ("dare_ties_svd", THREE, "dare_ties_svd", {"density": 0.6, "rank": 2}),
    ("magnitude_prune", THREE, "magnitude_prune", {"density": 0.6}),
    ("magnitude_prune_svd", THREE, "magnitude_prune_svd", {"density": 0.6, "rank": 2}),
    ("unequal_cat", UNEQUAL, "cat", {}),
    ("unequal_svd", UNEQUAL, "svd", {}),
    ("stable_cat", STABLE, "cat", {}),
    ("stable_linear", STABLE, "linear", {}),
]


def from_peft(name: str) -> dict:
    """PEFT's adapter, on weights in PyTorch's layout; zeros where it has none."""
    tree = {}
    for layer, (shape, roles) in LAYERS.items():
        tree[layer] = w = jnp.zeros(shape)
        if f"{layer}/adapter/{name}/a" in PEFT:
            a, b, scale = (PEFT[f"{layer}/adapter/{name}/{x}"] for x in ("a", "b", "scale"))
            inputs = [n for n, r in zip(shape, roles, strict=True) if r == "i"]
            a = jnp.asarray(a).reshape(*inputs, a.shape[-1])
            tree[layer] = LoraWeight(
                w=w, a=a, b=jnp.asarray(b), scale=jnp.asarray(scale), roles=roles
            )
    return tree


@pytest.mark.parametrize(
    ("case", "which", "method", "options"), PEFT_CASES, ids=[case for case, *_ in PEFT_CASES]
)
def test_weighted_sum_against_peft(case, which, method, options, monkeypatch):
    """With the masks that PEFT drew; its rank-stabilized sums are sqrt(r) times too large."""
    names, weights = which
    masks = []
    for layer in sorted(LAYERS):
        own = [PEFT[k] for k in PEFT if k.startswith(f"{layer}/sum/{case}/mask/")]
        size = len(own) if method.endswith("_svd") else len(own) // 2
        sides = [own[:size], own[size:]] if size < len(own) else [own]
        masks += [np.stack([m.reshape(-1) for m in side]) for side in sides if side]

    def kept(key, density, shape):
        assert masks[0].shape == shape
        return jnp.asarray(masks.pop(0), bool)

    monkeypatch.setattr(_merging, "_kept", kept)
    given = options | ({"key": KEY} if "dare" in method else {})
    total = jaxlora.weighted_sum([from_peft(name) for name in names], weights, method, **given)
    assert not masks
    for layer in LAYERS:
        lw, prefix = total[layer], f"{layer}/sum/{case}"
        (a, b, scale), *_ = factors(lw)
        assert scale == 1
        if f"{prefix}/a" in PEFT:
            assert_close(np.float32(a), PEFT[f"{prefix}/a"])
            assert_close(np.float32(b), PEFT[f"{prefix}/b"])
        too_large = math.sqrt(lw.rank) if case.startswith("stable") else 1
        assert float(PEFT[f"{prefix}/scale"]) == pytest.approx(too_large)
        assert_close(np.float32(a @ b * too_large), PEFT[f"{prefix}/product"])


# --- extract --------------------------------------------------------------------------------------

TUNED = {
    name: leaf + np.float32(0.3 * RNG.standard_normal(leaf.shape)) if name != "steps" else leaf
    for name, leaf in BASE.items()
}


def few(tree: dict, *more: str) -> dict:
    return {name: tree[name] for name in (*FEW, *more)}


def config_of(names=FEW, **config) -> LoraConfig:
    roles = {name: ROLES[name] for name in names}
    return LoraConfig(**({"targets": list(names), "roles": roles, "rank": 2, "alpha": 5} | config))


def differences(name: str) -> list[np.ndarray]:
    pairs = zip(matrices(TUNED[name], ROLES[name]), matrices(BASE[name], ROLES[name]), strict=True)
    return [tuned - base for tuned, base in pairs]


def rank_holding(parts: list[np.ndarray], energy: float) -> int:
    needed = 1
    for matrix in parts:
        squares = np.linalg.svd(matrix, compute_uv=False) ** 2
        needed = max(needed, 1 + int(np.argmax(np.cumsum(squares) >= energy * squares.sum())))
    return needed


def test_extract_against_numpy():
    lora = jaxlora.extract(BASE, TUNED, config_of(KINDS))
    for name in KINDS:
        assert lora[name].w is BASE[name]
        assert lora[name].rank == 2
        assert_same(lora[name].scale, np.full(lora[name].scale.shape, 2.5, np.float32))
        for got, whole in zip(added(lora[name]), differences(name), strict=True):
            assert_close(np.float32(got), np.float32(best(whole, 2)))
        for a, b, _ in factors(lora[name]):  # split evenly
            norms = np.linalg.norm(a, axis=0), np.linalg.norm(b, axis=1)
            np.testing.assert_allclose(*norms, rtol=1e-4)
    assert isinstance(lora["bias"], FullWeight)
    assert_same(lora["bias"].value, TUNED["bias"])
    assert lora["bias"].w is BASE["bias"]
    assert lora["steps"] is BASE["steps"]


@pytest.mark.parametrize("dora", [False, True])
def test_extract_at_full_rank_is_the_tuned_model(dora):
    lora = jaxlora.extract(few(BASE), few(TUNED), config_of(rank=6, dora=dora))
    for name in FEW:
        assert (lora[name].magnitude is not None) == dora
        for got, tuned in zip(
            value_of(lora[name]), matrices(TUNED[name], ROLES[name]), strict=True
        ):
            assert_close(np.float32(got), np.float32(tuned))


def test_extract_gives_a_merged_adapter_back():
    """At its rank, whatever its scale; here rank-stabilized, with factors of half the width."""
    lora = make(1, names=FEW)
    merged = {k: jnp.float32(jaxlora.merge(lora)[k]) for k in FEW}
    config = config_of(rank=3, rank_stabilized=True, alpha_pattern={"dense": 4})
    back = jaxlora.extract(few(BASE), merged, config)
    assert float(back["dense"].scale) == pytest.approx(4 / math.sqrt(3))
    for name in FEW:
        for got, whole in zip(added(back[name]), added(lora[name]), strict=True):
            assert_close(np.float32(got), np.float32(whole), factor=5)
    narrow = jaxlora.extract(few(BASE), merged, dataclasses.replace(config, dtype=jnp.bfloat16))
    assert narrow["dense"].a.dtype == narrow["dense"].b.dtype == jnp.bfloat16


def test_extract_with_dora_has_exact_norms():
    lora = jaxlora.extract(few(BASE), few(TUNED), config_of(rank=1, dora=True))
    for name in FEW:
        for got, tuned in zip(
            value_of(lora[name]), matrices(TUNED[name], ROLES[name]), strict=True
        ):
            assert_close(*(np.float32(np.linalg.norm(x, axis=0)) for x in (got, tuned)))


def test_extract_by_energy():
    lora = jaxlora.extract(few(BASE), few(TUNED), config_of(rank=1), energy=0.8)
    for name in FEW:
        needed = rank_holding(differences(name), 0.8)
        assert lora[name].rank == needed > 1
        expected = np.full(lora[name].scale.shape, 5 / needed, np.float32)  # alpha over this rank
        assert_same(lora[name].scale, expected)
    same = jaxlora.extract(few(BASE, "bias"), few(BASE, "bias"), config_of(), energy=1.0)
    assert {same[name].rank for name in FEW} == {1}
    assert same["bias"] is BASE["bias"]


def test_extract_keeps_what_the_config_trains():
    base = {"kernel": jnp.ones((3, 4)), "bias": jnp.ones(4), "scale": jnp.ones(4)}
    tuned = base | {"kernel": 2 * base["kernel"]}
    lora = jaxlora.extract(base, tuned, LoraConfig(targets=["kernel"], rank=1, train=["bias"]))
    assert isinstance(lora["bias"], FullWeight)
    assert lora["bias"].value is not lora["bias"].w
    assert lora["scale"] is base["scale"]


# --- truncate and scaled --------------------------------------------------------------------------


def test_truncate_against_numpy():
    lora = make(1, rank=4, alpha=3)
    less = jaxlora.truncate(lora, 2)
    for name in KINDS:
        assert less[name].rank == 2
        assert_same(less[name].scale, lora[name].scale)
        assert less[name].dropout == 0.1
        for got, whole in zip(added(less[name]), added(lora[name]), strict=True):
            assert_close(np.float32(got), np.float32(best(whole, 2)))
    assert_same(less["bias"], lora["bias"])
    for rank in (4, 9):
        assert jaxlora.truncate(lora, rank)["dense"] is lora["dense"]


def test_truncate_by_energy():
    lora = make(1, 4, (*FEW, "bias"))
    less = jaxlora.truncate(lora, energy=0.7)
    for name in FEW:
        assert less[name].rank == rank_holding(added(lora[name]), 0.7)
    assert 1 < less["dense"].rank < 4
    assert less["bias"] is lora["bias"]
    both = jaxlora.truncate(lora, 1, 0.7)
    assert {both[name].rank for name in FEW} == {1}
    doubled = jaxlora.weighted_sum([lora, lora], [1, 1], "cat")  # of rank 8, of which 4 count
    exact = jaxlora.truncate(doubled, energy=1.0)
    assert {exact[name].rank for name in FEW} == {4}


def test_truncate_keeps_the_magnitude():
    """And so the norms of the columns."""
    lora = make(1, 3, ("dense",), dora=True)
    less = jaxlora.truncate(lora, 2)["dense"]
    assert less.magnitude is lora["dense"].magnitude
    assert less.squared_norm is lora["dense"].squared_norm
    merged = np.asarray(jaxlora.merge({"w": less})["w"])
    assert_close(np.linalg.norm(merged, axis=0), np.asarray(less.magnitude))


def test_scaled():
    lora = make(1, names=(*FEW, "bias"), alpha=6)
    value, w = (np.asarray(x, np.float64) for x in (lora["bias"].value, lora["bias"].w))
    for factor in (0, 1, -1, 2.5):
        result = jaxlora.scaled(lora, factor)
        for name in FEW:
            for got, whole in zip(added(result[name]), added(lora[name]), strict=True):
                assert_close(np.float32(got), np.float32(factor * whole))
        assert_close(np.asarray(result["bias"].value), np.float32(w + factor * (value - w)))
    swept = jax.vmap(lambda f: jaxlora.merge(jaxlora.scaled(lora, f)))(jnp.array([0.0, 1.0]))
    assert_close(jax.tree.map(lambda x: x[0], swept), few(BASE, "bias"))
    dora = make(1, names=FEW, dora=True)
    assert jaxlora.scaled(dora, 1.0)["dense"] is dora["dense"]


# --- Errors ---------------------------------------------------------------------------------------

SMALL = {
    "layer": {"kernel": jnp.ones((4, 6)), "bias": jnp.ones(6)},
    "head": {"kernel": jnp.ones((6, 3))},
}


def small(base=SMALL, **config):
    return jaxlora.init(KEY, base, LoraConfig(**({"targets": ["layer"], "rank": 2} | config)))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "tise"}, ["got method 'tise'", "magnitude_prune_svd", "method='cat'"]),
        ({"weights": [1.0]}, ["got 2 adapters and weights of shape (1,)", "[0.5, 0.5]"]),
        ({"method": "cat", "rank": 4}, ["method='cat'", "got rank=4", "method='svd'"]),
        ({"method": "svd", "rank": 0}, ["method='svd'", "got rank 0", "integer of at least 1"]),
        ({"method": "linear", "density": 0.5}, ["got density=0.5, expected none"]),
        ({"method": "ties"}, ["got density=None", "in (0, 1]"]),
        ({"method": "ties", "density": 0}, ["got density=0", "in (0, 1]"]),
        ({"method": "magnitude_prune", "density": 1.5}, ["got density=1.5"]),
        ({"method": "dare_ties", "density": 0.5}, ["got no key", "jax.random.key(0)"]),
        (
            {"method": "ties", "density": 0.5, "majority_sign": "mean"},
            ["got majority_sign 'mean'", "'total' or 'frequency'"],
        ),
    ],
)
def test_bad_options(options, words):
    given = {"weights": [0.5, 0.5]} | options
    text = message(lambda: jaxlora.weighted_sum([small(), small()], **given))
    assert all(word in text for word in words), text


def other_base(**leaves):
    return {"layer": SMALL["layer"] | leaves, "head": SMALL["head"]}


@pytest.mark.parametrize(
    ("loras", "words"),
    [
        (lambda: [], ["got 0 adapters"]),
        (
            lambda: [small(), SMALL],
            ["loras[1]: got a tree without adapters", "jaxlora.extract(base, tuned"],
        ),
        (
            lambda: [small(), small({"layer": SMALL["layer"]})],
            ["loras[1]: got a tree with other leaves", "head/kernel (missing)"],
        ),
        (
            lambda: [small({"layer": SMALL["layer"]}), small()],
            ["head/kernel (not expected)"],
        ),
        (
            lambda: [small(), small(other_base(kernel=jnp.ones((4, 5))))],
            ["layer/kernel: got float32 (4, 5), expected float32 (4, 6)"],
        ),
        (
            lambda: [small(), small(other_base(bias=jnp.ones(6, jnp.bfloat16)))],
            ["layer/bias: got bfloat16 (6,), expected float32 (6,)"],
        ),
        (
            lambda: [small(), small(roles={"layer": "oi"})],
            ["layer/kernel: got roles 'oi', expected 'io'"],
        ),
        (
            lambda: [small(), small(other_base(bias=2 * jnp.ones(6)))],
            ["loras[1]: got a base with other values", "layer/bias", "jaxlora.merge(lora)"],
        ),
        (
            lambda: [small(), small(other_base(kernel=2 * jnp.ones((4, 6))))],
            ["loras[1]: got a base with other values", "layer/kernel"],
        ),
        (
            lambda: [small(), small(targets=["head"], train=["layer"])],
            ["layer/kernel: got an adapter that trains it in full", "jaxlora.extract("],
        ),
    ],
)
def test_adapters_that_do_not_fit_each_other(loras, words):
    text = message(lambda: jaxlora.weighted_sum(loras(), [0.5] * len(loras())))
    assert all(word in text for word in words), text


def test_an_equal_base_is_the_same_base():
    """A copy, NaNs included; under jit values are not known, and not compared."""
    copies = [small(other_base(bias=jnp.full(6, np.nan))) for _ in range(2)]
    jaxlora.weighted_sum(copies, [1, 1])
    other = small(other_base(bias=jnp.zeros(6)))
    jax.jit(lambda x, y: jaxlora.weighted_sum([x, y], [1, 1]))(small(), other)


@pytest.mark.parametrize(
    "method", ["linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"]
)
def test_unequal_ranks(method):
    density = None if method == "linear" else 0.5
    loras = [small(), small(rank=3)]
    text = message(lambda: jaxlora.weighted_sum(loras, [1, 1], method, density=density, key=KEY))
    assert (
        f"layer/kernel: got adapters of ranks 2, 3, expected equal ranks for method='{method}'"
        in text
    )
    assert "method='cat' or method='svd'" in text


def test_dora_refuses_what_is_not_linear():
    lora = small(dora=True)
    text = message(lambda: jaxlora.weighted_sum([lora, small()], [1, 1], "cat"))
    assert "layer/kernel: got a weight with DoRA's magnitude for method='cat'" in text
    assert "method='svd'" in text
    text = message(lambda: jaxlora.scaled(lora, 0.5))
    assert "layer/kernel: got a factor of 0.5 for a weight with DoRA's magnitude" in text
    assert "jaxlora.extract(base, jaxlora.merge(lora), config)" in text
    assert "got a factor of" in message(lambda: jax.jit(jaxlora.scaled)(lora, 1.0))
    assert "shape (2,)" in message(lambda: jaxlora.scaled(small(), jnp.ones(2)))


@pytest.mark.parametrize(
    ("tuned", "words"),
    [
        (
            lambda: {"layer": SMALL["layer"]},
            ["tuned: got a tree with other leaves", "head/kernel (missing)"],
        ),
        (
            lambda: other_base(kernel=jnp.ones((6, 4))),
            ["layer/kernel: got float32 (6, 4), expected float32"],
        ),
        (
            lambda: small(),
            ["layer/kernel: got a LoraWeight in the tuned tree", "jaxlora.merge(lora)"],
        ),
    ],
)
def test_extract_refuses_other_trees(tuned, words):
    call = lambda: jaxlora.extract(SMALL, tuned(), LoraConfig(targets=["layer"]))
    text = message(call)
    assert all(word in text for word in words), text


def test_extract_refuses_what_no_adapter_holds():
    base = SMALL | {"steps": jnp.array(3), "rate": 0.1}
    config = LoraConfig(targets=["layer"])
    other = base | {"steps": jnp.array(4), "rate": 0.2}
    text = message(lambda: jaxlora.extract(base, other, config))
    assert "tuned: got leaves that differ from the base's and are not floating-point" in text
    assert "rate (float)" in text
    assert "steps (int32)" in text
    for call in (
        lambda x: jaxlora.extract(SMALL, x, config),
        lambda x: jaxlora.extract(x, SMALL, config),
    ):
        text = message(lambda call=call: jax.jit(call)(SMALL))
        assert "head/kernel: got a traced leaf" in text
        assert "outside of jax.jit" in text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, ["truncate: got neither rank nor energy", "jaxlora.truncate(lora, rank=4)"]),
        ({"rank": 0}, ["truncate: got rank 0"]),
        ({"rank": 2.0}, ["truncate: got rank 2.0"]),
        ({"energy": 0}, ["truncate: got energy 0", "(0, 1]"]),
        ({"energy": 1.1}, ["truncate: got energy 1.1"]),
    ],
)
def test_truncate_refuses(options, words):
    text = message(lambda: jaxlora.truncate(small(), **options))
    assert all(word in text for word in words), text


def test_energy_is_not_for_jit():
    text = message(lambda: jax.jit(lambda x: jaxlora.truncate(x, energy=0.5))(small()))
    assert "layer/kernel: got energy=0.5 under a transformation" in text
    text = message(lambda: jaxlora.extract(SMALL, SMALL, LoraConfig(targets=["layer"]), energy=2))
    assert "extract: got energy 2" in text
