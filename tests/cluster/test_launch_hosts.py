"""The launcher on several hosts over ssh: they train one model, and none is left running alone."""

import json
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import hosts
from tests.cluster.hosts import Cluster
from tests.cluster.launchers import (
    ROOT,
    Outcome,
    checkpoint_problems,
    losses,
    run_here,
    tiny_run,
)
from tests.cluster.test_launch import (
    AWKWARD,
    FLAKY,
    LAUNCH,
    REPORT,
    SLEEP,
    assert_nothing_left,
    script,
    wait_for_text,
)

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(hosts.missing() is not None, reason=str(hosts.missing())),
]

# From a failure to the end of everything, everywhere.
END_SECONDS = 40


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with Cluster(tmp_path) as running:
        yield running


@pytest.fixture
def three_hosts(tmp_path: Path) -> Iterator[Cluster]:
    with Cluster(tmp_path, size=3) as running:
        yield running


def words(cluster: Cluster, *options: str) -> list[str]:
    return [*LAUNCH, "--hostfile", str(cluster.hostfile()), "--nproc_per_node", "1", *options]


def ended(cluster: Cluster, process: "subprocess.Popen[bytes]", seconds: float) -> Outcome:
    """The outcome of a launcher that was started on the first host."""
    code = process.wait(seconds)
    return Outcome(code, cluster.output(0).read_text())


def test_two_hosts_train_one_model(cluster, tmp_path):
    outcome = cluster.run(words(cluster, *tiny_run(tmp_path, tmp_path / "cache")))
    assert outcome.code == 0, outcome.said
    assert len(losses(tmp_path)) == 4
    assert not checkpoint_problems(tmp_path)
    assert outcome.said.rstrip().splitlines()[-1].startswith("max memory usage: ")
    assert "step 4/4" in outcome.said
    assert "[node2] step 4/4" not in outcome.said
    assert_nothing_left(tmp_path)


@pytest.mark.full
def test_two_hosts_train_as_one_does(cluster, tmp_path):
    """To the last bit, with equal numbers of threads."""
    here, there, cache = tmp_path / "one host", tmp_path / "two hosts", tmp_path / "cache"
    outcome = run_here([*LAUNCH, "--nproc_per_node", "2", *tiny_run(here, cache)], tmp_path)
    assert outcome.code == 0, outcome.said
    outcome = cluster.run(words(cluster, *tiny_run(there, cache)))
    assert outcome.code == 0, outcome.said
    assert losses(there) == losses(here)


def test_words_and_variables_arrive_on_the_other_host(cluster, tmp_path):
    """Through a login shell that has something to say for itself."""
    (tmp_path / "home" / ".bashrc").write_text("echo Welcome; printf 'no end of line'\n")
    text = 'he said "hi" $HOME `touch HOSTILE`\nand left'
    outcome = cluster.run(
        words(
            cluster, "--pass", "MY_TOKEN", str(script(tmp_path, REPORT)), str(tmp_path), *AWKWARD
        ),
        TORCH_TEXT=text,
        MY_TOKEN="private-value",
        WANDB_API_KEY="other-value",
        UNKNOWN="1",
        CUDA_VISIBLE_DEVICES="",
    )
    assert outcome.code == 0, outcome.said
    report = json.loads((tmp_path / "rank-1.json").read_text())
    assert report["words"] == AWKWARD
    variables = report["variables"]
    assert variables["TORCH_TEXT"] == text
    assert variables["MY_TOKEN"] == "private-value"
    assert not {"WANDB_API_KEY", "UNKNOWN", "CUDA_VISIBLE_DEVICES"} & variables.keys()
    assert "not passed on to the other hosts: CUDA_VISIBLE_DEVICES, WANDB_API_KEY" in outcome.said
    assert "private-value" not in outcome.said
    assert (variables["RANK"], variables["LOCAL_RANK"], variables["GROUP_RANK"]) == ("1", "0", "1")
    assert variables["MASTER_ADDR"] == "node1"
    assert not (ROOT / "HOSTILE").exists()


def test_a_failure_on_the_other_host_ends_both_with_its_code(cluster, tmp_path):
    text = """
print(f"hello from {rank}", flush=True)
if rank == 0:
    time.sleep(600)
print("unfinished", end="", flush=True)
time.sleep(2)
sys.exit(7)
"""
    outcome = cluster.run(words(cluster, str(script(tmp_path, text))))
    assert outcome.code == 7, outcome.said
    lines = outcome.said.splitlines()
    assert "hello from 0" in lines
    assert "[node2] hello from 1" in lines
    assert "[node2] unfinished" in lines
    assert "launch: rank 1 on node2 ended with exit code 7 first; exit code 7" in lines
    assert_nothing_left(tmp_path)


