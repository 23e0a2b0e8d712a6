"""With --document_mask a packed row trains as its documents alone would, in every layout.

Rows, ranks and micro-batches have unequal numbers of labels, documents and padding throughout
(`plain_loop.packed_batch`).
"""

import pytest

from tests.distributed.cases import LENGTH
from tests.distributed.conftest import Job
from tests.distributed.test_truth import TOLERANCE, job_params, worst

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize(
    "job",
    job_params(
        "truth",
        quick="zero2_documents/fp32 gemini_documents/fp32 tp2_documents/fp32 pp2_documents/fp32",
        full="zero2_accumulate_documents/fp32 zero2_cpu_documents/fp32"
        " gemini_accumulate_documents/fp32 gemini_offload_all_documents/fp32"
        " gemini_auto_documents/fp32 hybrid_zero0_documents/fp32 tp2_accumulate_documents/fp32"
        " zero2_documents/bf16 zero2_cpu_documents/bf16 gemini_documents/bf16"
        " gemini_auto_documents/bf16 gemini_offload_all_documents/bf16 hybrid_zero1_documents/bf16"
        " tp2_documents/bf16 zero2_documents/fp16 gemini_documents/fp16"
        " pp2_accumulate_documents/fp32 pp2_microbatch2_documents/fp32 pp2_documents/bf16"
        " zero2_mistral_documents/fp32 gemini_mistral_documents/fp32"
        " gemini_mistral_documents/bf16"
        " hybrid_zero1_mistral_documents/bf16"
        # four processes
        " dp2_tp2_zero1_documents/bf16 tp2_pp2_documents/fp32 dp2_pp2_zero1_documents/bf16",
    ),
)
def test_equals_a_plain_loop_with_a_mask_over_pairs(report: Job, job: str) -> None:
    result, precision = report(job), job.split("/")[2]
    plain = result["plain"]
    assert plain["losses"][-1] < plain["losses"][0] - 1, "the plain loop learnt nothing to compare"
    assert worst(result["losses"], plain["losses"]) < TOLERANCE[precision]
    if precision == "fp32":
        assert worst(result["norms"], plain["norms"]) < TOLERANCE[precision]


@pytest.mark.full
@pytest.mark.parametrize(
    ("recomputing", "plain"),
    [
        pytest.param(jobs[0], jobs[1], marks=pytest.mark.needs(*jobs))
        for jobs in (
            (f"truth/{layout}_recompute_documents/fp32", f"truth/{layout}_documents/fp32")
            for layout in ("zero2", "gemini", "tp2", "pp2")
        )
    ],
)
def test_recomputation_sees_the_same_documents(report: Job, recomputing: str, plain: str) -> None:
    assert report(recomputing)["losses"] == report(plain)["losses"]
    assert report(recomputing)["norms"] == report(plain)["norms"]


ISOLATION = job_params(
    "isolation",
    quick="zero2_documents/fp32 gemini_documents/fp32 tp2_documents/fp32 pp2_documents/fp32",
    full="zero2_cpu_documents/fp32 gemini_auto_documents/fp32 gemini_recompute_documents/fp32"
    " hybrid_zero0_documents/fp32 zero2_accumulate_documents/fp32 zero2_documents/bf16"
    " gemini_documents/bf16 hybrid_zero1_documents/bf16 tp2_documents/bf16 gemini_documents/fp16"
    " pp2_documents/bf16 pp2_microbatch2_documents/fp32 tp2_pp2_documents/fp32"
    " zero2_mistral_documents/fp32 gemini_mistral_documents/fp32",
)


@pytest.mark.parametrize("job", ISOLATION)
def test_a_document_moves_no_loss_of_another(report: Job, job: str) -> None:
    """To the bit. A loss at position i is that of predicting token i + 1."""
    result = report(job)
    for name, (start, stop) in result["borders"].items():
        # All but the last of its own, which says something of the next document's first token.
        assert result[f"moved_by_{name}"] == list(range(start, min(stop, LENGTH - 1))), name


@pytest.mark.parametrize("job", ISOLATION)
def test_a_document_sends_no_gradient_to_another(report: Job, job: str) -> None:
    result = report(job)
    assert result["reached"] == ["middle"]
    # The same rows without their documents, or the line above could not fail.
    assert result["reached_without_a_mask"] == ["first", "middle"]


@pytest.mark.parametrize("job", ISOLATION)
def test_a_packed_document_has_the_losses_it_has_alone(report: Job, job: str) -> None:
    result, precision = report(job), job.split("/")[2]
    alone = result["alone"]
    assert len(alone) == LENGTH - len(result["borders"])
    for position, loss in alone.items():
        expected = pytest.approx(loss, rel=TOLERANCE[precision])
        assert result["losses"][int(position)] == expected, position
