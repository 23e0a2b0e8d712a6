"""Steps and phases are timed without waiting; evaluation, saving and first steps are no steps."""

import pytest
import torch

from llama_lib import timing
from llama_lib.timing import PHASES, Stopwatch


class Time:
    """A clock moved by hand."""

    def __init__(self) -> None:
        self.now = 100.0
        self.waited = 0.0

    def perf_counter(self) -> float:
        return self.now

    def pass_in_communication(self, seconds: float) -> None:
        self.now += seconds
        self.waited += seconds


@pytest.fixture
def clock(monkeypatch):
    clock = Time()
    monkeypatch.setattr(timing, "time", clock)
    return clock


def stopwatch(clock: Time, ignored: int = 1) -> Stopwatch:
    return Stopwatch(torch.device("cpu"), ignored, lambda: clock.waited)


def step(watch: Stopwatch, clock: Time, seconds: float, data_wait: float = 0.0) -> None:
    """A step that waits for data and spends half of what is left on each of the other phases."""
    clock.now += data_wait
    watch.ends("data")
    clock.now += (seconds - data_wait) / 2
    watch.ends("forward_backward")
    clock.now += (seconds - data_wait) / 2
    watch.step_done(data_wait)


def test_first_step_is_in_no_total(clock):
    watch = stopwatch(clock)
    step(watch, clock, 9.0)
    for _ in range(4):
        step(watch, clock, 0.5, data_wait=0.1)
    window = watch.window()
    assert (window.steps, window.seconds) == (4, 2.0)
    assert window.data_wait == pytest.approx(0.4)
    step(watch, clock, 1.0)
    watch.finish()
    assert watch.seconds == pytest.approx([0.5, 0.5, 0.5, 0.5, 1.0])
    assert watch.num_ignored == 1
    assert watch.phases["data"] == pytest.approx(0.4)
    assert watch.phases["optimizer"] == pytest.approx(0.8 + 0.5)
    assert sum(watch.phases.values()) == pytest.approx(3.0)


def test_more_steps_can_be_left_out(clock):
    watch = stopwatch(clock, ignored=3)
    for seconds in (9.0, 5.0, 4.0, 1.0, 2.0):
        step(watch, clock, seconds)
    # The records of a run count every step but the first; the totals leave out all three.
    assert (watch.window().steps, watch.num_ignored) == (4, 3)
    assert watch.seconds == [1.0, 2.0]
    assert sum(watch.phases.values()) == pytest.approx(3.0)


@pytest.mark.parametrize("ignored", [1, 2, 5])
def test_a_run_of_too_few_steps_still_has_a_rate(clock, ignored):
    watch = stopwatch(clock, ignored)
    step(watch, clock, 9.0)
    assert watch.window().seconds == 9.0
    watch.finish()
    assert (watch.seconds, watch.num_ignored) == ([9.0], 0)
    assert sum(watch.phases.values()) == 9.0


def test_pauses_are_in_no_step_and_no_window(clock):
    watch = stopwatch(clock)
    step(watch, clock, 1.0)
    step(watch, clock, 1.0)
    with watch.paused("save"):
        clock.pass_in_communication(60.0)
    with watch.paused("other"):
        clock.now += 7.0
    step(watch, clock, 1.0)
    assert watch.window().seconds == pytest.approx(2.0)
    assert watch.seconds == [1.0, 1.0]
    expected = dict.fromkeys(PHASES, 0.0) | {"forward_backward": 1.0, "optimizer": 1.0}
    assert watch.phases == expected | {"save": 60.0, "other": 7.0}


def test_a_pause_after_the_last_ignored_step_is_not_measured(clock):
    """A save every five steps of which five are ignored: one save belongs to five steps."""
    watch = stopwatch(clock, ignored=5)
    for number in range(1, 11):
        step(watch, clock, 1.0, data_wait=0.5)
        if number % 5 == 0:
            with watch.paused("save"):
                clock.now += 3.0
        watch.ends("other")
    watch.finish()
    assert watch.seconds == [1.0] * 5
    assert watch.phases["save"] == 3.0 and sum(watch.phases.values()) == 8.0


