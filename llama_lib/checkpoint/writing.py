"""One checkpoint on its way to the disk: temporary name, sync, manifest last, rename.

Invariant: at every moment the newest complete checkpoint on disk is loadable; a save that is
killed, or meets a full disk, leaves the older ones untouched. `finish` may run beside the training:
it reads nothing of the run but what it is given.
"""

import importlib.metadata
import logging
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from llama_lib import coordination
from llama_lib.checkpoint.adapters import (
    ADAPTER_WEIGHTS,
    BASE_SAMPLE,
    base_facts,
    save_adapter_config,
)
from llama_lib.checkpoint.manifest import (
    FileRecord,
    Manifest,
    file_record,
    free_space_problem,
    point_best,
    publish,
    remove_old,
    size_problems,
    sync_directory,
    sync_file,
    whole_checkpoints,
    write_json,
)
from llama_lib.checkpoint.parts import STATE, Entry
from llama_lib.checkpoint.state import gather_optimizer, gather_weights, is_writer
from llama_lib.checkpoint.tensors import ShardWriter, write_index
from llama_lib.engine import Engine
from llama_lib.errors import RunError
from llama_lib.inference import ADAPTER, MODEL
from llama_lib.lora import adapter_parameters
from llama_lib.private import allow_readers

logger = logging.getLogger("llama_lib")

OPTIMIZER_INDEX = "optimizer.index.json"
MODEL_INDEX = "model.safetensors.index.json"
# 2% for headers and small files.
SPACE_MARGIN = 1.02
# What --save_check writes; no name of a checkpoint, neither finished nor begun.
CHECK_NAME = "save-check.tmp"
# Names under which a save that was killed may have left something.
LEFTOVERS = ("step-*.tmp", CHECK_NAME)


class Tensors(Protocol):
    """What a checkpoint holds besides descriptions; all ranks iterate, the writers get tensors."""

    def weights(self) -> Iterable[tuple[str, Tensor]]: ...

    def adapters(self) -> Iterable[tuple[str, Tensor]]: ...

    def optimizer(self) -> Iterable[Entry]: ...

    def rng(self) -> dict[str, Tensor]:
        """This rank's random state."""
        ...


