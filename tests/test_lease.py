"""Two runs never write to one directory at the same time, and a dead one is in nobody's way."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llama_lib import lease, progress
from llama_lib.errors import UserError
from llama_lib.lease import FILE, Holder, leased


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "LEASE_SECONDS", 1.5)
    monkeypatch.setattr(lease, "RENEW_SECONDS", 0.2)
    monkeypatch.setattr(lease, "_POLL_SECONDS", 0.1)
    monkeypatch.setattr(lease, "_SETTLE_SECONDS", 0.2)


def leave(folder: Path, **changes: object) -> Holder:
    """A lease as another run would have left it."""
    values = {"host": "node2", "place": "elsewhere", "pid": 7, "started": 1.0, "job": "none"}
    holder = Holder(**{**values, "token": "theirs", **changes})
    (folder / FILE).write_text(json.dumps(dataclasses.asdict(holder)))
    return holder


def take(folder: Path) -> list[str]:
    said: list[str] = []
    with leased(str(folder), said.append):
        assert json.loads((folder / FILE).read_text())["pid"] == os.getpid()
    assert sorted(os.listdir(folder)) == [], "nothing is left behind"
    return said


def test_a_directory_of_a_run_on_this_host_is_refused(tmp_path: Path, quick: None):
    with leased(str(tmp_path), print):
        with pytest.raises(UserError, match=rf"process {os.getpid()} on .*-o other") as caught:
            take(tmp_path)
        assert caught.value.exit_code == 2
        assert (tmp_path / FILE).is_file(), "the refused run leaves the other's lease alone"
    take(tmp_path)


def test_a_killed_run_of_this_host_is_not_waited_for(tmp_path: Path, quick: None):
    code = "import llama_lib.lease as l, os, sys\nwith l.leased(sys.argv[1], print): os._exit(9)\n"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert (tmp_path / FILE).is_file()
    begin = time.monotonic()
    assert take(tmp_path) == []
    assert time.monotonic() - begin < 1.0


def test_a_process_that_only_has_the_same_number_is_another(tmp_path: Path, quick: None):
    leave(tmp_path, place=Holder.here().place, pid=os.getpid(), started=1.0)
    assert take(tmp_path) == []


def test_a_lost_run_of_another_host_is_waited_for_and_taken_over(tmp_path: Path, quick: None):
    leave(tmp_path)
    before = progress.count()
    (said,) = take(tmp_path)
    assert progress.count() >= before + 5, "the watchdog would call the waiting a stall"
    assert re.search(r"of process 7 on node2, which renewed it 0 s ago: waiting up to [12] s", said)


def test_a_run_of_another_host_that_renews_its_lease_is_refused(tmp_path: Path, quick: None):
    leave(tmp_path)
    code = "import os, sys, time\nwhile True:\n    os.utime(sys.argv[1])\n    time.sleep(0.2)\n"
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path / FILE)]) as other:
        with pytest.raises(UserError, match="process 7 on node2"):
            take(tmp_path)
        other.kill()


def test_a_restart_of_the_same_job_goes_on_at_once(
    tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "5e1f")
    leave(tmp_path, job="5e1f")
    assert take(tmp_path) == []
    leave(tmp_path, job="another")
    assert len(take(tmp_path)) == 1


def test_a_lease_that_nobody_can_read_is_waited_for(tmp_path: Path, quick: None):
    (tmp_path / FILE).write_text("{")
    assert "a host unknown" in take(tmp_path)[0]


def test_of_two_that_start_at_the_same_moment_one_is_refused(tmp_path: Path):
    code = (
        "import sys, time, llama_lib.lease as l\n"
        "while time.time() < float(sys.argv[2]):\n    pass\n"
        "with l.leased(sys.argv[1], print):\n    time.sleep(3)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path), str(time.time() + 2)]
    both = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate()[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 1]
    assert any("is being written to by another run" in text for text in said)


def test_a_run_that_stood_still_and_lost_its_directory_ends(tmp_path: Path):
    code = (
        "import sys, time, llama_lib.lease as l\nl.RENEW_SECONDS = 0.2\n"
        "with l.leased(sys.argv[1], print):\n    print('has it', flush=True)\n    time.sleep(60)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as run:
        assert run.stdout is not None and run.stderr is not None
        assert run.stdout.readline() == "has it\n"
        leave(tmp_path)
        assert run.wait(20) == 1
        assert "was taken over by another run (process 7 on node2)" in run.stderr.read()
    assert json.loads((tmp_path / FILE).read_text())["pid"] == 7, "it is the other's"
