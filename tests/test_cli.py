"""Commands end in an exit code and one message, and are found without loading what they need."""

import ast
import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llama_lib import cli
from llama_lib.__main__ import COMMANDS, main
from llama_lib.errors import RunError, UserError

ROOT = Path(__file__).parents[1]


def raising(error: BaseException):
    def command(argv: list[str]) -> int:
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (RunError("disk is full"), 1, "disk is full\n"),
        (UserError(["one", "two"]), 2, "one\ntwo\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_errors_are_messages_and_exit_codes(error, code, message, capsys):
    assert cli.run_command(raising(error), []) == code
    assert capsys.readouterr() == ("", message)


def test_other_errors_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        cli.run_command(raising(ZeroDivisionError()), [])


@pytest.mark.parametrize(("result", "code"), [(None, 0), (0, 0), (3, 3)])
def test_results_are_exit_codes(result, code, monkeypatch):
    seen = []
    monkeypatch.setattr(sys, "argv", ["pretrain.py", "-c", "tiny"])
    with pytest.raises(SystemExit) as end:
        cli.run(lambda argv: seen.append(argv) or result)
    assert end.value.code == code
    assert seen == [["-c", "tiny"]]


def test_other_processes_let_the_first_one_speak(monkeypatch, capsys):
    waits: list[float] = []
    monkeypatch.setattr(cli.time, "sleep", waits.append)
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("LOCAL_RANK", "1")
    cli.run_command(raising(UserError("no")), [])
    assert len(waits) == 1
    cli.run_command(raising(RunError("lost")), [])
    assert len(waits) == 1
    assert capsys.readouterr().err == "[rank 5] no\n[rank 5] lost\n"


def test_help_is_quick_and_lists_every_command():
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "llama_lib", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert time.monotonic() - start < 2
    assert (done.returncode, done.stderr) == (0, "")
    assert all(f"  {name} " in done.stdout for name in COMMANDS)


@pytest.mark.parametrize(
    ("argv", "message"),
    [(["verfy"], "did you mean verify?"), ([], "no command given"), (["--lr"], "'--lr'")],
)
def test_unknown_command(argv, message, capsys):
    assert cli.run_command(main, argv) == 2
    assert message in capsys.readouterr().err


def test_arguments_reach_the_command(monkeypatch):
    monkeypatch.setitem(COMMANDS, "echo", ("tests.test_cli:echo", ""))
    assert main(["echo", "a", "--b"]) == 2


def echo(argv: list[str]) -> int:
    assert argv == ["a", "--b"]
    return len(argv)


@pytest.mark.parametrize("name", COMMANDS)
def test_command_exists(name):
    module, function = COMMANDS[name][0].split(":")
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None
    tree = ast.parse(Path(spec.origin).read_text())
    assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("code", [0, 1, 143])
def test_script_ends_with_its_code_and_all_its_output_and_no_shutdown(code):
    """A finished run once ended with SIGABRT: a gloo thread met the interpreter's shutdown."""
    program = (
        "import atexit, sys; from llama_lib.cli import run_script; "
        "atexit.register(lambda: print('shutdown')); "
        f"run_script(lambda argv: print('last line', *argv) or {code})"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "word"], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (code, "last line word\n")


def test_output_that_nobody_reads_any_more_is_no_failure(tmp_path):
    """`inspect ... | head -1` ends without a traceback."""
    program = (
        "from llama_lib.cli import run\n"
        "run(lambda argv: [print('line', flush=True) for _ in range(100_000)] and 0)"
    )
    command = f'"{sys.executable}" -c "$PROGRAM" | head -1'
    done = subprocess.run(
        ["bash", "-c", command],
        env={**os.environ, "PROGRAM": program, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert (done.stdout, done.stderr) == ("line\n", "")
