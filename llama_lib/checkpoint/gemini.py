"""Full optimizer state of the gemini plugin, chunk by chunk.

Invariant: only rank 0 ever holds more than its own shard, and only of one chunk. ColossalAI's own
gathering pickles every shard to every rank, three barriers per parameter.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


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


def gather_chunks(
    optimizer: Any, keys: Sequence[str]
) -> Iterator[list[tuple[int, dict[str, Tensor]]]]:
    """For every chunk its parameters' (id, {key: full flat tensor on the host}).

    All ranks must iterate; ranks other than 0 get empty lists.

    Args:
        keys: entries of the optimizer's state, each as long as this rank's part of a parameter.
    """
    for chunk, parameter_ids in _parameters_by_chunk(optimizer).items():
        full = {key: _gather(_shard(optimizer, chunk, parameter_ids, key), chunk) for key in keys}
        gathered = []
        for parameter_id in parameter_ids:
            info = chunk.tensors_info[optimizer.id_to_real_params[parameter_id]]
            tensors = {k: t[info.offset : info.end] for k, t in full.items() if t is not None}
            gathered.append((parameter_id, tensors))
        yield gathered if dist.get_rank() == 0 else []


def _shard(optimizer: Any, chunk: Any, parameter_ids: list[int], key: str) -> Tensor:
    """This rank's shard of a chunk of `key`, on the device that communicates."""
    from colossalai.accelerator import get_accelerator

    size = chunk.chunk_size if chunk.keep_gathered else chunk.shard_size
    shard = torch.zeros(size, device=get_accelerator().get_current_device())
    for parameter_id in parameter_ids:
        fake = optimizer.id_to_fake_params.get(parameter_id)
        if fake is not None:  # None: this parameter lies wholly in other ranks' shards
            begin, end = optimizer.param_to_range[fake]
            shard[begin:end] = optimizer.optim.state[fake][key]
    return shard


def _gather(shard: Tensor, chunk: Any) -> Tensor | None:
    """The whole chunk on the host of rank 0, None elsewhere."""
    group, is_collector = chunk.torch_pg, dist.get_rank(chunk.torch_pg) == 0
    if chunk.keep_gathered or dist.get_world_size(group) == 1:
        return shard.cpu() if is_collector else None
    parts = None
    if is_collector:
        parts = [torch.empty_like(shard) for _ in range(dist.get_world_size(group))]
    dist.gather(shard, parts, dst=dist.get_global_rank(group, 0), group=group)
    return None if parts is None else torch.cat([part.cpu() for part in parts])
