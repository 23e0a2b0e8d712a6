"""The chaos report: what was hit, what was lost, and that nothing of it shows at the end.

Invariant: every number comes from the runs' own files and outputs; nothing is left out.
"""

import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from statistics import median
from typing import Any

from benchmarks.measure import surroundings
from tests.chaos.harness import Kill, Usual
from tests.chaos.runs import HOSTS_AT_WORK, HOSTS_IN_FILE, Disturbed, Work

_PACKAGES = ("torch", "colossalai", "transformers", "safetensors", "fabric")


@dataclass(frozen=True)
class Part:
    """One disturbed run beside its undisturbed twin."""

    work: Work
    usual: Usual
    disturbed: Disturbed
    differences: list[str]

    def record(self, folder: str) -> dict[str, Any]:
        words = [word.replace(folder, "RUN") for word in self.disturbed.command]
        return {
            "options": " ".join(self.work.options),
            "command": shlex.join(["python", *words]),
            "steps": self.work.rhythm.steps,
            "save_interval": self.work.rhythm.save_interval,
            "eval_interval": self.work.rhythm.eval_interval,
            "undisturbed_seconds": {k: round(v, 3) for k, v in asdict(self.usual).items()},
            "seconds": round(self.disturbed.seconds, 1),
            "hashes_compared": len(self.disturbed.ending.hashes),
            "losses_compared": sum(map(len, self.disturbed.losses.values())),
            "held_out_losses_compared": len(self.disturbed.ending.held_out),
            "differences": self.differences,
            "kills": [kill.record() for kill in self.disturbed.kills],
        }


def report(parts: Sequence[Part], seed: int, folder: str, begun: float) -> dict[str, Any]:
    kills = [kill for part in parts for kill in part.disturbed.kills]
    return {
        "command": f"python -m tests.chaos --seed {seed}",  # other options name folders
        "date": f"{datetime.fromtimestamp(begun, UTC):%Y-%m-%d %H:%M} UTC",
        "seed": seed,
        **surroundings(_PACKAGES),
        "hosts": f"{HOSTS_AT_WORK} of {HOSTS_IN_FILE} network namespaces at work, one rank each; "
        "the launcher on a further one; both runs at the same time",
        "totals": totals(kills, [line for part in parts for line in part.differences]),
        "runs": [part.record(folder) for part in parts],
    }


def totals(kills: Sequence[Kill], differences: Sequence[str]) -> dict[str, Any]:
    lost = [kill.steps_lost or 0 for kill in kills]
    seconds: dict[str, list[float]] = {}
    for kill in kills:
        seconds.setdefault(_kind(kill), []).append(kill.seconds or 0.0)
    return {
        "kills": len(kills),
        "restarts": len(kills),  # a run with any other restart has failed
        "steps_lost": sum(lost),
        "most_steps_lost": max(lost),
        "checkpoints_refused": len({line for kill in kills for line in kill.refused}),
        "saves_left_unfinished": sum(kill.left_behind is not None for kill in kills),
        "moments": dict(Counter(kill.moment for kill in kills)),
        "targets": dict(Counter(_kind(kill) for kill in kills)),
        "median_seconds_until_training": {
            target: round(median(values), 1) for target, values in sorted(seconds.items())
        },
        "differences": len(differences),
    }


def _kind(kill: Kill) -> str:
    return "agent" if "agent" in kill.target else kill.target.split()[0]


def table(result: dict[str, Any]) -> str:
    """The report to be read."""
    sums = result["totals"]
    lines = [
        f"command   {result['command']}",
        f"date      {result['date']}, seed {result['seed']}",
        "versions  " + ", ".join(f"{name} {v}" for name, v in result["versions"].items()),
        "hardware  {cpu}, {cores} cores, {memory_gib} GiB, load {load_before} at the "
        "beginning".format(**result["hardware"]),
        f"hosts     {result['hosts']}",
        "",
        f"{sums['kills']} kills, {sums['restarts']} restarts, {sums['steps_lost']} steps done "
        f"again (at most {sums['most_steps_lost']} for one kill), {sums['checkpoints_refused']} "
        f"finished checkpoints refused, {sums['saves_left_unfinished']} saves left unfinished and "
        "not loaded",
        "seconds until training went on, median: "
        + ", ".join(f"{k} {v}" for k, v in sums["median_seconds_until_training"].items()),
        f"differences from the undisturbed runs: {sums['differences']}",
    ]
    for run in result["runs"]:
        lines += ["", f"{run['options']}: {run['command']}"]
        lines += [
            f"  {run['hashes_compared']} files of weights, optimizer and random state and "
            f"{run['losses_compared']} losses and {run['held_out_losses_compared']} held-out "
            "losses compared: "
            + ("equal to the bit" if not run["differences"] else "; ".join(run["differences"])),
            "",
            "  kill  moment      target                        reached  resumed  lost  seconds"
            "  left unfinished / refused",
        ]
        lines += [_row(kill) for kill in run["kills"]]
    return "\n".join(lines) + "\n"


def _row(kill: dict[str, Any]) -> str:
    refused = "; ".join(filter(None, [kill["left_behind"], *kill["refused"]]))
    return (
        f"  {kill['number']:>4}  {kill['moment']:<10}  {kill['target']:<28}  "
        f"{kill['step_reached']:>7}  {kill['resumed_at']:>7}  {kill['steps_lost']:>4}  "
        f"{kill['seconds']:>7.1f}  {refused}"
    ).rstrip()
