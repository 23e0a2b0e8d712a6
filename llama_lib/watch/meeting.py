"""The store in which the processes of a run find each other: a server at MASTER_ADDR:MASTER_PORT.

Invariant: whatever keeps this process from it is said in one message with the address and the
mend; every start of a job has keys of its own.
"""

import errno
import os
import socket
import time
from datetime import timedelta
from typing import NamedTuple

import psutil
import torch.distributed as dist

from llama_lib.errors import JobError, UserError
from llama_lib.launch import keep_to_this_host

# One attempt to connect; a host that drops packets would hold the first one for minutes.
ATTEMPT_SECONDS = 5.0
_PAUSE_SECONDS = 0.2

# For requests that wait for a key. What waits long asks again and again instead.
REQUEST_SECONDS = 30.0


class Place(NamedTuple):
    """Where the processes meet."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


def meeting_place() -> Place:
    """As the launcher names it.

    Raises:
        UserError: nobody named it, although there are several processes.
    """
    try:
        return Place(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    except (KeyError, ValueError):
        raise UserError(
            f"WORLD_SIZE is {os.environ.get('WORLD_SIZE')}, but MASTER_ADDR and MASTER_PORT do not "
            "say where the processes meet: start them with python -m llama_lib launch or torchrun."
        ) from None


def open_store(place: Place, is_server: bool, seconds: float) -> dist.Store:
    """A client of its own to the store; with `is_server` the store itself too, if nobody has it.

    torch keeps one server per port and process, so the process group later shares this one. Under
    torchrun the server is torchrun's, which outlives a restart: hence the prefix.

    Raises:
        JobError: it was not reached in so many seconds.
    """
    own = is_server and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if not own:
        _wait_for(place, seconds)
    try:
        if own:
            keep_to_this_host()
        store = dist.TCPStore(
            place.host,
            place.port,
            is_master=own,
            timeout=timedelta(seconds=REQUEST_SECONDS),
            wait_for_workers=False,
            multi_tenant=True,
        )
    except (RuntimeError, OSError) as error:
        raise JobError(_not_opened(place, error)) from None
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"llama_lib/{attempt}", store)


def _wait_for(place: Place, seconds: float) -> None:
    """Until somebody listens there. torch would wait too, but would not say why it waits."""
    deadline = time.monotonic() + seconds
    while True:
        left = deadline - time.monotonic()
        try:
            socket.create_connection(place, min(ATTEMPT_SECONDS, max(left, 0.1))).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise JobError(_not_reached(place, seconds, error)) from None
        time.sleep(_PAUSE_SECONDS)


def _not_reached(place: Place, seconds: float, error: OSError) -> str:
    who = f"process {os.environ['RANK']} on {socket.gethostname()}"
    if isinstance(error, socket.gaierror):
        cause = f"the name {place.host} is unknown here; give an address, or add it to /etc/hosts"
    elif error.errno == errno.ECONNREFUSED:
        cause = (
            f"{place.host} answers, but nothing listens on port {place.port}: process 0 has not "
            "started or has ended; its output says why"
        )
    elif isinstance(error, TimeoutError):
        cause = "no answer at all; is the address right, and does a firewall let the port through?"
    else:
        cause = f"{error.strerror or error}; is there a way from this host to that one?"
    return (
        f"{who} did not reach the meeting point {place} (MASTER_ADDR:MASTER_PORT) in "
        f"{seconds:.0f} s (--start_timeout): {cause}. `python -m llama_lib doctor --hostfile FILE` "
        "checks the hosts."
    )


def _not_opened(place: Place, error: RuntimeError | OSError) -> str:
    words = str(error).splitlines()[0]
    if "EADDRINUSE" in str(error) or getattr(error, "errno", None) == errno.EADDRINUSE:
        return (
            f"port {place.port} of {place.host} is in use by another program, perhaps an earlier "
            f"run: choose another --master_port, as in --master_port {place.port + 1}."
        )
    return f"the meeting point {place} (MASTER_ADDR:MASTER_PORT) cannot be used: {words}"


def way_to(place: Place) -> tuple[str, str]:
    """(interface, address) of this host that lead to the meeting place; "?" for what is unknown."""
    try:
        with socket.create_connection(place, ATTEMPT_SECONDS) as probe:
            address = str(probe.getsockname()[0])
    except OSError:
        return "?", "?"
    plain = address.removeprefix("::ffff:")
    for interface, addresses in psutil.net_if_addrs().items():
        if any(each.address.partition("%")[0] in (address, plain) for each in addresses):
            return interface, plain
    return "?", plain
