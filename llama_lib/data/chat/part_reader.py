"""Read the records of a part of a file without reading what is before it.

Invariant: the numbers that a reader gives, plus the lines of the parts before, are those of the
file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from llama_lib.data.bad_records import BadRecord, unreadable
from llama_lib.data.chat.messages import Example
from llama_lib.data.chat.records import ExampleFile
from llama_lib.data.parts import Part

_BLOCK_BYTES = 1 << 20


class ExampleReader(ExampleFile):
    """As ExampleFile, but the lines of a part are counted from its own first one.

    `on_bad` gets the number of each record that is left out, and why.
    """

    def __init__(
        self,
        path: Path,
        skip_bad_lines: bool,
        on_bad: Callable[[int, BadRecord], None],
        part: Part | None = None,
    ) -> None:
        super().__init__(path, skip_bad_lines, part)
        self._on_bad = on_bad

    def __iter__(self) -> Iterator[tuple[int, Example]]:
        for example in self._values():
            yield self._first + self._number, example

    def _reject(self, unit: str, number: int, bad: BadRecord) -> None:
        super()._reject(unit, number, bad)
        self._on_bad(self._first + number, bad)

    @property
    def _first(self) -> int:
        # Of a table it is known without reading.
        return self._before if self._is_table else 0


def lines_of(part: Part) -> int:
    """How many lines begin in a part of a file."""
    first, stop = max(part.start - 1, 0), part.stop - 1
    lines = int(part.start == 0 < part.stop)
    try:
        with part.path.open("rb") as file:
            file.seek(first)
            while first < stop and (block := file.read(min(stop - first, _BLOCK_BYTES))):
                lines += block.count(b"\n")
                first += len(block)
    except OSError as error:
        raise unreadable(part.path, error) from error
    return lines
