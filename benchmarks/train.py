"""Measure pretrain.py beside transformers' Trainer and the barest PyTorch loop, in turns.

    python -m benchmarks.train
    python -m benchmarks.train --only zero2,barest,trainer --repeats 1 --steps 6

Each contender trains the same model from the same weights on the same rows in the same order with
the same recipe (AdamW with fp32 state, clipping, schedule), and reads the loss after every step:
ours as a user starts it, with `--log_interval 1`; the rivals from benchmarks/rivals. All have the
same number of threads. Runs take turns: A B C, A B C; the order turns round in every second round.

Invariant: nothing is written unless the losses of all contenders agree at every step; a step's time
is all that passes between the ends of two steps, in every contender.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import shlex
import shutil
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

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
from benchmarks.rivals.job import job_of
from llama_lib.config import Options, parse_options
from llama_lib.data.loader import BatchLoader
from llama_lib.errors import UserError
from llama_lib.flops import num_parameters
from llama_lib.models import model_config
from llama_lib.run_data import open_data

RESULT = ROOT / "benchmarks" / "results" / "train.json"
PACKAGES = ("torch", "colossalai", "transformers", "accelerate", "numpy")
_SEED = 42
_LR = 3e-4
_PLUGINS = ("zero2", "zero2_cpu", "gemini", "gemini_auto", "hybrid_parallel")
# The name of a contender: a plugin of ours or a rival, and `-2` where two processes share a step.
_RIVALS = {
    "trainer": ["-m", "benchmarks.rivals.hf_trainer"],
    "trainer_bf16_weights": ["-m", "benchmarks.rivals.hf_trainer", "--weights", "bf16"],
    "barest": ["-m", "benchmarks.rivals.barest"],
}
# Trained with other state than the recipe's, so its losses are not compared beyond the first.
_OTHER_RECIPES = ("trainer_bf16_weights",)
_DEFAULT = (*_PLUGINS, "trainer", "barest", "zero2-2", "trainer-2")
# bf16 has 8 bits: the same step, summed in another order, differs in the second or third decimal.
LOSS_TOLERANCE = {"bf16": 2e-2, "fp32": 1e-4}


@dataclass(frozen=True)
class Contender:
    """Who trains, and in how many processes that share each step's rows."""

    way: str
    processes: int

    @property
    def name(self) -> str:
        return self.way if self.processes == 1 else f"{self.way}-{self.processes}"

    @property
    def is_ours(self) -> bool:
        return self.way in _PLUGINS


def contender_of(name: str) -> Contender:
    way, _, processes = name.partition("-")
    if way not in (*_PLUGINS, *_RIVALS) or not (processes or "1").isdigit():
        raise SystemExit(
            f"--only {name}: expected {', '.join((*_PLUGINS, *_RIVALS))}, and -2 for two processes"
        )
    if way == "barest" and processes:
        raise SystemExit(f"--only {name}: the barest loop has one process")
    return Contender(way, int(processes or 1))


def main(argv: Sequence[str] | None = None) -> None:
    run_benchmark(arguments_of(argv), "train-benchmark-", run, table)


