"""Options, markers and the report of the test suite.

Invariant: no test reads or writes the home directory of whoever runs it.
"""

import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("torch", "transformers", "colossalai", "datasets", "tokenizers", "safetensors", "numpy")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--full-report",
        metavar="PATH",
        help="write what ran, on what machine, and how every test ended to PATH",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "needs(*jobs): jobs of tests/distributed/worker.py")
    if path := config.getoption("--full-report"):
        config.pluginmanager.register(FullReport(Path(path)), "full-report")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Fast tests first: a slip shows in seconds, not after minutes of starting processes.
    items.sort(key=lambda item: item.get_closest_marker("distributed") is not None)
    gpu_tests = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_tests:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_tests:
            item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU"))


@pytest.fixture(scope="session", autouse=True)
def private_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A home directory of the session's own: this project's cache and Hugging Face's go there."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(home))
        patch.setenv("XDG_CACHE_HOME", str(home / ".cache"))
        patch.setenv("HF_HOME", str(home / ".cache" / "huggingface"))
        yield home


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A process group of this process alone."""
    import torch.distributed as dist

    rendezvous = dist.FileStore(str(tmp_path_factory.mktemp("store") / "file"), 1)
    dist.init_process_group("gloo", store=rendezvous, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@dataclass
class Ending:
    """How one test ended; `seconds` includes its fixtures."""

    outcome: str = "no result"
    reason: str = ""
    seconds: float = 0.0


class FullReport:
    """Collects how every test ended and writes one text file when the session ends."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self.begin = time.time()
        self.endings: dict[str, Ending] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        ending = self.endings.setdefault(report.nodeid, Ending())
        ending.seconds += report.duration
        if report.when != "call" and report.passed:
            return
        broken_fixture = report.failed and report.when != "call"
        ending.outcome = "error" if broken_fixture else report.outcome
        if report.skipped and isinstance(report.longrepr, tuple):
            ending.reason = report.longrepr[2].removeprefix("Skipped: ")

    def pytest_sessionfinish(self) -> None:
        totals = Counter(ending.outcome for ending in self.endings.values())
        counts = ", ".join(f"{number} {outcome}" for outcome, number in sorted(totals.items()))
        lines = [*_circumstances(self.begin), f"totals    {counts}", ""]
        lines += [
            f"{ending.outcome:7} {ending.seconds:8.2f} s  {nodeid}"
            + (f"  ({ending.reason})" if ending.reason else "")
            for nodeid, ending in self.endings.items()
        ]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text("\n".join(lines) + "\n")


def _circumstances(begin: float) -> list[str]:
    started = datetime.fromtimestamp(begin, UTC)
    versions = {"python": platform.python_version()}
    versions |= {name: importlib.metadata.version(name) for name in PACKAGES}
    cores = len(os.sched_getaffinity(0))
    memory = psutil.virtual_memory().total / 2**30
    return [
        f"date      {started:%Y-%m-%d %H:%M} UTC, {time.time() - begin:.0f} s",
        f"commit    {_commit()}",
        f"command   python -m pytest {shlex.join(sys.argv[1:])}",
        f"versions  {', '.join(f'{name} {version}' for name, version in versions.items())}",
        f"hardware  {_processor()}, {cores} cores, {memory:.1f} GiB, {_gpu()}",
        f"system    {platform.system()} {platform.release()}",
    ]


def _commit() -> str:
    git = ["git", "-C", str(ROOT)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
        # The report itself is the one file that a run may change.
        changes = ["status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks"]
        changed = subprocess.run([*git, *changes], capture_output=True, text=True)
    except FileNotFoundError:
        return "unknown (no git)"
    if commit.returncode:
        return "unknown (not a git checkout)"
    return commit.stdout.strip() + (" with local changes" if changed.stdout else "")


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _gpu() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
