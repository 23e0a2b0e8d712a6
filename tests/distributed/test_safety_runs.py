"""Real runs: no secret in any byte they leave, nothing open to everyone, no pickle loaded."""

import contextlib
import hashlib
import json
import os
import pickle
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import pytest

from llama_lib.checkpoint.manifest import MANIFEST, step_directories
from tests.distributed.launching import ROOT, Started, run, start
from tests.distributed.test_finetune_runs import chat_flags  # noqa: F401 - a fixture
from tests.distributed.test_resume import Folder

pytestmark = pytest.mark.distributed

SECRETS = {
    "HF_TOKEN": "hf_Zq8vK3mNbW7xYtR2",
    "WANDB_API_KEY": "5f1c9a0d7e3b4826aa90",
    "AWS_SECRET_ACCESS_KEY": "wJalr/K7MDENG+bPxRfiCYzE",
    "OPENAI_API_KEY": "sk-Live0123456789abcdef",
    "MY_PASSWORD": "correct-Horse-7",
}
IN_ADDRESS = "hunter2-in-a-url"
ADDRESS = f"https://me:{IN_ADDRESS}@host.example/x"
# Adapters train no embeddings: a template that needs no new tokens.
LORA = "--lora_rank 4 --chat_template llama-2"


@pytest.fixture
def secrets(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Variables of the environment; what must be found nowhere."""
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    return [value.encode() for value in (*SECRETS.values(), IN_ADDRESS)]


def leaks(folder: Path, secrets: Sequence[bytes]) -> list[str]:
    """Every file that holds one, anywhere in it."""
    found = []
    for path in folder.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            found += [f"{path}: {secret!r}" for secret in secrets if secret in content]
    return found


def kinds(folder: Path) -> set[str]:
    """What was written, to be sure that it was looked at."""
    return {path.name.partition("step-")[0] for path in folder.rglob("*")}


def text_of(folder: Path) -> list[str]:
    """Flags for text that has to be prepared: the cache is written too."""
    lines = [json.dumps({"text": f"the cat number {n} sat on the mat"}) for n in range(3000)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "text.jsonl").write_text("\n".join(lines) + "\n")
    return ["-d", str(folder / "text.jsonl"), "--cache_dir", str(folder / "cache")]


WRITES_ALL = (
    "-l 32 -b 4 -i 3 --log_interval 1 --max_steps 6 --eval_interval 3 --eval_ratio 0.1"
    " --eval_steps 1 --sample_interval 3 --profile 2:4"
)


def quick_run(folder: Folder, dataset: Path, config: Path) -> list[str]:
    """A run that writes all that a run can write."""
    return folder.arguments(
        *("-c", str(config), "--tokenizer", str(dataset / "tokenizer"), "--workers", "1"),
        *text_of(folder.root / "data"),
        *WRITES_ALL.split(),
    )


def test_a_run_leaves_no_secret(
    secrets: list[bytes], dataset: Path, model_config: Path, tmp_path: Path
) -> None:
    folder = Folder(tmp_path)
    outcome = run("pretrain.py", quick_run(folder, dataset, model_config), folder.log("run"))
    assert outcome.code == 0, outcome.output
    assert {"specs.yaml", "trainer_state.json", MANIFEST, "ledger.jsonl", "metrics.jsonl"} <= kinds(
        tmp_path
    )
    assert any(name.startswith("events.out.") for name in kinds(tmp_path))
    assert leaks(tmp_path, secrets) == []


@pytest.mark.full
def test_two_processes_and_torchrun_leave_no_secret(
    secrets: list[bytes], dataset: Path, model_config: Path, tmp_path: Path
) -> None:
    folder = Folder(tmp_path)
    command = quick_run(folder, dataset, model_config)
    outcome = run("pretrain.py", command, folder.log("run"), processes=2)
    assert outcome.code == 0, outcome.output
    assert leaks(tmp_path, secrets) == []


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.full)])
def test_an_error_shows_no_secret(
    processes: int, secrets: list[bytes], flags: list[str], tmp_path: Path
) -> None:
    """A wrong option and an address that cannot be had: the messages quote what was given."""
    for number, words in enumerate(
        (["-d", f"{ADDRESS}.jsonl"], [ADDRESS], ["--model_path", ADDRESS])
    ):
        log = tmp_path / f"{number}.txt"
        tokenizer = ["--tokenizer", str(Path(flags[1]) / "tokenizer")]
        outcome = run("pretrain.py", [*flags, *tokenizer, *words], log, processes)
        assert outcome.code == (2 if processes == 1 else 1), outcome.output
        assert "https://me:***@host.example" in outcome.output
    assert leaks(tmp_path, secrets) == []


def test_a_hub_with_a_password_is_not_quoted(
    secrets: list[bytes], flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message, and the file by which other processes learn of it."""
    monkeypatch.setenv("HF_ENDPOINT", f"http://me:{IN_ADDRESS}@127.0.0.1:9")
    words = ["-d", "org/data", "--cache_dir", str(tmp_path / "cache")]
    tokenizer = ["--tokenizer", str(Path(flags[1]) / "tokenizer")]
    outcome = run("pretrain.py", [*flags, *words, *tokenizer], tmp_path / "run.txt")
    assert outcome.code == 2, outcome.output
    assert "org/data" in outcome.output
    assert leaks(tmp_path, secrets) == []


def test_a_traceback_shows_no_secret(secrets: list[bytes], tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import os\n"
        "from llama_lib.cli import run_script\n"
        "def main(argv):\n"
        "    headers = {'Authorization': 'Bearer ' + os.environ['HF_TOKEN']}\n"
        "    address = 'https://me:' + argv[0] + '@host/x'\n"
        "    raise RuntimeError(f'no answer: {headers} {address}')\n"
        "run_script(main)\n"
    )
    log = tmp_path / "out" / "run.txt"
    log.parent.mkdir()
    started = Started([str(program), IN_ADDRESS], log)
    outcome = started.wait(60)
    assert outcome.code == 1
    assert "Traceback" in outcome.output, "an error that is not ours keeps its traceback"
    assert "'Bearer ***'} https://me:***@host/x" in outcome.output
    assert leaks(log.parent, secrets) == []


@pytest.mark.full
@pytest.mark.parametrize("layout", ["", LORA, f"{LORA} --merge_lora"])
def test_fine_tuning_leaves_no_secret_and_is_resumed(
    layout: str,
    secrets: list[bytes],
    chat_flags: list[str],  # noqa: F811
    tmp_path: Path,
) -> None:
    """A prompt holds an address with a password: it is asked as it is, and stored without."""
    folder = Folder(tmp_path)
    prompts = ["--sample_prompts", f"at http://me:{IN_ADDRESS}@h", "--sample_interval", "2"]
    common = [*chat_flags, *layout.split(), "-b", "4", "-p", "zero2", "-i", "2"]
    first = folder.arguments(*common, "--max_steps", "4", *prompts)
    outcome = run("finetune.py", first, folder.log("first"))
    assert outcome.code == 0, outcome.output
    again = folder.arguments(*common, "--max_steps", "6", *prompts, "--load", "auto")
    outcome = run("finetune.py", again, folder.log("second"))
    assert outcome.code == 0, outcome.output
    assert "resumed " in outcome.output
    assert "--sample_prompts was" not in outcome.output, "it is the same one"
    assert "at http://me:***@h" in (folder.save_dir / "specs.yaml").read_text()
    assert leaks(tmp_path, secrets) == []


@pytest.mark.full
def test_a_result_file_holds_no_secret(
    secrets: list[bytes], model_config: Path, tmp_path: Path
) -> None:
    command = f"-c {model_config} -l 32 -b 2 --num_steps 4 --ignore_steps 1 -i 2".split()
    command += ["-o", f"s3://me:{IN_ADDRESS}@bucket/run", "--output", "result.json"]
    outcome = run("benchmark.py", command, tmp_path / "run.txt")
    assert outcome.code == 0, outcome.output
    result = (tmp_path / "result.json").read_text()
    assert "s3://me:***@bucket/run" in json.loads(result)["command"]
    assert leaks(tmp_path, secrets) == []


# -- modes -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def umask(value: int) -> Iterator[None]:
    before = os.umask(value)
    try:
        yield
    finally:
        os.umask(before)


@pytest.mark.parametrize(
    ("mask", "processes"),
    [
        (0, 1),
        pytest.param(0, 2, marks=pytest.mark.full),
        pytest.param(0o027, 1, marks=pytest.mark.full),
    ],
)
def test_nothing_is_left_that_everyone_may_write_to(
    mask: int, processes: int, dataset: Path, model_config: Path, tmp_path: Path
) -> None:
    """Whatever the umask; the folder that is there already keeps its mode, which is said."""
    folder = Folder(tmp_path)
    command = quick_run(folder, dataset, model_config)
    folder.save_dir.mkdir()
    folder.save_dir.chmod(0o777)
    made_before = {folder.save_dir, *tmp_path.rglob("*")}
    with umask(mask):
        outcome = run("pretrain.py", command, folder.log("run"), processes)
    assert outcome.code == 0, outcome.output
    warnings = [line for line in outcome.output.splitlines() if "every user" in line]
    assert len(warnings) == 1
    assert warnings[0].startswith(f"warning: --save_dir {folder.save_dir} can be written to by")

    made = [path for path in tmp_path.rglob("*") if path not in made_before]
    made = [path for path in made if path != folder.log("run")]  # this test's own
    assert {"specs.yaml", MANIFEST, "events.out.tfevents"} <= {
        path.name if not path.name.startswith("events") else "events.out.tfevents" for path in made
    }
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in made}
    assert [path for path, mode in modes.items() if mode & stat.S_IWOTH] == []
    # Others may read what the umask lets them read.
    for path, mode in modes.items():
        allowed = (0o775 if path.is_dir() else 0o664) & ~mask
        assert mode & 0o666 == allowed & 0o666 or path.parent.name == "locks", f"{path} {mode:o}"


