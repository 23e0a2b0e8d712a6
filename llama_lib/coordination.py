"""Agreements between ranks about files and decisions: small objects over gloo, with patience.

Invariant: nothing here runs on a GPU or under NCCL's watchdog, so one rank may write for an hour
while the others wait.
"""

from datetime import timedelta
from typing import Any

import torch.distributed as dist

# The longest save of one writer that is still a save and not a hang (chosen).
PATIENCE = timedelta(hours=4)

_group: tuple[Any, Any] | None = None  # (world it was made in, group)


def _patient_group() -> Any:
    """The gloo group of all ranks; the first call after joining a world is collective."""
    global _group
    world = dist.group.WORLD
    if _group is None or _group[0] is not world:
        _group = (world, dist.new_group(backend="gloo", timeout=PATIENCE))
    return _group[1]


def new_group() -> Any:
    """A gloo group of all ranks for another thread than the main one, which must never use it: of
    one group the calls have to come in the same order on every rank. Collective."""
    return dist.new_group(backend="gloo", timeout=PATIENCE)


def gather(value: Any, group: Any = None) -> list[Any]:
    """Every rank's value, in rank order, on every rank.

    Args:
        group: of `new_group`, in a thread that has one.
    """
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=group or _patient_group())
    return values


def from_rank_0(value: Any, group: Any = None) -> Any:
    """Rank 0's value on every rank; `group` as for `gather`."""
    values = [value]
    dist.broadcast_object_list(values, src=0, group=group or _patient_group())
    return values[0]


def barrier() -> None:
    dist.barrier(group=_patient_group())
