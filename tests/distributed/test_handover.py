"""A checkpoint of any layout is the same tensors in any other; in its own it is the same run."""

import pytest

from tests.distributed.conftest import Job
from tests.distributed.test_truth import job_params

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize(
    "job",
    job_params(
        "handover",
        quick="gemini>tp2/bf16 tp2>hybrid_zero1/bf16 hybrid_zero1>gemini/bf16",
        full="gemini>zero2/bf16 zero2>gemini/bf16 zero2>tp2/bf16 tp2>gemini/bf16 gemini>pp2/bf16"
        " pp2>zero2_cpu/bf16 zero2_cpu>gemini_offload_all/bf16 gemini_offload_all>gemini_auto/bf16"
        " gemini_auto>hybrid_zero2/bf16 hybrid_zero2>all_to_all/bf16 all_to_all>split_gather/bf16"
        " split_gather>hybrid_zero0/bf16 hybrid_zero0>gemini_offload_half/bf16 pp2>tp2/bf16"
        " gemini>zero2/fp32 zero2>pp2/fp32 pp2>tp2/fp32 tp2>gemini/fp32 gemini>zero2/fp16"
        " zero2>gemini/fp16 dp2_tp2_zero1>tp2_pp2/bf16 tp2_pp2>dp4_gemini/bf16"
        " dp4_gemini>dp2_pp2_zero1/bf16 dp2_pp2_zero1>dp4_zero2/bf16",
    ),
)
def test_another_layout_loads_the_same_tensors(report: Job, job: str) -> None:
    result = report(job)
    assert result["tensors"] > 100
    assert result["differing"] == []
    assert result["resumed"] == pytest.approx(result["straight"], rel=5e-3)


@pytest.mark.parametrize(
    "job",
    job_params(
        "handover",
        quick="tp2>tp2/bf16",
        full="gemini>gemini/bf16 zero2>zero2/bf16 zero2_cpu>zero2_cpu/bf16"
        " gemini_offload_all>gemini_offload_all/bf16 gemini_offload_half>gemini_offload_half/bf16"
        " gemini_auto>gemini_auto/bf16 gemini_accumulate>gemini_accumulate/bf16"
        " hybrid_zero0>hybrid_zero0/bf16 hybrid_zero1>hybrid_zero1/bf16"
        " hybrid_zero2>hybrid_zero2/bf16 pp2>pp2/bf16 all_to_all>all_to_all/bf16"
        " split_gather>split_gather/bf16 zero2>zero2/fp32 gemini>gemini/fp32 tp2>tp2/fp32"
        " zero2>zero2/fp16 gemini>gemini/fp16 tp2_pp2>tp2_pp2/bf16"
        " dp2_tp2_zero1>dp2_tp2_zero1/bf16",
    ),
)
def test_the_same_layout_goes_on_bit_by_bit(report: Job, job: str) -> None:
    result = report(job)
    assert result["differing"] == []
    assert result["resumed"] == result["straight"]
