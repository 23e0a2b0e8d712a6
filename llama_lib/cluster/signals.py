"""Signals to the launcher, which are requests to the job once it runs.

Invariant: a signal ends a launcher that has started nothing, and is never lost once it has.
"""

import os
import signal
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from llama_lib.errors import LlamaLibError


def signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


class Interrupted(LlamaLibError):
    """A signal came while there was no job to pass it on to."""

    def __init__(self, number: int) -> None:
        self.exit_code = 128 + number
        super().__init__(f"launch: {signal_name(number)}: ending")


class Signals:
    """Handlers of the signals that end a launcher; a context manager."""

    def __init__(self) -> None:
        self._received: deque[int] = deque()
        self._keeps = False
        self._former: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            # `nohup` has it ignored, and so it stays.
            if signal.getsignal(number) != signal.SIG_IGN:
                self._former[number] = signal.signal(number, self._receive)
        self._former[signal.SIGTSTP] = signal.signal(signal.SIGTSTP, self._refuse_to_pause)
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Inside, signals are kept for `take`; outside, one raises Interrupted."""
        self._keeps = True
        try:
            yield
        finally:
            self._keeps = False

    def take(self) -> list[int]:
        """The signals since the last call, in order."""
        taken = []
        while self._received:
            taken.append(self._received.popleft())
        return taken

    def _receive(self, number: int, _: FrameType | None) -> None:
        if not self._keeps:
            raise Interrupted(number)
        self._received.append(number)

    @staticmethod
    def _refuse_to_pause(*_: Any) -> None:
        # A paused launcher is silent, and the hosts would end the job.
        # Not print: it fails in a handler that interrupts another print.
        os.write(2, b"launch: a running job cannot be paused; Ctrl-C saves and ends it\n")
