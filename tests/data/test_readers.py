"""Every kind of file gives the same texts; everything wrong is named by file and line."""

import gzip
import json
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from llama_lib.data.readers import TextFile
from llama_lib.errors import UserError

TEXTS = ["one", 'two "quoted"\n\nwith lines', "\u4f60\u597d \U0001f600", "four" * 1000]
LINES = "".join(json.dumps({"text": t, "meta": {"n": n}}) + "\n" for n, t in enumerate(TEXTS))


def written(folder: Path, name: str, content: bytes) -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


def parquet(folder: Path, columns: dict) -> Path:
    path = folder / "data.parquet"
    pq.write_table(pa.table(columns), path)
    return path


def problem(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        list(TextFile(path))
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", LINES.encode()),
        ("bom.jsonl", b"\xef\xbb\xbf" + LINES.encode()),
        ("bom_blank.jsonl", b"\xef\xbb\xbf\r\n" + LINES.replace("\n", "\r\n").encode()),
        ("blank.jsonl", b"\n" + LINES.replace("\n", "\n\n").encode()),
        ("a.jsonl.gz", gzip.compress(LINES.encode())),
        ("a.jsonl.zst", zstandard.compress(LINES.encode())),
        # what `zstd -T` and concatenated files look like: several frames
        ("frames.jsonl.zst", zstandard.compress(b"") + zstandard.compress(LINES.encode())),
        (
            "skipped.jsonl.zst",
            b"\x50\x2a\x4d\x18\x03\0\0\0abc" + zstandard.compress(LINES.encode()),
        ),
        ("members.jsonl.gz", gzip.compress(b"") + gzip.compress(LINES.encode())),
        ("array.json", json.dumps([json.loads(line) for line in LINES.splitlines()]).encode()),
        ("lines.json", LINES.encode()),
        ("bom.json", b"\xef\xbb\xbf" + LINES.encode()),
        (
            "pretty.json",
            json.dumps([json.loads(line) for line in LINES.splitlines()], indent=2).encode(),
        ),
    ],
)
def test_all_text_formats_give_the_same_texts(tmp_path: Path, name: str, content: bytes) -> None:
    assert list(TextFile(written(tmp_path, name, content))) == TEXTS


def test_single_record_over_several_lines(tmp_path: Path) -> None:
    path = written(tmp_path, "one.json", json.dumps({"text": "alone"}, indent=2).encode())
    assert list(TextFile(path)) == ["alone"]


def test_array_longer_than_a_chunk(tmp_path: Path) -> None:
    texts = [f"{n} " * 300 for n in range(3000)]
    path = written(tmp_path, "long.json", json.dumps([{"text": t} for t in texts]).encode())
    assert list(TextFile(path)) == texts


def test_parquet_reads_the_text_column_only(tmp_path: Path) -> None:
    path = parquet(tmp_path, {"meta": [{"n": n} for n in range(4)], "text": TEXTS})
    reader = TextFile(path)
    assert list(reader) == TEXTS
    assert reader.position == reader.size


def test_clashing_meta_is_no_obstacle(tmp_path: Path) -> None:
    records = [{"text": "a", "meta": "x"}, {"text": "b", "meta": {"y": [1]}}, {"text": "c"}]
    content = "\n".join(map(json.dumps, records)).encode()
    assert list(TextFile(written(tmp_path, "a.jsonl", content))) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "cut of', "invalid JSON"),
        (b'{"content": "x"}', "no `text`; found content"),
        (b'{"text": 7}', "`text` is int"),
        (b'{"text": null}', "`text` is NoneType"),
        (b'["text"]', "list instead of an object"),
        (b'{"text": "\xff"}', "not UTF-8"),
        (b'{"text": "\\ud800"}', "half a surrogate pair"),
        (b'{"text": "\xed\xa0\x80"}', "not UTF-8 at byte 10"),
        (b'{"text": "a\x01"}', "Invalid control character at at column 12"),
        (b'{"text": "a"} x', "Extra data at column 15"),
        (b'{"text": "a", "n": 01}', "at column 21"),
        (b'{"text": "a", "n": NaN', "Expecting ',' delimiter at column"),
        (b'{"text": "a", "n": \xff}', "not UTF-8 at byte 19"),
        (b'\xef\xbb\xbf{"text": "a"}', "invalid JSON"),
        (b'"text"', "str instead of an object"),
        (b'{"n": ' + b"[" * 5000 + b"]" * 5000 + b', "text": "a"}', "recursion"),
        (b'{"n": x' + b"9" * 5000 + b', "text": "a"}', "invalid JSON"),
    ],
)
def test_bad_line_is_named_or_counted(tmp_path: Path, line: bytes, reason: str) -> None:
    content = LINES.encode() + line + b"\n" + LINES.encode()
    path = written(tmp_path, "part-3.jsonl", content)
    message = problem(path)
    assert "part-3.jsonl line 5: " in message
    assert reason in message and "--skip_bad_lines" in message

    reader = TextFile(path, skip_bad_lines=True)
    assert list(reader) == TEXTS + TEXTS
    assert reader.bad == 1


@pytest.mark.parametrize(
    "line",
    [
        b'{"text": "kept", "n": NaN, "m": -Infinity}',
        b'{"text": "kept", "n": 1e999}',
        b'{"text": "kept", "n": 123456789012345678901234567890}',
        b'{"text": "kept", "id": "\\ud83d"}',
        b'{"text": "not this one", "text": "kept"}',
        b'{"t\\u0065xt": "kept"}',
        b' \t{"text": "kept"} \r',
    ],
)
def test_what_pythons_parser_takes_is_taken(tmp_path: Path, line: bytes) -> None:
    assert json.loads(line)["text"] == "kept"
    assert list(TextFile(written(tmp_path, "a.jsonl", line + b"\n"))) == ["kept"]


