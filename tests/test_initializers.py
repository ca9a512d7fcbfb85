"""How adapters start: at the base, with the papers' numbers, and with PEFT's."""

from __future__ import annotations

import dataclasses
import math
import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, randomized

import jaxlora
from jaxlora import (
    LoraConfig,
    LoraWeight,
    QuantizedArray,
    TargetError,
    initializers,
    quantize_array,
)
from jaxlora.initializers import Moments, Target

KEY = jax.random.key(0, impl="unsafe_rbg")  # which compiles quickly
RANK, ALPHA = 2, 3.0
SCALE = ALPHA / RANK
ROLES = {
    "dense/weight": "oi",
    "query/kernel": "ioo",
    "out/kernel": "iio",
    "conv/kernel": "iiio",
    "embed/embedding": "io",
    "scanned/kernel": "sio",
}
SHAPES = {
    "dense/weight": (7, 9),
    "query/kernel": (6, 2, 4),
    "out/kernel": (2, 4, 6),
    "conv/kernel": (2, 2, 2, 5),
    "embed/embedding": (8, 6),
    "scanned/kernel": (3, 6, 7),
}


def matrices(array, roles: str) -> np.ndarray:
    """An array as float64 matrices (stack, inputs, outputs)."""
    order = [d for letter in "sio" for d, role in enumerate(roles) if role == letter]
    sizes = [
        math.prod(n for n, role in zip(array.shape, roles, strict=True) if role == x) for x in "sio"
    ]
    return np.asarray(array, np.float64).transpose(order).reshape(sizes)


def factors(lw: LoraWeight) -> tuple[np.ndarray, np.ndarray]:
    """a (stack, inputs, R) and b (stack, R, outputs), float64."""
    stack, n_in, n_out = matrices(lw.w, lw.roles).shape
    a = np.asarray(lw.a, np.float64).reshape(stack, n_in, lw.rank)
    return a, np.asarray(lw.b, np.float64).reshape(stack, lw.rank, n_out)


def tree_of(leaves: dict) -> dict:
    tree: dict = {}
    for path, leaf in leaves.items():
        module, name = path.split("/")
        tree.setdefault(module, {})[name] = leaf
    return tree


def leaf_of(tree, path: str):
    module, name = path.split("/")
    return tree[module][name]


def arrays(seed: int) -> dict:
    rng = np.random.default_rng(seed)
    return {p: jnp.asarray(rng.standard_normal(s), jnp.float32) for p, s in SHAPES.items()}


WEIGHTS, GRADIENTS = arrays(0), arrays(1)
PARAMS = tree_of(WEIGHTS)


def moments_of(x: np.ndarray) -> Moments:
    """Of inputs (stack, samples, n), or (samples, n)."""
    count = jnp.full(x.shape[:-2], x.shape[-2], jnp.float32)
    second = np.swapaxes(x, -1, -2) @ x
    return Moments(count=count, total=jnp.float32(x.sum(-2)), second=jnp.float32(second))


def inputs_of(path: str) -> np.ndarray:
    """(stack, samples, n): directions of unlike variance, off zero."""
    stack, n, _ = matrices(WEIGHTS[path], ROLES[path]).shape
    rng = np.random.default_rng(len(path))
    return rng.standard_normal((stack, 30, n)) * 0.8 ** np.arange(n) + 0.2


INPUTS = {p: inputs_of(p) for p in ROLES if p != "embed/embedding"}
STATS = {p: moments_of(x if "s" in ROLES[p] else x[0]) for p, x in INPUTS.items()}


def coarse(w):
    """A quantizer of 16 steps, one range for all."""
    step = jnp.max(jnp.abs(w)) / 8
    return jnp.round(w / step) * step


def lora_ga_of(*args, **more):
    return initializers.lora_ga(tree_of(GRADIENTS), *args, **more)


