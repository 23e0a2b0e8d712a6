"""Measure how long training stands still for a checkpoint, with and without --async_save.

    python -m benchmarks.saving
    python -m benchmarks.saving --only zero2 --hidden_size 128 --layers 2 --repeats 1

Each plugin, on one process and on two, runs pretrain.py as a user starts it, once saving at once
and once beside the training, in turns. How long the loop stood still for a save is what the run's
log says; the steps lie between the records of metrics, by the clock, less that time. A step counts
as one "while writing" if any of it lies between the end of the copy and the end of the writing.

Invariant: nothing is written unless both ways trained alike and left checkpoints with the same
files; the last save of a run, which nothing could go on beside, is in no number.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from benchmarks.measure import (
    ROOT,
    add_output_flags,
    as_record,
    command_line,
    measure,
    read_records,
    run_benchmark,
    surroundings,
    write_result,
)
from benchmarks.train import Bench, Contender, contender_of, moments, prepared_sample

RESULT = ROOT / "benchmarks" / "results" / "saving.json"
PACKAGES = ("torch", "colossalai", "safetensors", "numpy")
_DEFAULT = "zero2,gemini,zero2-2,gemini-2"
_WAYS = ("at once", "beside")
_MIB = 2**20
# Files that name the options of their run, one of which is what is compared here.
_OF_THE_RUN = ("trainer_state.json",)


def main(argv: Sequence[str] | None = None) -> None:
    run_benchmark(arguments_of(argv), "saving-benchmark-", run, table)


def arguments_of(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.saving")
    add = parser.add_argument
    add("--only", default=_DEFAULT, help=f"plugins, -2 for two processes ({_DEFAULT})")
    add("--model", help="-c of pretrain.py (a Llama of the next three)")
    add("--hidden_size", type=int, default=512, help="of the model (512)")
    add("--layers", type=int, default=8, help="of the model (8)")
    add("--vocab_size", type=int, default=32000, help="of the model (32000)")
    add("--max_length", type=int, default=256, help="tokens of a row (256)")
    add("--batch_size", type=int, default=2, help="rows of a step, over all processes (2)")
    add("--precision", choices=("bf16", "fp32"), default="bf16", help="(bf16)")
    add("--interval", type=int, default=12, help="steps from one save to the next (12)")
    add("--saves", type=int, default=2, help="measured saves of a run (2)")
    add("--ignore", type=int, default=3, help="first steps that are not measured (3)")
    add("--repeats", type=int, default=1, help="runs of each way (1)")
    add("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of a run (all cores)")
    add("--ours", default="", help="more flags for pretrain.py, in quotes")
    add_output_flags(parser, RESULT)
    arguments = parser.parse_args(argv)
    arguments.contenders = [contender_of(name) for name in arguments.only.split(",")]
    for contender in arguments.contenders:
        if not contender.is_ours or arguments.batch_size % contender.processes:
            raise SystemExit(
                f"--only {contender.name}: expected a plugin, and an even --batch_size"
            )
    if arguments.ignore >= arguments.interval:
        raise SystemExit(f"--ignore {arguments.ignore}: expected less than --interval")
    # Half an interval after the last measured save comes the one at the end.
    arguments.steps = arguments.interval * arguments.saves + arguments.interval // 2
    return arguments


def run(arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    bench = Bench(arguments, work, prepared_sample(work))
    config = bench.describe()
    config |= {"interval": arguments.interval, "saves": arguments.saves}
    result: dict[str, Any] = {
        "command": command_line("benchmarks.saving"),
        **surroundings(PACKAGES),
        "config": config,
        "runs": [],
    }
    for repeat in range(arguments.repeats):
        for contender in arguments.contenders:
            pair = [one_run(bench, contender, way) for way in _WAYS]
            check_alike(contender, *pair)
            for each in pair:
                each.pop("files")
                result["runs"].append({"repeat": repeat, **each})
                print(line_of(each), flush=True)
            result["summary"] = summary(result["runs"])
            write_result(arguments.result, result)
    return result


def one_run(bench: Bench, contender: Contender, way: str) -> dict[str, Any]:
    a = bench.arguments
    folder = bench.work / f"run-{bench.count}"
    bench.count += 1
    folder.mkdir()
    command = [sys.executable]
    if contender.processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc_per_node", str(contender.processes)]
    save_dir = folder / "checkpoint"
    command += [str(ROOT / "pretrain.py"), *bench.flags(contender), "--log_interval", "1"]
    command += ["--max_steps", str(a.steps), "--save_interval", str(a.interval), "--keep_last", "2"]
    command += ["-o", str(save_dir), "-t", str(folder)]
    command += ["--async_save"] if way == "beside" else []
    threads = str(max(1, a.threads // contender.processes))
    measured = measure(command, folder / "log", {"OMP_NUM_THREADS": threads})
    found = {
        "contender": contender.name,
        "way": way,
        "checkpoint_mb": round(size_of(save_dir) / _MIB, 1),
        **saves_and_steps(folder, save_dir / "logs" / "rank-00000.log", a),
        "loss": [each["loss"] for each in read_records(folder / "metrics.jsonl")],
        "command": as_record(measured),
        "files": files_of(save_dir),
    }
    shutil.rmtree(folder)
    return found


def size_of(save_dir: Path) -> int:
    newest = max(save_dir.glob("step-????????"))
    return sum(path.stat().st_size for path in newest.rglob("*") if path.is_file())


def files_of(save_dir: Path) -> dict[str, Any]:
    """What the manifests say of every file that does not depend on how it was saved."""
    return {
        f"{path.parent.name}/{name}": record
        for path in sorted(save_dir.glob("step-*/complete.json"))
        for name, record in json.loads(path.read_text())["files"].items()
        if name not in _OF_THE_RUN
    }


def check_alike(contender: Contender, at_once: dict[str, Any], beside: dict[str, Any]) -> None:
    for what in ("loss", "files"):
        if at_once[what] != beside[what]:
            raise SystemExit(f"{contender.name}: with and without --async_save the {what} differ")


# -- what a run's files say -----------------------------------------------------------------------

_LINE = re.compile(r"^(\S+ \S+),(\d{3}) INFO (.*)$")
_SAVE = re.compile(r"save of step (\d+): ([\d.]+) s$")
_WRITTEN = re.compile(r"saved \S*step-(\d+) beside the training in ([\d.]+) s")


def saves_and_steps(folder: Path, log: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds the loop stood still for each measured save, seconds of its writing, and seconds of
    steps while something was written and of the others."""
    stops, ends, writing = {}, {}, {}
    for line in log.read_text().splitlines():
        if not (match := _LINE.match(line)):
            continue
        moment = datetime.fromisoformat(match[1]).timestamp() + int(match[2]) / 1000
        if save := _SAVE.search(match[3]):
            stops[int(save[1])], ends[int(save[1])] = float(save[2]), moment
        elif written := _WRITTEN.search(match[3]):
            writing[int(written[1])] = float(written[2])
    measured = [step for step in sorted(stops) if step < arguments.steps]
    if len(measured) != arguments.saves:
        raise SystemExit(f"{log}: {len(measured)} saves, expected {arguments.saves}")
    clock = moments(folder)
    spans = [(ends[step], ends[step] + seconds) for step, seconds in writing.items()]
    while_writing: list[float] = []
    otherwise: list[float] = []
    for step in range(arguments.ignore + 1, arguments.steps + 1):
        begin, end = clock[step - 2], clock[step - 1]
        seconds = end - begin - stops.get(step - 1, 0.0)
        busy = any(start < end and begin < stop for start, stop in spans)
        (while_writing if busy else otherwise).append(round(seconds, 4))
    return {
        "stopped_seconds": [stops[step] for step in measured],
        "writing_seconds": [writing[step] for step in measured if step in writing],
        "step_seconds_while_writing": while_writing,
        "step_seconds_otherwise": otherwise,
    }


