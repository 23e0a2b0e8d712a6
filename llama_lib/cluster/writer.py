"""Writes what the launcher shows, from a thread of its own.

Invariant: a reader that stands still, as a terminal after Ctrl-S or a pager, holds up neither the
job nor what the launcher has to do for it; what is written keeps its order.
"""

import os
import queue
import sys
import threading
from typing import TextIO


class Writer:
    """Both streams of the launcher: 0 is the standard output, 1 the standard error."""

    def __init__(self, stdout: TextIO | None = None, stderr: TextIO | None = None) -> None:
        self._streams = (stdout or sys.stdout, stderr or sys.stderr)
        self._is_read = [True, True]
        self._waiting: queue.Queue[tuple[int, str]] = queue.Queue()
        threading.Thread(target=self._work, daemon=True).start()

    def write(self, stream: int, text: str) -> None:
        """To be written when all before it is."""
        self._waiting.put((stream, text))

    def flush(self) -> None:
        """Wait until all is written, which may take as long as a reader likes."""
        self._waiting.join()

    def _work(self) -> None:
        while True:
            stream, text = self._waiting.get()
            self._write(stream, text)
            self._waiting.task_done()

    def _write(self, stream: int, text: str) -> None:
        if not self._is_read[stream]:
            return
        try:
            self._put(stream, text)
        except UnicodeEncodeError:
            encoding = self._streams[stream].encoding
            self._put(stream, text.encode(encoding, "replace").decode(encoding))
        except OSError:
            # A closed terminal or `head` is no reason to lose a run; it has its own log files.
            self._is_read[stream] = False
            # What is left in its buffer would fail again when the launcher ends.
            with open(os.devnull, "w") as nothing:
                os.dup2(nothing.fileno(), self._streams[stream].fileno())
            name = ("standard output", "standard error")[stream]
            line = f"launch: nobody reads the {name} any more; the job goes on, see its log files\n"
            self._write(1 - stream, line)

    def _put(self, stream: int, text: str) -> None:
        self._streams[stream].write(text)
        self._streams[stream].flush()
