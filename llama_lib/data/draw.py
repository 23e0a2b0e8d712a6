"""A random subset of numbered things, in flat memory: which numbers below n are drawn.

Invariant: exactly min(count, n) are drawn, by the seed alone; the stream of random numbers is
our own, so no new version of a library changes a subset.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_CHUNK = 1 << 20
_TOP_BITS = 16


@dataclass(frozen=True)
class Draw:
    """Numbers whose key is at most `threshold`; None draws all."""

    seed: int
    threshold: int | None

    @classmethod
    def of(cls, count: int, total: int, seed: int) -> "Draw":
        """Draw `count` of the numbers 0..total-1: those with the smallest keys."""
        if count >= total:
            return cls(seed, None)
        if count < 1:
            raise ValueError(f"{count} of {total}")
        shift = np.uint64(64 - _TOP_BITS)
        tops = np.zeros(1 << _TOP_BITS, np.int64)
        for keys in _keys_below(total, seed):
            tops += np.bincount((keys >> shift).astype(np.int64), minlength=len(tops))
        ends = np.cumsum(tops)
        top = int(np.searchsorted(ends, count))
        missing = count - (int(ends[top - 1]) if top else 0)
        candidates = [keys[keys >> shift == top] for keys in _keys_below(total, seed)]
        return cls(seed, int(np.sort(np.concatenate(candidates))[missing - 1]))

    def chosen(self, numbers: npt.NDArray[np.integer]) -> npt.NDArray[np.bool_]:
        """Which of these numbers are drawn."""
        if self.threshold is None:
            return np.ones(len(numbers), bool)
        return _keys(numbers, self.seed) <= np.uint64(self.threshold)


def drawn(count: int, total: int, seed: int) -> npt.NDArray[np.int64]:
    """The numbers that are drawn, ascending."""
    draw = Draw.of(count, total, seed)
    chunks = []
    for first in range(0, total, _CHUNK):
        numbers = np.arange(first, min(first + _CHUNK, total), dtype=np.int64)
        chunks.append(numbers[draw.chosen(numbers)])
    return np.concatenate(chunks or [np.empty(0, np.int64)])


def _keys_below(total: int, seed: int) -> Iterator[npt.NDArray[np.uint64]]:
    for first in range(0, total, _CHUNK):
        yield _keys(np.arange(first, min(first + _CHUNK, total)), seed)


def _keys(numbers: npt.NDArray[np.integer], seed: int) -> npt.NDArray[np.uint64]:
    """The finaliser of SplitMix64, a bijection: no two numbers have the same key."""
    start = _mixed(np.array([seed], np.uint64))
    step = np.uint64(0x9E3779B97F4A7C15)
    return _mixed(start + (numbers.astype(np.uint64) + np.uint64(1)) * step)


def _mixed(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