# -- what the numbers say -------------------------------------------------------------------------


def summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """By contender: medians of both ways over all runs, and what share of the time is left."""
    found = {}
    for name in dict.fromkeys(each["contender"] for each in runs):
        own = {way: [r for r in runs if (r["contender"], r["way"]) == (name, way)] for way in _WAYS}
        at_once = median(own["at once"], "stopped_seconds")
        beside = median(own["beside"], "stopped_seconds")
        slowed = median(own["beside"], "step_seconds_while_writing")
        plain = median(own["beside"], "step_seconds_otherwise")
        # The first copy gets its memory, the later ones have it.
        later = [each["stopped_seconds"][1:] for each in own["beside"]]
        found[name] = {
            "stopped_at_once_s": at_once,
            "stopped_beside_s": beside,
            "stopped_beside_later_s": _median([s for each in later for s in each]),
            "share": round(beside / at_once, 4),
            "writing_s": median(own["beside"], "writing_seconds"),
            "step_while_writing_s": slowed,
            "step_otherwise_s": plain,
            "slowdown": None if not slowed or not plain else round(slowed / plain, 3),
            "checkpoint_mb": own["beside"][0]["checkpoint_mb"],
        }
    return found


def median(runs: Sequence[dict[str, Any]], name: str) -> Any:
    return _median([seconds for each in runs for seconds in each[name]])


def _median(values: Sequence[float]) -> float | None:
    return round(statistics.median(values), 4) if values else None


def line_of(each: dict[str, Any]) -> str:
    stopped = ", ".join(f"{seconds:.2f}" for seconds in each["stopped_seconds"])
    return (
        f"{each['contender']:<12}{each['way']:<9} loop stopped {stopped} s  "
        f"{each['checkpoint_mb']:.0f} MB  {each['command']['seconds']:.1f} s in all"
    )


def table(result: dict[str, Any]) -> str:
    head = ("at once", "beside", "share", "written in", "step while", "step else", "slower")
    lines = [f"{'':<12}" + "".join(f"{name:>12}" for name in head)]
    for name, each in result["summary"].items():
        keys = (
            *("stopped_at_once_s", "stopped_beside_s", "share", "writing_s"),
            *("step_while_writing_s", "step_otherwise_s", "slowdown"),
        )
        values = "".join(f"{'n/a' if each[k] is None else f'{each[k]:.3f}':>12}" for k in keys)
        lines.append(f"{name:<12}{values}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
