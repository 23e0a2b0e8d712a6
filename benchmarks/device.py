"""Measure 7B and 1.1B on one GPU: benchmark.py beside transformers' Trainer.

    python -m benchmarks.device

Ours are benchmark.py on the same rows, since it saves no checkpoint: that of a 7B model takes 94 GB
of disk for a few steps. Rivals, weights, rows and recipe are those of benchmarks/train.py. A run
that needs more memory than there is stands in the result as such.

Invariant: a row has a number only if its run ended in order on this machine's GPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import train
from benchmarks.measure import (
    ROOT,
    add_output_flags,
    command_line,
    read_records,
    run_benchmark,
    surroundings,
    write_result,
)
from llama_lib import flops
from llama_lib.models import model_config

RESULT = ROOT / "benchmarks" / "results" / "device.json"


@dataclass(frozen=True)
class Row:
    """One line of the table. `batch_size` counts rows of a step; `contender` as in train.py."""

    model: str
    max_length: int
    batch_size: int
    recompute: str
    contender: str


# By arithmetic, 7B: weights, gradients and optimizer state are 108 GB. With full recomputation 8
# rows add 9 GB; Trainer's fp32 activations and bf16 copies of the weights leave room for 2. Without
# recomputation a row adds 24 GB.
ROWS = (
    Row("7b", 4096, 8, "full", "zero2"),
    Row("7b", 4096, 2, "full", "zero2"),
    Row("7b", 4096, 2, "full", "trainer"),
    Row("7b", 4096, 1, "selective", "zero2"),
    Row("7b", 4096, 1, "none", "zero2"),
    Row("1.1b", 2048, 16, "none", "zero2"),
    Row("1.1b", 2048, 16, "none", "trainer"),
    Row("1.1b", 2048, 16, "none", "barest"),
)


def main(argv: Sequence[str] | None = None) -> None:
    run_benchmark(_arguments(argv), "device-benchmark-", run, table)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.device")
    add = parser.add_argument
    add("--models", nargs="+", default=sorted({row.model for row in ROWS}), help="rows to run")
    add("--steps", type=int, default=25, help="of each run (25)")
    add("--ignore", type=int, default=5, help="first steps that are not measured (5)")
    add_output_flags(parser, RESULT)
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise SystemExit("there is no NVIDIA GPU here: nothing measured")
    return arguments


def run(arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Every row once; the result file is written after each."""
    result: dict[str, Any] = {
        "command": command_line("benchmarks.device"),
        **surroundings(train.PACKAGES),
        "config": {"steps": arguments.steps, "ignore": arguments.ignore, "precision": "bf16"},
        "rows": [],
    }
    device = gpu_name()
    result["hardware"]["gpu"] = device
    tokens = train.prepared_sample(work)
    for number, row in enumerate(each for each in ROWS if each.model in arguments.models):
        folder = work / f"row-{number}"
        found = measured(row, arguments.steps, arguments.ignore, folder, tokens)
        result["rows"].append(asdict(row) | rates(row, found, device) | found)
        check_alike(result["rows"])
        write_result(arguments.result, result)
        print(table(result).splitlines()[-1], flush=True)
    return result


def gpu_name() -> str:
    """As torch names it, from a process of its own: asking takes memory of the GPU."""
    command = [sys.executable, "-c", "import torch; print(torch.cuda.get_device_name())"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


class DeviceBench(train.Bench):
    """A bench whose own runs are benchmark.py's; `kernels` are those of the last one."""

    kernels: str | None = None

    def our_command(self, contender: train.Contender, folder: Path) -> list[str]:
        a = self.arguments
        command = [str(ROOT / "benchmark.py"), *self.flags(contender), "-o", str(folder / "run")]
        # One loss read on the host after each step, as the rivals do.
        command += ["-t", str(folder), "--num_steps", str(a.steps), "--log_interval", "1"]
        return [*command, "--ignore_steps", str(a.ignore), "--output", str(folder / "result.json")]

    def our_steps(self, folder: Path) -> dict[str, Any]:
        """Seconds and loss of every step: the measured seconds are the result's own, those before
        them the records'."""
        result = json.loads((folder / "result.json").read_text())
        records = read_records(folder / "metrics.jsonl")
        if len(records) != self.arguments.steps:
            raise SystemExit(f"{len(records)} records of {self.arguments.steps} steps")
        self.kernels = result["kernels"]
        before = [each["step_time_s"] for each in records[: result["steps"]["ignored"]]]
        return {
            "seconds": before + result["steps"]["seconds"],
            "reported": [each["step_time_s"] for each in records],
            "loss": [each["loss"] for each in records],
            "memory": {name: result["memory_mb"][name] for name in ("allocated", "reserved")},
        }


def measured(row: Row, steps: int, ignore: int, folder: Path, tokens: Path) -> dict[str, Any]:
    """The run of a row, or {"failed": why} when memory did not suffice."""
    arguments = train.arguments_of(
        ["--only", row.contender, "--model", row.model, "--max_length", str(row.max_length)]
        + ["--batch_size", str(row.batch_size), "--steps", str(steps), "--ignore", str(ignore)]
        + [f"--ours=--recompute {row.recompute}"]
    )
    try:
        bench = DeviceBench(arguments, folder, tokens)
        found = bench.train(arguments.contenders[0])
    except SystemExit as error:
        if "out of memory" not in str(error).lower():
            raise
        return {"failed": "out of memory"}
    return found | {"kernels": bench.kernels or "transformers"}


def rates(row: Row, found: Mapping[str, Any], device: str) -> dict[str, Any]:
    """tokens/s, model TFLOPS and MFU of the median step; nothing where there is no run."""
    if "failed" in found:
        return {}
    tokens = row.batch_size * row.max_length / statistics.median(found["measured_seconds"])
    per_token = flops.model_flops_per_token(model_config(row.model), row.max_length)
    tflops = flops.tflops_per_gpu(per_token, tokens, 1)
    mfu = flops.model_flops_utilization(tflops, device, "bf16")
    return {
        "tokens_per_second": round(tokens, 1),
        "model_tflops": round(tflops, 2),
        "mfu": None if mfu is None else round(mfu, 4),
    }


def check_alike(rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows of one model and batch trained alike, whatever was recomputed: first and last loss."""
    first: dict[tuple[Any, ...], Mapping[str, Any]] = {}
    for row in rows:
        if "failed" in row:
            continue
        other = first.setdefault((row["model"], row["max_length"], row["batch_size"]), row)
        for place in (0, -1):
            if abs(row["loss"][place] - other["loss"][place]) > train.LOSS_TOLERANCE["bf16"]:
                raise SystemExit(f"{other['contender']} and {row['contender']} train differently")


def table(result: Mapping[str, Any]) -> str:
    lines = [f"{'model':<7}{'length':>7}{'rows':>6}  {'recompute':<11}{'who':<9}{'tokens/s':>10}"]
    lines[0] += f"{'TFLOPS':>9}{'MFU':>8}"
    for row in result["rows"]:
        numbers = row.get("failed")
        if numbers is None:
            mfu = "n/a" if row["mfu"] is None else f"{row['mfu']:.1%}"
            numbers = f"{row['tokens_per_second']:>10,.0f}{row['model_tflops']:>9.1f}{mfu:>8}"
        lines.append(
            f"{row['model']:<7}{row['max_length']:>7}{row['batch_size']:>6}  {row['recompute']:<11}"
            f"{row['contender']:<9}{numbers}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
