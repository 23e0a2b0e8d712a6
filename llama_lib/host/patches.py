"""The places where ColossalAI has no extension point and its code is replaced, each with a reason.

Invariant: nothing is replaced unless the code it was written against is there to the letter, so
another ColossalAI ends in one sentence instead of in a wrong run.
"""

import hashlib
import importlib
import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from colossalai.version import __version__ as colossalai_version

from llama_lib.errors import UserError
from llama_lib.host import gemini, kernels, zero

TESTED_VERSION = "0.5.0"


@dataclass(frozen=True)
class Patch:
    """Replacements by "module:qualified.name", and digests of the code they were written against.

    `host_only` patches stand in for a missing device; the others replace kernels on every machine.
    """

    name: str
    reason: str
    replaces: Mapping[str, Any]
    expects: Mapping[str, str]
    host_only: bool = True


def check_one_dtype(self: Any) -> None:
    """LowLevelZeroOptimizer._sanity_checks without its demand for a GPU."""
    for group in self.optim.param_groups:
        for param in group["params"]:
            if not getattr(param, "skip_zero_check", False):
                assert param.dtype == self._dtype, f"expected {self._dtype}, got {param.dtype}"


def is_device_backend(group: Any) -> bool:
    """Pipeline messages travel over gloo, from CPU tensors."""
    return False


def discard(*args: Any) -> None:
    """Takes the place of `print` in a module that prints on every rank."""


_ZERO = "colossalai.zero.low_level.low_level_optim:LowLevelZeroOptimizer"
_P2P = "colossalai.pipeline.p2p"
_GEMINI = "colossalai.zero.gemini"
_GEMINI_OPTIMIZER = "colossalai.zero.gemini.gemini_optimizer:GeminiOptimizer"
_TRACER = "colossalai.zero.gemini.memory_tracer.memstats_collector"
_PLUGIN = "colossalai.booster.plugin.gemini_plugin"

