"""The recipes of images: what Docker and Apptainer would do, done here as far as that goes.

Neither is needed: each recipe is read, its files are copied into an empty folder in its order, its
commands run with recorders in place of what would change the machine, and what it starts trains.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from fnmatch import fnmatch
from itertools import pairwise
from pathlib import Path

import pytest

from tests.cluster.launchers import SEARCH_PATH, finish

ROOT = Path(__file__).parents[1]
DOCKERFILE = ROOT / "scripts" / "docker" / "Dockerfile"
DEFINITION = ROOT / "scripts" / "docker" / "llama.def"
INSIDE = "/opt/llama"
# What a command of a recipe may be; everything else is not found.
COMMANDS = ("apt-get", "chmod", "python", "rm", "useradd")
SECRETS = re.compile(r"TOKEN|KEY|SECRET|PASSWORD|CREDENTIAL", re.I)

RECORDER = """#!{python}
import json, os, sys
words = [os.path.basename(sys.argv[0]), *sys.argv[1:]]
with open({record!r}, "a") as file:
    print(json.dumps(words), file=file)
for flag, file in zip(words, words[1:]):
    if flag == "-r":
        open(file).close()
"""


@dataclass
class Recipe:
    """An image: `steps` are copies (a pair of paths) and command lines, in order."""

    base: str
    steps: list[tuple[str, str] | str]
    environment: dict[str, str]
    start: list[str]

    @property
    def copies(self) -> list[tuple[str, str]]:
        return [step for step in self.steps if isinstance(step, tuple)]


def instructions() -> list[tuple[str, str]]:
    """The instructions of the Dockerfile and their arguments, on one line each."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if not line.startswith("#")]
    text = "\n".join(lines).replace("\\\n", " ")
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in text.splitlines() if line]


def dockerfile() -> Recipe:
    steps: list[tuple[str, str] | str] = []
    environment: dict[str, str] = {}
    base, start, workdir = "", [], ""
    for name, rest in instructions():
        match name:
            case "FROM":
                base = rest
            case "WORKDIR":
                workdir = rest
            case "ENV":
                environment |= dict(word.split("=", 1) for word in shlex.split(rest))
            case "COPY":
                *sources, target = rest.split()
                for source in sources:
                    path = f"{workdir}/{source if target == './' else target}"
                    steps.append((source, path))
            case "RUN":
                steps.append(f"cd {workdir}; {rest}")
            case "ENTRYPOINT":
                start = json.loads(rest)
            case _:
                assert name in ("USER", "CMD"), f"no test knows {name}"
    return Recipe(base, steps, environment, start)


def sections() -> dict[str, str]:
    """The sections of the Apptainer definition; its head is called ''."""
    text = re.sub(r"(?m)^#.*\n", "", DEFINITION.read_text())
    head, *rest = re.split(r"(?m)^%", text)
    found = {part.split("\n", 1)[0].strip(): part.split("\n", 1)[1] for part in rest}
    assert len(found) == len(rest), "a section twice"
    return {"": head, **found}


def definition() -> Recipe:
    parts = sections()
    head = dict(re.findall(r"^(\w+): (\S+)$", parts[""], re.M))
    assert head["Bootstrap"] == "docker"
    copies = [tuple(line.split()) for line in parts["files"].splitlines() if line.strip()]
    environment = dict(re.findall(r"^\s*export (\w+)=(\S*)$", parts["environment"], re.M))
    start = ["sh", "-c", parts["runscript"], "runscript"]
    return Recipe(head["From"], [*copies, parts["post"]], environment, start)  # type: ignore[list-item]


RECIPES = {"docker": dockerfile, "apptainer": definition}


@dataclass
class Image:
    """What a recipe has made of an empty folder, and the commands it ran."""

    folder: Path
    ran: list[list[str]]


