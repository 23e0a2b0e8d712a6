"""What a run shows: files that every tool reads, a console that does not repeat itself."""

import json
import math
import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from llama_lib.metrics import Console, Measure, MetricsSink, StepRecord, final_line

KEYS = ["step", "tokens", "loss", "lr", "grad_norm", "tokens_per_second", "samples_per_second"]
KEYS += ["tflops_per_gpu", "mfu", "memory_mb", "data_wait_s", "step_time_s", "loss_scale"]


def record(step: int, **changes) -> StepRecord:
    values = dict.fromkeys(KEYS, 1.0) | {"step": step, "tokens": step * 1024, "mfu": None}
    return StepRecord(**(values | changes))


def strict(path: Path) -> list[dict]:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def write_steps(folder: Path, steps: range, first_step: int | None = None, **changes) -> None:
    sink = MetricsSink(folder, first_step or steps.start, is_writer=True)
    for step in steps:
        sink.log(record(step, **changes))
        sink.log_eval(step, {"books": Measure(float(step), 0.5), "code": Measure(2.0, 0.25)})
    sink.close()


def test_records_have_the_agreed_keys_in_order(tmp_path):
    write_steps(tmp_path, range(1, 3))
    lines = strict(tmp_path / "metrics.jsonl")
    assert [list(line) for line in lines] == [KEYS, KEYS]
    assert lines[1]["step"] == 2 and lines[1]["tokens"] == 2048 and lines[1]["mfu"] is None
    assert strict(tmp_path / "eval.jsonl")[1] == {
        "step": 2,
        "losses": {"books": 2.0, "code": 2.0},
        "accuracies": {"books": 0.5, "code": 0.25},
    }


def test_a_resumed_run_knows_what_was_measured(tmp_path):
    write_steps(tmp_path, range(1, 4))
    sink = MetricsSink(tmp_path, 3, is_writer=True)  # cuts step 3
    assert [sink.has_eval(step) for step in (1, 2, 3)] == [True, True, False]
    sink.close()
    assert not MetricsSink(tmp_path, 3, is_writer=False).has_eval(1)


def test_records_are_on_disk_at_once(tmp_path):
    sink = MetricsSink(tmp_path, 1, is_writer=True)
    sink.log(record(1))
    assert len(strict(tmp_path / "metrics.jsonl")) == 1
    sink.close()


def test_nan_and_infinity_are_null(tmp_path):
    sink = MetricsSink(tmp_path, 1, is_writer=True)
    sink.log(record(1, loss=math.nan, grad_norm=math.inf))
    sink.log_eval(1, {"books": Measure(math.nan, 0.0)})
    sink.close()
    (line,) = strict(tmp_path / "metrics.jsonl")
    assert line["loss"] is None and line["grad_norm"] is None
    assert strict(tmp_path / "eval.jsonl")[0]["losses"] == {"books": None}


def test_resume_cuts_what_is_done_again(tmp_path):
    write_steps(tmp_path, range(1, 8))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "tok')
    write_steps(tmp_path, range(6, 8), loss=9.0)
    lines = strict(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6, 7]
    assert [line["loss"] for line in lines] == [1.0] * 5 + [9.0] * 2
    assert [line["step"] for line in strict(tmp_path / "eval.jsonl")] == [1, 2, 3, 4, 5, 6, 7]


def test_resume_in_a_new_folder(tmp_path):
    write_steps(tmp_path / "new", range(6, 8))
    assert [line["step"] for line in strict(tmp_path / "new" / "metrics.jsonl")] == [6, 7]


def test_a_fresh_run_keeps_the_records_of_the_last_one(tmp_path):
    for loss in (1.0, 2.0, 3.0):
        write_steps(tmp_path, range(1, 3), loss=loss)
    names = ("metrics.1.jsonl", "metrics.2.jsonl", "metrics.jsonl")
    assert [strict(tmp_path / name)[0]["loss"] for name in names] == [1.0, 2.0, 3.0]


def test_tensorboard_shows_one_curve_after_a_resume(tmp_path):
    write_steps(tmp_path, range(1, 8))
    # TensorBoard reads event files in the order of the second in their names.
    time.sleep(1.1)
    write_steps(tmp_path, range(6, 8), loss=9.0)
    board = EventAccumulator(str(tmp_path))
    board.Reload()
    assert [event.step for event in board.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6, 7]
    assert board.Scalars("train/loss")[-1].value == 9.0
    assert board.Scalars("train/tokens")[-1].value == 7 * 1024
    assert board.Scalars("eval/books")[-1].value == 7.0
    # An unknown value makes no curve.
    assert "train/mfu" not in board.Tags()["scalars"]


def test_only_the_writer_writes(tmp_path, capsys):
    sink = MetricsSink(tmp_path / "tb", 1, is_writer=False)
    sink.log(record(1))
    sink.log_eval(1, {"books": Measure(1.0, 0.0)})
    sink.close()
    console = Console(10, 0, is_writer=False, is_terminal=True)
    console.advance()
    console.log(record(1))
    console.write("text")
    console.close()
    assert not (tmp_path / "tb").exists()
    assert capsys.readouterr() == ("", "")


def test_plain_lines_have_fixed_columns(capsys):
    console = Console(1000, 0, is_writer=True, is_terminal=False)
    console.advance()
    console.log(record(1, loss=8.31234, lr=3e-4, tokens_per_second=1234.5, memory_mb=55491.1))
    console.log(record(1000, loss=10.5, grad_norm=None, memory_mb=None, tokens_per_second=1e6))
    console.write("saved")
    console.close()
    out, err = capsys.readouterr()
    first, second, third = out.splitlines()
    assert (err, third) == ("", "saved")
    assert "step    1/1000" in first
    for part in ("loss   8.3123", "lr  3.00e-04", "tokens/s      1,234", "55,491 MB"):
        assert part in first
    for column in ("loss", "lr", "grad norm", "tokens/s", "memory"):
        assert first.index(column) == second.index(column)
    assert "n/a" in second


def test_one_bar_on_a_terminal(capsys):
    console = Console(10, 4, is_writer=True, is_terminal=True)
    for step in range(5, 11):
        console.advance()
        console.log(record(step, loss=float(step)))
        if step == 7:
            console.write("saved step 7")
    console.close()
    out, err = capsys.readouterr()
    assert out == "saved step 7\n"
    assert "10/10" in err and "loss 10.0000" in err
    # Redrawn in place: the bar itself never begins another line.
    assert err.count("\n") == 1


def test_no_terminal_no_bar(capsys):
    console = Console(10, 0, is_writer=True)
    console.advance()
    console.close()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("values", "line"),
    [
        (
            (55491.1, 24.26, 167.43),
            "max memory usage:  55491.10 MB, throughput:  24.26 samples/s, TFLOPS/GPU:  167.43",
        ),
        (
            (None, 24.26, None),
            "max memory usage:  n/a, throughput:  24.26 samples/s, TFLOPS/GPU:  n/a",
        ),
    ],
)
def test_final_line(values, line):
    assert final_line(*values) == line
