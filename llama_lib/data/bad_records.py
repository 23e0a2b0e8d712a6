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


class UnknownShape(BadRecord):
    """A record without the columns in `wanted`, of which `example` shows lines."""

    def __init__(
        self, columns: list[str], wanted: str = "`text`", example: str = EXAMPLE_LINE
    ) -> None:
        self._found = ", ".join(columns) if columns else "no columns"
        self._wanted = wanted
        self._example = example
        super().__init__(f"no {wanted}; found {self._found}")

    def of_file(self, path: Path) -> UserError:
        """The error of a file whose records are all of this shape."""
        return UserError(
            f"{path} has no {self._wanted} column; found {self._found}. "
            f"Expected lines like {self._example}"
        )


def check_characters(text: str) -> None:
    """Raises BadRecord for half a surrogate pair.

    JSON can spell it, but it is no character and no tokenizer takes it.
    """
    if text.isascii():
        return
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRecord(f"half a surrogate pair at character {error.start}") from error


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


def nothing_in(path: Path, bad: int, last_bad: str, example: str = EXAMPLE_LINE) -> UserError:
    """The error of a file without a single good record, of which `bad` were left out."""
    if bad:
        return UserError(
            f"{path}: all {bad} records are bad; the last one: {last_bad}. "
            f"Expected lines like {example}"
        )
    return UserError(f"{path} is empty: expected lines like {example}")
