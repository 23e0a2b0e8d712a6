"""The scripts: what they start, with which options, on which hosts.

Each script really runs, with a `python` on PATH that only records how launch was called. The last
cases have the real one, which refuses what a host file must not have.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from llama_lib.config import Options, parse_options
from llama_lib.layout import layout_of, layout_problems, plan_batches
from llama_lib.models import model_config, model_shape
from llama_lib.option_tree import PLUGINS
from llama_lib.planner.hardware import known_gpu, machines
from llama_lib.planner.job import Job, job_of
from llama_lib.planner.memory import Memory, memory
from llama_lib.planner.search import Limits, fits, limits

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(ROOT.glob("scripts/benchmark_*/*.sh"))
GEMINI = "benchmark_7B/gemini.sh"

# Scripts first ask it whether this project's packages are there.
RECORDER = """#!{python}
import json, os, sys
if sys.argv[1:3] == ["-P", "-c"]:
    sys.exit(0)
record = {{"argv": sys.argv[1:], "cwd": os.getcwd(), "environment": dict(os.environ)}}
with open({path!r}, "w") as file:
    json.dump(record, file)
"""


@dataclass
class Start:
    """How a script called launch: `launcher` are the words before benchmark.py."""

    launcher: list[str]
    benchmark: str
    arguments: list[str]
    cwd: str
    environment: dict[str, str]
    said: str


@dataclass
class Runner:
    """Runs scripts in a copy of their folder, where hosts.txt may be put, with a recording python.

    `folder` is the copied project, `elsewhere` the folder the user is in.
    """

    folder: Path
    elsewhere: Path
    commands: Path
    record: Path

    def end(
        self, script: str, *arguments: str, **variables: str
    ) -> "subprocess.CompletedProcess[str]":
        """Run a script to its end; the environment is the given variables and little more."""
        self.record.unlink(missing_ok=True)
        search = f"{self.commands}:/usr/bin:/bin"
        return subprocess.run(
            ["bash", str(self.folder / "scripts" / script), *arguments],
            cwd=self.elsewhere,
            env={"PATH": search, "HOME": str(self.elsewhere), "VIRTUAL_ENV": "mine", **variables},
            capture_output=True,
            text=True,
            timeout=60,
        )

    def started(self, script: str, *arguments: str, **variables: str) -> Start:
        done = self.end(script, *arguments, **variables)
        assert done.returncode == 0, done.stderr
        found = json.loads(self.record.read_text())
        assert found["argv"][:4] == ["-P", "-m", "llama_lib", "launch"]
        words = found["argv"][4:]
        at = next(index for index, word in enumerate(words) if "benchmark.py" in word)
        return Start(
            words[:at],
            words[at],
            words[at + 1 :],
            found["cwd"],
            found["environment"],
            done.stdout + done.stderr,
        )

    def refused(self, script: str, *arguments: str, **variables: str) -> str:
        """The message of a script that ends with 2 and starts nothing."""
        done = self.end(script, *arguments, **variables)
        assert done.returncode == 2, done.stdout + done.stderr
        assert not self.record.exists(), "it was started all the same"
        return done.stderr

    def executable(self, name: str, text: str) -> None:
        path = self.commands / name
        path.write_text(text)
        path.chmod(0o755)


@pytest.fixture
def runner(tmp_path: Path) -> Iterator[Runner]:
    made = Runner(
        tmp_path / "a project", tmp_path / "else where", tmp_path / "bin", tmp_path / "record.json"
    )
    shutil.copytree(ROOT / "scripts", made.folder / "scripts")
    for folder in (made.elsewhere, made.commands):
        folder.mkdir()
    made.executable("python", RECORDER.format(python=sys.executable, path=str(made.record)))
    yield made


def value(words: list[str], flag: str) -> str:
    return words[words.index(flag) + 1]


def options_of(start: Start) -> Options:
    return parse_options("benchmark", start.arguments)


# -- what each script asks for ---------------------------------------------------------------------


def test_there_is_one_script_per_plugin_and_one_in_three_dimensions():
    expected = {*PLUGINS, "3d"}
    for size in ("7B", "70B"):
        found = {path.stem for path in SCRIPTS if path.parent.name == f"benchmark_{size}"}
        assert found == expected
    assert len(SCRIPTS) == 2 * len(expected)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_script_asks_for_a_run_that_is_possible(runner: Runner, path: Path):
    """The real parser, the real model's shape and the real checks, on 8 GPUs and on 32."""
    start = runner.started(f"{path.parent.name}/{path.name}", NPROC="8")
    options = options_of(start)
    size = path.parent.name.removeprefix("benchmark_").lower()
    assert options.model.config == size
    assert options.parallel.plugin == ("hybrid_parallel" if path.stem == "3d" else path.stem)
    assert options.training.mixed_precision == "bf16"
    assert options.recompute == "full"
    config = model_config(size)
    for processes in (8, 32):
        assert layout_problems(options, processes, config) == []
        layout = layout_of(options, processes)
        # Raises where the rows of a step cannot be cut for the layout.
        plan_batches(options, layout, options.model.max_length, total_rows=10**6)
    assert (options.parallel.tp > 1) == (path.stem in ("3d", "hybrid_parallel"))
    assert (options.parallel.pp > 1) == (path.stem == "3d")


