"""Measure fine-tuning: what held-out answers gain by it, and packing against padding.

    python -m benchmarks.finetune --model checkpoint --data ../shared/data/self_instruct

Quality: loss and token accuracy on the held-out completions, before and after training on the
others, by plain transformers code, a conversation at a time in fp32. Packing: finetune.py once
with and once without --no_packing on the same conversations, in turns, with one process and with
two; the time of a step is that of its record in metrics.jsonl.

Invariant: nothing is written unless the held-out loss of the training run is that of plain
transformers, and packed and padded runs train on the same conversations with the same loss.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.completions import score
from benchmarks.measure import (
    ROOT,
    add_output_flags,
    command_line,
    measure,
    read_records,
    run_benchmark,
    surroundings,
)
from llama_lib.inference import model_folder

RESULT = ROOT / "benchmarks" / "results" / "finetune.json"
_SELF_INSTRUCT = ROOT.parent / "shared" / "data" / "self_instruct"
_PACKAGES = ("torch", "colossalai", "transformers", "peft", "numpy")
PACKED, PADDED = "packed", "padded"
# Prompts with completions and nothing between them: the base model needs no new tokens, so that
# before and after are losses of the same ids.
_TEMPLATE = "plain"
# Records of the first steps, with all that starts up, are left out.
_WARM_UP = 2
# Training works in bf16, plain transformers here in fp32.
_SCORE_TOLERANCE = 0.02
# Both in fp32; only the order of the sums differs.
_LOSS_TOLERANCE = 1e-4

_SUMMARY = re.compile(
    r"^data .*: ([\d,]+) conversations, ([\d,]+) tokens from .*, ([\d,]+) of them trained on", re.M
)
_PACKED = re.compile(r"^ *packed [\d,]+ conversations into ([\d,]+) rows", re.M)
_PADDED = re.compile(r"^ *([\d,]+) rows of \d+ with one conversation", re.M)


def main(argv: Sequence[str] | None = None) -> None:
    run_benchmark(_arguments(argv), "finetune-benchmark-", run, table)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.finetune")
    add = parser.add_argument
    add("--model", default="checkpoint", help="base model: a checkpoint or folder (checkpoint)")
    add("--data", type=Path, default=_SELF_INSTRUCT, help="folder with train.jsonl and test.jsonl")
    add("--max_length", type=int, default=512, help="tokens of a row (512)")
    add("--batch_size", type=int, default=8, help="rows of a step, over all processes (8)")
    add("--epochs", type=int, default=3, help="of the training for quality (3)")
    add("--lr", default="5e-4", help="of all training (5e-4)")
    add("--eval_interval", type=int, default=50, help="steps between held-out losses (50)")
    add("--processes", type=int, nargs="+", default=[1, 2], help="of packing against padding (1 2)")
    add("--conversations", type=int, default=480, help="of each timed run (480)")
    add("--compared", type=int, default=64, help="conversations whose loss is compared (64)")
    add("--repeats", type=int, default=3, help="timed runs of each kind (3)")
    add_output_flags(parser, RESULT)
    arguments = parser.parse_args(argv)
    for name in ("train.jsonl", "test.jsonl"):
        if not (arguments.data / name).is_file():
            raise SystemExit(f"--data {arguments.data}: there is no {name}")
    if wrong := [n for n in arguments.processes if n < 1 or arguments.batch_size % n]:
        raise SystemExit(f"--batch_size {arguments.batch_size} does not divide by {wrong[0]}")
    return arguments


def run(arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    """All measurements, one after the other."""
    base = model_folder(arguments.model)
    shape = json.loads((base / "config.json").read_text())
    names = ("num_hidden_layers", "hidden_size", "vocab_size", "max_position_embeddings")
    options = ("max_length", "batch_size", "epochs", "lr", "conversations", "compared")
    result: dict[str, Any] = {
        "command": command_line("benchmarks.finetune"),
        **surroundings(_PACKAGES),
        "config": {name: getattr(arguments, name) for name in options}
        | {"chat_template": _TEMPLATE, "plugin": "zero2", "base": {n: shape[n] for n in names}},
    }
    trainer = Trainer(arguments, base, work)
    result["quality"] = quality(arguments, trainer)
    result["equal_losses"] = [compare_losses(n, arguments, trainer) for n in arguments.processes]
    result["runs"] = []
    for processes in arguments.processes:
        for repeat in range(arguments.repeats):
            # The order turns round, so that neither way always has the warmer machine.
            for way in (PACKED, PADDED) if repeat % 2 == 0 else (PADDED, PACKED):
                timed = measure_way(way, processes, arguments, trainer)
                result["runs"].append({"repeat": repeat} | timed)
    result["packing"] = summary(result["runs"])
    return result


@dataclass
class Trainer:
    """Runs finetune.py on the base model; every run has a folder of its own."""

    arguments: argparse.Namespace
    base: Path
    work: Path
    runs: int = 0

    def train(self, data: str, flags: Sequence[str], processes: int = 1) -> Run:
        folder = self.work / f"run-{self.runs}"
        self.runs += 1
        command = [sys.executable]
        if processes > 1:
            command += ["-m", "torch.distributed.run", "--standalone"]
            command += ["--nproc_per_node", str(processes)]
        command += [str(ROOT / "finetune.py"), "--model_path", str(self.base), "-d", data]
        command += ["-p", "zero2", "--chat_template", _TEMPLATE, "--lr", self.arguments.lr]
        command += ["-l", str(self.arguments.max_length), "--cache_dir", str(self.work / "cache")]
        command += ["-o", str(folder), "-t", str(folder / "logs"), "--log_interval", "1", *flags]
        log = self.work / f"{folder.name}.log"
        measured = measure(command, log)
        return Run(folder, log.read_text(), measured.seconds)


@dataclass(frozen=True)
class Run:
    """A finished run of finetune.py; after --dry_run it has its log alone."""

    folder: Path
    log: str
    seconds: float

    def records(self, name: str) -> list[dict[str, Any]]:
        return read_records(self.folder / "logs" / name)

    @property
    def data(self) -> dict[str, int]:
        """Conversations, tokens and label tokens of one epoch, as the run said."""
        found = _SUMMARY.search(self.log)
        if found is None:
            raise SystemExit(f"no line about the data in the log:\n{self.log[:4000]}")
        return dict(
            zip(("conversations", "tokens", "labels"), map(_int, found.groups()), strict=True)
        )

    @property
    def rows(self) -> int:
        """Rows of one epoch, as the run said."""
        found = _PACKED.search(self.log) or _PADDED.search(self.log)
        if found is None:
            raise SystemExit(f"no line about the rows in the log:\n{self.log[:4000]}")
        return _int(found.group(1))


def _int(text: str) -> int:
    return int(text.replace(",", ""))


# -- quality ------------------------------------------------------------------------------------


def quality(arguments: argparse.Namespace, trainer: Trainer) -> dict[str, Any]:
    """Held-out loss before and after, and on the way."""
    held_out = arguments.data / "test.jsonl"
    flags = ["--eval_data", str(held_out), "--eval_steps", "1000000"]
    flags += ["--eval_interval", str(arguments.eval_interval), "-e", str(arguments.epochs)]
    flags += ["-b", str(arguments.batch_size)]
    done = trainer.train(str(arguments.data / "train.jsonl"), flags)
    tuned = model_folder(str(done.folder))
    before, after = (
        score(folder, tuned, held_out, arguments.max_length) for folder in (trainer.base, tuned)
    )
    curve = [
        {"step": each["step"], "loss": each["losses"]["all"], "accuracy": each["accuracies"]["all"]}
        for each in done.records("eval.jsonl")
    ]
    check_same_loss(curve[-1]["loss"], after["loss"], _SCORE_TOLERANCE, "held-out loss")
    return {
        "trained_on": done.data,
        "held_out": {name: after[name] for name in ("conversations", "labels", "cut", "left_out")},
        "before": {name: before[name] for name in ("loss", "accuracy")},
        "after": {name: after[name] for name in ("loss", "accuracy")},
        "during": curve,
        "seconds": done.seconds,
    }


# -- packing against padding --------------------------------------------------------------------


def compare_losses(
    processes: int, arguments: argparse.Namespace, trainer: Trainer
) -> dict[str, Any]:
    """The loss of one step over the same conversations, packed and padded, in fp32."""
    count, rows = _divisible(processes, arguments, trainer)
    data = _some(arguments, count)
    losses = {}
    for way, batch in ((PACKED, rows), (PADDED, count)):
        flags = ["-x", "fp32", "-b", str(batch // processes), "--max_steps", "1"]
        done = trainer.train(data, [*flags, *_flags(way)], processes)
        losses[way] = done.records("metrics.jsonl")[0]["loss"]
    check_same_loss(losses[PACKED], losses[PADDED], _LOSS_TOLERANCE, "loss packed and padded")
    return {"processes": processes, "conversations": count, "packed_rows": rows, "loss": losses}


def _divisible(processes: int, arguments: argparse.Namespace, trainer: Trainer) -> tuple[int, int]:
    """(conversations, their packed rows), both whole batches of all processes."""
    for count in range(arguments.compared - arguments.compared % processes, 0, -processes):
        plan = trainer.train(_some(arguments, count), [*_flags(PACKED), "--dry_run"])
        if plan.rows % processes == 0:
            return count, plan.rows
    raise SystemExit(f"--compared {arguments.compared}: no number of rows divides by {processes}")


def measure_way(
    way: str, processes: int, arguments: argparse.Namespace, trainer: Trainer
) -> dict[str, Any]:
    """One epoch: rows, and the times of its steps."""
    flags = [*_flags(way), "-b", str(arguments.batch_size // processes), "-e", "1"]
    done = trainer.train(_some(arguments, arguments.conversations), flags, processes)
    records = done.records("metrics.jsonl")
    shutil.rmtree(done.folder)
    timed = timing(records, done.data, done.rows, arguments.batch_size, arguments.max_length)
    return {"way": way, "processes": processes} | timed


def _some(arguments: argparse.Namespace, count: int) -> str:
    """The same conversations for every run: they are drawn by the seed."""
    return f"{arguments.data / 'train.jsonl'}[{count}]"


def _flags(way: str) -> list[str]:
    return ["--eval_ratio", "0", *(["--no_packing"] if way == PADDED else [])]


def timing(
    records: Sequence[dict[str, Any]],
    data: dict[str, int],
    rows: int,
    batch_size: int,
    max_length: int,
) -> dict[str, Any]:
    """Conversations per second of steps of `batch_size` rows, from a run's records."""
    seconds = [record["step_time_s"] for record in records[_WARM_UP:]]
    if not seconds:
        raise SystemExit(f"{len(records)} step(s) in metrics.jsonl: raise --conversations")
    per_step = data["conversations"] / rows * batch_size
    return {
        **data,
        "rows": rows,
        "fill_percent": round(100 * data["tokens"] / (rows * max_length), 2),
        "steps": len(seconds),
        "step_ms": round(statistics.fmean(seconds) * 1000, 2),
        "conversations_per_second": round(per_step / statistics.fmean(seconds), 2),
        "memory_mb": max(record["memory_mb"] for record in records),
        "raw_step_ms": [round(each * 1000, 2) for each in seconds],
    }


