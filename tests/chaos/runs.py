"""The runs that are compared: an undisturbed one, and ones that are hit, on one host or several.

Invariant: all get the same data, model, options that decide numbers, and number of threads.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llama_lib.data.prepare import PrepareRequest, prepare
from llama_lib.data.sample import sample_records
from llama_lib.data.tokenizer import save_tokenizer, train_tokenizer
from tests.chaos.draws import Draw
from tests.chaos.harness import Chaos, Kill, Rhythm, Timeline, Usual
from tests.chaos.places import OneHost, TestHosts
from tests.chaos.run_files import Ending, RunFiles
from tests.cluster.hosts import Cluster
from tests.cluster.launchers import free_port
from tests.distributed.cases import MODEL
from tests.distributed.launching import ROOT, Started, start

SCRIPT = "pretrain.py"
RESTARTS = 40
HOSTS_AT_WORK, HOSTS_IN_FILE = 2, 3
# One more, which is never hit: whoever starts a run does it from a host that lives.
LAUNCHER_HOST = HOSTS_IN_FILE
# Every process of these tests has as many: sums are equal to the last bit only then.
THREADS = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@dataclass(frozen=True)
class Work:
    """What is trained: options common to the undisturbed and the disturbed run."""

    data: Path
    config: Path
    rhythm: Rhythm
    options: tuple[str, ...]

    def arguments(self, files: RunFiles) -> list[str]:
        rhythm = self.rhythm
        common = (
            f"-l 32 -b 8 --lr 1e-3 -s 2 --log_interval 1 --num_epochs 100 "
            f"--max_steps {rhythm.steps} -i {rhythm.save_interval} "
            f"--eval_interval {rhythm.eval_interval} --eval_steps 8"
        )
        where = ["-d", str(self.data), "-c", str(self.config)]
        return [*where, *common.split(), *self.options, *files.arguments()]


def prepare_data(folder: Path) -> tuple[Path, Path]:
    """A prepared dataset of documentation text and the config.json of a model for it."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = [str(record["text"]) for record in sample_records("documentation")]
    save_tokenizer(train_tokenizer(texts, MODEL["vocab_size"]), folder / "tokenizer")
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (folder / "text.jsonl").write_text(lines)
    request = PrepareRequest(
        datasets=[str(folder / "text.jsonl")],
        tokenizer=str(folder / "tokenizer"),
        eval_ratio=0.1,
        output=folder / "prepared",
        cache_dir=folder / "cache",
        workers=1,
    )
    config = folder / "config.json"
    config.write_text(json.dumps({"model_type": "llama", **MODEL}))
    return prepare(request).path, config


def train_undisturbed(work: Work, folder: Path) -> tuple[Ending, Usual]:
    """Two processes of torchrun on this host, and how long what took."""
    files = RunFiles(folder)
    with start(SCRIPT, work.arguments(files), folder / "output.txt", processes=2) as started:
        timeline = Timeline(files, work.rhythm)
        started.wait_until(timeline.look)
        outcome = started.wait()
        assert outcome.code == 0, outcome.output
    return files.final(work.rhythm.steps), timeline.usual()


def launch_words(options: Sequence[str], work: Work, files: RunFiles) -> list[str]:
    """Arguments of python."""
    script = [SCRIPT, *work.arguments(files), "--load", "auto"]
    return ["-m", "llama_lib", "launch", *options, *script]


@dataclass(frozen=True)
class Disturbed:
    """A run that was hit and came to its end."""

    command: list[str]
    kills: list[Kill]
    ending: Ending
    losses: dict[int, set[float]]
    left: list[str]
    seconds: float


def disturb_here(work: Work, usual: Usual, draws: Sequence[Draw], folder: Path) -> Disturbed:
    """Two ranks on this machine, started by `llama_lib launch` without a host file."""
    files, log = RunFiles(folder), folder / "output.txt"
    folder.mkdir(parents=True)
    options = ["--nproc_per_node", "2", "--restarts", str(len(draws) + 1)]
    options += ["--master_port", free_port()]
    words = launch_words(options, work, files)
    words[words.index(SCRIPT)] = str(ROOT / SCRIPT)
    begun = time.monotonic()
    started = Started(words, log)
    try:
        place = OneHost(started.process.pid, SCRIPT)
        chaos = Chaos(started.process, log, files, place, usual, work.rhythm)
        chaos.run(draws)
        return _ended(chaos, words, work, files, place, log, begun)
    finally:
        started.kill()


def disturb_hosts(
    work: Work, usual: Usual, draws: Sequence[Draw], folder: Path, cluster: Cluster
) -> Disturbed:
    """One rank on each of two hosts of three; the launcher is on a fourth."""
    files = RunFiles(folder)
    folder.mkdir(parents=True)
    hostfile = folder / "hosts.txt"
    hostfile.write_text("\n".join(cluster.names[:HOSTS_IN_FILE]) + "\n")
    options = ["--hostfile", str(hostfile), "--num_nodes", str(HOSTS_AT_WORK)]
    options += ["--restarts", str(RESTARTS), "--nproc_per_node", "1"]
    words = launch_words(options, work, files)
    begun = time.monotonic()
    launcher = cluster.start(["python", *words], LAUNCHER_HOST, **THREADS)
    log = cluster.output(LAUNCHER_HOST)
    place = TestHosts(cluster, SCRIPT)
    chaos = Chaos(launcher, log, files, place, usual, work.rhythm, HOSTS_AT_WORK)
    try:
        chaos.run(draws)
        return _ended(chaos, words, work, files, place, log, begun)
    finally:
        if launcher.poll() is None:
            launcher.kill()
            launcher.wait()


def _ended(
    chaos: Chaos,
    words: list[str],
    work: Work,
    files: RunFiles,
    place: OneHost | TestHosts,
    log: Path,
    begun: float,
) -> Disturbed:
    code = chaos.finish()
    assert code == 0, f"exit code {code}:\n{log.read_text(errors='replace')[-20000:]}"
    seconds = time.monotonic() - begun
    ending, left = files.final(work.rhythm.steps), place.everything_left()
    return Disturbed(words, chaos.kills, ending, files.losses, left, seconds)


def differences(expected: Ending, found: Disturbed) -> list[str]:
    """What is not as in the undisturbed run; empty if every bit is."""
    problems = []
    if found.ending.hashes != expected.hashes or not expected.hashes:
        names = expected.hashes.keys() | found.ending.hashes.keys()
        problems += [
            f"{name} differs"
            for name in sorted(names)
            if expected.hashes.get(name) != found.ending.hashes.get(name)
        ] or ["no state was hashed"]
    for step in sorted(expected.losses.keys() | found.ending.losses.keys() | found.losses.keys()):
        losses = found.losses.get(step, set()) | {found.ending.losses.get(step)}
        if losses != {expected.losses.get(step)}:
            problems.append(f"step {step}: losses {losses}, expected {expected.losses.get(step)}")
    for step in sorted(expected.held_out.keys() | found.ending.held_out.keys()):
        if expected.held_out.get(step) != found.ending.held_out.get(step):
            problems.append(f"step {step}: held-out losses differ")
    problems += [f"still running: {command}" for command in found.left]
    return problems
