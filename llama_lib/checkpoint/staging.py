"""A copy of the run's tensors in host memory, from which a checkpoint is written later.

Invariant: what is written from a copy is, byte for byte, what would have been written when the copy
was made, whatever has become of the engine since; nothing of the engine is read after that.

Every rank copies only what it holds itself: the fp32 master weights and two moments, 12 bytes for
each of its parameters. That is 12 bytes / ranks for each of the model's under gemini, gemini_auto,
zero2, zero2_cpu and ZeRO stages 1 and 2 of hybrid_parallel, there per pipeline stage and after
tensor parallelism; without ZeRO 12 bytes in full on the first replica and none on the others. The
memory is taken when the run begins and kept to its end: to get it, and to pin it for a GPU, takes
longer than the copying. While it writes, a writer needs what it needs in a save that is not staged:
up to a shard of 1 GiB and a tensor, or gemini's chunk. Weights in the working precision need no
copy: they are the masters, rounded; but a whole model with its adapters merged is 2 bytes (fp32: 4)
for each of its parameters on the first rank, given back when it is written.
"""

import socket
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import psutil
import torch
from torch import Tensor

from llama_lib import coordination
from llama_lib.checkpoint.parts import (
    MASTER,
    STATE,
    Collect,
    Entry,
    Held,
    collect_over,
    whole_state,
)
from llama_lib.checkpoint.state import gather_weights, is_writer, weight_names
from llama_lib.checkpoint.writing import holds_model, rng_state
from llama_lib.engine import Engine
from llama_lib.lora import adapter_parameters
from llama_lib.progress import made

# Of the memory a host has free, what a copy may not take: caches of the files it writes (chosen).
KEPT_FREE = 0.1

# By key of STATE this rank's flat parts, one for each element of what `held_state` gives.
Copies = Mapping[str, Sequence[Tensor]]


def free_memory() -> int:
    """Bytes that this host, or the container if that may use less, could still give."""
    free = psutil.virtual_memory().available
    cgroup = Path("/sys/fs/cgroup")
    try:
        limit, used = (
            int((cgroup / name).read_text()) for name in ("memory.max", "memory.current")
        )
        stat = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
        # Pages of files that nobody has used of late are given back when memory is asked for.
        return min(free, limit - used + int(stat["inactive_file"]))
    except (OSError, ValueError, KeyError):  # no such file, or no limit
        return free


class HostMemory:
    """This rank's memory for copies: taken once, kept for all of them."""

    def __init__(self, device: torch.device) -> None:
        self._is_pinned = device.type == "cuda"
        self._values: Tensor | None = None

    def take(self, held: Sequence[Held]) -> str | None:
        """Take the memory unless that is done; called by all ranks.

        Returns:
            Why some host has no room for the copies of its ranks; the same on all ranks.
        """
        mine = 0 if self._values is not None else 4 * _size(held)
        hosts: dict[str, tuple[int, int]] = {}
        for host, needed, free in coordination.gather((socket.gethostname(), mine, free_memory())):
            hosts[host] = (hosts.get(host, (0, 0))[0] + needed, free)
        for host, (needed, free) in hosts.items():
            if needed > free * (1 - KEPT_FREE):
                return (
                    f"{host} has {free / 2**30:.2f} GiB of memory free, and a copy of what its "
                    f"processes hold takes {needed / 2**30:.2f} GiB"
                )
        if self._values is None:
            # Zeros are written now: otherwise the kernel looks for every page in the first copy.
            self._values = torch.empty(_size(held)).zero_()
            if self._is_pinned and self._values.numel():
                self._pin(self._values)
        return None

    def _pin(self, values: Tensor) -> None:
        # torch's own pinned memory is rounded up to a power of two: up to twice as much.
        cudart, address = torch.cuda.cudart(), values.data_ptr()
        torch.cuda.check_error(cudart.cudaHostRegister(address, values.nbytes, 0))
        # Else whoever is given these addresses next, in this process, could not pin them.
        weakref.finalize(self, cudart.cudaHostUnregister, address).atexit = False

    def copy(self, held: Sequence[Held]) -> Copies:
        """A copy of this rank's parts, in memory that was taken; the one before is lost."""
        assert self._values is not None
        begin, copies = 0, {}
        for key in STATE:
            parts = []
            for each in held:
                length = each.length if each.cut.is_given else 0
                part = self._values[begin : begin + length]
                if length:
                    each.copy_to(part, key)
                parts.append(part)
                begin += length
            copies[key] = parts
            made()
        if self._is_pinned:
            torch.cuda.synchronize()
        return copies


def _size(held: Sequence[Held]) -> int:
    return len(STATE) * sum(each.length for each in held if each.cut.is_given)


class Staged:
    """The `Tensors` of a checkpoint as they are now; made by all ranks, in the main thread.

    Args:
        connections: a gloo group of all ranks over which they are gathered, later.
    """

    def __init__(
        self, engine: Engine, memory: HostMemory, held: Sequence[Held], connections: object
    ) -> None:
        self._held, self._copies = held, memory.copy(held)
        self._collect: Collect = collect_over(connections)
        self._is_writer, self._dtype = is_writer(engine), engine.dtype
        self._adapters: list[tuple[str, Tensor]] = []
        if self._is_writer:
            self._adapters = [
                (name, tensor.detach().to("cpu", copy=True))
                for name, tensor in adapter_parameters(engine.module)
            ]
        self._names: list[str] = []
        self._merged: list[tuple[str, Tensor]] = []
        if engine.options.model.merge_lora:
            # A weight without adapters is frozen: where it is on the host already, it may stay.
            self._merged = [(name, t.cpu()) for name, t in gather_weights(engine, merged=True)]
        elif holds_model(engine):
            self._names = weight_names(engine)
        self._rng = rng_state(engine.device)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        yield from self._merged
        places = {p.name: (i, p) for i, each in enumerate(self._held) for p in each.parameters}
        gathered, full = -1, None
        for name in self._names:
            index, parameter = places[name]
            if index != gathered:  # a chunk of gemini has many
                gathered, full = index, self._whole_weights(index)
            if self._is_writer and full is not None:
                yield name, parameter.of(full)

    def _whole_weights(self, index: int) -> Tensor | None:
        cut = self._held[index].cut
        made()
        if not cut.is_given:
            return None
        return cut.whole(self._copies[MASTER][index].to(self._dtype), self._collect)

    def adapters(self) -> Iterator[tuple[str, Tensor]]:
        yield from self._adapters

    def optimizer(self) -> Iterator[Entry]:
        places = {id(each): index for index, each in enumerate(self._held)}
        return whole_state(
            self._held,
            part=lambda held, key: self._copies[key][places[id(held)]],
            collect=self._collect,
            is_writer=self._is_writer,
        )

    def rng(self) -> dict[str, Tensor]:
        return self._rng
