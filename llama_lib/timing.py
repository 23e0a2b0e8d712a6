"""How long training takes, with evaluation, saving and the first step left out.

Invariant: a window ends only where the device has been waited for (or, in the loop, where the loss
was just read), so asynchronous work is counted in the window that started it.
"""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch


@dataclass
class Window:
    """Some consecutive optimizer steps: their number, seconds, and seconds waited for data."""

    steps: int = 0
    seconds: float = 0.0
    data_wait: float = 0.0


class Stopwatch:
    """Cuts training time into windows and adds them up.

    The first step allocates, traces and warms caches; it is a window of its own, outside the total.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._first: Window | None = None
        self._total = Window()
        self._restart()

    def _restart(self) -> None:
        self._start, self._steps, self._data_wait = time.perf_counter(), 0, 0.0

    def _cut(self) -> Window:
        window = Window(self._steps, time.perf_counter() - self._start, self._data_wait)
        self._restart()
        return window

    def step_done(self, data_wait: float) -> None:
        self._steps += 1
        self._data_wait += data_wait
        if self._first is None:
            self._synchronize()
            self._first = self._cut()

    def window(self) -> Window:
        """The steps since the last call; right after the first step, that step."""
        if self._steps == 0 and self._first is not None:
            return self._first
        window = self._cut()
        self._total.steps += window.steps
        self._total.seconds += window.seconds
        self._total.data_wait += window.data_wait
        return window

    def overall(self) -> Window:
        """All steps but the first; the first if there was no other."""
        if self._steps:
            self._synchronize()
            self.window()
        return self._total if self._total.steps else self._first or Window()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent in the block belongs to no window."""
        self._synchronize()
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._synchronize()
            self._start += time.perf_counter() - begin

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
