"""The five Booster plugins: name -> builder.

Invariant: every plugin clips, uses the run's precision, starts its loss scale at 2^16 and reads
data by data-parallel rank; ColossalAI's own defaults (no clipping, scale 2^32) never apply.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from llama_lib.config import Options
from llama_lib.layout import Layout
from llama_lib.planner.chunks import MAX_CHUNK_MEBI, MIN_CHUNKS

# 2^16 is torch.amp's starting scale; zero2's default of 2^32 overflows for many steps.
INITIAL_SCALE = 2**16


@dataclass(frozen=True)
class Setting:
    """What a plugin must know beyond the options.

    `accelerated`: ranks compute on a GPU (streams exist, host memory can be pinned).
    `accumulation`: micro-steps per optimizer step.
    """

    accelerated: bool
    accumulation: int


def _max_norm(options: Options) -> float:
    """Clipping off still asks for the norm: an infinite bound computes it and never clips."""
    return options.training.gradient_clipping or math.inf


def _build_zero2(options: Options, layout: Layout, config: Any, setting: Setting) -> Any:
    from colossalai.booster.plugin import LowLevelZeroPlugin

    return LowLevelZeroPlugin(
        stage=2,
        precision=options.training.mixed_precision,
        initial_scale=INITIAL_SCALE,
        max_norm=_max_norm(options),
        cpu_offload=options.parallel.plugin == "zero2_cpu",
        # Overlapping records tensors on a CUDA stream, which a host tensor does not have.
        overlap_communication=setting.accelerated,
    )


def _build_gemini(options: Options, layout: Layout, config: Any, setting: Setting) -> Any:
    from colossalai.booster.plugin import GeminiPlugin

    from llama_lib.flops import num_parameters

    chunk = min(MAX_CHUNK_MEBI, num_parameters(config) / MIN_CHUNKS / 2**20)
    auto = options.parallel.plugin == "gemini_auto"
    return GeminiPlugin(
        precision=options.training.mixed_precision,
        placement_policy="auto" if auto else "static",
        offload_optim_frac=options.parallel.offload_optim_frac,
        offload_param_frac=options.parallel.offload_param_frac,
        enable_gradient_accumulation=setting.accumulation > 1,
        initial_scale=INITIAL_SCALE,
        max_norm=_max_norm(options),
        hidden_dim=config.hidden_size,
        search_range_m=chunk,
        min_chunk_size_m=chunk,
        enable_async_reduce=setting.accelerated,
        pin_memory=setting.accelerated,
    )


def _build_hybrid(options: Options, layout: Layout, config: Any, setting: Setting) -> Any:
    from colossalai.booster.plugin import HybridParallelPlugin

    return HybridParallelPlugin(
        tp_size=layout.tp,
        pp_size=layout.pp,
        sp_size=layout.sequence_axis,
        zero_stage=layout.zero_stage,
        precision=options.training.mixed_precision,
        enable_sequence_parallelism=layout.sp_mode is not None,
        sequence_parallelism_mode=layout.sp_mode,
        enable_flash_attention=options.model.flash_attention,
        microbatch_size=(options.parallel.microbatch_size or 1) if layout.pp > 1 else None,
        pp_style=options.parallel.pp_style,
        num_model_chunks=options.parallel.num_model_chunks,
        # The interleaved schedule forgets the handle of its last send, and gloo a send without one.
        overlap_p2p=setting.accelerated,
        initial_scale=INITIAL_SCALE,
        max_norm=_max_norm(options),
        overlap_communication=setting.accelerated,
        # The only buffers are rotary frequencies, the same constant on every rank.
        broadcast_buffers=False,
    )


Builder = Callable[[Options, Layout, Any, Setting], Any]

PLUGINS: dict[str, Builder] = {
    "gemini": _build_gemini,
    "gemini_auto": _build_gemini,
    "zero2": _build_zero2,
    "zero2_cpu": _build_zero2,
    "hybrid_parallel": _build_hybrid,
}


def build_plugin(options: Options, layout: Layout, config: Any, setting: Setting) -> Any:
    """The Booster plugin for checked options; `config` is the model's transformers config."""
    return PLUGINS[layout.plugin](options, layout, config, setting)


def supports_lazy_init(layout: Layout) -> bool:
    """Whether the plugin shards a model that has no storage yet."""
    return layout.plugin != "zero2" and layout.plugin != "zero2_cpu"


def data_parallel_rank(plugin: Any, layout: Layout) -> int:
    """Which of the `layout.dp` replicas this process belongs to."""
    if layout.plugin == "hybrid_parallel":
        return plugin.pg_mesh.coordinate(plugin.dp_axis)
    return dist.get_rank()
