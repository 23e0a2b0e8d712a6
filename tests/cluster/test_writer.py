"""What becomes of a job whose output is not read, or cannot be written as it is."""

import io
import os
import signal
import subprocess
import time

import pytest

from llama_lib.cluster.writer import Writer
from tests.cluster.launchers import ROOT, environment
from tests.cluster.test_launch import LAUNCH, assert_nothing_left, left_over, script

FLOOD = """
signal.signal(signal.SIGTERM, lambda *_: os._exit(143))
open(f"{sys.argv[1]}/started", "w").close()
while True:
    os.write(1, 4000 * b"x" + b"\\n")
    time.sleep(0.01)
"""


@pytest.mark.distributed
def test_a_reader_that_stands_still_holds_up_no_end(tmp_path):
    """A terminal after Ctrl-S kept a Ctrl-C, and the end after a failure, from every rank."""
    path = script(tmp_path, FLOOD)
    command = [*LAUNCH, "--nproc_per_node", "2", str(path), str(tmp_path)]
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment(MARK=str(tmp_path)),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as process:
        try:
            deadline = time.monotonic() + 30
            while not (tmp_path / "started").exists():
                assert time.monotonic() < deadline
                time.sleep(0.1)
            time.sleep(1)  # More than a pipe holds.
            process.send_signal(signal.SIGTERM)
            deadline = time.monotonic() + 10
            while [each for each in left_over(tmp_path) if each.pid != process.pid]:
                assert time.monotonic() < deadline, left_over(tmp_path)
                time.sleep(0.1)
            assert process.poll() is None, "it still has something to show"
            assert process.stdout is not None
            assert process.stdout.read().endswith(b"x\n")
            assert process.wait(10) == 143
            assert_nothing_left(tmp_path)
        finally:
            process.kill()
            for each in left_over(tmp_path):
                each.kill()


def test_the_order_is_kept_and_what_the_encoding_has_not_is_replaced():
    raw = io.BytesIO()
    writer = Writer(io.TextIOWrapper(raw, encoding="ascii"), io.StringIO())
    for number in range(100):
        writer.write(0, f"{number} \u2588\n")
    writer.flush()
    assert raw.getvalue().decode() == "".join(f"{number} ?\n" for number in range(100))


def test_a_closed_stream_is_named_on_the_other():
    receiving, sending = os.pipe()
    os.close(receiving)
    stderr = io.StringIO()
    with os.fdopen(sending, "w") as stdout:
        writer = Writer(stdout, stderr)
        for _ in range(3):
            writer.write(0, "text\n")
        writer.flush()
    assert stderr.getvalue().count("nobody reads the standard output any more") == 1
