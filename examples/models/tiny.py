"""A random model of a few thousand numbers, with a tokenizer and a chat template: to try code on.

Each byte is a token, and <|im_start|>, <|im_end|> are one each.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np

from models import hf, llama

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


def write(directory: str | os.PathLike[str], template: str | None = CHATML) -> Path:
    """A Hugging Face directory; the weights are large enough that answers vary."""
    directory = Path(directory)
    config = hf.read_config(CONFIG)
    rng = np.random.default_rng(0)
    tokens = np.zeros((1, 2), np.int32)
    shapes = jax.eval_shape(llama.Llama(config).init, jax.random.key(0), tokens)["params"]

    def draw(x: jax.ShapeDtypeStruct) -> np.ndarray:
        is_scale = x.ndim == 1 or (x.shape[0] == config.num_hidden_layers and x.ndim == 2)
        return rng.normal(float(is_scale), 0.3, x.shape).astype(np.float32)

    hf.save(directory, config, jax.tree.map(draw, shapes))
    tokenizer().save(str(directory / "tokenizer.json"))
    settings = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "chat_template": template}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory
