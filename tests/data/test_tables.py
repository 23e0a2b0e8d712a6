"""Every kind of table gives the same texts or rows; rows that mean something else are refused."""

import errno
import mmap
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llama_lib.data.readers import TextFile
from llama_lib.errors import RunError, UserError
from tests.data.conftest import parquet, problem

TEXTS = ["one", 'two "quoted"\n\nwith lines', "\u4f60\u597d \U0001f600", "four" * 1000]
ROWS = [[1, 2, 3], [], [4], [31999, 0, 7, 7]]
MASKS = [[1, 1, 0], [], [1], [0, 1, 1, 0]]
KEPT = [[1, 2], [], [4], [0, 7]]
PAIRS = list(zip(ROWS, MASKS, strict=True))


def tables(folder: Path, table: pa.Table) -> list[Path]:
    """The same table as parquet and as both formats of arrow, in several batches."""
    paths = [folder / "rows.parquet", folder / "stream.arrow", folder / "file.arrow"]
    pq.write_table(table, paths[0], row_group_size=3)
    with pa.ipc.new_stream(paths[1], table.schema) as writer:
        writer.write_table(table, max_chunksize=3)
    with pa.ipc.new_file(paths[2], table.schema) as writer:
        writer.write_table(table, max_chunksize=3)
    return paths


def test_parquet_reads_the_text_column_only(tmp_path: Path) -> None:
    path = parquet(tmp_path, {"meta": [{"n": n} for n in range(4)], "text": TEXTS})
    reader = TextFile(path)
    assert list(reader) == TEXTS
    assert reader.position == reader.size


def test_null_and_wrong_type_in_parquet(tmp_path: Path) -> None:
    assert "row 2: `text` is null" in problem(parquet(tmp_path, {"text": ["a", None]}))
    assert "holds int64, expected strings" in problem(parquet(tmp_path, {"text": [1, 2]}))


def test_a_server_that_fails_under_a_table_is_no_mistake_of_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    for path in tables(tmp_path, pa.table({"text": ["a"]})):
        with monkeypatch.context() as patch:
            patch.setattr(pq, "ParquetFile", fails)
            patch.setattr(mmap, "mmap", fails)
            with pytest.raises(RunError, match=r"cannot be read: .*Stale file handle"):
                list(TextFile(path))


def test_text_of_a_table_that_is_not_utf8(tmp_path: Path) -> None:
    values = pa.array([b"good", b"b\xffd", b"fine"])
    texts = pa.Array.from_buffers(pa.string(), 3, values.buffers())
    path = parquet(tmp_path, {"text": texts})
    assert "row 2: `text` is not UTF-8 at byte 1" in problem(path)
    reader = TextFile(path, skip_bad_lines=True)
    assert list(reader) == ["good", "fine"] and reader.bad == 1


@pytest.mark.parametrize("kind", [pa.large_string(), pa.dictionary(pa.int8(), pa.string())])
def test_every_kind_of_string_column(tmp_path: Path, kind: pa.DataType) -> None:
    assert list(TextFile(parquet(tmp_path, {"text": pa.array(TEXTS).cast(kind)}))) == TEXTS


def test_text_comes_before_input_ids(tmp_path: Path) -> None:
    reader = TextFile(parquet(tmp_path, {"input_ids": [[1], [2]], "text": ["a", "b"]}))
    assert not reader.is_rows and list(reader) == ["a", "b"]


@pytest.mark.parametrize(
    "kind", [pa.list_(pa.int64()), pa.list_(pa.uint16()), pa.large_list(pa.int32())]
)
def test_ready_made_rows(tmp_path: Path, kind: pa.DataType) -> None:
    columns = {"input_ids": pa.array(ROWS, kind), "labels": ROWS, "length": [3, 0, 1, 4]}
    for path in tables(tmp_path, pa.table(columns)):
        reader = TextFile(path)
        assert reader.is_rows
        found = list(reader)
        assert [row.tolist() for row in found] == ROWS
        assert all(row.dtype == np.int64 and row.ndim == 1 for row in found)
        assert reader.position == reader.size == path.stat().st_size


