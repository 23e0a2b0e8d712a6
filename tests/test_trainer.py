"""The loop itself, around an engine whose numbers cannot be read: it waits for nothing."""

import gc
import json
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn

from llama_lib import measurement, result_file
from llama_lib.checkpoint.store import TrainerState
from llama_lib.chunked_loss import ChunkedHead
from llama_lib.config import dump_yaml, parse_options
from llama_lib.data.loader import BatchLoader
from llama_lib.data.random_rows import RandomRows
from llama_lib.engine import Engine, GradientNorm
from llama_lib.errors import RunError
from llama_lib.layout import Layout, layout_of, plan_batches
from llama_lib.models import model_config
from llama_lib.run_benchmark import settle
from llama_lib.trainer import Trainer

LENGTH, STEPS = 8, 12


class Unreadable:
    """An engine whose losses have no value: whoever reads one on the way fails."""

    def __init__(self, options) -> None:
        self.options = options
        self.device = torch.device("cpu")
        self.config = model_config("tiny")
        self.config._attn_implementation = "sdpa"
        self.layout = layout_of(options, 1)
        self.optimizer = SimpleNamespace(param_groups=[{}])
        self.dp_rank = 0
        self.attention, self.kernels, self.chunked_loss = "sdpa", "torch", True
        self.model: nn.Module = nn.Identity()
        self.steps = 0
        self.read: list[torch.Tensor] = []

    def forward_backward(self, batches, num_labels) -> torch.Tensor:
        assert num_labels == 2 * (LENGTH - 1)
        self.batches = batches
        return torch.empty((), device="meta")

    def step(self) -> GradientNorm:
        self.steps += 1
        return GradientNorm(1.0, None)

    def reduce_loss(self, share: torch.Tensor) -> float:
        self.read.append(share)
        return 1.0


def trainer_of(*more: str) -> Trainer:
    argv = f"-c tiny -p zero2 -l {LENGTH} --num_steps {STEPS} --ignore_steps 2 --output out.json"
    options = parse_options("benchmark", [*argv.split(), *more])
    settle(options)
    plan = plan_batches(options, layout_of(options, 1), LENGTH, 10**6)
    loader = BatchLoader(RandomRows(100, LENGTH, 0, document_mask=False), plan.global_batch)
    state = TrainerState(0, 0, 0, 0, 0, options.to_dict())
    return Trainer(options, Unreadable(options), plan, loader, None, state)


@pytest.fixture
def trainer(one_process, tmp_path, monkeypatch) -> Trainer:
    monkeypatch.chdir(tmp_path)
    return trainer_of()


def test_a_loss_is_read_where_it_is_logged_and_at_the_end(trainer, capsys):
    assert trainer.fit() == 0
    # Steps 10 and 12 are logged; the result shows the first and the last.
    assert len(trainer.engine.read) == 2 + 2
    result = result_file.read("out.json")
    assert (result.steps.run, result.steps.ignored) == (STEPS, 2)
    assert (result.attention, result.kernels, result.chunked_loss) == ("sdpa", "torch", True)
    assert trainer.state.step == STEPS and trainer.state.tokens == STEPS * 2 * LENGTH
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("max memory usage:  ")


def test_rows_without_padding_are_copied_once(trainer):
    trainer.fit()
    (batch,) = trainer.engine.batches
    assert batch.labels is batch.input_ids


