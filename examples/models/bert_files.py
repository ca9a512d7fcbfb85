"""BERT's files: config.json of BERT, RoBERTa and DistilBERT, and what beside has no leaf.

`hf.py` has the rest: this is what it asks of a family of models.
"""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp

from models.bert import Config, model_of, names
from models.config_file import Fields
from models.errors import ModelError
from models.leaves import Tensors

__all__ = [
    "MODEL_TYPES",
    "config_json",
    "described",
    "init",
    "names",
    "new_groups",
    "read_config",
    "rename",
    "surplus",
]

MODEL_TYPES = {"bert": "Bert", "roberta": "Roberta", "distilbert": "DistilBert"}
_CLASSES = {  # Transformers' class for a head, after the architecture's name
    None: "Model",
    "classifier": "ForSequenceClassification",
    "norm_classifier": "Model",
    "qa": "ForQuestionAnswering",
}
# Our field: theirs, where they are not called the same.
_DISTILBERT = {
    "hidden_size": "dim",
    "intermediate_size": "hidden_dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "hidden_dropout_prob": "dropout",
    "attention_probs_dropout_prob": "attention_dropout",
    "classifier_dropout": "seq_classif_dropout",
}
_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)
_RATES = ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout", "qa_dropout")
# Fields that change the arithmetic, and the only values of them that `bert.py` computes.
_ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("gelu",),
    "activation": ("gelu",),
    "position_embedding_type": ("absolute", None),
    "is_decoder": (False, None),
    "add_cross_attention": (False, None),
    "quantization_config": (None,),
}
# What Transformers takes where config.json says nothing.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "bert": {"pad_token_id": 0},
    "roberta": {"pad_token_id": 1},
    "distilbert": {"pad_token_id": 0, "seq_classif_dropout": 0.2, "qa_dropout": 0.1},
}


def read_config(given: Fields) -> Config:
    """The architecture, and the head that `architectures` tells of.

    Raises:
      ModelError: a value of a field that `bert.py` does not compute; fields that miss or have no
        sense.
    """
    kind = given.raw["model_type"]
    given.check_only(_ONLY, "bert.py")
    fields = Fields({**_DEFAULTS[kind], **given.raw}, given.where)
    theirs = _DISTILBERT if kind == "distilbert" else {}
    fields.check_sizes([theirs.get(field, field) for field in _SIZES])

    def field(name: str, default: Any = None) -> Any:
        found = fields.raw.get(theirs.get(name, name))
        return default if found is None else found

    heads, width = field("num_attention_heads"), field("hidden_size")
    if width % heads:
        name = theirs.get("num_attention_heads", "num_attention_heads")
        raise fields.wrong(name, f"a divisor of the hidden size, {width}")
    dropout = field("hidden_dropout_prob", 0.1)
    rates = {
        "hidden_dropout_prob": dropout,
        "attention_probs_dropout_prob": field("attention_probs_dropout_prob", 0.1),
        "classifier_dropout": field("classifier_dropout", dropout),
        "qa_dropout": field("qa_dropout", 0.0) if kind == "distilbert" else 0.0,
    }
    for name, rate in rates.items():
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate < 1:
            raise fields.wrong(theirs.get(name, name), "a rate from 0 to less than 1")
    types = 0 if kind == "distilbert" else field("type_vocab_size", 2)
    if isinstance(types, bool) or not isinstance(types, int) or (types < 1 and theirs == {}):
        raise fields.wrong("type_vocab_size", "a positive integer")
    pad = field("pad_token_id")
    if isinstance(pad, bool) or not isinstance(pad, int) or pad < 0:
        raise fields.wrong("pad_token_id", "a token's id")
    labels = field("num_labels", len(field("id2label", {})) or 2)
    numbers: dict[str, Any] = {size: field(size) for size in _SIZES}
    numbers |= {name: float(rate) for name, rate in rates.items()}
    try:
        return Config(
            model_type=kind,
            **numbers,
            type_vocab_size=types,
            layer_norm_eps=1e-12 if kind == "distilbert" else float(field("layer_norm_eps", 1e-12)),
            pad_token_id=pad,
            head=field("head", _head(field("architectures", ()))),
            num_labels=labels,
        )
    except ValueError as error:
        raise ModelError(f"{given.where}: {error}") from None


