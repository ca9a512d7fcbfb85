"""Regexes that a file brings along, matched in bounded time: no backtracking, no hang."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from re import _constants as ops  # type: ignore[attr-defined]
from re import _parser  # type: ignore[attr-defined]
from typing import Any

_BUDGET = 200_000  # operations on sets of positions: a fraction of a second
_LONGEST = 10_000  # characters of a pattern
_UNBOUNDED = int(_parser.MAXREPEAT)
_CATEGORIES = {
    ops.CATEGORY_DIGIT: str.isdecimal,
    ops.CATEGORY_NOT_DIGIT: lambda c: not c.isdecimal(),
    ops.CATEGORY_SPACE: str.isspace,
    ops.CATEGORY_NOT_SPACE: lambda c: not c.isspace(),
    ops.CATEGORY_WORD: lambda c: c.isalnum() or c == "_",
    ops.CATEGORY_NOT_WORD: lambda c: not (c.isalnum() or c == "_"),
}


class Texts:
    r"""Texts to match patterns against, all of them at once.

    A set of positions, over all texts, is one integer with a bit for each; a part of a pattern
    takes the set of positions where it may begin to that where it may end. So the work is that of
    the pattern's length, times the longest text for each `*`, whatever the pattern.

    >>> texts = Texts(["layers.0.q_proj", "layers.1.k_proj"])
    >>> sorted(texts.full(r"layers\.\d+\.(q|v)_proj")), sorted(texts.tail("k_proj"))
    (['layers.0.q_proj'], ['layers.1.k_proj'])
    """

    def __init__(self, texts: Iterable[str]):
        self.texts = list(dict.fromkeys(texts))
        self._joined = "\0".join(self.texts) + "\0"
        self._first = self._last = 0
        place = 0
        self._ends = []
        for text in self.texts:
            self._first |= 1 << place
            place += len(text)
            self._ends.append(place)
            self._last |= 1 << place
            place += 1
        chars: dict[str, bytearray] = {}
        for k, c in enumerate(self._joined):
            if c != "\0":
                bits = chars.setdefault(c, bytearray(len(self._joined) // 8 + 1))
                bits[k // 8] |= 1 << (k % 8)
        self._chars = {c: int.from_bytes(bits, "little") for c, bits in chars.items()}
        self._left = _BUDGET

    def full(self, pattern: str) -> set[str]:
        """The texts that the pattern matches as a whole, as `re.fullmatch`."""
        return self._found(pattern, self._first)

    def tail(self, pattern: str) -> set[str]:
        r"""The texts that `(.*\.)?(pattern)` matches as a whole: segments at the end of a name."""
        return self._found(pattern, self._first | self._chars.get(".", 0) << 1)

    def _found(self, pattern: str, starts: int) -> set[str]:
        if len(pattern) > _LONGEST or "\0" in pattern:
            raise ValueError("a regex that is too long")
        self._spend(5 + len(pattern) // 4)  # for parsing it
        try:
            parsed = _parser.parse(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(f"no regex ({error})") from None
        if parsed.state.flags & ~re.UNICODE:
            raise ValueError("a regex with flags, which are not supported here")
        try:
            ends = self._run(parsed, starts) & self._last
        except RecursionError:
            raise ValueError("a regex that is nested too deeply") from None
        return {t for t, end in zip(self.texts, self._ends, strict=True) if ends >> end & 1}

    def _run(self, parts: Sequence[Any], starts: int) -> int:
        for op, arg in parts:
            if not starts:
                return 0
            starts = self._step(op, arg, starts)
        return starts

    def _step(self, op: Any, arg: Any, at: int) -> int:
        self._spend(1)
        if op in (ops.LITERAL, ops.NOT_LITERAL, ops.ANY, ops.IN):
            return (at & self._where(op, arg)) << 1
        if op is ops.BRANCH:
            found = 0
            for branch in arg[1]:
                found |= self._run(branch, at)
            return found
        if op is ops.SUBPATTERN and not (arg[1] or arg[2]):
            return self._run(arg[3], at)
        if op in (ops.MAX_REPEAT, ops.MIN_REPEAT):
            least, most, body = arg
            return self._repeat(least, most, body, at)
        if op is ops.AT:
            return self._anchor(arg, at)
        if op in (ops.ASSERT, ops.ASSERT_NOT) and arg[0] == 1:
            return self._ahead(op is ops.ASSERT, arg[1], at)
        raise ValueError(f"a regex with {str(op).lower()}, which is not supported here")

    def _spend(self, steps: int) -> None:
        self._left -= steps
        if self._left < 0:
            raise ValueError("regexes that take too long to match")

    def _where(self, op: Any, arg: Any) -> int:
        if op is ops.LITERAL:
            return self._chars.get(chr(arg), 0)
        found = 0
        for c, mask in self._chars.items():
            if _is_in(c, op, arg):
                found |= mask
        return found

    def _repeat(self, least: int, most: int, body: Sequence[Any], at: int) -> int:
        for _ in range(least):
            before, at = at, self._run(body, at)
            if at in (before, 0):  # more rounds change nothing
                break
        found = frontier = at
        rounds = most - least if most != _UNBOUNDED else -1
        while frontier and rounds:
            frontier = self._run(body, frontier) & ~found
            found |= frontier
            rounds -= 1
        return found

    def _anchor(self, where: Any, at: int) -> int:
        if where in (ops.AT_BEGINNING, ops.AT_BEGINNING_STRING):
            return at & self._first
        if where in (ops.AT_END, ops.AT_END_STRING):
            return at & self._last
        if where in (ops.AT_BOUNDARY, ops.AT_NON_BOUNDARY):
            word = self._where(ops.IN, [(ops.CATEGORY, ops.CATEGORY_WORD)])
            boundary = word ^ (word << 1)
            return at & (boundary if where is ops.AT_BOUNDARY else ~boundary)
        raise ValueError(f"a regex with {str(where).lower()}, which is not supported here")

    def _ahead(self, wanted: bool, body: Sequence[Any], at: int) -> int:
        found, rest = 0, at
        while rest:
            one = rest & -rest
            rest ^= one
            if bool(self._run(body, one)) == wanted:
                found |= one
        return found


def _is_in(c: str, op: Any, arg: Any) -> bool:
    if op is ops.NOT_LITERAL:
        return ord(c) != arg
    if op is ops.ANY:
        return c != "\n"
    negated = False
    for kind, value in arg:
        if kind is ops.NEGATE:
            negated = True
        elif (
            (kind is ops.LITERAL and ord(c) == value)
            or (kind is ops.RANGE and value[0] <= ord(c) <= value[1])
            or (kind is ops.CATEGORY and _CATEGORIES[value](c))
        ):
            return not negated
    return negated