def test_a_mistake_that_all_hosts_meet_is_said_once(cluster, tmp_path):
    run = [*tiny_run(tmp_path, tmp_path / "cache"), "--lr", "-1", "-p", "none"]
    outcome = cluster.run(words(cluster, *run))
    assert outcome.code == 2, outcome.said
    assert outcome.said.count("--lr: got '-1'") == 1, outcome.said
    assert outcome.said.count("--plugin: got 'none'") == 1, outcome.said
    assert "[node2]" not in outcome.said


LACKS = [
    pytest.param(ROOT / ".venv", "node2: no Python at .*; install the project", id="python"),
    pytest.param(ROOT / "llama_lib", f"node2: the project is not complete in {ROOT}", id="code"),
]


@pytest.mark.parametrize(("hidden", "said"), LACKS)
@pytest.mark.full
def test_a_host_without_the_project(tmp_path, hidden, said):
    (tmp_path / "empty").mkdir()
    with Cluster(tmp_path, mounts={1: [(tmp_path / "empty", hidden)]}) as cluster:
        outcome = cluster.run(words(cluster, str(script(tmp_path, "print('started')"))))
    assert outcome.code == 1, outcome.said
    assert re.search(said, outcome.said), outcome.said
    assert outcome.said.count("\n") == 1, "one line for the one host"


@pytest.mark.full
def test_a_host_without_the_folders(tmp_path):
    """Of the project, then only of the script; neither is started anywhere."""
    for name in ("empty", "disk", "scripts"):
        (tmp_path / name).mkdir()
    project = tmp_path / "disk" / "our project"
    project.mkdir()
    (project / "llama_lib").symlink_to(ROOT / "llama_lib")
    path = script(tmp_path / "scripts", "print('started')")
    hidden = [(tmp_path / "empty", tmp_path / name) for name in ("disk", "scripts")]
    with Cluster(tmp_path, mounts={1: hidden}) as cluster:
        command = [LAUNCH[0], "-P", *words(cluster, str(path))[1:]]
        without_project = cluster.run(command, PYTHONPATH=str(project))
        without_script = cluster.run(words(cluster, str(path)))
    assert without_project.code == without_script.code == 1
    assert re.fullmatch(
        f"node2: no folder {project} there \\(.*\\); put the project there, or on a disk that all "
        "hosts share.\n",
        without_project.said,
    ), without_project.said
    mend = "the project must lie there on all hosts"
    assert f"node2: {path} is not in {ROOT}; {mend}.\n" in without_script.said
    assert "started" not in without_script.said


def test_hosts_that_cannot_be_reached(cluster, tmp_path):
    """All are named at once, and in time: one off the network, one unknown, one that is none."""
    path = tmp_path / "faulty.txt"
    path.write_text("node1\nnode2\nnode-without-a-name\n10.77.0.99\n")
    cluster.cut(1)
    begun = time.monotonic()
    command = [*LAUNCH, "--hostfile", str(path), "--nproc_per_node", "1"]
    outcome = cluster.run([*command, str(script(tmp_path, "print('started')"))])
    assert time.monotonic() - begun < 25
    assert outcome.code == 1, outcome.said
    lines = outcome.said.splitlines()
    assert len(lines) == 3, outcome.said
    silent = r"(no way leads to it|ssh had no answer within 10 s); is the host up"
    assert re.match(f"node2: {silent}", lines[0])
    assert lines[1].startswith("node-without-a-name: its name means nothing here; correct it")
    assert re.match(f"10.77.0.99: {silent}", lines[2])


@pytest.mark.full
def test_a_login_that_hangs_or_fails(tmp_path):
    """A server that says nothing; one that lets nobody in."""
    with Cluster(tmp_path, sshd_lines={1: ["DenyUsers *"]}) as cluster:
        outcome = cluster.run(words(cluster, str(script(tmp_path, ""))))
        assert outcome.code == 1, outcome.said
        assert "node2: the login by ssh failed" in outcome.said
        assert "name the key as IdentityFile in ~/.ssh/config" in outcome.said
        outcome = cluster.run(words(cluster, "--ssh_port", "2222", "benchmark.py"))
        assert outcome.code == 1
        assert outcome.said == (
            "node2: its ssh port is closed; start sshd there, or give its port by --ssh_port.\n"
        )
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = str(silent.getsockname()[1])
        path = tmp_path / "hosts.txt"
        # An alias of ~/.ssh/config is not this host by name.
        path.write_text("alias\n")
        folder = tmp_path / "home" / ".ssh"
        (folder / "config").write_text("Host alias\n  HostName 127.0.0.1\n")
        begun = time.monotonic()
        outcome = run_here(
            [*LAUNCH, "--hostfile", str(path), "--ssh_port", port, "benchmark.py"],
            tmp_path,
            HOME=str(tmp_path / "home"),
        )
        assert 9 < time.monotonic() - begun < 14
    assert outcome.code == 1, outcome.said
    assert outcome.said.startswith("alias: ssh had no answer within 10 s"), outcome.said


