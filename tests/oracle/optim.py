"""Writes tests/references/optim.npz: steps of bitsandbytes' AdamW8bit and of PEFT's LoRA+.

Run by a developer, where torch, peft and bitsandbytes are installed (written with torch 2.13, peft
0.21.2, bitsandbytes 0.50.2, on a CPU with AVX2), from the root of the repository:

    python tests/oracle/optim.py

`code/signed`, `code/unsigned`: what `create_dynamic_map` returns.

`adamw/...`: AdamW8bit on a leaf `large`, (3, 199), three blocks of 256, the last of them partly
filled, in 8 bits since `min_8bit_size` is 512, and a leaf `small`, (7, 11), in float32. The params
`start/LEAF`; then for each step K `K/gradient/LEAF`, `K/param/LEAF`, and the state: `K/mu/LEAF`,
`K/nu/LEAF` (codes or moments), `K/mu_absmax/large`, `K/nu_absmax/large`. Gradients span nine
decades; the first one of the second block is zero.

The quantizer is the one that bitsandbytes has for all devices without a kernel of their own. The
compiled one for CPUs is looked up in 65,536 equal bins, and so is not exact near zero: it takes
1e-6 of a block's absmax for 2.1e-5.

`loraplus/...`: three steps of torch's AdamW as `create_loraplus_optimizer` sets it up, on a model
of an embedding (9, 6) and a linear layer (6, 8) with adapters of rank 2, in jaxlora's layout: a
(inputs, rank), b (rank, outputs). `start/LAYER/a`; for each step K `K/gradient/LAYER/a`;
`end/LAYER/a`; b likewise.
"""

from __future__ import annotations

import pathlib

REFERENCES = pathlib.Path(__file__).parent.parent / "references"
ADAMW = {"lr": 0.02, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
LORA_PLUS = {
    "lr": 0.01,
    "loraplus_lr_ratio": 8.0,
    "loraplus_lr_embedding": 0.003,
    "loraplus_weight_decay": 0.1,
}
SHAPES = {"large": (3, 199), "small": (7, 11)}


def main() -> None:
    import bitsandbytes.functional
    import numpy as np

    code = {
        f"code/{name}": bitsandbytes.functional.create_dynamic_map(signed).numpy()
        for name, signed in (("signed", True), ("unsigned", False))
    }
    np.savez_compressed(REFERENCES / "optim.npz", **code, **adamw_8bit(), **lora_plus())


def adamw_8bit() -> dict:
    import numpy as np
    import torch
    from bitsandbytes.backends.cpu import ops
    from bitsandbytes.optim import AdamW8bit

    quantize = torch.ops.bitsandbytes.quantize_blockwise.default
    default = torch._C.DispatchKey.CompositeExplicitAutograd

    def store(x, code, absmax, codes, blocksize):
        found = quantize._op_dk(default, x, code, blocksize)
        codes.copy_(found[0])
        absmax.copy_(found[1])

    ops._quant_blockwise_fp32_direct = store

    rng = np.random.default_rng(0)
    draw = lambda shape: rng.standard_normal(shape).astype(np.float32)
    params = {name: torch.nn.Parameter(torch.tensor(draw(s))) for name, s in SHAPES.items()}
    optimizer = AdamW8bit(list(params.values()), min_8bit_size=512, **ADAMW)
    found = {f"adamw/start/{name}": p.detach().numpy().copy() for name, p in params.items()}
    for k in range(1, 4):
        for name, p in params.items():
            gradient = draw(p.shape) * np.float32(10) ** rng.uniform(-9, 0, p.shape)
            gradient = gradient.astype(np.float32)
            gradient.reshape(-1)[300:512] = 0 if k < 2 else 1e-4
            gradient.reshape(-1)[256:300] = 0
            p.grad = torch.tensor(gradient)
            found[f"adamw/{k}/gradient/{name}"] = gradient
        optimizer.step()
        for name, p in params.items():
            state = optimizer.state[p]
            found[f"adamw/{k}/param/{name}"] = p.detach().numpy().copy()
            for ours, theirs in (
                ("mu", "state1"),
                ("nu", "state2"),
                ("mu_absmax", "absmax1"),
                ("nu_absmax", "absmax2"),
            ):
                if theirs in state:
                    found[f"adamw/{k}/{ours}/{name}"] = state[theirs].numpy().copy()
    assert found["adamw/1/mu/large"].dtype == np.uint8
    assert found["adamw/1/mu/small"].dtype == np.float32
    return found


def lora_plus() -> dict:
    import numpy as np
    import peft
    import torch
    from peft.optimizers import create_loraplus_optimizer

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = torch.nn.Embedding(9, 6)
            self.up = torch.nn.Linear(6, 8)

        def forward(self, ids):
            return self.up(self.embed(ids))

    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["embed", "up"])
    model = peft.get_peft_model(Model(), config)
    optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, **LORA_PLUS)
    named = {
        "embed/a": model.base_model.model.embed.lora_embedding_A["default"],
        "embed/b": model.base_model.model.embed.lora_embedding_B["default"],
        "up/a": model.base_model.model.up.lora_A["default"].weight,
        "up/b": model.base_model.model.up.lora_B["default"].weight,
    }
    rng = np.random.default_rng(1)
    found = {f"loraplus/start/{name}": p.detach().numpy().T.copy() for name, p in named.items()}
    for k in range(1, 4):
        for name, p in named.items():
            p.grad = torch.tensor(rng.standard_normal(p.shape).astype(np.float32))
            found[f"loraplus/{k}/gradient/{name}"] = p.grad.numpy().T.copy()
        optimizer.step()
    return found | {f"loraplus/end/{name}": p.detach().numpy().T for name, p in named.items()}


if __name__ == "__main__":
    main()