def plan_of(runner: Runner, path: Path, *extra: str) -> tuple[Job, Memory]:
    """What the planner says of a script's run on 32 GPUs."""
    options = options_of(runner.started(f"{path.parent.name}/{path.name}", *extra))
    job = job_of(options, model_shape(options.model.config), world_size=32, gpus_per_host=8)
    return job, memory(job)


def room_of(gpu: str) -> Limits:
    card = known_gpu(gpu)
    assert card is not None
    return limits(machines(card, gpus_per_host=8), host_bytes=None)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_script_fits_gpus_of_80_gb_or_says_what_it_needs(runner: Runner, path: Path):
    """By the planner, on 32 GPUs."""
    job, need = plan_of(runner, path)
    assert fits(job, need, room_of("a100-80gb")) == ("By the plan it needs" not in path.read_text())


@pytest.mark.parametrize("name", ["zero2", "zero2_cpu"])
def test_what_a_script_says_it_needs_is_what_the_plan_says(runner: Runner, name: str):
    path = ROOT / "scripts" / "benchmark_70B" / f"{name}.sh"
    # Without the line breaks of the comment.
    text = path.read_text().replace("\n# ", " ")
    found = re.search(r"needs about ([\d,]+) MB on each of 32 GPUs", text)
    assert found
    job, need = plan_of(runner, path)
    assert int(found[1].replace(",", "")) == pytest.approx(need.device_total / 2**20, rel=0.02)
    assert "a B200 has that, an H200" in text
    assert fits(job, need, room_of("b200")) and not fits(job, need, room_of("h200"))
    if found := re.search(r"with --accumulation_steps about ([\d,]+) MB", text):
        job, need = plan_of(runner, path, "--accumulation_steps", "2")
        assert int(found[1].replace(",", "")) == pytest.approx(need.device_total / 2**20, rel=0.02)
        assert fits(job, need, room_of("b200"))


@pytest.mark.parametrize("size", ["7B", "70B"])
def test_gemini_auto_keeps_the_optimizer_state_on_the_host(runner: Runner, size: str):
    """As its comment says; of the weights what the GPUs have no room for."""
    path = ROOT / "scripts" / f"benchmark_{size}" / "gemini_auto.sh"
    text = path.read_text().replace("\n# ", " ")
    assert "the optimizer state always in host memory" in text
    _, need = plan_of(runner, path)
    assert need.device["master"] == need.device["optimizer"] == 0
    assert need.host["optimizer"] > 0 and need.evictable > 0


def test_the_benchmark_run_of_colossalais_own_example(runner: Runner):
    """7B, gemini, 16 rows of 4096 tokens per GPU, recomputation: scripts/benchmark_7B/gemini.sh of
    ColossalAI's examples/language/llama, whose README shows its result on 32 A800."""
    options = options_of(runner.started(GEMINI))
    assert (options.training.batch_size, options.model.max_length) == (16, 4096)
    assert (options.model.config, options.recompute) == ("7b", "full")


@pytest.mark.parametrize("size", ["7B", "70B"])
def test_the_pipeline_is_interleaved_unless_asked_otherwise(runner: Runner, size: str):
    script = f"benchmark_{size}/3d.sh"
    parallel = options_of(runner.started(script)).parallel
    assert (parallel.pp_style, parallel.num_model_chunks) == ("interleaved", 2)
    parallel = options_of(runner.started(script, NUM_MODEL_CHUNKS="4")).parallel
    assert (parallel.pp_style, parallel.num_model_chunks) == ("interleaved", 4)
    parallel = options_of(runner.started(script, PP_STYLE="1f1b")).parallel
    assert (parallel.pp_style, parallel.num_model_chunks) == ("1f1b", 1)
    message = runner.refused(script, PP_STYLE="zbv")
    assert message == "3d.sh: PP_STYLE: got 'zbv', expected interleaved or 1f1b\n"


