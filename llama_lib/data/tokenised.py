"""First stage: parts of the source files to parts of tokens in a work folder, in any order.

Invariant: a part with facts is whole and stays valid for the next attempt; what a part holds
depends on its text and the tokenizer alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from llama_lib.data.parts import Part, parts_of
from llama_lib.data.progress import Progress
from llama_lib.data.readers import TextFile, nothing_in
from llama_lib.data.sources import Source
from llama_lib.data.tokenise import Encoder, Recipe
from llama_lib.data.workers import Report, WorkerPool
from llama_lib.errors import UserError

# Small enough that killing costs little and all workers finish together, large enough that the
# files and messages per part do not count. Chosen.
PART_BYTES = 8 << 20
# Text in memory at a time. Measured 2026-11: 1 MiB is as fast as 4.
_BATCH_CHARACTERS = 1 << 20

# What the second stage needs to know of a document: sha256 of its text (of its ids, for a
# ready-made row) cut to 128 bits, tokens with both ends, and UTF-8 bytes.
DOCUMENT = np.dtype([("hash", "S16"), ("length", "<u4"), ("bytes", "<u4")])


@dataclass(frozen=True)
class Stored:
    """Facts of one part in the work folder."""

    number: int
    path: str
    start: int
    stop: int
    documents: int
    tokens: int
    bad_lines: int
    empty_texts: int
    last_bad: str
    is_rows: bool
    crc_tokens: int
    crc_documents: int


@dataclass(frozen=True)
class Tokenised:
    """The parts of one source, file by file, in order."""

    source: Source
    files: tuple[tuple[Path, tuple[Stored, ...]], ...]

    @property
    def parts(self) -> list[Stored]:
        return [part for _, parts in self.files for part in parts]

    @property
    def is_rows(self) -> bool:
        return any(part.is_rows for part in self.parts)

    def total(self, name: str) -> int:
        return sum(getattr(part, name) for part in self.parts)


def tokens_path(folder: Path, number: int) -> Path:
    return folder / f"part-{number:06d}.bin"


def documents_path(folder: Path, number: int) -> Path:
    return folder / f"part-{number:06d}.documents"


def tokenise(
    sources: Sequence[Source],
    folder: Path,
    recipe: Recipe,
    *,
    workers: int,
    skip_bad_lines: bool = False,
    on_percent: Callable[[int], None] = lambda percent: None,
) -> list[Tokenised]:
    """Tokenise what is not there yet; returns all sources, with their parts.

    Raises UserError for the first bad line in the order of the sources, unless they are skipped.
    """
    folder.mkdir(parents=True, exist_ok=True)
    cuts = [[(path, parts_of(path, PART_BYTES)) for path in source.files] for source in sources]
    numbered = list(enumerate(part for files in cuts for _, parts in files for part in parts))
    earlier = (_found(folder, part, number) for number, part in numbered)
    found = {stored.number: stored for stored in earlier if stored is not None}
    for left_over in folder.glob("part-*.tmp"):
        # A process that outlived a killed run by a moment may still own it, so this may be late.
        left_over.unlink(missing_ok=True)
    wanted = [(number, part) for number, part in numbered if number not in found]
    sizes = _file_bytes(cuts)
    progress = Progress("tokenising", sum(sizes), on_percent)
    progress.skip(sum(sizes[number] for number in found))
    setup = TokenisePart(recipe, str(folder), skip_bad_lines)
    workers = min(workers, len(wanted))
    if recipe.engine == "gigatoken":
        # It is done with two parts sooner than a process has started (measured: 0.25 s).
        size = sum(sizes[number] for number, _ in wanted)
        workers = min(workers, math.ceil(size / (2 * PART_BYTES)))
    with WorkerPool(setup, workers) as pool:
        # No limit: results are small, and one compressed file may take longer than all others.
        results = pool.map(
            wanted,
            lambda order, share: progress.show(wanted[order][0], share * sizes[wanted[order][0]]),
            ahead=max(len(wanted), 1),
        )
        for stored in results:
            found[stored.number] = stored
            progress.show(stored.number, sizes[stored.number])
    progress.close()
    number = 0
    tokenised = []
    for source, files in zip(sources, cuts, strict=True):
        stored_files = []
        for path, parts in files:
            stored_files.append((path, tuple(found[number + n] for n in range(len(parts)))))
            number += len(parts)
            _check_file(path, stored_files[-1][1])
        tokenised.append(Tokenised(source, tuple(stored_files)))
    return tokenised


@dataclass(frozen=True)
class TokenisePart:
    """Setup of a worker that writes parts into the work folder."""

    recipe: Recipe
    folder: str
    skip_bad_lines: bool

    def __call__(self) -> Callable[[tuple[int, Part], Report], Stored]:
        encoder = Encoder(self.recipe)

        def work(item: tuple[int, Part], report: Report) -> Stored:
            number, part = item
            return _write_part(
                encoder, Path(self.folder), number, part, self.skip_bad_lines, report
            )

        return work


class _PartFile:
    """A file that grows under a name of this process alone."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        self.crc = 0
        self._file: IO[bytes] = self.temporary.open("wb")

    def write(self, values: npt.NDArray[Any]) -> None:
        # Without copying; numpy refuses to export an array of records as bytes otherwise.
        content = values.view(np.uint8).data
        self.crc = zlib.crc32(content, self.crc)
        self._file.write(content)

    def close(self) -> None:
        self._file.close()

    def publish(self) -> None:
        self._file.close()
        self.temporary.rename(self.path)