def _head(architectures: Any) -> str | None:
    known = {_CLASSES[head]: head for head in ("classifier", "qa")}
    return next(
        (head for end, head in known.items() for name in architectures if str(name).endswith(end)),
        None,
    )


def config_json(config: Config) -> dict[str, Any]:
    """The fields of config.json, but for the dtype."""
    kind = config.model_type
    theirs = _DISTILBERT if kind == "distilbert" else {}
    architecture = MODEL_TYPES[kind] + _CLASSES[config.head]
    found: dict[str, Any] = {"architectures": [architecture], "model_type": kind}
    for field in (*_SIZES, *_RATES):
        found[theirs.get(field, field)] = getattr(config, field)
    found["pad_token_id"] = config.pad_token_id
    if kind == "distilbert":
        found["activation"] = "gelu"
    else:
        del found["qa_dropout"]
        found |= {"hidden_act": "gelu", "position_embedding_type": "absolute"}
        found |= {f: getattr(config, f) for f in ("type_vocab_size", "layer_norm_eps")}
    if config.head == "norm_classifier":
        found["head"] = config.head  # not one of Transformers': its encoder opens there
    if config.head in ("classifier", "norm_classifier"):
        labels = [f"LABEL_{i}" for i in range(config.num_labels)]
        found["id2label"] = {str(i): label for i, label in enumerate(labels)}
        found["label2id"] = {label: i for i, label in enumerate(labels)}
        if config.num_labels == 1:
            found["problem_type"] = "regression"
    return found


def init(config: Config, key: jax.Array) -> Any:
    """Random params, of the shapes that all have."""
    return model_of(config).init(key, jnp.zeros((1, 2), jnp.int32))["params"]


_BASE = re.compile(r"(embeddings|encoder|transformer|pooler)\.")


def rename(config: Config, name: str) -> str:
    """With `bert.` before the encoder's tensors, if there is a head; gamma, beta of old files."""
    prefix = f"{config.model_type}."
    bare = name.removeprefix(prefix)
    bare = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", bare)
    bare = re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", bare)
    return prefix + bare if config.head is not None and _BASE.match(bare) else bare


def new_groups(config: Config) -> tuple[str, ...]:
    """Leaves that a file may lack, each group as a whole: the head, and the pooler."""
    return (r"(pre_classifier|classifier|qa_outputs)/.*", r"(encoder/)?pooler/.*")


# Of pretraining, and of what Transformers once saved beside its weights.
_SURPLUS = re.compile(
    r"cls\.(predictions|seq_relationship)\..*|lm_head\..*|vocab_(transform|layer_norm|projector)\..*"
    r"|(\w+\.)?embeddings\.(position_ids|token_type_ids)"
)
_POOLER = re.compile(r"(\w+\.)?pooler\.dense\.(weight|bias)")
_CLASSIFIERS = re.compile(r"(pre_classifier|classifier)\..*")


def surplus(config: Config, source: Tensors, name: str) -> bool:
    """Tensors that the model has no use for: another head's, a pooler that it does not have."""
    if _SURPLUS.fullmatch(name):
        return True
    if _POOLER.fullmatch(name):
        return not config.has_pooler
    if _CLASSIFIERS.fullmatch(name):
        return config.head in (None, "qa")
    return re.fullmatch(r"qa_outputs\.(weight|bias)", name) is not None and config.head != "qa"


def described(config: Config) -> str:
    head = "no head" if config.head is None else f"head {config.head!r}"
    if config.head in ("classifier", "norm_classifier"):
        head += f" of {config.num_labels} labels"
    return f"a {config.model_type} of {config.num_hidden_layers} layers, {head}"
