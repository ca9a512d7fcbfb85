"""Rows to train on, from JSON lines or the hub: chats, prompts and completions, or texts.

One row a line, plain or gzipped, of any of these forms:

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
    {"prompt": "...", "completion": "..."}
    {"question": "...", "answer": "..."}
    {"text": "..."}
    {"prompt": {"text": "...", "role": "prompter", "replies": [...]}}    a tree of Open Assistant

Of a tree, the best-ranked human reply is followed at each turn.
"""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

ROLES = ("system", "user", "assistant", "tool")


class DataError(ValueError):
    """Data that cannot be trained on: which row, what it has, what was expected."""


class Row(NamedTuple):
    """One example.

    Attributes:
      number: of its line in the file, or its place in the data set; from 1.
      messages: a chat whose last turn is the assistant's; None of a plain text.
      text: a plain text; None of a chat.
    """

    number: int
    messages: tuple[dict[str, str], ...] | None = None
    text: str | None = None

    @property
    def question(self) -> tuple[dict[str, str], ...]:
        """The chat, up to its last answer."""
        return (self.messages or ())[:-1]

    @property
    def answer(self) -> str:
        return self.messages[-1]["content"] if self.messages else ""


class Rows(NamedTuple):
    """The rows of a source, and how many of it have nothing that a human wrote."""

    rows: list[Row]
    left_out: int


def read(source: str | os.PathLike[str]) -> Rows:
    """The rows of a file, or of a data set on the hub: "name", "name:split", "name:config:split".

    Raises:
      DataError: a row of none of the forms, by its number; nothing to read.
    """
    path = Path(source)
    looks_local = path.suffix in (".jsonl", ".json", ".gz") or path.exists()
    lines = _lines(path) if looks_local else _hub(str(source))
    rows, left_out = [], 0
    for number, value in lines:
        found = row(value, number, str(source))
        if found is None:
            left_out += 1
        else:
            rows.append(found)
    if not rows:
        raise DataError(f"{source}: has no rows to train on, expected one JSON object a line.")
    return Rows(rows, left_out)


def row(value: Any, number: int, where: str) -> Row | None:
    """One object of one of the forms; None of a tree without a human's reply."""

    def wrong(expected: str, got: Any) -> DataError:
        shown = json.dumps(got, ensure_ascii=False, default=str)
        shown = shown if len(shown) <= 120 else shown[:117] + "..."
        return DataError(f"{where}: row {number}: expected {expected}, got {shown}.")

    def text(value: Any, name: str) -> str:
        if not isinstance(value, str) or not value.strip():
            raise wrong(f"{name!r} to be a text that is not empty", value)
        return value

    if not isinstance(value, Mapping):
        raise wrong("an object", value)
    if "messages" in value:
        return Row(number, _chat(value["messages"], wrong))
    if isinstance(value.get("prompt"), Mapping):
        chat = _best(value["prompt"], wrong)
        return Row(number, chat) if chat else None
    if isinstance(value.get("prompt"), list) and isinstance(value.get("completion"), list):
        return Row(number, _chat([*value["prompt"], *value["completion"]], wrong))
    for asked, answered in (("prompt", "completion"), ("question", "answer")):
        if asked in value and answered in value:
            pair = [("user", asked), ("assistant", answered)]
            chat = tuple({"role": role, "content": text(value[k], k)} for role, k in pair)
            return Row(number, chat)
    if "text" in value:
        return Row(number, text=text(value["text"], "text"))
    raise wrong("'messages', 'prompt' and 'completion', 'question' and 'answer', or 'text'", value)


def _chat(messages: Any, wrong: Any) -> tuple[dict[str, str], ...]:
    if not isinstance(messages, list) or not messages:
        raise wrong("'messages' to be a list that is not empty", messages)
    for i, message in enumerate(messages):
        good = isinstance(message, Mapping) and message.get("role") in ROLES
        if not good or not isinstance(message.get("content"), str):
            expected = f"message {i + 1} to have a 'role' of {', '.join(ROLES)}, and a 'content'"
            raise wrong(expected, message)
    if messages[-1]["role"] != "assistant":
        raise wrong("the last message to be the assistant's", messages[-1])
    if not messages[-1]["content"].strip():
        raise wrong("the last message not to be empty", messages[-1])
    return tuple(dict(message) for message in messages)


def _best(node: Mapping[str, Any], wrong: Any) -> tuple[dict[str, str], ...]:
    """From the root of a tree, the best human reply at each turn; up to the assistant's last."""
    roles = {"prompter": "user", "assistant": "assistant"}
    chat: list[dict[str, str]] = []
    at: Mapping[str, Any] | None = node
    while at is not None and not at.get("synthetic"):
        role, content = roles.get(str(at.get("role"))), at.get("text")
        if role is None or not isinstance(content, str):
            raise wrong("a message with a 'role' of prompter or assistant, and a 'text'", at)
        chat.append({"role": role, "content": content})
        replies = [r for r in at.get("replies") or [] if not r.get("synthetic")]
        at = min(replies, key=_rank, default=None)
    while chat and chat[-1]["role"] != "assistant":
        chat.pop()
    return tuple(chat)


def _rank(reply: Mapping[str, Any]) -> float:
    rank = reply.get("rank")
    return float("inf") if rank is None else rank


def _lines(path: Path) -> Iterator[tuple[int, Any]]:
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    yield number, json.loads(line)
                except ValueError as error:
                    raise DataError(f"{path}: row {number}: expected JSON: {error}.") from None
    except (OSError, EOFError) as error:  # a truncated .gz ends early
        raise DataError(f"{path}: cannot be read: {error}.") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: expected UTF-8: {error}.") from None


def _hub(source: str) -> Iterator[tuple[int, Any]]:
    name, *rest = source.split(":")
    config, split = (rest[0] if len(rest) > 1 else None), (rest[-1] if rest else "train")
    try:
        import datasets
    except ImportError:
        raise DataError(
            f"{source}: is no file here, and a data set of the hub needs: pip install datasets"
        ) from None
    try:
        rows = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # of the network, of the hub, of the data set: theirs are many
        raise DataError(
            f"{source}: is no file here, and the hub gave none: {type(error).__name__}: {error}"
        ) from error
    yield from enumerate(rows, 1)
