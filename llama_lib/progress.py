"""Counts what this process gets done, so that one that works is told from one that hangs.

Invariant: a count costs an addition; nobody is told until the watchdog asks.
"""

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

_LOOK_SECONDS = 1.0
# More than the lines of a log, less than a connection brings that is worth waiting for. Chosen.
_TRANSFER_BYTES = 1 << 20

_count = 0
_step = 0
_trains = False


def made() -> None:
    """Some work is done: a tensor written, a batch measured, a token chosen.

    To be called wherever a process may be busy for longer than a few seconds. Several threads may:
    one of two simultaneous counts can get lost, which nobody needs.
    """
    global _count
    _count += 1


@contextlib.contextmanager
def transferring() -> Iterator[None]:
    """Count the bytes that come in, or go out, while a library is at work that counts nothing."""
    done = threading.Event()
    watcher = threading.Thread(target=_count_bytes, args=(done,), daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()


def _count_bytes(done: threading.Event) -> None:
    moved = _bytes_moved()
    while not done.wait(_LOOK_SECONDS):
        if _bytes_moved() > moved + _TRANSFER_BYTES:
            moved = _bytes_moved()
            made()


def _bytes_moved() -> int:
    """Bytes this process has written to files and sockets; 0 where the system does not say."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("wchar")), 0)


def step_done(step: int) -> None:
    """A training step, counted from 1, is done."""
    global _step, _trains
    _step, _trains = step, True
    made()


def count() -> int:
    return _count


def step() -> int:
    """The latest training step that this process has done; 0 before the first."""
    return _step


def trains() -> bool:
    """Whether this process has done a step: no more models to build, no kernels to compile."""
    return _trains
