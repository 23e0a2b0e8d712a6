"""The words of `-d`: a name, and what may follow it: `name[N]:weight`.

Invariant: a word means the same wherever it is typed; a file or folder that is really called so
is always meant by its whole name.
"""

import glob
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

from llama_lib.errors import UserError

# What float() takes, without the underscores: `org/name:2020_01` is a configuration of the hub.
_WEIGHT = re.compile(
    r"^(?P<name>.*):(?P<weight>[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e[+-]?[0-9]+)?"
    r"|[+-]?nan|[+-]?inf(?:inity)?)$",
    re.IGNORECASE | re.DOTALL,
)
_LIMIT = re.compile(r"^(?P<name>.*)\[(?P<limit>(?:[+-]?[0-9][^\[\]]*)?)\]$", re.DOTALL)


@dataclass(frozen=True)
class Entry:
    """One word: at most `limit` documents of `name`, and its relative share of the training."""

    name: str  # path, glob, folder, prepared folder, Megatron prefix, hub name or `sample`
    limit: int | None
    weight: float | None
    text: str  # as typed


def parse_entry(text: str) -> Entry:
    """`path[5000]:0.7`; both ends may be missing.

    A name that ends in a number after a colon is written with a weight: `org/name:2020:1`.
    """
    if _exists(text):
        return Entry(text, None, None, text)
    name, limit, weight = text, None, None
    if found := _WEIGHT.match(name):
        name = found["name"]
        weight = _weight(text, found["weight"])
    if not _exists(name) and (found := _LIMIT.match(name)) and not _is_pattern(name, found):
        name = found["name"]
        limit = _limit(text, found["limit"])
        if not _exists(name) and (swapped := _WEIGHT.match(name)) and weight is None:
            mended = f"{swapped['name']}[{limit}]:{swapped['weight']}"
            raise UserError(f"-d {text}: the number of documents comes first: -d '{mended}'.")
    if not name.strip():
        raise UserError(f"-d {text!r} names no dataset: expected NAME, NAME[N] or NAME:WEIGHT.")
    return Entry(name, limit, weight, text)


def parse_entries(texts: str | Sequence[str]) -> list[Entry]:
    """All words of one option. Raises UserError with every problem found.

    Either all have weights or none has, and no name comes twice.
    """
    entries: list[Entry] = []
    problems: list[str] = []
    for text in [texts] if isinstance(texts, str) else texts:
        try:
            entries.append(parse_entry(text))
        except UserError as error:
            problems += error.problems
    first: dict[str, Entry] = {}
    for entry in entries:
        path = os.path.expanduser(entry.name)
        key = os.path.realpath(path) if _exists(entry.name) else entry.name
        if key in first:
            problems.append(
                f"-d {first[key].text} and -d {entry.text} name the same data: name it once."
            )
        first.setdefault(key, entry)
    if not problems:
        bare = [entry.text for entry in entries if entry.weight is None]
        weighted = [entry.text for entry in entries if entry.weight is not None]
        if bare and weighted:
            problems.append(
                f"-d {', '.join(weighted)} with a weight and {', '.join(bare)} without: give "
                f"every dataset a weight, as in {bare[0]}:0.5, or none."
            )
    if problems:
        raise UserError(problems)
    return entries


def _weight(text: str, digits: str) -> float:
    weight = float(digits)
    if not (math.isfinite(weight) and weight > 0):
        raise UserError(
            f"-d {text}: the weight {digits} is no share; expected a number above 0, as in "
            "NAME:0.7. Leave the dataset out to give it nothing."
        )
    return weight


def _limit(text: str, digits: str) -> int:
    if not digits.isdecimal() or int(digits) == 0:
        raise UserError(
            f"-d {text}: [{digits}] is no number of documents; expected a whole number from 1, "
            "as in NAME[5000]. Without brackets all documents are taken."
        )
    return int(digits)


def _is_pattern(name: str, found: re.Match[str]) -> bool:
    """Whether `[0-9]` and the like are part of a glob, which they are if something matches."""
    is_number = found["limit"].isdecimal() or not found["limit"]
    return not is_number and bool(glob.glob(os.path.expanduser(name), recursive=True))


def _exists(name: str) -> bool:
    return bool(name) and os.path.exists(os.path.expanduser(name))
