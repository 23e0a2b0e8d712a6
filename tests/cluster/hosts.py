"""Two hosts on this machine: Linux namespaces joined by a virtual cable, an ssh server in each.

Invariant: nothing outside the given folder is written and nothing outlives `close`. A host's
processes, mounts, network and name live in namespaces that the kernel takes down with their first
process, and that one dies with this process, however it ends.
"""

import os
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.cluster.launchers import ROOT, SEARCH_PATH, Outcome, environment, finish

NAMES = ("node1", "node2")
ADDRESSES = ("10.77.0.1", "10.77.0.2")
START_SECONDS = 30

# The cable is plugged in from outside once both hosts exist. A fresh /run gives sshd the folder it
# insists on without touching the machine's.
HOST_SCRIPT = """
set -e
mount -t tmpfs tmpfs /run
mkdir /run/sshd
hostname "$1"
mount --bind "$2" /etc/hosts
ip link set lo up
until ip link show eth0 >/dev/null 2>&1; do sleep 0.1; done
ip address add "$3/24" dev eth0
ip link set eth0 up
exec "$4" -D -e -f "$5"
"""

SSHD_CONFIG = """
ListenAddress 0.0.0.0
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/authorized_keys
PidFile none
StrictModes no
UsePAM no
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
SetEnv HOME={folder}/home
"""


def missing() -> str | None:
    """Why the test hosts cannot be made on this machine; None if they can."""
    if os.geteuid() != 0:
        return "the two test hosts are network namespaces, which need root"
    tools = ("ip", "sshd", "ssh-keygen", "unshare", "nsenter", "setpriv")
    absent = [tool for tool in tools if shutil.which(tool, path=SEARCH_PATH) is None]
    if absent:
        return f"not installed: {', '.join(absent)} (packages iproute2, openssh-server, util-linux)"
    return None


@dataclass
class Host:
    """One test host; `first` is the process id, as seen from outside, of its first process."""

    name: str
    address: str
    first: int

    def start(self, command: list[str], output: Path, **variables: str) -> subprocess.Popen[bytes]:
        """Start `command` on the host, in the project's folder, with only the given variables."""
        enter = ["nsenter", "--target", str(self.first), "--net", "--mount", "--uts", "--pid"]
        with output.open("wb") as file:
            return subprocess.Popen(
                [*enter, f"--wd={ROOT}", *command],
                env=variables,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
            )


class Cluster:
    """Both hosts, their keys and the user's home folder; a context manager.

    Args:
        folder: where keys, logs and the home folder go.
        loopback_names: each host's own name means 127.0.1.1 there, as Debian's installer sets it.
    """

    def __init__(self, folder: Path, loopback_names: bool = False) -> None:
        self.folder = folder
        self.hosts: list[Host] = []
        self._servers: list[subprocess.Popen[bytes]] = []
        self._loopback_names = loopback_names

    def __enter__(self) -> "Cluster":
        try:
            self._make_keys()
            for index in range(len(NAMES)):
                self._start_host(index)
            first, second = (str(host.first) for host in self.hosts)
            cable = f"ip link add eth0 netns {first} type veth peer name eth0 netns {second}"
            subprocess.run(cable.split(), check=True, env={"PATH": SEARCH_PATH})
            for name in NAMES:
                log = self.folder / f"{name}.log"
                wait_for(lambda log=log: "Server listening" in log.read_text(), log)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """End every process of both hosts and wait until they are gone."""
        for server in self._servers:
            server.kill()
            server.wait()
        for host in self.hosts:
            wait_for(lambda host=host: not Path(f"/proc/{host.first}").exists())

    def run(self, command: list[str], host: int = 0, **variables: str) -> Outcome:
        """Run `command` on one host to its end."""
        return self.run_on_each({host: command}, **variables)[0]

    def run_on_each(self, commands: dict[int, list[str]], **variables: str) -> list[Outcome]:
        """Run one command per host at the same time, all to their end."""
        known = environment(HOME=str(self.folder / "home"), **variables)
        started = []
        for host, command in commands.items():
            output = self.folder / f"{NAMES[host]}.out"
            started.append((self.hosts[host].start(command, output, **known), output))
        return [finish(process, output) for process, output in started]

    def _make_keys(self) -> None:
        keys = self.folder / "home" / ".ssh"
        keys.mkdir(parents=True, mode=0o700)
        for path in (self.folder / "host_key", keys / "id_ed25519"):
            command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)]
            subprocess.run(command, check=True)
        shutil.copy(keys / "id_ed25519.pub", self.folder / "authorized_keys")
        (self.folder / "sshd_config").write_text(SSHD_CONFIG.format(folder=self.folder))

    def _start_host(self, index: int) -> None:
        name = NAMES[index]
        addresses = dict(zip(NAMES, ADDRESSES, strict=True))
        if self._loopback_names:
            addresses[name] = "127.0.1.1"
        known = "".join(f"{address} {host}\n" for host, address in addresses.items())
        hosts_file = self.folder / f"{name}.hosts"
        hosts_file.write_text(f"127.0.0.1 localhost\n{known}")
        log = self.folder / f"{name}.log"
        sshd = str(shutil.which("sshd", path=SEARCH_PATH))
        values = [name, str(hosts_file), ADDRESSES[index], sshd, str(self.folder / "sshd_config")]
        namespaces = [
            "--net",
            "--mount",
            "--uts",
            "--pid",
            "--mount-proc",
            "--fork",
            "--kill-child",
        ]
        script = ["sh", "-c", HOST_SCRIPT, "host"]
        with log.open("wb") as file:
            server = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", "unshare", *namespaces, *script, *values],
                env={"PATH": SEARCH_PATH},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        self._servers.append(server)
        children = Path(f"/proc/{server.pid}/task/{server.pid}/children")
        wait_for(lambda: bool(children.read_text().split()), log)
        self.hosts.append(Host(name, ADDRESSES[index], int(children.read_text())))


def wait_for(condition: Callable[[], bool], log: Path | None = None) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            said = "" if log is None else log.read_text()
            raise TimeoutError(f"a test host did not get there in {START_SECONDS} s: {said}")
        time.sleep(0.05)
