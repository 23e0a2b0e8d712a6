"""torchrun plan_checks.py FOLDER CASE...: the bytes that living engines hold of the model.

A case is LAYOUT/PRECISION or LAYOUT@VARIANT/PRECISION (`case_of`). Each one adds one line
{"job": ..., "ranks" or "error": ...} to FOLDER/report.jsonl; "ranks" has of every process its
pipeline stage and its bytes by kind, on the device tier and on the host tier.

python plan_checks.py FOLDER peak FLAGS: {"peak": bytes} of all tensors of one process in a step.
"""

import gc
import itertools
import json
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llama_lib.cli import run_script
from llama_lib.config import Options, parse_options
from llama_lib.launch import start_process_group
from tests.distributed.cases import MODEL, options_of

Bytes = dict[str, int]

MODELS = {
    "tied": {"tie_word_embeddings": True},
    "biased": {"attention_bias": True, "mlp_bias": True},
}
SETTINGS = {
    # gemini counts a chunk once for each of its parameters: 0.05 is about a third of the chunks.
    "some_offloaded": {"offload_optim_frac": 0.05},
    "parameters_half": {"offload_optim_frac": 1.0, "offload_param_frac": 0.5},
}


def case_of(name: str) -> tuple[Options, dict[str, Any]]:
    """The options and the model's settings of a case."""
    layout, _, precision = name.partition("/")
    layout, _, variant = layout.partition("@")
    options = options_of(layout, precision)
    for setting, value in SETTINGS.get(variant, {}).items():
        setattr(options.parallel, setting, value)
    return options, MODEL | MODELS.get(variant, {})


class Tally:
    """Bytes by kind and tier; a storage counts once, for the first kind that names it."""

    def __init__(self) -> None:
        self.seen: set[int] = set()
        self.bytes: dict[str, Bytes] = {"device": {}, "host": {}}

    def add(self, kind: str, tensors: Iterable[Any], tier: str = "device") -> None:
        total = 0
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage.nbytes() and storage.data_ptr() not in self.seen:
                self.seen.add(storage.data_ptr())
                total += storage.nbytes()
        self.bytes[tier][kind] = self.bytes[tier].get(kind, 0) + total


def _add_chunks(tally: Tally, kind: str, chunks: Iterable[Any]) -> None:
    for chunk in chunks:
        if chunk is None:
            continue
        shards = {"device": (chunk.cuda_shard, chunk.cuda_global_chunk), "host": (chunk.cpu_shard,)}
        for tier, tensors in shards.items():
            tally.add(kind, [tensor for tensor in tensors if tensor is not None], tier)


def _groups(engine: Any) -> tuple[list[Any], list[Any]]:
    """Gemini's chunks in the working precision and in fp32."""
    groups = engine.optimizer.chunk_manager.chunk_groups
    working = [c for name, group in groups.items() if name.startswith("fp16") for c in group]
    master = [c for name, group in groups.items() if name.startswith("fp32") for c in group]
    return working, master


def _moments(state: Bytes) -> list[Any]:
    return [value for value in state.values() if hasattr(value, "untyped_storage")]


def gradients(engine: Any) -> dict[str, Bytes]:
    """What the engine holds after a backward pass and before the step."""
    tally, optimizer = Tally(), engine.optimizer
    if engine.layout.plugin.startswith("gemini"):
        working, _ = _groups(engine)
        _add_chunks(tally, "weights", working)
        _add_chunks(tally, "gradients", [chunk.grad_chunk for chunk in working])
        return tally.bytes
    parameters = list(engine.module.parameters())
    tally.add("weights", [parameter.data for parameter in parameters])
    tally.add("gradients", [p.grad for p in parameters if p.grad is not None])
    for store in getattr(optimizer, "pg_to_grad_store", {}).values():
        for group in store._grads_of_params.values():
            tally.add("gradients", [grad for grads in group.values() for grad in grads])
    return tally.bytes


def states(engine: Any) -> dict[str, Bytes]:
    """Master weights and moments after a step."""
    tally, optimizer = Tally(), engine.optimizer
    state = optimizer.optim.state
    if engine.layout.plugin.startswith("gemini"):
        _add_chunks(tally, "master", _groups(engine)[1])
        for parameter, values in state.items():
            on_host = optimizer.param_to_chunk16[parameter].paired_chunk.device_type == "cpu"
            tally.add("optimizer", _moments(values), "host" if on_host else "device")
        return tally.bytes
    # The weights first: in fp32 hybrid_parallel has no others.
    tally.add("weights", [parameter.data for parameter in engine.module.parameters()])
    tier = "host" if engine.layout.plugin == "zero2_cpu" else "device"
    for group in optimizer.optim.param_groups:
        tally.add("master", group["params"], tier)
    for values in state.values():
        tally.add("optimizer", _moments(values), tier)
    return tally.bytes


