"""`python -m llama_lib compare A.json B.json ...`: results of benchmark.py side by side.

Invariant: a ratio stands only between two numbers that count the same thing; where none could mean
anything the files are refused, where one row could not, the row has no ratio and a line says why.
"""

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llama_lib import result_file
from llama_lib.errors import UserError
from llama_lib.result_file import RANDOM_DATA, Result

# Formulas that count what the backward pass computes again; the others count the model alone.
RECOMPUTING_FORMULAS = ("hardware", "colossalai_8n", "megatron_2021")

# Options that say where files go: they differ between any two runs and change no number.
PLACES = ("output", "save_dir", "tensorboard_dir")

# Rates are written unrounded; two programs' arithmetic may differ in the last digits.
SAME = 1e-6


@dataclass(frozen=True)
class Row:
    """A line of the table: its name, the number of each result, and how it is shown.

    `has_ratio` is False where dividing two of the numbers would mean nothing.
    """

    name: str
    values: Sequence[float | None]
    form: str
    has_ratio: bool = True

    def cells(self) -> list[str]:
        """The first number, then each other one followed by its ratio to the first."""
        first, *others = self.values
        cells = [_shown(first, self.form)]
        for other in others:
            ratio = other / first if self.has_ratio and first and other is not None else None
            cells += [_shown(other, self.form), "" if ratio is None else f"{ratio:.3f}"]
        return cells


def incomparable(names: Sequence[str], results: Sequence[Result]) -> list[str]:
    """Why these results cannot stand side by side; each is held against the first."""
    problems = []
    for name, result in zip(names[1:], results[1:], strict=True):
        first = results[0]
        problems += [
            f"{names[0]} and {name} cannot be compared: {what} is {ours} in the one, {theirs} in "
            f"the other; {mend}."
            for what, ours, theirs, mend in _conflicts(first, result)
        ]
    return problems


def _conflicts(first: Result, other: Result) -> list[tuple[str, Any, Any, str]]:
    """(what, value, value, how to mend it) for all that makes two results incomparable."""
    again = "measure again with the same"
    facts: list[tuple[str, Callable[[Result], Any], str]] = [
        ("the model's size", lambda each: f"{each.model.parameters:,} parameters", f"{again} -c"),
        ("the row length", lambda each: each.sequence, f"{again} -l"),
        ("the precision", lambda each: each.precision, f"{again} -x"),
        ("the kind of data", _kind_of_data, f"{again} -d"),
        (
            "the set of FLOP formulas",
            lambda each: ", ".join(sorted(each.tflops_per_gpu)),
            f"{again} version of this program",
        ),
    ]
    conflicts = [
        (what, fact(first), fact(other), mend)
        for what, fact, mend in facts
        if fact(first) != fact(other)
    ]
    return conflicts or _formula_conflicts(first, other)


def _kind_of_data(result: Result) -> str:
    return "random tokens" if result.data == RANDOM_DATA else "text"


def _formula_conflicts(first: Result, other: Result) -> list[tuple[str, Any, Any, str]]:
    """Formulas of one name that count differently, for results of one model and row length."""
    ours, theirs = flops_per_token(first), flops_per_token(other)
    return [
        (
            f"what formula {name} counts",
            f"{ours[name]:,.0f} FLOPs per token",
            f"{theirs[name]:,.0f}",
            "measure again with the same version of this program",
        )
        for name in ours
        if _counts_the_same(name, [first, other])
        and not math.isclose(ours[name], theirs[name], rel_tol=SAME)
    ]


def flops_per_token(result: Result) -> dict[str, float]:
    """What each formula of a result must have counted to get from its tokens/s to its TFLOPS."""
    rate = result.rates.tokens_per_second_per_gpu
    return {name: tflops * 1e12 / rate for name, tflops in result.tflops_per_gpu.items()}


def _counts_the_same(formula: str, results: Sequence[Result]) -> bool:
    return formula not in RECOMPUTING_FORMULAS or len({each.recompute for each in results}) == 1


