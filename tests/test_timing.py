"""Rates leave out the first step, evaluation and saving."""

import pytest
import torch

from llama_lib import timing
from llama_lib.timing import Stopwatch


class Time:
    """A clock moved by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Time()
    monkeypatch.setattr(timing, "time", clock)
    return clock


def step(watch: Stopwatch, clock: Time, seconds: float, data_wait: float = 0.0) -> None:
    clock.now += seconds
    watch.step_done(data_wait)


def test_first_step_is_in_no_total(clock):
    watch = Stopwatch(torch.device("cpu"))
    step(watch, clock, 9.0)
    for _ in range(4):
        step(watch, clock, 0.5, data_wait=0.1)
    window = watch.window()
    assert (window.steps, window.seconds) == (4, 2.0)
    assert window.data_wait == pytest.approx(0.4)
    step(watch, clock, 1.0)
    overall = watch.overall()
    assert (overall.steps, overall.seconds) == (5, 3.0)


def test_a_single_step_still_has_a_rate(clock):
    watch = Stopwatch(torch.device("cpu"))
    step(watch, clock, 9.0)
    assert watch.window().seconds == 9.0
    assert (watch.overall().steps, watch.overall().seconds) == (1, 9.0)


def test_no_step_has_no_rate(clock):
    assert Stopwatch(torch.device("cpu")).overall().seconds == 0.0


def test_pauses_do_not_count(clock):
    watch = Stopwatch(torch.device("cpu"))
    step(watch, clock, 1.0)
    step(watch, clock, 1.0)
    with watch.paused():
        clock.now += 60.0
    step(watch, clock, 1.0)
    assert watch.window().seconds == pytest.approx(2.0)
