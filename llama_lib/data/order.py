"""The one seeded global order of training rows, computed for any position without walking to it.

Invariant: rows do not overlap; over any number of whole epochs each token appears in exactly one
row, but for those of the incomplete row at the very end.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from llama_lib.data.shared import SharedArrays, create, is_large

# Entries worked on at once, so that building an array of any size takes flat memory.
CHUNK = 1 << 20

_DOCUMENTS, _ROWS = 0, 1

Integers = npt.NDArray[np.integer]


class Piece(NamedTuple):
    """Part of a row: `length` ids of `document`, from its id number `start` on."""

    document: int
    start: int
    length: int


class Pieces(NamedTuple):
    """The pieces of several rows, row after row; `row` counts the rows from 0.

    Every row has a piece and none is empty.
    """

    row: npt.NDArray[np.int64]
    document: npt.NDArray[np.int64]
    start: npt.NDArray[np.int64]
    length: npt.NDArray[np.int64]


class Order(ABC):
    """Which ids make the row of a sample, for every sample from 0 on.

    A row has at most `max_length` ids; what is missing is padding at its end.
    """

    max_length: int

    @abstractmethod
    def num_rows(self, num_epochs: int) -> int:
        """Rows in so many epochs."""

    @abstractmethod
    def epoch_of(self, sample: int) -> int:
        """Epoch in which the row of a sample begins, from 0."""

    @abstractmethod
    def pieces(self, samples: npt.NDArray[np.int64]) -> Pieces:
        """The pieces of documents that make the rows of these samples."""

    def row_documents(self, sample: int) -> list[Piece]:
        """The pieces of documents that make the row of a sample, in order."""
        if sample < 0:
            raise IndexError(f"sample {sample}")
        found = self.pieces(np.array([sample]))
        columns = (found.document.tolist(), found.start.tolist(), found.length.tolist())
        return [Piece(*each) for each in zip(*columns, strict=True)]

    def num_labels(self, samples: npt.NDArray[np.int64], document_mask: bool) -> int:
        """Label tokens of these rows together: all but the first of a row, or of a piece."""
        found = self.pieces(samples)
        return int(found.length.sum()) - (len(found.length) if document_mask else len(samples))


class Permutations:
    """Seeded permutations, one for each epoch and purpose; large ones in shared files."""

    def __init__(self, seed: int, shared: SharedArrays | None = None) -> None:
        if not 0 <= seed < 1 << 32:
            raise ValueError(f"seed {seed} is not in 0 .. 2^32 - 1")
        self.seed = seed
        self._shared = shared

    def of(self, count: int, epoch: int, purpose: int) -> Integers:
        """The numbers below `count` in the order of an epoch."""
        if self._shared is None or not is_large(count):
            order = np.empty(count, number_dtype(count))
            self.fill(order, epoch, purpose)
            return order

        def build(folder: Path) -> None:
            self.fill(create(folder, "order", number_dtype(count), count), epoch, purpose)

        return self.of_epoch(f"order-{purpose}", epoch, build)["order"]

    def of_epoch(self, name: str, epoch: int, build: Callable[[Path], None]) -> dict[str, Integers]:
        """Shared arrays of one epoch; those nobody needs any more are removed."""
        assert self._shared is not None
        arrays = self._shared.load(f"{name}-{epoch}", build)
        # Two epochs meet in a carried row; the one before them is over.
        self._shared.forget(f"{name}-{epoch - 2}")
        return arrays

    def fill(self, order: Integers, epoch: int, purpose: int) -> None:
        """Write the permutation of an epoch into an array."""
        for first in range(0, len(order), CHUNK):
            stop = min(first + CHUNK, len(order))
            order[first:stop] = np.arange(first, stop, dtype=order.dtype)
        # numpy freezes the stream of RandomState for good, that of its newer Generator not: a run
        # resumed after an upgrade has to see the same order.
        np.random.RandomState([self.seed, epoch, purpose]).shuffle(order)


def number_dtype(count: int) -> npt.DTypeLike:
    return np.uint32 if count < 1 << 32 else np.int64


class RowOrder(Order):
    """Rows of one token stream: nothing is padded, nothing lost.

    Each epoch permutes all documents; the token stream is one epoch after the other; row r is
    tokens r*max_length .. (r+1)*max_length - 1 of it, so the rest of an epoch begins the next.
    Samples visit the rows that lie wholly in an epoch in a permuted order, then the row that
    carries its rest into the next: so the first n epochs are the first num_rows(n) samples.
    """

    def __init__(
        self,
        document_lengths: Integers,
        max_length: int,
        seed: int,
        shared: SharedArrays | None = None,
    ) -> None:
        self.num_tokens = int(document_lengths.sum(dtype=np.int64))
        if self.num_tokens == 0 or max_length < 1:
            raise ValueError(f"{self.num_tokens} tokens in rows of {max_length}")
        self.max_length = max_length
        self._lengths = document_lengths
        self._permutations = Permutations(seed, shared)
        self._in_files = shared is not None and is_large(len(document_lengths))
        # Two epochs meet in a carried row, and a prefetching thread may be one ahead.
        self._documents = lru_cache(maxsize=3)(self._permuted_documents)
        self._rows = lru_cache(maxsize=3)(self._permuted_rows)

    def num_rows(self, num_epochs: int) -> int:
        """Whole rows in so many epochs."""
        return num_epochs * self.num_tokens // self.max_length

    def passes(self, num_samples: int) -> float:
        """How many times so many samples go through the documents."""
        return num_samples * self.max_length / self.num_tokens

    def epoch_of(self, sample: int) -> int:
        return sample * self.max_length // self.num_tokens

    def pieces(self, samples: npt.NDArray[np.int64]) -> Pieces:
        starts = self._row_numbers(samples) * self.max_length
        return self._cut(starts, starts + self.max_length)

    def _row_numbers(self, samples: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        numbers = np.array(samples, np.int64)
        epochs = numbers * self.max_length // self.num_tokens
        for epoch in np.unique(epochs).tolist():
            first, rows = self._first_row(epoch), self._rows(epoch)
            whole = (epochs == epoch) & (numbers < first + len(rows))
            numbers[whole] = first + rows[numbers[whole] - first].astype(np.int64)
        return numbers

    def _cut(self, starts: npt.NDArray[np.int64], stops: npt.NDArray[np.int64]) -> Pieces:
        """The pieces of the token stream between each start and its stop."""
        first, last = starts // self.num_tokens, (stops - 1) // self.num_tokens
        row, number = expand(last - first + 1)
        epochs = first[row] + number
        starts = np.maximum(starts[row] - epochs * self.num_tokens, 0)
        stops = np.minimum(stops[row] - epochs * self.num_tokens, self.num_tokens)
        found = [np.empty((4, 0), np.int64)]
        for epoch in np.unique(epochs).tolist():
            documents, ends = self._documents(epoch)
            here = np.flatnonzero(epochs == epoch)
            begin = np.searchsorted(ends, starts[here], side="right")
            end = np.searchsorted(ends, stops[here], side="left")
            part, number = expand(end - begin + 1)
            index = begin[part] + number
            document_start = np.where(index > 0, ends[index - 1], 0)
            start = np.maximum(starts[here][part], document_start)
            length = np.minimum(stops[here][part], ends[index]) - start
            pieces = np.stack([row[here][part], documents[index], start - document_start, length])
            found.append(pieces[:, length > 0])  # a document may be empty
        together = np.concatenate(found, axis=1)
        # By epoch so far; the pieces of a row that carries its end into the next belong together.
        return Pieces(*together[:, np.argsort(together[0], kind="stable")])

    def _first_row(self, epoch: int) -> int:
        """The first row that begins in an epoch."""
        return -(-epoch * self.num_tokens // self.max_length)

    def _permuted_documents(self, epoch: int) -> tuple[Integers, Integers]:
        """Documents of an epoch in their order, and where each ends in the epoch's stream."""
        count = len(self._lengths)
        if not self._in_files:
            documents = self._permutations.of(count, epoch, _DOCUMENTS)
            return documents, np.cumsum(self._lengths[documents], dtype=np.int64)

        def build(folder: Path) -> None:
            documents = create(folder, "documents", number_dtype(count), count)
            self._permutations.fill(documents, epoch, _DOCUMENTS)
            ends = create(folder, "ends", np.int64, count)
            before = 0
            for first in range(0, count, CHUNK):
                lengths = self._lengths[documents[first : first + CHUNK]]
                ends[first : first + CHUNK] = before + np.cumsum(lengths, dtype=np.int64)
                before = int(ends[first + len(lengths) - 1])

        arrays = self._permutations.of_epoch("documents", epoch, build)
        return arrays["documents"], arrays["ends"]

    def _permuted_rows(self, epoch: int) -> Integers:
        """Order of the rows wholly inside an epoch, counted from its first row."""
        last = (epoch + 1) * self.num_tokens // self.max_length
        return self._permutations.of(max(0, last - self._first_row(epoch)), epoch, _ROWS)


def expand(
    counts: npt.NDArray[np.int64],
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """For `counts` things of each kind: the kind of every thing, and its number in the kind."""
    kind = np.repeat(np.arange(len(counts)), counts)
    return kind, np.arange(len(kind)) - np.repeat(np.cumsum(counts) - counts, counts)
