"""How long a step waits for other processes.

Invariant: only time in which a process could do nothing else counts: what runs beside the
computation costs nothing.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from llama_lib import coordination


@contextlib.contextmanager
def waiting_timed(measured: bool) -> Iterator[Callable[[], float]]:
    """Yields how many seconds the main thread has waited in collectives since the block began;
    always 0 unless `measured`.

    For gloo, whose collectives run on threads of their own: one that Python code asks for ends in a
    call of `Work.wait`, and there the process waits, for the bytes or for another process that
    comes later. There is no hook for it in torch, so the method is replaced, and put back at the
    end. What waits elsewhere is not heard of: see `waits_in_python`.
    """
    waited = 0.0
    if not measured:
        yield lambda: waited
        return
    original = dist.Work.wait

    def wait(work: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal waited
        begin = time.perf_counter()
        try:
            return original(work, *args, **kwargs)
        finally:
            if threading.current_thread() is threading.main_thread():
                waited += time.perf_counter() - begin

    dist.Work.wait = wait  # type: ignore[method-assign, assignment]
    try:
        yield lambda: waited
    finally:
        dist.Work.wait = original  # type: ignore[method-assign]


def waits_in_python(model: nn.Module) -> bool:
    """Whether `waiting_timed` hears of all waiting of a training step of this boosted model.

    Not so where replicas exchange gradients through DistributedDataParallel, as hybrid_parallel
    does without ZeRO and pipeline: its reducer waits in C++.
    """
    return not any(
        isinstance(module, DistributedDataParallel) and module.process_group.size() > 1
        for module in model.modules()
    )


class Kernel(NamedTuple):
    """What a GPU did from `begin` to `end`, in seconds of one clock."""

    name: str
    begin: float
    end: float

    @property
    def communicates(self) -> bool:
        return self.name.startswith("nccl")


def exposed_seconds(phases: Mapping[str, Callable[[], Any]]) -> dict[str, float] | None:
    """Seconds in which each phase of a step keeps a GPU busy with NCCL alone, mean of the ranks.

    To be called by all of them. The step is done twice, since setting the profiler up for the first
    time takes the ranks unequally long, and whoever is early would wait for the others in NCCL.

    Args:
        phases: what has to be done, in its order.

    Returns:
        None if the profiler of some rank saw a GPU do nothing at all in some phase: then it does
        not work there, and no communication in what it saw means nothing.
    """
    for _ in range(2):
        kernels = {name: _profiled(work) for name, work in phases.items()}
    mine = None
    if all(kernels.values()):
        mine = {name: communication_alone(each) for name, each in kernels.items()}
    ranks = coordination.gather(mine)
    if None in ranks:
        return None
    return {name: fmean(each[name] for each in ranks) for name in phases}


def communication_alone(kernels: Sequence[Kernel]) -> float:
    """Seconds in which NCCL kernels ran and no other kernel did."""
    borders = sorted(
        (moment, change, kernel.communicates)
        for kernel in kernels
        for moment, change in ((kernel.begin, 1), (kernel.end, -1))
    )
    exposed, before = 0.0, 0.0
    running = {True: 0, False: 0}
    for moment, change, communicates in borders:
        if running[True] and not running[False]:
            exposed += moment - before
        running[communicates] += change
        before = moment
    return exposed


def _profiled(work: Callable[[], Any]) -> list[Kernel]:
    """What `work`, which all ranks begin together, makes the GPU of this one do."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profile:
        coordination.barrier()  # profilers do not start at one moment
        work()
        torch.cuda.synchronize()
    return [
        Kernel(event.name, event.time_range.start / 1e6, event.time_range.end / 1e6)
        for event in profile.events()
        # Named regions of the program lie over the kernels and would hide them.
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation
    ]


def with_communication(
    phases: Mapping[str, float], exposed: Mapping[str, float], num_steps: int
) -> dict[str, float]:
    """`phases` with the communication taken out of the phases it happened in.

    Args:
        phases: seconds of all steps together.
        exposed: seconds of communication in a phase of one step.
    """
    found = dict(phases)
    for phase, seconds in exposed.items():
        moved = min(found[phase], seconds * num_steps)
        found[phase] -= moved
        found["communication"] += moved
    return found
