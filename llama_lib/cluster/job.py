"""One attempt to run a job on a list of hosts, from the first process to the last.

Invariant: no process starts before every host can start its own; the first rank that fails ends all
within `_END_SECONDS`; the outcome is that of the rank that ended first.
"""

import queue
import signal
import time
from dataclasses import dataclass, field

from llama_lib.cluster.link import Events, Link
from llama_lib.cluster.output import Output, Source
from llama_lib.cluster.protocol import GRACE_SECONDS, HOST_LOST_SECONDS, STUCK_SECONDS, Message
from llama_lib.cluster.remote import HostError, in_parallel
from llama_lib.cluster.signals import Signals, signal_name
from llama_lib.errors import UserError

# Ranks that end for one common reason do so by themselves, each with its own message.
_PATIENCE_SECONDS = 2.0
# From the first failure to the last end.
_END_SECONDS = 30.0
# The ranks that were asked to save end together; one that does not is not waited for.
_ASKED_END_SECONDS = 60.0
_READY_SECONDS = 40.0
_LOOK_SECONDS = 0.2


@dataclass(frozen=True)
class Plan:
    """What is started: the same on all hosts.

    `environment` is for hosts other than this machine, where the launcher's own holds.
    """

    argv: list[str]
    workdir: str
    environment: dict[str, str]
    nproc: int
    master_addr: str
    master_port: int
    run_id: str
    attempt: int = 0
    restarts: int = 0
    terminals: tuple[dict[str, int | str] | None, dict[str, int | str] | None] = (None, None)


@dataclass(frozen=True)
class Failure:
    """What ended a job first: a rank with its exit code (below 0: a signal), or a host."""

    host: str
    rank: int | None = None
    code: int | None = None
    what: str = ""

    def __str__(self) -> str:
        if self.rank is None or self.code is None:
            return f"{self.host}: {self.what}"
        if self.code < 0:
            how = f"was killed by {signal_name(-self.code)}"
            if self.code == -signal.SIGKILL:
                how += " (by somebody, or by the system for want of memory: see dmesg)"
        else:
            how = f"ended with exit code {self.code}"
        return f"rank {self.rank} on {self.host} {how}"


class NotReady(Exception):
    """Hosts that cannot start their part; nothing was started on any."""

    def __init__(self, problems: list[HostError]) -> None:
        super().__init__("\n".join(map(str, problems)))
        self.problems = problems


@dataclass
class Outcome:
    """How an attempt ended.

    `code` is the job's exit code; `asked` says that it was to end, by a signal or a mistake in the
    options, so that starting again would be wrong; `at_once`, that ranks were killed on a second
    signal.
    """

    code: int
    asked: bool = False
    failure: Failure | None = None
    lost: list[str] = field(default_factory=list)
    at_once: bool = False


@dataclass
class _Place:
    """A host's part of the job."""

    link: Link
    index: int
    first_rank: int
    running: set[int]
    is_ready: bool = False
    is_orphaned: bool = False  # its agent ended before its ranks


