"""The benchmark of training: its sums and tables, and that all contenders do the same training."""

import json
import math
import os
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState

from benchmarks import device, growth, plots, switches, train
from benchmarks.measure import ROOT, Measured
from benchmarks.rivals import barest, hf_trainer
from benchmarks.rivals.job import Job, Notes, initial_model, job_of
from llama_lib.config import parse_options
from llama_lib.data.prepare import PrepareRequest, prepare
from llama_lib.data.tokenizer import save_tokenizer, train_tokenizer
from llama_lib.optim import parameter_groups

TINY = ["--hidden_size", "64", "--layers", "2", "--vocab_size", "16384", "--max_length", "32"]


def a_run(contender: str, repeat: int, seconds: list[float], memory: float = 100.0) -> Any:
    measured = Measured(9.0, 9.0, memory, memory, memory, 1, 5)
    return {
        "repeat": repeat,
        "contender": contender,
        "step_seconds": [9.0, *seconds],
        "measured_seconds": seconds,
        "loss": [5.0] + [4.0] * len(seconds),
        "gpu_memory_mb": {},
        "command": vars(measured),
    }


RUNS = [
    a_run("zero2", 0, [1.0, 1.1, 1.2], 90.0),
    a_run("trainer", 0, [2.2, 2.2, 2.2]),
    a_run("trainer", 1, [1.1, 1.1, 1.1]),
    a_run("zero2", 1, [1.0, 1.0, 1.0], 110.0),
    a_run("trainer-2", 0, [3.0, 3.0, 3.0]),
]


# -- sums ---------------------------------------------------------------------------------------


def test_ratios_are_of_medians_over_all_runs_with_the_spread_of_rounds():
    found = train.ratio(RUNS, "zero2", "trainer")
    # All steps of zero2: 1 1 1 1 1.1 1.2; of Trainer: 1.1 1.1 1.1 2.2 2.2 2.2.
    assert found["times_faster"] == pytest.approx(1.65 / 1.0)
    assert found["rounds"] == [pytest.approx(2.0), pytest.approx(1.1)]
    assert (found["lowest"], found["highest"]) == (pytest.approx(1.1), pytest.approx(2.0))
    assert found["memory"] == pytest.approx(1.0)


def test_runs_with_other_numbers_of_processes_are_not_compared():
    pairs = [(each["ours"], each["rival"]) for each in train.summary(RUNS)["ratios"]]
    assert pairs == [("zero2", "trainer")]


def test_the_summary_has_medians_and_extremes_over_all_runs():
    found = train.summary(RUNS)["contenders"]["zero2"]
    assert (found["runs"], found["steps"], found["step_ms"]) == (2, 6, 1000.0)
    assert (found["fastest_ms"], found["slowest_ms"]) == (1000.0, 1200.0)
    assert found["peak_pss_mb"] == 100.0


def test_a_round_turns_the_order_round():
    contenders = [train.contender_of(name) for name in ("zero2", "trainer", "trainer-2")]
    assert train.in_turn(contenders, 1) == train.in_turn(contenders, 0)[::-1]


@pytest.mark.parametrize("step", [0, 1])
def test_contenders_that_train_differently_give_no_result(step):
    other = a_run("trainer", 0, [1.0])
    other["loss"][step] += 0.03
    with pytest.raises(SystemExit, match=f"differently.* at step {step + 1}"):
        train.check_losses([a_run("zero2", 0, [1.0]), other], "bf16")


def test_a_loss_that_is_no_number_gives_no_result():
    other = a_run("trainer", 0, [1.0])
    other["loss"][1] = math.nan
    with pytest.raises(SystemExit, match="differently"):
        train.check_losses([a_run("zero2", 0, [1.0]), other], "bf16")


def test_another_recipe_has_to_begin_alike_only():
    other = a_run("trainer_bf16_weights", 0, [1.0])
    other["loss"][1] += 1.0
    train.check_losses([a_run("zero2", 0, [1.0]), other], "bf16")
    other["loss"][0] += 1.0
    with pytest.raises(SystemExit, match="step 1"):
        train.check_losses([a_run("zero2", 0, [1.0]), other], "bf16")


