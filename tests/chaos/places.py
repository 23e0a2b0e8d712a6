"""Where a launched run lives: its agents and ranks on every host, and how one of them dies.

Invariant: only descendants of the launcher, or processes of a test host, are ever killed.
"""

import contextlib
import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from llama_lib.cluster.processes import descendants
from tests.cluster.hosts import Cluster

_AGENT = b"llama_lib.cluster.agent"


@dataclass(frozen=True)
class Found:
    """The processes of one attempt that are there; hosts by name, process ids as seen here."""

    agents: dict[str, list[int]] = field(default_factory=dict)
    ranks: dict[int, tuple[str, int]] = field(default_factory=dict)

    @property
    def pids(self) -> set[int]:
        agents = {pid for pids in self.agents.values() for pid in pids}
        return agents | {pid for _, pid in self.ranks.values()}


def _read(pid: int, name: str) -> bytes:
    try:
        with open(f"/proc/{pid}/{name}", "rb") as file:
            return file.read()
    except OSError:
        return b""  # it has just ended


def _rank_of(pid: int) -> int | None:
    for variable in _read(pid, "environ").split(b"\0"):
        if variable.startswith(b"RANK="):
            return int(variable.removeprefix(b"RANK="))
    return None


def _parent_of(pid: int) -> int:
    stat = _read(pid, "stat").rpartition(b")")[2].split()
    return int(stat[1]) if stat else 0


def _in_namespace_of(first: int) -> list[int]:
    """All processes of a test host, also those that were started in it from outside."""

    def namespace(pid: int | str) -> str:
        try:
            return os.readlink(f"/proc/{pid}/ns/pid")
        except OSError:
            return ""  # it has just ended

    own = namespace(first)
    return [
        int(pid) for pid in os.listdir("/proc") if pid.isdigit() and own == namespace(pid) != ""
    ]


def _look_at(host: str, pids: Sequence[int], script: str, found: Found) -> None:
    """Add the agents and ranks among the processes to `found`."""
    commands = {pid: _read(pid, "cmdline").split(b"\0") for pid in pids}
    agents = [pid for pid, words in commands.items() if _AGENT in words]
    if agents:
        found.agents[host] = agents
    for pid, words in commands.items():
        if any(word.endswith(script.encode()) for word in words) and _parent_of(pid) in agents:
            rank = _rank_of(pid)
            if rank is not None:
                found.ranks[rank] = (host, pid)


def kill_process(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


class OneHost:
    """A run whose launcher and ranks are on this machine, below process `launcher`."""

    def __init__(self, launcher: int, script: str) -> None:
        self._launcher, self._script = launcher, script

    def find(self) -> Found:
        found = Found()
        _look_at("this host", descendants(self._launcher), self._script, found)
        return found

    def host_killer(self, name: str) -> Callable[[], None]:
        raise NotImplementedError(f"{name} runs the tests as well")

    def mend(self) -> None:
        """Nothing here is ever broken for longer."""

    def everything_left(self) -> list[str]:
        return _commands(self.find().pids)


class TestHosts:
    """A run on the hosts of a cluster; its launcher may be on a further one."""

    __test__ = False  # its name says whose hosts they are

    def __init__(self, cluster: Cluster, script: str) -> None:
        self.cluster, self._script = cluster, script
        self._dead: list[int] = []

    def find(self) -> Found:
        """Of the hosts that live."""
        found = Found()
        for index, host in enumerate(self.cluster.hosts):
            if index not in self._dead:
                _look_at(host.name, _in_namespace_of(host.first), self._script, found)
        return found

    def host_killer(self, name: str) -> Callable[[], None]:
        index = self.cluster.names.index(name)

        def kill() -> None:
            self._dead.append(index)
            self.cluster.kill(index)

        return kill

    def mend(self) -> None:
        """Start every host again that was killed."""
        while self._dead:
            self.cluster.revive(self._dead[-1])
            self._dead.pop()

    def everything_left(self) -> list[str]:
        return _commands(self.find().pids)


Place = OneHost | TestHosts


def _commands(pids: set[int]) -> list[str]:
    return [_read(pid, "cmdline").replace(b"\0", b" ").decode() for pid in sorted(pids)]
