"""Gemini's two memory tiers on a machine whose device memory and host memory are the same.

Invariant: a chunk's shard is owned by exactly one tier; changing tiers hands the tensor over, never
copies it, and what Gemini counts per tier adds up as it does on a GPU.
"""

import time
from typing import Any

import torch
import torch.distributed as dist
from colossalai.zero.gemini import gemini_ddp, gemini_optimizer
from colossalai.zero.gemini.chunk.chunk import Chunk, free_storage
from colossalai.zero.gemini.chunk.manager import ChunkManager
from colossalai.zero.gemini.memory_tracer.memory_monitor import MemoryMonitor

from llama_lib.host.accelerator import HostAccelerator
from llama_lib.host.norms import squared_norm

# Gemini names the host tier `torch.device("cpu")` and asks the accelerator for the device tier. The
# index tells them apart; tensors made on either are plain CPU tensors. Only Gemini sees the index,
# because `tensor.to("cpu:0")` copies a tensor that is already there.
DEVICE_TIER = torch.device("cpu", 0)


class GeminiAccelerator(HostAccelerator):
    """What Gemini's placement code sees: the current device is the device tier."""

    def get_current_device(self) -> torch.device:
        return DEVICE_TIER


def gemini_accelerator() -> GeminiAccelerator:
    return GeminiAccelerator()


class HostChunk(Chunk):
    """A chunk that knows its tier by which attribute holds the shard, not by a tensor's device.

    `cuda_shard` and `cuda_global_chunk` are the device tier, `cpu_shard` the host tier. In a group
    of one process the gathered chunk and its shard are one tensor, so gathering costs nothing.
    """

    def __init__(
        self,
        chunk_size: int,
        zero_group: dist.ProcessGroup,
        dtype: torch.dtype,
        init_device: torch.device | None = None,
        cpu_shard_init: bool = False,
        keep_gathered: bool = False,
        pin_memory: bool = False,
        extra_dp_group: dist.ProcessGroup | None = None,
    ) -> None:
        # Memory is pinned for a device to read it, and there is none.
        super().__init__(
            chunk_size,
            zero_group,
            dtype,
            init_device,
            cpu_shard_init,
            keep_gathered,
            pin_memory=False,
            extra_dp_group=extra_dp_group,
        )
        self._starts_on_host_tier = cpu_shard_init

    @property
    def device_type(self) -> str:
        on_device = self.chunk_temp is not None or self.is_gathered or self.cuda_shard is not None
        return "cuda" if on_device else "cpu"

    @property
    def memory_usage(self) -> dict[str, int]:
        if self.chunk_temp is not None:
            return {"cuda": self.chunk_mem, "cpu": 0}
        return super().memory_usage

    @property
    def has_inf_or_nan(self) -> torch.Tensor:
        # The engine makes two masks in 90 ms per 32 Mi elements, this takes 2 ms (2 cores, bf16).
        valid = self._valid_payload()
        if valid.numel() == 0:
            return torch.zeros((), dtype=torch.bool)
        return ~torch.stack(torch.aminmax(valid)).isfinite().all()

    def set_l2_norm(self) -> None:
        assert self.l2_norm is None, "the norm of this chunk is already known"
        self.l2_norm = squared_norm(self._valid_payload()).item()

    def _valid_payload(self) -> torch.Tensor:
        if self.is_gathered:
            return self.cuda_global_chunk[: self.utilized_size]
        return self.cuda_shard[: self.valid_end]

    def close_chunk(self) -> None:
        built = self.chunk_temp
        super().close_chunk()
        if self.keep_gathered:
            return
        # The engine takes the device for a CPU and leaves a copied shard in the host tier.
        if self.pg_size == 1:
            free_storage(built)
            self.cuda_global_chunk = self.cpu_shard
        if not self._starts_on_host_tier:
            self.cuda_shard, self.cpu_shard = self.cpu_shard, None
            self.cpu_vis_flag = False

    def shard_move(
        self, device: torch.device, force_copy: bool = False, non_blocking: bool = False
    ) -> None:
        assert not self.is_gathered
        if not self.optim_sync_flag:
            assert device == DEVICE_TIER, "each chunk should first be moved to the device tier"
            self._take_weights_from_master()
        elif device == DEVICE_TIER and self.cuda_shard is None:
            self.cuda_shard, self.cpu_shard = self.cpu_shard, None
        elif device != DEVICE_TIER and self.cuda_shard is not None:
            self.cuda_shard, self.cpu_shard = None, self.cuda_shard
            self.cpu_vis_flag = True

    def _take_weights_from_master(self) -> None:
        # Into the buffer that held the gradients: a new one would be paged in by the kernel at
        # every step, and `.to(dtype)` would share the master's memory in fp32.
        assert self.cuda_shard is None
        shard = self.cpu_shard
        if shard is None:
            shard = torch.empty(self.shard_size, dtype=self.dtype)
        shard.copy_(self.paired_chunk.cpu_shard)
        self.cuda_shard, self.cpu_shard = shard, None
        self.optim_sync_flag = True

    def _Chunk__gather(self, async_op: bool = False) -> dist.Work | None:
        if self.pg_size > 1:
            return super()._Chunk__gather(async_op)
        if not self.is_gathered:
            self.cuda_global_chunk, self.cuda_shard = self.cuda_shard, None
            self.is_gathered = True
        return None

    def _Chunk__scatter(self) -> None:
        if self.pg_size > 1:
            super()._Chunk__scatter()
        elif self.is_gathered and not self.keep_gathered:
            self.cuda_shard = self.cuda_global_chunk
            self.is_gathered = False


