"""Checks of adapters that run inside a process group; see checks.py.

Invariant: every rank returns the same; what the data must be is said in the tests, not here.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import AutoPeftModelForCausalLM, PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from llama_lib import coordination
from llama_lib.checkpoint import store
from llama_lib.checkpoint.manifest import Manifest
from llama_lib.checkpoint.verify import checkpoint_problems
from llama_lib.checkpoint.weights import load_weights
from llama_lib.engine import Engine
from llama_lib.initial_model import build_model
from llama_lib.layout import layout_of
from llama_lib.lora import adapter_parameters
from tests.distributed import plain_loop
from tests.distributed.cases import LENGTH, SEED, STEPS, model_type, options_of
from tests.distributed.checks import (
    llama_config,
    micro_batches,
    optimizer_hashes,
    rows_per_step,
    train_step,
    weight_hashes,
)
from tests.distributed.plain_loop import batch, num_labels

RANK, ALPHA = 4, 32.0

Report = dict[str, Any]


def base_folder(layout: str, folder: Path, seed: int = 7) -> Path:
    """A model of transformers with random weights, saved by rank 0."""
    base = folder / f"base-{seed}"
    if dist.get_rank() == 0:
        config = llama_config(layout)
        build_model(config, torch.float32, seed, torch.device("cpu"), lazy=False).save_pretrained(
            base
        )
    coordination.barrier()
    return base


def build(layout: str, precision: str, base: Path, merge: bool = False) -> Engine:
    """An engine with adapters on the weights in `base`."""
    options = options_of(layout, precision)
    options.model.model_path = str(base)
    options.model.lora_rank, options.model.lora_alpha = RANK, ALPHA
    options.model.merge_lora = merge
    engine = Engine(
        options,
        layout_of(options, dist.get_world_size()),
        llama_config(layout),
        torch.device("cpu"),
        options.training.accumulation_steps,
    )
    load_weights(engine, base, "--model_path", progress=False)
    return engine


def save(engine: Engine, folder: Path, step: int) -> Path:
    state = store.TrainerState(step, 0, 0, 0, SEED, {}, scaler=store.scaler_state(engine))
    return store.save(engine, state, None, str(folder), None)


def adapter_hash(engine: Engine) -> str:
    digest = hashlib.sha256()
    for name, parameter in adapter_parameters(engine.module):
        digest.update(name.encode())
        digest.update(parameter.detach().cpu().float().numpy().tobytes())
    return digest.hexdigest()


@dataclass
class Adapted:
    """A model of peft as the plain loop trains it: its adapters only."""

    model: Any

    @property
    def dtype(self) -> torch.dtype:
        return self.model.get_base_model().dtype

    def parameters(self) -> list[Tensor]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def __call__(self, **inputs: Tensor) -> Any:
        return self.model(**inputs)


def plain_adapted(layout: str, precision: str, base: Path, adapter: Path) -> Adapted:
    """Plain transformers and plain peft, with the adapters of a folder."""
    weights = AutoModelForCausalLM.from_pretrained(base).state_dict()
    model = plain_loop.plain_model(model_type(layout), weights, precision)
    return Adapted(
        PeftModel.from_pretrained(model, adapter, is_trainable=True, autocast_adapter_dtype=False)
    )


# -- the checks ------------------------------------------------------------------------------------


def lora_truth(layout: str, precision: str, folder: Path) -> Report:
    """STEPS steps of the engine, and of plain peft from the adapters that the engine began with."""
    base = base_folder(layout, folder)
    engine = build(layout, precision, base)
    before, begin = weight_hashes(engine), adapter_hash(engine)
    plain = plain_adapted(layout, precision, base, save(engine, folder, 0) / "adapter")
    results = [train_step(engine, step) for step in range(1, STEPS + 1)]
    skipped = frozenset(step for step, (_, norm) in enumerate(results, 1) if norm is None)
    loss_of = plain_loop.mean_loss(rows_per_step(engine), engine.options.model.document_mask)
    with torch.no_grad(), plain.model.disable_adapter():
        without = loss_of(plain, 1).item()
    return {
        "losses": [loss for loss, _ in results],
        "norms": [norm for _, norm in results],
        "plain": vars(plain_loop.train(plain, loss_of, skipped)),
        "overflows": sorted(skipped),
        "loss_without_adapters": without,
        "initial_adapters": begin,
        "trained": sorted(engine.trained),
        "base_changed": [
            name for name, kept in weight_hashes(engine).items() if kept != before[name]
        ],
    }


def lora_saved(layout: str, precision: str, folder: Path) -> Report:
    """Trained adapters in the engine, read by peft, and merged into a whole model."""
    base = base_folder(layout, folder)
    engine = build(layout, precision, base, merge=True)
    for step in range(1, 6):
        train_step(engine, step)
    path = save(engine, folder, 5)
    rows = rows_per_step(engine)
    ids, labels = batch(99, rows)
    loss = engine.score(micro_batches(engine, ids, labels)).loss_sum
    position = LENGTH - 3
    trained = engine.next_token_logits(ids[:1], position).cpu()
    dtype = plain_loop.DTYPES[precision]
    adapted = AutoPeftModelForCausalLM.from_pretrained(path / "adapter", torch_dtype=dtype)
    merged = AutoModelForCausalLM.from_pretrained(path / "model", torch_dtype="auto")
    base_model = AutoModelForCausalLM.from_pretrained(base, torch_dtype=dtype)
    report: Report = {
        "loss": loss / num_labels(labels),
        "files": sorted(Manifest.read(path).files),
        "problems": checkpoint_problems(path),
        "merged_dtype": str(merged.dtype),
        "merged_adapters": [name for name, _ in merged.named_parameters() if "lora" in name],
    }
    served = {"adapted": adapted, "merged": merged, "base": base_model}
    for name, model in served.items():
        with torch.no_grad():
            logits = model(input_ids=ids).logits
        report[f"{name}_loss"] = plain_loop.loss_sum(logits, labels).item() / num_labels(labels)
        difference = (trained - logits[0, position].float()).abs().max()
        report[f"{name}_difference"] = float(difference / trained.abs().max())
    return report


def lora_handover(layouts: str, precision: str, folder: Path) -> Report:
    """Saved by one layout, loaded by another ("a>b"); both then take the same steps."""
    saver, loader = layouts.split(">")
    base = base_folder(saver, folder)
    engine = build(saver, precision, base)
    for step in range(1, 4):
        train_step(engine, step)
    saved = {"adapters": adapter_hash(engine), **optimizer_hashes(engine)}
    path = save(engine, folder, 3)
    straight = [train_step(engine, step) for step in (4, 5, 6)]
    del engine
    engine = build(loader, precision, base)
    store.load(engine, path, store.read_state(path))
    loaded = {"adapters": adapter_hash(engine), **optimizer_hashes(engine)}
    return {
        "differing": [name for name in saved | loaded if saved.get(name) != loaded.get(name)],
        "tensors": len(saved),
        "files": sorted(Manifest.read(path).files),
        "problems": checkpoint_problems(path),
        "straight": straight,
        "resumed": [train_step(engine, step) for step in (4, 5, 6)],
    }


CHECKS: dict[str, Callable[[str, str, Path], Report]] = {
    check.__name__: check for check in (lora_truth, lora_saved, lora_handover)
}
