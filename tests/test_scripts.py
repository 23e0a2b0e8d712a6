"""The benchmark scripts: what they start, with which options, on which hosts.

Each script really runs, with a torchrun and a colossalai on PATH that only record how they were
called. The launcher for many hosts joins its words for a shell, so `started` splits them like one.
"""

import json
import os
import re
import shlex
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

RECORDER = """#!{python}
import json, os, sys
record = {{"name": os.path.basename(sys.argv[0]), "argv": sys.argv[1:], "cwd": os.getcwd()}}
with open({path!r}, "w") as file:
    json.dump({{**record, "environment": dict(os.environ)}}, file)
"""


@dataclass
class Start:
    """How a script called its launcher: `launcher` are the words before benchmark.py."""

    name: str
    launcher: list[str]
    benchmark: str
    arguments: list[str]
    cwd: str
    environment: dict[str, str]
    said: str


@dataclass
class Runner:
    """Runs scripts in a copy of their folder, where hosts.txt may be put, with recording launchers.

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
        words = found["argv"]
        at = next(index for index, word in enumerate(words) if "benchmark.py" in word)
        passed = words[at:]
        if found["name"] == "colossalai":
            assert words[at - 1] == "--", "options of the run must not reach the launcher"
            assert words[at].endswith(".py"), "the launcher would end with 0 and do nothing"
            passed = shlex.split(" ".join(passed))
        return Start(
            found["name"],
            words[:at],
            passed[0],
            passed[1:],
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
    for launcher in ("torchrun", "colossalai"):
        made.executable(launcher, RECORDER.format(python=sys.executable, path=str(made.record)))
    # This machine's own GPUs must not decide what the tests see.
    made.executable("nvidia-smi", "#!/bin/sh\nexit 9\n")
    yield made


def gpus(runner: Runner, number: int) -> None:
    lines = "".join(f"echo 'GPU {index}: NVIDIA H200 (UUID: x)'\n" for index in range(number))
    runner.executable("nvidia-smi", f'#!/bin/sh\n[ "$1" = -L ] || exit 1\n{lines}')


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
    assert start.name == ("colossalai" if hosts else "torchrun")
    assert start.arguments[-len(AWKWARD) :] == AWKWARD


def test_a_shell_reads_the_launchers_line_as_it_was_meant(runner: Runner):
    """As on the hosts: /bin/sh evaluates nothing of it."""
    file = runner.elsewhere / "hosts"
    file.write_text("node1\n")
    runner.started(GEMINI, *AWKWARD, HOSTFILE=str(file))
    words = json.loads(runner.record.read_text())["argv"]
    line = " ".join(words[words.index("--") + 1 :])
    show = shlex.join([sys.executable, "-c", "import json, sys; print(json.dumps(sys.argv[1:]))"])
    done = subprocess.run(
        ["/bin/sh", "-c", f"{show} {line}"], cwd="/", capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout)[-len(AWKWARD) :] == AWKWARD


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
    gpus(runner, 4)
    start = runner.started(GEMINI)
    assert start.name == "torchrun"
    assert "--standalone" in start.launcher
    assert value(start.launcher, "--nproc_per_node") == "4"
    assert "gemini.sh: this host alone, 4 process(es)" in start.said


def test_hosts_beside_the_script_are_used(runner: Runner):
    """As with ColossalAI's own example scripts: cd into the folder, put hosts.txt there, bash
    gemini.sh."""
    beside = runner.folder / "scripts" / "benchmark_7B" / "hosts.txt"
    beside.write_text("node1\n\nnode2\r\n10.0.0.3")
    start = runner.started(GEMINI, NPROC="8")
    assert start.name == "colossalai"
    assert start.launcher[0] == "run"
    assert value(start.launcher, "--hostfile") == str(beside)
    assert value(start.launcher, "--nproc_per_node") == "8"
    assert value(start.launcher, "--master_port") == "29500"
    assert f"3 host(s) of {beside}, 8 process(es) on each" in start.said
    # Not of other folders, and not when another file, or none, is asked for.
    assert runner.started("benchmark_70B/gemini.sh", NPROC="8").name == "torchrun"
    assert runner.started(GEMINI, NPROC="8", HOSTFILE="").name == "torchrun"


def test_another_host_file_and_port(runner: Runner):
    (runner.elsewhere / "my hosts").write_text("node1\nnode2\n")
    start = runner.started(GEMINI, HOSTFILE="my hosts", MASTER_PORT="29600", NPROC="1")
    assert value(start.launcher, "--hostfile") == str(runner.elsewhere / "my hosts")
    assert value(start.launcher, "--master_port") == "29600"


def test_a_missing_host_file_is_refused(runner: Runner):
    """The launcher of ColossalAI says so and ends with 0, as if it had trained."""
    message = runner.refused(GEMINI, HOSTFILE="nowhere.txt")
    assert message.startswith("gemini.sh: host file nowhere.txt: no such file; give HOSTFILE=")
    assert "no such file" in runner.refused(GEMINI, HOSTFILE=str(runner.elsewhere))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("node1 slots=8\n", "line 1: got 'node1 slots=8', expected one host name or address"),
        ("# mine\nnode1\n", "line 1: got '# mine', expected one host name or address"),
        ("node1\nnode2\nnode1\n", "line 3 names node1 a second time"),
        ("\n\n", "names no host; expected a host name or address per line"),
    ],
)
def test_what_the_launcher_would_misread_is_refused(runner: Runner, text: str, message: str):
    file = runner.elsewhere / "hosts"
    file.write_text(text)
    said = runner.refused(GEMINI, HOSTFILE=str(file))
    assert said.startswith(f"gemini.sh: {file} ")
    assert message in said


def test_how_many_processes(runner: Runner):
    hosts = runner.elsewhere / "hosts"
    hosts.write_text("node1\n")

    def processes(**variables: str) -> str:
        return value(runner.started(GEMINI, **variables).launcher, "--nproc_per_node")

    # No GPU can be seen: the one process that any host can run; on others 8, as in
    # ColossalAI's example scripts.
    assert processes() == "1"
    assert "no GPU can be seen" in runner.started(GEMINI).said
    assert processes(HOSTFILE=str(hosts)) == "8"
    assert "no GPU can be seen here: 8" in runner.started(GEMINI, HOSTFILE=str(hosts)).said
    assert processes(NPROC="3") == "3"
    gpus(runner, 4)
    assert processes() == "4"
    assert processes(HOSTFILE=str(hosts)) == "4"
    assert processes(CUDA_VISIBLE_DEVICES="2,3") == "2"
    assert processes(NPROC="2") == "2"
    for wrong in ("0", "two", "-1", "1.5"):
        message = runner.refused(GEMINI, NPROC=wrong)
        assert (
            message
            == f"gemini.sh: NPROC: got '{wrong}', expected the number of processes per host\n"
        )


def test_cores_are_shared_out_among_processes(runner: Runner):
    """torchrun would set 1 thread, which slows an optimizer in host memory down."""
    cores = len(os.sched_getaffinity(0))
    for number in (1, 2, 64):
        threads = runner.started(GEMINI, NPROC=str(number)).environment["OMP_NUM_THREADS"]
        assert threads == str(max(1, cores // number))
    assert runner.started(GEMINI, OMP_NUM_THREADS="5").environment["OMP_NUM_THREADS"] == "5"


@pytest.fixture
def hosts(runner: Runner) -> str:
    file = runner.elsewhere / "hosts"
    file.write_text("node1\n")
    return str(file)


def test_hosts_are_given_what_a_run_needs_of_the_environment(runner: Runner, hosts: str):
    """The launcher writes all it has into a line that a shell on each host evaluates."""
    passed = {"HF_HOME": "/hub", "NCCL_DEBUG": "INFO", "GLOO_SOCKET_IFNAME": "eth0"}
    kept_back = {"LS_COLORS": "y", "NCCL_NOTE": "`touch /tmp/x`"}
    start = runner.started(GEMINI, HOSTFILE=hosts, **passed, **kept_back)
    assert passed.items() <= start.environment.items()
    assert not kept_back.keys() & start.environment.keys()
    assert start.environment["PATH"].startswith(str(runner.commands))
    assert "NCCL_NOTE is not passed on to the hosts" in start.said
    # On this host alone no shell stands between.
    assert kept_back.items() <= runner.started(GEMINI, HOSTFILE="", **kept_back).environment.items()


def test_settings_of_networks_compilers_and_proxies_reach_the_hosts(runner: Runner, hosts: str):
    passed = {
        **{"FI_PROVIDER": "efa", "UCX_TLS": "rc,cuda_copy", "OFI_NCCL_PROTOCOL": "RDMA"},
        **{"IBV_FORK_SAFE": "1", "NVIDIA_VISIBLE_DEVICES": "all", "TRITON_CACHE_DIR": "/t"},
        **{"TORCHINDUCTOR_CACHE_DIR": "/i", "MKL_NUM_THREADS": "2", "KMP_AFFINITY": "compact,1,0"},
        **{"CC": "gcc-12", "CXX": "g++-12", "TMPDIR": "/scratch", "LC_ALL": "C.UTF-8"},
        **{"http_proxy": "http://proxy:3128", "HTTPS_PROXY": "http://me@proxy:3128/"},
        **{"no_proxy": "localhost,10.0.0.0/8", "https_proxy": "http://proxy:3128="},
    }
    start = runner.started(GEMINI, HOSTFILE=hosts, **passed)
    assert passed.items() <= start.environment.items()
    assert "not passed on" not in start.said


SECRETS = {
    "HF_TOKEN": "xyzzy",
    "NVIDIA_API_KEY": "xyzzy",
    "CUDA_LICENCE_KEY": "xyzzy",
    "WANDB_API_KEY": "xyzzy",
    "HUGGING_FACE_HUB_TOKEN": "xyzzy",
}


def test_no_secret_stands_on_a_command_line_of_a_host(runner: Runner, hosts: str):
    """One line names them, and what else of known tools was held back; no line shows a value."""
    others = {"WANDB_MODE": "offline", "EDITOR": "vi", "HF_TOKEN_PATH": "/shared/token"}
    start = runner.started(GEMINI, HOSTFILE=hosts, **SECRETS, **others)
    assert not SECRETS.keys() & start.environment.keys()
    assert start.environment["HF_TOKEN_PATH"] == "/shared/token"
    assert "xyzzy" not in json.dumps([start.launcher, start.arguments, start.environment])
    (line,) = [line for line in start.said.splitlines() if "not passed on" in line]
    said, _, advice = line.partition("; ")
    names = said.removeprefix("gemini.sh: not passed on to the hosts: ").split()
    assert sorted(names) == sorted([*SECRETS, "WANDB_MODE"])
    assert advice == "PASS=NAME,... passes on what is no secret"
    assert "xyzzy" not in start.said
    # On this host alone they stand on no command line.
    assert SECRETS.items() <= runner.started(GEMINI, HOSTFILE="", **SECRETS).environment.items()


@pytest.mark.parametrize("name", ["http_proxy", "HTTPS_PROXY", "HF_ENDPOINT"])
@pytest.mark.parametrize("address", ["http://me:xyzzy@proxy:3128", "me:xyzzy@proxy:3128"])
def test_an_address_with_a_password_is_left_out(
    runner: Runner, hosts: str, name: str, address: str
):
    start = runner.started(GEMINI, HOSTFILE=hosts, **{name: address})
    assert name not in start.environment
    said = f"gemini.sh: {name} is not passed on to the hosts: its value holds a password"
    assert said in start.said.splitlines()
    assert "xyzzy" not in start.said


def test_pass_names_more_variables(runner: Runner, hosts: str):
    more = {"WANDB_MODE": "offline", "my_setting": "a b"}
    start = runner.started(GEMINI, HOSTFILE=hosts, PASS="WANDB_MODE,my_setting", OTHER="x", **more)
    assert more.items() <= start.environment.items()
    assert not {"OTHER", "PASS"} & start.environment.keys()
    assert "not passed on" not in start.said


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("HF_TOKEN", "PASS: HF_TOKEN would stand on a command line of every host"),
        ("HF_HOME,WANDB_API_KEY", "PASS: WANDB_API_KEY would stand on a command line"),
        ("NOWHERE", "PASS: NOWHERE is not set"),
        ("HF_HOME,,X", "PASS: got '', expected names of variables, separated by commas"),
        ("a b", "PASS: got 'a b', expected names of variables"),
        ("x[$(touch y)]", "PASS: got 'x[$(touch y)]', expected names of variables"),
    ],
)
def test_what_pass_cannot_mean_is_refused(runner: Runner, hosts: str, names: str, message: str):
    given = {"HOSTFILE": hosts, "NPROC": "8", "HF_HOME": "/hub"}
    said = runner.refused(GEMINI, PASS=names, **given, **SECRETS)
    assert said.startswith(f"gemini.sh: {message}")
    assert "xyzzy" not in said


def test_the_projects_own_packages_unless_others_are_active(runner: Runner):
    own = runner.folder / ".venv" / "bin"
    own.mkdir(parents=True)
    for launcher in ("torchrun", "colossalai"):
        shutil.move(runner.commands / launcher, own / launcher)
    start = runner.started(GEMINI, VIRTUAL_ENV="")
    assert start.environment["PATH"].startswith(str(own))
    message = runner.refused(GEMINI, VIRTUAL_ENV="/other")
    assert "torchrun and colossalai are not both on PATH; run 'make install'" in message


def test_the_scripts_are_free_of_what_shellcheck_knows():
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:/usr/bin")
    assert shellcheck, "not installed: run `make install-dev`"
    files = [*SCRIPTS, ROOT / "scripts" / "benchmark_common.sh"]
    done = subprocess.run(
        [shellcheck, "-x", *map(str, files)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
