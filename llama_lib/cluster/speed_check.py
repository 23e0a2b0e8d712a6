"""Has all hosts measure themselves and each other at the same time, and names the slow ones.

Invariant: ends within its deadline whatever the hosts do, and says then which had not arrived.
"""

import json
import queue
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llama_lib.cluster.problem import Problem
from llama_lib.cluster.remote import Host, HostError, in_parallel, start

# Importing torch for the first time from a network file system takes a minute: chosen above that.
DEADLINE_SECONDS = 120
# Chosen: beyond what equal hosts were seen to differ by, and worth a look in any case.
SLOW_SHARE = 0.7
# Chosen lower: a cable that has fallen back to a lesser speed has a tenth, and two good ones on
# busy hosts were seen to differ by a third.
SLOW_LINK_SHARE = 0.5
# Ten times a host's own beat: chosen.
SILENT_SECONDS = 20.0
# After a first failure: the others often say more clearly why.
_LAST_WORDS_SECONDS = 3.0


@dataclass
class Speeds:
    """What the processes said; the lists by rank are as long as the job has processes.

    Attributes:
        matmul: TFLOPS of each process.
        all_reduce: GB/s of each process over the slowest connection.
        links: GB/s that the first process of each host received from the host before.
        failures: (host, what) of those that did not come to their end.
    """

    hosts: list[str]
    per_host: int
    matmul: dict[int, float] = field(default_factory=dict)
    all_reduce: dict[int, float] = field(default_factory=dict)
    links: dict[int, float] = field(default_factory=dict)
    failures: list[tuple[str, str]] = field(default_factory=list)

    def host_of(self, rank: int) -> str:
        return self.hosts[rank // self.per_host]


def measure(
    hosts: Sequence[Host],
    per_host: int,
    port: int,
    root: str,
    environment: Mapping[str, str],
    on_gpu: bool,
    installation: bool = False,
    seconds: int = DEADLINE_SECONDS,
) -> Speeds:
    """Measure `hosts`; with `installation` the processes are started as a run starts them."""
    speeds = Speeds([host.name for host in hosts], per_host)
    heard: queue.SimpleQueue[tuple[int, bytes | None]] = queue.SimpleQueue()
    channels: dict[int, Any] = {}
    job = {
        "world": len(hosts) * per_host,
        "hosts": len(hosts),
        "processes": per_host,
        "master": hosts[0].name if len(hosts) > 1 else "127.0.0.1",
        "port": port,
        "seconds": seconds,
        "environment": dict(environment),
        "on_gpu": on_gpu,
        "installation": installation,
    }

    def begin(number: int) -> None:
        try:
            program = [sys.executable, "-m", "llama_lib.cluster.speed"]
            channel = start(hosts[number], program, root)
            channels[number] = channel
            channel.receive(lambda line: heard.put((number, line)))
            line = json.dumps({**job, "first_rank": number * per_host})
            channel.send(line.encode() + b"\n")
        except HostError as error:
            speeds.failures.append((hosts[number].name, error.what))
        except OSError as error:
            speeds.failures.append((hosts[number].name, f"the connection ended ({error})"))

    try:
        in_parallel(begin, range(len(hosts)))
        _listen(speeds, heard, channels, seconds)
    finally:
        in_parallel(lambda channel: channel.close(), list(channels.values()))
    return speeds


def _listen(
    speeds: Speeds,
    heard: "queue.SimpleQueue[tuple[int, bytes | None]]",
    channels: Mapping[int, Any],
    seconds: int,
) -> None:
    """Take in what the processes say until all are done, one has failed, or the time is over."""
    joined: set[int] = set()
    done: set[int] = set()
    world = len(speeds.hosts) * speeds.per_host
    if speeds.failures:
        return
    deadline = time.monotonic() + seconds
    last_sign = dict.fromkeys(channels, time.monotonic())
    while len(done) < world:
        oldest = min(last_sign.values(), default=deadline)
        until = min(deadline, oldest + SILENT_SECONDS)
        try:
            number, line = heard.get(timeout=max(0.0, until - time.monotonic()))
        except queue.Empty:
            if until < deadline and not speeds.failures:
                what = f"no sign of it for {SILENT_SECONDS:.0f} s: the connection to it is lost"
                speeds.failures += [
                    (speeds.hosts[number], what)
                    for number, when in last_sign.items()
                    if when == oldest
                ]
            break
        last_sign[number] = time.monotonic()
        if line is None:
            del last_sign[number]
            ranks = range(number * speeds.per_host, (number + 1) * speeds.per_host)
            if done.issuperset(ranks) or speeds.failures:
                continue
            said = channels[number].errors().strip().splitlines()
            why = said[-1] if said else "without a word"
            speeds.failures.append((speeds.hosts[number], f"its processes ended early ({why})"))
        else:
            message = _message(line)
            rank = message.get("rank", -1)
            if message.get("stage") == "joined":
                joined.add(rank)
            elif message.get("stage") == "done":
                done.add(rank)
            for kind in ("matmul", "all_reduce"):
                if kind in message:
                    getattr(speeds, kind)[rank] = message[kind]
            if message.get("link") is not None:
                speeds.links[rank // speeds.per_host] = message["link"]
            if "error" in message:
                speeds.failures.append((speeds.hosts[number], message["error"]))
        if speeds.failures:
            deadline = min(deadline, time.monotonic() + _LAST_WORDS_SECONDS)
    if len(done) == world or speeds.failures:
        return
    behind = [
        rank for rank in range(world) if rank not in (done if len(joined) == world else joined)
    ]
    what = "came to no end" if len(joined) == world else "did not join the others"
    for host in dict.fromkeys(speeds.host_of(rank) for rank in behind):
        ranks_there = [rank for rank in behind if speeds.host_of(rank) == host]
        named = f"rank{'s' if len(ranks_there) > 1 else ''} {', '.join(map(str, ranks_there))}"
        speeds.failures.append((host, f"{named} {what} within {seconds} s"))


def _message(line: bytes) -> dict[str, Any]:
    """What a process said; empty for a line that some library printed."""
    try:
        message = json.loads(line)
    except ValueError:
        return {}
    return message if isinstance(message, dict) and "rank" in message else {}


def slow_ones(speeds: Speeds, on_gpu: bool) -> list[Problem]:
    """Processes far slower than most, and hosts with slow connections, with the numbers."""
    found = [
        Problem(host, "speed", "failed", what, "mend what it names; or pass --no-speed")
        for host, what in speeds.failures
    ]
    if len(speeds.matmul) > 1:
        usual = statistics.median(speeds.matmul.values())
        for rank, speed in sorted(speeds.matmul.items()):
            if speed >= SLOW_SHARE * usual:
                continue
            which = f"GPU {rank % speeds.per_host}" if on_gpu else f"process {rank}"
            what = (
                f"{which} is slow: matmul {_rate(speed)}, median {_rate(usual)} "
                f"({speed / usual:.0%}, expected {SLOW_SHARE:.0%} or more)"
            )
            mend = (
                "`nvidia-smi -q -d PERFORMANCE` there shows heat and power limits"
                if on_gpu
                else "`top` there shows what else runs; a limit of a container counts too"
            )
            found.append(Problem(speeds.host_of(rank), "speed", f"{speed / usual:.0%}", what, mend))
    slow_already = {problem.host for problem in found}
    return found + [problem for problem in _slow_links(speeds) if problem.host not in slow_already]


def _slow_links(speeds: Speeds) -> list[Problem]:
    """Hosts both of whose connections are slow: of a slow one with a good neighbour, that is it."""
    count = len(speeds.hosts)
    if len(speeds.links) < count or count < 3:
        return []
    usual = statistics.median(speeds.links.values())
    found = []
    for number, name in enumerate(speeds.hosts):
        best = max(speeds.links[number], speeds.links[(number + 1) % count])
        if best >= SLOW_LINK_SHARE * usual:
            continue
        what = (
            f"slow connection: {best:.3g} GB/s at best, median {usual:.3g} "
            f"({best / usual:.0%}, expected {SLOW_LINK_SHARE:.0%} or more)"
        )
        mend = "`ethtool INTERFACE` there shows its speed; look at cable, port and interface"
        found.append(Problem(name, "speed", "slow network", what, mend))
    return found


def speed_lines(speeds: Speeds, on_gpu: bool) -> list[str]:
    """What was measured, in one line each."""
    lines = []
    if speeds.matmul:
        values = sorted(speeds.matmul.values())
        what = "bfloat16 matmul per GPU" if on_gpu else "float32 matmul per process"
        lines.append(
            f"{what}: {_rate(values[0])} to {_rate(values[-1])}, "
            f"median {_rate(statistics.median(values))}"
        )
    if speeds.all_reduce:
        world, hosts = len(speeds.hosts) * speeds.per_host, len(speeds.hosts)
        lines.append(
            f"all-reduce over {world} processes on {hosts} host(s): "
            f"{min(speeds.all_reduce.values()):.3g} GB/s (bus bandwidth)"
        )
    return lines


def _rate(tflops: float) -> str:
    return f"{tflops:.3g} TFLOPS" if tflops >= 1 else f"{1000 * tflops:.3g} GFLOPS"
