"""Batches of the global order for one data-parallel rank, built one step ahead.

Invariant: step k holds the samples that the position gives it, whatever the number of ranks and
accumulation steps; nothing but the step number decides a batch.
"""

import hashlib
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from llama_lib.data.order import Order
from llama_lib.data.position import Position
from llama_lib.data.prepared import PreparedDataset
from llama_lib.errors import UserError

# torch's default ignore_index; criterion.IGNORED is the same, but needs torch.
IGNORED = -100


@dataclass(frozen=True)
class Row:
    """One sample: ids and labels [max_length], the rest behind the text filled with the pad id.

    `labels` are -100 where there is none: padding and, with a document mask, the first token of
    every piece. The model shifts, so the label of the first token is never used.
    `documents` [max_length] numbers the pieces of the row from 0, padding has a number of its own;
    None without a document mask. `tokens` counts the training tokens of each source. `weights`
    [max_length] say what each label counts in the loss; None: each label counts one.
    """

    ids: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    documents: npt.NDArray[np.int32] | None
    tokens: dict[str, int]
    weights: npt.NDArray[np.float32] | None = None


class RowSource(Protocol):
    """Where rows come from: sample i is the same row for every rank and every caller."""

    max_length: int

    def rows(self, samples: Sequence[int], wanted: Sequence[int]) -> tuple[list[Row], float]:
        """The rows of `wanted`, in its order, and the label tokens of all `samples` together, each
        counted with its weight.

        `samples` are those of a whole global batch, ascending; `wanted` is a rank's part of them.
        """

    def epoch_of(self, sample: int) -> int:
        """Epoch in which the row of a sample begins, from 0."""

    def state(self, sample: int) -> dict[str, Any]:
        """What is needed to begin with this sample at once; {} for prepared data."""

    def report(self) -> list[str]:
        """Lines for the end of a run: what was left out on the way."""

    def close(self) -> None:
        """End what the source has started."""


class PreparedRows:
    """Rows of a prepared dataset in a given order."""

    def __init__(
        self, dataset: PreparedDataset, order: Order, pad_id: int, document_mask: bool
    ) -> None:
        self.dataset = dataset
        self.order = order
        self.pad_id = pad_id
        self.document_mask = document_mask
        self.max_length = order.max_length
        self._sources = list(dataset.readers.items())
        counts = [len(reader) for reader in dataset.readers.values()]
        self._firsts = np.cumsum([0, *counts], dtype=np.int64)

    def rows(self, samples: Sequence[int], wanted: Sequence[int]) -> tuple[list[Row], int]:
        num_labels = self.order.num_labels(np.array(samples, np.int64), self.document_mask)
        pieces = self.order.pieces(np.array(wanted, np.int64))
        sources = np.searchsorted(self._firsts, pieces.document, side="right") - 1
        columns = (sources, pieces.document - self._firsts[sources], pieces.start, pieces.length)
        parts = list(zip(*(column.tolist() for column in columns), strict=True))
        ends = np.searchsorted(pieces.row, np.arange(len(wanted)), side="right").tolist()
        ranges = zip([0, *ends], ends, strict=False)
        return [self._row(parts[first:end]) for first, end in ranges], num_labels

    def _row(self, parts: Sequence[tuple[int, int, int, int]]) -> Row:
        """The row made of (source, document within it, start, length)."""
        ids = np.full(self.max_length, self.pad_id, np.int64)
        lengths = [length for *_, length in parts]
        tokens: dict[str, int] = {}
        filled = 0
        for source, document, start, length in parts:
            name, reader = self._sources[source]
            ids[filled : filled + length] = reader.tokens(document, start, length)
            filled += length
            tokens[name] = tokens.get(name, 0) + length
        return Row(*row_arrays(ids, lengths, self.document_mask), tokens)

    def epoch_of(self, sample: int) -> int:
        return self.order.epoch_of(sample)

    def state(self, sample: int) -> dict[str, Any]:
        return {}

    def report(self) -> list[str]:
        return []

    def close(self) -> None:
        pass


