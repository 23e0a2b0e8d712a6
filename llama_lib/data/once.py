"""Work that exactly one process of a node does while the others wait and watch.

Invariant: the lock dies with its holder, so a killed process never blocks the next one, and a
waiter sees the result of the process it waited for.
"""

import contextlib
import fcntl
import hashlib
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_lib.errors import LlamaLibError, RunError, UserError
from llama_lib.private import masked

_POLL_SECONDS = 0.2
_LINE_SECONDS = 10.0


@dataclass
class Turn:
    """Held by the one process at work; `before` is the last report of the process it waited for."""

    _board: Path
    before: dict[str, Any]

    def report(self, **state: Any) -> None:
        """Show the waiting processes how far the work is: `percent`, `result` or `failed`."""
        with beside(self._board) as temporary:
            temporary.write_text(json.dumps(state))
            temporary.replace(self._board)


@contextlib.contextmanager
def beside(path: Path) -> Iterator[Path]:
    """Where to write what then becomes `path` by a rename: a place of nobody else's.

    A name with the number of the process would not do: containers that share a disk can have
    equal ones. A fresh folder, because files made by mkstemp can be read by their owner alone.
    """
    with tempfile.TemporaryDirectory(
        dir=path.parent, prefix=f"{path.name}.", suffix=".tmp"
    ) as folder:
        yield Path(folder) / path.name


@contextlib.contextmanager
def once(cache_dir: Path, key: str, work: str) -> Iterator[Turn]:
    """Hold the lock of `key`; while another process has it print `waiting for <work>, 43%`."""
    folder = cache_dir / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    name = hashlib.sha256(key.encode()).hexdigest()[:32]
    board = folder / f"{name}.json"
    with (folder / f"{name}.lock").open("a") as lock:
        waited = False
        shown_at, shown = -math.inf, ""
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                waited = True
            except OSError as error:
                raise UserError(
                    f"--cache_dir {cache_dir} is on a file system without file locks "
                    f"({error.strerror}), so processes cannot take turns; choose another."
                ) from None
            percent = _read(board).get("percent")
            line = f"waiting for {work}" + ("" if percent is None else f", {percent}%")
            now = time.monotonic()
            if is_first_of_node() and line != shown and now - shown_at > _pause():
                print(line, end=_line_end(), file=sys.stderr, flush=True)
                shown_at, shown = now, line
            time.sleep(_POLL_SECONDS)
        if not waited:
            # What an earlier run left says nothing about this one.
            board.unlink(missing_ok=True)
        turn = Turn(board, _read(board))
        try:
            yield turn
        finally:
            fcntl.flock(lock, fcntl.LOCK_UN)


def raise_failure(turn: Turn) -> None:
    """End as the process did that this one has waited for."""
    if "failed" in turn.before:
        raise UserError(turn.before["failed"])
    if "broken" in turn.before:
        raise RunError(turn.before["broken"])


@contextlib.contextmanager
def failure_reported(turn: Turn) -> Iterator[None]:
    """Tell the processes that wait how this one ended."""
    try:
        yield
    except UserError as error:
        turn.report(failed=list(map(masked, error.problems)))
        raise
    except LlamaLibError as error:
        # On a full disk there may be no room for this either; then the next one tries again.
        with contextlib.suppress(OSError):
            turn.report(broken=masked(str(error)))
        raise


def _read(board: Path) -> dict[str, Any]:
    try:
        return json.loads(board.read_text())
    except FileNotFoundError:
        return {}


def is_first_of_node() -> bool:
    """Whether this process speaks for all of its node; the launchers name it so."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def _pause() -> float:
    return 0.0 if sys.stderr.isatty() else _LINE_SECONDS


def _line_end() -> str:
    return "\r" if sys.stderr.isatty() else "\n"
