"""Held-out loss per source and text samples of the model being trained.

Invariant: neither reads or moves the training stream's data position or random state.
"""

from collections.abc import Iterator
from dataclasses import dataclass
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

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class HeldOut:
    """The held-out documents and how they are cut: unshuffled rows of `max_length` ids."""

    dataset: PreparedDataset
    max_length: int

    @cached_property
    def entropy(self) -> float:
        """Unigram entropy in nats per token: the loss of the best model that ignores context."""
        return unigram_entropy(self.dataset)

    def rows(self, source: str) -> Iterator[tuple[Rows, int]]:
        """(ids [max_length], how many of them are text) of one source, the last row padded."""
        for ids in self.dataset.only(source).rows(self.max_length):
            padded = np.zeros(self.max_length, np.int64)
            padded[: len(ids)] = ids
            yield padded, len(ids)


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
            labels += sum(max(0, length - 1) for _, length in rows)
        if labels:
            losses[source] = total / labels
            sum_all, labels_all = sum_all + total, labels_all + labels
    if labels_all:
        losses[TOTAL] = sum_all / labels_all
    return losses


def _global_batches(
    rows: Iterator[tuple[Rows, int]], size: int, limit: int
) -> Iterator[list[tuple[Rows, int]]]:
    """Batches of exactly `size` rows; the last is filled with rows without any label."""
    for _ in range(limit):
        batch = [row for row, _ in zip(rows, range(size), strict=False)]
        if not batch:
            return
        empty = (np.zeros_like(batch[0][0]), 0)
        yield batch + [empty] * (size - len(batch))
        if len(batch) < size:
            return


def _micro_batch(rows: list[tuple[Rows, int]]) -> MicroBatch:
    ids = torch.from_numpy(np.stack([ids for ids, _ in rows]))
    labels = ids.clone()
    for index, (_, length) in enumerate(rows):
        labels[index, length:] = IGNORED
    return MicroBatch(ids, labels)


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
