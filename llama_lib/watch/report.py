"""Why a run was ended and where its processes were: the one message about it.

Invariant: a process is named with the place it was at, or as one of whom nothing is known.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path

from llama_lib.watch import stacks
from llama_lib.watch.pulse import Beat
from llama_lib.watch.roll_call import Crew, ranges

# What processes write before they end is not older than this.
RECENT_SECONDS = 28.0
_SHOWN_FILES = 4


@dataclass(frozen=True)
class Verdict:
    """Why a run ends.

    `lost` are the ranks that cannot be asked; `alone`: nobody can; `start`: in connecting.
    """

    why: str
    lost: list[int] = field(default_factory=list)
    alone: bool = False
    start: bool = False

    @classmethod
    def read(cls, text: str) -> Verdict:
        return cls(**json.loads(text))


def without_stack(folder: Path | None, ranks: list[int]) -> list[int]:
    """Those of whom there is no stack of these seconds."""
    if folder is None:
        return ranks
    since = time.time() - RECENT_SECONDS
    return [rank for rank in ranks if not stacks.is_written(folder, rank, since)]


def _at(step: int, where: str) -> str:
    return f"after step {step}" + (f", in {where}" if where else "")


@dataclass
class Report:
    """The message, and what it is made of."""

    crew: Crew
    folder: Path | None
    verdict: Verdict
    found: dict[int, Beat]
    problem: str | None
    stopped: set[int] = field(default_factory=set)

    def lines(self) -> list[str]:
        verdict, crew = self.verdict, self.crew
        lines = [f"watchdog: {verdict.why}. The run ends here."]
        groups: dict[str, list[int]] = {}
        for rank, beat in sorted(self.found.items()):
            place = _at(beat.step, beat.words)
            if rank in self.stopped:
                place += ", where it was stopped (SIGSTOP) until now"
            groups.setdefault(place, []).append(rank)
        lines += [f"  {crew.named(ranks)}: {place}" for place, ranks in groups.items()]
        absent = set(range(len(crew.members))) - self.found.keys() - set(verdict.lost)
        if absent and not verdict.alone:
            lines.append(
                f"  {crew.named(absent)}: no answer: stopped, cut off, or a thread holds Python's "
                "lock"
            )
        lines += self._files()
        if verdict.start:
            lines.append(
                f"The way to {crew.place} is {crew.ways()}; if that is not the network that joins "
                "the hosts, set GLOO_SOCKET_IFNAME (with GPUs also NCCL_SOCKET_IFNAME) to the "
                "interface that is. NCCL_DEBUG=INFO shows what NCCL tries, and `python -m "
                "llama_lib doctor --hostfile FILE` checks the hosts; if they are only slow, raise "
                "--start_timeout."
            )
        elif len(groups) + bool(absent) > 1 and not verdict.alone and not verdict.lost:
            lines.append("A process that is elsewhere than most is the one to look at first.")
        if (self.folder or self.problem) and not verdict.start:
            lines.append("The checkpoints are untouched: --load auto goes on from the newest.")
        return lines

    def _files(self) -> list[str]:
        if self.problem is not None:
            return [f"  no stacks: {self.problem}"]
        if self.folder is None:
            return []
        absent = without_stack(self.folder, list(range(len(self.crew.members))))
        written = sorted(set(range(len(self.crew.members))) - set(absent))
        names = [stacks.stack_file(self.folder, rank).name for rank in written]
        shown = ", ".join(names) if len(names) <= _SHOWN_FILES else f"{names[0]} to {names[-1]}"
        missing = f" (none of {ranges(absent)})" if absent else ""
        return [f"  stacks of all threads in {self.folder}: {shown}{missing}"]
