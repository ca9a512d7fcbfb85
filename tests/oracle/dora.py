"""Writes tests/references/dora.npz: what PEFT's DoRA computes, in float64.

    python -m venv oracle && oracle/bin/pip install torch peft
    oracle/bin/python tests/oracle/dora.py

For a linear layer, an embedding and a convolution: the weight, A, B, the magnitude (all random), an
input, PEFT's output, and its gradients of A, B and the magnitude for the loss sum(sin(output)). The
linear layer and the convolution also in training, under dropout with a given mask.
"""

from __future__ import annotations

import pathlib

import numpy as np
import peft
import torch
from torch import nn

OUT = pathlib.Path(__file__).parent.parent / "references" / "dora.npz"
RANK, ALPHA, RATE = 2, 3.0, 0.5


class Masked(nn.Module):
    """Dropout with a mask that is known."""

    def __init__(self, mask: torch.Tensor):
        super().__init__()
        self.mask = mask

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.mask / (1 - RATE)


class Model(nn.Module):
    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def run(name: str, layer: nn.Module, x: torch.Tensor, mask: torch.Tensor | None) -> dict:
    config = peft.LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        target_modules=["layer"],
        use_dora=True,
        lora_dropout=RATE if mask is not None else 0.0,
    )
    model = peft.get_peft_model(Model(layer.double()), config).double()
    model.train(mask is not None)
    wrapped = model.base_model.model.layer
    generator = torch.Generator().manual_seed(1)
    trained = {k: p for k, p in model.named_parameters() if p.requires_grad}
    kinds = {"lora_A": "a", "lora_embedding_A": "a", "lora_B": "b", "lora_embedding_B": "b"}
    kinds |= {"lora_magnitude_vector": "m"}
    named = {next(v for k, v in kinds.items() if f".{k}." in key): p for key, p in trained.items()}
    assert sorted(named) == ["a", "b", "m"]
    for p in named.values():
        p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64)
    if mask is not None:
        wrapped.lora_dropout["default"] = Masked(mask)
    y = model(x)
    y.sin().sum().backward()
    found = {"w": wrapped.get_base_layer().weight.detach().clone(), "x": x, "y": y}
    found |= named | {f"d{k}": p.grad for k, p in named.items()}
    if mask is not None:
        found["mask"] = mask
    else:
        wrapped.merge()
        found["merged"] = wrapped.get_base_layer().weight
    return {f"{name}/{key}": value.detach().numpy().copy() for key, value in found.items()}


def main() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 6, dtype=torch.float64)
    image = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    tokens = torch.tensor([[1, 4, 0], [3, 3, 6]])
    out: dict[str, np.ndarray] = {}
    for suffix in ("", "_dropout"):

        def mask(x: torch.Tensor, suffix: str = suffix) -> torch.Tensor | None:
            return (torch.rand(x.shape) < 1 - RATE).double() if suffix else None

        out |= run(f"linear{suffix}", nn.Linear(6, 5, bias=False), x, mask(x))
        conv = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        out |= run(f"conv{suffix}", conv, image, mask(image))
    out |= run("embedding", nn.Embedding(7, 5), tokens, None)
    np.savez_compressed(OUT, **out)
    print(f"{OUT}: {OUT.stat().st_size / 1024:.1f} KiB")


if __name__ == "__main__":
    main()
