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
from dataclasses import asdict
from pathlib import Path
from typing import NoReturn

import psutil

from llama_lib import progress
from llama_lib.cli import report_to_torchrun
from llama_lib.private import masked
from llama_lib.watch import stacks
from llama_lib.watch.neighbour import process_of
from llama_lib.watch.pulse import CLOSED, ENDED, LEFT, SPOKEN, Beat, Pulse
from llama_lib.watch.report import Report, Verdict, without_stack
from llama_lib.watch.roll_call import Crew

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
# Who said this says nothing more.
FINISHED = (CLOSED, LEFT, ENDED, SPOKEN)


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
        _speak(Report(crew, folder, verdict, found, problem).lines())
    elif verdict.alone:
        found = {crew.rank: Beat(0, progress.step(), ENDED, where)}
        _speak_for_host(crew, Report(crew, folder, verdict, found, problem))
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
        if not without_stack(folder, waited_for):
            deadline = min(deadline, time.monotonic() + _LAST_SECONDS)
        stopped |= {rank for rank in waited_for if _goes_on(crew, rank)}
    found = {n: beat for n, beat in enumerate(pulse.beats) if beat.state in (ENDED, SPOKEN)}
    report = Report(crew, folder, verdict, found, problem, stopped)
    if crew.rank not in found:  # the store has gone meanwhile
        found[crew.rank] = Beat(0, progress.step(), ENDED, where)
        _speak_for_host(crew, report)
    elif crew.rank == min(found):
        _speak(report.lines())
        # Launchers end all processes when one has ended: the last resort of a process that cannot
        # write its stacks itself comes first.
        if folder is not None:
            _until(lambda: not without_stack(folder, waited_for), _LINGER_SECONDS)
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
    try:
        process = process_of(crew, rank)
        if process is None or process.status() != psutil.STATUS_STOPPED:
            return False
        process.send_signal(signal.SIGCONT)
    except (psutil.Error, OSError):
        return False
    return True


def _speak_for_host(crew: Crew, report: Report) -> None:
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
            _until(lambda: not without_stack(folder, mine), _SILENT_SECONDS)
            absent = without_stack(folder, mine)
            for rank in set(mine) - set(absent) - report.found.keys():
                step = stacks.step_in(stacks.stack_file(folder, rank))
                report.found[rank] = Beat(0, step, ENDED, "")
        _speak(report.lines())
        time.sleep(_SILENT_SECONDS)  # keeps the name until the others have tried


def _until(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)


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