def _write_part(
    encoder: Encoder, folder: Path, number: int, part: Part, skip_bad_lines: bool, report: Report
) -> Stored:
    tokens = _PartFile(tokens_path(folder, number))
    documents = _PartFile(documents_path(folder, number))
    reader = TextFile(part.path, skip_bad_lines, part)
    counts = {"documents": 0, "tokens": 0, "empty_texts": 0}
    try:
        for records, empty in _batches(reader):
            if reader.is_rows:
                ids, about = _rows(encoder, reader, records)
            else:
                ids, about = _texts(encoder, records)
            tokens.write(ids)
            documents.write(about)
            counts["documents"] += len(about)
            counts["tokens"] += len(ids)
            counts["empty_texts"] += empty
            report(reader.position / max(reader.size, 1))
        tokens.publish()
        documents.publish()
    except BaseException:
        for file in (tokens, documents):
            with contextlib.suppress(OSError):  # on a full disk closing fails as writing did
                file.close()
            file.temporary.unlink(missing_ok=True)
        raise
    stored = Stored(
        number=number,
        path=str(part.path),
        start=part.start,
        stop=part.stop,
        bad_lines=reader.bad,
        last_bad=reader.last_bad,
        is_rows=reader.is_rows,
        crc_tokens=tokens.crc,
        crc_documents=documents.crc,
        **counts,
    )
    facts = _facts_path(folder, number)
    temporary = facts.with_name(f"{facts.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(asdict(stored)))
    temporary.rename(facts)
    return stored


def _batches(reader: TextFile) -> Iterator[tuple[list[Any], int]]:
    """Records of about `_BATCH_CHARACTERS`, and how many empty ones were left out among them."""
    records: list[Any] = []
    size = empty = 0
    for record in reader:
        if not len(record):
            empty += 1
            continue
        records.append(record)
        size += len(record)
        if size >= _BATCH_CHARACTERS:
            yield records, empty
            records, size, empty = [], 0, 0
    yield records, empty


def _texts(encoder: Encoder, texts: list[str]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    contents = [text.encode("utf-8") for text in texts]
    ids, lengths = encoder.encode(texts)
    return ids, _about(contents, lengths, [len(content) for content in contents])


def _rows(
    encoder: Encoder, reader: TextFile, rows: list[npt.NDArray[np.int64]]
) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    for row in rows:
        if row.min() < 0 or row.max() >= encoder.recipe.vocab_size:
            wrong = int(row.min() if row.min() < 0 else row.max())
            raise UserError(
                f"{reader.path} holds rows of ids, among them {wrong}; the tokenizer has the ids 0 "
                f"to {encoder.recipe.vocab_size - 1}. Give the tokenizer that made them: "
                "--tokenizer."
            )
    ids = np.concatenate(rows) if rows else np.empty(0, np.int64)
    lengths = np.array([len(row) for row in rows], np.int64)
    contents = [row.astype("<u4").tobytes() for row in rows]
    return ids.astype(encoder.dtype), _about(contents, lengths, [0] * len(rows))


def _about(
    contents: list[bytes], lengths: npt.NDArray[np.int64], sizes: list[int]
) -> npt.NDArray[Any]:
    about = np.empty(len(contents), DOCUMENT)
    sha256 = hashlib.sha256
    digests = b"".join([sha256(content).digest()[:16] for content in contents])
    about["hash"] = np.frombuffer(digests, "S16")
    about["length"] = lengths
    about["bytes"] = sizes
    return about


def _facts_path(folder: Path, number: int) -> Path:
    return folder / f"part-{number:06d}.json"


def _found(folder: Path, part: Part, number: int) -> Stored | None:
    """The part, if an earlier attempt left it whole.

    Nothing is synced while parts are made, so after a loss of power facts may be there without
    the tokens: the check sums tell.
    """
    try:
        facts = json.loads(_facts_path(folder, number).read_text())
        stored = Stored(**facts)
    except (FileNotFoundError, ValueError, TypeError):
        return None
    same = (str(part.path), part.start, part.stop) == (stored.path, stored.start, stored.stop)
    checks = (
        (tokens_path(folder, number), stored.crc_tokens),
        (documents_path(folder, number), stored.crc_documents),
    )
    return stored if same and all(_crc(path) == crc for path, crc in checks) else None


def _crc(path: Path) -> int | None:
    crc = 0
    try:
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                crc = zlib.crc32(chunk, crc)
    except FileNotFoundError:
        return None
    return crc


def _file_bytes(cuts: list[list[tuple[Path, list[Part]]]]) -> list[int]:
    """Bytes of the file that each part stands for; row groups of parquet share their file's."""
    sizes = []
    for files in cuts:
        for path, parts in files:
            total = max(parts[-1].stop, 1)
            size = path.stat().st_size
            sizes += [size * part.stop // total - size * part.start // total for part in parts]
    return sizes


def _check_file(path: Path, parts: Sequence[Stored]) -> None:
    """A file without a record is an error, whichever way it was cut."""
    if not any(part.documents or part.empty_texts for part in parts):
        last = next((part.last_bad for part in reversed(parts) if part.last_bad), "")
        raise nothing_in(path, sum(part.bad_lines for part in parts), last)
