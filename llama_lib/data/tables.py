"""Read the rows of one .parquet or .arrow file: texts, ready-made rows of token ids, or others.

Invariant: every row of the table gives exactly one value, or the reason why it has none.
"""

import mmap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llama_lib.data.bad_records import BadRecord, UnknownShape, unreadable
from llama_lib.data.parts import Part, parquet_file
from llama_lib.errors import UserError

# A label of no loss, by the convention of PyTorch and transformers.
_IGNORED = -100
_FILE_MAGIC = b"ARROW1"  # of the format with an index at its end; streams have no magic

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Selection:
    """What is taken from a table.

    Attributes:
        columns: those that are read, where the table has them.
        values: of a record batch, the value of each row, or the reason why it has none.
        batch_rows: decoded at once.
    """

    columns: tuple[str, ...]
    values: Callable[[Any], Iterator[Any]]
    batch_rows: int = 256  # chosen


class Table:
    """Iterate over the rows of a file, or of some of its row groups.

    `position` of `size` bytes are read so far. `select` looks at the schema and says what is
    taken; it raises UserError if the table holds nothing we can use.
    """

    def __init__(
        self, path: Path, select: Callable[[Path, Any], Selection], part: Part | None = None
    ) -> None:
        self.path = path
        self._select = select
        self._is_parquet = path.name.lower().endswith(".parquet")
        self._part = part if self._is_parquet else None
        self._tell: Callable[[], int] = lambda: 0

    @property
    def position(self) -> int:
        return self._tell()

    @cached_property
    def size(self) -> int:
        """Of the file; the sizes of its parts add up to it."""
        size = self.path.stat().st_size
        if self._part is None:
            return size
        first, last, total = self._rows
        return size * last // total - size * first // total if total else size

    @property
    def first_row(self) -> int:
        """Rows of the file before those read here."""
        return self._rows[0] if self._part else 0

    @cached_property
    def is_whole(self) -> bool:
        return self._part is None or self._rows == (0, self._rows[2], self._rows[2])

    @cached_property
    def selection(self) -> Selection:
        """What is taken. Raises UserError if the table holds nothing we can use."""
        with self._opened() as (schema, _):
            return self._select(self.path, schema)

    def __iter__(self) -> Iterator[Any]:
        """The value of each row, or the BadRecord that says why it has none."""
        with self._opened() as (schema, batches):
            selection = self._select(self.path, schema)
            columns = [name for name in selection.columns if name in schema.names]
            for batch in batches(columns, selection.batch_rows):
                for start in range(0, len(batch), selection.batch_rows):
                    yield from selection.values(batch.slice(start, selection.batch_rows))

    @cached_property
    def _rows(self) -> tuple[int, int, int]:
        """Rows of the file before the part, before its end, and all of them."""
        assert self._part is not None
        with parquet_file(self.path) as file:
            groups = file.metadata.num_row_groups
            rows = [file.metadata.row_group(number).num_rows for number in range(groups)]
        return sum(rows[: self._part.start]), sum(rows[: self._part.stop]), sum(rows)

    @contextmanager
    def _opened(self) -> Iterator[tuple[Any, Callable[[list[str], int], Iterator[Any]]]]:
        """(schema, a function that gives the record batches of some columns)."""
        if self._is_parquet:
            with parquet_file(self.path) as file:
                yield file.schema_arrow, lambda *wanted: self._row_groups(file, *wanted)
            return
        import pyarrow as pa

        if not self.path.stat().st_size:
            raise UserError(f"{self.path} is empty.")
        try:
            with self.path.open("rb") as raw:
                mapped = mmap.mmap(raw.fileno(), 0, access=mmap.ACCESS_READ)
            buffer = pa.BufferReader(pa.py_buffer(mapped))
            if mapped[: len(_FILE_MAGIC)] == _FILE_MAGIC:
                file = pa.ipc.open_file(buffer)
                yield file.schema, lambda *_: self._mapped(mapped, _indexed(file, self.size))
            else:
                stream = pa.ipc.open_stream(buffer)
                batches = ((batch, buffer.tell()) for batch in stream)
                yield stream.schema, lambda *_: self._mapped(mapped, batches)
        except pa.ArrowException as error:
            raise UserError(f"{self.path} is damaged, or no arrow file: {error}") from error
        except OSError as error:
            raise unreadable(self.path, error) from error

    def _row_groups(self, file: Any, columns: list[str], batch_rows: int) -> Iterator[Any]:
        part = self._part
        groups = range(part.start, part.stop) if part else range(file.metadata.num_row_groups)
        rows = max(1, sum(file.metadata.row_group(number).num_rows for number in groups))
        done = 0
        self._tell = lambda: self.size * done // rows
        for batch in file.iter_batches(
            batch_rows, row_groups=list(groups), columns=columns, use_threads=False
        ):
            yield batch
            done += len(batch)

    def _mapped(self, mapped: mmap.mmap, batches: Iterator[tuple[Any, int]]) -> Iterator[Any]:
        position = released = 0
        self._tell = lambda: position
        for batch, end in batches:
            yield batch
            position = end
            # What was read would otherwise count as memory of this process until others need it.
            last = position // mmap.PAGESIZE * mmap.PAGESIZE
            if last > released:
                mapped.madvise(mmap.MADV_DONTNEED, released, last - released)
                released = last


