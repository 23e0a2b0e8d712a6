"""Finding the processes of a family, whatever else runs on the host."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from llama_lib.cluster.processes import descendants, kill_marked

# The system cuts names after 15 bytes, in the middle of a character where one is there.
_ODD_NAME = "import ctypes; ctypes.CDLL(None).prctl(15, b'caf\\xc3) (', 0, 0, 0); "


@contextmanager
def started(text: str = "", **variables: str) -> Iterator["subprocess.Popen[bytes]"]:
    """A Python that has run `text` and sleeps."""
    command = [sys.executable, "-c", f"{text}\nimport time; print(flush=True); time.sleep(60)"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, **variables})
    try:
        assert process.stdout is not None and process.stdout.readline()
        yield process
    finally:
        process.kill()
        process.communicate()


def test_a_process_with_an_odd_name_hides_no_other():
    """An agent of a host with such a process left all behind that its ranks had started."""
    with started(_ODD_NAME) as odd, started() as plain:
        assert {odd.pid, plain.pid} <= set(descendants(os.getpid()))


def test_ranks_of_this_attempt_are_spared():
    """Hosts that are containers of one machine may see each other's processes."""
    with (
        started(MARK="run", ATTEMPT="0") as earlier,
        started(MARK="run", ATTEMPT="1") as current,
        started(MARK="other", ATTEMPT="0") as other,
    ):
        kill_marked("MARK", "run", "ATTEMPT=1")
        assert earlier.wait(10) == -9
        time.sleep(0.2)
        assert current.poll() is None and other.poll() is None
        kill_marked("MARK", "run")
        assert current.wait(10) == -9
        assert other.poll() is None