def rows(results: Sequence[Result]) -> list[Row]:
    """The lines of the table, the rate that compares anything with anything first."""
    one_batch = len({each.tokens_per_step for each in results}) == 1

    def row(name: str, number: Callable[[Result], float | None], form: str, ratio: bool) -> Row:
        return Row(name, [number(each) for each in results], form, ratio)

    lines = [
        row("tokens/s per GPU", lambda r: r.rates.tokens_per_second_per_gpu, ",.1f", True),
        row("samples/s, all GPUs", lambda r: r.rates.samples_per_second, ",.2f", True),
        row("step time, median (s)", lambda r: r.rates.step_time_median_s, ".4f", one_batch),
        row("step time, p95 (s)", lambda r: r.rates.step_time_p95_s, ".4f", one_batch),
        row("step time, (max - min) / median", lambda r: r.rates.step_time_spread, ".1%", False),
    ]
    for formula in results[0].tflops_per_gpu:
        values = [each.tflops_per_gpu[formula] for each in results]
        same = _counts_the_same(formula, results)
        lines.append(Row(f"TFLOPS/GPU, formula {formula}", values, ".4g", same))
    lines.append(row("MFU (formula model)", lambda r: r.mfu, ".1%", False))
    for kind in asdict(results[0].memory_mb):
        memory = [getattr(each.memory_mb, kind) for each in results]
        lines.append(Row(f"memory, {kind} (MB)", memory, ",.1f"))
    for phase in asdict(results[0].time_shares):
        shares = [getattr(each.time_shares, phase) for each in results]
        lines.append(Row(f"time, {phase.replace('_', '-')}", shares, ".1%", has_ratio=False))
    for which in ("first", "last"):
        losses = [getattr(each.loss, which) for each in results]
        lines.append(Row(f"loss, {which} step", losses, ".4f", has_ratio=False))
    return lines


def notes(results: Sequence[Result]) -> list[str]:
    """Why rows of the table have no ratio."""
    lines = []
    if len({each.recompute for each in results}) > 1:
        lines.append(
            f"recompute differs: {', '.join(RECOMPUTING_FORMULAS)} count the recomputed work, so "
            "they have no ratio; tokens/s and formula model compare"
        )
    if len({each.tokens_per_step for each in results}) > 1:
        lines.append("tokens per step differ: step times have no ratio")
    if any(each.time_shares.communication is None for each in results):
        lines.append("communication n/a: not measured by itself, part of the others")
    return lines


def differences(results: Sequence[Result]) -> list[tuple[str, list[str]]]:
    """(name, value of each result) of everything that was not the same, options as flags."""
    described = [_description(each) for each in results]
    names = dict.fromkeys(name for each in described for name in each)
    values = {
        name: [_text(each[name]) if name in each else "not recorded" for each in described]
        for name in names
    }
    return [(name, each) for name, each in values.items() if len(set(each)) > 1]


def _description(result: Result) -> dict[str, Any]:
    """What was run and on what, by the names the differences have."""
    described: dict[str, Any] = {
        "model": result.model.name,
        "layout": result.layout,
        "attention": result.attention,
        "kernels": result.kernels,
        "loss a piece at a time": "yes" if result.chunked_loss else "no",
        "data": result.data,
        "tokens per step": result.tokens_per_step,
        "measured steps": len(result.steps.seconds),
        "peak TFLOPS": result.peak.tflops,
        "peak from": result.peak.source,
    }
    described |= {f"hardware {name}": each for name, each in asdict(result.hardware).items()}
    described |= {f"version of {name}": each for name, each in result.versions.items()}
    for section in result.options.values():
        described |= {f"--{name}": each for name, each in section.items() if name not in PLACES}
    return described


def _text(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    return "none" if value is None else str(value)


def _shown(value: float | None, form: str) -> str:
    return "n/a" if value is None else f"{value:{form}}"


def comparison(names: Sequence[str], results: Sequence[Result]) -> list[str]:
    """The lines that set comparable results side by side."""
    heading = [names[0]]
    for name in names[1:]:
        heading += [name, "ratio"]
    table = [("", heading)] + [(row.name, row.cells()) for row in rows(results)]
    lines = _aligned(table, str.rjust)
    lines += ["", *notes(results)] if notes(results) else []
    found = differences(results)
    if not found:
        return [*lines, "", "the runs differ in nothing that is recorded"]
    return [*lines, "", "what differs", *_aligned([("", list(names)), *found], str.ljust)]


def _aligned(
    table: Sequence[tuple[str, Sequence[str]]], justify: Callable[[str, int], str]
) -> list[str]:
    width = max(len(name) for name, _ in table)
    widths = [max(map(len, column)) for column in zip(*(row for _, row in table), strict=True)]
    return [
        "  ".join(
            [name.ljust(width), *(justify(c, w) for c, w in zip(row, widths, strict=True))]
        ).rstrip()
        for name, row in table
    ]


def short_names(paths: Sequence[str]) -> list[str]:
    """File names without folder and ending where they tell the files apart, else the paths."""
    stems = [Path(path).stem for path in paths]
    return stems if len(set(stems)) == len(stems) else list(paths)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m llama_lib compare",
        description="Set results of benchmark.py --output side by side. Ratios refer to the first.",
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="a result, two or more of them")
    paths: list[str] = parser.parse_args(argv).files
    if len(paths) < 2:
        raise UserError(f"compare needs two results or more; got {paths[0]} alone.")
    results, problems = [], []
    for path in paths:
        try:
            results.append(result_file.read(path))
        except UserError as error:
            problems += error.problems
    problems = problems or incomparable(paths, results)
    if problems:
        raise UserError(problems)
    print("\n".join(comparison(short_names(paths), results)))
    return 0
