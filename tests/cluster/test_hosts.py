"""One model trained on two hosts, started from one of them over ssh or on each by hand."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster import hosts
from tests.cluster.hosts import ADDRESSES, NAMES, Cluster
from tests.cluster.launchers import Outcome, checkpoint_problems, losses, run_here, tiny_run

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(hosts.missing() is not None, reason=str(hosts.missing())),
]


NAMED = "hostfiles/two_hosts.txt"


@pytest.fixture
def cluster(tmp_path):
    with Cluster(tmp_path) as running:
        yield running


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def local_losses(tmp_path_factory, cache_dir) -> list[float]:
    """The losses of two processes on this machine."""
    folder = tmp_path_factory.mktemp("local")
    outcome = run_here(
        ["torchrun", "--standalone", "--nproc_per_node", "2", *tiny_run(folder, cache_dir)], folder
    )
    assert outcome.code == 0, outcome.said
    return losses(folder)


def from_hostfile(cluster: Cluster, run: list[str], hostfile: str = NAMED) -> Outcome:
    launcher = ["colossalai", "run", "--nproc_per_node", "1", "--hostfile", hostfile]
    return cluster.run([*launcher, *run])


def torchrun_on_each(run: list[str]) -> dict[int, list[str]]:
    return {
        rank: [
            *("torchrun", "--nnodes", "2", "--nproc_per_node", "1", "--node_rank", str(rank)),
            *("--master_addr", NAMES[0], "--master_port", "29500", *run),
        ]
        for rank in range(2)
    }


def assert_trained(outcome: Outcome, folder: Path, expected: list[float]) -> None:
    assert outcome.code == 0, outcome.said
    assert losses(folder) == expected, outcome.said
    assert not checkpoint_problems(folder)


def test_a_host_file_trains_one_model_on_both_hosts(cluster, tmp_path, cache_dir, local_losses):
    """The first host is recognised as local, the second is reached over ssh."""
    outcome = from_hostfile(cluster, tiny_run(tmp_path, cache_dir))
    assert_trained(outcome, tmp_path, local_losses)
    assert all(f"{name}: success" in outcome.said for name in NAMES)
    assert "2 process(es) = dp 2" in outcome.said
    logs = sorted(path.name for path in (tmp_path / "checkpoint" / "logs").iterdir())
    assert logs == ["rank-00000.log", "rank-00001.log"]


@pytest.mark.full
def test_a_host_file_of_addresses(cluster, tmp_path, local_losses):
    """By address no host is local: the launcher reaches its own host over ssh too.

    The two hosts share the file system and an empty cache: one prepares, the other waits.
    """
    cache_dir = tmp_path / "cache"
    hostfile = tmp_path / "hosts.txt"
    hostfile.write_text("\n".join(ADDRESSES))
    outcome = from_hostfile(cluster, tiny_run(tmp_path, cache_dir), str(hostfile))
    assert_trained(outcome, tmp_path, local_losses)
    assert len(list((cache_dir / "prepared").iterdir())) == 1
    assert outcome.said.count("prepared ") == 1


@pytest.mark.full
def test_torchrun_on_each_host(cluster, tmp_path, cache_dir, local_losses):
    outcomes = cluster.run_on_each(torchrun_on_each(tiny_run(tmp_path, cache_dir)))
    for outcome in outcomes:
        assert_trained(outcome, tmp_path, local_losses)
    assert "step 4/4" in outcomes[0].said
    assert "step 4/4" not in outcomes[1].said, "the console belongs to one rank"


@pytest.mark.full
def test_hosts_whose_names_mean_loopback(tmp_path, cache_dir, local_losses):
    """Refused on both hosts at once instead of a minute of waiting for a peer that is oneself."""
    with Cluster(tmp_path, loopback_names=True) as cluster:
        run = tiny_run(tmp_path, cache_dir)
        refused = from_hostfile(cluster, run)
        assert refused.code == 1, refused.said
        for name in NAMES:
            assert f"the name of this host, {name}, means 127.0.1.1" in refused.said
        outcomes = cluster.run_on_each(torchrun_on_each(run), GLOO_SOCKET_IFNAME="eth0")
    for outcome in outcomes:
        assert_trained(outcome, tmp_path, local_losses)


@pytest.mark.full
def test_a_world_size_that_does_not_fit_ends_on_both_hosts(cluster, tmp_path, cache_dir):
    run = tiny_run(tmp_path, cache_dir)
    outcome = from_hostfile(cluster, [*run, "-p", "hybrid_parallel", "--tp", "4"])
    assert outcome.code == 1, outcome.said
    assert all(f"{name}: failure" in outcome.said for name in NAMES)
    assert "valid numbers of processes are multiples of 4" in outcome.said


def test_nothing_outlives_the_hosts(tmp_path):
    with Cluster(tmp_path) as cluster:
        first = [host.first for host in cluster.hosts]
        sleeper = cluster.hosts[0].start(
            ["sleep", "1000"], tmp_path / "sleep", PATH="/usr/bin:/bin"
        )
    assert sleeper.wait(10) != 0
    assert not [pid for pid in first if Path(f"/proc/{pid}").exists()]


def test_four_hosts_that_are_cut_off_and_killed(tmp_path):
    """What tests of lost hosts rest on."""

    def reached(cluster: Cluster) -> str:
        """Hosts whose ssh port answers the first one."""
        connect = "echo | timeout 1 bash -c 'exec 3<>/dev/tcp/{0}/22' && echo {0}"
        script = "; ".join(connect.format(name) for name in cluster.names[1:])
        said = cluster.run(["bash", "-c", f"({script}) 2>/dev/null; true"]).said
        return " ".join(said.split())

    mounts = {2: [(tmp_path, "/mnt"), ("tmpfs:64k", "/opt")]}
    with Cluster(tmp_path, size=4, mounts=mounts) as cluster:
        assert reached(cluster) == "node2 node3 node4"
        cluster.cut(1)
        assert reached(cluster) == "node3 node4"
        cluster.mend(1)
        cluster.kill(2)
        assert reached(cluster) == "node2 node4"
        cluster.revive(2)
        assert reached(cluster) == "node2 node3 node4"
        look = ["sh", "-c", "test -d /mnt/home && df --output=size -k /opt | tail -n 1"]
        assert cluster.run(look, 2).said.strip() == "64"
        assert cluster.run(["ls", "/mnt/home"], 1).code != 0


def test_hosts_die_with_a_killed_test_run(tmp_path):
    script = (
        "import sys, time, pathlib\n"
        "from tests.cluster.hosts import Cluster\n"
        "cluster = Cluster(pathlib.Path(sys.argv[1])).__enter__()\n"
        "print(*(host.first for host in cluster.hosts), flush=True)\n"
        "time.sleep(1000)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    with subprocess.Popen(command, cwd=hosts.ROOT, stdout=subprocess.PIPE, text=True) as test_run:
        assert test_run.stdout is not None
        first = test_run.stdout.readline().split()
        assert len(first) == 2
        test_run.kill()
    hosts.wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in first))
