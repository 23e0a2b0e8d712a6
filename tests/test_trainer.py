"""The loop itself, around an engine whose numbers cannot be read: it waits for nothing."""

from types import SimpleNamespace

import pytest
import torch

from llama_lib import result_file
from llama_lib.checkpoint.store import TrainerState
from llama_lib.config import parse_options
from llama_lib.data.loader import BatchLoader
from llama_lib.data.random_rows import RandomRows
from llama_lib.engine import GradientNorm
from llama_lib.errors import RunError
from llama_lib.layout import layout_of, plan_batches
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
        self.read: list[torch.Tensor] = []

    def forward_backward(self, batches, num_labels) -> torch.Tensor:
        assert num_labels == 2 * (LENGTH - 1)
        self.batches = batches
        return torch.empty((), device="meta")

    def step(self) -> GradientNorm:
        return GradientNorm(1.0, None)

    def reduce_loss(self, share: torch.Tensor) -> float:
        self.read.append(share)
        return 1.0


@pytest.fixture
def trainer(one_process, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = f"-c tiny -p zero2 -l {LENGTH} --num_steps {STEPS} --ignore_steps 2 --output out.json"
    options = parse_options("benchmark", argv.split())
    settle(options)
    plan = plan_batches(options, layout_of(options, 1), LENGTH, 10**6)
    loader = BatchLoader(RandomRows(100, LENGTH, 0, document_mask=False), plan.global_batch)
    state = TrainerState(0, 0, 0, 0, 0, options.to_dict())
    return Trainer(options, Unreadable(options), plan, loader, None, state)


def test_a_loss_is_read_where_it_is_logged_and_at_the_end(trainer, capsys):
    assert trainer.fit() == 0
    # Steps 10 and 12 are logged; the result shows the first and the last.
    assert len(trainer.engine.read) == 2 + 2
    result = result_file.read("out.json")
    assert (result.steps.run, result.steps.ignored) == (STEPS, 2)
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