# -- what is passed on -----------------------------------------------------------------------------

AWKWARD = ["-d", "two words", "it's", 'a "quoted" $HOME', "*", "a;b", "`id`", "", "a\\b", "-m"]


@pytest.mark.parametrize("hosts", ["", "node1\nnode2\n"])
def test_extra_arguments_arrive_as_they_were_given(runner: Runner, hosts: str):
    file = runner.elsewhere / "hosts"
    file.write_text(hosts)
    start = runner.started(GEMINI, *AWKWARD, HOSTFILE=str(file) if hosts else "")
    assert ("--hostfile" in start.launcher) == bool(hosts)
    assert start.arguments[-len(AWKWARD) :] == AWKWARD


def test_launch_hands_on_all_words_and_the_exit_code(runner: Runner):
    """scripts/launch.sh itself; a failing python stands for a failing job."""
    done = runner.end("launch.sh", "--nproc_per_node", "2", "pretrain.py", *AWKWARD)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    found = json.loads(runner.record.read_text())
    expected = ["-P", "-m", "llama_lib", "launch", "--nproc_per_node", "2", "pretrain.py"]
    assert found["argv"] == [*expected, *AWKWARD]
    assert found["cwd"] == str(runner.elsewhere)
    failing = '#!/bin/sh\n[ "$2" = -c ] || exit 143\n'
    runner.executable("python", failing)
    assert runner.end("launch.sh", "pretrain.py").returncode == 143


def test_the_code_is_the_projects_wherever_the_user_is(runner: Runner):
    """A folder for modules that the user has set stays behind it; CDPATH leads nowhere."""
    start = runner.started(GEMINI, PYTHONPATH="/mine", CDPATH="/tmp")
    assert start.environment["PYTHONPATH"] == f"{runner.folder}:/mine"
    assert runner.started(GEMINI).environment["PYTHONPATH"] == str(runner.folder)


def test_what_is_given_last_counts(runner: Runner):
    extra = ["-c", "tiny", "-b", "2", "--recompute", "none", "-l", "64"]
    options = options_of(runner.started(GEMINI, *extra))
    assert (options.model.config, options.training.batch_size) == ("tiny", 2)
    assert (options.recompute, options.model.max_length) == ("none", 64)
    for recompute in (["-g"], ["--recompute", "full"]):
        assert options_of(runner.started(GEMINI, *recompute)).recompute == "full"
    assert options_of(runner.started(GEMINI, "--recompute", "selective")).recompute == "selective"


def test_paths_mean_what_they_mean_where_the_user_is(runner: Runner):
    start = runner.started(GEMINI, "--output", "result.json")
    assert start.cwd == str(runner.elsewhere)
    assert start.benchmark == str(runner.folder / "benchmark.py")


# -- hosts and processes ---------------------------------------------------------------------------


def test_no_hosts_is_this_host_alone_and_says_so(runner: Runner):
    start = runner.started(GEMINI)
    assert start.launcher == []
    assert (
        "gemini.sh: this host alone, a process for each GPU (NPROC= asks for another" in start.said
    )
    start = runner.started(GEMINI, NPROC="4")
    assert start.launcher == ["--nproc_per_node", "4"]
    assert "gemini.sh: this host alone, 4 process(es)" in start.said


def test_hosts_beside_the_script_are_used(runner: Runner):
    """As with ColossalAI's own example scripts: cd into the folder, put hosts.txt there, bash
    gemini.sh."""
    beside = runner.folder / "scripts" / "benchmark_7B" / "hosts.txt"
    beside.write_text("node1\n\nnode2\r\n10.0.0.3")
    start = runner.started(GEMINI, NPROC="8")
    assert start.launcher == ["--nproc_per_node", "8", "--hostfile", str(beside)]
    assert f"gemini.sh: the hosts of {beside}, on each 8 process(es)" in start.said
    assert runner.started(GEMINI).launcher == ["--hostfile", str(beside)]
    # Not of other folders, and not when another file, or none, is asked for.
    for other in (
        runner.started("benchmark_70B/gemini.sh", NPROC="8"),
        runner.started(GEMINI, NPROC="8", HOSTFILE=""),
    ):
        assert other.launcher == ["--nproc_per_node", "8"]


