"""A run that loses a process comes back by itself as the run it was; on fewer or more processes it
goes on without a row lost or seen twice."""

import json
import re
import signal
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path

import psutil
import pytest

from llama_lib import ledger
from llama_lib.checkpoint.manifest import Manifest, step_directories, step_directory
from llama_lib.control import SAVE_AND_EXIT
from llama_lib.data.loader import BatchLoader, PreparedRows, rows_hash
from llama_lib.data.order import RowOrder
from llama_lib.data.prepared import PreparedDataset
from tests.distributed.launching import LAUNCHER, ROOT, Started, run, start
from tests.distributed.test_resume import COMPARED, Folder

pytestmark = pytest.mark.distributed

STEPS, INTERVAL = 12, 3
RUN = ["-b", "8", "--max_steps", str(STEPS), "-i", str(INTERVAL)]
# Another way for each: gathered by chunks, by shards, by tensor-parallel parts.
LAYOUTS = {
    "gemini": "-p gemini",
    "zero2": "-p zero2",
    "tp2": "-p hybrid_parallel --tp 2",
}

Kill = Callable[[Folder, Started], None]


def ranks(started: Started) -> list[psutil.Process]:
    """The training processes that are alive, by rank."""
    found = {}
    for process in psutil.Process(started.process.pid).children(recursive=True):
        try:
            if any(word.endswith("pretrain.py") for word in process.cmdline()):
                found.setdefault(int(process.environ()["RANK"]), process)
        except (psutil.Error, KeyError, OSError):  # gone, or not yet the program it will be
            continue
    return [found[rank] for rank in sorted(found)]


def in_mid_run(folder: Folder, started: Started) -> None:
    started.wait_until(lambda: len(folder.records) > INTERVAL)
    ranks(started)[1].kill()


def in_a_save(folder: Folder, started: Started) -> None:
    """Both ranks are held still first, to be sure that the save is still going on."""
    started.wait_until(step_directory(folder.save_dir, INTERVAL).exists)
    while True:
        started.wait_until(lambda: list(folder.save_dir.glob("step-*.tmp")))
        both = ranks(started)
        for process in both:
            process.send_signal(signal.SIGSTOP)
        if list(folder.save_dir.glob("step-*.tmp")):
            both[0].kill()
            both[1].send_signal(signal.SIGCONT)
            return
        for process in both:
            process.send_signal(signal.SIGCONT)


def at_the_start(folder: Folder, started: Started) -> None:
    started.wait_until(lambda: len(ranks(started)) == 2)
    ranks(started)[0].kill()


def when_it_meets(folder: Folder, started: Started) -> None:
    """Once the process group is there: its addresses must not be those of the next start."""
    started.wait_until((folder.save_dir / "logs" / "rank-00001.log").exists)
    ranks(started)[1].kill()


@pytest.fixture(scope="module")
def straight(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Folder]:
    """The undisturbed run of a layout, done once."""
    done: dict[str, Folder] = {}

    def of(layout: str) -> Folder:
        if layout not in done:
            folder = done[layout] = Folder(tmp_path_factory.mktemp(f"straight-{layout}"))
            command = folder.arguments(*flags, *LAYOUTS[layout].split(), *RUN)
            outcome = run("pretrain.py", command, folder.log("run"), processes=2)
            assert outcome.code == 0, outcome.output
        return done[layout]

    return of


def tensor_files(folder: Folder) -> dict[str, str]:
    """sha256 of every file of the last checkpoint that holds tensors."""
    files = Manifest.read(step_directory(folder.save_dir, STEPS)).files
    return {name: each.sha256 for name, each in files.items() if name.endswith(".safetensors")}


