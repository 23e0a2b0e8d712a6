"""The barest PyTorch loop with our recipe: transformers' model and loss, one process, no library.

    python -m benchmarks.rivals.barest job.json

bf16 weights for forward and backward, fp32 master weights and AdamW moments, clipping, the loss
printed after each step. In fp32 the weights are their own masters.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.utils import clip_grad_norm_

from benchmarks.rivals.job import Job, Notes, adamw, initial_model, read_job
from llama_lib.engine import DTYPES


def main(argv: Sequence[str] | None = None) -> None:
    job = read_job("python -m benchmarks.rivals.barest", argv)
    train(job).write(job.records, {"memory": peak_memory()})


def train(job: Job) -> Notes:
    dtype = DTYPES[job.mixed_precision]
    model = initial_model(job, dtype)
    optimizer = adamw(model, job)
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    masters = weights
    if dtype != torch.float32:
        masters = [weight.detach().float() for weight in weights]
        for master in masters:
            master.grad = torch.empty_like(master)
        _replace(optimizer, masters)
    gradients = [master.grad for master in masters]
    rows = job.all_rows()
    notes = Notes()
    notes.start()
    for step in range(1, job.steps + 1):
        batch = rows[(step - 1) * job.batch_size : step * job.batch_size]
        ids = torch.from_numpy(batch.astype("int64")).to(job.device, non_blocking=True)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        if masters is not weights:
            torch._foreach_copy_(gradients, [weight.grad for weight in weights])
            for weight in weights:
                weight.grad = None
        clip_grad_norm_(masters, job.gradient_clipping)
        for group in optimizer.param_groups:
            group["lr"] = job.learning_rate(step)
        optimizer.step()
        if masters is not weights:
            with torch.no_grad():
                torch._foreach_copy_(weights, masters)
        else:
            optimizer.zero_grad()
        value = loss.item()
        print(f"step {step} loss {value:.4f}", flush=True)
        notes.losses.append(value)
        notes.step_done()
    return notes


def _replace(optimizer: torch.optim.Optimizer, masters: Sequence[torch.Tensor]) -> None:
    """Let the optimizer update `masters`, given in the order of its parameters."""
    first = 0
    for group in optimizer.param_groups:
        count = len(group["params"])
        group["params"] = list(masters[first : first + count])
        first += count


def peak_memory() -> dict[str, float]:
    """Peaks of the GPU in MB (2^20 bytes), where there is one."""
    if not torch.cuda.is_available():
        return {}
    return {
        "allocated": torch.cuda.max_memory_allocated() / 2**20,
        "reserved": torch.cuda.max_memory_reserved() / 2**20,
    }


if __name__ == "__main__":
    main()
