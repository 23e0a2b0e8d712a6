"""`inspect --labels`: conversations with the tokens that fine-tuning trains on marked.

Invariant: ids, roles and weights come from the functions that training calls; the text shown is
the decoded whole, marks added.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llama_lib.data.bad_records import BadRecord
from llama_lib.data.chat.encode import is_table
from llama_lib.data.chat.labels import label_weights
from llama_lib.data.chat.records import ExampleFile, resolve_conversations
from llama_lib.data.chat.roles import ROLE_NAMES
from llama_lib.data.chat.templates import ChatTemplate, use_template
from llama_lib.data.chat.training import kinds_of
from llama_lib.data.entries import parse_entries
from llama_lib.data.tokenizer import load_tokenizer
from llama_lib.errors import UserError
from llama_lib.option_tree import ModelOptions

_OPTIONS = (
    *("chat_template", "loss_role", "other_role_weight", "number", "task_name", "colour"),
    "skip_bad_lines",
)
_COLUMNS = "{:<12} {:>10} {:>12} {:>10}"


@dataclass(frozen=True)
class Marks:
    """What stands before and after tokens that count fully, and those that count less."""

    whole: tuple[str, str]
    part: tuple[str, str]
    by_line: bool = False

    def around(self, text: str, weight: float) -> str:
        if not weight:
            return text
        begin, end = self.whole if weight == 1 else self.part
        if self.by_line:
            return "\n".join(f"{begin}{line}{end}" if line else "" for line in text.split("\n"))
        return begin + text + end


# Backgrounds, because blanks have no other colour; a terminal would fill the line behind a newline.
COLOURS = Marks(("\x1b[30;42m", "\x1b[0m"), ("\x1b[30;43m", "\x1b[0m"), by_line=True)
BRACKETS = Marks(("[[", "]]"), ("((", "))"))


@dataclass(frozen=True)
class Labelled:
    """One conversation as training sees it: ids, roles and label weights [tokens].

    `place` is its file and line; `tokens_before` it may have been cut.
    """

    place: str
    ids: npt.NDArray[np.int32]
    roles: npt.NDArray[np.uint8]
    weights: npt.NDArray[np.float32]
    tokens_before: int

    def headline(self) -> str:
        labels = np.count_nonzero(self.weights)
        line = f"{self.place}: {len(self.ids):,} tokens, {labels:,} trained on"
        if len(self.ids) < self.tokens_before:
            line += f", cut from {self.tokens_before:,} tokens"
        return line if labels else f"{line}; finetune.py leaves it out"


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of --labels; False or None where they are not given."""
    add = parser.add_argument_group("conversations").add_argument
    add("--labels", action="store_true", help="show conversations, what is trained on marked")
    add("--number", type=int, help="how many, from the first on (1)")
    add("--chat_template", help="as of finetune.py (none: chosen as there)")
    add("--loss_role", choices=("assistant", "user", "all"), help="as of finetune.py (assistant)")
    add("--other_role_weight", type=float, help="as of finetune.py (0)")
    add("--task_name", help="as of finetune.py")
    add("--skip_bad_lines", action="store_true", help="pass over bad records")
    add("--colour", choices=("auto", "always", "never"), help="else brackets (auto: a terminal's)")


def option_problems(arguments: argparse.Namespace) -> list[str]:
    """What is wrong with the options of --labels, or that they are given without it."""
    if not arguments.labels:
        given = [f"--{name}" for name in _OPTIONS if getattr(arguments, name) not in (None, False)]
        return [f"{', '.join(given)} can only be given with --labels."] if given else []
    problems = []
    if arguments.tokenizer is None:
        problems.append("--labels needs the tokenizer of the model: give --tokenizer FOLDER.")
    if arguments.number is not None and arguments.number < 1:
        problems.append(f"--number {arguments.number}: expected at least 1.")
    if arguments.max_length is not None and arguments.max_length < 2:
        problems.append(f"-l {arguments.max_length}: expected at least 2.")
    if not 0 <= (arguments.other_role_weight or 0) <= 1:
        problems.append(f"--other_role_weight {arguments.other_role_weight}: expected 0 to 1.")
    return problems


