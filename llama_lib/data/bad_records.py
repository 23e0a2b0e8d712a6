"""What is wrong with a record or a file, said in the same words for every kind of file.

Invariant: every message says what was found and what is expected.
"""

from pathlib import Path

from llama_lib.errors import UserError

EXAMPLE_LINE = '{"text": "One document of plain text.", "meta": {"anything": "is ignored"}}'


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
