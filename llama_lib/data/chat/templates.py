"""Chat templates: the text of a conversation, its ids, and what each id belongs to.

Invariant: the ids are those of `tokenizer.apply_chat_template`, which serving will build; a role
comes from the place where a token's text begins, never from tokenising a part again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llama_lib.data.bad_records import BadRecord
from llama_lib.data.chat.cuts import cuts_of
from llama_lib.data.chat.messages import Example, Message, without_end
from llama_lib.data.chat.rendering import WAY_OUT, Refused, Rendered, Renderer, special_tokens
from llama_lib.data.chat.roles import ASSISTANT, TEXT
from llama_lib.data.chat.template_texts import (
    BOS,
    OPTIONAL_BOS,
    SPECIAL_TOKENS,
    TEMPLATES,
    with_fixed_date,
)
from llama_lib.data.tokenizer import adds_bos, bare_backend, tokenizer_hash
from llama_lib.errors import UserError

# Part of ChatTemplate.identity: raised when the same template gives other ids or roles.
_VERSION = 2
_CHUNK_CHARACTERS = 1 << 20  # tokenised at a time, which bounds the memory of offsets; chosen

# What special tokens look like in the template of a file, which does not name them.
_MARKER = re.compile(r"<\|[^<>|\s]+\|>")


@dataclass(frozen=True)
class TemplateChoice:
    """`added_tokens` are new to the tokenizer, so the embedding needs rows for them.

    `name` is a key of TEMPLATES, `tokenizer` or the path of a file; `note` says why, in a line.
    """

    name: str
    added_tokens: list[str]
    note: str


@dataclass(frozen=True)
class Encoded:
    """A conversation or a text as ids [tokens] and the roles [tokens] of chat/roles.py.

    Attributes:
        merged: the tokenizer joins the end of the generation prompt with the first letters of an
            answer; that token is not trained on, and serving gives another in its place.
        specials: a content holds the text of a special token, which becomes that token.
    """

    ids: npt.NDArray[np.int32]
    roles: npt.NDArray[np.uint8]
    merged: bool = False
    specials: bool = False


def use_template(tokenizer: Any, choice: str | None, kinds: Collection[str]) -> TemplateChoice:
    """Set `tokenizer.chat_template` and add the special tokens that the tokenizer lacks for it.

    `choice` is that of --chat_template; None takes the tokenizer's own, else `plain` if the data's
    `kinds` (Example.kind) are prompts with completions and texts only, else `chatml`. Raises
    UserError for a template that is not there.
    """
    note = "chosen with --chat_template"
    if choice is None:
        if tokenizer.chat_template:
            choice, note = "tokenizer", "the tokenizer's own"
        elif set(kinds) <= {"completion", "text"}:
            choice, note = "plain", "the data are prompts with completions"
        else:
            choice, note = "chatml", "the tokenizer has none and the data are conversations"
    if choice == "tokenizer":
        tokenizer.chat_template = _own_template(tokenizer)
        added: list[str] = []
    elif choice in TEMPLATES:
        text = TEMPLATES[choice]
        if choice in OPTIONAL_BOS and not adds_bos(tokenizer):
            text = text.removeprefix(BOS)
        tokenizer.chat_template = text
        added = _add(tokenizer, SPECIAL_TOKENS.get(choice, ()))
    else:
        tokenizer.chat_template = _template_file(choice)
        added = _add(tokenizer, _markers(tokenizer))
    tokenizer.chat_template, date = with_fixed_date(tokenizer.chat_template)
    if date:
        note += f"; the date that it writes is always {date}"
    return TemplateChoice(choice, added, note)


def _own_template(tokenizer: Any) -> str:
    """The tokenizer's; of several, the one called default, as apply_chat_template takes it."""
    if not tokenizer.chat_template:
        raise UserError(
            "--chat_template tokenizer: the tokenizer has no chat template. Expected one of "
            f"{', '.join(TEMPLATES)}, or a Jinja file."
        )
    try:
        template: str = tokenizer.get_chat_template()
    except ValueError:
        raise UserError(
            f"the tokenizer has several chat templates ({', '.join(tokenizer.chat_template)}) and "
            "none called default. Save the one you want to a file and pass it with --chat_template."
        ) from None
    return template


