"""Answers of the model in training, in every layout, against transformers' own generate."""

import pytest

from tests.distributed.conftest import Job
from tests.distributed.samples_checks import TAUGHT
from tests.distributed.test_truth import job_params

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize(
    "job",
    job_params(
        "answered",
        quick="tp2/fp32 pp2/fp32 gemini/fp32",
        full="zero2/fp32 zero2_cpu/bf16 gemini/bf16 gemini_auto/bf16 hybrid_zero1/bf16"
        " all_to_all/fp32 split_gather/fp32 pp2_microbatch2/fp32 pp2_accumulate/fp32"
        " zero2_documents/fp32 tp2_documents/fp32"
        # four processes
        " tp2_pp2/fp32 dp2_tp2/fp32 dp2_pp2/fp32",
    ),
)
def test_answers_are_those_of_the_saved_model(report: Job, job: str) -> None:
    result, precision = report(job), job.split("/")[2]
    taught = list(TAUGHT.values())
    assert result["answers"][: len(taught)] == taught, "or it never learnt to end an answer"
    assert result["served"][: len(taught)] == taught
    if precision == "fp32":  # below it, what was never learnt is a matter of rounding
        assert result["answers"] == result["served"]
    assert all(part == result["answers"] for part in result["by_rank"])
    assert result["cut"] != taught[0] and taught[0].startswith(result["cut"])
    assert result["random_state_kept"]