def chunks_at_loss(engine: Any) -> Bytes:
    """Gemini's working chunks on the device tier: the ranks' own parts, and whole chunks."""
    working, _ = _groups(engine)
    whole = [chunk for chunk in working if chunk.is_gathered]
    parts = sum(chunk.shard_mem for chunk in working if chunk.cuda_shard is not None)
    return {
        "parts": parts,
        "whole": sum(chunk.chunk_mem for chunk in whole),
        "parts_of_whole": sum(chunk.shard_mem for chunk in whole),
    }


def build(name: str) -> Any:
    import torch
    import torch.distributed as dist
    from transformers import LlamaConfig

    from llama_lib.engine import Engine
    from llama_lib.layout import layout_of

    options, model = case_of(name)
    config = LlamaConfig(**model, use_cache=False)
    config._attn_implementation = "eager" if options.parallel.sp_mode else "sdpa"
    layout = layout_of(options, dist.get_world_size())
    device = torch.device("cpu")
    return Engine(options, layout, config, device, options.training.accumulation_steps)


def measure(name: str) -> dict[str, Any]:
    """Two steps of a real engine, the second one looked at."""
    from tests.distributed.checks import micro_batches, rows_per_step, train_step
    from tests.distributed.plain_loop import batch, num_labels

    engine = build(name)
    train_step(engine, 1)
    found: dict[str, Any] = {}
    if engine.layout.plugin.startswith("gemini"):
        backward = engine.booster.backward

        def looking(*args: Any, **kwargs: Any) -> None:
            found["at_loss"] = chunks_at_loss(engine)
            backward(*args, **kwargs)

        engine.booster.backward = looking
    ids, labels = batch(2, rows_per_step(engine))
    engine.forward_backward(micro_batches(engine, ids, labels), num_labels(labels))
    found |= gradients(engine)
    engine.step()
    for tier, values in states(engine).items():
        found[tier] = values | found[tier]
    stage = engine.plugin.stage_manager.stage if engine.layout.pp > 1 else 0
    return {"stage": stage, **found}


# Large enough that tensors, not their bookkeeping, are what is counted.
PEAK_MODEL = {
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
}


def peak_options(flags: str) -> Options:
    return parse_options("pretrain", f"-d unused -x bf16 -b 4 -l 256 {flags}".split())


def measure_peak(flags: str) -> int:
    """Most bytes of tensors in the second step of one process: those before it, found by the
    garbage collector, and what torch's profiler sees come and go."""
    import torch
    import torch.distributed as dist
    from torch.profiler import ProfilerActivity, profile
    from transformers import LlamaConfig

    from llama_lib.engine import Engine, MicroBatch
    from llama_lib.layout import layout_of

    options = peak_options(flags)
    config = LlamaConfig(**PEAK_MODEL, use_cache=False, attn_implementation="sdpa")
    steps = options.training.accumulation_steps
    engine = Engine(options, layout_of(options, 1), config, torch.device("cpu"), steps)
    ids = torch.randint(0, config.vocab_size, (4, 256))

    def step() -> None:
        engine.forward_backward([MicroBatch(ids, ids)] * steps, 4.0 * 255 * steps)
        engine.step()

    step()
    # Each of gloo's threads holds what it sent last until it has something else to send.
    for _ in range(16):
        dist.all_reduce(torch.zeros(1))
    gc.collect()
    before: dict[int, int] = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor):
            storage = thing.untyped_storage()
            before[storage.data_ptr()] = storage.nbytes()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    events = profiled.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return sum(before.values()) + max(itertools.accumulate(count for _, count in changes))


def main() -> None:
    start_process_group(seed=1)
    if sys.argv[2] == "peak":
        line = json.dumps({"peak": measure_peak(sys.argv[3])})
        (Path(sys.argv[1]) / "report.jsonl").write_text(line)
        return
    import torch.distributed as dist

    folder = Path(sys.argv[1])
    for job in sys.argv[2:]:
        line: dict[str, Any] = {"job": job}
        try:
            ranks: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(ranks, measure(job))
            line["ranks"] = ranks
        except Exception:  # every rank meets it, or the launcher's time limit ends the others
            line["error"] = traceback.format_exc()
        if dist.get_rank() == 0 or "error" in line:
            with (folder / "report.jsonl").open("a") as stream:
                # ColossalAI counts some sizes in numpy numbers.
                stream.write(json.dumps(line, default=int) + "\n")
        gc.collect()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    run_script(lambda _: main())
