"""The memory that was planned for a run beside what it took.

Invariant: nothing here decides anything; a plan that is wrong costs a run one line that says so.
"""

import contextlib
import dataclasses
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch

from llama_lib.config import Options
from llama_lib.errors import RunError
from llama_lib.models import Shape
from llama_lib.planner.advice import out_of_memory_text
from llama_lib.planner.hardware import cpu_host, host_gpu, host_memory
from llama_lib.planner.job import Job, job_of
from llama_lib.planner.memory import memory
from llama_lib.planner.report import megabytes

# By the fifth step of a run everything it allocates has been allocated once.
STEPS = 5


def shape_of(config: Any) -> Shape:
    """The shape of a transformers config."""
    given = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(Shape)
        if getattr(config, field.name, None) is not None
    }
    return Shape(**{"head_dim": config.hidden_size // config.num_attention_heads} | given)


def planned_job(options: Options, config: Any, world_size: int) -> Job:
    """What the planner makes of a run; torchrun and `colossalai run` say how many share a host."""
    per_host = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return job_of(options, shape_of(config), world_size, per_host)


def plan_line(job: Job, has_gpu: bool) -> str:
    """The peak of one process by kind, in one line, and whether this machine has less."""
    need = memory(job)
    peak = need.moments[need.moment]
    parts = ", ".join(f"{kind} {megabytes(size)}" for kind, size in peak.items() if size)
    line = f"memory planned for one process: {megabytes(need.device_total)} ({parts})"
    on_host = need.host_total if has_gpu else host_part(job) * job.processes_per_host
    if on_host:
        line += f"; for one host: {megabytes(on_host)}"
    if has_gpu:
        gpu = host_gpu()
        needed, room = need.device_total, None if gpu is None else gpu.memory_mib * 2**20
    else:
        needed, room = need.device_total * job.processes_per_host + on_host, host_memory()
    if room is not None and needed > room:
        line += f"; does not fit: there are {megabytes(room)} (--dry_run shows what would)"
    return line


def host_part(job: Job) -> int:
    """What is planned for the host is in the same memory on a CPU: the share of one process."""
    need = dict(memory(job).host)
    need.pop("buffers", None)  # copies that are pinned for a GPU to read
    return sum(need.values()) // job.processes_per_host


class MemoryCheck:
    """Knows what a run was to take, and how large this process was before it took anything.

    To be made before the model is built.
    """

    def __init__(self, job: Job, device: torch.device) -> None:
        self.job, self.device = job, device
        _forget_peak()
        self.before = psutil.Process().memory_info().rss

    def used(self) -> int:
        """Bytes that this process has taken since, at most at one time."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - self.before

    def line(self, used: int) -> str:
        """Planned and measured peak of a process, after some steps.

        Args:
            used: bytes of the process that has taken most.
        """
        planned, kind = memory(self.job).device_total, "allocated on the GPU"
        if self.device.type != "cuda":
            planned += host_part(self.job)
            kind = "resident since the model was built, buffers of libraries included"
        return (
            f"memory of one process: planned {megabytes(planned)}, measured {megabytes(used)} "
            f"({used / planned - 1:+.0%}; {kind})"
        )

    @contextmanager
    def explaining(self, options: Options) -> Iterator[None]:
        """Running out of memory in the block ends with the plan, the peak and what would help.

        Raises:
            RunError: in place of torch's error.
        """
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise RunError(self._explanation(options)) from error

    def _explanation(self, options: Options) -> str:
        if self.device.type == "cuda":
            room = torch.cuda.get_device_properties(self.device).total_memory
            return out_of_memory_text(self.job, self.used(), room, options)
        here = cpu_host(host_memory(), self.job.processes_per_host)
        return out_of_memory_text(self.job, self.used(), here.capacity, options, here)


def _forget_peak() -> None:
    """The kernel's high-water mark of this process begins anew: preparing data is no training."""
    with contextlib.suppress(OSError):  # a kernel without the file: the mark stays as it is
        Path("/proc/self/clear_refs").write_text("5")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch, or the system, had no memory left: on a CPU torch has no type for it."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return "DefaultCPUAllocator" in str(error) and "allocate" in str(error)
