"""Published peaks of GPU memory beside what the plan says of the same runs.

Invariant: the rows are quotations, the plan's numbers are computed each time, and nothing in the
model of memory is fitted to them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llama_lib.layout import Layout
from llama_lib.models import SHAPES
from llama_lib.planner.job import Job
from llama_lib.planner.memory import memory

MB = 2**20


@dataclass(frozen=True)
class Row:
    """A published peak: `megabytes` (2^20 bytes) of the run `job`, as far as its settings are told.

    `copies` says how many more fp32 copies of all logits the run is known to have held than this
    project does; `known` what the source leaves open and what is known of the difference.
    """

    name: str
    source: str
    megabytes: float
    job: Job
    known: str
    copies: int = 0


def _job(model: str, plugin: str, gpus: int, rows: int, length: int, precision: str) -> Job:
    """Full recomputation, a flash kernel and whole logits: what all of the published runs had."""
    stage = 3 if plugin.startswith("gemini") else 2
    layout = Layout(plugin, gpus, zero_stage=stage)
    return Job(
        SHAPES[model],
        layout,
        batch_size=rows,
        accumulation=1,
        microbatch_size=rows,
        max_length=length,
        precision=precision,
        recompute="full",
        chunked_loss=False,
    )


PUBLISHED = (
    Row(
        "7B gemini, 32 A800, 16 rows of 4096",
        "ColossalAI examples/language/llama/README.md, called 65B there (its rate is that of a 7B)",
        55491.10,
        _job("llama2-7b", "gemini", 32, 16, 4096, "fp16"),
        "transformers' loss of that time turned the logits into fp32 and shifted a copy of them, "
        "and the outputs kept the first: one copy more than here.",
        copies=1,
    ),
    Row(
        "65B gemini_auto, 32 A800, 12 rows of 2048",
        "ColossalAI branch example/llama, README",
        58500.20,
        _job("llama1-65b", "gemini_auto", 32, 12, 2048, "fp16"),
        "One copy more, as above. gemini_auto leaves weights that it has gathered on the GPU while "
        "nine tenths of its memory allow it; the plan counts the chunks it cannot do without.",
        copies=1,
    ),
    Row(
        "7B zero2, 8 H200, 36 rows of 4096",
        "ColossalAI README at 4f9953be3, table of benchmarks, batch '36/DP'",
        119040.0,
        _job("llama2-7b", "zero2", 8, 36, 4096, "bf16"),
        "36 rows are taken as those of one GPU; as those of all they would be no whole number "
        "each. How that run computed its loss is not told.",
    ),
    Row(
        "70B zero2, 16 GPUs, 3 rows of 4096",
        "ColossalAI README at 4f9953be3, table of benchmarks, batch '48/DP', on 'H200'",
        150032.0,
        _job("llama2-70b", "zero2", 16, 3, 4096, "bf16"),
        "48 rows are taken as those of all GPUs: 48 on each would keep 245,760 MB of layer inputs "
        "alone. The row cannot be what it says: 150,032 MB are 146.5 GiB, an H200 has 140.4. And "
        "zero2 holds on every GPU all weights in bf16 and a sixteenth of 12 bytes a parameter, "
        "180,898 MB before the first activation. The next row is another reading of it.",
    ),
    Row(
        "the same as zero2_cpu",
        "the same row",
        150032.0,
        _job("llama2-70b", "zero2_cpu", 16, 3, 4096, "bf16"),
        "A reading that fits (optimizer and master weights on the host), not one that the source "
        "gives.",
    ),
)


def extra_bytes(row: Row) -> int:
    """Bytes of the copies of the logits that the run held and this project does not."""
    tokens = row.job.microbatch_size * row.job.max_length
    return row.copies * 4 * tokens * row.job.shape.vocab_size


def table(rows: Sequence[Row] = PUBLISHED) -> list[str]:
    """The rows as a table of markdown, and beneath it what is known of each difference."""
    head = ("run", "published", "plan", "deviation", "with known copies", "deviation")
    parts = ("states", "activations", "logits", "rest", "peak at")
    lines = [f"| {' | '.join(head + parts)} |", "|---|" + "---:|" * 9 + "---|"]
    for row in rows:
        need = memory(row.job)
        at_peak = need.moments[need.moment]
        states = sum(at_peak[kind] for kind in ("weights", "master", "optimizer"))
        rest = at_peak["gradients"] + at_peak["buffers"]
        cells = [row.name, f"{row.megabytes:,.0f}"]
        for plan in (need.device_total, need.device_total + extra_bytes(row)):
            cells += [f"{plan / MB:,.0f}", f"{plan / MB / row.megabytes - 1:+.1%}"]
        counts = (states, at_peak["activations"], at_peak["logits"], rest)
        cells += [f"{count / MB:,.0f}" for count in counts] + [need.moment]
        lines.append(f"| {' | '.join(cells)} |")
    lines.append("")
    lines += [f"- {row.name}: {row.known} Source: {row.source}." for row in rows]
    return lines
