"""The file of benchmark --output: what is written is read back, anything else is one message."""

import json
import math
import statistics
from dataclasses import replace
from typing import Any

import pytest

from llama_lib import result_file
from llama_lib.config import parse_options
from llama_lib.errors import UserError
from llama_lib.result_file import (
    Hardware,
    Loss,
    Memory,
    Model,
    Peak,
    Result,
    Steps,
    TimeShares,
    rates_of,
)

SECONDS = [1.0, 2.0, 1.5, 1.25]
HARDWARE: dict[str, Any] = {
    "device": "cpu",
    "count": 2,
    "cpu": "a processor",
    "cores": 2,
    "memory_gib": 7.5,
}


def a_result(**changes: Any) -> Result:
    """Two GPUs, rows of 512 tokens, four measured steps; no number is meant to be likely."""
    rates = rates_of(SECONDS, tokens_per_step=4096, rows_per_step=8, gpus=2)
    speed = rates.tokens_per_second_per_gpu / 1e12
    flops = {
        "model": 6e9,
        "causal": 5.5e9,
        "hardware": 6e9,
        "colossalai_8n": 6e9,
        "megatron_2021": 7e9,
    }
    whole = Result(
        command="benchmark.py -c tiny -l 512 -b 4",
        model=Model("tiny", 1_000_000),
        options=parse_options("benchmark", ["-c", "tiny", "-l", "512", "-x", "bf16"]).to_dict(),
        layout="zero2: 2 process(es) = dp 2, tp 1, pp 1",
        attention="sdpa",
        kernels="torch",
        chunked_loss=False,
        versions={"torch": "2.13.0", "colossalai": "0.5.0"},
        hardware=Hardware(**HARDWARE),
        data="random",
        steps=Steps(run=6, ignored=2, seconds=SECONDS),
        tokens_per_step=4096,
        rows_per_step=8,
        rates=rates,
        tflops_per_gpu={name: number * speed for name, number in flops.items()},
        mfu=None,
        peak=Peak(None, "unknown"),
        memory_mb=Memory(None, None, 812.5),
        time_shares=TimeShares(0.0, 0.75, 0.125, 0.125, 0.0, 0.0),
        loss=Loss(9.5, 9.25),
    )
    return replace(whole, **changes)


def document(**changes: Any) -> dict[str, Any]:
    return {**json.loads(a_result().to_json()), **changes}


def refused(whole: Any) -> list[str]:
    with pytest.raises(UserError) as caught:
        Result.from_json(whole if isinstance(whole, str) else json.dumps(whole), "run.json")
    return caught.value.problems


def test_what_is_written_is_read_back_to_the_last_bit(tmp_path):
    path = tmp_path / "new" / "folder" / "run.json"
    result = a_result(steps=Steps(6, 2, [0.1 + 0.2, math.pi, 1e-7, 1.0]))
    result_file.write(result, path)
    assert result_file.read(path) == result
    assert [each.name for each in path.parent.iterdir()] == ["run.json"], "a part was left behind"


def test_the_file_says_what_it_is():
    whole = document()
    assert whole["format"] == "llama_lib benchmark"
    assert whole["version"] == 1
    assert set(whole) == {
        *("format", "version", "command", "model", "options", "layout", "attention", "kernels"),
        "chunked_loss",
        *("versions", "hardware", "data", "steps", "tokens_per_step", "rows_per_step", "rates"),
        *("tflops_per_gpu", "mfu", "peak", "memory_mb", "time_shares", "loss"),
    }


def test_numbers_that_are_not_finite_become_null():
    result = a_result(loss=Loss(9.5, math.nan))
    assert "NaN" not in result.to_json()
    assert Result.from_json(result.to_json()).loss == Loss(9.5, None)


def test_what_depends_on_the_options():
    assert (a_result().sequence, a_result().precision, a_result().recompute) == (
        512,
        "bf16",
        "none",
    )
    for flags, recompute in ((["-g"], "full"), (["--recompute", "selective"], "selective")):
        options = parse_options("benchmark", flags).to_dict()
        assert a_result(options=options).recompute == recompute


def test_rates_are_those_of_all_measured_steps_together():
    rates = rates_of(SECONDS, tokens_per_step=4096, rows_per_step=8, gpus=2)
    # Four steps took 5.75 seconds.
    assert rates.samples_per_second == pytest.approx(4 * 8 / 5.75)
    assert rates.tokens_per_second_per_gpu == pytest.approx(4 * 4096 / 5.75 / 2)
    assert rates.step_time_median_s == statistics.median(SECONDS) == 1.375
    assert rates.step_time_p95_s == 2.0
    assert rates.step_time_spread == pytest.approx(1.0 / 1.375)


