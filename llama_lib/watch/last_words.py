"""python last_words.py FILE HEADER MESSAGE: writes down the last stack of a process that is stuck.

While a thread holds Python's lock nothing of that process runs but faulthandler's C code, which can
write the stacks to a pipe. This is the other end of the pipe, and it ends the process. A line of
digits is a note of the latest step: whoever writes one is not stuck, but was stopped (Ctrl-Z, a
suspended job), or its machine slept. MESSAGE goes to standard error, if it is not empty.

Invariant: without a stack that is followed by silence nothing is written anywhere, and nothing is
ended; this process ends with the one it listens to.
"""

import contextlib
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

# What faulthandler begins with.
BEGINS = "Timeout ("

# So long a process that goes on may take for its next note, which comes every second (chosen).
GRACE_SECONDS = 4.0


def lines_of(pipe: int, silence: float = GRACE_SECONDS) -> Iterator[str | None]:
    """The lines as they come; None after so many seconds without any."""
    begun = b""
    while True:
        if not select.select([pipe], [], [], silence)[0]:
            yield None
            continue
        content = os.read(pipe, 1 << 16)
        if not content:
            return
        *whole, begun = (begun + content).split(b"\n")
        yield from (line.decode(errors="replace") for line in whole)


def listen(
    lines: Iterable[str | None], path: Path, header: str, message: str, end: Callable[[], None]
) -> None:
    step, stack = "0", list[str]()
    for line in lines:
        if line is None:
            if stack:
                break
        elif line.isdigit():
            step, stack = line, []
        elif stack or line.startswith(BEGINS):
            stack.append(line)
    if not stack:
        return
    if message:
        print(message, file=sys.stderr, flush=True)
    now = time.strftime("%Y-%m-%d %H:%M:%S")
    text = "".join(f"{line}\n" for line in stack)
    with contextlib.suppress(OSError):  # a disk that is full does not keep the process
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"time: {now}\nlast step done: {step}\n{header}\n\n{text}")
    end()


def main() -> None:
    process = os.getppid()

    def end() -> None:
        if os.getppid() == process:  # it has not ended by itself
            os.kill(process, signal.SIGKILL)

    listen(lines_of(sys.stdin.fileno()), Path(sys.argv[1]), sys.argv[2], sys.argv[3], end)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
