"""Which characters of a rendered conversation are whose, for any Jinja template.

Invariant: the text is what `tokenizer.apply_chat_template` renders, character for character; a
template that does more than write text around the contents of the turns is refused.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from llama_lib.data.bad_records import BadRecord
from llama_lib.data.chat.messages import Message
from llama_lib.data.chat.roles import ROLE_NUMBERS, TEMPLATE, UNTRAINED

# Templates copy contents as they are or without the blanks at their ends; on one side only where
# another text is joined to the content first, as Llama 2's joins the system message.
# The key says whether the blanks in front of the content stay, and those behind it.
_TRIMS: dict[tuple[bool, bool], Callable[[str], str]] = {
    (True, True): str,
    (True, False): str.rstrip,
    (False, True): str.lstrip,
    (False, False): str.strip,
}
# Of different lengths, so that blanks of the template cannot be taken for them.
_LEFT, _RIGHT = "\n \t", " \n\t \n"
# Stands for a content; letters of both cases, which a template may change.
_MARK = "Qx{:06d}xQ"
_MARKS = re.compile(r"(Qx\d{6}xQ)")
_SHOWN = 30  # characters of a difference in a message; chosen
# Turns of a user and an assistant, of which each order is looked at by itself, which takes several
# renderings; those behind them are written as the last two of these. Chosen.
_OWN_TURNS = 8
# What to do about a template that does more than write text around the turns.
WAY_OUT = "--chat_template chatml, or a Jinja file of your own that writes each turn as it is"


class Refused(BadRecord):
    """The template itself raises an error on a conversation."""


@dataclass(frozen=True)
class Rendered:
    """A text, and the character at which each span begins with what it belongs to (chat/roles.py).

    `starts` and `roles` have the same length; `starts` ascends from 0 and may repeat.
    """

    text: str
    starts: list[int]
    roles: list[int]


@dataclass(frozen=True)
class Frame:
    """What a template writes around the contents of conversations with the same roles.

    `literals` are one more than the turns. Of the literal before a content, the last `leads`
    characters belong to the turn; of the one behind it, the first `tails`. `sample` is a rendering
    of which the first `sure` characters must stay as they are when turns follow.
    """

    roles: tuple[int, ...]
    literals: tuple[str, ...]
    trims: tuple[Callable[[str], str], ...]
    leads: tuple[int, ...]
    tails: tuple[int, ...]
    sample: str
    sure: int

    def filled(self, messages: Sequence[Message]) -> Rendered:
        """The conversation of these turns, of the frame's roles."""
        parts = [self.literals[0]]
        starts, roles = [0], [TEMPLATE]
        position = len(parts[0])
        for index, message in enumerate(messages):
            content = self.trims[index](message.content)
            literal = self.literals[index + 1]
            starts.append(position - self.leads[index])
            position += len(content)
            starts.append(position + self.tails[index])
            roles += (self.roles[index] if message.trained else UNTRAINED, TEMPLATE)
            position += len(literal)
            parts += (content, literal)
        return Rendered("".join(parts), starts, roles)

    def extended(self, exchanges: int) -> Frame:
        """With so many more turns of a user and an assistant, written as the last two are."""
        last = self.literals[-1]
        return replace(
            self,
            roles=self.roles + self.roles[-2:] * exchanges,
            literals=(*self.literals[:-1], *self.literals[-3:-1] * exchanges, last),
            trims=self.trims + self.trims[-2:] * exchanges,
            leads=self.leads + self.leads[-2:] * exchanges,
            tails=self.tails + self.tails[-2:] * exchanges,
        )


