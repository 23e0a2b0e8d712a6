"""transformers' Trainer on our job, as its users start it: in one process or under torchrun.

    python -m benchmarks.rivals.hf_trainer job.json
    torchrun --nproc_per_node 2 -m benchmarks.rivals.hf_trainer job.json

In bf16 this is Trainer's own recipe, `bf16=True`: fp32 weights, which are the state AdamW updates,
and autocast. `--weights bf16` trains bf16 weights with bf16 moments instead: less memory and
arithmetic, but another recipe, since no fp32 state is kept. Optimizer and schedule are handed to
Trainer, so that they are those of the job to the letter; it saves nothing and reports to nobody.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset, Sampler, SequentialSampler
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer import Trainer

from benchmarks.rivals.barest import peak_memory
from benchmarks.rivals.job import Job, Notes, adamw, initial_model, read_job


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rivals.hf_trainer", add_help=False)
    parser.add_argument("--weights", choices=("fp32", "bf16"), default="fp32")
    chosen, rest = parser.parse_known_args(argv)
    job = read_job("python -m benchmarks.rivals.hf_trainer", rest)
    trainer = train(job, torch.bfloat16 if chosen.weights == "bf16" else torch.float32)
    if int(os.environ.get("RANK", "0")) == 0:
        trainer.notes.write(job.records, {"memory": peak_memory()})
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        sys.stdout.flush()
        # torch 2.13 may deadlock when a gloo group is taken down with DDP: its destructor holds
        # the interpreter's lock and waits for a thread that needs it. All is written by now.
        os._exit(0)


class Rows(Dataset):
    """The job's rows as Trainer takes them."""

    def __init__(self, job: Job) -> None:
        self.rows = job.all_rows()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.from_numpy(self.rows[index].astype("int64"))
        labels = ids.clone()
        # No position predicts the first token, yet Trainer divides by it among the label tokens.
        labels[0] = -100
        return {"input_ids": ids, "labels": labels}


class InOrder(Trainer):
    """Trainer without shuffling, which keeps every loss and the moment of every step."""

    notes: Notes

    def _get_train_sampler(self) -> Sampler:
        assert isinstance(self.train_dataset, Rows)
        return SequentialSampler(self.train_dataset)

    def training_step(self, *arguments: Any, **named: Any) -> torch.Tensor:
        loss = super().training_step(*arguments, **named)
        self.notes.losses.append(loss.detach())
        return loss


class Clock(TrainerCallback):
    """Notes the end of each step. The loss of a step is read in Trainer's log just after this, so
    that the reading lies between two moments as in the other contenders."""

    def __init__(self, notes: Notes) -> None:
        self.notes = notes

    def on_train_begin(self, *arguments: Any, **named: Any) -> None:
        self.notes.start()

    def on_step_end(self, *arguments: Any, **named: Any) -> None:
        self.notes.step_done()


def train(job: Job, dtype: torch.dtype) -> InOrder:
    """Trainer when it has done the job; its `notes` have the loss over all processes' rows."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    # Where `bf16` is off, transformers takes this for the precision, and it leaves its own there.
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)
    notes = Notes()
    model = initial_model(job, dtype)
    optimizer = adamw(model, job)
    schedule = LambdaLR(optimizer, lambda done: job.learning_rate(done + 1) / job.lr)
    with tempfile.TemporaryDirectory(prefix="hf-trainer-") as folder:
        trainer = InOrder(
            model=model,
            args=TrainingArguments(
                output_dir=folder,
                max_steps=job.steps,
                per_device_train_batch_size=job.batch_size // processes,
                max_grad_norm=job.gradient_clipping,
                bf16=job.mixed_precision == "bf16" and dtype == torch.float32,
                use_cpu=job.device == "cpu",
                ddp_backend="gloo" if job.device == "cpu" and processes > 1 else None,
                # By itself Trainer lets DDP look for unused parameters, which costs time.
                ddp_find_unused_parameters=False if processes > 1 else None,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                seed=job.seed,
            ),
            train_dataset=Rows(job),
            optimizers=(optimizer, schedule),
            callbacks=[Clock(notes)],
        )
        trainer.notes = notes
        trainer.train()
    if processes > 1:
        # Each process has the loss of its own rows; all have equally many.
        losses = torch.stack([torch.as_tensor(loss) for loss in notes.losses]).float()
        torch.distributed.all_reduce(losses)
        notes.losses = list(losses / processes)
    return trainer


if __name__ == "__main__":
    main(sys.argv[1:])
