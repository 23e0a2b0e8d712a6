"""Held-out loss per source and text samples of the model being trained.

Invariant: neither reads or moves the training stream's data position or random state.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from llama_lib.data.prepared import PreparedDataset, unigram_entropy
from llama_lib.engine import IGNORED, Engine, MicroBatch
from llama_lib.layout import BatchPlan

SAMPLE_TOKENS = 48
PROMPT_TOKENS = 8
TEMPERATURE = 0.8

# All held-out sources together, weighted by their label tokens.
TOTAL = "all"


@dataclass(frozen=True)
class HeldOutRow:
    """Each [max_length]: ids, labels (-100: no loss) and, with a document mask, the documents."""

    ids: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    documents: npt.NDArray[np.int32] | None

    @property
    def num_labels(self) -> int:
        """Tokens that are predicted: the first of a row never is."""
        return int((self.labels[1:] != IGNORED).sum())


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

    def rows(self, source: str) -> Iterator[HeldOutRow]:
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
            yield HeldOutRow(np.pad(ids, (0, padding)), labels, documents)


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


def held_out_losses(
    engine: Engine, held_out: HeldOut, plan: BatchPlan, num_batches: int
) -> dict[str, float]:
    """Mean loss in nats per token for each source, and for all under "all".

    Args:
        num_batches: at most so many global batches per source, from its beginning.
    """
    losses: dict[str, float] = {}
    sum_all, labels_all = 0.0, 0
    for source in held_out.dataset.sources:
        total, labels = 0.0, 0
        for rows in _global_batches(held_out.rows(source), plan.global_batch, num_batches):
            mine = rows[engine.dp_rank :: plan.dp]
            batches = [
                _micro_batch(mine[first : first + plan.batch_size])
                for first in range(0, len(mine), plan.batch_size)
            ]
            total += engine.loss_sum(batches).item()
            labels += sum(row.num_labels for row in rows)
        if labels:
            losses[source] = total / labels
            sum_all, labels_all = sum_all + total, labels_all + labels
    if labels_all:
        losses[TOTAL] = sum_all / labels_all
    return losses


def _global_batches(
    rows: Iterator[HeldOutRow], size: int, limit: int
) -> Iterator[list[HeldOutRow]]:
    """Batches of exactly `size` rows; the last is filled with rows without any label."""
    for _ in range(limit):
        batch = list(itertools.islice(rows, size))
        if not batch:
            return
        empty = replace(batch[0], labels=np.full_like(batch[0].labels, IGNORED))
        yield batch + [empty] * (size - len(batch))
        if len(batch) < size:
            return


def _micro_batch(rows: list[HeldOutRow]) -> MicroBatch:
    ids = torch.from_numpy(np.stack([row.ids for row in rows]))
    labels = torch.from_numpy(np.stack([row.labels for row in rows]))
    documents = [row.documents for row in rows if row.documents is not None]
    return MicroBatch(ids, labels, torch.from_numpy(np.stack(documents)) if documents else None)


def sample_text(
    engine: Engine, tokenizer: Any, held_out: HeldOut | None, plan: BatchPlan, step: int
) -> str:
    """Text the model writes after the first tokens of a held-out document (else after EOS).

    One forward pass per token through the training layout, so it works wherever training does.
    """
    ids = [tokenizer.eos_token_id]
    if held_out is not None and held_out.dataset.num_documents:
        text = held_out.dataset.tokens(0)[:PROMPT_TOKENS].tolist()
        ids = [each for each in text if each != tokenizer.eos_token_id] or ids
    generator = torch.Generator().manual_seed(engine.options.training.seed + step)
    length = plan.max_length
    # A pipeline keeps the shapes of a training step; elsewhere one row is enough.
    num_rows = plan.batch_size * plan.accumulation if engine.layout.pp > 1 else 1
    for _ in range(min(SAMPLE_TOKENS, length - len(ids))):
        rows = torch.zeros(num_rows, length, dtype=torch.long)
        rows[0, : len(ids)] = torch.tensor(ids)
        logits = engine.next_token_logits(rows, len(ids) - 1).cpu()
        choice = torch.multinomial(
            torch.softmax(logits / TEMPERATURE, -1), 1, generator=generator
        ).to(engine.device)
        dist.broadcast(choice, 0)  # rounding differs between hosts; the text must not
        ids.append(int(choice.item()))
        if ids[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(ids)
