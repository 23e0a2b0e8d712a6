"""A Hugging Face folder arrives in every layout bit by bit, in little memory, with room for new
tokens."""

import pytest

from tests.distributed.cases import MODEL
from tests.distributed.conftest import Job
from tests.distributed.loading_checks import NEW_IDS
from tests.distributed.test_truth import TOLERANCE, job_params

MIB = 2**20

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize(
    "job",
    job_params(
        "load",
        quick="zero2/bf16 gemini/bf16 tp2/bf16 pp2/bf16",
        full="zero2/fp32 zero2/fp16 zero2_cpu/bf16 gemini/fp32 gemini/fp16 gemini_accumulate/bf16"
        " gemini_offload_half/bf16 gemini_offload_all/bf16 gemini_auto/bf16 hybrid_zero0/fp32"
        " hybrid_zero0/bf16 hybrid_zero1/bf16 hybrid_zero2/bf16 tp2/fp32 pp2/fp32 all_to_all/bf16"
        " split_gather/bf16 tp2_pp2/bf16 dp2_tp2_zero1/bf16 dp2_pp2_zero1/bf16 dp4_gemini/bf16"
        " dp4_zero2/bf16",
    ),
)
def test_weights_and_masters_are_those_of_the_files(report: Job, job: str) -> None:
    """Masters keep what fp32 files have beyond bf16; the first loss is the one of transformers."""
    result, precision = report(job), job.split("/")[2]
    assert result["sharded fp32"]["files"] > 5
    assert result["single bf16"]["files"] == 1
    for loaded in result.values():
        assert loaded["differing"] == []
        assert loaded["loss"] == pytest.approx(loaded["expected_loss"], rel=TOLERANCE[precision])


@pytest.mark.parametrize(
    "job",
    job_params(
        "load_tied",
        quick="gemini/fp32",
        full="zero2/fp32 zero2_cpu/bf16 gemini/bf16 gemini_auto/bf16 gemini_accumulate/fp32"
        " hybrid_zero0/fp32 hybrid_zero1/bf16",
    ),
)
def test_a_tied_head_is_loaded_with_the_embedding(report: Job, job: str) -> None:
    result, precision = report(job), job.split("/")[2]
    assert result["once"] == [] and result["twice"] == []
    assert result["found"] == pytest.approx(result["expected"], rel=TOLERANCE[precision])


@pytest.mark.parametrize(
    "job",
    job_params(
        "grow",
        quick="gemini/bf16 tp2/fp32",
        full="zero2/fp32 zero2_cpu/bf16 gemini/fp32 tp2/bf16 pp2/bf16 hybrid_zero1/bf16"
        " tp2_pp2/bf16",
    ),
)
def test_new_tokens_begin_as_the_mean_of_the_old(report: Job, job: str) -> None:
    result, precision = report(job), job.split("/")[2]
    assert result["far"] == []
    assert result["kept_bits"]
    assert result["loss"] == pytest.approx(result["expected_loss"], rel=TOLERANCE[precision])
    rows = MODEL["vocab_size"] + NEW_IDS
    assert result["served_rows"] == [rows, rows, MODEL["hidden_size"]]
    assert result["resumed"] == result["straight"]


@pytest.mark.parametrize(
    "job",
    job_params(
        "memory",
        quick="gemini/bf16",
        full="zero2/bf16 zero2_cpu/bf16 gemini_offload_all/bf16 hybrid_zero1/bf16 tp2/bf16"
        " pp2/bf16",
    ),
)
def test_loading_takes_a_tensor_of_memory_not_a_model(report: Job, job: str) -> None:
    """A folder of 154 MB; most is held while tables get new rows.

    To check what has arrived gemini gathers a chunk as in a forward pass: with the buffers of gloo
    that takes three times its size.
    """
    result = report(job)
    assert result["model"] > 140 * MIB
    allowed = max(result["largest"], 3.25 * result["chunk"]) + 8 * MIB
    assert allowed < result["model"] * 0.65, "the bound says nothing"
    assert result["growth"] < allowed
    assert result["growth_resizing"] < allowed
