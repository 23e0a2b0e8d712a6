"""Every layout trains as a plain transformers and torch.optim.AdamW loop on the same rows does.

Rows, ranks and micro-batches have unequal numbers of labels throughout (`plain_loop.batch`).
"""

import math
from typing import Any

import pytest

from tests.distributed.cases import LENGTH, MODEL
from tests.distributed.checks import POISONED
from tests.distributed.conftest import Job

# fp32: loss and gradient norm; bf16 and fp16: loss.
TOLERANCE = {"fp32": 1e-4, "bf16": 1e-2, "fp16": 1e-2}

pytestmark = pytest.mark.distributed


def job_params(check: str, quick: str, full: str) -> list[Any]:
    """Parameters "check/layout/precision", the `full` ones marked so."""
    quick_jobs = [f"{check}/{name}" for name in quick.split()]
    full_jobs = [f"{check}/{name}" for name in full.split()]
    return [pytest.param(job, marks=pytest.mark.needs(job)) for job in quick_jobs] + [
        pytest.param(job, marks=[pytest.mark.needs(job), pytest.mark.full]) for job in full_jobs
    ]


def worst(found: list[float | None], expected: list[float | None]) -> float:
    """Largest relative difference over the steps where both have a number."""
    pairs = zip(found, expected, strict=True)
    return max(abs(f / e - 1) for f, e in pairs if f is not None and e is not None)


@pytest.mark.parametrize(
    "job",
    job_params(
        "truth",
        quick="zero2_accumulate/fp32 gemini/fp32 tp2/fp32 pp2/fp32 all_to_all/fp32"
        " pp2_interleaved/fp32"
        " gemini_offload_all/bf16 hybrid_zero1/bf16",
        full="zero2/fp32 zero2_cpu/fp32 zero2_cpu_accumulate/fp32 gemini_accumulate/fp32"
        " gemini_offload_half/fp32 gemini_offload_optimizer/fp32 gemini_offload_all/fp32"
        " gemini_auto/fp32 gemini_auto_accumulate/fp32 hybrid_zero0/fp32"
        " hybrid_zero0_accumulate/fp32 tp2_accumulate/fp32 pp2_accumulate/fp32"
        " pp2_microbatch2/fp32 split_gather/fp32"
        " pp2_interleaved_accumulate/fp32 pp2_interleaved_microbatch2/fp32"
        " pp2_interleaved_recompute/fp32 pp2_interleaved/bf16"
        " zero2_whole/fp32 gemini_whole/fp32 hybrid_zero1_whole/bf16 all_to_all_whole/fp32"
        " zero2/bf16 zero2_accumulate/bf16 zero2_cpu/bf16 gemini/bf16 gemini_accumulate/bf16"
        " gemini_offload_half/bf16 gemini_offload_optimizer/bf16 gemini_auto/bf16"
        " gemini_auto_accumulate/bf16 hybrid_zero0/bf16 hybrid_zero0_accumulate/bf16"
        " hybrid_zero1_accumulate/bf16 hybrid_zero2/bf16 hybrid_zero2_accumulate/bf16"
        " tp2/bf16 tp2_accumulate/bf16 pp2/bf16 pp2_accumulate/bf16 pp2_microbatch2/bf16"
        " all_to_all/bf16 split_gather/bf16"
        " zero2/fp16 zero2_cpu/fp16 gemini/fp16 gemini_accumulate/fp16"
        # four processes
        " tp2_pp2/fp32 tp2_pp2_interleaved/fp32 dp2_pp2_interleaved_zero1/bf16"
        " dp2_tp2/fp32 dp2_pp2/fp32 dp2_all_to_all/fp32 dp4_gemini/fp32"
        " dp4_zero2/fp32 dp2_tp2_zero1/bf16 dp2_pp2_zero1/bf16",
    ),
)
def test_equals_a_plain_loop(report: Job, job: str) -> None:
    result, precision = report(job), job.split("/")[2]
    plain = result["plain"]
    assert plain["losses"][-1] < plain["losses"][0] - 1, "the plain loop learnt nothing to compare"
    assert worst(result["losses"], plain["losses"]) < TOLERANCE[precision]
    if precision == "fp32":
        assert worst(result["norms"], plain["norms"]) < TOLERANCE[precision]
    if precision == "fp16":
        assert len(result["overflows"]) < 6
        assert 2**10 <= result["loss_scale"] <= 2**16
    else:
        assert not result["overflows"]
    assert result["initial_weights"] == result["plain_weights"], "other weights for the same seed"


@pytest.mark.parametrize(
    ("recomputing", "plain"),
    [
        pytest.param(
            f"truth/{layout}_recompute/fp32",
            f"truth/{layout}/fp32",
            marks=[
                pytest.mark.needs(f"truth/{layout}_recompute/fp32", f"truth/{layout}/fp32"),
                *([] if layout == "gemini" else [pytest.mark.full]),
            ],
        )
        for layout in ("gemini", "zero2", "tp2", "pp2", "all_to_all", "split_gather")
    ],
)
def test_gradient_checkpointing_changes_no_number(
    report: Job, recomputing: str, plain: str
) -> None:
    assert report(recomputing)["losses"] == report(plain)["losses"]
    assert report(recomputing)["norms"] == report(plain)["norms"]


@pytest.mark.needs("truth/gemini_accumulate/bf16")
def test_gemini_accumulation_is_not_multiplied_by_the_ranks(report: Job) -> None:
    """A model smaller than one chunk stayed whole on every rank, and its accumulated gradient came
    out times the number of ranks."""
    result = report("truth/gemini_accumulate/bf16")
    assert result["norms"] == pytest.approx(result["plain"]["norms"], rel=0.1)


