"""`python -m llama_lib doctor` on namespace hosts: every fault is named with its host."""

import os
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import pytest

from llama_lib.cluster import doctor as program
from llama_lib.cluster.speed_check import Speeds
from tests.cluster import hosts
from tests.cluster.hosts import Cluster
from tests.cluster.launchers import ROOT, SEARCH_PATH, Outcome, free_port, run_here

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(hosts.missing() is not None, reason=str(hosts.missing())),
]

FAKETIME = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1")
needs_faketime = pytest.mark.skipif(not FAKETIME.exists(), reason="not installed: faketime")
needs_cpulimit = pytest.mark.skipif(
    shutil.which("cpulimit", path=SEARCH_PATH) is None, reason="not installed: cpulimit"
)
LISTENING = "0A"


def doctor(cluster: Cluster, *options: str, **variables: str) -> Outcome:
    """Run it on the first host for all hosts, with a save directory that they share."""
    save_dir = str(cluster.folder / "checkpoint")
    command = ["python", "-m", "llama_lib", "doctor", "--hostfile", str(cluster.hostfile())]
    return cluster.run([*command, "--save_dir", save_dir, *options], **variables)


def rows(outcome: Outcome) -> dict[str, dict[str, str]]:
    """The table: cells by host and check."""
    lines = outcome.said.splitlines()
    begin = next(number for number, line in enumerate(lines) if line.startswith("host "))
    header, *body = [
        re.split(r"  +", line.strip()) for line in lines[begin : lines.index("", begin)]
    ]
    return {row[0]: dict(zip(header, row, strict=True)) for row in body}


def faulty_cells(outcome: Outcome) -> dict[tuple[str, str], str]:
    return {
        (host, check): cell
        for host, cells in rows(outcome).items()
        for check, cell in cells.items()
        if check != "host" and cell not in ("ok", "-")
    }


def lines_about(outcome: Outcome, host: str) -> list[str]:
    """The lines below the table that name what is wrong with a host."""
    below = outcome.said.split("\n\n")[2]
    return [line for line in below.splitlines() if line.startswith(f"{host}: ")]


def other_torch(folder: Path) -> tuple[Path, Path]:
    """What to mount so that a host seems to have another version of torch."""
    torch = distribution("torch")
    name = next(file for file in torch.files or [] if file.name == "METADATA")
    real = Path(str(torch.locate_file(name)))
    altered = folder / "METADATA"
    altered.write_text(re.sub(r"(?m)^Version: .*", "Version: 2.9.0", real.read_text(), count=1))
    return altered, real


def empty(folder: Path, name: str) -> Path:
    (folder / name).mkdir(parents=True)
    return folder / name


def wrong_clock(offset: str) -> str:
    return f"SetEnv LD_PRELOAD={FAKETIME} FAKETIME={offset}"


def fill(cluster: Cluster, host: int, path: Path) -> None:
    cluster.run(["sh", "-c", f"cat /dev/zero > {path}/zeros; true"], host)


def speed_processes(first: int) -> list[int]:
    """Process ids, as seen from outside, of a host's part in the measurement."""
    space = os.readlink(f"/proc/{first}/ns/pid")
    found = []
    for pid in (int(entry) for entry in os.listdir("/proc") if entry.isdigit()):
        with suppress(OSError):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            is_one = b"llama_lib.cluster.speed" in words
            if is_one and os.readlink(f"/proc/{pid}/ns/pid") == space:
                found.append(pid)
    return found


def is_measuring(first: int) -> bool:
    """Whether a host listens for its peers, which it does soon before it begins to measure."""
    table = Path(f"/proc/{first}/net/tcp").read_text().splitlines()[1:]
    cells = [row.split() for row in table]
    ports = {int(row[1].split(":")[1], 16) for row in cells if row[3] == LISTENING}
    return bool(ports - {22, 29500})


@contextmanager
def when_measuring(cluster: Cluster, index: int, action: Callable[[], None]) -> Iterator[None]:
    """Do something once a host has imported torch and is about to measure."""
    first = cluster.hosts[index].first
    over, acted = threading.Event(), threading.Event()

    def watch() -> None:
        while not over.wait(0.05):
            if is_measuring(first):
                action()
                acted.set()
                return

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        assert acted.is_set(), "the host never listened for its peers"