def move_chunk(
    self: ChunkManager,
    chunk: Chunk,
    device: torch.device,
    force_copy: bool = False,
    async_move: bool = False,
) -> None:
    """ChunkManager.move_chunk, which compares `device.type`: that is "cpu" for both tiers here."""
    tier = "cuda" if device == DEVICE_TIER else "cpu"
    if not chunk.can_move or chunk.device_type == tier:
        return
    self._ChunkManager__sub_memory_usage(chunk.memory_usage)
    chunk.shard_move(device, force_copy, non_blocking=async_move)
    self._ChunkManager__add_memory_usage(chunk.memory_usage)


class HostMemoryMonitor(MemoryMonitor):
    """Samples resident memory where ColossalAI's monitor samples torch.cuda's peak."""

    def __init__(self, power: int = 10) -> None:
        super().__init__()

    def start(self) -> None:
        return None

    def finish(self) -> int:
        self.time_stamps.append(time.time())
        self.mem_stats.append(HostAccelerator().memory_allocated())
        return self.mem_stats[-1]


class AnyPrecisionGeminiDDP(gemini_ddp.GeminiDDP):
    """GeminiDDP that also takes torch.float32, which the engine's constructor asserts against.

    The constructor does nothing with the precision but store it and build the chunks, so the wanted
    one is put in place just before they are built.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        *args: Any,
        mixed_precision: torch.dtype = torch.float16,
        **kwargs: Any,
    ) -> None:
        self._wanted_precision = mixed_precision
        accepted = torch.bfloat16 if mixed_precision is torch.float32 else mixed_precision
        super().__init__(module, *args, mixed_precision=accepted, **kwargs)

    def _init_chunks(self, *args: Any, **kwargs: Any) -> None:
        self.mixed_precision = self._wanted_precision
        super()._init_chunks(*args, **kwargs)


class AnyPrecisionGeminiOptimizer(gemini_optimizer.GeminiOptimizer):
    """GeminiOptimizer that steps fp32 chunks the way it steps bf16 ones: without a loss scale."""

    def __init__(
        self, optim: torch.optim.Optimizer, module: gemini_ddp.GeminiDDP, *args: Any, **kwargs: Any
    ) -> None:
        wanted = module.mixed_precision
        if wanted is torch.float32:
            module.mixed_precision = torch.bfloat16
        try:
            super().__init__(optim, module, *args, **kwargs)
        finally:
            module.mixed_precision = wanted
