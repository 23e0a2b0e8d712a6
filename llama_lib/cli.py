"""Runs a command so that its end is an exit code and, where it failed, one message.

Invariant: an error of this project never shows a traceback, any other error always does.
"""

import contextlib
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import NoReturn

from llama_lib import private
from llama_lib.errors import JobError, LlamaLibError, UserError

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
    private.protect()
    sys.exit(run_command(main, sys.argv[1:] if argv is None else argv))


def run_script(main: Callable[[list[str]], int | None]) -> NoReturn:
    """`run` for the training scripts: ends the process without the interpreter's own shutdown.

    There, threads of gloo now and then meet an interpreter that is gone, and a run that has saved
    everything ends with "terminate called without an active exception" and SIGABRT.
    """
    private.protect()
    try:
        code = run_command(main, sys.argv[1:])
    except Exception as error:
        report_to_torchrun(f"{type(error).__name__}: {error}")
        raise
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def report_to_torchrun(message: str) -> None:
    """Let torchrun's own report, which comes after everything else, end with this message."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path is None:
        return
    content = {"message": private.masked(message), "timestamp": int(time.time())}
    # torchrun reads it when the process has ended; without it the report only says less.
    with contextlib.suppress(OSError):
        with open(path, "w", encoding="utf-8") as file:
            json.dump(content, file)


def _report(error: LlamaLibError) -> None:
    rank = os.environ.get("RANK", "0")
    prefix = "" if rank == "0" else f"[rank {rank}] "
    is_shared = isinstance(error, UserError | JobError)
    if is_shared and os.environ.get("LOCAL_RANK", "0") != "0":
        # What is wrong with the whole job is met by every process. The launcher ends the others
        # once the first has spoken and left; one still alive after that time has something of its
        # own to say.
        time.sleep(FIRST_SPEAKS_SECONDS)
    report_to_torchrun(str(error))
    print(f"{prefix}{error}", file=sys.stderr)
