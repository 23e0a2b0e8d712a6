"""Draw the plots of docs/performance.md and write its tables, all from the result files.

    python -m benchmarks.plots

Invariant: no number of the page comes from anywhere else; what was not measured says so.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import device, growth, switches, train
from benchmarks.measure import ROOT

PAGE = ROOT / "docs" / "performance.md"
IMAGES = ROOT / "docs" / "images"
_MARKED = re.compile(r"(<!-- measured:(\w+) -->\n).*?(<!-- /measured -->)", re.S)
_OURS, _RIVAL = "#1f6f8b", "#b9b9b9"

# What the project set out to reach: ours, rival, how many times as fast at least.
SPEED_GOALS = (
    ("zero2", "trainer", 1.15),
    ("zero2", "barest", 1.0),
    ("hybrid_parallel", "trainer", 1.0),
    ("gemini", "trainer", 0.9),
    ("zero2-2", "trainer-2", 1.1),
)
# Of one GPU of this name: model, recompute, column of the result, at least.
GOALS_GPU = "NVIDIA H200"
DEVICE_GOALS = (
    ("7b", ("full",), "tokens_per_second", 8771),
    ("7b", ("none", "selective"), "tokens_per_second", 10500),
    ("1.1b", ("none", "selective"), "mfu", 0.47),
)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plots")
    parser.add_argument("--images", type=Path, default=IMAGES, help="folder of the PNGs")
    images = parser.parse_args(argv).images
    for name, draw in (("train", draw_train), ("growth", draw_growth)):
        if (result := read_result(name)) is not None:
            images.mkdir(parents=True, exist_ok=True)
            draw(result, images / f"{name}.png")
            print(f"drawn: {images / name}.png")
    PAGE.write_text(with_current_tables(PAGE.read_text()))


def read_result(name: str) -> dict[str, Any] | None:
    """A result file, or None if nothing was measured."""
    module: Any = {"train": train, "growth": growth, "device": device, "switches": switches}[name]
    return json.loads(module.RESULT.read_text()) if module.RESULT.is_file() else None


# -- tables -------------------------------------------------------------------------------------


def with_current_tables(text: str) -> str:
    """The page with every marked part as the result files have it."""

    def part(found: re.Match[str]) -> str:
        return f"{found[1]}\n{TABLES[found[2]]()}\n{found[3]}"

    return _MARKED.sub(part, text)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _command(result: Mapping[str, Any]) -> str:
    """The command of a result, on lines of its own."""
    return f"```text\n{result['command']}\n```\n"


def _missing(module: str) -> str:
    return f"not measured (`python -m benchmarks.{module}`)\n"


def setting_text(result: Mapping[str, Any] | None) -> str:
    """What the numbers were measured on, and with which command."""
    if result is None:
        return _missing("train")
    config, hardware, versions = result["config"], result["hardware"], result["versions"]
    named = ", ".join(f"{name} {version}" for name, version in versions.items())
    lines = [
        _command(result),
        f"- {hardware['cores']} cores of {hardware['cpu']}, {hardware['memory_gib']} GiB, load "
        f"{hardware['load_before']} before the first run; {config['threads']} threads",
        f"- {named}",
        f"- {config['parameters']:,} parameters, rows of {config['max_length']} tokens, "
        f"{config['batch_size']} rows a step, {config['precision']}; {config['steps']} steps a "
        f"run, the first {config['ignore']} not counted",
    ]
    return "\n".join(lines) + "\n"


def contenders_table(result: Mapping[str, Any] | None) -> str:
    if result is None:
        return _missing("train")
    config = result["config"]
    tokens = config["batch_size"] * config["max_length"]
    rows = [
        [
            f"`{name}`",
            f"{each['step_ms']:,.0f}",
            f"{each['fastest_ms']:,.0f} to {each['slowest_ms']:,.0f}",
            f"{tokens / each['step_ms'] * 1000:,.0f}",
            f"{each['peak_pss_mb']:,.0f}",
            f"{each['first_loss']:.4f}",
            f"{each['last_loss']:.4f}",
            f"{each['steps']} / {each['runs']}",
        ]
        for name, each in result["summary"]["contenders"].items()
    ]
    head = ["", "step, ms", "fastest to slowest", "tokens/s", "peak memory, MB"]
    text = markdown([*head, "first loss", "last loss", "steps / runs"], rows)
    if (IMAGES / "train.png").is_file():
        text += "\n![Step times of all contenders](images/train.png)\n"
    return text


def ratios_table(result: Mapping[str, Any] | None) -> str:
    if result is None:
        return _missing("train")
    rows = [
        [
            f"`{each['ours']}`",
            f"`{each['rival']}`",
            f"{each['times_faster']:.2f}",
            "n/a" if each["lowest"] is None else f"{each['lowest']:.2f} to {each['highest']:.2f}",
            f"{each['memory']:.2f}",
        ]
        for each in result["summary"]["ratios"]
    ]
    return markdown(["ours", "against", "times as fast", "of single rounds", "memory"], rows)


def goals_table(result: Mapping[str, Any] | None, gpu: Mapping[str, Any] | None) -> str:
    """Each goal, what was measured, and whether that reaches it."""
    rows = []
    ratios = [] if result is None else result["summary"]["ratios"]
    for ours, rival, least in SPEED_GOALS:
        pair = [each for each in ratios if (each["ours"], each["rival"]) == (ours, rival)]
        speed = [each["times_faster"] for each in pair]
        rows.append(_goal(f"`{ours}` times as fast as `{rival}`", least, speed, "{:.2f}"))
        if rival.startswith("trainer"):
            memory = [-each["memory"] for each in pair]
            what = f"peak host memory of `{ours}`, times that of `{rival}`"
            rows.append(_goal(what, -1.0, memory, "{:.2f}"))
    device_rows = gpu["rows"] if gpu is not None and gpu["hardware"]["gpu"] == GOALS_GPU else []
    for model, recompute, column, least in DEVICE_GOALS:
        found = [
            row[column]
            for row in device_rows
            if row["model"] == model and row["recompute"] in recompute
            if row["contender"] == "zero2" and row.get(column) is not None
        ]
        unit, form = ("MFU", "{:.1%}") if column == "mfu" else ("tokens/s", "{:,.0f}")
        what = f"one H200, {model}, recompute {' or '.join(recompute)}: {unit}"
        rows.append(_goal(what, least, found, form))
    return markdown(["goal", "wanted", "measured", "reached"], rows)


def _goal(what: str, least: float, found: Sequence[float], form: str) -> list[str]:
    """A line of the goals; below 0 both numbers are limits from above, with their sign turned."""
    wanted = f"{'at most' if least < 0 else 'at least'} {form.format(abs(least))}"
    if not found:
        return [what, wanted, "not measured", ""]
    best = max(found)
    return [what, wanted, form.format(abs(best)), "yes" if best >= least else "no"]


def switches_table(result: Mapping[str, Any] | None) -> str:
    """What each switch costs or saves, as a share of the default."""
    if result is None:
        return _missing("switches")
    rows = [
        [
            each["switch"],
            f"`{result['flags'][each['switch']]}`" if result["flags"][each["switch"]] else "",
            f"{each['step_ms']:,.0f}",
            f"{each['fastest_ms']:,.0f} to {each['slowest_ms']:,.0f}",
            f"{each['time']:.2f}",
            f"{each['peak_pss_mb']:,.0f}",
            f"{each['memory']:.2f}",
        ]
        for each in result["summary"]
    ]
    head = ["", "flags", "step, ms", "fastest to slowest", "of the default", "peak memory, MB"]
    return _command(result) + "\n" + markdown([*head, "of the default"], rows)


def growth_table(result: Mapping[str, Any] | None) -> str:
    if result is None:
        return _missing("growth")
    rows = []
    for fit in result["fits"]:
        sizes, seconds = growth.line_of(result["points"], fit["line"], fit["contender"])
        rows.append(
            [
                fit["line"],
                f"`{fit['contender']}`",
                f"{fit['exponent']:.2f}",
                f"{fit['r_squared']:.3f}",
                ", ".join(f"{size:,.0f}" for size in sizes),
                ", ".join(f"{each * 1000:,.0f}" for each in seconds),
            ]
        )
    head = ["what grows", "who", "exponent", "r squared", "sizes", "step, ms"]
    text = _command(result) + "\n" + markdown(head, rows)
    if (IMAGES / "growth.png").is_file():
        text += "\n![Step time against model, length and batch](images/growth.png)\n"
    return text


def device_table(result: Mapping[str, Any] | None) -> str:
    """Every row that benchmarks.device would run; those without a run are not measured."""
    rows = []
    done = {} if result is None else {_row_key(row): row for row in result["rows"]}
    for row in device.ROWS:
        named = [row.model, f"{row.max_length}", f"{row.batch_size}", row.recompute]
        numbers = ["not measured", "", "", ""]
        found = done.get((*named, row.contender))
        if found is not None and "failed" in found:
            numbers[0] = found["failed"]
        elif found is not None:
            mfu = "n/a" if found["mfu"] is None else f"{found['mfu']:.1%}"
            memory = found["gpu_memory_mb"].get("reserved")
            numbers = [f"{found['tokens_per_second']:,.0f}", f"{found['model_tflops']:.1f}", mfu]
            numbers.append("n/a" if memory is None else f"{memory:,.0f}")
        rows.append([*named, f"`{row.contender}`", *numbers])
    head = ["model", "length", "rows a step", "recompute", "who"]
    text = markdown([*head, "tokens/s", "model TFLOPS", "MFU", "reserved, MB"], rows)
    if result is not None:
        text = f"{result['hardware']['gpu']}\n\n{_command(result)}\n{text}"
    return text


def _row_key(row: Mapping[str, Any]) -> tuple[str, ...]:
    names = ("model", "max_length", "batch_size", "recompute", "contender")
    return tuple(str(row[name]) for name in names)


TABLES: dict[str, Callable[[], str]] = {
    "setting": lambda: setting_text(read_result("train")),
    "goals": lambda: goals_table(read_result("train"), read_result("device")),
    "contenders": lambda: contenders_table(read_result("train")),
    "ratios": lambda: ratios_table(read_result("train")),
    "switches": lambda: switches_table(read_result("switches")),
    "growth": lambda: growth_table(read_result("growth")),
    "device": lambda: device_table(read_result("device")),
}


# -- plots --------------------------------------------------------------------------------------


def _figure(columns: int, width: float, height: float) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, columns, figsize=(width, height), layout="constrained")
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    # Without the version of the library, so that equal results give equal files.
    figure.savefig(path, dpi=120, metadata={"Software": None})
    pyplot.close(figure)


def draw_train(result: Mapping[str, Any], path: Path) -> None:
    """Bars of the median step, from the fastest to the slowest step as a line; memory beside."""
    contenders = result["summary"]["contenders"]
    names = sorted(contenders, key=lambda name: -contenders[name]["step_ms"])
    ours = [train.contender_of(name).is_ours for name in names]
    colours = [_OURS if each else _RIVAL for each in ours]
    figure, (left, right) = _figure(2, 10, 0.42 * len(names) + 1.2)
    steps = [contenders[name]["step_ms"] for name in names]
    ranges = [
        [contenders[name]["step_ms"] - contenders[name]["fastest_ms"] for name in names],
        [contenders[name]["slowest_ms"] - contenders[name]["step_ms"] for name in names],
    ]
    left.barh(names, steps, color=colours, xerr=ranges, error_kw={"elinewidth": 1, "capsize": 2})
    left.set_xlabel("median step, ms (line: fastest to slowest)")
    right.barh(names, [contenders[name]["peak_pss_mb"] for name in names], color=colours)
    right.set_xlabel("peak host memory of all processes, MB")
    right.set_yticklabels([])
    left.set_title("blue: ours; grey: rivals; -2: two processes", fontsize=9, loc="left")
    _save(figure, path)


def draw_growth(result: Mapping[str, Any], path: Path) -> None:
    """A panel for each line: points, and the fitted power law with its exponent."""
    figure, axes = _figure(3, 12, 3.6)
    titles = {"model": "parameters", "length": "tokens of a row", "batch": "rows of a step"}
    for axis, (line, title) in zip(axes, titles.items(), strict=True):
        for fit in (each for each in result["fits"] if each["line"] == line):
            sizes, seconds = growth.line_of(result["points"], line, fit["contender"])
            colour = _OURS if train.contender_of(fit["contender"]).is_ours else "#777777"
            label = f"{fit['contender']}: exponent {fit['exponent']:.2f}"
            axis.plot(sizes, [1000 * each for each in seconds], "o", color=colour, label=label)
            fitted = [1000 * fit["factor"] * size ** fit["exponent"] for size in sizes]
            axis.plot(sizes, fitted, "-", color=colour, linewidth=1)
        axis.set_xscale("log")
        axis.set_yscale("log")
        # Numbers between the powers of ten run into each other on narrow panels.
        axis.xaxis.set_minor_formatter("")
        axis.set_xlabel(title)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8, frameon=False)
    axes[0].set_ylabel("median step, ms")
    _save(figure, path)


if __name__ == "__main__":
    main()
