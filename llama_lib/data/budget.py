"""Token budgets: how many rows of which length each source has to give, and cutting them.

Invariant: the rows depend on the budgets, the mixture, the seed and the documents in their order
alone, never on how the documents are handed over; a row holds text of one source only.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from fractions import Fraction
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt

from llama_lib.data.mixture import MIXTURES, entry_of, load_mixture
from llama_lib.errors import UserError

Quota = dict[int, int]  # rows by row length
Quotas = dict[str, Quota]  # by entry of the mixture

_UNITS = {"": 0, "k": 3, "m": 6, "b": 9, "t": 12}
_BUDGET = re.compile(r"(\d+):(\d+(?:\.\d*)?|\.\d+)([kmbt]?)", re.IGNORECASE)
_MAX_LENGTH = (1 << 31) - 1  # what the token files can hold

# Row lengths are drawn this many at a time, whatever is cut. Part of the order: never change it.
_BLOCK = 4096


def parse_budgets(texts: Sequence[str]) -> dict[int, int]:
    """`8192:1.8b` and the like as {row length: tokens}, exact; all problems at once."""
    budgets: dict[int, int] = {}
    problems = []
    for text in texts:
        match = _BUDGET.fullmatch(text.strip())
        if match is None:
            problems.append(
                f"--num_token: got {text!r}, expected LENGTH:NUMBER with a unit of k, m, b or t, "
                "such as 8192:1.8b"
            )
            continue
        length = int(match[1])
        tokens = Fraction(match[2]) * 10 ** _UNITS[match[3].lower()]
        if not 2 <= length <= _MAX_LENGTH:
            problems.append(f"--num_token: got rows of {length} in {text!r}, expected 2 or more")
        elif tokens.denominator != 1:
            problems.append(f"--num_token: {text!r} is no whole number of tokens")
        elif tokens < length:
            problems.append(
                f"--num_token: {text!r} is less than one row of {length} tokens; is the unit "
                "missing (k, m, b or t)?"
            )
        elif length in budgets:
            problems.append(f"--num_token: rows of {length} are given twice; give them once")
        else:
            budgets[length] = int(tokens)
    if not texts:
        problems.append("--num_token: got nothing, expected LENGTH:NUMBER such as 8192:1.8b")
    if problems:
        raise UserError(problems)
    return budgets


def quotas(budgets: Mapping[int, int], mixture: Mapping[str, float]) -> Quotas:
    """Rows per entry and length: as many as cover the entry's percentage of the tokens."""
    return {
        entry: {
            length: -(-_ceil(tokens * Fraction(Decimal(repr(percent))) / 100) // length)
            for length, tokens in budgets.items()
        }
        for entry, percent in mixture.items()
    }


class RowCutter:
    """Cut the documents of one source into rows of a quota's lengths.

    Documents are cut in the order they come, ends included. The next length is drawn in
    proportion to the rows still to be made of each. What fills no row at the end is dropped.
    """

    def __init__(self, quota: Mapping[int, int], seed: int, name: str) -> None:
        self._quota = {length: quota[length] for length in sorted(quota)}
        self._made = dict.fromkeys(self._quota, 0)
        self._lengths = np.array(list(self._quota), np.int64)
        self._to_draw = np.array(list(self._quota.values()), np.int64)
        digest = hashlib.sha256(name.encode()).digest()[:16]
        # numpy freezes the stream of RandomState for good, that of its newer Generator not.
        self._random = np.random.RandomState([seed, *np.frombuffer(digest, "<u4")])
        self._drawn = self._draw()
        self._held: list[npt.NDArray[np.integer]] = []
        self._num_held = 0

    @property
    def done(self) -> bool:
        """Whether the quota is met; what is handed over then is ignored."""
        return not len(self._drawn)

    @property
    def dropped(self) -> int:
        """Tokens that wait for a row to be filled: lost if no more come."""
        return self._num_held

    def made(self) -> Quota:
        """Rows of each length made so far."""
        return dict(self._made)

    def left(self) -> Quota:
        """Rows of each length still to be made."""
        return {length: rows - self._made[length] for length, rows in self._quota.items()}

    def cut_flat(
        self, ids: npt.NDArray[np.integer]
    ) -> tuple[npt.NDArray[np.integer], npt.NDArray[np.int64]]:
        """The rows that the next ids fill, one after another in one array, and their lengths."""
        if self.done:
            return ids[:0], np.empty(0, np.int64)
        self._held.append(ids)
        self._num_held += len(ids)
        if self._num_held < self._drawn[0]:
            # A copy, so that a few ids do not keep a large array alive.
            self._held[-1] = ids.copy()
            return ids[:0], np.empty(0, np.int64)
        stream = np.concatenate(self._held) if len(self._held) > 1 else ids
        lengths = self._take(len(stream))
        for length, rows in zip(*np.unique(lengths, return_counts=True), strict=True):
            self._made[int(length)] += int(rows)
        end = int(lengths.sum())
        rest = stream[:0] if self.done else stream[end:]
        self._held = [rest.copy()]
        self._num_held = len(rest)
        return stream[:end], lengths

    def _take(self, num_ids: int) -> npt.NDArray[np.int64]:
        """The next lengths that fit into so many ids together."""
        taken = []
        while len(self._drawn):
            ends = np.cumsum(self._drawn)
            count = int(np.searchsorted(ends, num_ids, side="right"))
            taken.append(self._drawn[:count])
            if count < len(self._drawn):
                self._drawn = self._drawn[count:]
                break
            num_ids -= int(ends[-1])
            self._drawn = self._draw()
        return np.concatenate(taken)

    def _draw(self) -> npt.NDArray[np.int64]:
        """The next lengths, drawn in proportion to the rows that are left; empty at the end.

        Drawing one after the other is putting all rows in a random order, of which this is the
        next stretch: how many of each length it has is hypergeometric, their order is a shuffle.
        """
        rest = int(self._to_draw.sum())
        wanted = min(_BLOCK, rest)
        counts = np.zeros_like(self._to_draw)
        for index, rows in enumerate(self._to_draw.tolist()):
            rest -= rows
            if rows and wanted:
                counts[index] = self._random.hypergeometric(rows, rest, wanted) if rest else wanted
                wanted -= int(counts[index])
        self._to_draw -= counts
        drawn = np.repeat(self._lengths, counts)
        if np.count_nonzero(counts) > 1:
            self._random.shuffle(drawn)
        return drawn


class Budget:
    """The quotas of one dataset, shared out among its sources.

    `text_bytes` gives the bytes of text of each source, in order. Sources of one entry share its
    rows in proportion to them; what one of them could not fill is asked of the next.
    """

    def __init__(
        self,
        num_token: Sequence[str],
        mixture: str | None,
        text_bytes: Mapping[str, float],
        seed: int,
    ) -> None:
        if mixture is None:
            raise UserError(
                "--num_token needs --mixture, the percentage of each source: "
                f"{', '.join(MIXTURES)}, or a .json or .yaml file"
            )
        percents = load_mixture(mixture)
        self._num_token, self._mixture, self._seed = list(num_token), percents, seed
        self._asked = quotas(parse_budgets(num_token), percents)
        self._text_bytes = dict(text_bytes)
        self._entries = {source: entry_of(source, percents) for source in text_bytes}
        if all(entry is None for entry in self._entries.values()):
            raise UserError(
                f"--mixture {mixture}: no source belongs to any of its entries "
                f"({', '.join(percents)}); got the sources {', '.join(text_bytes)}"
            )
        if all(percents.get(entry or "", 0) == 0 for entry in self._entries.values()):
            raise UserError(
                f"--mixture {mixture} gives 0 percent to all there is "
                f"({', '.join(text_bytes)}): nothing would be left to train on"
            )
        self._shares: Quotas = {}
        for entry, quota in self._asked.items():
            sources = self._sources(entry)
            sizes = [text_bytes[source] for source in sources]
            for source, share in zip(sources, _shared_out(quota, sizes), strict=True):
                self._shares[source] = share
        self._cutters: dict[str, RowCutter] = {}

    def makes_a_row(self, tokens: Mapping[str, float]) -> bool:
        """Whether any source with so many tokens is long enough for a row that is asked of it."""
        return any(
            tokens[source] >= length
            for source, entry in self._entries.items()
            for length, rows in self._asked.get(entry or "", {}).items()
            if rows
        )

    def cutter(self, source: str) -> RowCutter | None:
        """The cutter of a source, to be asked for after those before it have been used.

        None if the source belongs to no entry, so that nothing of it is wanted.
        """
        entry = self._entries[source]
        if entry is None:
            return None
        quota = dict(self._shares[source])
        # The rows that earlier sources of the entry still owe, which their successors did not make.
        before = [self._cutters[name] for name in self._sources(entry) if name in self._cutters]
        for cutter in before[-1:]:
            for length, rows in cutter.left().items():
                quota[length] += rows
        self._cutters[source] = RowCutter(quota, self._seed, source)
        return self._cutters[source]

    def expected(self, bytes_per_token: float) -> list[str]:
        """Lines on the entries whose text is too short, by an estimate; on sources not wanted."""
        lines = [
            f"{source} belongs to no entry of the mixture: left out"
            for source, entry in self._entries.items()
            if entry is None
        ]
        for entry, quota in self._asked.items():
            sources = self._sources(entry)
            asked = sum(length * rows for length, rows in quota.items())
            tokens = int(sum(self._text_bytes[source] for source in sources) / bytes_per_token)
            if asked and not sources:
                lines.append(f"{entry}: {asked:,} tokens are asked for, but there is no source")
            elif tokens < asked:
                lines.append(
                    f"{entry}: {asked:,} tokens are asked for, its text has about {tokens:,} "
                    f"({tokens / asked:.0%})"
                )
        return lines

    def shortfall(self) -> list[str]:
        """Lines on the rows that could not be made, once all sources have been cut."""
        return [
            f"{entry}: {made:,} of {asked:,} rows of {length} tokens made, {asked - made:,} short"
            for entry, rows in self._rows().items()
            for length, (asked, made) in rows.items()
            if made < asked
        ]

    def facts(self) -> dict[str, Any]:
        """For the manifest: what was asked, and rows asked and made per entry and length."""
        rows = {
            entry: {
                str(length): {"asked": asked, "made": made}
                for length, (asked, made) in by_length.items()
            }
            for entry, by_length in self._rows().items()
        }
        dropped = {source: cutter.dropped for source, cutter in self._cutters.items()}
        return {
            "num_token": self._num_token,
            "mixture": self._mixture,
            "entries": self._entries,
            "rows": rows,
            "dropped_tokens": dropped,
        }

    def _rows(self) -> dict[str, dict[int, tuple[int, int]]]:
        """(rows asked, rows made) per entry and length."""
        rows = {}
        for entry, quota in self._asked.items():
            cutters = [self._cutters[s] for s in self._sources(entry) if s in self._cutters]
            rows[entry] = {
                length: (asked, sum(cutter.made()[length] for cutter in cutters))
                for length, asked in quota.items()
            }
        return rows

    def _sources(self, entry: str) -> list[str]:
        return [source for source, own in self._entries.items() if own == entry]


def _shared_out(quota: Mapping[int, int], sizes: Sequence[float]) -> list[Quota]:
    """A quota in whole rows over sources of these sizes, in proportion, nothing lost."""
    ends = list(accumulate(max(int(size), 1) for size in sizes))
    starts = [0, *ends][: len(ends)]
    return [
        {
            length: rows * end // ends[-1] - rows * start // ends[-1]
            for length, rows in quota.items()
        }
        for start, end in zip(starts, ends, strict=True)
    ]


def _ceil(number: Fraction) -> int:
    return -(-number.numerator // number.denominator)
