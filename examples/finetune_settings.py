"""The settings of finetune_lm.py, their defaults, and the command line that gives them."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pretrained
from models import llama


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a run computes depends on these, and on nothing else. Defaults: Qwen's SFT with QLoRA.

    `--help` has their meanings; PEFT's and TRL's names for them are the same or near.
    """

    model: str = pretrained.DEFAULT
    data: str | None = None
    eval_data: str | None = None
    eval_rows: int = 100
    max_rows: int | None = None
    rank: int = 64
    alpha: float = 32.0
    dropout: float = 0.1
    targets: str = "q_proj,k_proj,v_proj"
    quantize: str = "nf4"
    batch: int = 2
    accumulate: int = 4
    learning_rate: float = 2e-4
    schedule: str = "cosine"
    warmup: float = 0.03
    weight_decay: float = 0.0
    clip: float = 1.0
    epochs: int = 1
    max_length: int = 512
    packing: bool = True
    dtype: str = "auto"
    remat: str = "layer"
    attention: str = "xla"
    metric: str = "none"
    metric_rows: int = 20
    max_new_tokens: int = 128
    seed: int = 0


# The default task, made to be over in minutes on two cores: what differs from the above. Many small
# steps at a higher rate, on all layers of the model.
ORDERS = Settings(
    rank=16,
    dropout=0.0,
    targets=",".join(pretrained.PROJECTIONS),
    quantize="none",
    batch=1,
    accumulate=1,
    learning_rate=1e-3,
    max_length=224,
    remat=",".join(llama.SAVEABLE),  # on a CPU, to write more costs more than to compute it again
    metric="exact",
    metric_rows=10,
    max_new_tokens=48,
)


HELP = {
    "model": "a directory, a hub name, or tiny: a random one to try things on",
    "data": "JSON lines of chats, prompts and completions, or texts; or a hub data set, "
    "name[:config][:split]",
    "eval_data": "held-out rows; without, some of the data",
    "eval_rows": "how many rows to hold out, a fifth of the data at most",
    "max_rows": "train on the first so many",
    "targets": "names of layers, joined by commas",
    "quantize": "the base: nf4 (double quantization), int8 or none",
    "batch": "rows of a microbatch",
    "accumulate": "microbatches of a step",
    "warmup": "which part of the steps the rate rises",
    "clip": "the largest norm of a gradient",
    "max_length": "of a row, in tokens; of a bin, with packing",
    "packing": "several rows in one, each attending to itself",
    "dtype": "of base and arithmetic; auto: bfloat16, on a CPU float32",
    "remat": "what is computed again: none, layer, or all but some names, see models/llama.py",
    "attention": "xla, or cudnn: the flash kernel of NVIDIA's GPUs, in bfloat16",
    "metric": "of generated answers: exact, number (the last one, as in GSM8K) or none",
    "metric_rows": "how many held-out rows to answer, before and after",
}
CHOICES = {
    "quantize": ("nf4", "int8", "none"),
    "schedule": ("cosine", "linear", "constant"),
    "dtype": ("auto", "float32", "bfloat16"),
    "attention": ("xla", "cudnn"),
    "metric": ("exact", "number", "none"),
}


COUNT = (lambda x: x >= 1), "1 or more"
MAYBE = (lambda x: x >= 0), "0 or more"
POSITIVE = (lambda x: 0 < x < math.inf), "a positive number"
LIMITS: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(("rank", "batch", "accumulate", "epochs", "max_length", "eval_rows"), COUNT),
    **dict.fromkeys(("max_rows", "max_new_tokens", "log_every"), COUNT),
    **dict.fromkeys(("metric_rows", "seed", "save_every", "eval_every"), MAYBE),
    **dict.fromkeys(("learning_rate", "clip", "alpha"), POSITIVE),
    "weight_decay": ((lambda x: 0 <= x < math.inf), "0 or more"),
    "dropout": ((lambda x: 0 <= x < 1), "0 or more, below 1"),
    "warmup": ((lambda x: 0 <= x <= 1), "a part of the steps, 0 to 1"),
}


def parse_args(argv: Sequence[str] | None, about: str) -> tuple[argparse.Namespace, Settings]:
    """(where and how to run, what to compute); `about` is what --help says."""
    doc = about.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=doc[0], epilog=doc[2], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    own = Settings()
    for field in dataclasses.fields(Settings):
        name, default = field.name, getattr(own, field.name)
        here = getattr(ORDERS, name)
        text = HELP.get(name, name.replace("_", " "))
        text += f" [{default}" + (f"; without --data {here}]" if here != default else "]")
        options: dict[str, Any] = {"help": text.replace("%", "%%"), "default": None}
        if isinstance(default, bool):
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["type"] = (
                int if name == "max_rows" else type(default) if default is not None else str
            )
            options["choices"] = CHOICES.get(name)
        parser.add_argument("--" + name.replace("_", "-"), **options)
    parser.add_argument("--out", type=Path, default=Path("out/finetune_lm"))
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    parser.add_argument(
        "--overwrite", action="store_true", help="the run in --out, if there is one"
    )
    parser.add_argument("--save-every", type=int, default=50, help="steps; 0: at the end alone")
    parser.add_argument("--eval-every", type=int, default=0, help="steps; 0: before and after")
    parser.add_argument("--log-every", type=int, default=10, help="steps, where no bar is shown")
    parser.add_argument("--tensorboard", type=Path, help="a folder for its events")
    parser.add_argument("--short", action="store_true", help="seconds: few rows of a tiny model")
    args = parser.parse_args(argv)
    defaults = own if args.data is not None else ORDERS
    if args.short:
        short: dict[str, Any] = {
            "max_rows": 12,
            "eval_rows": 4,
            "metric_rows": 2,
            "max_new_tokens": 8,
            "rank": 4,
        }
        defaults = dataclasses.replace(defaults, model="tiny", **short)
    given = {f.name: getattr(args, f.name) for f in dataclasses.fields(Settings)}
    settings = dataclasses.replace(defaults, **{k: v for k, v in given.items() if v is not None})
    known = (*pretrained.PROJECTIONS, "embed_tokens", "lm_head")
    unknown = [target for target in settings.targets.split(",") if target not in known]
    if unknown:
        parser.error(f"--targets: got {','.join(unknown)}, expected some of {','.join(known)}")
    kept = settings.remat.split(",")
    if settings.remat not in ("none", "layer") and not set(kept) <= set(llama.SAVEABLE):
        names = ", ".join(llama.SAVEABLE)
        parser.error(f"--remat: got {settings.remat}, expected none, layer, or some of {names}")
    if settings.eval_data is not None and settings.data is None:
        parser.error("--eval-data: expected --data too; the default task makes its own rows")
    for name, (good, expected) in LIMITS.items():
        value = getattr(settings if hasattr(settings, name) else args, name)
        if value is not None and not good(value):
            parser.error(f"--{name.replace('_', '-')}: got {value}, expected {expected}")
    return args, settings
