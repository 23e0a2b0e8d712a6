"""The best checkpoint so far: only where it is, and only on the rows it was measured on."""

import math
from types import SimpleNamespace

import pytest

from llama_lib import resume
from llama_lib.checkpoint.manifest import MANIFEST, step_directory
from llama_lib.checkpoint.store import TrainerState
from llama_lib.config import parse_options
from llama_lib.saving import Saver

BEST = {"step": 4, "loss": 1.5, "rows": 160}  # 20 batches of 8 rows


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setattr(resume.coordination, "from_rank_0", lambda value: value)
    monkeypatch.setattr(resume.dist, "get_rank", lambda: 0)
    options = parse_options("finetune", ["--model_path", "base", "-o", str(tmp_path)])
    return SimpleNamespace(options=options, plan=SimpleNamespace(global_batch=8), chat=None)


def state() -> TrainerState:
    options = {"model": {"model_path": "base"}}
    return TrainerState(8, 0, 64, 0, 42, options, best=dict(BEST))


def test_it_is_kept_while_it_is_there(run, tmp_path):
    best = step_directory(tmp_path, 4)
    best.mkdir()
    (best / MANIFEST).write_text("{}")
    said, resumed = [], state()
    resume._check_best(run, resumed, said.append)
    assert (resumed.best, said) == (BEST, [])
    assert (tmp_path / "best").read_text() == "step-00000004\n"
    run.options.report.eval_steps = 5
    resume._check_best(run, resumed, said.append)
    assert resumed.best is None and "other held-out rows" in said[0]
    assert not (tmp_path / "best").exists()


def test_one_that_is_gone_is_forgotten(run, tmp_path):
    """A run that went back to an older checkpoint named a best one that had been removed, and no
    later one could become the best."""
    (tmp_path / "best").write_text("step-00000004\n")
    said, resumed = [], state()
    resume._check_best(run, resumed, said.append)
    assert resumed.best is None and "is not in" in said[0]
    assert not (tmp_path / "best").exists()


def test_the_model_of_the_beginning_is_kept(run, tmp_path):
    """--model_path may be left out; another one would only confuse the record of the run."""
    said = []
    run.options.model.model_path = None
    resume._keep_model_path(run, state(), tmp_path, said.append)
    assert (run.options.model.model_path, said) == ("base", [])
    run.options.model.model_path = "other"
    resume._keep_model_path(run, state(), tmp_path, said.append)
    assert run.options.model.model_path == "base" and "--model_path is ignored" in said[0]


@pytest.mark.parametrize(
    ("measured", "best"),
    [
        ((8, 1.2), 8),
        ((8, 1.5), 4),
        ((8, math.nan), 4),
        ((8, math.inf), 4),
        ((6, 1.0), 4),
        (None, 4),
    ],
)
def test_what_is_saved_as_the_best(run, measured, best):
    """A loss that was not finite once became the best: no comparison with it is true."""
    saver = SimpleNamespace(state=state(), end_token_ids=[0], options=run.options, plan=run.plan)
    assert Saver._best(saver, measured)["step"] == best
