"""Saving and loading a run: temporary name, sync, manifest last, rename; verified before loading.

Invariant: at every moment the newest complete checkpoint on disk is loadable; a save that is
killed, or meets a full disk, leaves the older ones untouched.
"""

import dataclasses
import importlib.metadata
import json
import logging
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from llama_lib import coordination
from llama_lib.checkpoint.adapters import (
    ADAPTER_WEIGHTS,
    BASE_SAMPLE,
    base_facts,
    load_adapters,
    save_adapter_config,
)
from llama_lib.checkpoint.manifest import (
    FileRecord,
    Manifest,
    file_record,
    free_space_problem,
    hash_problems,
    point_best,
    publish,
    remove_old,
    size_problems,
    step_directories,
    step_directory,
    sync_directory,
    sync_file,
    write_json,
)
from llama_lib.checkpoint.state import (
    MASTER,
    MOMENTS,
    gather_optimizer,
    gather_weights,
    is_writer,
    scatter_optimizer,
)
from llama_lib.checkpoint.tensors import (
    ShardWriter,
    TensorReader,
    write_index,
)
from llama_lib.checkpoint.weights import load_weights
from llama_lib.data.position import Position
from llama_lib.engine import Engine
from llama_lib.errors import RunError, UserError
from llama_lib.inference import ADAPTER, MODEL
from llama_lib.lora import adapter_parameters

logger = logging.getLogger("llama_lib")

OPTIMIZER_INDEX = "optimizer.index.json"
MODEL_INDEX = "model.safetensors.index.json"
# 2% for headers and small files.
SPACE_MARGIN = 1.02


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


def _versions() -> dict[str, str]:
    names = ("torch", "transformers", "colossalai", "datasets", "safetensors")
    return {name: importlib.metadata.version(name) for name in names}


def checkpoint_bytes(engine: Engine) -> int:
    def numel(shapes: Mapping[str, tuple[int, ...]]) -> int:
        return sum(math.prod(shape) for shape in shapes.values())

    # The trained tensors in working precision with an fp32 master and two moments.
    size = numel(engine.trained) * (engine.dtype.itemsize + 12)
    if engine.options.model.merge_lora:
        size += numel(engine.shapes) * engine.dtype.itemsize
    return int(size * SPACE_MARGIN)


def _holds_model(engine: Engine) -> bool:
    """Whether a checkpoint has a whole model in it, not adapters alone."""
    return not engine.options.model.lora_rank or engine.options.model.merge_lora


# -- saving -------------------------------------------------------------------------------------


def save(
    engine: Engine,
    state: TrainerState,
    tokenizer: Any,
    save_dir: str,
    keep_last: int | None,
    end_token_ids: Sequence[int] | None = None,
) -> Path:
    """Write the checkpoint of `state.step`; called by all ranks.

    Args:
        keep_last: newest checkpoints to keep; the one of `state.best` is kept besides.
        end_token_ids: ids at which generation stops (None: the tokenizer's end of text).

    Raises:
        RunError: on every rank, if any rank could not write; older checkpoints are untouched.
    """
    final = step_directory(save_dir, state.step)
    temporary = final.with_suffix(".tmp")
    _together(_prepare_directory, engine, temporary)
    error, files, weight_maps = _write_tensors(engine, temporary)
    collected = coordination.gather((error, files, weight_maps))

    def finish() -> None:
        errors = [error for error, _, _ in collected if error]
        if errors:
            raise OSError(errors[0])
        _write_description(engine, state, tokenizer, end_token_ids, temporary, collected)
        with _only_warned("the file `latest` could not be written", unless=temporary):
            publish(temporary, final)
        best = None if state.best is None else step_directory(save_dir, state.best["step"])
        with _only_warned("the file `best` could not be written"):
            point_best(Path(save_dir), best)
        with _only_warned("--keep_last: an old checkpoint could not be removed"):
            remove_old(Path(save_dir), keep_last, best)

    try:
        _together(finish)
    except RunError as failure:
        if dist.get_rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise RunError(
            f"checkpoint {final} could not be written: {failure}. Older checkpoints are untouched."
        ) from None
    return final


