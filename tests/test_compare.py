"""Results side by side: the ratios are right, and what counts different things has none."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llama_lib.__main__ import main
from llama_lib.compare import comparison, differences, incomparable, rows
from llama_lib.config import parse_options
from llama_lib.errors import UserError
from llama_lib.result_file import Loss, Memory, Model, Result, TimeShares, write
from tests.test_result_file import a_result


def options(*flags: str) -> dict[str, Any]:
    return parse_options("benchmark", ["-c", "tiny", "-l", "512", "-x", "bf16", *flags]).to_dict()


def faster(result: Result, factor: float) -> Result:
    """The same run at `factor` times the speed."""
    rates = result.rates
    return replace(
        result,
        rates=replace(
            rates,
            tokens_per_second_per_gpu=rates.tokens_per_second_per_gpu * factor,
            samples_per_second=rates.samples_per_second * factor,
            step_time_median_s=rates.step_time_median_s / factor,
            step_time_p95_s=rates.step_time_p95_s / factor,
        ),
        tflops_per_gpu={name: each * factor for name, each in result.tflops_per_gpu.items()},
    )


def cells(results: list[Result]) -> dict[str, list[str]]:
    return {row.name: row.cells() for row in rows(results)}


def test_every_rate_has_its_ratio_to_the_first():
    first = a_result()
    table = cells([first, faster(first, 2), faster(first, 0.5)])
    rate = first.rates.tokens_per_second_per_gpu
    assert table["tokens/s per GPU"] == [
        f"{rate:,.1f}",
        *(f"{2 * rate:,.1f}", "2.000"),
        *(f"{rate / 2:,.1f}", "0.500"),
    ]
    for name in (*first.tflops_per_gpu,):
        assert table[f"TFLOPS/GPU, formula {name}"][2::2] == ["2.000", "0.500"]
    assert table["samples/s, all GPUs"][2::2] == ["2.000", "0.500"]
    assert table["step time, median (s)"][2::2] == ["0.500", "2.000"]


def test_what_is_unknown_is_said_and_has_no_ratio():
    first = a_result(memory_mb=Memory(100.0, None, 812.5), loss=Loss(9.5, None))
    table = cells([first, replace(first, memory_mb=Memory(150.0, 7.0, 812.5))])
    assert table["memory, allocated (MB)"] == ["100.0", "150.0", "1.500"]
    assert table["memory, reserved (MB)"] == ["n/a", "7.0", ""]
    assert table["memory, host (MB)"] == ["812.5", "812.5", "1.000"]
    assert table["MFU (formula model)"] == ["n/a", "n/a", ""]
    assert table["loss, last step"] == ["n/a", "n/a", ""]


def test_the_rate_that_compares_anything_comes_first():
    assert rows([a_result(), a_result()])[0].name == "tokens/s per GPU"


def test_a_row_of_tflops_is_always_named_by_its_formula():
    named = [row.name for row in rows([a_result(), a_result()]) if "TFLOPS" in row.name]
    assert named == [f"TFLOPS/GPU, formula {name}" for name in a_result().tflops_per_gpu]


def test_other_recomputation_leaves_the_model_formula_to_compare():
    """The same work at the same speed: what the hardware did besides is no gain."""
    first = a_result()
    flops = first.tflops_per_gpu
    recomputing = a_result(
        options=options("-g"),
        tflops_per_gpu={**flops, "hardware": flops["hardware"] * 4 / 3},
    )
    assert incomparable(["a", "b"], [first, recomputing]) == []
    table = cells([first, recomputing])
    assert table["TFLOPS/GPU, formula model"][2] == "1.000"
    assert table["TFLOPS/GPU, formula causal"][2] == "1.000"
    for name in ("hardware", "colossalai_8n", "megatron_2021"):
        assert table[f"TFLOPS/GPU, formula {name}"][2] == ""
    text = "\n".join(comparison(["a", "b"], [first, recomputing]))
    assert "recompute differs: hardware, colossalai_8n, megatron_2021 count" in text


def test_steps_of_other_sizes_have_no_common_time():
    first = a_result()
    larger = replace(first, tokens_per_step=2 * first.tokens_per_step)
    table = cells([first, larger])
    assert table["step time, median (s)"][2] == ""
    assert table["tokens/s per GPU"][2] == "1.000"
    assert "tokens per step differ" in "\n".join(comparison(["a", "b"], [first, larger]))


def changed_formula() -> Result:
    flops = a_result().tflops_per_gpu
    return a_result(tflops_per_gpu={**flops, "model": flops["model"] * 1.01})


def fewer_formulas() -> Result:
    flops = a_result().tflops_per_gpu
    return a_result(tflops_per_gpu={name: flops[name] for name in ("model", "causal")})


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            a_result(model=Model("tiny", 2_000_000)),
            "the model's size is 1,000,000 parameters in the one, 2,000,000 parameters in the"
            " other; measure again with the same -c.",
        ),
        (
            a_result(options=options("-l", "1024")),
            "the row length is 512 in the one, 1024 in the other; measure again with the same -l.",
        ),
        (
            a_result(options=options("-x", "fp16")),
            "the precision is bf16 in the one, fp16 in the other; measure again with the same -x.",
        ),
        (
            a_result(data="sample"),
            "the kind of data is random tokens in the one, text in the other; measure again with"
            " the same -d.",
        ),
        (
            fewer_formulas(),
            "the set of FLOP formulas is causal, colossalai_8n, hardware, megatron_2021, model in"
            " the one, causal, model in the other; measure again with the same version of this"
            " program.",
        ),
        (
            changed_formula(),
            "what formula model counts is 6,000,000,000 FLOPs per token in the one, 6,060,000,000"
            " in the other; measure again with the same version of this program.",
        ),
    ],
)
def test_what_counts_different_things_is_refused(other, message):
    expected = [f"a and b cannot be compared: {message}"]
    assert incomparable(["a", "b"], [a_result(), other]) == expected


def test_all_conflicts_with_the_first_come_at_once():
    others = [a_result(data="sample"), a_result(), a_result(options=options("-l", "1024"))]
    problems = incomparable(["a", "b", "c", "d"], [a_result(), *others])
    assert [problem.split(" cannot")[0] for problem in problems] == ["a and b", "a and d"]


def test_the_same_shape_by_another_name_is_compared():
    """-c 7b and the folder of the same model are one shape; the name is listed."""
    other = a_result(model=Model("/models/tiny", 1_000_000))
    assert incomparable(["a", "b"], [a_result(), other]) == []
    assert ("model", ["tiny", "/models/tiny"]) in differences([a_result(), other])


def test_differences_of_options_are_listed_as_flags_and_nothing_else():
    first = a_result(options=options("-p", "zero2", "--output", "a.json"))
    other = a_result(options=options("-p", "gemini", "-b", "4", "-d", "x", "y", "--output", "b"))
    found = dict(differences([first, other]))
    assert found == {
        "--plugin": ["zero2", "gemini"],
        "--batch_size": ["2", "4"],
        "--dataset": ["random", "x y"],
    }


def test_runs_of_other_hardware_and_versions_are_told_apart():
    first = a_result()
    other = a_result(
        hardware=replace(first.hardware, device="NVIDIA H200", count=8),
        versions={**first.versions, "torch": "2.8.0"},
    )
    found = dict(differences([first, other]))
    assert found["hardware device"] == ["cpu", "NVIDIA H200"]
    assert found["hardware count"] == ["2", "8"]
    assert found["version of torch"] == ["2.13.0", "2.8.0"]


def test_an_option_that_one_of_the_programs_did_not_have_is_not_taken_for_none():
    older = options()
    del older["parallel"]["tp"]
    found = dict(differences([a_result(options=older), a_result()]))
    assert found == {"--tp": ["not recorded", "1"]}


def test_communication_that_was_not_measured_is_said():
    shares = TimeShares(0.0, 0.875, 0.125, None, 0.0, 0.0)
    text = "\n".join(comparison(["a", "b"], [a_result(), a_result(time_shares=shares)]))
    assert "communication n/a: not measured by itself" in text


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    first = a_result()
    paths = [tmp_path / name for name in ("first.json", "second.json", "third.json")]
    for path, result in zip(paths, (first, faster(first, 1.25), faster(first, 0.8)), strict=True):
        write(result, path)
    return [str(path) for path in paths]


def test_the_command_prints_one_table(files, capsys):
    assert main(["compare", *files]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["first", "second", "ratio", "third", "ratio"]
    assert lines[1].startswith("tokens/s per GPU")
    assert (lines[1].split()[-1], lines[1].split()[-3]) == ("0.800", "1.250")
    # Right-aligned under their headings.
    assert lines[1].index("1.250") == lines[0].index("ratio")
    assert lines[-1] == "the runs differ in nothing that is recorded"


def test_files_of_one_name_keep_their_folders(tmp_path, capsys):
    paths = [str(tmp_path / folder / "run.json") for folder in ("a", "b")]
    for path in paths:
        write(a_result(), path)
    main(["compare", *paths])
    assert capsys.readouterr().out.splitlines()[0].split() == [*paths, "ratio"]


def test_bad_files_and_incomparable_runs_end_with_a_message(files, tmp_path):
    first, *_ = files
    with pytest.raises(UserError, match=r"two results or more; got .*first\.json alone"):
        main(["compare", first])
    damaged = tmp_path / "damaged.json"
    damaged.write_text("{")
    missing = str(tmp_path / "missing.json")
    with pytest.raises(UserError) as caught:
        main(["compare", first, str(damaged), missing])
    assert len(caught.value.problems) == 2, "both bad files at once"
    old = json.loads(Path(first).read_text()) | {"version": 0}
    damaged.write_text(json.dumps(old))
    with pytest.raises(UserError, match="has version 0 of the format, expected 1"):
        main(["compare", first, str(damaged)])
    write(a_result(data="sample"), damaged)
    with pytest.raises(UserError, match="the kind of data is random tokens") as caught:
        main(["compare", first, str(damaged)])
    assert caught.value.exit_code == 2


def test_a_loss_a_piece_at_a_time_is_a_difference_though_the_options_are_the_same():
    """The option only asks for it: a layout that cannot do it computes all logits at once."""
    found = dict(differences([a_result(chunked_loss=True), a_result(attention="flash")]))
    assert found == {"attention": ["sdpa", "flash"], "loss a piece at a time": ["yes", "no"]}


def test_communication_that_is_unknown_is_part_of_the_others():
    unknown = a_result(time_shares=TimeShares(0.0, 0.875, 0.125, None, 0.0, 0.0))
    text = "\n".join(comparison(["a", "b"], [a_result(), unknown]))
    assert "communication n/a: not measured by itself, part of the others" in text
