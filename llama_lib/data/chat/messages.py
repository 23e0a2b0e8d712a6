"""Conversations: turns of a system, a user and an assistant, checked when they are made.

Invariant: an Example either has text, or user and assistant in turn, each with something to say,
from a user to an assistant; a system may speak first.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from llama_lib.data.bad_records import BadRecord, check_characters

ROLES = ("system", "user", "assistant")

# Ends the answers of data made with GPT-3; the template gives every answer its own end.
END_OF_TEXT = "<|endoftext|>"

# What roles are called in published data: OpenAI's, ShareGPT's exports, OpenAssistant, Gemma.
_ROLE_OF = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bard", "model"), "assistant"),
}
_KNOWN_ROLES = "system (developer), user (human, prompter) or assistant (gpt, chatgpt, bard, model)"
# Of a turn, where OpenAI's format says which tools the assistant calls.
_CALLS = ("tool_calls", "function_call")


@dataclass(frozen=True)
class Message:
    """One turn; `role` is one of ROLES. No loss is taken of one that is not `trained`."""

    role: str
    content: str
    trained: bool = True


@dataclass(frozen=True)
class Example:
    """What one record trains on: `messages`, or `text` as it stands.

    Attributes:
        messages: an optional system turn, then user and assistant in turn; the last is an
            assistant's.
        text: a document without turns.
        kind: the shape of its record: conversation, completion, alpaca or text.
        cut_turns: user turns at the end that nobody answered, left out.
    """

    messages: tuple[Message, ...] = ()
    text: str | None = None
    kind: str = "conversation"
    cut_turns: int = 0


def conversation(turns: Any, system: str | None = None, given: int = 0) -> Example:
    """The Example of a list of turns, `role` + `content` or `from` + `value` each.

    Args:
        turns: or a dict of lists, which is how Hugging Face's Sequence keeps a list of dicts. A
            turn whose `weight` is 0 is not trained on.
        system: what a system says before the first turn, if anything.
        given: answers among so many turns from the first on are not trained on.

    Raises:
        BadRecord: naming the turn, counted from 1 (without `system`), and what is wrong with it.
    """
    turns = turn_list(turns)
    messages = [_message(number, turn) for number, turn in enumerate(turns, start=1)]
    for index, message in enumerate(messages[:given]):
        if message.role == "assistant":
            messages[index] = replace(message, trained=False)
    num_turns = len(messages)
    if not num_turns:
        raise BadRecord("the conversation has no turns")
    while messages and messages[-1].role == "user":
        messages.pop()
    if all(message.role != "assistant" for message in messages):
        raise BadRecord("the conversation has no turn of an assistant")
    if system is not None:
        if messages[0].role == "system":
            raise BadRecord("turn 1: a system turn, beside the column `system`")
        messages.insert(0, Message("system", system))
    _check_order([message.role for message in messages], first=1 if system is None else 0)
    cut = num_turns + (system is not None) - len(messages)
    return Example(tuple(messages), cut_turns=cut)


def exchange(prompt: Message, answer: Message, system: str | None, kind: str) -> Example:
    """The Example of one question and its answer."""
    begin = () if system is None else (Message("system", system),)
    return Example((*begin, prompt, answer), kind=kind)


def turn_list(turns: Any) -> list[Any]:
    """The turns of a list, or of a dict of lists. Raises BadRecord for anything else."""
    if isinstance(turns, dict):
        columns = {name: column for name, column in turns.items() if column is not None}
        if columns and all(isinstance(column, list) for column in columns.values()):
            lengths = {name: len(column) for name, column in columns.items()}
            if len(set(lengths.values())) > 1:
                raise BadRecord(f"the lists of the conversation differ in length: {lengths}")
            return [
                dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)
            ]
    if not isinstance(turns, list):
        raise BadRecord(f"the conversation is {_kind(turns)}, expected a list of turns")
    return turns


def without_end(text: str, ends: Sequence[str] = (END_OF_TEXT,)) -> str:
    """The text without one of the marks `ends` at its end, nor the blanks behind that."""
    bare = text.rstrip()
    for end in ends:
        if bare.endswith(end):
            return bare.removesuffix(end)
    return text


def answered(content: Any, where: str) -> str:
    """As `said`, of an answer, whose end mark is taken off."""
    text = said(content, where)
    bare = without_end(text)
    return text if bare is text else said(bare, where)


def said(content: Any, where: str) -> str:
    """The content of a turn. Raises BadRecord, beginning with `where`, if it says nothing."""
    if isinstance(content, list):
        content = "".join(_text_parts(content, where))
    if not isinstance(content, str):
        raise BadRecord(f"{where} is {_kind(content)}, not a string")
    if not content or content.isspace():
        raise BadRecord(f"{where} is empty")
    try:
        check_characters(content)
    except BadRecord as bad:
        raise BadRecord(f"{where}: {bad}") from bad
    return content


def _message(number: int, turn: Any) -> Message:
    if not isinstance(turn, dict):
        raise BadRecord(f"turn {number} is {_kind(turn)}, expected an object")
    # A table has every column in every turn, null where there is nothing.
    name, content = turn.get("role"), turn.get("content")
    if name is None:
        name = turn.get("from")
    if content is None:
        content = turn.get("value")
    if name is None:
        found = ", ".join(sorted(turn)) or "nothing"
        raise BadRecord(f"turn {number} has no `role` (or `from`); found {found}")
    role = _ROLE_OF.get(name.lower()) if isinstance(name, str) else None
    if role is None:
        raise BadRecord(f"turn {number}: unknown role {name!r}; expected {_KNOWN_ROLES}")
    where = f"turn {number} ({role})"
    for key in _CALLS:
        if turn.get(key):
            raise BadRecord(f"{where} has `{key}`: calls of tools cannot be trained on")
    if "content" not in turn and "value" not in turn:
        raise BadRecord(f"{where} has no `content` (or `value`); found {', '.join(sorted(turn))}")
    content = answered(content, where) if role == "assistant" else said(content, where)
    return Message(role, content, _is_trained(turn.get("weight"), where))


def _is_trained(weight: Any, where: str) -> bool:
    """What OpenAI's `weight` says; none is 1."""
    if weight is not None and weight not in (0, 1):
        raise BadRecord(f"{where} has the weight {weight!r}, expected 0 (not trained on) or 1")
    return weight != 0


def _text_parts(parts: list[Any], where: str) -> list[str]:
    """The texts of contents that could also hold pictures."""
    texts = []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else _kind(part)
        if kind != "text" or not isinstance(part.get("text"), str):
            raise BadRecord(f"{where} has a part that is no text: {kind}")
        texts.append(part["text"])
    return texts


def _check_order(roles: list[str], first: int) -> None:
    """`first` is the number of the first role."""
    talk = roles[1:] if roles[0] == "system" else roles
    start = first + len(roles) - len(talk)
    if "system" in talk:
        number = start + talk.index("system")
        raise BadRecord(f"turn {number}: a system turn can only be the first")
    if talk[0] != "user":
        raise BadRecord(f"turn {start}: the assistant speaks first, expected the user")
    for number, (before, role) in enumerate(pairwise(talk), start=start + 1):
        if role == before:
            raise BadRecord(
                f"turn {number}: {role} after {before}; user and assistant must take turns"
            )


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__