@pytest.mark.parametrize(
    "job",
    job_params(
        "nonfinite",
        quick="gemini/bf16 zero2/fp32 tp2/fp32",
        full="zero2/bf16 zero2_cpu/bf16 zero2_accumulate/fp32 gemini_offload_all/bf16"
        " gemini_accumulate/bf16 gemini_auto/bf16 gemini/fp32 hybrid_zero0/bf16 hybrid_zero0/fp32"
        " hybrid_zero1/bf16 hybrid_zero2/bf16 tp2/bf16 pp2/fp32 pp2/bf16 all_to_all/bf16"
        " split_gather/bf16 zero2/fp16 gemini/fp16 gemini_accumulate/fp16 zero2_cpu/fp16",
    ),
)
def test_a_nonfinite_gradient_changes_nothing(report: Job, job: str) -> None:
    """Weights and optimizer state keep every bit; later steps are those of a loop without it."""
    result, precision = report(job), job.split("/")[2]
    assert result["changed"] == []
    assert set(POISONED) <= set(result["skipped"])
    assert precision == "fp16" or result["skipped"] == list(POISONED)
    assert len(result["skipped"]) < 8
    plain = result["plain"]
    for step, (loss, norm) in enumerate(zip(result["losses"], result["norms"], strict=True), 1):
        if step in result["skipped"]:
            assert norm is None or not math.isfinite(norm)
        else:
            assert loss == pytest.approx(plain["losses"][step - 1], rel=TOLERANCE[precision])
            if precision == "fp32":
                assert norm == pytest.approx(plain["norms"][step - 1], rel=TOLERANCE[precision])


@pytest.mark.full
@pytest.mark.needs("truth/gemini_accumulate/fp16", "nonfinite/gemini_accumulate/fp16")
def test_gemini_accumulation_recovers_from_an_overflow(report: Job) -> None:
    """Gemini returned from an overflowed step with accumulation still on: every later step was
    added to the overflow and skipped, until the loss scale was 1."""
    for check in ("truth", "nonfinite"):
        norms = report(f"{check}/gemini_accumulate/fp16")["norms"]
        assert norms[-1] is not None and None in norms


@pytest.mark.parametrize(
    "job",
    job_params(
        "clipping",
        quick="gemini_offload_all/bf16 zero2_cpu/bf16 pp2/bf16",
        full="zero2/fp32 zero2/bf16 zero2_cpu/fp32 gemini/bf16 gemini/fp32 gemini_auto/bf16"
        " gemini_accumulate/bf16 gemini_offload_half/bf16 gemini_offload_optimizer/bf16"
        " hybrid_zero0/bf16 hybrid_zero0/fp32 hybrid_zero1/bf16 hybrid_zero2/bf16 tp2/bf16 tp2/fp32"
        " pp2/fp32 all_to_all/bf16 split_gather/bf16 zero2/fp16 gemini/fp16 gemini_offload_all/fp16"
        " dp2_tp2_zero1/bf16 tp2_pp2/bf16",
    ),
)
def test_clipping_bounds_the_gradient_that_reaches_adam(report: Job, job: str) -> None:
    result = report(job)
    assert result["norm"] > 10 * result["bound"]
    assert result["applied"] == pytest.approx(result["bound"], rel=1e-3)


@pytest.mark.parametrize(
    "job",
    job_params(
        "causality",
        quick="all_to_all/fp32 split_gather/fp32",
        full="all_to_all/bf16 split_gather/bf16 zero2/fp32 tp2/fp32 pp2/fp32 dp2_all_to_all/fp32",
    ),
)
def test_a_token_moves_no_earlier_loss(report: Job, job: str) -> None:
    result = report(job)
    middle, last = LENGTH // 2, LENGTH - 1
    plain = result["plain"]
    assert len(plain) == LENGTH - 1
    assert result[str(last)] == plain
    changed = result[str(middle)]
    assert changed[:middle] == plain[:middle]
    assert all(a != b for a, b in zip(changed[middle:], plain[middle:], strict=True))


@pytest.mark.parametrize(
    "job",
    job_params(
        "saved_model",
        quick="gemini/bf16 tp2/bf16",
        full="zero2/bf16 zero2_cpu/bf16 hybrid_zero1/bf16 pp2/bf16 all_to_all/bf16"
        " split_gather/bf16 tp2_pp2/bf16 gemini/fp32 zero2/fp16",
    ),
)
def test_transformers_serves_the_model_that_was_trained(report: Job, job: str) -> None:
    """Same loss, rotary frequencies in fp32 on both sides, no padding left in the vocabulary."""
    result, precision = report(job), job.split("/")[2]
    dtype = {"fp32": "torch.float32", "bf16": "torch.bfloat16", "fp16": "torch.float16"}[precision]
    assert result["served_dtype"] == dtype
    assert result["loss"] == pytest.approx(result["served_loss"], rel=1e-3)
    assert result["next_token_difference"] < 2e-2
    assert result["rotary_dtypes"] == ["torch.float32"]
    assert result["rotary_equal"]
    assert result["vocabulary_rows"] == MODEL["vocab_size"]


@pytest.mark.needs("saved_model/tp2/bf16", "handover/tp2>hybrid_zero1/bf16")
def test_a_padded_vocabulary_is_saved_and_loaded(report: Job) -> None:
    """500 ids are no multiple of 64: ColossalAI pads them, and its gathering of padded weights and
    optimizer state failed under the hybrid plugin, with tensor parallelism and without."""
    assert MODEL["vocab_size"] % 64
    assert report("saved_model/tp2/bf16")["vocabulary_rows"] == MODEL["vocab_size"]
    assert report("handover/tp2>hybrid_zero1/bf16")["differing"] == []
