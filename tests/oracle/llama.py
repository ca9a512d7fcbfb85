"""Logits of Transformers' models, for tests/test_llama.py.

    python tests/oracle/llama.py                     # writes tests/references/llama.npz
    python tests/oracle/llama.py --stories DIR       # ... stories260k.npz, of that HF directory
    python tests/oracle/llama.py --smollm2 FILE      # ... smollm2.npz, of that GGUF file (gguf)
    python tests/oracle/llama.py --check DIR         # DIR/<name>/, by tests/llama_models.py:
                                                     # Transformers and PEFT give the same logits

Needs torch, transformers 5, peft 0.21.2; the tests need only the files.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import sys
import tempfile
import warnings
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import torch
import transformers
from safetensors import safe_open

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from llama_models import FILE, weight

SMALL = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "attn_implementation": "eager",
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,  # so that of the four frequencies one is kept, one blended, two divided
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 40,
}
# name: (configuration class, fields)
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama3": (transformers.LlamaConfig, {"rope_parameters": LLAMA3, "eos_token_id": [2, 3]}),
    "llama_biases": (
        transformers.LlamaConfig,
        {
            "attention_bias": True,
            "mlp_bias": True,
            "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
        },
    ),
    "smollm2": (
        transformers.LlamaConfig,
        {
            "hidden_size": 36,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
        },
    ),
    "mistral": (transformers.MistralConfig, {"sliding_window": 4, "head_dim": 6}),
    "qwen2": (transformers.Qwen2Config, {"tie_word_embeddings": True, "rope_theta": 1e6}),
    "qwen2_window": (
        transformers.Qwen2Config,
        {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1},
    ),
    "qwen3": (transformers.Qwen3Config, {"tie_word_embeddings": True, "head_dim": 10}),
}


def logits_of(model: Any, tokens: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    options = {}
    if mask is not None:
        at = np.maximum(mask.cumsum(axis=1) - 1, 0)
        options = {"attention_mask": torch.tensor(mask), "position_ids": torch.tensor(at)}
    with torch.no_grad():
        return model(torch.tensor(tokens), **options).logits.numpy()


def small() -> None:
    cases, arrays = {}, {}
    for seed, (name, (kind, fields)) in enumerate(CASES.items()):
        model = transformers.AutoModelForCausalLM.from_config(kind(**(SMALL | fields))).eval()
        with torch.no_grad():
            for key, value in model.named_parameters():
                value.copy_(torch.tensor(weight(key, tuple(value.shape))))
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            config = json.loads((pathlib.Path(folder) / "config.json").read_text())
            with safe_open(f"{folder}/model.safetensors", "np") as file:
                shapes = {k: file.get_slice(k).get_shape() for k in sorted(file.keys())}
        start = 3
        tokens = np.random.RandomState(seed).randint(1, 40, (2, 9))
        mask = np.ones_like(tokens)
        mask[1, :start] = 0
        arrays[f"{name}/tokens"] = tokens.astype(np.int32)
        arrays[f"{name}/logits"] = logits_of(model, tokens)
        arrays[f"{name}/padded"] = logits_of(model, tokens * mask, mask)[1, start:]
        cases[name] = {"config": config, "shapes": shapes, "start": start}
        print(f"{name}: logits up to {np.abs(arrays[f'{name}/logits']).max():.1f}")
    np.savez_compressed(FILE, cases=json.dumps(cases), **arrays)
    print(f"{FILE.name}: {FILE.stat().st_size:,} bytes")


def stories(folder: str) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    tokens = np.random.RandomState(0).randint(3, 512, (1, 24))
    tokens[:, 0] = 1
    greedy = model.generate(
        torch.tensor(tokens[:, :4]), max_new_tokens=40, do_sample=False, pad_token_id=0
    )
    file = FILE.with_name("stories260k.npz")
    np.savez_compressed(
        file,
        tokens=tokens.astype(np.int32),
        logits=logits_of(model, tokens)[0, [3, 11, 23]],
        greedy=greedy[0].numpy().astype(np.int32),
    )
    print(f"{file.name}: {file.stat().st_size:,} bytes")


PROMPTS = (
    "What is the capital of France?",
    "Write a haiku about the sea, then explain it in 2 sentences.",
    "Turn this into JSON: 3 apples, 12 pears and 1045 plums.\n\tUse integers — no text.",
)


def smollm2(file: str) -> None:
    path = pathlib.Path(file)
    options = {"gguf_file": path.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, **options)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, dtype=torch.float32, attn_implementation="eager", **options
    ).eval()
    saved: dict[str, Any] = {"prompts": list(PROMPTS)}
    for i, prompt in enumerate(PROMPTS):
        chat = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        tokens = np.array([tokenizer(text, add_special_tokens=False)["input_ids"]])
        done = model.generate(
            torch.tensor(tokens),
            attention_mask=torch.ones_like(torch.tensor(tokens)),
            max_new_tokens=40,
            do_sample=False,
            repetition_penalty=1.0,
            pad_token_id=2,
            eos_token_id=2,
        )[0].numpy()
        saved[f"tokens/{i}"] = tokens[0].astype(np.int32)
        saved[f"greedy/{i}"] = done[tokens.shape[1] :].astype(np.int32)
        saved[f"logits/{i}"] = logits_of(model, tokens)[0, -1, ::768]
        print(repr(tokenizer.decode(done)))
    reference = FILE.with_name("smollm2.npz")
    np.savez_compressed(reference, **saved)
    print(f"{reference.name}: {reference.stat().st_size:,} bytes")


def check(root: pathlib.Path) -> None:
    import peft

    for folder in sorted(p.parent for p in root.glob("*/expected.npz")):
        expected = np.load(folder / "expected.npz")
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            folder, attn_implementation="eager", output_loading_info=True
        )
        wrong = {k: v for k, v in report.items() if v}
        assert not wrong, (folder.name, wrong)
        model.eval()
        plain = np.abs(logits_of(model, expected["tokens"]) - expected["logits"]).max()
        config = peft.PeftConfig.from_pretrained(folder / "adapter")
        tuned = peft.get_peft_model(model, config)
        result = tuned.load_adapter(folder / "adapter", "default")
        odd = [k for k in result.missing_keys if "default" in k] + list(result.unexpected_keys)
        assert not odd, (folder.name, odd)
        tuned.eval()
        got = logits_of(tuned, expected["tokens"])
        adapted = np.abs(got - expected["adapted"]).max()
        moved = np.abs(expected["adapted"] - expected["logits"]).max()
        print(f"{folder.name}: {plain:.1e}; with the adapter {adapted:.1e} (it moves {moved:.2f})")
        assert max(plain, adapted) < 1e-4, folder.name
        assert moved > 0.05, folder.name


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", type=pathlib.Path)
    parser.add_argument("--stories")
    parser.add_argument("--smollm2")
    arguments = parser.parse_args()
    if arguments.check:
        check(arguments.check)
    elif arguments.stories:
        stories(arguments.stories)
    elif arguments.smollm2:
        smollm2(arguments.smollm2)
    else:
        small()
