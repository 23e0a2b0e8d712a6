"""Checks of loading weights that run inside a process group; see checks.py.

Invariant: every rank returns the same; what the data must be is said in the tests, not here.
"""

import ctypes
import gc
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import LlamaForCausalLM

from llama_lib.checkpoint import store
from llama_lib.checkpoint.resize import NewRows
from llama_lib.checkpoint.state import MASTER, gather_optimizer, gather_weights
from llama_lib.checkpoint.weights import load_weights
from llama_lib.engine import Engine
from llama_lib.layout import layout_of
from tests.distributed import plain_loop
from tests.distributed.cases import MODEL, SEED, options_of
from tests.distributed.checks import llama_config, merged, rows_per_step, train_step
from tests.distributed.plain_loop import batch, num_labels

Report = dict[str, Any]

NEW_IDS = 6
# Rows of the saved tables without a token: some stay without, some get one of the new tokens.
SPARE = range(485, 500)

# 77 million parameters: 154 MB in bf16, of which each of the two tables is 12 MB.
LARGE = {
    "vocab_size": 8000,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 10,
    "num_attention_heads": 12,
    "num_key_value_heads": 6,
    "head_dim": 64,
}
LARGE_KNOWN = 7900


def _engine(layout: str, precision: str, **changes: Any) -> Engine:
    options = options_of(layout, precision)
    config = llama_config(layout)
    for name, value in changes.items():
        setattr(config, name, value)
    return Engine(
        options,
        layout_of(options, dist.get_world_size()),
        config,
        torch.device("cpu"),
        options.training.accumulation_steps,
    )


def _save_model(folder: Path, dtype: torch.dtype, shard_size: str = "5GB", **changes: Any) -> None:
    """A model as transformers makes and saves it, once for all ranks."""
    if dist.get_rank() == 0:
        torch.manual_seed(len(folder.name))
        config = llama_config("plain")
        for name, value in changes.items():
            setattr(config, name, value)
        model = LlamaForCausalLM(config).to(dtype)
        with torch.no_grad():
            for parameter in model.parameters():  # norms too: ones would hide a mistake
                parameter.mul_(5 + torch.rand(parameter.shape))
        model.save_pretrained(folder, max_shard_size=shard_size)
    dist.barrier()


def _state(folder: Path) -> dict[str, Tensor]:
    """The weights of a folder as transformers reads them."""
    return LlamaForCausalLM.from_pretrained(folder, torch_dtype="auto").state_dict()


def _differing(engine: Engine, expected: dict[str, Tensor]) -> list[str]:
    """Weights and masters of the engine that are not the expected ones, in their precisions."""
    found: dict[str, Any] = {
        name: torch.equal(tensor.cpu(), expected[name].to(engine.dtype))
        for name, tensor in gather_weights(engine)
    }
    found |= {
        f"{name}/{MASTER}": torch.equal(tensors[MASTER].cpu(), expected[name].float())
        for name, _, tensors in gather_optimizer(engine)
    }
    found = merged(found)
    absent = {f"{name}{end}" for name in expected for end in ("", f"/{MASTER}")} - set(found)
    return sorted(absent) + [name for name, equal in found.items() if not equal]


def _losses(engine: Engine, folder: Path) -> tuple[float, float]:
    """The first loss of training and that of transformers with the folder's weights."""
    ids, labels = batch(1, rows_per_step(engine))
    served = LlamaForCausalLM.from_pretrained(folder, torch_dtype=engine.dtype)
    with torch.no_grad():
        expected = plain_loop.loss_sum(served(input_ids=ids).logits, labels) / num_labels(labels)
    return train_step(engine, 1)[0], expected.item()


def load(layout: str, precision: str, folder: Path) -> Report:
    """Folders of two kinds, each loaded into an engine of its own."""
    report: Report = {}
    for name, dtype, shard_size in (
        ("sharded fp32", torch.float32, "100KB"),
        ("single bf16", torch.bfloat16, "5GB"),
    ):
        saved = folder / name
        _save_model(saved, dtype, shard_size)
        engine = _engine(layout, precision)
        load_weights(engine, saved, "--model_path")
        differing = _differing(engine, _state(saved))
        loss, expected = _losses(engine, saved)
        report[name] = {
            "files": len(list(saved.glob("*.safetensors"))),
            "differing": differing,
            "loss": loss,
            "expected_loss": expected,
        }
    return report


def load_tied(layout: str, precision: str, folder: Path) -> Report:
    """A model whose head is its embedding, from a folder that holds it once, and one twice.

    "norm" is that of the first gradient: the embedding gets one from both of its uses.
    """
    engine = _engine(layout, precision, tie_word_embeddings=True)
    report: Report = {}
    once, twice = folder / "once", folder / "twice"
    _save_model(once, torch.float32, tie_word_embeddings=True)
    _save_model(twice, torch.float32)
    for saved in (twice, once):
        load_weights(engine, saved, "--model_path")
        expected = _state(saved)
        del expected["lm_head.weight"]
        report[saved.name] = _differing(engine, expected)
    ids, labels = batch(1, rows_per_step(engine))
    plain = LlamaForCausalLM.from_pretrained(once, torch_dtype=engine.dtype)
    loss = plain_loop.loss_sum(plain(input_ids=ids).logits, labels) / num_labels(labels)
    loss.backward()
    squares = [p.grad.float().square().sum() for p in plain.parameters() if p.grad is not None]
    report["expected"] = [loss.item(), torch.stack(squares).sum().sqrt().item()]
    report["found"] = train_step(engine, 1)
    return report


