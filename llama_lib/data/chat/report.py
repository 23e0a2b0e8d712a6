"""What is told of the conversations of a run: how many, in how many rows, and which are left out.

Invariant: every conversation that is read is counted in one of the lines.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llama_lib.data.blend import Blend
from llama_lib.data.chat.rows import HeldOutConversations
from llama_lib.data.chat.selection import Selection, Tally
from llama_lib.data.chat.store import Store
from llama_lib.data.order import Order

if TYPE_CHECKING:
    from llama_lib.data.chat.training import ChatRequest


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
    lines = []
    for source in store.sources.values():
        for file in source.files:
            if file.counts.bad:
                lines.append(
                    f"left out {file.counts.bad:,} bad record(s) of {file.path}, one of them "
                    f"{file.counts.last_bad}"
                )
    files = [file for source in store.sources.values() for file in source.files]
    if turns := sum(file.counts.cut_turns for file in files):
        first = next(file for file in files if file.counts.first_cut)
        lines.append(
            f"left out {turns:,} turn(s) of users at the end that nobody answered (first: "
            f"{first.place(first.counts.first_cut)})"
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


def nothing_left(selection: Selection, request: ChatRequest) -> str:
    """Why there is nothing, if every conversation is left out."""
    found = [
        f"{tally.conversations:,} have {text}"
        if reason.startswith("too")
        else f"{tally.conversations:,}: {text}"
        for reason, text in _reasons(request).items()
        if (tally := selection.dropped[reason]).conversations
    ]
    return (
        f"no conversation is left; of {selection.total:,}, {', '.join(found)}. Change these "
        "options or give other conversations."
    )
