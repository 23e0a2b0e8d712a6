"""The launcher on this machine: what reaches the ranks, what they say, how they end.

The ranks are small scripts. Several hosts and a training: tests/cluster/test_launch_hosts.py; the
command line: tests/cluster/test_launch_options.py.
"""

import json
import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.cluster.launchers import ROOT, TIMEOUT_SECONDS, Outcome, environment, run_here

pytestmark = pytest.mark.distributed

LAUNCH = [sys.executable, "-m", "llama_lib", "launch"]

# Arguments that shells, `colossalai run` and careless code change.
AWKWARD = [
    "two words",
    "it's",
    'say "hi"',
    "a;reboot",
    "$HOME",
    "`id`",
    "",
    "--",
    "*",
    "\\n",
    "a\nb",
]

# What a test host consists of.
OF_A_HOST = ("sshd", "sshd-session", "sshd-auth", "unshare", "sh", "bash", "setpriv", "nsenter")


def script(folder: Path, text: str) -> Path:
    path = folder / "ranks.py"
    path.write_text("import json, os, signal, sys, time\nrank = int(os.environ['RANK'])\n" + text)
    return path


def launched(folder: Path, nproc: int, path: Path, *words: str, **variables: str) -> Outcome:
    command = [*LAUNCH, "--nproc_per_node", str(nproc), str(path), *words]
    return run_here(command, folder, **variables)


def left_over(folder: Path) -> list[psutil.Process]:
    """Processes, of whatever host, that know `folder` by a variable or an argument."""
    found = []
    for process in psutil.process_iter():
        try:
            known = [*process.cmdline(), *process.environ().values()]
        except psutil.Error:
            continue
        if process.name() in OF_A_HOST:
            continue
        if any(str(folder) in text for text in known) and process.pid != os.getpid():
            found.append(process)
    return found


