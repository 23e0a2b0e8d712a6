"""The deadlines of one attempt, without processes: a host that answers as told."""

import dataclasses
import io
import queue
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from llama_lib.cluster import job
from llama_lib.cluster.job import Job, NotReady, Outcome, Plan
from llama_lib.cluster.output import Output
from llama_lib.cluster.remote import Host
from llama_lib.cluster.signals import Signals

PLAN = Plan(["ranks.py"], "/", {}, 2, "127.0.0.1", 29500, "run")


class Answering:
    """The link to a host whose two ranks end as `ends` says: (seconds, rank, code) from `go`, and
    what still runs `stop_seconds` after it is stopped, by SIGKILL."""

    host = Host("node1", is_local=True)
    is_silent = False

    def __init__(self, ends: list[tuple[float, int, int]], stop_seconds: float = 0.0) -> None:
        self.events: Any = queue.SimpleQueue()
        self.running = {0, 1}
        self.ends, self.stop_seconds = ends, stop_seconds

    def send(self, message: dict[str, Any]) -> None:
        if "job" in message:
            self.events.put((self, {"ready": 1}))
        elif "go" in message:
            for seconds, rank, code in self.ends:
                self._later(seconds, rank, code)
        elif "stop" in message:
            for rank in self.running:
                self._later(self.stop_seconds, rank, -signal.SIGKILL)

    def _later(self, seconds: float, rank: int, code: int) -> None:
        timer = threading.Timer(seconds, self._end, (rank, code))
        timer.daemon = True
        timer.start()

    def _end(self, rank: int, code: int) -> None:
        if rank in self.running:
            self.running.remove(rank)
            self.events.put((self, {"end": rank, "code": code, "ago": 0.0}))

    def end(self) -> None:
        pass

    def close(self, _: float) -> bool:
        return True


class Lost(Answering):
    """One whose host is gone: closing waits for it in vain."""

    def __init__(self) -> None:
        super().__init__([])
        self.is_silent = True

    def send(self, message: dict[str, Any]) -> None:
        pass

    def errors(self) -> str:
        return ""

    def close(self, _: float) -> bool:
        time.sleep(1.0)
        return False


class Late(Signals):
    """A signal that comes with the end of the last rank."""

    @contextmanager
    def kept(self) -> Iterator[None]:
        with super().kept():
            yield
            self._received.append(signal.SIGTERM)


def run(link: Any, signals: Signals | None = None, plan: Plan = PLAN) -> tuple[Outcome, str]:
    said = io.StringIO()
    output = Output(lambda _, text: said.write(text))
    return Job(plan, [link], link.events, output, signals or Signals()).run(), said.getvalue()


@pytest.mark.parametrize(("attempt", "said"), [(0, 1), (1, 0)])
def test_the_start_is_said_once(attempt, said):
    """Regression: until the scripts had imported torch, half a minute passed without a word. Of a
    restart there is a line already."""
    plan = dataclasses.replace(PLAN, attempt=attempt)
    _, text = run(Answering([(0.0, 0, 0), (0.0, 1, 0)]), plan=plan)
    assert text == "launch: starting 2 process(es) on node1\n" * said


def test_a_rank_that_was_waited_for_after_a_save_still_gets_its_time_to_end(monkeypatch):
    """It was called a process in state D in the moment in which it was told to end."""
    for name, seconds in {"_ASKED_END": 1.2, "_PATIENCE": 0.1, "_END": 1.0}.items():
        monkeypatch.setattr(job, f"{name}_SECONDS", seconds)
    outcome, said = run(Answering([(0.0, 0, 143)], stop_seconds=0.5))
    assert "cannot be ended" not in said
    assert outcome.code == 143


def test_a_rank_that_cannot_be_ended_is_given_up_and_named(monkeypatch):
    for name, seconds in {"_PATIENCE": 0.1, "_END": 0.5}.items():
        monkeypatch.setattr(job, f"{name}_SECONDS", seconds)
    outcome, said = run(Answering([(0.0, 0, 3)], stop_seconds=60.0))
    assert "node1: ranks [1] cannot be ended" in said
    assert outcome.code == 3


def test_many_lost_hosts_are_given_up_at_the_same_time():
    links: Any = [Lost() for _ in range(64)]
    output = Output(lambda *_: None)
    begun = time.monotonic()
    with pytest.raises(NotReady):
        Job(PLAN, links, links[0].events, output, Signals()).run()
    assert time.monotonic() - begun < 10


def test_a_signal_that_comes_with_the_last_end_forbids_a_restart():
    ends = [(0.0, 0, 1), (0.0, 1, 1)]
    assert not run(Answering(ends))[0].asked
    outcome, _ = run(Answering(ends), Late())
    assert (outcome.code, outcome.asked) == (1, True)


@pytest.mark.parametrize(
    ("codes", "asked"), [((143, 143), True), ((2, 2), True), ((1, 143), False)]
)
def test_what_counts_as_asked_for(codes, asked):
    outcome, _ = run(Answering([(0.0, 0, codes[0]), (0.3, 1, codes[1])]))
    assert (outcome.code, outcome.asked) == (codes[0], asked)
