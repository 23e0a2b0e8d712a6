"""--async_save and --save_check in real processes: the same files, the same run, nothing lost."""

import json
import os
import resource
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from llama_lib.checkpoint.manifest import MANIFEST, step_directories, step_directory
from llama_lib.checkpoint.verify import checkpoint_problems
from tests.distributed.conftest import Job
from tests.distributed.launching import Started, run, start
from tests.distributed.test_faults import small_disk as small_disk
from tests.distributed.test_resume import Folder
from tests.distributed.test_truth import job_params

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize(
    "job",
    [
        *job_params(
            "beside_training",
            quick="gemini/bf16 zero2/bf16 tp2/bf16 pp2/bf16 hybrid_zero1/bf16",
            full="zero2/fp32 zero2/fp16 zero2_cpu/bf16 zero2_cpu/fp16 zero2_cpu/fp32 gemini/fp16"
            " gemini_offload_half/bf16 gemini_offload_optimizer/bf16 gemini_offload_all/bf16"
            " gemini_auto/bf16 gemini_accumulate/bf16 hybrid_zero0/fp32 hybrid_zero0/bf16"
            " hybrid_zero0/fp16 hybrid_zero1/fp16 hybrid_zero2/bf16 tp2/fp32 tp2/fp16 pp2/fp32"
            " pp2/fp16 pp2_interleaved/bf16 all_to_all/bf16 split_gather/bf16 zero2_mistral/fp32"
            " dp2_tp2/bf16 dp2_tp2_zero1/bf16 dp2_pp2_zero1/bf16 tp2_pp2/bf16 dp4_gemini/bf16"
            " dp2_all_to_all/bf16",
        ),
        *job_params("beside_lora", quick="zero2/bf16", full="zero2_cpu/bf16 hybrid_zero0/fp32"),
        *job_params("beside_merged_lora", quick="hybrid_zero1/bf16", full="zero2/fp32"),
    ],
)
def test_its_files_are_those_of_a_save_at_once(report: Job, job: str) -> None:
    result = report(job)
    assert result["beside"] == result["at_once"]
    assert [manifest["step"] for manifest in result["at_once"]] == [2, 6]
    assert any(result["training_went_on"]), "nothing could have spoilt the copy"
    assert result["problems"] == [] and result["failure"] is None


@pytest.mark.parametrize(
    "job", job_params("beside_unmoved", quick="zero2/bf16", full="gemini/bf16 hybrid_zero0/bf16")
)
def test_before_the_first_step_there_is_nothing_to_leave_behind(report: Job, job: str) -> None:
    result = report(job)
    assert result["beside"] == result["at_once"]
    assert result["kept"] == []


@pytest.mark.parametrize(
    "job",
    job_params(
        "beside_equals_undisturbed", quick="gemini/bf16", full="zero2/bf16 tp2/bf16 pp2/bf16"
    ),
)
def test_training_does_not_notice(report: Job, job: str) -> None:
    result = report(job)
    assert result["with"] == result["without"]


@pytest.mark.parametrize(
    "job", job_params("beside_full_disk", quick="pp2/bf16", full="gemini/bf16 tp2/bf16")
)
def test_every_rank_hears_of_a_full_disk(report: Job, job: str) -> None:
    result = report(job)
    (message,) = set(result["messages"])
    assert message.endswith("Older checkpoints are untouched.") and "step-00000002" in message
    assert len(result["messages"]) == result["ranks"]
    assert result["found"] == result["first"]
    assert result["left"] == ["latest", "step-00000001"]


# -- whole runs ------------------------------------------------------------------------------------


def written(save_dir: Path) -> dict[str, Any]:
    """What the manifests say, and the states without the options, which name the way of saving."""
    found: dict[str, Any] = {}
    for path in step_directories(save_dir):
        manifest = json.loads((path / MANIFEST).read_text())
        del manifest["files"]["trainer_state.json"]
        state = json.loads((path / "trainer_state.json").read_text())
        del state["options"]
        found[path.name] = (manifest, state)
    return found


@pytest.fixture(scope="module")
def plain(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """A run of two processes that saves at once."""
    folder = Folder(tmp_path_factory.mktemp("plain"))
    outcome = run("pretrain.py", folder.arguments(*flags, *RUN), folder.log("run"), processes=2)
    assert outcome.code == 0, outcome.output
    return folder


RUN = ["-p", "gemini", "-b", "8", "-i", "3", "--max_steps", "8"]


def test_a_run_with_it_is_the_same_run(flags: list[str], plain: Folder, tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    arguments = folder.arguments(*flags, *RUN, "--async_save", "--save_check")
    outcome = run("pretrain.py", arguments, folder.log("run"), processes=2)
    assert outcome.code == 0, outcome.output
    assert [each["loss"] for each in folder.records] == [each["loss"] for each in plain.records]
    assert written(folder.save_dir) == written(plain.save_dir)
    assert len(step_directories(folder.save_dir)) == 3
    assert outcome.output.count("save check: a checkpoint of ") == 1
    assert outcome.output.count(" beside the training in ") == 2
    assert not [path for path in folder.save_dir.iterdir() if "tmp" in path.name]
    assert (folder.save_dir / "latest").read_text() == "step-00000008\n"


def limit_files(started: Started, size: int) -> None:
    """No process of the run can make a file larger than `size` any more."""
    for process in psutil.Process(started.process.pid).children(recursive=True):
        _, hard = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, hard))