def build(recipe: Recipe, folder: Path) -> Image:
    """Do what the recipe says in `folder`, which stands for `INSIDE`."""
    commands, record = folder / "bin", folder / "record"
    inside = folder / "llama"
    for made in (commands, inside):
        made.mkdir(parents=True)
    for name in COMMANDS:
        path = commands / name
        path.write_text(RECORDER.format(python=sys.executable, record=str(record)))
        path.chmod(0o755)
    for step in recipe.steps:
        if isinstance(step, tuple):
            source, target = ROOT / step[0], Path(step[1].replace(INSIDE, str(inside)))
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, target)
            continue
        done = subprocess.run(
            ["/bin/sh", "-e", "-c", step.replace(INSIDE, str(inside))],
            cwd="/",
            env={"PATH": str(commands)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{step}: {done.stderr}"
    return Image(inside, [json.loads(line) for line in record.read_text().splitlines()])


@pytest.fixture(params=RECIPES)
def recipe(request: pytest.FixtureRequest) -> Recipe:
    return RECIPES[request.param]()


def test_both_recipes_make_the_same(tmp_path: Path):
    """Base, files, packages and environment; the one starts as a user, the other as its own."""
    docker, apptainer = dockerfile(), definition()
    assert docker.base == apptainer.base
    assert sorted(docker.copies) == sorted(apptainer.copies)
    ran = [
        [words for words in build(recipe, tmp_path / name).ran if words[0] in ("apt-get", "python")]
        for name, recipe in (("docker", docker), ("apptainer", apptainer))
    ]
    assert ran[0] == ran[1]
    own = {"HOME", "USER", "PIP_NO_CACHE_DIR", "NVIDIA_DRIVER_CAPABILITIES"}
    environment = {name: text for name, text in docker.environment.items() if name not in own}
    assert environment == apptainer.environment
    assert shlex.split(sections()["runscript"]) == ["exec", *docker.start, "$@"]


def test_the_base_is_one_version_of_a_supported_python(recipe: Recipe):
    found = re.fullmatch(r"python:(3\.\d+)\.\d+-slim-\w+", recipe.base)
    assert found, f"{recipe.base}: expected a full version"
    minor = found[1].removeprefix("3.")
    assert f"(3, {minor})" in (ROOT / "Makefile").read_text()


def test_packages_are_installed_as_by_make_install(recipe: Recipe, tmp_path: Path):
    """The same two commands in the same order, each where its file is there already."""
    makefile = (ROOT / "Makefile").read_text()
    lines = re.findall(
        r"^\t\$\(BIN\)/(python -m pip install .*requirements(?!-dev).*)$", makefile, re.M
    )
    expected = [line.split() for line in lines]
    assert len(expected) == 2
    ran = build(recipe, tmp_path / "image").ran
    assert [words for words in ran if words[0] == "python"] == expected
    installed = next(words for words in ran if words[:2] == ["apt-get", "install"])
    assert {"gcc", "openssh-client"} <= set(installed)


def test_only_code_goes_into_the_image():
    """A checkpoint, a data set or a key beside the code stays where it is."""
    first, *rest = [
        line
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    assert first == "*"
    let_in = {line.removeprefix("!") for line in rest if line.startswith("!")}
    assert let_in == {source for source, _ in dockerfile().copies}
    kept_out = [line for line in rest if not line.startswith("!")]
    assert any(fnmatch("llama_lib/data/__pycache__", pattern) for pattern in kept_out)


def test_no_secret_and_no_root():
    found = instructions()
    assert [rest for name, rest in found if name == "USER"] == ["1000"]
    assert found[-2][0] == "ENTRYPOINT" and found[-1] == ("CMD", '["--help"]')
    for text in (DOCKERFILE.read_text(), DEFINITION.read_text()):
        code = "\n".join(line for line in text.splitlines() if not line.strip().startswith("#"))
        assert not SECRETS.search(code)
        assert not re.search(r"\b(ARG|ADD|curl|wget|http)\b", code)


def tool(name: str) -> str:
    path = shutil.which(name, path=f"{Path(sys.executable).parent}:/usr/bin")
    assert path, f"{name} is not installed: run `make install-dev`"
    return path


def test_the_dockerfile_is_free_of_what_hadolint_knows():
    done = subprocess.run([tool("hadolint"), DOCKERFILE], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("section", ["post", "environment", "runscript", "test"])
def test_the_definitions_shell_is_free_of_what_shellcheck_knows(tmp_path: Path, section: str):
    script = tmp_path / section
    # Apptainer runs it with -e.
    script.write_text(f"#!/bin/sh\nset -e\n{sections()[section]}")
    done = subprocess.run([tool("shellcheck"), script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


# -- what the images start -------------------------------------------------------------------------

NO_NETWORK = ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]


def started(recipe: Recipe, folder: Path, *words: str, network: bool = True):
    """What the image starts, with its files, its environment and little else."""
    image = build(recipe, folder / "image")
    text = {
        name: value.replace(INSIDE, str(image.folder)) for name, value in recipe.environment.items()
    }
    home = folder / "home"
    home.mkdir()
    output = folder / "output"
    with output.open("wb") as file:
        process = subprocess.Popen(
            [*([] if network else NO_NETWORK), *recipe.start, *words],
            cwd=image.folder,
            env={**text, "PATH": SEARCH_PATH, "HOME": str(home)},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    return finish(process, output)


def trains(recipe: Recipe, folder: Path, network: bool = True) -> None:
    run = folder / "a run"
    options = ["-c", "tiny", "-d", "sample", "-l", "64", "-b", "2", "--max_steps", "3", "-s", "2"]
    places = ["-o", str(run), "-t", str(run / "tb_logs"), "--cache_dir", str(folder / "cache")]
    words = ["--nproc_per_node", "2", "pretrain.py", *options, *places]
    outcome = started(recipe, folder, *words, network=network)
    assert outcome.code == 0, outcome.said
    assert "2 process(es) = dp 2" in outcome.said
    assert (run / "latest").read_text() == "step-00000003\n"


@pytest.mark.distributed
def test_the_docker_image_trains(tmp_path: Path):
    """With the files of the image alone, in its folder."""
    trains(dockerfile(), tmp_path)


@pytest.mark.distributed
@pytest.mark.full
def test_the_images_need_no_network(tmp_path: Path, recipe: Recipe):
    if os.geteuid() != 0 or not shutil.which("ip", path=SEARCH_PATH):
        pytest.skip("a run without network needs root and `ip` (package iproute2)")
    trains(recipe, tmp_path, network=False)


@pytest.mark.distributed
def test_a_mistake_in_the_image_is_a_mistake(tmp_path: Path, recipe: Recipe):
    outcome = started(recipe, tmp_path, "pretrain.py", "-c", "tiny", "--max_step", "3")
    assert outcome.code == 2, outcome.said
    assert "max_step" in outcome.said and "Traceback" not in outcome.said


# -- run.sh ----------------------------------------------------------------------------------------


@dataclass
class Docker:
    """`run.sh` with a docker that only records how it was called."""

    commands: Path
    elsewhere: Path

    def end(self, *words: str, **variables: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            ["bash", str(ROOT / "scripts" / "docker" / "run.sh"), *words],
            cwd=self.elsewhere,
            env={
                "PATH": f"{self.commands}:/usr/bin:/bin",
                "HOME": str(self.elsewhere),
                **variables,
            },
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )

    def called(self, *words: str, **variables: str) -> list[str]:
        record = self.commands / "record"
        record.unlink(missing_ok=True)
        done = self.end(*words, **variables)
        assert done.returncode == 0, done.stderr
        return json.loads(record.read_text())

    def program(self, name: str, text: str) -> None:
        path = self.commands / name
        path.write_text(text)
        path.chmod(0o755)


@pytest.fixture
def docker(tmp_path: Path) -> Docker:
    made = Docker(tmp_path / "bin", tmp_path / "else where")
    for folder in (made.commands, made.elsewhere):
        folder.mkdir()
    record = str(made.commands / "record")
    made.program("docker", RECORDER.format(python=sys.executable, record=record))
    made.program("nvidia-smi", "#!/bin/sh\nexit 9\n")
    return made


def test_run_hands_over_folders_user_and_words(docker: Docker, tmp_path: Path):
    awkward = ["pretrain.py", "-o", "two words", "it's $HOME `id` *"]
    words = docker.called(*awkward, MOUNTS=str(tmp_path))
    assert words[:2] == ["docker", "run"]
    assert words[words.index("llama") + 1 :] == awkward
    assert words[words.index("--user") + 1] == f"{os.getuid()}:{os.getgid()}"
    assert words[words.index("--workdir") + 1] == str(docker.elsewhere)
    mounts = [text for flag, text in pairwise(words) if flag == "--mount"]
    folders = {folder: folder for folder in (ROOT, docker.elsewhere, tmp_path)}
    folders[docker.elsewhere / ".cache"] = Path(dockerfile().environment["HOME"]) / ".cache"
    assert mounts == [f"type=bind,source={ours},target={its}" for ours, its in folders.items()]
    assert (docker.elsewhere / ".cache").is_dir(), "Docker would make it, as root"
    assert {"--ipc=host", "memlock=-1", f"PYTHONPATH={ROOT}"} <= set(words)
    assert "--gpus" not in words and "--network" not in words


def test_run_gives_all_gpus_if_there_are_some(docker: Docker):
    docker.program("nvidia-smi", "#!/bin/sh\necho 'GPU 0: NVIDIA H200 (UUID: x)'\n")
    words = docker.called("pretrain.py", IMAGE="mine:2", NETWORK="host")
    assert words[words.index("--gpus") + 1] == "all"
    assert words[words.index("--network") + 1] == "host"
    assert words[-2:] == ["mine:2", "pretrain.py"]


def test_run_gives_the_gpus_of_a_slow_driver(docker: Docker):
    """Its list was read to the first line, and then it failed, as it could not write on."""
    slow = "for gpu in 0 1; do echo GPU $gpu: NVIDIA H200; sleep 1; done"
    docker.program("nvidia-smi", f"#!/bin/sh\n{slow}\n")
    words = docker.called("pretrain.py")
    assert words[words.index("--gpus") + 1] == "all"


def test_run_names_secrets_and_never_shows_them(docker: Docker):
    given = {"HF_TOKEN": "xyzzy", "NCCL_DEBUG": "INFO", "AWS_SECRET_ACCESS_KEY": "xyzzy"}
    words = docker.called("pretrain.py", **given)
    named = [text for flag, text in pairwise(words) if flag == "--env"]
    assert sorted(named) == ["HF_TOKEN", "NCCL_DEBUG", f"PYTHONPATH={ROOT}"]
    assert "xyzzy" not in json.dumps(words)


def test_run_makes_no_folder(docker: Docker):
    done = docker.end("pretrain.py", MOUNTS="/nowhere")
    assert (done.returncode, done.stderr) == (2, "run.sh: MOUNTS: no such folder: /nowhere\n")
