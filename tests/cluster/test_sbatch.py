"""The batch script of Slurm: what it starts, and what it does when it is asked to end.

Slurm's programs are fakes (tests/cluster/slurm.py). The first cases train with the real torchrun;
the others have one in its place that ends as a case wants it to.
"""

import json
import shutil
import signal
import time
from pathlib import Path

import pytest

from tests.cluster.launchers import ROOT, losses, run_here
from tests.cluster.slurm import JOB, NOT_PREEMPTED, Slurm, interrupt

pytestmark = pytest.mark.distributed

STEPS = 40
SHORT = ["-c", "tiny", "-d", "sample", "-l", "64", "-b", "2", "-s", "2", "--log_interval", "1"]


@pytest.fixture
def slurm(tmp_path: Path) -> Slurm:
    return Slurm(tmp_path / "slurm")


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


def run_of(folder: Path, cache_dir: Path) -> list[str]:
    """pretrain.py and its arguments; the save_dir stands in a file."""
    folder.mkdir()
    spec = folder / "its specs.yaml"
    spec.write_text(f"save_dir: {folder / 'checkpoint'}\nmax_steps: {STEPS}\n")
    places = ["--cache_dir", str(cache_dir), "-t", str(folder / "tb_logs")]
    return ["pretrain.py", "--spec_file", str(spec), *SHORT, *places]


def logged(folder: Path) -> int:
    path = folder / "tb_logs" / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def interrupted_and_continued(
    slurm: Slurm, folder: Path, cache_dir: Path, times: int, *options: str, **variables: str
) -> str:
    """Time runs out in mid-run, so many times; the losses are those of a run that had the time."""
    words = run_of(folder / "a run", cache_dir)
    save_dir = folder / "a run" / "checkpoint"
    for start in range(times):
        steps = logged(folder / "a run")
        job = slurm.submit(*words, options=options, start=start, **variables)
        interrupt(job, lambda steps=steps: logged(folder / "a run") > steps + 2)
        outcome = slurm.end(job)
        assert outcome.code == 0, outcome.said
        assert slurm.requeued() == start + 1, outcome.said
        saved = int((save_dir / "latest").read_text().strip().removeprefix("step-"))
        assert steps < saved < STEPS
        assert f"step {saved} of {STEPS} is saved; back into the queue" in outcome.said
        assert not (save_dir / "save_and_exit").exists()
    outcome = slurm.end(slurm.submit(*words, options=options, start=times, **variables))
    assert outcome.code == 0, outcome.said
    assert slurm.requeued() == times
    assert f"job {JOB}, start {times + 1}:" in outcome.said
    assert (save_dir / "latest").read_text() == f"step-{STEPS:08d}\n"

    alone = run_of(folder / "undisturbed", cache_dir)
    torchrun = ["torchrun", "--standalone", "--nproc_per_node", "2"]
    undisturbed = run_here([*torchrun, *alone], folder, OMP_NUM_THREADS="1")
    assert undisturbed.code == 0, undisturbed.said
    assert losses(folder / "a run") == losses(folder / "undisturbed")
    assert len(losses(folder / "a run")) == STEPS
    return outcome.said


@pytest.mark.full
def test_a_job_without_time_saves_goes_back_and_ends_as_if_nothing_had_been(
    tmp_path: Path, slurm: Slurm, cache_dir: Path
):
    options = ("--gpus-per-node", "h200:2", "--time", "00:10:00")
    said = interrupted_and_continued(slurm, tmp_path, cache_dir, 1, *options)
    port = 10000 + int(JOB)
    assert f"1 node(s), 2 process(es) on each, meeting at localhost:{port}" in said


@pytest.mark.full
def test_two_nodes_in_a_container(tmp_path: Path, slurm: Slurm, cache_dir: Path):
    image = tmp_path / "an image.sif"
    image.touch()
    options = ("--nodes", "2", "--gpus-per-node", "1")
    given = {"LLAMA_IMAGE": str(image), "OMP_NUM_THREADS": "1"}
    said = interrupted_and_continued(slurm, tmp_path, cache_dir, 2, *options, **given)
    assert "2 node(s), 1 process(es) on each" in said
    started = [record for record in slurm.contained() if record["command"][0] == "bash"]
    assert len(started) == 6  # two tasks of three starts
    for record in started:
        assert record["image"] == str(image)
        assert record["binds"] == [str(ROOT), str(tmp_path / "a run" / "checkpoint")]