@pytest.mark.parametrize(
    "interval", ["1", pytest.param("1000000", marks=pytest.mark.full, id="save_now")]
)
def test_a_disk_that_fills_up_ends_the_run_at_the_next_step(
    interval: str, flags: list[str], tmp_path: Path
) -> None:
    folder = Folder(tmp_path)
    command = [*flags, "-p", "zero2", "-b", "8", "--num_epochs", "100", "-i", interval]
    arguments = folder.arguments(*command, "--async_save", "--keep_last", "2")
    with start("pretrain.py", arguments, folder.log("run"), processes=2) as started:
        started.wait_until(lambda: len(folder.records) >= 2)
        (folder.save_dir / "save_now").touch()
        started.wait_until(lambda: step_directories(folder.save_dir))
        limit_files(started, 2**17)
        (folder.save_dir / "save_now").touch()
        outcome = started.wait()
    assert outcome.code == 1
    assert outcome.output.count("--async_save: checkpoint ") >= 2, outcome.output
    assert "File too large" in outcome.output
    assert "Older checkpoints are untouched." in outcome.output
    assert 'saving.py", line' not in outcome.output, "a traceback of ours; torchrun adds its own"
    complete = step_directories(folder.save_dir)
    assert complete and [checkpoint_problems(path) for path in complete] == [[]] * len(complete)
    assert not list(folder.save_dir.glob("*.tmp"))
    newest = int(complete[0].name.removeprefix("step-"))
    assert len(folder.records) > newest


@pytest.mark.full
@pytest.mark.parametrize("layout", ["-p gemini -b 16", "-p hybrid_parallel --pp 2 -b 32"])
def test_killed_while_it_is_written(layout: str, flags: list[str], tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    command = [*flags, *layout.split(), "--num_epochs", "100", "-i", "3", "--async_save"]

    def unfinished() -> list[Path]:
        return list(folder.save_dir.glob("step-*.tmp"))

    arguments = folder.arguments(*command)
    with start("pretrain.py", arguments, folder.log("first"), processes=2) as started:
        started.wait_until(lambda: len(step_directories(folder.save_dir)) >= 2)
        while True:
            started.wait_until(unfinished)
            started.signal_all(signal.SIGSTOP)
            if unfinished():
                break
            started.signal_all(signal.SIGCONT)
        started.kill()
    complete = step_directories(folder.save_dir)
    assert [checkpoint_problems(checkpoint) for checkpoint in complete] == [[]] * len(complete)
    last = int(complete[0].name.removeprefix("step-")) + 3
    again = folder.arguments(*command, "--max_steps", str(last), "--load", "auto")
    outcome = run("pretrain.py", again, folder.log("second"), processes=2)
    assert outcome.code == 0, outcome.output
    assert f"resumed {complete[0]}" in outcome.output
    assert not unfinished()
    assert [record["step"] for record in folder.records] == list(range(1, last + 1))


@pytest.mark.full
def test_a_signal_waits_for_what_is_under_way(flags: list[str], tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    command = [*flags, "-b", "16", "--num_epochs", "100", "-i", "2", "--async_save"]
    with start("pretrain.py", folder.arguments(*command), folder.log("run")) as started:
        started.wait_until(lambda: list(folder.save_dir.glob("step-*.tmp")))
        started.send(signal.SIGTERM)
        outcome = started.wait()
    assert outcome.code == 128 + signal.SIGTERM, outcome.output
    complete = step_directories(folder.save_dir)
    assert complete[0] == step_directory(folder.save_dir, len(folder.records))
    assert len(complete) >= 2, "the one under way was lost"
    assert [checkpoint_problems(checkpoint) for checkpoint in complete] == [[]] * len(complete)
    assert not list(folder.save_dir.glob("*.tmp"))


@pytest.mark.parametrize("async_save", [[], pytest.param(["--async_save"], marks=pytest.mark.full)])
def test_a_disk_without_room_is_found_after_the_first_step(
    async_save: list[str], flags: list[str], small_disk: Path, tmp_path: Path
) -> None:
    with (small_disk / "others").open("wb") as file:
        file.write(bytes(3 * 2**20))
        os.fsync(file.fileno())
    command = ["-b", "8", "-i", "1000", "--max_steps", "1000", "--save_check", *async_save]
    arguments = [*flags, *command, "-o", str(small_disk), "-t", str(tmp_path / "tb")]
    begin = time.monotonic()
    outcome = run("pretrain.py", arguments, tmp_path / "run.txt")
    assert outcome.code == 1, outcome.output
    last = outcome.output.strip().splitlines()[-1]
    assert last.startswith("--save_check: ") and "free, a checkpoint needs about" in last
    assert "--no-save_check" in last and "Traceback" not in outcome.output
    assert time.monotonic() - begin < 300
    assert step_directories(small_disk) == [] and not list(small_disk.glob("*.tmp"))
