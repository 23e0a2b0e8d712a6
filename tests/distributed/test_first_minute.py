"""What does not come together at the start is named within --start_timeout."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.distributed.launching import ROOT, Outcome, run

pytestmark = pytest.mark.distributed

WORKER = "tests/distributed/stuck.py"
SECONDS = 4


def port_of_this_test() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def one_of_two(rank: int, folder: Path, command: list[str], **variables: str) -> Outcome:
    """One process of a run of two hosts whose other one never comes."""
    environment = {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port_of_this_test(),
        "PYTHONPATH": str(ROOT),
        **variables,
    }
    done = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )
    return Outcome(done.returncode, done.stdout)


def pretrain(folder: Path, *flags: str) -> list[str]:
    """The data of this run do not exist: whoever looks for them is told so."""
    known = ["-c", "tiny", "-d", str(folder / "absent.jsonl"), "-o", str(folder / "checkpoint")]
    return [str(ROOT / "pretrain.py"), *known, *flags]


def test_a_process_that_never_comes_is_named_before_data_are_prepared(tmp_path: Path) -> None:
    begin = time.monotonic()
    outcome = one_of_two(0, tmp_path, pretrain(tmp_path, "--start_timeout", str(SECONDS)))
    assert outcome.code == 1
    lines = outcome.output.splitlines()
    assert lines[0].startswith("1 of 2 processes did not come to the meeting point 127.0.0.1:")
    assert "rank 1: no process of that host came (host 2 of the host file)" in lines[1]
    assert "there are rank 0 of" in lines[2]
    assert "absent.jsonl" not in outcome.output
    assert "Traceback" not in outcome.output
    assert time.monotonic() - begin < SECONDS + 30
    assert not (tmp_path / "checkpoint").exists()


def test_a_meeting_point_that_is_not_there_is_named(tmp_path: Path) -> None:
    command = [str(ROOT / WORKER), str(tmp_path), "2", "0", "nothing"]
    outcome = one_of_two(1, tmp_path, command, MASTER_PORT=(port := port_of_this_test()))
    assert outcome.code == 1
    (line,) = outcome.output.splitlines()
    assert f"did not reach the meeting point 127.0.0.1:{port} (MASTER_ADDR:MASTER_PORT)" in line
    assert "nothing listens on port" in line


@pytest.mark.full
def test_a_meeting_point_of_an_unknown_name(tmp_path: Path) -> None:
    command = [str(ROOT / WORKER), str(tmp_path), "2", "0", "nothing"]
    outcome = one_of_two(1, tmp_path, command, MASTER_ADDR="no-such-host.invalid")
    assert outcome.code == 1
    assert "the name no-such-host.invalid is unknown here" in outcome.output


@pytest.mark.full
def test_a_process_that_does_not_connect_is_named(tmp_path: Path) -> None:
    """It came, and then stands still: the other waits for it in the first exchange."""
    arguments = [str(tmp_path), str(SECONDS), "1", "stops_early"]
    outcome = run(WORKER, arguments, tmp_path / "output.txt", 2)
    assert outcome.code == 1
    said = outcome.output.partition("Traceback")[0]
    assert said.count("The run ends here.") == 1
    assert "the processes were not connected to each other in 4 s (--start_timeout)" in said
    assert "rank 1" in said and "until now" in said
    assert "GLOO_SOCKET_IFNAME" in said
    for rank in range(2):
        text = (tmp_path / "stacks" / f"rank-{rank:05d}.txt").read_text()
        assert "why: the processes were not connected to each other in 4 s" in text


@pytest.mark.full
def test_a_mistake_of_one_process_ends_torchruns_report(tmp_path: Path) -> None:
    arguments = [str(tmp_path), str(SECONDS), "1", "fails_early"]
    outcome = run(WORKER, arguments, tmp_path / "output.txt", 2)
    assert outcome.code == 1
    said, _, report = outcome.output.partition("Traceback (most recent call last)")
    assert "[rank 1] the disk is full" in said
    assert "traceback : the disk is full" in report


def test_a_healthy_start_is_quick(tmp_path: Path) -> None:
    """The roll call and the watch cost next to nothing beside the imports."""
    begin = time.monotonic()
    outcome = run(WORKER, [str(tmp_path), "60", "0", "nothing"], tmp_path / "output.txt", 2)
    assert outcome.code == 0, outcome.output
    assert outcome.output.count("all steps are done") == 2
    assert time.monotonic() - begin < 60
