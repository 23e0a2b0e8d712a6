"""Packed, masked, blended and streamed data in real runs: the same after a kill, a gap left out."""

import re
from pathlib import Path

import pytest

from llama_lib import step_view
from llama_lib.checkpoint.manifest import step_directories, step_directory
from tests.distributed.launching import run, start
from tests.distributed.test_resume import COMPARED, Folder

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="session")
def stream_flags(dataset: Path, model_config: Path) -> list[str]:
    """A run that reads the text of `dataset` as a stream."""
    text, tokenizer = dataset.parent / "text.jsonl", dataset.parent / "tokenizer"
    common = "-l 32 --lr 1e-3 -s 2 --log_interval 1 --streaming --shuffle_window 2"
    given = ["-d", str(text), "--tokenizer", str(tokenizer), "-c", str(model_config)]
    return [*given, *common.split()]


def test_a_stream_goes_on_after_a_kill_with_half_the_processes(
    stream_flags: list[str], tmp_path: Path
) -> None:
    straight, broken = Folder(tmp_path / "straight"), Folder(tmp_path / "broken")
    command = [*stream_flags, "-p", "zero2", "--max_steps", "8", "-i", "4"]
    outcome = run("pretrain.py", straight.arguments(*command, "-b", "16"), straight.log("run"))
    assert outcome.code == 0, outcome.output

    first = broken.arguments(*command, "-b", "8")
    with start("pretrain.py", first, broken.log("first"), processes=2) as started:
        started.wait_until(step_directory(broken.save_dir, 4).exists)
        started.kill()
    second = broken.arguments(*command, "-b", "16", "--load", "auto")
    outcome = run("pretrain.py", second, broken.log("second"))
    assert outcome.code == 0, outcome.output

    assert [record["step"] for record in broken.records] == list(range(1, 9))
    for expected, found in zip(straight.records, broken.records, strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-2)  # bf16, other sums
    # One process again: the same rows to the last id.
    ours, theirs = broken.batches(), straight.batches()
    assert all(ours["rank-00000.log", step] == theirs["rank-00000.log", step] for step in (5, 8))
    state = broken.state(8)
    assert state["consumed"] == straight.state(8)["consumed"] == {"text": 8 * 16 * 32}
    assert state["stream"] == straight.state(8)["stream"]
    for step in (1, 6):
        rows = step_view.passages_of_step(str(broken.save_dir), step)
        assert rows == step_view.passages_of_step(str(straight.save_dir), step)
        assert [sum(part.length for part in parts) for _, parts in rows] == [32] * 16


def test_steps_left_out_are_never_trained_on(flags: list[str], tmp_path: Path) -> None:
    """Steps 4 and 5 go: step 4 has the rows of 6, and the ledger names their documents."""
    straight, gap = Folder(tmp_path / "straight"), Folder(tmp_path / "gap")
    command = [*flags, "-p", "zero2", "-b", "8", "-i", "3"]
    common = [*command, "--max_steps", "8", "--packing", "best_fit", "--document_mask"]
    outcome = run("pretrain.py", straight.arguments(*common), straight.log("run"))
    assert outcome.code == 0, outcome.output

    arguments = gap.arguments(*common)
    outcome = run("pretrain.py", arguments, gap.log("first"))
    assert outcome.code == 0, outcome.output
    outcome = run(
        "pretrain.py", [*arguments, "--load", "auto", "--skip_steps", "4:6"], gap.log("second")
    )
    assert outcome.code == 0, outcome.output
    assert "step-00000006 is passed over: --skip_steps 4:6: step 4 is done" in outcome.output
    assert "--skip_steps 4:6: rows 24 to 39 of the data order are left out" in outcome.output
    theirs, ours = straight.batches(), gap.batches()
    log = "rank-00000.log"
    for step, same in ((3, 3), (4, 6), (5, 7), (6, 8)):
        assert theirs[log, same] <= ours[log, step]  # of the steps done twice, both
    # The same command again, as a scheduler would start it: done, and nothing skipped twice.
    outcome = run(
        "pretrain.py", [*arguments, "--load", "auto", "--skip_steps", "4:6"], gap.log("third")
    )
    assert outcome.code == 0, outcome.output
    assert "left out already" in outcome.output and "nothing to train" in outcome.output

    for step, same in ((3, 3), (4, 6), (6, 8)):
        assert [parts for _, parts in step_view.passages_of_step(str(gap.save_dir), step)] == [
            parts for _, parts in step_view.passages_of_step(str(straight.save_dir), same)
        ]
    assert re.search(r"trained on:\n  text +\S+ tokens +100\.00%", outcome.output + read(gap))


def read(folder: Folder) -> str:
    return folder.log("second").read_text()


@pytest.mark.full
@pytest.mark.parametrize(
    "layout",
    [
        "-p gemini -b 32 --packing best_fit --document_mask",
        "-p hybrid_parallel --tp 2 -b 64 --document_mask -g",
        "-p zero2_cpu -b 32 --packing best_fit",
    ],
)
def test_packed_and_masked_runs_resume_to_the_bit(
    layout: str, flags: list[str], tmp_path: Path
) -> None:
    command = [*flags, *layout.split(), "--max_steps", "10", "-i", "5"]
    straight, broken = Folder(tmp_path / "straight"), Folder(tmp_path / "broken")
    outcome = run("pretrain.py", straight.arguments(*command), straight.log("run"), processes=2)
    assert outcome.code == 0, outcome.output
    first = broken.arguments(*command)
    with start("pretrain.py", first, broken.log("first"), processes=2) as started:
        started.wait_until(step_directory(broken.save_dir, 5).exists)
        started.kill()
    assert [d.name for d in step_directories(broken.save_dir)] == ["step-00000005"]
    outcome = run("pretrain.py", [*first, "--load", "auto"], broken.log("second"), processes=2)
    assert outcome.code == 0, outcome.output
    for expected, found in zip(straight.records, broken.records, strict=True):
        assert {k: found[k] for k in COMPARED} == {k: expected[k] for k in COMPARED}
    assert broken.batches() == straight.batches()
    assert broken.state(10)["consumed"] == straight.state(10)["consumed"]


@pytest.mark.full
def test_shares_of_a_blend_are_met_and_reported(
    dataset: Path, model_config: Path, tmp_path: Path
) -> None:
    """Two sources 3 to 1, one of them small enough to come round more than once."""
    lines = (dataset.parent / "text.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "large.jsonl").write_text("".join(lines[3:]))
    (tmp_path / "small.jsonl").write_text("".join(lines[:3]))
    folder = Folder(tmp_path / "run")
    words = [f"{tmp_path / 'large.jsonl'}:3", f"{tmp_path / 'small.jsonl'}:1"]
    arguments = ["-d", *words, "--tokenizer", str(dataset.parent / "tokenizer")]
    arguments += f"-c {model_config} -l 32 -b 16 --max_steps 40 --eval_ratio 0".split()
    outcome = run("pretrain.py", folder.arguments(*arguments), folder.log("run"), processes=2)
    assert outcome.code == 0, outcome.output
    consumed = folder.state(40)["consumed"]
    rows = 40 * 32
    assert consumed == {"large": rows * 3 // 4 * 32, "small": rows // 4 * 32}
    report = dict(re.findall(r"^  (\w+) +[\d,]+ tokens +([\d.]+)%", outcome.output, re.M))
    assert report == {"large": "75.00", "small": "25.00"}
    passes = re.findall(r"small.*?([\d.]+) passes", outcome.output)
    assert len(set(passes)) == 1, "before the run and after it"
    assert float(passes[0]) > 1