@pytest.mark.parametrize("kind", [pa.list_(pa.int8()), pa.list_(pa.bool_()), pa.list_(pa.int64())])
def test_what_the_attention_mask_hides_is_left_out(tmp_path: Path, kind: pa.DataType) -> None:
    masks = pa.array([[bool(m) for m in mask] for mask in MASKS] * 100).cast(kind)
    table = pa.table({"input_ids": ROWS * 100, "attention_mask": masks})
    for path in tables(tmp_path, table):
        assert [row.tolist() for row in TextFile(path)] == KEPT * 100


def test_rows_of_fixed_length_and_many(tmp_path: Path) -> None:
    ids = np.arange(3000 * 16).reshape(3000, 16)
    column = pa.FixedSizeListArray.from_arrays(pa.array(ids.ravel()), 16)
    for path in tables(tmp_path, pa.table({"input_ids": column})):
        assert np.array_equal(np.stack(list(TextFile(path))), ids)


@pytest.mark.parametrize(
    ("row", "mask", "reason"),
    [
        (None, [1], "is null"),
        ([1, None], [1, 1], "holds a null"),
        ([1, 2], None, "is null"),
        ([1, 2], [1], "`input_ids` has 2 numbers, `attention_mask` 1"),
    ],
)
def test_bad_rows_are_named_or_counted(
    tmp_path: Path, row: list | None, mask: list | None, reason: str
) -> None:
    table = pa.table(
        {"input_ids": [*ROWS, row, *ROWS], "attention_mask": [*MASKS, mask, *MASKS]},
        pa.schema({"input_ids": pa.list_(pa.int64()), "attention_mask": pa.list_(pa.int64())}),
    )
    for path in tables(tmp_path, table):
        message = problem(path)
        assert "row 5: " in message and reason in message
        reader = TextFile(path, skip_bad_lines=True)
        assert [row.tolist() for row in reader] == KEPT + KEPT
        assert reader.bad == 1


@pytest.mark.parametrize(
    ("labels", "bad"),
    [
        (ROWS, 0),
        ([None] * len(ROWS), 0),
        # Hidden by the mask as well: padding.
        ([[i if m else -100 for i, m in zip(*pair, strict=True)] for pair in PAIRS], 0),
        ([[-100] * len(row) for row in ROWS], 3),  # one row is empty
    ],
)
def test_rows_whose_labels_hide_visible_tokens_are_bad(
    tmp_path: Path, labels: list, bad: int
) -> None:
    """They were made for fine-tuning: here every token would be learnt, prompts included."""
    table = pa.table({"input_ids": ROWS, "attention_mask": MASKS, "labels": labels})
    for path in tables(tmp_path, table):
        reader = TextFile(path, skip_bad_lines=True)
        assert len(list(reader)) == len(ROWS) - bad
        assert reader.bad == bad
        if bad:
            assert "row 1: `labels` hides tokens from the loss" in problem(path)


def row_by_row(ids: list, mask: list | None, labels: list | None) -> bool:
    """Whether a row may be used, said without numpy."""
    if labels is None:
        return True
    if len(labels) != len(ids):
        return False
    mask = mask or [1] * len(ids)
    return all(
        label == number or (label == -100 and not seen)
        for number, seen, label in zip(ids, mask, labels, strict=True)
    )


