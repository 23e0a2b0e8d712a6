"""Full tensors of the hybrid plugin from the ranks' parts, and back.

Invariant: cutting what was gathered gives every rank its own part again, bit by bit. ColossalAI's
own functions fail on a vocabulary that had to be padded, in saving and in loading.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from llama_lib.checkpoint.parts import Cut

# Elements of a part gathered at once by gather_blocks: 2 MiB in bf16, no measurable cost; chosen.
BLOCK_ELEMENTS = 1 << 20


def _cut_axis(parameter: Tensor) -> int | None:
    """The axis along which tensor parallelism has cut a parameter."""
    from colossalai.tensor.d_tensor import get_sharding_spec, is_distributed_tensor

    if not is_distributed_tensor(parameter):
        return None
    (axis,) = get_sharding_spec(parameter).dim_partition_dict
    return axis


def cut_of(parameter: Tensor, shape: Sequence[int], io: Any, is_state: bool) -> Cut:
    """How a weight, or with `is_state` a master or moment of it, is cut among the ranks.

    Args:
        shape: of the weight in full; a padded vocabulary has more rows.
        io: the plugin's checkpoint io, which knows the groups.
    """
    return Cut(
        tuple(shape),
        tuple(parameter.shape),
        group=io.global_dp_group,
        is_shared=is_state and io.use_zero,
        tp_group=io.tp_group,
        axis=_cut_axis(parameter),
    )


def gather_blocks(
    parameter: Tensor, shape: Sequence[int], io: Any
) -> Iterator[tuple[tuple[slice, ...], Tensor]]:
    """(where in the full tensor, values) of every part of a weight in full `shape`, in blocks.

    All ranks of a tensor group iterate. Unlike `Cut.whole` it never holds a whole tensor, of which
    a collective keeps several copies.
    """
    axis, own = _cut_axis(parameter), parameter.data
    if axis is None:
        yield tuple(map(slice, shape)), own[tuple(map(slice, shape))]
        return
    rows = max(1, BLOCK_ELEMENTS // max(1, own[0].numel()))
    for first in range(0, own.shape[0], rows):
        block = own[first : first + rows].contiguous()
        blocks = [torch.empty_like(block) for _ in range(io.tp_size)]
        dist.all_gather(blocks, block, group=io.tp_group)
        for rank, values in enumerate(blocks):
            begins = [0] * own.dim()
            begins[0] = first
            begins[axis] += rank * own.shape[axis]
            # What lies behind the end of the full tensor is padding.
            where = tuple(
                slice(min(begin, size), min(begin + held, size))
                for begin, held, size in zip(begins, values.shape, shape, strict=True)
            )
            yield where, values[tuple(slice(part.stop - part.start) for part in where)]


def cut_weight(full: Tensor, parameter: Tensor, io: Any) -> Tensor:
    """This rank's part of a weight given in full shape, a view of it where nothing is padded."""
    axis, part = _cut_axis(parameter), full
    if axis is not None:
        size = parameter.shape[axis]
        first = min(io.tp_rank * size, full.shape[axis])
        part = full.narrow(axis, first, min(size, full.shape[axis] - first))
    # pad() counts from the last axis, two numbers each.
    missing = [size - held for size, held in zip(parameter.shape, part.shape, strict=True)]
    if any(missing):  # pad() copies even when there is nothing to add
        part = pad(part, [number for size in reversed(missing) for number in (0, size)])
    return part


def cut_state(full: Tensor, parameter: Tensor, io: Any) -> Tensor:
    """This rank's shard of a master or moment of `parameter` given in full shape."""
    part = cut_weight(full, parameter, io)
    if io.use_zero:
        return flat_share(part, io.global_dp_size, io.dp_rank)
    return part


def flat_share(tensor: Tensor, size: int, rank: int) -> Tensor:
    """The `rank`-th of `size` equal parts of a flattened tensor, the last padded with zeros."""
    flat = tensor.flatten()
    length = -(-flat.numel() // size)
    part = flat[rank * length : (rank + 1) * length]
    missing = length - part.numel()
    return pad(part, (0, missing)) if missing else part