@pytest.mark.full
def test_one_host_under_two_names(cluster, tmp_path):
    path = tmp_path / "hosts.txt"
    path.write_text("node1\nnode2\n10.77.0.2\n")
    command = [*LAUNCH, "--hostfile", str(path), "--nproc_per_node", "1", "benchmark.py"]
    outcome = cluster.run(command)
    assert outcome.code == 1
    assert "10.77.0.2: is the same host as node2; name each host once" in outcome.said


VICTIMS = {"launcher": -signal.SIGKILL, "agent": 1, "first rank": 137}


@pytest.mark.parametrize(
    "victim", ["launcher", "agent", pytest.param("first rank", marks=pytest.mark.full)]
)
def test_nothing_outlives_a_killed_part_on_any_host(cluster, tmp_path, victim):
    process = cluster.start(words(cluster, str(script(tmp_path, SLEEP))))
    wait_for_text(cluster.output(0), r"(?s)is \d+.*is \d+")
    pids = {
        "launcher": pids_on(cluster, 0, "launch"),
        # Both halves at once, so that neither can end what the ranks have started.
        "agent": pids_on(cluster, 1, "llama_lib.cluster.agent"),
        "first rank": pids_on(cluster, 0, "ranks.py")[-1:],
    }
    for pid in pids[victim]:
        os.kill(pid, signal.SIGKILL)
    outcome = ended(cluster, process, END_SECONDS)
    assert outcome.code == VICTIMS[victim], outcome.said
    assert_nothing_left(tmp_path, END_SECONDS)


def pids_on(cluster: Cluster, host: int, word: str) -> list[int]:
    """Processes of a host, seen from outside, with a word that ends with `word`."""
    space = os.readlink(f"/proc/{cluster.hosts[host].first}/ns/pid")
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if os.readlink(folder / "ns" / "pid") != space:
                continue
            command = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if any(each.endswith(word.encode()) for each in command):
            found.append(int(folder.name))
    return sorted(found)


@pytest.mark.full
def test_a_cut_link_ends_the_job_everywhere(cluster, tmp_path):
    process = cluster.start(words(cluster, str(script(tmp_path, SLEEP))))
    wait_for_text(cluster.output(0), r"(?s)is \d+.*is \d+")
    cluster.cut(1)
    begun = time.monotonic()
    outcome = ended(cluster, process, END_SECONDS)
    assert outcome.code == 1, outcome.said
    assert "node2: no sign of life for 20 s first; exit code 1" in outcome.said
    assert_nothing_left(tmp_path, begun + END_SECONDS - time.monotonic())


ATTEMPTS = """
attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
print(f"attempt {attempt} rank {rank} of {os.environ['WORLD_SIZE']}", flush=True)
if not attempt:
    time.sleep(600)
"""


@pytest.mark.full
def test_a_spare_takes_the_place_of_a_dead_host(three_hosts, tmp_path):
    command = words(three_hosts, "--num_nodes", "2", "--restarts", "1")
    process = three_hosts.start([*command, str(script(tmp_path, ATTEMPTS))])
    said = wait_for_text(three_hosts.output(0), "(?s)attempt 0.*attempt 0")
    assert "node3" not in said
    three_hosts.kill(1)
    outcome = ended(three_hosts, process, 90)
    assert outcome.code == 0, outcome.said
    assert "[node3] attempt 1 rank 1 of 2" in outcome.said
    assert "without node2: " in outcome.said
    assert "restart 1 of 1, since node2: " in outcome.said
    assert ": 2 process(es) on node1, node3" in outcome.said
    assert "global batch" not in outcome.said
    assert_nothing_left(tmp_path)


@pytest.mark.full
@pytest.mark.parametrize("least", [1, 2])
def test_a_job_goes_on_with_fewer_hosts(cluster, tmp_path, least):
    command = words(cluster, "--min_nodes", str(least), "--restarts", "1")
    process = cluster.start([*command, str(script(tmp_path, ATTEMPTS))])
    wait_for_text(cluster.output(0), "(?s)attempt 0.*attempt 0")
    cluster.kill(1)
    outcome = ended(cluster, process, 90)
    if least == 1:
        assert outcome.code == 0, outcome.said
        assert "attempt 1 rank 0 of 1" in outcome.said
        assert "instead of 2; that changes the global batch" in outcome.said
    else:
        assert outcome.code == 1, outcome.said
        assert "1 of the hosts answer, fewer than --min_nodes 2" in outcome.said
    assert_nothing_left(tmp_path)


@pytest.mark.full
def test_restarts_on_the_same_hosts(cluster, tmp_path):
    outcome = cluster.run(words(cluster, "--restarts", "2", str(script(tmp_path, FLAKY))))
    assert outcome.code == 0, outcome.said
    assert "[node2] attempt 2 of rank 1" in outcome.said
