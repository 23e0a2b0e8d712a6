"""As much of Slurm as a batch script sees: sbatch, srun, scontrol and apptainer on a PATH.

Invariant: what a fake is asked for that it does not know, it refuses, as the program it stands for
would; every task runs on this machine, whatever its node is called.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.cluster.launchers import ROOT, SEARCH_PATH, Outcome, finish

JOB = "4242"
SCRIPT = ROOT / "scripts" / "slurm" / "train.sbatch"
PATIENCE_SECONDS = 120

# The script is copied, and its own options are read from the copy. It replaces this process, so
# that a signal sent to it is sent to the batch shell, as --signal=B: does.
SBATCH = """
import argparse, itertools, os, shutil, sys
from pathlib import Path

options = argparse.ArgumentParser(allow_abbrev=False)
for name in ("job-name", "nodes", "ntasks-per-node", "gpus-per-node", "mem", "signal", "time"):
    options.add_argument(f"--{name}")
options.add_argument("--open-mode", choices=["append", "truncate"])
options.add_argument("--output", required=True)
for name in ("exclusive", "requeue"):
    options.add_argument(f"--{name}", action="store_true", required=True)
split = next(i for i, word in enumerate(sys.argv) if word.endswith(".sbatch"))
typed, script, words = sys.argv[1:split], sys.argv[split], sys.argv[split + 1 :]
head = itertools.takewhile(lambda line: line[:1] in ("", "#"), open(script).read().splitlines())
own = [line.split(maxsplit=1)[1] for line in head if line.startswith("#SBATCH")]
asked = options.parse_args([*own, *typed])
assert asked.signal.startswith("B:USR1@") and int(asked.signal[7:]) <= 65535
job = os.environ["FAKE_JOB"]
spool = Path(os.environ["FAKE_FOLDER"]) / "spool" / f"job{job}"
spool.mkdir(parents=True, exist_ok=True)
copy = shutil.copy(script, spool / "slurm_script")
os.environ.update(
    SLURM_JOB_ID=job,
    SLURM_SUBMIT_DIR=os.getcwd(),
    SLURM_JOB_NODELIST=",".join(["localhost", "127.0.0.1"][: int(asked.nodes)]),
    SLURM_CPUS_ON_NODE="2",
)
if asked.gpus_per_node != "0":
    os.environ["SLURM_GPUS_PER_NODE"] = asked.gpus_per_node
    os.environ.setdefault("SLURM_GPUS_ON_NODE", asked.gpus_per_node.split(":")[-1])
path = asked.output.replace("%x", asked.job_name).replace("%j", job)
mode = os.O_APPEND if asked.open_mode == "append" else os.O_TRUNC
output = os.open(path, os.O_WRONLY | os.O_CREAT | mode)
os.dup2(output, 1)
os.dup2(output, 2)
os.execvp("bash", ["bash", str(copy), *words])
"""

SRUN = """
import argparse, os, signal, subprocess, sys, time

options = argparse.ArgumentParser(allow_abbrev=False)
for name in ("nodes", "ntasks", "ntasks-per-node", "kill-on-bad-exit"):
    options.add_argument(f"--{name}", type=int, required=True)
options.add_argument("--cpu-bind", choices=["none"], required=True)
options.add_argument("--export", choices=["ALL"], required=True)
options.add_argument("command", nargs=argparse.REMAINDER)
asked = options.parse_args()
assert asked.ntasks == asked.nodes and asked.ntasks_per_node == 1
tasks = []
for rank in map(str, range(asked.ntasks)):
    places = {"SLURM_PROCID": rank, "SLURM_NODEID": rank}
    tasks.append(subprocess.Popen(asked.command, env={**os.environ, **places}))
signal.signal(signal.SIGTERM, lambda *_: [task.terminate() for task in tasks])
while any(task.poll() is None for task in tasks):
    if any(task.poll() for task in tasks):
        for task in tasks:
            task.terminate()
    time.sleep(0.1)
codes = [task.returncode if task.returncode >= 0 else 128 - task.returncode for task in tasks]
sys.exit(max(codes))
"""

SCONTROL = """
import os, sys
from pathlib import Path

