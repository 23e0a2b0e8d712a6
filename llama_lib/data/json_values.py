"""The JSON values of a file: arrays of records, records over several lines, or one a line.

Invariant: what is no JSON is named by its line; memory holds one chunk, or one longer value.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from llama_lib.data.bad_records import BadRecord
from llama_lib.errors import UserError

# A JSON value still open after this many characters is a broken file, not a record. Chosen.
LARGEST_VALUE = 1 << 28
_CHUNK_CHARACTERS = 1 << 20
_BETWEEN = re.compile(r"[ \t\r\n,]*")


def json_values(path: Path, stream: IO[str]) -> Iterator[tuple[int, Any]]:
    """(line number, value) of each element of every array, and of each value outside them."""
    decoder = json.JSONDecoder()
    buffer, at, line, ended, wanted = "", 0, 1, False, _CHUNK_CHARACTERS
    in_array = False
    while True:
        start, at = at, _after_blanks(buffer, at)
        # What follows an array may be another one: a file may be several, joined.
        while at < len(buffer) and buffer[at] == ("]" if in_array else "["):
            in_array = not in_array
            at = _after_blanks(buffer, at + 1)
        line += buffer.count("\n", start, at)
        value, end = None, at
        if at < len(buffer):
            try:
                value, end = decoder.raw_decode(buffer, at)
            except json.JSONDecodeError as error:
                if ended or len(buffer) - at > LARGEST_VALUE:
                    line += buffer.count("\n", at, error.pos)
                    raise _cut_short(path, line, error.msg) from error
            except (ValueError, RecursionError) as error:
                raise _cut_short(path, line, str(error)) from error
        # A value that ends where the buffer ends may go on in the next chunk.
        if end > at and (end < len(buffer) or ended):
            yield line, value
            line += buffer.count("\n", at, end)
            at = end
            wanted = _CHUNK_CHARACTERS
        elif ended:
            if in_array:
                raise UserError(f"{path} line {line}: the array has no closing ].")
            return
        else:
            try:
                chunk = stream.read(wanted)
            except UnicodeDecodeError as error:
                raise UserError(f"{path} is not UTF-8: {error}.") from error
            # Doubling keeps the decoding of one long value linear.
            wanted *= 2
            buffer, at, ended = buffer[at:] + chunk, 0, not chunk


def _after_blanks(buffer: str, at: int) -> int:
    found = _BETWEEN.match(buffer, at)
    assert found is not None  # it matches nothing, too
    return found.end()


def _cut_short(path: Path, line: int, reason: str) -> UserError:
    return UserError(
        f"{path} line {line}: invalid JSON ({reason}). An array cannot be read past such a place; "
        "mend it, or save one record per line."
    )


def is_a_line(line: bytes) -> bool:
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


def parse_line(line: bytes) -> Any:
    """The value of a line. Raises BadRecord."""
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRecord(f"not UTF-8 at byte {error.start}") from error
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        # Some of Python's own messages end with the word that follows here.
        what = error.msg.removesuffix(" at")
        raise BadRecord(f"invalid JSON ({what} at column {error.colno})") from error
    except (ValueError, RecursionError) as error:
        # A number of thousands of digits, or a thousand open brackets.
        raise BadRecord(f"invalid JSON ({error})") from error
