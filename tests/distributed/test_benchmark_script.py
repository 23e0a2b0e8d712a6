"""benchmark.py as a user runs it, and the table that every script ends with."""

import math
import re
from dataclasses import asdict
from pathlib import Path

import pytest

from llama_lib import result_file
from llama_lib.checkpoint.manifest import step_directories
from llama_lib.flops import model_flops_per_token, tflops_per_gpu
from llama_lib.models import model_config as read_config
from llama_lib.result_file import Result
from tests.distributed.launching import Outcome, run

pytestmark = pytest.mark.distributed

STEPS, IGNORED, LENGTH = 14, 3, 32
TABLE = ["tokens/s/GPU", "samples/s", "step time", "model TFLOPS/GPU", "MFU", "max memory", "time"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("benchmark")


@pytest.fixture(scope="module")
def alone(folder: Path, model_config: Path) -> Outcome:
    """One process, random rows, nothing about folders said: everything lands in `folder`."""
    flags = f"-c {model_config} -p zero2 -l {LENGTH} --num_steps {STEPS} --ignore_steps {IGNORED}"
    flags += " --peak_tflops 0.5 --output out/alone.json"
    return run("benchmark.py", flags.split(), folder / "alone.txt")


@pytest.fixture(scope="module")
def together(folder: Path, alone: Outcome, flags: list[str]) -> Outcome:
    """Two processes in the same folder, on real data, with a checkpoint."""
    measured = f"--num_steps {STEPS} --ignore_steps {IGNORED} -i 100 --output out/together.json"
    return run(
        "benchmark.py",
        [*flags, "-p", "zero2", *measured.split(), "-t", str(folder / "tb")],
        folder / "together.txt",
        processes=2,
    )


def check(outcome: Outcome, path: Path, gpus: int) -> Result:
    """The result of a benchmark, whole and in agreement with itself and with the console."""
    assert outcome.code == 0, outcome.output
    result = result_file.read(path)
    seconds = result.steps.seconds
    assert (result.steps.run, result.steps.ignored) == (STEPS, IGNORED)
    assert len(seconds) == STEPS - IGNORED and all(each > 0 for each in seconds)
    assert result.tokens_per_step == 2 * LENGTH * gpus and result.rows_per_step == 2 * gpus

    rate = len(seconds) * result.tokens_per_step / sum(seconds)
    assert result.rates.tokens_per_second_per_gpu == pytest.approx(rate / gpus)
    assert result.rates.samples_per_second == pytest.approx(rate / LENGTH)
    config = read_config(result.model.name)
    model = tflops_per_gpu(model_flops_per_token(config, LENGTH), rate, gpus)
    assert result.tflops_per_gpu["model"] == pytest.approx(model)
    assert result.hardware.count == gpus and result.hardware.device == "cpu"
    assert result.memory_mb.allocated is None and result.memory_mb.host > 100

    shares = asdict(result.time_shares)
    assert math.fsum(shares.values()) == pytest.approx(1)
    assert all(share >= 0 for share in shares.values())
    assert min(shares["forward_backward"], shares["optimizer"], shares["data"]) > 0
    # Random or not, a model that has learnt nothing guesses among all ids.
    assert result.loss.first == pytest.approx(math.log(500), abs=0.3)

    lines = outcome.output.strip().splitlines()
    assert f"{rate / gpus:,.1f}" in next(line for line in lines if "tokens/s/GPU" in line)
    check_table(outcome)
    assert "next:" not in outcome.output and "Traceback" not in outcome.output
    return result


def check_table(outcome: Outcome) -> None:
    lines = outcome.output.strip().splitlines()
    labels = [line.strip().split("  ")[0] for line in lines]
    assert [label for label in labels if label in TABLE] == TABLE
    assert lines[-1].startswith("max memory usage:  ")
    shown = next(line for line in lines if line.strip().startswith("time "))
    percents = [float(number) for number in re.findall(r"([\d.]+)%", shown)]
    assert len(percents) == 6 and sum(percents) == pytest.approx(100)


def test_one_process_needs_nothing_and_leaves_a_log(alone: Outcome, folder: Path) -> None:
    result = check(alone, folder / "out" / "alone.json", gpus=1)
    assert result.data == "random"
    assert result.time_shares.communication == result.time_shares.save == 0
    assert result.peak == result_file.Peak(0.5, "given")
    assert result.mfu == pytest.approx(result.tflops_per_gpu["model"] / 0.5)
    assert "of 0.5 TFLOPS (given)" in alone.output
    assert "benchmark.py" in result.command and "--peak_tflops 0.5" in result.command
    assert step_directories(folder / "benchmark_run") == []
    assert {path.name for path in (folder / "benchmark_run").iterdir()} == {"logs", "specs.yaml"}


def test_two_processes_on_real_data_wait_for_each_other(
    alone: Outcome, together: Outcome, folder: Path, dataset: Path
) -> None:
    result = check(together, folder / "out" / "together.json", gpus=2)
    assert result.data == str(dataset)
    assert result.time_shares.communication > 0.01
    # The last step is saved, since checkpoints were asked for: in the folder of an earlier
    # benchmark, which had none.
    assert result.time_shares.save > 0
    (saved,) = step_directories(folder / "benchmark_run")
    assert saved.name == f"step-{STEPS:08}"
    assert (folder / "tb" / "metrics.jsonl").is_file()


def test_what_torch_waits_for_by_itself_is_not_called_communication(
    folder: Path, model_config: Path
) -> None:
    """DistributedDataParallel showed next to none of its waiting."""
    flags = f"-c {model_config} -p hybrid_parallel -x fp32 -l {LENGTH} --num_steps 6"
    outcome = run(
        "benchmark.py",
        [*flags.split(), "--ignore_steps", "2", "--output", "out/replicas.json"],
        folder / "replicas.txt",
        processes=2,
    )
    assert outcome.code == 0, outcome.output
    result = result_file.read(folder / "out" / "replicas.json")
    assert "zero 0" in result.layout and result.time_shares.communication is None
    assert "communication n/a" in outcome.output


def test_pretraining_ends_with_the_same_table(flags: list[str], tmp_path: Path) -> None:
    command = [*flags, "-p", "hybrid_parallel", "--max_steps", "4"]
    outcome = run("pretrain.py", command, tmp_path / "run.txt")
    assert outcome.code == 0, outcome.output
    check_table(outcome)
    assert "measured over 3 steps" in outcome.output and "few" not in outcome.output
    assert outcome.output.index("next:") < outcome.output.index("tokens/s/GPU  ")
