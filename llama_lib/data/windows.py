"""Shuffle the documents of a window and cut them into rows.

Invariant: the rows of a group and the rest it leaves hold the tokens of its windows, each once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

_DOCUMENTS, _ROWS = 0, 1

# A document, or a piece of one: the file, the part of it that its record is counted from, the
# record, the first token and the number of tokens.
PIECE = np.dtype(
    [("file", "<i4"), ("part", "<i8"), ("record", "<i8"), ("start", "<i8"), ("length", "<i8")]
)


@dataclass(frozen=True)
class Tokens:
    """Ids one after another [tokens], and the pieces of documents they are [pieces]."""

    ids: npt.NDArray[np.integer]
    pieces: npt.NDArray[np.void]

    @classmethod
    def none(cls) -> Tokens:
        return cls(np.empty(0, np.uint16), np.empty(0, PIECE))

    @cached_property
    def ends(self) -> npt.NDArray[np.int64]:
        """Where each piece ends [pieces]."""
        return np.cumsum(self.pieces["length"], dtype=np.int64)

    def cut(self, start: int, stop: int) -> Tokens:
        """Tokens start..stop-1, with the pieces shortened accordingly; a copy."""
        if start >= stop:
            return Tokens(self.ids[:0], self.pieces[:0])
        first = int(np.searchsorted(self.ends, start, side="right"))
        last = int(np.searchsorted(self.ends, stop, side="left"))
        pieces = self.pieces[first : last + 1].copy()
        before = start - (int(self.ends[first]) - int(pieces["length"][0]))
        pieces["length"][-1] -= int(self.ends[last]) - stop
        pieces["start"][0] += before
        pieces["length"][0] -= before
        return Tokens(self.ids[start:stop].copy(), pieces)


def joined(parts: Sequence[Tokens]) -> Tokens:
    """One after another."""
    return Tokens(
        np.concatenate([part.ids for part in parts]),
        np.concatenate([part.pieces for part in parts]),
    )


def shuffled(chunks: Sequence[Tokens], seed: int, epoch: int, window: int) -> Tokens:
    """All documents of a window in an order that (seed, epoch, window) decide."""
    tokens = joined(chunks)
    order = permutation(len(tokens.pieces), seed, epoch, window, _DOCUMENTS)
    if not len(order):
        return tokens
    starts = tokens.ends - tokens.pieces["length"]
    ids = [tokens.ids[starts[number] : tokens.ends[number]] for number in order]
    return Tokens(np.concatenate(ids), tokens.pieces[order])


def permutation(count: int, *key: int) -> npt.NDArray[np.integer]:
    # As in order.py: numpy freezes the stream of RandomState for good.
    order = np.arange(count, dtype=np.int64)
    np.random.RandomState(key).shuffle(order)
    return order


class Group:
    """The rows that a window completes, in their order; the rest goes into the next group.

    `carried` is what the groups before left over.
    """

    def __init__(
        self, carried: Tokens, window: Tokens, max_length: int, seed: int, epoch: int, number: int
    ) -> None:
        tokens = joined([carried, window])
        self.num_rows = len(tokens.ids) // max_length
        self.rest = tokens.cut(self.num_rows * max_length, len(tokens.ids))
        self._tokens = tokens
        self._max_length = max_length
        # Rows of one long document would else stand in one batch. The row that was begun before
        # stays the first: no document moves further than by a window.
        first = min(self.num_rows, 1 if len(carried.ids) else 0)
        others = first + permutation(self.num_rows - first, seed, epoch, number, _ROWS)
        self._order = np.concatenate([np.arange(first), others])

    def row(self, number: int) -> Tokens:
        start = int(self._order[number]) * self._max_length
        return self._tokens.cut(start, start + self._max_length)

    @cached_property
    def num_pieces(self) -> npt.NDArray[np.int64]:
        """Pieces of documents in each row."""
        starts = self._order * self._max_length
        ends = self._tokens.ends
        last = np.searchsorted(ends, starts + self._max_length, side="left")
        return last - np.searchsorted(ends, starts, side="right") + 1
