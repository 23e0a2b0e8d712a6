"""Rows of conversations: ids, labels of the trained roles only, their weights, and the borders.

Invariant: a conversation is in one row, from its first token on, and its labels are those it would
have alone: its own first token has none, whatever stands in front of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llama_lib.data.chat.selection import Chosen, Loss
from llama_lib.data.loader import IGNORED, Row, row_arrays
from llama_lib.data.order import Order

# A conversation: the name of its source, and its place among those chosen of it.
Part = tuple[str, int]


@dataclass(frozen=True)
class RowMaker:
    """Makes a row of conversations; `isolated` marks their borders, which a shared row needs."""

    chosen: Mapping[str, Chosen]
    max_length: int
    pad_id: int
    loss: Loss
    isolated: bool

    def row(self, parts: Sequence[Part]) -> Row:
        ids = np.full(self.max_length, self.pad_id, np.int64)
        weights = np.zeros(self.max_length, np.float32)
        lengths: list[int] = []
        tokens: dict[str, int] = {}
        filled = 0
        for name, index in parts:
            piece, roles = self.chosen[name].tokens(index)
            end = filled + len(piece)
            ids[filled:end] = piece
            weights[filled:end] = self.loss.weights(roles)
            lengths.append(len(piece))
            tokens[name] = tokens.get(name, 0) + len(piece)
            filled = end
        _, _, documents = row_arrays(ids, lengths, self.isolated)
        labels = np.where(weights > 0, ids, IGNORED)
        return Row(ids, labels, documents, tokens, weights if self._weighted else None)

    @property
    def _weighted(self) -> bool:
        """Whether some labels count neither one nor nothing."""
        return not set(self.loss.by_role.tolist()) <= {0.0, 1.0}


class ConversationRows:
    """Rows to train on, in a given order; conversations are numbered through all sources."""

    def __init__(self, maker: RowMaker, order: Order) -> None:
        self.maker = maker
        self.order = order
        self.max_length = maker.max_length
        self._names = list(maker.chosen)
        chosen = list(maker.chosen.values())
        self._firsts = np.cumsum([0, *map(len, chosen)], dtype=np.int64)
        self._num_labels = np.concatenate([each.num_labels for each in chosen])

    def rows(self, samples: Sequence[int], wanted: Sequence[int]) -> tuple[list[Row], float]:
        pieces = self.order.pieces(np.array(samples, np.int64))
        num_labels = float(self._num_labels[pieces.document].sum())
        return [self.maker.row(parts) for parts in self.conversations(wanted)], num_labels

    def conversations(self, samples: Sequence[int]) -> list[list[Part]]:
        """The conversations of each row, in order."""
        pieces = self.order.pieces(np.array(samples, np.int64))
        sources = np.searchsorted(self._firsts, pieces.document, side="right") - 1
        within = pieces.document - self._firsts[sources]
        rows: list[list[Part]] = [[] for _ in samples]
        columns = (pieces.row.tolist(), sources.tolist(), within.tolist())
        for row, source, index in zip(*columns, strict=True):
            rows[row].append((self._names[source], index))
        return rows

    def epoch_of(self, sample: int) -> int:
        return self.order.epoch_of(sample)

    def state(self, sample: int) -> dict[str, Any]:
        return {}

    def report(self) -> list[str]:
        return []

    def close(self) -> None:
        pass


class HeldOutConversations:
    """Rows that are never trained on, in one order for ever: the conversations by their hashes.

    However the files are sorted, the first rows of a source are a fair part of all.
    """

    def __init__(self, maker: RowMaker) -> None:
        self.maker = maker

    @property
    def sources(self) -> list[str]:
        return [name for name, chosen in self.maker.chosen.items() if len(chosen)]

    @property
    def num_conversations(self) -> int:
        return sum(map(len, self.maker.chosen.values()))

    @property
    def num_tokens(self) -> int:
        return sum(chosen.num_tokens for chosen in self.maker.chosen.values())

    def rows(self, source: str) -> Iterator[Row]:
        """The rows of one source; those that follow each other share one while it has room."""
        chosen = self.maker.chosen[source]
        hashes = chosen.source.about["hash"][chosen.numbers]
        parts: list[Part] = []
        filled = 0
        for index in np.argsort(hashes, kind="stable").tolist():
            length = int(chosen.lengths[index])
            shares = self.maker.isolated and filled + length <= self.maker.max_length
            if parts and not shares:
                yield self.maker.row(parts)
                parts, filled = [], 0
            parts.append((source, index))
            filled += length
        if parts:
            yield self.maker.row(parts)
