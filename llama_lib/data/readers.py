"""Read the records of one file, in order and with flat memory.

Invariant: a record is either yielded, or named by file and line in an error, or counted as bad.
"""

import io
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from operator import itemgetter
from pathlib import Path
from typing import IO, Any, Generic, TypeVar

import orjson

from llama_lib.data.bad_records import (
    EXAMPLE_LINE,
    BadRecord,
    UnknownShape,
    check_characters,
    nothing_in,
    unreadable,
)
from llama_lib.data.compressed import decompressed
from llama_lib.data.json_values import LARGEST_VALUE, is_a_line, json_values, parse_line
from llama_lib.data.parts import Part, is_seekable
from llama_lib.data.tables import ROWS, Selection, Table, select_documents
from llama_lib.errors import UserError

FORMATS = ".jsonl, .jsonl.gz, .jsonl.zst, .json, .parquet, .arrow"

_COMPRESSIONS = ("", ".gz", ".zst")
# 256 KiB instead of Python's 8: 1050 instead of 640 MB/s of parsed lines. Measured 2026-11-22.
_BUFFER_BYTES = 1 << 18
_PEEK_BYTES = 1 << 10
_BOM = b"\xef\xbb\xbf"

T = TypeVar("T")


def file_format(path: Path) -> str | None:
    """'jsonl', 'json', 'parquet' or 'arrow' by the name of the file; None for any other."""
    name = path.name.lower()
    for compression in _COMPRESSIONS:
        for kind in ("jsonl", "json"):
            if name.endswith(f".{kind}{compression}"):
                return kind
    for kind in ("parquet", "arrow"):
        if name.endswith(f".{kind}"):
            return kind
    return None


@dataclass(frozen=True)
class Reading(Generic[T]):
    """What records are read as.

    Attributes:
        kind: the type of the values of JSON records.
        plain: the value of a parsed record, by the fastest way; anything but a `kind`, or a
            BadRecord or error of a wrong key or type, if the record is not plainly right.
        judged: the value of any parsed record; raises BadRecord, which says what is wrong.
        select: says the same for the rows of a table.
        example: lines that are right, for messages.
    """

    kind: type
    plain: Callable[[Any], Any]
    judged: Callable[[Any], T]
    select: Callable[[Path, Any], Selection]
    example: str


