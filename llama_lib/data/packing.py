"""Packing: documents stay whole while they fit into a row, and rows are nearly full by best-fit.

Invariant: every token of every document is in exactly one row of an epoch; only a document longer
than a row is cut, into full rows and a rest.
"""

from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from llama_lib.data.order import (
    CHUNK,
    Integers,
    Order,
    Permutations,
    Pieces,
    create,
    expand,
    number_dtype,
)
from llama_lib.data.shared import SharedArrays, is_large

# Documents packed together: enough that the rows left open at the end of a window do not count
# (one in a thousand), few enough that memory stays flat.
WINDOW = CHUNK

_ROWS, _WINDOWS = 1, 2

# (lengths, 1 .. max_length each, max_length) -> the row of each item.
Place = Callable[[npt.NDArray[np.integer], int], npt.NDArray[np.int64]]


def best_fit(lengths: npt.NDArray[np.integer], max_length: int) -> npt.NDArray[np.int64]:
    """The row of each item by best-fit decreasing: the longest item first, into the fullest row
    that has room for it, else into a new row.

    Items of one length are placed together, and rows with equal room are interchangeable, so the
    work is one step for each pair of a length and a room, not for each item.

    Args:
        lengths: 1 .. max_length each.
    """
    counts = np.bincount(lengths, minlength=max_length + 1)
    steps = _steps(counts, max_length)
    each = np.repeat(steps.each, steps.rows)
    first, number = expand(steps.rows)
    # Items in descending length take the places in the order of the steps.
    rows = np.repeat(steps.first[first] + number, each)
    by_length = np.argsort(-lengths.astype(np.int32), kind="stable")
    placed = np.empty(len(lengths), np.int64)
    placed[by_length] = rows
    return placed


def alone(lengths: npt.NDArray[np.integer], max_length: int) -> npt.NDArray[np.int64]:
    """The row of each item where every item has one of its own."""
    return np.arange(len(lengths))


class _Steps(NamedTuple):
    """Step i puts `each` items into each of the rows first .. first + rows - 1."""

    first: npt.NDArray[np.int64]
    rows: npt.NDArray[np.int64]
    each: npt.NDArray[np.int64]


