"""Training mixtures: rows of several orders in fixed proportions, in one order.

Invariant: at the end of every block of rows each part has its share of all rows so far, to less
than one row, for any number of parts and however long the run is.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from math import ceil, lcm

import numpy as np
import numpy.typing as npt

from llama_lib.data.order import Order, Pieces, RowOrder
from llama_lib.data.packing import PackedOrder
from llama_lib.errors import UserError

_BLENDS = 3

# Rows whose parts are found together; chosen: costs nothing to keep, little to compute.
_TOGETHER = 1024
# A part with a smaller share would have blocks that do not fit in memory comfortably.
_LARGEST_BLOCK = 1 << 20


class Apportionment:
    """Which part each sample belongs to, and how many samples of that part came before.

    The shares are rounded along the row of parts: the first k parts together have round(n * their
    share) of n rows. So all rows are given away, no part is ever a whole row off, and any place is
    computed at once. Within a block, the fewest rows that hold one of each part on average, the
    parts are shuffled.
    """

    def __init__(self, weights: Sequence[float], seed: int) -> None:
        # What was typed, not the nearest binary number: 0.7 and 0.3 repeat exactly after ten rows.
        exact = [Fraction(str(weight)) for weight in weights]
        if min(exact) <= 0:
            raise ValueError(f"weights {list(weights)} are not all positive")
        whole = lcm(*(weight.denominator for weight in exact))
        sums = np.cumsum([int(weight * whole) for weight in exact], dtype=object)
        self._sums: list[int] = sums.tolist()
        self.block = ceil(Fraction(self._sums[-1]) / (min(exact) * whole))
        if self.block > _LARGEST_BLOCK:
            raise UserError(
                f"the weight {min(weights):g} is less than one row in {_LARGEST_BLOCK:,} of all: "
                "give weights that are nearer to each other, or leave that data out (-d)."
            )
        self.seed = seed
        self._blocks = ceil(_TOGETHER / self.block)
        self._groups = lru_cache(maxsize=2)(self._group)

    def locate(
        self, samples: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """The part of each sample, and its number within the part, from 0."""
        parts, numbers = np.empty((2, len(samples)), np.int64)
        groups, within = np.divmod(samples, self._blocks * self.block)
        for group in np.unique(groups).tolist():
            here = groups == group
            parts[here], numbers[here] = (found[within[here]] for found in self._groups(group))
        return parts, numbers

    def counts(self, num_samples: int) -> list[int]:
        """Samples of each part among the first so many."""
        group, within = divmod(num_samples, self._blocks * self.block)
        rest = np.bincount(self._groups(group)[0][:within], minlength=len(self._sums))
        before = self._rounded(num_samples - within)
        return [count + more for count, more in zip(before, rest.tolist(), strict=True)]

    def _rounded(self, num_samples: int) -> list[int]:
        """`counts` at the end of a block."""
        total = self._sums[-1]
        ends = [(2 * num_samples * part + total) // (2 * total) for part in self._sums]
        return [end - start for start, end in zip([0, *ends], ends, strict=False)]

    def _group(self, number: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        first = number * self._blocks
        ends = [self._rounded((first + i) * self.block) for i in range(self._blocks + 1)]
        table = np.array(ends, np.int64)
        counts = table[1:] - table[:-1]
        parts = np.repeat(np.tile(np.arange(counts.shape[1]), self._blocks), counts.ravel())
        blocks = np.repeat(np.arange(self._blocks), self.block)
        keys = np.random.RandomState([self.seed, number, _BLENDS]).random_sample(len(parts))
        parts = parts[np.lexsort((keys, blocks))]
        numbers = np.empty_like(parts)
        ranges = [np.arange(start, end) for start, end in zip(ends[0], ends[-1], strict=True)]
        numbers[np.argsort(parts, kind="stable")] = np.concatenate(ranges)
        return parts, numbers


@dataclass(frozen=True)
class Component:
    """A weighted part of a blend: the order of its own documents, numbered from 0.

    Its document d is number d + offsets[i] of the whole, with the largest i with firsts[i] <= d.
    """

    label: str
    weight: float
    order: RowOrder | PackedOrder
    firsts: npt.NDArray[np.int64]
    offsets: npt.NDArray[np.int64]


class Blend(Order):
    """Rows of several components by weight; row k of a component is row k of its own order.

    So each component goes through its own epochs, and a small one is repeated. An epoch of the
    blend has as many rows as the components have together.
    """

    def __init__(self, components: Sequence[Component], max_length: int, seed: int) -> None:
        self.max_length = max_length
        self.components = components
        self._rows = max(1, sum(part.order.num_rows(1) for part in components))
        self._apportionment = Apportionment([part.weight for part in components], seed)

    def num_rows(self, num_epochs: int) -> int:
        return num_epochs * self._rows

    def epoch_of(self, sample: int) -> int:
        return sample // self._rows

    def repetitions(self, num_samples: int) -> dict[str, float]:
        """How many times so many samples go through each component."""
        counts = self._apportionment.counts(num_samples)
        return {
            part.label: part.order.passes(count)
            for part, count in zip(self.components, counts, strict=True)
        }

    def pieces(self, samples: npt.NDArray[np.int64]) -> Pieces:
        parts, numbers = self._apportionment.locate(samples)
        found = [np.empty((4, 0), np.int64)]
        for number in np.unique(parts).tolist():
            here = np.flatnonzero(parts == number)
            component = self.components[number]
            row, document, start, length = component.order.pieces(numbers[here])
            source = np.searchsorted(component.firsts, document, side="right") - 1
            document = document + component.offsets[source]
            found.append(np.stack([here[row], document, start, length]))
        together = np.concatenate(found, axis=1)
        return Pieces(*together[:, np.argsort(together[0], kind="stable")])