# -- a torchrun that ends as it is told ------------------------------------------------------------

TORCHRUN = """
import json, os, signal, sys, time
from pathlib import Path

folder, save_dir = Path(os.environ["FAKE_FOLDER"]), Path(os.environ["FAKE_SAVE_DIR"])
say = {"argv": sys.argv[1:], "threads": os.environ["OMP_NUM_THREADS"], "cwd": os.getcwd()}
(folder / "torchrun.json").write_text(json.dumps(say))
request = save_dir / "save_and_exit"
left_over = request.exists()
deadline = time.monotonic() + 60
(folder / "ready").touch()
while os.environ["FAKE_WAIT"] == "yes" and not request.exists():
    assert time.monotonic() < deadline
    time.sleep(0.02)
if os.environ["FAKE_TAKES"] == "yes":
    request.unlink()
(folder / "saving").touch()
time.sleep(float(os.environ["FAKE_SAVES_FOR"]))
step, last = map(int, os.environ["FAKE_STEP"].split("/"))
if step:
    (save_dir / "step-00000005").mkdir()
    state = {"step": step, "schedule": {"num_steps": last}}
    (save_dir / "step-00000005" / "trainer_state.json").write_text(json.dumps(state))
    (save_dir / "latest").write_text("step-00000005\\n")
sys.exit(99 if left_over else int(os.environ["FAKE_CODE"]))
"""


class Job:
    """Runs pretrain.py with `TORCHRUN`; `save_dir` is where it is told to save."""

    def __init__(self, slurm: Slurm, folder: Path) -> None:
        self.slurm, self.save_dir = slurm, folder / "the run"
        slurm.program("torchrun", TORCHRUN)

    def variables(self, **changed: str) -> dict[str, str]:
        usual = {"WAIT": "no", "TAKES": "no", "SAVES_FOR": "0", "STEP": "0/0", "CODE": "0"}
        fakes = {f"FAKE_{name}": value for name, value in usual.items()}
        return {**fakes, "FAKE_SAVE_DIR": str(self.save_dir), **changed}

    def start(self, *words: str, options: tuple[str, ...] = (), **changed: str):
        words = words or ("pretrain.py", "-c", "tiny")
        given = [*words, "-o", str(self.save_dir)]
        return self.slurm.submit(*given, options=options, **self.variables(**changed))

    def signalled(self, number: int, **changed: str):
        """The end of a run that was asked to end once it had begun."""
        job = self.start(FAKE_WAIT="yes", **changed)
        interrupt(job, (self.slurm.folder / "ready").exists, number)
        return self.slurm.end(job)

    def run(self, *words: str, options: tuple[str, ...] = (), **changed: str):
        return self.slurm.end(self.start(*words, options=options, **changed))

    def refused(self, *words: str, **changed: str) -> str:
        outcome = self.slurm.end(self.slurm.submit(*words, **self.variables(**changed)))
        assert outcome.code == 2, outcome.said
        assert not (self.slurm.folder / "ready").exists(), "it was started all the same"
        return outcome.said

    def torchrun(self) -> dict[str, object]:
        return json.loads((self.slurm.folder / "torchrun.json").read_text())


@pytest.fixture
def job(slurm: Slurm, tmp_path: Path) -> Job:
    return Job(slurm, tmp_path)


def test_it_is_put_back_only_where_its_own_request_left_steps_to_do(job: Job):
    outcome = job.signalled(signal.SIGUSR1, FAKE_TAKES="yes", FAKE_STEP="5/10")
    assert (outcome.code, job.slurm.requeued()) == (0, 1)
    assert f"USR1: asking the run to save and end ({job.save_dir}/save_and_exit)" in outcome.said


