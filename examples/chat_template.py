"""Chats to tokens, and which of them are the assistant's: a tokenizer.json and a Jinja template.

As Transformers' `apply_chat_template`, with `tokenizers` and `jinja2` alone.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Messages = Sequence[Mapping[str, Any]]
_BEGIN, _END = "\ufdd0", "\ufdd1"  # noncharacters: around what `{% generation %}` renders


class TemplateError(ValueError):
    """A template that cannot be rendered, or from which no loss mask follows, and why."""


@dataclasses.dataclass(frozen=True)
class ChatTokenizer:
    """A tokenizer with its marks and its template.

    Attributes:
      tokenizer: a `tokenizers.Tokenizer`.
      template: Jinja; None for a model that knows no chats.
      marks: {"bos_token": "<s>", ...}, which templates use.
      stop: ids of tokens after which nothing comes.
      pad: the id that fills up rows.
      today: for templates that say the date; fixed, so that a chat's tokens are.
    """

    tokenizer: Any
    template: str | None
    marks: Mapping[str, str]
    stop: tuple[int, ...]
    pad: int
    today: datetime.datetime = dataclasses.field(default_factory=datetime.datetime.now)

    def render(self, messages: Messages, answer: bool = False) -> str:
        """The chat as text; with `answer`, up to where the assistant's next answer begins."""
        return self._rendered(messages, answer).replace(_BEGIN, "").replace(_END, "")

    def prompt(self, messages: Messages) -> np.ndarray:
        """The tokens after which the assistant answers."""
        return self.encode(self.render(messages, answer=True))

    def encode(self, text: str) -> np.ndarray:
        """Tokens of a text as it is: none are added, marks such as <|im_end|> become one each."""
        return np.array(self.tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    def decode(self, tokens: Sequence[int] | np.ndarray, marks: bool = False) -> str:
        return self.tokenizer.decode([int(t) for t in tokens], skip_special_tokens=not marks)

    def chat(self, messages: Messages) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, mask), both (T,): the mask is 1 where the assistant speaks, its end included.

        From the template's own `{% generation %}` marks where it has them. Else an assistant's
        turn is what the template adds to the chat before it, less the prompt for an answer, and
        less blanks after the last mark. Where the template renders a turn otherwise once others
        follow (Qwen3 drops what was thought), what is learned is what the whole chat has of it. A
        token that is partly the assistant's is learned.

        An earlier turn that cannot be found so is not learned, with a warning.

        Raises:
          TemplateError: the last turn cannot be found.
        """
        return self._masked(*self._spans(messages))

    def _masked(self, text: str, spans: Sequence[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, mask): the mask is 1 for tokens with a character within a span."""
        encoded = self.tokenizer.encode(text, add_special_tokens=False)
        offsets = np.array(encoded.offsets, np.int64).reshape(-1, 2)
        mask = np.zeros(len(offsets), np.int32)
        for start, end in spans:
            mask |= (offsets[:, 1] > start) & (offsets[:, 0] < end)
        return np.array(encoded.ids, np.int32), mask

    def text(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, mask) of a plain text with its end: all of it is learned."""
        end = self.stop[:1]
        tokens = np.concatenate([self._begin(), self.encode(text), end]).astype(np.int32)
        return tokens, np.ones_like(tokens)

    def completion(self, prompt: str, completion: str) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, mask) of plain texts: what comes after the prompt is learned, and the end."""
        text, begin, end = prompt + completion, self._begin(), self.stop[:1]
        tokens, mask = self._masked(text, [(len(prompt), len(text))])
        tokens = np.concatenate([begin, tokens, end]).astype(np.int32)
        mask = np.concatenate([np.zeros(len(begin)), mask, np.ones(len(end))]).astype(np.int32)
        return tokens, mask

    def _begin(self) -> list[int]:
        """The bos_token, if the tokenizer puts it before a text."""
        bos = self.marks.get("bos_token")
        first = self.tokenizer.encode("a")
        return first.ids[:1] if bos is not None and first.tokens[:1] == [bos] else []

    def _spans(self, messages: Messages) -> tuple[str, list[tuple[int, int]]]:
        """The chat as text, and where in it the assistant speaks."""
        marked = self._rendered(messages, answer=False)
        if _BEGIN in marked:
            text, spans, start = "", [], 0
            for part in marked.split(_BEGIN):
                inside, end, outside = part.partition(_END)
                if end:
                    spans.append((start, start + len(inside)))
                text += inside + outside
                start = len(text)
            return text, spans
        spans = []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._rendered(messages[:i], answer=True)
            until = self._end(messages, i, marked, len(before))
            if marked.startswith(before) and until is not None:
                spans.append((len(before), until))
            elif i < len(messages) - 1:
                warnings.warn(
                    f"message {i + 1} of a chat is not learned: the template renders it, or what "
                    "comes before it, otherwise when more follows",
                    stacklevel=2,
                )
            else:
                raise TemplateError(
                    f"message {i + 1}: the template renders what comes before it differently "
                    "once it is there, so where it begins is unknown. Expected a template that "
                    "only appends, or one with {% generation %} around what the assistant says."
                )
        return marked, spans

    def _end(self, messages: Messages, i: int, marked: str, start: int) -> int | None:
        """Where in the whole chat message `i` ends, which begins at `start`."""
        through = self._rendered(messages[: i + 1], answer=False)
        asks_again = through == self._rendered(messages[: i + 1], answer=True)
        if not asks_again and marked.startswith(through.rstrip()):
            return len(through.rstrip())
        # Another rendering, or one with the prompt for one more answer: to the mark after what is
        # said. A search for its words could find them where another turn quotes them, so the chat
        # is rendered once more with noncharacters around them.
        thought, closing, said = messages[i]["content"].rpartition("</think>")
        first = len(said) - len(said.lstrip())
        last = max(first, len(said.rstrip()))
        around = thought + closing + said[:first] + _BEGIN + said[first:last] + _END + said[last:]
        again = [*messages[:i], {**messages[i], "content": around}, *messages[i + 1 :]]
        found = self._rendered(again, answer=False)
        same = found.replace(_BEGIN, "").replace(_END, "") == marked
        if not same or _END not in found or found.find(_BEGIN) < start:
            return None
        end = len(found.partition(_END)[0].replace(_BEGIN, ""))
        rest = marked[end:]
        marks = [self.tokenizer.id_to_token(i) for i in self.stop]
        mark = next((m for m in marks if rest.lstrip().startswith(m)), "")
        return end + (len(rest) - len(rest.lstrip()) + len(mark) if mark else 0)

    def _rendered(self, messages: Messages, answer: bool) -> str:
        import jinja2

        if self.template is None:
            raise TemplateError(
                "this model's tokenizer has no chat template, expected one: data of prompts and "
                "completions, or of plain texts, needs none."
            )
        try:
            return _compiled(self.template).render(
                messages=messages,
                add_generation_prompt=answer,
                strftime_now=self.today.strftime,
                **self.marks,
            )
        except jinja2.TemplateError as error:
            raise TemplateError(
                f"the chat template does not take these messages: {error}"
            ) from error


