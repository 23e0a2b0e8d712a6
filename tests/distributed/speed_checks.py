"""Checks of what makes a step faster or smaller: the same steps with a switch on and off.

Invariant: as in checks.py; `switched` names a layout of cases.py with more flags.
"""

from pathlib import Path
from typing import Any

import torch
from torch._dynamo.utils import counters
from torch.utils.flop_counter import FlopCounterMode

from llama_lib import recompute
from llama_lib.engine import Engine
from tests.distributed.cases import LAYOUTS
from tests.distributed.checks import Report, build, train_step, weight_hashes
from tests.test_model_kernels import StandInRMSNorm, liger_stand_in

STEPS = 3
RECOMPUTE = ("none", "selective", "full")


def switched(layout: str, flags: str) -> str:
    """The name of `layout` with these flags beside its own."""
    name = f"{layout} {flags}"
    LAYOUTS[name] = f"{LAYOUTS[layout]} {flags}"
    return name


def _train(engine: Engine) -> Report:
    results = [train_step(engine, step) for step in range(1, STEPS + 1)]
    report: Report = {
        "losses": [loss for loss, _ in results],
        "norms": [norm for _, norm in results],
        "weights": weight_hashes(engine),
    }
    # Gemini's tensors call themselves without end when a counter looks at them.
    if not engine.layout.plugin.startswith("gemini"):
        with FlopCounterMode(display=False) as counter:
            train_step(engine, STEPS + 1)
        report["flops"] = counter.get_total_flops()
    return report


def recomputed(layout: str, precision: str, folder: Path) -> dict[str, Report]:
    """The first steps in each recompute mode; "selective_layers" counts layers run selectively."""
    reports = {}
    plain = recompute.selective_contexts
    for mode in RECOMPUTE:
        calls: list[Any] = []

        def counted(calls: list[Any] = calls) -> Any:
            calls.append(None)
            return plain()

        recompute.selective_contexts = counted
        try:
            engine = build(switched(layout, f"--recompute {mode}"), precision)
        finally:
            recompute.selective_contexts = plain
        reports[mode] = _train(engine) | {"selective_layers": len(calls)}
    return reports


def compiled(layout: str, precision: str, folder: Path) -> dict[str, Report]:
    """The first steps with and without torch.compile, and the graphs it made of the layers."""
    reports = {"plain": _train(build(layout, precision))}
    torch._dynamo.reset()
    counters.clear()
    reports["compiled"] = _train(build(switched(layout, "--compile"), precision))
    reports["compiled"]["graphs"] = counters["stats"]["unique_graphs"]
    reports["compiled"]["breaks"] = dict(counters["graph_break"])
    return reports


def kernels(layout: str, precision: str, folder: Path) -> dict[str, Report]:
    """The first steps with torch's kernels and with what stands in for Liger's on a CPU."""
    reports = {"plain": _train(build(layout, precision))}
    before = StandInRMSNorm.calls
    with liger_stand_in():
        reports["liger"] = _train(build(switched(layout, "--kernels liger"), precision))
    reports["liger"]["norms_called"] = StandInRMSNorm.calls - before
    return reports


CHECKS = {"recomputed": recomputed, "compiled": compiled, "kernels": kernels}
