"""Running a program on a host: here as a child process, elsewhere over ssh by fabric.

Invariant: a shell sees nothing but `cd FOLDER && exec PROGRAM WORDS`, each word quoted; all else
goes through the program's standard input. Whatever keeps a host from running it is one `HostError`
within the time given.
"""

import errno
import ipaddress
import logging
import shlex
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from functools import partial
from typing import Any

from llama_lib.cluster.channel import Channel, LocalChannel, SshChannel
from llama_lib.errors import RunError

CONNECT_SECONDS = 10.0


class HostError(RunError):
    """One host cannot do its part: which, why, and what mends it."""

    def __init__(self, host: str, what: str, mend: str) -> None:
        self.host, self.what, self.mend = host, what, mend
        super().__init__(f"{host}: {what}; {mend}.")


@dataclass(frozen=True)
class Host:
    """A host of the job as the launcher reaches it.

    `ssh_port` is None for what ~/.ssh/config says, else 22.
    """

    name: str
    is_local: bool
    ssh_port: int | None = None


@dataclass(frozen=True)
class Completed:
    """How a program ended; `code` is None where the time was over before."""

    code: int | None
    stdout: str
    stderr: str


def open_hosts(names: Sequence[str], ssh_port: int | None = None) -> list[Host]:
    """The hosts of these names; a name that means this machine needs no ssh."""
    return [
        Host(name, local, ssh_port)
        for name, local in zip(names, in_parallel(is_this_machine, names), strict=True)
    ]


def in_parallel(function: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
    """`function` of each item, all at the same time, in the order of the items.

    Its threads keep no program from ending: an interrupted launcher waits for no host.
    """
    started = [in_background(partial(function, item)) for item in items]
    return [future.result() for future in started]


def in_background(function: Callable[[], Any]) -> "Future[Any]":
    """The result to come of a function that runs in a thread of its own."""
    future: Future[Any] = Future()

    def work() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future


def is_this_machine(name: str) -> bool:
    """Whether a name is this machine's own or means one of its addresses."""
    own = socket.gethostname()
    if name in (own, own.split(".")[0], "localhost"):
        return True
    try:
        found = socket.getaddrinfo(name, 9, type=socket.SOCK_DGRAM)
    except (OSError, UnicodeError):
        return False  # `start` says so, unless ~/.ssh/config knows the name
    return any(_is_own(family, address) for family, _, _, _, address in found)


def _is_own(family: int, address: Any) -> bool:
    meaning = ipaddress.ip_address(address[0].split("%")[0])
    if meaning.is_loopback or meaning.is_unspecified:
        return True
    # To reach an address of its own the machine would send from that address. Nothing is sent.
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(address)
        except OSError:
            return False
        return bool(probe.getsockname()[0].split("%")[0] == str(meaning))


def start(
    host: Host, argv: Sequence[str], workdir: str, connect_timeout: float = CONNECT_SECONDS
) -> Channel:
    """Start a program in a folder of a host.

    On other hosts a missing folder or program shows as an early end of the program, with what the
    shell said in `Channel.errors`.

    Raises:
        HostError: it cannot be started, or ssh had not answered after `connect_timeout` seconds.
    """
    if host.is_local:
        return _start_here(host, argv, workdir)
    return _start_there(host, argv, workdir, connect_timeout)


def run(
    host: Host,
    argv: Sequence[str],
    workdir: str,
    stdin: bytes = b"",
    timeout: float = 30.0,
    connect_timeout: float = CONNECT_SECONDS,
) -> Completed:
    """Run a program to its end, or for `timeout` seconds.

    A program here is killed then; one on another host only loses its standard streams.

    Raises:
        HostError: as for `start`.
    """
    deadline = time.monotonic() + timeout
    channel = start(host, argv, workdir, min(timeout, connect_timeout))
    try:
        lines: list[bytes] = []
        done = threading.Event()

        def receive(line: bytes | None) -> None:
            if line is None:
                done.set()
            else:
                lines.append(line)

        channel.receive(receive)
        feeder = threading.Thread(target=_feed, args=(channel, stdin), daemon=True)
        feeder.start()
        ended = done.wait(max(0.0, deadline - time.monotonic()))
        code = channel.wait(max(0.0, deadline - time.monotonic())) if ended else None
        return Completed(code, b"".join(lines).decode("utf-8", "replace"), channel.errors())
    finally:
        channel.close()


def _feed(channel: Channel, stdin: bytes) -> None:
    try:
        channel.send(stdin)
        channel.end_input()
    except OSError:
        pass  # it ended without reading all: its exit status says whether that was well


def _start_here(host: Host, argv: Sequence[str], workdir: str) -> Channel:
    try:
        # A session of its own: a Ctrl-C of the terminal reaches the launcher alone.
        process = subprocess.Popen(
            list(argv),
            cwd=workdir,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
    except OSError as error:
        what = f"cannot run {argv[0]} in {workdir} ({error.strerror})"
        raise HostError(host.name, what, "both must be there") from None
    return LocalChannel(process)


def _start_there(
    host: Host, argv: Sequence[str], workdir: str, connect_timeout: float
) -> SshChannel:
    command = f"cd {shlex.quote(workdir)} && exec {shlex.join(argv)}"
    opened: list[Any] = []
    try:
        # Before the clock runs: from a network disk this takes seconds at the first time.
        from fabric import Connection

        make = partial(Connection, host.name, port=host.ssh_port)
        login = in_background(partial(_log_in, make, command, connect_timeout, opened))
        # paramiko's own timeouts are for each step of a login; this one is for all of them.
        return SshChannel(*login.result(connect_timeout))
    except Exception as error:
        for connection in opened:
            # Closing may wait for the peer that does not answer.
            threading.Thread(target=connection.close, daemon=True).start()
        raise _translated(host, error, connect_timeout) from None


def _log_in(
    make: Callable[[], Any], command: str, seconds: float, opened: list[Any]
) -> tuple[Any, Any]:
    """A connection and a running command on it."""
    # What paramiko has to say about a failed login is in the exception too.
    logging.getLogger("paramiko").setLevel(logging.CRITICAL)
    connection = make()
    opened.append(connection)
    connection.connect_timeout = max(1, round(seconds))
    # Given to the constructor they would hide those of the user's fabric configuration.
    limits = ("banner_timeout", "auth_timeout", "channel_timeout")
    connection.connect_kwargs = {**connection.connect_kwargs, **dict.fromkeys(limits, seconds)}
    connection.open()
    channel = connection.transport.open_session(timeout=seconds)
    channel.exec_command(command)
    return connection, channel


def _translated(host: Host, error: Exception, seconds: float) -> HostError:
    """What an exception of fabric, paramiko or the network means to a user."""
    from paramiko import ssh_exception

    name, port = host.name, f" -p {host.ssh_port}" if host.ssh_port else ""
    by_hand = f"`ssh{port} {name} true` shows more"
    if isinstance(error, socket.gaierror):
        return HostError(
            name,
            "its name means nothing here",
            "correct it in the host file, or make it known in /etc/hosts or ~/.ssh/config",
        )
    if isinstance(error, FutureTimeout | TimeoutError):
        what = f"ssh had no answer within {seconds:.0f} s"
        return HostError(name, what, f"is the host up, and its ssh port open? {by_hand}")
    if isinstance(error, ssh_exception.BadHostKeyException):
        return HostError(
            name,
            "its host key is not the one in ~/.ssh/known_hosts",
            f"if the host was installed anew: ssh-keygen -R {name}",
        )
    if isinstance(error, ssh_exception.AuthenticationException) or "authentication" in str(error):
        return HostError(
            name,
            f"the login by ssh failed ({error})",
            "the login is done by the library fabric, which knows ~/.ssh/config, "
            "~/.ssh/id_ed25519, id_rsa, id_ecdsa and the ssh agent, and asks for no passphrase: "
            f"name the key as IdentityFile in ~/.ssh/config, and add it to {name} by ssh-copy-id",
        )
    if isinstance(error, OSError) and error.errno in (errno.EHOSTUNREACH, errno.ENETUNREACH):
        return HostError(name, "no way leads to it", f"is the host up? {by_hand}")
    if isinstance(error, ssh_exception.NoValidConnectionsError | ConnectionRefusedError):
        reasons = getattr(error, "errors", {}).values()
        if reasons and all(reason.errno == errno.EHOSTUNREACH for reason in reasons):
            return HostError(name, "no way leads to it", f"is the host up? {by_hand}")
        return HostError(
            name, "its ssh port is closed", "start sshd there, or give its port by --ssh_port"
        )
    said = str(error) or type(error).__name__
    if "banner" in said:
        what = "what answers on its ssh port is no ssh server"
        return HostError(name, what, f"start sshd there, or give its port by --ssh_port; {by_hand}")
    return HostError(name, f"ssh failed ({said})", by_hand)