def test_the_95th_percentile_is_a_step_that_happened():
    seconds = [float(n) for n in range(1, 101)]
    assert rates_of(list(reversed(seconds)), 1, 1, 1).step_time_p95_s == 95.0
    assert rates_of([3.0], 1, 1, 1).step_time_p95_s == 3.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "run.json has version 2 of the format, expected 1; measure again."),
        ({"format": "other"}, "run.json is no file that benchmark.py --output wrote."),
        ({"mfu": "high"}, 'run.json: mfu is "high", expected a number.'),
        ({"mfu": True}, "run.json: mfu is true, expected a number."),
        ({"tokens_per_step": 1.5}, "run.json: tokens_per_step is 1.5, expected a whole number."),
        ({"model": "7b"}, 'run.json: model is "7b", expected an object.'),
        ({"model": {"name": "7b"}}, "run.json: model.parameters is missing."),
        ({"extra": 1}, "run.json: extra is unknown."),
        (
            {"tflops_per_gpu": {"model": None}},
            "run.json: tflops_per_gpu.model is null, expected a number.",
        ),
        (
            {"steps": {"run": 6, "ignored": 2, "seconds": [1.0, "2"]}},
            'run.json: steps.seconds[1] is "2", expected a number.',
        ),
        (
            {"steps": {"run": 6, "ignored": 2, "seconds": [1.0]}},
            "run.json: steps.seconds has 1 steps, expected run - ignored = 4, at least 1.",
        ),
        ({"chunked_loss": 1}, "run.json: chunked_loss is 1, expected true or false."),
        (
            {"hardware": {**HARDWARE, "interconnect": "a cable"}},
            "run.json: hardware.interconnect is unknown.",
        ),
        (
            {"options": {"model": {"max_length": 512}}},
            "run.json: options.model.gradient_checkpoint is missing.",
        ),
    ],
)
def test_anything_else_is_refused_by_name(changes, message):
    assert message in refused(document(**changes))


@pytest.mark.parametrize("number", [0.0, -1.0, math.inf, math.nan])
@pytest.mark.parametrize(
    "name",
    [
        *("tokens_per_second_per_gpu", "samples_per_second"),
        *("step_time_median_s", "step_time_p95_s"),
    ],
)
def test_a_rate_that_no_step_can_have_is_refused(name, number):
    """compare divides by them."""
    rates = document()["rates"] | {name: number}
    assert refused(document(rates=rates)) == [
        f"run.json: rates.{name} is {number}, expected a number above 0."
    ]


def test_a_step_without_duration_is_refused():
    steps = {"run": 6, "ignored": 2, "seconds": [1.0, 0.0, 1.5, -2.0]}
    assert refused(document(steps=steps)) == [
        f"run.json: steps.seconds[{n}] is {number}, expected a number above 0."
        for n, number in ((1, 0.0), (3, -2.0))
    ]


def test_all_problems_come_at_once():
    whole = document(layout=3, kernels=None)
    del whole["data"]
    assert refused(whole) == [
        "run.json: layout is 3, expected a text.",
        "run.json: kernels is null, expected a text.",
        "run.json: data is missing.",
    ]


def test_shares_have_to_add_up():
    shares = document()["time_shares"]
    assert refused(document(time_shares={**shares, "data": 0.25})) == [
        "run.json: the time_shares add up to 1.250000, expected 1."
    ]
    # Communication that was not measured is part of the others.
    merged = {**shares, "forward_backward": 0.875, "communication": None}
    assert Result.from_json(json.dumps(document(time_shares=merged))).time_shares.data == 0.0


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", '"text"', "7"])
def test_no_result_at_all(text):
    assert len(refused(text)) == 1


def test_a_path_that_cannot_be_read_is_one_message(tmp_path):
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    for path, reason in (
        (tmp_path / "none.json", "No such file or directory"),
        (tmp_path, "Is a directory"),
        (tmp_path / "binary.json", "not a text file"),
    ):
        with pytest.raises(UserError) as caught:
            result_file.read(path)
        assert str(caught.value) == f"{path} cannot be read: {reason}."


def test_whether_a_file_can_be_written_is_known_before_the_run(tmp_path):
    assert result_file.output_problems(tmp_path / "a" / "b.json") == []
    assert list(tmp_path.iterdir()) == [], "asking must leave nothing behind"
    assert "is a folder" in result_file.output_problems(tmp_path)[0]
    (tmp_path / "file").write_text("")
    problems = result_file.output_problems(tmp_path / "file" / "run.json")
    assert problems == [
        f"--output {tmp_path}/file/run.json: nothing can be written in {tmp_path}/file."
    ]
