"""One host: every way to start pretrain.py trains, and says no in the same way."""

from pathlib import Path

import pytest

from tests.cluster.launchers import (
    ROOT,
    SEARCH_PATH,
    checkpoint_problems,
    free_port,
    losses,
    run_here,
    tiny_run,
)

pytestmark = pytest.mark.distributed

TORCHRUN = ["torchrun", "--standalone", "--nproc_per_node", "2"]


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


def colossalai_run() -> list[str]:
    return ["colossalai", "run", "--nproc_per_node", "2", "--master_port", free_port()]


def test_python_alone_is_one_process(tmp_path, cache_dir):
    outcome = run_here(["python", *tiny_run(tmp_path, cache_dir)], tmp_path)
    assert outcome.code == 0, outcome.said
    assert "1 process(es) = dp 1" in outcome.said
    assert len(losses(tmp_path)) == 4
    assert not checkpoint_problems(tmp_path)


def test_torchrun_prepares_the_data_once(tmp_path):
    """Both processes find the same empty cache; the one without the lock waits."""
    cache_dir = tmp_path / "cache"
    outcome = run_here([*TORCHRUN, *tiny_run(tmp_path, cache_dir)], tmp_path)
    assert outcome.code == 0, outcome.said
    assert "2 process(es) = dp 2" in outcome.said
    assert outcome.said.count("prepared ") == 1
    assert len(list((cache_dir / "prepared").iterdir())) == 1
    assert len(losses(tmp_path)) == 4
    assert not checkpoint_problems(tmp_path)


@pytest.mark.full
def test_colossalai_run_on_one_host(tmp_path, cache_dir):
    """Its launcher joins the arguments for a shell: what holds a space is quoted twice."""
    folder = tmp_path / "with space"
    folder.mkdir()
    run = [f"'{word}'" if " " in word else word for word in tiny_run(folder, cache_dir)]
    outcome = run_here([*colossalai_run(), *run], tmp_path)
    assert outcome.code == 0, outcome.said
    assert "2 process(es) = dp 2" in outcome.said
    assert len(losses(folder)) == 4
    assert not checkpoint_problems(folder)


@pytest.mark.full
def test_colossalai_run_with_the_environment_as_documented(tmp_path, cache_dir):
    """A variable whose name no shell accepts stops the launcher; `env -i` keeps it away."""
    launcher = colossalai_run()
    run = tiny_run(tmp_path, cache_dir)
    hostile = {"no-shell-takes-this": "1"}
    assert run_here([*launcher, *run], tmp_path, **hostile).code == 1
    clean = ["env", "-i", f"PATH={SEARCH_PATH}", f"HOME={tmp_path}"]
    outcome = run_here([*clean, *launcher, *run], tmp_path, **hostile)
    assert outcome.code == 0, outcome.said


MISFITS = [
    pytest.param(
        ["-p", "hybrid_parallel", "--tp", "3"],
        [
            "--tp 3 does not divide the model's 8 attention heads and 4 key-value heads; "
            "valid values: [1, 2, 4].",
            "2 process(es) cannot be divided into groups of tp 3 x pp 1 x sp 1 = 3;",
        ],
        id="heads and processes",
    ),
    pytest.param(
        ["-p", "hybrid_parallel", "--pp", "5"],
        ["--pp 5 is more than the model's 4 layers; valid values: 1 to 4."],
        id="layers",
        marks=pytest.mark.full,
    ),
    pytest.param(
        ["-p", "hybrid_parallel", "--sp_mode", "all_to_all", "--sp", "8"],
        ["--sp 8 does not divide", "groups of tp 1 x pp 1 x sp 8 = 8;"],
        id="sequence parallel",
        marks=pytest.mark.full,
    ),
    pytest.param(
        ["-p", "hybrid_parallel", "--pp", "2", "-b", "6", "--microbatch_size", "4"],
        ["--batch_size 6 is not divisible by --microbatch_size 4; valid values: [1, 2, 3, 6]."],
        id="batch",
        marks=pytest.mark.full,
    ),
    pytest.param(
        ["--global_batch_tokens", "300"],
        ["--global_batch_tokens 300 is not a multiple of", "nearest valid: 256 or 512."],
        id="global batch",
        marks=pytest.mark.full,
    ),
]


@pytest.mark.parametrize(("flags", "messages"), MISFITS)
def test_a_world_size_that_does_not_fit_is_refused(tmp_path, cache_dir, flags, messages):
    outcome = run_here([*TORCHRUN, *tiny_run(tmp_path, cache_dir), *flags], tmp_path)
    assert outcome.code == 1, outcome.said
    said, report = outcome.said.split("Root Cause")
    for message in messages:
        assert said.count(message) == report.count(message) == 1, outcome.said
    assert "exitcode  : 2" in outcome.said, "torchrun's report names the code of the process"
    assert 'pretrain.py", line' not in outcome.said, "a traceback of ours"
    assert not (tmp_path / "checkpoint").exists()


LATE_FIRST_PROCESS = """
import os, time
from llama_lib import cli
from llama_lib.errors import UserError

def main(argv):
    time.sleep(5 if os.environ["RANK"] == "0" else 0)
    raise UserError("what is wrong")

cli.run(main)
"""


def test_a_late_first_process_still_speaks_for_all(tmp_path):
    """Regression: on a busy host a mistake was reported twice, once by each process."""
    script = tmp_path / "late.py"
    script.write_text(LATE_FIRST_PROCESS)
    outcome = run_here([*TORCHRUN, str(script)], tmp_path, PYTHONPATH=str(ROOT))
    assert outcome.code == 1
    said, report = outcome.said.split("Root Cause")
    assert said.count("what is wrong") == report.count("what is wrong") == 1, outcome.said


@pytest.mark.full
@pytest.mark.parametrize("launcher", ["python", "colossalai run"])
def test_other_launchers_refuse_too(tmp_path, cache_dir, launcher):
    start = ["python"] if launcher == "python" else colossalai_run()
    flags = ["-p", "hybrid_parallel", "--tp", "4"]
    outcome = run_here([*start, *tiny_run(tmp_path, cache_dir), *flags], tmp_path)
    assert outcome.code == (2 if launcher == "python" else 1)
    assert outcome.said.count("valid numbers of processes are multiples of 4") == 1
