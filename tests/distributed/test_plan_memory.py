"""The plan's bytes of weights, gradients, master weights and moments are those of real engines, to
the byte; the peak of everything together is within 5%."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llama_lib.models import Shape
from llama_lib.planner.job import Job, job_of
from llama_lib.planner.memory import END_OF_BACKWARD, LOSS, STEP, Memory, memory, stage_memory
from tests.distributed.cases import num_processes
from tests.distributed.launching import run
from tests.distributed.plan_checks import PEAK_MODEL, case_of, peak_options

pytestmark = pytest.mark.distributed

PEAK_TOLERANCE = 0.05
# Which chunks gemini offloads follows their addresses in memory, and the last ones are not full.
SOME_CHUNKS_TOLERANCE = 0.06

QUICK = (
    *(
        "zero2/bf16",
        "zero2_cpu/bf16",
        "gemini/bf16",
        "gemini_offload_half/bf16",
        "gemini_auto/bf16",
    ),
    *("hybrid_zero0/fp32", "hybrid_zero1/bf16", "tp2/bf16", "pp2/bf16"),
    *("gemini_offload_all/bf16", "hybrid_zero1@tied/bf16"),
)
FULL = (
    *("zero2/fp32", "zero2/fp16", "zero2_accumulate/bf16", "zero2_cpu/fp32"),
    *("gemini/fp32", "gemini_accumulate/bf16", "gemini_offload_optimizer/bf16"),
    *("gemini_auto_accumulate/bf16", "gemini@some_offloaded/bf16", "gemini@parameters_half/bf16"),
    *("zero2@tied/bf16", "gemini@tied/bf16", "tp2@biased/bf16", "hybrid_zero0@biased/bf16"),
    *("hybrid_zero0/bf16", "hybrid_zero0_accumulate/bf16", "hybrid_zero1_accumulate/bf16"),
    *("hybrid_zero2/bf16", "tp2/fp32", "pp2/fp32", "all_to_all/bf16", "split_gather/bf16"),
    *("tp2_pp2/bf16", "dp2_tp2/bf16", "dp2_tp2_zero1/bf16", "dp2_pp2_zero1/bf16"),
    *("dp2_all_to_all/bf16", "dp4_gemini/bf16", "dp4_zero2/bf16"),
    *("pp2_interleaved/bf16", "tp2_pp2_interleaved/bf16", "dp2_pp2_interleaved_zero1/bf16"),
)

Ranks = list[dict[str, Any]]


@pytest.fixture(scope="session")
def measured(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Ranks]:
    """What the processes of a job found; all jobs of one number of processes run in one start."""
    jobs: dict[int, list[str]] = {}
    for item in request.session.items:
        # Tests elsewhere have an argument of this name too.
        own = isinstance(item, pytest.Function) and item.module.__name__ == __name__
        if own and "measured" in item.fixturenames:
            names = jobs.setdefault(num_processes(item.callspec.params["name"]), [])
            if item.callspec.params["name"] not in names:
                names.append(item.callspec.params["name"])
    entries: dict[str, dict[str, Any]] = {}
    outputs: dict[int, str] = {}

    def ranks_of(job: str) -> Ranks:
        processes = num_processes(job)
        if processes not in outputs:
            folder = tmp_path_factory.mktemp(f"plan-{processes}")
            outputs[processes] = run(
                "tests/distributed/plan_checks.py",
                [str(folder), *jobs[processes]],
                folder / "output.txt",
                processes,
                timeout=60 + 30 * len(jobs[processes]),
            ).output
            path = folder / "report.jsonl"
            for line in path.read_text().splitlines() if path.is_file() else []:
                entry = json.loads(line)
                entries[entry["job"]] = entry
        assert job in entries, f"{job} never ended:\n{outputs[processes]}"
        assert "error" not in entries[job], entries[job]["error"]
        return entries[job]["ranks"]

    return ranks_of


def shape_of(model: dict[str, Any]) -> Shape:
    return Shape(**model, head_dim=model["hidden_size"] // model["num_attention_heads"])


def job_named(name: str) -> Job:
    options, model = case_of(name)
    return job_of(options, shape_of(model), num_processes(name), gpus_per_host=8)


def expected(job: Job, plan: Memory) -> dict[str, dict[str, int]]:
    """The plan's bytes of one GPU and of one host, where `plan_checks` looks."""
    host = dict(plan.host)
    end, step = plan.moments[END_OF_BACKWARD], plan.moments[STEP]
    device = {
        "weights": end["weights"],
        "gradients": end["gradients"],
        "master": step["master"],
        "optimizer": step["optimizer"],
    }
    if job.layout.plugin.startswith("gemini") and job.accumulation == 1:
        # The gradients are in what held the weights; on the host as well.
        host["weights"] = host.pop("gradients")
    elif job.layout.plugin == "zero2_cpu":
        del host["gradients"]  # fp32 copies, which live as long as the step
    return {"device": device, "host": host}


