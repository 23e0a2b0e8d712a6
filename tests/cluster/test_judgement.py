"""What is said of a host's answers: made-up answers, so that any fault can be had anywhere."""

import copy
from typing import Any

import pytest

from llama_lib.cluster.doctor import problem_lines, table
from llama_lib.cluster.examination import Examined, Questions
from llama_lib.cluster.judgement import CHECKS, not_made, problems_of
from llama_lib.cluster.problem import Job, Problem
from llama_lib.cluster.remote import Host, HostError
from llama_lib.cluster.speed_check import Speeds, slow_ones

GIB = 2**30
PACKAGES = {
    "torch": "2.13.0",
    "colossalai": "0.5.0",
    "transformers": "4.51.3",
    "datasets": "5.0.1",
    "numpy": "2.4.6",
}
QUESTIONS = Questions("/run", "/project", list(PACKAGES), "/save", "/cache", None, 29500)
DISK = {"free": 100 * GIB, "total": 200 * GIB, "at": "/", "writable": True}


def gpu(index: int, used: float = 10.0, driver: str = "550.54") -> dict[str, Any]:
    return {
        "index": str(index),
        "name": "NVIDIA H100",
        "mib": 81559.0,
        "used_mib": used,
        "driver": driver,
    }


def healthy(name: str, gpus: int = 2) -> Examined:
    facts = {
        "name": name,
        "python": "3.12.4",
        "executable": "/usr/bin/python",
        "python_found": True,
        "folder": True,
        "code": {"pretrain.py": "a", "llama_lib/run.py": "b"},
        "packages": dict(PACKAGES),
        "gpus": [gpu(index) for index in range(gpus)],
        "memory": 64 * GIB,
        "shm": {**DISK, "total": 32 * GIB},
        "disks": {path: dict(DISK) for path in ("/save", "/cache", "/tmp")},
        "temporary": "/tmp",
        "own_address": "10.0.0.1",
        "interfaces": {"lo": ["127.0.0.1"], "eth0": ["10.0.0.1"], "down0": []},
        "towards": {"address": "10.0.0.9", "own": "10.0.0.1", "interface": "eth0"},
        "cores": 8,
    }
    host = Host(name, is_local=False)
    return Examined(host, facts=facts, offset=0.01, sees=frozenset({"a", "b", "c"}))


def job_of(hosts: list[Examined], **values: Any) -> Job:
    here = copy.deepcopy(healthy("here"))
    known: dict[str, Any] = {"processes": 2, "checkpoint_bytes": None, "environment": {}}
    return Job(here, hosts, QUESTIONS, **{**known, **values})


def judged(change: Any = None, name: str = "b", **values: Any) -> list[Problem]:
    """Faults found on three hosts, of which `change` alters one."""
    hosts = [healthy(each) for each in "abc"]
    hosts[0].port = {"free": True}
    changed = next(host for host in hosts if host.host.name == name)
    if change is not None:
        change(changed)
    job = job_of(hosts, **values)
    assert "ssh" not in not_made(changed, job)
    return [problem for host in hosts for problem in problems_of(host, job)]


def only(problems: list[Problem]) -> Problem:
    assert len(problems) == 1, problems
    return problems[0]


def test_healthy_hosts_have_no_fault():
    assert judged() == []


def put(name: str, value: Any) -> Any:
    return lambda each: each.facts.update({name: value})


