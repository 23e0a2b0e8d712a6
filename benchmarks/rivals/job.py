"""The job that every rival does, and how its steps are timed.

Invariant: all rivals start from one set of weights, the one `pretrain.py` starts from, read the
same rows in the same order, and note the same moment of each step.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llama_lib.config import Options
from llama_lib.engine import DTYPES
from llama_lib.initial_model import build_model, restore_rotary_frequencies
from llama_lib.models import model_config
from llama_lib.optim import BETAS, EPSILON, learning_rate, parameter_groups


@dataclass(frozen=True)
class Job:
    """Training to measure. Fields are named as the options of pretrain.py.

    `rows` is a .npy file of token ids [steps * batch_size, max_length] in the order of training,
    `batch_size` the rows of a step over all processes, `records` the file for what was noted.
    """

    config: str
    rows: str
    records: str
    steps: int
    batch_size: int
    lr: float
    warmup_steps: int
    weight_decay: float
    gradient_clipping: float
    mixed_precision: str
    gradient_checkpoint: bool
    seed: int
    device: str

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=2) + "\n")

    def all_rows(self) -> Any:
        """The rows, mapped into memory: int32 [rows, max_length]."""
        rows = np.load(self.rows, mmap_mode="r")
        if len(rows) != self.steps * self.batch_size:
            raise SystemExit(f"{self.rows}: {len(rows)} rows for {self.steps} x {self.batch_size}")
        return rows

    def learning_rate(self, step: int) -> float:
        """Of optimizer step `step`, counted from 1."""
        return learning_rate(step, self.steps, self.warmup_steps, self.lr)


def read_job(program: str, argv: Sequence[str] | None) -> Job:
    parser = argparse.ArgumentParser(prog=program)
    parser.add_argument("job", type=Path, help="JSON of the fields of benchmarks.rivals.job.Job")
    return Job(**json.loads(parser.parse_args(argv).job.read_text()))


def job_of(options: Options, rows: Path, records: Path, steps: int, processes: int) -> Job:
    """The job that pretrain.py does with these options."""
    training = options.training
    return Job(
        config=options.model.config,
        rows=str(rows),
        records=str(records),
        steps=steps,
        batch_size=training.batch_size * processes,
        lr=training.lr,
        warmup_steps=training.warmup_steps,
        weight_decay=training.weight_decay,
        gradient_clipping=training.gradient_clipping,
        mixed_precision=training.mixed_precision,
        gradient_checkpoint=options.recompute == "full",
        seed=training.seed,
        device="cuda" if torch.cuda.is_available() else "cpu",
    )


def initial_model(job: Job, dtype: torch.dtype) -> Any:
    """transformers' model with the weights pretrain.py starts from, held in `dtype`.

    The weights are drawn in the job's precision, so that fp32 weights and bf16 weights are equal
    numbers.
    """
    config = model_config(job.config)
    config.use_cache = False
    device = torch.device(job.device)
    model = build_model(config, DTYPES[job.mixed_precision], job.seed, device, lazy=False)
    model = model.to(dtype)
    # A cast rounds them; transformers computes them in fp32 whatever the weights are.
    restore_rotary_frequencies(model, device)
    if job.gradient_checkpoint:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def adamw(model: torch.nn.Module, job: Job) -> torch.optim.AdamW:
    """torch's fused AdamW over the parameters of `model`, decay on matrices only."""
    groups = parameter_groups(model, job.weight_decay)
    return torch.optim.AdamW(groups, lr=job.lr, betas=BETAS, eps=EPSILON, fused=True)


class Notes:
    """Moments and losses of steps. Costs a step nothing but a clock reading."""

    def __init__(self) -> None:
        self.moments: list[float] = []
        self.losses: list[Tensor | float] = []

    def start(self) -> None:
        """Just before the first step."""
        self.moments.append(time.perf_counter())

    def step_done(self) -> None:
        """After the update of the weights, when the loss has been read."""
        self.moments.append(time.perf_counter())

    def write(self, path: str, about: dict[str, Any]) -> None:
        """One JSON object: `seconds` and `loss` of every step, and what `about` says."""
        seconds = [end - start for start, end in itertools.pairwise(self.moments)]
        losses = [float(loss) for loss in self.losses]
        if len(seconds) != len(losses):
            raise SystemExit(f"{len(seconds)} steps were timed and {len(losses)} losses kept")
        Path(path).write_text(json.dumps({**about, "seconds": seconds, "loss": losses}) + "\n")
