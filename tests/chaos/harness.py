"""Hits a launched run again and again, each time at a drawn moment, and notes what became of it.

Invariant: nothing is killed but at the moment that was drawn, or the note says at which instead;
an attempt that ends without having been hit fails the test.
"""

import os
import re
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from tests.chaos.draws import AGENT, EVALUATION, HOST, RANK, SAVE, START, STEP, Draw
from tests.chaos.places import Found, Place, kill_process
from tests.chaos.run_files import RunFiles

# Others may be using the machine: limits are for what hangs.
ATTEMPT_SECONDS = 300.0
END_SECONDS = 400.0
_LOOK_SECONDS = 0.002
# A moment that was over before it could be hit is waited for again, and hit so much earlier.
_EARLIER = 0.6
# A line of the launcher for each new attempt.
_RESTART = re.compile(r"^launch: restart (\d+) of ", re.M)
# Of the shortest time from an attempt's start to its first step: later might be too late.
_SAFE_PART_OF_START = 0.85


@dataclass(frozen=True)
class Usual:
    """Seconds that each moment took in the undisturbed run."""

    start: float
    step: float
    save: float
    evaluation: float


@dataclass(frozen=True)
class Rhythm:
    """After which steps the run saves and evaluates, and its last step."""

    steps: int
    save_interval: int
    eval_interval: int

    def only_trains(self, step: int) -> bool:
        return step % self.save_interval != 0 and step % self.eval_interval != 0


@dataclass
class Kill:
    """What one kill did. `resumed_at` and what follows from it come with the next first step.

    Attributes:
        steps_lost: steps of the attempt that was hit which had to be done again.
        seconds: from the kill to the first step after it, later kills in between included.
        being_written: the checkpoint whose temporary folder was there when the kill was sent.
        left_behind: the same, when the next attempt began.
        refused: what --load auto said of checkpoints that it did not take.
    """

    number: int
    moment: str
    part: float
    target: str
    being_written: str | None
    step_reached: int | None = None
    resumed_at: int | None = None
    steps_lost: int | None = None
    seconds: float | None = None
    left_behind: str | None = None
    refused: list[str] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        return asdict(self)