def check_same_loss(one: float, other: float, tolerance: float, what: str) -> None:
    if not abs(one - other) <= tolerance * abs(other):
        raise SystemExit(f"{what}: {one} and {other} differ by more than {tolerance:.2%}")


def summary(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per number of processes: medians of both ways and how much faster packing is."""
    lines = []
    for processes in dict.fromkeys(run["processes"] for run in runs):
        line: dict[str, Any] = {"processes": processes}
        found = [run for run in runs if run["processes"] == processes]
        same = {tuple(run[name] for name in ("conversations", "tokens", "labels")) for run in found}
        if len(same) > 1:
            raise SystemExit(f"the runs did not train on the same conversations: {sorted(same)}")
        for way in (PACKED, PADDED):
            chosen = [run for run in found if run["way"] == way]
            line[way] = {
                "runs": len(chosen),
                **{name: chosen[0][name] for name in ("rows", "fill_percent")},
                **{
                    name: round(statistics.median(run[name] for run in chosen), 2)
                    for name in ("step_ms", "conversations_per_second", "memory_mb")
                },
            }
        rate = "conversations_per_second"
        line["fewer_rows"] = round(line[PADDED]["rows"] / line[PACKED]["rows"], 2)
        line["times_faster"] = round(line[PACKED][rate] / line[PADDED][rate], 2)
        lines.append(line)
    return lines


def table(result: dict[str, Any]) -> str:
    quality = result["quality"]
    lines = [f"{'held out':<10}{'loss':>9}{'accuracy':>10}"]
    for name in ("before", "after"):
        lines.append(
            f"{name:<10}{quality[name]['loss']:>9.4f}{quality[name]['accuracy'] * 100:>9.2f}%"
        )
    lines += ["", f"{'processes':<11}{'loss packed':>13}{'loss padded':>13}"]
    for line in result["equal_losses"]:
        losses = line["loss"]
        lines.append(f"{line['processes']:<11}{losses[PACKED]:>13.6f}{losses[PADDED]:>13.6f}")
    head = f"{'processes':<11}{'way':<8}{'rows':>7}{'full %':>8}{'step ms':>10}{'conv./s':>10}"
    lines += ["", f"{head}{'faster':>8}"]
    for line in result["packing"]:
        for way in (PACKED, PADDED):
            each = line[way]
            faster = f"{line['times_faster']:>7.2f}x" if way == PACKED else ""
            lines.append(
                f"{line['processes']:<11}{way:<8}{each['rows']:>7,}{each['fill_percent']:>8.1f}"
                f"{each['step_ms']:>10.1f}{each['conversations_per_second']:>10.2f}{faster}"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