@pytest.mark.parametrize("name", ["zero3", "barest-2", "zero2-x", ""])
def test_a_contender_that_does_not_exist_is_refused(name):
    with pytest.raises(SystemExit, match="--only"):
        train.arguments_of(["--only", name])


def test_resuming_keeps_the_runs_of_the_same_measurement_only(tmp_path):
    path = tmp_path / "train.json"
    about = {"versions": {"torch": "1"}, "sources": "a", "config": {"steps": 3}}
    assert train.kept_runs(path, about) == []
    path.write_text(json.dumps(about | {"runs": RUNS}))
    assert train.kept_runs(path, about) == RUNS
    with pytest.raises(SystemExit, match="config"):
        train.kept_runs(path, about | {"config": {"steps": 4}})
    with pytest.raises(SystemExit, match="sources"):
        train.kept_runs(path, about | {"sources": "b"})


@pytest.mark.parametrize(
    ("contenders", "threads", "cores", "refused"),
    [
        ("zero2-2,trainer-2", 2, 8, True),
        ("zero2-2", 1, 2, True),
        ("zero2-2", 3, 8, True),
        ("zero2-2", 2, 2, False),
        ("zero2-2", 3, 3, False),
        ("zero2-2", 1, 1, False),
        ("zero2-2", 4, 8, False),
        ("zero2", 1, 8, False),
        ("zero2", 0, 8, True),
    ],
)
def test_threads_that_ours_would_not_keep_to_are_refused(
    monkeypatch, contenders, threads, cores, refused
):
    """torchrun's OMP_NUM_THREADS=1 and the user's cannot be told apart by pretrain.py."""
    monkeypatch.setattr(train.os, "sched_getaffinity", lambda _: set(range(cores)))
    flags = ["--only", contenders, "--threads", str(threads)]
    if refused:
        with pytest.raises(SystemExit, match=f"--threads {threads}"):
            train.arguments_of(flags)
    else:
        assert train.arguments_of(flags).threads == threads


def test_notes_are_the_times_between_moments(tmp_path):
    notes = Notes()
    notes.moments, notes.losses = [1.0, 3.0, 3.5], [torch.tensor(5.0), 4.0]
    notes.write(str(tmp_path / "a.json"), {"memory": {}})
    found = json.loads((tmp_path / "a.json").read_text())
    assert found == {"memory": {}, "seconds": [2.0, 0.5], "loss": [5.0, 4.0]}
    notes.losses.pop()
    with pytest.raises(SystemExit, match="2 steps were timed and 1 losses"):
        notes.write(str(tmp_path / "a.json"), {})


# -- switches -----------------------------------------------------------------------------------


SWITCHED = [
    a_run("default", 0, [1.0, 2.0, 1.0], 100.0),
    a_run("recompute full", 0, [1.5, 1.5, 1.4], 50.0),
    a_run("recompute full", 1, [1.4, 1.6, 1.5], 60.0),
    a_run("default", 1, [1.0, 1.0, 1.0], 100.0),
]


def test_a_switch_is_a_share_of_the_default():
    usual, other = switches.summary(SWITCHED)
    assert (usual["switch"], usual["step_ms"], usual["time"]) == ("default", 1000.0, 1.0)
    assert (usual["fastest_ms"], usual["slowest_ms"]) == (1000.0, 2000.0)
    assert (other["switch"], other["step_ms"], other["peak_pss_mb"]) == (
        "recompute full",
        1500.0,
        55.0,
    )
    assert (other["time"], other["memory"]) == (1.5, 0.55)


def test_switches_without_the_default_have_no_share():
    (found,) = switches.summary(SWITCHED[1:3])
    assert "time" not in found and "memory" not in found
    (line,) = switches.table({"summary": [found]}).splitlines()[1:]
    assert line.split() == ["recompute", "full", "1500.0", "n/a", "55", "n/a"]


