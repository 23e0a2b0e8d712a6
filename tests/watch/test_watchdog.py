"""What ends a run and what does not, on a clock of the test's own."""

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from llama_lib import progress
from llama_lib.watch import giving_up, last_words, stacks, watchdog
from llama_lib.watch.pulse import CLOSED, ENDED, LEFT, Beat
from llama_lib.watch.report import Report, Verdict
from llama_lib.watch.roll_call import Crew
from llama_lib.watch.watchdog import Silence, Watchdog
from tests.watch.test_roll_call import crew, member


class FakePulse:
    """A pulse that hears what the test says."""

    def __init__(self, world: int) -> None:
        self.exchanges = self.total = 0
        self.verdict = ""
        self.is_broken = False
        self.interval = 2.0
        self.beats = [Beat(0, 0, "", "") for _ in range(world)]

    def heard(self, *ranks: int) -> None:
        """One exchange with the store, in which these ranks have a new beat."""
        self.exchanges += 1
        for rank in ranks:
            self.beats[rank] = self.beats[rank]._replace(number=self.exchanges)

    def close(self, *_) -> None:
        pass

    def say(self, *_) -> None:
        pass


@pytest.fixture
def alone(monkeypatch):
    """A watchdog whose thread is not there: the test is the clock."""
    monkeypatch.setattr(threading.Thread, "start", lambda self: None)
    monkeypatch.setattr(threading.Thread, "join", lambda self, timeout=None: None)
    monkeypatch.setattr(progress, "_trains", True)
    dog = Watchdog(Crew([member(0)], 0))
    dog._stall = 100.0
    return dog


@pytest.fixture
def together(alone):
    """Two hosts with two processes each."""
    alone.crew, alone.pulse = crew(4), FakePulse(4)
    alone._others = [Silence() for _ in range(4)]
    alone._lost_seconds = 60.0
    return alone


def seconds_until_end(dog: Watchdog, limit: int, each=lambda second: None) -> tuple[int, Verdict]:
    for second in range(limit):
        each(second)
        if verdict := dog._judged(1.0):
            return second, verdict
    raise AssertionError(f"nothing in {limit} s")


def test_a_stall_ends_the_run_after_the_timeout(alone):
    second, verdict = seconds_until_end(alone, 200)
    assert second == 101
    assert verdict.why == "nothing got done for 100 s (--stall_timeout)"


def test_work_however_slow_never_does(alone):
    def tensor_by_tensor(second: int) -> None:
        if second % 99 == 0:
            progress.made()

    with pytest.raises(AssertionError, match="nothing in 2000 s"):
        seconds_until_end(alone, 2000, tensor_by_tensor)


def test_the_first_step_has_more_patience(alone, monkeypatch):
    """Large models are built then, and kernels compiled, with nothing to count."""
    monkeypatch.setattr(progress, "_trains", False)
    second, verdict = seconds_until_end(alone, 400)
    assert second == 301
    assert "for 300 s" in verdict.why


def test_the_work_of_another_process_counts(together):
    """One rank writes a checkpoint, the others wait for it."""

    def writes(second: int) -> None:
        together.pulse.heard(0, 1, 2, 3)
        together.pulse.total += second % 90 == 0

    with pytest.raises(AssertionError, match="nothing in 1000 s"):
        seconds_until_end(together, 1000, writes)


def test_a_machine_that_slept_has_not_waited(alone, monkeypatch):
    """An hour between two looks counts as the two seconds that they are apart at most."""
    times = iter([0.0, 1.0, 3601.0, 7201.0, 10801.0])
    looks = iter([False] * 4 + [True])
    monkeypatch.setattr(time, "monotonic", lambda: next(times))
    monkeypatch.setattr(alone._closing, "wait", lambda tick: next(looks))
    monkeypatch.setattr(watchdog, "give_up", pytest.fail)
    alone._run()


def test_a_host_that_is_silent_is_named(together):
    second, verdict = seconds_until_end(together, 100, lambda _: together.pulse.heard(0, 1))
    assert second == 61
    assert verdict.why.startswith("node2 has not been heard of for 60 s")
    assert verdict.lost == [2, 3]


