"""The launcher's side of the contact with one host's agent.

Invariant: the agent hears from the launcher from the moment it runs, and a host that is silent for
`HOST_LOST_SECONDS` is known to be, however busy the launcher's own output is.
"""

import os
import queue
import sys
import threading
import time
from contextlib import suppress
from typing import TypeAlias

import llama_lib
from llama_lib.cluster import remote
from llama_lib.cluster.protocol import (
    BEAT_SECONDS,
    HOST_LOST_SECONDS,
    RUN_ID,
    VERSION,
    Message,
    decode,
    encode,
    find_hello,
)
from llama_lib.cluster.remote import Host, HostError

# From a login to the agent's first word: a shell's start files and Python, perhaps from a network
# disk. Chosen.
HELLO_SECONDS = 20.0
_AGENT = "llama_lib.cluster.agent"
_PROCESSES = "llama_lib.cluster.processes"

Events: TypeAlias = "queue.SimpleQueue[tuple[Link, Message | None]]"


def project_folder() -> str:
    """Where llama_lib lies, by the name it was started by: other hosts may know no other."""
    return os.path.dirname(os.path.dirname(os.path.abspath(llama_lib.__file__)))


def _python(host: Host, module: str, *words: str) -> list[str]:
    """A module of ours as a command on a host."""
    command = [sys.executable, "-m", module, *words]
    # Python itself may need this one, where its libraries lie in a folder of their own.
    libraries = os.environ.get("LD_LIBRARY_PATH")
    if libraries and not host.is_local:
        return ["env", f"LD_LIBRARY_PATH={libraries}", *command]
    return command


class Link:
    """An agent that has said hello.

    Args:
        host: where it runs.
        events: gets (link, message) for each of its messages, and (link, None) at its end.

    Raises:
        HostError: none could be started there.
    """

    def __init__(self, host: Host, events: Events) -> None:
        self.host = host
        self._events = events
        self._heard = time.monotonic()
        self._is_closed = False
        self._hello: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self._has_greeted = False
        self._channel = remote.start(host, _python(host, _AGENT), project_folder())
        self._channel.receive(self._receive)
        threading.Thread(target=self._beat, daemon=True).start()
        try:
            self.hello = self._greeting()
        except HostError:
            self._give_up()
            raise

    @property
    def is_silent(self) -> bool:
        return time.monotonic() - self._heard > HOST_LOST_SECONDS

    def send(self, message: Message) -> None:
        """Tell the agent; one that is gone is found out by its silence."""
        with suppress(OSError):
            self._channel.send(encode(message))

    def errors(self) -> str:
        """The last of what the agent and its shell said on standard error."""
        return self._channel.errors()

    def end(self) -> None:
        """Nothing more is wanted: the agent ends what it still has, and itself."""
        self._is_closed = True
        self._channel.end_input()

    def close(self, seconds: float) -> bool:
        """Wait for the agent's end for some time; returns whether it came."""
        ended = self._channel.wait(seconds) is not None
        self._give_up()
        return ended

    def sweep(self, run_id: str) -> None:
        """End what is left of a job on a host whose agent was killed, both halves of it."""
        with suppress(HostError):
            command = _python(self.host, _PROCESSES, RUN_ID, run_id)
            remote.run(self.host, command, project_folder(), timeout=HELLO_SECONDS)

    def _give_up(self) -> None:
        self._is_closed = True
        self._channel.close()

    def _receive(self, line: bytes | None) -> None:
        self._heard = time.monotonic()
        if not self._has_greeted:
            hello = None if line is None else find_hello(line)
            if hello is not None or line is None:
                self._has_greeted = True
                self._hello.put(hello)
            return
        if line is None:
            self._events.put((self, None))
            return
        with suppress(ValueError):  # what else a shell prints, as when it logs out
            message = decode(line)
            if "beat" not in message:
                self._events.put((self, message))

    def _beat(self) -> None:
        while not self._is_closed:
            self.send({"beat": 1})
            time.sleep(BEAT_SECONDS)

    def _greeting(self) -> Message:
        name = self.host.name
        try:
            hello = self._hello.get(timeout=HELLO_SECONDS)
        except queue.Empty:
            raise HostError(
                name,
                f"the login worked, but Python did not start within {HELLO_SECONDS:.0f} s",
                f"is its disk slow, or does a start file of the shell wait? `ssh {name} true`",
            ) from None
        if hello is None:
            raise self._refusal()
        if hello["hello"] != VERSION:
            raise HostError(
                name,
                f"another version of this project lies in {project_folder()} there",
                "copy this one to all hosts",
            )
        return hello

    def _refusal(self) -> HostError:
        """Why the shell of a host did not start the agent, from what it said."""
        code = self._channel.wait(2.0)
        said = self.errors().strip()
        folder, name = project_folder(), self.host.name
        last = said.splitlines()[-1] if said else f"exit code {code}"
        if "No module named" in said or "ModuleNotFoundError" in said:
            what = f"the project is not complete in {folder} there ({last})"
            return HostError(name, what, "copy it there, the same version as here")
        if code in (126, 127) or sys.executable in said:
            what = f"no Python at {sys.executable} there ({last})"
            mend = f"install the project there too: make install in {folder}"
            return HostError(name, what, mend)
        if "cd" in said or folder in said:
            what = f"no folder {folder} there ({last})"
            return HostError(name, what, "put the project there, or on a disk that all hosts share")
        return HostError(name, f"the agent did not start ({last})", f"look with `ssh {name}`")


def connect(hosts: list[Host], events: Events) -> list[Link | HostError]:
    """An agent on each host, or why there is none; all at the same time."""

    def attempt(host: Host) -> Link | HostError:
        try:
            return Link(host, events)
        except HostError as error:
            return error

    return remote.in_parallel(attempt, hosts)