@pytest.mark.parametrize(
    ("layout", "kill"),
    [
        pytest.param(layout, kill, marks=() if quick else pytest.mark.full)
        for layout, kill, quick in [
            ("gemini", in_mid_run, True),
            ("gemini", in_a_save, False),
            ("gemini", at_the_start, False),
            ("gemini", when_it_meets, False),
            ("zero2", in_mid_run, False),
            ("zero2", in_a_save, False),
            ("tp2", in_mid_run, False),
            ("tp2", in_a_save, False),
        ]
    ],
)
def test_torchrun_brings_a_killed_rank_back(
    layout: str,
    kill: Kill,
    straight: Callable[[str], Folder],
    flags: list[str],
    tmp_path: Path,
) -> None:
    """--max_restarts and --load auto are enough: records, rows and weights as if undisturbed."""
    expected, folder = straight(layout), Folder(tmp_path)
    command = folder.arguments(*flags, *LAYOUTS[layout].split(), *RUN, "--load", "auto")
    launcher = [*LAUNCHER, "--nproc_per_node=2", "--max_restarts=2", "--monitor_interval=0.2"]
    started = Started([*launcher, str(ROOT / "pretrain.py"), *command], folder.log("run"))
    try:
        kill(folder, started)
        outcome = started.wait()
    finally:
        started.kill()
    assert outcome.code == 0, outcome.output

    steps = list(range(1, STEPS + 1))
    assert [record["step"] for record in folder.records] == steps
    for one, other in zip(expected.records, folder.records, strict=True):
        assert {k: other[k] for k in COMPARED} == {k: one[k] for k in COMPARED}
    assert folder.batches() == expected.batches()
    rows = [ledger.read_step(folder.save_dir, step).samples for step in steps]
    assert list(chain.from_iterable(rows)) == list(range(len(rows[0]) * STEPS))
    lines = (folder.save_dir / ledger.FILE).read_text().splitlines()
    firsts = [json.loads(line)["step"] for line in lines]
    assert firsts == sorted(set(firsts)), "a part of the run stands there twice"

    found = tensor_files(folder)
    assert any(name.startswith("model/") for name in found)
    assert any(name.startswith("optimizer/") for name in found)
    assert found == tensor_files(expected)
    assert not list(folder.save_dir.glob("step-*.tmp"))


# -- another number of processes -------------------------------------------------------------------

ROWS, LENGTH = 32, 60  # of a step, and steps of a run: enough to be stopped in
FIXED = f"-b 8 --global_batch_tokens {ROWS * 32} --max_steps {LENGTH} -i 1000000".split()
PLUGINS = {
    "gemini": "-p gemini",
    "gemini_offload": "-p gemini --offload_optim_frac 1.0 --offload_param_frac 1.0",
    "gemini_auto": "-p gemini_auto",
    "zero2": "-p zero2",
    "zero2_fp16": "-p zero2 -x fp16",
    "zero2_cpu": "-p zero2_cpu",
    "hybrid_zero1": "-p hybrid_parallel --zero_stage 1",
    "hybrid_zero2": "-p hybrid_parallel --zero_stage 2",
}


@pytest.fixture(scope="module")
def undisturbed(
    flags: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Folder]:
    """The same on two processes from beginning to end."""
    done: dict[str, Folder] = {}

    def of(plugin: str) -> Folder:
        if plugin not in done:
            folder = done[plugin] = Folder(tmp_path_factory.mktemp(f"undisturbed-{plugin}"))
            command = folder.arguments(*flags, *FIXED, *PLUGINS[plugin].split())
            outcome = run("pretrain.py", command, folder.log("run"), processes=2)
            assert outcome.code == 0, outcome.output
        return done[plugin]

    return of


