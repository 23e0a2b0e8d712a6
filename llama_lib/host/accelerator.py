"""The accelerator that ColossalAI gets on a machine without one: this process's share of the CPU.

Invariant: every call does what its CUDA namesake does for a device that computes in program order.
"""

import contextlib
import resource

import psutil
import torch
from colossalai.accelerator.cpu_accelerator import CpuAccelerator


class HostStream:
    """A stream of work that is finished as soon as it is issued."""

    def wait_stream(self, stream: "HostStream") -> None:
        del stream

    def synchronize(self) -> None:
        return None


class HostAccelerator(CpuAccelerator):
    """Answers where ColossalAI's CPU accelerator raises: devices, streams, random state, memory."""

    def current_device(self) -> torch.device:
        # The engine passes the answer on as `device=...`, so a device serves as CUDA's index does.
        return self.get_current_device()

    def device_count(self) -> int:
        return 1

    def get_device_name(self, device: torch.device | None = None) -> str:
        return "cpu"

    def synchronize(self, device: torch.device | None = None) -> None:
        return None

    def get_rng_state(self, device: torch.device | None = None) -> torch.Tensor:
        return torch.get_rng_state()

    def get_rng_state_all(self) -> list[torch.Tensor]:
        return [torch.get_rng_state()]

    def set_rng_state_all(self, new_states: list[torch.Tensor]) -> None:
        torch.set_rng_state(new_states[0])

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        torch.manual_seed(seed)

    def initial_seed(self) -> int:
        return torch.initial_seed()

    def empty_cache(self) -> None:
        return None

    def memory_allocated(self, device: torch.device | None = None) -> int:
        """Bytes resident in this process, the interpreter included."""
        return psutil.Process().memory_info().rss

    def max_memory_allocated(self, device: torch.device | None = None) -> int:
        """Most bytes ever resident in this process; Linux gives KiB."""
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def max_memory_reserved(self, device: torch.device | None = None) -> int:
        return self.max_memory_allocated()

    def reset_peak_memory_stats(self, device: torch.device | None = None) -> None:
        # The kernel's high-water mark belongs to the whole process; it is not ours to lower.
        return None

    def Stream(self, device: torch.device | None = None, priority: int = 0, **kwargs: object):
        return HostStream()

    def current_stream(self, device: torch.device | None = None) -> HostStream:
        return HostStream()

    def default_stream(self, device: torch.device | None = None) -> HostStream:
        return HostStream()

    def set_stream(self, stream_: HostStream) -> None:
        return None

    def stream(self, stream_: HostStream | None) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()
