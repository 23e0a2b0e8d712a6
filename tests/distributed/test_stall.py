"""A run that hangs ends with the stacks of all its processes; one that works does not."""

import signal
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.cluster import hosts
from tests.cluster.hosts import NAMES, Cluster
from tests.distributed.launching import Outcome, Started, run, start
from tests.distributed.test_resume import Folder

pytestmark = pytest.mark.distributed

WORKER = "tests/distributed/stuck.py"
SECONDS = 5
# To end in, from the moment in which the stall is found.
END = 15
needs_hosts = pytest.mark.skipif(hosts.missing() is not None, reason=str(hosts.missing()))


def stuck(folder: Path, rank: int, what: str, processes: int = 2) -> Outcome:
    arguments = [str(folder), str(SECONDS), str(rank), what]
    return run(WORKER, arguments, folder / "output.txt", processes)


def stack(folder: Path, rank: int) -> str:
    return (folder / "stacks" / f"rank-{rank:05d}.txt").read_text()


def message(output: str) -> str:
    """The one message of the watchdog; torchrun's own report repeats it after its traceback."""
    said, _, report = output.partition("Traceback (most recent call last)")
    assert said.count("The run ends here.") == 1, output
    if report:
        assert "The run ends here." in report, "torchrun's report lacks the message"
    return said[said.index("watchdog: ") :]


def rank_of(process: psutil.Process) -> str | None:
    try:
        return process.environ().get("RANK")
    except psutil.Error:
        return None


def process_of(started: Started, rank: int) -> psutil.Process:
    (found, *_) = (p for p in started._family() if rank_of(p) == str(rank))
    return found


def test_a_stopped_process_ends_the_run(flags: list[str], tmp_path: Path) -> None:
    """Rank 1 of a real run stands still; it is woken to say where."""
    folder = Folder(tmp_path)
    more = ["-b", "16", "--num_epochs", "100", "-i", "1000000", "--stall_timeout", "8"]
    with start("pretrain.py", folder.arguments(*flags, *more), folder.log("run"), 2) as started:
        started.wait_until(lambda: len(folder.records) >= 2)
        process_of(started, 1).send_signal(signal.SIGSTOP)
        begin = time.monotonic()
        outcome = started.wait(120)
        seconds = time.monotonic() - begin
    assert outcome.code == 1
    said = message(outcome.output)
    assert "no process got anything done for 8 s (--stall_timeout)" in said
    assert "where it was stopped (SIGSTOP) until now" in said
    assert "rank-00000.txt, rank-00001.txt\n" in said
    assert "--load auto" in said
    assert seconds < 8 + 2 * END, "torchrun itself takes a moment"
    for rank in range(2):
        text = stack(folder.save_dir, rank)
        assert f"rank: {rank}\n" in text
        assert "train_step" in text, "not the stack of the thread that trains"
        assert "why: no process got anything done" in text
        log = (folder.save_dir / "logs" / f"rank-{rank:05d}.log").read_text()
        assert "ERROR no process got anything done" in log
    assert "2 processes on 1 host(s)" in outcome.output, "no topology"


@pytest.mark.full
def test_an_endless_loop_ends_the_run(tmp_path: Path) -> None:
    outcome = stuck(tmp_path, 1, "endless")
    assert outcome.code == 1
    said = message(outcome.output)
    (waits,) = (line for line in said.splitlines() if line.startswith("  rank 0 "))
    (loops,) = (line for line in said.splitlines() if line.startswith("  rank 1 "))
    assert "after step 4, in " in waits and waits.endswith(" all_reduce")
    assert "after step 4, in " in loops and loops.endswith(" endless")
    assert "in endless" in stack(tmp_path, 1)


@pytest.mark.full
def test_work_of_one_process_is_progress_for_all(tmp_path: Path) -> None:
    """One rank writes for twice the timeout, the other waits for it in an all-reduce."""
    outcome = stuck(tmp_path, 1, "works")
    assert outcome.code == 0, outcome.output
    assert "all steps are done" in outcome.output
    assert not (tmp_path / "stacks").exists()


@pytest.mark.full
def test_a_thread_that_holds_pythons_lock_ends_a_single_process(tmp_path: Path) -> None:
    outcome = stuck(tmp_path, 0, "holds_the_lock", processes=1)
    assert outcome.code == -signal.SIGKILL, "nothing of its own can end it"
    text = ""
    deadline = time.monotonic() + 10
    while "holds_the_lock" not in text and time.monotonic() < deadline:
        time.sleep(0.1)  # written by another process, after this one has ended
        text = stack(tmp_path, 0) if (tmp_path / "stacks").is_dir() else ""
    assert "in holds_the_lock" in text
    assert "why: nothing got done for 5 s: a thread holds Python's lock" in text
    said = (tmp_path / "output.txt").read_text()
    assert said.count("stall: nothing got done for 5 s: a thread holds Python's lock") == 1