def arguments_of(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train")
    add = parser.add_argument
    add("--only", default=",".join(_DEFAULT), help="contenders, comma-separated (all)")
    add("--model", help="-c of pretrain.py (a Llama of the next three)")
    add("--hidden_size", type=int, default=512, help="of the model (512)")
    add("--layers", type=int, default=8, help="of the model (8)")
    add("--vocab_size", type=int, default=32000, help="of the model (32000)")
    add("--max_length", type=int, default=512, help="tokens of a row (512)")
    add("--batch_size", type=int, default=4, help="rows of a step, over all processes (4)")
    add("--precision", choices=sorted(LOSS_TOLERANCE), default="bf16", help="(bf16)")
    add("--steps", type=int, default=10, help="of each run (10)")
    add("--ignore", type=int, default=3, help="first steps that are not measured (3)")
    add("--repeats", type=int, default=3, help="runs of each contender (3)")
    add("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of a run (all cores)")
    add("--ours", default="", help="more flags for pretrain.py, in quotes")
    add("--resume", action="store_true", help="keep the runs that --result holds already")
    add_output_flags(parser, RESULT)
    return checked(parser.parse_args(argv))


def checked(arguments: argparse.Namespace) -> argparse.Namespace:
    """The arguments with `contenders`; SystemExit if they make no sense."""
    arguments.contenders = [contender_of(name) for name in arguments.only.split(",")]
    if arguments.ignore >= arguments.steps:
        raise SystemExit(f"--ignore {arguments.ignore} leaves nothing of --steps")
    for contender in arguments.contenders:
        if arguments.batch_size % contender.processes:
            raise SystemExit(f"{contender.name}: --batch_size {arguments.batch_size} is not even")
        refuse_unequal_threads(contender, arguments.threads)
    return arguments


def refuse_unequal_threads(contender: Contender, threads: int) -> None:
    """SystemExit if one thread a process would be one for the rivals alone.

    pretrain.py takes OMP_NUM_THREADS=1 under several processes for torchrun's own default, and
    divides the cores among them instead.
    """
    cores = len(os.sched_getaffinity(0))
    if threads < 1:
        raise SystemExit(f"--threads {threads}: expected a number from 1")
    if contender.processes > 1 and threads < 2 * contender.processes and threads != cores:
        raise SystemExit(
            f"{contender.name}: --threads {threads} is less than two for each process, where ours "
            f"would take its share of the {cores} cores instead; give --threads {cores}, or fewer "
            "cores to the whole (taskset)"
        )


# -- the runs -----------------------------------------------------------------------------------


def run(arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    """All runs, one after the other; the result file is written after each."""
    bench = Bench(arguments, work, prepared_sample(work))
    result: dict[str, Any] = {
        "command": command_line("benchmarks.train"),
        **surroundings(PACKAGES),
        "sources": sources_digest(),
        "config": bench.describe(),
        "runs": [],
    }
    if arguments.resume:
        result["runs"] = kept_runs(arguments.result, result)
    done = {(each["repeat"], each["contender"]) for each in result["runs"]}
    for repeat in range(arguments.repeats):
        for contender in in_turn(arguments.contenders, repeat):
            if (repeat, contender.name) not in done:
                result["runs"].append({"repeat": repeat} | bench.train(contender))
                check_losses(result["runs"], arguments.precision)
                result["summary"] = summary(result["runs"])
                write_result(arguments.result, result)
                print(line_of(result["runs"][-1]), flush=True)
    result["summary"] = summary(result["runs"])
    return result


def in_turn(contenders: Sequence[Contender], repeat: int) -> Sequence[Contender]:
    """The order of a round; it turns round, so that nobody always follows the same one."""
    return contenders if repeat % 2 == 0 else contenders[::-1]


def sources_digest() -> str:
    """sha256 of the code that was measured: of every module of ours and of the rivals."""
    digest = hashlib.sha256()
    for folder in (ROOT / "llama_lib", ROOT / "benchmarks" / "rivals"):
        for path in sorted(folder.rglob("*.py")):
            digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def kept_runs(path: Path, result: dict[str, Any]) -> list[dict[str, Any]]:
    """The runs of an earlier result of the same measurement; it has to be the same in all else."""
    if not path.is_file():
        return []
    earlier = json.loads(path.read_text())
    for name in ("versions", "sources", "config"):
        if earlier.get(name) != result[name]:
            raise SystemExit(f"--resume: {name} of {path} differ; measure anew without --resume")
    return earlier["runs"]


def prepared_sample(work: Path) -> Path:
    """Tokens of the built-in sample. They come from a smaller vocabulary than the model's, which
    changes nothing of what a step computes."""
    tokens = work / "tokens"
    command = [sys.executable, "-m", "llama_lib", "prepare", "-d", "sample", "--eval_ratio", "0"]
    command += ["--output", str(tokens), "--cache_dir", str(work / "cache")]
    measure(command, work / "prepare.log")
    return tokens


class Bench:
    """The model, the rows and the options that all contenders share.

    Args:
        work: an empty or new folder for it.
        tokens: a prepared dataset without held-out text.
    """

    def __init__(self, arguments: argparse.Namespace, work: Path, tokens: Path) -> None:
        self.arguments, self.work, self.tokens = arguments, work, tokens
        self.count = 0
        work.mkdir(exist_ok=True)
        self.model = arguments.model
        if self.model is None:
            path = work / "config.json"
            path.write_text(json.dumps(self._shape(), indent=2) + "\n")
            self.model = str(path)
        self.rows = work / "rows.npy"
        self._write_rows()

    def _shape(self) -> dict[str, Any]:
        a = self.arguments
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": a.vocab_size,
            "hidden_size": a.hidden_size,
            # LLaMA's 8/3, rounded up to a multiple of 32.
            "intermediate_size": -(-a.hidden_size * 8 // 3 // 32) * 32,
            "num_hidden_layers": a.layers,
            "num_attention_heads": max(1, a.hidden_size // 64),
            "num_key_value_heads": max(1, a.hidden_size // 64),
            "max_position_embeddings": max(2048, a.max_length),
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
        }

    def _write_rows(self) -> None:
        """The rows that pretrain.py reads from the tokens, in its order, for the rivals."""
        a = self.arguments
        options = self.options(Contender("zero2", 1))
        data, _ = open_data(options, model_config(self.model), None)
        loader = BatchLoader(data.open_rows({}), a.batch_size)
        ids = [loader.batch(step).micro_batches[0].ids for step in range(a.steps)]
        loader.close()
        np.save(self.rows, np.concatenate(ids).astype(np.int32))

    def flags(self, contender: Contender) -> list[str]:
        """Options of the training scripts that say what is trained and how."""
        a = self.arguments
        flags = ["-c", self.model, "-d", str(self.tokens), "--eval_ratio", "0"]
        flags += ["-p", contender.way if contender.is_ours else "zero2", "-x", a.precision]
        flags += ["-l", str(a.max_length), "-b", str(a.batch_size // contender.processes)]
        flags += ["--warmup_steps", "2", "--lr", str(_LR), "--seed", str(_SEED)]
        return [*flags, "--cache_dir", str(self.work / "cache"), *shlex.split(a.ours)]

    def options(self, contender: Contender) -> Options:
        try:
            return parse_options("pretrain", self.flags(contender))
        except UserError as error:
            raise SystemExit(str(error)) from None

    def describe(self) -> dict[str, Any]:
        """What decides the numbers, as it stands in the result file."""
        a = self.arguments
        names = ("max_length", "batch_size", "precision", "steps", "ignore", "threads")
        return {
            "model": a.model or self._shape(),
            "parameters": num_parameters(model_config(self.model)),
            **{name: getattr(a, name) for name in names},
            "ours": a.ours,
            "seed": _SEED,
            "lr": _LR,
        }

    def train(self, contender: Contender) -> dict[str, Any]:
        """One run: seconds and loss of every step, memory of all its processes together."""
        folder = self.work / f"run-{self.count}"
        folder.mkdir()
        self.count += 1
        command = [sys.executable]
        if contender.processes > 1:
            command += ["-m", "torch.distributed.run", "--standalone"]
            command += ["--nproc_per_node", str(contender.processes)]
        if contender.is_ours:
            command += self.our_command(contender, folder)
        else:
            options = self.options(contender)
            records = folder / "records.json"
            job = job_of(options, self.rows, records, self.arguments.steps, contender.processes)
            job.write(folder / "job.json")
            command += [*_RIVALS[contender.way], str(folder / "job.json")]
        threads = str(max(1, self.arguments.threads // contender.processes))
        measured = measure(command, folder / "log", {"OMP_NUM_THREADS": threads})
        found = self.our_steps(folder) if contender.is_ours else json.loads(records.read_text())
        shutil.rmtree(folder)
        return {
            "contender": contender.name,
            "step_seconds": [round(each, 5) for each in found["seconds"]],
            "measured_seconds": [
                round(each, 5) for each in found["seconds"][self.arguments.ignore :]
            ],
            "reported_seconds": [round(each, 5) for each in found.get("reported", [])],
            "loss": [round(each, 6) for each in found["loss"]],
            "gpu_memory_mb": found.get("memory", {}),
            "command": as_record(measured),
        }

    def our_command(self, contender: Contender, folder: Path) -> list[str]:
        command = [str(ROOT / "pretrain.py"), *self.flags(contender), "--log_interval", "1"]
        command += ["--max_steps", str(self.arguments.steps), "--save_interval", "1000000"]
        return [*command, "-o", str(folder / "checkpoint"), "-t", str(folder)]

    def our_steps(self, folder: Path) -> dict[str, Any]:
        """Seconds and loss of every step of a run of pretrain.py.

        The seconds lie between the records of two steps, by the clock, so that nothing can be left
        out; what metrics.jsonl says of the first step is all there is of it.
        """
        records, clock = read_records(folder / "metrics.jsonl"), moments(folder)
        if len(records) != self.arguments.steps or len(clock) != len(records):
            raise SystemExit(f"{len(records)} records and {len(clock)} events of the steps")
        between = [end - start for start, end in itertools.pairwise(clock)]
        return {
            "seconds": [records[0]["step_time_s"], *between],
            "loss": [each["loss"] for each in records],
            "reported": [each["step_time_s"] for each in records],
        }


def moments(folder: Path) -> list[float]:
    """The clock at each step's record, in seconds, as TensorBoard's event file has it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return [each.wall_time for each in events.Scalars("train/loss")]


# -- what the numbers say -----------------------------------------------------------------------


def check_losses(runs: Sequence[dict[str, Any]], precision: str) -> None:
    """All contenders have to have trained alike: the first loss and every later one."""
    tolerance = LOSS_TOLERANCE[precision]
    one = runs[0]
    for other in runs[1:]:
        pairs = list(zip(one["loss"], other["loss"], strict=True))
        if {one["contender"], other["contender"]} & set(_OTHER_RECIPES):
            pairs = pairs[:1]
        for step, (a, b) in enumerate(pairs, 1):
            if not abs(a - b) <= tolerance:
                raise SystemExit(
                    f"{one['contender']} and {other['contender']} train differently: loss {a} and "
                    f"{b} at step {step}"
                )


def summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Medians of each contender over all its runs, and how fast ours are against the rivals."""
    contenders: dict[str, Any] = {}
    for name in dict.fromkeys(each["contender"] for each in runs):
        found = [each for each in runs if each["contender"] == name]
        steps = [seconds for each in found for seconds in each["measured_seconds"]]
        contenders[name] = {
            "runs": len(found),
            "steps": len(steps),
            "step_ms": round(statistics.median(steps) * 1000, 1),
            "fastest_ms": round(min(steps) * 1000, 1),
            "slowest_ms": round(max(steps) * 1000, 1),
            "first_loss": found[0]["loss"][0],
            "last_loss": found[0]["loss"][-1],
            **{
                key: round(statistics.median(each["command"][key] for each in found), 1)
                for key in ("peak_pss_mb", "peak_anonymous_mb", "seconds")
            },
        }
    pairs = [
        (ours, rival)
        for ours in contenders
        for rival in contenders
        if contender_of(ours).is_ours and not contender_of(rival).is_ours
        if contender_of(ours).processes == contender_of(rival).processes
    ]
    return {"contenders": contenders, "ratios": [ratio(runs, *pair) for pair in pairs]}


def ratio(runs: Sequence[dict[str, Any]], ours: str, rival: str) -> dict[str, Any]:
    """How many times faster than `rival` a step of `ours` is: medians over all runs, and the
    lowest and highest of the rounds, each with the medians of its two runs."""
    medians: dict[str, dict[int, float]] = {ours: {}, rival: {}}
    steps: dict[str, list[float]] = {ours: [], rival: []}
    memory: dict[str, list[float]] = {ours: [], rival: []}
    for each in runs:
        if (name := each["contender"]) in medians:
            medians[name][each["repeat"]] = statistics.median(each["measured_seconds"])
            steps[name] += each["measured_seconds"]
            memory[name].append(each["command"]["peak_pss_mb"])
    rounds = [
        medians[rival][repeat] / seconds
        for repeat, seconds in medians[ours].items()
        if repeat in medians[rival]
    ]
    return {
        "ours": ours,
        "rival": rival,
        "times_faster": round(statistics.median(steps[rival]) / statistics.median(steps[ours]), 3),
        "rounds": [round(each, 3) for each in rounds],
        "lowest": round(min(rounds), 3) if rounds else None,
        "highest": round(max(rounds), 3) if rounds else None,
        "memory": round(statistics.median(memory[ours]) / statistics.median(memory[rival]), 3),
    }


def line_of(run: dict[str, Any]) -> str:
    seconds = statistics.median(run["measured_seconds"])
    return (
        f"round {run['repeat']}  {run['contender']:<22} step {seconds * 1000:8.1f} ms  loss "
        f"{run['loss'][0]:.4f} -> {run['loss'][-1]:.4f}  {run['command']['peak_pss_mb']:7.0f} MB"
        f"  {run['command']['seconds']:5.1f} s in all"
    )


def table(result: dict[str, Any]) -> str:
    lines = [f"{'contender':<22}{'step ms':>9}{'fastest':>9}{'slowest':>9}{'memory MB':>11}"]
    for name, each in result["summary"]["contenders"].items():
        times = "".join(f"{each[key]:>9.1f}" for key in ("step_ms", "fastest_ms", "slowest_ms"))
        lines.append(f"{name:<22}{times}{each['peak_pss_mb']:>11.0f}")
    lines += ["", f"{'ours':<22}{'rival':<22}{'faster':>9}{'rounds':>16}{'memory':>9}"]
    for each in result["summary"]["ratios"]:
        rounds = f"{each['lowest']:.2f} to {each['highest']:.2f}"
        lines.append(
            f"{each['ours']:<22}{each['rival']:<22}{each['times_faster']:>8.2f}x{rounds:>16}"
            f"{each['memory']:>8.2f}x"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