class Live:
    """The tensors as they are in the engine; gathered one after the other, between the devices."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        if holds_model(self._engine):
            merged = self._engine.options.model.merge_lora
            yield from gather_weights(self._engine, merged=merged)

    def adapters(self) -> Iterator[tuple[str, Tensor]]:
        if is_writer(self._engine):
            yield from adapter_parameters(self._engine.module)

    def optimizer(self) -> Iterator[Entry]:
        yield from gather_optimizer(self._engine)

    def rng(self) -> dict[str, Tensor]:
        return rng_state(self._engine.device)


def rng_state(device: torch.device) -> dict[str, Tensor]:
    state = {"torch": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def checkpoint_bytes(engine: Engine) -> int:
    def numel(shapes: Mapping[str, tuple[int, ...]]) -> int:
        return sum(math.prod(shape) for shape in shapes.values())

    # The trained tensors in working precision with an fp32 master and two moments.
    size = numel(engine.trained) * (engine.dtype.itemsize + 12)
    if engine.options.model.merge_lora:
        size += numel(engine.shapes) * engine.dtype.itemsize
    return int(size * SPACE_MARGIN)


def holds_model(engine: Engine) -> bool:
    """Whether a checkpoint has a whole model in it, not adapters alone."""
    return not engine.options.model.lora_rank or engine.options.model.merge_lora


# -- what is written at once, while the run stands still ----------------------------------------


@dataclass(frozen=True)
class Description:
    """What rank 0 writes down of a run beside its tensors.

    Args:
        records: contents of JSON files, by name.
        end_token_ids: ids at which generation stops (None: the tokenizer's end of text).
    """

    records: Mapping[str, Any]
    tokenizer: Any = None
    end_token_ids: Sequence[int] | None = None


@dataclass(frozen=True)
class Draft:
    """A checkpoint that has been begun.

    Args:
        final: where it will be; None: it stays where it is, under its temporary name.
        keep_last: newest checkpoints to keep; `best` is kept besides.
        manifest: without files.
        weights, state: names of all tensors that it has to hold.
    """

    temporary: Path
    final: Path | None
    keep_last: int | None
    best: Path | None
    manifest: Manifest
    folders: tuple[str, ...]
    weights: frozenset[str]
    state: frozenset[str]


def begin(
    engine: Engine,
    step: int,
    temporary: Path,
    final: Path | None,
    description: Description,
    keep_last: int | None = None,
    best: Path | None = None,
) -> Draft:
    """Make room and the folder, and write all but the tensors; called by all ranks.

    Raises:
        RunError: on every rank; nothing is left of the draft.
    """
    adapter = (ADAPTER,) if engine.options.model.lora_rank else ()
    model = (MODEL,) if holds_model(engine) else ()
    draft = Draft(
        temporary,
        final,
        keep_last,
        best,
        Manifest(step, engine.layout.plugin, asdict(engine.layout), _versions()),
        (*model, *adapter, "optimizer", "rng"),
        frozenset(engine.shapes) if model else frozenset(),
        frozenset(f"{name}/{key}" for name in engine.names for key in STATE),
    )
    together(_prepare_directory, engine, draft)
    together(_whole_or_gone, draft, _describe, engine, description, draft)
    return draft


def _versions() -> dict[str, str]:
    names = ("torch", "transformers", "colossalai", "datasets", "safetensors")
    return {name: importlib.metadata.version(name) for name in names}


def together(action: Any, *args: Any, group: Any = None) -> None:
    """Run `action` on rank 0; if it fails there, every rank raises RunError.

    Args:
        group: as for `coordination.gather`.
    """
    outcome: str | None = None
    if dist.get_rank() == 0:
        try:
            action(*args)
        except Exception as error:  # any failure must reach the ranks that wait for the outcome
            outcome = f"{error}"
    outcome = coordination.from_rank_0(outcome, group)
    if outcome is not None:
        raise RunError(outcome)


def _prepare_directory(engine: Engine, draft: Draft) -> None:
    parent = draft.temporary.parent
    parent.mkdir(parents=True, exist_ok=True)
    for pattern in LEFTOVERS:
        for leftover in parent.glob(pattern):
            shutil.rmtree(leftover)
    problem = free_space_problem(parent, checkpoint_bytes(engine))
    if problem:
        raise OSError(problem)


def _whole_or_gone(draft: Draft, action: Any, *args: Any) -> None:
    """Run `action`; if it fails, nothing is left of the draft."""
    try:
        action(*args)
    except Exception as failure:
        shutil.rmtree(draft.temporary, ignore_errors=True)
        older = ""
        with suppress(OSError):  # a disk that fails may not even be read
            if whole_checkpoints(draft.temporary.parent):
                older = " Older checkpoints are untouched."
        raise OSError(
            f"checkpoint {draft.final or draft.temporary} could not be written: {failure}.{older}"
        ) from None


def _describe(engine: Engine, description: Description, draft: Draft) -> None:
    temporary = draft.temporary
    for folder in draft.folders:
        (temporary / folder).mkdir(parents=True)
    if MODEL in draft.folders:
        config = engine.module.config.__class__.from_dict(engine.module.config.to_dict())
        config.torch_dtype, config.use_cache = engine.dtype, True
        config.architectures = [type(engine.module).__name__]
        config.save_pretrained(temporary / MODEL)
        _write_serving_files(engine, description, temporary / MODEL)
    if ADAPTER in draft.folders:
        save_adapter_config(engine.model, temporary / ADAPTER)
        _write_serving_files(engine, description, temporary / ADAPTER)
        write_json(temporary / BASE_SAMPLE, base_facts(engine))
    for name, record in description.records.items():
        write_json(temporary / name, record)


def _write_serving_files(engine: Engine, description: Description, folder: Path) -> None:
    """The tokenizer with its chat template, and where generation begins and ends."""
    generation, tokenizer = engine.module.generation_config, description.tokenizer
    # Training goes without the cache of keys and values; without it serving takes hours.
    generation.use_cache = True
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
        generation.eos_token_id = tokenizer.eos_token_id
        generation.bos_token_id = tokenizer.bos_token_id
        generation.pad_token_id = tokenizer.pad_token_id
    if description.end_token_ids is not None:
        generation.eos_token_id = list(description.end_token_ids)
    generation.save_pretrained(folder)


# -- the tensors, and the end -------------------------------------------------------------------


IndexParts = tuple[dict[str, str], dict[str, str], dict[str, int]]
# Of a rank: its first error, its files, its part of the indexes.
Written = tuple[str | None, dict[str, FileRecord], IndexParts]


def finish(draft: Draft, tensors: Tensors, group: Any = None) -> None:
    """Write the tensors, then the manifest, and put the checkpoint in its place; all ranks call it.

    Args:
        group: as for `coordination.gather`.

    Raises:
        RunError: on every rank, if any rank could not write; nothing is left of the draft.
    """
    collected = coordination.gather(_write_tensors(draft.temporary, tensors), group)
    together(_whole_or_gone, draft, _complete, draft, collected, group=group)


def _write_tensors(temporary: Path, tensors: Tensors) -> Written:
    """This rank's shards; the first error instead of an exception, so that collectives go on."""
    rank = dist.get_rank()
    weights = ShardWriter(temporary, MODEL, f"model-{rank:05d}")
    for name, tensor in tensors.weights():
        weights.add(name, tensor)
    weights.flush()
    adapters = ShardWriter(temporary, ADAPTER, ADAPTER_WEIGHTS, shard_bytes=None)
    for name, tensor in tensors.adapters():
        adapters.add(name, tensor)
    adapters.flush()
    moments = ShardWriter(temporary, "optimizer", f"optimizer-{rank:05d}")
    steps = {}
    for name, adam_step, state in tensors.optimizer():
        steps[name] = adam_step
        for key, tensor in state.items():
            moments.add(f"{name}/{key}", tensor)
    moments.flush()
    error = weights.error or adapters.error or moments.error
    files = weights.files | adapters.files | moments.files
    try:
        path = temporary / "rng" / f"rank-{rank:05d}.safetensors"
        save_file(tensors.rng(), path)
        allow_readers(path)
        sync_file(path)
        files[f"rng/{path.name}"] = file_record(path)
    except Exception as failure:  # safetensors raises its own class for a full disk
        error = error or f"{failure}"
    return error, files, (weights.weight_map, moments.weight_map, steps)


def _complete(draft: Draft, collected: Sequence[Written]) -> None:
    """What rank 0 adds once all tensors are on disk; the manifest last, then the rename."""
    errors = [error for error, _, _ in collected if error]
    if errors:
        raise OSError(errors[0])
    _write_manifest(draft, collected)
    if draft.final is None:
        return
    with _only_warned("the file `latest` could not be written", unless=draft.temporary):
        publish(draft.temporary, draft.final)
    with _only_warned("the file `best` could not be written"):
        point_best(draft.final.parent, draft.best)
    with _only_warned("--keep_last: an old checkpoint could not be removed"):
        remove_old(draft.final.parent, draft.keep_last, draft.best)


def _write_manifest(draft: Draft, collected: Sequence[Written]) -> None:
    temporary = draft.temporary
    files: dict[str, FileRecord] = {}
    weight_map: dict[str, str] = {}
    moment_map: dict[str, str] = {}
    steps: dict[str, int] = {}
    for _, part, (weights, moments, part_steps) in collected:
        files |= part
        weight_map |= weights
        moment_map |= moments
        steps |= part_steps
    if MODEL in draft.folders:
        if draft.weights - set(weight_map):
            raise OSError(f"the index lists {len(weight_map)} of {len(draft.weights)} tensors")
        write_index(temporary / MODEL / MODEL_INDEX, weight_map)
    if draft.state != set(moment_map):
        raise OSError(f"optimizer state has {len(moment_map)} of {len(draft.state)} tensors")
    write_index(temporary / "optimizer" / OPTIMIZER_INDEX, moment_map, adam_steps=steps)
    for path in temporary.rglob("*"):
        name = str(path.relative_to(temporary))
        if path.is_file() and name not in files:
            sync_file(path)
            files[name] = file_record(path)
    for folder in draft.folders:
        sync_directory(temporary / folder)
    draft.manifest.files = dict(sorted(files.items()))
    problems = size_problems(temporary, draft.manifest)
    if problems:
        raise OSError(
            f"{problems[0]} as seen by rank 0: --save_dir must be one directory shared by all hosts"
        )
    draft.manifest.write(temporary)


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
