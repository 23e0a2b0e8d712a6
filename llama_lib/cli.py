"""Runs a command so that its end is an exit code and, where it failed, one message.

Invariant: an error of this project never shows a traceback, any other error always does.
"""

import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import NoReturn

from llama_lib.errors import LlamaLibError, UserError

INTERRUPTED = 130
BROKEN_PIPE = 141

# On a busy host the processes of one start were seen to come to their first check seconds apart.
FIRST_SPEAKS_SECONDS = 15.0


def run_command(function: Callable[[list[str]], int | None], argv: Sequence[str]) -> int:
    """Calls `function(argv)` and returns the exit code; None counts as 0."""
    try:
        return function(list(argv)) or 0
    except LlamaLibError as error:
        _report(error)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read the output has seen enough, as `head` does; what is left would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE


def run(main: Callable[[list[str]], int | None], argv: Sequence[str] | None = None) -> NoReturn:
    """Ends the process with the exit code of `main`; `argv` is by default the command line's."""
    sys.exit(run_command(main, sys.argv[1:] if argv is None else argv))


def run_script(main: Callable[[list[str]], int | None]) -> NoReturn:
    """`run` for the training scripts: ends the process without the interpreter's own shutdown.

    There, threads of gloo now and then meet an interpreter that is gone, and a run that has saved
    everything ends with "terminate called without an active exception" and SIGABRT.
    """
    code = run_command(main, sys.argv[1:])
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _report(error: LlamaLibError) -> None:
    rank = os.environ.get("RANK", "0")
    prefix = "" if rank == "0" else f"[rank {rank}] "
    if isinstance(error, UserError) and os.environ.get("LOCAL_RANK", "0") != "0":
        # A user's mistake is met by every process. The launcher ends the others once the first has
        # spoken and left; one still alive after that time has something of its own to say.
        time.sleep(FIRST_SPEAKS_SECONDS)
    print(f"{prefix}{error}", file=sys.stderr)