def test_a_result_that_cannot_be_written_is_shown_all_the_same(trainer, capsys, monkeypatch):
    def full(result, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(result_file, "write", full)
    with pytest.raises(RunError, match=r"--output out.json .*No space left"):
        trainer.fit()
    assert "tokens/s/GPU" in capsys.readouterr().out


# -- a benchmark that ends early, or in an error ---------------------------------------------------


def test_an_interrupted_benchmark_leaves_no_result(trainer, capsys):
    """Its warm-up steps were written as if they had been measured, over an earlier result."""
    Path("out.json").write_text("an earlier result")
    train_step = trainer.train_step

    def interrupted(rows) -> None:
        train_step(rows)
        if trainer.state.step == 2:
            signal.raise_signal(signal.SIGTERM)
        if trainer.state.step >= 2:
            time.sleep(0.05)  # steps that do nothing would be over before the signal is read

    trainer.train_step = interrupted
    assert trainer.fit() == 128 + signal.SIGTERM
    stopped = trainer.state.step
    assert 2 <= stopped < STEPS
    assert Path("out.json").read_text() == "an earlier result"
    shown = capsys.readouterr()
    assert f"--output out.json is not written: {stopped} of {STEPS} steps were run" in shown.out
    assert "result:" not in shown.out and "SIGTERM" in shown.err and "saving" not in shown.err


class Broken(nn.Module):
    """A model that does not get through its forward pass."""

    def forward(self, **inputs) -> None:
        assert not gc.isenabled() and dist.Work.wait is not WAIT
        raise RuntimeError("out of memory")


WAIT = dist.Work.wait


def test_an_error_in_a_step_leaves_nothing_replaced(trainer):
    """Work.wait, Python's collector and the model's head are as they were before `fit`."""
    head, engine = nn.Linear(4, 10), trainer.engine
    engine.model, engine._head = Broken(), ChunkedHead(head, 10)
    # Two processes that read the same rows; around the head it is the real engine's pass.
    engine.layout = Layout("hybrid_parallel", 2, tp=2)
    engine.criterion = SimpleNamespace(targets=lambda *_: (torch.zeros(2, LENGTH), 1.0))
    engine.grad_scaler, engine._inputs = lambda: None, lambda batch: {}

    def forward_backward(batches, num_labels) -> torch.Tensor:
        return Engine._loss_sum(engine, batches[0], 1.0)

    engine.forward_backward = forward_backward
    trainer.measurement = measurement.Measurement(engine, trainer.plan)
    enabled = gc.isenabled()
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.fit()
    assert dist.Work.wait is WAIT
    assert gc.isenabled() == enabled and gc.get_freeze_count() == 0
    hidden = torch.ones(1, 3, 4)
    assert torch.equal(head(hidden), nn.functional.linear(hidden, head.weight, head.bias))


# -- the profiled step -----------------------------------------------------------------------------


@pytest.fixture
def profiled_trainer(one_process, tmp_path, monkeypatch):
    """A trainer that profiles a step as on several GPUs; `seen` is what was so when it did."""
    monkeypatch.chdir(tmp_path)
    seen: dict = {}

    def make(exposed, *more: str) -> Trainer:
        trainer = trainer_of(*more)

        def exposed_seconds(phases):
            seen["trace"] = Path("benchmark_run/profile/rank-00000.json").exists()
            seen["steps"] = trainer.engine.steps
            seen["memory"] = "read" in seen
            for work in phases.values():
                work()
            return exposed

        def peak_memory(device):
            seen["read"] = True
            return result_file.Memory(None, None, 1.0)

        monkeypatch.setattr(measurement, "exposed_seconds", exposed_seconds)
        monkeypatch.setattr(measurement, "peak_memory", peak_memory)
        trainer.measurement.needs_profile = True
        trainer.measurement._communication_known = False
        return trainer

    return make, seen


def test_a_trace_is_whole_and_memory_read_before_the_profiled_step(profiled_trainer):
    make, seen = profiled_trainer
    # Asked for to the end: the trace is written where the loop ends.
    trainer = make({"forward_backward": 0.0, "optimizer": 0.0}, "--profile", f"{STEPS - 1}:99")
    trainer.fit()
    assert seen == {"read": True, "trace": True, "steps": STEPS, "memory": True}
    assert json.loads(Path("benchmark_run/profile/rank-00000.json").read_text())["traceEvents"]
    assert trainer.engine.steps == STEPS + 1 and trainer.state.step == STEPS
    assert result_file.read("out.json").time_shares.communication == 0.0


def test_a_profile_without_kernels_leaves_communication_unknown(profiled_trainer):
    make, _ = profiled_trainer
    make(None).fit()
    assert result_file.read("out.json").time_shares.communication is None


# -- metrics of a benchmark ------------------------------------------------------------------------


def test_metrics_are_written_where_they_are_asked_for(one_process, tmp_path, monkeypatch):
    """A run's specs.yaml names every option, its --tensorboard_dir too: nobody asked for that."""
    monkeypatch.chdir(tmp_path)
    dump_yaml(parse_options("benchmark", ["-t", "written"]), "specs.yaml")
    trainer_of("--spec_file", "specs.yaml").fit()
    assert not Path("written").exists()
    trainer_of("--spec_file", "specs.yaml", "-t", "asked").fit()
    assert Path("asked/metrics.jsonl").read_text()