def test_the_table_of_switches_has_every_switch():
    lines = switches.table({"summary": switches.summary(SWITCHED)}).splitlines()
    assert lines[1].split() == ["default", "1000.0", "1.00x", "100", "1.00x"]
    assert lines[2].split() == ["recompute", "full", "1500.0", "1.50x", "55", "0.55x"]


def test_the_page_shows_switches_with_their_flags():
    result = {"command": "python", "flags": switches.SWITCHES}
    text = plots.switches_table(result | {"summary": switches.summary(SWITCHED)})
    line = "| recompute full | `--recompute full` | 1,500 | 1,400 to 1,600 | 1.50 | 55 | 0.55 |"
    assert line in text.splitlines()


def a_bench_of(losses: dict[str, float]) -> Any:
    """A stand-in for train.Bench: one second a step, and a last loss by the flags of the run."""

    class Recorded:
        def __init__(self, arguments: Namespace, work: Path, tokens: Path) -> None:
            self.arguments = arguments

        def describe(self) -> dict[str, Any]:
            return {}

        def train(self, contender: train.Contender) -> dict[str, Any]:
            found = a_run(contender.name, -1, [1.0])
            del found["repeat"]
            return found | {"loss": [5.0, losses.get(self.arguments.ours, 4.0)]}

    return Recorded


def run_switches(tmp_path: Path, monkeypatch: Any, losses: dict[str, float]) -> dict[str, Any]:
    monkeypatch.setattr(train, "Bench", a_bench_of(losses))
    monkeypatch.setattr(train, "prepared_sample", lambda work: work)
    flags = ["--only", "default,recompute full", "--repeats", "2"]
    arguments = switches._arguments([*flags, "--result", str(tmp_path / "switches.json")])
    return switches.run(arguments, tmp_path)


def test_switches_take_turns_and_turn_round(tmp_path, monkeypatch):
    result = run_switches(tmp_path, monkeypatch, {})
    order = [(run["repeat"], run["contender"]) for run in result["runs"]]
    assert order == [
        (0, "default"),
        (0, "recompute full"),
        (1, "recompute full"),
        (1, "default"),
    ]
    assert json.loads((tmp_path / "switches.json").read_text()) == result


def test_a_switch_that_trains_differently_gives_no_result(tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match=r"default and recompute full train differently.*step 2"):
        run_switches(tmp_path, monkeypatch, {"--recompute full": 4.03})
    runs = json.loads((tmp_path / "switches.json").read_text())["runs"]
    assert [run["contender"] for run in runs] == ["default"]


def test_an_unknown_switch_is_refused():
    with pytest.raises(SystemExit, match="--only faster: expected some of default, all logits"):
        switches._arguments(["--only", "faster"])


# -- growth -------------------------------------------------------------------------------------


def test_a_power_law_gives_its_exponent_back():
    sizes = [10.0, 20.0, 40.0, 80.0]
    found = growth.power_law(sizes, [3 * size**1.5 for size in sizes])
    assert found == {"exponent": 1.5, "factor": pytest.approx(3.0), "r_squared": 1.0}


def test_a_fit_is_numpys_least_squares_of_the_logarithms():
    sizes, seconds = [1.0, 2.0, 4.0, 8.0], [1.0, 1.7, 3.9, 6.0]
    slope, intercept = np.polyfit(np.log(sizes), np.log(seconds), 1)
    r = np.corrcoef(np.log(sizes), np.log(seconds))[0, 1]
    found = growth.power_law(sizes, seconds)
    assert found["exponent"] == pytest.approx(slope, abs=6e-4)
    assert found["factor"] == pytest.approx(math.exp(intercept))
    assert found["r_squared"] == pytest.approx(r**2, abs=6e-5)


def growth_result() -> dict[str, Any]:
    arguments = growth._arguments(["--models", "256x4", "512x8", "--batches", "2", "4"])
    points = []
    for (hidden, layers), length, batch, lines in growth.points_of(arguments):
        seconds = hidden * length * batch**0.5 / 1e6
        point = {"lines": lines, "parameters": hidden**2, "hidden_size": hidden, "layers": layers}
        point |= {"max_length": length, "batch_size": batch}
        points.append(point | {"runs": [a_run("zero2", 0, [seconds, 9.0, seconds])]})
    result = {"command": "python -m benchmarks.growth", "points": points}
    return result | {"fits": growth.fits(points)}


def test_lines_of_growth_share_their_middle_point():
    points = growth_result()["points"]
    assert [each["lines"] for each in points] == [
        ["model"],
        ["model", "length", "batch"],
        ["length"],
        ["length"],
        ["length"],
        ["batch"],
    ]
    exponents = {fit["line"]: fit["exponent"] for fit in growth_result()["fits"]}
    assert exponents == {"model": 0.5, "length": 1.0, "batch": 0.5}


def test_growth_needs_its_middle_among_the_models():
    with pytest.raises(SystemExit, match="width 512"):
        growth._arguments(["--models", "256x4"])


# -- the page -----------------------------------------------------------------------------------


def test_the_tables_of_the_page_are_current():
    text = plots.PAGE.read_text()
    assert text == plots.with_current_tables(text), "stale: run `python -m benchmarks.plots`"
    assert sorted(found[1] for found in plots._MARKED.findall(text)) == sorted(plots.TABLES)


def test_what_was_not_measured_is_said_and_has_no_number():
    for text in (plots.contenders_table(None), plots.ratios_table(None), plots.growth_table(None)):
        assert text.startswith("not measured") and not any(each.isdigit() for each in text)
    for line in plots.goals_table(None, None).splitlines()[2:]:
        assert line.endswith("| not measured |  |")
    lines = plots.device_table(None).splitlines()[2:]
    assert len(lines) == len(device.ROWS)
    assert all(line.endswith("| not measured |  |  |  |") for line in lines)


def test_goals_are_reached_from_their_own_side():
    result = {"summary": train.summary(RUNS)}
    lines = plots.goals_table(result, None).splitlines()
    speed = next(each for each in lines if "`zero2` times as fast as `trainer`" in each)
    assert speed.endswith("| at least 1.15 | 1.65 | yes |")
    memory = next(each for each in lines if "memory of `zero2`" in each)
    assert memory.endswith("| at most 1.00 | 1.00 | yes |")
    heavier = [each | {"memory": 1.01} for each in result["summary"]["ratios"]]
    lines = plots.goals_table({"summary": {"ratios": heavier}}, None).splitlines()
    memory = next(each for each in lines if "memory of `zero2`" in each)
    assert memory.endswith("| at most 1.00 | 1.01 | no |")


def device_result() -> dict[str, Any]:
    fast = {"tokens_per_second": 9000.0, "model_tflops": 414.9, "mfu": 0.42}
    rows = [
        vars(device.ROWS[0]) | fast | {"gpu_memory_mb": {"reserved": 120000.0}},
        vars(device.ROWS[2]) | {"failed": "out of memory"},
    ]
    return {"rows": rows, "hardware": {"gpu": "NVIDIA H200"}, "command": "python"}


def test_rows_of_a_gpu_show_their_numbers_or_why_there_are_none():
    lines = plots.device_table(device_result()).splitlines()
    assert "| 7b | 4096 | 8 | full | `zero2` | 9,000 | 414.9 | 42.0% | 120,000 |" in lines
    assert "| 7b | 4096 | 2 | full | `trainer` | out of memory |  |  |  |" in lines
    assert "| 7b | 4096 | 2 | full | `zero2` | not measured |  |  |  |" in lines
    goals = plots.goals_table(None, device_result()).splitlines()
    assert [line for line in goals if line.endswith("| at least 8,771 | 9,000 | yes |")]


@pytest.mark.parametrize("gpu", ["NVIDIA H100 80GB HBM3", "NVIDIA H200 NVL", "NVIDIA B200"])
def test_goals_of_an_h200_are_not_reached_on_another_gpu(gpu):
    result = device_result() | {"hardware": {"gpu": gpu}}
    lines = plots.goals_table(None, result).splitlines()[2:]
    assert all(line.endswith("| not measured |  |") for line in lines)
    assert gpu in plots.device_table(result)


