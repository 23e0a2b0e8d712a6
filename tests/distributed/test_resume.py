"""A run that is killed and resumed is the run that was never killed, seen from its own records."""

import json
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from llama_lib.checkpoint.manifest import step_directories, step_directory
from llama_lib.control import SAVE_AND_EXIT
from llama_lib.data.loader import BatchLoader, PreparedRows, rows_hash
from llama_lib.data.order import RowOrder
from llama_lib.data.position import Position
from llama_lib.data.prepared import PreparedDataset
from tests.distributed.launching import Outcome, records, run, start

pytestmark = pytest.mark.distributed

STEPS, KILLED_AFTER = 10, 5
COMPARED = ("step", "tokens", "loss", "lr", "grad_norm", "loss_scale")

# 64 rows a step under every layout: slow enough to be killed before step 10.
LAYOUTS = {
    "gemini": "-p gemini -b 32",
    "gemini_offload": "-p gemini -b 32 --offload_optim_frac 1.0 --offload_param_frac 1.0",
    "gemini_accumulate": "-p gemini -b 16 --accumulation_steps 2",
    "gemini_auto": "-p gemini_auto -b 32",
    "zero2": "-p zero2 -b 32",
    "zero2_fp16": "-p zero2 -b 32 -x fp16",
    "zero2_cpu": "-p zero2_cpu -b 32",
    "hybrid_zero1": "-p hybrid_parallel -b 32",
    "hybrid_zero2": "-p hybrid_parallel --zero_stage 2 -b 32",
    "tp2": "-p hybrid_parallel --tp 2 -b 64",
    "pp2": "-p hybrid_parallel --pp 2 -b 64 --microbatch_size 16",
    "split_gather": "-p hybrid_parallel --tp 2 --sp_mode split_gather -b 64",
    "all_to_all": "-p hybrid_parallel --sp 2 --sp_mode all_to_all -b 64",
}


@dataclass
class Folder:
    """Where one run, interrupted or not, leaves everything."""

    root: Path

    @property
    def save_dir(self) -> Path:
        return self.root / "checkpoint"

    @property
    def records(self) -> list[dict[str, Any]]:
        return records(self.root / "tb")

    def state(self, step: int) -> dict[str, Any]:
        return json.loads((step_directory(self.save_dir, step) / "trainer_state.json").read_text())

    def arguments(self, *flags: str) -> list[str]:
        return [*flags, "-o", str(self.save_dir), "-t", str(self.root / "tb")]

    def log(self, name: str) -> Path:
        return self.root / f"{name}.txt"

    def batches(self) -> dict[tuple[str, int], set[str]]:
        """Hashes of the rows that each rank trained on, by (log file, step)."""
        found = defaultdict(set)
        for log in sorted((self.save_dir / "logs").glob("rank-*.log")):
            for step, digest in re.findall(r"step (\d+) batch (\w+)", log.read_text()):
                found[log.name, int(step)].add(digest)
        return dict(found)


@pytest.mark.parametrize(
    "layout",
    [pytest.param(name, marks=() if name == "gemini" else pytest.mark.full) for name in LAYOUTS],
)
def test_killed_and_resumed_is_the_same_run(layout: str, flags: list[str], tmp_path: Path) -> None:
    """10 steps == 5 steps, kill -9, --load auto, 5 steps: batches, rates and losses to the bit."""
    command = [*flags, *LAYOUTS[layout].split(), "--max_steps", str(STEPS), "-i", str(KILLED_AFTER)]
    straight, broken = Folder(tmp_path / "straight"), Folder(tmp_path / "broken")
    outcome = run("pretrain.py", straight.arguments(*command), straight.log("run"), processes=2)
    assert outcome.code == 0, outcome.output

    first = broken.arguments(*command)
    with start("pretrain.py", first, broken.log("first"), processes=2) as started:
        started.wait_until(step_directory(broken.save_dir, KILLED_AFTER).exists)
        started.kill()
    assert [d.name for d in step_directories(broken.save_dir)] == ["step-00000005"]
    second = [*first, "--load", "auto"]
    outcome = run("pretrain.py", second, broken.log("second"), processes=2)
    assert outcome.code == 0, outcome.output

    assert [record["step"] for record in broken.records] == list(range(1, STEPS + 1))
    for expected, found in zip(straight.records, broken.records, strict=True):
        assert {k: found[k] for k in COMPARED} == {k: expected[k] for k in COMPARED}
    assert broken.batches() == straight.batches()
    assert len(straight.batches()) == 2 * STEPS
    for name in ("samples", "tokens", "epoch", "scaler", "schedule"):
        assert broken.state(STEPS)[name] == straight.state(STEPS)[name]