# -- pickles in a checkpoint -----------------------------------------------------------------------


class Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.marker),)


@pytest.fixture(scope="module")
def finished(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Folder:
    folder = Folder(tmp_path_factory.mktemp("finished"))
    command = folder.arguments(*flags, "-b", "2", "--max_steps", "2")
    outcome = run("pretrain.py", command, folder.log("run"))
    assert outcome.code == 0, outcome.output
    return folder


def spoil(checkpoint: Path, name: str, content: bytes) -> None:
    """Put `content` in the place of a file, and into the manifest as if it belonged there."""
    (checkpoint / name).write_bytes(content)
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    manifest["files"][name] = {
        "size": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param("model", marks=pytest.mark.full),
        "optimizer",
        pytest.param("rng", marks=pytest.mark.full),
        pytest.param("trainer_state", marks=pytest.mark.full),
        pytest.param("optimizer.index", marks=pytest.mark.full),
    ],
)
def test_a_pickle_in_a_checkpoint_is_refused(
    kind: str, finished: Folder, flags: list[str], tmp_path: Path
) -> None:
    """Its hash is in the manifest: whoever wrote the checkpoint wanted it to be loaded."""
    folder = Folder(Path(shutil.copytree(finished.root, tmp_path / "copy")))
    checkpoint = step_directories(folder.save_dir)[0]
    marker = tmp_path / "the code was run"
    files = [
        path
        for path in sorted(checkpoint.rglob("*"))
        if path.is_file()
        and (path.suffix == ".safetensors" or kind in ("trainer_state", "optimizer.index"))
        and str(path.relative_to(checkpoint))
        .replace("optimizer/", "", kind.count("."))
        .startswith(kind)
    ]
    assert files
    for path in files:
        spoil(checkpoint, str(path.relative_to(checkpoint)), pickle.dumps(Evil(marker)))
    command = [*flags, "-b", "2", "--max_steps", "4", "--load", str(checkpoint)]
    outcome = run("pretrain.py", folder.arguments(*command), tmp_path / "run.txt")
    assert not marker.exists()
    assert outcome.code in (1, 2), outcome.output
    assert "Traceback" not in outcome.output
    assert str(checkpoint) in outcome.output


