"""Where every thread of this process is, in a file of its own, for whoever asks why a run hangs.

Invariant: a file is written only when the run ends for it, also while a thread holds Python's lock.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import FrameType

from llama_lib import progress
from llama_lib.watch import last_words
from llama_lib.watch.roll_call import Member

FOLDER = "stacks"
_PACKAGE = str(Path(__file__).parents[2]) + os.sep


def stack_file(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank:05d}.txt"


def write_stacks(folder: Path, member: Member, why: str) -> str | None:
    """Write the stacks of all threads; returns what was wrong with it."""
    now = time.strftime("%Y-%m-%d %H:%M:%S")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with stack_file(folder, member.rank).open("w") as file:
            file.write(
                f"time: {now}\nlast step done: {progress.step()}\n{_header(member, why)}\n\n"
            )
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
    except OSError as error:
        return f"{folder} cannot be written to ({error.strerror})"
    return None


def _header(member: Member, why: str) -> str:
    return f"rank: {member.rank}\nhost: {member.host}, process {member.pid}\nwhy: {why}"


def is_written(folder: Path, rank: int, since: float) -> bool:
    """Whether a stack was written after a moment of `time.time`; older ones are of other runs."""
    try:
        status = stack_file(folder, rank).stat()
    except OSError:
        return False
    return status.st_size > 0 and status.st_mtime >= since


def step_in(path: Path) -> int:
    """The step that a stack file names."""
    with path.open() as file:
        for line in file:
            name, _, value = line.partition(": ")
            if name == "last step done":
                return int(value)
    return 0


def whereabouts() -> str:
    """Where the main thread is: the innermost line of this project, and the innermost of all."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    if frame is None:
        return "nowhere"
    innermost: FrameType | None = frame
    own: FrameType | None = frame
    while own is not None and not _is_own(own):
        own = own.f_back
    shown = [] if own is None or own is innermost else [_line(own)]
    return " > ".join([*shown, _line(frame)])


def _is_own(frame: FrameType) -> bool:
    name = frame.f_code.co_filename
    return name.startswith(_PACKAGE) and "site-packages" not in name


def _line(frame: FrameType) -> str:
    name = frame.f_code.co_filename.removeprefix(_PACKAGE)
    short = name.rpartition("site-packages/")[2]
    return f"{short}:{frame.f_lineno} {frame.f_code.co_name}"


class LastResort:
    """Writes the stacks and ends the process if nobody winds it up again: needs no Python lock."""

    def __init__(self, folder: Path, member: Member, why: str, message: str = "") -> None:
        path, header = str(stack_file(folder, member.rank)), _header(member, why)
        # Isolated and without site-packages: 10 ms and 8 MB. A session of its own, because a
        # Ctrl-C is not for it.
        command = [sys.executable, "-I", "-S", last_words.__file__, path, header, message]
        self._helper = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True
        )

    def wind_up(self, seconds: float) -> None:
        assert self._helper.stdin is not None
        pipe = self._helper.stdin.fileno()
        # It must not end the process itself: one that was stopped for longer would end on going on.
        faulthandler.dump_traceback_later(seconds, file=pipe)
        if self._helper.poll() is None:
            with contextlib.suppress(BrokenPipeError):
                os.write(pipe, f"{progress.step()}\n".encode())

    def close(self) -> None:
        faulthandler.cancel_dump_traceback_later()
        assert self._helper.stdin is not None
        self._helper.stdin.close()
        self._helper.wait()