def show_labels(arguments: argparse.Namespace) -> None:
    """Print conversations with their labels marked, and what each role contributes.

    Raises:
        UserError: the data, the tokenizer or the template cannot be used.
    """
    tokenizer = load_tokenizer(arguments.tokenizer, arguments.cache_dir)
    kinds: set[str] = set()
    if arguments.chat_template is None and not tokenizer.chat_template:
        kinds = kinds_of([arguments.folder], arguments.task_name, arguments.cache_dir)
    choice = use_template(tokenizer, arguments.chat_template, kinds)
    template = ChatTemplate(tokenizer)
    shown = list(itertools.islice(labelled(template, arguments), arguments.number or 1))
    if not shown:
        raise UserError(f"{arguments.folder} holds no conversation that the chat template takes.")
    in_colour = arguments.colour == "always" or (
        arguments.colour != "never" and sys.stdout.isatty()
    )
    marks = COLOURS if in_colour else BRACKETS
    ends = ", ".join(tokenizer.convert_ids_to_tokens(template.end_token_ids))
    print(f"chat template {choice.name} ({choice.note}); answers end with {ends}")
    legend = f"trained on: {marks.around('these', 1)}"
    if arguments.other_role_weight:
        weight = arguments.other_role_weight
        legend += f"; counting {weight:g}: {marks.around('these', weight)}"
    print(legend)
    for each in shown:
        print(f"\n{each.headline()}\n{marked_text(tokenizer, each.ids, each.weights, marks)}")
    print("\n" + role_table(shown))


def labelled(template: ChatTemplate, arguments: argparse.Namespace) -> Iterator[Labelled]:
    """The conversations of the data, in order, cut and weighed as `arguments` say."""
    cache_dir = Path(arguments.cache_dir).expanduser()
    # How many of them a run takes and what they weigh does not change what they look like.
    names = [entry.name for entry in parse_entries([arguments.folder])]
    sources = resolve_conversations(names, arguments.task_name, cache_dir)
    max_length = arguments.max_length or _default_length(arguments.tokenizer)
    for path in (path for source in sources for path in source.files):
        for number, example in ExampleFile(path, arguments.skip_bad_lines):
            place = f"{path} {'row' if is_table(path) else 'line'} {number}"
            try:
                encoded = template.encode(example)
            except BadRecord as bad:
                if arguments.skip_bad_lines:
                    continue
                raise UserError(
                    f"{place}: {bad}. Mend it, or pass over such records with --skip_bad_lines."
                ) from bad
            ids, roles = encoded.ids[:max_length], encoded.roles[:max_length]
            weights = label_weights(
                roles, arguments.loss_role or "assistant", arguments.other_role_weight or 0.0
            )
            yield Labelled(place, ids, roles, weights, len(encoded.ids))


def _default_length(tokenizer: str) -> int:
    """--max_length of finetune.py where none is typed, of a model beside its tokenizer."""
    default = ModelOptions().max_length
    config = Path(tokenizer).expanduser() / "config.json"
    if not config.is_file():
        return default
    return min(
        default, json.loads(config.read_text("utf-8")).get("max_position_embeddings", default)
    )


def marked_text(
    tokenizer: Any, ids: npt.NDArray[np.int32], weights: npt.NDArray[np.float32], marks: Marks
) -> str:
    """The decoded ids [tokens], special tokens shown, with marks where their weights are not 0."""

    def decoded(length: int) -> str:
        return tokenizer.decode(
            ids[:length].tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )

    whole, begin = decoded(len(ids)), 0
    borders = [*(np.flatnonzero(np.diff(weights)) + 1).tolist(), len(ids)]
    pieces = []
    for first, border in itertools.pairwise([0, *borders]):
        # Of a run of tokens alone some tokenizers would lose the blank in front.
        end = _common_length(whole, decoded(border))
        pieces.append(marks.around(_printable(whole[begin:end]), float(weights[first])))
        begin = end
    return "".join(pieces)


def _common_length(one: str, other: str) -> int:
    """Characters in which both begin: a run may end within a character, which decodes as none."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))


def _printable(text: str) -> str:
    """Without what a terminal would obey: data may hold any character."""
    return "".join(
        char if char.isprintable() or char in "\n\t" else ascii(char)[1:-1] for char in text
    )


def role_table(shown: Sequence[Labelled]) -> str:
    """Tokens of each role, how many of them are trained on, and what these count together."""
    roles = np.concatenate([each.roles for each in shown])
    weights = np.concatenate([each.weights for each in shown])
    lines = [_COLUMNS.format("role", "tokens", "trained on", "counting")]
    for number, name in enumerate(ROLE_NAMES):
        if (of_role := roles == number).any():
            lines.append(_table_line(name, weights[of_role]))
    return "\n".join([*lines, _table_line("all", weights)])


def _table_line(name: str, weights: npt.NDArray[np.float32]) -> str:
    labels = np.count_nonzero(weights)
    return _COLUMNS.format(name, f"{len(weights):,}", f"{labels:,}", f"{weights.sum():,.1f}")
