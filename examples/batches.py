"""Rows of tokens to batches of one shape: packed, shuffled and resumed by grain."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import grain
import numpy as np

ROUND = 64  # rows that are not packed are as long as the longest, rounded up to this
OPEN = 64  # bins that are looked at for room, the newest ones


class Example(NamedTuple):
    """One row as tokens.

    Attributes:
      row: its number in the data.
      tokens: (T + 1,).
      mask: (T + 1,), 1 for the tokens to be learned.
    """

    row: int
    tokens: np.ndarray
    mask: np.ndarray


class Batch(NamedTuple):
    """What a step sees, (..., T) all: each token, the next one, and its weight in the loss."""

    tokens: np.ndarray
    labels: np.ndarray
    weights: np.ndarray
    segment_ids: np.ndarray


def digest(examples: Sequence[Example]) -> str:
    """A hash of all tokens and masks: whether a resumed run has the data that it began with."""
    found = hashlib.sha256()
    for example in examples:
        found.update(np.stack([example.tokens, example.mask]).astype(np.int64).tobytes() + b";")
    return found.hexdigest()[:16]


def shortened(examples: Sequence[Example], length: int) -> tuple[list[Example], int, int]:
    """Those cut to `length` + 1 tokens that still have one to learn; how many were cut, dropped."""
    cut = [Example(e.row, e.tokens[: length + 1], e.mask[: length + 1]) for e in examples]
    kept = [e for e in cut if e.mask[1:].any()]
    return kept, sum(len(e.tokens) > length + 1 for e in examples), len(cut) - len(kept)


def pack(examples: Sequence[Example], length: int) -> list[list[Example]]:
    """Puts each example into the first bin that has room: bins of at most `length` tokens.

    >>> row = lambda i, size: Example(i, np.ones(size + 1, int), np.ones(size + 1, int))
    >>> [[e.row for e in bin] for bin in pack([row(0, 3), row(1, 4), row(2, 1)], 4)]
    [[0, 2], [1]]
    """
    bins: list[list[Example]] = []
    room: list[int] = []
    for example in examples:
        size = len(example.tokens) - 1
        recent = range(max(0, len(bins) - OPEN), len(bins))
        at = next((i for i in recent if room[i] >= size), len(bins))
        if at == len(bins):
            bins.append([])
            room.append(length)
        bins[at].append(example)
        room[at] -= size
    return bins


def fill(bins: Sequence[Sequence[Example]], rows: int, length: int, pad: int) -> Batch:
    """Bins to arrays of (rows, length): each example a segment of its own, the rest padding."""
    shape = rows, length
    batch = Batch(
        tokens=np.full(shape, pad, np.int32),
        labels=np.full(shape, pad, np.int32),
        weights=np.zeros(shape, np.float32),
        segment_ids=np.zeros(shape, np.int32),
    )
    for i, examples in enumerate(bins):
        start = 0
        for segment, example in enumerate(examples, 1):
            here = i, slice(start, start + len(example.tokens) - 1)
            batch.tokens[here] = example.tokens[:-1]
            batch.labels[here] = example.tokens[1:]
            batch.weights[here] = example.mask[1:]
            batch.segment_ids[here] = segment
            start += len(example.tokens) - 1
    return batch


def bins_of(
    examples: Sequence[Example], length: int, packed: bool, seed: int
) -> tuple[list[list[Example]], int]:
    """The bins, and their length in tokens. Rows are packed once, in an order that `seed` draws."""
    if packed:
        order = np.random.default_rng(seed).permutation(len(examples))
        return pack([examples[i] for i in order], length), length
    longest = max(len(e.tokens) - 1 for e in examples)
    return [[e] for e in examples], min(length, -(-longest // ROUND) * ROUND)


def dataset(
    bins: Sequence[Sequence[Example]],
    length: int,
    *,
    batch: int,
    accumulate: int,
    epochs: int,
    pad: int,
    seed: int,
) -> Any:
    """A grain data set of steps, each (`Batch` of (accumulate, batch, length), rows' numbers).

    Shuffled anew in each epoch. Each row is seen once in each epoch: the last step of one is filled
    up with padding.
    """

    def collate(some: Sequence[Sequence[Example]]) -> tuple[Batch, list[int]]:
        filled = fill(some, accumulate * batch, length, pad)
        split = Batch(*(x.reshape(accumulate, batch, length) for x in filled))
        return split, [example.row for examples in some for example in examples]

    shuffled = grain.MapDataset.source(list(bins)).seed(seed).shuffle()
    steps = shuffled.batch(accumulate * batch, drop_remainder=False, batch_fn=collate)
    return steps.repeat(epochs)