PATCHES = (
    Patch(
        "hybrid_adam_step",
        "bf16 gradients on the CPU bypass the kernel and lose div_scale, so gradient clipping is "
        "silently off for gemini's offloaded part; also one call per group, not per parameter",
        {"colossalai.nn.optimizer.hybrid_adam:HybridAdam.step": kernels.hybrid_adam_step},
        {
            "colossalai.nn.optimizer.hybrid_adam:HybridAdam.step": "42dc0fea29d7d3aa",
            "colossalai.nn.optimizer.nvme_optimizer:NVMeOptimizer._pre_step": "bd854a91da929a68",
            "colossalai.nn.optimizer.nvme_optimizer:NVMeOptimizer._post_step": "c1d5d7d1be2fe7a6",
        },
        host_only=False,
    ),
    Patch(
        "zero_without_gpu",
        "the ZeRO optimizer asserts that the accelerator is cuda or npu",
        {f"{_ZERO}._sanity_checks": check_one_dtype},
        {f"{_ZERO}._sanity_checks": "4f098277e94d5b2d"},
    ),
    Patch(
        "zero_norm",
        "the ZeRO optimizer makes an fp64 copy of every gradient for its norm",
        {f"{_ZERO}._compute_grad_norm": zero.compute_grad_norm},
        {f"{_ZERO}._compute_grad_norm": "c6a6b28366c32f59"},
    ),
    Patch(
        "zero_alone",
        "a process that is alone copies its gradients into buckets and out again to send them to "
        "nobody",
        {f"{_ZERO}._run_reduction": zero.run_reduction},
        {
            f"{_ZERO}._run_reduction": "50fbd61baa390f70",
            f"{_ZERO}._add_grad": "6bfb32fd73061885",
            "colossalai.zero.low_level.bookkeeping.bucket_store:BucketStore": "0105c02392e25d44",
        },
    ),
    Patch(
        "pipeline_over_gloo",
        "asks for torch.distributed.is_hccl_available, which torch does not have, without NCCL",
        {f"{_P2P}:_check_for_nccl_hccl_backend": is_device_backend},
        {
            f"{_P2P}:_check_for_nccl_hccl_backend": "595088b2b5b0a2da",
            f"{_P2P}:_check_device": "163c1b82a2e9bc7b",
        },
    ),
    Patch(
        "gemini_tiers",
        "Gemini tells device from host by device.type, which is cpu for both here, and copies "
        "chunks between the two although they are one memory",
        {
            f"{_GEMINI}.chunk.chunk:Chunk": gemini.HostChunk,
            f"{_GEMINI}.chunk.manager:Chunk": gemini.HostChunk,
            f"{_GEMINI}.chunk.manager:ChunkManager.move_chunk": gemini.move_chunk,
            f"{_GEMINI}.chunk.manager:get_accelerator": gemini.gemini_accelerator,
            f"{_GEMINI}.placement_policy:get_accelerator": gemini.gemini_accelerator,
            f"{_GEMINI}.gemini_optimizer:get_accelerator": gemini.gemini_accelerator,
        },
        {
            f"{_GEMINI}.chunk.chunk:Chunk": "7afc94a92d1b0b23",
            f"{_GEMINI}.chunk.manager:ChunkManager": "8434808af9d6c1d0",
            f"{_GEMINI}.placement_policy:StaticPlacementPolicy": "0798e4fb27e40d84",
            f"{_GEMINI}.placement_policy:AutoPlacementPolicy": "1141ce614770e7ce",
            f"{_GEMINI}.gemini_ddp:GeminiDDP._init_chunks": "1504d77d31fecd33",
            f"{_GEMINI}.gemini_ddp:GeminiDDP.grad_handle": "b2925f495bdb945f",
            f"{_GEMINI_OPTIMIZER}._maybe_move_fp32_params": "d416a61b7c0dca17",
        },
    ),
    Patch(
        "gemini_memory_monitor",
        "gemini_auto samples memory from torch.cuda; the collector also prints on every rank",
        {
            f"{_TRACER}:SyncCudaMemoryMonitor": gemini.HostMemoryMonitor,
            f"{_TRACER}:print": discard,
        },
        {
            f"{_TRACER}:MemStatsCollector": "e4a65d77b4fc4925",
            f"{_TRACER}:SyncCudaMemoryMonitor": "89ab59799b7a525d",
        },
    ),
    Patch(
        "gemini_fp32",
        "Gemini asserts against fp32, in which its arithmetic is exact",
        {
            f"{_PLUGIN}:SUPPORTED_PRECISION": ["fp16", "bf16", "fp32"],
            f"{_PLUGIN}:PRECISION_STR_TO_DTYPE": {
                "fp16": torch.float16,
                "bf16": torch.bfloat16,
                "fp32": torch.float32,
            },
            f"{_PLUGIN}:GeminiDDP": gemini.AnyPrecisionGeminiDDP,
            f"{_PLUGIN}:GeminiOptimizer": gemini.AnyPrecisionGeminiOptimizer,
        },
        {
            f"{_PLUGIN}:SUPPORTED_PRECISION": "ce59b57838134af6",
            f"{_PLUGIN}:PRECISION_STR_TO_DTYPE": "f0c6d911bba85599",
            f"{_GEMINI}.gemini_ddp:GeminiDDP.__init__": "2429cd0a9922f010",
            f"{_GEMINI}.gemini_ddp:GeminiDDP._init_chunks": "1504d77d31fecd33",
            f"{_GEMINI_OPTIMIZER}.__init__": "f199c4d185049c8d",
        },
    ),
)


def resolve(path: str) -> Any:
    """The object named "module:qualified.name"."""
    module_name, _, qualified_name = path.partition(":")
    found: Any = importlib.import_module(module_name)
    for part in qualified_name.split("."):
        found = getattr(found, part)
    return found


def digest(path: str) -> str:
    """Hash of the source text of a function or class, or of plain data as it prints."""
    found = resolve(path)
    text = inspect.getsource(found) if callable(found) else repr(found)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def check(patch: Patch) -> None:
    """Raise UserError if the code that the patch was written against has changed."""
    for path, expected in patch.expects.items():
        try:
            found = digest(path)
        except (ImportError, AttributeError, OSError):
            found = "no such code"
        if found != expected:
            raise UserError(
                f"patch {patch.name} does not fit the installed ColossalAI {colossalai_version}: "
                f"{path} has changed; got {found}, expected {expected} as in ColossalAI "
                f"{TESTED_VERSION}, which `make install` installs"
            )


def apply(patches: Iterable[Patch]) -> list[str]:
    """Check all of them, then replace; returns their names."""
    chosen = list(patches)
    for patch in chosen:
        check(patch)
    for patch in chosen:
        for path, replacement in patch.replaces.items():
            module_name, _, qualified_name = path.partition(":")
            *owners, attribute = qualified_name.split(".")
            owner = importlib.import_module(module_name)
            for part in owners:
                owner = getattr(owner, part)
            setattr(owner, attribute, replacement)
    return [patch.name for patch in chosen]