def grow(layout: str, precision: str, folder: Path) -> Report:
    """A folder of 500 rows into a model of more, and what becomes of it: trained, saved, loaded.

    The first new tokens lie in spare rows of the folder's tables.
    """
    rows = MODEL["vocab_size"] + NEW_IDS
    old = range(SPARE.start)
    new = [*SPARE[-3:], *range(MODEL["vocab_size"], rows)]
    saved = folder / "model"
    _save_model(saved, torch.float32)
    engine = _engine(layout, precision, vocab_size=rows)
    load_weights(engine, saved, "--model_path", new_rows=NewRows(old, new))
    expected = _state(saved)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        mean = expected[name][: SPARE.start].float().mean(0, keepdim=True)
        kept = expected[name][: SPARE.stop - 3]
        expected[name] = torch.cat([kept, mean.expand(len(new), -1)])
    weights = merged({name: tensor.cpu().clone() for name, tensor in gather_weights(engine)})
    rounding = 1e-6 if engine.dtype == torch.float32 else torch.finfo(engine.dtype).eps
    report: Report = {
        "far": [
            name
            for name, tensor in weights.items()
            if not torch.allclose(tensor, expected[name].to(engine.dtype), rounding, atol=1e-7)
        ],
        "kept_bits": all(
            torch.equal(
                weights[name][: SPARE.stop - 3],
                expected[name][: SPARE.stop - 3].to(engine.dtype),
            )
            for name in ("model.embed_tokens.weight", "lm_head.weight")
        ),
    }
    if dist.get_rank() == 0:
        config = llama_config("plain")
        config.vocab_size = rows
        grown = LlamaForCausalLM(config)
        grown.load_state_dict(expected)
        grown.save_pretrained(folder / "grown")
    dist.barrier()
    report["loss"], report["expected_loss"] = _losses(engine, folder / "grown")
    state = store.TrainerState(1, 0, 0, 0, SEED, {}, scaler=store.scaler_state(engine))
    path = store.save(engine, state, None, str(folder), None)
    served = LlamaForCausalLM.from_pretrained(path / "model")
    report["served_rows"] = [served.config.vocab_size, *served.lm_head.weight.shape]
    straight = [train_step(engine, step)[0] for step in (2, 3)]
    del engine
    engine = _engine(layout, precision, vocab_size=rows)
    store.load(engine, path, store.read_state(path))
    report["straight"] = straight
    report["resumed"] = [train_step(engine, step)[0] for step in (2, 3)]
    return report


class AnonymousMemory:
    """The most anonymous memory of this process inside the block, in bytes.

    File pages that are only mapped do not count: the kernel takes them back whenever it wants.
    """

    def __enter__(self) -> "AnonymousMemory":
        gc.collect()
        self.begin = self.peak = self._now()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.is_set():
            self.peak = max(self.peak, self._now())
            time.sleep(0.001)

    @staticmethod
    def _now() -> int:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
        raise AssertionError("the kernel tells no RssAnon")


def memory(layout: str, precision: str, folder: Path) -> Report:
    """Anonymous memory that loading takes on the rank that takes most."""
    saved = folder / "model"
    _save_model(saved, torch.bfloat16, "50MB", **LARGE)
    _save_model(folder / "smaller", torch.bfloat16, "50MB", **{**LARGE, "vocab_size": LARGE_KNOWN})
    engine = _engine(layout, precision, **LARGE)
    # Freed tensors go back to the kernel at once: M_MMAP_THRESHOLD, which otherwise grows.
    ctypes.CDLL(None).mallopt(-3, 2**20)
    # What the first use of everything allocates once: threads, groups, buffers of gloo.
    load_weights(engine, saved, "--model_path")
    growth = []
    for folder_name, rows in (
        ("model", None),
        ("smaller", NewRows(range(LARGE_KNOWN), range(LARGE_KNOWN, LARGE["vocab_size"]))),
    ):
        with AnonymousMemory() as memory:
            load_weights(engine, folder / folder_name, "--model_path", new_rows=rows)
        most = torch.tensor(memory.peak - memory.begin)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        growth.append(most.item())
    chunk = 0
    if layout.startswith("gemini"):
        chunks = engine.model.chunk_manager.get_chunks(engine.model.fp32_params)
        chunk = max(int(chunk.chunk_size) for chunk in chunks) * engine.dtype.itemsize
    sizes = [torch.Size(shape).numel() * 2 for shape in engine.shapes.values()]
    return {
        "model": sum(sizes),
        "largest": max(sizes),
        "chunk": chunk,
        "growth": growth[0],
        "growth_resizing": growth[1],
    }


CHECKS: dict[str, Callable[[str, str, Path], Report]] = {
    check.__name__: check for check in (load, load_tied, grow, memory)
}
