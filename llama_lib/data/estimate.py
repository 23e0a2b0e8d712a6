"""What can be known of text before it is read: its first texts, its size, the space it needs.

Invariant: costs the same for any size of the files; no more text is in memory than is asked for.
"""

import shutil
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from llama_lib.data.parts import parquet_file
from llama_lib.data.readers import TextFile
from llama_lib.data.sources import Source
from llama_lib.errors import UserError

# Text to prove the fast tokenizer on, in characters: of all sources together, and of each. Chosen.
_PROBES = 4 << 20
_LEAST_PROBE, _MOST_PROBE = 1 << 10, 64 << 10
# Text read to learn how much of it a file holds per byte, of the first files of each kind. Chosen.
_MEASURED = 2 << 20
_MEASURED_FILES = 4


def probes(sources: Sequence[Source], skip_bad_lines: bool = False) -> Iterator[str]:
    """The first texts of every source, one source after the other."""
    share = min(max(_PROBES // max(len(sources), 1), _LEAST_PROBE), _MOST_PROBE)
    for source in sources:
        characters = 0
        reader = TextFile(source.files[0], skip_bad_lines)
        for text in reader:
            if reader.is_rows:
                break
            if text:
                yield text[: share - characters]
            characters += len(text)
            if characters >= share:
                break


def text_bytes(sources: Sequence[Source], skip_bad_lines: bool = False) -> dict[str, float]:
    """About how many UTF-8 bytes of text each source has, by name."""
    measured: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for path in _files(sources):
        found = measured[_kind(path)]
        if _kind(path) != ".parquet" and len(found) < _MEASURED_FILES:
            found.append(_measure(path, skip_bad_lines))
    ratios = {
        kind: sum(text for text, _ in found) / max(sum(size for _, size in found), 1)
        for kind, found in measured.items()
    }
    return {
        source.name: sum(
            _column_bytes(path)
            if _kind(path) == ".parquet"
            else path.stat().st_size * ratios[_kind(path)]
            for path in source.files
        )
        for source in sources
    }


def check_space(
    num_bytes: float, bytes_per_token: float, itemsize: int, work: Path, option: str
) -> None:
    """Tokens are there twice for a while: in parts, and assembled.

    The size is an estimate: only what cannot be meant is refused, the rest is a warning.
    """
    needed = 2 * num_bytes / bytes_per_token * itemsize
    there = sum(path.stat().st_size for path in work.glob("part-*")) if work.is_dir() else 0
    free = shutil.disk_usage(work.parent).free
    if needed - there <= free:
        return
    line = (
        f"{work.parent} has {free / 2**30:.1f} GiB free; the tokens of {num_bytes / 2**30:.1f} GiB "
        f"of text need about {(needed - there) / 2**30:.1f} GiB while they are prepared, and half "
        f"of it afterwards. Free space, or choose another disk with {option}."
    )
    if needed / 5 - there > free:
        raise UserError(line)
    print(f"warning: {line}", file=sys.stderr)


def _files(sources: Iterable[Source]) -> Iterator[Path]:
    """The first file of every source, then the others."""
    for source in sources:
        yield source.files[0]
    for source in sources:
        yield from source.files[1:]


def _kind(path: Path) -> str:
    return path.suffix.lower()


def _measure(path: Path, skip_bad_lines: bool) -> tuple[int, int]:
    """(bytes of text, bytes of file that they come from) of the beginning of a file."""
    reader = TextFile(path, skip_bad_lines)
    found = 0
    records: Iterable[Any] = reader
    for record in records:
        found += len(record.encode("utf-8")) if isinstance(record, str) else record.nbytes
        if found >= _MEASURED:
            return found, max(reader.position, 1)
    return found, path.stat().st_size


def _column_bytes(path: Path) -> int:
    """Bytes of the one column that is read, decompressed."""
    with parquet_file(path) as file:
        metadata = file.metadata
        total = dict.fromkeys(("text", "input_ids"), 0)
        for number in range(metadata.num_row_groups):
            group = metadata.row_group(number)
            for index in range(group.num_columns):
                column = group.column(index)
                name = column.path_in_schema.split(".")[0]
                if name in total:
                    total[name] += column.total_uncompressed_size
    return total["text"] or total["input_ids"]
