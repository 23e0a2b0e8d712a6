"""What a run says of itself while it goes on, read from its files.

Invariant: nothing here disturbs the run; half a line that is being written is left out.
"""

import contextlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llama_lib.checkpoint.manifest import Manifest, hash_problems, size_problems, step_directory
from tests.distributed.launching import records

# What --load auto says.
_RESUMED = re.compile(r"resumed \S+ at step (\d+)")
_REFUSED = re.compile(r"(step-\d{8}\S* (?:is damaged|is unfinished|did not finish).*)")

# The state that has to come out bit for bit; other files hold options and paths.
_STATE_FILES = ("model/", "optimizer/", "rng/")


@dataclass
class RunFiles:
    """The folder of one run, with all losses that its attempts had at each step."""

    root: Path
    losses: dict[int, set[float]] = field(default_factory=dict)
    _leftovers: set[tuple[str, int]] = field(default_factory=set)

    @property
    def save_dir(self) -> Path:
        return self.root / "checkpoint"

    @property
    def metrics(self) -> Path:
        return self.root / "tb" / "metrics.jsonl"

    def arguments(self) -> list[str]:
        return ["-o", str(self.save_dir), "-t", str(self.root / "tb")]

    def identity(self) -> tuple[int, bool] | None:
        """Which file holds the records now: a continued run writes a new one."""
        try:
            stat = self.metrics.stat()
        except FileNotFoundError:
            return None
        return stat.st_ino, stat.st_size == 0

    def last_step(self) -> int:
        return _last_step(self.metrics)

    def last_evaluated(self) -> int:
        return _last_step(self.root / "tb" / "eval.jsonl")

    def being_written(self) -> str | None:
        """The checkpoint that is being written, or was when the writer of this attempt died."""
        found = self._temporary() - self._leftovers
        return min(found)[0] if found else None

    def note_leftovers(self) -> str | None:
        """To be called when an attempt begins: what earlier ones left is not its own."""
        self._leftovers = self._temporary()
        return min(self._leftovers)[0] if self._leftovers else None

    def _temporary(self) -> set[tuple[str, int]]:
        """Unfinished checkpoints with the time of their last change: names occur again."""
        found = set()
        for path in self.save_dir.glob("step-*.tmp"):
            with contextlib.suppress(FileNotFoundError):
                found.add((path.name, path.stat().st_ctime_ns))
        return found

    @property
    def journal(self) -> Path:
        """What rank 0 writes itself: unlike the launcher's output it comes before the records."""
        return self.save_dir / "logs" / "rank-00000.log"

    def journal_size(self) -> int:
        return self.journal.stat().st_size if self.journal.exists() else 0

    def _said(self, offset: int) -> str:
        if not self.journal.exists():
            return ""
        return self.journal.read_bytes()[offset:].decode(errors="replace")

    def resumed_at(self, offset: int) -> int:
        """The step that the newest attempt went on after; 0 where it found no checkpoint."""
        found = _RESUMED.findall(self._said(offset))
        return int(found[-1]) if found else 0

    def refused(self, offset: int) -> list[str]:
        """Checkpoints that --load auto named and did not take."""
        return sorted(set(_REFUSED.findall(self._said(offset))))

    def remember_losses(self) -> None:
        """Of an attempt that has ended, before the next one cuts its records."""
        for record in records(self.metrics.parent):
            losses = self.losses.setdefault(record["step"], set())
            losses.add(record["loss"])

    def final(self, steps: int) -> "Ending":
        """What the run has come to, its last checkpoint read once more."""
        last = step_directory(self.save_dir, steps)
        manifest = Manifest.read(last)
        problems = size_problems(last, manifest) or hash_problems(last, manifest, manifest.files)
        assert not problems, problems
        hashes = {
            name: record.sha256
            for name, record in manifest.files.items()
            if name.startswith(_STATE_FILES) and name.endswith(".safetensors")
        }
        held_out = {
            record["step"]: record
            for record in map(json.loads, _lines(self.root / "tb" / "eval.jsonl"))
        }
        training = {record["step"]: record["loss"] for record in records(self.metrics.parent)}
        return Ending(hashes, training, held_out)


@dataclass(frozen=True)
class Ending:
    """What is equal at the end of two runs that trained the same."""

    hashes: dict[str, str]
    losses: dict[int, float]
    held_out: dict[int, dict[str, Any]]


def _lines(path: Path) -> Iterable[str]:
    return path.read_text().split("\n")[:-1] if path.is_file() else []


def _last_step(path: Path) -> int:
    """The step of the last whole record of a .jsonl file; 0 without one."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - 8192))
            lines = file.read().split(b"\n")[:-1]
    except FileNotFoundError:
        return 0
    return int(json.loads(lines[-1])["step"]) if lines else 0
