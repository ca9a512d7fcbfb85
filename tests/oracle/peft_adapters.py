"""Adapters that PEFT wrote, with the base, the inputs and what PEFT's model gives for them.

    python tests/oracle/peft_adapters.py            # writes tests/references/peft/<name>/
    python tests/oracle/peft_adapters.py --check D  # D/<name>/, saved by jaxlora: PEFT loads them,
                                                    # uses every key, and gives the same

Needs torch, peft 0.21.2, transformers 5; the tests need only the files.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import shutil
import warnings

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import peft
import torch
import transformers
from torch import nn

HERE = pathlib.Path(__file__).resolve().parent.parent / "references" / "peft"
TOKENS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 8]])


class Layers(nn.Module):
    """An embedding, a linear layer, and convolutions of one and two dims."""

    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(11, 4)
        self.lin = nn.Linear(4, 6)
        self.conv1 = nn.Conv1d(6, 5, 3)
        self.conv2 = nn.Conv2d(2, 3, (3, 2))

    def forward(self, tokens):
        h = self.lin(torch.tanh(self.emb(tokens)))
        one = self.conv1(torch.tanh(h).transpose(1, 2))  # (B, 5, T - 2)
        two = self.conv2(torch.tanh(h).reshape(2, 2, 5, 3))
        return torch.cat([one.flatten(), two.flatten()])


class Linears(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(11, 6)
        self.up = nn.Linear(6, 8)
        self.down = nn.Linear(8, 6, bias=False)

    def forward(self, tokens):
        return self.down(torch.tanh(self.up(self.emb(tokens))))


class Experts(nn.Module):
    """Parameters of three experts: (E, out, in), as transformers has them."""

    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 8, 6) / 2)
        self.down = nn.Parameter(torch.randn(3, 6, 8) / 2)

    def forward(self, x):
        return torch.einsum(
            "...eh,eoh->...o", torch.tanh(torch.einsum("...i,ehi->...eh", x, self.up)), self.down
        )


class Mixture(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(11, 6)
        self.experts = Experts()

    def forward(self, tokens):
        return self.experts(self.emb(tokens))


def llama(tied=False):
    config = transformers.LlamaConfig(
        vocab_size=12,
        hidden_size=16,
        intermediate_size=20,
        num_hidden_layers=1 if tied else 2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=16,
        tie_word_embeddings=tied,
        initializer_range=0.3,
    )
    return transformers.LlamaForCausalLM(config)


def gpt2():
    config = transformers.GPT2Config(
        vocab_size=12,
        n_embd=12,
        n_layer=2,
        n_head=2,
        n_positions=8,
        initializer_range=0.3,
        resid_pdrop=0,
        embd_pdrop=0,
        attn_pdrop=0,
    )
    return transformers.GPT2LMHeadModel(config)


def bert():
    config = transformers.BertConfig(
        vocab_size=12,
        hidden_size=12,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=8,
        initializer_range=0.3,
        num_labels=3,
    )
    return transformers.BertForSequenceClassification(config)


# name: the model, and PEFT's configuration
CASES = {
    "llama": (
        llama,
        {
            "r": 4,
            "lora_alpha": 6,
            "use_rslora": True,
            "task_type": "CAUSAL_LM",
            "target_modules": ["q_proj", "v_proj", "gate_proj", "down_proj"],
            "rank_pattern": {"layers.1.self_attn.q_proj": 2},
            "alpha_pattern": {"down_proj": 3},
        },
    ),
    "llama_layers": (
        llama,
        {
            "r": 2,
            "lora_alpha": 4,
            "target_modules": ["q_proj", "o_proj"],
            "layers_to_transform": [1],
            "layers_pattern": "layers",
        },
    ),
    "llama_tied": (
        lambda: llama(True),
        {
            "r": 2,
            "lora_alpha": 4,
            "target_modules": ["embed_tokens", "q_proj"],
            "ensure_weight_tying": True,
        },
    ),
    "gpt2": (
        gpt2,
        {
            "r": 3,
            "lora_alpha": 5,
            "target_modules": ["c_attn", "c_fc"],
            "fan_in_fan_out": True,
        },
    ),
    "bert": (
        bert,
        {
            "r": 2,
            "lora_alpha": 4,
            "target_modules": ["query", "dense"],
            "modules_to_save": ["classifier"],
            "exclude_modules": ["bert.pooler.dense"],
            "bias": "all",
            "task_type": "SEQ_CLS",
        },
    ),
    "layers": (
        Layers,
        {"r": 2, "lora_alpha": 3, "target_modules": ["emb", "lin", "conv1", "conv2"]},
    ),
    "dora": (
        Layers,
        {
            "r": 2,
            "lora_alpha": 3,
            "target_modules": ["emb", "lin", "conv1", "conv2"],
            "use_dora": True,
        },
    ),
    "lora_bias": (
        Layers,
        {
            "r": 2,
            "lora_alpha": 3,
            "target_modules": ["lin", "conv1", "conv2"],
            "lora_bias": True,
            "bias": "lora_only",
        },
    ),
    "tokens": (
        Linears,
        {
            "r": 2,
            "lora_alpha": 3,
            "target_modules": r".*\b(up|down)$",
            "trainable_token_indices": {"emb": [5, 1]},
        },
    ),
    "pissa": (
        Linears,
        {
            "r": 2,
            "lora_alpha": 3,
            "target_modules": ["up", "down"],
            "init_lora_weights": "pissa",
        },
    ),
    "olora": (
        Linears,
        {
            "r": 2,
            "lora_alpha": 3,
            "target_modules": ["up", "down"],
            "init_lora_weights": "olora",
        },
    ),
    "experts": (
        Mixture,
        {
            "r": 2,
            "lora_alpha": 3,
            "target_modules": [],
            "target_parameters": ["experts.down", "experts.up"],
            "rank_pattern": {"experts.down": 1},
        },
    ),
}


def output(model) -> np.ndarray:
    model.eval()
    with torch.no_grad():
        found = model(TOKENS)
    return getattr(found, "logits", found).numpy()


def base_of(name: str, folder: pathlib.Path):
    model = CASES[name][0]()
    saved = np.load(folder / "base.npz")
    state = {k: torch.tensor(saved[k]) for k in saved.files if not k.startswith("=")}
    missing = model.load_state_dict(state, strict=False).missing_keys
    assert set(missing) <= {"lm_head.weight"}, missing  # a tied head is there once
    return model


def write(name: str) -> None:
    torch.manual_seed(sorted(CASES).index(name))
    make, fields = CASES[name]
    model = make()
    for p in model.parameters():  # biases and norms that are not all 0 and 1
        if p.ndim == 1:
            p.data += 0.2 * torch.randn_like(p)
    base = {k: v.numpy().copy() for k, v in model.state_dict().items() if v.is_floating_point()}
    if name == "llama_tied":
        del base["lm_head.weight"]
    tuned = peft.get_peft_model(model, peft.LoraConfig(**fields))
    for key, p in tuned.named_parameters():
        if p.requires_grad:
            size = 0.2 if "lora_" in key else 0.1
            p.data += size * (p.data.abs().mean() + 0.5) * torch.randn_like(p)
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    tuned.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    config = json.loads((folder / "adapter_config.json").read_text())
    for field in ("target_modules", "exclude_modules"):  # sets, in an order that changes
        if isinstance(config[field], list):
            config[field] = sorted(config[field])
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n")
    expected = output(tuned)
    np.savez_compressed(
        folder / "base.npz", **base, **{"=expected": expected, "=tokens": TOKENS.numpy()}
    )
    again = peft.PeftModel.from_pretrained(base_of(name, folder), folder)
    print(f"{name}: reloaded, largest difference {np.abs(output(again) - expected).max():.2e}")


def check(root: pathlib.Path) -> None:
    for folder in sorted(p for p in root.iterdir() if (p / "adapter_config.json").exists()):
        name = folder.name.partition("-")[0]
        reference = HERE / name
        expected = np.load(reference / "base.npz")["=expected"]
        config = peft.PeftConfig.from_pretrained(folder)
        tuned = peft.get_peft_model(base_of(name, reference), config)
        result = tuned.load_adapter(folder, "default")
        missing = [k for k in result.missing_keys if "default" in k]
        odd = [*missing, *result.unexpected_keys]
        assert not odd, (name, odd)
        plain = peft.PeftModel.from_pretrained(base_of(name, reference), folder)
        error = np.abs(output(plain) - expected).max()
        print(f"{folder.name}: largest difference {error:.2e} of {np.abs(expected).max():.2f}")
        assert error < 1e-5 * max(1, np.abs(expected).max()), folder.name


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", type=pathlib.Path, help="a directory of saved adapters")
    arguments = parser.parse_args()
    if arguments.check:
        check(arguments.check)
    else:
        for each in CASES:
            write(each)
