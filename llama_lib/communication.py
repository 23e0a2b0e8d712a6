"""How long a step waits for other processes.

Invariant: only time in which a process could do nothing else counts: what runs beside the
computation costs nothing.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist


@contextlib.contextmanager
def waiting_timed(measured: bool) -> Iterator[Callable[[], float]]:
    """Yields how many seconds this process has waited in collectives since the block began; always
    0 unless `measured`.

    For gloo, whose collectives run on threads of their own: every one of them, asked for by whom it
    may be, ends in a call of `Work.wait`, and there the process waits, for the bytes or for another
    process that comes later. There is no hook for it in torch, so the method is replaced, and put
    back at the end.
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
            waited += time.perf_counter() - begin

    dist.Work.wait = wait  # type: ignore[method-assign, assignment]
    try:
        yield lambda: waited
    finally:
        dist.Work.wait = original  # type: ignore[method-assign]


class Kernel(NamedTuple):
    """What a GPU did from `begin` to `end`, in seconds of one clock."""

    name: str
    begin: float
    end: float

    @property
    def communicates(self) -> bool:
        return self.name.startswith("nccl")


def exposed_seconds(work: Callable[[], Any]) -> float:
    """Time in which `work` keeps this process's GPU busy with NCCL alone, by the profiler."""
    return communication_alone(_profiled(work))


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
    """What `work` makes the GPU do."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profile:
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
