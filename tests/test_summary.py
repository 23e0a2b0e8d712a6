"""What a run shows at its end: rates that follow from its steps, shares that add up to 100%."""

import re
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest

from llama_lib import flops
from llama_lib.config import parse_options
from llama_lib.models import model_config
from llama_lib.result_file import Hardware, Memory, Model, Peak, Result, Steps, TimeShares, rates_of
from llama_lib.summary import closing_lines, mean_of_ranks, percents, render, time_shares
from llama_lib.throughput import Throughput
from llama_lib.timing import PHASES
from tests.test_result_file import a_result

SECONDS = [1.0, 1.1, 0.9, 1.2, 1.0, 1.0, 0.8, 1.0, 1.1, 0.9]
TOKENS, ROWS, GPUS = 16 * 512, 16, 2


def throughput(*argv: str, device: str = "NVIDIA H200", adapters: int = 0) -> Throughput:
    options = parse_options("benchmark", ["-c", "7b", "-x", "bf16", *argv])
    return Throughput(options, model_config("7b"), 4096, GPUS, device, adapters)


def result(*argv: str, script: str = "benchmark", **changes) -> Result:
    job = throughput()
    rates = rates_of(SECONDS, TOKENS, ROWS, GPUS)
    tflops = job.tflops_per_gpu(TOKENS * 10 / sum(SECONDS))
    measured = a_result(
        model=Model("7b", 6_738_415_616),
        options=parse_options(script, ["-x", "bf16", "-l", "512", *argv]).to_dict(),
        hardware=Hardware("NVIDIA H200", GPUS, "cpu", 2, 8.0),
        steps=Steps(15, 5, SECONDS),
        tokens_per_step=TOKENS,
        rows_per_step=ROWS,
        rates=rates,
        tflops_per_gpu=tflops,
        mfu=job.mfu(tflops["model"]),
        peak=job.peak,
        memory_mb=Memory(55491.1, 60000.0, 3000.0),
        time_shares=TimeShares(0.01, 0.7, 0.15, 0.1, 0.0, 0.04),
    )
    return replace(measured, **changes)


def values(lines: list[str]) -> dict[str, str]:
    """The table's rows by label."""
    rows = (re.fullmatch(r"  (\S.*?)  +(.*)", line) for line in lines)
    return {row[1]: row[2] for row in rows if row}


# -- formulas ------------------------------------------------------------------------------------


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_every_formula_by_its_name(recompute):
    config = model_config("7b")
    found = throughput("--recompute", recompute).flops_per_token
    assert found == {
        "model": flops.model_flops_per_token(config, 4096),
        "causal": flops.causal_flops_per_token(config, 4096),
        "hardware": flops.hardware_flops_per_token(config, 4096, recompute),
        "colossalai_8n": flops.colossalai_8n(config, recompute == "full"),
        "megatron_2021": flops.megatron_2021(config, 4096, recompute == "full"),
    }


def test_the_published_row_of_the_recipe():
    """24.26 samples/s of 4096 tokens on 32 A800: 167.43 TFLOPS by ColossalAI's formula."""
    options = parse_options("benchmark", ["-g", "-x", "bf16"])
    job = Throughput(options, model_config("7b"), 4096, 32, "NVIDIA A800-SXM4-80GB")
    found = job.tflops_per_gpu(24.26 * 4096)
    assert found["colossalai_8n"] == pytest.approx(167.43, rel=1e-3)
    assert job.mfu(found["model"]) == pytest.approx(0.459, abs=1e-3)


def test_adapters_have_a_formula_of_their_own():
    found = throughput(adapters=1000).flops_per_token
    assert found == {"model": flops.lora_flops_per_token(model_config("7b"), 4096, 1000)}


def test_the_peak_is_given_or_known_or_unknown():
    given = throughput("--peak_tflops", "500", device="some card")
    assert given.peak == Peak(500.0, "given") and given.mfu(250.0) == 0.5
    assert throughput("--peak_tflops", "500").peak == Peak(500.0, "given")
    assert throughput().peak == Peak(989.4, "data sheet of NVIDIA H200")
    unknown = throughput(device="cpu")
    assert unknown.peak == Peak(None, "unknown") and unknown.mfu(1.0) is None


# -- the table -----------------------------------------------------------------------------------


def test_rates_follow_from_the_raw_steps():
    lines = render(result())
    assert lines[0] == (
        "measured over 10 steps of 16 rows = 8,192 tokens, the first 5 left out, on 2 x NVIDIA "
        "H200:"
    )
    assert next(iter(values(lines))) == "tokens/s/GPU"
    shown = values(lines)
    per_gpu = len(SECONDS) * TOKENS / sum(SECONDS) / GPUS
    assert shown["tokens/s/GPU"] == f"{per_gpu:,.1f}"
    assert shown["samples/s"] == "16.00"
    assert shown["step time"].startswith("median 1 s, 95th percentile 1.2 s, ")
    assert shown["step time"].endswith("40.0%")
    tflops = throughput().flops_per_token["model"] * per_gpu / 1e12
    assert shown["model TFLOPS/GPU"].startswith(f"{tflops:.4g} ")
    assert shown["MFU"] == f"{tflops / 989.4:.1%} of 989.4 TFLOPS (data sheet of NVIDIA H200)"
    assert "colossalai_8n" in shown["TFLOPS/GPU by legacy"]
    assert "megatron_2021" in shown["TFLOPS/GPU by legacy"]
    assert shown["max memory"] == (
        "allocated 55,491 MB, reserved 60,000 MB, host 3,000 MB (each of the process with the most)"
    )


