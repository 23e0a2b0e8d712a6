"""How far long work on data is: a bar on a terminal, else a line now and then.

Invariant: shows only; percent never goes back.
"""

import math
import sys
import time
from collections.abc import Callable

_LINE_SECONDS = 10.0
# A report is a file written and renamed, and those who wait look five times a second.
_REPORT_SECONDS = 0.5


class Progress:
    """Bytes of input done, by numbered parts that may be worked on at once."""

    def __init__(
        self, work: str, total: int, on_percent: Callable[[int], None] = lambda percent: None
    ) -> None:
        from tqdm import tqdm

        self._work = work
        self._total = max(total, 1)
        self._on_percent = on_percent
        self._parts: dict[int, float] = {}
        self._done = self._skipped = 0.0
        self._percent = -1
        self._reported = -math.inf
        self._started = self._shown = time.monotonic()
        self._terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=total, unit="B", unit_scale=True, desc=work, disable=not self._terminal
        )

    def skip(self, size: float) -> None:
        """So much was done by an earlier attempt, which says nothing about the speed of this."""
        if size:
            self._skipped += size
            self._done += size
            self._bar.initial = size
            print(
                f"{self._work}: {100 * size / self._total:.0f}% are there already",
                file=sys.stderr,
                flush=True,
            )

    def show(self, part: int, size: float) -> None:
        """`size` bytes of a part are done."""
        self._done += size - self._parts.get(part, 0.0)
        self._parts[part] = size
        self._bar.update(self._done - self._bar.n)
        percent = int(100 * self._done // self._total)
        now = time.monotonic()
        if percent > self._percent and now - self._reported > _REPORT_SECONDS:
            self._percent, self._reported = percent, now
            self._on_percent(percent)
        if not self._terminal and now - self._shown > _LINE_SECONDS:
            self._shown = now
            rate = max(self._done - self._skipped, 1.0) / (now - self._started)
            left = _time((self._total - self._done) / rate)
            print(
                f"{self._work}, {percent}%, {rate / 1e6:.1f} MB/s, {left} left",
                file=sys.stderr,
                flush=True,
            )

    def close(self) -> None:
        self._bar.close()


def _time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s"
