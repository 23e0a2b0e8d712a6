"""Work folders beside a result: one process at a time makes a result, the next one continues.

Invariant: only the holder of a result's lock touches its work folders, so none that is in use is
ever removed; the lock dies with its holder, whatever its host is called.
"""

import contextlib
import fcntl
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from llama_lib.errors import UserError

_POLL_SECONDS = 0.2


@contextlib.contextmanager
def alone_at(folder: Path) -> Iterator[None]:
    """Hold the lock beside `folder`, for processes with another --cache_dir or of another host."""
    path = folder.with_name(f"{folder.name}.lock")
    lock = _locked(path, folder)
    try:
        yield
    finally:
        # While it is held: whoever waits for it finds another file of this name, or none.
        path.unlink(missing_ok=True)
        lock.close()


def work_folder(folder: Path, key: str) -> Path:
    return folder.with_name(f"{folder.name}.work-{key[:8]}")


def remove_others(folder: Path, work: Path) -> None:
    """Remove work folders left by attempts with other text; only under the lock of `folder`."""
    name = re.compile(re.escape(folder.name) + r"\.work-[0-9a-f]{8}")
    for other in folder.parent.iterdir():
        if name.fullmatch(other.name) and other != work:
            shutil.rmtree(other, ignore_errors=True)


def _locked(path: Path, folder: Path) -> IO[str]:
    told = False
    while True:
        lock = path.open("a")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_still(lock, path):
                return lock
        except BlockingIOError:
            if not told:
                print(f"waiting for another process that prepares {folder}", file=sys.stderr)
                told = True
            time.sleep(_POLL_SECONDS)
        except OSError as error:
            lock.close()
            raise UserError(
                f"{folder.parent} is on a file system without file locks ({error.strerror}), so "
                "processes cannot take turns; choose another with --output or --cache_dir."
            ) from None
        lock.close()


def _is_still(lock: IO[str], path: Path) -> bool:
    """Whether the file is there under its name, and not removed by the one who held it."""
    try:
        return os.path.samestat(os.fstat(lock.fileno()), path.stat())
    except FileNotFoundError:
        return False
