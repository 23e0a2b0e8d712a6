"""Full (unsharded) weights and optimizer state of a boosted model, by name, and back.

Invariant: what is gathered is independent of plugin and layout: per parameter the fp32 master
weight, exp_avg and exp_avg_sq in the parameter's full shape. ColossalAI's own optimizer files drop
the masters, and a bf16 run resumed without them is another run.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from llama_lib.checkpoint import gemini
from llama_lib.checkpoint.hybrid import cut_state, flat_share, gather_state, gather_weight
from llama_lib.engine import Engine
from llama_lib.lora import base_parameters, merge

MASTER = "master"
MOMENTS = ("exp_avg", "exp_avg_sq")

# Unit of ColossalAI's block size arguments is MiB.
BLOCK_MEBIBYTES = 1024


def is_writer(engine: Engine) -> bool:
    """Whether this rank ends up with gathered tensors: one rank per pipeline stage."""
    if engine.layout.plugin != "hybrid_parallel":
        return dist.get_rank() == 0
    io = engine.booster.checkpoint_io
    return io.dp_rank == 0 and io.tp_rank == 0 and io.sp_rank == 0


# -- weights -----------------------------------------------------------------------------------


def gather_weights(engine: Engine, merged: bool = False) -> Iterator[tuple[str, Tensor]]:
    """(name, full weight in the working precision) on the writers; all ranks must iterate.

    Args:
        merged: with the adapters added; without, a model with adapters gives its base.
    """
    for name, tensor in _full_weights(engine):
        yield name, merge(engine.module, name, tensor) if merged else tensor


def _full_weights(engine: Engine) -> Iterator[tuple[str, Tensor]]:
    if engine.layout.plugin.startswith("gemini"):
        # Blocks of one tensor: larger ones would be held beside the chunk they come from.
        for block, _ in engine.model.state_dict_shard(max_shard_size=0):
            if is_writer(engine):
                # Under both names if the head is the embedding.
                yield from ((n, tensor) for n, tensor in block.items() if n in engine.shapes)
    elif engine.layout.plugin == "hybrid_parallel":
        io = engine.booster.checkpoint_io
        for name, parameter in base_parameters(engine.module):
            full = gather_weight(parameter, engine.shapes[name], io)
            if is_writer(engine):
                yield name, full
            _keep_step(engine)
    elif is_writer(engine):
        yield from base_parameters(engine.module)


def _keep_step(engine: Engine) -> None:
    """Wait for the device, so that ranks which do not write stay beside the one that does.

    Otherwise they enqueue all their collectives at once, and NCCL's watchdog, which counts from
    then, ends the run when writing takes long.
    """
    if engine.device.type == "cuda":
        torch.cuda.synchronize(engine.device)


# -- optimizer ----------------------------------------------------------------------------------


def _owned(engine: Engine) -> Iterator[tuple[int, Any, Tensor]]:
    """(parameter id, key in the inner optimizer's state, this rank's fp32 master shard)."""
    optimizer = engine.optimizer
    if engine.layout.plugin.startswith("gemini"):
        for parameter_id, fake in optimizer.id_to_fake_params.items():
            begin, end = optimizer.param_to_range[fake]
            chunk = optimizer.param_to_chunk16[fake].paired_chunk
            yield parameter_id, fake, chunk.payload[begin:end]
        return
    if engine.layout.plugin == "hybrid_parallel":
        ids = optimizer.param_info["param2id"]
        for group in optimizer.optim.param_groups:
            for key in group["params"]:
                yield ids[id(_working(engine, key))], key, key.data
        return
    keys = (key for group in optimizer.optim.param_groups for key in group["params"])
    yield from ((index, key, key.detach()) for index, key in enumerate(keys))


def _working(engine: Engine, key: Any) -> Tensor:
    """The hybrid plugin's parameter behind a key of its optimizer's state."""
    working = engine.optimizer.get_master_to_working_map()
    return key if working is None else working[id(key)]


def _complete_state(engine: Engine) -> None:
    """Give every parameter a state with the master in it, in one order of keys.

    A run whose steps were all skipped so far has no moments yet: zeros are what they stand for.
    """
    state = engine.optimizer.optim.state
    for _, key, master in _owned(engine):
        entry = state[key]
        moments = {name: entry.get(name, torch.zeros_like(master)) for name in MOMENTS}
        state[key] = {"step": entry.get("step", 0), **moments, MASTER: master}


def _forget_masters(engine: Engine) -> None:
    for entry in engine.optimizer.optim.state.values():
        entry.pop(MASTER, None)


Entry = tuple[int, int, dict[str, Tensor]]  # parameter id, Adam steps, tensors by key


def _gemini_entries(engine: Engine) -> Iterator[Entry]:
    optimizer = engine.optimizer
    steps = gemini.adam_steps(optimizer, engine.device)
    for parameters in gemini.gather_chunks(optimizer, (MASTER, *MOMENTS)):
        for parameter_id, tensors in parameters:
            yield parameter_id, steps, tensors
        _keep_step(engine)


def _zero_entries(engine: Engine) -> Iterator[Entry]:
    blocks = engine.optimizer.state_dict_shard(max_shard_size=BLOCK_MEBIBYTES, only_on_master=True)
    for block, _ in blocks:
        for parameter_id, entry in block.items():
            if is_writer(engine):
                yield parameter_id, int(entry["step"]), {k: entry[k] for k in (MASTER, *MOMENTS)}
        _keep_step(engine)


def _hybrid_entries(engine: Engine) -> Iterator[Entry]:
    io = engine.booster.checkpoint_io
    for parameter_id, key, _ in _owned(engine):
        entry, parameter = engine.optimizer.optim.state[key], _working(engine, key)
        shape = engine.trained[engine.names[parameter_id]]
        full = {
            name: gather_state(entry[name], parameter, shape, io) for name in (MASTER, *MOMENTS)
        }
        if is_writer(engine):
            yield parameter_id, int(entry["step"]), full
        _keep_step(engine)


def gather_optimizer(engine: Engine) -> Iterator[tuple[str, int, dict[str, Tensor]]]:
    """(name, Adam steps done, {master, exp_avg, exp_avg_sq} in full shape and fp32) on the writers.

    All ranks must iterate to the end.
    """
    if engine.layout.plugin.startswith("gemini"):
        entries = _gemini_entries(engine)
    elif engine.layout.plugin == "hybrid_parallel":
        entries = _hybrid_entries(engine)
    else:
        entries = _zero_entries(engine)
    _complete_state(engine)
    try:
        for parameter_id, steps, tensors in entries:
            name = engine.names[parameter_id]
            shape = engine.trained[name]
            yield name, steps, {key: t.float().reshape(shape) for key, t in tensors.items()}
    finally:
        _forget_masters(engine)


def scatter_optimizer(engine: Engine, read: Any) -> None:
    """Put stored optimizer state into this rank's shards.

    Args:
        read: name -> (Adam steps done, {master, exp_avg, exp_avg_sq} in full shape, fp32).
    """
    for parameter_id, key, master in list(_owned(engine)):
        step, tensors = read(engine.names[parameter_id])
        shards = _shard(engine, parameter_id, key, step, tensors)
        master.copy_(shards.pop(MASTER).reshape(master.shape))
        engine.optimizer.optim.state[key] = {"step": step} | {
            name: shards[name].reshape(master.shape).to(master.device).clone() for name in MOMENTS
        }


def _shard(
    engine: Engine, parameter_id: int, key: Any, step: int, tensors: dict[str, Tensor]
) -> dict[str, Tensor]:
    """This rank's part of full tensors, cut the way the plugin cuts them."""
    optimizer = engine.optimizer
    if engine.layout.plugin.startswith("gemini"):
        optimizer.load_single_param_states(parameter_id, dict(tensors))
        return dict(optimizer.optim.state[key])
    if engine.layout.plugin == "hybrid_parallel":
        parameter, io = _working(engine, key), engine.booster.checkpoint_io
        return {name: cut_state(tensor, parameter, io) for name, tensor in tensors.items()}
    size, rank = dist.get_world_size(), dist.get_rank()
    return {name: flat_share(tensor, size, rank) for name, tensor in tensors.items()}