METHODS = {
    "gaussian": initializers.gaussian,
    "orthogonal": initializers.orthogonal,
    "pissa": initializers.pissa(),
    "pissa_niter": initializers.pissa(niter=16, oversample=2),
    "olora": initializers.olora,
    "loftq": initializers.loftq(coarse, iterations=3),
    "eva": initializers.eva(STATS),
    "eva_white": initializers.eva(STATS, whiten=True),
    "corda_ipm": initializers.corda(STATS),
    "corda_kpm": initializers.corda(STATS, mode="kpm"),
    "lora_ga": lora_ga_of(niter=None),
    "lora_ga_niter": lora_ga_of("A2rBr"),
    "lora_ga_gd": lora_ga_of("ArBr", "gd_scale", niter=None),
    "lora_ga_svd": lora_ga_of("random", "weight_svd", niter=None),
    "lora_ga_paper": lora_ga_of(scale="paper", stable_gamma=4, niter=None),
}
# On one kind of weight only: what differs is not how the weight is laid out.
VARIANTS = {
    "pissa_niter",
    "eva_white",
    "corda_kpm",
    "lora_ga_niter",
    "lora_ga_gd",
    "lora_ga_svd",
    "lora_ga_paper",
}
SCANNED = {"scanned/kernel": WEIGHTS["scanned/kernel"]}


def config_of(method: str, weights=WEIGHTS, **more) -> LoraConfig:
    inputs = method.startswith(("eva", "corda")) and "embed/embedding" in weights
    settings = {
        "targets": ".*",
        "rank": RANK,
        "alpha": ALPHA,
        "roles": {p: ROLES[p] for p in weights if not (inputs and p.startswith("embed"))},
        "initializer": METHODS[method],
        "exclude": ["embed"] if inputs else None,
    }
    return LoraConfig(**(settings | more))


def start(method: str, weights=WEIGHTS, **more):
    """The tree and its merge, under one jit."""
    config = config_of(method, weights, **more)

    @jax.jit
    def both(params):
        lora = jaxlora.init(KEY, params, config)
        return lora, jaxlora.merge(lora)

    return both(tree_of(weights))


# --------------------------------------------------------------------------------------------------
# The formulas, in NumPy and float64: (scale * a b, a's columns, b's rows) of one matrix


def svd(m: np.ndarray, rank: int | None = None):
    u, s, vt = np.linalg.svd(m, full_matrices=False)
    return u[:, :rank], s[:rank], vt[:rank]


def pissa(w, x, g):
    u, s, vt = svd(w, RANK)
    root = np.sqrt(s / SCALE)
    return (u * s) @ vt, u * root, root[:, None] * vt


def olora(w, x, g):
    q, t = np.linalg.qr(w.T)
    return SCALE * (q[:, :RANK] @ t[:RANK]).T, t[:RANK].T, q[:, :RANK].T


def corda(kept):
    def reference(w, x, g):
        c = x.T @ x / np.mean(np.sum(x * x, axis=0))
        c += 0.01 * np.eye(len(c))
        v, s, ut = (m[kept] for m in (lambda t: (t[0].T, t[1], t[2]))(svd(c @ w)))
        root = np.sqrt(s / SCALE)
        a, b = np.linalg.solve(c, v.T) * root, root[:, None] * ut
        return SCALE * a @ b, a, b

    return reference


def eva(white):
    def reference(w, x, g):
        d, v = np.linalg.eigh((x - x.mean(0)).T @ (x - x.mean(0)))
        a = v[:, ::-1][:, :RANK] / (d[::-1][:RANK] ** 0.25 if white else 1)
        return np.zeros_like(w), a, np.zeros((RANK, w.shape[1]))

    return reference


def lora_ga(of_a, of_b, scale, gamma=16):
    def reference(w, x, g):
        u, s, vt = svd(g, 2 * RANK)
        a, b = u[:, of_a], vt[of_b]
        stable = w.shape[1] ** 0.25 / gamma**0.5
        if scale == "paper":
            a, b = stable * a, stable * b
        else:
            b = s[of_b][:, None] * b
        if scale == "stable":
            b = stable * b
        if scale == "gd_scale":
            a, b = a / SCALE, b / SCALE
        return None, a, b  # the sign of a b is that of an SVD

    return reference


