"""Hosts on this machine: Linux namespaces cabled to one switch, an ssh server in each.

Invariant: nothing outside the given folder is written and nothing outlives `close`. A host's
processes, mounts, network and name live in namespaces that the kernel takes down with their first
process, and that one dies with this process, however it ends. All hosts share the machine's file
system, apart from what is mounted for one of them.
"""

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.cluster.launchers import ROOT, SEARCH_PATH, Outcome, environment, finish

# Of the usual two; a cluster of any size has `names` and `addresses`.
NAMES = ("node1", "node2")
ADDRESSES = ("10.77.0.1", "10.77.0.2")
START_SECONDS = 30

# The kernel means the thread that starts it: make and revive hosts from one that stays.
UNTIL_THIS_ENDS = ("setpriv", "--pdeathsig", "KILL")

# The cable is plugged in from outside once the host exists. A fresh /run gives sshd the folder it
# insists on without touching the machine's. After the words for sshd come pairs to mount.
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
sshd="$4" config="$5"
shift 5
while [ $# -gt 0 ]; do
    case "$1" in
        tmpfs:*) mount -t tmpfs -o "size=${1#tmpfs:}" tmpfs "$2" ;;
        *) mount --bind "$1" "$2" ;;
    esac
    shift 2
done
exec "$sshd" -D -e -f "$config"
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
"""


def missing() -> str | None:
    """Why the test hosts cannot be made on this machine; None if they can."""
    if os.geteuid() != 0:
        return "the test hosts are network namespaces, which need root"
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
    """The hosts, the switch between them, their keys and the user's home; a context manager.

    Args:
        folder: where keys, logs and the home folder go.
        loopback_names: each host's own name means 127.0.1.1 there, as Debian's installer sets it.
        size: number of hosts, called node1, node2 and so on.
        mounts: pairs (source, target) per host. The source is a file or folder that the host sees
            in the target's place, or `tmpfs:SIZE` for an empty file system of that size.
        sshd_lines: lines of a host's sshd_config that go before those of all hosts.
    """

    def __init__(
        self,
        folder: Path,
        loopback_names: bool = False,
        size: int = len(NAMES),
        mounts: Mapping[int, Sequence[tuple[str | Path, str | Path]]] | None = None,
        sshd_lines: Mapping[int, Sequence[str]] | None = None,
    ) -> None:
        self.folder = folder
        self.names = tuple(f"node{number}" for number in range(1, size + 1))
        self.addresses = tuple(f"10.77.0.{number}" for number in range(1, size + 1))
        self.hosts: list[Host] = []
        self._servers: dict[int, subprocess.Popen[bytes]] = {}
        self._switch: subprocess.Popen[bytes] | None = None
        self._loopback_names = loopback_names
        self._mounts = mounts or {}
        self._sshd_lines = sshd_lines or {}

    def __enter__(self) -> "Cluster":
        try:
            self._make_keys()
            self._start_switch()
            for index in range(len(self.names)):
                self.hosts.append(self._start_host(index))
                self._plug_in(index)
            for index in range(len(self.names)):
                self._wait_for_sshd(index)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """End every process of all hosts and wait until they are gone."""
        for server in self._servers.values():
            server.kill()
        for server in self._servers.values():
            server.wait()
        for host in self.hosts:
            wait_for(lambda host=host: not Path(f"/proc/{host.first}").exists())
        if self._switch is not None:
            self._switch.kill()
            self._switch.wait()

    def hostfile(self) -> Path:
        """A host file that names all hosts."""
        path = self.folder / "all_hosts.txt"
        path.write_text("\n".join(self.names) + "\n")
        return path

    def run(self, command: list[str], host: int = 0, **variables: str) -> Outcome:
        """Run `command` on one host to its end."""
        return self.run_on_each({host: command}, **variables)[0]

    def run_on_each(self, commands: dict[int, list[str]], **variables: str) -> list[Outcome]:
        """Run one command per host at the same time, all to their end."""
        started = [(self.start(words, host, **variables), host) for host, words in commands.items()]
        return [finish(process, self.output(host)) for process, host in started]

    def start(self, command: list[str], host: int = 0, **variables: str) -> subprocess.Popen[bytes]:
        """Start `command` on one host as its user would; what it prints goes to `output(host)`."""
        known = environment(HOME=str(self.folder / "home"), **variables)
        return self.hosts[host].start(command, self.output(host), **known)

    def output(self, host: int) -> Path:
        return self.folder / f"{self.names[host]}.out"

    def cut(self, host: int) -> None:
        """Take the host off the network: packets either way are lost without an answer."""
        self._in_switch(f"ip link set to{host} down")

    def mend(self, host: int) -> None:
        self._in_switch(f"ip link set to{host} up")

    def kill(self, host: int) -> None:
        """End the host as a power cut does: its peers hear nothing, not even a connection's end."""
        self._in_switch(f"ip link delete to{host}")
        self._servers[host].kill()
        self._servers[host].wait()
        first = Path(f"/proc/{self.hosts[host].first}")
        wait_for(lambda: not first.exists())

    def revive(self, host: int) -> None:
        """Start a killed host again, with the same name, address, mounts and keys."""
        self.hosts[host] = self._start_host(host)
        self._plug_in(host)
        self._wait_for_sshd(host)

    def _make_keys(self) -> None:
        keys = self.folder / "home" / ".ssh"
        keys.mkdir(parents=True, mode=0o700)
        for path in (self.folder / "host_key", keys / "id_ed25519"):
            command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)]
            subprocess.run(command, check=True)
        shutil.copy(keys / "id_ed25519.pub", self.folder / "authorized_keys")

    def _start_switch(self) -> None:
        script = "ip link add name switch type bridge && ip link set switch up && exec sleep inf"
        self._switch = subprocess.Popen(
            [*UNTIL_THIS_ENDS, "unshare", "--net", "sh", "-c", script],
            env={"PATH": SEARCH_PATH},
            stdin=subprocess.DEVNULL,
        )
        command = Path(f"/proc/{self._switch.pid}/cmdline")
        wait_for(lambda: command.read_bytes().startswith(b"sleep"))

    def _in_switch(self, command: str) -> None:
        assert self._switch is not None
        enter = ["nsenter", "--target", str(self._switch.pid), "--net"]
        subprocess.run([*enter, *command.split()], check=True, env={"PATH": SEARCH_PATH})

    def _plug_in(self, index: int) -> None:
        # A revived host keeps its hardware address, or the others would go on writing to the old.
        self._in_switch(
            f"ip link add name to{index} type veth peer name eth0 "
            f"address 02:00:00:00:00:{index + 1:02x} netns {self.hosts[index].first}"
        )
        self._in_switch(f"ip link set to{index} master switch up")

    def _wait_for_sshd(self, index: int) -> None:
        log = self.folder / f"{self.names[index]}.log"
        wait_for(lambda: "Server listening" in log.read_text(), log)

    def _sshd_config(self, index: int) -> str:
        """A host's own lines come first: of several with one keyword sshd obeys the first alone."""
        lines = self._sshd_lines.get(index, ())
        variables = [f"HOME={self.folder}/home"]
        variables += [line.removeprefix("SetEnv ") for line in lines if line.startswith("SetEnv ")]
        others = [line for line in lines if not line.startswith("SetEnv ")]
        common = SSHD_CONFIG.format(folder=self.folder)
        return "\n".join([*others, f"SetEnv {' '.join(variables)}", common]) + "\n"

    def _start_host(self, index: int) -> Host:
        name = self.names[index]
        addresses = dict(zip(self.names, self.addresses, strict=True))
        if self._loopback_names:
            addresses[name] = "127.0.1.1"
        known = "".join(f"{address} {host}\n" for host, address in addresses.items())
        hosts_file = self.folder / f"{name}.hosts"
        hosts_file.write_text(f"127.0.0.1 localhost\n{known}")
        config = self.folder / f"{name}.sshd_config"
        config.write_text(self._sshd_config(index))
        log = self.folder / f"{name}.log"
        sshd = str(shutil.which("sshd", path=SEARCH_PATH))
        values = [name, str(hosts_file), self.addresses[index], sshd, str(config)]
        mounts = [str(path) for pair in self._mounts.get(index, ()) for path in pair]
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
                [*UNTIL_THIS_ENDS, "unshare", *namespaces, *script, *values, *mounts],
                env={"PATH": SEARCH_PATH},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        self._servers[index] = server
        children = Path(f"/proc/{server.pid}/task/{server.pid}/children")
        wait_for(lambda: bool(children.read_text().split()), log)
        return Host(name, self.addresses[index], int(children.read_text()))


def wait_for(condition: Callable[[], bool], log: Path | None = None) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            said = "" if log is None else log.read_text()
            raise TimeoutError(f"a test host did not get there in {START_SECONDS} s: {said}")
        time.sleep(0.05)