@pytest.mark.parametrize("with_mask", [False, True])
def test_labels_are_judged_as_row_by_row(tmp_path: Path, with_mask: bool) -> None:
    rng = random.Random(with_mask)
    rows, masks, labels = [], [], []
    for _ in range(400):
        row = [rng.randrange(50) for _ in range(rng.randrange(9))]
        mask = [rng.randrange(4) and 1 for _ in row]
        label = [number if seen or rng.random() < 0.5 else -100
                 for number, seen in zip(row, mask, strict=True)]  # fmt: skip
        kind = rng.randrange(8)
        if kind == 0:
            label = label[1:]
        elif kind == 1:
            label = [*label, 7]
        elif kind == 2:
            label = [*label[1:], -100][: len(label)]
        elif kind == 3 and label:
            label[rng.randrange(len(label))] = rng.choice((-100, -1, 0, 49))
        rows.append(row)
        masks.append(mask)
        labels.append(None if kind == 4 else label)
    columns = {
        "input_ids": rows,
        "labels": labels,
        **({"attention_mask": masks} if with_mask else {}),
    }
    good = [
        [number for number, seen in zip(row, mask, strict=True) if seen or not with_mask]
        for row, mask, label in zip(rows, masks, labels, strict=True)
        if row_by_row(row, mask if with_mask else None, label)
    ]
    assert 100 < len(good) < 350
    for path in tables(tmp_path, pa.table(columns)):
        reader = TextFile(path, skip_bad_lines=True)
        assert [row.tolist() for row in reader] == good
        assert reader.bad == 400 - len(good)


@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        ([2, 3, -100], "`labels` hides tokens from the loss"),
        ([2, 3, 1], "`labels` differs from `input_ids`"),
        ([1, 2], "`input_ids` has 3 numbers, `labels` 2"),
        ([1, 2, 3, 4], "`input_ids` has 3 numbers, `labels` 4"),
        ([1, None, 3], "`labels` holds a null"),
    ],
)
def test_rows_with_other_labels_are_named(tmp_path: Path, labels: list, reason: str) -> None:
    table = pa.table({"input_ids": [[4, 5], [1, 2, 3]], "labels": [[4, 5], labels]})
    for path in tables(tmp_path, table):
        message = problem(path)
        assert "row 2: " in message and reason in message


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"input_ids": [[1.5]]}, "`input_ids` holds list<.*double>, expected lists of whole"),
        ({"input_ids": [[[1]]]}, "`input_ids` holds list<.*expected lists of whole numbers"),
        ({"input_ids": [1]}, "`input_ids` holds int64, expected lists"),
        ({"input_ids": [[1]], "attention_mask": [1.0]}, "`attention_mask` holds double"),
    ],
)
def test_columns_that_hold_no_rows(tmp_path: Path, columns: dict, reason: str) -> None:
    path = parquet(tmp_path, columns)
    with pytest.raises(UserError, match=reason):
        list(TextFile(path))
    with pytest.raises(UserError, match=reason):
        assert TextFile(path).is_rows


def test_table_without_rows(tmp_path: Path) -> None:
    for path in tables(tmp_path, pa.table({"text": pa.array([], pa.string())})):
        assert "is empty" in problem(path)


PEAK = """
import sys
from pathlib import Path
import pyarrow.parquet
from llama_lib.data.readers import TextFile
def peak():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) << 10
before = peak()
print(sum(len(record) for record in TextFile(Path(sys.argv[1]))), peak() - before)
"""


@pytest.mark.full
def test_memory_does_not_grow_with_a_table(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 32_000, (6000, 8192), dtype=np.int32)
    column = pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), 8192)
    text = pa.array([rng.bytes(2500).hex() for _ in range(50_000)])
    for table in (pa.table({"input_ids": column}), pa.table({"text": text})):
        # 200 and 250 MB; without a size of their own row groups are larger than that.
        with pa.ipc.new_stream(tmp_path / "a.arrow", table.schema) as writer:
            writer.write_table(table, max_chunksize=500)
        with pa.ipc.new_file(tmp_path / "b.arrow", table.schema) as writer:
            writer.write_table(table, max_chunksize=500)
        pq.write_table(table, tmp_path / "one.parquet", compression="none")
        pq.write_table(table, tmp_path / "many.parquet", row_group_size=500, compression="none")
        paths = [tmp_path / name for name in ("a.arrow", "b.arrow", "one.parquet", "many.parquet")]
        for path in paths:
            done = subprocess.run(
                [sys.executable, "-c", PEAK, str(path)], capture_output=True, text=True, check=True
            )
            length, peak = map(int, done.stdout.split())
            assert length > 45_000_000
            assert peak < 110_000_000, path