def expected_rows(
    dataset: Path, sizes: Sequence[int], borders: Sequence[int]
) -> Iterator[tuple[str, int, str]]:
    """(log file, step, hash of the rows) of every process, from the order of the data alone."""
    prepared = PreparedDataset.open(dataset)
    order = RowOrder(prepared.document_lengths, 32, 42)
    rows = PreparedRows(prepared, order, pad_id=0, document_mask=False)
    for size, first, last in zip(sizes, borders, borders[1:], strict=False):
        for rank in range(size):
            loader = BatchLoader(rows, ROWS, rank, size, ROWS // (8 * size))
            for step in range(first, last):
                yield f"rank-{rank:05d}.log", step + 1, rows_hash(loader.batch(step))


@pytest.mark.parametrize(
    ("plugin", "sizes"),
    [
        pytest.param(plugin, sizes, marks=pytest.mark.full)
        for sizes in ((2, 1, 2), (2, 4))
        for plugin in PLUGINS
    ],
)
def test_another_number_of_processes_goes_on_with_the_next_unseen_row(
    plugin: str,
    sizes: tuple[int, ...],
    undisturbed: Callable[[str], Folder],
    flags: list[str],
    dataset: Path,
    tmp_path: Path,
) -> None:
    folder, borders = Folder(tmp_path), [0]
    command = folder.arguments(*flags, *FIXED, *PLUGINS[plugin].split(), "--load", "auto")
    for number, size in enumerate(sizes):
        with start("pretrain.py", command, folder.log(f"{number}"), processes=size) as started:
            if number < len(sizes) - 1:
                going_on = borders[-1] + 3
                started.wait_until(lambda last=going_on: len(folder.records) >= last)
                (folder.save_dir / SAVE_AND_EXIT).touch()
            outcome = started.wait()
        assert outcome.code == 0, outcome.output
        borders.append(int(step_directories(folder.save_dir)[0].name.removeprefix("step-")))
        assert "the global batch was" not in outcome.output
    assert borders == sorted(set(borders)) and borders[-1] == LENGTH

    found = {(log, step): hashes for (log, step), hashes in folder.batches().items()}
    assert found == {
        (log, step): {digest} for log, step, digest in expected_rows(dataset, sizes, borders)
    }
    taken = [ledger.read_step(folder.save_dir, step).samples for step in range(1, LENGTH + 1)]
    assert list(chain.from_iterable(taken)) == list(range(ROWS * LENGTH))
    for one, other in zip(undisturbed(plugin).records, folder.records, strict=True):
        assert (other["step"], other["tokens"], other["lr"]) == (
            one["step"],
            one["tokens"],
            one["lr"],
        )
        assert other["loss"] == pytest.approx(one["loss"], rel=5e-3)


@pytest.mark.full
def test_tensor_parallel_halves_become_one_process_and_two_again(
    flags: list[str], dataset: Path, tmp_path: Path
) -> None:
    """A pair of processes with one half of every layer each; a host is lost, then back."""
    folder = Folder(tmp_path)
    straight = Folder(tmp_path / "straight")
    common = [*flags, *FIXED, "-p", "hybrid_parallel"]
    outcome = run("pretrain.py", straight.arguments(*common), straight.log("run"))
    assert outcome.code == 0, outcome.output
    last = 0
    for number, (size, layout) in enumerate([(2, "--tp 2"), (1, ""), (2, "--pp 2")]):
        command = folder.arguments(*common, *layout.split(), "--load", "auto")
        with start("pretrain.py", command, folder.log(f"{number}"), processes=size) as started:
            if number < 2:
                started.wait_until(lambda least=last + 3: len(folder.records) >= least)
                (folder.save_dir / SAVE_AND_EXIT).touch()
            outcome = started.wait()
        assert outcome.code == 0, outcome.output
        last = int(step_directories(folder.save_dir)[0].name.removeprefix("step-"))
    assert last == LENGTH
    for one, other in zip(straight.records, folder.records, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=5e-3)
    taken = [ledger.read_step(folder.save_dir, step).samples for step in range(1, LENGTH + 1)]
    assert list(chain.from_iterable(taken)) == list(range(ROWS * LENGTH))


@pytest.mark.full
def test_a_changed_global_batch_is_said_in_one_line(flags: list[str], tmp_path: Path) -> None:
    """--batch_size is of one process: half of them make half the batch."""
    folder = Folder(tmp_path)
    first = folder.arguments(*flags, "-b", "4", "--max_steps", "3")
    outcome = run("pretrain.py", first, folder.log("first"), processes=2)
    assert outcome.code == 0, outcome.output
    second = folder.arguments(*flags, "-b", "4", "--max_steps", "6", "--load", "auto")
    outcome = run("pretrain.py", second, folder.log("second"))
    assert outcome.code == 0, outcome.output
    lines = re.findall("the global batch was .*", outcome.output)
    assert lines == [
        "the global batch was 8 rows, now 4 (2 data-parallel processes then, 1 now); "
        "--global_batch_tokens 256 keeps it"
    ]
    taken = [ledger.read_step(folder.save_dir, step).samples for step in range(1, 7)]
    assert list(chain.from_iterable(taken)) == list(range(3 * 8 + 3 * 4))
