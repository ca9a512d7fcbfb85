"""Arrays in 4 and 8 bits: bitsandbytes' bits, exact arithmetic, and what a pytree must stand."""

from __future__ import annotations

import dataclasses
import math
import pathlib
import statistics
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_same, mostly_slow
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlora import TargetError
from jaxlora._codebooks import FP4, NF4, dynamic_code
from jaxlora._quantized_array import (
    QuantizedArray,
    absmax_of,
    decode,
    decode_at,
    over_channels,
    places,
    quantize_array,
)

REFERENCES = np.load(pathlib.Path(__file__).parent / "references" / "quantize.npz")
FOUR_BITS = [
    key.removesuffix("/codes")
    for key in REFERENCES
    if key.endswith("/codes") and not key.startswith("int8/")
]
TINY = np.finfo(np.float32).tiny
TABLES = {"nf4": NF4, "fp4": FP4, "int8": np.arange(-127, 128) / 127}


def draw(*shape: int, seed: int = 0, dtype: Any = jnp.float32) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def given(name: str) -> jax.Array:
    x = REFERENCES[f"input/{name}"]
    return jnp.asarray(x, jnp.bfloat16 if name.endswith("bfloat16") else x.dtype)


def elements(q: QuantizedArray) -> np.ndarray:
    """The codes of an unstacked array in 4 bits, in order: halves of rows share the bytes."""
    codes = np.asarray(q.codes)
    return np.concatenate([codes >> 4, codes & 15], axis=-1).ravel()[: q.size]


def by_neighbours(key: str, size: int) -> np.ndarray:
    """bitsandbytes' codes in order: neighbours share the bytes."""
    packed = REFERENCES[f"{key}/codes"].ravel()
    return np.stack([packed >> 4, packed & 15], axis=-1).ravel()[:size]


def nearest_in_float64(w: Any, q: QuantizedArray, absmax: np.ndarray) -> None:
    """Each code stands for a value as near to w as any: absmax broadcasts against w."""
    candidates = TABLES[q.kind] * np.float64(absmax)[..., None]
    best = np.abs(np.float64(w)[..., None] - candidates).min(-1)
    found = np.abs(np.float64(w) - np.float64(q.dequantize(jnp.float32)))
    assert (found <= best + 2e-7 * absmax).all()


# --------------------------------------------------------------------------------------------------
# bitsandbytes


@pytest.mark.parametrize("key", FOUR_BITS)
def test_codes_and_absmax_are_those_of_bitsandbytes(key: str):
    name, kind, block_size = key.split("/")
    w = given(name)
    q = quantize_array(w, kind, block_size=int(block_size), double_quant=False)
    np.testing.assert_array_equal(elements(q), by_neighbours(key, w.size))
    absmax = REFERENCES[f"{key}/absmax"]
    if w.size % int(block_size):  # theirs is 1e-38 for zeros, but only in a block that is not full
        absmax[-1] = absmax[-1] if absmax[-1] > TINY else 0
    np.testing.assert_array_equal(np.ravel(q.absmax), absmax)
    if f"{key}/dequantized" in REFERENCES:
        assert q.dequantize().dtype == w.dtype
        expected = REFERENCES[f"{key}/dequantized"]
        np.testing.assert_array_equal(np.asarray(q.dequantize(), expected.dtype), expected)


@pytest.mark.parametrize("key", [k for k in FOUR_BITS if f"double/{k}/offset" in REFERENCES])
def test_double_quantisation_is_that_of_bitsandbytes(key: str):
    name, kind, block_size = key.split("/")
    w = given(name)
    q = quantize_array(w, kind, block_size=int(block_size))
    read = lambda part: REFERENCES[f"double/{key}/{part}"]
    np.testing.assert_array_equal(elements(q), by_neighbours(key, w.size))
    np.testing.assert_array_equal(q.absmax_offset, read("offset"))
    np.testing.assert_array_equal(np.ravel(q.absmax), read("absmax"))
    np.testing.assert_array_equal(q.absmax_scale, read("scale"))
    # With all optimizations: there XLA fuses multiply and add wherever it may.
    jax.config.update("jax_disable_most_optimizations", False)
    values = jax.jit(QuantizedArray.dequantize)(q)
    expected = read("dequantized")
    np.testing.assert_array_equal(np.asarray(values, expected.dtype), expected)


