"""What the launcher and the agents on the hosts say to each other, one JSON object per line.

Invariant: each side hears the other at least every `BEAT_SECONDS`, or takes it for lost after
`HOST_LOST_SECONDS`: a cut cable says nothing.

To an agent: `job` (what to run), `go`, `signal` N (for its workers), `stop` SECONDS (end them:
SIGTERM, after that time SIGKILL), `beat`. From an agent: `hello`, `ready` or `problem`, `out`,
`end` (of a worker), `ending` (everything, and why), `beat`.
"""

import json
from typing import Any

VERSION = 1
# The variable by which every process of a job knows it, whoever started it.
RUN_ID = "TORCHELASTIC_RUN_ID"
BEAT_SECONDS = 2.0
HOST_LOST_SECONDS = 20.0
# From SIGTERM to SIGKILL: the time in which the ranks agree on a signal (control.ANSWER_SECONDS).
GRACE_SECONDS = 10.0
# What a worker cannot be woken from even by SIGKILL, as a dead network disk, is given up on.
STUCK_SECONDS = 10.0

Message = dict[str, Any]


def encode(message: Message) -> bytes:
    return json.dumps(message).encode() + b"\n"


def decode(line: bytes) -> Message:
    """One message.

    Raises:
        ValueError: the line is none.
    """
    message = json.loads(line)
    if not isinstance(message, dict):
        raise ValueError(f"not a message: {line[:80]!r}")
    return message


def find_hello(line: bytes) -> Message | None:
    """The hello of an agent; None for whatever else the login shell of a host prints first."""
    start = line.find(b'{"hello"')
    if start < 0:
        return None
    try:
        return decode(line[start:])
    except ValueError:
        return None
