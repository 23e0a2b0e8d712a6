"""Tokenise sources into a folder in one streaming pass, setting held-out documents aside.

Invariant: whether a document is held out depends on its text alone, so equal texts always land on
the same side; output bytes do not depend on the number of workers.
"""

import hashlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llama_lib.data.indexed import IndexedWriter
from llama_lib.data.readers import TextFile
from llama_lib.data.sources import Source
from llama_lib.data.tokenise import Encoder, in_order

HASHES = 1 << 64  # text hashes are drawn from 0..HASHES-1

# Enough text to keep every thread of an encoder busy, little enough to keep memory flat. Chosen.
_BATCH_CHARACTERS = 4 << 20
_LINE_SECONDS = 10.0


@dataclass(frozen=True)
class _Batch:
    """Some documents of one file; the last batch of a file carries its counts."""

    source: int
    texts: list[str]
    position: int
    finished: dict[str, Any] | None


@dataclass(frozen=True)
class _Encoded:
    batch: _Batch
    ids: npt.NDArray[np.uint32]
    lengths: npt.NDArray[np.int64]
    hashes: npt.NDArray[np.uint64]
    num_bytes: npt.NDArray[np.int64]


@dataclass
class Built:
    """What one pass wrote: facts per source for the manifests, and the range of text hashes."""

    kept: dict[str, dict[str, Any]] = field(default_factory=dict)
    held_out: dict[str, dict[str, Any]] = field(default_factory=dict)
    lowest: int = HASHES
    highest: int = -1
    hashes: set[int] = field(default_factory=set)
    num_documents: int = 0
    excluded: int = 0

    def note(
        self, hashes: npt.NDArray[np.uint64], excluded: set[int] | None
    ) -> npt.NDArray[np.bool_]:
        """Count the documents of a batch; which of them are to be left out."""
        values = hashes.tolist()
        self.num_documents += len(values)
        if values:
            self.lowest = min(self.lowest, *values)
            self.highest = max(self.highest, *values)
        if not excluded:
            return np.zeros(len(values), bool)
        left_out = np.array([value in excluded for value in values], bool)
        self.excluded += int(left_out.sum())
        return left_out


def text_hash(text: bytes) -> int:
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big")


def build(
    sources: Sequence[Source],
    folder: Path,
    *,
    encoder: Encoder,
    skip_bad_lines: bool = False,
    eval_folder: Path | None = None,
    cut: int = 0,
    excluded: set[int] | None = None,
    keep_hashes: bool = False,
    on_percent: Callable[[int], None] = lambda percent: None,
) -> Built:
    """Write `<source>.bin/.idx` into `folder`; a text hash below `cut` goes to `eval_folder`.

    Documents whose hash is in `excluded` are left out and counted; `keep_hashes` collects all
    hashes. A source without a document on one side has no files there.
    """
    built = Built()
    progress = _Progress(sum(path.stat().st_size for s in sources for path in s.files), on_percent)

    def encode(batch: _Batch) -> _Encoded:
        contents = [text.encode("utf-8") for text in batch.texts]
        ids, lengths = encoder.encode(batch.texts)
        hashes = np.array([text_hash(content) for content in contents], np.uint64)
        sizes = np.array([len(content) for content in contents], np.int64)
        return _Encoded(batch, ids, lengths, hashes, sizes)

    sides: list[_Side] = []
    current = -1
    for part in in_order(encode, _batches(sources, skip_bad_lines), encoder.threads):
        if part.batch.source != current:
            current = part.batch.source
            name = sources[current].name
            sides = [_Side(folder / name, encoder.dtype, built.kept)]
            if eval_folder is not None:
                sides.append(_Side(eval_folder / name, encoder.dtype, built.held_out))
        if keep_hashes:
            built.hashes.update(part.hashes.tolist())
        left_out = built.note(part.hashes, excluded)
        aside = part.hashes <= np.uint64(cut - 1) if cut else np.zeros(len(left_out), bool)
        sides[0].write(part, ~aside & ~left_out)
        for side in sides[1:]:
            side.write(part, aside)
        if part.batch.finished is not None:
            for side in sides:
                side.end_file(part.batch.finished)
        progress.show(part.batch.position)
    progress.close()
    return built


class _Side:
    """The training or the held-out part of one source."""

    def __init__(self, prefix: Path, dtype: np.dtype, facts: dict[str, dict[str, Any]]) -> None:
        self._prefix = prefix
        self._facts = facts
        self._writer = IndexedWriter(prefix, dtype)
        self._bytes = 0
        self._files: list[dict[str, Any]] = []
        self._before_file = 0

    def write(self, part: _Encoded, chosen: npt.NDArray[np.bool_]) -> None:
        if chosen.all():
            self._writer.write(part.ids, part.lengths)
        elif chosen.any():
            self._writer.write(part.ids[np.repeat(chosen, part.lengths)], part.lengths[chosen])
        self._bytes += int(part.num_bytes[chosen].sum())

    def end_file(self, counts: dict[str, Any]) -> None:
        documents = self._writer.documents - self._before_file
        self._before_file = self._writer.documents
        facts = {key: counts[key] for key in ("name", "bad_lines", "empty_texts")}
        self._files.append({**facts, "documents": documents})
        if counts["last"]:
            self._close()

    def _close(self) -> None:
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
        }


def _batches(sources: Sequence[Source], skip_bad_lines: bool) -> Iterator[_Batch]:
    done = 0
    for number, source in enumerate(sources):
        for path in source.files:
            reader = TextFile(path, skip_bad_lines)
            texts: list[str] = []
            characters = empty = 0
            for text in reader:
                if not text:
                    empty += 1
                    continue
                texts.append(text)
                characters += len(text)
                if characters >= _BATCH_CHARACTERS:
                    yield _Batch(number, texts, done + reader.position, None)
                    texts, characters = [], 0
            done += reader.size
            counts = {
                "name": path.name,
                "bad_lines": reader.bad,
                "empty_texts": empty,
                "last": path is source.files[-1],
            }
            yield _Batch(number, texts, done, counts)


class _Progress:
    """Bytes of the input read: a bar on a terminal, else a line now and then."""

    def __init__(self, total: int, on_percent: Callable[[int], None]) -> None:
        from tqdm import tqdm

        self._total = max(total, 1)
        self._on_percent = on_percent
        self._percent = -1
        self._started = self._shown = time.monotonic()
        self._terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=total, unit="B", unit_scale=True, desc="tokenising", disable=not self._terminal
        )

    def show(self, position: int) -> None:
        self._bar.update(position - self._bar.n)
        percent = 100 * position // self._total
        if percent != self._percent:
            self._percent = percent
            self._on_percent(percent)
        now = time.monotonic()
        if not self._terminal and now - self._shown > _LINE_SECONDS:
            self._shown = now
            rate = position / 1e6 / (now - self._started)
            print(f"tokenising, {percent}%, {rate:.1f} MB/s", file=sys.stderr, flush=True)

    def close(self) -> None:
        self._bar.close()
