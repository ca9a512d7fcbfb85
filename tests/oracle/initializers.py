"""Writes tests/references/initializers.npz: what PEFT's initializers make of small linear layers.

Run by a developer, where torch, peft, bitsandbytes and attrs are installed (written with torch
2.13, peft 0.21.2, bitsandbytes 0.50.2, on a CPU), from the root of the repository:

    python tests/oracle/initializers.py

Of each method `m`: `m/base`, `m/A`, `m/B` are PEFT's, in torch's orientation: base (O, I),
A (R, I), B (O, R). `weight` is what all start from, (O, I); `inputs` and `gradient` are the data;
the scale is 1.5, for loftq 1. Of EVA's three layers: `eva/<layer>/inputs`, `A`, `scale`.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import pathlib

REFERENCES = pathlib.Path(__file__).parent.parent / "references"
N_IN, N_OUT, RANK, ALPHA = 9, 8, 2, 3
GRADIENTS = [("ArB2r", "stable"), ("A2rBr", "gd_scale"), ("ArBr", "weight_svd"), ("ArB2r", "unit")]


def main() -> None:
    import numpy as np
    import peft
    import torch
    from peft.tuners.lora import LoraGAConfig, preprocess_loraga
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    torch.manual_seed(0)
    u, _, vt = torch.linalg.svd(torch.randn(N_OUT, N_IN), full_matrices=False)
    weight = u @ torch.diag(4 * 0.6 ** torch.arange(N_OUT)) @ vt  # gaps: few iterations suffice
    inputs = torch.randn(40, N_IN) * 0.7 ** torch.arange(N_IN) + 0.3
    cotangent = torch.randn(40, N_OUT)
    found = {"weight": weight.numpy(), "inputs": inputs.numpy()}

    def model() -> torch.nn.Module:
        linear = torch.nn.Linear(N_IN, N_OUT, bias=False)
        linear.weight.data = weight.clone()
        return torch.nn.Sequential(linear)

    def config(init, **more) -> peft.LoraConfig:
        settings = {"r": RANK, "lora_alpha": ALPHA, "target_modules": ["0"]} | more
        return peft.LoraConfig(init_lora_weights=init, **settings)

    def keep(name: str, base: torch.nn.Module, settings: peft.LoraConfig) -> None:
        layer = peft.get_peft_model(base, settings).base_model.model[0]
        found[f"{name}/base"] = layer.base_layer.weight.detach().numpy()
        found[f"{name}/A"] = layer.lora_A["default"].weight.detach().numpy()
        found[f"{name}/B"] = layer.lora_B["default"].weight.detach().numpy()

    for name in ("pissa", "pissa_niter_16", "olora"):
        keep(name, model(), config(name))
    keep("orthogonal", model(), config("orthogonal", r=4))

    for mode in ("ipm", "kpm"):
        base, settings = model(), config("corda", corda_config=CordaConfig(corda_method=mode))
        preprocess_corda(base, settings, run_model=lambda base=base: base(inputs))
        keep(f"corda_{mode}", base, settings)

    for direction, scale in GRADIENTS:
        ga = LoraGAConfig(direction=direction, scale=scale)
        base, settings = model(), config("lora_ga", lora_ga_config=ga)
        preprocess_loraga(
            base, settings, lambda base=base: (base(inputs) * cotangent).sum().backward()
        )
        found["gradient"] = base[0]._peft_loraga_grad.numpy().copy()
        keep(f"lora_ga_{direction}_{scale}", base, settings)

    import bitsandbytes

    found["nf4"] = bitsandbytes.functional.get_4bit_type("nf4", device="cpu").numpy()
    for iterations in (1, 3):
        loftq = {"loftq_bits": 4, "loftq_iter": iterations}
        with everything_on_the_cpu():
            settings = config("loftq", lora_alpha=RANK, loftq_config=loftq)
            keep(f"loftq_{iterations}", model(), settings)

    wide = torch.nn.Sequential(torch.nn.Linear(4096, 3))
    layer = peft.get_peft_model(wide, config("gaussian", r=8)).base_model.model[0]
    found["gaussian/std"] = layer.lora_A["default"].weight.detach().std().numpy()
    wide = torch.nn.Sequential(torch.nn.Linear(4096, 3))
    layer = peft.get_peft_model(wide, config("orthogonal", r=8)).base_model.model[0]
    found["orthogonal/std"] = layer.lora_A["default"].weight.detach().std().numpy()

    found |= eva(torch, peft)
    np.savez_compressed(REFERENCES / "initializers.npz", **found)


def eva(torch, peft) -> dict:
    """Three layers in a row, and what EVA gives each: `eva/<layer>/A`, of its own rank."""
    from peft.tuners.lora import EvaConfig, initialize_lora_eva_weights

    torch.manual_seed(1)
    sizes = (12, 12, 10, 3)
    layers = [torch.nn.Linear(n, m) for n, m in itertools.pairwise(sizes)]
    layers[1].weight.data *= 3 * 0.5 ** torch.arange(12)
    base = torch.nn.Sequential(layers[0], torch.nn.Tanh(), layers[1], torch.nn.Tanh(), layers[2])
    x = torch.randn(24, 12) * 0.75 ** torch.arange(12) + 0.5
    found = {}

    def record(name):
        return lambda module, args, out: found.__setitem__(name, args[0].detach().numpy())

    hooks = [base[k].register_forward_hook(record(f"eva/{k}/inputs")) for k in (0, 2, 4)]
    base(x)
    for hook in hooks:
        hook.remove()

    for whiten in (False, True):
        settings = peft.LoraConfig(
            init_lora_weights="eva",
            r=RANK,
            lora_alpha=ALPHA,
            target_modules=["0", "2", "4"],
            eva_config=EvaConfig(rho=2.0, tau=0.99, whiten=whiten),
        )
        model = peft.get_peft_model(copy.deepcopy(base), settings)
        initialize_lora_eva_weights(
            model,
            [{"x": x}],
            forward_fn=lambda model, inputs: model(inputs["x"]),
            prepare_model_inputs_fn=None,
            prepare_layer_inputs_fn=None,
            show_progress_bar=False,
        )
        for k in (0, 2, 4):
            layer = model.base_model.model[k]
            name = f"eva{'_white' * whiten}/{k}"
            adapted = hasattr(layer, "lora_A")
            a = layer.lora_A["default"].weight.detach().numpy() if adapted else x[:0].numpy()
            found[f"{name}/A"] = a
            if adapted:
                found[f"{name}/scale"] = torch.tensor(layer.scaling["default"]).numpy()
    return found


@contextlib.contextmanager
def everything_on_the_cpu():
    """PEFT's LoftQ asks for a GPU by name; its arithmetic does not need one."""
    import torch

    there = torch.Tensor.to

    def here(self, *args, **kwargs):
        args = tuple("cpu" if str(x) == "cuda" else x for x in args)
        kwargs = {k: "cpu" if str(x) == "cuda" else x for k, x in kwargs.items()}
        return there(self, *args, **kwargs)

    torch.Tensor.to = here
    try:
        yield
    finally:
        torch.Tensor.to = there


if __name__ == "__main__":
    main()