@pytest.mark.parametrize(
    ("number", "how", "code"),
    [
        pytest.param(signal.SIGUSR1, {"TAKES": "yes", "STEP": "10/10"}, 0, id="at the last step"),
        pytest.param(signal.SIGUSR1, {"STEP": "5/10"}, 0, id="ended without the request"),
        pytest.param(signal.SIGUSR1, {"TAKES": "yes", "CODE": "1"}, 1, id="failed to save"),
        pytest.param(signal.SIGUSR1, {"TAKES": "yes"}, 1, id="saved nothing"),
        pytest.param(signal.SIGTERM, {"TAKES": "yes", "STEP": "5/10"}, 0, id="cancelled"),
        pytest.param(signal.SIGTERM, {"CODE": "143"}, 143, id="cancelled, ended by the signal"),
    ],
)
def test_otherwise_it_ends(job: Job, number: int, how: dict[str, str], code: int):
    changed = {f"FAKE_{name}": value for name, value in how.items()}
    outcome = job.signalled(number, **changed)
    assert (outcome.code, job.slurm.requeued()) == (code, 0), outcome.said
    assert not (job.save_dir / "save_and_exit").exists(), "it would end the next start"


def test_signals_in_a_row_do_not_hide_the_end_of_the_run(job: Job):
    """Each ends the batch shell's `wait`; the last ones come while the run is saving."""
    how = {"FAKE_TAKES": "yes", "FAKE_SAVES_FOR": "2", "FAKE_CODE": "3"}
    process = job.start(FAKE_WAIT="yes", **how)
    interrupt(process, (job.slurm.folder / "ready").exists)
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR1):
        interrupt(process, (job.slurm.folder / "saving").exists, number)
        time.sleep(0.2)
    outcome = job.slurm.end(process)
    assert (outcome.code, job.slurm.requeued()) == (3, 0), outcome.said


@pytest.mark.parametrize("code", [1, 3, 137])
def test_the_exit_code_is_the_runs(job: Job, code: int):
    outcome = job.run(FAKE_CODE=str(code), FAKE_STEP="5/10")
    assert (outcome.code, job.slurm.requeued()) == (code, 0)
    assert f"the run ended with {code}" in outcome.said


def test_preempted_within_its_grace_time_it_is_put_back(job: Job):
    """Slurm signals the tasks first; one that ends in time counts as ended."""
    state = NOT_PREEMPTED.replace("PreemptTime=None", "PreemptTime=2026-01-02T09:04:05")
    outcome = job.run(FAKE_CODE="143", FAKE_STATE=state)
    assert (outcome.code, job.slurm.requeued()) == (0, 1), outcome.said


@pytest.mark.parametrize("when", ["None", "2026-01-01T09:04:05"])
def test_not_preempted_in_this_start_it_is_not(job: Job, when: str):
    state = NOT_PREEMPTED.replace("PreemptTime=None", f"PreemptTime={when}")
    outcome = job.run(FAKE_CODE="143", FAKE_STATE=state)
    assert (outcome.code, job.slurm.requeued()) == (143, 0), outcome.said


def test_a_queue_that_does_not_take_it_back_is_a_failure(job: Job):
    how = {"FAKE_TAKES": "yes", "FAKE_STEP": "5/10", "FAKE_REQUEUE": "1"}
    outcome = job.signalled(signal.SIGUSR1, **how)
    assert outcome.code == 1
    assert f"Slurm did not take job {JOB} back; submit the same command again" in outcome.said


def test_a_request_left_by_an_earlier_start_does_not_end_this_one(job: Job):
    job.save_dir.mkdir()
    (job.save_dir / "save_and_exit").touch()
    outcome = job.run()
    assert outcome.code == 0, outcome.said
    assert (job.save_dir / "logs").is_dir()


# -- what is started -------------------------------------------------------------------------------


def test_torchruns_words(job: Job):
    awkward = ["--tokenizer", "two words", "--model_path", "it's $HOME `id` *;\\"]
    outcome = job.run("pretrain.py", *awkward, options=("--gpus-per-node", "4"))
    assert outcome.code == 0, outcome.said
    started = job.torchrun()
    assert started["argv"] == [
        *("--node_rank", "0", "--nnodes", "1", "--nproc_per_node", "4"),
        *("--master_addr", "localhost", "--master_port", str(10000 + int(JOB)), "pretrain.py"),
        *(*awkward, "-o", str(job.save_dir), "--load", "auto"),
    ]
    assert (started["threads"], started["cwd"]) == ("1", str(ROOT))


