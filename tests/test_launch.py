"""What launching decides from the launcher's environment."""

import os
import socket

import pytest
import torch

from llama_lib import launch


@pytest.fixture
def two_hosts(monkeypatch):
    """The environment of one process on each of two hosts; `node1` is this host's name."""
    for name, value in {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "node1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setattr(socket, "gethostname", lambda: "node1")
    return monkeypatch


def name_means(monkeypatch, *addresses: str) -> None:
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0)) for address in addresses]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)


def test_a_host_name_that_means_loopback_is_refused(two_hosts):
    """Regression: gloo retried for a minute, then the first host failed and the second hung."""
    name_means(two_hosts, "127.0.1.1")
    (problem,) = launch.network_problems()
    assert "node1, means 127.0.1.1" in problem
    assert "GLOO_SOCKET_IFNAME" in problem


def test_an_address_of_another_host_does_not_count(two_hosts):
    """192.0.2.1 is reserved for documentation: no server can be bound to it."""
    name_means(two_hosts, "192.0.2.1", "127.0.0.1")
    assert "means 127.0.0.1" in launch.network_problems()[0]


def test_a_host_name_without_address_is_refused(two_hosts):
    def unknown(*_, **__):
        raise socket.gaierror

    two_hosts.setattr(socket, "getaddrinfo", unknown)
    assert "has no address" in launch.network_problems()[0]


@pytest.mark.parametrize(
    "settings",
    [
        {"GLOO_SOCKET_IFNAME": "eth0"},
        {"LOCAL_WORLD_SIZE": "2"},
        {"MASTER_ADDR": "127.0.0.1"},
    ],
    ids=["the user named the interface", "all on one host", "hosts that are this one"],
)
def test_a_loopback_name_that_does_no_harm(two_hosts, settings):
    name_means(two_hosts, "127.0.1.1")
    for name, value in settings.items():
        two_hosts.setenv(name, value)
    assert launch.network_problems() == []


@pytest.fixture
def no_store(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")  # so that it is as before afterwards
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    launch.keep_to_this_host.cache_clear()
    yield monkeypatch
    launch.keep_to_this_host.cache_clear()


def test_processes_of_unknown_hosts_are_not_kept_to_one(two_hosts, no_store):
    """srun and mpirun do not say how many processes a host has: gloo was bound to `lo`, and no
    process reached another host's."""
    two_hosts.delenv("LOCAL_WORLD_SIZE")
    launch.keep_to_this_host()
    assert "GLOO_SOCKET_IFNAME" not in os.environ
    assert launch.network_problems() == [], "they may all be on this host"


def test_processes_of_one_host_are_kept_to_it(two_hosts, no_store):
    two_hosts.setenv("LOCAL_WORLD_SIZE", "2")
    two_hosts.setenv("RANK", "1")
    launch.keep_to_this_host()
    assert os.environ.get("GLOO_SOCKET_IFNAME") == "lo"


@pytest.mark.parametrize(
    ("threads", "local_processes", "chosen"),
    [("1", "1", True), ("3", "2", True), ("1", "2", False), (None, "1", False), ("", "1", False)],
)
def test_a_number_of_threads_the_user_chose_stands(monkeypatch, threads, local_processes, chosen):
    """Regression: OMP_NUM_THREADS=1 of a single process was overridden."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if threads is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", local_processes)
    set_to: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", set_to.append)
    launch._share_cores()
    assert (set_to == []) is chosen