class Renderer:
    """Renders with a tokenizer's chat template; keeps the frames of the orders of roles it met."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        # Longest first: one may begin with another.
        special = sorted(map(re.escape, special_tokens(tokenizer)), key=len, reverse=True)
        self._special = re.compile("|".join(special) or r"(?!)")
        self._frames: dict[tuple[str, ...], Frame | BadRecord] = {}

    def text(self, messages: Sequence[Message], generation_prompt: bool = False) -> str:
        """What apply_chat_template renders. Raises Refused, with the template's own words."""
        return self._texts([messages], generation_prompt)[0]

    def rendered(self, conversations: Sequence[Sequence[Message]]) -> list[Rendered]:
        """Answered conversations with their spans. Raises BadRecord, or Refused.

        Each one is held against the template, which may depend on what the turns say.
        """
        try:
            texts = self._texts(conversations)
        except Refused:
            texts = []
        if texts:
            return list(map(self._rendered, conversations, texts))
        return [self._rendered(messages, self.text(messages)) for messages in conversations]

    def _texts(
        self, conversations: Sequence[Sequence[Message]], generation_prompt: bool = False
    ) -> list[str]:
        turns = [
            [{"role": message.role, "content": message.content} for message in messages]
            for messages in conversations
        ]
        try:
            texts: list[str] = self.tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=generation_prompt
            )
        except Exception as error:  # a template's code may raise anything
            # The caller's sentence goes on.
            words = str(error).rstrip(".")
            raise Refused(f"the chat template refuses the conversation: {words}") from None
        return texts

    def _rendered(self, messages: Sequence[Message], text: str) -> Rendered:
        rendered = self.frame(tuple(message.role for message in messages)).filled(messages)
        if rendered.text != text:
            difference = _difference(rendered.text, text)
            raise BadRecord(f"the chat template rewrites a turn: {difference}; use {WAY_OUT}")
        return rendered

    def has_special(self, text: str) -> bool:
        """Whether the text of a special token is in it."""
        return self._special.search(text) is not None

    def frame(self, roles: tuple[str, ...]) -> Frame:
        """The frame of conversations with these roles, the last of which is `assistant`.

        Raises BadRecord if the template cannot be trained with on them.
        """
        own = _OWN_TURNS + (roles[:1] == ("system",))
        more = (len(roles) - own) // 2
        if more > 0 and roles[own:] == ("user", "assistant") * more:
            return self.frame(roles[:own]).extended(more)
        if roles not in self._frames:
            earlier: Frame | None = None
            for index, role in enumerate(roles):
                part = roles[: index + 1]
                if role == "assistant" or part == roles:
                    if part not in self._frames:
                        self._frames[part] = self._made(part, earlier)
                    found = self._frames[part]
                    if isinstance(found, BadRecord):
                        self._frames[roles] = found
                        break
                    earlier = found
        frame = self._frames[roles]
        if isinstance(frame, BadRecord):
            raise frame
        return frame

    def _made(self, roles: tuple[str, ...], earlier: Frame | None) -> Frame | BadRecord:
        try:
            return self._frame(roles, earlier)
        except BadRecord as error:
            return error

    def _frame(self, roles: tuple[str, ...], earlier: Frame | None) -> Frame:
        """Made from renderings of contents that occur in no template."""
        if roles[-1] != "assistant":
            raise BadRecord("the last turn is not an answer of the assistant")
        marks = [_MARK.format(index) for index in range(len(roles))]
        turns = [Message(role, mark) for role, mark in zip(roles, marks, strict=True)]
        sample = self.text(turns)
        literals = _split(sample, roles, marks)
        padded = [Message(turn.role, _LEFT + turn.content + _RIGHT) for turn in turns]
        trims = _trims(literals, _split(self.text(padded), roles, marks), roles)

        # The answer begins where the generation prompt ends.
        prompt = self.text(turns[:-1], generation_prompt=True)
        answer = len(sample) - len(literals[-1]) - len(marks[-1])
        if not sample.startswith(prompt) or not answer - len(literals[-2]) <= len(prompt) <= answer:
            raise BadRecord(
                "the chat template asks for an answer in another way than it writes answered "
                f"turns: {_difference(prompt, sample[: len(prompt)])}"
            )
        end = self._special.search(literals[-1])
        if end is None:
            raise BadRecord(
                f"the chat template writes {literals[-1]!r} behind an answer, in which there is no "
                "special token of the tokenizer: the model would not learn to stop"
            )
        # Only a special token that follows at once ends another turn; later ones begin the next.
        matches = [self._special.match(literal) for literal in literals[1:]]
        tails = [match.end() if match else 0 for match in matches]
        leads = [0] * len(roles)
        if earlier is not None:
            known = len(earlier.roles)
            if sample[: earlier.sure] != earlier.sample[: earlier.sure] or (
                trims[:known] != earlier.trims
            ):
                raise BadRecord(
                    "the chat template rewrites earlier turns when others follow: "
                    + _difference(earlier.sample[: earlier.sure], sample[: earlier.sure])
                )
            leads[:known] = earlier.leads
            tails[:known] = earlier.tails
        leads[-1] = answer - len(prompt)
        tails[-1] = end.end()
        return Frame(
            roles=tuple(ROLE_NUMBERS[role] for role in roles),
            literals=tuple(literals),
            trims=trims,
            leads=tuple(leads),
            tails=tuple(tails),
            sample=sample,
            sure=answer + len(marks[-1]) + tails[-1],
        )

    def end_token(self, frame: Frame) -> str:
        """The special token that ends the answers."""
        found = self._special.search(frame.literals[-1])
        assert found is not None  # else there would be no frame
        return found.group()


def special_tokens(tokenizer: Any) -> list[str]:
    """The texts that become one token wherever they stand, and that are not shown to readers."""
    added = tokenizer.added_tokens_decoder.values()
    texts = {token.content for token in added if token.special}
    return sorted(texts | set(tokenizer.all_special_tokens))


def _split(text: str, roles: Sequence[str], marks: Sequence[str]) -> list[str]:
    """What stands around the marks; raises BadRecord if one is not there once, in its place."""
    parts = _MARKS.split(text)
    found = parts[1::2]
    if found == list(marks):
        return parts[::2]
    counts = Counter(found)
    for index, mark in enumerate(marks):
        if counts[mark] != 1:
            how = "more than once" if counts[mark] else "not at all or rewritten"
            raise BadRecord(
                f"the chat template writes turn {index + 1} ({roles[index]}) {how} in a "
                f"conversation of {len(roles)} turns"
            )
    raise BadRecord("the chat template writes the turns in another order")


def _trims(
    literals: Sequence[str], padded: Sequence[str], roles: Sequence[str]
) -> tuple[Callable[[str], str], ...]:
    """How each content is copied, from what stands around it without and with blanks."""
    gaps = []
    for index, (literal, seen) in enumerate(zip(literals, padded, strict=True)):
        gap = {
            right + literal + left: (bool(right), bool(left))
            for right in ("", _RIGHT)
            for left in ("", _LEFT)
        }.get(seen)
        if gap is None:
            turn = min(index, len(roles) - 1)
            raise BadRecord(
                f"the chat template changes the blanks of turn {turn + 1} ({roles[turn]}): "
                "expected the content as it is, or without the blanks at its ends"
            )
        gaps.append(gap)
    return tuple(_TRIMS[before[1], behind[0]] for before, behind in pairwise(gaps))


def _difference(expected: str, got: str) -> str:
    """Where two texts part, for a message."""
    pairs = zip(expected, got, strict=False)
    same = next((index for index, (a, b) in enumerate(pairs) if a != b), None)
    place = min(len(expected), len(got)) if same is None else same
    begin = max(0, place - _SHOWN)
    return (
        f"expected {expected[begin : place + _SHOWN]!r}, got {got[begin : place + _SHOWN]!r} "
        f"at character {place}"
    )
