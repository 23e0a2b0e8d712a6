"""The pool: order, errors, reports, and processes that die."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Any

import pytest

from llama_lib.data.workers import Report, Work, WorkerPool
from llama_lib.errors import RunError, UserError


@dataclass(frozen=True)
class Squares:
    """Even numbers take longer, 13 is a mistake, 14 ends its process."""

    offset: int = 0

    def __call__(self) -> Work[int, tuple[int, int]]:
        def work(number: int, report: Report) -> tuple[int, int]:
            report(number)
            if number == 13:
                raise UserError(["13 is unlucky", "so is 13"])
            if number == 14:
                os.kill(os.getpid(), signal.SIGKILL)
            if number == 15:
                raise ZeroDivisionError("a fault of ours")
            if number % 2 == 0:
                time.sleep(0.02)
            return number * number + self.offset, os.getpid()

        return work


@dataclass(frozen=True)
class Broken:
    def __call__(self) -> Work[int, int]:
        raise UserError("cannot begin")


@pytest.mark.parametrize("workers", [0, 1, 2, 3])
def test_results_come_in_order_whoever_made_them(workers: int) -> None:
    reports: list[tuple[int, Any]] = []
    with WorkerPool(Squares(5), workers) as pool:
        found = list(pool.map(range(12), lambda *pair: reports.append(pair)))
        again = list(pool.map(iter([3, 4])))
    assert [square for square, _ in found] == [n * n + 5 for n in range(12)]
    assert [square for square, _ in again] == [14, 21]
    assert len({pid for _, pid in found}) == max(workers, 1)
    assert (os.getpid() in {pid for _, pid in found}) == (workers < 2)
    assert sorted(reports) == [(n, n) for n in range(12)]


@pytest.mark.parametrize("workers", [1, 2])
def test_the_first_error_in_order_is_raised_when_its_turn_comes(workers: int) -> None:
    with WorkerPool(Squares(), workers) as pool:
        results = pool.map([10, 12, 13, 13, 1])
        assert [next(results)[0], next(results)[0]] == [100, 144]
        with pytest.raises(UserError) as caught:
            next(results)
    assert caught.value.problems == ["13 is unlucky", "so is 13"]


def test_faults_are_told_apart() -> None:
    with WorkerPool(Squares(), 2) as pool, pytest.raises(RunError, match="ended by signal 9"):
        list(pool.map([1, 14, 2]))
    with WorkerPool(Squares(), 2) as pool, pytest.raises(RunError, match="a fault of ours"):
        list(pool.map([1, 15, 2]))
    with WorkerPool(Broken(), 2) as pool, pytest.raises(UserError, match="cannot begin"):
        list(pool.map([1]))


def test_all_processes_are_started_before_the_first_gets_its_setup(monkeypatch) -> None:
    """A setup larger than a pipe holds up whoever sends it until the process has come up."""
    events: list[str] = []
    for name in ("_start", "_send"):
        true = getattr(WorkerPool, name)

        def spied(pool: Any, *arguments: Any, name: str = name, true: Any = true) -> None:
            events.append(name)
            true(pool, *arguments)

        monkeypatch.setattr(WorkerPool, name, spied)
    with WorkerPool(Squares(), 3) as pool:
        assert events == ["_start"] * 3 + ["_send"] * 3
        assert [square for square, _ in pool.map([1, 3])] == [1, 9]


def test_not_more_is_begun_than_agreed() -> None:
    begun: list[int] = []

    def items():  # type: ignore[no-untyped-def]
        for number in range(1, 200, 2):
            begun.append(number)
            yield number

    with WorkerPool(Squares(), 2) as pool:
        results = pool.map(items(), ahead=3)
        next(results)
        time.sleep(0.2)
        assert len(begun) <= 6 + 1
        results.close()  # type: ignore[attr-defined]


ORPHANS = """
import sys, time
sys.path.insert(0, sys.argv[1])
from tests.data.test_workers import Squares
from llama_lib.data.workers import WorkerPool
pool = WorkerPool(Squares(), 2)
print(*[pid for _, pid in pool.map([1, 3, 5, 7])], flush=True)
time.sleep(60)
"""


def test_processes_end_when_their_owner_is_killed() -> None:
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    owner = subprocess.Popen(
        [sys.executable, "-c", ORPHANS, root], stdout=subprocess.PIPE, text=True, cwd=root
    )
    assert owner.stdout is not None
    pids = {int(pid) for pid in owner.stdout.readline().split()}
    assert len(pids) == 2 and all(map(_is_alive, pids))
    owner.kill()
    owner.wait()
    deadline = time.monotonic() + 20
    while any(map(_is_alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(_is_alive, pids))


def _is_alive(pid: int) -> bool:
    """A process that has ended but was not waited for is a zombie, not alive."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
