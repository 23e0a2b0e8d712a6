"""Checks of saving beside the training that run inside a process group; see checks.py.

Invariant: every rank returns the same; what the data must be is said in the tests, not here.
"""

import resource
import threading
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist

from llama_lib import coordination
from llama_lib.checkpoint import store, writing
from llama_lib.checkpoint.background import Background
from llama_lib.checkpoint.manifest import Manifest
from llama_lib.checkpoint.staging import HostMemory, Staged
from llama_lib.checkpoint.state import held_state
from llama_lib.checkpoint.verify import checkpoint_problems
from llama_lib.engine import Engine
from tests.distributed import lora_checks
from tests.distributed.cases import SEED
from tests.distributed.checks import build, optimizer_hashes, train_step

Report = dict[str, Any]


def _state(engine: Engine, step: int) -> store.TrainerState:
    return store.TrainerState(step, 0, 0, 0, SEED, {}, scaler=store.scaler_state(engine))


def _at_once(engine: Engine, folder: Path, step: int) -> Path:
    return store.save(engine, _state(engine, step), None, str(folder / "at_once"), None)


class Beside:
    """Writes checkpoints beside the training, each only once `go_on` is set."""

    def __init__(self, engine: Engine, folder: Path) -> None:
        self.engine, self.folder = engine, folder / "beside"
        self.background, self.memory = Background(), HostMemory(engine.device)
        self.go_on = threading.Event()

    def begin(self, step: int) -> Path:
        held = held_state(self.engine)
        assert self.memory.take(held) is None
        draft = store.begin(
            self.engine, _state(self.engine, step), None, str(self.folder), keep_last=None
        )
        staged = Staged(self.engine, self.memory, held, self.background.group)
        group = self.background.group
        self.go_on.clear()

        def work() -> None:
            self.go_on.wait()
            writing.finish(draft, staged, group)

        self.background.start(work)
        assert draft.final is not None
        return draft.final

    def end(self) -> None:
        self.go_on.set()
        self.background.wait()


def _files(path: Path) -> dict[str, Any]:
    coordination.barrier()
    return asdict(Manifest.read(path))


def _compared(engine: Engine, folder: Path) -> Report:
    """A step saved at once and beside the training, which goes on while it is written; twice, for
    the second copy is made in the memory of the first."""
    beside = Beside(engine, folder)
    report: Report = {"at_once": [], "beside": [], "problems": [], "training_went_on": []}
    for step in (2, 6):
        for each in range(step - 1, step + 1):
            train_step(engine, each)
        path = _at_once(engine, folder, step)
        before = optimizer_hashes(engine)
        written = beside.begin(step)
        train_step(engine, step + 1)
        assert not written.exists()
        beside.go_on.set()
        train_step(engine, step + 2)
        beside.end()
        report["training_went_on"].append(before != optimizer_hashes(engine))
        report["at_once"].append(_files(path))
        report["beside"].append(_files(written))
        report["problems"] += checkpoint_problems(written)
    report["failure"] = beside.background.failure
    return report


# -- the checks ------------------------------------------------------------------------------------


def beside_training(layout: str, precision: str, folder: Path) -> Report:
    return _compared(build(layout, precision), folder)


def beside_lora(layout: str, precision: str, folder: Path) -> Report:
    base = lora_checks.base_folder(layout, folder)
    return _compared(lora_checks.build(layout, precision, base), folder)


def beside_merged_lora(layout: str, precision: str, folder: Path) -> Report:
    base = lora_checks.base_folder(layout, folder)
    return _compared(lora_checks.build(layout, precision, base, merge=True), folder)


def beside_unmoved(layout: str, precision: str, folder: Path) -> Report:
    """Before the first step there are no moments, and saving must leave none behind."""
    engine = build(layout, precision)
    path, beside = _at_once(engine, folder, 0), Beside(engine, folder)
    written = beside.begin(0)
    beside.end()
    kept = [sorted(entry) for entry in engine.optimizer.optim.state.values() if entry]
    return {"at_once": _files(path), "beside": _files(written), "kept": kept}


def beside_equals_undisturbed(layout: str, precision: str, folder: Path) -> Report:
    """Losses and state of a run that saves beside every step, and of one that never saves."""
    runs = {}
    for saves in (False, True):
        engine = build(layout, precision)
        beside = Beside(engine, folder)
        losses = []
        for step in range(1, 6):
            losses.append(train_step(engine, step))
            if saves:
                beside.end()
                beside.begin(step)
                beside.go_on.set()
        beside.end()
        runs[saves] = {"losses": losses, "state": optimizer_hashes(engine)}
    return {"with": runs[True], "without": runs[False]}


def beside_full_disk(layout: str, precision: str, folder: Path) -> Report:
    """Every file of the second checkpoint stops growing early, as on a disk that fills up."""
    engine = build(layout, precision)
    train_step(engine, 1)
    beside = Beside(engine, folder)
    first = beside.begin(1)
    beside.end()
    beside.begin(2)
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**14, unlimited[1]))
    beside.end()
    resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    coordination.barrier()
    return {
        "messages": coordination.gather(beside.background.failure),
        "first": str(first),
        "found": str(store.find_checkpoint("auto", str(first.parent))[0]),
        "left": sorted(path.name for path in first.parent.iterdir()),
        "ranks": dist.get_world_size(),
    }


CHECKS: dict[str, Callable[[str, str, Path], Report]] = {
    check.__name__: check
    for check in (
        beside_training,
        beside_lora,
        beside_merged_lora,
        beside_unmoved,
        beside_equals_undisturbed,
        beside_full_disk,
    )
}