first, second = slice(0, RANK), slice(RANK, 2 * RANK)
FORMULAS = {
    "pissa": pissa,
    "pissa_niter": pissa,
    "olora": olora,
    "eva": eva(False),
    "eva_white": eva(True),
    "corda_ipm": corda(slice(0, RANK)),
    "corda_kpm": corda(slice(-RANK, None)),
    "lora_ga": lora_ga(first, second, "stable"),
    "lora_ga_niter": lora_ga(second, first, "stable"),
    "lora_ga_gd": lora_ga(slice(1, None, 2), slice(0, None, 2), "gd_scale"),
    "lora_ga_paper": lora_ga(first, second, "paper", gamma=4),
}


def assert_near(got, expected, tolerance=1e-5):
    """Equal to `tolerance` of the largest value."""
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    assert got.shape == expected.shape
    largest = max(np.abs(expected).max(), 1e-3)
    np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance * largest)


@pytest.mark.parametrize("method", METHODS)
def test_starts_at_the_base_with_the_formulas_factors(method):
    weights = SCANNED if method in VARIANTS else WEIGHTS
    lora, merged = start(method, weights)
    for path, w in weights.items():
        lw = leaf_of(lora, path)
        if not isinstance(lw, LoraWeight):
            assert path.startswith("embed")
            continue
        assert lw.w.dtype == w.dtype
        if method != "loftq":
            assert_near(leaf_of(merged, path), w)
        moves = method.startswith(("pissa", "olora", "loftq", "corda", "lora_ga"))
        assert moves != bool(jnp.all(lw.w == w))
        if method not in FORMULAS:
            continue
        a, b = factors(lw)
        for k, matrix in enumerate(matrices(w, ROLES[path])):
            x = INPUTS[path][k] if path in INPUTS else None
            gradient = matrices(GRADIENTS[path], ROLES[path])[k]
            product, of_a, of_b = FORMULAS[method](matrix, x, gradient)
            # Up to the signs of singular vectors; the smallest of C W suffer most from float32.
            tolerance = 1e-3 if method in ("corda_kpm", "lora_ga_niter", "pissa_niter") else 1e-4
            assert_near(np.abs(a[k]), np.abs(of_a), tolerance)
            assert_near(np.abs(b[k]), np.abs(of_b), tolerance)
            if product is not None:
                assert_near(SCALE * a[k] @ b[k], product, tolerance)


def test_loftq_leaves_the_best_low_rank_error():
    lora, merged = start("loftq")
    for path, w in WEIGHTS.items():
        lw = leaf_of(lora, path)
        before = matrices(w, ROLES[path])
        base, after = matrices(lw.w, ROLES[path]), matrices(leaf_of(merged, path), ROLES[path])
        for k in range(len(before)):
            left = svd(before[k] - base[k])[1][RANK:]
            assert np.linalg.norm(before[k] - after[k]) == pytest.approx(
                np.linalg.norm(left), rel=1e-3, abs=1e-5
            )


def test_loftq_by_hand_and_with_a_quantized_array():
    """Three iterations in float64; the same where the quantizer gives a QuantizedArray."""

    def to_int8(w):
        return quantize_array(w, "int8", block_size=64, double_quant=False)

    w = WEIGHTS["dense/weight"]
    assert w.size <= 64, "one block"
    target = Target(path="w", roles="io", rank=RANK, scale=SCALE)

    def by_hand(levels):
        left = np.asarray(w, np.float64)
        for _ in range(3):
            step = np.abs(left).max() / levels
            base = np.round(left / step) * step
            u, s, vt = svd(np.asarray(w, np.float64) - base, RANK)
            left = w - (u * s) @ vt
        return base, (u * s) @ vt

    got, a, b = METHODS["loftq"](KEY, w, target)
    base, product = by_hand(8)
    assert_near(got, base)
    assert_near(SCALE * a @ b, product, 1e-4)
    kept, a, b = initializers.loftq(to_int8, 3)(KEY, w, target)
    assert isinstance(kept, QuantizedArray)
    base, product = by_hand(127)
    assert_near(kept.dequantize(), base, 1e-5)
    assert_near(SCALE * a @ b, product, 1e-4)


