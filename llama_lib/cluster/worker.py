"""One rank's process on its host: started with its place in the job, followed to its end.

Invariant: its output is handed on in order and complete, whole lines as they come and a line that
is still being written after a moment; it does not outlive the agent.
"""

import codecs
import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from llama_lib.cluster.processes import dying_with_this
from llama_lib.cluster.protocol import Message

# An unfinished line is shown when nothing followed for this long. Chosen.
_PARTIAL_LINE_SECONDS = 0.2
# A child of an ended worker may keep its output open: nobody waits longer for it.
_LAST_OUTPUT_SECONDS = 2.0
_READ_BYTES = 65536


@dataclass(frozen=True)
class Terminal:
    """The terminal before which the launcher was started."""

    columns: int
    lines: int
    name: str

    def open(self) -> tuple[int, int]:
        """Both ends of a new one like it, which changes nothing that is written to it."""
        ours, theirs = pty.openpty()
        attributes = termios.tcgetattr(theirs)
        attributes[1] &= ~termios.OPOST
        attributes[3] &= ~termios.ECHO
        termios.tcsetattr(theirs, termios.TCSANOW, attributes)
        size = struct.pack("HHHH", self.lines, self.columns, 0, 0)
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, size)
        return ours, theirs


class Worker:
    """A process of the job.

    Args:
        local_rank: which of this host's.
        command: the script and its arguments.
        environment: all of the process's variables.
        emit: takes messages for the launcher.
        terminals: of standard output and standard error; None stands for a pipe.
    """

    def __init__(
        self,
        local_rank: int,
        command: Sequence[str],
        environment: Mapping[str, str],
        emit: Callable[[Message], None],
        terminals: tuple[Terminal | None, Terminal | None],
    ) -> None:
        self.local_rank = local_rank
        self.is_reported = threading.Event()
        self._emit = emit
        pairs = [terminal.open() if terminal else os.pipe() for terminal in terminals]
        try:
            # In a session of its own, so that no key of a terminal reaches it. Without -u what a
            # script prints would wait in its memory.
            self._process = subprocess.Popen(
                [sys.executable, "-u", *command],
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=pairs[0][1],
                stderr=pairs[1][1],
                start_new_session=True,
                preexec_fn=dying_with_this(signal.SIGKILL),
            )
        finally:
            for _, theirs in pairs:
                os.close(theirs)
        self._outputs = [ours for ours, _ in pairs]

    def follow(self) -> None:
        """Start to hand on output and, when it comes, the end."""
        pumps = [
            threading.Thread(target=self._pump, args=(output, is_error), daemon=True)
            for is_error, output in enumerate(self._outputs)
        ]
        for pump in pumps:
            pump.start()
        threading.Thread(target=self._wait, args=(pumps,), daemon=True).start()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def has_ended(self) -> bool:
        return self._process.returncode is not None

    def send_signal(self, number: int) -> None:
        """To the process itself; its children learn from it."""
        with suppress(ProcessLookupError):
            self._process.send_signal(number)

    def kill(self) -> None:
        """At once, with all that it started in its own session."""
        if not self.has_ended:
            with suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)

    def _wait(self, pumps: Sequence[threading.Thread]) -> None:
        code = self._process.wait()
        ended = time.monotonic()
        for pump in pumps:
            pump.join(max(0.0, ended + _LAST_OUTPUT_SECONDS - time.monotonic()))
        self._emit({"end": self.local_rank, "code": code, "ago": time.monotonic() - ended})
        self.is_reported.set()

    def _pump(self, output: int, is_error: int) -> None:
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        pending = ""

        def hand_on(text: str) -> None:
            if text:
                self._emit({"out": self.local_rank, "error": bool(is_error), "text": text})

        poll = select.poll()
        poll.register(output, select.POLLIN)
        while True:
            if not poll.poll(_PARTIAL_LINE_SECONDS * 1000 if pending else None):
                hand_on(pending)
                pending = ""
                continue
            try:
                data = os.read(output, _READ_BYTES)
            except OSError:
                data = b""  # a terminal ends this way
            if not data:
                break
            text = pending + decoder.decode(data)
            # A progress bar writes its return first and never ends its line.
            complete = max(text.rfind("\n"), text.rfind("\r")) + 1
            if len(text) > _READ_BYTES:
                complete = len(text)
            hand_on(text[:complete])
            pending = text[complete:]
        hand_on(pending + decoder.decode(b"", True))
        os.close(output)
