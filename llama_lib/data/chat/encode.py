"""Files of conversations to batches of ids and roles, by several processes.

Invariant: the conversations, their numbers and counts, and the first error, are the same for any
number of processes.
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
from llama_lib.data.chat.counts import Counts, Seen
from llama_lib.data.chat.messages import Example
from llama_lib.data.chat.part_reader import ExampleReader, lines_of
from llama_lib.data.chat.roles import ROLE_NAMES
from llama_lib.data.chat.templates import ChatTemplate, Encoded
from llama_lib.data.parts import Part, is_seekable, parts_of
from llama_lib.data.readers import file_format
from llama_lib.data.tokenise import text_hash
from llama_lib.data.tokenizer import load_tokenizer
from llama_lib.data.workers import Report, WorkerPool
from llama_lib.errors import LlamaLibError, UserError

# What is known of a conversation: a hash of what is said in it, and one of what is asked first; its
# line or row in its file, from 1; and how many tokens of each role (chat/roles.py) can be labels,
# which are all but the first.
CONVERSATION = np.dtype(
    [("hash", "<u8"), ("group", "<u8"), ("number", "<u8"), ("labels", "<u4", (len(ROLE_NAMES),))]
)
# Of a file, for one process at a time; characters of a batch of a file that has no parts. Enough
# that opening and messages do not count, little enough that some per process fit anywhere. Chosen.
_PART_BYTES = 1 << 20
_BATCH_CHARACTERS = 1 << 20
# A part of parquet is at least one row group. Files whose parts are larger than this, on average,
# are read by one process in batches, so that memory stays flat. Chosen.
_LARGE_PART = 16
# Another process is started for so much of the files; before, this one is as soon done. Chosen.
_WORKER_BYTES = 4 << 20


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

    def add(self, number: int, example: Example) -> None:
        self.examples.append(example)
        self.numbers.append(number)
        if example.cut_turns:
            self.counts.cut_turns.add(Seen(example.cut_turns, number))


@dataclass(frozen=True)
class _Task:
    """A part of a file that the process which encodes it reads itself."""

    part: Part
    position: int
    is_last: bool


@dataclass(frozen=True)
class _Done:
    """`lines` of the file were passed, by which the numbers of what follows it are too small."""

    batch: Batch
    lines: int


@dataclass(frozen=True)
class Encoding:
    """How to encode, to be sent to other processes. The folder `tokenizer` has a chat template.

    `apart`: in a process of its own, which needs no model.
    """

    tokenizer: str
    cache_dir: str
    skip_bad_lines: bool
    apart: bool = False

    def __call__(self) -> Callable[[_Read | _Task, Report], _Done]:
        if self.apart:
            # A tokenizer alone loads without torch, in a third of the time and memory.
            os.environ.update(USE_TORCH="0", TRANSFORMERS_NO_ADVISORY_WARNINGS="1")
        template = ChatTemplate(load_tokenizer(self.tokenizer, self.cache_dir))
        return lambda item, report: _done(template, item, self.skip_bad_lines)


def encode_files(files: Sequence[Path], encoding: Encoding, workers: int) -> Iterator[Batch]:
    """The batches of all files, in order.

    Raises:
        UserError: the first bad record, named by file and line, unless they are skipped.
    """
    size = sum(path.stat().st_size for path in files)
    workers = min(workers, math.ceil(size / _WORKER_BYTES))
    encoding = replace(encoding, apart=workers > 1)
    items = (item for path in files for item in _items(path, encoding.skip_bad_lines))
    lines = 0
    with WorkerPool(encoding, workers) as pool:
        for done in pool.map(items):
            done.batch.about["number"] += np.uint64(lines)
            done.batch.counts.shift(lines)
            lines = 0 if done.batch.is_last else lines + done.lines
            yield done.batch


def is_table(path: Path) -> bool:
    """Whether its records are rows, which have no lines."""
    return file_format(path) in ("parquet", "arrow")


def record_name(path: Path, number: int) -> str:
    """What a user finds a record of a file by: `line 7`, in a table `row 7`, from 1."""
    return f"{'row' if is_table(path) else 'line'} {number}"


def _items(path: Path, skip_bad_lines: bool) -> Iterator[_Read | _Task]:
    """The parts of a file; batches of its records if it can only be read from its beginning."""
    parts = []
    if is_seekable(path):
        try:
            parts = parts_of(path, _PART_BYTES)
        except LlamaLibError as error:
            # Passed on, so that it comes after those of the files before.
            yield _Read(path, error=error)
            return
    size = path.stat().st_size
    if not parts or (is_table(path) and size > _LARGE_PART * _PART_BYTES * len(parts)):
        yield from _batches(path, skip_bad_lines)
        return
    for number, part in enumerate(parts, start=1):
        yield _Task(part, size * number // len(parts), number == len(parts))


def _batches(path: Path, skip_bad_lines: bool) -> Iterator[_Read]:
    """The records of a file; an error is passed on, so that it comes after those before it."""
    read, size = _Read(path), 0
    try:
        file = ExampleReader(
            path, skip_bad_lines, lambda number, bad: read.counts.add_bad(number, str(bad))
        )
        for number, example in file:
            read.add(number, example)
            size += len(example.text or "") + sum(len(turn.content) for turn in example.messages)
            if size >= _BATCH_CHARACTERS:
                yield replace(read, position=file.position)
                read, size = _Read(path), 0
        yield replace(read, position=file.position, is_last=True)
    except LlamaLibError as error:
        yield replace(read, error=error)


def _read(task: _Task, skip_bad_lines: bool) -> _Read:
    """The records of a part, those before an error too."""
    read = _Read(task.part.path, position=task.position, is_last=task.is_last)
    try:
        file = ExampleReader(
            read.path,
            skip_bad_lines,
            lambda number, bad: read.counts.add_bad(number, str(bad)),
            task.part,
        )
        for number, example in file:
            read.add(number, example)
    except LlamaLibError as error:
        return replace(read, error=error)
    return read


def _done(template: ChatTemplate, item: _Read | _Task, skip_bad_lines: bool) -> _Done:
    if isinstance(item, _Read):
        return _Done(_encoded(template, item, skip_bad_lines, Part(item.path, 0, 0)), 0)
    read = _read(item, skip_bad_lines)
    batch = _encoded(template, read, skip_bad_lines, Part(read.path, 0, item.part.start))
    return _Done(batch, 0 if is_table(read.path) else lines_of(item.part))


def _encoded(template: ChatTemplate, read: _Read, skip_bad_lines: bool, before: Part) -> Batch:
    """`before` is what the numbers of the batch do not count."""
    numbers, examples, counts = read.numbers, read.examples, read.counts
    found: list[Encoded] = []
    try:
        found = template.encode_many(examples)
    except BadRecord:
        # Which one it is shows when each is tried alone.
        numbers, examples = [], []
        for number, example in zip(read.numbers, read.examples, strict=True):
            try:
                found.append(template.encode(example))
            except BadRecord as bad:
                if not skip_bad_lines:
                    passed = 0 if is_table(read.path) else lines_of(before)
                    where = f"{read.path} {record_name(read.path, number + passed)}"
                    raise UserError(
                        f"{where}: {bad}. Mend it, or drop and count such lines with "
                        "--skip_bad_lines."
                    ) from bad
                counts.add_bad(number, str(bad))
            else:
                numbers.append(number)
                examples.append(example)
    if read.error is not None:
        raise read.error
    ids = np.concatenate([each.ids for each in found] or [np.empty(0, np.int32)])
    roles = np.concatenate([each.roles for each in found] or [np.empty(0, np.uint8)])
    about = np.empty(len(found), CONVERSATION)
    about["hash"] = [conversation_hash(example) for example in examples]
    about["group"] = [group_hash(example) for example in examples]
    about["number"] = numbers
    for index, (number, each) in enumerate(zip(numbers, found, strict=True)):
        about["labels"][index] = np.bincount(each.roles[1:], minlength=len(ROLE_NAMES))
        counts.merged.add(Seen(int(each.merged), number if each.merged else 0))
        counts.specials.add(Seen(int(each.specials), number if each.specials else 0))
    lengths = np.fromiter((len(each.ids) for each in found), np.int64, len(found))
    return Batch(ids, roles, lengths, about, counts, read.position, read.is_last)


def conversation_hash(example: Example) -> int:
    """64 bits of what is said by whom, whatever the shape of the record and the blanks around."""
    if example.text is not None:
        return text_hash(example.text.strip().encode("utf-8"))
    return _hash_of([(message.role, message.content) for message in example.messages])


def group_hash(example: Example) -> int:
    """64 bits that all answers to one prompt have in common: of the first user turn and of what a
    system says before it; of the whole text, where there are no turns."""
    if example.text is not None:
        return conversation_hash(example)
    turns = [(message.role, message.content) for message in example.messages]
    first = next(index for index, (role, _) in enumerate(turns) if role == "user")
    return _hash_of(turns[: first + 1])


def _hash_of(turns: Sequence[tuple[str, str]]) -> int:
    stripped = [[role, content.strip()] for role, content in turns]
    return text_hash(json.dumps(stripped).encode("utf-8"))