def row_arrays(
    ids: npt.NDArray[np.int64], lengths: Sequence[int], document_mask: bool
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int32] | None]:
    """(ids, labels, documents) of a row whose pieces have these lengths; the rest is padding."""
    filled = sum(lengths)
    padded = filled < len(ids)
    labels = ids.copy() if padded or document_mask else ids
    labels[filled:] = IGNORED
    if not document_mask:
        return ids, labels, None
    sizes = [*lengths, len(ids) - filled] if padded else lengths
    labels[np.cumsum([0, *lengths[:-1]])] = IGNORED
    return ids, labels, np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)


@dataclass(frozen=True)
class Rows:
    """A micro-batch: ids and labels [rows, max_length], documents and weights where rows have
    them."""

    ids: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    documents: npt.NDArray[np.int32] | None
    weights: npt.NDArray[np.float32] | None = None


@dataclass(frozen=True)
class StepRows:
    """What one rank needs for a step.

    `num_labels` counts the label tokens of the global batch, each with its weight; `tokens` the
    training tokens of each source in this rank's rows; `samples` are those of the global batch.
    """

    micro_batches: list[Rows]
    num_labels: float
    tokens: dict[str, int]
    samples: list[int]


class BatchLoader:
    """The micro-batches of every step for one rank.

    `data_wait` is how many seconds the caller of `steps` waited for its latest step.
    """

    def __init__(
        self,
        source: RowSource,
        global_batch: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        accumulation: int = 1,
        position: Position = Position(),  # noqa: B008 - frozen
    ) -> None:
        share = dp_size * accumulation
        if global_batch < 1 or global_batch % share:
            raise UserError(
                f"a global batch of {global_batch} rows cannot be shared by {dp_size} data-"
                f"parallel ranks with {accumulation} accumulation steps: expected a "
                f"multiple of {share} (--batch_size, --accumulation_steps, --global_batch_tokens)."
            )
        self.source = source
        self.global_batch = global_batch
        self.dp_rank = dp_rank
        self.dp_size = dp_size
        self.accumulation = accumulation
        self.position = position
        self.batch_size = global_batch // share
        self.data_wait = 0.0

    def batch(self, step: int) -> StepRows:
        """The rows of a step for this rank; step counts from 0."""
        samples = self.position.samples(step, self.global_batch)
        size = self.batch_size
        wanted: list[int] = []
        for part in range(self.accumulation):
            start = (part * self.dp_size + self.dp_rank) * size
            wanted += samples[start : start + size]
        rows, num_labels = self.source.rows(samples, wanted)
        tokens: dict[str, int] = {}
        for row in rows:
            for source, count in row.tokens.items():
                tokens[source] = tokens.get(source, 0) + count
        parts = [stacked(rows[first : first + size]) for first in range(0, len(rows), size)]
        return StepRows(parts, num_labels, tokens, samples)

    def steps(self, start: int, stop: int) -> Iterator[StepRows]:
        """Batches of the steps start..stop-1; a thread builds the next while one is in use."""
        if start >= stop:
            return
        with ThreadPoolExecutor(1, thread_name_prefix="batches") as pool:
            following = pool.submit(self.batch, start)
            for step in range(start, stop):
                asked = time.perf_counter()
                batch = following.result()
                self.data_wait = time.perf_counter() - asked
                if step + 1 < stop:
                    following = pool.submit(self.batch, step + 1)
                yield batch

    def close(self) -> None:
        """End what the source of the rows has started."""
        self.source.close()


def stacked(rows: Sequence[Row]) -> Rows:
    """The micro-batch of these rows."""
    ids = np.stack([row.ids for row in rows])
    # Without padding and mask labels are the ids themselves: one array does for both.
    same = all(row.labels is row.ids for row in rows)
    labels = ids if same else np.stack([row.labels for row in rows])
    documents = [row.documents for row in rows if row.documents is not None]
    weights = [row.weights for row in rows if row.weights is not None]
    return Rows(
        ids,
        labels,
        np.stack(documents) if documents else None,
        np.stack(weights) if weights else None,
    )


def rows_hash(step: StepRows) -> str:
    """sha256 of the ids of one rank's step: ranks of one model replica compare it."""
    digest = hashlib.sha256()
    for rows in step.micro_batches:
        digest.update(rows.ids.astype("<i8").tobytes())
    return digest.hexdigest()
