"""Planned beside measured memory, and what a run says that has no memory left."""

import pytest
import torch

from llama_lib import memory_check
from llama_lib.config import parse_options
from llama_lib.errors import RunError
from llama_lib.memory_check import (
    MemoryCheck,
    is_out_of_memory,
    plan_line,
    planned_job,
    shape_of,
)
from llama_lib.models import MODELS, SHAPES, model_config
from llama_lib.planner.hardware import HostGpu
from llama_lib.planner.memory import memory

MIB = 2**20


def options(words: str):
    return parse_options("pretrain", ["-d", "unused", "-x", "bf16", *words.split()])


def check(words: str = "-p zero2 -c tiny -b 8") -> tuple[MemoryCheck, object]:
    chosen = options(words)
    job = planned_job(chosen, model_config(chosen.model.config), 1)
    return MemoryCheck(job, torch.device("cpu")), chosen


@pytest.mark.parametrize("name", sorted(MODELS))
def test_a_config_has_the_shape_of_the_table(name):
    assert shape_of(model_config(name)) == SHAPES[name]


def test_the_plan_is_one_line_that_adds_up():
    found, _ = check()
    need = memory(found.job)
    line = plan_line(found.job, has_gpu=True)
    assert f"{need.device_total / MIB:,.0f} MB" in line and "\n" not in line
    shown = [int(part.split()[-2].replace(",", "")) for part in line[:-1].split(", ")]
    assert sum(shown) == pytest.approx(need.device_total / MIB, abs=len(shown))


def test_planned_and_measured_stand_side_by_side():
    found, _ = check()
    planned = memory(found.job).device_total
    line = found.line(planned * 3 // 2)
    assert "(+50%;" in line and f"measured {planned * 1.5 / MIB:,.0f} MB" in line
    found.device = torch.device("cuda")
    line = found.line(planned * 9 // 10)
    assert "(-10%;" in line and "allocated on the GPU" in line


def test_what_was_used_before_the_model_is_not_measured():
    preparing = torch.ones(400 * MIB // 4)
    del preparing
    found, _ = check()
    kept = torch.ones(100 * MIB // 4)
    assert 95 * MIB < found.used() < 150 * MIB
    del kept


def test_what_is_planned_for_the_host_is_in_a_cpu_process_too():
    alone, _ = check("-p gemini -c tiny")
    offloading, _ = check("-p gemini -c tiny --offload_optim_frac 1.0")
    moved = memory(offloading.job)
    assert moved.host_total > 0

    def planned(found: MemoryCheck) -> int:
        return int(found.line(0).split("planned ")[1].split(" MB")[0].replace(",", ""))

    assert planned(offloading) > moved.device_total / MIB + 10
    assert planned(offloading) == pytest.approx(planned(alone), rel=0.3)


def test_a_run_that_cannot_fit_says_so(monkeypatch):
    big, _ = check("-p zero2 -c 70b -b 1")
    small, _ = check("-p zero2 -c tiny")
    monkeypatch.setattr(memory_check, "host_memory", lambda: 24 * 2**30)
    assert "does not fit: there are 24,576 MB" in plan_line(big.job, has_gpu=False)
    assert "fit" not in plan_line(small.job, has_gpu=False)
    card = HostGpu("NVIDIA H200", 140 * 1024, 1)
    monkeypatch.setattr(memory_check, "host_gpu", lambda: card)
    assert "does not fit: there are 143,360 MB" in plan_line(big.job, has_gpu=True)
    assert "fit" not in plan_line(small.job, has_gpu=True)


def fail_to_allocate() -> None:
    torch.empty(2**60, dtype=torch.uint8)


def test_torch_running_out_of_memory_on_a_cpu_is_recognised():
    with pytest.raises(RuntimeError) as caught:
        fail_to_allocate()
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_out_of_memory(RuntimeError("shapes do not fit"))


def test_a_run_without_memory_ends_with_the_plan_and_three_changes():
    found, chosen = check("-p zero2 -c 7b -b 4 -l 4096")
    with pytest.raises(RunError) as caught, found.explaining(chosen):
        fail_to_allocate()
    text = str(caught.value)
    assert "out of memory" in text and "measured peak" in text
    for kind in ("weights", "master", "optimizer", "activations"):
        assert kind in text
    changes = text.split("the cheapest changes:")[1].strip().splitlines()
    assert len(changes) == 3
    assert any("recompute" in change or "-g" in change for change in changes)
    assert all("saves" in change for change in changes), changes
    # There is no GPU here, and no other memory to move anything to.
    assert "planned for one process:" in text and "GPU" not in text
    assert "zero2_cpu" not in text and "offload" not in text


def test_other_errors_stay_what_they_are():
    found, chosen = check()
    with pytest.raises(RuntimeError, match="shapes"), found.explaining(chosen):
        raise RuntimeError("shapes do not fit")
