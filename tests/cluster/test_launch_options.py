"""The launcher's command line: what it refuses, what it prints, where the script's words begin."""

import sys
from pathlib import Path

import pytest

from llama_lib.cluster import launch
from llama_lib.cluster.remote import Host, HostError
from llama_lib.errors import RunError, UserError
from tests.cluster.launchers import ROOT


def printed(capsys, *words: str) -> list[str]:
    assert launch.main([*words, "--print_only", "pretrain.py", "-o", "my runs/it's"]) == 0
    return capsys.readouterr().out.splitlines()


def test_the_torchrun_line_of_each_host(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    torchrun = f"cd {ROOT} && {Path(sys.executable).parent}/torchrun"
    command = """pretrain.py -o 'my runs/it'"'"'s'"""
    assert printed(capsys, "--nproc_per_node", "3") == [
        f"{torchrun} --standalone --nproc_per_node 3 {command}"
    ]
    hosts = tmp_path / "hosts.txt"
    hosts.write_text("localhost.example\nnode2.example\nspare.example\n")
    words = ["--hostfile", str(hosts), "--nproc-per-node=3", "--num-nodes", "2"]
    assert printed(capsys, *words, "--master_port", "29600") == [
        f"{name}: {torchrun} --nnodes 2 --node_rank {number} --nproc_per_node 3 --master_addr "
        f"localhost.example --master_port 29600 {command}"
        for number, name in enumerate(["localhost.example", "node2.example"])
    ]


def refusal(*words: str) -> str:
    with pytest.raises(UserError) as caught:
        launch.main(list(words))
    return str(caught.value)


def test_wrong_options_are_said_before_anything_starts(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    hosts = tmp_path / "hosts.txt"
    hosts.write_text("node1\n127.0.0.1\n")
    assert "got no script" in refusal()
    assert "'absent.py' is no file in" in refusal("absent.py", "-c", "tiny")
    assert "got '0', expected a number from 1" in refusal("--nproc_per_node", "0", "pretrain.py")
    assert "expected a port from 1 to 65535" in refusal("--master_port", "70000", "pretrain.py")
    assert "--nproc_per_nod" in refusal("--nproc_per_nod", "2", "pretrain.py")
    assert "--num_nodes needs the hosts' names" in refusal("--num_nodes", "2", "pretrain.py")
    file = ["--hostfile", str(hosts)]
    several = refusal(*file, "--num_nodes", "3", "--min_nodes", "4", "pretrain.py")
    assert "--num_nodes 3 is more than the 2 host(s)" in several
    assert "--min_nodes 4 is more than the 3 host(s) that work" in several
    assert "127.0.0.1 means another host on each host" in several
    assert "no such file" in refusal("--hostfile", str(tmp_path / "absent"), "pretrain.py")
    assert "needs --nproc_per_node" in refusal(
        *file[:1], only(hosts), "--print_only", "pretrain.py"
    )
    assert "ABSENT is not set here" in refusal("--pass", "ABSENT", "pretrain.py")


def test_a_script_of_the_project_that_lies_elsewhere_is_shown(tmp_path, monkeypatch):
    """Regression: from another folder nothing said which pretrain.py was meant."""
    monkeypatch.chdir(tmp_path)
    assert (
        f"'pretrain.py' is no file in {tmp_path} (there is {ROOT / 'pretrain.py'}); the first word"
        in refusal("pretrain.py", "-c", "tiny")
    )
    assert "there is" not in refusal("mine.py")


@pytest.mark.parametrize("word", ["train.sh", "pretrain", "llama_lib"])
def test_what_is_no_python_script_is_refused(tmp_path, monkeypatch, word):
    """Regression: every rank gave it to Python, which ended each in a SyntaxError."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.sh").write_text("torchrun pretrain.py\n")
    assert f"got '{word}', expected a Python script, named *.py" in refusal(word, "-c", "tiny")
    assert UserError.exit_code == 2


@pytest.mark.parametrize("count", ["-1", "x", "1.5"])
def test_no_restarts_is_a_number_too(count):
    """Regression: --restarts -1 was answered with `expected a number from 1`."""
    said = refusal("--restarts", count, str(ROOT / "pretrain.py"))
    assert f"--restarts: got '{count}', expected a number from 0" in said


def only(hosts: Path) -> str:
    hosts.write_text("node1\n")
    return str(hosts)


def test_what_a_single_far_host_is_not_given_is_named(capsys, tmp_path, monkeypatch):
    """With one host in the file nothing was said."""
    monkeypatch.setenv("HF_TOKEN", "hf_private_value")
    monkeypatch.setattr("llama_lib.cluster.link.remote.start", unreachable)
    monkeypatch.setattr(
        launch, "open_hosts", lambda names, _: [Host(name, False) for name in names]
    )
    hosts = tmp_path / "hosts"
    hosts.write_text("far-away\n")
    with pytest.raises(RunError, match="no way leads to it"):
        launch.main(["--hostfile", str(hosts), "--nproc_per_node", "1", str(ROOT / "pretrain.py")])
    said = capsys.readouterr().err
    assert "not passed on to the other hosts:" in said and "HF_TOKEN" in said
    assert "private" not in said


def unreachable(host: Host, *_: object) -> None:
    raise HostError(host.name, "no way leads to it", "is the host up?")


def test_srun_that_starts_it_several_times_is_refused(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("SLURM_PROCID", "3")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    said = refusal("--nproc_per_node", "2", "pretrain.py")
    assert "started by every task of srun (this is task 3 of 8)" in said
    # The first task would start the job beside the seven refusals.
    monkeypatch.setenv("SLURM_PROCID", "0")
    assert "task 0 of 8" in refusal("--nproc_per_node", "2", "pretrain.py")


def test_own_words_end_where_the_script_begins():
    split = launch.split
    assert split(["--hostfile", "x", "a.py", "--hostfile", "y", "--"]) == (
        ["--hostfile", "x"],
        ["a.py", "--hostfile", "y", "--"],
    )
    assert split(["--num-nodes=2", "--print-only", "a.py"]) == (
        ["--num_nodes=2", "--print_only"],
        ["a.py"],
    )
    assert split(["--", "-odd.py", "-c"]) == ([], ["-odd.py", "-c"])
    assert split(["--ssh_port"]) == (["--ssh_port"], [])