def _indexed(file: Any, size: int) -> Iterator[tuple[Any, int]]:
    """(record batch, about how much of the file it ends at) in order."""
    number = file.num_record_batches
    for index in range(number):
        yield file.get_batch(index), size * (index + 1) // number


def check_strings(path: Path, schema: Any, name: str) -> None:
    """Raises UserError if a column holds anything but strings."""
    from pyarrow import types

    kind = schema.field(name).type
    kind = kind.value_type if types.is_dictionary(kind) else kind
    if not (types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)):
        raise UserError(f"{path}: the column `{name}` holds {kind}, expected strings.")


def is_list(kind: Any) -> bool:
    """Whether the rows of a column of this arrow type are lists."""
    from pyarrow import types

    return types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)


def select_documents(path: Path, schema: Any) -> Selection:
    """The `text` strings; of a table with `input_ids` and no `text`, ROWS."""
    from pyarrow import types

    if "text" in schema.names:
        check_strings(path, schema, "text")
        return _TEXTS
    if "input_ids" not in schema.names:
        raise UnknownShape(schema.names).of_file(path)
    for name, what in (
        ("input_ids", "whole numbers"),
        ("attention_mask", "0 and 1"),
        ("labels", "whole numbers"),
    ):
        if name not in schema.names:
            continue
        kind = schema.field(name).type
        if name == "labels" and types.is_null(kind):
            continue
        is_mask = name == "attention_mask"
        if not is_list(kind) or not (
            types.is_integer(kind.value_type) or (is_mask and types.is_boolean(kind.value_type))
        ):
            raise UserError(f"{path}: the column `{name}` holds {kind}, expected lists of {what}.")
    return ROWS


def _texts_of(batch: Any) -> Iterator[str | BadRecord]:
    column = batch.column(batch.schema.get_field_index("text"))
    try:
        texts = column.to_pylist()
    except UnicodeDecodeError:
        texts = [_text_or_reason(value) for value in column]
    for text in texts:
        yield BadRecord("`text` is null") if text is None else text


def _text_or_reason(value: Any) -> str | BadRecord | None:
    try:
        return value.as_py()
    except UnicodeDecodeError as error:
        return BadRecord(f"`text` is not UTF-8 at byte {error.start}")