def _template_file(choice: str) -> str:
    path = Path(choice).expanduser()
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(
            f"unknown --chat_template: got {choice!r}, expected {', '.join(TEMPLATES)}, tokenizer "
            "(its own) or the path of a Jinja file."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--chat_template {choice} cannot be read: {error}.") from None
    if not text.strip():
        raise UserError(f"--chat_template {choice} is empty: expected a Jinja template.")
    return text


def _markers(tokenizer: Any) -> list[str]:
    """Texts like <|im_end|> that the template writes around turns, in order."""
    try:
        text = Renderer(tokenizer).text([Message("user", "a"), Message("assistant", "b")], True)
    except Refused:
        return []  # ChatTemplate will say what is wrong
    return list(dict.fromkeys(_MARKER.findall(text)))


def _add(tokenizer: Any, tokens: Sequence[str]) -> list[str]:
    """Make the tokens special; returns those that got a new id."""
    lacking = [token for token in tokens if token not in special_tokens(tokenizer)]
    if not lacking:
        return []
    known = tokenizer.get_vocab()
    tokenizer.add_special_tokens(
        {"additional_special_tokens": lacking}, replace_additional_special_tokens=False
    )
    return [token for token in lacking if token not in known]


class ChatTemplate:
    """Encodes with `tokenizer.chat_template`, which must be set (use_template).

    `end_token_ids` are what a server has to stop at: the end of an answer and EOS. Making one
    raises UserError for a template that cannot be trained with. A conversation that the template
    refuses or rewrites is a BadRecord of `encode`, `encode_many` and `prompt_ids`. `note` is a
    warning in one line, or empty.
    """

    end_token_ids: list[int]
    note: str

    def __init__(self, tokenizer: Any) -> None:
        from tokenizers import processors

        self._tokenizer = tokenizer
        if not tokenizer.chat_template:
            raise UserError("the tokenizer has no chat template: choose one with --chat_template.")
        if tokenizer.eos_token_id is None:
            raise UserError("the tokenizer has no eos_token. Set it in its tokenizer_config.json.")
        self._backend = bare_backend(tokenizer)
        # Nothing is added anyway, but a post-processor may leave blanks out of the offsets.
        self._backend.post_processor = processors.TemplateProcessing(single="$A")
        self._prefix = [tokenizer.bos_token_id] if adds_bos(tokenizer) else []
        self._renderer = Renderer(tokenizer)
        self._ends = [tokenizer.eos_token]
        self._probe()

    def _probe(self) -> None:
        """Set the end tokens; raises UserError unless one and two exchanges can be trained on."""
        exchange = (Message("user", "What is it?"), Message("assistant", "It is \u00e9."))
        roles = ("user", "assistant")
        try:
            frame = self._renderer.frame(roles)
            own = self.encode(Example(messages=exchange)).ids.tolist()
            # Templates for one exchange are right to refuse two.
            with contextlib.suppress(Refused):
                self._renderer.frame(roles * 2)
        except BadRecord as error:
            others = ", ".join(name for name in TEMPLATES if name != "chatml")
            raise UserError(
                f"{error}. Training needs a template that only writes text around the turns, "
                "not as those of models that think (Qwen3, DeepSeek-R1): choose "
                f"{WAY_OUT} (or {others})."
            ) from None
        turns = [{"role": turn.role, "content": turn.content} for turn in exchange]
        expected = self._tokenizer.apply_chat_template(turns)
        if own != expected:
            raise UserError(
                f"the tokenizer does not tokenise as its tokenizer.json says: got {expected}, "
                f"expected {own}. Choose another with --tokenizer."
            )
        prompt = self.prompt_ids(exchange[:1])
        self.note = ""
        if own[: len(prompt)] != prompt:
            self.note = (
                "the tokenizer joins the end of the generation prompt with the answer: in training "
                "the model sees other ids in front of an answer than when it is used"
            )
        self._ends = list(dict.fromkeys([self._renderer.end_token(frame), *self._ends]))
        self.end_token_ids = self._tokenizer.convert_tokens_to_ids(self._ends)

    @cached_property
    def identity(self) -> str:
        """Hash of all that decides ids and roles; it does not change from process to process."""
        content = {
            "version": _VERSION,
            "template": self._tokenizer.chat_template,
            "tokenizer": tokenizer_hash(self._tokenizer),
            "special": self._tokenizer.special_tokens_map,
            "prefix": self._prefix,
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def encode(self, example: Example) -> Encoded:
        """The ids and roles of one conversation or text.

        An end token at the end of an answer or a text is taken off: it is there once anyway.
        """
        return self.encode_many([example])[0]

    def encode_many(self, examples: Iterable[Example]) -> list[Encoded]:
        """As `encode`, many times faster for many; raises BadRecord for the first bad one.

        To know which one it is, call `encode` for each.
        """
        encoded: list[Encoded] = []
        for chunk in _chunks(map(self._ending_once, examples)):
            rendered = self._rendered(chunk)
            texts = [each.text for each in rendered]
            encodings = self._backend.encode_batch(texts, add_special_tokens=False)
            encoded += map(self._encoded, chunk, rendered, encodings)
        return encoded

    def _ending_once(self, example: Example) -> Example:
        """Without the ends that the template writes, or that are written behind a text."""
        if example.text is not None:
            return replace(example, text=without_end(example.text, [self._tokenizer.eos_token]))
        messages = list(example.messages)
        for index, message in enumerate(messages):
            if message.role == "assistant":
                content = without_end(message.content, self._ends)
                if content is not message.content:
                    if not content.strip():
                        raise BadRecord(f"turn {index + 1} (assistant) is empty but for its end")
                    messages[index] = replace(message, content=content)
        return replace(example, messages=tuple(messages))

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """The ids of turns that end with the user's, with the generation prompt behind them."""
        text = self._renderer.text(messages, generation_prompt=True)
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids

    def _rendered(self, examples: Sequence[Example]) -> list[Rendered]:
        turns = [example.messages for example in examples if example.text is None]
        conversations = iter(self._renderer.rendered(turns))
        return [
            next(conversations) if example.text is None else Rendered(example.text, [0], [TEXT])
            for example in examples
        ]

    def _encoded(self, example: Example, rendered: Rendered, encoding: Any) -> Encoded:
        ids = encoding.ids
        if example.text is not None:
            prefix = [] if ids[:1] == self._prefix else self._prefix
            ids = [*prefix, *ids, self._tokenizer.eos_token_id]
            roles = np.full(len(ids), TEXT, np.uint8)
            specials = self._renderer.has_special(example.text)
            return Encoded(np.array(ids, np.int32), roles, specials=specials)
        cuts, over = cuts_of(encoding, rendered.starts, len(rendered.text))
        roles = np.empty(len(ids), np.uint8)
        for role, begin, end in zip(rendered.roles, cuts, cuts[1:], strict=False):
            roles[begin:end] = role
        return Encoded(
            np.array(ids, np.int32),
            roles,
            merged=any(
                role == ASSISTANT and cut for role, cut in zip(rendered.roles, over, strict=True)
            ),
            specials=any(self._renderer.has_special(turn.content) for turn in example.messages),
        )


def _chunks(examples: Iterable[Example]) -> Iterator[list[Example]]:
    chunk: list[Example] = []
    size = 0
    for example in examples:
        chunk.append(example)
        size += len(example.text or "") + sum(len(turn.content) for turn in example.messages)
        if size >= _CHUNK_CHARACTERS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk
