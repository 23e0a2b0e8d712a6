"""Several prepared datasets as one, one source of a dataset, and random subsets of one.

Invariant: nothing is copied; the manifest of what comes out says what it is made of, so equal
`manifest_hash` still means equal documents in equal order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from llama_lib.data.draw import drawn
from llama_lib.data.prepared import FORMAT, VERSION, PreparedDataset, Reader, check_tokenizer
from llama_lib.errors import UserError

_TOTALS = ("documents", "tokens", "bytes")


class SomeDocuments:
    """Some of the documents of a reader; `numbers` int64, ascending."""

    def __init__(self, reader: Reader, numbers: npt.NDArray[np.int64]) -> None:
        self._reader = reader
        self._numbers = numbers

    def __len__(self) -> int:
        return len(self._numbers)

    @cached_property
    def lengths(self) -> npt.NDArray[np.integer]:
        return self._reader.lengths[self._numbers]

    @cached_property
    def num_tokens(self) -> int:
        return int(self.lengths.sum(dtype=np.int64))

    def tokens(
        self, document: int, start: int = 0, count: int | None = None
    ) -> npt.NDArray[np.integer]:
        return self._reader.tokens(int(self._numbers[document]), start, count)

    def chunks(self, size: int) -> Iterator[npt.NDArray[np.integer]]:
        """The ids of all documents in order, document by document, at most `size` at a time."""
        for document in range(len(self)):
            ids = self.tokens(document)
            for first in range(0, len(ids), size):
                yield ids[first : first + size]

    def number_in_file(self, document: int) -> int:
        return self._reader.number_in_file(int(self._numbers[document]))


def subset(dataset: PreparedDataset, count: int, seed: int) -> PreparedDataset:
    """At most `count` documents of all sources together, drawn by the seed.

    What is held out stays as it is.
    """
    if count >= dataset.num_documents:
        return dataset
    numbers = drawn(count, dataset.num_documents, seed)
    borders = np.cumsum([0, *(len(reader) for reader in dataset.readers.values())])
    readers: dict[str, Reader] = {}
    for (name, reader), first, last in zip(
        dataset.readers.items(), borders[:-1], borders[1:], strict=True
    ):
        within = numbers[np.searchsorted(numbers, first) : np.searchsorted(numbers, last)] - first
        if len(within):
            readers[name] = SomeDocuments(reader, within)
    facts = {name: _facts_of(dataset.manifest["sources"][name], r) for name, r in readers.items()}
    manifest = {
        **_with_sources(dataset.manifest, facts),
        "subset": {"documents": count, "seed": seed, "of": dataset.manifest_hash},
    }
    return replace(dataset, manifest=manifest, readers=readers)


def one_source(dataset: PreparedDataset, source: str) -> PreparedDataset:
    """One source as a dataset of its own, with what was held out of it."""
    held_out = dataset.held_out
    if held_out is not None:
        held_out = one_source(held_out, source) if source in held_out.readers else None
    manifest = _with_sources(dataset.manifest, {source: dataset.manifest["sources"][source]})
    return replace(
        dataset,
        manifest=manifest,
        readers={source: dataset.readers[source]},
        held_out=held_out,
    )


def joined(
    datasets: Sequence[PreparedDataset], entries: Sequence[Mapping[int, int]] | None = None
) -> PreparedDataset:
    """All documents of the datasets, one after the other.

    `entries` gives each dataset's entries other numbers; without it a dataset is one entry. A name
    that is taken gets a number behind it. Raises UserError if their tokenizers are not the same.
    """
    problems = [
        problem
        for dataset in datasets[1:]
        for problem in check_tokenizer(dataset, datasets[0].tokenizer_hash)
    ]
    if problems:
        raise UserError(problems)
    names = _unique_names(datasets)
    held_out = [
        (dataset.held_out, own)
        for dataset, own in zip(datasets, names, strict=True)
        if dataset.held_out is not None
    ]
    renumbered = []
    for number, dataset in enumerate(datasets):
        own = dict.fromkeys(dataset.sources_of_entry, number)
        renumbered.append(own if entries is None else entries[number])
    whole = _joined(datasets, names, renumbered)
    if held_out:
        parts, own_names = zip(*held_out, strict=True)
        whole = replace(whole, held_out=_joined(parts, own_names, None))
    return whole


def _joined(
    datasets: Sequence[PreparedDataset],
    names: Sequence[Mapping[str, str]],
    entries: Sequence[Mapping[int, int]] | None,
) -> PreparedDataset:
    readers: dict[str, Reader] = {}
    facts: dict[str, Any] = {}
    for number, (dataset, own) in enumerate(zip(datasets, names, strict=True)):
        for name, reader in dataset.readers.items():
            readers[own[name]] = reader
            about = dataset.manifest["sources"][name]
            entry = about.get("entry", 0)
            facts[own[name]] = {**about, "entry": entries[number][entry] if entries else entry}
    first = datasets[0]
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "tokenizer": first.manifest["tokenizer"],
        "options": {"joined": len(datasets)},
        "joined": [dataset.manifest_hash for dataset in datasets],
    }
    return PreparedDataset(
        path=first.path,
        manifest=_with_sources(manifest, facts),
        readers=readers,
        tokenizer_folder=first.tokenizer_path,
    )


def _unique_names(datasets: Sequence[PreparedDataset]) -> list[dict[str, str]]:
    """For each dataset: its names of sources, of both sides, to names that no other has."""
    taken: set[str] = set()
    names = []
    for dataset in datasets:
        own = {}
        held_out = dataset.held_out.sources if dataset.held_out is not None else []
        for name in dict.fromkeys([*dataset.sources, *held_out]):
            unique, number = name, 2
            while unique in taken:
                unique, number = f"{name}.{number}", number + 1
            taken.add(unique)
            own[name] = unique
        names.append(own)
    return names


def _facts_of(facts: dict[str, Any], reader: Reader) -> dict[str, Any]:
    """Facts of a source of which only some documents are left; their bytes are an estimate."""
    share = reader.num_tokens / max(facts["tokens"], 1)
    return {
        **facts,
        "documents": len(reader),
        "tokens": reader.num_tokens,
        "bytes": round(facts["bytes"] * share),
    }


def _with_sources(manifest: dict[str, Any], sources: dict[str, Any]) -> dict[str, Any]:
    totals = {name: sum(facts[name] for facts in sources.values()) for name in _TOTALS}
    return {**manifest, **totals, "sources": sources}
