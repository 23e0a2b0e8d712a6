"""Full optimizer state of the gemini plugin, chunk by chunk.

Invariant: only rank 0 ever holds more than its own shard, and only of one chunk. ColossalAI's own
gathering pickles every shard to every rank, three barriers per parameter.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from llama_lib.checkpoint.parts import Cut, Held, Parameter, value_of


def adam_steps(optimizer: Any, device: torch.device) -> int:
    """Adam steps done, the same for all parameters; a rank may own no part of some."""
    steps = [int(entry.get("step", 0)) for entry in optimizer.optim.state.values()]
    value = torch.tensor(max(steps, default=0), device=device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return int(value.item())


def _parameters_by_chunk(optimizer: Any) -> dict[Any, list[int]]:
    """Chunk of working weights -> ids of its parameters; the same order on every rank."""
    chunks: dict[Any, list[int]] = {}
    for parameter_id, parameter in optimizer.id_to_real_params.items():
        chunks.setdefault(optimizer.chunk_manager.get_chunk(parameter), []).append(parameter_id)
    return chunks


def held_chunks(
    optimizer: Any,
    steps: int,
    names: Sequence[str],
    shapes: Mapping[str, tuple[int, ...]],
) -> Iterator[Held]:
    """What this rank holds, in the order of the chunks.

    Args:
        steps: Adam steps done.
        names: of the parameters, by their id.
        shapes: full shapes by name.
    """
    for chunk, parameter_ids in _parameters_by_chunk(optimizer).items():
        cut = Cut(
            (chunk.chunk_size,),
            (chunk.chunk_size,),
            group=chunk.torch_pg,
            is_shared=not chunk.keep_gathered,
        )
        parameters = []
        for parameter_id in parameter_ids:
            info = chunk.tensors_info[optimizer.id_to_real_params[parameter_id]]
            name = names[parameter_id]
            place = slice(info.offset, info.end)
            parameters.append(Parameter(name, steps, shapes[name], place))
        length = chunk.chunk_size if chunk.keep_gathered else chunk.shard_size
        yield Held(cut, length, parameters, partial(_pieces, optimizer, parameter_ids))


def _pieces(optimizer: Any, parameter_ids: Sequence[int], key: str) -> list[tuple[int, Tensor]]:
    """This rank's pieces of a chunk of `key`; a parameter may lie wholly in other ranks' shards."""
    pieces = []
    for parameter_id in parameter_ids:
        fake = optimizer.id_to_fake_params.get(parameter_id)
        if fake is None:
            continue
        begin, end = optimizer.param_to_range[fake]
        master = optimizer.param_to_chunk16[fake].paired_chunk.payload[begin:end]
        pieces.append((begin, value_of(optimizer.optim.state[fake], key, master)))
    return pieces