class Timeline:
    """Waits for what an undisturbed run does, and for how long."""

    def __init__(self, files: RunFiles, rhythm: Rhythm) -> None:
        self._files, self._rhythm = files, rhythm
        self._begun = time.monotonic()
        self._first: float | None = None
        self._saving: dict[str, list[float]] = {}
        self._evaluating: dict[int, list[float]] = {}
        self._last: tuple[int, float] = (0, 0.0)

    def look(self) -> bool:
        """To be called again and again while the run goes on; True at its last step."""
        now, step = time.monotonic(), self._files.last_step()
        if step and self._first is None:
            self._first = now
        if step != self._last[0]:
            self._last = (step, now)
        if name := self._files.being_written():
            self._saving.setdefault(name, [now, now])[1] = now
        is_measured = step and step % self._rhythm.eval_interval == 0
        if is_measured and self._files.last_evaluated() < step:
            self._evaluating.setdefault(step, [now, now])[1] = now
        return step == self._rhythm.steps

    def usual(self) -> Usual:
        def shortest_usual(spans: Sequence[list[float]]) -> float:
            lengths = sorted(end - begin for begin, end in spans)
            return lengths[len(lengths) // 2]

        assert self._first is not None, "the undisturbed run trained no step"
        paused = [*self._saving.values(), *self._evaluating.values()]
        trained = self._last[1] - self._first - sum(end - begin for begin, end in paused)
        return Usual(
            start=self._first - self._begun,
            step=trained / max(1, self._rhythm.steps - 1),
            save=shortest_usual(list(self._saving.values())),
            evaluation=shortest_usual(list(self._evaluating.values())),
        )


class Chaos:
    """One disturbed run.

    Args:
        launcher: the process of `llama_lib launch`, its output in `log`.
        nodes: hosts at work at a time.
    """

    def __init__(
        self,
        launcher: "subprocess.Popen[bytes]",
        log: Path,
        files: RunFiles,
        place: Place,
        usual: Usual,
        rhythm: Rhythm,
        nodes: int = 1,
    ) -> None:
        self._launcher, self._log = launcher, log
        self._files, self._place = files, place
        self._usual, self._rhythm, self._nodes = usual, rhythm, nodes
        self.kills: list[Kill] = []
        self._open: list[tuple[Kill, float]] = []  # not yet made up for, and when they were
        self._seen: set[int] = set()
        self._offset = 0
        self._start = usual.start  # the shortest so far, from an attempt's beginning to a step
        self._before: tuple[int, bool] | None = None
        self._begun = 0.0

    def run(self, draws: Sequence[Draw]) -> None:
        """Kill by each draw, then let the run come to its end."""
        queue = deque(draws)
        while queue:
            self._next_attempt()
            draw = queue.popleft()
            moment = self._reach(draw)
            self._kill(draw, moment)
            if moment != draw.moment:  # too late for the start: this one again, and earlier
                queue.appendleft(replace(draw, part=draw.part * _EARLIER))
        self._next_attempt()
        self._first_step()

    def finish(self) -> int:
        """The exit code of the launcher."""
        try:
            code = self._launcher.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"not done: {self._said()}") from None
        self._files.remember_losses()
        self._check_restarts()
        return code

    # -- moments ---------------------------------------------------------------------------------

    def _next_attempt(self) -> None:
        """Returns when the agents of all hosts of a new attempt are there."""
        self._await(lambda: len(self._new().agents) >= self._nodes, "no new attempt", 0.03)
        self._begun = time.monotonic()
        left_behind = self._files.note_leftovers()
        self._files.remember_losses()
        for kill, _ in self._open[-1:]:
            kill.left_behind = left_behind
            if kill.moment != START:
                # Ranks whose agent died may have had the time to save.
                kill.step_reached = self._files.last_step()
        self._before = self._files.identity()
        self._place.mend()

    def _check_restarts(self) -> None:
        """Every kill makes one new attempt, and nothing else does."""
        restarts = _RESTART.findall(self._log.read_text(errors="replace"))
        assert len(restarts) == len(self.kills), (
            f"{len(restarts)} restarts after {len(self.kills)} kills: {self._said()}"
        )

    def _new(self) -> Found:
        """Processes of the present attempt; an agent counts when both its processes are there."""
        found = self._place.find()
        agents = {
            host: [pid for pid in pids if pid not in self._seen]
            for host, pids in found.agents.items()
        }
        ranks = {rank: at for rank, at in found.ranks.items() if at[1] not in self._seen}
        return Found({host: pids for host, pids in agents.items() if len(pids) >= 2}, ranks)

    def _reach(self, draw: Draw) -> str:
        """Wait for the drawn moment; returns the moment it is."""
        if draw.moment == START:
            due = self._begun + draw.part * _SAFE_PART_OF_START * self._start
            self._await(lambda: time.monotonic() >= due or self._trains(), "no start")
            self._await(lambda: len(self._new().ranks) >= self._nodes, "no ranks")
            if not self._trains():
                return START
            self._first_step()
            return STEP
        resumed = self._first_step()
        reach = {STEP: self._reach_step, SAVE: self._reach_save, EVALUATION: self._reach_evaluation}
        reach[draw.moment](draw, resumed)
        return draw.moment

    def _reach_step(self, draw: Draw, resumed: int) -> None:
        step = resumed + draw.count
        while not self._rhythm.only_trains(step):
            step += 1
        self._await(partial(self._has_done, step), f"no step {step}")
        time.sleep(draw.part * self._usual.step)

    def _reach_save(self, draw: Draw, resumed: int) -> None:
        passed: set[str] = set()
        delay = draw.part * self._usual.save
        while True:
            name = self._await(self._writing_other_than(passed), "no save")
            passed.add(name)
            if len(passed) < draw.count:
                continue
            time.sleep(delay)
            if self._files.being_written() == name:
                return
            delay *= _EARLIER

    def _writing_other_than(self, passed: set[str]) -> Callable[[], str | None]:
        def look() -> str | None:
            name = self._files.being_written()
            return None if name in passed else name

        return look

    def _reach_evaluation(self, draw: Draw, resumed: int) -> None:
        interval = self._rhythm.eval_interval
        step = (resumed // interval + draw.count) * interval
        delay = draw.part * self._usual.evaluation
        while True:
            self._await(partial(self._has_done, step), f"no step {step}")
            time.sleep(delay)
            if self._files.last_step() == step and self._files.last_evaluated() < step:
                return
            step += interval
            delay *= _EARLIER

    def _has_done(self, step: int) -> bool:
        return self._files.last_step() >= step

    def _trains(self) -> bool:
        """Whether this attempt has done a step."""
        now = self._files.identity()
        replaced = now is not None and (
            self._before is None or now[0] != self._before[0] or self._before[1]
        )
        return replaced and self._files.last_step() > self._files.resumed_at(self._offset)

    def _first_step(self) -> int:
        """Wait for the first step of this attempt and close the notes of the kills before it."""
        self._await(self._trains, "no first step")
        now, resumed = time.monotonic(), self._files.resumed_at(self._offset)
        self._start = min(self._start, now - self._begun)
        for kill, when in self._open:
            kill.seconds = round(now - when, 2)
            kill.resumed_at = resumed
            kill.refused = self._files.refused(self._offset)
            if kill.step_reached is None:
                kill.step_reached = resumed
            kill.steps_lost = kill.step_reached - resumed
        self._open = []
        return resumed

    # -- kills -----------------------------------------------------------------------------------

    def _kill(self, draw: Draw, moment: str) -> None:
        self._check_restarts()
        found = self._new()
        self._seen |= found.pids
        target, strike = self._victim(draw, found)
        being_written, offset = self._files.being_written(), self._files.journal_size()
        assert self._launcher.poll() is None and len(found.ranks) >= self._nodes, (
            f"the attempt ended by itself: {self._said()}"
        )
        strike()
        when = time.monotonic()
        if not self._open:
            self._offset = offset
        kill = Kill(len(self.kills) + 1, moment, round(draw.part, 3), target, being_written)
        self.kills.append(kill)
        print(f"kill {kill.number}: {moment}, {target}", file=sys.stderr, flush=True)
        self._open.append((kill, when))

    def _victim(self, draw: Draw, found: Found) -> tuple[str, Callable[[], None]]:
        def choose(items: Sequence[Any]) -> Any:
            return items[int(draw.pick * len(items))]

        if draw.target == RANK:
            rank = choose(sorted(found.ranks))
            host, pid = found.ranks[rank]
            return f"rank {rank} on {host}", lambda: kill_process(pid)
        if draw.target == HOST:
            host = choose(sorted(found.agents))
            return f"host {host}", self._place.host_killer(host)
        assert draw.target == AGENT
        host, pid = choose(
            [(host, pid) for host in sorted(found.agents) for pid in sorted(found.agents[host])]
        )
        kind = "agent" if pid != min(found.agents[host]) else "guard of the agent"
        return f"{kind} on {host}", lambda: kill_process(pid)

    # -- waiting ---------------------------------------------------------------------------------

    def _await(self, look: Callable[[], Any], missing: str, pause: float = _LOOK_SECONDS) -> Any:
        deadline = time.monotonic() + ATTEMPT_SECONDS
        while not (found := look()):
            assert self._launcher.poll() is None, f"{missing}, the launcher ended: {self._said()}"
            assert time.monotonic() < deadline, f"{missing} in {ATTEMPT_SECONDS} s: {self._said()}"
            time.sleep(pause)
        return found

    def _said(self) -> str:
        notes = "\n".join(map(str, self.kills))
        return f"{self._log.read_text(errors='replace')[-20000:]}\n{notes}\nload {os.getloadavg()}"