def assert_nothing_left(folder: Path, seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while left := left_over(folder):
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def wait_for_text(path: Path, pattern: str, seconds: float = 30.0) -> str:
    deadline = time.monotonic() + seconds
    while not re.search(pattern, path.read_text()):
        assert time.monotonic() < deadline, path.read_text()
        time.sleep(0.05)
    return path.read_text()


def hear_signals() -> None:
    """What is started in the background, or by nohup, inherits that these are ignored."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


class Started:
    """A launcher that runs; nothing of it is left after the `with` block."""

    def __init__(self, folder: Path, *words: str, **variables: str) -> None:
        self.folder, self.output = folder, folder / "output.txt"
        with self.output.open("wb") as file:
            self.process = subprocess.Popen(
                [*LAUNCH, *words],
                cwd=ROOT,
                # The folder marks every process of the run.
                env=environment(**variables, MARK=str(folder)),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                preexec_fn=hear_signals,
            )

    def __enter__(self) -> "Started":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        for process in left_over(self.folder):
            with suppress(psutil.NoSuchProcess):
                process.kill()

    def end(self, seconds: float = 40.0) -> Outcome:
        return Outcome(self.process.wait(seconds), self.output.read_text())


REPORT = """
with open(f"{sys.argv[1]}/rank-{rank}.json", "w") as file:
    json.dump({"words": sys.argv[2:], "variables": dict(os.environ), "stdin": sys.stdin.read(),
               "folder": os.getcwd()}, file)
"""


def test_words_and_variables_arrive_unchanged(tmp_path):
    folder = tmp_path / "a folder; `with` $signs"
    folder.mkdir()
    hostile = {"TORCH_TEXT": 'he said "hi" $HOME `touch HOSTILE`\nand left', "RANK": "7"}
    path = script(folder, REPORT)
    outcome = launched(folder, 2, path, str(folder), *AWKWARD, **hostile)
    assert outcome.code == 0, outcome.said
    for rank in range(2):
        report = json.loads((folder / f"rank-{rank}.json").read_text())
        assert report["words"] == AWKWARD
        assert report["stdin"] == ""
        assert report["folder"] == str(ROOT)
        variables = report["variables"]
        assert variables["TORCH_TEXT"] == hostile["TORCH_TEXT"]
        expected = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
        assert {name: int(variables[name]) for name in expected} == expected
        assert variables["MASTER_ADDR"] == "127.0.0.1"
    assert not (ROOT / "HOSTILE").exists()


def test_cores_are_shared_unless_the_user_chose(tmp_path):
    path = script(tmp_path, REPORT)
    command = [*LAUNCH, "--nproc_per_node", "2", str(path), str(tmp_path)]
    shell = environment()
    del shell["OMP_NUM_THREADS"]
    subprocess.run(command, cwd=ROOT, env=shell, check=True, capture_output=True)
    report = json.loads((tmp_path / "rank-0.json").read_text())
    share = max(1, len(os.sched_getaffinity(0)) // 2)
    assert report["variables"]["OMP_NUM_THREADS"] == str(share)


TALK = """
for line in range(2000):
    print(f"rank {rank} line {line}")
print("error of", rank, file=sys.stderr)
sys.stdout.write(f"last words of {rank}")
"""


def test_all_that_ranks_say_is_shown_in_order(tmp_path):
    path = script(tmp_path, TALK)
    done = subprocess.run(
        [*LAUNCH, "--nproc_per_node", "2", str(path)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        lines = [line for line in done.stdout.splitlines() if line.startswith(f"rank {rank} line")]
        assert lines == [f"rank {rank} line {line}" for line in range(2000)]
        assert f"error of {rank}\n" in done.stderr
        assert f"last words of {rank}\n" in done.stdout
    assert done.stdout.count("\n") == 2 * 2001, "a line for each line, and no more"


def test_an_unfinished_line_is_shown_while_it_lasts(tmp_path):
    path = script(tmp_path, "sys.stdout.write('\\r 10% done'); sys.stdout.flush(); time.sleep(60)")
    with Started(tmp_path, "--nproc_per_node", "1", str(path)) as run:
        wait_for_text(run.output, "10% done", 10)


@pytest.mark.parametrize(
    ("text", "code", "said"),
    [
        pytest.param("sys.exit(3 if rank == 1 else time.sleep(60))", 3, "rank 1", id="exit code"),
        pytest.param(
            "os.kill(os.getpid(), 9) if rank == 1 else time.sleep(60)",
            137,
            "rank 1 on this host was killed by SIGKILL",
            id="killed",
        ),
        pytest.param("raise ValueError('boom') if rank == 0 else 0", 1, "boom", id="exception"),
    ],
)
def test_a_rank_that_fails_ends_the_job_with_its_code(tmp_path, text, code, said):
    begun = time.monotonic()
    outcome = launched(tmp_path, 2, script(tmp_path, text))
    assert outcome.code == code, outcome.said
    assert said in outcome.said
    assert time.monotonic() - begun < 30
    assert_nothing_left(tmp_path)


@pytest.mark.full
def test_a_rank_that_will_not_end_is_killed(tmp_path):
    """It ignores SIGTERM and has children in sessions of their own."""
    text = """
if rank == 1:
    time.sleep(2)
    sys.exit(5)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if os.fork() == 0:
    os.setsid()
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
print("deaf", flush=True)
time.sleep(600)
"""
    outcome = launched(tmp_path, 2, script(tmp_path, text), MARK=str(tmp_path))
    assert outcome.code == 5, outcome.said
    assert outcome.said.count("deaf") == 2
    assert_nothing_left(tmp_path, 1)


def test_a_users_mistake_is_said_once_and_never_repeated(tmp_path):
    text = """
from llama_lib.cli import run_script
from llama_lib.errors import UserError
def main(argv):
    raise UserError(["--lr: got -1, expected more", "--tp: got 7, expected 1, 2 or 4"])
run_script(main)
"""
    outcome = run_here(
        [*LAUNCH, "--nproc_per_node", "2", "--restarts", "3", str(script(tmp_path, text))],
        tmp_path,
        PYTHONPATH=str(ROOT),
    )
    assert outcome.code == 2, outcome.said
    assert outcome.said.count("--lr: got -1") == 1, outcome.said
    assert "restart" not in outcome.said


ASKED = """
count = 0
def note(number, _):
    global count
    count += 1
    print(f"rank {rank} asked {count}", flush=True)
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, note)
print(f"rank {rank} ready, terminal {sys.stdout.isatty()}", flush=True)
while not count:
    time.sleep(0.1)
