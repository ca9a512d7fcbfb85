"""What PEFT's `add_weighted_adapter` makes of three small layers, for tests/test_adapters.py.

Run it by hand, with torch and peft (0.21.2) installed, from the root of the repository:

    python tests/oracle/adapters.py

It writes tests/references/adapters.npz: `values`, all tensors end to end, and `shapes`, a JSON of
{name: shape} in their order (with an entry for each, the file is four times as large). All are
matrices in jaxlora's layout: a (inputs, rank), b (rank, outputs), what an adapter adds to W
(inputs, outputs), and masks alike. Inputs of the convolution are (channel, row, column), fused.
The names:

    LAYER/adapter/NAME/a, b, scale        the adapters (scale: PEFT's `scaling`)
    LAYER/sum/CASE/a, b                   the result's factors, where factors are added
    LAYER/sum/CASE/product                scaling * a b of the result
    LAYER/sum/CASE/scale                  the result's `scaling`
    LAYER/sum/CASE/mask/K                 the K-th mask that dare drew for this layer
"""

from __future__ import annotations

import json
import pathlib
from typing import Any

import numpy as np

ADAPTERS = {
    # name: (rank, alpha, rank-stabilized, layers)
    "one": (3, 6.0, False, ["linear", "conv", "embedding"]),
    "two": (3, 3.0, False, ["linear", "conv", "embedding"]),
    "three": (3, 4.5, False, ["linear", "conv"]),
    "small": (2, 5.0, False, ["linear", "conv", "embedding"]),
    "stable_one": (3, 2.0, True, ["linear", "conv", "embedding"]),
    "stable_two": (3, 4.0, True, ["linear", "conv", "embedding"]),
}
THREE = (["one", "two", "three"], [0.7, -0.4, 1.2])
UNEQUAL = (["one", "small"], [1.5, -0.8])
STABLE = (["stable_one", "stable_two"], [0.6, 0.9])
CASES = {
    # name: ((adapters, weights), combination_type, other arguments)
    "cat": (THREE, "cat", {}),
    "linear": (THREE, "linear", {}),
    "svd": (THREE, "svd", {"svd_rank": 2}),
    "ties": (THREE, "ties", {"density": 0.6}),
    "ties_frequency": (THREE, "ties", {"density": 0.6, "majority_sign_method": "frequency"}),
    "ties_svd": (THREE, "ties_svd", {"density": 0.6, "svd_rank": 2}),
    "ties_svd_frequency": (
        THREE,
        "ties_svd",
        {"density": 0.6, "svd_rank": 2, "majority_sign_method": "frequency"},
    ),
    "dare_linear": (THREE, "dare_linear", {"density": 0.6}),
    "dare_linear_svd": (THREE, "dare_linear_svd", {"density": 0.6, "svd_rank": 2}),
    "dare_ties": (THREE, "dare_ties", {"density": 0.6}),
    "dare_ties_svd": (THREE, "dare_ties_svd", {"density": 0.6, "svd_rank": 2}),
    "magnitude_prune": (THREE, "magnitude_prune", {"density": 0.6}),
    "magnitude_prune_svd": (THREE, "magnitude_prune_svd", {"density": 0.6, "svd_rank": 2}),
    "unequal_cat": (UNEQUAL, "cat", {}),
    "unequal_svd": (UNEQUAL, "svd", {}),
    "stable_cat": (STABLE, "cat", {}),
    "stable_linear": (STABLE, "linear", {}),
}
FACTORS = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")


def main() -> None:
    import peft
    import torch

    model = torch.nn.ModuleDict(
        {
            "linear": torch.nn.Linear(6, 4),
            "conv": torch.nn.Conv2d(2, 4, (3, 1)),
            "embedding": torch.nn.Embedding(6, 4),
        }
    )
    rng = np.random.default_rng(0)
    peft_model: Any = None
    for name, (rank, alpha, stable, layers) in ADAPTERS.items():
        config = peft.LoraConfig(
            r=rank, lora_alpha=alpha, use_rslora=stable, target_modules=layers, bias="none"
        )
        if peft_model is None:
            peft_model = peft.get_peft_model(model, config, adapter_name=name)
        else:
            peft_model.add_adapter(name, config)
    tuner = peft_model.base_model
    layers = {name: tuner.model[name] for name in ("linear", "conv", "embedding")}

    saved: dict[str, np.ndarray] = {}
    for layer, module in layers.items():
        for name in ADAPTERS:
            if name in module.scaling:
                for tensor in factors(layer, module, name):
                    noise = 0.5 * rng.standard_normal(tuple(tensor.shape))
                    tensor.data = torch.tensor(noise, dtype=torch.float32)
                a, b = (as_matrix(layer, t) for t in factors(layer, module, name))
                saved |= {f"{layer}/adapter/{name}/a": a.T, f"{layer}/adapter/{name}/b": b.T}
                saved[f"{layer}/adapter/{name}/scale"] = np.float32(module.scaling[name])

    for case, ((names, weights), method, options) in CASES.items():
        masks: list[np.ndarray] = []

        def bernoulli(p: Any, masks: list[np.ndarray] = masks) -> Any:
            masks.append(rng.random(tuple(p.shape)) < p.numpy())
            return torch.tensor(masks[-1], dtype=p.dtype)

        original, torch.bernoulli = torch.bernoulli, bernoulli
        tuner.add_weighted_adapter(names, weights, case, combination_type=method, **options)
        torch.bernoulli = original
        for layer, module in tuner_order(tuner):
            prefix = f"{layer}/sum/{case}"
            a, b = (as_matrix(layer, t) for t in factors(layer, module, case))
            if method in FACTORS:
                saved |= {f"{prefix}/a": a.T, f"{prefix}/b": b.T}
            product = as_matrix(layer, module.get_delta_weight(case))
            saved[f"{prefix}/product"] = product if layer == "embedding" else product.T
            saved[f"{prefix}/scale"] = np.float32(module.scaling[case])
            if method.startswith("dare"):
                count = sum(name in module.scaling for name in names)
                count *= 2 if method in FACTORS else 1
                for k, mask in enumerate(masks[:count]):
                    mask = as_matrix(layer, mask)
                    is_product = layer == "embedding" and method not in FACTORS
                    saved[f"{prefix}/mask/{k}"] = mask if is_product else mask.T
                del masks[:count]
        assert not masks
    path = pathlib.Path(__file__).parent.parent / "references" / "adapters.npz"
    shapes = json.dumps({name: np.shape(x) for name, x in saved.items()})
    values = np.concatenate([np.ravel(x).astype(np.float32) for x in saved.values()])
    np.savez_compressed(path, values=values, shapes=shapes)
    print(f"{path.name}: {len(saved)} arrays, {path.stat().st_size:,} bytes")


def tuner_order(tuner: Any) -> list[tuple[str, Any]]:
    """The layers in the order in which PEFT merges them."""
    return [
        (name.removeprefix("model."), module)
        for name, module in tuner.named_modules()
        if name in ("model.linear", "model.conv", "model.embedding")
    ]


def factors(layer: str, module: Any, name: str) -> tuple[Any, Any]:
    """PEFT's A (rank, inputs...) and B (outputs, rank, ...)."""
    if layer == "embedding":
        return module.lora_embedding_A[name], module.lora_embedding_B[name]
    return module.lora_A[name].weight, module.lora_B[name].weight


def as_matrix(layer: str, tensor: Any) -> np.ndarray:
    array = tensor if isinstance(tensor, np.ndarray) else tensor.detach().numpy()
    return array.reshape(array.shape[0], -1)


if __name__ == "__main__":
    main()
