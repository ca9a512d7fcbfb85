"""A tiny model with a tokenizer and a chat template, for tests/test_finetune.py.

Each byte is a token, and <|im_start|>, <|im_end|> are one each.
"""

from __future__ import annotations

import json
import pathlib
import sys
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "examples"))

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe brief.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CONFIG = {
    "model_type": "llama",
    "vocab_size": 260,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
    "eos_token_id": 258,
}


def tokenizer() -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(m, special=True, normalized=False) for m in MARKS])
    return made


def write(directory: pathlib.Path, template: str | None = CHATML) -> pathlib.Path:
    """A Hugging Face directory; weights are random, and large enough that answers vary."""
    import jax
    import numpy as np
    from models import hf, llama

    config = hf.read_config(CONFIG)
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(
        llama.Llama(config).init, jax.random.key(0), np.zeros((1, 2), np.int32)
    )["params"]
    params = jax.tree.map(
        lambda x: (
            rng.normal(0.3 if x.ndim > 1 else 1.0, 0.3, x.shape).astype(np.float32)
            - (0.3 if x.ndim > 1 else 0.0)
        ),
        shapes,
    )
    hf.save(directory, config, params)
    tokenizer().save(str(directory / "tokenizer.json"))
    settings = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "chat_template": template}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory
