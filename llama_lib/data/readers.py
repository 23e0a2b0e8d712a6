"""Read the records of one file, in order and with flat memory.

Invariant: a record is either yielded, or named by file and line in an error, or counted as bad.
"""

import io
import json
import zlib
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import orjson

from llama_lib.data.bad_records import (
    BadRecord,
    NoTextColumn,
    no_text_column,
    nothing_in,
    unreadable,
)
from llama_lib.data.compressed import decompressed
from llama_lib.data.parts import Part, is_seekable
from llama_lib.data.tables import Ids, Table
from llama_lib.errors import UserError

FORMATS = ".jsonl, .jsonl.gz, .jsonl.zst, .json, .parquet, .arrow"

_COMPRESSIONS = ("", ".gz", ".zst")
_CHUNK_CHARACTERS = 1 << 20
# 256 KiB instead of Python's 8: 1050 instead of 640 MB/s of parsed lines. Measured 2026-11-22.
_BUFFER_BYTES = 1 << 18
# A JSON value still open after this many characters is a broken file, not a record. Chosen.
_LARGEST_VALUE = 1 << 28
_PEEK_BYTES = 1 << 10
_BOM = b"\xef\xbb\xbf"


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


class TextFile:
    """Iterate over the records of one file or of a part of it: texts, or arrays of token ids.

    `position` of `size` bytes are read so far; `bad` records were left out (only with
    `skip_bad_lines`; without it the first bad record raises UserError). `is_rows` says whether
    the records are ready-made rows of ids. Reading a whole file that gives no record is an
    error; whoever reads a file in parts looks at all of them and raises `nothing_in`.
    """

    def __init__(self, path: Path, skip_bad_lines: bool = False, part: Part | None = None) -> None:
        self.path = path
        self.skip_bad_lines = skip_bad_lines
        self.bad = 0
        self._kind = file_format(path)
        if part and part.start and not is_seekable(path):
            raise ValueError(f"{part}: such a file has no parts")
        self._part = part
        self._tell: Callable[[], int] = lambda: 0
        self._last_bad: tuple[str, int, BadRecord] | None = None
        self._first_byte = 0  # where the first line read here begins
        self._table = Table(path, part)  # used for tables only
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
    def is_rows(self) -> bool:
        return self._kind in ("parquet", "arrow") and self._table.is_rows

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

    def __iter__(self) -> Iterator[Any]:
        readers: dict[str | None, Callable[[], Iterator[str | Ids]]] = {
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
                raise nothing_in(self.path, self.bad, self.last_bad)
        except (OSError, EOFError, zlib.error) as error:
            raise unreadable(self.path, error) from error
        finally:
            self._tell = lambda: self.size

    def _is_whole(self) -> bool:
        if self._part is None:
            return True
        if self._kind == "parquet":
            return self._table.is_whole
        return self._part.start == 0 and self._part.stop >= self.path.stat().st_size

    def _json_lines(self) -> Iterator[str]:
        with (
            self.path.open("rb", buffering=_BUFFER_BYTES) as raw,
            decompressed(self.path, raw) as stream,
        ):
            part = self._part if stream is raw else None
            start = part.start if part else 0
            lines = self._lines_of(part, raw) if part else stream
            self._tell = lambda: raw.tell() - start
            loads = orjson.loads
            for number, line in enumerate(lines, start=1):
                try:
                    text = loads(line)["text"]
                except (ValueError, KeyError, TypeError):
                    text = None
                # Whatever is not plainly right is judged by the slower parser, which knows why.
                if type(text) is not str:
                    if number == 1 and start == 0:
                        line = line.removeprefix(_BOM)
                    if not line.strip():
                        continue
                    try:
                        text = _text_of(_parse_line(line))
                    except BadRecord as bad:
                        self._reject("line", number, bad)
                        continue
                yield text

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

    def _json(self) -> Iterator[str]:
        """Arrays of records, records over several lines, or lines named .json."""
        with self.path.open("rb") as raw, decompressed(self.path, raw) as stream:
            # An array may be one line as long as the file, so only its beginning is looked at.
            first_line = stream.readline(_PEEK_BYTES).removeprefix(_BOM)
            while first_line and not first_line.strip():
                first_line = stream.readline(_PEEK_BYTES)
            if first_line.lstrip().startswith(b"{") and not first_line.endswith(b"\n"):
                first_line += stream.readline(_LARGEST_VALUE)
        if first_line and _is_a_line(first_line):
            yield from self._json_lines()
            return
        with self.path.open("rb") as raw, decompressed(self.path, raw) as stream:
            self._tell = raw.tell
            for number, value in self._json_values(io.TextIOWrapper(stream, "utf-8-sig")):
                try:
                    yield _text_of(value)
                except BadRecord as bad:
                    self._reject("line", number, bad)

    def _json_values(self, stream: IO[str]) -> Iterator[tuple[int, Any]]:
        """(line number, value) of each element of every array, and of each value outside them."""
        decoder = json.JSONDecoder()
        buffer, line, ended, wanted = "", 1, False, _CHUNK_CHARACTERS
        in_array = False
        while True:
            body = buffer.lstrip(" \t\r\n,")
            # What follows an array may be another one: a file may be several, joined.
            while body and body[0] == ("]" if in_array else "["):
                in_array = not in_array
                body = body[1:].lstrip(" \t\r\n,")
            line += buffer.count("\n", 0, len(buffer) - len(body))
            buffer = body
            value, end = None, 0
            if buffer:
                try:
                    value, end = decoder.raw_decode(buffer)
                except json.JSONDecodeError as error:
                    if ended or len(buffer) > _LARGEST_VALUE:
                        raise self._cut_short(line + error.lineno - 1, error.msg) from error
                except (ValueError, RecursionError) as error:
                    raise self._cut_short(line, str(error)) from error
            # A value that ends where the buffer ends may go on in the next chunk.
            if end and (end < len(buffer) or ended):
                yield line, value
                line += buffer.count("\n", 0, end)
                buffer = buffer[end:]
                wanted = _CHUNK_CHARACTERS
            elif ended:
                if in_array:
                    raise UserError(f"{self.path} line {line}: the array has no closing ].")
                return
            else:
                try:
                    chunk = stream.read(wanted)
                except UnicodeDecodeError as error:
                    raise UserError(f"{self.path} is not UTF-8: {error}.") from error
                # Doubling keeps the decoding of one long value linear.
                wanted *= 2
                buffer, ended = buffer + chunk, not chunk

    def _cut_short(self, line: int, reason: str) -> UserError:
        return UserError(
            f"{self.path} line {line}: invalid JSON ({reason}). An array cannot be read past such "
            "a place; mend it, or save one record per line."
        )

    def _table_rows(self) -> Iterator[str | Ids]:
        self._tell = lambda: self._table.position
        for number, value in enumerate(self._table, start=1):
            if isinstance(value, BadRecord):
                self._reject("row", number, value)
            else:
                yield value

    def _reject(self, unit: str, number: int, bad: BadRecord) -> None:
        """`number` counts from the first record read here."""
        self._last_bad = unit, number, bad
        if self.skip_bad_lines:
            self.bad += 1
            return
        if isinstance(bad, NoTextColumn) and number == 1 and not self._before:
            raise no_text_column(self.path, bad.columns)
        raise UserError(
            f"{self.path} {self._named(unit, number, bad)}. Mend it, or drop and count such lines "
            "with --skip_bad_lines."
        )

    def _named(self, unit: str, number: int, bad: BadRecord) -> str:
        return f"{unit} {self._before + number}: {bad}"

    @cached_property
    def _before(self) -> int:
        """Lines or rows of the file before the first one read here; counted only for a message."""
        if self._kind in ("parquet", "arrow"):
            return self._table.first_row
        lines, left = 0, self._first_byte
        with self.path.open("rb") as raw:
            while left > 0 and (block := raw.read(min(left, _BUFFER_BYTES))):
                lines += block.count(b"\n")
                left -= len(block)
        return lines


def _is_a_line(line: bytes) -> bool:
    """Whether the first line of a file tells that each line is a record, if perhaps a bad one."""
    try:
        text = line.decode("utf-8").strip(" \t\r\n")
        if text.startswith("["):
            return False
        json.loads(text)
    except json.JSONDecodeError as error:
        if not text.startswith("{"):
            return True
        # No string goes on in the next line, so this one is cut.
        if error.msg.startswith("Unterminated string"):
            return True
        rest = text[error.pos :].lstrip(" \t\r\n,")
        # Neither a record that goes on in the next line, nor one with more behind it.
        return bool(rest) and not (error.msg == "Extra data" and rest[0] in "{[")
    except (ValueError, RecursionError):
        pass
    return True


def _parse_line(line: bytes) -> Any:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRecord(f"not UTF-8 at byte {error.start}") from error
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise BadRecord(f"invalid JSON ({error.msg} at column {error.colno})") from error
    except (ValueError, RecursionError) as error:
        # A number of thousands of digits, or a thousand open brackets.
        raise BadRecord(f"invalid JSON ({error})") from error


def _text_of(record: Any) -> str:
    if not isinstance(record, dict):
        raise BadRecord(f"{type(record).__name__} instead of an object with `text`")
    if "text" not in record:
        raise NoTextColumn(sorted(record))
    text = record["text"]
    if not isinstance(text, str):
        raise BadRecord(f"`text` is {type(text).__name__}, not a string")
    # JSON can spell half a surrogate pair, which is no character and which no tokenizer takes.
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRecord(f"half a surrogate pair at character {error.start}") from error
    return text