def test_a_silent_process_of_a_living_host_is_left_to_the_stall(together):
    """It may hold Python's lock for long, in a library that reads a large file."""

    def lives(second: int) -> None:
        together.pulse.heard(0, 1, 2)
        together.pulse.total += 1

    with pytest.raises(AssertionError, match="nothing in 300 s"):
        seconds_until_end(together, 300, lives)


def test_processes_that_ended_in_order_are_not_missed(together):
    for rank in (2, 3):
        together.pulse.beats[rank] = Beat(1, 9, CLOSED, "")

    def goes_on(second: int) -> None:
        together.pulse.heard(0, 1)
        together.pulse.total += 1

    with pytest.raises(AssertionError, match="nothing in 300 s"):
        seconds_until_end(together, 300, goes_on)


def test_a_process_that_failed_is_named_with_its_words(together):
    together.pulse.beats[3] = Beat(1, 0, LEFT, "the disk is full")
    _, verdict = seconds_until_end(together, 30, lambda _: together.pulse.heard(0, 1, 2))
    assert verdict.why == "rank 3 (node2) has ended: the disk is full"


def test_a_store_that_is_silent(together):
    second, verdict = seconds_until_end(together, 100)
    assert second == 61
    assert verdict.why.startswith("no contact with node1 (the meeting point node1:29500) for 60 s")
    assert verdict.alone


def test_a_store_that_is_gone(together):
    together.pulse.is_broken = True
    second, verdict = seconds_until_end(together, 100)
    assert second == 21
    assert "process 0 or its launcher on node1 has ended" in verdict.why


