"""What a run trains on, prepared tokens or a stream of text, behind one face.

Invariant: equal `identity` on all hosts means the same rows under the same sample numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from llama_lib.data.loader import RowSource

if TYPE_CHECKING:
    from llama_lib.config import Options


class Document(NamedTuple):
    """A document as a passage names it."""

    source: str
    file: str
    number: int

    def name(self, options: Options) -> str:
        """In the words by which a user finds it."""
        if options.script == "finetune":
            return f"record {self.number} of {self.file}"
        if options.data.streaming:
            return f"record {self.number} of {self.file} ({self.source})"
        return f"document {self.number} of {self.source} ({self.file})"


class Passage(NamedTuple):
    """Part of a row: `length` tokens from token `start` of a document.

    `source`, `file` and `number` together name the document, and the same one for as long as the
    files do not change. `number` is the one by which a user finds it: in prepared data what
    `inspect --document` takes, in a stream how many readable records of `file` are before it, of
    a conversation the line of `file` where it begins, in a table its row, from 1.
    """

    source: str
    file: str
    number: int
    start: int
    length: int

    @property
    def document(self) -> Document:
        return Document(self.source, self.file, self.number)


@dataclass
class TrainingData:
    """Rows to train on and what belongs to them.

    Attributes:
        changes: what keeps a checkpoint with such a state from being continued with these data,
            where more can be said than that the identity differs.
        num_rows: whole rows in so many epochs; None for a stream, whose length nobody knows.
        open_rows: the rows, from the state a checkpoint kept ({} at the beginning).
        passages: for every sample of a step the documents it is made of; the second argument is
            what the ledger kept of the step.
        available: tokens of each source in one pass, where known.
        repetitions: passes over each weighted entry in so many samples; None without weights.
        lines: what a reader of the log needs to know.
    """

    identity: str
    tokenizer_hash: str
    open_rows: Callable[[dict[str, Any]], RowSource]
    passages: Callable[[Sequence[int], dict[str, Any]], list[list[Passage]]]
    changes: Callable[[dict[str, Any]], list[str]] = lambda state: []
    num_rows: Callable[[int], int] | None = None
    repetitions: Callable[[int], dict[str, float]] | None = None
    held_out: Any = None
    available: dict[str, int] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)


def prepared_data(
    dataset: Any,
    max_length: int,
    seed: int,
    packing: str,
    document_mask: bool,
    pad_id: int,
    cache_dir: str | Path,
) -> TrainingData:
    """Rows of a prepared dataset."""
    from llama_lib.data.arrange import arrange
    from llama_lib.data.loader import PreparedRows

    order = arrange(dataset, max_length, seed, packing, cache_dir)

    def open_rows(state: dict[str, Any]) -> RowSource:
        return PreparedRows(dataset, order, pad_id, document_mask)

    def passages(samples: Sequence[int], state: dict[str, Any]) -> list[list[Passage]]:
        return [[passage(*piece) for piece in order.row_documents(sample)] for sample in samples]

    def passage(document: int, start: int, length: int) -> Passage:
        source, within = dataset.locate(document)
        return Passage(source, dataset.file_of(source, within), within, start, length)

    held_out = dataset.held_out.num_tokens if dataset.held_out else 0
    lines = [
        f"{dataset.num_documents:,} documents, {dataset.num_tokens:,} tokens from "
        f"{len(dataset.sources)} source(s); held out {held_out:,} tokens"
    ]
    if packing == "best_fit" and dataset.weights is None:
        rows = order.num_rows(1)
        fill = dataset.num_tokens / max(1, rows * max_length)
        lines.append(f"packed by best fit into {rows:,} rows of {max_length}, {fill:.1%} full")
    return TrainingData(
        identity=dataset.manifest_hash,
        tokenizer_hash=dataset.tokenizer_hash,
        open_rows=open_rows,
        passages=passages,
        num_rows=order.num_rows,
        repetitions=getattr(order, "repetitions", None),
        held_out=dataset.held_out,
        available={name: reader.num_tokens for name, reader in dataset.readers.items()},
        lines=lines,
    )
