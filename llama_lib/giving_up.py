"""How a run ends that cannot go on: stacks of every process, one message, exit code 1.

Invariant: the process is gone within END_SECONDS, whatever hangs.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NoReturn

import psutil

from llama_lib import progress, stacks
from llama_lib.cli import report_to_torchrun
from llama_lib.private import masked
from llama_lib.pulse import CLOSED, ENDED, LEFT, SPOKEN, Beat, Pulse
from llama_lib.roll_call import Crew, ranges

logger = logging.getLogger("llama_lib")

# In so many seconds every process has to write its stacks, and then one has to speak.
STACK_SECONDS = 6.0
# A disk that takes longer does not answer.
DISK_SECONDS = 2.0
END_SECONDS = 14.0
_POLL_SECONDS = 0.1
# Processes of a host that cannot agree on who speaks try one after the other.
_TURN_SECONDS = 0.3
_SILENT_SECONDS = 3.0
# The one that has spoken ends first: launchers report the end that they see first.
_LAST_SECONDS = 1.0
_LINGER_SECONDS = 4.0
_SHOWN_FILES = 4
# Who said this says nothing more.
FINISHED = (CLOSED, LEFT, ENDED, SPOKEN)


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


def give_up(crew: Crew, pulse: Pulse | None, folder: Path | None, verdict: Verdict) -> NoReturn:
    """End this process, and with it the run."""
    # os._exit, because the main thread may never come back to end in order.
    last = threading.Timer(END_SECONDS, os._exit, [1])
    last.daemon = True
    last.start()
    where = stacks.whereabouts()
    faulthandler.cancel_dump_traceback_later()
    problem = _write_down(crew, folder, verdict.why)
    if problem is not None:
        folder = None
    if pulse is None:
        found = {0: Beat(0, progress.step(), ENDED, where)}
        _speak(_Report(crew, folder, verdict, found, problem).lines())
    elif verdict.alone:
        found = {crew.rank: Beat(0, progress.step(), ENDED, where)}
        _speak_for_host(crew, _Report(crew, folder, verdict, found, problem))
    else:
        _agree(crew, pulse, folder, verdict, where, problem)
    os._exit(1)


def _write_down(crew: Crew, folder: Path | None, why: str) -> str | None:
    """Stack and log of this process; returns why there are none.

    The disk may be what the run hangs on, and then hangs whoever looks at it.
    """
    problems: list[str | None] = []

    def write() -> None:
        problems.append(stacks.write_stacks(folder, crew.me, why) if folder else None)
        _log([why])

    if _is_done(write, DISK_SECONDS):
        return problems[0]
    return f"the disk of {folder or 'the log'} does not answer"


def _is_done(action: Callable[[], None], seconds: float) -> bool:
    thread = threading.Thread(target=action, daemon=True)
    thread.start()
    thread.join(seconds)
    return not thread.is_alive()


def _agree(
    crew: Crew, pulse: Pulse, folder: Path | None, verdict: Verdict, where: str, problem: str | None
) -> None:
    """All processes end for this reason; the first that is alive speaks, the others wait for it."""
    pulse.listens, pulse.interval = True, _POLL_SECONDS
    before = pulse.exchanges
    pulse.propose(json.dumps(asdict(verdict)))
    pulse.say(ENDED, where)
    deadline = time.monotonic() + STACK_SECONDS
    stopped: set[int] = set()
    waited_for: list[int] = []
    while time.monotonic() < deadline and not pulse.is_broken:
        time.sleep(_POLL_SECONDS)
        waited_for = [
            rank
            for rank, beat in enumerate(pulse.beats)
            if beat.state not in FINISHED and rank not in verdict.lost
        ]
        if pulse.exchanges > before + 1 and not waited_for:
            break
        # The last resort writes a stack and says nothing more.
        if not _without_stack(folder, waited_for):
            deadline = min(deadline, time.monotonic() + _LAST_SECONDS)
        stopped |= {rank for rank in waited_for if _goes_on(crew, rank)}
    found = {n: beat for n, beat in enumerate(pulse.beats) if beat.state in (ENDED, SPOKEN)}
    report = _Report(crew, folder, verdict, found, problem, stopped)
    if crew.rank not in found:  # the store has gone meanwhile
        found[crew.rank] = Beat(0, progress.step(), ENDED, where)
        _speak_for_host(crew, report)
    elif crew.rank == min(found):
        _speak(report.lines())
        # Launchers end all processes when one has ended: the last resort of a process that cannot
        # write its stacks itself comes first.
        if folder is not None:
            _until(lambda: not _without_stack(folder, waited_for), _LINGER_SECONDS)
        pulse.say(SPOKEN, where)
        heard = pulse.exchanges
        _until(lambda: pulse.exchanges > heard + 1 or pulse.is_broken, 1.0)
        time.sleep(3 * _POLL_SECONDS)  # the others hear it before the store may go
    else:
        first = min(found)
        _until(lambda: pulse.beats[first].state == SPOKEN or pulse.is_broken, _LINGER_SECONDS + 1)
        time.sleep(_LAST_SECONDS)


def _goes_on(crew: Crew, rank: int) -> bool:
    """Let a process of this host that is stopped (SIGSTOP) go on, so that it can end in order."""
    member = crew.members[rank]
    if member.host != crew.me.host or rank == crew.rank:
        return False
    try:
        process = psutil.Process(member.pid)
        if process.status() != psutil.STATUS_STOPPED:
            return False
        # Containers of one host may count processes anew.
        facts = process.environ()
        if facts.get("RANK") != str(rank) or facts.get("MASTER_PORT") != os.environ["MASTER_PORT"]:
            return False
        process.send_signal(signal.SIGCONT)
    except (psutil.Error, OSError):
        return False
    return True


def _speak_for_host(crew: Crew, report: _Report) -> None:
    """One process of each host speaks: those of others cannot be asked."""
    time.sleep(min(crew.me.local_rank * _TURN_SECONDS, _SILENT_SECONDS))
    with socket.socket(socket.AF_UNIX) as mark:
        try:
            # An abstract name: of this host alone, and free again when the process ends.
            mark.bind(f"\0llama_lib {crew.place} {os.environ.get('TORCHELASTIC_RESTART_COUNT')}")
        except OSError:
            time.sleep(_SILENT_SECONDS)
            return
        mine = crew.hosts(range(len(crew.members)))[crew.me.host]
        folder = report.folder
        if folder is not None:
            _until(lambda: not _without_stack(folder, mine), _SILENT_SECONDS)
            absent = _without_stack(folder, mine)
            for rank in set(mine) - set(absent) - report.found.keys():
                step = stacks.step_in(stacks.stack_file(folder, rank))
                report.found[rank] = Beat(0, step, ENDED, "")
        _speak(report.lines())
        time.sleep(_SILENT_SECONDS)  # keeps the name until the others have tried


def _without_stack(folder: Path | None, ranks: list[int]) -> list[int]:
    """Those of whom there is no stack of these seconds."""
    if folder is None:
        return ranks
    since = time.time() - 2 * END_SECONDS
    return [rank for rank in ranks if not stacks.is_written(folder, rank, since)]


def _until(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)


def _at(step: int, where: str) -> str:
    return f"after step {step}" + (f", in {where}" if where else "")


@dataclass
class _Report:
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
        absent = _without_stack(self.folder, list(range(len(self.crew.members))))
        written = sorted(set(range(len(self.crew.members))) - set(absent))
        names = [stacks.stack_file(self.folder, rank).name for rank in written]
        shown = ", ".join(names) if len(names) <= _SHOWN_FILES else f"{names[0]} to {names[-1]}"
        missing = f" (none of {ranges(absent)})" if absent else ""
        return [f"  stacks of all threads in {self.folder}: {shown}{missing}"]


def _log(lines: list[str]) -> None:
    if logger.handlers:  # else logging would print them: there is no log before there is a folder
        for line in lines:
            logger.error("%s", line)


def _speak(lines: list[str]) -> None:
    text = masked("\n".join(lines))
    # Not through sys.stderr: a thread that hangs may hold its lock. A bar may end without a line.
    with contextlib.suppress(OSError):
        os.write(2, f"\n{text}\n".encode())
    report_to_torchrun(text)
    _is_done(lambda: _log(text.splitlines()), DISK_SECONDS)
