"""Which hosts and devices a run of several processes has, said once at its start.

Invariant: a line per host, or per kind of host where there are many.
"""

import torch

from llama_lib import coordination
from llama_lib.watch.roll_call import SHOWN_HOSTS, Crew, ranges, some


def topology(crew: Crew, device: torch.device) -> list[str]:
    """To be called by all processes; nothing for a single one."""
    if len(crew.members) == 1:
        return []
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return topology_lines(crew, coordination.gather(name))


def topology_lines(crew: Crew, devices: list[str]) -> list[str]:
    hosts = crew.hosts(range(len(crew.members)))
    lines = [f"{len(devices)} processes on {len(hosts)} host(s), which met at {crew.place}"]
    kinds: dict[str, list[str]] = {}
    for host, ranks in hosts.items():
        member = crew.members[ranks[0]]
        names = ", ".join(sorted({devices[rank] for rank in ranks}))
        kind = f"{len(ranks)} x {names}, interface {member.interface}"
        if member.chosen:
            kind += f", {member.chosen}"
        kinds.setdefault(kind, []).append(host)
        if len(hosts) <= SHOWN_HOSTS:
            lines.append(f"  {host}: {ranges(ranks)}, {kind} ({member.address})")
    if len(hosts) > SHOWN_HOSTS:
        lines += [f"  {some(names)}: {kind} each" for kind, names in kinds.items()]
    return lines