def test_without_measured_steps_all_pauses_count(clock):
    watch = stopwatch(clock, ignored=2)
    for _ in range(2):
        step(watch, clock, 1.0)
        with watch.paused("save"):
            clock.now += 3.0
    watch.finish()
    assert (watch.seconds, watch.num_ignored) == ([1.0, 1.0], 0)
    assert watch.phases["save"] == 6.0 and sum(watch.phases.values()) == 8.0


def test_what_comes_after_a_step_is_other_and_counts_in_the_next(clock):
    watch = stopwatch(clock)
    for _ in range(3):
        step(watch, clock, 1.0)
        clock.now += 0.25
        watch.ends("other")
    watch.finish()
    assert watch.seconds == [1.25, 1.25]
    assert watch.phases["other"] == 0.5
    assert watch.phases["data"] == 0.0


def test_communication_is_taken_out_of_the_phase_it_happened_in(clock):
    watch = stopwatch(clock)
    step(watch, clock, 9.0)
    watch.ends("data")
    clock.now += 2.0
    clock.pass_in_communication(0.5)
    watch.ends("forward_backward")
    clock.pass_in_communication(0.25)
    clock.now += 1.0
    watch.step_done(0.0)
    watch.finish()
    assert watch.seconds == [3.75]
    found = {name: seconds for name, seconds in watch.phases.items() if seconds}
    assert found == {"forward_backward": 2.0, "optimizer": 1.0, "communication": 0.75}


def test_long_runs_without_records_keep_few_marks(clock, monkeypatch):
    monkeypatch.setattr(timing, "MOST_MARKS", 20)
    watch = stopwatch(clock)
    for _ in range(100):
        step(watch, clock, 1.0, data_wait=0.5)
        assert len(watch._marks) < 25
    watch.finish()
    assert watch.seconds == [1.0] * 99
    assert watch.phases["data"] == 49.5


class Gpu:
    """A queue: events get their time when the device comes to them, not when they are recorded."""

    def __init__(self) -> None:
        self.now = 0.0
        self.queue: list[object] = []
        self.synchronized = 0

    def run(self, seconds: float) -> None:
        self.queue.append(seconds)

    def synchronize(self, *_: object) -> None:
        self.synchronized += 1
        for item in self.queue:
            if isinstance(item, float):
                self.now += item
            else:
                item.moment = self.now
        self.queue.clear()


@pytest.fixture
def gpu(monkeypatch):
    gpu = Gpu()

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing
            self.moment: float | None = None

        def record(self) -> None:
            gpu.queue.append(self)

        def elapsed_time(self, end: "Event") -> float:
            assert self.moment is not None and end.moment is not None, "read before it happened"
            return (end.moment - self.moment) * 1000

        def synchronize(self) -> None:
            assert self.moment is not None, "the device was waited for"

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", gpu.synchronize)
    return gpu


def test_on_a_gpu_no_step_waits(clock, gpu):
    watch = Stopwatch(torch.device("cuda"), ignored=2)
    for number in range(6):
        watch.ends("data")
        gpu.run(2.0)
        watch.ends("forward_backward")
        gpu.run(1.0 + number)
        watch.step_done(0.0)
        watch.ends("other")
    # At the edges of the window: after the first step and after the ignored ones.
    assert gpu.synchronized == 2
    watch.finish()
    assert gpu.synchronized == 3
    assert watch.seconds == pytest.approx([5.0, 6.0, 7.0, 8.0])
    assert watch.phases["forward_backward"] == pytest.approx(8.0)
    assert watch.phases["optimizer"] == pytest.approx(3.0 + 4.0 + 5.0 + 6.0)
