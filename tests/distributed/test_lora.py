"""Adapters train as plain peft trains them, and what is saved is what was trained."""

import pytest

from tests.distributed.conftest import Job
from tests.distributed.test_truth import TOLERANCE, job_params, worst

pytestmark = pytest.mark.distributed

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.mark.parametrize(
    "job",
    job_params(
        "lora_truth",
        quick="zero2_documents/fp32 hybrid_zero1_documents/bf16",
        full="zero2/fp32 zero2_accumulate/fp32 zero2_recompute/fp32 zero2_cpu/fp32 zero2_cpu/bf16"
        " zero2/bf16 zero2/fp16 zero2_mistral/fp32 hybrid_zero0/fp32 hybrid_zero0_accumulate/fp32"
        " hybrid_zero0/bf16 hybrid_zero1/bf16 hybrid_zero1_accumulate/bf16 hybrid_zero2/bf16"
        " hybrid_zero0_documents/fp32 zero2_cpu_documents/bf16 dp4_zero2/fp32",
    ),
)
def test_equals_plain_peft(report: Job, job: str) -> None:
    result, precision = report(job), job.split("/")[2]
    plain = result["plain"]
    assert plain["losses"][-1] < plain["losses"][0] - 0.3, "plain peft learnt nothing to compare"
    assert worst(result["losses"], plain["losses"]) < TOLERANCE[precision]
    if precision == "fp32":
        assert worst(result["norms"], plain["norms"]) < TOLERANCE[precision]
    assert len(result["overflows"]) < (6 if precision == "fp16" else 1)
    assert result["losses"][0] == pytest.approx(result["loss_without_adapters"], rel=2e-5)
    assert result["base_changed"] == []
    assert len(result["trained"]) == 4 * len(LINEAR) * 2
    assert all(".lora_A." in name or ".lora_B." in name for name in result["trained"])


BEGINNINGS = [f"lora_truth/{name}/fp32" for name in ("zero2", "hybrid_zero0", "dp4_zero2")]


@pytest.mark.full
@pytest.mark.needs(*BEGINNINGS)
def test_adapters_begin_the_same_everywhere(report: Job) -> None:
    assert len({report(job)["initial_adapters"] for job in BEGINNINGS}) == 1


# Relative to the largest logit; peft computes with fp32 adapters where the engine has bf16 ones.
LOGITS = {"fp32": 1e-5, "bf16": 2e-2}


@pytest.mark.parametrize(
    "job",
    job_params(
        "lora_saved",
        quick="zero2/fp32 hybrid_zero1/bf16",
        full="zero2/bf16 zero2_cpu/bf16 zero2_mistral/fp32 hybrid_zero0/fp32 hybrid_zero2/bf16"
        " dp4_zero2/fp32",
    ),
)
def test_peft_and_the_merged_model_say_what_was_trained(report: Job, job: str) -> None:
    result, precision = report(job), job.split("/")[2]
    for name in ("adapted", "merged"):
        assert result[f"{name}_difference"] < LOGITS[precision], name
        assert result[f"{name}_loss"] == pytest.approx(result["loss"], rel=TOLERANCE[precision])
    assert result["base_difference"] > 0.2, "training changed nothing to compare"
    assert result["merged_adapters"] == []
    assert result["merged_dtype"] == {"fp32": "torch.float32", "bf16": "torch.bfloat16"}[precision]
    assert result["problems"] == []


@pytest.mark.parametrize(
    "job",
    job_params(
        "lora_handover",
        quick="zero2>zero2/bf16 hybrid_zero1>zero2_cpu/bf16",
        full="zero2>zero2/fp16 zero2_cpu>hybrid_zero0/bf16 hybrid_zero0>hybrid_zero0/fp32"
        " hybrid_zero1>hybrid_zero1/bf16 hybrid_zero2>zero2/bf16 zero2_cpu>zero2_cpu/fp32",
    ),
)
def test_a_resumed_run_goes_on_to_the_bit(report: Job, job: str) -> None:
    result = report(job)
    assert result["differing"] == []
    assert result["tensors"] == 4 * len(LINEAR) * 2 * 3 + 1
    assert not [name for name in result["files"] if name.startswith("model/")]
    assert "adapter/adapter_model.safetensors" in result["files"]
    assert result["problems"] == []
    saver, loader = job.split("/")[1].split(">")
    if saver == loader:
        assert result["resumed"] == result["straight"]
    for resumed, straight in zip(result["resumed"], result["straight"], strict=True):
        assert resumed[0] == pytest.approx(straight[0], rel=1e-3)