def test_loftq_refuses_what_is_no_array():
    target = Target(path="layer/w", roles="io", rank=RANK, scale=SCALE)
    for made in ((), types.SimpleNamespace(shape=(7, 9)), jnp.zeros(3)):
        with pytest.raises(TargetError, match=r"layer/w: got .* from loftq's .*quantize_array"):
            initializers.loftq(lambda w, made=made: made)(KEY, jnp.ones((7, 9)), target)


def test_full_rank_takes_all():
    """With as many ranks as there are, nothing is left of the base, and LoftQ loses nothing."""
    lora, _ = start("pissa", SCANNED, rank=6)
    assert float(jnp.max(jnp.abs(lora["scanned"]["kernel"].w))) < 1e-5
    _, merged = start("loftq", SCANNED, rank=6)
    assert_near(merged["scanned"]["kernel"], SCANNED["scanned/kernel"])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_half_precision_starts_within_half_a_last_place(dtype):
    """w rounds once, and nothing else does: a b is that of the factors as they are kept."""
    half = {p: WEIGHTS[p].astype(jnp.bfloat16) for p in ("scanned/kernel", "conv/kernel")}
    lora, _ = start("pissa", half, dtype=dtype)
    for path, w in half.items():
        lw = leaf_of(lora, path)
        assert (lw.w.dtype, lw.a.dtype, lw.b.dtype) == (jnp.bfloat16, dtype, dtype)
        a, b = factors(lw)
        base = matrices(lw.w, ROLES[path])
        error = np.abs(base + SCALE * a @ b - matrices(w, ROLES[path]))
        assert np.all(error <= 2.0**-8 * np.abs(base) + 1e-6)


def test_random_ones_draw_what_peft_draws():
    target = Target(path="w", roles="io", rank=8, scale=1.0)
    looked_up = dataclasses.replace(target, lookup=True)

    @jax.jit
    def draw(w):
        drawn = [f(KEY, w, target) for f in (initializers.gaussian, initializers.orthogonal)]
        return drawn, initializers.gaussian(KEY, w, looked_up)

    ((_, a, b), (_, of_orthogonal, _)), (_, zero, rows) = draw(jnp.zeros((4096, 3)))
    assert np.std(a) == pytest.approx(float(PEFT["gaussian/std"]), rel=0.02)
    assert not np.any(b)
    assert np.std(of_orthogonal) == pytest.approx(float(PEFT["orthogonal/std"]), rel=0.05)
    assert not np.any(zero)
    assert np.all(rows != 0)


def test_orthogonal_has_two_halves_as_in_peft():
    lora, _ = start("orthogonal", SCANNED, rank=4)
    theirs = (PEFT["orthogonal/A"].T[None], PEFT["orthogonal/B"].T[None])
    for a, b in (factors(lora["scanned"]["kernel"]), theirs):
        for k in range(len(a)):
            assert np.linalg.matrix_rank(a[k], 1e-4) == 2
            assert np.linalg.matrix_rank(b[k], 1e-4) == 2
            assert np.abs(a[k] @ b[k]).max() < 1e-7


# --------------------------------------------------------------------------------------------------
# PEFT: tests/oracle/initializers.py

PEFT = dict(np.load(pathlib.Path(__file__).parent / "references" / "initializers.npz"))


def nf4(w):
    """bitsandbytes' NF4 of up to 64 values, which share a block."""
    largest, codes = jnp.max(jnp.abs(w)), jnp.asarray(PEFT["nf4"])
    nearest = jnp.argmin(jnp.abs(w[..., None] / largest - codes), axis=-1)
    return codes[nearest] * largest