def test_another_host_file_port_and_variables_to_pass(runner: Runner):
    (runner.elsewhere / "my hosts").write_text("node1\nnode2\n")
    given = {"HOSTFILE": "my hosts", "MASTER_PORT": "29600", "NPROC": "1", "PASS": "A,B"}
    start = runner.started(GEMINI, **given)
    assert value(start.launcher, "--hostfile") == str(runner.elsewhere / "my hosts")
    assert value(start.launcher, "--master_port") == "29600"
    assert value(start.launcher, "--pass") == "A,B"


def test_a_missing_host_file_is_refused(runner: Runner):
    """The launcher of ColossalAI says so and ends with 0, as if it had trained."""
    message = runner.refused(GEMINI, HOSTFILE="nowhere.txt")
    assert message.startswith("gemini.sh: host file nowhere.txt: no such file; give HOSTFILE=")
    assert "no such file" in runner.refused(GEMINI, HOSTFILE=str(runner.elsewhere))


@pytest.mark.parametrize("wrong", ["0", "two", "-1", "1.5"])
def test_a_number_of_processes_that_is_none_is_refused(runner: Runner, wrong: str):
    message = runner.refused(GEMINI, NPROC=wrong)
    expected = f"gemini.sh: NPROC: got '{wrong}', expected the number of processes per host\n"
    assert message == expected


def test_the_projects_own_packages_unless_others_are_active(runner: Runner):
    own = runner.folder / ".venv" / "bin"
    own.mkdir(parents=True)
    shutil.move(runner.commands / "python", own / "python")
    start = runner.started(GEMINI, VIRTUAL_ENV="")
    assert start.environment["PATH"].startswith(str(own))
    runner.executable("python", "#!/bin/sh\nexit 1\n")
    for active in ("VIRTUAL_ENV", "CONDA_PREFIX"):
        message = runner.refused(GEMINI, **{"VIRTUAL_ENV": "", active: "/other"})
        assert f"packages are not installed ({runner.commands}/python)" in message
        assert f"run 'make install' in {runner.folder}, or deactivate" in message


# -- with the real launch --------------------------------------------------------------------------


def ended(*words: str, folder: Path = ROOT, **variables: str) -> "subprocess.CompletedProcess[str]":
    """A script of the project itself, with this python's packages."""
    search = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    return subprocess.run(
        ["bash", str(ROOT / "scripts" / words[0]), *words[1:]],
        cwd=folder,
        env={"PATH": search, "HOME": os.environ["HOME"], "VIRTUAL_ENV": "mine", **variables},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("node1 slots=8\n", "line 1: got 'node1 slots=8', expected one host name or address"),
        # Regression: it named only the option of a command that the user had not typed.
        ("node1 slots=8\n", "--nproc_per_node 8 (to a benchmark script: NPROC=8)"),
        ("# mine\nnode1\n", "line 1: got '# mine', expected one host name or address"),
        ("node1\nnode2\nnode1\n", "line 3: got 'node1', which line 1 names already"),
        ("$(touch here)\n", "line 1: got '$(touch here)', expected one host name or address"),
        ("\n\n", "names no host; write one host name or address per line"),
    ],
)
def test_a_faulty_host_file_is_refused(tmp_path: Path, text: str, message: str):
    file = tmp_path / "my hosts"
    file.write_text(text)
    done = ended(GEMINI, folder=tmp_path, HOSTFILE="my hosts", NPROC="1")
    assert done.returncode == 2, done.stdout + done.stderr
    assert f"{file} " in done.stderr and message in done.stderr
    assert list(tmp_path.iterdir()) == [file]


def test_a_host_that_nobody_knows_is_named(tmp_path: Path):
    """Regression: it ended in a traceback of the launcher."""
    file = tmp_path / "hosts"
    file.write_text("no-such-host.invalid\n")
    done = ended(GEMINI, folder=tmp_path, HOSTFILE=str(file), NPROC="1")
    assert done.returncode in (1, 2), done.stdout + done.stderr
    assert "no-such-host.invalid" in done.stderr
    assert "Traceback" not in done.stdout + done.stderr


def test_a_variable_that_cannot_be_passed_is_refused(tmp_path: Path):
    done = ended(GEMINI, folder=tmp_path, NPROC="1", PASS="NOWHERE")
    assert done.returncode == 2, done.stdout + done.stderr
    assert "--pass: NOWHERE is not set here" in done.stderr


def test_the_scripts_are_free_of_what_shellcheck_knows():
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:/usr/bin")
    assert shellcheck, "not installed: run `make install-dev`"
    files = [*ROOT.glob("scripts/**/*.sh"), *ROOT.glob("scripts/**/*.sbatch")]
    assert len(files) > len(SCRIPTS) + 3
    done = subprocess.run(
        [shellcheck, "-x", *map(str, files)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