@contextmanager
def _only_warned(what: str, unless: Path | None = None) -> Iterator[None]:
    """An OSError inside becomes a warning: the new checkpoint is whole all the same.

    Args:
        unless: where the checkpoint lies while it is not in its place; as long as it does, the
            error is one.
    """
    try:
        yield
    except OSError as failure:
        if unless is not None and unless.exists():
            raise
        logger.warning("%s: %s", what, failure)


def _together(action: Any, *args: Any) -> None:
    """Run `action` on rank 0; if it fails there, every rank raises."""
    outcome: str | None = None
    if dist.get_rank() == 0:
        try:
            action(*args)
        except Exception as error:  # any failure must reach the ranks that wait for the outcome
            outcome = f"{error}"
    outcome = coordination.from_rank_0(outcome)
    if outcome is not None:
        raise RunError(outcome)


def _prepare_directory(engine: Engine, temporary: Path) -> None:
    temporary.parent.mkdir(parents=True, exist_ok=True)
    for leftover in temporary.parent.glob("step-*.tmp"):
        shutil.rmtree(leftover)
    problem = free_space_problem(temporary.parent, checkpoint_bytes(engine))
    if problem:
        raise OSError(problem)
    for folder in _folders(engine):
        (temporary / folder).mkdir(parents=True)


def _folders(engine: Engine) -> list[str]:
    adapter = [ADAPTER] if engine.options.model.lora_rank else []
    model = [MODEL] if _holds_model(engine) else []
    return [*model, *adapter, "optimizer", "rng"]


IndexParts = tuple[dict[str, str], dict[str, str], dict[str, int]]


def _write_tensors(
    engine: Engine, temporary: Path
) -> tuple[str | None, dict[str, FileRecord], IndexParts]:
    """This rank's shards; the first error instead of an exception, so that collectives go on."""
    rank = dist.get_rank()
    weights = ShardWriter(temporary, MODEL, f"model-{rank:05d}")
    if _holds_model(engine):
        for name, tensor in gather_weights(engine, merged=engine.options.model.merge_lora):
            weights.add(name, tensor)
        weights.flush()
    adapters = ShardWriter(temporary, ADAPTER, ADAPTER_WEIGHTS, shard_bytes=None)
    if is_writer(engine):
        for name, tensor in adapter_parameters(engine.module):
            adapters.add(name, tensor)
        adapters.flush()
    moments = ShardWriter(temporary, "optimizer", f"optimizer-{rank:05d}")
    steps = {}
    for name, adam_step, tensors in gather_optimizer(engine):
        steps[name] = adam_step
        for key, tensor in tensors.items():
            moments.add(f"{name}/{key}", tensor)
    moments.flush()
    error = weights.error or adapters.error or moments.error
    files = weights.files | adapters.files | moments.files
    try:
        path = temporary / "rng" / f"rank-{rank:05d}.safetensors"
        save_file(_rng_state(engine.device), path)
        sync_file(path)
        files[f"rng/{path.name}"] = file_record(path)
    except Exception as failure:  # safetensors raises its own class for a full disk
        error = error or f"{failure}"
    return error, files, (weights.weight_map, moments.weight_map, steps)