def blocks_of_nf4(w):
    """In torch's orientation, and blocks of 64 in its order."""
    flat = jnp.ravel(w.T)
    return jnp.concatenate([nf4(flat[:64]), nf4(flat[64:])]).reshape(w.T.shape).T


IN_PEFT = {
    "pissa": initializers.pissa(),
    "pissa_niter_16": initializers.pissa(niter=16),
    "olora": initializers.olora,
    "corda_ipm": initializers.corda({"w": moments_of(PEFT["inputs"])}),
    "corda_kpm": initializers.corda({"w": moments_of(PEFT["inputs"])}, "kpm"),
    "loftq_1": initializers.loftq(blocks_of_nf4),
    "loftq_3": initializers.loftq(blocks_of_nf4, 3),
    **{
        f"lora_ga_{direction}_{scale}": initializers.lora_ga(
            {"w": PEFT["gradient"].T}, direction, scale, niter=4 if scale == "stable" else None
        )
        for direction, scale in (
            ("ArB2r", "stable"),
            ("A2rBr", "gd_scale"),
            ("ArBr", "weight_svd"),
            ("ArB2r", "unit"),
        )
    },
}


@pytest.mark.parametrize("method", IN_PEFT)
def test_equals_peft(method):
    target = Target(path="w", roles="io", rank=2, scale=1.0 if "loftq" in method else 1.5)
    w, a, b = jax.jit(lambda w: IN_PEFT[method](KEY, w, target))(PEFT["weight"].T)
    their_w, their_a, their_b = (PEFT[f"{method}/{x}"].T for x in ("base", "A", "B"))
    if "corda" in method:  # whose scale of C depends there on the batches
        ratio = np.linalg.norm(their_a) / np.linalg.norm(a)
        their_a, their_b = their_a / ratio, their_b * ratio
    tolerance = 2e-4  # theirs is float32, and some randomised
    if "lora_ga" in method:  # the sign of a b is that of an SVD
        assert_near(w + target.scale * a @ b, PEFT["weight"].T)
        assert_near(their_w + target.scale * their_a @ their_b, PEFT["weight"].T)
    else:
        assert_near(w, their_w, tolerance)
        assert_near(a @ b, their_a @ their_b, tolerance)
    assert_near(jnp.abs(a), np.abs(their_a), tolerance)
    assert_near(jnp.abs(b), np.abs(their_b), tolerance)


EVA_STATS = {f"{k}/kernel": moments_of(PEFT[f"eva/{k}/inputs"]) for k in (0, 2, 4)}


def test_eva_ranks_and_directions_equal_pefts():
    ranks = initializers.eva_ranks(EVA_STATS, rank=2, rho=2.0, least=0)
    assert ranks == {f"^{k}/kernel": len(PEFT[f"eva/{k}/A"]) for k in (0, 2, 4)}
    assert len({*ranks.values()}) > 1
    widths = {k: PEFT[f"eva/{k}/inputs"].shape[-1] for k in (0, 2, 4)}
    params = {str(k): {"kernel": jnp.ones((n, 4))} for k, n in widths.items()}
    alphas = {p: ALPHA * r / RANK for p, r in ranks.items()}
    for whiten in (False, True):
        config = LoraConfig(
            targets=["kernel"],
            alpha=ALPHA,
            rank_pattern=ranks,
            alpha_pattern=alphas,
            initializer=initializers.eva(EVA_STATS, whiten),
        )
        lora = jax.jit(lambda params, config=config: jaxlora.init(KEY, params, config))(params)
        for k in (0, 2, 4):
            lw, theirs = lora[str(k)]["kernel"], PEFT[f"eva{'_white' * whiten}/{k}/A"].T
            # White, theirs shrinks with each pass over the same data.
            ratio = np.linalg.norm(theirs) / np.linalg.norm(lw.a) if whiten else 1
            assert_near(ratio * lw.a, theirs, 5e-3)  # theirs is randomised
            assert not np.any(lw.b)
            assert float(lw.scale) == pytest.approx(float(PEFT[f"eva/{k}/scale"]))