def test_broken_lines_are_judged_as_pythons_own_parser_does(tmp_path: Path) -> None:
    rng = random.Random(0)
    good = (
        '{"text": "ab \\u00e9 \\ud83d\\ude00 \u4f60", "n": [1, -2.5e3, NaN, {"text": 7}]}'.encode()
    )
    lines, expected = [], []
    for _ in range(20_000):
        line = bytearray(good)
        for _ in range(rng.randrange(4)):
            at = rng.randrange(len(line))
            line[at : at + rng.randrange(2)] = bytes(
                [rng.choice(b'"\\{}[]:,01.eE-u \t\x00\x80\xed')]
            )
        lines.append(bytes(line))
        try:
            record = json.loads(line.decode())
            record["text"].encode()
        except (ValueError, TypeError, KeyError, AttributeError):
            continue
        expected.append(record["text"])
    assert 4000 < len(expected) < 16_000
    reader = TextFile(written(tmp_path, "a.jsonl", b"\n".join(lines)), skip_bad_lines=True)
    assert list(reader) == expected
    assert reader.bad == len(lines) - len(expected)


@pytest.mark.full
def test_lines_are_read_faster_than_pythons_own_parser_reads_them(tmp_path: Path) -> None:
    text = 'A line of text, with "quotes" and\n\u4f60\u597d. ' * 20
    line = json.dumps({"text": text, "meta": {"url": "http://a.b/c", "n": [1, 2]}}) + "\n"
    path = written(tmp_path, "a.jsonl", line.encode() * 20_000)

    def seconds(texts: object) -> float:
        started = time.perf_counter()
        assert sum(1 for _ in texts) == 20_000  # type: ignore[attr-defined]
        return time.perf_counter() - started

    ours = min(seconds(TextFile(path)) for _ in range(3))
    plain = min(seconds(json.loads(line)["text"] for line in path.open("rb")) for _ in range(3))
    assert ours < plain / 1.5


def test_missing_column_shows_what_is_there_and_what_is_wanted(tmp_path: Path) -> None:
    for path in (
        written(tmp_path, "a.jsonl", b'{"content": "x", "id": 1}\n'),
        parquet(tmp_path, {"content": ["x"], "id": [1]}),
    ):
        message = problem(path)
        assert "no `text` column; found content, id" in message
        assert '{"text": "One document' in message


def test_file_with_only_bad_lines_is_an_error_even_when_they_are_skipped(tmp_path: Path) -> None:
    path = written(tmp_path, "a.jsonl", b"{}\nnonsense\n")
    with pytest.raises(UserError, match=r"all 2 records are bad.*line 2: invalid JSON"):
        list(TextFile(path, skip_bad_lines=True))


def test_null_and_wrong_type_in_parquet(tmp_path: Path) -> None:
    assert "row 2: `text` is null" in problem(parquet(tmp_path, {"text": ["a", None]}))
    assert "holds int64, expected strings" in problem(parquet(tmp_path, {"text": [1, 2]}))


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.jsonl", b"", "is empty"),
        ("a.jsonl", b"\n \n", "is empty"),
        ("a.json", b"[]", "is empty"),
        ("a.json", b'[{"text": "a"},\n{"text": b}]', "line 2: invalid JSON"),
        ("a.json", b'[{"text": "a"},\n', "no closing ]"),
        ("a.jsonl.gz", gzip.compress(LINES.encode())[:-20], "cannot be read"),
        ("a.jsonl.gz", b"not gzip at all", "cannot be read"),
        ("a.jsonl.zst", b"not zstd at all", "cannot be read"),
        ("a.jsonl.zst", zstandard.compress(LINES.encode())[:-1], "ends within a zstandard frame"),
        ("a.jsonl.zst", zstandard.compress(LINES.encode())[:20], "ends within a zstandard frame"),
        ("a.jsonl.zst", zstandard.compress(LINES.encode() * 2) + b"rest", "cannot be read"),
        ("a.json", b'[{"text": "a"},\n' + b"[" * 5000, "line 2: invalid JSON"),
        ("a.parquet", b"not parquet at all", "no parquet file"),
        ("a.parquet", b"", "no parquet file"),
        ("a.arrow", b"not arrow at all", "no arrow file"),
        ("a.arrow", b"ARROW1 but nothing after it", "no arrow file"),
        ("a.arrow", b"", "is empty"),
        ("a.txt", b"text", "unsupported kind of file"),
    ],
)
def test_unreadable_files_end_in_one_sentence(
    tmp_path: Path, name: str, content: bytes, reason: str
) -> None:
    message = problem(written(tmp_path, name, content))
    assert name in message and reason in message


def test_missing_file_is_one_sentence(tmp_path: Path) -> None:
    assert "cannot be read" in problem(tmp_path / "a.parquet")


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


def test_memory_stays_flat(tmp_path: Path) -> None:
    import tracemalloc

    path = tmp_path / "big.jsonl"
    line = json.dumps({"text": "x" * 10_000}) + "\n"
    with path.open("w") as file:
        for _ in range(3000):  # 30 MB
            file.write(line)
    tracemalloc.start()
    assert sum(1 for _ in TextFile(path)) == 3000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2_000_000


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