@pytest.fixture
def process_0(together, monkeypatch):
    """A living process 0 on the host of the watched rank 1."""
    monkeypatch.setenv("MASTER_PORT", "29500")
    environment = {"RANK": "0", "MASTER_PORT": "29500"}
    command = [sys.executable, "-ISc", "print(flush=True); import time; time.sleep(60)"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        members = [replace(member(0), pid=process.pid), *(member(rank) for rank in (1, 2, 3))]
        together.crew = Crew(members, 1, together.crew.place)
        yield process
        process.kill()


def test_a_stopped_process_0_of_this_host_is_said_to_be_stopped(together, process_0):
    """The message blamed the host and the network, on the host itself."""
    process_0.send_signal(signal.SIGSTOP)
    os.waitpid(process_0.pid, os.WUNTRACED)
    second, verdict = seconds_until_end(together, 100)
    assert second == 61 and verdict.alone
    assert verdict.why == (
        "no contact with the meeting point node1:29500 for 60 s: process 0 (pid "
        f"{process_0.pid}) on this host is stopped (SIGSTOP)"
    )


@pytest.mark.parametrize("is_broken", [False, True])
def test_a_process_0_of_this_host_that_ended_is_said_to_have_ended(together, process_0, is_broken):
    process_0.kill()
    process_0.wait()
    together.pulse.is_broken = is_broken
    second, verdict = seconds_until_end(together, 100)
    assert second == (21 if is_broken else 61) and verdict.alone
    ended = f"process 0 (pid {process_0.pid}) on this host has ended; its output says why"
    assert verdict.why.endswith(ended)
    assert "the host is down" not in verdict.why and "launcher" not in verdict.why


def test_a_process_0_that_is_there_is_not_said_to_have_ended(together, process_0):
    assert "on this host is there but does not answer" in seconds_until_end(together, 100)[1].why
    together.pulse.is_broken = True  # the launcher had the store, and has gone
    assert "process 0 or its launcher on node1 has ended" in together._judged(1.0).why


def test_a_process_0_elsewhere_is_not_looked_for_here(together, process_0, monkeypatch):
    """Neither on another host nor in another container of this one, where 100 may be anybody."""
    first, pulse = together.crew.members[0], together.pulse
    together._lost(pulse, 0.0)
    for other in (replace(first, host="node9"), replace(first, numbers="pid:[7]")):
        together.crew.members[0] = other
        assert "the host is down" in together._lost(pulse, 61.0).why
    monkeypatch.setenv("MASTER_PORT", "29501")  # its number belongs to a process of another run
    together.crew.members[0] = first
    assert "on this host has ended" in together._lost(pulse, 61.0).why


def test_what_another_process_found_ends_this_one(together):
    together.pulse.verdict = '{"why": "node2 is gone", "lost": [2, 3]}'
    assert seconds_until_end(together, 1)[1] == Verdict("node2 is gone", [2, 3])


def test_while_data_are_prepared_nothing_has_to_be_done(together):
    together._stall = 0.0
    together._lost_seconds = watchdog.PREPARATION_LOST_SECONDS
    with pytest.raises(AssertionError, match="nothing in 5000 s"):
        seconds_until_end(together, 5000, lambda _: together.pulse.heard(0, 1, 2, 3))
    second, verdict = seconds_until_end(together, 700, lambda _: together.pulse.heard(0, 1))
    assert 590 < second < 610
    assert verdict.lost == [2, 3]


def test_a_start_has_a_deadline(together, tmp_path):
    with together.starting(str(tmp_path), 30):
        _, verdict = seconds_until_end(together, 60, lambda _: together.pulse.heard(0, 1, 2, 3))
        assert verdict.why.startswith("the processes were not connected to each other in 30 s")
    together._stall = 0.0
    with pytest.raises(AssertionError, match="nothing in 300 s"):
        seconds_until_end(together, 300, lambda _: together.pulse.heard(0, 1, 2, 3))


def report(verdict: Verdict, found: dict[int, Beat], folder=None, stopped=frozenset()) -> str:
    made = Report(crew(4), folder, verdict, found, None, set(stopped))
    return "\n".join(made.lines())


def test_the_message_groups_ranks_by_where_they_are(tmp_path):
    for rank in (0, 1, 3):
        stacks.write_stacks(tmp_path, member(rank), "why")
    waits = Beat(5, 12, ENDED, "trainer.py:9 train_step > all_reduce")
    found = {0: waits, 1: waits, 3: Beat(5, 11, ENDED, "data.py:3 read")}
    lines = report(Verdict("nothing was done"), found, tmp_path, {3}).splitlines()
    assert lines[0] == "watchdog: nothing was done. The run ends here."
    assert lines[1] == (
        "  ranks 0-1 (node1): after step 12, in trainer.py:9 train_step > all_reduce"
    )
    assert lines[2] == (
        "  rank 3 (node2): after step 11, in data.py:3 read, where it was stopped (SIGSTOP) until "
        "now"
    )
    assert lines[3].startswith("  rank 2 (node2): no answer: ")
    assert lines[4] == (
        f"  stacks of all threads in {tmp_path}: rank-00000.txt, rank-00001.txt, rank-00003.txt "
        "(none of rank 2)"
    )
    assert "the one to look at first" in lines[5]


def test_a_disk_that_hangs_does_not_silence_the_watchdog(tmp_path, monkeypatch, capfd):
    """The run often hangs on that very disk: the process ended without a word."""
    answers = threading.Event()
    monkeypatch.setattr(giving_up, "DISK_SECONDS", 0.1)
    monkeypatch.setattr(stacks, "write_stacks", lambda *_: answers.wait())
    monkeypatch.setattr(giving_up, "_log", lambda lines: answers.wait() and None)
    problem = giving_up._write_down(crew(4), tmp_path, "nothing was done")
    assert problem == f"the disk of {tmp_path} does not answer"
    verdict, found = Verdict("nothing was done"), {0: Beat(1, 3, ENDED, "")}
    giving_up._speak(Report(crew(4), None, verdict, found, problem).lines())
    answers.set()
    said = capfd.readouterr().err
    assert "watchdog: nothing was done. The run ends here." in said
    assert f"no stacks: the disk of {tmp_path} does not answer" in said


def test_a_disk_that_answers_has_the_stack(tmp_path):
    assert giving_up._write_down(crew(4), tmp_path, "nothing was done") is None
    assert "why: nothing was done" in stacks.stack_file(tmp_path, 0).read_text()


def test_a_failed_start_is_explained_by_the_interfaces():
    text = report(Verdict("not connected", start=True), {0: Beat(1, 0, ENDED, "launch.py:1 x")})
    assert "The way to node1:29500 is eth0 on node1, node2" in text
    assert "GLOO_SOCKET_IFNAME" in text
    assert "--load auto" not in text


def test_lost_ranks_are_not_said_to_be_stopped():
    found = {rank: Beat(1, 3, ENDED, "") for rank in (0, 1)}
    assert "no answer" not in report(Verdict("node2 is gone", [2, 3]), found)


def test_a_stack_file_tells_when_where_and_why(tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "_step", 17)
    before = time.time() - 1
    assert stacks.write_stacks(tmp_path / "stacks", member(3), "it hangs") is None
    path = stacks.stack_file(tmp_path / "stacks", 3)
    text = path.read_text()
    assert path.name == "rank-00003.txt"
    for part in ("time: 20", "last step done: 17", "rank: 3", "host: node2", "why: it hangs"):
        assert part in text
    assert "test_a_stack_file_tells_when_where_and_why" in text, "no stack of this thread"
    assert stacks.step_in(path) == 17
    assert stacks.is_written(tmp_path / "stacks", 3, before)
    assert not stacks.is_written(tmp_path / "stacks", 3, time.time() + 60)
    assert not stacks.is_written(tmp_path / "stacks", 2, before)


def test_a_folder_that_cannot_be_written_to_is_said(tmp_path):
    (tmp_path / "stacks").write_text("a file")
    assert "cannot be written to" in stacks.write_stacks(tmp_path / "stacks", member(0), "why")


def test_whereabouts_name_the_innermost_lines():
    assert "whereabouts" in stacks.whereabouts()
    assert stacks.whereabouts().startswith("llama_lib/watch/stacks.py:")


STUCK = ["Timeout (0:00:09)!", "Thread 1:", "  File x"]


def last_words_of(lines: list[str | None], folder: Path) -> tuple[str | None, int]:
    """What was written, and how often the process was ended."""
    ends: list[None] = []
    path = folder / "stacks" / "rank-00000.txt"
    last_words.listen(lines, path, "rank: 0", "it is stuck", lambda: ends.append(None))
    return (path.read_text() if path.exists() else None), len(ends)


def test_last_words_are_written_with_the_latest_step(tmp_path, capsys):
    text, ends = last_words_of(["3", None, "14", *STUCK, None, None], tmp_path)
    assert text is not None and ends == 1
    assert "last step done: 14\nrank: 0\n\nTimeout (0:00:09)!\nThread 1:\n  File x\n" in text
    assert capsys.readouterr().err == "it is stuck\n"


@pytest.mark.parametrize("lines", [["3"], ["3", *STUCK, "3"], ["3", *STUCK, "3", None, "4"]])
def test_a_process_that_goes_on_has_no_last_words(lines, tmp_path, capsys):
    assert last_words_of(lines, tmp_path) == (None, 0)
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr().err == ""


def test_silence_of_the_pipe_is_heard():
    reader, writer = os.pipe()
    lines = last_words.lines_of(reader, silence=0.01)
    os.write(writer, b"3\nTime")
    assert [next(lines), next(lines)] == ["3", None]
    os.write(writer, b"out (\n")
    os.close(writer)
    assert list(lines) == ["Timeout ("]
    os.close(reader)


def test_bytes_that_come_in_count_as_progress(tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "_LOOK_SECONDS", 0.01)
    before = progress.count()
    with progress.transferring():
        time.sleep(0.05)
        (tmp_path / "download").write_bytes(bytes(4 << 20))
        deadline = time.monotonic() + 10
        while progress.count() == before and time.monotonic() < deadline:
            time.sleep(0.01)
    assert progress.count() > before
