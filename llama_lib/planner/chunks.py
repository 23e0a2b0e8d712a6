"""The chunks that ColossalAI's gemini cuts a model into.

Invariant: sizes and order are those of colossalai 0.5.0's search_chunk_configuration and
ChunkManager for the settings that llama_lib/plugins.py takes from here.
"""

from __future__ import annotations

import functools
import math
import statistics
from dataclasses import dataclass

import numpy as np

from llama_lib.flops import num_parameters
from llama_lib.models import Shape

# Gemini keeps a model smaller than one minimal chunk whole on every rank, and then multiplies
# accumulated gradients by the number of ranks; a minimal chunk of an eighth of the model always
# shards. 32 Mi elements, ColossalAI's default, is the upper bound; smaller ones copy less.
MIN_CHUNKS = 8
MAX_CHUNK_MEBI = 32


@dataclass(frozen=True)
class Chunk:
    """`size` elements over all ranks, `used` of them by the model; `parameters` is their number."""

    size: int
    used: int
    parameters: int


@functools.lru_cache(maxsize=64)
def _chunk_size(shape: Shape, parameters: tuple[int, ...]) -> int:
    """Elements of a chunk before it is made divisible by the ranks: the least padding wins."""
    smallest = round(min(MAX_CHUNK_MEBI, num_parameters(shape) / MIN_CHUNKS / 2**20) * 2**20)
    # Parameters more than three standard deviations above the mean get chunks of their own.
    limit = statistics.fmean(parameters) + 3 * statistics.pstdev(parameters)
    sizes = [size for size in parameters if size <= limit]
    step = shape.hidden_size
    start = math.ceil(max(smallest, *sizes) / step) * step
    candidates = np.arange(start, start + smallest + 1, step)
    wasted = np.zeros_like(candidates)
    left = np.zeros_like(candidates)
    for size in sizes:
        full = size > left
        wasted += np.where(full, left, 0)
        left = np.where(full, candidates, left) - size
    return int(candidates[np.argmin(wasted + left)])


@functools.lru_cache(maxsize=256)
def gemini_chunks(shape: Shape, parameters: tuple[int, ...], ranks: int) -> tuple[Chunk, ...]:
    """The chunks of a model, in order.

    Args:
        parameters: elements of each parameter in the model's order.
        ranks: processes that a chunk is sharded over.
    """
    size = _divisible(_chunk_size(shape, parameters), ranks)
    chunks: list[Chunk] = []
    for elements in parameters:
        last = chunks[-1] if chunks else Chunk(0, 0, 0)
        if last.used + elements <= last.size:
            chunks[-1] = Chunk(last.size, last.used + elements, last.parameters + 1)
        else:
            chunks.append(Chunk(max(size, _divisible(elements, ranks)), elements, 1))
    return tuple(chunks)


def _divisible(number: int, by: int) -> int:
    return number + -number % by