def test_older_slurm_says_what_was_asked_for_alone(job: Job):
    options = ("--gpus-per-node", "h200:3")
    assert job.run(options=options, SLURM_GPUS_ON_NODE="").code == 0
    words = job.torchrun()["argv"]
    assert words[words.index("--nproc_per_node") + 1] == "3"


def test_processes_port_and_threads_can_be_given(job: Job):
    outcome = job.run(NPROC="3", MASTER_PORT="31000", OMP_NUM_THREADS="7")
    assert outcome.code == 0, outcome.said
    words = job.torchrun()["argv"]
    assert words[words.index("--nproc_per_node") + 1] == "3"
    assert words[words.index("--master_port") + 1] == "31000"
    assert job.torchrun()["threads"] == "7"


def test_another_checkpoint_to_start_from_counts_until_the_run_has_one(job: Job):
    words = ("pretrain.py", "--load", "/other/step-00000100")
    assert job.run(*words).code == 0
    assert "auto" not in job.torchrun()["argv"]
    (job.save_dir / "step-00000005").mkdir()
    assert job.run(*words).code == 0
    assert job.torchrun()["argv"][-2:] == ["--load", "auto"]


def test_a_measurement_is_neither_continued_nor_ended(job: Job):
    words = ("benchmark.py", "-c", "tiny")
    process = job.start(*words, FAKE_WAIT="yes", FAKE_TAKES="yes")
    interrupt(process, (job.slurm.folder / "ready").exists)
    (job.save_dir / "save_and_exit").touch()  # by hand
    outcome = job.slurm.end(process)
    assert (outcome.code, job.slurm.requeued()) == (0, 0)
    assert "asking the run" not in outcome.said
    assert "--load" not in job.torchrun()["argv"]


def test_mistakes_are_found_before_anything_starts(job: Job, tmp_path: Path):
    said = job.refused("pretrain.py", "--learning_rat", "3")
    assert "learning_rat" in said
    assert "no script given" in job.refused()
    assert "no such file; expected pretrain.py" in job.refused("train.py")
    assert "got 'Makefile', expected one of pretrain.py" in job.refused("Makefile")
    assert "nothing to train: usage:" in job.refused("pretrain.py", "--help")
    assert "has no llama_lib; submit from" in job.refused("pretrain.py", LLAMA_PROJECT="/etc")
    assert "LLAMA_IMAGE: no such file" in job.refused("pretrain.py", LLAMA_IMAGE="/no/image.sif")
    assert "started by every task" in job.refused("pretrain.py", SLURM_PROCID="1")
    assert "no GPU was given to this job" in job.refused(
        "pretrain.py", "-o", str(tmp_path / "x"), NPROC="0"
    )


def test_a_job_without_gpus_is_told_so(job: Job):
    outcome = job.run(options=("--gpus-per-node", "0"))
    assert outcome.code == 2
    assert "no GPU was given to this job (got '0'); submit with --gpus-per-node N" in outcome.said


def test_outside_slurm_it_says_how_to_submit_it(tmp_path: Path):
    outcome = run_here(["bash", "scripts/slurm/train.sbatch", "pretrain.py"], tmp_path)
    assert outcome.code == 2
    expected = "submit it: sbatch scripts/slurm/train.sbatch pretrain.py"
    assert expected in outcome.said


def test_another_folder_than_the_projects(job: Job, tmp_path: Path):
    """The job's folder holds no script of that name: it is the project's."""
    project = tmp_path / "a project"
    project.mkdir()
    for name in ("llama_lib", "scripts", "benchmark.py"):
        (project / name).symlink_to(ROOT / name)
    shutil.copy(ROOT / "pretrain.py", project / "my_pretrain.py")
    said = job.refused("my_pretrain.py", LLAMA_PROJECT=str(project))
    assert "expected one of pretrain.py" in said
    (project / "my_pretrain.py").unlink()
    said = job.refused("my_pretrain.py", LLAMA_PROJECT=str(project))
    assert f"{project}/my_pretrain.py: no such file" in said