@contextmanager
def slowed(cluster: Cluster, index: int) -> Iterator[None]:
    """Have a host's processes get little of the processor while they measure."""
    limits: list[subprocess.Popen[bytes]] = []

    def limit() -> None:
        for pid in speed_processes(cluster.hosts[index].first):
            command = ["cpulimit", "--limit", "4", "--pid", str(pid)]
            limits.append(subprocess.Popen(command, env={"PATH": SEARCH_PATH}))

    with when_measuring(cluster, index, limit):
        yield
    for process in limits:
        process.terminate()
        process.wait()


@needs_faketime
@needs_cpulimit
def test_many_faults_at_once(tmp_path):
    """Every kind of fault that docs/launch.md promises to name, each on a host of its own."""
    cache = empty(tmp_path, "home/.cache/llama_lib")
    mounts: dict[int, Any] = {
        1: [(empty(tmp_path, "empty"), ROOT / "llama_lib")],
        2: [
            other_torch(tmp_path),
            (empty(tmp_path, "own"), empty(tmp_path, "checkpoint")),
            ("tmpfs:256k", cache),
        ],
    }
    with Cluster(tmp_path, size=5, mounts=mounts, sshd_lines={1: [wrong_clock("+30s")]}) as cluster:
        fill(cluster, 2, cache)
        cluster.cut(3)
        with slowed(cluster, 4):
            outcome = doctor(cluster)
    assert outcome.code == 1, outcome.said
    cells = faulty_cells(outcome)
    assert set(cells) == {
        ("node2", "code"),
        ("node2", "clock"),
        ("node3", "packages"),
        ("node3", "save_dir"),
        ("node3", "disk"),
        ("node4", "ssh"),
        ("node5", "speed"),
    }, outcome.said
    assert cells["node2", "code"] == "no code"
    assert cells["node2", "clock"] == "+30 s"
    assert cells["node3", "packages"] == "torch 2.9.0"
    assert cells["node3", "save_dir"] == "not shared"
    assert cells["node3", "disk"] == "0.0 MiB free"
    assert {host: len(lines_about(outcome, host)) for host in cluster.names} == {
        "node1": 0,
        "node2": 2,
        "node3": 3,
        "node4": 1,
        "node5": 1,
    }, outcome.said
    assert "speed: not measured with node2, node3, node4; mend that first" in outcome.said
    assert outcome.said.splitlines()[-1].startswith("7 problems; when mended: python -m llama_lib")
    assert list((tmp_path / "checkpoint").iterdir()) == [], "tokens are removed"


@dataclass
class Fault:
    """One thing that is wrong with the second host, and how it is to be named."""

    cell: tuple[str, str]
    message: str
    mounts: Callable[[Path], list[tuple[Any, Any]]] = lambda folder: []
    sshd_lines: list[str] = field(default_factory=list)
    action: Callable[[Cluster], None] = lambda cluster: None
    host: str = "node2"
    more: dict[str, Any] = field(default_factory=dict)


def take_the_port(cluster: Cluster) -> None:
    script = "import socket, time; s = socket.create_server(('', 29500)); time.sleep(1000)"
    cluster.hosts[0].start(["python", "-c", script], cluster.folder / "server", PATH=SEARCH_PATH)
    time.sleep(1)


def forget_the_keys(cluster: Cluster) -> None:
    for key in (cluster.folder / "home" / ".ssh").iterdir():
        key.unlink()


