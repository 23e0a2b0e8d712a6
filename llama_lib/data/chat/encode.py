"""Files of conversations to batches of ids and roles: one process reads, several encode.

Invariant: the batches' contents, and the first error, are the same for any number of processes.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llama_lib.data.bad_records import BadRecord
from llama_lib.data.chat.messages import Example
from llama_lib.data.chat.records import ExampleFile
from llama_lib.data.chat.roles import ROLE_NAMES
from llama_lib.data.chat.templates import ChatTemplate
from llama_lib.data.readers import file_format
from llama_lib.data.tokenise import text_hash
from llama_lib.data.tokenizer import load_tokenizer
from llama_lib.data.workers import Report, WorkerPool
from llama_lib.errors import LlamaLibError, UserError

# What is known of a conversation: a hash of what is said in it; its line or row in its file, from
# 1; and how many tokens of each role (chat/roles.py) can be labels, which are all but the first.
CONVERSATION = np.dtype([("hash", "<u8"), ("number", "<u8"), ("labels", "<u4", (len(ROLE_NAMES),))])
# Characters of a batch: enough that the message to a process does not count. Chosen.
_BATCH_CHARACTERS = 1 << 18
# Another process is started for so much of the files; before, this one is as soon done. Chosen.
_WORKER_BYTES = 4 << 20


@dataclass
class Counts:
    """What became of records besides being encoded, over a batch or a file.

    `bad` records were left out, one of them for `last_bad`. `cut_turns` are the user turns at
    the end of conversations that nobody answered; `first_cut` is the first such record's number.
    """

    bad: int = 0
    last_bad: str = ""
    cut_turns: int = 0
    first_cut: int = 0

    def add(self, later: Counts) -> None:
        self.bad += later.bad
        self.last_bad = later.last_bad or self.last_bad
        self.cut_turns += later.cut_turns
        self.first_cut = self.first_cut or later.first_cut


@dataclass(frozen=True)
class Batch:
    """Conversations of one file, one after another: ids and roles [tokens], lengths [batch].

    `about` [batch] is of the type CONVERSATION. `position` is how many bytes of the file are read;
    `is_last` ends the file.
    """

    ids: npt.NDArray[np.int32]
    roles: npt.NDArray[np.uint8]
    lengths: npt.NDArray[np.int64]
    about: npt.NDArray[Any]
    counts: Counts
    position: int
    is_last: bool


@dataclass(frozen=True)
class _Read:
    """A batch before it is encoded; `error` ends the reading after it."""

    path: Path
    examples: list[Example] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    counts: Counts = field(default_factory=Counts)
    position: int = 0
    is_last: bool = False
    error: LlamaLibError | None = None


@dataclass(frozen=True)
class Encoding:
    """How to encode, to be sent to other processes. The folder `tokenizer` has a chat template.

    `apart`: in a process of its own, which needs no model.
    """

    tokenizer: str
    cache_dir: str
    skip_bad_lines: bool
    apart: bool = False

    def __call__(self) -> Callable[[_Read, Report], Batch]:
        if self.apart:
            # A tokenizer alone loads without torch, in a third of the time and memory.
            os.environ.update(USE_TORCH="0", TRANSFORMERS_NO_ADVISORY_WARNINGS="1")
        template = ChatTemplate(load_tokenizer(self.tokenizer, self.cache_dir))
        return lambda read, report: _encoded(template, read, self.skip_bad_lines)


def encode_files(files: Sequence[Path], encoding: Encoding, workers: int) -> Iterator[Batch]:
    """The batches of all files, in order.

    Raises:
        UserError: the first bad record, named by file and line, unless they are skipped.
    """
    size = sum(path.stat().st_size for path in files)
    workers = min(workers, math.ceil(size / _WORKER_BYTES))
    encoding = replace(encoding, apart=workers > 1)
    batches = (batch for path in files for batch in _batches(path, encoding.skip_bad_lines))
    with WorkerPool(encoding, workers) as pool:
        yield from pool.map(batches)


def is_table(path: Path) -> bool:
    """Whether its records are rows, which have no lines."""
    return file_format(path) in ("parquet", "arrow")


def _batches(path: Path, skip_bad_lines: bool) -> Iterator[_Read]:
    """The records of a file; an error is passed on, so that it comes after those before it."""
    read, size = _Read(path), 0
    try:
        file = ExampleFile(path, skip_bad_lines)
        for number, example in file:
            read.examples.append(example)
            read.numbers.append(number)
            if example.cut_turns:
                read.counts.add(Counts(cut_turns=example.cut_turns, first_cut=number))
            size += len(example.text or "") + sum(len(turn.content) for turn in example.messages)
            if size >= _BATCH_CHARACTERS:
                yield replace(read, position=file.position)
                read, size = _Read(path), 0
        read.counts.add(Counts(bad=file.bad, last_bad=file.last_bad))
        yield replace(read, position=file.position, is_last=True)
    except LlamaLibError as error:
        yield replace(read, error=error)


def _encoded(template: ChatTemplate, read: _Read, skip_bad_lines: bool) -> Batch:
    numbers, examples, counts = read.numbers, read.examples, read.counts
    try:
        found = template.encode_many(examples)
    except BadRecord:
        # Which one it is shows when each is tried alone.
        numbers, examples, found = [], [], []
        for number, example in zip(read.numbers, read.examples, strict=True):
            try:
                found.append(template.encode(example))
            except BadRecord as bad:
                what = f"{'row' if is_table(read.path) else 'line'} {number}: {bad}"
                if not skip_bad_lines:
                    raise UserError(
                        f"{read.path} {what}. Mend it, or drop and count such lines with "
                        "--skip_bad_lines."
                    ) from bad
                counts.add(Counts(bad=1, last_bad=what))
            else:
                numbers.append(number)
                examples.append(example)
    if read.error is not None:
        raise read.error
    ids = np.concatenate([each.ids for each in found] or [np.empty(0, np.int32)])
    roles = np.concatenate([each.roles for each in found] or [np.empty(0, np.uint8)])
    about = np.empty(len(found), CONVERSATION)
    about["hash"] = [conversation_hash(example) for example in examples]
    about["number"] = numbers
    for place, each in enumerate(found):
        about["labels"][place] = np.bincount(each.roles[1:], minlength=len(ROLE_NAMES))
    lengths = np.fromiter((len(each.ids) for each in found), np.int64, len(found))
    return Batch(ids, roles, lengths, about, counts, read.position, read.is_last)


def conversation_hash(example: Example) -> int:
    """64 bits of what is said by whom, whatever the shape of the record."""
    if example.text is not None:
        return text_hash(example.text.encode("utf-8"))
    turns = [[message.role, message.content] for message in example.messages]
    return text_hash(json.dumps(turns).encode("utf-8"))