@pytest.mark.parametrize("noise", [0.0, 0.1])
@pytest.mark.parametrize("whiten", [False, True])
def test_eva_of_inputs_that_do_not_vary(noise, whiten):
    """Nor so little that float32 sums cannot tell."""
    x = 1000 + noise * np.random.default_rng(0).standard_normal((64, 4))
    x = jnp.asarray(x, jnp.float32)
    stats = {"w": Moments(count=jnp.float32(64), total=x.sum(0), second=x.T @ x)}
    target = Target(path="w", roles="io", rank=2, scale=1.0)
    with pytest.raises(TargetError, match="w: got inputs that are all but equal"):
        initializers.eva(stats, whiten)(jax.random.key(0), jnp.ones((4, 3)), target)


def test_eva_ranks_of_a_stack_are_paid_for_each_layer():
    diagonal = lambda *d: jnp.diag(jnp.array(d, jnp.float32))
    moments = lambda second: Moments(
        count=jnp.float32(9), total=jnp.zeros(second.shape[:-1]), second=second
    )
    stats = {
        "params/one/kernel": moments(diagonal(97, 1, 1, 1)),
        "stack/kernel": moments(jnp.stack([diagonal(40, 30, 20, 10), diagonal(50, 25, 24, 1)])),
    }
    # 3 * 2 ranks to spend: .97 | .45 .275 .22 .055 twice each | .01 .01 .01
    ranks = initializers.eva_ranks(stats, rank=2)
    assert ranks == {"^one/kernel": 2, "^stack/kernel": 2}
    assert initializers.eva_ranks(stats, rank=2, rho=1) == ranks
    uneven = {p: moments(v) for p, v in zip("ab", (diagonal(1, 1), diagonal(9, 1)), strict=True)}
    uneven |= {"c": moments(diagonal(8, 2))}
    assert initializers.eva_ranks(uneven, 1, least=0) == {"^a": 0 + 1, "^b": 1, "^c": 1}
    assert initializers.eva_ranks({p: uneven[p] for p in "bc"}, 1) == {"^b": 1, "^c": 1}
    config = LoraConfig(targets=["kernel"], rank=1, rank_pattern=ranks)
    assert config.rank_of("params/one/kernel") == 2
    assert config.rank_of("two/one/kernel") == 1


# --------------------------------------------------------------------------------------------------
# DoRA, abstract params, the original base


def test_dora_starts_at_the_base_too():
    weights = {p: WEIGHTS[p] for p in ("scanned/kernel", "conv/kernel")}
    lora, merged = start("pissa", weights, dora=True)
    for path, w in weights.items():
        excess = jax.jit(jaxlora._weight.excess)(leaf_of(lora, path))
        assert float(jnp.max(jnp.abs(excess))) < 1e-6
        assert_near(leaf_of(merged, path), w)


@pytest.mark.parametrize(
    "method", ["pissa_niter", "olora", "corda_ipm", "lora_ga_svd", "orthogonal"]
)
def test_shapes_need_no_numbers(method):
    config = config_of(method)
    shapes = jax.eval_shape(lambda params: jaxlora.init(KEY, params, config), PARAMS)
    assert leaf_of(shapes, "scanned/kernel").a.shape == (3, 6, RANK)
    assert leaf_of(shapes, "conv/kernel").b.shape == (RANK, 5)


