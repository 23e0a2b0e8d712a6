"""What a model writes in plain transformers: after a text, or as answers in a conversation.

Invariant: the ids a model answers to are those of the tokenizer's own `apply_chat_template`, as any
other Hugging Face tool builds them; nothing is ever cut off a prompt to make it fit.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TextIO

from transformers.generation.streamers import BaseStreamer

from llama_lib.errors import UserError

Turn = dict[str, str]  # role, content

_UNFINISHED = "\ufffd"  # what the bytes of half a character decode to


@dataclass(frozen=True)
class Sampling:
    """At most `max_new_tokens` after a prompt; temperature 0 always takes the likeliest token."""

    max_new_tokens: int
    temperature: float


def new_ids(
    model: Any, ids: Sequence[int], sampling: Sampling, streamer: BaseStreamer | None = None
) -> list[int]:
    """Ids that the model writes after `ids`, to an end token of its generation_config or the limit.

    Args:
        streamer: is given `ids`, then the new ones as they come.

    Raises:
        UserError: the model's context has no room for a token after `ids`.
    """
    import torch

    context = model.config.max_position_embeddings
    if len(ids) >= context:
        raise UserError(
            f"the prompt has {len(ids)} tokens: expected fewer than {context}, the model's "
            "context. Give a shorter one."
        )
    inputs = torch.tensor([list(ids)], device=model.device)
    # Greedy decoding has no use for what a generation_config may say about sampling, and warns.
    greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    with torch.no_grad():
        output = model.generate(
            input_ids=inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=min(sampling.max_new_tokens, context - len(ids)),
            pad_token_id=next(iter(end_token_ids(model)), None),  # one row: never used
            streamer=streamer,
            **(
                {"do_sample": True, "temperature": sampling.temperature}
                if sampling.temperature > 0
                else greedy
            ),
        )
    return output[0, len(ids) :].tolist()


def end_token_ids(model: Any) -> list[int]:
    """The tokens that end a text, from the generation_config: none, one or several."""
    found = model.generation_config.eos_token_id
    if found is None:
        return []
    return [found] if isinstance(found, int) else list(found)


class TextStream(BaseStreamer):
    """Writes an answer as it comes, without the blanks around it and never half a character.

    transformers' own TextStreamer decodes each line by itself, in which a tokenizer may lose the
    blanks it begins with; here what was written is the decoded whole.
    """

    def __init__(self, tokenizer: Any, write: Callable[[str], Any]) -> None:
        self.tokenizer, self.write = tokenizer, write
        self.ids: list[int] = []
        self.written = ""
        self.met_prompt = False

    @property
    def text(self) -> str:
        """The answer so far."""
        return self.tokenizer.decode(
            self.ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        ).strip()

    def put(self, value: Any) -> None:
        if self.met_prompt:
            self.ids += value.flatten().tolist()
            self._write(self.text.rstrip(_UNFINISHED).rstrip())
        self.met_prompt = True

    def end(self) -> None:
        self._write(self.text)

    def _write(self, text: str) -> None:
        if len(text) > len(self.written):
            self.write(text[len(self.written) :])
            self.written = text


# -- conversations ---------------------------------------------------------------------------------


def check_template(tokenizer: Any, name: str) -> None:
    """Raises UserError when the tokenizer of the model `name` has no chat template."""
    try:
        tokenizer.get_chat_template()
    except ValueError:
        raise UserError(
            f"{name}: its tokenizer has no chat template, so there is no way to talk to it. "
            "finetune.py makes a chat model of it (--chat_template says how turns become text); "
            "without --chat its text is continued."
        ) from None


@dataclass
class Conversation:
    """Asks a model through its chat template and remembers what was said.

    Attributes:
        one_turn: the template takes one question and one answer, so each question begins anew.

    Raises:
        UserError: the tokenizer has no chat template, or its template takes no system turn.
    """

    model: Any
    tokenizer: Any
    sampling: Sampling
    name: str  # of the model, for messages
    system: str | None = None
    turns: list[Turn] = field(default_factory=list)
    one_turn: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        check_template(self.tokenizer, self.name)
        self.prompt_ids("?")  # a template that refuses the system turn says so before any question
        self.turns = [_turn("user", "?"), _turn("assistant", "!")]
        try:
            self.prompt_ids("?")
        except UserError:
            self.one_turn = True
        self.clear()

    def clear(self) -> None:
        self.turns = []

    def prompt_ids(self, question: str) -> list[int]:
        """Ids of all that was said, the question, and what begins an answer."""
        system = [] if self.system is None else [_turn("system", self.system)]
        try:
            return self.tokenizer.apply_chat_template(
                [*system, *self.turns, _turn("user", question)],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=False,
            )
        except Exception as error:  # a template's code may raise anything
            words = str(error) or type(error).__name__
            raise UserError(
                f"{self.name}: its chat template refuses this conversation: {words}"
            ) from None

    def ask(self, question: str, write: Callable[[str], Any]) -> str | None:
        """Answers through `write`, piece by piece, and keeps both turns.

        Returns:
            Why the answer was cut, None where the model ended it.

        Raises:
            UserError: the conversation is longer than the model's context; nothing is kept.
        """
        if self.one_turn:
            self.clear()
        prompt = self.prompt_ids(question)
        stream = TextStream(self.tokenizer, write)
        ids = new_ids(self.model, prompt, self.sampling, stream)
        self.turns += [_turn("user", question), _turn("assistant", stream.text)]
        if ids and ids[-1] in end_token_ids(self.model):
            return None
        context = self.model.config.max_position_embeddings
        if len(prompt) + len(ids) == context:
            return f"cut: the model's context of {context} tokens is full"
        return f"cut after --max_new_tokens {len(ids)}"


def _turn(role: str, content: str) -> Turn:
    return {"role": role, "content": content}


def answer_once(conversation: Conversation, prompt: str) -> None:
    """One question, its answer on standard output."""
    if not prompt.strip():
        raise UserError("--prompt is empty: there is nothing to answer.")
    _answer(conversation, prompt)


def talk(conversation: Conversation) -> None:
    """A question a line from standard input, until it ends or says /exit; /new begins anew.

    Raises:
        UserError: a question has no room in the context; at a terminal this is said instead.
    """
    interactive = sys.stdin.isatty()
    _say("a line is a question; /new begins a new conversation, /exit or Ctrl-D ends", interactive)
    _say("the chat template takes one question: each begins anew", conversation.one_turn)
    for line in _terminal_lines() if interactive else _lines(sys.stdin):
        question = line.strip()
        if question == "/exit":
            return
        if question == "/new":
            conversation.clear()
        elif question:
            try:
                _answer(conversation, question)
            except UserError as error:
                if not interactive:
                    raise
                _say(f"{error} /new begins a new conversation.")


def _answer(conversation: Conversation, question: str) -> None:
    cut = conversation.ask(question, lambda piece: print(piece, end="", flush=True))
    print(flush=True)
    _say(f"({cut})", cut is not None)


def _say(text: str, wanted: bool = True) -> None:
    """To standard error: standard output is for answers."""
    if wanted:
        print(text, file=sys.stderr, flush=True)


def _terminal_lines() -> Iterator[str]:
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (gives input() editing and a history)
    with contextlib.suppress(EOFError):
        while True:
            yield input("> ")
    print()


def _lines(stream: TextIO) -> Iterator[str]:
    try:
        yield from stream
    except UnicodeDecodeError as error:
        raise UserError(f"standard input is not UTF-8 text: {error}") from None
