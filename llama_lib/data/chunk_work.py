"""Read and tokenise one chunk of a stream, in whatever process.

Invariant: what a chunk gives depends on its task and the settings alone, so any process may do it.
Imports neither torch nor transformers: a worker process starts in a fraction of a second.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from llama_lib.data.chunks import Task, check_unchanged
from llama_lib.data.readers import TextFile
from llama_lib.data.tokenise import Encoder, Recipe, text_hash
from llama_lib.data.windows import PIECE, Tokens
from llama_lib.errors import LlamaLibError, UserError


@dataclass(frozen=True)
class Chunk:
    """The documents of a task and their tokens, with what was left out of it."""

    task: Task  # without its texts
    first_record: int
    tokens: Tokens
    bad: int
    excluded: int


@dataclass(frozen=True)
class Settings:
    """What tokenising needs to know; sent to every process once.

    `excluded` are hashes of texts, ascending, that are held out. `is_worker` is set in processes
    of their own.
    """

    recipe: Recipe
    excluded: npt.NDArray[np.uint64]
    skip_bad_lines: bool
    document_mask: bool
    is_worker: bool

    def __call__(self) -> Callable[[Task | LlamaLibError, Callable[[Any], None]], Chunk]:
        if self.is_worker:
            # A scheduler signals all processes of a job. The trainer saves before it ends, and
            # needs data until then; a worker ends when the trainer has closed its connection.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        tokeniser = _Tokeniser(self)
        return lambda task, report: tokeniser.chunk(task)


class _Tokeniser:
    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._encoders: dict[str, Encoder] = {}

    def _encoder(self, engine: str) -> Encoder:
        if engine not in self._encoders:
            self._encoders[engine] = Encoder(replace(self._settings.recipe, engine=engine))
        return self._encoders[engine]

    def chunk(self, task: Task | LlamaLibError) -> Chunk:
        """An error in place of a task is raised: it comes behind the chunks before it."""
        if isinstance(task, LlamaLibError):
            raise task
        documents, records, bad = task.documents, task.records, task.bad
        if documents is None or records is None:
            documents, bad = self._read(task)
            records = list(range(len(documents)))
        if documents and not isinstance(documents[0], str):
            kept = np.array([len(row) > 0 for row in documents], bool)
            ids, lengths = self._rows(task, [row for row in documents if len(row)])
        else:
            kept = np.array(
                [bool(text) and not self._is_excluded(text) for text in documents], bool
            )
            texts = [text for text, keep in zip(documents, kept, strict=True) if keep]
            ids, lengths = self._encoder(task.engine).encode(texts)
        pieces = np.zeros(int(kept.sum()), PIECE)
        pieces["file"], pieces["part"] = task.file, task.part.start
        pieces["record"] = np.array(records, np.int64)[kept]
        pieces["length"] = lengths
        empty = sum(not len(document) for document in documents)
        return Chunk(
            task=replace(task, documents=None, records=None),
            first_record=records[0] if records else 0,
            tokens=Tokens(ids, pieces),
            bad=bad,
            excluded=len(documents) - len(pieces) - empty,
        )

    def _read(self, task: Task) -> tuple[list[Any], int]:
        """The documents of a part, and how many bad ones there are besides."""
        path = task.part.path
        check_unchanged(path, *task.expected)
        reader = TextFile(path, self._settings.skip_bad_lines, task.part)
        try:
            documents = list(reader)
        except UserError:
            check_unchanged(path, *task.expected)
            raise
        return documents, reader.bad

    def _is_excluded(self, text: str) -> bool:
        excluded = self._settings.excluded
        if not len(excluded):
            return False
        value = np.uint64(text_hash(text.encode("utf-8")))
        place = int(np.searchsorted(excluded, value))
        return place < len(excluded) and excluded[place] == value

    def _rows(
        self, task: Task, rows: list[npt.NDArray[np.int64]]
    ) -> tuple[npt.NDArray[np.integer], npt.NDArray[np.int64]]:
        """Ready-made rows, as they are."""
        path = task.part.path
        if self._settings.document_mask:
            raise UserError(
                f"{path} holds ready-made rows, which do not say where documents end: "
                "--document_mask needs the text itself, or leave it out."
            )
        ids = np.concatenate([np.empty(0, np.int64), *rows])
        size = self._settings.recipe.vocab_size
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < size:
            raise UserError(
                f"{path} holds the ids {ids.min()} to {ids.max()}, the tokenizer has 0 to "
                f"{size - 1}: give the --tokenizer these rows were made with."
            )
        dtype = self._encoder(task.engine).dtype
        return ids.astype(dtype), np.array([len(row) for row in rows], np.int64)
