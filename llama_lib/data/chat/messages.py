"""Conversations: turns of a system, a user and an assistant, checked when they are made.

Invariant: an Example either has text, or user and assistant in turn, each with something to say,
from a user to an assistant; a system may speak first.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from llama_lib.data.bad_records import BadRecord, check_characters

ROLES = ("system", "user", "assistant")

# What roles are called in published data: ShareGPT's exports, OpenAssistant, Gemma.
_ROLE_OF = {
    "system": "system",
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bard", "model"), "assistant"),
}
_KNOWN_ROLES = "system, user (human, prompter) or assistant (gpt, chatgpt, bard, model)"


@dataclass(frozen=True)
class Message:
    """One turn; `role` is one of ROLES."""

    role: str
    content: str


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


def conversation(turns: Any, system: str | None = None) -> Example:
    """The Example of a list of turns, `role` + `content` or `from` + `value` each.

    Args:
        system: what a system says before the first turn, if anything.

    Raises:
        BadRecord: naming the turn, counted from 1 (without `system`), and what is wrong with it.
    """
    if not isinstance(turns, list):
        raise BadRecord(f"the conversation is {_kind(turns)}, expected a list of turns")
    messages = [_message(number, turn) for number, turn in enumerate(turns, start=1)]
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
    return Message(role, said(content, f"turn {number} ({role})"))


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
