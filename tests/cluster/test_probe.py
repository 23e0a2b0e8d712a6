"""The program that answers for a host: alone, with nothing of this project beside it."""

import ast
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llama_lib.cluster import probe
from llama_lib.cluster.examination import AnswerError, Interview
from llama_lib.cluster.remote import Host, HostError

PROGRAM = Path(probe.__file__)
HERE = Host("this", is_local=True)


def conversation(*questions: dict[str, Any]) -> list[dict[str, Any]]:
    """Answers of the program, run where nothing but Python's own library can be imported."""
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", PROGRAM.read_text()],
        input="".join(json.dumps(question) + "\n" for question in questions),
        cwd="/",
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert not done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def facts_question(**values: Any) -> dict[str, Any]:
    known = {"ask": "facts", "python": sys.executable, "folder": "/", "root": "/nowhere"}
    others = {"packages": [], "search": [], "paths": [], "temporary": None}
    return {**known, **others, "first": "127.0.0.1", **values}


def test_it_needs_nothing_but_an_old_python():
    tree = ast.parse(PROGRAM.read_text(), feature_version=(3, 8))
    imported = {
        name
        for node in ast.walk(tree)
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [str(node.module)]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert {name.split(".")[0] for name in imported} <= set(sys.stdlib_module_names)


def test_facts_of_a_host_without_the_project(tmp_path):
    (tmp_path / "llama_lib").mkdir()
    (tmp_path / "run.py").write_text("1")
    (tmp_path / "llama_lib" / "a.py").write_text("2")
    (tmp_path / "llama_lib" / "notes.txt").write_text("3")
    nowhere, here = conversation(facts_question(), facts_question(root=str(tmp_path)))
    assert nowhere["is"]["code"] == {}
    assert set(here["is"]["code"]) == {"run.py", "llama_lib/a.py"}
    facts = here["is"]
    assert facts["python"] == sys.version.split()[0]
    assert facts["python_found"] and facts["folder"]
    assert facts["memory"] > 2**20
    assert facts["towards"] == {"address": "127.0.0.1", "own": "127.0.0.1", "interface": "lo"}
    assert "127.0.0.1" in facts["interfaces"]["lo"]
    assert "errors" not in facts


def test_a_changed_file_has_another_hash(tmp_path):
    source = tmp_path / "run.py"
    source.write_text("a")
    before = probe.code(str(tmp_path))
    source.write_text("b")
    assert probe.code(str(tmp_path)) != before


def test_one_failing_fact_leaves_the_others(monkeypatch):
    def broken() -> int:
        raise OSError("no /proc")

    monkeypatch.setattr(probe, "memory", broken)
    facts = probe.facts(facts_question())
    assert facts["memory"] is None
    assert facts["errors"] == {"memory": "OSError: no /proc"}
    assert facts["python"]


def test_versions_are_read_from_metadata(tmp_path):
    folder = tmp_path / "torch-1.2.3.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 1.2.3\n")
    question = facts_question(packages=["torch", "absent"], search=[str(tmp_path)])
    (answer,) = conversation(question)
    assert answer["is"]["packages"] == {"torch": "1.2.3", "absent": None}


NVIDIA_SMI = """#!/bin/sh
echo "0, GPU-1a2b, 81559, 512, 550.54.15, NVIDIA H100, any"
echo "1, GPU-1a3c, 81559, [N/A], 550.54.15, NVIDIA H100, any"
"""


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        (NVIDIA_SMI, [("0", 512.0), ("1", None)]),
        ("#!/bin/sh\necho No devices were found\nexit 6\n", []),
        (None, []),
    ],
    ids=["two", "none", "no driver"],
)
def test_gpus(monkeypatch, tmp_path, script, expected):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if script:
        program = tmp_path / "nvidia-smi"
        program.write_text(script)
        program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path) if not script else f"{tmp_path}:/bin:/usr/bin")
    found = probe.gpus()
    assert [(gpu["index"], gpu["used_mib"]) for gpu in found] == expected
    assert all(gpu["name"] == "NVIDIA H100, any" and gpu["mib"] == 81559 for gpu in found)


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ("1", ["1"]),
        ("1,0", ["1", "0"]),
        (" 0", ["0"]),
        ("GPU-1a3", ["1"]),
        ("GPU-1a", []),
        ("", []),
        ("-1", []),
        ("0,7,1", ["0"]),
        ("MIG-5c", ["0", "1"]),
    ],
)
def test_gpus_that_the_user_hid_are_not_counted(monkeypatch, tmp_path, chosen, expected):
    """Those of others on a shared host are busy, and processes of a run would not see them."""
    program = tmp_path / "nvidia-smi"
    program.write_text(NVIDIA_SMI)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
    assert [gpu["index"] for gpu in probe.gpus()] == expected


def test_a_driver_that_does_not_work_is_no_host_without_gpus(monkeypatch, tmp_path):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho Driver/library version mismatch\nexit 18\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert probe.facts(facts_question())["errors"] == {
        "gpus": "RuntimeError: Driver/library version mismatch"
    }


def test_a_taken_port_and_who_has_it():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        taken, nobody = conversation(
            {"ask": "port", "port": port}, {"ask": "reach", "first": "127.0.0.1", "port": 1}
        )
    assert taken["is"]["free"] is False
    assert taken["is"]["holder"].startswith(f"pid {os.getpid()} (")
    assert "refused" in nobody["is"]


def test_a_free_port_is_held_for_the_other_hosts():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    held, reached = conversation(
        {"ask": "port", "port": port}, {"ask": "reach", "first": "127.0.0.1", "port": port}
    )
    assert held["is"] == {"free": True}
    assert reached["is"] is None


def test_tokens_leave_nothing_behind(tmp_path):
    folder = tmp_path / "a" / "b"
    write = {"ask": "write_token", "folder": str(folder), "name": ".doctor-1"}
    read = {"ask": "read_tokens", "folder": str(folder), "names": [".doctor-1"]}
    written, seen, *_ = conversation(write, read, {"ask": "remove_token"})
    assert written == {"is": None}
    assert seen == {"is": [".doctor-1"]}
    assert not (tmp_path / "a").exists()


def test_a_lost_connection_leaves_nothing_behind_either(tmp_path):
    kept = tmp_path / "a" / "kept"
    kept.parent.mkdir()
    kept.write_text("of a run")
    conversation({"ask": "write_token", "folder": str(kept.parent), "name": ".doctor-1"})
    assert list(kept.parent.iterdir()) == [kept]


def test_what_cannot_be_written_is_an_answer(tmp_path):
    (tmp_path / "file").write_text("")
    refused, clock = conversation(
        {"ask": "write_token", "folder": str(tmp_path / "file"), "name": "x"}, {"ask": "clock"}
    )
    assert "FileExistsError" in refused["error"]
    assert clock["is"] > 0


def test_an_interview(tmp_path):
    talk = Interview(HERE)
    try:
        assert talk.ask("clock") > 0
        with pytest.raises(AnswerError, match="nothing_like_it"):
            talk.ask("nothing_like_it")
        assert talk.ask("facts", **{k: v for k, v in facts_question().items() if k != "ask"})
    finally:
        talk.close()
    with pytest.raises(HostError, match="this: cannot run the checking program"):
        talk.ask("clock")


def test_a_host_that_greets(tmp_path, monkeypatch):
    """Some login files print a line even where nobody reads it."""
    shell = tmp_path / "sh"
    shell.write_text('#!/bin/sh\necho Welcome\necho 42\nexec /bin/sh "$@"\n')
    shell.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    talk = Interview(HERE)
    try:
        assert talk.ask("clock") > 42
    finally:
        talk.close()
