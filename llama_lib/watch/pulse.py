"""Tells the other processes that this one is alive and what it gets done, and hears it of them.

Invariant: only the thread of the pulse waits for the network; everyone else reads what it last
heard, so nobody hangs on a link that is cut.
"""

from __future__ import annotations

import json
import threading
from typing import NamedTuple

from llama_lib import progress
from llama_lib.watch.meeting import open_store
from llama_lib.watch.roll_call import Crew

INTERVAL_SECONDS = 2.0
# So many processes can beat at this interval without the one store noticing; more beat slower.
_QUICK_PROCESSES = 512

# States of a process that others act on; the rest says how far its start is.
CLOSED, LEFT, ENDED, SPOKEN = "closed", "left", "ended", "spoken"


class Beat(NamedTuple):
    """What a process last said: the number of the beat, its step, its state, words to it."""

    number: int
    step: int
    state: str
    words: str


class Pulse:
    """The thread; what it heard is in its attributes.

    Attributes:
        exchanges: how often the store has answered.
        total: what all processes together got done.
        verdict: why the job ends; "" while it does not.
        beats: of every process by rank, where `listens`; else empty.
        is_broken: the store has gone, not only fallen silent.
    """

    def __init__(self, crew: Crew) -> None:
        assert crew.place is not None
        self._crew, self._told = crew, 0
        self._store = open_store(crew.place, is_server=False, seconds=INTERVAL_SECONDS * 5)
        self._keys = [f"pulse/{rank}" for rank in range(len(crew.members))]
        self._said = ("", "")
        self._proposed = ""
        self._wake, self._closing = threading.Event(), False
        self.interval = INTERVAL_SECONDS * max(1.0, len(crew.members) / _QUICK_PROCESSES)
        self.listens = crew.rank == 0
        self.exchanges = self.total = 0
        self.verdict = ""
        self.beats: list[Beat] = []
        self.is_broken = False
        self._thread = threading.Thread(target=self._run, name="pulse", daemon=True)
        self._thread.start()

    def say(self, state: str, words: str = "") -> None:
        """From now on, with an exchange at once."""
        self._said = (state, words)
        self._wake.set()

    def propose(self, verdict: str) -> None:
        """Let the job end for this reason, unless there is another already."""
        self._proposed = verdict
        self._wake.set()

    def close(self, seconds: float = 1.0) -> None:
        """Say the last words, if they can be said so soon."""
        self._closing = True
        self._wake.set()
        self._thread.join(seconds)

    def _run(self) -> None:
        while True:
            closing = self._closing  # before the exchange, which tells the last words
            try:
                self._exchange()
            except RuntimeError:  # torch's errors of the store
                self.is_broken = True
                return
            if closing:
                return
            self._wake.wait(self.interval)
            self._wake.clear()

    def _exchange(self) -> None:
        count = progress.count()
        total = self._store.add("progress", count - self._told)
        self._told = count
        beat = Beat(self.exchanges + 1, progress.step(), *self._said)
        self._store.set(self._keys[self._crew.rank], json.dumps(beat))
        # Sets nothing if there is a verdict, and nothing but "" without a proposal.
        verdict = self._store.compare_set("verdict", "", self._proposed)
        if self.listens:
            self.beats = [Beat(*json.loads(each)) for each in self._store.multi_get(self._keys)]
        self.total, self.verdict = total, verdict.decode()
        self.exchanges += 1
