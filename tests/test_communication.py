"""Only time in which nothing else could be done is communication."""

import time
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from llama_lib import communication
from llama_lib.communication import (
    Kernel,
    communication_alone,
    exposed_seconds,
    waiting_timed,
    waits_in_python,
    with_communication,
)


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


def test_gradients_that_torch_exchanges_by_itself_are_not_heard_of(one_process, monkeypatch):
    """DistributedDataParallel waits in C++: what is heard of is not all, so it is not a number."""
    plain = nn.Sequential(nn.Linear(2, 2))
    assert waits_in_python(plain)
    model = nn.Sequential(DistributedDataParallel(plain))
    assert waits_in_python(model)  # of one process: there is nothing to exchange
    with waiting_timed(True) as waited:
        model(torch.ones(1, 2)).sum().backward()
        assert waited() == 0.0
    monkeypatch.setattr(model[0], "process_group", SimpleNamespace(size=lambda: 2))
    assert not waits_in_python(model)


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


# -- a profiled step -----------------------------------------------------------------------------

CUDA = torch.autograd.DeviceType.CUDA


class Profiler:
    """torch's, of a GPU that the phases of a step keep busy as `events` say, in microseconds."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.others: list[dict[str, float] | None] = []  # what other ranks found
        self.recorded: list[tuple[str, float, float]] = []
        self.works = True

    def profile(self, activities) -> "Profiler":
        assert activities == [torch.profiler.ProfilerActivity.CUDA]
        return self

    def __enter__(self) -> "Profiler":
        self.calls.append("start")
        self.recorded = []
        return self

    def __exit__(self, *_) -> None:
        self.calls.append("stop")

    def phase(self, name: str, *events: tuple[str, float, float]):
        def work() -> None:
            self.calls.append(name)
            self.recorded += events

        return work

    def events(self) -> list[SimpleNamespace]:
        return [
            SimpleNamespace(
                name=name,
                time_range=SimpleNamespace(start=begin, end=end),
                device_type=CUDA,
                is_user_annotation=False,
            )
            for name, begin, end in self.recorded
            if self.works
        ]


@pytest.fixture
def profiler(monkeypatch):
    profiler = Profiler()
    monkeypatch.setattr(torch.profiler, "profile", profiler.profile)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    group = SimpleNamespace(
        barrier=lambda: profiler.calls.append("barrier"),
        gather=lambda mine: [mine, *profiler.others],
    )
    monkeypatch.setattr(communication, "coordination", group)
    return profiler


def phases(profiler: Profiler):
    return {
        "forward_backward": profiler.phase("pass", ("gemm", 0, 2e6), ("nccl_a", 1e6, 3e6)),
        "optimizer": profiler.phase("update", ("adam", 3e6, 4e6)),
    }


def test_ranks_begin_a_profiled_phase_together_once_the_profiler_is_warm(profiler):
    assert exposed_seconds(phases(profiler)) == {"forward_backward": 1.0, "optimizer": 0.0}
    step = [
        *("start", "barrier", "pass", "stop"),
        *("start", "barrier", "update", "stop"),
    ]
    assert profiler.calls == step + step


def test_exposed_communication_is_that_of_the_mean_rank(profiler):
    profiler.others = [{"forward_backward": 2.0, "optimizer": 0.5}]
    assert exposed_seconds(phases(profiler)) == {"forward_backward": 1.5, "optimizer": 0.25}


def test_a_profiler_that_sees_nothing_says_nothing(profiler):
    profiler.others = [None]
    assert exposed_seconds(phases(profiler)) is None
    profiler.others, profiler.works = [], False
    assert exposed_seconds(phases(profiler)) is None