FAULTS = {
    "no project": Fault(
        ("code", "no code"),
        "no code",
        mounts=lambda folder: [(empty(folder, "empty"), ROOT / "llama_lib")],
    ),
    "another torch": Fault(
        ("packages", "torch 2.9.0"),
        "torch: got 2.9.0, expected",
        mounts=lambda folder: [other_torch(folder)],
    ),
    "no python": Fault(
        ("python", "not there"),
        "no Python at",
        mounts=lambda folder: [(empty(folder, "empty"), ROOT / ".venv" / "bin")],
    ),
    "clock ahead": Fault(("clock", "+5 s"), "its clock is 5.", sshd_lines=[wrong_clock("+5s")]),
    "clock behind": Fault(
        ("clock", "-5 s"), "behind the starting host's", sshd_lines=[wrong_clock("-5s")]
    ),
    "cut off": Fault(("ssh", "unreachable"), "no way leads to it", action=lambda c: c.cut(1)),
    "dead": Fault(("ssh", "unreachable"), "no way leads to it", action=lambda c: c.kill(1)),
    "hanging": Fault(
        ("ssh", "no answer"),
        "no answer within 10 s",
        action=lambda c: os.kill(c.hosts[1].first, signal.SIGSTOP),
    ),
    "no login": Fault(("ssh", "login failed"), "ssh-copy-id", action=forget_the_keys),
    "full disk": Fault(
        ("save_dir", "disk full"),
        "No space left",
        mounts=lambda folder: [("tmpfs:64k", empty(folder, "checkpoint"))],
        action=lambda c: fill(c, 1, c.folder / "checkpoint"),
    ),
    "not shared": Fault(
        ("save_dir", "not shared"),
        "it is not the same folder",
        mounts=lambda folder: [(empty(folder, "own"), empty(folder, "checkpoint"))],
    ),
    "port taken": Fault(("port", "29500 taken"), "(python", action=take_the_port, host="node1"),
    "loopback name": Fault(
        ("network", "name is loopback"), "means 127.0.1.1 there", more={"loopback_names": True}
    ),
}


@pytest.mark.full
@pytest.mark.parametrize("kind", FAULTS)
def test_one_fault(tmp_path, kind):
    fault = FAULTS[kind]
    if "clock" in kind and not FAKETIME.exists():
        pytest.skip("not installed: faketime")
    cluster_of_two = Cluster(
        tmp_path,
        mounts={1: fault.mounts(tmp_path)},
        sshd_lines={1: fault.sshd_lines},
        **fault.more,
    )
    with cluster_of_two as cluster:
        fault.action(cluster)
        began = time.monotonic()
        outcome = doctor(cluster, "--no-speed")
        took = time.monotonic() - began
    assert outcome.code == 1, outcome.said
    check, cell = fault.cell
    assert rows(outcome)[fault.host][check] == cell, outcome.said
    said = [line for line in outcome.said.splitlines() if line.startswith("node")]
    assert any(fault.message in line and fault.host in line for line in said), outcome.said
    assert took < 40


@pytest.mark.full
@pytest.mark.parametrize("size", [2, 4])
def test_healthy_hosts(tmp_path, size):
    with Cluster(tmp_path, size=size) as cluster:
        outcome = doctor(cluster)
    assert outcome.code == 0, outcome.said
    assert not faulty_cells(outcome)
    assert set(rows(outcome)) == set(cluster.names)
    assert f"all-reduce over {size} processes on {size} host(s): " in outcome.said
    last = outcome.said.splitlines()[-1]
    assert last.startswith("no problem found; next: python -m llama_lib launch --hostfile ")
    assert not (tmp_path / "checkpoint").exists(), "a folder made for the tokens goes with them"


@pytest.mark.full
@needs_cpulimit
def test_a_slow_host_among_four(tmp_path):
    with Cluster(tmp_path, size=4) as cluster, slowed(cluster, 2):
        outcome = doctor(cluster)
    assert outcome.code == 1, outcome.said
    assert list(faulty_cells(outcome)) == [("node3", "speed")], outcome.said
    assert "process 2 is slow: matmul" in lines_about(outcome, "node3")[0]


@pytest.mark.full
def test_a_host_lost_while_measuring_is_named_in_time(tmp_path):
    with Cluster(tmp_path, size=3) as cluster:
        with when_measuring(cluster, 1, lambda: cluster.kill(1)):
            outcome = doctor(cluster)
        began = time.monotonic()
        for host in (cluster.hosts[0], cluster.hosts[2]):
            hosts.wait_for(lambda host=host: not speed_processes(host.first))
    assert outcome.code == 1, outcome.said
    assert [cell for cell in faulty_cells(outcome) if cell[0] == "node2"] == [("node2", "speed")]
    assert "no sign of it for 20 s" in lines_about(outcome, "node2")[0], outcome.said
    assert time.monotonic() - began < 10, "processes of the measurement are left"


