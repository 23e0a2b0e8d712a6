"""What a run did, at its end: one result for the table on the console and for --output.

Invariant: the table shows numbers of the result and nothing else, so a file holds what was shown.
"""

import importlib.metadata
import math
import os
import platform
import resource
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from llama_lib import coordination, private
from llama_lib.engine import Engine
from llama_lib.flops import num_parameters
from llama_lib.layout import BatchPlan
from llama_lib.metrics import final_line
from llama_lib.result_file import (
    Hardware,
    Loss,
    Memory,
    Model,
    Result,
    Steps,
    TimeShares,
    rates_of,
)
from llama_lib.throughput import Throughput
from llama_lib.timing import PHASES, Stopwatch

PACKAGES = ("torch", "transformers", "colossalai", "datasets", "liger-kernel", "flash-attn")
# A rate over fewer steps says little: one of them may be an odd one.
FEW_STEPS = 10


def peak_memory(device: torch.device) -> Memory:
    """The most that any process of the run has used so far; to be called by all of them.

    `allocated` is what tensors took of a GPU, `reserved` what torch took of it to serve them;
    `host` is the peak resident set of the process that had the largest.
    """
    gpu = [0.0, 0.0]
    if device.type == "cuda":
        gpu = [torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)]
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
    peaks = torch.tensor([*gpu, host], dtype=torch.float64, device=device) / 2**20
    dist.all_reduce(peaks, op=dist.ReduceOp.MAX)
    allocated, reserved, host = peaks.tolist()
    if device.type == "cuda":
        return Memory(allocated, reserved, host)
    return Memory(None, None, host)


def headline_memory(memory: Memory) -> float | None:
    """What "memory" means where one number is shown: a GPU's tensors, else the host's."""
    return memory.host if memory.allocated is None else memory.allocated


def throughput_of(engine: Engine, sequence: int) -> Throughput:
    """The rates of what an engine trains, `sequence` tokens to a row."""
    options, device = engine.options, engine.device
    return Throughput(
        options,
        engine.config,
        sequence,
        engine.layout.world_size,
        torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        sum(map(math.prod, engine.trained.values())) if options.model.lora_rank else 0,
    )


def time_shares(phases: Mapping[str, float], communication_known: bool) -> TimeShares:
    """Seconds of every phase as shares of their sum.

    NCCL works on streams of its own: what of it a step waits for is known after a profile only.
    """
    total = sum(phases.values())
    shares: dict[str, Any] = {name: phases[name] / total for name in PHASES}
    if not communication_known:
        shares["communication"] = None
    return TimeShares(**shares)


def mean_of_ranks(phases: Mapping[str, float]) -> dict[str, float]:
    """Seconds of every phase, of the mean rank; to be called by all of them."""
    found = coordination.gather([phases[name] for name in PHASES])
    means = [math.fsum(each) / len(found) for each in zip(*found, strict=True)]
    return dict(zip(PHASES, means, strict=True))


def summarise(
    engine: Engine,
    plan: BatchPlan,
    throughput: Throughput,
    watch: Stopwatch,
    shares: TimeShares,
    memory: Memory,
    loss: Loss,
) -> Result:
    """The result of a run in which at least one step was done."""
    options, gpus = engine.options, throughput.num_gpus
    rates = rates_of(watch.seconds, plan.tokens_per_step, plan.global_batch, gpus)
    tflops = throughput.tflops_per_gpu(rates.tokens_per_second_per_gpu * gpus)
    return Result(
        command=private.masked(shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])),
        model=Model(
            private.masked(
                options.model.model_path or options.checkpoint.load or options.model.config
            ),
            num_parameters(engine.config),
        ),
        options=options.to_dict(),
        layout=engine.layout.describe(),
        attention=engine.attention,
        kernels=engine.kernels,
        chunked_loss=engine.chunked_loss,
        versions=_versions(),
        hardware=Hardware(
            throughput.device_name,
            gpus,
            _processor(),
            len(os.sched_getaffinity(0)),
            os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30,
        ),
        data=private.masked(" ".join(options.data.dataset)),
        steps=Steps(len(watch.seconds) + watch.num_ignored, watch.num_ignored, watch.seconds),
        tokens_per_step=plan.tokens_per_step,
        rows_per_step=plan.global_batch,
        rates=rates,
        tflops_per_gpu=tflops,
        mfu=throughput.mfu(tflops["model"]),
        peak=throughput.peak,
        memory_mb=memory,
        time_shares=shares,
        loss=loss,
    )


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