time.sleep(float(sys.argv[1]))
print(f"rank {rank} saved", flush=True)
os._exit(128 + int(sys.argv[2]))
"""


def test_one_ctrl_c_of_a_terminal_asks_every_rank_once(tmp_path):
    """The terminal sends it to the launcher's process group; ranks are in none of its groups."""
    path = script(tmp_path, ASKED)
    command = [*LAUNCH, "--nproc_per_node", "2", "--restarts", "2", str(path), "3", "2"]
    pid, terminal = pty.fork()
    if pid == 0:
        hear_signals()
        os.chdir(ROOT)
        os.execve(command[0], command, environment(MARK=str(tmp_path)))
    said = b""

    def read_until(pattern: bytes) -> None:
        nonlocal said
        while not re.search(pattern, said, re.DOTALL):
            assert select.select([terminal], [], [], TIMEOUT_SECONDS)[0], said
            try:
                said += os.read(terminal, 4096)
            except OSError:
                raise AssertionError(said) from None

    read_until(rb"rank 0 ready.*rank 1 ready|rank 1 ready.*rank 0 ready")
    os.write(terminal, b"\x03")
    read_until(rb"saved.*saved")
    while True:
        try:
            more = os.read(terminal, 4096)
        except OSError:
            break
        said += more
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code == 130, said
    for rank in (b"0", b"1"):
        assert said.count(b"rank " + rank + b" asked") == 1, said
    assert b"SIGINT: passed on to all ranks" in said
    assert b"rank 0 ready, terminal True" in said, "its progress bar is drawn"
    assert b"rank 1 ready, terminal False" in said
    assert b"launch: ended as asked; exit code 130" in said
    assert b"restart 1" not in said
    assert_nothing_left(tmp_path)


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGHUP, marks=pytest.mark.full)]
)
def test_the_end_that_was_asked_for_is_awaited(tmp_path, number):
    """A terminal that is closed asks for the same; a pause would lose the job and is refused."""
    path = script(tmp_path, ASKED)
    with Started(tmp_path, "--nproc_per_node", "2", "--restarts", "1", str(path), "6", "15") as run:
        wait_for_text(run.output, "(?s)ready.*ready")
        run.process.send_signal(signal.SIGTSTP)
        wait_for_text(run.output, "a running job cannot be paused")
        run.process.send_signal(number)
        outcome = run.end(20)
    assert outcome.code == 143, outcome.said
    assert outcome.said.count("saved") == 2
    assert outcome.said.count("asked 1") == 2
    assert "asked 2" not in outcome.said
    assert "restart 1" not in outcome.said


def test_a_second_signal_ends_at_once(tmp_path):
    path = script(tmp_path, ASKED)
    with Started(tmp_path, "--nproc_per_node", "2", str(path), "600", "15") as run:
        wait_for_text(run.output, "(?s)ready.*ready")
        run.process.send_signal(signal.SIGTERM)
        wait_for_text(run.output, "(?s)asked 1.*asked 1")
        run.process.send_signal(signal.SIGTERM)
        outcome = run.end(10)
        assert outcome.code == 137, outcome.said
        assert_nothing_left(tmp_path)
    # Regression: it said `ended as asked`, as after a save.
    last = outcome.said.splitlines()[-1]
    expected = "the ranks were ended at once, as asked, which saves nothing; exit code 137"
    assert last == f"launch: {expected}"