@pytest.mark.full
def test_a_run_that_was_suspended_goes_on(tmp_path: Path) -> None:
    """Ctrl-Z or `scontrol suspend` for longer than the timeout: time in which nothing could be
    done. faulthandler counted it, and ended the run when it was let go on."""
    command = [str(tmp_path), "1", "0", "nothing"]
    with start(WORKER, command, tmp_path / "output.txt", 1) as started:
        started.wait_until(lambda: (tmp_path / "step-3").exists())
        started.signal_all(signal.SIGSTOP)
        time.sleep(SECONDS + 2)
        started.signal_all(signal.SIGCONT)
        outcome = started.wait(60)
    assert outcome.code == 0, outcome.output
    assert not (tmp_path / "stacks").exists()


@pytest.mark.full
def test_a_thread_that_holds_pythons_lock_ends_the_others_too(tmp_path: Path) -> None:
    outcome = stuck(tmp_path, 1, "holds_the_lock")
    assert outcome.code == 1
    assert "rank 1 " in message(outcome.output)
    assert "in holds_the_lock" in stack(tmp_path, 1)
    assert "all_reduce" in stack(tmp_path, 0)


@pytest.mark.full
def test_the_first_process_may_be_the_one(tmp_path: Path) -> None:
    """It speaks elsewhere, and may hold the store in which the others meet."""
    outcome = stuck(tmp_path, 0, "holds_the_lock")
    assert outcome.code == 1
    message(outcome.output)
    assert "in holds_the_lock" in stack(tmp_path, 0)


@pytest.mark.full
def test_an_endless_loop_ends_a_single_process(tmp_path: Path) -> None:
    outcome = stuck(tmp_path, 0, "endless", processes=1)
    assert outcome.code == 1
    assert "nothing got done for 5 s (--stall_timeout)" in message(outcome.output)
    assert "in endless" in stack(tmp_path, 0)


@pytest.mark.full
def test_a_job_that_was_suspended_goes_on(tmp_path: Path) -> None:
    """As a scheduler does it, which stops all processes and lets them go on much later."""
    arguments = [str(tmp_path), "10", "0", "slowly"]
    with start(WORKER, arguments, tmp_path / "output.txt", 2) as started:
        started.wait_until(lambda: (tmp_path / "step-5").exists())
        workers = [process for process in started._family() if rank_of(process) is not None]
        for process in workers:
            process.send_signal(signal.SIGSTOP)
        time.sleep(22)  # faulthandler, on a clock of its own, acts after 14
        for process in workers:
            process.send_signal(signal.SIGCONT)
        outcome = started.wait()
    assert outcome.code == 0, outcome.output


# -- two hosts -------------------------------------------------------------------------------------


def on_two_hosts(cluster: Cluster, folder: Path, what: str) -> list:
    """Process 0 on the first host, which has the store too, and process 1 on the second."""
    started = []
    for rank in range(2):
        variables = {
            "RANK": str(rank),
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "1",
            "GROUP_RANK": str(rank),
            "MASTER_ADDR": NAMES[0],
            "MASTER_PORT": "29611",
            "GLOO_SOCKET_IFNAME": "eth0",
            "PYTHONPATH": str(Path(__file__).parents[2]),
        }
        command = [sys.executable, WORKER, str(folder), str(SECONDS * 2), "0", what]
        started.append(cluster.start(command, rank, **variables))
    return started


def wait_for(path: Path, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"no {path}"
        time.sleep(0.01)


@needs_hosts
@pytest.mark.full
def test_a_cut_link_ends_both_sides(tmp_path: Path) -> None:
    with Cluster(tmp_path) as cluster:
        both = on_two_hosts(cluster, tmp_path, "slowly")
        wait_for(tmp_path / "step-2")
        cluster.cut(1)
        begin = time.monotonic()
        codes = [each.wait(60) for each in both]
        seconds = time.monotonic() - begin
        said = [cluster.output(host).read_text() for host in range(2)]
    assert codes == [1, 1]
    assert seconds < 2 * SECONDS + END + 5
    assert "node2 has not been heard of for 10 s" in message(said[0]) or "got anything" in said[0]
    assert "no contact with node1" in message(said[1]) or "got anything" in said[1]
    assert "all_reduce" in stack(tmp_path, 0) + stack(tmp_path, 1)


@needs_hosts
@pytest.mark.full
def test_a_dead_host_ends_the_others(tmp_path: Path) -> None:
    with Cluster(tmp_path) as cluster:
        both = on_two_hosts(cluster, tmp_path, "slowly")
        wait_for(tmp_path / "step-2")
        cluster.cut(0)  # a host without power closes no connection
        cluster.kill(0)
        code = both[1].wait(60)
        said = cluster.output(1).read_text()
        both[0].wait(10)
    assert code == 1
    assert "node1" in message(said)