class RecordFile(Generic[T]):
    """The records of one file or of a part of it, each as a value of one type.

    `position` of `size` bytes are read so far; `bad` records were left out (only with
    `skip_bad_lines`; without it the first bad record raises UserError). Reading a whole file that
    gives no record is an error; whoever reads a file in parts looks at all of them and raises
    `nothing_in`.
    """

    def __init__(
        self, path: Path, reading: Reading[T], skip_bad_lines: bool, part: Part | None
    ) -> None:
        self.path = path
        self.skip_bad_lines = skip_bad_lines
        self._reading = reading
        self.bad = 0
        self._kind = file_format(path)
        if part and part.start and not is_seekable(path):
            raise ValueError(f"{part}: such a file has no parts")
        self._part = part
        self._tell: Callable[[], int] = lambda: 0
        self._last_bad: tuple[str, int, BadRecord] | None = None
        self._first_byte = 0  # where the first line read here begins
        self._number = 0  # of the last record, counted from the first one read here
        self._table = Table(path, reading.select, part)  # used for tables only
        try:
            self.size = self._table.size
        except OSError as error:
            raise unreadable(path, error) from error
        if part and self._kind == "jsonl":
            self.size = part.stop - part.start

    @property
    def position(self) -> int:
        return min(self._tell(), self.size)

    @property
    def number(self) -> int:
        """Line of the file where the last record begins, or its row in a table, from 1."""
        return self._before + self._number

    def check_table(self) -> None:
        """Raises UserError if this is a table without any of the columns that are looked for."""
        if self._is_table:
            _ = self._table.selection

    @property
    def last_bad(self) -> str:
        """The last record left out, as `line 7: why`; empty if there is none."""
        if self._last_bad is None:
            return ""
        unit, number, bad = self._last_bad
        if unit == "line" and self._first_byte:
            # Every part of a file may be asked: counting the lines before it would take too long.
            return f"line {number} from byte {self._first_byte} on: {bad}"
        return self._named(unit, number, bad)

    def _values(self) -> Iterator[T]:
        readers: dict[str | None, Callable[[], Iterator[T]]] = {
            "jsonl": self._json_lines,
            "json": self._json,
            "parquet": self._table_rows,
            "arrow": self._table_rows,
        }
        if self._kind not in readers:
            raise UserError(f"{self.path}: unsupported kind of file; expected one of {FORMATS}.")
        try:
            records = readers[self._kind]()
            first = next(records, None)
            if first is not None:
                yield first
                yield from records
            elif self._is_whole():
                raise nothing_in(self.path, self.bad, self.last_bad, self._reading.example)
        except (OSError, EOFError, zlib.error) as error:
            raise unreadable(self.path, error) from error
        finally:
            self._tell = lambda: self.size

    @property
    def _is_table(self) -> bool:
        return self._kind in ("parquet", "arrow")

    def _is_whole(self) -> bool:
        if self._part is None:
            return True
        if self._kind == "parquet":
            return self._table.is_whole
        return self._part.start == 0 and self._part.stop >= self.path.stat().st_size

    def _json_lines(self) -> Iterator[T]:
        with (
            self.path.open("rb", buffering=_BUFFER_BYTES) as raw,
            decompressed(self.path, raw) as stream,
        ):
            part = self._part if stream is raw else None
            start = part.start if part else 0
            lines = self._lines_of(part, raw) if part else stream
            self._tell = lambda: raw.tell() - start
            loads, plain, kind = orjson.loads, self._reading.plain, self._reading.kind
            for number, line in enumerate(lines, start=1):
                try:
                    value = plain(loads(line))
                except (ValueError, KeyError, TypeError, BadRecord):
                    value = None
                # Whatever is not plainly right is judged by the slower parser, which knows why.
                if type(value) is not kind:
                    if number == 1 and start == 0:
                        line = line.removeprefix(_BOM)
                    if not line.strip():
                        continue
                    try:
                        value = self._reading.judged(parse_line(line))
                    except BadRecord as bad:
                        self._reject("line", number, bad)
                        continue
                self._number = number
                yield value

    def _lines_of(self, part: Part, raw: IO[bytes]) -> Iterator[bytes]:
        """The lines that begin in a part of a plain file."""
        if part.start:
            raw.seek(part.start - 1)
            if not raw.readline(part.stop - part.start).endswith(b"\n"):
                return
        at = self._first_byte = raw.tell()
        # The line after the last one may be very long, so it is not read to find the end.
        for line in raw if at < part.stop else ():
            yield line
            at += len(line)
            if at >= part.stop:
                return

    def _json(self) -> Iterator[T]:
        """Arrays of records, records over several lines, or lines named .json."""
        with self.path.open("rb") as raw, decompressed(self.path, raw) as stream:
            # An array may be one line as long as the file, so only its beginning is looked at.
            first_line = stream.readline(_PEEK_BYTES).removeprefix(_BOM)
            while first_line and not first_line.strip():
                first_line = stream.readline(_PEEK_BYTES)
            if first_line.lstrip().startswith(b"{") and not first_line.endswith(b"\n"):
                first_line += stream.readline(LARGEST_VALUE)
        if first_line and is_a_line(first_line):
            yield from self._json_lines()
            return
        with self.path.open("rb") as raw, decompressed(self.path, raw) as stream:
            self._tell = raw.tell
            for number, record in json_values(self.path, io.TextIOWrapper(stream, "utf-8-sig")):
                try:
                    value = self._reading.judged(record)
                except BadRecord as bad:
                    self._reject("line", number, bad)
                    continue
                self._number = number
                yield value

    def _table_rows(self) -> Iterator[T]:
        self._tell = lambda: self._table.position
        for number, value in enumerate(self._table, start=1):
            if isinstance(value, BadRecord):
                self._reject("row", number, value)
            else:
                self._number = number
                yield value

    def _reject(self, unit: str, number: int, bad: BadRecord) -> None:
        """`number` counts from the first record read here."""
        self._last_bad = unit, number, bad
        if self.skip_bad_lines:
            self.bad += 1
            return
        if isinstance(bad, UnknownShape) and number == 1 and not self._before:
            raise bad.of_file(self.path)
        raise UserError(
            f"{self.path} {self._named(unit, number, bad)}. Mend it, or drop and count such lines "
            "with --skip_bad_lines."
        )

    def _named(self, unit: str, number: int, bad: BadRecord) -> str:
        return f"{unit} {self._before + number}: {bad}"

    @cached_property
    def _before(self) -> int:
        """Lines or rows of the file before the first one read here; counted only when asked for."""
        if self._is_table:
            return self._table.first_row
        lines, left = 0, self._first_byte
        with self.path.open("rb") as raw:
            while left > 0 and (block := raw.read(min(left, _BUFFER_BYTES))):
                lines += block.count(b"\n")
                left -= len(block)
        return lines


class TextFile(RecordFile[Any]):
    """Iterate over the texts of a file, or over its ready-made rows of token ids."""

    def __init__(self, path: Path, skip_bad_lines: bool = False, part: Part | None = None) -> None:
        super().__init__(path, _DOCUMENTS, skip_bad_lines, part)

    @property
    def is_rows(self) -> bool:
        return self._is_table and self._table.selection is ROWS

    def __iter__(self) -> Iterator[Any]:
        return self._values()


def _text_of(record: Any) -> str:
    if not isinstance(record, dict):
        raise BadRecord(f"{type(record).__name__} instead of an object with `text`")
    if "text" not in record:
        raise UnknownShape(sorted(record))
    text = record["text"]
    if not isinstance(text, str):
        raise BadRecord(f"`text` is {type(text).__name__}, not a string")
    check_characters(text)
    return text


_DOCUMENTS = Reading(str, itemgetter("text"), _text_of, select_documents, EXAMPLE_LINE)
