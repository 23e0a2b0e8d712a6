"""When and how a run is saved, around a real engine in this process: at once and beside it."""

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llama_lib import host
from llama_lib.errors import JobError, RunError

host.install()

from llama_lib import saving  # noqa: E402
from llama_lib.checkpoint import manifest, staging, store, verify, writing  # noqa: E402
from llama_lib.checkpoint.manifest import step_directories  # noqa: E402
from llama_lib.checkpoint.state import held_state  # noqa: E402
from llama_lib.saving import Saver  # noqa: E402
from tests.distributed.checks import build, optimizer_hashes, train_step  # noqa: E402

if torch.cuda.is_available():
    pytest.skip("the engine here is one of a CPU", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("one_process")

FULL = OSError(28, "No space left on device")


@pytest.fixture(scope="module")
def engine(one_process):
    built = build("zero2", "bf16")
    train_step(built, 1)
    return built


class Run:
    """A saver, what it said, and a writer that can be held up."""

    def __init__(self, engine, folder: Path, **checkpoint: Any) -> None:
        self.folder, self.said = folder, []
        options = engine.options
        options.checkpoint.save_dir, options.checkpoint.async_save = str(folder), True
        options.checkpoint.save_check, options.checkpoint.keep_last = None, None
        options.checkpoint.save_interval = 1
        for name, value in checkpoint.items():
            setattr(options.checkpoint, name, value)
        plan = SimpleNamespace(warmup_steps=2, num_steps=9, global_batch=2)
        source = SimpleNamespace(epoch_of=lambda sample: 0, state=lambda sample: {})
        self.state = store.TrainerState(0, 0, 0, 0, 42, {})
        self.saver = Saver(options, engine, plan, source, None, self.state, None, self.said.append)

    def save(self, step: int, is_last: bool = False) -> None:
        self.state.step = step
        self.saver.save(None, is_last)

    def written(self) -> None:
        self.saver._background.wait()

    @property
    def steps(self) -> list[int]:
        return [int(path.name[5:]) for path in step_directories(self.folder)]


@pytest.fixture
def run(engine, tmp_path) -> Run:
    return Run(engine, tmp_path)


@pytest.fixture
def held_up(monkeypatch) -> threading.Event:
    """Nothing is written before this is set."""
    go_on, finish = threading.Event(), writing.finish

    def waiting(draft, tensors, group=None) -> None:
        go_on.wait()
        finish(draft, tensors, group)

    monkeypatch.setattr(writing, "finish", waiting)
    yield go_on
    go_on.set()


def test_a_checkpoint_is_said_to_be_saved_once_it_is(run, held_up):
    run.save(1)
    run.saver.step_done()
    assert (run.said, run.saver.saved_step, run.steps) == ([], None, [])
    held_up.set()
    run.written()
    run.saver.step_done()
    run.saver.step_done()
    (line,) = run.said
    assert line.startswith(f"saved {run.folder / 'step-00000001'} beside the training in ")
    assert run.saver.saved_step == 1
    assert verify.checkpoint_problems(run.folder / "step-00000001") == []


def test_one_is_in_flight_at_most(run, held_up):
    run.save(1)
    threading.Timer(0.5, held_up.set).start()
    run.save(2)
    assert run.said[0] == "waiting until the checkpoint of step 1 is written"
    assert run.said[1].startswith("waited ") and "step-00000001 beside" in run.said[2]
    run.written()
    assert run.steps == [2, 1]


def test_ranks_ask_each_other_alike_whoever_is_done(run, held_up, monkeypatch):
    """The rank whose thread had ended no longer asked, and the other one waited for its answer."""
    asked, gather = [], saving.coordination.gather

    def counted(value: Any, group: Any = None) -> list[Any]:
        if isinstance(value, tuple) and isinstance(value[0], bool):
            asked.append(value)
        return gather(value, group)

    monkeypatch.setattr(saving.coordination, "gather", counted)
    held_up.set()
    run.save(1)
    assert asked == [], "nothing was under way anywhere"
    run.written()
    run.saver.step_done()
    run.save(2)
    assert asked == [(False, False)]


def test_the_state_is_that_of_the_step(engine, run, held_up):
    run.state.loss = 3.5
    before = optimizer_hashes(engine)
    run.save(1)
    run.state.step, run.state.loss = 2, 1.5
    train_step(engine, 2)
    assert optimizer_hashes(engine) != before
    held_up.set()
    run.written()
    path = run.folder / "step-00000001"
    state = store.read_state(path)
    assert (state.step, state.loss, state.schedule["last_step"]) == (1, 3.5, 1)
    store.load(engine, path, state)
    assert optimizer_hashes(engine) == before


def test_keep_last_and_latest_are_as_ever(engine, tmp_path):
    run = Run(engine, tmp_path, keep_last=2)
    for step in (1, 2, 3):
        run.save(step)
    run.written()
    assert run.steps == [3, 2]
    assert (tmp_path / "latest").read_text() == "step-00000003\n"
    assert not list(tmp_path.glob("*.tmp"))


def test_the_last_save_waits_and_is_not_staged(run, held_up, monkeypatch):
    run.save(1)
    monkeypatch.setattr(saving, "Staged", None)
    threading.Timer(0.3, held_up.set).start()
    run.save(2, is_last=True)
    assert run.steps == [2, 1] and run.saver.saved_step == 2
    assert run.said[-1] == f"saved {run.folder / 'step-00000002'}"


def test_the_step_that_is_being_written_is_not_saved_again(run, held_up):
    run.save(1)
    threading.Timer(0.3, held_up.set).start()
    run.save(1, is_last=True)
    assert run.steps == [1] and run.saver.saved_step == 1


# -- failures --------------------------------------------------------------------------------------


def broken_writing(monkeypatch, error: BaseException) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(writing, "save_file", broken)


@pytest.mark.parametrize("then", ["the next step", "the next save", "the last save"])
def test_a_failed_writer_ends_the_run_with_the_older_checkpoint(run, monkeypatch, then):
    run.save(1)
    run.written()
    broken_writing(monkeypatch, FULL)
    run.save(2)
    run.written()
    assert run.saver.has_failed
    with pytest.raises(JobError, match=r"--async_save: .*step-00000002 could not .*No space left"):
        if then == "the next step":
            run.saver.fail()
        else:
            run.save(3, is_last=then == "the last save")
    assert run.steps == [1] and not list(run.folder.glob("*.tmp"))
    assert verify.checkpoint_problems(run.folder / "step-00000001") == []
    assert not [line for line in run.said if "step-00000002" in line]


LOST = (
    "Older checkpoints are untouched. The newest whole checkpoint is {0}/step-00000001: 4 step(s) "
    "since then are lost. Once that is mended (a full disk: free space; --keep_last N keeps the "
    "newest N only), the same command with --load auto goes on from there."
)
ALL_LOST = (
    "No space left on device. No whole checkpoint is in {0}: 5 step(s) are lost. Once that "
    "is mended (a full disk: free space; --keep_last N keeps the newest N only), start the same "
    "command again."
)


@pytest.mark.parametrize(("is_saved", "words"), [(True, LOST), (False, ALL_LOST)])
@pytest.mark.parametrize("async_save", [False, True])
def test_a_run_that_cannot_be_saved_says_once_what_is_lost_and_left(
    engine, tmp_path, monkeypatch, async_save, is_saved, words
):
    """Each rank had a message of its own, which spoke of older checkpoints where there were none,
    and of nothing else."""
    run = Run(engine, tmp_path, async_save=async_save)
    if is_saved:
        run.save(1, is_last=True)
    (tmp_path / "step-00000003.tmp").mkdir()
    (tmp_path / "step-00000004").mkdir()  # its manifest was removed first: it is not whole
    broken_writing(monkeypatch, FULL)
    if async_save:
        run.save(2)
        run.written()
    with pytest.raises(JobError) as failed:
        run.save(5, is_last=True)
    message = str(failed.value)
    begin = "--async_save: " if async_save else "the last save failed: "
    assert message.startswith(f"{begin}checkpoint {tmp_path}/step-0000000")
    assert message.endswith(words.format(tmp_path))
    assert is_saved or "untouched" not in message


def test_one_kept_checkpoint_is_not_told_to_keep_fewer(engine, tmp_path, monkeypatch):
    run = Run(engine, tmp_path, async_save=False, keep_last=1)
    broken_writing(monkeypatch, FULL)
    with pytest.raises(JobError, match=r"\(a full disk: free space\), start"):
        run.save(5, is_last=True)


@pytest.mark.parametrize("error", [MemoryError("no room"), SystemExit(3)])
def test_no_error_of_the_thread_is_lost(run, monkeypatch, error):
    def broken(*args: Any) -> None:
        raise error

    monkeypatch.setattr(writing, "finish", broken)
    run.save(1)
    run.written()
    run.saver.step_done()
    assert run.saver.has_failed and run.said == []
    with pytest.raises(RunError, match=f"writing a checkpoint failed: {type(error).__name__}"):
        run.saver.fail()
    assert run.steps == []


def test_a_run_under_nice_saves(run, monkeypatch):
    """A thread of such a user may not go back to a smaller number: it ended before it had written
    anything, and the checkpoint was said to be saved."""

    def refused(kind: int, who: int, priority: int) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("os.setpriority", refused)
    run.save(1)
    run.written()
    run.saver.step_done()
    assert run.steps == [1] and run.saver.saved_step == 1


def test_a_disk_that_is_full_beforehand_is_a_warning(run, monkeypatch):
    """As without --async_save: nothing was begun, and there may be room at the next interval."""
    problem = "0.00 GiB free, a checkpoint needs about 0.01 GiB"
    with monkeypatch.context() as patch:
        patch.setattr(writing, "free_space_problem", lambda *_: problem)
        run.save(1)
        assert run.said == [
            f"warning: {problem} Training goes on; the next save is tried as planned."
        ]
        with pytest.raises(RunError, match="GiB free"):
            run.save(2, is_last=True)
    run.save(3)
    run.written()
    assert run.steps == [3] and not run.saver.has_failed


def test_without_memory_for_a_copy_the_save_waits(engine, tmp_path, monkeypatch):
    monkeypatch.setattr(staging, "free_memory", lambda: 2**20)
    run = Run(engine, tmp_path)
    assert run.said.pop().endswith("until there is, training waits for each checkpoint")
    run.save(1)
    assert run.steps == [1], "it is not written beside the training"
    assert run.said[0].startswith("--async_save: ")
    assert "has 0.00 GiB of memory free" in run.said[0] and "training waits" in run.said[0]
    assert run.said[1] == f"saved {run.folder / 'step-00000001'}"
    monkeypatch.undo()
    run.save(2)
    run.written()
    run.saver.step_done()
    assert "step-00000002 beside the training" in run.said[2]
    # The memory is there now: it is not asked for again.
    monkeypatch.setattr(staging, "free_memory", lambda: 2**20)
    run.save(3)
    run.written()
    assert len(run.said) == 3 and run.steps == [3, 2, 1]


def test_pinned_memory_is_let_go(engine, monkeypatch):
    """The next one in the same process is given the same addresses, and could not be pinned."""
    held, calls = held_state(engine), []
    cudart = SimpleNamespace(
        cudaHostRegister=lambda address, size, flags: calls.append(("pinned", address)),
        cudaHostUnregister=lambda address: calls.append(("let go", address)),
    )
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    monkeypatch.setattr(torch.cuda, "check_error", lambda error: None)
    memory = staging.HostMemory(torch.device("cuda"))
    assert memory.take(held) is None
    address = memory._values.data_ptr()
    assert calls == [("pinned", address)]
    del memory
    assert calls == [("pinned", address), ("let go", address)]


def test_a_run_that_ends_in_an_error_finishes_what_is_under_way(run, held_up):
    run.save(1)
    threading.Timer(0.3, held_up.set).start()
    run.saver.close()
    assert run.steps == [1]


def test_without_the_option_there_is_no_thread_and_no_copy(engine, tmp_path):
    run = Run(engine, tmp_path, async_save=False)
    threads = threading.active_count()
    run.save(1)
    assert run.steps == [1] and threading.active_count() == threads
    assert run.said == [f"saved {tmp_path / 'step-00000001'}"]
    assert run.saver._background is None and run.saver._memory is None


# -- the trial after the first step ----------------------------------------------------------------


@pytest.mark.parametrize("async_save", [False, True])
def test_the_check_leaves_no_trace(engine, tmp_path, async_save):
    run = Run(engine, tmp_path, async_save=async_save)
    run.state.step = 1
    random, before = torch.get_rng_state(), optimizer_hashes(engine)
    run.saver.check()
    assert torch.equal(torch.get_rng_state(), random) and optimizer_hashes(engine) == before
    assert list(tmp_path.iterdir()) == []
    (line,) = run.said
    assert line.startswith("save check: a checkpoint of ") and line.endswith(", and removed")
    assert run.saver.saved_step is None
    run.save(1)
    assert not [line for line in run.said if "waiting" in line]


def test_a_check_without_memory_for_a_copy_waits_as_saves_will(engine, tmp_path, monkeypatch):
    """It ended the run, and blamed --save_dir."""
    monkeypatch.setattr(staging, "free_memory", lambda: 2**20)
    run = Run(engine, tmp_path)
    run.saver.check()
    assert "this checkpoint is written while training waits" in run.said[-2]
    assert run.said[-1].startswith("save check: a checkpoint of ")


@pytest.mark.parametrize("async_save", [False, True])
def test_a_disk_that_changes_what_is_written_is_found(engine, tmp_path, monkeypatch, async_save):
    run, write = Run(engine, tmp_path, async_save=async_save), manifest.Manifest.write

    def damaged(self, directory: Path) -> None:
        write(self, directory)
        path = next((directory / "optimizer").glob("*.safetensors"))
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)

    monkeypatch.setattr(manifest.Manifest, "write", damaged)
    with pytest.raises(RunError, match=r"--save_check: what was written reads otherwise: optimi"):
        run.saver.check()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("async_save", [False, True])
