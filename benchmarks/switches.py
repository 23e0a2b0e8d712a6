"""Measure what each switch of speed and memory does to a step of pretrain.py, in turns.

    python -m benchmarks.switches

The model and the rows of benchmarks/train.py, plugin zero2: once as it is by default, once with
each switch. Runs take turns as they do there.

Invariant: nothing is written unless the losses of all runs agree at every step.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import train
from benchmarks.measure import (
    ROOT,
    add_output_flags,
    command_line,
    run_benchmark,
    surroundings,
    write_result,
)

RESULT = ROOT / "benchmarks" / "results" / "switches.json"
DEFAULT = "default"
SWITCHES = {
    DEFAULT: "",
    "all logits at once": "--no-chunked_loss",
    "recompute selective": "--recompute selective",
    "recompute full": "--recompute full",
    "compiled layers": "--compile",
}


def main(argv: Sequence[str] | None = None) -> None:
    run_benchmark(_arguments(argv), "switches-benchmark-", run, table)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.switches")
    add = parser.add_argument
    add("--only", default=",".join(SWITCHES), help="switches, comma-separated (all)")
    add("--steps", type=int, default=10, help="of each run (10)")
    add("--ignore", type=int, default=3, help="first steps that are not measured (3)")
    add("--repeats", type=int, default=3, help="runs of each switch (3)")
    add("--batch_size", type=int, default=4, help="rows of a step (4)")
    add_output_flags(parser, RESULT)
    arguments = parser.parse_args(argv)
    arguments.switches = arguments.only.split(",")
    if unknown := [name for name in arguments.switches if name not in SWITCHES]:
        raise SystemExit(f"--only {unknown[0]}: expected some of {', '.join(SWITCHES)}")
    return arguments


def run(arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    """All runs, one after the other; the result file is written after each."""
    settings = train.arguments_of(
        ["--only", "zero2", "--steps", str(arguments.steps), "--ignore", str(arguments.ignore)]
        + ["--batch_size", str(arguments.batch_size)]
    )
    bench = train.Bench(settings, work / "bench", train.prepared_sample(work))
    result: dict[str, Any] = {
        "command": command_line("benchmarks.switches"),
        **surroundings(train.PACKAGES),
        "config": bench.describe() | {"plugin": "zero2"},
        "flags": {name: SWITCHES[name] for name in arguments.switches},
        "runs": [],
    }
    (contender,) = settings.contenders
    for repeat in range(arguments.repeats):
        names = arguments.switches if repeat % 2 == 0 else arguments.switches[::-1]
        for name in names:
            settings.ours = SWITCHES[name]
            found = {"repeat": repeat} | bench.train(contender) | {"contender": name}
            result["runs"].append(found)
            train.check_losses(result["runs"], settings.precision)
            result["summary"] = summary(result["runs"])
            write_result(arguments.result, result)
            print(train.line_of(found), flush=True)
    return result


def summary(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Median step and memory of each switch, and both as shares of the default's."""
    found = []
    for name in dict.fromkeys(each["contender"] for each in runs):
        own = [each for each in runs if each["contender"] == name]
        seconds = [step for each in own for step in each["measured_seconds"]]
        found.append(
            {
                "switch": name,
                "step_ms": round(statistics.median(seconds) * 1000, 1),
                "fastest_ms": round(min(seconds) * 1000, 1),
                "slowest_ms": round(max(seconds) * 1000, 1),
                "peak_pss_mb": statistics.median(each["command"]["peak_pss_mb"] for each in own),
            }
        )
    usual = next((each for each in found if each["switch"] == DEFAULT), None)
    for each in found:
        if usual is not None:
            each["time"] = round(each["step_ms"] / usual["step_ms"], 3)
            each["memory"] = round(each["peak_pss_mb"] / usual["peak_pss_mb"], 3)
    return found


def table(result: dict[str, Any]) -> str:
    lines = [f"{'switch':<22}{'step ms':>9}{'time':>8}{'memory MB':>11}{'memory':>8}"]
    for each in result["summary"]:
        time, memory = (f"{each[key]:.2f}x" if key in each else "n/a" for key in ("time", "memory"))
        lines.append(
            f"{each['switch']:<22}{each['step_ms']:>9.1f}{time:>8}{each['peak_pss_mb']:>11.0f}"
            f"{memory:>8}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
