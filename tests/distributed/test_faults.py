"""Signals, kills, full disks, damaged files: never a wrong load or a lost older checkpoint."""

import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from llama_lib.checkpoint.manifest import MANIFEST, step_directories
from llama_lib.checkpoint.verify import checkpoint_problems
from llama_lib.control import SAVE_AND_EXIT, SAVE_NOW
from tests.distributed.conftest import Job
from tests.distributed.launching import ROOT, Outcome, run, start, start_words
from tests.distributed.test_resume import Folder

pytestmark = pytest.mark.distributed

ENDLESS = ["--num_epochs", "100", "-i", "1000000"]


def newest_step(folder: Folder) -> int:
    return int(step_directories(folder.save_dir)[0].name.removeprefix("step-"))


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def largest_file(checkpoint: Path) -> Path:
    return max((p for p in checkpoint.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


@pytest.fixture(scope="module")
def stopped(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Folder, Outcome]:
    """One process, two checkpoints asked for by `touch save_now`, then SIGTERM during a step."""
    folder = Folder(tmp_path_factory.mktemp("stopped"))
    arguments = folder.arguments(*flags, "-b", "16", *ENDLESS)
    with start("pretrain.py", arguments, folder.log("first")) as started:
        started.wait_until(lambda: len(folder.records) >= 2)
        for count in (1, 2):
            (folder.save_dir / SAVE_NOW).touch()
            started.wait_until(lambda n=count: len(step_directories(folder.save_dir)) == n)
        going_on = len(folder.records) + 3
        started.wait_until(lambda: len(folder.records) >= going_on)
        started.send(signal.SIGTERM)
        return folder, started.wait()


@pytest.fixture
def damaged(stopped: tuple[Folder, Outcome], tmp_path: Path) -> Folder:
    """A copy of the stopped run, to be damaged."""
    return Folder(Path(shutil.copytree(stopped[0].root, tmp_path / "copy")))


def resume(folder: Folder, flags: list[str], load: str = "auto", steps: int = 2) -> Outcome:
    command = [*flags, "-b", "16", "--num_epochs", "100", "--load", load]
    last = newest_step(folder) + steps
    return run(
        "pretrain.py", folder.arguments(*command, "--max_steps", str(last)), folder.log("resumed")
    )


def test_a_killed_rank_is_one_message_of_the_others(flags: list[str], tmp_path: Path) -> None:
    """Regression: the ranks that were left showed a traceback of gloo, 45 lines each."""
    folder = Folder(tmp_path)
    arguments = folder.arguments(*flags, "-b", "16", *ENDLESS)
    # Not torchrun, which ends the others before they can speak.
    launch = ["-m", "llama_lib", "launch", "--nproc_per_node", "2", str(ROOT / "pretrain.py")]
    with start_words([*launch, *arguments], folder.log("run")) as started:
        started.wait_until(lambda: len(folder.records) >= 2)
        for process in psutil.Process(started.process.pid).children(recursive=True):
            if process.environ().get("RANK") == "1":
                process.kill()
        outcome = started.wait()
    assert outcome.code == 128 + signal.SIGKILL
    assert outcome.output.count("the connection to another process broke") == 1
    assert "rank 1 on this host was killed by SIGKILL" in outcome.output
    assert "Traceback" not in outcome.output and "gloo/transport" not in outcome.output
    log = (folder.save_dir / "logs" / "rank-00000.log").read_text()
    assert "Traceback" in log, "what broke is in the log"


def test_sigterm_saves_and_ends_with_143(stopped: tuple[Folder, Outcome]) -> None:
    folder, outcome = stopped
    assert outcome.code == 128 + signal.SIGTERM, outcome.output
    assert newest_step(folder) == len(folder.records), "the step that was going on is not saved"
    assert f"stopped after step {newest_step(folder)} as asked" in outcome.output
    assert (folder.save_dir / "latest").read_text().strip() == f"step-{newest_step(folder):08d}"


def test_save_now_saves_and_goes_on(stopped: tuple[Folder, Outcome]) -> None:
    folder, _ = stopped
    checkpoints = step_directories(folder.save_dir)
    assert len(checkpoints) == 3
    assert [checkpoint_problems(checkpoint) for checkpoint in checkpoints] == [[], [], []]
    assert not (folder.save_dir / SAVE_NOW).exists()


def test_a_flipped_bit_is_passed_over_for_the_older_checkpoint(
    damaged: Folder, flags: list[str]
) -> None:
    newest, older, _ = step_directories(damaged.save_dir)
    flip_bit(largest_file(newest))
    outcome = resume(damaged, flags)
    assert outcome.code == 0, outcome.output
    assert f"{newest.name} is damaged, passed over" in outcome.output
    assert f"resumed {older}" in outcome.output
    steps = [record["step"] for record in damaged.records]
    assert steps == list(range(1, steps[-1] + 1))


@pytest.mark.full
def test_the_stopped_run_goes_on_where_it_was(damaged: Folder, flags: list[str]) -> None:
    before = newest_step(damaged)
    outcome = resume(damaged, flags)
    assert outcome.code == 0, outcome.output
    assert [record["step"] for record in damaged.records] == list(range(1, before + 3))


@pytest.mark.full
def test_a_truncated_file_is_passed_over(damaged: Folder, flags: list[str]) -> None:
    newest, older, _ = step_directories(damaged.save_dir)
    path = largest_file(newest)
    os.truncate(path, path.stat().st_size // 2)
    outcome = resume(damaged, flags)
    assert outcome.code == 0, outcome.output
    assert f"{newest.name} is damaged, passed over" in outcome.output
    assert path.name in outcome.output
    assert f"resumed {older}" in outcome.output


@pytest.mark.full
def test_only_damaged_checkpoints_end_the_run(damaged: Folder, flags: list[str]) -> None:
    """A fresh start over what can perhaps still be saved would be worse than none."""
    checkpoints = step_directories(damaged.save_dir)
    for checkpoint in checkpoints:
        (checkpoint / MANIFEST).unlink()
    outcome = resume(damaged, flags)
    assert outcome.code == 1
    assert all(checkpoint.name in outcome.output for checkpoint in checkpoints)
    assert step_directories(damaged.save_dir) == checkpoints


@pytest.mark.full
def test_a_damaged_checkpoint_is_not_loaded_by_name(damaged: Folder, flags: list[str]) -> None:
    newest = step_directories(damaged.save_dir)[0]
    flip_bit(largest_file(newest))
    outcome = resume(damaged, flags, load=str(newest))
    assert outcome.code == 1
    assert f"--load {newest} is damaged" in outcome.output
    assert "Traceback" not in outcome.output


@pytest.mark.full
@pytest.mark.parametrize(("processes", "code"), [(1, 130), (2, 1)])
def test_sigint_saves(processes: int, code: int, flags: list[str], tmp_path: Path) -> None:
    """Workers may get Ctrl-C twice, from the terminal and from torchrun: that is one request."""
    folder = Folder(tmp_path)
    arguments = folder.arguments(*flags, "-b", "16", *ENDLESS)
    with start("pretrain.py", arguments, folder.log("run"), processes) as started:
        started.wait_until(lambda: len(folder.records) >= 2)
        started.signal_all(signal.SIGINT)
        outcome = started.wait()
    assert outcome.code == code, outcome.output
    assert newest_step(folder) == len(folder.records)
    assert checkpoint_problems(step_directories(folder.save_dir)[0]) == []


@pytest.mark.full
def test_sigterm_to_torchrun_saves(flags: list[str], tmp_path: Path) -> None:
    """As a cluster's scheduler does it: torchrun passes the signal on to its workers."""
    folder = Folder(tmp_path)
    arguments = folder.arguments(*flags, "-b", "16", *ENDLESS)
    with start("pretrain.py", arguments, folder.log("run"), processes=2) as started:
        started.wait_until(lambda: len(folder.records) >= 2)
        started.send(signal.SIGTERM)
        outcome = started.wait()
    assert outcome.code != 0
    assert newest_step(folder) == len(folder.records)
    assert checkpoint_problems(step_directories(folder.save_dir)[0]) == []


@pytest.mark.full
def test_save_and_exit(flags: list[str], tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    arguments = folder.arguments(*flags, "-b", "16", *ENDLESS)
    with start("pretrain.py", arguments, folder.log("run")) as started:
        started.wait_until(lambda: len(folder.records) >= 2)
        (folder.save_dir / SAVE_AND_EXIT).touch()
        outcome = started.wait()
    assert outcome.code == 0, outcome.output
    assert newest_step(folder) == len(folder.records)
    assert not (folder.save_dir / SAVE_AND_EXIT).exists()


def evaluations(folder: Folder) -> list[dict[str, Any]]:
    lines = (folder.root / "tb" / "eval.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.full
@pytest.mark.parametrize("plugin", ["gemini", "gemini_auto", "zero2"])
def test_what_an_ended_run_did_not_measure_is_made_up_for(
    plugin: str, flags: list[str], tmp_path: Path
) -> None:
    """Regression: eval.jsonl kept a hole at a step where a run had been asked to end."""
    command = [*flags, "-p", plugin, "-b", "16", "-i", "1000"]
    command += ["--eval_interval", "1", "--eval_steps", "1"]
    straight, broken = Folder(tmp_path / "straight"), Folder(tmp_path / "broken")
    first = run("pretrain.py", straight.arguments(*command, "--max_steps", "4"), straight.log("a"))
    assert first.code == 0, first.output
    arguments = broken.arguments(*command, "--max_steps", "4")
    with start("pretrain.py", arguments, broken.log("a")) as started:
        started.wait_until((broken.save_dir / "logs").exists)
        (broken.save_dir / SAVE_AND_EXIT).touch()  # taken at the end of the first step
        assert started.wait().code == 0
    assert newest_step(broken) < 4
    ended_at = newest_step(broken)
    assert ended_at not in [record["step"] for record in evaluations(broken)]
    again = run("pretrain.py", [*arguments, "--load", "auto"], broken.log("b"))
    assert again.code == 0, again.output
    expected = evaluations(straight)
    if plugin == "gemini_auto":
        expected = [record for record in expected if record["step"] != ended_at]
        assert f"held-out loss at step {ended_at}: left out" in again.output
    assert evaluations(broken) == expected


@pytest.mark.full
@pytest.mark.parametrize("layout", ["-p gemini -b 16", "-p hybrid_parallel --pp 2 -b 32"])
def test_killed_in_the_middle_of_a_save(layout: str, flags: list[str], tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    command = [*flags, *layout.split(), "--num_epochs", "100"]
    saving = folder.arguments(*command, "-i", "3")

    def unfinished() -> list[Path]:
        return list(folder.save_dir.glob("step-*.tmp"))

    with start("pretrain.py", saving, folder.log("first"), processes=2) as started:
        started.wait_until(lambda: len(step_directories(folder.save_dir)) >= 2)
        while True:
            started.wait_until(unfinished)
            started.signal_all(signal.SIGSTOP)
            if unfinished():  # else the save was over before the processes stood still
                break
            started.signal_all(signal.SIGCONT)
        started.kill()
    complete = step_directories(folder.save_dir)
    assert [checkpoint_problems(checkpoint) for checkpoint in complete] == [[]] * len(complete)

    last = newest_step(folder) + 3
    again = folder.arguments(*command, "-i", "3", "--max_steps", str(last), "--load", "auto")
    outcome = run("pretrain.py", again, folder.log("second"), processes=2)
    assert outcome.code == 0, outcome.output
    assert f"resumed {complete[0]}" in outcome.output
    assert not unfinished()
    assert step_directories(folder.save_dir)[1:] == complete
    assert [record["step"] for record in folder.records] == list(range(1, last + 1))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for one checkpoint of the tests' model (2.8 MB), not for two."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() != 0:
        pytest.skip("mounting a small tmpfs needs root")
    mount = ["mount", "-t", "tmpfs", "-o", "size=5m", "tmpfs", str(folder)]
    mounted = subprocess.run(mount, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.full
def test_a_full_disk_ends_the_run_after_warnings(
    flags: list[str], small_disk: Path, tmp_path: Path
) -> None:
    """Training outlives a save that finds no room; the last one has to succeed."""
    command = ["-b", "16", "-i", "2", "--max_steps", "8"]
    arguments = [*flags, *command, "-o", str(small_disk), "-t", str(tmp_path / "tb")]
    outcome = run("pretrain.py", arguments, tmp_path / "run.txt")
    assert outcome.code == 1
    for line in re.findall("warning: .*", outcome.output):
        assert "free, a checkpoint needs about" in line
        assert line.endswith("Training goes on; the next save is tried as planned.")
    assert outcome.output.count("warning: ") == 2
    assert "Traceback" not in outcome.output
    complete = step_directories(small_disk)
    assert [checkpoint.name for checkpoint in complete] == ["step-00000002"]
    assert checkpoint_problems(complete[0]) == []
    assert not list(small_disk.glob("*.tmp"))


@pytest.mark.full
@pytest.mark.parametrize(
    "job",
    [
        pytest.param(job, marks=pytest.mark.needs(job))
        for job in ("full_disk/gemini/bf16", "full_disk/tp2/bf16", "full_disk/pp2/bf16")
    ],
)
def test_a_disk_that_fills_up_while_writing(report: Job, job: str) -> None:
    result = report(job)
    assert result["message"].startswith("checkpoint ")
    assert result["message"].endswith("Older checkpoints are untouched.")
    assert result["found"] == result["first"]
    assert result["left"] == ["latest", "step-00000001"]
    assert result["problems_later"] == [], "the next save is to succeed once there is room again"
