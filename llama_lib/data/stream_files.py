"""The files that a stream is made of, from the words of `-d`.

Invariant: nothing is read but names, sizes and the index of parquet files; of the hub only lists.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from llama_lib.data.chunks import Corpus, StreamFile
from llama_lib.data.entries import Entry
from llama_lib.data.hub import HubFile, hub_listing
from llama_lib.data.once import once
from llama_lib.data.sources import is_on_hub, resolve
from llama_lib.errors import UserError


def corpora_of(
    entries: Sequence[Entry], cache_dir: Path, seed: int, skip_bad_lines: bool, chunk_bytes: int
) -> list[Corpus]:
    """One corpus for each weighted entry, or one for all.

    Raises:
        UserError: everything that is wrong with the entries, in one message.
    """
    problems = [
        f"{entry.text}: a stream cannot draw {entry.limit} documents at random before it has seen "
        "all; leave out --streaming, or the brackets."
        for entry in entries
        if entry.limit is not None
    ]
    weighted = any(entry.weight is not None for entry in entries)
    local = [number for number, entry in enumerate(entries) if not is_on_hub(entry.name)]
    found: dict[int, list[tuple[str, list[StreamFile]]]] = {n: [] for n in range(len(entries))}
    try:
        names = [entries[number].name for number in local]
        for source in resolve(names, cache_dir, entries_apart=weighted) if names else []:
            files = [StreamFile.local(path) for path in source.files]
            found[local[source.entry]].append((source.name, files))
    except UserError as error:
        problems += error.problems
    taken = {name for parts in found.values() for name, _ in parts}
    for number, entry in enumerate(entries):
        if number not in local:
            try:
                found[number] += _on_hub(entry.name, cache_dir, taken)
            except UserError as error:
                problems += error.problems
    if problems:
        raise UserError(problems)
    together = [[part for number in found for part in found[number]]]
    return [
        _corpus(parts, seed, skip_bad_lines, chunk_bytes)
        for parts in (list(found.values()) if weighted else together)
    ]


def _corpus(
    parts: list[tuple[str, list[StreamFile]]], seed: int, skip_bad_lines: bool, chunk_bytes: int
) -> Corpus:
    files = []
    for source, (_, its_files) in enumerate(parts):
        for file in its_files:
            file.source = source
            files.append(file)
    return Corpus([name for name, _ in parts], files, seed, skip_bad_lines, chunk_bytes)


def _on_hub(dataset: str, cache_dir: Path, taken: set[str]) -> list[tuple[str, list[StreamFile]]]:
    """The sources of a dataset on the hub, by names that are not `taken` yet."""
    groups: dict[tuple[str, ...], list[StreamFile]] = {}
    for file in _listing_once(dataset, cache_dir):
        groups.setdefault(file.parts, []).append(StreamFile.on_hub(file))
    named = []
    for parts, files in groups.items():
        tails = ["_".join(parts[-depth:]) for depth in range(1, len(parts) + 1)]
        tails += [f"{tails[-1]}.{number}" for number in range(len(taken) + 1)]
        name = next(tail for tail in tails if tail not in taken)
        taken.add(name)
        named.append((name, files))
    return named


def _listing_once(dataset: str, cache_dir: Path) -> list[HubFile]:
    """The files of a dataset on the hub; of the processes of a node that start together, one asks.

    So the hub is not asked by hundreds at once, and all see the same commit.
    """
    with once(cache_dir, f"listing {dataset}", f"the list of files of {dataset}") as turn:
        if "failed" in turn.before:
            raise UserError(turn.before["failed"])
        if "files" not in turn.before:
            try:
                files = hub_listing(dataset)
            except UserError as error:
                turn.report(failed=error.problems)
                raise
            turn.report(files=[asdict(file) for file in files])
            return files
        return [
            HubFile(**{**facts, "parts": tuple(facts["parts"])}) for facts in turn.before["files"]
        ]
