"""Processes that must not outlive another one, and finding what is left of them.

Invariant: of a family under a subreaper no process escapes, whatever sessions it opens: orphans
become the subreaper's children. Where the subreapers themselves were killed, a variable that the
whole family inherited still tells its members.
"""

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress

_SET_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of linux/prctl.h
_SET_CHILD_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl failed")


def become_subreaper() -> None:
    """Orphaned descendants become children of this process instead of the system's first."""
    _prctl(_SET_CHILD_SUBREAPER, 1)


def die_with(parent: int, number: int) -> None:
    """Have the kernel send this process a signal when the thread that started it ends."""
    _prctl(_SET_DEATH_SIGNAL, number)
    if os.getppid() != parent:  # it was gone before
        os.kill(os.getpid(), number)


def dying_with_this(number: int = signal.SIGKILL) -> Callable[[], None]:
    """For a child between fork and exec: `die_with` this process, loaded before the fork."""
    parent = os.getpid()
    libc = ctypes.CDLL(None)
    value = ctypes.c_ulong(number)

    def bind() -> None:
        libc.prctl(_SET_DEATH_SIGNAL, value, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(128 + number)

    return bind


def descendants(ancestor: int) -> list[int]:
    """Process ids of all living descendants, parents before children."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            with open(f"/proc/{entry}/stat", "rb") as file:
                # The name in parentheses may hold blanks, parentheses and half a character.
                state, parent = file.read().rpartition(b")")[2].split()[:2]
        except OSError:
            continue
        if state not in (b"Z", b"X"):
            children.setdefault(int(parent), []).append(int(entry))
    found, queue = [], [ancestor]
    while queue:
        nearest = children.get(queue.pop(), [])
        found += nearest
        queue += nearest
    return found


def kill_descendants(seconds: float) -> list[int]:
    """Kill all descendants of this process; returns those still there after `seconds`.

    A process may start another while it is being killed, so it looks again until none is left.
    """
    deadline = time.monotonic() + seconds
    while left := descendants(os.getpid()):
        for pid in left:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        if time.monotonic() > deadline:
            return left
        time.sleep(0.02)
    return []


def kill_marked(name: str, value: str, spared: str = "") -> None:
    """Kill the processes of this host that were started with a variable, but not this one, nor
    those that were started with the other one too, written NAME=VALUE."""
    mark, spare = f"{name}={value}".encode(), spared.encode()
    for entry in os.listdir("/proc"):
        if not entry.isdigit() or int(entry) == os.getpid():
            continue
        with suppress(OSError):  # it has ended, or is another user's
            with open(f"/proc/{entry}/environ", "rb") as file:
                variables = file.read().split(b"\0")
            if mark in variables and (not spare or spare not in variables):
                os.kill(int(entry), signal.SIGKILL)


if __name__ == "__main__":
    kill_marked(*sys.argv[1:])
