"""Weights of a Hugging Face folder into the shards of a boosted model, tensor by tensor.

Invariant: beside the model a rank never holds more than one tensor of the folder in memory of its
own, or what gathering a chunk takes under gemini: files are mapped, and every rank copies only its
part out of them.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from llama_lib import coordination
from llama_lib.checkpoint.hybrid import cut_state, cut_weight, flat_share, gather_blocks
from llama_lib.checkpoint.resize import NewRows, grown_table, mean_row
from llama_lib.checkpoint.state import gather_weights
from llama_lib.checkpoint.tensors import (
    COMPARED_ELEMENTS,
    VOCABULARY_TABLES,
    TensorReader,
    open_weights,
    same_values,
)
from llama_lib.data.progress import Progress
from llama_lib.engine import Engine
from llama_lib.errors import RunError, UserError
from llama_lib.lora import base_parameters
from llama_lib.progress import made

# A part of this rank's shards, and how what belongs there is cut out of the full tensor.
Place = tuple[Tensor, Callable[[Tensor], Tensor]]
# Where something lies in the full tensor, and what is there.
Part = tuple[tuple[slice, ...], Tensor]
WHOLE = (slice(None),)


def load_weights(
    engine: Engine,
    folder: Path,
    flag: str,
    progress: bool = True,
    new_rows: NewRows | None = None,
) -> None:
    """Load a Hugging Face folder into the boosted model and its fp32 masters, and check it.

    The masters keep the precision of the files. Called by all ranks.

    Args:
        flag: the option that named the folder, for messages.
        progress: whether rank 0 shows how far it is.
        new_rows: tokens that the weights do not know; the tables by vocabulary may then have fewer
            rows than the model's.

    Raises:
        UserError: no safetensors there, names or shapes differ from the model's, or a value is not
            finite in the working precision.
        RunError: a tensor in the model is not the one in the file.
    """
    reader = open_weights(folder, engine.shapes, flag, grows=new_rows is not None)
    source = _Source(reader, engine.shapes, new_rows)
    _fill(engine, source, f"weights of {folder}" if progress and dist.get_rank() == 0 else None)
    coordination.barrier()
    _check(engine, source, f"{flag} {folder}")


class _Source:
    """The tensors of a folder in the shapes of the model."""

    def __init__(
        self, reader: TensorReader, shapes: Mapping[str, tuple[int, ...]], new_rows: NewRows | None
    ) -> None:
        self._reader, self._shapes, self._new_rows = reader, shapes, new_rows
        # A table is asked for up to four times; its mean, for which every row is read, is kept.
        self._means: dict[str, Tensor] = {}

    def size(self, name: str) -> int:
        """Bytes in the file."""
        return self._reader.tensor(name).nbytes

    def tensor(self, name: str) -> Tensor:
        stored = self._reader.tensor(name)
        if self._new_rows is None or name not in VOCABULARY_TABLES:
            return stored
        if name not in self._means:
            self._means[name] = mean_row(stored, self._new_rows.old)
        return grown_table(stored, self._shapes[name][0], self._new_rows.new, self._means[name])


@torch.no_grad()
def _fill(engine: Engine, source: _Source, shown_as: str | None) -> None:
    places = list(_places(engine))
    total = sum(source.size(name) for name, _ in places)
    bar = Progress(shown_as, total) if shown_as is not None else None
    done = 0
    for name, parts in places:
        full = source.tensor(name)
        for destination, cut in parts:
            destination.copy_(cut(full).reshape(destination.shape))
        made()
        done += source.size(name)
        if bar is not None:
            bar.show(0, done)
    if bar is not None:
        bar.close()


# -- where the parts go ---------------------------------------------------------------------------


def _places(engine: Engine) -> Iterator[tuple[str, list[Place]]]:
    """For every tensor of which this rank holds a part: where, in working precision and as master.

    Only storage is written to, no tensor replaced: the optimizers keep views of the parameters.
    """
    if engine.layout.plugin.startswith("gemini"):
        for parameter, name in engine.model.param2name.items():
            yield name, _chunk_places(engine, parameter)
        return
    # There are none where parameters are their own masters.
    masters = engine.optimizer.get_working_to_master_map() or {}
    for name, parameter in base_parameters(engine.module):
        working, share = _cuts(engine, parameter)
        # `detach` of a padded parameter is replaced by ColossalAI, and fails when called twice.
        places: list[Place] = [(parameter.data, working)]
        if id(parameter) in masters:
            places.append((masters[id(parameter)], share))
        yield name, places


def _cuts(
    engine: Engine, parameter: Tensor
) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """How a parameter and its master are cut out of the full tensor, outside gemini."""
    if engine.layout.plugin == "hybrid_parallel":
        io = engine.booster.checkpoint_io
        return (
            partial(cut_weight, parameter=parameter, io=io),
            partial(cut_state, parameter=parameter, io=io),
        )
    share = partial(flat_share, size=dist.get_world_size(), rank=dist.get_rank())
    return (lambda full: full), share


def _chunk_places(engine: Engine, parameter: Tensor) -> list[Place]:
    """The overlap of a parameter with this rank's shard of its chunk and of the chunk of masters.

    Both chunks have the parameter in the same place.
    """
    chunk = engine.model.chunk_manager.get_chunk(parameter)
    info = chunk.tensors_info[parameter]
    places: list[Place] = []
    for owner in (chunk, chunk.paired_chunk):
        first, stop = 0, owner.chunk_size
        if not owner.is_gathered:
            first, stop = owner.shard_begin, owner.shard_end
        begin, end = max(info.offset, first), min(info.end, stop)
        if begin < end:
            within = slice(begin - info.offset, end - info.offset)
            shard = owner.payload[begin - first : end - first]
            places.append((shard, partial(_flat_part, within=within)))
    return places


def _flat_part(full: Tensor, within: slice) -> Tensor:
    return full.flatten()[within]


# -- what has arrived -----------------------------------------------------------------------------


def _arrived(engine: Engine) -> Iterator[tuple[str, Iterable[Part]]]:
    """The parts that make every tensor, in working precision, on every rank that can have them.

    Gemini has one copy, which rank 0 gets; of the other plugins every replica is its own. All ranks
    iterate to the end.
    """
    if engine.layout.plugin.startswith("gemini"):
        for name, tensor in gather_weights(engine):
            yield name, [(WHOLE, tensor)]
        return
    for name, parameter in base_parameters(engine.module):
        if engine.layout.plugin == "hybrid_parallel":
            io = engine.booster.checkpoint_io
            yield name, gather_blocks(parameter, engine.shapes[name], io)
        else:
            yield name, [(WHOLE, parameter)]


def _unlike_parts(engine: Engine, source: _Source) -> list[str]:
    """Tensors of which a part that `_arrived` does not show is not what belongs there.

    That is the masters', and gemini's working weights, for which it shows the masters.
    """
    shown = 0 if engine.layout.plugin.startswith("gemini") else 1
    return [
        name
        for name, parts in _places(engine)
        if any(not same_values(part, cut(source.tensor(name))) for part, cut in parts[shown:])
    ]


def _check(engine: Engine, source: _Source, where: str) -> None:
    """Compare what the ranks hold together with the files; every rank raises the same."""
    names: list[str] = []
    wrong, infinite = _unlike_parts(engine, source), []
    for name, parts in _arrived(engine):
        names.append(name)
        stored, compared = source.tensor(name), 0
        made()
        for place, values in parts:
            compared += values.numel()
            if not _is_finite(values):
                infinite.append(name)
            elif not same_values(values, stored[place]):
                wrong.append(name)
        if compared != stored.numel():
            wrong.append(name)
    seen, wrong, infinite = (_together(part) for part in (names, wrong, infinite))
    wrong += [name for name in engine.shapes if name not in seen]
    if wrong:
        raise RunError(
            f"{where}: {len(wrong)} of {len(engine.shapes)} loaded tensors differ from the "
            f"file, first {wrong[0]}"
        )
    if infinite:
        precision = engine.options.training.mixed_precision
        raise UserError(
            f"{where}: {len(infinite)} of {len(engine.shapes)} tensors have values that are not "
            f"finite in {precision}, first {infinite[0]}; "
            + ("use -x bf16 or -x fp32." if precision == "fp16" else "the weights are damaged.")
        )


def _together(names: list[str]) -> list[str]:
    """The names of all ranks, each once."""
    return list(dict.fromkeys(name for part in coordination.gather(names) for name in part))


def _is_finite(tensor: Tensor) -> bool:
    blocks = tensor.detach().flatten().split(COMPARED_ELEMENTS)
    return all(bool(block.isfinite().all()) for block in blocks)