def test_rates_of_a_row_are_those_of_its_median_step():
    row = device.Row("7b", 4096, 8, "full", "zero2")
    found = device.rates(row, {"measured_seconds": [4.0, 2.0, 9.0]}, "NVIDIA H200")
    assert found["tokens_per_second"] == 8192.0
    # 46.1e9 model FLOPs a token of 7B at 4096: 6 for each of 6.607e9 matrix weights and 12 *
    # 32 layers * 4096 * 4096 for attention; peak 989.4 TFLOPS (NVIDIA's data sheet, dense bf16).
    assert found["model_tflops"] == pytest.approx(8192 * 46.1e9 / 1e12, rel=2e-3)
    assert found["mfu"] == pytest.approx(found["model_tflops"] / 989.4, abs=1e-4)
    assert device.rates(row, {"failed": "out of memory"}, "NVIDIA H200") == {}


def test_rows_of_one_batch_have_to_train_alike():
    rows = [vars(row) | {"loss": [10.4, 9.0]} for row in device.ROWS[:3]]
    device.check_alike(rows)
    rows[2]["loss"] = [10.4, 9.1]
    with pytest.raises(SystemExit, match="differently"):
        device.check_alike(rows)


def recorded_device_run(folder: Path, steps: int) -> device.DeviceBench:
    """A bench of 4 steps, 1 not measured, whose run left `steps` records in `folder`."""
    result = {"steps": {"run": 4, "ignored": 1, "seconds": [0.2, 0.3, 0.4]}, "kernels": "liger"}
    result["memory_mb"] = {"allocated": 5.0, "reserved": 6.0, "host": 7.0}
    (folder / "result.json").write_text(json.dumps(result))
    records = [{"step_time_s": 9.0 - step, "loss": 5.0 - step} for step in range(steps)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
    bench = object.__new__(device.DeviceBench)
    bench.arguments = Namespace(steps=4, ignore=1)
    return bench


def test_a_row_of_a_gpu_keeps_every_steps_time_and_loss(tmp_path):
    bench = recorded_device_run(tmp_path, 4)
    found = bench.our_steps(tmp_path)
    assert found["seconds"] == [9.0, 0.2, 0.3, 0.4]
    assert found["reported"] == [9.0, 8.0, 7.0, 6.0]
    assert found["loss"] == [5.0, 4.0, 3.0, 2.0]
    assert found["memory"] == {"allocated": 5.0, "reserved": 6.0}
    assert bench.kernels == "liger"
    with pytest.raises(SystemExit, match="3 records of 4 steps"):
        recorded_device_run(tmp_path, 3).our_steps(tmp_path)


def test_our_runs_on_a_gpu_read_one_loss_after_each_step(tmp_path):
    """As the page says of all contenders."""
    row = device.ROWS[0]
    bench = object.__new__(device.DeviceBench)
    bench.arguments = train.arguments_of(["--only", row.contender, "--steps", "4"])
    bench.work, bench.tokens, bench.model = tmp_path, tmp_path, row.model
    command = bench.our_command(train.contender_of(row.contender), tmp_path)
    options = parse_options("benchmark", command[1:])
    assert options.report.log_interval == 1
    assert (options.report.num_steps, options.report.ignore_steps) == (4, 3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_measured_for_one():
    with pytest.raises(SystemExit, match="no NVIDIA GPU"):
        device._arguments([])


def test_plots_are_drawn_from_results_alike_each_time(tmp_path):
    result = {"summary": train.summary(RUNS)}
    for name in ("one.png", "two.png"):
        plots.draw_train(result, tmp_path / name)
        plots.draw_growth(growth_result(), tmp_path / f"growth-{name}")
    for name in ("{}.png", "growth-{}.png"):
        one, two = ((tmp_path / name.format(each)).read_bytes() for each in ("one", "two"))
        assert one.startswith(b"\x89PNG") and one == two


# -- the rivals ---------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """accelerate keeps the precision of the first Trainer of a process; a rival's has one only."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = tmp_path_factory.mktemp("job")
    shape = {"model_type": "llama", "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96}
    shape |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    (folder / "config.json").write_text(json.dumps(shape))
    rows = np.random.default_rng(0).integers(300, size=(12, 16), dtype=np.int32)
    np.save(folder / "rows.npy", rows)
    return Job(
        config=str(folder / "config.json"),
        rows=str(folder / "rows.npy"),
        records=str(folder / "records.json"),
        steps=6,
        batch_size=2,
        lr=1e-2,
        warmup_steps=2,
        weight_decay=0.1,
        gradient_clipping=1.0,
        mixed_precision="fp32",
        gradient_checkpoint=False,
        seed=3,
        device="cpu",
    )


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("bf16", 2e-2)])
def test_the_rivals_train_alike(job, precision, tolerance):
    job = replace(job, mixed_precision=precision)
    one = barest.train(job).losses
    other = [float(each) for each in hf_trainer.train(job, torch.float32).notes.losses]
    assert other == pytest.approx(one, abs=tolerance)
    # They really train: the loss moves by far more than they may differ.
    assert max(one) - min(one) > 5 * tolerance
    recomputed = barest.train(replace(job, gradient_checkpoint=True)).losses
    assert recomputed == pytest.approx(one, abs=tolerance)


def test_trainer_takes_no_precision_from_the_environment(job, monkeypatch):
    """transformers leaves the one of an earlier Trainer there, and `accelerate config` may too."""
    expected = barest.train(job).losses
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    losses = hf_trainer.train(job, torch.float32).notes.losses
    assert [float(each) for each in losses] == pytest.approx(expected, abs=1e-5)


def test_the_barest_loop_is_the_recipe_written_out(job):
    """Against AdamW of torch without any of the loop's shortcuts, in fp32."""
    model = initial_model(job, torch.float32)
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1), betas=(0.9, 0.95), eps=1e-8)
    losses = []
    for step in range(job.steps):
        ids = torch.from_numpy(job.all_rows()[2 * step : 2 * step + 2].astype("int64"))
        logits = model(input_ids=ids).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = job.learning_rate(step + 1)
        optimizer.step()
    assert barest.train(job).losses == pytest.approx(losses, abs=1e-5)


