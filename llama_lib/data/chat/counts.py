"""What became of records besides being encoded: left out, cut, or worth a warning.

Invariant: the counts of a file's parts, each shifted by the lines before it and added in order,
are those of the file.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

# Reasons kept apart for a file, whose records could give each a reason of its own. Chosen.
_MOST_REASONS = 1000
_OTHER_REASON = "other reasons"
_QUOTED = re.compile(r"(?<!\w)('(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\")")


@dataclass
class Seen:
    """How often something was met in a file, and the number of the first record it was met in."""

    count: int = 0
    first: int = 0

    def add(self, later: Seen) -> None:
        self.first = self.first or later.first
        self.count += later.count

    def shift(self, lines: int) -> None:
        if self.first:
            self.first += lines


@dataclass
class Bad(Seen):
    """Records left out for one reason; `message` says it of the first."""

    message: str = ""


@dataclass
class Counts:
    """What became of records besides being encoded, over a batch or a file.

    Attributes:
        bad: records that were left out, by reason: the message without what differs from record
            to record.
        last_bad: number and message of the last of them.
        cut_turns: user turns at the end of conversations that nobody answered.
        merged: conversations with an Encoded.merged.
        specials: conversations with an Encoded.specials.
    """

    bad: dict[str, Bad] = field(default_factory=dict)
    last_bad: tuple[int, str] = (0, "")
    cut_turns: Seen = field(default_factory=Seen)
    merged: Seen = field(default_factory=Seen)
    specials: Seen = field(default_factory=Seen)

    @property
    def num_bad(self) -> int:
        return sum(bad.count for bad in self.bad.values())

    def add_bad(self, number: int, message: str) -> None:
        self._add_reason(reason_of(message), Bad(1, number, message))
        self.last_bad = max(self.last_bad, (number, message))

    def add(self, later: Counts) -> None:
        for reason, bad in later.bad.items():
            self._add_reason(reason, bad)
        self.last_bad = max(self.last_bad, later.last_bad)
        self.cut_turns.add(later.cut_turns)
        self.merged.add(later.merged)
        self.specials.add(later.specials)

    def shift(self, lines: int) -> None:
        """Count the numbers from `lines` records earlier."""
        for seen in (*self.bad.values(), self.cut_turns, self.merged, self.specials):
            seen.shift(lines)
        if self.last_bad[0]:
            self.last_bad = (self.last_bad[0] + lines, self.last_bad[1])

    def _add_reason(self, reason: str, bad: Bad) -> None:
        if reason not in self.bad and len(self.bad) >= _MOST_REASONS:
            reason = _OTHER_REASON
        known = self.bad.setdefault(reason, Bad())
        # Those of a template are found after the others of their batch.
        if not known.count or bad.first < known.first:
            known.first, known.message = bad.first, bad.message
        known.count += bad.count


def reason_of(message: str) -> str:
    """A message without numbers and quoted text, by which equal reasons are counted."""
    return re.sub(r"\d+", "N", _QUOTED.sub("'...'", message))
