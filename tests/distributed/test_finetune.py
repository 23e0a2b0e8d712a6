"""Fine-tuning equals a plain transformers and AdamW loop that runs every conversation by itself.

Conversations are real, of unequal lengths and numbers of labels; questions weigh a quarter of
answers (`tests/distributed/conversations.py`). Layouts "..._documents" pack them into rows, the
others pad each to a row of its own.
"""

import pytest

from tests.distributed.conftest import Job
from tests.distributed.test_truth import TOLERANCE, job_params, worst

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize(
    "job",
    job_params(
        "conversation_steps",
        quick="zero2_documents/fp32 gemini_documents/bf16 tp2_documents/fp32 pp2_documents/fp32"
        " tp2/fp32",
        full="zero2_accumulate_documents/fp32 zero2_cpu_documents/fp32 gemini_documents/fp32"
        " gemini_accumulate_documents/fp32 gemini_offload_all_documents/fp32"
        " gemini_auto_documents/fp32 hybrid_zero0_documents/fp32 tp2_accumulate_documents/fp32"
        " tp2_recompute_documents/fp32 pp2_accumulate_documents/fp32"
        " pp2_microbatch2_documents/fp32 pp2_recompute_documents/fp32"
        " zero2_mistral_documents/fp32 gemini_mistral_documents/fp32"
        " zero2_documents/bf16 zero2_cpu_documents/bf16 gemini_auto_documents/bf16"
        " hybrid_zero1_documents/bf16 tp2_documents/bf16 pp2_documents/bf16"
        " zero2_documents/fp16 gemini_documents/fp16 hybrid_zero1_mistral_documents/bf16"
        # padded
        " zero2/fp32 zero2_cpu/fp32 gemini/fp32 gemini_auto/fp32 hybrid_zero0/fp32 pp2/fp32"
        " all_to_all/fp32 split_gather/fp32 hybrid_zero1/bf16 zero2_mistral/fp32"
        # four processes
        " tp2_pp2_documents/fp32 dp2_tp2_zero1_documents/bf16 dp2_pp2_zero1_documents/bf16",
    ),
)
def test_equals_a_plain_loop_over_separate_conversations(report: Job, job: str) -> None:
    result, precision = report(job), job.split("/")[2]
    plain = result["plain"]
    assert plain["losses"][-1] < plain["losses"][0] - 0.5, "the plain loop learnt nothing"
    assert worst(result["losses"], plain["losses"]) < TOLERANCE[precision]
    if precision == "fp32":
        assert worst(result["norms"], plain["norms"]) < TOLERANCE[precision]
    if precision != "fp16":
        assert None not in result["norms"]


@pytest.mark.parametrize(
    "job",
    job_params(
        "conversation_file",
        quick="gemini_documents/fp32",
        full="zero2_accumulate_documents/fp32 pp2_documents/fp32 tp2_documents/fp32 zero2/fp32"
        " pp2/fp32",
    ),
)
def test_a_file_of_conversations_equals_a_plain_loop(report: Job, job: str) -> None:
    """From the file to the gradient: the plain loop has its ids and labels from transformers."""
    test_equals_a_plain_loop_over_separate_conversations(report, job)


@pytest.mark.parametrize(
    "job",
    job_params(
        "conversation_scores",
        quick="tp2_documents/fp32 pp2_documents/fp32 all_to_all/fp32",
        full="zero2_documents/fp32 gemini_documents/fp32 hybrid_zero0_documents/fp32"
        " zero2_accumulate_documents/fp32 pp2_microbatch2_documents/fp32 split_gather/fp32"
        " zero2_mistral_documents/fp32 tp2_documents/bf16 pp2_documents/bf16 gemini_documents/bf16"
        " tp2_pp2_documents/fp32 dp2_all_to_all/fp32",
    ),
)
def test_packed_and_padded_conversations_score_as_they_do_alone(report: Job, job: str) -> None:
    """Loss and right guesses over all replicas, and over the parts of a cut vocabulary or row."""
    result, precision = report(job), job.split("/")[2]
    loss, correct, labels = result.pop("alone")
    assert 0 < correct < labels
    assert set(result) == ({"packed", "padded"} if "documents" in job else {"padded"})
    for kind, (found_loss, found_correct, found_labels) in result.items():
        assert found_loss == pytest.approx(loss, rel=TOLERANCE[precision]), kind
        assert found_labels == labels, kind
        if precision == "fp32":
            assert found_correct == correct, kind
        else:  # rounding decides between tokens that are almost equally likely
            assert found_correct == pytest.approx(correct, abs=3), kind
