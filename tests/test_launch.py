"""What launching decides from the launcher's environment."""

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