CASES = {
    "folder": (put("folder", False), "code", "no folder /run"),
    "one file": (
        put("code", {"pretrain.py": "a", "llama_lib/run.py": "x", "llama_lib/own.py": "y"}),
        "code",
        "llama_lib/run.py changed; llama_lib/own.py only there",
    ),
    "python": (put("python", "3.11.9"), "python", "got 3.11.9, expected 3.12.4"),
    "missing package": (
        put("packages", {**PACKAGES, "numpy": None}),
        "packages",
        "numpy: got none, expected 2.4.6",
    ),
    "fewer gpus": (put("gpus", [gpu(0)]), "gpus", "1 GPU(s), expected 2 for --nproc_per_node 2"),
    "more gpus": (put("gpus", [gpu(0), gpu(1), gpu(2)]), "gpus", "3 GPU(s), expected 2 as on most"),
    "driver": (
        put("gpus", [gpu(0, driver="535.1"), gpu(1, driver="535.1")]),
        "gpus",
        "got 535.1, expected 550.54",
    ),
    "gpu in use": (put("gpus", [gpu(0), gpu(1, 70000.0)]), "gpus", "GPU 1 is in use: 68 of 80 GiB"),
    "memory": (put("memory", GIB), "memory", "1.0 GiB of memory are free, expected 2.0 GiB"),
    "shm": (put("shm", {"total": 64 * 2**20}), "memory", "/dev/shm has 64.0 MiB"),
    "read-only": (
        put("disks", {"/save": {**DISK, "writable": False}}),
        "disk",
        "--save_dir /save: / cannot be written to",
    ),
    "no name": (put("own_address", None), "network", "has no address of its own there"),
    "loopback name": (put("own_address", "127.0.1.1"), "network", "means 127.0.1.1 there"),
    "first is loopback": (
        put("towards", {"address": "127.0.1.1", "own": "127.0.0.1", "interface": "lo"}),
        "network",
        "a means 127.0.1.1 there, which is that host itself",
    ),
    "no way": (put("towards", None), "network", "no way to a"),
    "firewall": (
        lambda each: setattr(each, "unreachable", "timed out"),
        "network",
        "no connection to a port 29500 (timed out)",
    ),
    "clock": (
        lambda each: setattr(each, "offset", -31.2),
        "clock",
        "31.2 s behind that of most hosts",
    ),
    "unreadable": (
        lambda each: each.facts.update(memory=None, errors={"memory": "OSError: no"}),
        "memory",
        "its memory could not be looked at (OSError: no)",
    ),
    "nvidia-smi": (
        lambda each: each.facts.update(gpus=None, errors={"gpus": "RuntimeError: mismatch"}),
        "gpus",
        "nvidia-smi fails (RuntimeError: mismatch)",
    ),
}


@pytest.mark.parametrize("kind", CASES)
def test_a_fault_is_named(kind):
    change, check, message = CASES[kind]
    problem = only(judged(change))
    assert (problem.host, problem.check) == ("b", check)
    assert message in problem.what
    assert problem.mend


def test_an_untested_package_on_all_hosts_is_one_line():
    hosts = [healthy(each) for each in "abc"]
    job = job_of(hosts)
    for each in [job.here, *hosts]:
        each.facts["packages"]["torch"] = "2.5.1"
    problems = [problem for each in hosts for problem in problems_of(each, job)]
    (line,) = problem_lines(problems)
    assert line.startswith("a, b, c: torch: got 2.5.1, expected 2.8 to 2.13; ")


def test_the_starting_hosts_clock_is_outvoted():
    hosts = [healthy(each) for each in "abc"]
    for each in hosts:
        each.offset = 60.0
    job = job_of(hosts)
    assert not [problem for each in hosts for problem in problems_of(each, job)]


def test_a_taken_port_with_and_without_its_holder():
    def taken(holder: str | None) -> str:
        answer = {"free": False, "why": "Address already in use", "holder": holder}
        problem = only(judged(lambda each: setattr(each, "port", answer), name="a"))
        assert "--master_port 29501" in problem.mend
        return problem.what

    assert taken("pid 7 (python)") == "port 29500 is not free (pid 7 (python) has it)"
    assert "whose it is cannot be seen" in taken(None)


def test_the_host_with_a_folder_of_its_own_is_the_one():
    """Also where it is the first: the others saw each other's tokens."""

    def alone(each: Examined) -> None:
        each.sees = frozenset({"a"})

    problem = only(judged(alone, name="a"))
    assert (problem.host, problem.short) == ("a", "not shared")


def test_room_for_one_checkpoint():
    problem = only(
        judged(
            lambda each: each.facts["disks"]["/save"].update(free=GIB * 50),
            checkpoint_bytes=90 * GIB,
        )
    )
    assert (
        "--save_dir /save has 50.0 GiB free, expected 90.0 GiB, for one checkpoint" in problem.what
    )


@pytest.mark.parametrize(
    ("variable", "value", "fits"),
    [
        ("GLOO_SOCKET_IFNAME", "eth0", True),
        ("GLOO_SOCKET_IFNAME", "eth", False),
        ("GLOO_SOCKET_IFNAME", "down0", False),
        ("NCCL_SOCKET_IFNAME", "eth", True),
        ("NCCL_SOCKET_IFNAME", "=eth", False),
        ("NCCL_SOCKET_IFNAME", "ib,eth0", True),
        ("NCCL_SOCKET_IFNAME", "^lo,docker", True),
        ("NCCL_SOCKET_IFNAME", "^lo,eth", False),
    ],
)
def test_interfaces_that_are_asked_for(variable, value, fits):
    problems = judged(environment={variable: value})
    assert bool(problems) is not fits
    assert all(f"{variable} is {value}" in problem.what for problem in problems)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize(
    ("variable", "value", "lacks"),
    [
        ("GLOO_SOCKET_IFNAME", "eth77", "no interface eth77"),
        ("GLOO_SOCKET_IFNAME", "eth0,eth77", "no interface eth77"),
        ("GLOO_SOCKET_IFNAME", "down0", "no address on interface down0"),
        ("NCCL_SOCKET_IFNAME", "ib,eth77:2", "no interface ib, eth77"),
        ("NCCL_SOCKET_IFNAME", "=eth", "no interface eth"),
        ("NCCL_SOCKET_IFNAME", "^lo,eth", "no interface other than lo, eth"),
    ],
)
def test_an_interface_that_is_not_there_is_named_on_one_host_and_on_many(
    count, variable, value, lacks
):
    """Regression: on one host nothing was said, and the run ended in gloo's own words."""
    hosts = [healthy(each) for each in "abc"[:count]]
    job = job_of(hosts, environment={variable: value})
    problems = [problem for each in hosts for problem in problems_of(each, job)]
    assert [problem.check for problem in problems] == ["network"] * count
    (line,) = problem_lines(problems)
    names = ", ".join("abc"[:count])
    assert line.startswith(f"{names}: has {lacks}; it has lo, eth0 ({variable} is {value}); set ")


