"""Saving and loading a run: its state beside the tensors; verified before anything is loaded.

Invariant: what is loaded was whole, and loading brings back every bit that `writing` wrote.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file

from llama_lib import coordination
from llama_lib.checkpoint import writing
from llama_lib.checkpoint.adapters import load_adapters
from llama_lib.checkpoint.manifest import (
    Manifest,
    hash_problems,
    size_problems,
    step_directories,
    step_directory,
)
from llama_lib.checkpoint.parts import STATE
from llama_lib.checkpoint.state import scatter_optimizer
from llama_lib.checkpoint.tensors import TensorReader
from llama_lib.checkpoint.weights import load_weights
from llama_lib.checkpoint.writing import (
    CHECK_NAME,
    LEFTOVERS,
    OPTIMIZER_INDEX,
    Description,
    Draft,
    Live,
)
from llama_lib.data.position import Position
from llama_lib.engine import Engine
from llama_lib.errors import RunError, UserError
from llama_lib.inference import MODEL


@dataclass
class TrainerState:
    """Everything of a run that is not a tensor; stored as trainer_state.json.

    `samples` counts those trained on. The data position is `next_sample` of the global order
    (None: equal to `samples`, as in checkpoints of older versions); `skips` are sample ranges
    [first, stop) left out, `skipped_steps` the options that asked for it; `stream` is what a stream
    needs besides. `consumed` counts training tokens by source. `best` is {"step", "loss", "rows"}
    of the saved checkpoint with the lowest held-out loss so far, and how many held-out rows it is
    of.
    """

    step: int
    tokens: int
    samples: int
    epoch: float
    seed: int
    options: dict[str, Any]
    loss: float | None = None
    loss_scale: float | None = None
    scaler: dict[str, Any] | None = None
    schedule: dict[str, Any] = dataclasses.field(default_factory=dict)
    model: dict[str, Any] = dataclasses.field(default_factory=dict)
    data: dict[str, Any] = dataclasses.field(default_factory=dict)
    next_sample: int | None = None
    skips: list[list[int]] = dataclasses.field(default_factory=list)
    skipped_steps: list[str] = dataclasses.field(default_factory=list)
    stream: dict[str, Any] = dataclasses.field(default_factory=dict)
    consumed: dict[str, int] = dataclasses.field(default_factory=dict)
    best: dict[str, Any] | None = None

    @property
    def position(self) -> Position:
        """Where the next step begins in the data."""
        sample = self.samples if self.next_sample is None else self.next_sample
        return Position(self.step, sample, tuple((a, b) for a, b in self.skips))


# -- saving -------------------------------------------------------------------------------------


def begin(
    engine: Engine,
    state: TrainerState,
    tokenizer: Any,
    save_dir: str,
    keep_last: int | None,
    end_token_ids: Sequence[int] | None = None,
    is_check: bool = False,
) -> Draft:
    """Begin the checkpoint of `state.step`, for `writing.finish`; called by all ranks.

    Args:
        keep_last: newest checkpoints to keep; the one of `state.best` is kept besides.
        end_token_ids: ids at which generation stops (None: the tokenizer's end of text).
        is_check: it stays under a name that is never taken for a checkpoint's.

    Raises:
        RunError: on every rank; older checkpoints are untouched.
    """
    final = None if is_check else step_directory(save_dir, state.step)
    temporary = Path(save_dir) / CHECK_NAME if final is None else final.with_suffix(".tmp")
    best = None if state.best is None else step_directory(save_dir, state.best["step"])
    records = {"lr_scheduler.json": state.schedule, "trainer_state.json": asdict(state)}
    description = Description(records, tokenizer, end_token_ids)
    return writing.begin(engine, state.step, temporary, final, description, keep_last, best)


def save(
    engine: Engine,
    state: TrainerState,
    tokenizer: Any,
    save_dir: str,
    keep_last: int | None,
    end_token_ids: Sequence[int] | None = None,
) -> Path:
    """Write the checkpoint of `state.step`, as `begin` has it; called by all ranks.

    Raises:
        RunError: on every rank, if any rank could not write; older checkpoints are untouched.
    """
    draft = begin(engine, state, tokenizer, save_dir, keep_last, end_token_ids)
    writing.finish(draft, Live(engine))
    return step_directory(save_dir, state.step)


# -- loading ------------------------------------------------------------------------------------


def verify_distributed(directory: Path) -> list[str]:
    """Problems of a checkpoint; every rank hashes its share of the files. Same list everywhere."""
    try:
        manifest = Manifest.read(directory)
        problems = size_problems(directory, manifest)
        if not problems:
            mine = sorted(manifest.files)[dist.get_rank() :: dist.get_world_size()]
            problems = hash_problems(directory, manifest, mine)
    except RunError as error:  # another host may see what this one does not
        problems = [str(error)]
    return sorted({problem for part in coordination.gather(problems) for problem in part})


def find_checkpoint(
    load: str,
    save_dir: str,
    unfit: Callable[[TrainerState], str | None] = lambda state: None,
) -> tuple[Path | None, list[str]]:
    """The checkpoint to resume from and the lines that say what was passed over.

    Args:
        unfit: why `auto` has to look for an older one than that of a state, if it has to.

    Raises:
        UserError: every good checkpoint that `auto` found is unfit.
        RunError: the named checkpoint, or every one that `auto` found, is damaged.
    """
    lines = coordination.from_rank_0(_unfinished(save_dir))
    if load != "auto":
        problems = verify_distributed(Path(load))
        if problems:
            raise RunError(f"--load {load} is damaged: {'; '.join(problems[:5])}")
        return Path(load), lines
    passed_over, reason = [], None
    for directory in coordination.from_rank_0(step_directories(save_dir)):
        problems = verify_distributed(directory)
        if not problems:
            reason = unfit(read_state(directory))
            if reason is None:
                return directory, [*passed_over, *lines]
            passed_over.append(f"{directory.name} is passed over: {reason}")
            continue
        passed_over.append(f"{directory.name} is damaged, passed over: {'; '.join(problems[:3])}")
    if reason is not None:
        raise UserError(f"--load auto: no checkpoint in {save_dir} is old enough: {reason}.")
    if passed_over:
        raise RunError(f"--load auto: no good checkpoint in {save_dir}: " + " | ".join(passed_over))
    return None, [*lines, f"--load auto: no checkpoint in {save_dir}, starting afresh"]


def _unfinished(save_dir: str) -> list[str]:
    """One line if there is something of saves that were killed."""
    found = sorted({path.name for name in LEFTOVERS for path in Path(save_dir).glob(name)})
    if not found:
        return []
    return [
        f"{', '.join(found)} in {save_dir}: what is left of a save that did not finish; it is "
        "never loaded, and the next save removes it"
    ]


def read_state(directory: Path) -> TrainerState:
    with _of_this_program(directory):
        return TrainerState(**json.loads((directory / "trainer_state.json").read_text("utf-8")))


@contextmanager
def _of_this_program(directory: Path) -> Iterator[None]:
    """Files with the right hashes may still not be what their names say, pickles for instance."""
    try:
        yield
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"--load {directory} was not written by this program, or not by this version of it "
            f"({type(error).__name__}: {error}); choose another checkpoint."
        ) from None


def load(engine: Engine, directory: Path, state: TrainerState) -> None:
    """Put a verified checkpoint into the engine: weights, optimizer, scaler, random state.

    An engine with adapters has its base loaded already; the checkpoint brings the adapters.

    Raises:
        UserError: the checkpoint does not fit the model, or its adapters belong to another base.
    """
    if engine.options.model.lora_rank:
        load_adapters(engine, directory)
    else:
        load_weights(engine, directory / MODEL, "--load")
    with _of_this_program(directory):
        reader = TensorReader(directory / "optimizer", OPTIMIZER_INDEX)
        adam_steps = reader.index["adam_steps"]

    def read(name: str) -> tuple[int, dict[str, torch.Tensor]]:
        with _of_this_program(directory):
            return adam_steps[name], {key: reader.tensor(f"{name}/{key}") for key in STATE}

    scatter_optimizer(engine, read)
    scaler = engine.grad_scaler()
    if scaler is not None and state.scaler is not None:
        scaler._scale = torch.tensor([state.scaler["scale"]], device=engine.device)
        scaler._growth_step = state.scaler["growth_step"]
        scaler._hysteresis_step = state.scaler["hysteresis_step"]
    rng = directory / "rng" / f"rank-{dist.get_rank():05d}.safetensors"
    if rng.is_file():  # a larger world than the saved one has ranks without a stored state
        with _of_this_program(directory):
            states = load_file(rng)
        torch.set_rng_state(states["torch"])
        if "cuda" in states and engine.device.type == "cuda":
            torch.cuda.set_rng_state(states["cuda"], engine.device)
    coordination.barrier()


def scaler_state(engine: Engine) -> dict[str, Any] | None:
    """Loss scale and its two counters, which ColossalAI's own state_dict leaves out."""
    scaler = engine.grad_scaler()
    if scaler is None:
        return None
    return {
        "scale": float(scaler.scale),
        "growth_step": scaler._growth_step,
        "hysteresis_step": scaler._hysteresis_step,
    }
