"""Read the `text` of every record of one file, in order and with flat memory.

Invariant: a record is either yielded, or named by file and line in an error, or counted as bad.
"""

import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from llama_lib.errors import UserError

EXAMPLE_LINE = '{"text": "One document of plain text.", "meta": {"anything": "is ignored"}}'
FORMATS = ".jsonl, .jsonl.gz, .jsonl.zst, .json, .parquet"

_COMPRESSIONS = ("", ".gz", ".zst")
_BATCH_ROWS = 256
_CHUNK_CHARACTERS = 1 << 20
# A JSON value still open after this many characters is a broken file, not a record. Chosen.
_LARGEST_VALUE = 1 << 28


class _BadRecord(Exception):
    """Why one record gives no text."""


class _NoTextColumn(_BadRecord):
    def __init__(self, columns: list[str]) -> None:
        self.columns = columns
        super().__init__(f"no `text`; found {_listed(columns)}")


def file_format(path: Path) -> str | None:
    """'jsonl', 'json', 'parquet' or 'arrow' by the name of the file; None for any other."""
    name = path.name.lower()
    for compression in _COMPRESSIONS:
        for kind in ("jsonl", "json"):
            if name.endswith(f".{kind}{compression}"):
                return kind
    if name.endswith(".parquet"):
        return "parquet"
    # Arrow streams are what the datasets library leaves in its cache after a download.
    return "arrow" if name.endswith(".arrow") else None


class TextFile:
    """Iterate over the texts of one file.

    `position` of `size` bytes are read so far; `bad` records were left out (only with
    `skip_bad_lines`; without it the first bad record raises UserError).
    """

    def __init__(self, path: Path, skip_bad_lines: bool = False) -> None:
        self.path = path
        self.skip_bad_lines = skip_bad_lines
        self.size = path.stat().st_size
        self.bad = 0
        self._tell: Callable[[], int] = lambda: 0
        self._last_bad = ""
        self._row = 0

    @property
    def position(self) -> int:
        return self._tell()

    def __iter__(self) -> Iterator[str]:
        kind = file_format(self.path)
        readers = {
            "jsonl": self._json_lines,
            "json": self._json,
            "parquet": self._parquet,
            "arrow": self._arrow,
        }
        if kind is None:
            raise UserError(f"{self.path}: unsupported kind of file; expected one of {FORMATS}.")
        records = 0
        try:
            for text in readers[kind]():
                records += 1
                yield text
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{self.path} cannot be read: {error}.") from error
        finally:
            self._tell = lambda: self.size
        if not records and self.bad:
            raise UserError(
                f"{self.path}: all {self.bad} records are bad; the last one: {self._last_bad}. "
                f"Expected lines like {EXAMPLE_LINE}"
            )
        if not records:
            raise UserError(f"{self.path} is empty: expected lines like {EXAMPLE_LINE}")

    def _json_lines(self) -> Iterator[str]:
        with self.path.open("rb") as raw, _decompressed(self.path, raw) as stream:
            self._tell = raw.tell
            for number, line in enumerate(stream, start=1):
                if not line.strip():
                    continue
                try:
                    yield _text_of(_parse_line(line, number))
                except _BadRecord as bad:
                    self._reject("line", number, bad)

    def _json(self) -> Iterator[str]:
        """An array of records, one record over several lines, or lines named .json."""
        with self.path.open("rb") as raw, _decompressed(self.path, raw) as stream:
            first_line = stream.readline().strip()
        if first_line.startswith(b"{") and _is_json(first_line):
            yield from self._json_lines()
            return
        with self.path.open("rb") as raw, _decompressed(self.path, raw) as stream:
            self._tell = raw.tell
            for number, value in self._json_values(io.TextIOWrapper(stream, "utf-8-sig")):
                try:
                    yield _text_of(value)
                except _BadRecord as bad:
                    self._reject("line", number, bad)

    def _json_values(self, stream: IO[str]) -> Iterator[tuple[int, Any]]:
        """(line number, value) of each element of an array, or of each value standing alone."""
        decoder = json.JSONDecoder()
        buffer, line, ended, wanted = "", 1, False, _CHUNK_CHARACTERS
        in_array = None
        while True:
            body = buffer.lstrip(" \t\r\n,")
            if body and in_array is None:
                in_array = body[0] == "["
                if in_array:
                    body = body[1:].lstrip()
            line += buffer.count("\n", 0, len(buffer) - len(body))
            buffer = body
            value, end = None, 0
            if buffer and not (in_array and buffer[0] == "]"):
                try:
                    value, end = decoder.raw_decode(buffer)
                except json.JSONDecodeError as error:
                    if ended or len(buffer) > _LARGEST_VALUE:
                        at = line + error.lineno - 1
                        raise UserError(
                            f"{self.path} line {at}: invalid JSON ({error.msg}). An array cannot "
                            "be read past such a place; mend it, or save one record per line."
                        ) from error
            elif buffer:
                return
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

    def _parquet(self) -> Iterator[str]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            with pq.ParquetFile(self.path) as file:
                self._check_columns(file.schema_arrow)
                batches = file.iter_batches(batch_size=_BATCH_ROWS, columns=["text"])
                rows = max(file.metadata.num_rows, 1)
                self._tell = lambda: self.size * self._row // rows
                yield from self._column(batches)
        except pa.ArrowException as error:
            raise UserError(f"{self.path} is damaged, or no parquet file: {error}") from error

    def _arrow(self) -> Iterator[str]:
        import pyarrow as pa

        try:
            with self.path.open("rb") as raw, pa.ipc.open_stream(raw) as stream:
                self._check_columns(stream.schema)
                self._tell = raw.tell
                yield from self._column(stream)
        except pa.ArrowException as error:
            raise UserError(f"{self.path} is damaged, or no arrow stream: {error}") from error

    def _check_columns(self, schema: Any) -> None:
        import pyarrow as pa

        if "text" not in schema.names:
            raise UserError(_no_text_column(self.path, schema.names))
        kind = schema.field("text").type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise UserError(f"{self.path}: the column `text` holds {kind}, expected strings.")

    def _column(self, batches: Any) -> Iterator[str]:
        for batch in batches:
            for text in batch.column(batch.schema.get_field_index("text")).to_pylist():
                self._row += 1
                if text is None:
                    self._reject("row", self._row, _BadRecord("`text` is null"))
                else:
                    yield text

    def _reject(self, unit: str, number: int, bad: _BadRecord) -> None:
        self._last_bad = f"{unit} {number}: {bad}"
        if self.skip_bad_lines:
            self.bad += 1
            return
        if isinstance(bad, _NoTextColumn) and number == 1:
            raise UserError(_no_text_column(self.path, bad.columns))
        raise UserError(
            f"{self.path} {unit} {number}: {bad}. Mend it, or drop and count such lines "
            "with --skip_bad_lines."
        )


