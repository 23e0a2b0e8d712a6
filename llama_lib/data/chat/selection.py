"""Which stored conversations are trained on, how much of each, and why the others are not.

Invariant: a conversation is left out for one reason, the first that holds; whether it is held out
depends on what is asked first in it alone, so all answers to one prompt are on the same side.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import sliding_window_view

from llama_lib.data.chat.labels import label_weights
from llama_lib.data.chat.roles import ROLE_NAMES
from llama_lib.data.chat.store import Store, StoredSource
from llama_lib.data.draw import Draw
from llama_lib.data.fates import HASHES

# Reasons in the order in which they are looked at; 0 is a conversation that stays.
REASONS = ("in_eval_data", "too_short", "too_long", "no_label", "not_drawn")
_STAYS = 0
_CODES = {reason: code for code, reason in enumerate(REASONS, start=1)}
# Roles of cut conversations that are looked at together: in the caches of a core they are counted
# at 0.5 ns each, from main memory at 0.8. Measured 2026-11-22.
_CHUNK_TOKENS = 1 << 19

Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Loss:
    """What is trained on: --loss_role and --other_role_weight."""

    loss_role: str = "assistant"
    other_role_weight: float = 0.0

    def weights(self, roles: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Of the labels [tokens] of one conversation; 0 is no loss."""
        return label_weights(roles, self.loss_role, self.other_role_weight)

    @property
    def by_role(self) -> npt.NDArray[np.float32]:
        """The weight of a label of each role [roles]."""
        return self.weights(np.array([0, *range(len(ROLE_NAMES))], np.uint8))[1:]


@dataclass(frozen=True)
class Rules:
    """Which conversations stay.

    Attributes:
        max_length: tokens of a row; what is longer is cut, or dropped unless `cut`.
        limits: conversations of each entry of -d at most, by its number; drawn by `seed`.
        excluded: hashes of conversations that are held out by hand, sorted.
        eval_ratio: share of the prompts whose conversations are held out.
    """

    max_length: int
    min_length: int = 0
    cut: bool = True
    loss: Loss = Loss()
    limits: Mapping[int, int] = field(default_factory=dict)
    seed: int = 0
    excluded: npt.NDArray[np.uint64] | None = None
    eval_ratio: float = 0.0


@dataclass(frozen=True, eq=False)
class Chosen:
    """Conversations of one source: their `numbers` in the store, ascending, and of each the
    `lengths` in tokens that are taken, from its beginning, and the weight of its labels."""

    source: StoredSource
    numbers: Numbers
    lengths: npt.NDArray[np.int32]
    num_labels: npt.NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def num_tokens(self) -> int:
        return int(self.lengths.sum(dtype=np.int64))

    def tokens(self, index: int) -> tuple[npt.NDArray[np.integer], npt.NDArray[np.uint8]]:
        """(ids, roles) of a chosen conversation, views on the files."""
        number, length = int(self.numbers[index]), int(self.lengths[index])
        roles = self.source.roles.tokens(number, 0, length)
        return self.source.ids.tokens(number, 0, length), roles.astype(np.uint8, copy=False)


@dataclass
class Tally:
    """Conversations something happened to, and how many of each source.

    `first` is the place of the first of them.
    """

    by_source: dict[str, int] = field(default_factory=dict)
    tokens: int = 0
    first: str = ""

    @property
    def conversations(self) -> int:
        return sum(self.by_source.values())

    def add(self, name: str, source: StoredSource, numbers: Numbers, tokens: int = 0) -> None:
        if len(numbers):
            file, number = source.locate(int(numbers[0]))
            self.first = self.first or file.place(number)
            self.by_source[name] = len(numbers)
            self.tokens += tokens


@dataclass(frozen=True)
class Selection:
    """What is left of a store, by source; every source has its place in both, if only an empty one.

    `dropped` counts by reason; `cut` the conversations that stay, and the tokens they lose;
    `totals` all conversations of each source.
    """

    training: dict[str, Chosen]
    held_out: dict[str, Chosen]
    dropped: dict[str, Tally]
    cut: Tally
    totals: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.totals.values())


