"""Rows of random ids, for measuring speed without data.

Invariant: a sample is the same row for every rank and every run of the same seed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from llama_lib.data.loader import Row, row_arrays
from llama_lib.data.training_data import TrainingData

RANDOM = "random"


class RandomRows:
    """Rows of ids drawn uniformly from a vocabulary; each row is one document, and full."""

    def __init__(self, vocab_size: int, max_length: int, seed: int, document_mask: bool) -> None:
        self.vocab_size = vocab_size
        self.max_length = max_length
        self.seed = seed
        self.document_mask = document_mask

    def rows(self, samples: Sequence[int], wanted: Sequence[int]) -> tuple[list[Row], int]:
        # The first token of a row has no label.
        return [self._row(sample) for sample in wanted], len(samples) * (self.max_length - 1)

    def _row(self, sample: int) -> Row:
        ids = np.random.default_rng([self.seed, sample]).integers(
            self.vocab_size, size=self.max_length, dtype=np.int64
        )
        arrays = row_arrays(ids, [self.max_length], self.document_mask)
        return Row(*arrays, {RANDOM: self.max_length})

    def epoch_of(self, sample: int) -> int:
        return 0

    def state(self, sample: int) -> dict[str, Any]:
        return {}

    def report(self) -> list[str]:
        return []

    def close(self) -> None:
        pass


def random_data(vocab_size: int, max_length: int, seed: int, document_mask: bool) -> TrainingData:
    """As many random rows as a run asks for."""
    facts = f"{RANDOM} {vocab_size} {max_length} {seed}"
    return TrainingData(
        identity=hashlib.sha256(facts.encode()).hexdigest(),
        tokenizer_hash="none",
        open_rows=lambda state: RandomRows(vocab_size, max_length, seed, document_mask),
        passages=lambda samples, state: [[] for _ in samples],
        lines=[f"rows of {max_length} random ids below {vocab_size:,}, seed {seed}"],
    )
