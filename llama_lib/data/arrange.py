"""The order of the rows of a dataset, by packing and weights.

Invariant: equal data, row length, seed, packing and weights give the same order on every host.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np

from llama_lib.data.blend import Blend, Component
from llama_lib.data.order import CHUNK, Integers, Order, RowOrder
from llama_lib.data.packing import PackedOrder, alone
from llama_lib.data.shared import SharedArrays, create, is_large
from llama_lib.errors import UserError

PACKINGS: dict[str, Callable[[Integers, int, int, SharedArrays], RowOrder | PackedOrder]] = {
    "concat": RowOrder,
    "best_fit": PackedOrder,
    "padded": partial(PackedOrder, place=alone),
}

# Part of the name of the shared files: another number whenever what is written there changes.
_VERSION = 1


class Documents(Protocol):
    """The documents of one source; `lengths` [documents] counts their tokens."""

    @property
    def lengths(self) -> Integers: ...

    def __len__(self) -> int: ...


class Dataset(Protocol):
    """What is arranged. Equal `manifest_hash` means equal lengths.

    `weights`: relative shares of the training tokens, each of the sources it is for together;
    None trains on everything alike.
    """

    @property
    def readers(self) -> Mapping[str, Documents]: ...

    @property
    def weights(self) -> tuple[tuple[float, tuple[str, ...]], ...] | None: ...

    @property
    def manifest_hash(self) -> str: ...


def arrange(
    dataset: Dataset,
    max_length: int,
    seed: int,
    packing: str,
    cache_dir: str | Path,
) -> Order:
    """The order of a dataset's rows; blended when the dataset has weights.

    Raises:
        UserError: a weight that cannot be kept to.
    """
    sources = list(dataset.readers)
    if dataset.weights is None:
        return _order_of(dataset, sources, max_length, seed, packing, cache_dir)
    weighted = [name for _, names in dataset.weights for name in names]
    if sorted(weighted) != sorted(sources):
        raise ValueError(f"weights for {sorted(weighted)} of the sources {sorted(sources)}")
    sizes = [len(reader) for reader in dataset.readers.values()]
    firsts = dict(zip(sources, (np.cumsum(sizes) - sizes).tolist(), strict=True))
    components = []
    for weight, names in dataset.weights:
        label = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
        counts = np.array([len(dataset.readers[name]) for name in names], np.int64)
        if not counts.any():
            raise UserError(f"{label} has weight {weight:g} but no documents; leave it out of -d.")
        begins = np.cumsum(counts) - counts
        offsets = np.array([firsts[name] for name in names], np.int64) - begins
        part = _order_of(dataset, names, max_length, seed, packing, cache_dir)
        # Weights are shares of tokens, and rows are what is shared out: fuller ones count for more.
        rows = part.num_rows(1) if isinstance(part, PackedOrder) else 0
        fill = part.num_tokens / (rows * max_length) if rows else 1.0
        components.append(Component(label, weight / fill, part, begins, offsets))
    return Blend(components, max_length, seed)


def _order_of(
    dataset: Dataset,
    names: Sequence[str],
    max_length: int,
    seed: int,
    packing: str,
    cache_dir: str | Path,
) -> RowOrder | PackedOrder:
    readers = [dataset.readers[name] for name in names]
    documents = [(name, len(reader)) for name, reader in zip(names, readers, strict=True)]
    facts = [_VERSION, dataset.manifest_hash, documents, max_length, seed, packing]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]
    shared = SharedArrays(cache_dir, key)
    lengths = _together([reader.lengths for reader in readers], shared)
    return PACKINGS[packing](lengths, max_length, seed, shared)


def _together(lengths: Sequence[Integers], shared: SharedArrays) -> Integers:
    """The lengths of the documents of several sources as one array."""
    count = sum(map(len, lengths))
    if len(lengths) == 1:
        return lengths[0]
    if not is_large(count):
        return np.concatenate(lengths)

    def build(folder: Path) -> None:
        together = create(folder, "lengths", np.int32, count)
        first = 0
        for part in lengths:
            for start in range(0, len(part), CHUNK):
                values = part[start : start + CHUNK]
                together[first : first + len(values)] = values
                first += len(values)

    return shared.load("lengths", build)["lengths"]
