"""Measure how the time of a step grows with the model, the length of the rows and the batch.

    python -m benchmarks.growth

zero2 and the barest loop of benchmarks/train.py, in turns, along three lines through one point: the
model grows in width and depth together, or the row, or the batch, and the rest stays. The exponent
of a line is the slope of log time over log size, by least squares.

Invariant: a point is the median step of its run; a fit takes all points of its line.
"""

from __future__ import annotations

import argparse
import math
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

RESULT = ROOT / "benchmarks" / "results" / "growth.json"
_CONTENDERS = "zero2,barest"
# Width and depth; the vocabulary stays, so that small models are mostly embedding and head.
_MODELS = ((256, 4), (384, 6), (512, 8), (640, 10))
_LENGTHS = (128, 256, 512, 1024)
_BATCHES = (1, 2, 4, 8)
_SIZES = {"model": "parameters", "length": "max_length", "batch": "batch_size"}


def main(argv: Sequence[str] | None = None) -> None:
    run_benchmark(_arguments(argv), "growth-benchmark-", run, table)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.growth")
    add = parser.add_argument
    add("--only", default=_CONTENDERS, help=f"contenders ({_CONTENDERS})")
    add("--models", nargs="+", default=_MODELS, type=_model, help="HIDDENxLAYERS (256x4 to 640x10)")
    add("--lengths", nargs="+", default=_LENGTHS, type=int, help="tokens of a row (128 to 1024)")
    add("--batches", nargs="+", default=_BATCHES, type=int, help="rows of a step (1 to 8)")
    add("--centre", nargs=3, default=(512, 512, 4), type=int, help="width, length, batch elsewhere")
    add("--steps", type=int, default=8, help="of each run (8)")
    add("--ignore", type=int, default=3, help="first steps that are not measured (3)")
    add_output_flags(parser, RESULT)
    arguments = parser.parse_args(argv)
    if arguments.centre[0] not in [hidden for hidden, _ in arguments.models]:
        raise SystemExit(f"--centre: no model of width {arguments.centre[0]} among --models")
    return arguments


def _model(text: str) -> tuple[int, int]:
    hidden, _, layers = text.partition("x")
    return int(hidden), int(layers)


def points_of(arguments: argparse.Namespace) -> list[tuple[tuple[int, int], int, int, list[str]]]:
    """(model, length, batch, lines it lies on): the point where the lines meet is run once."""
    width, length, batch = arguments.centre
    middle = next(model for model in arguments.models if model[0] == width)
    lines: dict[tuple[tuple[int, int], int, int], list[str]] = {}
    for model in arguments.models:
        lines.setdefault((model, length, batch), []).append("model")
    for other in arguments.lengths:
        lines.setdefault((middle, other, batch), []).append("length")
    for other in arguments.batches:
        lines.setdefault((middle, length, other), []).append("batch")
    return [(*point, names) for point, names in lines.items()]


def run(arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    """All points; the result file is written after each."""
    names = ("models", "lengths", "batches", "centre", "steps", "ignore")
    result: dict[str, Any] = {
        "command": command_line("benchmarks.growth"),
        **surroundings(train.PACKAGES),
        "config": {name: getattr(arguments, name) for name in names},
        "points": [],
        "fits": [],
    }
    tokens = train.prepared_sample(work)
    for number, (model, length, batch, lines) in enumerate(points_of(arguments)):
        point = train.arguments_of(
            ["--only", arguments.only, "--hidden_size", str(model[0]), "--layers", str(model[1])]
            + ["--max_length", str(length), "--batch_size", str(batch)]
            + ["--steps", str(arguments.steps), "--ignore", str(arguments.ignore)]
        )
        bench = train.Bench(point, work / f"point-{number}", tokens)
        runs = []
        for contender in train.in_turn(point.contenders, number):
            runs.append(bench.train(contender))
            train.check_losses(runs, point.precision)
            print(train.line_of({"repeat": number} | runs[-1]), flush=True)
        sizes = {"parameters": bench.describe()["parameters"], "hidden_size": model[0]}
        sizes |= {"layers": model[1], "max_length": length, "batch_size": batch}
        result["points"].append({"lines": lines, **sizes, "runs": runs})
        write_result(arguments.result, result)
    result["fits"] = fits(result["points"])
    return result


def step_seconds(point: dict[str, Any], contender: str) -> float:
    found = next(each for each in point["runs"] if each["contender"] == contender)
    return statistics.median(found["measured_seconds"])


def line_of(
    points: Sequence[dict[str, Any]], line: str, contender: str
) -> tuple[list[float], list[float]]:
    """Sizes, ascending, and median seconds of a step along a line."""
    along = sorted(
        (float(point[_SIZES[line]]), step_seconds(point, contender))
        for point in points
        if line in point["lines"]
    )
    return [size for size, _ in along], [seconds for _, seconds in along]


def fits(points: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The exponent of every line and contender."""
    contenders = dict.fromkeys(run["contender"] for point in points for run in point["runs"])
    found = []
    for line, size in _SIZES.items():
        for contender in contenders:
            sizes, seconds = line_of(points, line, contender)
            if len(set(sizes)) > 1:
                found.append({"line": line, "size": size, "contender": contender})
                found[-1] |= power_law(sizes, seconds)
    return found


def power_law(sizes: Sequence[float], seconds: Sequence[float]) -> dict[str, float]:
    """seconds = factor * size ** exponent, least squares of the logarithms.

    `r_squared` is the share of the logarithms' variance that the line explains, 1 on a line.
    """
    x, y = [math.log(size) for size in sizes], [math.log(second) for second in seconds]
    slope, intercept = statistics.linear_regression(x, y)
    mean = statistics.fmean(y)
    left = sum((b - slope * a - intercept) ** 2 for a, b in zip(x, y, strict=True))
    total = sum((b - mean) ** 2 for b in y)
    return {
        "exponent": round(slope, 3),
        "factor": math.exp(intercept),
        "r_squared": round(1 - left / total, 4) if total else 1.0,
    }


def table(result: dict[str, Any]) -> str:
    lines = [f"{'grows':<10}{'contender':<12}{'exponent':>9}{'r squared':>11}"]
    for fit in result["fits"]:
        lines.append(
            f"{fit['line']:<10}{fit['contender']:<12}{fit['exponent']:>9.3f}{fit['r_squared']:>11.4f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