@pytest.mark.parametrize("dora", [False, True])
def test_rebase_is_the_same_model_on_the_original_base(dora):
    weights = {p: WEIGHTS[p] for p in ("scanned/kernel", "conv/kernel")}
    params = tree_of(weights | {"dense/weight": WEIGHTS["dense/weight"]})
    config = config_of("pissa", weights, dora=dora, exclude=["dense"], train=["dense"])

    @jax.jit
    def run(params):
        initial = jaxlora.init(KEY, params, config)
        lora = randomized(initial)
        plain = jaxlora.rebase(lora, initial, params)
        computed = jaxlora.rebase(lora, initial)
        return lora, plain, jaxlora.merge(lora), jaxlora.merge(plain), computed

    lora, plain, merged, of_plain, computed = run(params)
    assert_close(of_plain, merged, 3.0)
    assert_close(computed, plain, 3.0)
    assert np.array_equal(plain["dense"]["weight"].value, lora["dense"]["weight"].value)
    for path, w in weights.items():
        after, before = leaf_of(plain, path), leaf_of(lora, path)
        assert np.array_equal(after.w, w)
        assert after.rank == 2 * RANK
        assert np.array_equal(after.scale, before.scale)
        assert (after.magnitude is not None) == dora


def test_rebase_of_loftq_is_on_its_own_start():
    params = tree_of(SCANNED)
    initial, _ = start("loftq", SCANNED)
    lora = randomized(initial)
    with pytest.raises(TargetError, match=r"kernel: got a weight in `params` that differs"):
        jaxlora.rebase(lora, initial, params)
    plain = jaxlora.rebase(lora, initial)
    assert_close(jaxlora.merge(plain), jaxlora.merge(lora), 3.0)


def test_rebase_refuses_trees_that_do_not_fit():
    params = tree_of(SCANNED)
    initial, _ = start("pissa", SCANNED)
    other, _ = start("olora", SCANNED, rank=3)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    for arguments, text in [
        ((initial, params), r"scanned/kernel: got a .* in `initial`, expected the LoraWeight"),
        ((initial, {}), r"scanned/kernel: got nothing in `initial`"),
        ((initial, other), r"scanned/kernel: got rank 3 in `initial`, expected 2"),
        ((jaxlora.with_scale(initial, 1.0), initial), r"got a scale of .1\.5 .* and of .1\. "),
        ((initial, initial, {}), r"got nothing in `params`, expected float32\(3, 6, 7\)"),
        ((initial, initial, half), r"got bfloat16\(3, 6, 7\) in `params`"),
        ((initial, initial, jax.tree.map(lambda x: x + 1, params)), r"differs by 1 from what"),
    ]:
        with pytest.raises(TargetError, match=text):
            jaxlora.rebase(*arguments)


# --------------------------------------------------------------------------------------------------
# What is refused


def refused(initializer, w=None, **target) -> str:
    target = Target(
        **({"path": "params/up/kernel", "roles": "io", "rank": 2, "scale": 1.0} | target)
    )
    with pytest.raises(TargetError) as error:
        initializer(KEY, jnp.ones((4, 3)) if w is None else w, target)
    return str(error.value)


@pytest.mark.parametrize("method", ["pissa", "pissa_niter", "olora", "loftq"])
def test_ranks_above_the_weights(method):
    text = refused(METHODS[method], rank=4)
    name = method.removesuffix("_niter")
    assert text == (
        "params/up/kernel: got rank 4 for a weight of 4 inputs and 3 outputs, expected rank <= 3, "
        f"since {name} takes so many of its singular vectors. "
        "LoraConfig(rank_pattern={'up/kernel': 3})."
    )


UP = {"up/kernel": moments_of(np.ones((5, 4)))}


def test_ranks_above_the_datas():
    text = refused(initializers.lora_ga({"up": {"kernel": jnp.ones((4, 3))}}))
    assert "expected 2 * rank <= 3, since lora_ga" in text
    assert text.endswith("LoraConfig(rank_pattern={'up/kernel': 1}).")
    ga = initializers.lora_ga({"up": {"kernel": jnp.ones((4, 1))}})
    assert "exclude=['up/kernel']" in refused(ga, jnp.ones((4, 1)), rank=1)
    assert "expected rank <= 3, since corda" in refused(initializers.corda(UP), rank=4)
    assert "of 4 inputs, expected at most 4, since EVA" in refused(initializers.eva(UP), rank=5)
    assert "got rank 3, expected an even one" in refused(initializers.orthogonal, rank=3)


