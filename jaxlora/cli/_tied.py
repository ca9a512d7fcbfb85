"""Whether a table of a model in files is its head too: lookup and head at once, in one tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from jaxlora._errors import AdapterFileError
from jaxlora.peft._config import has_tail

_HEADS = (
    "lm_head",
    "embed_out",
    "output_projection",
    "proj_out",
    "vocab_projector",
    "generator_lm_head",
    "lm_loss",
    "lm_head.decoder",
    "predictions.decoder",
    "decoder",
    "output",
)
_NO_HEAD = ("Classification", "QuestionAnswering", "MultipleChoice")
_TABLES = ("embed_tokens", "wte", "word_embeddings", "shared", "tok_embeddings", "embed_in")

Shapes = Mapping[str, tuple[int, ...]]


def is_head(name: str) -> bool:
    """Whether a tensor has the name of a language model's head."""
    return any(has_tail(name, f"{head}.weight") for head in _HEADS)


def _is_head_of(name: str, table: str) -> bool:
    """Whether a head lies where that of a table would, not in another part of the model."""
    head = next((h for h in _HEADS if has_tail(name, f"{h}.weight")), None)
    if head is None:
        return False
    part = name.removesuffix(f"{head}.weight").partition(".")[0]
    return part in ("", "cls", table.partition(".")[0])


def is_table(name: str, shape: tuple[int, ...], model: Mapping[str, Any]) -> bool:
    """Whether a matrix is a table of the vocabulary, as its name or config.json has it."""
    named = any(has_tail(name, f"{table}.weight") for table in _TABLES)
    return len(shape) == 2 and (named or shape[0] == _of(model, "vocab_size")) and not is_head(name)


def may_be_tied(model: Mapping[str, Any]) -> bool:
    """Whether config.json leaves it open; most models of Transformers are tied if it is silent."""
    listed = model.get("architectures")
    classes = [x for x in listed if isinstance(x, str)] if isinstance(listed, list) else []
    headless = [any(word in x for word in _NO_HEAD) or _is_body(x) for x in classes]
    return _of(model, "tie_word_embeddings") is not False and not (headless and all(headless))


def _is_body(name: str) -> bool:
    headed = ("LMHeadModel", "DoubleHeadsModel", "DecoderModel")
    return name.endswith("Model") and not name.endswith(headed)


def _of(model: Mapping[str, Any], field: str) -> Any:
    text = model.get("text_config")
    return model.get(field, text.get(field) if isinstance(text, dict) else None)


def tied_heads(
    key: str,
    base: Shapes,
    model: Mapping[str, Any],
    missing: list[str],
) -> list[str]:
    """The modules that may share a table; [] where it is known that none does.

    Args:
      key: the table's, in the base.
      base: the shapes of the base's tensors.
      model: the base's `config.json`, or {}.
      missing: heads that the adapter speaks of and the base has no tensor of.
    """
    rows = _of(model, "vocab_size")
    if not may_be_tied(model) or (isinstance(rows, int) and base[key][0] != rows):
        return []
    if any(_is_head_of(other, key) and base[other] == base[key] for other in base):
        return []  # it has its own
    return missing or ["lm_head"]


def check_apart(
    file: str,
    key: str,
    base: Shapes,
    model: Mapping[str, Any],
    equal: Callable[[str, str], bool],
) -> None:
    """Raises if a table or head that changes lies on the disk twice: Transformers would read one.

    Args:
      file: named in the message.
      key: of the tensor that changes.
      base: the shapes of the base's tensors.
      model: the base's `config.json`, or {}.
      equal: whether two tensors are the same, bit for bit.
    """
    if not may_be_tied(model):
        return
    said = _of(model, "tie_word_embeddings") is True
    for other, shape in base.items():
        pair = is_head(other) or is_head(key)
        if other != key and pair and shape == base[key] and (said or equal(other, key)):
            copy = other if is_head(other) else key
            raise AdapterFileError(
                f"{file}: the adapter changes {key}, and the base has {other} too, as a model that "
                "ties them would have it twice: what one of them becomes, the other would not. If "
                f"they are tied, take {copy} out of the base's files; if not, say so in "
                "config.json: tie_word_embeddings false."
            )