# -- servers ---------------------------------------------------------------------------------------


def listening(started: Started) -> dict[str, set[str]]:
    """The addresses on which the processes that train listen, by process."""
    parent = psutil.Process(started.process.pid)
    found: dict[str, set[str]] = {}
    for process in [parent, *parent.children(recursive=True)]:
        with contextlib.suppress(psutil.Error, OSError):
            if not any(word.endswith("pretrain.py") for word in process.cmdline()):
                continue
            if process.cmdline()[1:2] == ["-m"]:  # torchrun, whose store torch opens to all
                continue
            places = process.net_connections("inet")
            own = {each.laddr.ip for each in places if each.status == psutil.CONN_LISTEN}
            found[str(process.pid)] = own
    return found


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.full)])
def test_a_run_on_one_host_listens_on_loopback_only(
    processes: int, flags: list[str], tmp_path: Path
) -> None:
    folder = Folder(tmp_path)
    command = folder.arguments(*flags, "-b", "16", "--num_epochs", "100", "-i", "1000000")
    with start("pretrain.py", command, folder.log("run"), processes) as started:
        started.wait_until(lambda: len(folder.records) >= 1)
        found = listening(started)
    assert len(found) == processes
    assert set().union(*found.values()) == {"127.0.0.1"}


@pytest.mark.full
def test_a_launcher_that_sets_only_the_variables_gets_a_store_on_loopback(
    flags: list[str], tmp_path: Path
) -> None:
    """As this project's own launcher starts the processes of one host."""
    folder = Folder(tmp_path)
    command = folder.arguments(*flags, "-b", "16", "--num_epochs", "100", "-i", "1000000")
    port = free_port()
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    shared |= {"MASTER_PORT": str(port), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    running = []
    try:
        for rank in ("0", "1"):
            with (tmp_path / f"{rank}.txt").open("w") as output:
                running.append(
                    subprocess.Popen(
                        [sys.executable, str(ROOT / "pretrain.py"), *command],
                        env={**os.environ, **shared, "RANK": rank, "LOCAL_RANK": rank},
                        stdout=output,
                        stderr=subprocess.STDOUT,
                    )
                )
        wait_for(lambda: len(folder.records) >= 1, running)
        for process in running:
            places = psutil.Process(process.pid).net_connections("inet")
            own = [each.laddr for each in places if each.status == psutil.CONN_LISTEN]
            assert {place.ip for place in own} == {"127.0.0.1"}
            assert (port in [place.port for place in own]) == (process is running[0])
    finally:
        for process in running:
            process.kill()
            process.wait()


def free_port() -> int:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def wait_for(condition, running: Sequence[subprocess.Popen[bytes]]) -> None:  # type: ignore[no-untyped-def]
    import time

    deadline = time.monotonic() + 300
    while not condition():
        assert all(process.poll() is None for process in running), "a process ended"
        assert time.monotonic() < deadline
        time.sleep(0.05)
