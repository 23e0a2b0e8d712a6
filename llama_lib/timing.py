"""How long every training step takes and what its time is spent on.

Invariant: the device is never waited for within a step. Marks are left on the way, a reading of the
clock on a CPU, an event in the queue of a GPU, and are read only where the device has been waited
for anyway; so asynchronous work is counted where it was done, not where it was asked for.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

# What the time of a run is divided into. Communication is taken out of the phase it happened in.
PHASES = ("data", "forward_backward", "optimizer", "communication", "save", "other")

# Marks of hundreds of steps, unread because nothing is logged, are too many to keep. The older half
# of them is far behind what a GPU's queue holds, so reading it waits for nothing.
MOST_MARKS = 2000


@dataclass
class Window:
    """Some consecutive optimizer steps: their number, seconds, and seconds waited for data."""

    steps: int = 0
    seconds: float = 0.0
    data_wait: float = 0.0


class _Mark(NamedTuple):
    """`phase` is what the time since the mark before was spent on, None: it counts nowhere."""

    phase: str | None
    moment: Any
    communication: float  # seconds of the run until then
    ends_step: bool = False


class Stopwatch:
    """Times every step, divides the time among `PHASES`, and cuts windows for the records of a run.

    The first steps allocate, trace and warm caches: `ignored` of them are in no total, the first is
    a window of its own.

    Args:
        communication: seconds this process has spent waiting for others so far; 0 if that is not
            measured.
    """

    def __init__(
        self,
        device: torch.device,
        ignored: int = 1,
        communication: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self._device, self._ignored, self._communication = device, ignored, communication
        self._first: Window | None = None
        self._num_steps = 0
        self._step_seconds: list[float] = []
        self._open_step = 0.0  # seconds of the step under way, as far as they have been read
        self._phases = dict.fromkeys(PHASES, 0.0)
        self._phases_ignored: dict[str, float] | None = None  # once a step is measured
        self._marks: list[_Mark] = []
        self._mark(None)
        self._restart()

    # -- what the loop calls ---------------------------------------------------------------------

    def ends(self, phase: str) -> None:
        """The time since the last call, or the last step, was spent on `phase`."""
        self._mark(phase)

    def step_done(self, data_wait: float) -> None:
        """A step ends; the time since the last call of `ends` was spent on the optimizer."""
        self._mark("optimizer", ends_step=True)
        self._steps += 1
        self._num_steps += 1
        self._data_wait += data_wait
        if self._first is None:
            self._synchronize()
            self._first = self._cut()
        elif self._num_steps == self._ignored:
            self._synchronize()
        elif len(self._marks) > MOST_MARKS:
            self._read_marks(MOST_MARKS // 2)

    @contextlib.contextmanager
    def paused(self, phase: str) -> Iterator[None]:
        """Time spent in the block belongs to no step and no window, but to `phase`."""
        self._mark("other")
        self._synchronize()
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._synchronize()
            seconds = time.perf_counter() - begin
            self._phases[phase] += seconds
            self._start += seconds
            self._marks = []
            self._mark(None)

    def window(self) -> Window:
        """The steps since the last call; right after the first step, that step.

        To be called where the device has just been waited for.
        """
        self._read_marks()
        if self._steps == 0 and self._first is not None:
            return self._first
        return self._cut()

    # -- what was measured -----------------------------------------------------------------------

    def finish(self) -> None:
        """Wait for the device and read what is left; to be called before what follows."""
        self._synchronize()

    @property
    def seconds(self) -> list[float]:
        """Of every measured step; if there was none, of the ignored ones."""
        return self._step_seconds[self._ignored :] or self._step_seconds

    @property
    def num_ignored(self) -> int:
        """Steps that `seconds` leaves out."""
        return len(self._step_seconds) - len(self.seconds)

    @property
    def phases(self) -> dict[str, float]:
        """Seconds of each phase since the first measured step began, those of pauses included; if
        none was measured, since the beginning."""
        if self.num_ignored or self._phases_ignored is None:
            return dict(self._phases)
        return {name: self._phases[name] + self._phases_ignored[name] for name in PHASES}

    # -- marks -----------------------------------------------------------------------------------

    def _mark(self, phase: str | None, ends_step: bool = False) -> None:
        if self._device.type == "cuda":
            moment: Any = torch.cuda.Event(enable_timing=True)
            moment.record()
        else:
            moment = time.perf_counter()
        self._marks.append(_Mark(phase, moment, self._communication(), ends_step))

    def _read_marks(self, count: int | None = None) -> None:
        """Turn the first `count` marks, or all, into seconds. The device must be past them."""
        marks, self._marks = self._marks[:count], self._marks[count:] if count else []
        before = marks[0]
        for mark in marks[1:]:
            if mark.phase == "data" and len(self._step_seconds) == self._ignored:
                # Not where the last ignored step ended: a pause after it is no measured time.
                self._phases_ignored = self._phases
                self._phases = dict.fromkeys(PHASES, 0.0)
            if mark.phase is not None:
                seconds = self._between(before.moment, mark.moment)
                waited = mark.communication - before.communication
                self._open_step += seconds
                self._phases[mark.phase] += seconds - waited
                self._phases["communication"] += waited
            if mark.ends_step:
                self._step_seconds.append(self._open_step)
                self._open_step = 0.0
            before = mark
        self._marks.insert(0, before)

    def _between(self, begin: Any, end: Any) -> float:
        if self._device.type == "cuda":
            end.synchronize()
            return float(begin.elapsed_time(end)) / 1000
        return float(end - begin)

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._read_marks()

    # -- windows ---------------------------------------------------------------------------------

    def _restart(self) -> None:
        self._start, self._steps, self._data_wait = time.perf_counter(), 0, 0.0

    def _cut(self) -> Window:
        window = Window(self._steps, time.perf_counter() - self._start, self._data_wait)
        self._restart()
        return window
