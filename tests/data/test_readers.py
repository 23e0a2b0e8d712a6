"""Every kind of file gives the same texts; everything wrong is named by file and line."""

import gzip
import json
from pathlib import Path

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
        ("blank.jsonl", b"\n" + LINES.replace("\n", "\n\n").encode()),
        ("a.jsonl.gz", gzip.compress(LINES.encode())),
        ("a.jsonl.zst", zstandard.compress(LINES.encode())),
        # what `zstd -T` and concatenated files look like: several frames
        ("frames.jsonl.zst", zstandard.compress(b"") + zstandard.compress(LINES.encode())),
        ("array.json", json.dumps([json.loads(line) for line in LINES.splitlines()]).encode()),
        ("lines.json", LINES.encode()),
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
        ("a.parquet", b"not parquet at all", "no parquet file"),
        ("a.txt", b"text", "unsupported kind of file"),
    ],
)
def test_unreadable_files_end_in_one_sentence(
    tmp_path: Path, name: str, content: bytes, reason: str
) -> None:
    message = problem(written(tmp_path, name, content))
    assert name in message and reason in message


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
