"""What a stream is made of, and the order of its chunks in every epoch.

Invariant: the chunks of an epoch and their order depend on the files, the seed and the number of
the epoch alone; each record is in exactly one chunk of every epoch.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from llama_lib.data.hub import HubFile
from llama_lib.data.parts import Part, is_seekable, parts_of
from llama_lib.data.readers import TextFile
from llama_lib.errors import RunError, UserError

CHUNK_BYTES = 1 << 20

# A part of parquet is at least one row group, and some writers make only one of a whole file. Files
# whose parts are larger than so many chunks are read like compressed ones, so that memory stays
# flat: text in parquet takes some four times the space once it is read. Chosen.
_LARGE_PART = 2
_LINE_SECONDS = 5.0
_UNITS, _PARTS = 2, 3  # what a permutation is for, besides those of windows.py


@dataclass
class StreamFile:
    """One file: here already, as it was when the stream was opened, or still on the hub.

    `name` tells it apart from the other files of its source, on every machine.
    """

    source: int
    name: str
    path: Path | None
    size: int
    mtime_ns: int = 0
    remote: HubFile | None = None

    @classmethod
    def local(cls, path: Path) -> StreamFile:
        facts = path.stat()
        return cls(0, path.name, path, facts.st_size, facts.st_mtime_ns)

    @classmethod
    def on_hub(cls, file: HubFile) -> StreamFile:
        return cls(0, file.name, None, file.size, remote=file)

    @property
    def identity(self) -> list[Any]:
        """What has to be the same for the same records."""
        if self.remote is not None:
            return [self.remote.size, self.remote.revision]
        return [self.size, self.mtime_ns]

    def fetch(self) -> None:
        """Download the file, if it is on the hub and not here yet."""
        if self.path is None and self.remote is not None:
            path = self.remote.download()
            facts = path.stat()
            self.size, self.mtime_ns = facts.st_size, facts.st_mtime_ns
            self.path = path

    def ready(self) -> Path:
        """The file on this machine; RunError if it is another one now."""
        self.fetch()
        assert self.path is not None
        check_unchanged(self.path, self.size, self.mtime_ns)
        return self.path


def check_unchanged(path: Path, size: int, mtime_ns: int) -> None:
    """RunError if a file is gone or was written to since the stream was opened."""
    try:
        facts = path.stat()
    except OSError as error:
        raise RunError(
            f"{path} cannot be read any more ({error.strerror}): it was there when the run began. "
            "Put it back, then go on with --load auto."
        ) from error
    if (facts.st_size, facts.st_mtime_ns) != (size, mtime_ns):
        raise RunError(
            f"{path} was changed while it was streamed: {size:,} bytes before, {facts.st_size:,} "
            "now, or a later time stamp. Put the old file back, then go on with --load auto."
        )


class Place(NamedTuple):
    """Where a chunk stands: chunk `chunk` of the unit that is number `unit` of its epoch."""

    epoch: int
    unit: int
    chunk: int


@dataclass(frozen=True)
class Task:
    """One chunk to tokenise: a part to be read, or documents that were read already.

    `records` are the numbers of the documents within the part, `after` is the place of the next
    chunk, `engine` which tokenizer is proven for its source.
    """

    place: Place
    after: Place
    file: int
    part: Part
    expected: tuple[int, int]  # size and mtime_ns of the file
    documents: list[Any] | None = None
    records: list[int] | None = None
    bad: int = 0
    engine: str = "tokenizers"


@dataclass
class Corpus:
    """All files of a stream, cut into units.

    A unit is a part that can be read by itself, or a file (a large row group) that is read from
    its beginning and gives several chunks. Files on the hub are units, too: what they hold is not
    known before they are here.
    """

    sources: list[str]
    files: list[StreamFile]
    seed: int
    skip_bad_lines: bool
    chunk_bytes: int = CHUNK_BYTES
    parts: npt.NDArray[np.int64] = field(init=False)  # file, start, stop, is sequential
    whole_files: list[int] = field(init=False)
    _coming: dict[int, threading.Thread] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        rows: list[npt.NDArray[np.int64]] = []
        self.whole_files = []
        for number, file in enumerate(self.files):
            if file.path is None or not is_seekable(file.path):
                self.whole_files.append(number)
            else:
                rows.append(self._cut(number, file))
        self.parts = np.concatenate(rows) if rows else np.empty((0, 4), np.int64)

    @property
    def num_units(self) -> int:
        return len(self.parts) + len(self.whole_files)

    @property
    def size(self) -> int:
        """Bytes of all files that are here."""
        return sum(file.size for file in self.files)

    def identity(self) -> str:
        """Equal for equal names, sizes and times of files in the same order, and equal seed."""
        # A run that a bad line has ended may go on with --skip_bad_lines: it is not part of this.
        facts: list[Any] = [self.seed, self.chunk_bytes, self.sources]
        facts += [list(item) for item in self.listing().items()]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def listing(self) -> dict[str, list[Any]]:
        """What has to be the same for the same records, under `source/file`."""
        return {f"{self.sources[file.source]}/{file.name}": file.identity for file in self.files}

    def tasks(self, place: Place) -> Iterator[Task]:
        """Chunks from `place` on, one epoch after another, without end."""
        epoch, unit, chunk = place
        while True:
            order = self._permutation(self.num_units, epoch, _UNITS)
            remote = np.flatnonzero(order >= len(self.parts))
            for number in range(unit, self.num_units):
                # The next file of the hub comes while this unit is used.
                for other in remote[np.searchsorted(remote, number, side="right") :][:1].tolist():
                    self._come(self.whole_files[int(order[other]) - len(self.parts)])
                start = Place(epoch, number, chunk)
                following = Place(epoch, number + 1, 0)
                if number + 1 == self.num_units:
                    following = Place(epoch + 1, 0, 0)
                yield from self._unit(int(order[number]), start, following)
                chunk = 0
            epoch, unit = epoch + 1, 0

    def ready(self, number: int) -> Path:
        """A file on this machine; RunError if it is another one than it was."""
        if download := self._coming.get(number):
            download.join()
        return self.files[number].ready()

    def _come(self, number: int) -> None:
        """Begin to download a file, if it is on the hub."""

        def fetch() -> None:
            # What goes wrong is said when the file is needed, if it goes wrong again.
            with contextlib.suppress(Exception):
                self.files[number].fetch()

        if self.files[number].path is None and number not in self._coming:
            # A daemon, which does not keep the program from ending.
            self._coming[number] = threading.Thread(target=fetch, name="download", daemon=True)
            self._coming[number].start()

    def _unit(self, unit: int, start: Place, following: Place) -> Iterator[Task]:
        if unit < len(self.parts):
            file, begin, stop, is_sequential = map(int, self.parts[unit])
            path = self.ready(file)
            if is_sequential:
                yield from self._sequential(file, Part(path, begin, stop), start, following)
            else:
                yield self._task(start, following, file, Part(path, begin, stop))
            return
        file = self.whole_files[unit - len(self.parts)]
        path = self.ready(file)
        parts = self._cut(file, self.files[file])
        if parts[:, 3].any():
            whole = Part(path, int(parts[0, 1]), int(parts[-1, 2]))
            yield from self._sequential(file, whole, start, following)
            return
        # A file of the hub: it has just come, and its parts can be read in any order.
        order = self._permutation(len(parts), start.epoch, _PARTS, file)
        for number in range(start.chunk, len(parts)):
            _, begin, stop, _ = map(int, parts[order[number]])
            after = following if number + 1 == len(parts) else start._replace(chunk=number + 1)
            here = start._replace(chunk=number)
            yield self._task(here, after, file, Part(path, begin, stop))

    def _sequential(self, file: int, part: Part, start: Place, following: Place) -> Iterator[Task]:
        """Chunks of about `chunk_bytes` of text; those before `start` are read, but not used."""
        reader = TextFile(part.path, self.skip_bad_lines, part)
        progress = _Rereading(reader, start.chunk)
        number = bad = 0
        documents: list[Any] = []
        records: list[int] = []
        size = 0

        def task(after: Place) -> Task:
            place = start._replace(chunk=number)
            found = reader.bad - bad
            return self._task(place, after, file, part, list(documents), list(records), found)

        try:
            for record, document in enumerate(reader):
                if size >= self.chunk_bytes:
                    if number >= start.chunk:
                        yield task(start._replace(chunk=number + 1))
                    number, bad, size = number + 1, reader.bad, 0
                    documents.clear()
                    records.clear()
                    progress.show(number)
                documents.append(document)
                records.append(record)
                size += len(document) * (1 if isinstance(document, str) else 4)
        except UserError:
            # A file that was written to meanwhile is the cause of any other error.
            self.ready(file)
            raise
        self.ready(file)
        yield task(following)

    def _task(
        self,
        place: Place,
        after: Place,
        file: int,
        part: Part,
        documents: list[Any] | None = None,
        records: list[int] | None = None,
        bad: int = 0,
    ) -> Task:
        facts = self.files[file]
        expected = (facts.size, facts.mtime_ns)
        return Task(place, after, file, part, expected, documents, records, bad)

    def _cut(self, number: int, file: StreamFile) -> npt.NDArray[np.int64]:
        assert file.path is not None
        parts = parts_of(file.path, self.chunk_bytes)
        sequential = not is_seekable(file.path)
        if file.path.name.lower().endswith(".parquet"):
            sequential = file.size > _LARGE_PART * self.chunk_bytes * len(parts)
        return np.array([[number, part.start, part.stop, sequential] for part in parts], np.int64)

    def _permutation(self, count: int, epoch: int, *purpose: int) -> npt.NDArray[np.integer]:
        # As in order.py: numpy freezes the stream of RandomState for good.
        order = np.arange(count, dtype=np.int64)
        np.random.RandomState([self.seed, epoch, *purpose]).shuffle(order)
        return order


class _Rereading:
    """Says how far a file is re-read that has no other way to a place in its middle."""

    def __init__(self, reader: TextFile, chunks: int) -> None:
        self._reader, self._chunks = reader, chunks
        self._shown = time.monotonic()
        if chunks:
            self._say(f"re-reading {reader.path} to where the run stood")

    def show(self, chunks: int) -> None:
        """`chunks` of those wanted are read."""
        if chunks > self._chunks:
            return
        now = time.monotonic()
        if chunks == self._chunks:
            self._say(f"re-read {self._reader.path}, {self._megabytes()} MB")
        elif now - self._shown > _LINE_SECONDS:
            self._shown = now
            percent = 100 * chunks // self._chunks
            self._say(f"re-reading {self._reader.path}, {self._megabytes()} MB, {percent}%")

    def _megabytes(self) -> int:
        return self._reader.position // 10**6

    def _say(self, line: str) -> None:
        # One process speaks for all of its host; the launchers name it so.
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(line, file=sys.stderr, flush=True)
