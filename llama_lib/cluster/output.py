"""What the ranks say, shown by the launcher: the first host's as it is, the others' under a name.

Invariant: the lines of different ranks never mix, and what a rank said last is shown. A mistake of
the user, which every rank meets, is said once.
"""

import re
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from llama_lib.errors import UserError

# Messages are compared with as many lines that were shown before. Chosen.
_REMEMBERED_LINES = 1000
_LINE_START = re.compile(r"(?:(?<=[\n\r])|^)(?=[^\n\r])")


@dataclass(frozen=True)
class Source:
    """A rank, and the name of its host if that is to be shown."""

    rank: int
    host: str | None


class Output:
    """What is shown on both streams of the launcher.

    Args:
        write: takes the stream (0: standard output, 1: standard error) and the text.
    """

    def __init__(self, write: Callable[[int, str], object]) -> None:
        self._write = write
        # Who wrote a line of each stream that has not ended yet.
        self._unfinished: list[Source | None] = [None, None]
        self._middle: set[tuple[Source, bool]] = set()  # is in a line that was shown in part
        self._shown: deque[str] = deque(maxlen=_REMEMBERED_LINES)
        self._errors: dict[Source, list[str]] = {}  # from a rank's error message on
        self._mistakes: list[Source] = []

    def say(self, line: str) -> None:
        """A line of the launcher's own."""
        self._end_line(1, None)
        self._write(1, f"launch: {line}\n")

    def show(self, source: Source, is_error: bool, text: str) -> None:
        """Some output of a rank: whole lines, or the beginning of one."""
        if is_error and source.host is not None:
            if source in self._errors:
                self._errors[source].append(text)
                return
            # The way cli.py begins the message that ends a rank.
            before, found, after = _partition_error(text, source.rank)
            if found:
                self._errors[source] = [found + after]
                text = before
        self._show(source, is_error, text)

    def ended(self, source: Source, code: int) -> None:
        """A rank has ended with this code, after all its output."""
        if source not in self._errors:
            return
        if code == UserError.exit_code:
            self._mistakes.append(source)
        else:
            self._show(source, True, "".join(self._errors.pop(source)))

    def finish(self) -> None:
        """Show what was kept back and is not what another rank has said."""
        for source in [*self._mistakes, *set(self._errors).difference(self._mistakes)]:
            text = "".join(self._errors[source])
            if any(line not in self._shown for line in _bare(text, source.rank)):
                self._show(source, True, text)
        self._errors, self._mistakes = {}, []
        for stream in (0, 1):
            self._end_line(stream, None)

    def _show(self, source: Source, is_error: bool, text: str) -> None:
        if not text:
            return
        stream = int(is_error)
        self._end_line(stream, source)
        if is_error:
            self._shown.extend(_bare(text, source.rank))
        if source.host is not None:
            text = self._named(source, is_error, text)
        self._write(stream, text)
        self._unfinished[stream] = None if text.endswith(("\n", "\r")) else source

    def _named(self, source: Source, is_error: bool, text: str) -> str:
        key = (source, is_error)
        head, prefix = "", f"[{source.host}] "
        if key in self._middle and self._unfinished[int(is_error)] == source:
            cut = min((text.find(end) + 1 for end in "\n\r" if end in text), default=len(text))
            head, text = text[:cut], text[cut:]
        whole = head + _LINE_START.sub(prefix, text)
        if whole.endswith(("\n", "\r")):
            self._middle.discard(key)
        else:
            self._middle.add(key)
        return whole

    def _end_line(self, stream: int, source: Source | None) -> None:
        if self._unfinished[stream] not in (None, source):
            self._write(stream, "\n")
            self._unfinished[stream] = None


def _partition_error(text: str, rank: int) -> tuple[str, str, str]:
    found = re.search(rf"(?m)^\[rank {rank}\] ", text)
    if found is None:
        return text, "", ""
    return text[: found.start()], found[0], text[found.end() :]


def _bare(text: str, rank: int) -> list[str]:
    """The lines of a text without the mark of its rank."""
    return [line.removeprefix(f"[rank {rank}] ") for line in text.splitlines() if line]
