"""The ledger of a run: from the number of a step to the documents that went into it.

Invariant: `ledger.jsonl` in the save directory describes exactly the steps that count: a resumed
run cuts it like the metrics. Prepared data needs one line for each part of a run, because the order
is a function of the seed; a stream adds one line for each step.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from llama_lib.data.position import Position
from llama_lib.errors import RunError, UserError
from llama_lib.metrics import continued

FILE = "ledger.jsonl"


@dataclass(frozen=True)
class Part:
    """One start or resumption: `step` is its first step (from 1), `position` where its data begin.

    `num_steps` is the last step of its plan, `global_batch` counts rows, `identity` is the hash
    of the data.
    """

    step: int
    num_steps: int
    global_batch: int
    identity: str
    position: Position

    def samples(self, step: int) -> list[int]:
        """Samples of the global order that a step (from 1) of this part takes."""
        return self.position.samples(step - 1, self.global_batch)


class LedgerWriter:
    """Appends to the ledger; only the process with `is_writer` touches the file."""

    def __init__(self, save_dir: str, part: Part, is_writer: bool) -> None:
        self._file = continued(Path(save_dir) / FILE, part.step) if is_writer else None
        self._warned = False
        self._append({"step": part.step, "part": asdict(part)})

    def stream_step(self, step: int, state: dict[str, Any]) -> None:
        """Where the first row of a step begins in a stream."""
        self._append({"step": step, "stream": state})

    def _append(self, record: dict[str, Any]) -> None:
        if self._file is None:
            return
        try:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        except OSError as error:
            # Like the metrics: a full disk costs records, said once, not the run.
            if not self._warned:
                print(f"warning: {FILE} cannot be written ({error})", file=sys.stderr)
            self._warned = True

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


@dataclass
class Entry:
    """What the ledger says about one step."""

    part: Part
    samples: list[int]
    stream: dict[str, Any] = field(default_factory=dict)


def read_step(save_dir: str | Path, step: int) -> Entry:
    """What the ledger of a run says about a step.

    Raises:
        UserError: there is no ledger, or the run never did this step.
        RunError: the ledger is damaged.
    """
    path = Path(save_dir) / FILE
    if not path.is_file():
        raise UserError(
            f"{save_dir} holds no {FILE}: expected the --save_dir of a run of pretrain.py."
        )
    part, stream, begins = None, {}, None
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            try:
                record = json.loads(line)
                begins = begins or record["step"]
                if record["step"] > step:
                    break
                if "part" in record:
                    part = _part(record["part"])
                elif record["step"] == step:
                    stream = record["stream"]
            except (ValueError, KeyError, TypeError) as error:
                if not line.endswith("\n"):
                    break  # a run that was killed while writing leaves half a line
                raise RunError(f"{path} line {number} is damaged ({error}).") from error
    if part is None and step >= 1 and begins is not None:
        raise UserError(
            f"--step {step}: the ledger in {save_dir} begins with step {begins}; the steps before "
            "it are in that of the run it was resumed from."
        )
    if part is None:
        raise UserError(f"--step {step}: the run in {save_dir} has no such step.")
    if step > part.num_steps:
        raise UserError(f"--step {step}: the run in {save_dir} has {part.num_steps} steps.")
    return Entry(part, part.samples(step), stream)


def _part(record: dict[str, Any]) -> Part:
    place = record["position"]
    skips = tuple((int(first), int(stop)) for first, stop in place["skips"])
    return Part(
        record["step"],
        record["num_steps"],
        record["global_batch"],
        record["identity"],
        Position(place["step"], place["sample"], skips),
    )


def tokens_by_source(
    counted: Sequence[tuple[int, dict[str, int]]], before: dict[str, int]
) -> dict[str, int]:
    """Training tokens of each source so far.

    Args:
        counted: (replica, tokens by source since the run was started) of every rank; the ranks of
            one replica count the same rows.
        before: what the checkpoint it was started from says.
    """
    total = dict(before)
    for counts in dict(counted).values():
        for source, tokens in counts.items():
            total[source] = total.get(source, 0) + tokens
    return total


def consumption(consumed: dict[str, int], available: dict[str, int]) -> list[str]:
    """Lines that show what a run trained on: tokens, share, passes over the source."""
    total = max(1, sum(consumed.values()))
    width = max(map(len, consumed), default=0)
    lines = []
    for source, tokens in sorted(consumed.items(), key=lambda item: (-item[1], item[0])):
        line = f"  {source:<{width}}  {tokens:>15,} tokens  {tokens / total:>6.2%}"
        if available.get(source):
            line += f"  {tokens / available[source]:.3g} passes"
        lines.append(line)
    return lines
