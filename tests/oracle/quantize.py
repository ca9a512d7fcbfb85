"""Writes tests/references/quantize.npz: what bitsandbytes stores of some arrays, and reads again.

Run by a developer, where torch and bitsandbytes are installed (written with torch 2.13 and
bitsandbytes 0.50.2, on a CPU with AVX-512), from the root of the repository:

    python tests/oracle/quantize.py

`input/NAME`: the arrays; those whose name ends in `bfloat16` in float32, of which they are exact.

`NAME/KIND/BLOCK_SIZE/...`: `codes` and `absmax` of `quantize_4bit`, and, of blocks of 64,
`dequantized`, in the input's dtype (bfloat16 widened to float32). Arrays whose rows whole blocks do
not fill are flat: where AVX-512 is used, bitsandbytes' CPU kernel takes the wrong absmax for rows
of a multiple of 16 that they do not fill.

`double/NAME/KIND/BLOCK_SIZE/...`: the same with double quantisation: `offset`, `absmax` (codes of
the absmaxes), `scale` (their scales) and `dequantized`. The 8-bit quantiser is the one that
bitsandbytes has for all devices without a kernel of their own, with exactly rounded codes, as in
CUDA. `compiled` are the codes of the compiled one for CPUs, which first rounds to 65,536 steps.

`int8/NAME/codes`, `absmax`, `dequantized`: of `int8_vectorwise_quant`, by rows.

Inputs have what decides about bits: outliers, blocks of zeros, midpoints between table entries
times a power of two (ties) and their neighbours, subnormal and largest float16. Where absmaxes
are quantised too, they have few bits, so that their sum is the same in any order. For the same
reason no float32 is subnormal: XLA takes them for zero on CPUs.
"""

from __future__ import annotations

import pathlib

REFERENCES = pathlib.Path(__file__).parent.parent / "references"
BLOCK_SIZES = {
    "rows": (32, 64, 128, 4096),
    "odd": (64,),
    "line_float16": (64,),
    "line_bfloat16": (64,),
    "many_bfloat16": (32,),
}


def main() -> None:
    import numpy as np

    arrays = inputs()
    found = {f"input/{name}": x for name, x in arrays.items()}
    for name, sizes in BLOCK_SIZES.items():
        for size in sizes:
            for kind in ("nf4", "fp4")[: 1 if name.startswith("many") else 2]:
                found |= four_bits(arrays[name], name, kind, size)
    found |= eight_bits(arrays["channels_float16"])
    np.savez_compressed(REFERENCES / "quantize.npz", **found)


def inputs() -> dict:
    import numpy as np
    import torch
    from bitsandbytes.functional import get_4bit_type

    rng = np.random.default_rng(0)

    def draw(*shape):
        outliers = np.where(rng.random(shape) < 0.02, 20, 1)
        return (0.02 * outliers * rng.standard_normal(shape)).astype(np.float32)

    def bfloat16(x):
        return torch.tensor(x).bfloat16().float().numpy()

    rows = draw(8, 128)
    for i, (kind, absmax) in enumerate((("nf4", 1), ("nf4", 0.25), ("fp4", 1), ("fp4", 8))):
        table = get_4bit_type(kind, device="cpu").sort().values.numpy()
        middles = (table[:-1] + table[1:]) / 2
        near = [np.nextafter(middles, np.float32(to)) for to in (-2, 2)]
        near = [np.where(np.abs(x) < 1e-30, 1e-30 * np.sign(x), x) for x in near]  # XLA flushes
        rows[i, :45] = np.concatenate([middles, *near])
        rows[i, 45:64] = rng.uniform(-0.02, 0.02, 19)
        rows[i, 63] = 1 if i % 2 else -1
        rows[i, :64] *= absmax
    rows[4, :64] = 0
    rows[5, 64:] = 0
    rows[5, 70] = -0.0

    line = (draw(500) * 2**14).astype(np.float16)
    line[:4] = [65504, -65504, 6e-8, -6e-5]
    line[64:128] = 0
    line[448:] = 0  # a block that is not full

    many = np.zeros((70, 160), np.float32)  # 350 blocks of 32: two groups
    absmax = rng.integers(1, 2**9, 350) * np.where(rng.random(350) < 0.02, 16, 1)
    many.reshape(350, 32)[np.arange(350), rng.integers(0, 32, 350)] = absmax / 2**10
    channels = draw(8, 48).astype(np.float16)
    channels[0] = np.arange(48) - 23.5
    channels[0, 0] = 127  # all of this row are ties
    channels[1] = 0
    channels[2] *= np.float16(1e-4)
    channels[3, 5] = 65504
    return {
        "rows": rows,
        "odd": draw(5, 7, 3),
        "line_float16": line,
        "line_bfloat16": bfloat16(draw(125, 4)),
        "many_bfloat16": bfloat16(many),
        "channels_float16": channels,
    }


def four_bits(array, name: str, kind: str, size: int) -> dict:
    import bitsandbytes.functional as F
    import torch

    x = torch.tensor(array)
    if name.endswith("bfloat16"):
        x = x.bfloat16()
    if x.shape[-1] % size:
        x = x.reshape(-1)
    numpy = lambda t: (t.float() if t.dtype == torch.bfloat16 else t).numpy().copy()
    codes, state = F.quantize_4bit(x, blocksize=size, quant_type=kind)
    key = f"{name}/{kind}/{size}"
    found = {
        f"{key}/codes": numpy(codes).reshape(-1),
        f"{key}/absmax": numpy(state.absmax),
    }
    if size == 64:
        values = F.dequantize_4bit(codes, state)
        found[f"{key}/dequantized"] = numpy(values).reshape(array.shape)
    if not name.endswith("float16"):
        return found
    quantize = torch.ops.bitsandbytes.quantize_blockwise.default
    portable = torch._C.DispatchKey.CompositeExplicitAutograd
    offset = state.absmax.mean()
    code = F.create_dynamic_map()
    nested, scale = quantize._op_dk(portable, state.absmax - offset, code, 256)
    compiled = F.quantize_4bit(x, blocksize=size, quant_type=kind, compress_statistics=True)[1]
    assert compiled.offset == offset
    compiled_codes = compiled.absmax.clone()
    compiled.absmax = nested
    compiled.state2.absmax = scale
    values = F.dequantize_4bit(codes, compiled)
    return found | {
        f"double/{key}/offset": numpy(offset),
        f"double/{key}/absmax": numpy(nested),
        f"double/{key}/scale": numpy(scale),
        f"double/{key}/compiled": numpy(compiled_codes),
        f"double/{key}/dequantized": numpy(values).reshape(array.shape),
    }


def eight_bits(array) -> dict:
    import bitsandbytes.functional as F
    import torch

    codes, absmax, _ = F.int8_vectorwise_quant(torch.tensor(array))
    values = F.int8_vectorwise_dequant(codes, absmax)
    key = "int8/channels_float16"
    return {
        f"{key}/codes": codes.numpy(),
        f"{key}/absmax": absmax.numpy(),
        f"{key}/dequantized": values.numpy(),
    }


if __name__ == "__main__":
    main()