def _rows_of(batch: Any) -> Iterator[Ids | BadRecord]:
    ids, ends, missing = _flat(batch, "input_ids")
    hidden: npt.NDArray[np.bool_] | None = None
    mask_ends = ends
    if "attention_mask" in batch.schema.names:
        mask, mask_ends, mask_missing = _flat(batch, "attention_mask")
        missing |= mask_missing
        hidden = mask == 0
        if not hidden.any():
            hidden = None
    mislabelled = _mislabelled(batch, ids, ends, hidden, mask_ends)
    start = mask_start = 0
    for number, (end, mask_end, null) in enumerate(
        zip(ends.tolist(), mask_ends.tolist(), missing, strict=True)
    ):
        if null:
            yield BadRecord("`input_ids` or `attention_mask` is null, or holds a null")
        elif end - start != mask_end - mask_start:
            yield BadRecord(
                f"`input_ids` has {end - start} numbers, `attention_mask` {mask_end - mask_start}"
            )
        elif number in mislabelled:
            yield BadRecord(mislabelled[number])
        elif hidden is None:
            yield ids[start:end]
        else:
            yield ids[start:end][~hidden[mask_start:mask_end]]
        start, mask_start = end, mask_end


def _mislabelled(
    batch: Any,
    ids: Ids,
    ends: npt.NDArray[np.int64],
    hidden: npt.NDArray[np.bool_] | None,
    mask_ends: npt.NDArray[np.int64],
) -> dict[int, str]:
    """The rows whose labels ask for another loss than that of every visible token, and why.

    Labels equal to the ids, shifted nowhere, are what transformers' models take; -100 may stand
    where the mask hides the token. A row without labels (null) asks for nothing.
    """
    from pyarrow import types

    if "labels" not in batch.schema.names or types.is_null(batch.schema.field("labels").type):
        return {}
    labels, label_ends, holds_null = _flat(batch, "labels")
    without = batch.column(batch.schema.get_field_index("labels")).is_null()
    given = ~without.to_numpy(zero_copy_only=False)
    lengths, label_lengths, mask_lengths = (
        np.diff(some, prepend=0) for some in (ends, label_ends, mask_ends)
    )
    reasons: dict[int, str] = {}
    for row in np.flatnonzero(given & (holds_null | (label_lengths != lengths))).tolist():
        reasons[row] = (
            "`labels` holds a null"
            if label_lengths[row] == lengths[row]
            else f"`input_ids` has {lengths[row]} numbers, `labels` {label_lengths[row]}"
        )
    # The numbers of the rows that are as long in every column, one below the other.
    alike = given & ~holds_null & (label_lengths == lengths) & (mask_lengths == lengths)
    counts = np.where(alike, lengths, 0)
    rows = np.repeat(np.arange(len(counts)), counts)
    within = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    wanted = labels[(label_ends - label_lengths)[rows] + within]
    other = wanted != ids[(ends - lengths)[rows] + within]
    ignored = wanted == _IGNORED
    if hidden is not None:
        other &= ~(ignored & hidden[(mask_ends - mask_lengths)[rows] + within])
    for row in np.unique(rows[other]).tolist():
        reasons[row] = (
            "`labels` differs from `input_ids` (shifted, or meant for another kind of model), but "
            "pre-training learns the row itself"
        )
    for row in np.unique(rows[other & ignored]).tolist():
        reasons[row] = (
            "`labels` hides tokens from the loss (-100), but pre-training learns every token"
        )
    return reasons


def _flat(batch: Any, name: str) -> tuple[Ids, npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """All numbers of a column of lists, where each row ends, and which rows hold a null."""
    import pyarrow.compute as pc

    column = batch.column(batch.schema.get_field_index(name))
    ends = np.cumsum(pc.list_value_length(column).fill_null(0).to_numpy(zero_copy_only=False))
    missing = column.is_null().to_numpy(zero_copy_only=False)
    values = pc.list_flatten(column)
    if values.null_count:
        at = np.flatnonzero(values.is_null().to_numpy(zero_copy_only=False))
        missing[np.searchsorted(ends, at, side="right")] = True
        values = values.fill_null(0)
    numbers = values.to_numpy(zero_copy_only=False)
    return numbers.astype(np.int64, copy=False), ends.astype(np.int64), missing


_TEXTS = Selection(("text",), _texts_of)
# Arrays of ids, without those that an `attention_mask` hides. They are long, so few at once.
ROWS = Selection(("input_ids", "attention_mask", "labels"), _rows_of, batch_rows=32)
