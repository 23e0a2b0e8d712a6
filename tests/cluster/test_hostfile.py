"""Host files: what ColossalAI's launcher would misread is refused with what to write instead."""

from pathlib import Path

import pytest

from llama_lib.cluster.hostfile import read_hostfile
from llama_lib.errors import UserError


def written(folder: Path, text: str | bytes) -> Path:
    path = folder / "hosts.txt"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def refusal(path: Path) -> list[str]:
    with pytest.raises(UserError) as caught:
        read_hostfile(path)
    return caught.value.problems


def test_hosts_in_the_order_of_the_file(tmp_path):
    text = "worker-1\n\n  gpu_node.cluster.example \r\n10.0.0.7\n::1\nfe80::2%eth0\nWorker2"
    assert read_hostfile(written(tmp_path, text)) == [
        "worker-1",
        "gpu_node.cluster.example",
        "10.0.0.7",
        "::1",
        "fe80::2%eth0",
        "Worker2",
    ]


def test_the_sample_files_are_host_files():
    folder = Path(__file__).parents[2] / "hostfiles"
    assert [len(read_hostfile(path)) for path in sorted(folder.glob("*.txt"))] == [4, 2]


FAULTS = {
    "worker-0 slots=8": "--nproc_per_node 8 (to a benchmark script: NPROC=8)",
    "worker-0 slots = 4 max_slots=8": "write worker-0 and pass --nproc_per_node 4",
    "# the first rack": "delete it: ColossalAI's launcher takes a comment for a host",
    "#": "delete it",
    "node1  # the first": "write node1: ColossalAI's launcher takes a comment",
    "node1 node2": "write node1; processes per host are given by --nproc_per_node",
    "node1 8": "write node1; processes per host are given by --nproc_per_node",
    "node1,node2": "write each host on a line of its own",
    "node[1-4]": "scontrol show hostnames",
    "me@node1": "write node1; the user goes into ~/.ssh/config, as User me",
    "me@node1:2222": "write node1; the user goes into ~/.ssh/config, as User me",
    "node1:2222": "write node1; an ssh port is given by --ssh_port",
    "10.0.0.300": "this is no IPv4 address; correct it",
    "node1;reboot": "a host name has letters, digits",
    "$(reboot)": "a host name has letters, digits",
    "`id`": "a host name has letters, digits",
    "-oProxyCommand=reboot": "a host name has letters, digits",
    "node..1": "a host name has letters, digits",
    "n\u00f6de": "a host name has letters, digits",
}


@pytest.mark.parametrize(("line", "mend"), FAULTS.items())
def test_a_line_that_is_no_host(tmp_path, line, mend):
    path = written(tmp_path, f"node9\n{line}\n")
    (problem,) = refusal(path)
    assert problem.startswith(f"{path} line 2: got {line!r}, expected one host name or address")
    assert mend in problem


def test_all_faults_at_once(tmp_path):
    path = written(tmp_path, "node1\n# rack\nnode2 slots=8\nNODE1\n\nnode3")
    problems = refusal(path)
    assert [problem.split(": got")[0] for problem in problems] == [
        f"{path} line {number}" for number in (2, 3, 4)
    ]
    assert problems[2].endswith("which line 1 names already; delete one of them.")


@pytest.mark.parametrize("text", ["", "\n \n\t\n"])
def test_a_file_without_hosts(tmp_path, text):
    (problem,) = refusal(written(tmp_path, text))
    assert "names no host; write one host name or address per line" in problem


def test_what_is_no_text_file(tmp_path):
    assert "no such file" in refusal(tmp_path / "absent")[0]
    assert "not a file" in refusal(tmp_path)[0]
    for data in (b"\x80\x81\x00n", b"node1\0\n"):
        assert "not text" in refusal(written(tmp_path, data))[0]


@pytest.mark.parametrize(
    ("encoding", "name"), [("utf-8-sig", "UTF-8"), ("utf-16", "UTF-16"), ("utf-16-be", "UTF-16")]
)
def test_a_byte_order_mark_is_named(tmp_path, encoding, name):
    """Regression: it was said that the host name, which looks right, has other characters."""
    mark = "\ufeff" if encoding == "utf-16-be" else ""
    (problem,) = refusal(written(tmp_path, f"{mark}node1\nnode2\n".encode(encoding)))
    assert f"begins with the byte order mark of {name}," in problem
    assert "save it as UTF-8 without a byte order mark" in problem