@pytest.mark.parametrize(
    ("name", "make"), [("EVA", initializers.eva), ("CorDA", initializers.corda)]
)
def test_statistics_that_do_not_fit(name, make):
    text = refused(make({"down/kernel": UP["up/kernel"]}))
    for part in (
        f"params/up/kernel: got no statistics of its inputs for {name}",
        "jaxlora.input_moments(fn, lora, batches)",
        "It has 1 paths:\n    down/kernel",
    ):
        assert part in text
    text = refused(make(UP), lookup=True)
    assert "params/up/kernel: got an embedding" in text
    assert "exclude=['up/kernel']" in text
    text = refused(make({"up/kernel": moments_of(np.ones((5, 3)))}))
    assert "got statistics of shapes (), (3,) and (3, 3)" in text
    assert "expected count () or (), total (4,)" in text
    text = refused(make({"up/kernel": moments_of(np.ones((0, 4)))}))
    assert f"params/up/kernel: {name} without data: got statistics of 0 inputs" in text
    text = refused(make({"up/kernel": moments_of(np.ones((1, 4)))}))
    assert "got statistics of 1 inputs" in text
    assert "as many as the rank, 2" in text
    for value, word in ((0.0, "0"), (np.nan, "nan")):
        text = refused(make({"up/kernel": moments_of(np.full((5, 4), value))}))
        assert f"got a sum of squared inputs of {word} for {name}" in text


def test_gradients_that_do_not_fit():
    text = refused(initializers.lora_ga({"down": {"kernel": jnp.ones((4, 3))}}))
    assert "params/up/kernel: got no gradient" in text
    assert "There are 1 paths:\n    down/kernel" in text
    text = refused(initializers.lora_ga({"up": {"kernel": jnp.ones((3, 4))}}))
    assert "got a gradient of shape (3, 4), expected (4, 3)" in text
    text = refused(initializers.lora_ga({"up": {"kernel": jnp.zeros((4, 3))}}))
    assert "got a gradient whose absolute values sum to 0, expected a finite number" in text
    text = refused(initializers.lora_ga({"up": {"kernel": jnp.full((4, 3), jnp.nan)}}))
    assert "sum to nan, expected" in text


def test_a_quantizer_of_another_shape():
    text = refused(initializers.loftq(lambda w: w[0]))
    assert "of shape (3,) from loftq's `quantize`, expected an array of shape (4, 3)" in text


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: initializers.pissa(niter=-1), "pissa: got niter -1, expected None for an exact"),
        (lambda: initializers.pissa(niter=1.5), "pissa: got niter 1.5"),
        (lambda: initializers.loftq(coarse, 0), "loftq: got iterations 0, expected an integer"),
        (lambda: initializers.corda(UP, "ipn"), "corda mode: got 'ipn', expected one of 'ipm', 'k"),
        (lambda: initializers.lora_ga({}, "BrAr"), "lora_ga direction: got 'BrAr', expected one"),
        (lambda: initializers.lora_ga({}, scale="gd"), "lora_ga scale: got 'gd', expected one of"),
        (lambda: initializers.lora_ga({}, stable_gamma=0), "got stable_gamma 0, expected a number"),
        (lambda: initializers.eva_ranks(UP, 0), "eva_ranks: got rank 0, expected an integer"),
        (lambda: initializers.eva_ranks(UP, 2, 0.5), "eva_ranks: got rho 0.5"),
        (lambda: initializers.eva_ranks(UP, 2, least=3), "got least 3, expected an integer of 0"),
        (lambda: initializers.eva_ranks({}, 2), "eva_ranks: got no statistics"),
        (
            lambda: initializers.eva_ranks({"up": moments_of(np.ones((0, 4)))}, 2),
            "up: EVA without data",
        ),
    ],
)
def test_settings_out_of_range(call, text):
    with pytest.raises(TargetError) as error:
        call()
    assert text in str(error.value)
