"""Readers: how the text of an option becomes its value.

Invariant: a reader accepts or refuses a text on its own, wherever the text was written.
"""

import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

TRUE_WORDS = frozenset({"true", "yes", "on"})
FALSE_WORDS = frozenset({"false", "no", "off"})


@dataclass(frozen=True)
class Reader:
    """`read` raises ValueError on a text it refuses; `expected` completes "got X, expected ..."."""

    metavar: str
    expected: str
    read: Callable[[str], Any]
    choices: tuple[str, ...] = ()


def integer(at_least: int) -> Reader:
    def read(text: str) -> int:
        value = int(text)
        if value < at_least:
            raise ValueError(text)
        return value

    return Reader("N", f"a whole number of at least {at_least}", read)


def number(expected: str, accepts: Callable[[float], bool]) -> Reader:
    def read(text: str) -> float:
        value = float(text)
        if not (math.isfinite(value) and accepts(value)):
            raise ValueError(text)
        return value

    return Reader("X", expected, read)


def choice(*values: str | int, also: tuple[str, ...] = ()) -> Reader:
    """One of `values`. `also` is read but not offered: a later check refuses it with its reason."""
    by_text = {str(value): value for value in (*values, *also)}
    offered = tuple(str(value) for value in values)

    def read(text: str) -> str | int:
        if text not in by_text:
            raise ValueError(text)
        return by_text[text]

    return Reader("NAME", "one of " + ", ".join(offered), read, offered)


def _read_switch(text: str) -> bool:
    if text.lower() not in TRUE_WORDS | FALSE_WORDS:
        raise ValueError(text)
    return text.lower() in TRUE_WORDS


def _read_text(text: str) -> str:
    if not text:
        raise ValueError(text)
    return text


def _read_path(text: str) -> str:
    return os.path.expanduser(_read_text(text))


def _read_tokens(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kmbt]?)", text.replace("_", "").lower())
    if match is None:
        raise ValueError(text)
    scale = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}[match[2]]
    # Decimal, because 1.8 * 10**9 need not be a whole number in binary.
    value = Decimal(match[1]) * scale
    if value < 1 or value != int(value):
        raise ValueError(text)
    return int(value)


def _read_step_range(text: str) -> str:
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if match is None or not 1 <= int(match[1]) < int(match[2]):
        raise ValueError(text)
    return text


SWITCH = Reader("", "true or false", _read_switch)
TEXT = Reader("TEXT", "text", _read_text)
PATH = Reader("PATH", "a path", _read_path)
TOKENS = Reader("TOKENS", "a number of tokens such as 4096, 100k, 4m or 1.8b", _read_tokens)
STEP_RANGE = Reader("START:STOP", "two steps START:STOP with 1 <= START < STOP", _read_step_range)
FRACTION = number("a fraction from 0 to 1", lambda value: 0 <= value <= 1)
PART = number("a number from 0 to below 1", lambda value: 0 <= value < 1)
POSITIVE = number("a number above 0", lambda value: value > 0)
NOT_NEGATIVE = number("a number of at least 0", lambda value: value >= 0)
