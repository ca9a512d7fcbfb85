"""Outputs of Transformers' encoders, for tests/test_bert.py.

    python tests/oracle/bert.py                      # writes tests/references/bert.npz
    python tests/oracle/bert.py --minilm DIR         # ... minilm.npz, of that HF directory
    python tests/oracle/bert.py --check DIR          # DIR/<name>/, by tests/bert_models.py:
                                                     # Transformers and PEFT give the same outputs

Needs torch, transformers 5, peft 0.21.2, tokenizers; the tests need only the files.
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
from bert_models import FILE, weight

SMALL: dict[str, Any] = {
    "vocab_size": 30,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
}
ROBERTA = {"type_vocab_size": 1, "layer_norm_eps": 1e-5, "pad_token_id": 1}
DISTILBERT = {
    "vocab_size": 30,
    "dim": 16,
    "hidden_dim": 24,
    "n_layers": 2,
    "n_heads": 2,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
}
BERT, ROB, DISTIL = "BertConfig", "RobertaConfig", "DistilBertConfig"
# name: (class, configuration class, fields)
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("BertModel", BERT, SMALL),
    "bert_classifier": ("BertForSequenceClassification", BERT, SMALL | {"num_labels": 3}),
    "bert_regression": ("BertForSequenceClassification", BERT, SMALL | {"num_labels": 1}),
    "bert_qa": ("BertForQuestionAnswering", BERT, SMALL),
    "roberta": ("RobertaModel", ROB, SMALL | ROBERTA),
    "roberta_classifier": ("RobertaForSequenceClassification", ROB, SMALL | ROBERTA),
    "roberta_qa": ("RobertaForQuestionAnswering", ROB, SMALL | ROBERTA),
    "distilbert": ("DistilBertModel", DISTIL, DISTILBERT),
    "distilbert_classifier": (
        "DistilBertForSequenceClassification",
        DISTIL,
        DISTILBERT | {"num_labels": 3},
    ),
    "distilbert_qa": ("DistilBertForQuestionAnswering", DISTIL, DISTILBERT),
}


def outputs_of(model: Any, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    given = {
        "input_ids": torch.tensor(inputs["tokens"]).long(),
        "attention_mask": torch.tensor(inputs["mask"]).long(),
    }
    if "token_types" in inputs:
        given["token_type_ids"] = torch.tensor(inputs["token_types"]).long()
    with torch.no_grad():
        found = model(**given)
    ours = {
        "logits": "logits",
        "start": "start_logits",
        "end": "end_logits",
        "hidden": "last_hidden_state",
        "pooled": "pooler_output",
    }
    return {name: found[theirs].float().numpy() for name, theirs in ours.items() if theirs in found}


def inputs_of(seed: int, pad: int, with_types: bool) -> dict[str, np.ndarray]:
    draw = np.random.RandomState(seed)
    tokens = draw.randint(2, 30, (3, 8)).astype(np.int32)
    mask = np.ones_like(tokens)
    mask[1, 5:] = 0
    mask[2, :3] = 0
    inputs = {"tokens": np.where(mask, tokens, pad).astype(np.int32), "mask": mask}
    if with_types:
        inputs["token_types"] = draw.randint(0, 2, (3, 8)).astype(np.int32) * mask
    return inputs


def small() -> None:
    cases, arrays = {}, {}
    for seed, (name, (kind, config_kind, fields)) in enumerate(CASES.items()):
        config = getattr(transformers, config_kind)(**fields, attn_implementation="eager")
        model = getattr(transformers, kind)(config).eval()
        with torch.no_grad():
            for key, value in model.named_parameters():
                value.copy_(torch.tensor(weight(key, tuple(value.shape))))
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            saved = json.loads((pathlib.Path(folder) / "config.json").read_text())
            with safe_open(f"{folder}/model.safetensors", "np") as file:
                shapes = {k: file.get_slice(k).get_shape() for k in sorted(file.keys())}
        assert {*shapes} == {key for key, _ in model.named_parameters()}, name
        inputs = inputs_of(seed, config.pad_token_id, name.startswith("bert"))
        outputs = outputs_of(model, inputs)
        arrays |= {f"{name}/in/{key}": value for key, value in inputs.items()}
        arrays |= {f"{name}/out/{key}": value for key, value in outputs.items()}
        cases[name] = {"config": saved, "shapes": shapes}
        print(f"{name}: { ({key: value.shape for key, value in outputs.items()}) }")
    np.savez_compressed(FILE, cases=json.dumps(cases), **arrays)
    print(f"{FILE.name}: {FILE.stat().st_size:,} bytes")


TEXTS = (
    ("What a lovely, quietly moving film.", None),
    ("Naïve café-goers paid €12.50!", "Did they pay in euros?"),
    ("no", None),
)


def minilm(folder: str) -> None:
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(f"{folder}/tokenizer.json")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    rows = [tokenizer.encode(*(t for t in texts if t)) for texts in TEXTS]
    length = max(len(row.ids) for row in rows)
    inputs = {name: np.zeros((len(rows), length), np.int32) for name in ("tokens", "mask")}
    inputs["token_types"] = np.zeros((len(rows), length), np.int32)
    for i, row in enumerate(rows):
        inputs["tokens"][i, : len(row.ids)] = row.ids
        inputs["token_types"][i, : len(row.ids)] = row.type_ids
        inputs["mask"][i, : len(row.ids)] = 1
    model = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    found = outputs_of(model, inputs)
    reference = FILE.with_name("minilm.npz")
    np.savez_compressed(
        reference,
        texts=json.dumps(TEXTS),
        **inputs,
        hidden=found["hidden"][..., ::16],
        pooled=found["pooled"][..., ::4],
    )
    print(f"{reference.name}: {reference.stat().st_size:,} bytes")


def check(root: pathlib.Path) -> None:
    import peft

    for folder in sorted(p.parent for p in root.glob("*/expected.npz")):
        saved = np.load(folder / "expected.npz")

        def arrays(start: str, saved: Any = saved) -> dict[str, np.ndarray]:
            return {k.removeprefix(start): saved[k] for k in saved.files if k.startswith(start)}

        inputs = arrays("in/")

        def difference(model: Any, start: str, inputs: Any = inputs, arrays: Any = arrays) -> float:
            found, expected = outputs_of(model.eval(), inputs), arrays(start)
            assert {*found} == {*expected}, (folder.name, {*found}, {*expected})
            worst = 0.0
            for name, value in found.items():
                real = inputs["mask"] if name in ("hidden", "start", "end") else np.ones(3)
                gap = np.abs(value - expected[name])[real.astype(bool)]
                worst = max(worst, float(gap.max()))
            return worst

        (kind,) = json.loads((folder / "config.json").read_text())["architectures"]
        model, report = getattr(transformers, kind).from_pretrained(
            folder, attn_implementation="eager", output_loading_info=True
        )
        wrong = {k: v for k, v in report.items() if v}
        assert not wrong, (folder.name, wrong)
        plain = difference(model, "out/")
        moved = difference(model, "adapted/")
        config = peft.PeftConfig.from_pretrained(folder / "adapter")
        tuned = peft.get_peft_model(model, config)
        result = tuned.load_adapter(folder / "adapter", "default")
        odd = [k for k in result.missing_keys if "default" in k] + list(result.unexpected_keys)
        assert not odd, (folder.name, odd)
        adapted = difference(tuned, "adapted/")
        whole = ", ".join(config.modules_to_save or []) or "nothing"
        print(
            f"{folder.name}: {plain:.1e}; with the adapter {adapted:.1e} (it moves {moved:.2f}); "
            f"bias {config.bias}, in full: {whole}"
        )
        assert max(plain, adapted) < 1e-4, folder.name
        assert moved > 0.05, folder.name


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", type=pathlib.Path)
    parser.add_argument("--minilm")
    arguments = parser.parse_args()
    if arguments.check:
        check(arguments.check)
    elif arguments.minilm:
        minilm(arguments.minilm)
    else:
        small()