def select(store: Store, rules: Rules, entries: Mapping[str, int]) -> Selection:
    """Apply the rules; `entries` is the number of the entry of -d of each source.

    Memory: about 60 bytes for each conversation, of which 30 stay (52 and 27 measured).
    """
    judged = {name: _judge(source, rules) for name, source in store.sources.items()}
    for entry, limit in rules.limits.items():
        names = [name for name in judged if entries[name] == entry]
        _draw([judged[name].codes for name in names], limit, rules.seed)
    groups = {
        name: store.sources[name].about["group"][each.codes == _STAYS]
        for name, each in judged.items()
    }
    bound = _bound(list(groups.values()), rules.eval_ratio)
    training, held_out = {}, {}
    dropped = {reason: Tally() for reason in REASONS}
    cut = Tally()
    for name, source in store.sources.items():
        each = judged[name]
        for reason, code in _CODES.items():
            dropped[reason].add(name, source, np.flatnonzero(each.codes == code))
        stays = np.flatnonzero(each.codes == _STAYS)
        shorter = stays[each.lengths[stays] < source.ids.lengths[stays]]
        lost = source.ids.lengths[shorter].sum(dtype=np.int64) - each.lengths[shorter].sum()
        cut.add(name, source, shorter, int(lost))
        aside = groups[name] < np.uint64(bound)
        training[name] = each.chosen(source, stays[~aside])
        held_out[name] = each.chosen(source, stays[aside])
    totals = {name: len(source) for name, source in store.sources.items()}
    return Selection(training, held_out, dropped, cut, totals)


@dataclass(frozen=True)
class _Judged:
    """Of all conversations of a source: reason, tokens that are taken, weight of their labels."""

    codes: npt.NDArray[np.uint8]
    lengths: npt.NDArray[np.int32]
    num_labels: npt.NDArray[np.float64]

    def chosen(self, source: StoredSource, numbers: Numbers) -> Chosen:
        return Chosen(source, numbers, self.lengths[numbers], self.num_labels[numbers])


def _judge(source: StoredSource, rules: Rules) -> _Judged:
    whole = source.ids.lengths
    lengths = np.minimum(whole, np.int32(rules.max_length))
    by_role = rules.loss.by_role
    num_labels = source.about["labels"] @ by_role.astype(np.float64)
    too_long = whole > rules.max_length
    if rules.cut:
        numbers = np.flatnonzero(too_long)
        num_labels[numbers] = _cut_labels(source, numbers, rules.max_length, by_role)
    codes = np.zeros(len(whole), np.uint8)
    # The first reason is written last.
    codes[num_labels == 0] = _CODES["no_label"]
    if not rules.cut:
        codes[too_long] = _CODES["too_long"]
    codes[whole < rules.min_length] = _CODES["too_short"]
    if rules.excluded is not None:
        hashes = source.about["hash"]
        near = np.searchsorted(rules.excluded, hashes)
        near[near == len(rules.excluded)] = 0
        codes[rules.excluded[near] == hashes] = _CODES["in_eval_data"]
    return _Judged(codes, lengths, num_labels)


def _cut_labels(
    source: StoredSource, numbers: Numbers, length: int, by_role: npt.NDArray[np.float32]
) -> npt.NDArray[np.float64]:
    """The weight of the labels [numbers] of conversations cut to `length` tokens; of these, the
    first is none."""
    labels = np.zeros(len(numbers), np.float64)
    if not len(numbers):
        return labels
    lengths = source.roles.lengths
    begins = np.cumsum(lengths, dtype=np.int64)[numbers] - lengths[numbers]
    windows = sliding_window_view(source.roles.ids, length)
    step = max(1, _CHUNK_TOKENS // length)
    for first in range(0, len(numbers), step):
        chunk = slice(first, first + step)
        roles = windows[begins[chunk]]
        for role in np.flatnonzero(by_role):
            here = roles == role
            here[:, 0] = False
            # Bits are counted three times as fast as booleans.
            counts = np.bitwise_count(np.packbits(here, axis=1)).sum(axis=1, dtype=np.int64)
            labels[chunk] += counts * np.float64(by_role[role])
    return labels


def _draw(parts: list[npt.NDArray[np.uint8]], limit: int, seed: int) -> None:
    """Keep `limit` of the conversations that stay in all parts together."""
    stays = [np.flatnonzero(codes == _STAYS) for codes in parts]
    total = sum(map(len, stays))
    if not total:
        return
    draw = Draw.of(limit, total, seed)
    before = 0
    for codes, numbers in zip(parts, stays, strict=True):
        chosen = draw.chosen(np.arange(before, before + len(numbers)))
        codes[numbers[~chosen]] = _CODES["not_drawn"]
        before += len(numbers)


def _bound(groups: list[npt.NDArray[Any]], ratio: float) -> int:
    """Prompts with a hash below it are held out: one at least, and never all."""
    groups = [each for each in groups if len(each)]
    least = min((int(each.min()) for each in groups), default=0)
    most = max((int(each.max()) for each in groups), default=0)
    if not ratio or least == most:
        return 0
    return min(max(int(ratio * HASHES), least + 1), most)


def all_hashes(store: Store) -> npt.NDArray[np.uint64]:
    """Of all conversations of a store, sorted."""
    hashes = [source.about["hash"] for source in store.sources.values()]
    return np.unique(np.concatenate(hashes))