def test_of_a_save_dir_that_takes_nothing_the_room_is_not_a_second_fault():
    """Regression: of --save_dir /proc/x also its 0.0 MiB of room were a problem."""

    def refuse(each: Examined) -> None:
        each.token_error = "FileNotFoundError: /save"
        each.facts["disks"]["/save"].update(free=0, writable=False)
        each.facts["disks"]["/cache"].update(free=0)

    first, second = judged(refuse)
    assert (first.check, second.check) == ("save_dir", "disk")
    assert "nothing can be written in /save (FileNotFoundError" in first.what
    assert "--cache_dir /cache has 0.0 MiB free" in second.what
    assert "/save" not in second.what


def test_a_host_that_does_not_answer():
    hosts = [healthy("a"), Examined(Host("b", is_local=False))]
    hosts[1].failure = HostError("b", "no way leads to it", "is the host up?")
    job = job_of(hosts)
    assert only(problems_of(hosts[1], job)).short == "unreachable"
    assert not_made(hosts[1], job) == {*CHECKS} - {"ssh"}
    assert problems_of(hosts[0], job) == []


def test_the_table_and_its_lines():
    faults = [
        Problem("b", "gpus", "1 GPU(s)", "1 GPU", "mend"),
        Problem("b", "gpus", "driver 1", "driver", "mend"),
        Problem("c", "code", "no code", "no code", "rsync x {host}:x"),
    ]
    lines = table(
        ["a", "b", "c"], ["ssh", "code", "gpus"], faults, {"a": set(), "b": {"code"}, "c": set()}
    )
    assert lines == [
        "host  ssh  code     gpus",
        "a     ok   ok       ok",
        "b     ok   -        1 GPU(s) +1",
        "c     ok   no code  ok",
    ]
    assert problem_lines(faults) == [
        "b: 1 GPU; mend.",
        "b: driver; mend.",
        "c: no code; rsync x c:x.",
    ]
    both = [faults[2], Problem("d", "code", "no code", "no code", "rsync x {host}:x")]
    assert problem_lines(both) == ["c, d: no code; rsync x HOST:x."]


def speeds(matmul: list[float], links: list[float], per_host: int = 1) -> Speeds:
    hosts = [f"h{number}" for number in range(len(matmul) // per_host)]
    return Speeds(hosts, per_host, dict(enumerate(matmul)), {}, dict(enumerate(links)))


def test_slow_processes_are_named_with_the_numbers():
    found = slow_ones(speeds([600.0, 610.0, 605.0, 400.0], [], per_host=2), on_gpu=True)
    problem = only(found)
    assert problem.host == "h1"
    assert problem.short == "66%"
    assert "GPU 1 is slow: matmul 400 TFLOPS, median 602 TFLOPS (66%" in problem.what


def test_seventy_percent_is_not_slow():
    assert slow_ones(speeds([1.0, 1.0, 0.71], [1.0, 1.0, 1.0]), on_gpu=False) == []


def test_of_a_slow_connection_the_host_with_two_is_named():
    """Host 1 receives slowly and host 2 receives slowly from it: 0 and 2 have a good side."""
    problem = only(slow_ones(speeds([1.0] * 4, [5.0, 1.0, 1.0, 5.0]), on_gpu=False))
    assert problem.host == "h1"
    assert "slow connection: 1 GB/s at best, median 3" in problem.what


def test_a_process_that_fails_is_a_fault_of_its_host():
    failed = speeds([], [])
    failed.failures.append(("h7", "an all-reduce failed (RuntimeError: x)"))
    assert only(slow_ones(failed, on_gpu=False)).host == "h7"