# -- the table -----------------------------------------------------------------------------------


def closing_lines(result: Result) -> list[str]:
    """The table, and last of all the line of the upstream benchmark."""
    rates, model_tflops = result.rates, result.tflops_per_gpu["model"]
    line = final_line(headline_memory(result.memory_mb), rates.samples_per_second, model_tflops)
    return [*render(result), line]


def render(result: Result) -> list[str]:
    """The lines of the table; rates are those of the mean step, GPU means CPU process too."""
    steps, rates, tflops = result.steps, result.rates, result.tflops_per_gpu
    rows = [
        ("tokens/s/GPU", f"{rates.tokens_per_second_per_gpu:,.1f}"),
        ("samples/s", f"{rates.samples_per_second:,.2f}"),
        (
            "step time",
            f"median {rates.step_time_median_s:.4g} s, 95th percentile "
            f"{rates.step_time_p95_s:.4g} s, (longest - shortest) / median "
            f"{rates.step_time_spread:.1%}",
        ),
        ("model TFLOPS/GPU", _tflops(tflops, "model", "nothing recomputed, whole attention")),
        ("MFU", _mfu(result)),
        ("hardware TFLOPS/GPU", _tflops(tflops, "hardware", f"recompute {result.recompute}")),
        ("causal TFLOPS/GPU", _tflops(tflops, "causal", "half of the attention")),
        ("TFLOPS/GPU by legacy", _legacy(tflops)),
        ("max memory", _memory(result.memory_mb)),
        ("time", _times(result.time_shares)),
    ]
    width = max(len(label) for label, _ in rows)
    lines = [
        f"measured over {len(steps.seconds)} steps of {result.rows_per_step} rows = "
        f"{result.tokens_per_step:,} tokens, the first {steps.ignored} left out, on "
        f"{result.hardware.count} x {result.hardware.device}:",
        *(f"  {label:<{width}}  {value}" for label, value in rows),
    ]
    if result.mfu is not None and result.mfu > 1:
        lines.append(
            "warning: MFU above 100% cannot be: the peak is not that of this machine "
            "(--peak_tflops)"
        )
    if len(steps.seconds) < FEW_STEPS and "num_steps" in result.options["report"]:
        lines.append(
            f"warning: {len(steps.seconds)} measured steps are few, a rate needs "
            f"{FEW_STEPS} or more (--num_steps)"
        )
    return lines


def _tflops(found: Mapping[str, float], name: str, meaning: str) -> str:
    return f"{found[name]:.4g} ({meaning})" if name in found else "n/a (with adapters)"


def _legacy(found: Mapping[str, float]) -> str:
    names = ("colossalai_8n", "megatron_2021")
    shown = [f"{name} {found[name]:.4g}" for name in names if name in found]
    return ", ".join(shown) or "n/a (with adapters)"


def _mfu(result: Result) -> str:
    if result.mfu is None:
        device = result.hardware.device
        return f"n/a (peak for {device!r} unknown, pass --peak_tflops)"
    return f"{result.mfu:.1%} of {result.peak.tflops:g} TFLOPS ({result.peak.source})"


def _memory(memory: Memory) -> str:
    parts = [
        f"{name} {'n/a' if value is None else f'{value:,.0f} MB'}"
        for name, value in asdict(memory).items()
    ]
    return ", ".join(parts) + " (each of the process with the most)"


def _times(shares: TimeShares) -> str:
    known = {name: share for name, share in asdict(shares).items() if share is not None}
    shown = dict(zip(known, percents(list(known.values())), strict=True))
    parts = [
        f"{name.replace('_', '-')} {f'{shown[name]:.1f}%' if name in shown else 'n/a'}"
        for name in PHASES
    ]
    note = "" if "communication" in known else " (communication is part of the others)"
    return ", ".join(parts) + note


def percents(shares: Sequence[float]) -> list[float]:
    """The shares in percent to a tenth, rounded so that what is shown adds up to 100."""
    tenths = [share * 1000 for share in shares]
    rounded = [math.floor(value) for value in tenths]
    by_remainder = sorted(range(len(shares)), key=lambda k: rounded[k] - tenths[k])
    for index in by_remainder[: 1000 - sum(rounded)]:
        rounded[index] += 1
    return [value / 10 for value in rounded]
