"""A started program on a host: its three standard streams and its exit status.

Invariant: a send never waits longer than `SEND_SECONDS`, and closing ends what runs here.
"""

import os
import select
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import IO, Any

# A peer that takes nothing for this long is gone; its heartbeats have the same limit.
SEND_SECONDS = 20.0
_READ_BYTES = 65536
_ERRORS_BYTES = 16384


class Channel:
    """What both kinds have in common; `_read`, `_read_errors` and the rest come from the kind."""

    def __init__(self) -> None:
        self._errors = b""
        self._errors_ended = threading.Event()
        threading.Thread(target=self._keep_errors, daemon=True).start()

    def send(self, data: bytes) -> None:
        """Write to the program's standard input.

        Raises:
            OSError: it is not read any more.
        """
        raise NotImplementedError

    def end_input(self) -> None:
        """The program's standard input ends here."""
        raise NotImplementedError

    def wait(self, seconds: float) -> int | None:
        """The exit status; below 0 where a signal ended it here, None if it still runs."""
        raise NotImplementedError

    def close(self) -> None:
        """Give up the program: here it is killed, elsewhere it loses its streams."""
        raise NotImplementedError

    def _read(self) -> bytes:
        raise NotImplementedError

    def _read_errors(self) -> bytes:
        raise NotImplementedError

    def receive(self, callback: Callable[[bytes | None], None]) -> None:
        """Call `callback` with each line of the standard output, and with None at its end.

        It is called from a thread of its own.
        """
        threading.Thread(target=self._pass_lines, args=(callback,), daemon=True).start()

    def errors(self, seconds: float = 1.0) -> str:
        """What the program said on its standard error, the last of it if that is long.

        Waits up to `seconds` for the end of it.
        """
        self._errors_ended.wait(seconds)
        return self._errors.decode("utf-8", "replace")

    def _pass_lines(self, callback: Callable[[bytes | None], None]) -> None:
        pending: list[bytes] = []
        while chunk := self._until_ended(self._read):
            *lines, rest = chunk.split(b"\n")
            for line in lines:
                callback(b"".join([*pending, line, b"\n"]))
                pending = []
            if rest:
                pending.append(rest)
        if pending:
            callback(b"".join(pending))
        callback(None)

    def _keep_errors(self) -> None:
        while chunk := self._until_ended(self._read_errors):
            self._errors = (self._errors + chunk)[-_ERRORS_BYTES:]
        self._errors_ended.set()

    @staticmethod
    def _until_ended(read: Callable[[], bytes]) -> bytes:
        try:
            return read()
        except (OSError, ValueError):
            return b""  # the stream was closed under the reader


class LocalChannel(Channel):
    """A child process, the first of a session of its own."""

    def __init__(self, process: "subprocess.Popen[bytes]") -> None:
        assert process.stdin and process.stdout and process.stderr
        self._process = process
        self._input, self._output = process.stdin, process.stdout
        self._error_output = process.stderr
        os.set_blocking(self._input.fileno(), False)
        self._lock = threading.Lock()
        super().__init__()

    def send(self, data: bytes) -> None:
        deadline = time.monotonic() + SEND_SECONDS
        with self._lock:
            while data:
                if self._input.closed:
                    raise BrokenPipeError("the input was closed")
                left = deadline - time.monotonic()
                # select() takes no descriptor above 1023, and there may be hundreds of hosts.
                writable = select.poll()
                writable.register(self._input, select.POLLOUT)
                if not writable.poll(max(0.0, left) * 1000):
                    raise TimeoutError("the program does not read its input")
                data = data[os.write(self._input.fileno(), data[:_READ_BYTES]) :]

    def end_input(self) -> None:
        with self._lock, suppress(OSError):
            self._input.close()

    def wait(self, seconds: float) -> int | None:
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def close(self) -> None:
        self.end_input()
        if self._process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def _read(self) -> bytes:
        return self._read_or_close(self._output)

    def _read_errors(self) -> bytes:
        return self._read_or_close(self._error_output)

    @staticmethod
    def _read_or_close(stream: IO[bytes]) -> bytes:
        chunk = os.read(stream.fileno(), _READ_BYTES)
        if not chunk:
            stream.close()
        return chunk


class SshChannel(Channel):
    """A command on a connection of fabric, which has no other."""

    def __init__(self, connection: Any, channel: Any) -> None:
        self._connection, self._channel = connection, channel
        channel.settimeout(None)
        self._lock = threading.Lock()
        super().__init__()

    def send(self, data: bytes) -> None:
        with self._lock:
            self._channel.settimeout(SEND_SECONDS)
            try:
                self._channel.sendall(data)
            except OSError:
                raise
            except Exception as error:
                # EOFError or SSHException, while paramiko finds out that the peer is gone.
                raise ConnectionError(f"the connection ended ({error})") from None
            finally:
                self._channel.settimeout(None)

    def end_input(self) -> None:
        with suppress(Exception):  # as for `send`
            self._channel.shutdown_write()

    def wait(self, seconds: float) -> int | None:
        if not self._channel.status_event.wait(seconds) or self._channel.exit_status < 0:
            return None
        return int(self._channel.exit_status)

    def close(self) -> None:
        # Closing says goodbye to the peer, which may not answer any more.
        closing = threading.Thread(target=self._connection.close, daemon=True)
        closing.start()
        closing.join(1.0)

    def _read(self) -> bytes:
        return self._patiently(self._channel.recv)

    def _read_errors(self) -> bytes:
        return self._patiently(self._channel.recv_stderr)

    @staticmethod
    def _patiently(receive: Callable[[int], bytes]) -> bytes:
        while True:
            # A channel has one time limit for both directions, which is meant for `send` alone.
            with suppress(TimeoutError):
                return bytes(receive(_READ_BYTES))
