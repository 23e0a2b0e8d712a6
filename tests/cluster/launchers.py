"""Starting pretrain.py the ways a user does, and what came of it."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
# Virtual environments keep their commands beside their python, reached by its unresolved path.
SEARCH_PATH = (
    f"{Path(sys.executable).parent}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
)
TIMEOUT_SECONDS = 300
TINY_RUN = "-c tiny -d sample -l 64 -b 2 --max_steps 4 --log_interval 1 -s 2"


@dataclass
class Outcome:
    """Exit code and all that was printed."""

    code: int
    said: str


def environment(**variables: str) -> dict[str, str]:
    """The few variables a launcher needs, so that none of this machine's reach the run.

    Losses are equal to the last bit only with equal numbers of threads; torchrun overrides 1.
    """
    return {"PATH": SEARCH_PATH, "HOME": os.environ["HOME"], "OMP_NUM_THREADS": "2", **variables}


def finish(process: "subprocess.Popen[bytes]", output: Path) -> Outcome:
    """Wait for the end of a started process; one that hangs is killed and fails the test."""
    try:
        code = process.wait(TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        for started in [*psutil.Process(process.pid).children(recursive=True), process]:
            started.kill()
        process.wait()
        raise AssertionError(f"no end in {TIMEOUT_SECONDS} s: {output.read_text()}") from None
    return Outcome(code, output.read_text())


def run_here(command: list[str], folder: Path, **variables: str) -> Outcome:
    """Run `command` on this machine, in the project's folder, to its end."""
    output = folder / "output.txt"
    with output.open("wb") as file:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment(**variables),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    return finish(process, output)


def tiny_run(folder: Path, cache_dir: Path) -> list[str]:
    """pretrain.py and its arguments for four steps that leave everything under `folder`."""
    places = {"--cache_dir": cache_dir, "-o": folder / "checkpoint", "-t": folder / "tb_logs"}
    return [
        "pretrain.py",
        *TINY_RUN.split(),
        *(str(item) for pair in places.items() for item in pair),
    ]


def losses(folder: Path) -> list[float]:
    """The loss of each step of a `tiny_run`, as its metrics say."""
    lines = (folder / "tb_logs" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def checkpoint_problems(folder: Path) -> str:
    """What `llama_lib verify` has against the last checkpoint of a `tiny_run`; empty if nothing."""
    checkpoint = folder / "checkpoint" / "step-00000004"
    command = [sys.executable, "-m", "llama_lib", "verify", str(checkpoint)]
    outcome = run_here(command, folder)
    return "" if outcome.code == 0 else outcome.said


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])
