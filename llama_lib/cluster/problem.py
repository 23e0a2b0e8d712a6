"""A fault of one host, and what all hosts of a job are held against.

Invariant: data alone; nothing here asks or judges.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llama_lib.cluster.examination import Examined, Questions


@dataclass(frozen=True)
class Problem:
    """One fault of one host.

    `short` is for the table; in `mend` the text {host} stands for the host's name.
    """

    host: str
    check: str
    short: str
    what: str
    mend: str


@dataclass(frozen=True)
class Job:
    """What the hosts are held against.

    Attributes:
        here: the answers of the machine that starts the job.
        processes: per host; None where nobody said.
        checkpoint_bytes: None where the model is not known.
        environment: variables of the starting host, which all processes are given.
    """

    here: Examined
    hosts: Sequence[Examined]
    questions: Questions
    processes: int | None
    checkpoint_bytes: int | None
    environment: Mapping[str, str]

    def per_host(self) -> int:
        return self.processes or max(1, self.usual_gpus())

    def usual_gpus(self) -> int:
        counts = [len(each.facts["gpus"]) for each in self.hosts if each.facts.get("gpus")]
        return Counter(counts).most_common(1)[0][0] if counts else 0


def some(names: Sequence[str]) -> str:
    shown = ", ".join(sorted(names)[:2])
    return shown if len(names) < 3 else f"{shown} and {len(names) - 2} more"
