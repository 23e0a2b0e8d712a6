"""Run a command in processes of its own and measure its time and the memory of all of them.

Invariant: a measurement covers the whole command as a user starts it, from the start of its first
process to the end of its last one; a command that fails raises and is never a result.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import resource
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]

# RSS is read and processes are looked for this often. For PSS the kernel walks through all pages,
# so it is read when RSS has grown by a share since, else so seldom that it costs 2% of a core.
_INTERVAL = 0.05
_TREE_INTERVAL = 0.2
_GROWTH = 1.03
_COST = 0.02
_MB = 10**6


@dataclass(frozen=True)
class Measured:
    """Seconds of a whole command, and the highest sums over its process tree, in MB (10^6 bytes).

    `cpu_seconds` are those of all its processes together: they tell a wait from work.
    `peak_pss_mb` counts every page that is in memory for the tree once, files it has mapped among
    them; `peak_anonymous_mb` leaves out the pages of files, which the kernel may drop at any time;
    `peak_rss_mb` counts a page again for each process that shares it.
    """

    seconds: float
    cpu_seconds: float
    peak_pss_mb: float
    peak_anonymous_mb: float
    peak_rss_mb: float
    peak_processes: int
    memory_samples: int


class MemoryWatch:
    """The highest memory of a process and all its descendants while the `with` block runs."""

    def __init__(self, pid: int) -> None:
        self._process = psutil.Process(pid)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.peaks = {"Pss": 0, "anonymous": 0, "Rss": 0, "processes": 0}
        self.samples = 0

    def __enter__(self) -> MemoryWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        looked = measured = cost = 0.0
        size_measured = 0
        tree: list[int] = []
        while not self._stop.wait(_INTERVAL):
            now = time.monotonic()
            if now - looked >= _TREE_INTERVAL:
                try:
                    tree = [p.pid for p in (self._process, *self._process.children(recursive=True))]
                except psutil.NoSuchProcess:
                    return
                looked = now
            size = sum(map(resident, tree))
            self._note({"Rss": size})
            if size > size_measured * _GROWTH or now - measured > cost / _COST:
                start = time.thread_time()
                found = [memory for pid in tree if (memory := memory_of(pid))]
                sums = {
                    name: sum(each[name] for each in found) for name in ("Pss", "anonymous", "Rss")
                }
                self._note({**sums, "processes": len(found)})
                self.samples += 1
                cost = time.thread_time() - start
                measured, size_measured = now, max(size, size_measured)

    def _note(self, values: Mapping[str, int]) -> None:
        for name, value in values.items():
            self.peaks[name] = max(self.peaks[name], value)


def resident(pid: int) -> int:
    """Bytes of RSS, cheaply; 0 if the process has ended."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()
    except (OSError, IndexError):
        return 0


def memory_of(pid: int) -> dict[str, int] | None:
    """Bytes of memory of a process by the kernel's own sums; None if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    except OSError:
        return None
    # The first line names the address range; the others read `Pss_Anon:   123 kB`.
    kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    if "Pss" not in kilobytes:
        return None
    anonymous = kilobytes["Pss_Anon"] + kilobytes["Pss_Shmem"]
    return {
        "Pss": kilobytes["Pss"] * 1024,
        "anonymous": anonymous * 1024,
        "Rss": kilobytes["Rss"] * 1024,
    }


def measure(command: Sequence[str], log: Path, environment: Mapping[str, str] = {}) -> Measured:
    """Run a command to its end; its output goes to `log`."""
    # What earlier commands wrote must not be on its way to the disk while this one runs.
    os.sync()
    with log.open("wb") as output:
        cpu = _cpu_of_children()
        start = time.perf_counter()
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        with MemoryWatch(process.pid) as watch:
            status = process.wait()
            seconds = time.perf_counter() - start
    if status:
        tail = log.read_text(errors="replace")[-4000:]
        raise SystemExit(f"{shlex.join(command)} ended with status {status}:\n{tail}")
    return Measured(
        round(seconds, 3),
        round(_cpu_of_children() - cpu, 3),
        round(watch.peaks["Pss"] / _MB, 1),
        round(watch.peaks["anonymous"] / _MB, 1),
        round(watch.peaks["Rss"] / _MB, 1),
        watch.peaks["processes"],
        watch.samples,
    )


def _cpu_of_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def surroundings(packages: Sequence[str]) -> dict[str, Any]:
    """Versions and hardware, to stand in a result file."""
    cpu = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    return {
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in packages},
        },
        "hardware": {
            "cpu": cpu,
            "cores": len(os.sched_getaffinity(0)),
            "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
            "load_before": round(os.getloadavg()[0], 2),
        },
    }


def command_line(module: str) -> str:
    """The command that was typed, as it stands in a result file."""
    return shlex.join(["python", "-m", module, *sys.argv[1:]])


def as_record(measured: Measured) -> dict[str, Any]:
    return asdict(measured)


def read_records(path: Path) -> list[dict[str, Any]]:
    """What a run wrote to one of its .jsonl files."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def add_output_flags(parser: argparse.ArgumentParser, result: Path) -> None:
    """--work_dir and --result, for `run_benchmark`."""
    parser.add_argument("--work_dir", help="folder for temporary files (the system's)")
    shown = result.relative_to(ROOT)
    parser.add_argument("--result", type=Path, default=result, help=f"({shown})")


def run_benchmark(
    arguments: argparse.Namespace,
    prefix: str,
    run: Callable[[argparse.Namespace, Path], dict[str, Any]],
    table: Callable[[dict[str, Any]], str],
) -> None:
    """Run a benchmark in a temporary folder; write and show its result."""
    with tempfile.TemporaryDirectory(
        prefix=prefix, dir=arguments.work_dir, ignore_cleanup_errors=True
    ) as work:
        result = run(arguments, Path(work))
    write_result(arguments.result, result)
    print(table(result))
    print(f"written to {arguments.result}")


def write_result(path: Path, result: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
