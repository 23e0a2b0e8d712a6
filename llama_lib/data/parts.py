"""Cut a file into parts that can be read by different processes, and in any order.

Invariant: every record of a file belongs to exactly one of its parts, whatever their size, and
the same file and size give the same parts.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from llama_lib.data.bad_records import unreadable
from llama_lib.errors import UserError

_BUFFER_BYTES = 1 << 20


@dataclass(frozen=True)
class Part:
    """A stretch of one file.

    Plain `.jsonl`: the lines that begin in the bytes [start, stop). `.parquet`: the row groups
    [start, stop). Any other file can only be read whole: (0, its size).
    """

    path: Path
    start: int
    stop: int


def is_seekable(path: Path) -> bool:
    """Whether a part can be read without reading what comes before it."""
    return path.name.lower().endswith((".jsonl", ".parquet"))


def parts_of(path: Path, num_bytes: int) -> list[Part]:
    """The parts of a file in order, of about `num_bytes` of the file each; at least one."""
    if num_bytes < 1:
        raise ValueError(f"num_bytes is {num_bytes}")
    if path.name.lower().endswith(".parquet"):
        return _row_groups(path, num_bytes)
    size = path.stat().st_size
    number = max(1, round(size / num_bytes)) if is_seekable(path) else 1
    cuts = [size * part // number for part in range(number + 1)]
    return [Part(path, *pair) for pair in pairwise(cuts)]


@contextmanager
def parquet_file(path: Path) -> Iterator[Any]:
    """An open pyarrow.parquet.ParquetFile; a damaged file is a UserError."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # The defaults read all that will be wanted ahead: memory would grow with the file.
        with pq.ParquetFile(path, buffer_size=_BUFFER_BYTES, pre_buffer=False) as file:
            yield file
    except pa.ArrowException as error:
        raise UserError(f"{path} is damaged, or no parquet file: {error}") from error
    except OSError as error:
        raise unreadable(path, error) from error


def _row_groups(path: Path, num_bytes: int) -> list[Part]:
    parts = []
    with parquet_file(path) as file:
        groups = file.metadata.num_row_groups
        start = size = 0
        for number in range(groups):
            group = file.metadata.row_group(number)
            columns = map(group.column, range(group.num_columns))
            size += sum(column.total_compressed_size for column in columns)
            if size >= num_bytes:
                parts.append(Part(path, start, number + 1))
                start, size = number + 1, 0
    if start < groups or not parts:
        parts.append(Part(path, start, groups))
    return parts