def test_absmax_scales_are_exact():
    """A mean by a division, rounded once, and differences from it as it is stored."""
    w = np.random.default_rng(0).standard_normal((31, 64), np.float32)
    q = quantize_array(w)
    absmax = np.abs(w).max(1)
    total = np.pad(absmax, (0, 1))
    while total.size > 1:
        total = total[: total.size // 2] + total[total.size // 2 :]
    np.testing.assert_array_equal(q.absmax_offset, total[0] / np.float32(31))
    difference = absmax - np.asarray(q.absmax_offset)
    np.testing.assert_array_equal(q.absmax_scale, np.abs(difference).max(keepdims=True))


def test_the_compiled_cpu_kernel_of_bitsandbytes_is_near():
    """It rounds to a 32,768th before it looks up the code; ours, as its CUDA kernel's, is exact."""
    key = "double/many_bfloat16/nf4/32"
    exact, theirs = REFERENCES[f"{key}/absmax"], REFERENCES[f"{key}/compiled"]
    assert 0 < np.sum(exact != theirs) < exact.size / 20
    code = dynamic_code(signed=True)
    apart = np.abs(code[exact] - code[theirs])
    spacing = np.maximum(np.diff(code)[np.minimum(exact, 254)], np.diff(code)[exact - 1])
    assert (apart <= spacing + 2**-15).all()


def test_int8_by_channel_is_that_of_bitsandbytes():
    read = lambda part: REFERENCES[f"int8/channels_float16/{part}"]
    w = given("channels_float16")
    for matrix, channel, turn in ((w, 0, np.asarray), (w.T, 1, np.transpose)):
        q = quantize_array(matrix, "int8", block_size=None, channels=(channel,))
        np.testing.assert_array_equal(turn(q.codes), read("codes"))
        np.testing.assert_array_equal(q.absmax, read("absmax"))
        values = q.dequantize(jnp.float32)
        np.testing.assert_array_equal(turn(values), read("dequantized"))
        assert q.absmax_scale is None  # of channels there are too few to quantise them again


def test_tables():
    quantile = statistics.NormalDist().inv_cdf
    above = [quantile(p) for p in np.linspace(0.9677083, 0.5, 9)[:-1]]
    below = [-quantile(p) for p in np.linspace(0.9677083, 0.5, 8)[:-1]]
    expected = np.sort([*below, 0, *above]) / max(above)
    np.testing.assert_allclose(NF4, expected, rtol=1e-6)

    # In the order of bitsandbytes' codes: 1 and 1.5 times 8, 4 and 2, zero, and a subnormal.
    magnitudes = np.array([0, 1 / 16, 8, 12, 4, 6, 2, 3]) / 12
    np.testing.assert_allclose(FP4, np.concatenate([magnitudes, -magnitudes]), rtol=1e-7)
    assert not np.signbit(FP4[[0, 8]]).any()


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("shape", [(64, 6), (33, 6)], ids=["columns", "flat"])
def test_along_the_inputs_is_the_transposed_array(kind: str, shape: tuple[int, int]):
    """A kernel (in, out) has the codes of PyTorch's weight (out, in), and its absmaxes."""
    w = draw(3, *shape)
    q = quantize_array(w, kind, block_size=16, stacked=1, along=(0,))
    turned = quantize_array(jnp.swapaxes(w, 1, 2), kind, block_size=16, stacked=1)
    assert_same(q.dequantize(), jnp.swapaxes(turned.dequantize(), 1, 2))
    assert (q.stacked, q.shape) == (1, w.shape)
    for leaf in ("absmax", "absmax_scale", "absmax_offset"):
        assert_same(getattr(q, leaf), getattr(turned, leaf))
    codes = jnp.moveaxis(q.codes, 1, -1) if q.is_rowwise else q.codes
    assert_same(codes, turned.codes)
    one = jax.tree.map(lambda x: x[1], q)
    assert_same(one, quantize_array(w[1], kind, block_size=16, along=(0,)))
    assert_same(decode_at(one, places(one)), one.dequantize())


def test_along_several_inputs():
    w = draw(4, 8, 6)  # heads, head size, outputs
    q = quantize_array(w, block_size=16, along=(0, 1))
    assert q.codes.shape == (16, 6)
    turned = quantize_array(w.reshape(32, 6).T, block_size=16)
    assert_same(q.dequantize(), turned.dequantize().T.reshape(w.shape))
    middle = quantize_array(w, block_size=8, along=(1,))
    turned = quantize_array(jnp.swapaxes(w, 1, 2), block_size=8)
    assert_same(middle.dequantize(), jnp.swapaxes(turned.dequantize(), 1, 2))
    with pytest.raises(TargetError, match=r"got along=\(3,\).*distinct dims.*along=\(0,\)"):
        quantize_array(w, along=(3,))


# --------------------------------------------------------------------------------------------------
# Exact arithmetic


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_codes_are_the_nearest(kind: str, dtype: str):
    for shape in ((6, 96), (5, 7)):
        w = draw(*shape, dtype=dtype)
        q = quantize_array(w, kind, block_size=16, double_quant=False)
        flat = np.abs(np.float64(w)).ravel()
        absmax = np.array([flat[i : i + 16].max() for i in range(0, w.size, 16)])
        np.testing.assert_array_equal(np.ravel(q.absmax), absmax)
        nearest_in_float64(w, q, np.repeat(absmax, 16)[: w.size].reshape(shape))


def test_absmaxes_of_double_quantisation_are_the_nearest():
    w = np.asarray(draw(75, 128)) * np.exp(np.asarray(draw(75, 1, seed=1)))
    q = quantize_array(w, block_size=32)
    absmax = np.abs(np.float64(w)).reshape(-1, 32).max(-1)
    offset = absmax.mean()
    np.testing.assert_allclose(q.absmax_offset, offset, rtol=2e-7)
    difference = absmax - offset
    largest = [np.abs(difference[:256]).max(), np.abs(difference[256:]).max()]
    np.testing.assert_allclose(q.absmax_scale, largest, rtol=1e-6)
    scale = np.repeat(largest, 256)[:300]
    candidates = scale[:, None] * dynamic_code(signed=True)
    best = np.abs(difference[:, None] - candidates).min(-1)
    found = np.abs(np.float64(np.ravel(absmax_of(q))) - absmax)
    assert (found <= best + 1e-6 * scale).all()


def test_int8_codes():
    w = draw(4, 8, 3)
    q = quantize_array(w, "int8", block_size=None, channels=(-1, 0))
    absmax = np.abs(np.float64(w)).max(1)
    assert (q.channels, q.absmax.shape, q.codes.shape) == ((0, 2), (4, 3), (4, 8, 3))
    np.testing.assert_array_equal(q.absmax, absmax)
    nearest_in_float64(w, q, absmax[:, None])
    ties = jnp.asarray([0.5, 1.5, -0.5, -1.5, 2.5, 127, -126.5, 0])
    q = quantize_array(ties, "int8", block_size=8)
    np.testing.assert_array_equal(q.codes, [0, 2, 0, -2, 2, 127, -126, 0])


@pytest.mark.parametrize("kind", mostly_slow(["nf4", "fp4", "int8"], ("nf4", "int8")))
def test_extremes(kind: str):
    blocks = {
        "zeros": np.zeros(8),
        "negative zeros": np.full(8, -0.0),
        "subnormals": np.full(8, 1e-40),
        "smallest": np.array([TINY, -TINY, 0, 0, 0, 0, 0, 0]),
        "largest": np.array([3.38e38, -3.38e38, 1.7e38, 0, 0, 0, 0, 0]),
    }
    w = np.stack(list(blocks.values())).astype(np.float32)
    q = quantize_array(w, kind, block_size=8, double_quant=False)
    found = dict(zip(blocks, np.asarray(q.dequantize()), strict=True))
    for name in ("zeros", "negative zeros", "subnormals"):
        np.testing.assert_array_equal(found[name], np.zeros(8))
    # TINY / 127 is subnormal: zero on CPUs.
    assert (np.abs(found["smallest"]) <= TINY).all()
    largest = dataclasses.replace(q, codes=q.codes[-1:], absmax=q.absmax[-1:], inner=(1, 8))
    nearest_in_float64(w[-1:], largest, w[-1].max())

    w = jnp.asarray([65504, -65504, 6e-8, 0], jnp.float16)
    for double_quant in (False, True):
        values = quantize_array(w, kind, block_size=2, double_quant=double_quant).dequantize()
        assert np.isfinite(values).all()
    assert float(quantize_array(w, kind).dequantize()[0]) == 65504


# --------------------------------------------------------------------------------------------------
# Layouts and leaves


@pytest.mark.parametrize(
    ("shape", "rowwise"),
    [
        ((6, 64), True),
        ((2, 3, 32), True),
        ((0, 32), True),
        ((3, 0), True),
        ((5, 7, 3), False),
        ((1,), False),
        ((), False),
        ((0, 3), False),
    ],
)
def test_layout(shape: tuple[int, ...], rowwise: bool):
    for kind, each in (("nf4", 2), ("int8", 1)):
        w = draw(*shape, dtype=jnp.bfloat16)
        q = jax.eval_shape(lambda w, kind=kind: quantize_array(w, kind, block_size=32), w)
        n = w.size
        assert (q.shape, q.ndim, q.size, q.dtype) == (shape, len(shape), n, jnp.bfloat16)
        assert (q.is_rowwise, q.stacked) == (rowwise, 0)
        if rowwise:
            assert q.codes.shape == (*shape[:-1], shape[-1] // each)
            assert q.absmax.shape == (*shape[:-1], shape[-1] // 32)
        else:
            assert q.codes.shape == (math.ceil(n / each),)
            assert q.absmax.shape == (math.ceil(n / 32),)
        assert jax.eval_shape(QuantizedArray.dequantize, q).shape == shape


@pytest.mark.parametrize("shape", [(), (0, 3), (0, 32)])
def test_one_element_and_none(shape: tuple[int, ...]):
    w = draw(*shape, dtype=jnp.bfloat16)
    assert_same(quantize_array(w, block_size=32).dequantize(), w)


def test_bytes():
    """0.5 + 1/64 + 4 / (64 * 256) bytes an element, and the offset."""
    w = jnp.zeros((256, 128), jnp.bfloat16)
    assert quantize_array(w).nbytes == w.size * (0.5 + 1 / 64 + 4 / (64 * 256)) + 4
    assert quantize_array(w, double_quant=False).nbytes == w.size * (0.5 + 4 / 64)
    q = quantize_array(w, "int8", block_size=None, channels=(1,))
    assert q.nbytes == w.size + 4 * 128


@pytest.mark.parametrize("kind", mostly_slow(["nf4", "flat", "channel"], ("nf4", "channel")))
def test_each_stacked_element_is_quantised_alone(kind: str):
    inner = (5, 3) if kind == "flat" else (4, 64)
    options: dict[str, Any] = {"block_size": 32}
    if kind == "channel":
        options = {"kind": "int8", "block_size": None, "channels": (1,)}
    w = draw(2, 3, *inner, dtype=jnp.bfloat16)
    q = quantize_array(w, stacked=2, **options)
    layers = [[quantize_array(x, **options) for x in row] for row in np.asarray(w)]
    rows = [jax.tree.map(lambda *xs: np.stack(xs), *row) for row in layers]
    assert_same(q, jax.tree.map(lambda *xs: np.stack(xs), *rows))
    assert (q.shape, q.stacked) == (w.shape, 2)

    @jax.jit
    def run(w, q):
        row = jax.tree.map(lambda x: x[1], q)
        scanned = jax.lax.scan(lambda _, q: (None, q.dequantize()), None, row)[1]
        mapped = jax.vmap(QuantizedArray.dequantize)(row)
        made = jax.vmap(lambda w: quantize_array(w, **options))(w[1])
        return made, row, q.dequantize(), scanned, mapped

    made, row, values, scanned, mapped = run(w, q)
    assert_same(made, row)
    assert (row.shape, row.stacked) == (w.shape[1:], 1)
    assert_same(values, q.dequantize())
    assert_same(values[1], scanned)
    assert_same(values[1], mapped)
    assert_same(np.asarray(values)[1, 2], layers[1][2].dequantize())


@pytest.mark.parametrize("axes", [AxisType.Auto, AxisType.Explicit])
def test_codes_are_sharded_as_the_array(axes: AxisType):
    w = draw(4, 128, dtype=jnp.bfloat16)
    mesh = jax.make_mesh((2, 2), ("rows", "columns"), axis_types=(axes,) * 2)
    with jax.set_mesh(mesh):
        sharded = jax.device_put(w, NamedSharding(mesh, P("rows", "columns")))
        q = quantize_array(sharded, block_size=32)
        assert q.codes.sharding.spec == P("rows", "columns")
        assert q.absmax.sharding.spec[0] == "rows"
        values = q.dequantize()
        assert values.sharding.spec == P("rows", "columns")
    expected = quantize_array(w, block_size=32)
    assert_same(q, expected)
    assert_same(values, expected.dequantize())


def test_jit_is_eager():
    w = draw(5, 32, dtype=jnp.bfloat16)
    assert_same(jax.jit(quantize_array)(w), quantize_array(w))


def test_rows_of_codes_are_rows_of_the_array():
    rows = np.array([[3, 0], [5, 3]])
    w = draw(6, 64)
    of_rows = jax.jit(decode, static_argnums=(0, 3, 4))
    for kind in ("nf4", "int8"):
        q = quantize_array(w, kind, block_size=32)
        absmax = absmax_of(q)
        assert absmax.shape == q.absmax.shape
        found = of_rows(kind, q.codes[rows], absmax[rows], jnp.float32, q.block_size)
        assert_same(found, q.dequantize()[rows])
    q = quantize_array(w, "int8", block_size=None, channels=(0,))
    absmax = over_channels(absmax_of(q), q.inner, q.channels)
    assert_same(
        decode("int8", q.codes[rows], absmax[rows], jnp.float32, None), q.dequantize()[rows]
    )


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_elements_at_indices(kind: str):
    for shape, double_quant in (((5, 7, 3), True), ((3, 64), False)):
        w = draw(*shape)
        indices = np.arange(w.size, dtype=np.int32).reshape(w.shape)[::-1]
        q = quantize_array(w, kind, block_size=32, double_quant=double_quant)
        assert_same(jax.jit(decode_at)(q, indices), np.asarray(q.dequantize())[::-1])


# --------------------------------------------------------------------------------------------------
# A pytree, and no array


def test_repr():
    q = quantize_array(jnp.zeros((3, 4, 64), jnp.bfloat16), stacked=1)
    expected = "QuantizedArray(nf4, (3, 4, 64) bfloat16, blocks of 64, double)"
    assert repr(q) == expected
    assert repr(jax.eval_shape(lambda q: q, q)) == expected
    assert repr(jax.tree.map(lambda x: None, q)).startswith("QuantizedArray(nf4, (4, 64)")
    assert repr(jax.tree.map(lambda x: 0, q)).startswith("QuantizedArray(nf4, (4, 64)")
    q = quantize_array(jnp.zeros((4, 6)), "int8", block_size=None, channels=(1,))
    assert repr(q) == "QuantizedArray(int8, (4, 6) float32, by channel)"


def test_tree():
    q = quantize_array(jnp.ones((2, 64)))
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(q)]
    assert paths == [".codes", ".absmax", ".absmax_scale", ".absmax_offset"]
    assert len(jax.tree.leaves(quantize_array(jnp.ones((2, 64)), double_quant=False))) == 2


def test_export():
    q = quantize_array(draw(5, 3, dtype=jnp.bfloat16))
    c = quantize_array(draw(5, 3), "int8", block_size=None, channels=(1,))
    exported = jax.export.export(jax.jit(lambda q, c: (q.dequantize(), c.dequantize())))(q, c)
    again = jax.export.deserialize(exported.serialize())
    assert_same(again.call(q, c), (q.dequantize(), c.dequantize()))


# --------------------------------------------------------------------------------------------------
# Errors

W = jnp.zeros((4, 64))


@pytest.mark.parametrize(
    ("w", "options", "match"),
    [
        (W, {"kind": "nf3"}, r"got kind='nf3', expected one of 'nf4', 'fp4', 'int8'"),
        (
            W,
            {"block_size": 63},
            r"got block_size=63 for .nf4., expected an integer .*even .*knows 32, 64",
        ),
        (W, {"block_size": 0}, r"got block_size=0 for .nf4., expected an integer"),
        (W, {"block_size": 64.0}, r"got block_size=64.0 for .nf4., expected"),
        (W, {"block_size": True}, r"got block_size=True for .nf4., expected"),
        (W, {"block_size": None}, r"got block_size=None with kind='nf4'.*for instance block_s"),
        (W, {"kind": "int8", "block_size": None}, r"channels=None, expected .*channels=\(1,\)"),
        (W, {"kind": "int8", "channels": (1,)}, r"and block_size=64, expected one of them"),
        (W, {"kind": "int8", "block_size": None, "channels": (2,)}, r"distinct dims of \(4, 64\)"),
        (W, {"kind": "int8", "block_size": None, "channels": (1, -1)}, r"expected distinct dims"),
        (W, {"stacked": 3}, r"got stacked=3 for an array of shape \(4, 64\).*from 0 to 2"),
        (W, {"stacked": -1}, r"got stacked=-1"),
        (jnp.zeros((4, 64), jnp.int8), {}, r"got int8, expected an array of float16, bfloat16 or"),
        (np.zeros((4, 64)), {}, r"got float64, expected .*Convert it first"),
        ([1.0, 2.0], {}, r"got list, expected an array"),
    ],
)
def test_bad_input(w: Any, options: dict[str, Any], match: str):
    with pytest.raises(TargetError, match=match):
        quantize_array(w, **options)


def test_a_shape_without_data():
    with pytest.raises(TargetError, match=r"without data.*eval_shape"):
        quantize_array(jax.ShapeDtypeStruct((2, 64), jnp.float32))


def test_already_quantised():
    q = quantize_array(W)
    with pytest.raises(TargetError, match=r"got QuantizedArray\(nf4.*quantised already"):
        quantize_array(q)


def test_parts_that_do_not_fit():
    q = quantize_array(W)
    with pytest.raises(TargetError, match=r"got absmax of shape \(3, 1\), expected \(4, 1\)"):
        dataclasses.replace(q, absmax=q.absmax[:3])
    with pytest.raises(TargetError, match=r"got absmax_offset of shape \(\), expected None"):
        dataclasses.replace(q, absmax_scale=None)