def test_fp32_masters_keep_what_bf16_weights_lose(job, tmp_path):
    """Updates below half a unit of most bf16 weights add up in the masters."""
    steps = 30
    np.save(tmp_path / "rows.npy", np.tile(job.all_rows()[:2], (steps, 1)))
    slow = replace(job, rows=str(tmp_path / "rows.npy"), steps=steps, lr=2e-5, warmup_steps=0)
    exact = barest.train(slow).losses
    slow = replace(slow, mixed_precision="bf16")
    with_masters = barest.train(slow).losses
    without = hf_trainer.train(slow, torch.bfloat16).notes.losses
    fall = exact[0] - exact[-1]
    assert with_masters[0] - with_masters[-1] == pytest.approx(fall, rel=0.05)
    assert float(without[0] - without[-1]) < 0.9 * fall


def test_a_rival_refuses_other_rows_than_its_steps_need(job):
    with pytest.raises(SystemExit, match="12 rows for 5 x 2"):
        barest.train(replace(job, steps=5))


# -- the whole of it ----------------------------------------------------------------------------


def measured(tmp_path: Path, *flags: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.train", *TINY, "--steps", "3", "--ignore", "1"]
    command += ["--repeats", "1", "--result", str(tmp_path / "train.json"), *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((tmp_path / "train.json").read_text())


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared dataset of a few thousand tokens."""
    folder = tmp_path_factory.mktemp("tokens")
    texts = [" ".join(f"word{i % number}" for i in range(60)) for number in range(2, 40)]
    save_tokenizer(train_tokenizer(texts, 300), folder / "tokenizer")
    text = folder / "text.jsonl"
    text.write_text("".join(json.dumps({"text": each}) + "\n" for each in texts))
    request = PrepareRequest(
        [str(text)],
        str(folder / "tokenizer"),
        eval_ratio=0,
        cache_dir=folder / "cache",
        output=folder / "prepared",
        workers=1,
    )
    return prepare(request).path


@pytest.mark.distributed
def test_pretrain_and_the_rivals_train_alike_on_its_rows(tmp_path, tokens):
    """The proof that the comparison is fair."""
    arguments = train.arguments_of(
        [*TINY, "--precision", "fp32", "--steps", "4", "--ignore", "1"]
        + ["--only", "zero2", "--threads", "1"]
    )
    bench = train.Bench(arguments, tmp_path / "work", tokens)
    ours = train.contender_of("zero2")
    found = bench.train(ours)
    job = job_of(bench.options(ours), bench.rows, tmp_path / "records.json", 4, 1)
    job = replace(job, device="cpu")
    assert barest.train(job).losses == pytest.approx(found["loss"], abs=1e-5)
    others = hf_trainer.train(job, torch.float32).notes.losses
    assert [float(each) for each in others] == pytest.approx(found["loss"], abs=1e-5)
    assert abs(found["loss"][3] - found["loss"][0]) > 1e-3
    assert len(found["step_seconds"]) == 4 and len(found["measured_seconds"]) == 3
    # The clock between two records, which no stopwatch can leave anything out of.
    assert all(each > 0 for each in found["step_seconds"])
    assert sum(found["measured_seconds"]) >= 0.9 * sum(found["reported_seconds"][1:])
    assert found["command"]["peak_pss_mb"] > 0


@pytest.mark.full
@pytest.mark.distributed
@pytest.mark.parametrize(
    "contenders",
    [
        "zero2,zero2_cpu,gemini,gemini_auto,hybrid_parallel,barest,trainer,trainer_bf16_weights",
        "zero2-2,gemini-2,hybrid_parallel-2,trainer-2",
    ],
)
def test_every_contender_trains_alike_in_bf16(tmp_path, contenders):
    # A run that trained otherwise would end the benchmark.
    result = measured(tmp_path, "--only", contenders)
    assert ",".join(run["contender"] for run in result["runs"]) == contenders
    for run in result["runs"]:
        assert run["loss"][0] == pytest.approx(result["runs"][0]["loss"][0], abs=2e-2)
    assert train.table(result) and plots.contenders_table(result) and plots.ratios_table(result)
    assert "\n" in plots.setting_text(result)
    again = measured(tmp_path, "--only", contenders, "--resume")
    assert again["runs"] == result["runs"]


@pytest.mark.full
@pytest.mark.distributed
def test_growth_is_measured_point_by_point(tmp_path):
    arguments: Namespace = growth._arguments(
        ["--models", "64x1", "128x2", "--lengths", "16", "32", "--batches", "1", "2"]
        + ["--centre", "64", "32", "2", "--steps", "3", "--ignore", "1"]
        + ["--result", str(tmp_path / "growth.json")]
    )
    result = growth.run(arguments, tmp_path)
    assert len(result["points"]) == 4 and len(result["fits"]) == 6
    assert all(math.isfinite(fit["exponent"]) for fit in result["fits"])
    assert growth.table(result) and plots.growth_table(result)


@pytest.mark.full
@pytest.mark.distributed
def test_a_row_of_a_gpu_is_benchmarks_own_result(tmp_path, tokens):
    """On whatever this machine has: benchmark.py and a rival, both with full recomputation."""
    results = []
    for number, contender in enumerate(("zero2", "barest")):
        row = device.Row("tiny", 64, 2, "full", contender)
        results.append(device.measured(row, 4, 1, tmp_path / str(number), tokens))
        assert len(results[-1]["measured_seconds"]) == 3
        # The page says that the file has every step's time and every loss.
        assert len(results[-1]["step_seconds"]) == len(results[-1]["loss"]) == 4
        assert all(each > 0 for each in results[-1]["step_seconds"])
    assert results[0]["kernels"].startswith("torch") or torch.cuda.is_available()
    assert results[1]["kernels"] == "transformers"
    device.check_alike([vars(row) | found for found in results])
    assert results[0]["loss"][0] == pytest.approx(results[1]["loss"][0], abs=2e-2)
    assert device.rates(row, results[0], "NVIDIA H200")["tokens_per_second"] > 0
