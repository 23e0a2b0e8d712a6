"""Sending to a program that may be gone, or one of very many."""

import fcntl
import os
import resource
import subprocess
from collections.abc import Iterator

import pytest

from llama_lib.cluster.channel import LocalChannel, SshChannel

_HIGH = 1100


class Gone:
    """A channel of paramiko at the moment in which its connection breaks."""

    def settimeout(self, _: float | None) -> None:
        pass

    def sendall(self, _: bytes) -> None:
        raise EOFError

    def shutdown_write(self) -> None:
        raise EOFError

    def recv(self, _: int) -> bytes:
        return b""

    recv_stderr = recv


def test_a_connection_that_breaks_while_sending_is_an_os_error():
    """Nothing else is expected of it: an EOFError ended the launcher with a traceback."""
    channel = SshChannel(None, Gone())
    with pytest.raises(OSError, match="the connection ended"):
        channel.send(b"beat")
    channel.end_input()


@pytest.fixture
def many_descriptors() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard <= _HIGH:
        pytest.skip(f"ulimit -Hn is {hard}, needed are {_HIGH + 1}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, _HIGH + 1), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.usefixtures("many_descriptors")
def test_a_launcher_of_hundreds_of_hosts_still_reaches_its_own():
    """select() takes no descriptor above 1023."""
    process = subprocess.Popen(
        ["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdin is not None
    high = fcntl.fcntl(process.stdin.fileno(), fcntl.F_DUPFD_CLOEXEC, _HIGH)
    process.stdin.close()
    process.stdin = os.fdopen(high, "wb", buffering=0)
    channel = LocalChannel(process)
    try:
        channel.send(b"heard")
        channel.end_input()
        assert channel.wait(10) == 0
    finally:
        channel.close()