def test_the_last_line_is_the_one_of_the_upstream_benchmark():
    tflops = throughput().tflops_per_gpu(TOKENS)["model"]
    line = f"throughput:  16.00 samples/s, TFLOPS/GPU:  {tflops:.2f}"
    assert closing_lines(result())[-1] == f"max memory usage:  55491.10 MB, {line}"
    without_gpu = result(memory_mb=Memory(None, None, 642.5))
    assert closing_lines(without_gpu)[-1] == f"max memory usage:  642.50 MB, {line}"
    assert "allocated n/a, reserved n/a, host 642 MB" in values(render(without_gpu))["max memory"]


def test_an_unknown_peak_is_not_guessed():
    unknown = result(
        mfu=None, peak=Peak(None, "unknown"), hardware=Hardware("cpu", 2, "cpu", 2, 8.0)
    )
    assert values(render(unknown))["MFU"] == "n/a (peak for 'cpu' unknown, pass --peak_tflops)"


def test_more_than_the_peak_is_a_warning():
    lines = render(result(mfu=1.01, peak=Peak(1.0, "given")))
    assert [line for line in lines if line.startswith("warning: MFU above 100%")]
    assert not [line for line in render(result()) if line.startswith("warning")]


def test_few_steps_are_a_warning_of_the_benchmark():
    few = Steps(14, 5, SECONDS[:9])
    (warning,) = (line for line in render(result(steps=few)) if line.startswith("warning"))
    assert "9 measured steps are few" in warning and "--num_steps" in warning
    assert not [each for each in render(result(script="pretrain", steps=few)) if "few" in each]


def test_adapters_show_what_is_known():
    shown = values(render(result(tflops_per_gpu={"model": 5.0}, mfu=None)))
    assert shown["model TFLOPS/GPU"].startswith("5 ")
    assert shown["hardware TFLOPS/GPU"] == "n/a (with adapters)"
    assert shown["TFLOPS/GPU by legacy"] == "n/a (with adapters)"


# -- where the time went -------------------------------------------------------------------------


def test_shares_are_of_the_whole_time():
    seconds = dict(zip(PHASES, (1.0, 6.0, 2.0, 0.5, 0.25, 0.25), strict=True))
    shares = time_shares(seconds, communication_known=True)
    assert asdict(shares) == {name: value / 10 for name, value in seconds.items()}


def test_unknown_communication_is_part_of_the_others():
    seconds = dict.fromkeys(PHASES, 1.0) | {"communication": 0.0}
    shares = time_shares(seconds, communication_known=False)
    assert shares.communication is None
    assert sum(share for share in asdict(shares).values() if share) == pytest.approx(1)
    shown = values(render(result(time_shares=shares)))["time"]
    assert "communication n/a" in shown and "part of the others" in shown


def test_shown_shares_add_up():
    shown = values(render(result(time_shares=TimeShares(*[1 / 6] * 6))))["time"]
    found = [float(number) for number in re.findall(r"([\d.]+)%", shown)]
    assert len(found) == 6 and sum(found) == pytest.approx(100)
    assert [name.rsplit(" ", 1)[0] for name in shown.split(", ")] == [
        *("data", "forward-backward", "optimizer", "communication", "save", "other")
    ]


@pytest.mark.parametrize(
    "shares", [[1.0], [1 / 3] * 3, [0.9996, 0.0002, 0.0002], [1 / 7] * 7, [0.12345, 0.87655]]
)
def test_percents_add_up_and_are_near(shares):
    found = percents(shares)
    assert sum(found) == pytest.approx(100)
    assert all(
        abs(percent - 100 * share) < 0.1 for percent, share in zip(found, shares, strict=True)
    )


def test_phases_are_those_of_the_mean_rank(monkeypatch):
    ranks = [[1.0, 6.0, 2.0, 1.0, 0.0, 0.0], [1.0, 2.0, 2.0, 5.0, 0.0, 0.0]]
    gathered = SimpleNamespace(gather=lambda mine: [mine, ranks[1]])
    monkeypatch.setattr("llama_lib.summary.coordination", gathered)
    found = mean_of_ranks(dict(zip(PHASES, ranks[0], strict=True)))
    assert list(found.values()) == [1.0, 4.0, 2.0, 3.0, 0.0, 0.0]
