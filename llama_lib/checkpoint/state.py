"""Full (unsharded) weights and optimizer state of a boosted model, by name, and back.

Invariant: what is gathered is independent of plugin and layout: per parameter the fp32 master
weight, exp_avg and exp_avg_sq in the parameter's full shape. ColossalAI's own optimizer files drop
the masters, and a bf16 run resumed without them is another run.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from llama_lib.checkpoint import gemini
from llama_lib.checkpoint.hybrid import cut_of, cut_state, flat_share
from llama_lib.checkpoint.parts import (
    MASTER,
    MOMENTS,
    Cut,
    Entry,
    Held,
    Parameter,
    collect_on,
    value_of,
    whole_state,
)
from llama_lib.engine import Engine
from llama_lib.lora import base_parameters, merge
from llama_lib.progress import made


def is_writer(engine: Engine) -> bool:
    """Whether this rank ends up with gathered tensors: one rank per pipeline stage."""
    if engine.layout.plugin != "hybrid_parallel":
        return dist.get_rank() == 0
    io = engine.booster.checkpoint_io
    return io.dp_rank == 0 and io.tp_rank == 0 and io.sp_rank == 0


# -- weights -----------------------------------------------------------------------------------


def weight_names(engine: Engine) -> list[str]:
    """The names of the weights that this rank takes part in gathering, in their order."""
    if engine.layout.plugin.startswith("gemini"):
        # It has both names of a head that is the embedding.
        return [name for name in engine.model.name2param if name in engine.shapes]
    return [name for name, _ in base_parameters(engine.module)]


def gather_weights(engine: Engine, merged: bool = False) -> Iterator[tuple[str, Tensor]]:
    """(name, full weight in the working precision) on the writers; all ranks must iterate.

    Args:
        merged: with the adapters added; without, a model with adapters gives its base.
    """
    for name, tensor in _full_weights(engine):
        yield name, merge(engine.module, name, tensor) if merged else tensor


def _full_weights(engine: Engine) -> Iterator[tuple[str, Tensor]]:
    if engine.layout.plugin.startswith("gemini"):
        _finish_step(engine)
        # Blocks of one tensor: larger ones would be held beside the chunk they come from.
        for block, _ in engine.model.state_dict_shard(max_shard_size=0):
            made()
            if is_writer(engine):
                yield from ((n, tensor) for n, tensor in block.items() if n in engine.shapes)
    elif engine.layout.plugin == "hybrid_parallel":
        io, collect = engine.booster.checkpoint_io, collect_on(engine.device)
        for name, parameter in base_parameters(engine.module):
            cut = cut_of(parameter, engine.shapes[name], io, is_state=False)
            # `detach` of a padded parameter is replaced by ColossalAI, and fails when called twice.
            full = cut.whole(parameter.data, collect) if cut.is_given else None
            made()
            if full is not None and is_writer(engine):  # a norm is whole on all of a tensor group
                yield name, full
            _keep_step(engine)
    elif is_writer(engine):
        yield from base_parameters(engine.module)


def _finish_step(engine: Engine) -> None:
    """Give gemini's weights in host memory what the last step made of their masters.

    The optimizer leaves that until a weight is used again, so a save would find the weights of one
    step before; under accumulation nothing else brings them up to date.
    """
    for chunk in engine.optimizer.chunk16_set:
        if not chunk.optim_sync_flag:
            chunk.payload.copy_(chunk.paired_chunk.payload)


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


def held_state(engine: Engine) -> list[Held]:
    """What this rank holds of the optimizer's state, in the order of a checkpoint's files.

    Called by all ranks. Nothing is copied: the tensors are those of the optimizer.
    """
    optimizer = engine.optimizer
    if engine.layout.plugin.startswith("gemini"):
        steps = gemini.adam_steps(optimizer, engine.device)
        return list(gemini.held_chunks(optimizer, steps, engine.names, engine.trained))
    held = []
    for parameter_id, key, master in _owned(engine):
        name, entry = engine.names[parameter_id], optimizer.optim.state[key]
        parameter = Parameter(name, int(entry.get("step", 0)), engine.trained[name])
        pieces = partial(_only_piece, entry, master)
        held.append(Held(_cut(engine, key, name), master.numel(), [parameter], pieces))
    return held


def _only_piece(entry: dict[str, Any], master: Tensor, key: str) -> list[tuple[int, Tensor]]:
    return [(0, value_of(entry, key, master))]


def _cut(engine: Engine, key: Any, name: str) -> Cut:
    """How a master is cut among the ranks, outside gemini."""
    shape, optimizer = engine.trained[name], engine.optimizer
    if engine.layout.plugin == "hybrid_parallel":
        io = engine.booster.checkpoint_io
        return cut_of(_working(engine, key), shape, io, is_state=True)
    group = optimizer.param_to_pg[optimizer.master_to_working_param[id(key)]]
    return Cut(shape, shape, group, is_shared=True)


def gather_optimizer(engine: Engine) -> Iterator[Entry]:
    """(name, Adam steps done, {master, exp_avg, exp_avg_sq} in full shape and fp32) on the writers.

    All ranks must iterate to the end.
    """
    return whole_state(
        held_state(engine),
        part=lambda held, key: held.part(key, engine.device),
        collect=collect_on(engine.device),
        is_writer=is_writer(engine),
        pause=lambda: _keep_step(engine),
    )


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
        made()


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
