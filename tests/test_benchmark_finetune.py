"""The benchmark of fine-tuning: its own loss, what it reads in logs, its sums; then all of it."""

import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.completions import completion_ids, score
from benchmarks.finetune import (
    PACKED,
    PADDED,
    Run,
    _divisible,
    check_same_loss,
    summary,
    table,
    timing,
)
from benchmarks.measure import ROOT
from llama_lib.data.chat.templates import use_template
from llama_lib.data.chat.training import ChatRequest, chat_data
from llama_lib.data.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer

RECORDS = [
    {"prompt": f"Count {number} words.\n", "completion": f"{'word ' * (1 + number % 3)}end."}
    for number in range(24)
]


def write(path: Path, records: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model with its tokenizer, whose chat template is `plain`."""
    folder = tmp_path_factory.mktemp("base")
    texts = [text for record in RECORDS for text in record.values()]
    save_tokenizer(train_tokenizer(texts, 300), folder)
    tokenizer = load_tokenizer(str(folder))
    use_template(tokenizer, "plain", {"completion"})
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def turns(record: dict[str, str]) -> list[dict[str, str]]:
    return [
        {"role": "user", "content": record["prompt"]},
        {"role": "assistant", "content": record["completion"]},
    ]


def test_the_answer_begins_behind_the_prompt_and_has_its_end(base: Path) -> None:
    tokenizer = load_tokenizer(str(base))
    ids, first = completion_ids(tokenizer, turns(RECORDS[1]))
    assert ids == tokenizer.apply_chat_template(turns(RECORDS[1]))
    assert tokenizer.decode(ids[first:]) == "word word end." + tokenizer.eos_token


def test_loss_and_accuracy_are_those_of_the_model(base: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "test.jsonl", RECORDS)
    tokenizer = load_tokenizer(str(base))
    model = LlamaForCausalLM.from_pretrained(base)
    losses, right, labels, whole = 0.0, 0, 0, {}
    for number, record in enumerate(RECORDS):
        ids, first = completion_ids(tokenizer, turns(record))
        whole[number] = (len(ids), first)
        target = torch.tensor([[-100] * first + ids[first:]])
        output = model(torch.tensor([ids]), labels=target)
        count = len(ids) - first
        losses += output.loss.item() * count
        right += (output.logits[0, :-1].argmax(-1) == target[0, 1:]).sum().item()
        labels += count
    found = score(base, base, path, 64)
    assert found["loss"] == pytest.approx(losses / labels, rel=1e-5)
    assert (found["correct"], found["labels"], found["conversations"]) == (right, labels, 24)
    assert found["accuracy"] == right / labels and found["cut"] == found["left_out"] == 0

    limit = min(first for _, first in whole.values()) + 1
    cut = score(base, base, path, limit)
    assert cut["cut"] == sum(length > limit for length, _ in whole.values()) > 0
    assert cut["left_out"] == sum(first >= limit for _, first in whole.values())
    assert cut["labels"] == sum(max(0, min(n, limit) - first) for n, first in whole.values())
    with pytest.raises(SystemExit, match="no completion within 2 tokens"):
        score(base, base, path, 2)


@pytest.mark.parametrize("packing", [True, False])
def test_the_lines_of_a_real_log_are_read(base: Path, tmp_path: Path, packing: bool) -> None:
    path = write(tmp_path / "train.jsonl", RECORDS)
    data = chat_data(
        ChatRequest(
            [str(path)], str(base), max_length=64, eval_ratio=0, cache_dir=tmp_path, packing=packing
        )
    )
    log = f"gemini: 1 process\ndata {path}: {data.lines[0]}\n"
    log += "".join(f"  {line}\n" for line in data.lines[1:])
    run = Run(tmp_path, log, 1.0)
    tokenizer = load_tokenizer(str(base))
    encoded = [completion_ids(tokenizer, turns(record)) for record in RECORDS]
    assert run.data == {
        "conversations": 24,
        "tokens": sum(len(ids) for ids, _ in encoded),
        "labels": sum(len(ids) - first for ids, first in encoded),
    }
    assert data.num_rows is not None
    assert run.rows == data.num_rows(1) and (run.rows < 24 if packing else run.rows == 24)
    for wanted in ("data", "rows"):
        with pytest.raises(SystemExit, match=r"(?s)no line about the.*some text"):
            getattr(Run(tmp_path, "some text", 1.0), wanted)


def test_a_whole_number_of_rows_for_every_process() -> None:
    class Planner:
        def train(self, data: str, flags: list[str]) -> Any:
            assert "--dry_run" in flags and "--no_packing" not in flags
            count = int(data.rpartition("[")[2].removesuffix("]"))
            return Namespace(rows=count // 2)

    arguments = Namespace(compared=11, data=Path("d"))
    planner: Any = Planner()
    assert _divisible(1, arguments, planner) == (11, 5)
    assert _divisible(2, arguments, planner) == (8, 4)


def test_losses_that_differ_end_the_benchmark() -> None:
    check_same_loss(2.0001, 2.0, 1e-4, "loss")
    for one in (2.0003, 1.9997, float("nan")):
        with pytest.raises(SystemExit, match=r"loss: .* differ by more than 0\.01%"):
            check_same_loss(one, 2.0, 1e-4, "loss")


def step(seconds: float) -> dict[str, float]:
    return {"step_time_s": seconds, "memory_mb": 100 * seconds}


DATA = {"conversations": 60, "tokens": 900, "labels": 300}


def test_rates_leave_the_first_steps_out() -> None:
    found = timing([step(9), step(7), step(0.5), step(1.5)], DATA, 20, 4, 64)
    # 3 conversations a row, 4 rows a step of a second.
    assert found["conversations_per_second"] == 12 and found["step_ms"] == 1000
    assert found["fill_percent"] == 70.31 and found["memory_mb"] == 900
    assert found["raw_step_ms"] == [500, 1500] and found["steps"] == 2
    with pytest.raises(SystemExit, match="raise --conversations"):
        timing([step(9), step(7)], DATA, 20, 4, 64)


def timed(way: str, rows: int, seconds: float, **changed: int) -> dict[str, Any]:
    records = [step(1), step(1), step(seconds)]
    return {"way": way, "processes": 1, **timing(records, {**DATA, **changed}, rows, 4, 64)}


def test_summary_takes_medians_of_the_same_conversations() -> None:
    runs = [timed(PACKED, 20, seconds) for seconds in (1.0, 9.0, 2.0)]
    runs += [timed(PADDED, 60, seconds) for seconds in (2.0, 2.0, 1.0)]
    (line,) = summary(runs)
    assert line[PACKED]["step_ms"] == line[PADDED]["step_ms"] == 2000
    assert (line[PACKED]["conversations_per_second"], line["times_faster"]) == (6, 3)
    assert line["fewer_rows"] == 3 and line[PACKED]["runs"] == 3
    with pytest.raises(SystemExit, match="not train on the same conversations"):
        summary([*runs, timed(PADDED, 60, 1.0, tokens=901)])
    values = {"loss": 3.25, "accuracy": 0.125}
    losses = [{"processes": 1, "loss": {PACKED: 2.0, PADDED: 2.000001}}]
    result = {"quality": {"before": values, "after": values}, "equal_losses": losses}
    text = table(result | {"packing": [line]})
    assert "3.2500    12.50%" in text and "3.00x" in text and "2.000001" in text


@pytest.mark.full
def test_finetune_benchmark_from_end_to_end(base: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    write(data / "train.jsonl", RECORDS[4:])
    write(data / "test.jsonl", RECORDS[:4])
    (tmp_path / "work").mkdir()
    command = [sys.executable, "-m", "benchmarks.finetune", "--model", str(base)]
    command += ["--data", str(data), "--max_length", "24", "--batch_size", "2", "--epochs", "2"]
    command += ["--lr", "3e-3", "--eval_interval", "4", "--conversations", "18", "--compared", "8"]
    command += ["--repeats", "1", "--work_dir", str(tmp_path / "work")]
    command += ["--result", str(tmp_path / "result.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "work").iterdir()) == []
    result = json.loads((tmp_path / "result.json").read_text())
    quality = result["quality"]
    assert quality["after"]["loss"] < quality["before"]["loss"]
    assert quality["held_out"]["conversations"] == 4 and len(quality["during"]) >= 2
    assert [line["processes"] for line in result["equal_losses"]] == [1, 2]
    assert all(line["packed_rows"] % line["processes"] == 0 for line in result["equal_losses"])
    assert [(run["processes"], run["way"]) for run in result["runs"]] == [
        (processes, way) for processes in (1, 2) for way in (PACKED, PADDED)
    ]
    assert all(run["conversations"] == 18 for run in result["runs"])
    assert all(line["fewer_rows"] > 1 for line in result["packing"])
    assert "faster" in done.stdout