def test_a_disk_that_fills_up_fails_the_check(engine, tmp_path, monkeypatch, async_save):
    run = Run(engine, tmp_path, async_save=async_save)
    broken_writing(monkeypatch, FULL)
    with pytest.raises(RunError, match=r"--save_check: .*No space left.*--no-save_check"):
        run.saver.check()
    assert list(tmp_path.iterdir()) == []


def test_a_check_that_was_killed_is_cleared_away(run):
    (run.folder / writing.CHECK_NAME / "model").mkdir(parents=True)
    run.save(1, is_last=True)
    assert not (run.folder / writing.CHECK_NAME).exists()
    assert step_directories(run.folder) == [run.folder / "step-00000001"]


@pytest.mark.parametrize(
    ("asked", "parameters", "processes", "on_this_host", "interval", "checks"),
    [
        (None, 7e9, 8, 8, 100, False),
        (None, 11e9, 8, 8, 100, True),
        (None, 7e9, 16, 8, 100, True),
        (False, 11e9, 16, 8, 100, False),
        (True, 7e9, 1, 1, 100, True),
        (True, 7e9, 1, 1, None, False),
    ],
)
def test_when_a_checkpoint_is_tried(
    asked, parameters, processes, on_this_host, interval, checks, monkeypatch
):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(on_this_host))
    options = SimpleNamespace(checkpoint=SimpleNamespace(save_interval=interval, save_check=asked))
    engine = SimpleNamespace(
        layout=SimpleNamespace(world_size=processes), shapes={"w": (int(parameters),)}
    )
    saver = SimpleNamespace(options=options, engine=engine)
    assert Saver.checks.fget(saver) is checks