folder = Path(os.environ["FAKE_FOLDER"])
match sys.argv[1:]:
    case ["show", "hostnames", nodes]:
        print("\\n".join(nodes.split(",")))
    case ["show", "job", job] if job == os.environ["FAKE_JOB"]:
        print(os.environ["FAKE_STATE"])
    case ["requeue", job] if job == os.environ["FAKE_JOB"]:
        with open(folder / "requeued", "a") as file:
            print(job, file=file)
        sys.exit(int(os.environ["FAKE_REQUEUE"]))
    case _:
        sys.exit(f"scontrol: invalid {sys.argv[1:]}")
"""

APPTAINER = """
import json, os, sys
from pathlib import Path

_, command, *words = sys.argv
assert command == "exec" and words.pop(0) == "--nv"
binds = []
while words[0] == "--bind":
    binds.append(words[1])
    del words[:2]
image = words.pop(0)
with open(Path(os.environ["FAKE_FOLDER"]) / "contained", "a") as file:
    print(json.dumps({"image": image, "binds": binds, "command": words}), file=file)
os.execvp(words[0], words)
"""

FAKES = {"sbatch": SBATCH, "srun": SRUN, "scontrol": SCONTROL, "apptainer": APPTAINER}
NOT_PREEMPTED = (
    "   StartTime=2026-01-02T03:04:05 EndTime=Unknown\n   PreemptTime=None SuspendTime=N"
)


class Slurm:
    """One job of one user; `folder` takes all that the fakes write."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.commands = folder, folder / "bin"
        self.commands.mkdir(parents=True)
        for name, text in FAKES.items():
            self.program(name, text)

    def program(self, name: str, text: str) -> None:
        """Put a Python program of this name before all others."""
        path = self.commands / name
        path.write_text(f"#!{sys.executable}\n{text}")
        path.chmod(0o755)

    def submit(
        self, *words: str, options: tuple[str, ...] = (), start: int = 0, **variables: str
    ) -> "subprocess.Popen[bytes]":
        """The batch shell of `sbatch options train.sbatch words`, at its first or a later start."""
        known = {
            "PATH": f"{self.commands}:{SEARCH_PATH}",
            "HOME": os.environ["HOME"],
            "VIRTUAL_ENV": "mine",
            "FAKE_FOLDER": str(self.folder),
            "FAKE_JOB": JOB,
            "FAKE_STATE": NOT_PREEMPTED,
            "FAKE_REQUEUE": "0",
        }
        if start:
            known["SLURM_RESTART_COUNT"] = str(start)
        output = ("--output", str(self.output))
        with (self.folder / "sbatch.out").open("wb") as file:
            return subprocess.Popen(
                ["sbatch", *output, *options, str(SCRIPT), *words],
                cwd=ROOT,
                env={**known, **variables},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
            )

    @property
    def output(self) -> Path:
        return self.folder / f"job-{JOB}.out"

    def end(self, job: "subprocess.Popen[bytes]") -> Outcome:
        """Wait for the end of a start of the job; `said` is of all its starts so far."""
        self.output.touch()
        return finish(job, self.output)

    def run(self, *words: str, **given: str) -> Outcome:
        return self.end(self.submit(*words, **given))  # type: ignore[arg-type]

    def requeued(self) -> int:
        """How often the job was put back into the queue."""
        path = self.folder / "requeued"
        return len(path.read_text().splitlines()) if path.exists() else 0

    def contained(self) -> list[dict[str, object]]:
        """What was started in the image."""
        return [json.loads(line) for line in (self.folder / "contained").read_text().splitlines()]


def interrupt(
    job: "subprocess.Popen[bytes]", when: Callable[[], bool], number: int = signal.SIGUSR1
) -> None:
    """Signal the batch shell alone as soon as `when` holds."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not when():
        assert job.poll() is None, "the job ended before it could be interrupted"
        assert time.monotonic() < deadline, "the job did not come so far"
        time.sleep(0.05)
    os.kill(job.pid, number)
