"""Every switch for speed or memory, under real plugins: the same training with it and without."""

from typing import Any

import pytest

from tests.distributed.conftest import Job
from tests.distributed.speed_checks import STEPS
from tests.distributed.test_truth import job_params, worst

pytestmark = pytest.mark.distributed

LAYERS = 4


def assert_trained(reports: dict[str, Any]) -> None:
    for report in reports.values():
        assert len(report["losses"]) == STEPS
        assert report["losses"][-1] < report["losses"][0]


@pytest.mark.parametrize(
    "job",
    job_params(
        "recomputed",
        quick="gemini/bf16 zero2/fp32 tp2/fp32",
        full="gemini/fp32 gemini_accumulate/bf16 gemini_offload_all/bf16 gemini_auto/bf16"
        " zero2/bf16 zero2/fp16 zero2_accumulate/bf16 zero2_cpu/bf16"
        " hybrid_zero0/fp32 hybrid_zero1/bf16 hybrid_zero2/bf16 tp2/bf16 pp2/fp32 pp2/bf16"
        " pp2_microbatch2/bf16 all_to_all/bf16 split_gather/bf16"
        " zero2_mistral/bf16 gemini_mistral/bf16 hybrid_zero1_mistral/bf16"
        " zero2_documents/bf16 gemini_documents/bf16 tp2_documents/bf16 pp2_documents/bf16"
        # four processes
        " tp2_pp2/bf16 dp2_tp2_zero1/bf16",
    ),
)
def test_recomputation_changes_no_bit(report: Job, job: str) -> None:
    """Loss, gradient norm and the weights after some steps; selective computes no product twice."""
    reports = report(job)
    assert_trained(reports)
    none, selective, full = (reports[mode] for mode in ("none", "selective", "full"))
    for mode in (selective, full):
        assert mode["losses"] == none["losses"]
        assert mode["norms"] == none["norms"]
        assert mode["weights"] == none["weights"]
    assert selective["selective_layers"] >= STEPS * LAYERS / 2, "no layer ran selectively"
    assert none["selective_layers"] == full["selective_layers"] == 0
    if "flops" in none:
        assert full["flops"] > none["flops"], "nothing was computed again"
        # Refused for this: there a product of every layer is computed twice.
        again = "split_gather" in job
        assert (selective["flops"] > none["flops"]) == again


@pytest.mark.parametrize(
    "job",
    job_params(
        "compiled",
        quick="zero2/fp32",
        full="zero2_recompute/bf16 zero2_cpu/bf16 zero2_documents/fp32 zero2_mistral/bf16"
        " hybrid_zero0/fp32 hybrid_zero1/bf16 pp2/fp32 pp2_recompute/fp32",
    ),
)
def test_compiled_layers_train_the_same(report: Job, job: str) -> None:
    """To rounding: a fused kernel rounds to bf16 less often."""
    reports = report(job)
    assert_trained(reports)
    plain, compiled = reports["plain"], reports["compiled"]
    tolerance = 1e-5 if job.endswith("fp32") else 3e-3
    assert worst(compiled["losses"], plain["losses"]) < tolerance
    assert worst(compiled["norms"], plain["norms"]) < tolerance
    # One graph for all layers, and no part of a layer left out of it.
    assert compiled["graphs"] == 1
    assert compiled["breaks"] == {}


@pytest.mark.parametrize(
    "job",
    job_params(
        "kernels",
        quick="gemini/fp32",
        full="zero2/fp32 zero2_cpu/fp32 gemini_offload_all/bf16 gemini_auto/fp32"
        " gemini_recompute/fp32 hybrid_zero0/fp32 tp2/fp32 pp2/fp32 split_gather/bf16",
    ),
)
def test_kernels_of_another_package_get_their_weights(report: Job, job: str) -> None:
    """What stands in for Liger's reads memory, as a Triton kernel does: under gemini a norm's
    weight must be there by then."""
    reports = report(job)
    assert_trained(reports)
    plain, liger = reports["plain"], reports["liger"]
    assert liger["norms_called"] > 0
    tolerance = 1e-5 if job.endswith("fp32") else 1e-2
    assert worst(liger["losses"], plain["losses"]) < tolerance
    assert worst(liger["norms"], plain["norms"]) < tolerance
