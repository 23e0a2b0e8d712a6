"""The conversations of a fine-tuning run: encoded, selected, in rows, and what is to be told.

Invariant: equal requests give equal rows on every host, and nothing is left out without a line
that says how many and why.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from llama_lib.data.arrange import arrange
from llama_lib.data.bad_records import BadRecord, UnknownShape
from llama_lib.data.chat.encode import record_name
from llama_lib.data.chat.part_reader import ExampleReader
from llama_lib.data.chat.records import resolve_conversations
from llama_lib.data.chat.report import (
    left_out_lines,
    nothing_left,
    rows_line,
    summary,
    warning_lines,
)
from llama_lib.data.chat.rows import ConversationRows, HeldOutConversations, RowMaker
from llama_lib.data.chat.selection import (
    Chosen,
    Loss,
    Rules,
    Selection,
    all_hashes,
    select,
)
from llama_lib.data.chat.store import Store, stored
from llama_lib.data.entries import Entry, parse_entries
from llama_lib.data.loader import RowSource
from llama_lib.data.once import once
from llama_lib.data.sources import Source, is_on_hub
from llama_lib.data.tokenizer import DEFAULT_CACHE_DIR, load_tokenizer, tokenizer_hash
from llama_lib.data.training_data import Passage, TrainingData
from llama_lib.errors import UserError

# Records looked at in a file, bad ones among which are passed over, and files in a source, to see
# which kinds there are. Chosen.
_FIRST_RECORDS = 8
_MOST_BAD = 100
_FIRST_FILES = 8

# Of each entry of -d with a weight: the weight, and the sources it is for. None without weights.
Weights = tuple[tuple[float, tuple[str, ...]], ...] | None


@dataclass(frozen=True)
class ChatRequest:
    """The data of a run; names and defaults as the options of finetune.py.

    `datasets` are words of -d: `name[N]:weight`. `tokenizer` is a folder with a chat template.
    `task_name` is the configuration of a dataset of the hub. `packing` puts several conversations
    into a row. `workers` are processes, 0 for one per core.
    """

    datasets: Sequence[str]
    tokenizer: str
    max_length: int
    task_name: str | None = None
    eval_data: Sequence[str] = ()
    eval_ratio: float = 0.005
    cache_dir: str | Path = DEFAULT_CACHE_DIR
    seed: int = 42
    workers: int = 0
    skip_bad_lines: bool = False
    min_length: int = 0
    overlong: str = "cut"
    loss_role: str = "assistant"
    other_role_weight: float = 0.0
    packing: bool = True


def kinds_of(datasets: Sequence[str], task_name: str | None, cache_dir: str | Path) -> set[str]:
    """The kinds (Example.kind) of the first records of the data.

    Raises:
        UserError: the data cannot be found or read, or none of the first records is good.
    """
    entries = parse_entries(datasets)
    kinds: set[str] = set()
    for source in _resolved(entries, task_name, Path(cache_dir).expanduser()):
        for path in source.files[:_FIRST_FILES]:
            kinds |= _first_kinds(path)
    return kinds


def _first_kinds(path: Path) -> set[str]:
    """Of the first good records of a file; those behind them are not read."""
    kinds: list[str] = []
    bad_ones: list[tuple[int, BadRecord]] = []

    def on_bad(number: int, bad: BadRecord) -> None:
        bad_ones.append((number, bad))
        first_number, first = bad_ones[0]
        if kinds:
            return
        if isinstance(first, UnknownShape) and len(bad_ones) == _FIRST_RECORDS:
            raise first.of_file(path)
        if len(bad_ones) == _MOST_BAD:
            raise UserError(
                f"{path}: the first {_MOST_BAD} records are bad; the first one, "
                f"{record_name(path, first_number)}: {first}. Mend them, or choose the "
                "--chat_template, so that it does not depend on them."
            )

    for _, example in ExampleReader(path, True, on_bad):
        kinds.append(example.kind)
        if len(kinds) == _FIRST_RECORDS:
            break
    return set(kinds)


def chat_data(request: ChatRequest) -> TrainingData:
    """Rows of conversations; what is not encoded yet is encoded first.

    May be called by all processes of a node at once: one encodes, the others wait.

    Raises:
        UserError: bad data, or none left to train on.
    """
    entries, eval_entries = parse_entries(request.datasets), parse_entries(request.eval_data)
    if taken := [each.text for each in eval_entries if (each.limit, each.weight) != (None, None)]:
        raise UserError(f"--eval_data {', '.join(taken)}: takes no [N] and no :weight.")
    cache_dir = Path(request.cache_dir).expanduser()
    sources = _resolved(entries, request.task_name, cache_dir)
    eval_store = None
    if eval_entries:
        found = _resolved(eval_entries, request.task_name, cache_dir)
        eval_store = _stored(found, request)
    store = _stored(sources, request)
    loss = Loss(request.loss_role, request.other_role_weight)
    rules = Rules(
        max_length=request.max_length,
        min_length=request.min_length,
        cut=request.overlong == "cut",
        loss=loss,
        limits={n: entry.limit for n, entry in enumerate(entries) if entry.limit is not None},
        seed=request.seed,
        excluded=None if eval_store is None else all_hashes(eval_store),
        eval_ratio=0.0 if request.eval_data else request.eval_ratio,
    )
    entry_of = {source.name: source.entry for source in sources}
    selection = select(store, rules, entry_of)
    if not any(map(len, selection.training.values())):
        raise UserError(nothing_left(selection, request))
    weights = _weights(entries, entry_of)
    if problems := _weighed_for_nothing(weights, entries, selection, request):
        raise UserError(problems)
    apart = None if eval_store is None else _eval_selection(eval_store, request, loss)
    arranged = _Arranged(store, selection.training, weights)
    packing = "best_fit" if request.packing else "padded"
    order = arrange(arranged, request.max_length, request.seed, packing, cache_dir)
    tokenizer = load_tokenizer(request.tokenizer, cache_dir)

    def maker(chosen: dict[str, Chosen]) -> RowMaker:
        pad_id = tokenizer.eos_token_id
        return RowMaker(chosen, request.max_length, pad_id, loss, isolated=request.packing)

    rows = ConversationRows(maker(selection.training), order)
    held_out = HeldOutConversations(maker(apart.training if apart else selection.held_out))

    def open_rows(state: dict[str, Any]) -> RowSource:
        return rows

    def passages(samples: Sequence[int], state: dict[str, Any]) -> list[list[Passage]]:
        return [
            [_passage(name, selection.training[name], index) for name, index in row]
            for row in rows.conversations(samples)
        ]

    lines = [summary(selection, held_out, request)]
    lines += left_out_lines(store, selection, request) + warning_lines(store)
    if eval_store is not None and apart is not None:
        told = left_out_lines(eval_store, apart, request) + warning_lines(eval_store)
        lines += [f"--eval_data: {line}" for line in told]
    lines.append(rows_line(selection, order, request))
    return TrainingData(
        identity=hashlib.sha256(
            json.dumps([arranged.manifest_hash, loss.by_role.tolist()]).encode()
        ).hexdigest(),
        tokenizer_hash=tokenizer_hash(tokenizer),
        open_rows=open_rows,
        passages=passages,
        num_rows=order.num_rows,
        repetitions=getattr(order, "repetitions", None),
        held_out=held_out if held_out.sources else None,
        available={name: chosen.num_tokens for name, chosen in selection.training.items()},
        lines=lines,
    )


@dataclass(frozen=True)
class _Arranged:
    """What arrange() needs to know of the conversations that are trained on."""

    store: Store
    readers: dict[str, Chosen]
    weights: Weights

    @cached_property
    def manifest_hash(self) -> str:
        """Of the ids, the roles, and what is taken of them; not of where they come from."""
        digest = hashlib.sha256(json.dumps(self.weights).encode())
        for name, chosen in self.readers.items():
            digest.update(json.dumps([name, self.store.sources[name].digest]).encode())
            digest.update(chosen.numbers.astype("<i8").tobytes())
            digest.update(chosen.lengths.astype("<i4").tobytes())
        return digest.hexdigest()


def _resolved(entries: Sequence[Entry], task_name: str | None, cache_dir: Path) -> list[Source]:
    """The sources of the entries; the processes of a node download one after the other."""
    names = [entry.name for entry in entries]
    apart = any(entry.limit is not None or entry.weight is not None for entry in entries)
    key = json.dumps(["conversations", names, task_name])
    download = once(cache_dir, key, "the download of the data")
    with download if any(map(is_on_hub, names)) else nullcontext():
        return resolve_conversations(names, task_name, cache_dir, apart)


def _stored(sources: Sequence[Source], request: ChatRequest) -> Store:
    return stored(
        sources, request.tokenizer, request.cache_dir, request.workers, request.skip_bad_lines
    )


def _eval_selection(store: Store, request: ChatRequest, loss: Loss) -> Selection:
    """What of --eval_data is measured: all that has a label within a row."""
    rules = Rules(max_length=request.max_length, cut=request.overlong == "cut", loss=loss)
    selection = select(store, rules, dict.fromkeys(store.sources, 0))
    if not any(map(len, selection.training.values())):
        raise UserError(f"--eval_data: {nothing_left(selection, request)}")
    return selection


def _weighed_for_nothing(
    weights: Weights, entries: Sequence[Entry], selection: Selection, request: ChatRequest
) -> list[str]:
    """The entries with a weight of which nothing is left, and why."""
    return [
        f"-d {entry.text}: {nothing_left(selection, request, names)}"
        for entry, (_, names) in zip(entries, weights or (), strict=False)
        if not any(len(selection.training[name]) for name in names)
    ]


def _weights(entries: Sequence[Entry], entry_of: dict[str, int]) -> Weights:
    """The weight of each entry, and the sources it is for; None if they have none."""
    if entries[0].weight is None:
        return None
    return tuple(
        (entry.weight or 0.0, tuple(name for name, n in entry_of.items() if n == number))
        for number, entry in enumerate(entries)
    )


def _passage(name: str, chosen: Chosen, index: int) -> Passage:
    file, number = chosen.source.locate(int(chosen.numbers[index]))
    return Passage(name, file.path.name, number, 0, int(chosen.lengths[index]))
