"""Ends a run that hangs or has lost a host, and leaves behind where every process was.

Invariant: work that goes on, however slowly, is never ended; nor is a run whose machine slept, for
time counts only while this process runs.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llama_lib import progress
from llama_lib.errors import JobError, LlamaLibError
from llama_lib.watch import stacks
from llama_lib.watch.giving_up import STACK_SECONDS, Verdict, give_up
from llama_lib.watch.last_words import GRACE_SECONDS
from llama_lib.watch.neighbour import GONE, RUNS, STOPPED, state_of
from llama_lib.watch.pulse import CLOSED, LEFT, Pulse
from llama_lib.watch.roll_call import Crew, call_roll

# A host that says nothing for so long is gone, and so is a link. While data are prepared libraries
# may hold Python's lock for minutes, and there is time.
LOST_SECONDS = 60.0
PREPARATION_LOST_SECONDS = 600.0
# A process that ended in order lets its launcher speak and act first.
LEFT_SECONDS = 20.0

# Before the first step is done: large models are built, kernels compiled, with nothing to count.
FIRST_STEP_PATIENCE = 3

_TICK_SECONDS = 1.0
# The last resort ends a process, and the launcher then all: one of the others has spoken by then.
_LAST_RESORT_SECONDS = STACK_SECONDS + 2.0 - GRACE_SECONDS
_POLL_SECONDS = 0.05
_SAY_SECONDS = 60.0


# Of a process 0 on this host that is silent.
_IS_HOW = {
    STOPPED: "is stopped (SIGSTOP)",
    GONE: "has ended; its output says why",
    RUNS: "is there but does not answer",
}


class Silence:
    """How long a value has not changed, in time that the caller has seen pass."""

    def __init__(self) -> None:
        self._value: Any = None
        self._seconds = 0.0

    def of(self, value: Any, passed: float) -> float:
        if value != self._value:
            self._value, self._seconds = value, 0.0
        else:
            self._seconds += passed
        return self._seconds


class Watchdog:
    """Watches one process of a run, and with the others the whole run.

    What it does depends on how far the run is: while data are prepared only hosts that die end it,
    at the start there is a deadline, in training progress has to be made.

    Args:
        crew: all processes of the run.
    """

    def __init__(self, crew: Crew) -> None:
        self.crew = crew
        self.folder: Path | None = None
        self.pulse = Pulse(crew) if crew.store is not None else None
        self._stall = 0.0
        self._lost_seconds = PREPARATION_LOST_SECONDS
        self._deadline: tuple[float, str] | None = None
        self._last_resort: stacks.LastResort | None = None
        self._tick = _TICK_SECONDS
        self._idle, self._contact = Silence(), Silence()
        self._others = [Silence() for _ in crew.members]
        self._closing = threading.Event()
        self._judge = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._judge.start()

    # -- the way of a run ------------------------------------------------------------------------

    def ready(self) -> None:
        """Waits, with all patience, until every process has come here."""
        if self.pulse is None:
            return
        store, world = self.crew.store, len(self.crew.members)
        assert store is not None
        self.pulse.say("ready")
        begin = said = time.monotonic()
        with self._explained("waiting for the other processes"):
            come = store.add("ready", 1)
            while come < world:
                now = time.monotonic()
                if self.crew.rank == 0 and now - said > _SAY_SECONDS:
                    said = now
                    behind = [n for n, beat in enumerate(self.pulse.beats) if beat.state != "ready"]
                    print(f"waiting for {self.crew.named(behind)} to have the data", flush=True)
                # Whoever waits long looks seldom.
                time.sleep(min(max(_POLL_SECONDS, (now - begin) / 20), 1.0))
                come = store.add("ready", 0)

    @contextlib.contextmanager
    def starting(self, save_dir: str, seconds: float) -> Iterator[None]:
        """The processes connect to each other within so many seconds, or the run ends."""
        self.folder = Path(save_dir) / stacks.FOLDER
        if self.pulse is None:
            yield
            return
        what = f"the processes were not connected to each other in {seconds:g} s (--start_timeout)"
        self._lost_seconds = min(LOST_SECONDS, seconds)
        self._deadline = (seconds, what)
        with self._explained("connecting the processes to each other"):
            yield
        self._deadline = None

    def train(self, stall_timeout: float) -> None:
        """From now on something has to get done every so many seconds; 0: nothing is watched."""
        assert self.folder is not None
        if not stall_timeout:
            self.close()
            return
        self._lost_seconds = min(LOST_SECONDS, stall_timeout)
        self._tick = min(_TICK_SECONDS, stall_timeout / 10)
        if self.pulse is not None:
            self.pulse.interval = min(self.pulse.interval, stall_timeout / 5)
        why = f"{self._nothing_done(stall_timeout)}: a thread holds Python's lock (GIL)"
        # With several processes another one speaks.
        files = stacks.stack_file(self.folder, self.crew.rank)
        message = "" if self.pulse else f"stall: {why}. Stacks of all threads: {files}"
        self._stall = stall_timeout
        last_resort = stacks.LastResort(self.folder, self.crew.me, why, message)
        # At once: the lock may be gone before the judge has its first look.
        last_resort.wind_up(self._patience() + _LAST_RESORT_SECONDS)
        self._last_resort = last_resort

    def close(self, error: BaseException | None = None) -> None:
        """The run is over for this process, with `error` or in order."""
        if self._closing.is_set():
            return
        self._closing.set()
        self._judge.join()
        if self._last_resort is not None:
            self._last_resort.close()
        if self.pulse is not None:
            if error is None:
                self.pulse.say(CLOSED)
            else:
                words = str(error) if isinstance(error, LlamaLibError) else repr(error)
                self.pulse.say(LEFT, words.partition("\n")[0])
            self.pulse.close()

    @contextlib.contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        """Errors of torch and gloo in words."""
        try:
            yield
        except RuntimeError as error:
            raise JobError(
                f"{what} failed ({str(error).partition(chr(10))[0]}). The way to "
                f"{self.crew.place} is {self.crew.ways()}; if that is not the network that joins "
                "the hosts, set GLOO_SOCKET_IFNAME (with GPUs also NCCL_SOCKET_IFNAME) to the "
                "interface that is. If a host has just failed, its own output says why."
            ) from error

    # -- the judge -------------------------------------------------------------------------------

    def _run(self) -> None:
        before = time.monotonic()
        while not self._closing.wait(self._tick):
            now = time.monotonic()
            # A process that was stopped, or a machine that slept, has not waited in that time.
            verdict = self._judged(min(now - before, 2 * self._tick))
            before = now
            if verdict is not None:
                give_up(self.crew, self.pulse, self.folder, verdict)
            if self._last_resort is not None:
                self._last_resort.wind_up(self._patience() + _LAST_RESORT_SECONDS)

    def _patience(self) -> float:
        return self._stall if progress.trains() else self._stall * FIRST_STEP_PATIENCE

    def _nothing_done(self, seconds: float) -> str:
        who = "no process" if self.pulse else "nothing"
        return f"{who} got {'anything ' if self.pulse else ''}done for {seconds:g} s"

    def _judged(self, passed: float) -> Verdict | None:
        """Why the run has to end, if it has to."""
        if self.pulse is not None:
            if self.pulse.verdict:
                return Verdict.read(self.pulse.verdict)
            if verdict := self._lost(self.pulse, passed):
                return verdict
        if self._deadline is not None:
            left, what = self._deadline
            if left < 0:
                return Verdict(what, start=True)
            self._deadline = (left - passed, what)
        if self._stall:
            mark = (progress.count(), self.pulse.total if self.pulse else 0)
            if self._idle.of(mark, passed) > self._patience():
                return Verdict(f"{self._nothing_done(self._patience())} (--stall_timeout)")
        return None

    def _process_0(self) -> str:
        return f"process 0 (pid {self.crew.members[0].pid}) on this host"

    def _lost(self, pulse: Pulse, passed: float) -> Verdict | None:
        """Whether the store, or all processes of a host, have not been heard of for too long."""
        limit, crew = self._lost_seconds, self.crew
        silent = self._contact.of(pulse.exchanges, passed)
        first = crew.members[0].host
        if pulse.is_broken and silent > min(limit, LEFT_SECONDS):
            if state_of(crew, 0) == GONE:
                return Verdict(f"{self._process_0()} has ended; its output says why", alone=True)
            return Verdict(
                f"process 0 or its launcher on {first} has ended (the meeting point {crew.place} "
                "is gone); the output there says why",
                alone=True,
            )
        if silent > limit:
            if is_how := _IS_HOW.get(state_of(crew, 0) or ""):
                return Verdict(
                    f"no contact with the meeting point {crew.place} for {limit:g} s: "
                    f"{self._process_0()} {is_how}",
                    alone=True,
                )
            return Verdict(
                f"no contact with {first} (the meeting point {crew.place}) for {limit:g} s: the "
                "host is down or does nothing, or the link to it is cut",
                alone=True,
            )
        if not pulse.beats or silent > 2 * pulse.interval:
            return None  # whoever hears nobody cannot tell who is silent
        quiet = [self._others[n].of(beat.number, passed) for n, beat in enumerate(pulse.beats)]
        for rank, beat in enumerate(pulse.beats):
            if beat.state == LEFT and quiet[rank] > min(limit, LEFT_SECONDS):
                return Verdict(f"{crew.named([rank])} has ended: {beat.words}", lost=[rank])
        for host, ranks in crew.hosts(range(len(quiet))).items():
            gone = [n for n in ranks if quiet[n] > limit and pulse.beats[n].state != CLOSED]
            if gone == ranks and crew.rank not in ranks:
                return Verdict(
                    f"{host} has not been heard of for {limit:g} s: the host is down or does "
                    "nothing, or the link to it is cut",
                    lost=ranks,
                )
        return None


@contextlib.contextmanager
def watched(start_timeout: float) -> Iterator[Watchdog]:
    """A run whose processes have all come, under watch until the block ends.

    Raises:
        JobError: some did not come.
    """
    watchdog = Watchdog(call_roll(start_timeout))
    try:
        yield watchdog
    except BaseException as error:
        watchdog.close(error)
        raise
    watchdog.close()
