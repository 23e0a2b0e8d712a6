"""Only time in which nothing else could be done is communication."""

import time

import pytest
import torch
import torch.distributed as dist

from llama_lib.communication import Kernel, communication_alone, waiting_timed, with_communication


def test_every_collective_is_timed(one_process, monkeypatch):
    before, slow = dist.Work.wait, 0.01

    def wait(work, *args, **kwargs):
        time.sleep(slow)
        return before(work, *args, **kwargs)

    monkeypatch.setattr(dist.Work, "wait", wait)
    with waiting_timed(True) as waited:
        assert waited() == 0.0
        tensor = torch.ones(4)
        dist.all_reduce(tensor)
        dist.all_gather([torch.empty(4)], tensor)
        dist.broadcast(tensor, 0)
        after_three = waited()
        assert after_three >= 3 * slow
        work = dist.all_reduce(tensor, async_op=True)
        time.sleep(5 * slow)  # beside it the process does something else
        work.wait()
        assert slow <= waited() - after_three < 5 * slow
    assert dist.Work.wait is wait


def test_nothing_is_replaced_where_nothing_is_measured(one_process):
    before = dist.Work.wait
    with waiting_timed(False) as waited:
        assert dist.Work.wait is before
        dist.all_reduce(torch.ones(1))
        assert waited() == 0.0


def kernels(*parts: tuple[str, float, float]) -> list[Kernel]:
    return [Kernel(*part) for part in parts]


@pytest.mark.parametrize(
    ("found", "seconds"),
    [
        ([], 0.0),
        (kernels(("gemm", 0, 4)), 0.0),
        (kernels(("ncclDevKernel_AllGather", 0, 4)), 4.0),
        # hidden behind a product but for its end
        (kernels(("gemm", 0, 3), ("ncclDevKernel_ReduceScatter", 1, 4)), 1.0),
        # two at once count once; products within them are taken out
        (kernels(("nccl_a", 0, 6), ("nccl_b", 2, 8), ("gemm", 1, 3), ("add", 2, 4)), 5.0),
        # one after the other
        (kernels(("gemm", 0, 1), ("nccl", 1, 2), ("gemm", 2, 3), ("nccl", 5, 7)), 3.0),
    ],
)
def test_communication_alone(found, seconds):
    assert communication_alone(found) == pytest.approx(seconds)


def test_it_is_taken_out_of_its_phase():
    phases = {"forward_backward": 10.0, "optimizer": 4.0, "communication": 0.0, "other": 1.0}
    found = with_communication(phases, {"forward_backward": 0.2, "optimizer": 9.0}, 10)
    assert found == {
        "forward_backward": 8.0,
        "optimizer": 0.0,  # a phase is never less than nothing
        "communication": 6.0,
        "other": 1.0,
    }
    assert sum(found.values()) == sum(phases.values())