@pytest.mark.full
def test_a_run_wanders_through_the_plugins(flags: list[str], tmp_path: Path) -> None:
    """gemini, zero2, hybrid tp2 and gemini again, stopped as a user stops a run: one loss curve."""
    length = 60
    command = [*flags, "--max_steps", str(length)]
    straight, wandering = Folder(tmp_path / "straight"), Folder(tmp_path / "wandering")
    gemini, zero2, tp2 = (LAYOUTS[name].split() for name in ("gemini", "zero2", "tp2"))
    outcome = run(
        "pretrain.py", straight.arguments(*command, *gemini), straight.log("run"), processes=2
    )
    assert outcome.code == 0, outcome.output

    borders = [0]
    for stage, layout in enumerate((gemini, zero2, tp2, gemini)):
        arguments = wandering.arguments(*command, *layout, *(["--load", "auto"] if stage else []))
        with start("pretrain.py", arguments, wandering.log(f"{stage}"), processes=2) as started:
            if stage < 3:
                started.wait_until(lambda: len(wandering.records) >= borders[-1] + 4)
                (wandering.save_dir / SAVE_AND_EXIT).touch()
            outcome = started.wait()
            assert outcome.code == 0, outcome.output
        newest = step_directories(wandering.save_dir)[0]
        borders.append(int(newest.name.removeprefix("step-")))
        assert len(wandering.records) == borders[-1]
    assert borders[-1] == length and sorted(set(borders)) == borders
    for expected, found in zip(straight.records, wandering.records, strict=True):
        assert found["lr"] == expected["lr"]
        assert found["loss"] == pytest.approx(expected["loss"], rel=5e-3)
    assert straight.records[-1]["loss"] < straight.records[0]["loss"] - 1


@pytest.mark.full
def test_another_global_batch_goes_on_with_the_next_sample(
    flags: list[str], dataset: Path, tmp_path: Path
) -> None:
    folder = Folder(tmp_path)

    def train(*more: str) -> Outcome:
        outcome = run("pretrain.py", folder.arguments(*flags, *more), folder.log(more[1]))
        assert outcome.code == 0, outcome.output
        return outcome

    train("-b", "8", "--max_steps", "4")
    outcome = train("-b", "6", "--max_steps", "7", "--load", "auto")
    assert "--batch_size was 8, now 6" in outcome.output
    assert folder.state(7)["samples"] == 4 * 8 + 3 * 6

    prepared = PreparedDataset.open(dataset)
    order = RowOrder(prepared.document_lengths, 32, 42)
    rows = PreparedRows(prepared, order, pad_id=0, document_mask=False)
    samples = [range(8 * step, 8 * step + 8) for step in range(4)]
    samples += [range(32 + 6 * step, 38 + 6 * step) for step in range(3)]
    for step, part in enumerate(samples, 1):
        batch = BatchLoader(rows, len(part), position=Position(0, part[0])).batch(0)
        assert folder.batches()["rank-00000.log", step] == {rows_hash(batch)}, f"step {step}"


def test_ten_nonfinite_steps_end_the_run(flags: list[str], tmp_path: Path) -> None:
    """A learning rate that throws the weights to infinity; the checkpoint before it stays."""
    folder = Folder(tmp_path)
    wild = ["-b", "2", "--lr", "1e30", "-w", "0", "-s", "1", "--max_steps", "50", "-i", "20"]
    outcome = run("pretrain.py", folder.arguments(*flags, *wild), folder.log("run"))
    assert outcome.code == 1
    message = outcome.output.strip().splitlines()[-1]
    assert message.startswith("10 steps in a row were not finite, the last one step ")
    assert "a lower --lr (now 1e+30)" in message
    assert "Traceback" not in outcome.output
