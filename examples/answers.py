"""Answers of a model to held-out questions, and whether they are right."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Any

import chat_data
import encoding
import generate
from chat_template import ChatTokenizer


def _last_number(text: str) -> Decimal | None:
    """After '####' as in GSM8K, else the last one. The minus of "10-3" and of "GPT-3" is none.

    >>> _last_number("so 2 + 3 = 5. #### 1,200.0") == 1200
    True
    """
    number = r"(?:(?<!\w)-)?(?:\d[\d,]*(?:\.\d+)?|(?<![\w.])\.\d+)"  # .5 is one, not in "...5"
    numbers = re.findall(number, text.rpartition("####")[2])
    return Decimal(numbers[-1].replace(",", "")) if numbers else None


def _same_number(got: str, wanted: str) -> bool:
    """A wanted answer without a number is never met."""
    number = _last_number(wanted)
    return number is not None and _last_number(got) == number


METRICS: dict[str, Callable[[str, str], bool]] = {
    "exact": lambda got, wanted: got.strip() == wanted.strip(),
    "number": _same_number,
}


def greedy(
    generator: generate.Generator,
    params: Any,
    tokenizer: ChatTokenizer,
    rows: Sequence[chat_data.Row],
    longest: int,
    max_new_tokens: int,
) -> tuple[list[str], float]:
    """Greedy answers, of questions cut on the left to `longest`; and tokens a second."""
    prompts = [encoding.prompt_of(tokenizer, row)[-longest:] for row in rows]
    began = time.time()
    made = generator(params, prompts, max_new_tokens)
    tokens = sum(len(t) for t in made.tokens)
    return [tokenizer.decode(t) for t in made.tokens], tokens / (time.time() - began)
