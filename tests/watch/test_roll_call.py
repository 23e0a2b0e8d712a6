"""Who is missing is said with all that is known about them."""

import errno
import socket

import pytest

from llama_lib.errors import JobError, UserError
from llama_lib.watch import meeting
from llama_lib.watch.meeting import Place
from llama_lib.watch.roll_call import Crew, Member, absent_message, call_roll, ranges
from llama_lib.watch.topology import topology_lines

PLACE = Place("node1", 29500)


def member(rank: int, size: int = 2, interface: str = "eth0", chosen: str = "") -> Member:
    node = rank // size
    address = f"10.0.0.{node + 1}"
    return Member(rank, f"node{node + 1}", rank % size, 100, node, interface, address, chosen)


def crew(world: int, size: int = 2) -> Crew:
    return Crew([member(rank, size) for rank in range(world)], 0, PLACE)


@pytest.mark.parametrize(
    ("ranks", "shown"),
    [([3], "rank 3"), ([0, 1, 2, 5], "ranks 0-2, 5"), ([1, 3], "ranks 1, 3")],
)
def test_ranges(ranks, shown):
    assert ranges(ranks) == shown


def test_ranks_are_named_with_their_hosts():
    assert crew(6).named([5, 0, 1, 2]) == "ranks 0-1 (node1), rank 2 (node2), rank 5 (node3)"


def test_a_missing_process_of_a_host_that_came(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    message = absent_message([member(0), member(1), member(2)], 8, 60, PLACE)
    assert message.startswith(
        "5 of 8 processes did not come to the meeting point node1:29500 in 60 s"
    )
    assert "rank 3 of node2: the output of that host says why" in message
    assert "ranks 4-5: no process of that host came (host 3 of the host file)" in message
    assert "ranks 6-7: no process of that host came (host 4 of the host file)" in message
    assert "there are ranks 0-1 of node1 by eth0 (10.0.0.1); rank 2 of node2 by eth0" in message
    assert "--start_timeout" in message


def test_a_launcher_that_does_not_say_how_many_processes_a_host_has(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    message = absent_message([member(0)], 4, 5, PLACE)
    assert "\n  ranks 1-3\n" in message


def test_one_process_meets_nobody(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.delenv("MASTER_PORT", raising=False)
    alone = call_roll(1)
    assert (len(alone.members), alone.store) == (1, None)


def test_processes_without_a_meeting_point_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(UserError, match="WORLD_SIZE is 2, but MASTER_ADDR and MASTER_PORT"):
        call_roll(1)


def test_interfaces_are_grouped_and_chosen_ones_named():
    members = [
        member(0),
        member(2),
        member(4, interface="docker0", chosen="NCCL_SOCKET_IFNAME=ib0"),
    ]
    members = [Member(n, *list(each.__dict__.values())[1:]) for n, each in enumerate(members)]
    ways = Crew(members, 0, PLACE).ways()
    assert ways == "eth0 on node1, node2; docker0 NCCL_SOCKET_IFNAME=ib0 on node3"


def test_topology_has_a_line_for_each_of_a_few_hosts():
    lines = topology_lines(crew(4), ["NVIDIA H200"] * 4)
    assert lines == [
        "4 processes on 2 host(s), which met at node1:29500",
        "  node1: ranks 0-1, 2 x NVIDIA H200, interface eth0 (10.0.0.1)",
        "  node2: ranks 2-3, 2 x NVIDIA H200, interface eth0 (10.0.0.2)",
    ]


def test_topology_groups_many_hosts_and_shows_the_odd_one():
    devices = ["NVIDIA H200"] * 64
    devices[10] = "NVIDIA H100"
    lines = topology_lines(crew(64), devices)
    assert len(lines) == 3
    assert "node1, node2 ... node32 (31 hosts): 2 x NVIDIA H200, interface eth0 each" in lines[1]
    assert "node6: 2 x NVIDIA H100, NVIDIA H200" in lines[2]


@pytest.fixture
def rank_one(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(meeting, "_PAUSE_SECONDS", 0.01)
    return monkeypatch


def unused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (None, "nothing listens on port"),
        (socket.gaierror(), "the name 127.0.0.1 is unknown here"),
        (TimeoutError(), "does a firewall let the port through?"),
        (OSError(errno.ENETUNREACH, "Network is unreachable"), "Network is unreachable; is there"),
    ],
)
def test_why_the_meeting_point_was_not_reached(rank_one, error, cause):
    if error is not None:

        def refuse(*_):
            raise error

        rank_one.setattr(socket, "create_connection", refuse)
    with pytest.raises(JobError, match="did not reach the meeting point") as raised:
        meeting.open_store(Place("127.0.0.1", unused_port()), is_server=False, seconds=0.1)
    assert cause in str(raised.value)
    assert "--start_timeout" in str(raised.value)


def test_a_port_in_use_is_named(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    monkeypatch.setattr(meeting, "keep_to_this_host", lambda: None)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(JobError) as raised:
            meeting.open_store(Place("127.0.0.1", port), is_server=True, seconds=1)
    assert f"port {port} of 127.0.0.1 is in use by another program" in str(raised.value)
    assert f"--master_port {port + 1}" in str(raised.value)


def test_the_way_of_this_host_is_named():
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert meeting.way_to(Place("127.0.0.1", server.getsockname()[1])) == ("lo", "127.0.0.1")
