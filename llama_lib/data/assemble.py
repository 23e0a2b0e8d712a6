"""Second stage: parts of tokens to one token file per source and side, in the order of the text.

Invariant: whether a document is held out depends on its text alone, so equal texts always land on
the same side; the bytes written depend on neither the number of workers nor the size of parts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llama_lib.data.budget import Budget, RowCutter
from llama_lib.data.fates import Fates
from llama_lib.data.indexed import IndexedWriter
from llama_lib.data.tokenised import Stored, Tokenised, tokens_path

# Tokens in memory at a time. Measured 2026-11: more is not faster.
_CHUNK_TOKENS = 1 << 20

Facts = dict[str, dict[str, Any]]


def assemble(
    sources: Sequence[Tokenised],
    fates: Fates,
    work: Path,
    folder: Path,
    eval_folder: Path | None,
    dtype: np.dtype,
    budget: Budget | None = None,
    on_part: Callable[[Stored], None] = lambda part: None,
) -> tuple[Facts, Facts]:
    """Write `<source>.bin/.idx` into `folder`, held-out documents into `eval_folder`.

    Returns the facts per source of both. A source without a document on one side has no files
    there. With a budget the training side holds rows, what it does not want is not written.
    """
    kept: Facts = {}
    held_out: Facts = {}
    for source in sources:
        name = source.source.name
        common = {"entry": source.source.entry, "rows": source.is_rows}
        cutter = budget.cutter(name) if budget else None
        sides: list[_Nothing] = []
        if budget is None:
            sides.append(_Side(folder / name, dtype, kept, common))
        elif cutter is None:
            sides.append(_Nothing())
        else:
            sides.append(_Rows(folder / name, dtype, kept, {**common, "rows": True}, cutter))
        if eval_folder is None:
            sides.append(_Nothing())
        else:
            sides.append(_Side(eval_folder / name, dtype, held_out, common))
        for path, parts in source.files:
            for part in parts:
                for about, ids, *chosen in _chunks(fates, work, part, dtype):
                    for side, documents in zip(sides, chosen, strict=True):
                        side.write(ids, about, documents)
                on_part(part)
            counts = {
                "name": path.name,
                "bad_lines": sum(part.bad_lines for part in parts),
                "empty_texts": sum(part.empty_texts for part in parts),
            }
            for side in sides:
                side.end_file(counts)
        for side in sides:
            side.close()
        if name in kept:
            kept[name]["left_out"] = {
                "bad_lines": source.total("bad_lines"),
                "empty_texts": source.total("empty_texts"),
                **fates.left_out(source),
            }
    return kept, held_out


class _Nothing:
    """A side that nothing is written to."""

    def write(
        self, ids: npt.NDArray[Any], about: npt.NDArray[Any], chosen: npt.NDArray[np.bool_]
    ) -> None:
        pass

    def end_file(self, counts: dict[str, Any]) -> None:
        pass

    def close(self) -> None:
        pass


class _Side(_Nothing):
    """The training or the held-out part of one source."""

    def __init__(self, prefix: Path, dtype: np.dtype, facts: Facts, common: dict[str, Any]) -> None:
        self._prefix = prefix
        self._facts = facts
        self._common = common
        self._writer = IndexedWriter(prefix, dtype)
        self._bytes = 0
        self._files: list[dict[str, Any]] = []
        self._before_file = 0

    def write(
        self, ids: npt.NDArray[Any], about: npt.NDArray[Any], chosen: npt.NDArray[np.bool_]
    ) -> None:
        lengths = about["length"].astype(np.int64)
        if chosen.all():
            self._write(ids, lengths)
        elif chosen.any():
            self._write(ids[np.repeat(chosen, lengths)], lengths[chosen])
        self._bytes += self._bytes_of(about["bytes"][chosen])

    def _bytes_of(self, sizes: npt.NDArray[np.integer]) -> int:
        """Bytes of the text that is written, of documents of these sizes."""
        return int(sizes.sum(dtype=np.int64))

    def _write(self, ids: npt.NDArray[Any], lengths: npt.NDArray[np.int64]) -> None:
        self._writer.write(ids, lengths)

    def end_file(self, counts: dict[str, Any]) -> None:
        documents = self._writer.documents - self._before_file
        self._before_file = self._writer.documents
        self._files.append({**counts, "documents": documents})

    def close(self) -> None:
        self._writer.close()
        if not self._writer.documents:
            for suffix in (".bin", ".idx"):
                Path(f"{self._prefix}{suffix}").unlink()
            return
        self._facts[self._prefix.name] = {
            "documents": self._writer.documents,
            "tokens": self._writer.tokens,
            "bytes": self._bytes,
            "sha256": self._writer.sha256(),
            "files": self._files,
            **self._common,
        }


class _Rows(_Side):
    """Rows of a budget; each is a document, of the file that its last id comes from."""

    def __init__(
        self,
        prefix: Path,
        dtype: np.dtype,
        facts: Facts,
        common: dict[str, Any],
        cutter: RowCutter,
    ) -> None:
        super().__init__(prefix, dtype, facts, common)
        self._cutter = cutter

    def _write(self, ids: npt.NDArray[Any], lengths: npt.NDArray[np.int64]) -> None:
        self._writer.write(*self._cutter.cut_flat(ids))

    def _bytes_of(self, sizes: npt.NDArray[np.integer]) -> int:
        # As for ready-made rows: a row begins and ends inside of documents.
        return 0


def _chunks(
    fates: Fates, work: Path, part: Stored, dtype: np.dtype
) -> Iterator[
    tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[np.bool_], npt.NDArray[np.bool_]]
]:
    """(about documents, their ids, which are trained on, which are held out) of a part."""
    with tokens_path(work, part.number).open("rb") as file:
        for about, trained, held_out in fates.sides(part):
            ends = np.cumsum(about["length"], dtype=np.int64)
            first = 0
            while first < len(about):
                start = int(ends[first - 1]) if first else 0
                last = int(np.searchsorted(ends, start + _CHUNK_TOKENS, side="right"))
                last = max(last, first + 1)
                ids = np.fromfile(file, dtype, int(ends[last - 1]) - start)
                chunk = slice(first, last)
                yield about[chunk], ids, trained[chunk], held_out[chunk]
                first = last
