"""How a host meets the others: the port of the first host, the clock, names and interfaces.

Invariant: what is said about names and interfaces is what would end the run later, in
llama_lib.launch.network_problems or in gloo's and NCCL's own search.
"""

import ipaddress
import statistics
from collections.abc import Sequence

from llama_lib.cluster.examination import Examined
from llama_lib.cluster.problem import Job, Problem

# Chosen: file times and logs of several hosts can be compared, and nothing in a job waits longer.
CLOCK_SECONDS = 2.0


def port(each: Examined, job: Job) -> list[Problem]:
    if each.port is None or each.port["free"]:
        return []
    number, holder = job.questions.port, each.port["holder"]
    by = f"{holder} has it" if holder else f"{each.port['why']}; whose it is cannot be seen"
    what = f"port {number} is not free ({by})"
    mend = f"end that, or pass --master_port {number + 1} here and to launch"
    return [Problem(each.host.name, "port", f"{number} taken", what, mend)]


def clock(each: Examined, job: Job) -> list[Problem]:
    known = [other.offset for other in job.hosts if other.offset is not None]
    if each.offset is None:
        return []
    # Two clocks cannot outvote each other: there the starting host's counts as right.
    right = statistics.median(known) if len(known) > 2 else 0.0
    wrong = each.offset - right
    if abs(wrong) <= CLOCK_SECONDS:
        return []
    than = "that of most hosts" if len(known) > 2 else "the starting host's"
    what = (
        f"its clock is {abs(wrong):.1f} s {'ahead of' if wrong > 0 else 'behind'} {than}, "
        f"expected within {CLOCK_SECONDS:.0f} s"
    )
    mend = "start its time service (timedatectl set-ntp true, or chronyd)"
    return [Problem(each.host.name, "clock", f"{wrong:+.0f} s", what, mend)]


def network(each: Examined, job: Job) -> list[Problem]:
    # Also a run on one host opens the interface that it is told to.
    found = _meeting(each, job) if len(job.hosts) > 1 else []
    return found + _wanted_interfaces(each, job)


def _meeting(each: Examined, job: Job) -> list[Problem]:
    """What keeps this host from the others."""
    name, first = each.host.name, job.hosts[0].host.name
    found = []

    def add(short: str, what: str, mend: str) -> None:
        found.append(Problem(name, "network", short, what, mend))

    towards, is_first = each.facts.get("towards"), name == first
    if is_first:
        pass  # The way to itself says nothing.
    elif towards is None:
        said = each.facts.get("errors", {}).get("towards", "no answer")
        add("no way", f"no way to {first} ({said})", f"make {first} known and reachable there")
    elif ipaddress.ip_address(towards["address"]).is_loopback:
        what = f"{first} means {towards['address']} there, which is that host itself"
        add(f"{first} is loopback", what, f"give {first} its network address in /etc/hosts there")
    elif each.unreachable:
        port = job.questions.port
        what = f"no connection to {first} port {port} ({each.unreachable})"
        add("port blocked", what, f"open the ports of {first} for the hosts in its firewall")

    # As in llama_lib.launch.network_problems, which would end the run.
    own = each.facts.get("own_address")
    own_name = each.facts.get("name")
    if not job.environment.get("GLOO_SOCKET_IFNAME") and (
        own is None or ipaddress.ip_address(own).is_loopback
    ):
        meaning = "has no address of its own there" if own is None else f"means {own} there"
        add(
            "name is loopback" if own else "name unknown",
            f"its name, {own_name}, {meaning}, so the other hosts cannot reach it",
            "set GLOO_SOCKET_IFNAME to the interface that leads to them, here: it is handed on"
            + (f" ({towards['interface']} there)" if towards and not is_first else "")
            + f"; or give {own_name} its network address in /etc/hosts there",
        )
    return found


def _wanted_interfaces(each: Examined, job: Job) -> list[Problem]:
    """Interfaces that the variables of the job name, and this host lacks."""
    interfaces = each.facts.get("interfaces")
    if interfaces is None:
        return []
    found = []
    usable = [key for key, addresses in interfaces.items() if addresses]
    for variable, missing_of in (
        ("GLOO_SOCKET_IFNAME", _gloo_lacks),
        ("NCCL_SOCKET_IFNAME", _nccl_lacks),
    ):
        value = job.environment.get(variable, "")
        if not value or not (missing := missing_of(value, usable)):
            continue
        bare = [word for word in missing if word in interfaces]
        kind = "no address on interface" if bare == missing else "no interface"
        what = (
            f"has {kind} {', '.join(missing)}; it has {', '.join(usable)} ({variable} is {value})"
        )
        mend = f"set {variable} to what all hosts have, or unset it"
        found.append(Problem(each.host.name, "network", f"no {value}", what, mend))
    return found


def _gloo_lacks(value: str, names: Sequence[str]) -> list[str]:
    """gloo opens every interface of the list, by its whole name."""
    return [word for word in value.split(",") if word and word not in names]


def _nccl_lacks(value: str, names: Sequence[str]) -> list[str]:
    """NCCL takes what fits any word: beginnings, whole names after =, all others after ^.

    Returns the words if nothing is left to take; a word may name a port, which is not looked at.
    """
    excludes = value.startswith("^")
    rest = value.removeprefix("^")
    whole = rest.startswith("=")
    words = [word.split(":")[0] for word in rest.removeprefix("=").split(",") if word]
    fits = [
        any(name == word if whole else name.startswith(word) for word in words) for name in names
    ]
    if not all(fits) if excludes else any(fits):
        return []
    return [f"other than {', '.join(words)}"] if excludes else words
