"""Rows of data to examples of tokens: what is learned of each, what is cut, what is asked."""

from __future__ import annotations

from collections.abc import Sequence

import batches
import chat_data
import chat_template
import numpy as np


def encoded(
    tokenizer: chat_template.ChatTokenizer,
    rows: Sequence[chat_data.Row],
    length: int,
    where: str,
) -> list[batches.Example]:
    """Rows as tokens, cut to the longest length; says what was cut, and what that left empty."""
    examples: list[batches.Example] = []
    merged = 0
    for row in rows:
        try:
            tokens, mask = tokens_of(tokenizer, row)
            examples.append(batches.Example(row.number, tokens, mask))
            if row.messages is not None:
                prompt = prompt_of(tokenizer, row)
                merged += int(not np.array_equal(tokens[: len(prompt)], prompt))
        except chat_template.TemplateError as error:
            raise chat_template.TemplateError(f"{where}: row {row.number}: {error}") from error
    kept, cut, dropped = batches.shortened(examples, length)
    if not kept:
        raise chat_data.DataError(
            f"{where}: no row has an answer within {length} tokens, expected a larger --max-length."
        )
    count = sum(len(e.tokens) for e in kept)
    learned = sum(int(e.mask[1:].sum()) for e in kept)
    print(f"{where}: {count:,} tokens, {learned:,} of them to be learned", end="")
    print(f"; {cut} rows cut, {dropped} of them left without an answer" if cut else "")
    if merged:
        print(
            f"{where}: the prompts of {merged} rows are other tokens without their answers than "
            "with them: answers that are generated begin otherwise than those that are learned"
        )
    return kept


def tokens_of(
    tokenizer: chat_template.ChatTokenizer, row: chat_data.Row
) -> tuple[np.ndarray, np.ndarray]:
    if row.messages is None:
        return tokenizer.text(row.text or "")
    if tokenizer.template is None and [m["role"] for m in row.messages] == ["user", "assistant"]:
        return tokenizer.completion(*(m["content"] for m in row.messages))
    return tokenizer.chat(row.messages)


def prompt_of(tokenizer: chat_template.ChatTokenizer, row: chat_data.Row) -> np.ndarray:
    """What is asked; its tokens know nothing of the answer, as generate.py's."""
    if tokenizer.template is None:
        return tokenizer.text(row.question[0]["content"])[0][:-1]
    return tokenizer.prompt(row.question)
