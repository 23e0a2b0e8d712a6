"""Judges what the hosts of a job answered: every fault with what was found and what mends it.

Invariant: functions of the answers alone; a check whose facts are absent says nothing here, and
its cell of the table says that it was not made.
"""

from llama_lib.cluster import network_checks, room_checks, software_checks
from llama_lib.cluster.examination import Examined
from llama_lib.cluster.problem import Job, Problem

# Columns of the table.
CHECKS = (
    "ssh",
    "code",
    "python",
    "packages",
    "gpus",
    "port",
    "clock",
    "network",
    "save_dir",
    "disk",
    "memory",
)
_CHECKING = (
    software_checks.code,
    software_checks.python,
    software_checks.packages,
    room_checks.gpus,
    network_checks.port,
    network_checks.clock,
    network_checks.network,
    room_checks.save_dir,
    room_checks.disk,
    room_checks.memory,
)
# Facts without which a check says nothing; the others' absence is a fault that their check names.
_CHECK_OF = {
    "packages": "packages",
    "own_address": "network",
    "interfaces": "network",
    "disks": "disk",
    "memory": "memory",
    "shm": "memory",
}
# For the cell of the table, by what the message of the connection has in it.
_SSH_WORDS = {
    "login": "login failed",
    "no way": "unreachable",
    "no answer": "no answer",
    "means nothing": "unknown name",
    "port is closed": "port closed",
    "host key": "host key",
}


def problems_of(each: Examined, job: Job) -> list[Problem]:
    """All faults of one host."""
    if each.failure is not None and not each.facts:
        return [_ssh_problem(each)]
    found = [] if each.failure is None else [_ssh_problem(each)]
    for fact, error in each.facts.get("errors", {}).items():
        if fact in _CHECK_OF:
            what = f"its {fact} could not be looked at ({error})"
            mend = "try the same by hand there, as the same user"
            found.append(Problem(each.host.name, _CHECK_OF[fact], "not readable", what, mend))
    for check in _CHECKING:
        found += check(each, job)
    return found


def not_made(each: Examined, job: Job) -> set[str]:
    """Checks that could not be made or mean nothing on this host."""
    if not each.facts:
        return {*CHECKS} - {"ssh"}
    absent = {"port"} if each.port is None else set()
    if not each.facts.get("python_found"):
        absent.add("packages")
    if each.sees is None and each.token_error is None:
        absent.add("save_dir")
    return absent


def _ssh_problem(each: Examined) -> Problem:
    assert each.failure is not None
    what = each.failure.what
    short = next((short for words, short in _SSH_WORDS.items() if words in what), "failed")
    return Problem(each.host.name, "ssh", short, what, each.failure.mend)
