"""Read the `text` strings, or the ready-made rows of token ids, of one .parquet or .arrow file.

Invariant: every row of the table gives exactly one value, or the reason why it has none.
"""

import mmap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llama_lib.data.bad_records import BadRecord, no_text_column, unreadable
from llama_lib.data.parts import Part, parquet_file
from llama_lib.errors import UserError

# Rows decoded at once, by is_rows: ready-made rows are long. Chosen.
_BATCH_ROWS = {False: 256, True: 32}
# A label of no loss, by the convention of PyTorch and transformers.
_IGNORED = -100
_FILE_MAGIC = b"ARROW1"  # of the format with an index at its end; streams have no magic

Ids = npt.NDArray[np.int64]


class Table:
    """Iterate over the rows of a file, or of some of its row groups.

    `position` of `size` bytes are read so far. Rows of a table with `input_ids` and no `text`
    are arrays of ids, without those that its `attention_mask` hides.
    """

    def __init__(self, path: Path, part: Part | None = None) -> None:
        self.path = path
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
    def is_rows(self) -> bool:
        """Whether it holds ready-made rows. Raises UserError if it holds nothing we can use."""
        with self._opened() as (schema, _):
            return _is_rows(self.path, schema)

    def __iter__(self) -> Iterator[str | Ids | BadRecord]:
        with self._opened() as (schema, batches):
            is_rows = _is_rows(self.path, schema)
            values = _rows_of if is_rows else _texts_of
            used = ("input_ids", "attention_mask", "labels") if is_rows else ("text",)
            columns = [name for name in used if name in schema.names]
            for batch in batches(columns):
                for start in range(0, len(batch), _BATCH_ROWS[is_rows]):
                    yield from values(batch.slice(start, _BATCH_ROWS[is_rows]))

    @cached_property
    def _rows(self) -> tuple[int, int, int]:
        """Rows of the file before the part, before its end, and all of them."""
        assert self._part is not None
        with parquet_file(self.path) as file:
            groups = file.metadata.num_row_groups
            rows = [file.metadata.row_group(number).num_rows for number in range(groups)]
        return sum(rows[: self._part.start]), sum(rows[: self._part.stop]), sum(rows)

    @contextmanager
    def _opened(self) -> Iterator[tuple[Any, Callable[[list[str]], Iterator[Any]]]]:
        """(schema, a function that gives the record batches of some columns)."""
        if self._is_parquet:
            with parquet_file(self.path) as file:
                yield file.schema_arrow, lambda columns: self._row_groups(file, columns)
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
                yield file.schema, lambda columns: self._mapped(mapped, _indexed(file, self.size))
            else:
                stream = pa.ipc.open_stream(buffer)
                batches = ((batch, buffer.tell()) for batch in stream)
                yield stream.schema, lambda columns: self._mapped(mapped, batches)
        except pa.ArrowException as error:
            raise UserError(f"{self.path} is damaged, or no arrow file: {error}") from error
        except OSError as error:
            raise unreadable(self.path, error) from error

    def _row_groups(self, file: Any, columns: list[str]) -> Iterator[Any]:
        part = self._part
        groups = range(part.start, part.stop) if part else range(file.metadata.num_row_groups)
        rows = max(1, sum(file.metadata.row_group(number).num_rows for number in groups))
        done = 0
        self._tell = lambda: self.size * done // rows
        batch_rows = _BATCH_ROWS[_is_rows(self.path, file.schema_arrow)]
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


def _is_rows(path: Path, schema: Any) -> bool:
    from pyarrow import types

    if "text" in schema.names:
        kind = schema.field("text").type
        kind = kind.value_type if types.is_dictionary(kind) else kind
        if not (types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)):
            raise UserError(f"{path}: the column `text` holds {kind}, expected strings.")
        return False
    if "input_ids" not in schema.names:
        raise no_text_column(path, schema.names)
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
        is_list = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
        is_mask = is_list and name == "attention_mask" and types.is_boolean(kind.value_type)
        if not (is_mask or (is_list and types.is_integer(kind.value_type))):
            raise UserError(f"{path}: the column `{name}` holds {kind}, expected lists of {what}.")
    return True


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