def load(directory: str | os.PathLike[str], stop: Sequence[int] = ()) -> ChatTokenizer:
    """The tokenizer of a Hugging Face directory.

    Args:
      directory: with tokenizer.json, and tokenizer_config.json if there is one.
      stop: ids at which an answer ends too, beside the tokenizer's eos_token.

    Raises:
      TemplateError: there is no tokenizer.json, or no eos_token.
    """
    from tokenizers import Tokenizer

    directory = Path(directory)
    if not (directory / "tokenizer.json").is_file():
        raise TemplateError(
            f"{directory}: has no tokenizer.json, expected the one that Transformers' fast "
            "tokenizers save: AutoTokenizer.from_pretrained(...).save_pretrained(directory)."
        )
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    path = directory / "tokenizer_config.json"
    config = json.loads(path.read_text()) if path.is_file() else {}
    beside = directory / "special_tokens_map.json"
    also = json.loads(beside.read_text()) if beside.is_file() else {}
    # As in Transformers, the map goes first, but for configs that list their added tokens.
    sources = (config, also) if "added_tokens_decoder" in config else (also, config)
    marks = {}
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        mark = sources[0].get(name) or sources[1].get(name)
        mark = mark.get("content") if isinstance(mark, dict) else mark
        if mark is not None:
            marks[name] = mark
    template = config.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = {one["name"]: one["template"] for one in template}.get("default")
    if (directory / "chat_template.jinja").is_file():
        template = (directory / "chat_template.jinja").read_text()
    eos = tokenizer.token_to_id(marks["eos_token"]) if "eos_token" in marks else None
    if eos is not None:
        stop = tuple(dict.fromkeys([eos, *stop]))
    if not stop:
        raise TemplateError(f"{path}: eos_token: got none, expected the token that ends a text.")
    pad = tokenizer.token_to_id(marks["pad_token"]) if "pad_token" in marks else None
    stop = tuple(stop)
    return ChatTokenizer(tokenizer, template, marks, stop, stop[0] if pad is None else pad)


_environments: dict[str, Any] = {}


def _compiled(template: str) -> Any:
    """The template, as Transformers sets Jinja up: sandboxed, with its few functions."""
    if template in _environments:
        return _environments[template]
    import jinja2.ext
    import jinja2.nodes
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """`{% generation %}...{% endgeneration %}`: what the assistant says."""

        tags = {"generation"}  # noqa: RUF012, Jinja's base class has a set

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            call = self.call_method("_marked")
            return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

        def _marked(self, caller: Any) -> str:
            return _BEGIN + caller() + _END

    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    _environments[template] = environment.from_string(template)
    return _environments[template]
