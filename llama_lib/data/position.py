"""Which samples of the global order each step takes, also where steps are left out.

Invariant: no sample is taken twice, and none is missed but those that were asked to be left out.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Position:
    """A place in a run: step number `step`, counted from 0, begins with sample `sample`.

    The samples of the ranges [a, b) in `skips` are never used. Everything is counted in samples, so
    a run may go on from here with another global batch.
    """

    step: int = 0
    sample: int = 0
    skips: tuple[tuple[int, int], ...] = ()

    def samples(self, step: int, global_batch: int) -> list[int]:
        """The samples of a step, ascending; step counts from 0 and is `step` or later."""
        if step < self.step:
            raise ValueError(f"step {step} lies before step {self.step}, where this position is")
        before = (step - self.step) * global_batch
        taken: list[int] = []
        for free in self._free():
            taken += free[before : before + global_batch - len(taken)]
            before = max(0, before - len(free))
            if len(taken) == global_batch:
                break
        return taken

    def _free(self) -> Iterator[range]:
        """The samples from here on that are not left out; the last range has no end."""
        first = self.sample
        for start, stop in merged(self.skips):
            if start > first:
                yield range(first, start)
            first = max(first, stop)
        yield range(first, sys.maxsize)

    def next_sample(self, step: int, global_batch: int) -> int:
        """The first sample of a step, which counts from 0."""
        return self.samples(step, global_batch)[0]

    def skipping(self, start_step: int, stop_step: int, global_batch: int) -> "Position":
        """The same position without the samples of the steps start_step .. stop_step - 1.

        Steps count from 1 here, as on the command line, and have the samples that this position
        gives them: the step after the last one before the gap takes what stop_step had.
        """
        if start_step >= stop_step:
            raise ValueError(f"steps {start_step} to {stop_step} are none")
        first = self.next_sample(start_step - 1, global_batch)
        stop = self.next_sample(stop_step - 1, global_batch)
        return replace(self, skips=merged((*self.skips, (first, stop))))


def merged(ranges: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
    """The same numbers as ascending ranges that neither touch nor overlap."""
    result: list[tuple[int, int]] = []
    for first, stop in sorted(ranges):
        if first >= stop:
            continue
        if result and first <= result[-1][1]:
            result[-1] = (result[-1][0], max(stop, result[-1][1]))
        else:
            result.append((first, stop))
    return tuple(result)