def _decompressed(path: Path, raw: IO[bytes]) -> Any:
    name = path.name.lower()
    if name.endswith(".gz"):
        return gzip.GzipFile(fileobj=raw)
    if name.endswith(".zst"):
        import zstandard

        frames = zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True)
        return io.BufferedReader(_ZstandardErrors(frames))
    return raw


class _ZstandardErrors(io.RawIOBase):
    """A zstandard stream whose damage shows as OSError, as gzip's does."""

    def __init__(self, frames: Any) -> None:
        self._frames = frames

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        import zstandard

        try:
            return self._frames.readinto(buffer)
        except zstandard.ZstdError as error:
            raise OSError(f"damaged zstandard data: {error}") from error


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _parse_line(line: bytes, number: int) -> Any:
    try:
        text = line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise _BadRecord(f"not UTF-8 at byte {error.start}") from error
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise _BadRecord(f"invalid JSON ({error.msg} at column {error.colno})") from error


def _text_of(record: Any) -> str:
    if not isinstance(record, dict):
        raise _BadRecord(f"{type(record).__name__} instead of an object with `text`")
    if "text" not in record:
        raise _NoTextColumn(sorted(record))
    text = record["text"]
    if not isinstance(text, str):
        raise _BadRecord(f"`text` is {type(text).__name__}, not a string")
    # JSON can spell half a surrogate pair, which is no character and which no tokenizer takes.
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise _BadRecord(f"half a surrogate pair at character {error.start}") from error
    return text


def _no_text_column(path: Path, columns: list[str]) -> str:
    return (
        f"{path} has no `text` column; found {_listed(columns)}. Expected lines like {EXAMPLE_LINE}"
    )


def _listed(columns: list[str]) -> str:
    return ", ".join(columns) if columns else "no columns"