def _write_description(
    engine: Engine,
    state: TrainerState,
    tokenizer: Any,
    end_token_ids: Sequence[int] | None,
    temporary: Path,
    collected: list[Any],
) -> None:
    """Everything rank 0 adds once all tensors are on disk; the manifest last."""
    files: dict[str, FileRecord] = {}
    weight_map: dict[str, str] = {}
    moment_map: dict[str, str] = {}
    steps: dict[str, int] = {}
    for _, part, (weights, moments, part_steps) in collected:
        files |= part
        weight_map |= weights
        moment_map |= moments
        steps |= part_steps
    if _holds_model(engine):
        if set(engine.shapes) - set(weight_map):
            raise OSError(f"the index lists {len(weight_map)} of {len(engine.shapes)} tensors")
        write_index(temporary / MODEL / MODEL_INDEX, weight_map)
    expected = {f"{name}/{key}" for name in engine.names for key in (MASTER, *MOMENTS)}
    if expected != set(moment_map):
        raise OSError(f"optimizer state has {len(moment_map)} of {len(expected)} tensors")
    write_index(temporary / "optimizer" / OPTIMIZER_INDEX, moment_map, adam_steps=steps)
    if _holds_model(engine):
        config = engine.module.config.__class__.from_dict(engine.module.config.to_dict())
        config.torch_dtype, config.use_cache = engine.dtype, True
        config.architectures = [type(engine.module).__name__]
        config.save_pretrained(temporary / MODEL)
        _write_serving_files(engine, tokenizer, end_token_ids, temporary / MODEL)
    if engine.options.model.lora_rank:
        save_adapter_config(engine.model, temporary / ADAPTER)
        _write_serving_files(engine, tokenizer, end_token_ids, temporary / ADAPTER)
        write_json(temporary / BASE_SAMPLE, base_facts(engine))
    write_json(temporary / "lr_scheduler.json", state.schedule)
    write_json(temporary / "trainer_state.json", asdict(state))
    for path in temporary.rglob("*"):
        name = str(path.relative_to(temporary))
        if path.is_file() and name not in files:
            sync_file(path)
            files[name] = file_record(path)
    for folder in _folders(engine):
        sync_directory(temporary / folder)
    files = dict(sorted(files.items()))
    layout = asdict(engine.layout)
    manifest = Manifest(state.step, engine.layout.plugin, layout, _versions(), files)
    problems = size_problems(temporary, manifest)
    if problems:
        raise OSError(
            f"{problems[0]} as seen by rank 0: --save_dir must be one directory shared by all hosts"
        )
    manifest.write(temporary)


def _write_serving_files(
    engine: Engine, tokenizer: Any, end_token_ids: Sequence[int] | None, folder: Path
) -> None:
    """The tokenizer with its chat template, and where generation begins and ends."""
    generation = engine.module.generation_config
    # Training goes without the cache of keys and values; without it serving takes hours.
    generation.use_cache = True
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
        generation.eos_token_id = tokenizer.eos_token_id
        generation.bos_token_id = tokenizer.bos_token_id
        generation.pad_token_id = tokenizer.pad_token_id
    if end_token_ids is not None:
        generation.eos_token_id = list(end_token_ids)
    generation.save_pretrained(folder)


def _rng_state(device: torch.device) -> dict[str, torch.Tensor]:
    state = {"torch": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


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
    if load != "auto":
        problems = verify_distributed(Path(load))
        if problems:
            raise RunError(f"--load {load} is damaged: {'; '.join(problems[:5])}")
        return Path(load), []
    passed_over, reason = [], None
    for directory in coordination.from_rank_0(step_directories(save_dir)):
        problems = verify_distributed(directory)
        if not problems:
            reason = unfit(read_state(directory))
            if reason is None:
                return directory, passed_over
            passed_over.append(f"{directory.name} is passed over: {reason}")
            continue
        passed_over.append(f"{directory.name} is damaged, passed over: {'; '.join(problems[:3])}")
    if reason is not None:
        raise UserError(f"--load auto: no checkpoint in {save_dir} is old enough: {reason}.")
    if passed_over:
        raise RunError(f"--load auto: no good checkpoint in {save_dir}: " + " | ".join(passed_over))
    return None, [f"--load auto: no checkpoint in {save_dir}, starting afresh"]


def read_state(directory: Path) -> TrainerState:
    return TrainerState(**json.loads((directory / "trainer_state.json").read_text()))


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
    reader = TensorReader(directory / "optimizer", OPTIMIZER_INDEX)
    adam_steps = reader.index["adam_steps"]

    def read(name: str) -> tuple[int, dict[str, torch.Tensor]]:
        return adam_steps[name], {key: reader.tensor(f"{name}/{key}") for key in (MASTER, *MOMENTS)}

    scatter_optimizer(engine, read)
    scaler = engine.grad_scaler()
    if scaler is not None and state.scaler is not None:
        scaler._scale = torch.tensor([state.scaler["scale"]], device=engine.device)
        scaler._growth_step = state.scaler["growth_step"]
        scaler._hysteresis_step = state.scaler["hysteresis_step"]
    rng = directory / "rng" / f"rank-{dist.get_rank():05d}.safetensors"
    if rng.is_file():  # a larger world than the saved one has ranks without a stored state
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
