"""python last_words.py FILE HEADER MESSAGE: writes down the last stack of a process that is stuck.

While a thread holds Python's lock nothing of that process runs but faulthandler's C code, which can
write the stacks to a pipe and end the process. This is the other end of the pipe. A line before
them is a note of the latest step. MESSAGE goes to standard error, if it is not empty.

Invariant: without a stack nothing is written anywhere; it ends with the process it listens to.
"""

import contextlib
import sys
import time
from collections.abc import Iterable
from pathlib import Path

# What faulthandler begins with.
BEGINS = "Timeout ("


def listen(lines: Iterable[str], path: Path, header: str, message: str) -> None:
    step = "0"
    pending = iter(lines)
    for line in pending:
        if not line.startswith(BEGINS):
            step = line.strip()
            continue
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        stack = "".join([line, *pending])
        if message:
            print(message, file=sys.stderr, flush=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"time: {now}\nlast step done: {step}\n{header}\n\n{stack}")


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        listen(sys.stdin, Path(sys.argv[1]), sys.argv[2], sys.argv[3])