class Job:
    """The hosts of one attempt.

    Args:
        links: agents in the order of their hosts' ranks.
        events: where their messages come.
        signals: those that come to the launcher.
    """

    def __init__(
        self,
        plan: Plan,
        links: list[Link],
        events: Events,
        output: Output,
        signals: Signals,
    ) -> None:
        self._plan, self._events, self._output = plan, events, output
        self._signals = signals
        self._places = [
            _Place(link, index, index * plan.nproc, set(range(plan.nproc)))
            for index, link in enumerate(links)
        ]
        self._failures: list[tuple[float, Failure]] = []
        self._asked: list[int] = []
        self._lost: list[str] = []
        self._first_end: float | None = None  # of a rank that did not end with 0
        self._stopped: float | None = None  # when all were last told to end

    def run(self) -> Outcome:
        """Start, follow and end it.

        Raises:
            NotReady: one of the hosts cannot start its part; nothing was started then.
        """
        try:
            self._get_ready()
            if self._plan.attempt == 0:  # of a restart there is a line already
                self._say_start()
            with self._signals.kept():
                self._tell({"go": 1})
                self._follow()
            # One that came with the last end is a wish too, which forbids a restart.
            self._asked += self._signals.take()
            return self._outcome()
        finally:
            self._end()

    def _get_ready(self) -> None:
        for place in self._places:
            place.link.send({"job": self._description(place)})
        deadline = time.monotonic() + _READY_SECONDS
        problems: list[HostError] = []
        while not all(place.is_ready for place in self._places):
            for place in self._places:
                if place.is_ready:
                    continue
                if place.link.is_silent or time.monotonic() > deadline:
                    problems.append(_unanswering(place.link))
                    place.is_ready = True
            received = self._next()
            if received is None:
                continue
            place, message = received
            if message is None:
                problems.append(_unanswering(place.link))
            elif "problem" in message:
                problems.append(HostError(place.link.host.name, *message["problem"]))
            place.is_ready = True
        if problems:
            raise NotReady(problems)

    def _say_start(self) -> None:
        """The scripts themselves say nothing until they have imported what they need."""
        names = ", ".join(place.link.host.name for place in self._places)
        processes = self._plan.nproc * len(self._places)
        self._output.say(f"starting {processes} process(es) on {names}")

    def _description(self, place: _Place) -> Message:
        plan = self._plan
        return {
            "argv": plan.argv,
            "workdir": plan.workdir,
            "environment": {} if place.link.host.is_local else plan.environment,
            "nproc": plan.nproc,
            "node_rank": place.index,
            "num_nodes": len(self._places),
            "master_addr": plan.master_addr,
            "master_port": plan.master_port,
            "run_id": plan.run_id,
            "attempt": plan.attempt,
            "restarts": plan.restarts,
            "terminals": plan.terminals,
        }

    def _follow(self) -> None:
        while any(place.running for place in self._places):
            received = self._next()
            if received is not None:
                self._take(*received)
            for place in self._places:
                if place.running and place.link.is_silent:
                    self._lose(place, f"no sign of life for {HOST_LOST_SECONDS:.0f} s")
            for number in self._signals.take():
                self._pass_on(number)
            self._keep_deadlines()

    def _next(self) -> tuple[_Place, Message | None] | None:
        try:
            link, message = self._events.get(timeout=_LOOK_SECONDS)
        except queue.Empty:
            return None
        for place in self._places:
            if place.link is link:
                return place, message
        return None  # from an attempt before this one

    def _take(self, place: _Place, message: Message | None) -> None:
        if message is None:
            if place.running:
                place.is_orphaned = True
                said = place.link.errors().strip().splitlines()
                self._lose(place, f"its agent ended ({said[-1]})" if said else "its agent ended")
        elif "out" in message:
            source = self._source(place, message["out"])
            self._output.show(source, message["error"], message["text"])
        elif "ending" in message:
            failure = Failure(place.link.host.name, what=message["ending"])
            self._fail(failure, time.monotonic())
        elif "end" in message:
            local_rank, code = message["end"], message["code"]
            place.running.discard(local_rank)
            source = self._source(place, local_rank)
            self._output.ended(source, code)
            if code:
                failure = Failure(place.link.host.name, source.rank, code)
                self._fail(failure, time.monotonic() - message["ago"])

    def _source(self, place: _Place, local_rank: int) -> Source:
        named = place.link.host.name if place.index else None
        return Source(place.first_rank + local_rank, named)

    def _lose(self, place: _Place, what: str) -> None:
        place.running.clear()
        self._lost.append(place.link.host.name)
        self._fail(Failure(place.link.host.name, what=what), time.monotonic())

    def _fail(self, failure: Failure, when: float) -> None:
        self._failures.append((when, failure))
        if self._first_end is None:
            self._first_end = time.monotonic()

    def _pass_on(self, number: int) -> None:
        """A signal to the launcher: the first one is for the ranks, the next one ends them."""
        name = signal_name(number)
        self._asked.append(number)
        if len(self._asked) == 1:
            # A terminal that is gone asks for the same as SIGTERM; torch ignores SIGHUP here.
            passed = signal.SIGTERM if number == signal.SIGHUP else number
            self._output.say(f"{name}: passed on to all ranks; a second one ends them at once")
            self._tell({"signal": int(passed)})
        elif len(self._asked) == 2:
            self._output.say(f"{name}: ending all ranks at once")
            self._stop(0.0)

    def _keep_deadlines(self) -> None:
        now = time.monotonic()
        if self._stopped is None:
            patience = _ASKED_END_SECONDS if self._is_asked_end() else _PATIENCE_SECONDS
            if self._first_end is not None and now - self._first_end > patience:
                self._stop(GRACE_SECONDS)
        elif now - self._stopped > _END_SECONDS - _PATIENCE_SECONDS:
            for place in self._places:
                if place.running:
                    ranks = sorted(place.first_rank + rank for rank in place.running)
                    self._output.say(
                        f"{place.link.host.name}: ranks {ranks} cannot be ended; look there for "
                        "processes in state D (ps -eo pid,stat,args), as on a disk that hangs"
                    )
                    place.running.clear()

    def _is_asked_end(self) -> bool:
        """Whether the ranks that have ended did so on a signal, as control.py does after a save."""
        codes = [failure.code for _, failure in self._failures]
        return all(code in (128 + signal.SIGTERM, 128 + signal.SIGINT) for code in codes)

    def _stop(self, grace: float) -> None:
        self._stopped = time.monotonic()
        self._tell({"stop": grace})

    def _tell(self, message: Message) -> None:
        for place in self._places:
            place.link.send(message)

    def _outcome(self) -> Outcome:
        if not self._failures:
            return Outcome(0)
        failures = sorted(self._failures, key=lambda each: each[0])
        first = failures[0][1]
        if first.code is None:
            code = 1
        else:
            code = first.code if first.code > 0 else 128 - first.code
        asked = bool(self._asked) or first.code == UserError.exit_code or self._is_asked_end()
        # Other hosts' ranks miss a lost one's before the launcher does.
        hosts = [failure for _, failure in failures if failure.code is None]
        at_once = len(self._asked) > 1 and any(
            failure.code == -signal.SIGKILL for _, failure in failures
        )
        return Outcome(code, asked, hosts[0] if hosts else first, self._lost, at_once)

    def _end(self) -> None:
        self._output.finish()
        for place in self._places:
            place.link.end()
        # Dozens of hosts that are lost at once would take minutes one after the other.
        in_parallel(self._close, self._places)

    def _close(self, place: _Place) -> None:
        place.link.close(0.0 if place.link.is_silent else GRACE_SECONDS + STUCK_SECONDS)
        if place.is_orphaned:
            place.link.sweep(self._plan.run_id)


def _unanswering(link: Link) -> HostError:
    said = link.errors().strip().splitlines()
    what = f"its agent gave up ({said[-1]})" if said else "its agent does not answer"
    return HostError(link.host.name, what, f"look with `ssh {link.host.name}`")