@pytest.mark.parametrize(
    "name",
    [*QUICK, *(pytest.param(name, marks=pytest.mark.full) for name in FULL)],
)
def test_states_are_those_of_a_real_engine(measured: Callable[[str], Ranks], name: str) -> None:
    job, ranks = job_named(name), measured(name)
    for stage in range(job.layout.pp):
        plan = expected(job, stage_memory(job, stage))
        of_stage = [rank for rank in ranks if rank["stage"] == stage]
        assert of_stage
        for tier, largest in (("device", max), ("host", sum)):
            for kind in ("weights", "gradients", "master", "optimizer"):
                found = largest(rank[tier].get(kind, 0) for rank in of_stage)
                wanted = plan[tier].get(kind, 0)
                if "some_offloaded" in name:
                    wanted = pytest.approx(wanted, rel=SOME_CHUNKS_TOLERANCE)
                assert found == wanted, f"{tier} {kind} {stage}"
    # Nobody is without a share: sums and maxima alone would not see an empty process.
    for kind in ("weights", "optimizer"):
        assert all(rank["device"].get(kind, 0) + rank["host"].get(kind, 0) for rank in ranks), kind


@pytest.mark.parametrize(
    "name",
    [
        "gemini/bf16",
        "gemini_offload_all/bf16",
        pytest.param("gemini_accumulate/bf16", marks=pytest.mark.full),
        pytest.param("gemini@parameters_half/bf16", marks=pytest.mark.full),
    ],
)
def test_gemini_weights_at_the_loss(measured: Callable[[str], Ranks], name: str) -> None:
    """Where the weights are when the activations are at their largest."""
    job = job_named(name)
    at_loss = memory(job).moments[LOSS]
    for rank in measured(name):
        found = rank["at_loss"]
        assert 0 < found["whole"] <= at_loss["buffers"]
        parts = found["parts"] + (found["parts_of_whole"] if at_loss["weights"] else 0)
        assert parts == at_loss["weights"]


def test_a_smaller_optimizer_share_offloads_less() -> None:
    """0.5 offloads all of this model: gemini's sum counts a chunk once for each parameter."""
    half = memory(job_named("gemini_offload_half/bf16"))
    some = memory(job_named("gemini@some_offloaded/bf16"))
    assert half.device["master"] == 0
    assert 0 < some.host["master"] < half.host["master"]


@pytest.mark.parametrize(
    "flags",
    [
        "-p zero2 --no-chunked_loss",  # at the loss
        pytest.param("-p zero2 -g", marks=pytest.mark.full),  # at the end of the backward pass
        pytest.param("-p hybrid_parallel --zero_stage 0 -g", marks=pytest.mark.full),  # in the step
        pytest.param("-p hybrid_parallel --zero_stage 0 --no-chunked_loss", marks=pytest.mark.full),
        pytest.param("-p zero2 --recompute selective --no-chunked_loss", marks=pytest.mark.full),
        pytest.param("-p gemini --no-chunked_loss", marks=pytest.mark.full),
        pytest.param("-p zero2 --accumulation_steps 2 --no-chunked_loss", marks=pytest.mark.full),
    ],
)
def test_peak_of_one_process(tmp_path: Path, flags: str) -> None:
    """Everything together, activations and buffers too, at whichever moment it is most."""
    arguments = [str(tmp_path), "peak", flags]
    outcome = run("tests/distributed/plan_checks.py", arguments, tmp_path / "output.txt")
    assert outcome.code == 0, outcome.output
    found = json.loads((tmp_path / "report.jsonl").read_text())["peak"]
    plan = memory(job_of(peak_options(flags), shape_of(PEAK_MODEL), 1, gpus_per_host=1))
    assert plan.device_total == pytest.approx(found, rel=PEAK_TOLERANCE), plan.moments