def test_this_installation(tmp_path):
    """Quick: without the measurement, which imports torch and ColossalAI."""
    command = ["python", "-m", "llama_lib", "doctor", "--no-speed", "-o", str(tmp_path / "out")]
    outcome = run_here([*command, "--master_port", free_port()], tmp_path)
    assert outcome.code == 0, outcome.said
    assert set(rows(outcome)) == {socket.gethostname()}
    assert not (tmp_path / "out").exists()


def test_an_interface_that_is_not_here(tmp_path):
    """Regression: on this host alone it said ok."""
    command = ["python", "-m", "llama_lib", "doctor", "--no-speed", "-o", str(tmp_path / "out")]
    outcome = run_here(
        [*command, "--master_port", free_port()], tmp_path, GLOO_SOCKET_IFNAME="eth77"
    )
    assert outcome.code == 1, outcome.said
    name = socket.gethostname()
    assert faulty_cells(outcome) == {(name, "network"): "no eth77"}
    assert re.search(rf"(?m)^{re.escape(name)}: has no interface eth77; it has lo\b", outcome.said)


def test_a_save_dir_where_nothing_can_be_written(tmp_path):
    """Regression: the room of /proc was a second problem of it."""
    command = ["python", "-m", "llama_lib", "doctor", "--no-speed", "--save_dir", "/proc/runs"]
    outcome = run_here([*command, "--master_port", free_port()], tmp_path)
    assert outcome.code == 1, outcome.said
    assert faulty_cells(outcome) == {(socket.gethostname(), "save_dir"): "cannot write"}


@pytest.mark.parametrize("speed", [True, False])
def test_the_measurement_is_announced(tmp_path, monkeypatch, capsys, speed):
    """Regression: for up to 50 s nothing was said."""
    begun = []

    def measure(*_: Any) -> Speeds:
        begun.append(capsys.readouterr().out)
        return Speeds(["this"], 2)

    monkeypatch.setattr(program, "measure", measure)
    words = ["-o", str(tmp_path / "out"), "--master_port", free_port()]
    program.main([*words, *([] if speed else ["--no-speed"])])
    assert len(begun) == speed or len(begun) == 2 * speed, "with GPUs these are measured too"
    line = "importing ColossalAI and measuring the speed of 1 host, at most "
    assert line not in capsys.readouterr().out, "once, before it"
    if speed:
        assert begun[0].splitlines()[-1].startswith(line)


@pytest.mark.full
def test_this_installation_works(tmp_path):
    command = ["python", "-m", "llama_lib", "doctor", "-o", str(tmp_path / "out")]
    outcome = run_here([*command, "--master_port", free_port()], tmp_path)
    assert outcome.code == 0, outcome.said
    assert "importing ColossalAI and measuring the speed of 1 host, at most 120 s" in outcome.said
    assert "ColossalAI with the host layer: imported; two processes met over gloo" in outcome.said


@pytest.mark.full
def test_a_broken_colossalai_is_named(tmp_path):
    (tmp_path / "colossalai").mkdir()
    (tmp_path / "colossalai" / "__init__.py").write_text("raise ImportError('half installed')")
    command = ["python", "-m", "llama_lib", "doctor", "-o", str(tmp_path / "out")]
    outcome = run_here([*command, "--master_port", free_port()], tmp_path, PYTHONPATH=str(tmp_path))
    assert outcome.code == 1, outcome.said
    assert "ColossalAI cannot be imported with the host layer" in outcome.said
    assert "half installed" in outcome.said


def test_a_taken_port_here(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        command = ["python", "-m", "llama_lib", "doctor", "--no-speed", "-o", str(tmp_path / "out")]
        outcome = run_here([*command, "--master_port", port], tmp_path)
    assert outcome.code == 1, outcome.said
    assert f"port {port} is not free (pid {os.getpid()} (" in outcome.said
    assert f"pass --master_port {int(port) + 1}" in outcome.said


@pytest.mark.parametrize(
    ("text", "message"),
    [("node1 slots=8\n", "write node1 and pass --nproc_per_node 8"), (None, "no such file")],
)
def test_a_bad_host_file(tmp_path, text, message):
    hostfile = tmp_path / "hosts"
    if text is not None:
        hostfile.write_text(text)
    command = ["python", "-m", "llama_lib", "doctor", "--hostfile", str(hostfile)]
    outcome = run_here(command, tmp_path)
    assert outcome.code == 2
    assert message in outcome.said
