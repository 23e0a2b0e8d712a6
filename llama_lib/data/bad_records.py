"""What is wrong with a record or a file, said in the same words for every kind of file.

Invariant: every message says what was found and what is expected.
"""

import errno
from pathlib import Path

from llama_lib.errors import RunError, UserError

EXAMPLE_LINE = '{"text": "One document of plain text.", "meta": {"anything": "is ignored"}}'


# What the name of the file, or its permissions, can cause; any other number is the machine's fault.
_MISTAKES = frozenset(
    [
        *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG),
        *(errno.EACCES, errno.EPERM),
    ]
)


class BadRecord(Exception):
    """Why one record gives nothing to train on."""


class NoTextColumn(BadRecord):
    def __init__(self, columns: list[str]) -> None:
        self.columns = columns
        super().__init__(f"no `text`; found {_listed(columns)}")


def no_text_column(path: Path, columns: list[str]) -> UserError:
    return UserError(
        f"{path} has no `text` column; found {_listed(columns)}. Expected lines like {EXAMPLE_LINE}"
    )


def unreadable(path: Path, error: Exception) -> UserError | RunError:
    """The error of a file that is missing, locked or damaged, or whose disk or server fails."""
    # Readers of damaged data raise OSError, too, without a number.
    number = getattr(error, "errno", None)
    if number is None or number in _MISTAKES:
        return UserError(f"{path} cannot be read: {error}.")
    return RunError(
        f"{path} cannot be read: {error}. The file itself may be whole: start the same command "
        "again when its disk or server answers."
    )


def nothing_in(path: Path, bad: int, last_bad: str) -> UserError:
    """The error of a file without a single record, of which `bad` were left out."""
    if bad:
        return UserError(
            f"{path}: all {bad} records are bad; the last one: {last_bad}. "
            f"Expected lines like {EXAMPLE_LINE}"
        )
    return UserError(f"{path} is empty: expected lines like {EXAMPLE_LINE}")


def _listed(columns: list[str]) -> str:
    return ", ".join(columns) if columns else "no columns"
