"""Lines of progress, and memory that stays flat."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from llama_lib.data import progress as progress_module
from llama_lib.data.progress import Progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    now = [100.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])
    yield now


def test_lines_tell_percent_speed_and_time_left(capsys, clock: list[float]) -> None:
    percents: list[int] = []
    progress = Progress("tokenising", 1_000_000_000, percents.append)
    clock[0] += 5
    progress.show(0, 10e6)
    assert capsys.readouterr().err == "", "not more often than every ten seconds"
    clock[0] += 5.1
    progress.show(0, 50e6)
    progress.show(1, 51e6)
    assert capsys.readouterr().err == "tokenising, 5%, 5.0 MB/s, 3m12s left\n"
    clock[0] += 10.1
    progress.show(1, 50e6)
    assert capsys.readouterr().err == "tokenising, 10%, 5.0 MB/s, 3m02s left\n"
    assert percents == [1, 5, 10]


def test_what_was_there_does_not_count_as_speed(capsys, clock: list[float]) -> None:
    progress = Progress("tokenising", 100_000_000)
    progress.skip(60e6)
    clock[0] += 10.1
    progress.show(7, 10.1e6)
    shown = capsys.readouterr().err.splitlines()
    assert shown == ["tokenising: 60% are there already", "tokenising, 70%, 1.0 MB/s, 0m30s left"]


def peak_memory(arguments: list[str]) -> int:
    """Bytes that the command and its children use at most, shared pages counted once."""
    process = subprocess.Popen(arguments, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        peak = max(peak, sum(map(proportional, family(process.pid))))
        time.sleep(0.02)
    assert process.returncode == 0
    return peak


def family(pid: int) -> list[int]:
    found = [pid]
    try:
        for task in os.listdir(f"/proc/{pid}/task"):
            children = Path(f"/proc/{pid}/task/{task}/children").read_text().split()
            for child in children:
                found += family(int(child))
    except OSError:
        pass
    return found


def proportional(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:")), 0)


@pytest.mark.full
def test_memory_does_not_grow_with_the_text(tmp_path: Path, tokenizer_path: Path) -> None:
    peaks = []
    for name, times in (("small", 50_000), ("large", 250_000)):
        path = tmp_path / f"{name}.jsonl"
        with path.open("w") as file:
            for number in range(times):
                # Texts differ, their words do not: gigatoken remembers words, up to a limit.
                text = f"the cat {number % 500} sat on mat {number // 500} " * 15
                file.write(json.dumps({"text": text}) + "\n")
        arguments = ["-d", str(path), "--tokenizer", str(tokenizer_path), "--workers", "2"]
        arguments += ["--output", str(tmp_path / f"out-{name}"), "--cache_dir", str(tmp_path / "c")]
        command = [sys.executable, "-m", "llama_lib", "prepare", *arguments, "--dedup"]
        peaks.append(peak_memory(command))
    assert (tmp_path / "large.jsonl").stat().st_size > 100_000_000
    assert peaks[1] < peaks[0] + (24 << 20), f"{peaks} bytes"
    assert peaks[1] < 400 << 20
