"""Asks every host of a job the questions of `probe`, all hosts at the same time.

Invariant: nothing is judged here; a host that does not answer, or one question that fails, leaves
the answers of all others as they are.
"""

import json
import os
import queue
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llama_lib.cluster import probe
from llama_lib.cluster.remote import CONNECT_SECONDS, Host, HostError, in_parallel, start

# Chosen: reading a hundred source files over a slow network file system stays far below it.
ANSWER_SECONDS = 10.0
_CLOCK_READINGS = 5

# Python reads the program's bytes from its input and leaves the rest of it for the questions. A
# host without the Python of the starting host still answers with any other.
_START = (
    'if [ -x "$1" ]; then python="$1"; else python=python3; fi; exec "$python" -c "$2" "$3"',
    "probe",
)
_LOAD = (
    "import sys; exec(compile(sys.stdin.buffer.read(int(sys.argv[1])), 'llama_lib probe', 'exec'))"
)


@dataclass(frozen=True)
class Questions:
    """What to look at on every host.

    `temporary` is the TMPDIR that the job is given, if any.
    """

    folder: str
    root: str
    packages: Sequence[str]
    save_dir: str
    cache_dir: str
    temporary: str | None
    port: int


@dataclass
class Examined:
    """What one host answered; None where it was not asked or could not say.

    Attributes:
        failure: why it could not be asked (any further).
        offset: seconds that its clock is ahead of this host's.
        port: the answer of the first host.
        unreachable: why the first host's port cannot be reached from here; None if it can.
        token_error: why nothing could be written in the save directory.
        sees: names of the hosts whose tokens this one sees there.
    """

    host: Host
    failure: HostError | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    offset: float | None = None
    port: dict[str, Any] | None = None
    unreachable: str | None = None
    token_error: str | None = None
    sees: frozenset[str] | None = None


class AnswerError(Exception):
    """A question failed on the host; the others may be asked."""


class Interview:
    """A conversation with the probe on one host.

    Raises:
        HostError: as `remote.start`; later where the host stops answering.
    """

    def __init__(self, host: Host) -> None:
        self.host = host
        program = Path(probe.__file__).read_bytes()
        argv = ["sh", "-c", *_START, sys.executable, _LOAD, str(len(program))]
        self._channel = start(host, argv, "/", CONNECT_SECONDS)
        self._lines: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._channel.receive(self._lines.put)
        self._send(program)

    def ask(self, what: str, seconds: float = ANSWER_SECONDS, **values: Any) -> Any:
        self._send(json.dumps({"ask": what, **values}).encode() + b"\n")
        deadline = time.monotonic() + seconds
        while True:
            try:
                line = self._lines.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise HostError(
                    self.host.name,
                    f"no answer within {seconds:.0f} s to the question for its {what}",
                    "is it overloaded, or one of its network file systems away?",
                ) from None
            if line is None:
                raise self._ended()
            try:
                answer = json.loads(line)
            except ValueError:
                continue  # Some login files print a greeting even where nobody reads it.
            if isinstance(answer, dict):
                break
        if "error" in answer:
            raise AnswerError(answer["error"])
        return answer["is"]

    def close(self) -> None:
        self._channel.close()

    def _send(self, data: bytes) -> None:
        try:
            self._channel.send(data)
        except OSError:
            raise self._ended() from None

    def _ended(self) -> HostError:
        said = self._channel.errors().strip().splitlines()
        why = said[-1] if said else "the connection ended"
        return HostError(
            self.host.name,
            f"cannot run the checking program ({why})",
            "the host needs a POSIX shell and a Python, and its login files must not end the login",
        )


def examine(hosts: Sequence[Host], questions: Questions) -> tuple[Examined, list[Examined]]:
    """Answers of this machine, which starts the job, and of each host of the job."""
    here = next((host for host in hosts if host.is_local), None)
    everyone = list(hosts) if here else [*hosts, Host("localhost", is_local=True)]
    found = {host: Examined(host) for host in everyone}
    talks: dict[Host, Interview] = {}

    def with_each(which: Sequence[Host], step: Callable[[Examined, Interview], None]) -> None:
        def guarded(host: Host) -> None:
            try:
                step(found[host], talks[host])
            except HostError as failure:
                found[host].failure = failure
            except AnswerError as error:
                what = f"the checking program failed there ({error})"
                found[host].failure = HostError(host.name, what, "mend what it names")

        in_parallel(guarded, [host for host in which if host in talks and not found[host].failure])

    def meet(host: Host) -> None:
        try:
            talks[host] = Interview(host)
        except HostError as failure:
            found[host].failure = failure

    in_parallel(meet, everyone)
    try:
        first = hosts[0]
        with_each(everyone, lambda each, talk: _ask_facts(each, talk, questions, first.name))
        with_each([first], lambda each, talk: _ask_port(each, talk, questions.port))
        if (found[first].port or {}).get("free"):
            with_each(
                hosts[1:], lambda each, talk: _ask_reach(each, talk, first.name, questions.port)
            )
        _exchange_tokens(hosts, with_each, questions.save_dir)
    finally:
        for talk in talks.values():
            talk.close()
    return found[here or everyone[-1]], [found[host] for host in hosts]


def _ask_facts(each: Examined, talk: Interview, questions: Questions, first: str) -> None:
    # The clock first: a host that answers slowly is still judged by it.
    each.offset = _offset(talk)
    each.facts = talk.ask(
        "facts",
        python=sys.executable,
        folder=questions.folder,
        root=questions.root,
        packages=list(questions.packages),
        search=[path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path],
        paths=[questions.save_dir, questions.cache_dir],
        temporary=questions.temporary,
        first=first,
    )


def _offset(talk: Interview) -> float:
    """Its clock minus ours: the reading with the shortest way there and back errs the least."""
    readings = []
    for _ in range(_CLOCK_READINGS):
        asked, sent = time.monotonic(), time.time()
        theirs = talk.ask("clock")
        took = time.monotonic() - asked
        readings.append((took, theirs - (sent + took / 2)))
    return min(readings)[1]


def _ask_port(each: Examined, talk: Interview, port: int) -> None:
    try:
        each.port = talk.ask("port", port=port)
    except AnswerError as error:
        each.port = {"free": False, "why": str(error), "holder": None}


def _ask_reach(each: Examined, talk: Interview, first: str, port: int) -> None:
    try:
        each.unreachable = talk.ask("reach", first=first, port=port)
    except AnswerError as error:
        each.unreachable = str(error)


def _exchange_tokens(hosts: Sequence[Host], with_each: Callable[..., None], folder: str) -> None:
    """Every host writes a token of its own, then looks for those of all."""
    mark = uuid.uuid4().hex[:12]
    names = {f".doctor-{mark}-{number}": host for number, host in enumerate(hosts)}
    token_of = {host: name for name, host in names.items()}
    written: list[str] = []

    def write(each: Examined, talk: Interview) -> None:
        try:
            talk.ask("write_token", folder=folder, name=token_of[each.host])
            written.append(token_of[each.host])
        except AnswerError as error:
            each.token_error = str(error)

    def read(each: Examined, talk: Interview) -> None:
        try:
            seen = talk.ask("read_tokens", folder=folder, names=written)
            each.sees = frozenset(names[name].name for name in seen)
        except AnswerError as error:
            each.token_error = each.token_error or str(error)

    with_each(hosts, write)
    with_each(hosts, read)
    # All files go before any folder, which could not go while another host's file is in it.
    with_each(hosts, lambda each, talk: talk.ask("remove_token"))
    with_each(hosts, lambda each, talk: talk.ask("remove_folders"))
