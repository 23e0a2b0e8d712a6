"""The one seeded global order of training rows, computed for any position without walking to it.

Invariant: rows do not overlap; over any number of whole epochs each token appears in exactly one
row, but for those of the incomplete row at the very end.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

_DOCUMENTS, _ROWS = 0, 1


class Piece(NamedTuple):
    """Part of a row: `length` ids of `document`, from its id number `start` on."""

    document: int
    start: int
    length: int


class RowOrder:
    """Which ids make row `i`, for every i >= 0.

    Each epoch permutes all documents; the token stream is one epoch after the other; row r is
    tokens r*max_length .. (r+1)*max_length - 1 of it, so the rest of an epoch begins the next.
    Samples visit the rows that lie wholly in an epoch in a permuted order, then the row that
    carries its rest into the next: so the first n epochs are the first num_rows(n) samples.
    """

    def __init__(
        self, document_lengths: npt.NDArray[np.integer], max_length: int, seed: int
    ) -> None:
        self.num_tokens = int(document_lengths.sum(dtype=np.int64))
        if self.num_tokens == 0 or max_length < 1:
            raise ValueError(f"{self.num_tokens} tokens in rows of {max_length}")
        if not 0 <= seed < 1 << 32:
            raise ValueError(f"seed {seed} is not in 0 .. 2^32 - 1")
        self.max_length = max_length
        self.seed = seed
        self._lengths = document_lengths
        # Two epochs meet in a carried row, and a prefetching thread may be one ahead.
        self._documents = lru_cache(maxsize=3)(self._permuted_documents)
        self._rows = lru_cache(maxsize=3)(self._permuted_rows)

    def num_rows(self, num_epochs: int) -> int:
        """Whole rows in so many epochs."""
        return num_epochs * self.num_tokens // self.max_length

    def dropped_tokens(self, num_epochs: int) -> int:
        """Tokens at the end of so many epochs that fill no row."""
        return num_epochs * self.num_tokens % self.max_length

    def epoch_of(self, sample: int) -> int:
        """Epoch in which the row of a sample begins, from 0."""
        return sample * self.max_length // self.num_tokens

    def row_documents(self, sample: int) -> list[Piece]:
        """The pieces of documents that make the row of a sample, in order."""
        if sample < 0:
            raise IndexError(f"sample {sample}")
        epoch = self.epoch_of(sample)
        first = self._first_row(epoch)
        rows = self._rows(epoch)
        within = sample - first
        row = first + (int(rows[within]) if within < len(rows) else within)
        return list(self._pieces(row * self.max_length, self.max_length))

    def _pieces(self, position: int, count: int) -> Iterator[Piece]:
        while count:
            epoch, offset = divmod(position, self.num_tokens)
            documents, ends = self._documents(epoch)
            index = int(np.searchsorted(ends, offset, side="right"))
            while count and index < len(ends):
                document = int(documents[index])
                start = offset - (int(ends[index]) - int(self._lengths[document]))
                taken = min(count, int(ends[index]) - offset)
                if taken:
                    yield Piece(document, start, taken)
                offset += taken
                position += taken
                count -= taken
                index += 1

    def _first_row(self, epoch: int) -> int:
        """The first row that begins in an epoch."""
        return -(-epoch * self.num_tokens // self.max_length)

    def _permuted_documents(
        self, epoch: int
    ) -> tuple[npt.NDArray[np.integer], npt.NDArray[np.int64]]:
        """Documents of an epoch in their order, and where each ends in the epoch's stream."""
        documents = self._permutation(len(self._lengths), epoch, _DOCUMENTS)
        return documents, np.cumsum(self._lengths[documents], dtype=np.int64)

    def _permuted_rows(self, epoch: int) -> npt.NDArray[np.integer]:
        """Order of the rows wholly inside an epoch, counted from its first row."""
        last = (epoch + 1) * self.num_tokens // self.max_length
        return self._permutation(max(0, last - self._first_row(epoch)), epoch, _ROWS)

    def _permutation(self, count: int, epoch: int, purpose: int) -> npt.NDArray[np.integer]:
        # numpy freezes the stream of RandomState for good, that of its newer Generator not: a run
        # resumed after an upgrade has to see the same order.
        order: npt.NDArray[np.integer] = np.arange(
            count, dtype=np.uint32 if count < 1 << 32 else np.int64
        )
        np.random.RandomState([self.seed, epoch, purpose]).shuffle(order)
        return order
