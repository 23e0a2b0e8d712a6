"""Read records of every usual shape as Examples: conversations, prompts, Alpaca, plain text.

Invariant: a record is either an Example, or named by file and line in an error, or counted as bad.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from llama_lib.data.bad_records import BadRecord, UnknownShape, nothing_in
from llama_lib.data.chat.messages import (
    Example,
    Message,
    answered,
    conversation,
    exchange,
    said,
    turn_list,
)
from llama_lib.data.parts import Part
from llama_lib.data.readers import Reading, RecordFile
from llama_lib.data.sources import Source, is_on_hub, locate
from llama_lib.data.tables import Selection, check_strings, is_list
from llama_lib.errors import UserError


def example_of(record: Any) -> Example:
    """The Example of one parsed record, by the first shape of which it has every needed column.

    Raises:
        BadRecord: it has none of the shapes (UnknownShape), or something in it is not right.
    """
    if not isinstance(record, dict):
        raise BadRecord(f"{type(record).__name__} instead of an object")
    return _shape_of(record).example_of(record)


class ExampleFile(RecordFile[Example]):
    """Iterate over (number, Example) of one file or of a part of it.

    `number` is the line of the file where the record begins, or its row in a table, from 1; to
    know it in a part of a file, what is before the part is read once.
    """

    def __init__(self, path: Path, skip_bad_lines: bool = False, part: Part | None = None) -> None:
        super().__init__(path, _EXAMPLES, skip_bad_lines, part)

    def __iter__(self) -> Iterator[tuple[int, Example]]:
        for example in self._values():
            yield self.number, example


def no_examples_in(path: Path, bad: int, last_bad: str) -> UserError:
    """The error of a file without a single good record, of which `bad` were left out."""
    return nothing_in(path, bad, last_bad, _EXAMPLES.example)


def resolve_conversations(
    datasets: str | Sequence[str],
    task_name: str | None,
    cache_dir: Path,
    entries_apart: bool = False,
) -> list[Source]:
    """Sources of one or several datasets, as sources.resolve finds them for text.

    Args:
        task_name: configuration of those datasets of the hub that are named without one; with
            None each has its default, which for yizhongw/self_instruct is
            super_natural_instructions.

    Raises:
        UserError: with every problem found, among them tables without any of the columns.
    """
    datasets = [datasets] if isinstance(datasets, str) else list(datasets)
    if task_name:
        datasets = [
            f"{dataset}:{task_name}" if _takes_task(dataset) else dataset for dataset in datasets
        ]
    sources = locate(datasets, cache_dir, entries_apart, conversations=True)
    problems: list[str] = []
    for source in sources:
        for path in source.files:
            try:
                ExampleFile(path).check_table()
            except UserError as error:
                problems += error.problems
    if problems:
        raise UserError(problems)
    return sources


def takes_task_name(datasets: Sequence[str]) -> bool:
    """Whether a task name means anything: some dataset of the hub is named without its own."""
    return any(map(_takes_task, datasets))


def _takes_task(dataset: str) -> bool:
    return is_on_hub(dataset) and ":" not in dataset


@dataclass(frozen=True)
class _Shape:
    """Records with every column in `needed`; `line` shows one."""

    needed: tuple[str, ...]
    optional: tuple[str, ...]
    example_of: Callable[[dict[str, Any]], Example]
    line: str


def _conversation(column: str, record: dict[str, Any]) -> Example:
    _check_tools(record)
    return conversation(record[column], _system(record))


def _completion(record: dict[str, Any]) -> Example:
    prompt, completion = record["prompt"], record["completion"]
    if _holds_turns(prompt) or _holds_turns(completion):
        # As TRL has them: both are turns, and only the completion's answers are trained on.
        _check_tools(record)
        given = turn_list(prompt)
        return conversation([*given, *turn_list(completion)], _system(record), len(given))
    system = _system(record)
    return exchange(
        Message("user", said(prompt, "`prompt`")),
        Message("assistant", answered(completion, "`completion`")),
        system,
        # The template for completions has no place for a system turn.
        "completion" if system is None else "conversation",
    )


def _alpaca(record: dict[str, Any]) -> Example:
    if record.get("history"):
        raise BadRecord("`history` is not read: save such records with `conversations`")
    question = said(record["instruction"], "`instruction`")
    if (given := _optional(record, "input")) is not None:
        question += f"\n\n{given}"
    answer = answered(record["output"], "`output`")
    return exchange(
        Message("user", question), Message("assistant", answer), _system(record), "alpaca"
    )


def _text(record: dict[str, Any]) -> Example:
    return Example(text=answered(record["text"], "`text`"), kind="text")


def _system(record: dict[str, Any]) -> str | None:
    return _optional(record, "system")


def _optional(record: dict[str, Any], column: str) -> str | None:
    """The content of a column; None if it is absent or blank."""
    content = record.get(column)
    if content is None or (isinstance(content, str) and not content.strip()):
        return None
    return said(content, f"`{column}`")


def _holds_turns(content: Any) -> bool:
    """Whether it is turns, and neither a text nor the parts of one."""
    if isinstance(content, list):
        return bool(content) and isinstance(content[0], dict) and "type" not in content[0]
    return isinstance(content, dict)


def _check_tools(record: dict[str, Any]) -> None:
    """Raises BadRecord for a conversation with tools, whose calls are no turns."""
    for column in _TOOLS:
        tools = record.get(column)
        if isinstance(tools, str):
            tools = tools.strip() not in _NO_TOOLS
        if tools:
            raise BadRecord(f"it has `{column}`: calls of tools cannot be trained on")


_TOOLS = ("tools", "functions")
_NO_TOOLS = ("", "[]", "{}", "null")  # as JSON in a string
# Datasets keep `text`, `prompt` or `instruction` beside the conversation that was made of it.
_SHAPES = (
    _Shape(
        ("messages",),
        ("system", *_TOOLS),
        partial(_conversation, "messages"),
        '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}',
    ),
    _Shape(
        ("conversations",),
        ("system", *_TOOLS),
        partial(_conversation, "conversations"),
        '{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]}',
    ),
    _Shape(
        ("prompt", "completion"),
        ("system", *_TOOLS),
        _completion,
        '{"prompt": "Is 7 prime?", "completion": "Yes."}',
    ),
    _Shape(
        ("instruction", "output"),
        ("input", "system", "history"),
        _alpaca,
        '{"instruction": "Add the numbers.", "input": "3 and 4", "output": "7"}',
    ),
    _Shape(("text",), (), _text, '{"text": "One document of plain text."}'),
)
# What is in these columns is looked at record by record.
_ANY = ("history", *_TOOLS)
_EXAMPLE_LINES = "one of these:\n" + "\n".join(f"  {shape.line}" for shape in _SHAPES)


def _shape_of(columns: dict[str, Any] | list[str]) -> _Shape:
    for shape in _SHAPES:
        if all(name in columns for name in shape.needed):
            return shape
    *others, last = (" with ".join(f"`{name}`" for name in shape.needed) for shape in _SHAPES)
    raise UnknownShape(sorted(columns), f"{', '.join(others)} or {last}", _EXAMPLE_LINES)


def _select(path: Path, schema: Any) -> Selection:
    """The columns of a shape. Raises UserError if they hold something else than they should."""
    from pyarrow import types

    try:
        shape = _shape_of(schema.names)
    except UnknownShape as unknown:
        raise unknown.of_file(path) from None
    for name in (*shape.needed, *shape.optional):
        if name not in schema.names:
            continue
        kind = schema.field(name).type
        if name in ("messages", "conversations"):
            if not _is_of_turns(kind):
                raise UserError(
                    f"{path}: the column `{name}` holds {kind}, expected lists of turns, each "
                    "with `role` and `content` or `from` and `value`."
                )
        elif name in ("prompt", "completion") and _is_of_turns(kind):
            continue
        elif name not in _ANY and not (name in shape.optional and types.is_null(kind)):
            check_strings(path, schema, name)
    return Selection((*shape.needed, *shape.optional), partial(_examples_of, shape))


def _is_of_turns(kind: Any) -> bool:
    """Whether a column of this arrow type holds lists of turns, or dicts of lists."""
    from pyarrow import types

    if types.is_struct(kind):
        return all(is_list(field.type) for field in kind)
    return is_list(kind) and types.is_struct(kind.value_type)


def _examples_of(shape: _Shape, batch: Any) -> Iterator[Example | BadRecord]:
    columns = [name for name in (*shape.needed, *shape.optional) if name in batch.schema.names]
    rows = batch.select(columns)
    try:
        records = rows.to_pylist()
    except UnicodeDecodeError:
        records = [_record_or_reason(rows.slice(number, 1)) for number in range(len(rows))]
    for record in records:
        try:
            yield record if isinstance(record, BadRecord) else shape.example_of(record)
        except BadRecord as bad:
            yield bad


def _record_or_reason(row: Any) -> dict[str, Any] | BadRecord:
    for name in row.schema.names:
        try:
            row.select([name]).to_pylist()
        except UnicodeDecodeError as error:
            return BadRecord(f"`{name}` is not UTF-8 at byte {error.start}")
    return row.to_pylist()[0]


_EXAMPLES = Reading(Example, example_of, example_of, _select, _EXAMPLE_LINES)