def _steps(counts: npt.NDArray[np.int64], max_length: int) -> _Steps:
    # Rows that have the same room, as ranges of row numbers; bit i of `rooms` says that there are
    # rows with room i, which finds the smallest room that is enough in one operation.
    ranges: dict[int, list[tuple[int, int]]] = {}
    rooms = 0
    num_rows = 0
    steps: list[tuple[int, int, int]] = []
    for length in np.flatnonzero(counts)[::-1].tolist():
        left = int(counts[length])
        while left:
            enough = rooms >> length
            if enough:
                room = length + (enough & -enough).bit_length() - 1
                first, stop = ranges[room].pop()
            else:
                room, first = max_length, num_rows
                stop = first + -(-left // (max_length // length))
                num_rows = stop
            # The row with the least room is best for the next item too, until it has no room.
            each = min(room // length, left)
            taken = min(stop - first, left // each)
            if first + taken < stop:
                ranges.setdefault(room, []).append((first + taken, stop))
                rooms |= 1 << room
            elif enough and not ranges[room]:
                rooms ^= 1 << room
            steps.append((first, taken, each))
            left -= taken * each
            rest = room - each * length
            if rest:
                ranges.setdefault(rest, []).append((first, first + taken))
                rooms |= 1 << rest
    columns = np.array(steps, np.int64).reshape(-1, 3).T
    return _Steps(*columns)


class PackedOrder(Order):
    """Rows of whole documents, as `place` puts them there; the rest of a row is padding.

    One packing serves all epochs; each epoch permutes its rows.
    """

    def __init__(
        self,
        document_lengths: Integers,
        max_length: int,
        seed: int,
        shared: SharedArrays,
        place: Place = best_fit,
    ) -> None:
        self.num_tokens = int(document_lengths.sum(dtype=np.int64))
        if self.num_tokens == 0 or max_length < 1:
            raise ValueError(f"{self.num_tokens} tokens in rows of {max_length}")
        self.max_length = max_length
        self._permutations = Permutations(seed, shared)

        def build(folder: Path) -> None:
            _write_packing(folder, document_lengths, max_length, self._permutations, place)

        arrays = shared.load(place.__name__, build)
        # Row i has the pieces firsts[i] .. firsts[i + 1] - 1.
        self._firsts = arrays["firsts"]
        self._pieces = arrays["documents"], arrays["starts"], arrays["lengths"]
        self._count = len(self._firsts) - 1
        self._rows = lru_cache(maxsize=3)(self._permuted_rows)

    def num_rows(self, num_epochs: int) -> int:
        return num_epochs * self._count

    def epoch_of(self, sample: int) -> int:
        return sample // self._count

    def passes(self, num_samples: int) -> float:
        """How many times so many samples go through the documents."""
        return num_samples / self._count

    def pieces(self, samples: npt.NDArray[np.int64]) -> Pieces:
        rows = np.empty(len(samples), np.int64)
        epochs, numbers = np.divmod(samples, self._count)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            rows[here] = self._rows(epoch)[numbers[here]]
        first = self._firsts[rows]
        row, number = expand(self._firsts[rows + 1] - first)
        index = first[row] + number
        return Pieces(row, *(values[index].astype(np.int64) for values in self._pieces))

    def _permuted_rows(self, epoch: int) -> Integers:
        return self._permutations.of(self._count, epoch, _ROWS)


def _write_packing(
    folder: Path, lengths: Integers, max_length: int, permutations: Permutations, place: Place
) -> None:
    """Write `documents`, `starts` and `lengths` of all pieces, and `firsts` of all rows."""
    count = 0
    for first in range(0, len(lengths), CHUNK):
        count += int((-(-lengths[first : first + CHUNK].astype(np.int64) // max_length)).sum())
    arrays = (
        create(folder, "documents", number_dtype(len(lengths)), count),
        create(folder, "starts", np.int32, count),
        create(folder, "lengths", np.int32, count),
    )
    end = 0
    # How many rows there are shows only at the end; until then their sizes wait in a file.
    sizes_path = folder / "sizes"
    with sizes_path.open("wb") as sizes_file:
        for documents in _windows(folder, len(lengths), permutations):
            window = lengths[documents].astype(np.int64)
            pieces, sizes = _packed(documents, window, max_length, place)
            begin, end = end, end + len(pieces[0])
            for array, values in zip(arrays, pieces, strict=True):
                array[begin:end] = values
            sizes_file.write(sizes.astype(np.int32).tobytes())
    num_rows = sizes_path.stat().st_size // 4
    firsts = create(folder, "firsts", np.int64, num_rows + 1)
    firsts[0] = 0
    with sizes_path.open("rb") as sizes_file:
        for row in range(0, num_rows, CHUNK):
            part = np.frombuffer(sizes_file.read(4 * CHUNK), np.int32)
            ends = int(firsts[row]) + np.cumsum(part, dtype=np.int64)
            firsts[row + 1 : row + 1 + len(part)] = ends
    sizes_path.unlink()


def _windows(folder: Path, count: int, permutations: Permutations) -> Iterator[Integers]:
    """All documents in a seeded order, a window at a time."""
    if is_large(count):
        order = create(folder, "windows", number_dtype(count), count)
    else:
        order = np.empty(count, number_dtype(count))
    permutations.fill(order, 0, _WINDOWS)
    for first in range(0, count, WINDOW):
        yield order[first : first + WINDOW]
    (folder / "windows.npy").unlink(missing_ok=True)


def _packed(
    documents: Integers, lengths: npt.NDArray[np.int64], max_length: int, place: Place
) -> tuple[tuple[Integers, Integers, Integers], Integers]:
    """(document, start, length) of the pieces of a window, row after row, and the rows' sizes."""
    full, rest = np.divmod(lengths, max_length)
    cut, number = expand(full)
    items = np.flatnonzero(rest)
    placed = place(rest[items], max_length)
    # Within a row the pieces keep the seeded order, so that short documents do not always stand at
    # the end of a row.
    items = items[np.argsort(placed, kind="stable")]
    pieces = (
        np.concatenate([documents[cut], documents[items]]),
        np.concatenate([number, full[items]]) * max_length,
        np.concatenate([np.full(len(cut), max_length), rest[items]]),
    )
    sizes = np.concatenate([np.ones(len(cut), np.int64), np.bincount(placed)])
    return pieces, sizes
