"""The memory that was planned for a run beside what it took.

Invariant: nothing here decides anything; a plan that is wrong costs a run one line that says so.
"""

import dataclasses
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import torch

from llama_lib.config import Options
from llama_lib.errors import RunError
from llama_lib.models import Shape
from llama_lib.planner.advice import out_of_memory_text
from llama_lib.planner.job import Job, job_of
from llama_lib.planner.memory import memory
from llama_lib.planner.report import megabytes
from llama_lib.result_file import Memory

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


def plan_line(job: Job) -> str:
    """The peak of one GPU by kind, in one line."""
    need = memory(job)
    peak = need.moments[need.moment]
    parts = ", ".join(f"{kind} {megabytes(size)}" for kind, size in peak.items() if size)
    line = f"memory planned for one process: {megabytes(need.device_total)} ({parts})"
    if need.host_total:
        line += f"; for one host: {megabytes(need.host_total)}"
    return line


class MemoryCheck:
    """Knows what a run was to take, and how large this process was before it took anything.

    To be made before the model is built.
    """

    def __init__(self, job: Job, device: torch.device) -> None:
        self.job, self.device = job, device
        self.before = psutil.Process().memory_info().rss

    def line(self, peak: Memory) -> str:
        """Planned and measured peak of the process with the most, after some steps.

        Args:
            peak: of all processes, as `summary.peak_memory` gives it.
        """
        planned = memory(self.job).device_total
        if peak.allocated is not None:
            measured, kind = peak.allocated * 2**20, "allocated on the GPU"
        else:
            assert peak.host is not None, "of a CPU process it is always known"
            measured = peak.host * 2**20 - self.before
            planned += self._host_part()
            kind = "resident, the process as it was before the model left out"
        return (
            f"memory of one process: planned {megabytes(planned)}, measured {megabytes(measured)} "
            f"({measured / planned - 1:+.0%}; {kind})"
        )

    def _host_part(self) -> int:
        """What was planned for the host is in the same memory on a CPU: a process's share of it."""
        need = dict(memory(self.job).host)
        need.pop("buffers", None)  # copies that are pinned for a GPU to read
        return sum(need.values()) // self.job.gpus_per_host

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
            peak = torch.cuda.max_memory_allocated(self.device)
            room = torch.cuda.get_device_properties(self.device).total_memory
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - self.before
            room = psutil.virtual_memory().total // self.job.gpus_per_host
        return out_of_memory_text(self.job, peak, room, options)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch, or the system, had no memory left: on a CPU torch has no type for it."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return "DefaultCPUAllocator" in str(error) and "allocate" in str(error)
