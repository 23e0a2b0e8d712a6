"""Who is there: every process of a run comes to the meeting point before anything takes long.

Invariant: a process that does not come is named within --start_timeout, with its host where others
of that host came; nothing is asked of a run of one process.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

import torch.distributed as dist

from llama_lib.errors import JobError
from llama_lib.watch.meeting import REQUEST_SECONDS, Place, meeting_place, open_store, way_to

_POLL_SECONDS = 0.05

# More hosts than these are shown by what they have in common.
SHOWN_HOSTS = 8


@dataclass(frozen=True)
class Member:
    """A process as it introduces itself.

    `interface` leads to the meeting point, with `address`; `chosen` are the interfaces that
    NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME name there. `numbers` tells which processes of a host
    count alike: containers may begin anew.
    """

    rank: int
    host: str
    local_rank: int
    pid: int
    node: int
    interface: str
    address: str
    chosen: str
    numbers: str = ""


@dataclass(frozen=True)
class Crew:
    """All processes of a run, by rank, and this one's way to the others.

    Without a `store` (and with one member) for a run of one process.
    """

    members: list[Member]
    rank: int
    place: Place | None = None
    store: dist.Store | None = None

    @property
    def me(self) -> Member:
        return self.members[self.rank]

    def hosts(self, ranks: Iterable[int]) -> dict[str, list[int]]:
        """These ranks by host, in their order."""
        found: dict[str, list[int]] = {}
        for rank in sorted(ranks):
            found.setdefault(self.members[rank].host, []).append(rank)
        return found

    def named(self, ranks: Iterable[int]) -> str:
        """As in `ranks 0-3 (node1), rank 4 (node2)`."""
        return ", ".join(f"{ranges(own)} ({host})" for host, own in self.hosts(ranks).items())

    def ways(self) -> str:
        """The interfaces that lead to the meeting point, which may be the wrong ones."""
        found: dict[str, list[str]] = {}
        for host, own in self.hosts(range(len(self.members))).items():
            member = self.members[own[0]]
            way = " ".join(filter(None, [member.interface, member.chosen]))
            found.setdefault(way, []).append(host)
        return "; ".join(f"{way} on {some(hosts)}" for way, hosts in found.items())


def ranges(ranks: Sequence[int]) -> str:
    """`rank 3`, `ranks 0-3, 8`; ascending."""
    parts: list[list[int]] = []
    for rank in ranks:
        if parts and rank == parts[-1][1] + 1:
            parts[-1][1] = rank
        else:
            parts.append([rank, rank])
    shown = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}"


def some(names: Sequence[str]) -> str:
    """All names, or the first and last of many."""
    if len(names) <= SHOWN_HOSTS:
        return ", ".join(names)
    return f"{names[0]}, {names[1]} ... {names[-1]} ({len(names)} hosts)"


def call_roll(seconds: float) -> Crew:
    """Waits until every process of the run is there.

    Raises:
        JobError: some did not come in so many seconds, or this one does not reach the others.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    if world == 1:
        return alone()
    begin = time.monotonic()
    place, chosen = meeting_place(), _chosen()
    # Requests to a store behind a link that is cut end never.
    overdue = threading.Timer(seconds + REQUEST_SECONDS, _give_up, [place])
    overdue.daemon = True
    overdue.start()
    try:
        store = open_store(place, is_server=rank == 0, seconds=seconds)
        me = _introduction(rank, chosen, *way_to(place))
        store.set(f"member/{rank}", json.dumps(asdict(me)))
        store.set(f"pulse/{rank}", '[0, 0, "", ""]')
        come = store.add("come", 1)
        while come < world:
            if time.monotonic() - begin > seconds:
                raise JobError(absent_message(_present(store, world), world, seconds, place))
            time.sleep(_POLL_SECONDS)
            come = store.add("come", 0)
        if rank == 0:
            keys = [f"member/{each}" for each in range(world)]
            found = [json.loads(value) for value in store.multi_get(keys)]
            store.set("members", json.dumps(found))
        members = [Member(**each) for each in json.loads(store.get("members"))]
    except RuntimeError as error:
        raise JobError(
            f"the meeting point {place} (MASTER_ADDR:MASTER_PORT) was lost while the processes "
            f"gathered: process 0 has ended, its output says why ({str(error).splitlines()[0]})."
        ) from None
    finally:
        overdue.cancel()
    return Crew(members, rank, place, store)


def alone() -> Crew:
    """The crew of a run of one process."""
    return Crew([_introduction(0, "", "?", "?")], 0)


def _give_up(place: Place) -> None:
    text = f"the meeting point {place} does not answer any more: is the network down?\n"
    os.write(2, text.encode())
    os._exit(1)


def _chosen() -> str:
    variables = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")
    return " ".join(f"{name}={os.environ[name]}" for name in variables if os.environ.get(name))


def _introduction(rank: int, chosen: str, interface: str, address: str) -> Member:
    return Member(
        rank,
        socket.gethostname(),
        int(os.environ.get("LOCAL_RANK", "0")),
        os.getpid(),
        int(os.environ.get("GROUP_RANK", "-1")),
        interface,
        address,
        chosen,
        _numbers(),
    )


def _numbers() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _present(store: dist.Store, world: int) -> list[Member]:
    present = [rank for rank in range(world) if store.check([f"member/{rank}"])]
    values = store.multi_get([f"member/{rank}" for rank in present])
    return [Member(**json.loads(value)) for value in values]


def absent_message(present: list[Member], world: int, seconds: float, place: Place) -> str:
    """Who is missing, which hosts they belong to as far as known, who is there and how."""
    absent = sorted(set(range(world)) - {member.rank for member in present})
    size = int(os.environ.get("LOCAL_WORLD_SIZE", "0"))
    # Launchers number the processes host by host, so a host is known by any of its processes.
    hosts = {member.rank // size: member.host for member in present} if size else {}
    by_host: dict[str, list[int]] = {}
    unknown: dict[int, list[int]] = {}
    for rank in absent:
        node = rank // size if size else 0
        if node in hosts:
            by_host.setdefault(hosts[node], []).append(rank)
        else:
            unknown.setdefault(node, []).append(rank)
    lines = [
        f"{len(absent)} of {world} processes did not come to the meeting point {place} in "
        f"{seconds:.0f} s (--start_timeout):"
    ]
    lines += [
        f"  {ranges(ranks)} of {host}: the output of that host says why"
        for host, ranks in by_host.items()
    ]
    lines += [
        f"  {ranges(ranks)}: no process of that host came (host {node + 1} of the host file)"
        if size
        else f"  {ranges(ranks)}"
        for node, ranks in unknown.items()
    ]
    came: dict[str, list[int]] = {}
    for member in present:
        came.setdefault(f"{member.host} by {member.interface} ({member.address})", []).append(
            member.rank
        )
    shown = [f"{ranges(ranks)} of {where}" for where, ranks in came.items()]
    if len(shown) > SHOWN_HOSTS:
        shown = [*shown[:SHOWN_HOSTS], f"{len(shown) - SHOWN_HOSTS} more hosts"]
    lines.append(f"  there are {'; '.join(shown)}")
    lines.append(
        "Were they started, and do their hosts reach the meeting point? `python -m llama_lib "
        "doctor --hostfile FILE` checks both. If they only start slowly, raise --start_timeout."
    )
    return "\n".join(lines)
