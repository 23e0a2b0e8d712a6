"""Held-out loss and accuracy per source.

Invariant: measuring neither reads nor moves the training stream's data position or random state.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from llama_lib.data.loader import Row, stacked
from llama_lib.data.prepared import PreparedDataset, unigram_entropy
from llama_lib.engine import IGNORED, Engine, MicroBatch
from llama_lib.layout import BatchPlan
from llama_lib.metrics import Measure
from llama_lib.progress import made

# All held-out sources together, weighted by their label tokens.
TOTAL = "all"


class HeldOutRows(Protocol):
    """Rows that are never trained on, by source."""

    @property
    def sources(self) -> list[str]:
        """Their names."""

    def rows(self, source: str) -> Iterator[Row]:
        """The rows of one source, in one order for ever."""


@dataclass(frozen=True)
class HeldOut:
    """The held-out documents and how they are cut: unshuffled rows of `max_length` ids.

    With `document_mask` every document of a row stands alone, as in training.
    """

    dataset: PreparedDataset
    max_length: int
    document_mask: bool = False

    @cached_property
    def entropy(self) -> float:
        """Unigram entropy in nats per token: the loss of the best model that ignores context."""
        return unigram_entropy(self.dataset)

    @property
    def sources(self) -> list[str]:
        return list(self.dataset.sources)

    def rows(self, source: str) -> Iterator[Row]:
        """The rows of one source, the last one padded."""
        ends = np.cumsum(self.dataset.readers[source].lengths, dtype=np.int64)
        for number, ids in enumerate(self.dataset.only(source).rows(self.max_length)):
            padding = self.max_length - len(ids)
            labels = np.pad(ids, (0, padding), constant_values=IGNORED)
            documents = None
            if self.document_mask:
                first = number * self.max_length
                documents = row_documents(ends, first, first + len(ids), padding)
                # A document's first token follows another's last, which says nothing of it.
                labels[1:][documents[1:] != documents[:-1]] = IGNORED
            yield Row(np.pad(ids, (0, padding)), labels, documents, {source: len(ids)})


def row_documents(
    ends: npt.NDArray[np.int64], first: int, last: int, padding: int
) -> npt.NDArray[np.int32]:
    """Which document each of the tokens `first` to `last` (exclusive) is of, counted from 0.

    Args:
        ends: where each document ends, in tokens from the beginning of the source.
        padding: tokens of no document after them; they get a number of their own.
    """
    documents = np.searchsorted(ends, np.arange(first, last), side="right")
    numbers = np.cumsum(np.diff(documents, prepend=documents[0]) > 0)
    return np.pad(numbers, (0, padding), constant_values=numbers[-1] + 1).astype(np.int32)


@dataclass
class _Sums:
    loss: float = 0.0
    weight: float = 0.0
    correct: int = 0
    labels: int = 0

    def add(self, other: "_Sums") -> None:
        self.loss += other.loss
        self.weight += other.weight
        self.correct += other.correct
        self.labels += other.labels


def measure(
    engine: Engine, held_out: HeldOutRows, plan: BatchPlan, num_batches: int
) -> dict[str, Measure]:
    """Loss and accuracy of each source, and of all under "all"; sources without a label left out.

    Args:
        num_batches: at most so many global batches per source, from its beginning.
    """
    sums = {source: _Sums() for source in held_out.sources}
    for source, part in sums.items():
        for rows in _global_batches(held_out.rows(source), plan.global_batch, num_batches):
            part.add(_measured(engine, rows, plan))
    total = _Sums()
    for part in sums.values():
        total.add(part)
    return {
        name: Measure(part.loss / part.weight, part.correct / part.labels)
        for name, part in [*sums.items(), (TOTAL, total)]
        if part.weight
    }


def _measured(engine: Engine, rows: list[Row], plan: BatchPlan) -> _Sums:
    mine = rows[engine.dp_rank :: plan.dp]
    batches = [
        _micro_batch(mine[first : first + plan.batch_size])
        for first in range(0, len(mine), plan.batch_size)
    ]
    score = engine.score(batches)
    made()
    weight = sum(map(_label_weight, rows))
    return _Sums(score.loss_sum, weight, score.correct, score.labels)


def _label_weight(row: Row) -> float:
    """Label tokens of a row, each with its weight; the first token of a row is never predicted."""
    labelled = row.labels[1:] != IGNORED
    return float(labelled.sum() if row.weights is None else row.weights[1:][labelled].sum())


def _global_batches(rows: Iterator[Row], size: int, limit: int) -> Iterator[list[Row]]:
    """Batches of exactly `size` rows; the last is filled with rows without any label."""
    for _ in range(limit):
        batch = list(itertools.islice(rows, size))
        if not batch:
            return
        empty = replace(batch[0], labels=np.full_like(batch[0].labels, IGNORED))
        yield batch + [empty] * (size - len(batch))
        if len(batch) < size:
            return


def _micro_batch(rows: list[Row]) -> MicroBatch:
    part = stacked(rows)
    return MicroBatch(*map(_tensor, (part.ids, part.labels, part.documents, part.weights)))


def _tensor(array: npt.NDArray[Any] | None) -> Any:
    return None if array is None else torch.from_numpy(array)
