"""Trains one tiny Llama under every plugin in one process group and reports how far each is from a
plain transformers + torch.optim.AdamW loop: torchrun --nproc_per_node 2 host_smoke.py REPORT.json
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llama_lib import host
from llama_lib.cli import run_script

host.install()

import colossalai  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from colossalai.booster import Booster  # noqa: E402
from colossalai.booster.plugin import (  # noqa: E402
    GeminiPlugin,
    HybridParallelPlugin,
    LowLevelZeroPlugin,
)
from colossalai.nn.optimizer import HybridAdam  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

STEPS = 6
MAX_NORM = 0.5  # below the norms of this model, so every step is clipped
ADAM = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}

# Chunks of 16384 elements shard and gather; with the default of 32 Mi this model is one chunk that
# every process keeps whole.
CHUNKS = {"min_chunk_size_m": 1 / 64, "search_range_m": 1, "hidden_dim": 64}


def zero(precision: str, **settings: Any) -> LowLevelZeroPlugin:
    return LowLevelZeroPlugin(
        stage=2,
        precision=precision,
        max_norm=MAX_NORM,
        overlap_communication=False,
        initial_scale=2**8,
        **settings,
    )


def gemini(precision: str, **settings: Any) -> GeminiPlugin:
    return GeminiPlugin(
        precision=precision,
        max_norm=MAX_NORM,
        enable_async_reduce=False,
        initial_scale=2**8,
        **CHUNKS,
        **settings,
    )


def hybrid(precision: str, **settings: Any) -> HybridParallelPlugin:
    return HybridParallelPlugin(
        precision=precision, zero_stage=0, max_norm=MAX_NORM, initial_scale=2**8, **settings
    )


OFFLOADED = {"offload_optim_frac": 1.0, "offload_param_frac": 1.0}
PLUGINS: dict[str, Callable[[str], Any]] = {
    "zero2": zero,
    "zero2_cpu": lambda precision: zero(precision, cpu_offload=True),
    "gemini": gemini,
    "gemini_offload_optim": lambda precision: gemini(precision, offload_optim_frac=1.0),
    "gemini_offload_all": lambda precision: gemini(precision, **OFFLOADED),
    "gemini_accumulate": lambda precision: gemini(
        precision, enable_gradient_accumulation=True, **OFFLOADED
    ),
    "gemini_auto": lambda precision: gemini(precision, placement_policy="auto"),
    "hybrid_tp2": lambda precision: hybrid(precision, tp_size=2, pp_size=1),
    "hybrid_pp2": lambda precision: hybrid(
        precision, tp_size=1, pp_size=2, num_microbatches=2, microbatch_size=None
    ),
}


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(1)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config)


def batches() -> list[torch.Tensor]:
    """Token ids [4, 32] per step, counting up; the plain loop reads all rows, a data-parallel rank
    its half."""
    generator = torch.Generator().manual_seed(2)
    starts = torch.randint(0, 128, (STEPS, 4, 1), generator=generator)
    return list((starts + torch.arange(32)) % 128)


def plain_losses(precision: str) -> list[float]:
    """fp32, or 16-bit weights with fp32 masters, moments and clipping."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    model = tiny_llama()
    masters = [param.detach().clone().requires_grad_() for param in model.parameters()]
    model.to(dtype)
    optimizer = torch.optim.AdamW(masters, **ADAM)
    losses = []
    for ids in batches():
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        for master, param in zip(masters, model.parameters(), strict=True):
            master.grad = param.grad.float()
            param.grad = None
        torch.nn.utils.clip_grad_norm_(masters, MAX_NORM)
        optimizer.step()
        with torch.no_grad():
            for master, param in zip(masters, model.parameters(), strict=True):
                param.copy_(master)
        losses.append(loss.item())
    return losses


def plugin_losses(name: str, precision: str) -> list[float]:
    plugin = PLUGINS[name](precision)
    booster = Booster(plugin=plugin)
    model = tiny_llama()
    optimizer = HybridAdam(model.parameters(), **ADAM)
    model, optimizer, *_ = booster.boost(model, optimizer)
    data_parallel = not isinstance(plugin, HybridParallelPlugin)
    losses = []
    for ids in batches():
        rows = ids.chunk(2)[dist.get_rank()] if data_parallel else ids
        loss = forward_backward(booster, model, optimizer, {"input_ids": rows, "labels": rows})
        optimizer.step()
        optimizer.zero_grad()
        if data_parallel:
            dist.all_reduce(loss)
            loss /= dist.get_world_size()
        losses.append(loss.item())
    return losses


def forward_backward(
    booster: Booster, model: Any, optimizer: Any, batch: dict[str, torch.Tensor]
) -> torch.Tensor:
    """Mean loss of the batch, known on every rank."""
    if getattr(booster.plugin, "pp_size", 1) == 1:
        loss = model(**batch).loss
        booster.backward(loss, optimizer)
        return loss.detach().float()
    outcome = booster.execute_pipeline(
        iter([batch]), model, lambda output, _: output.loss, optimizer, return_loss=True
    )
    loss = outcome["loss"] if outcome["loss"] is not None else torch.zeros(())
    loss = loss.detach().float().reshape(())
    dist.broadcast(loss, src=dist.get_world_size() - 1)
    return loss


def main() -> None:
    colossalai.launch_from_torch(verbose=False)
    chosen = sys.argv[2:] or list(PLUGINS)
    report: dict[str, Any] = {}
    for precision in ("fp32", "bf16", "fp16"):
        report[precision] = {"plain": plain_losses(precision)}
        for name in chosen:
            report[precision][name] = plugin_losses(name, precision)
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(report))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    run_script(lambda _: main())
