"""Starts the program in processes of its own, as a user would, and waits for what they do.

Invariant: whatever a test started is gone when the test ends.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[2]
# Others may be using the machine: a limit is for what hangs, not for what is slow.
TIMEOUT = 300.0

LAUNCHER = ("-m", "torch.distributed.run", "--standalone")


@dataclass
class Outcome:
    """How a command ended; `output` is stdout and stderr together."""

    code: int
    output: str


class Started:
    """A running command, its output in a file, with every process it starts."""

    def __init__(self, arguments: Sequence[str], log: Path) -> None:
        self.log = log
        with log.open("w") as stream:
            self.process = subprocess.Popen(
                [sys.executable, *arguments],
                stdout=stream,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                cwd=log.parent,
                env=_environment(),
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def wait(self, timeout: float = TIMEOUT) -> Outcome:
        try:
            code = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"not done after {timeout:.0f} s:\n{self.output}") from None
        return Outcome(code, self.output)

    def wait_until(self, condition: Callable[[], Any], timeout: float = TIMEOUT) -> Any:
        """Returns what `condition` found as soon as it is true; the command must still run then."""
        deadline = time.monotonic() + timeout
        while not (found := condition()):
            assert self.process.poll() is None, f"ended too early:\n{self.output}"
            assert time.monotonic() < deadline, f"nothing after {timeout:.0f} s:\n{self.output}"
            time.sleep(0.002)
        return found

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def _family(self) -> list[psutil.Process]:
        # torchrun gives its workers sessions of their own, so no process group holds them all.
        try:
            parent = psutil.Process(self.process.pid)
            return [parent, *parent.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def signal_all(self, number: signal.Signals) -> None:
        for process in self._family():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def kill(self) -> None:
        """kill -9 of every process at once, as when a machine goes down."""
        family = self._family()
        self.signal_all(signal.SIGSTOP)  # none of them may see another die first
        self.signal_all(signal.SIGKILL)
        psutil.wait_procs(family, timeout=10)
        self.process.wait(10)


def _environment() -> dict[str, str]:
    """The session's private home (see conftest) without what another launcher may have left."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT")
    }
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}


@contextlib.contextmanager
def start(
    script: str, arguments: Sequence[str], log: Path, processes: int = 1
) -> Iterator[Started]:
    """`python script` or, for several processes, torchrun; killed at the end of the block.

    Args:
        script: relative to the project's root.
        log: file for the output; its folder is the working directory.
    """
    launcher = () if processes == 1 else (*LAUNCHER, f"--nproc_per_node={processes}")
    with start_words([*launcher, str(ROOT / script), *arguments], log) as started:
        yield started


@contextlib.contextmanager
def start_words(words: Sequence[str], log: Path) -> Iterator[Started]:
    """`python WORDS`, killed at the end of the block."""
    log.parent.mkdir(parents=True, exist_ok=True)
    started = Started(words, log)
    try:
        yield started
    finally:
        started.kill()


def run(
    script: str,
    arguments: Sequence[str],
    log: Path,
    processes: int = 1,
    timeout: float = TIMEOUT,
) -> Outcome:
    with start(script, arguments, log, processes) as started:
        return started.wait(timeout)


def records(folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl in a --tensorboard_dir; a line still being written is left out."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        return []
    lines = path.read_text().split("\n")[:-1]
    return [record for line in lines if "loss" in (record := json.loads(line))]
