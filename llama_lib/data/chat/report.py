"""What is told of the conversations of a run: how many, in how many rows, and which are left out.

Invariant: every conversation that is read is counted in one of the lines.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING

from llama_lib.data.blend import Blend
from llama_lib.data.chat.counts import Bad, Seen
from llama_lib.data.chat.rows import HeldOutConversations
from llama_lib.data.chat.selection import Selection, Tally
from llama_lib.data.chat.store import FileFacts, Store
from llama_lib.data.order import Order

if TYPE_CHECKING:
    from llama_lib.data.chat.training import ChatRequest

# Reasons of bad records that are told one by one. Chosen.
_SHOWN_REASONS = 5


def summary(selection: Selection, held_out: HeldOutConversations, request: ChatRequest) -> str:
    """What is trained on and what is held out."""
    training = selection.training.values()
    labels = sum(float(chosen.num_labels.sum()) for chosen in training)
    shared = 0 < request.other_role_weight < 1 and request.loss_role != "all"
    return (
        f"{sum(map(len, training)):,} conversations, "
        f"{sum(chosen.num_tokens for chosen in training):,} tokens from "
        f"{sum(1 for chosen in training if len(chosen))} source(s), {labels:,.0f} of them trained "
        f"on{', by their weights' if shared else ''}; held out {held_out.num_conversations:,} "
        f"conversations, {held_out.num_tokens:,} tokens"
    )


def _reasons(request: ChatRequest) -> dict[str, str]:
    return {
        "in_eval_data": "in --eval_data too",
        "too_short": f"fewer tokens than --min_length {request.min_length}",
        "too_long": f"more tokens than --max_length {request.max_length}",
        "no_label": f"no trained token left within --max_length {request.max_length}",
        "not_drawn": "more than the [N] of -d",
    }


def left_out_lines(store: Store, selection: Selection, request: ChatRequest) -> list[str]:
    """One line for each reason, with the file and line of the first it holds for."""
    files = _files(store)
    lines = _bad_lines(files)
    turns, first = _all_of([(file, file.counts.cut_turns) for file in files])
    if turns:
        lines.append(
            f"left out {turns:,} turn(s) of users at the end that nobody answered (first: {first})"
        )
    for reason, text in _reasons(request).items():
        tally = selection.dropped[reason]
        if tally.conversations:
            lines.append(f"dropped {_share(tally, selection.total)}: {text}{_first(reason, tally)}")
    if selection.cut.conversations:
        lines.append(
            f"cut {_share(selection.cut, selection.total)} to --max_length {request.max_length}: "
            f"{selection.cut.tokens:,} tokens at their ends are not trained on"
            f"{_first('cut', selection.cut)}"
        )
    return lines


def warning_lines(store: Store) -> list[str]:
    """What is trained on, but perhaps not as it is meant; with the first file and line."""
    files = _files(store)
    lines = []
    merged, first = _all_of([(file, file.counts.merged) for file in files])
    if merged:
        lines.append(
            f"warning: in {merged:,} conversation(s) the tokenizer joins the end of the generation "
            "prompt with the answer's first letters: that token is not trained on, and serving "
            f"gives another in its place (first: {first})"
        )
    specials, first = _all_of([(file, file.counts.specials) for file in files])
    if specials:
        lines.append(
            f"warning: {specials:,} conversation(s) hold the text of special tokens, which becomes "
            f"these tokens (first: {first})"
        )
    return lines


def _files(store: Store) -> list[FileFacts]:
    return [file for source in store.sources.values() for file in source.files]


def _all_of(found: list[tuple[FileFacts, Seen]]) -> tuple[int, str]:
    """How often in all files, and the place of the first."""
    first = next((file.place(seen.first) for file, seen in found if seen.count), "")
    return sum(seen.count for _, seen in found), first


def _bad_lines(files: list[FileFacts]) -> list[str]:
    """The bad records of all files by reason, the most frequent first."""
    reasons: dict[str, list[tuple[FileFacts, Bad]]] = {}
    for file in files:
        for reason, bad in file.counts.bad.items():
            reasons.setdefault(reason, []).append((file, bad))
    counts = {reason: sum(bad.count for _, bad in found) for reason, found in reasons.items()}
    ordered = sorted(counts, key=lambda reason: -counts[reason])
    lines = []
    for reason in ordered[:_SHOWN_REASONS]:
        file, bad = reasons[reason][0]
        lines.append(
            f"left out {counts[reason]:,} bad record(s) (first: {file.place(bad.first)}): "
            f"{bad.message}"
        )
    if rest := ordered[_SHOWN_REASONS:]:
        number = sum(counts[reason] for reason in rest)
        lines.append(f"left out {number:,} bad record(s) for {len(rest):,} other reason(s)")
    return lines


def _share(tally: Tally, total: int) -> str:
    return f"{tally.conversations:,} of {total:,} conversations"


def _first(reason: str, tally: Tally) -> str:
    """Those that are drawn, or held out by hand, are nobody's fault."""
    return "" if reason in ("not_drawn", "in_eval_data") else f" (first: {tally.first})"


def rows_line(selection: Selection, order: Order, request: ChatRequest) -> str:
    """How full the rows are, and what packing saves."""
    training = selection.training.values()
    conversations = sum(map(len, training))
    tokens = sum(chosen.num_tokens for chosen in training)
    parts = [part.order for part in order.components] if isinstance(order, Blend) else [order]
    rows = sum(part.num_rows(1) for part in parts)
    fill = tokens / (rows * request.max_length)
    if not request.packing:
        return (
            f"{conversations:,} rows of {request.max_length} with one conversation, {fill:.1%} full"
        )
    return (
        f"packed {conversations:,} conversations into {rows:,} rows of {request.max_length}, "
        f"{fill:.1%} full: {conversations / rows:.1f} times fewer rows than padding"
    )


def nothing_left(
    selection: Selection, request: ChatRequest, names: Collection[str] | None = None
) -> str:
    """Why there is nothing, if every conversation is left out.

    Args:
        names: the sources of which nothing is left; None for all.
    """
    names = selection.totals.keys() if names is None else names
    total = sum(selection.totals[name] for name in names)
    found = ", ".join(_why(selection, request, names))
    return (
        f"no conversation is left; of {total:,}, {found}. Change these options or give other "
        "conversations."
    )


def _why(selection: Selection, request: ChatRequest, names: Collection[str]) -> Iterator[str]:
    for reason, text in _reasons(request).items():
        tally = selection.dropped[reason]
        if number := sum(tally.by_source.get(name, 0) for name in names):
            yield f"{number:,} have {text}" if reason.startswith("too") else f"{number:,}: {text}"
    if number := sum(len(selection.held_out[name]) for name in names):
        yield f"{number:,}: held out by --eval_ratio {request.eval_ratio:g}"
