"""What this rank holds of the optimizer's state, and how the parts of all ranks become whole.

Invariant: the same parts make the same tensors, whether they are collected from the devices or from
copies in host memory; of ranks that hold equal parts only the first gives its own.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from llama_lib.progress import made

MASTER = "master"
MOMENTS = ("exp_avg", "exp_avg_sq")
STATE = (MASTER, *MOMENTS)

# A tensor of every rank of a group -> all of them in rank order at its first rank, None elsewhere.
Collect = Callable[[Tensor, Any], list[Tensor] | None]


def value_of(entry: Mapping[str, Any], key: str, master: Tensor) -> Tensor:
    """A value of STATE.

    A run whose steps were all skipped so far has no moments yet: zeros are what they stand for.

    Args:
        entry: what the optimizer keeps beside `master`.
    """
    if key == MASTER:
        return master
    return entry[key] if key in entry else torch.zeros_like(master)


def collect_on(device: torch.device) -> Collect:
    """Over the group's own connections, between devices; what arrives lies in host memory."""

    def collect(tensor: Tensor, group: Any) -> list[Tensor] | None:
        size, is_first = dist.get_world_size(group), dist.get_rank(group) == 0
        if size == 1:
            return [tensor]
        tensor = tensor.to(device).contiguous()
        parts = [torch.empty_like(tensor) for _ in range(size)] if is_first else None
        dist.gather(tensor, parts, dst=dist.get_global_rank(group, 0), group=group)
        return None if parts is None else [part.cpu() for part in parts]

    return collect


def collect_over(connections: Any) -> Collect:
    """Between host memories, over a gloo group of all ranks; never over the given groups' own."""

    def collect(tensor: Tensor, group: Any) -> list[Tensor] | None:
        first, *others = dist.get_process_group_ranks(group)
        if not others:
            return [tensor]
        tensor = tensor.contiguous()
        if dist.get_rank() != first:
            dist.send(tensor, first, group=connections)
            return None
        arriving = [torch.empty_like(tensor) for _ in others]
        under_way = [
            dist.irecv(part, rank, group=connections)
            for part, rank in zip(arriving, others, strict=True)
        ]
        for work in under_way:
            assert work is not None
            work.wait()
        return [tensor, *arriving]

    return collect


@dataclass(frozen=True)
class Cut:
    """How a tensor is cut among ranks.

    Args:
        shape: of the tensor in full.
        held: shape of what tensor parallelism leaves of it, a padded vocabulary's rows included.
        group: the ranks that hold this part together.
        is_shared: each of them an equal share of its values, in a row; else each all of it.
        tp_group, axis: the ranks that tensor parallelism has cut the tensor among, and where.
    """

    shape: tuple[int, ...]
    held: tuple[int, ...]
    group: Any
    is_shared: bool
    tp_group: Any = None
    axis: int | None = None

    @property
    def is_given(self) -> bool:
        """Whether this rank's part is needed for the whole."""
        return self.is_shared or dist.get_rank(self.group) == 0

    def whole(self, part: Tensor, collect: Collect) -> Tensor | None:
        """The tensor on the writer, None on ranks that have given their part of it away.

        To be called by every rank whose part is given.
        """
        if self.is_shared:
            part_or_none = _joined(collect(part, self.group))
            if part_or_none is None:
                return None
            part = part_or_none[: math.prod(self.held)]
        part = part.reshape(self.held)
        if self.axis is not None:
            part_or_none = _joined(collect(part, self.tp_group), self.axis)
            if part_or_none is None:
                return None
            part = part_or_none
        return part[tuple(map(slice, self.shape))]


def _joined(parts: list[Tensor] | None, axis: int = 0) -> Tensor | None:
    if parts is None or len(parts) == 1:
        return None if parts is None else parts[0]
    return torch.cat(parts, dim=axis)


@dataclass(frozen=True)
class Parameter:
    """A trained parameter in what is gathered at once.

    Args:
        steps: Adam steps done.
        place: where it lies in the flat tensor that is gathered; None: it is all of it.
    """

    name: str
    steps: int
    shape: tuple[int, ...]
    place: slice | None = None

    def of(self, full: Tensor) -> Tensor:
        return (full if self.place is None else full[self.place]).reshape(self.shape)


@dataclass(frozen=True)
class Held:
    """The state of one parameter, or under gemini of one chunk of them, as far as this rank has it.

    Args:
        length: number of values of this rank's part.
        pieces: what it is made of, by key of STATE: (where each piece begins, its values); what
            lies between them means nothing.
    """

    cut: Cut
    length: int
    parameters: Sequence[Parameter]
    pieces: Callable[[str], Sequence[tuple[int, Tensor]]]

    def part(self, key: str, device: torch.device) -> Tensor:
        """This rank's part in one piece, flat."""
        pieces = self.pieces(key)
        if len(pieces) == 1 and pieces[0][1].numel() == self.length:
            return pieces[0][1].to(device).flatten()
        part = torch.zeros(self.length, device=device)
        self.copy_to(part, key)
        return part

    def copy_to(self, part: Tensor, key: str) -> None:
        """Fill `part`, flat; a GPU is not waited for if it is pinned."""
        for begin, values in self.pieces(key):
            place = part[begin : begin + values.numel()]
            place.copy_(values.flatten(), non_blocking=True)


Entry = tuple[str, int, dict[str, Tensor]]  # name, Adam steps done, full tensors by key


def whole_state(
    held: Sequence[Held],
    part: Callable[[Held, str], Tensor],
    collect: Collect,
    is_writer: bool,
    pause: Callable[[], None] = lambda: None,
) -> Iterator[Entry]:
    """Every parameter's state in full shape and fp32, on the writers; all ranks must iterate.

    Args:
        part: this rank's part of a key's tensor.
        pause: called after every element of `held`.
    """
    for each in held:
        full: dict[str, Tensor] = {}
        for key in STATE if each.cut.is_given else ():
            tensor = each.cut.whole(part(each, key), collect)
            if tensor is not None:
                full[key] = tensor
            made()
        if is_writer:
            for parameter in each.parameters:
                tensors = {key: parameter.of(tensor).float() for key, tensor in full.items()}
                yield parameter.name, parameter.steps, tensors
        pause()