def test_a_save_that_fails_after_a_signal_is_not_called_as_asked(tmp_path):
    text = "signal.signal(signal.SIGTERM, lambda *_: os._exit(1))\nprint('ready', flush=True)"
    path = script(tmp_path, f"{text}\ntime.sleep(60)")
    with Started(tmp_path, "--nproc_per_node", "1", "--restarts", "1", str(path)) as run:
        wait_for_text(run.output, "ready")
        run.process.send_signal(signal.SIGTERM)
        outcome = run.end(20)
    assert outcome.code == 1, outcome.said
    assert "launch: rank 0 on this host ended with exit code 1 first; exit code 1" in outcome.said
    assert "as asked" not in outcome.said
    assert "restart 1" not in outcome.said


def test_a_job_outlives_the_reader_of_its_output(tmp_path):
    path = script(tmp_path, TALK + f"\ntime.sleep(3)\nopen('{tmp_path}/done', 'w').close()")
    command = [*LAUNCH, "--nproc_per_node", "1", str(path)]
    with subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        said = process.stderr.read()
    assert process.returncode == 0, said
    assert b"nobody reads the standard output any more" in said
    assert (tmp_path / "done").exists()


SLEEP = """
import subprocess
child = subprocess.Popen(["sleep", "600"], start_new_session=True)
print(f"rank {rank} is {os.getpid()}", flush=True)
time.sleep(600)
"""


def agents(run: Started) -> list[psutil.Process]:
    """The two processes of this machine's agent, parent first."""
    found = [each for each in left_over(run.folder) if "llama_lib.cluster.agent" in each.cmdline()]
    return sorted(found, key=lambda each: each.parent() in found)


@pytest.mark.parametrize("victim", ["launcher", "guard", "agent", "rank"])
def test_nothing_outlives_a_killed_part(tmp_path, victim):
    with Started(tmp_path, "--nproc_per_node", "2", str(script(tmp_path, SLEEP))) as run:
        said = wait_for_text(run.output, r"(?s)is \d+.*is \d+")
        rank = int(re.findall(r"is (\d+)", said)[0])
        guard, agent = agents(run)
        pid = {"launcher": run.process.pid, "guard": guard.pid, "agent": agent.pid, "rank": rank}
        os.kill(pid[victim], signal.SIGKILL)
        outcome = run.end()
        expected = {"launcher": -9, "rank": 137}.get(victim, 1)
        assert outcome.code == expected, outcome.said
        assert_nothing_left(tmp_path, 20)


def test_a_port_in_use_is_named_with_its_owner(tmp_path):
    path = script(tmp_path, "print('started')")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        words = ["--nproc_per_node", "2", "--master_port", port, str(path)]
        outcome = run_here([*LAUNCH, *words], tmp_path)
    assert outcome.code == 1
    assert f"port {port} is used by pid {os.getpid()} (" in outcome.said
    assert "pass another one by --master_port" in outcome.said
    assert "started" not in outcome.said


FLAKY = """
attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
print(f"attempt {attempt} of rank {rank}: {sys.argv[1:]}", flush=True)
if attempt < 2:
    sys.exit(1) if rank else time.sleep(60)
"""


def test_restarts_go_on_with_load_auto_until_one_works(tmp_path):
    path = script(tmp_path, FLAKY).rename(tmp_path / "pretrain.py")
    words = ["--nproc_per_node", "2", "--restarts", "3", str(path), "-o", str(tmp_path / "saved")]
    outcome = run_here([*LAUNCH, *words], tmp_path)
    assert outcome.code == 0, outcome.said
    assert "attempt 0 of rank 0: ['-o'" in outcome.said
    for attempt in (1, 2):
        assert re.search(rf"attempt {attempt} of rank 0: .*'--load', 'auto'\]", outcome.said)
        line = f"restart {attempt} of 3, since rank 1 on this host ended with exit code 1"
        assert outcome.said.count(line) == 1, outcome.said
    assert "restart 3" not in outcome.said


def test_restarts_come_to_an_end(tmp_path):
    words = ["--nproc_per_node", "1", "--restarts", "1", str(script(tmp_path, "sys.exit(4)"))]
    outcome = run_here([*LAUNCH, *words], tmp_path)
    assert outcome.code == 4
    assert outcome.said.count("restart 1 of 1") == 1
    assert "restart 2" not in outcome.said
