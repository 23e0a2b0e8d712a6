"""The benchmark scripts for real: each measures a tiny model on this machine, one on two hosts.

One case on this machine is part of every test run, the others of the full one.

What they ask for at full size is tested in tests/test_scripts.py.
"""

import re
import shutil
from pathlib import Path

import pytest

from llama_lib.result_file import Result, read
from tests.cluster import hosts
from tests.cluster.hosts import NAMES, Cluster
from tests.cluster.launchers import ROOT, Outcome, free_port, run_here

pytestmark = pytest.mark.distributed

# The rows of a step are as many as two stages of one micro-batch of two rows need.
TINY = ["-c", "tiny", "-l", "64", "-b", "4", "--num_steps", "3", "--ignore_steps", "1"]

# script: (processes, what it needs to fit them, the layout that must come of it)
RUNS = {
    "gemini": (2, "", "gemini: 2 process(es) = dp 2, tp 1, pp 1"),
    "gemini_auto": (2, "", "gemini_auto: 2 process(es) = dp 2, tp 1, pp 1"),
    "zero2": (2, "", "zero2: 2 process(es) = dp 2, tp 1, pp 1"),
    "zero2_cpu": (2, "", "zero2_cpu: 2 process(es) = dp 2, tp 1, pp 1"),
    "hybrid_parallel": (2, "--tp 2", "hybrid_parallel: 2 process(es) = dp 1, tp 2, pp 1"),
    "3d": (4, "--tp 2", "hybrid_parallel: 4 process(es) = dp 1, tp 2, pp 2"),
}
QUICK = "benchmark_7B/zero2.sh"
SCRIPTS = [f"benchmark_{size}/{name}.sh" for size in ("7B", "70B") for name in RUNS]
CASES = [
    pytest.param(script, marks=() if script == QUICK else pytest.mark.full) for script in SCRIPTS
]

# The line that ColossalAI's examples/language/llama2/benchmark.py ends with.
FINAL = r"max memory usage:  [\d.]+ MB, throughput:  [\d.]+ samples/s, TFLOPS/GPU:  [\d.]+"


def places(folder: Path) -> list[str]:
    """Options that keep all a run writes in `folder`."""
    return [
        *("--output", str(folder / "result.json")),
        *("-o", str(folder / "checkpoint"), "-t", str(folder / "tb_logs")),
    ]


def measure(folder: Path, script: str, *extra: str, **variables: str) -> Outcome:
    """Run a script of the project on this machine to its end."""
    command = ["bash", str(ROOT / "scripts" / script), *TINY, *places(folder), *extra]
    return run_here(command, folder, HOSTFILE="", MASTER_PORT=free_port(), **variables)


def result_of(outcome: Outcome, folder: Path) -> Result:
    assert outcome.code == 0, outcome.said
    assert re.fullmatch(FINAL, outcome.said.rstrip().splitlines()[-1]), outcome.said
    return read(folder / "result.json")


@pytest.mark.parametrize("script", CASES)
def test_every_script_measures(tmp_path: Path, script: str):
    processes, fit, layout = RUNS[Path(script).stem]
    outcome = measure(tmp_path, script, *fit.split(), NPROC=str(processes))
    result = result_of(outcome, tmp_path)
    assert result.layout.startswith(layout)
    assert result.hardware.count == processes
    assert (result.model.name, result.sequence, result.recompute) == ("tiny", 64, "full")
    assert len(result.steps.seconds) == 2
    assert f"this host alone, {processes} process(es)" in outcome.said


@pytest.mark.full
def test_a_pipeline_that_is_not_interleaved(tmp_path: Path):
    script = "benchmark_7B/3d.sh"
    outcome = measure(tmp_path, script, "--tp", "1", NPROC="2", PP_STYLE="1f1b")
    result = result_of(outcome, tmp_path)
    assert result.options["parallel"]["pp_style"] == "1f1b"
    assert result.options["parallel"]["pp"] == 2


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project folder whose scripts may have a hosts.txt beside them."""
    folder = tmp_path / "a project"
    shutil.copytree(ROOT / "scripts", folder / "scripts")
    for name in ("benchmark.py", "llama_lib"):
        (folder / name).symlink_to(ROOT / name)
    return folder


@pytest.fixture
def cluster(tmp_path: Path):
    if reason := hosts.missing():
        pytest.skip(reason)
    (tmp_path / "cluster").mkdir()
    with Cluster(tmp_path / "cluster") as cluster:
        yield cluster


@pytest.mark.full
def test_two_hosts_of_a_file_beside_the_script(tmp_path: Path, project: Path, cluster: Cluster):
    """Started on one, with a blank in the path, ssh to the other; measured once for both."""
    script = project / "scripts" / "benchmark_7B" / "zero2.sh"
    (script.parent / "hosts.txt").write_text("\n".join(NAMES))
    command = ["bash", str(script), *TINY, *places(tmp_path / "the run")]
    outcome = cluster.run(command, NPROC="1")
    assert f"the hosts of {script.parent / 'hosts.txt'}, on each 1 process(es)" in outcome.said
    result = result_of(outcome, tmp_path / "the run")
    assert result.layout.startswith("zero2: 2 process(es) = dp 2")
    assert result.hardware.count == 2
    assert outcome.said.count("max memory usage:") == 1, "one rank speaks"
    # A mistake is not success, whatever host meets it.
    refused = cluster.run([*command, "--tp", "2"], NPROC="1")
    assert refused.code == 2, refused.said
    assert refused.said.count("--tp 2 needs -p hybrid_parallel") == 1, refused.said
    # Without GPUs nobody knows how many processes are meant.
    unsaid = cluster.run(command)
    assert unsaid.code == 2, unsaid.said
    assert "does not follow from the GPUs of the hosts (node1 0, node2 0)" in unsaid.said
