"""Every kind of file gives the same texts; everything wrong is named by file and line."""

import gzip
import json
import random
import time
from pathlib import Path

import pytest
import zstandard

from llama_lib.data.readers import TextFile
from llama_lib.errors import RunError, UserError
from tests.data.conftest import parquet, problem

TEXTS = ["one", 'two "quoted"\n\nwith lines', "\u4f60\u597d \U0001f600", "four" * 1000]
LINES = "".join(json.dumps({"text": t, "meta": {"n": n}}) + "\n" for n, t in enumerate(TEXTS))


def written(folder: Path, name: str, content: bytes) -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


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


ONE, TWO = b'{"text": "a"}', b'{"text": "b"}'


@pytest.mark.parametrize(
    "content",
    [
        b"[%s]\n[%s]" % (ONE, TWO),
        b"[%s][%s]\n\n" % (ONE, TWO),
        b"[%s],\n[],[%s]\n" % (ONE, TWO),
        b"[%s]\n%s\n" % (ONE, TWO),
        b'{\n"text": "a"}\n[%s]' % TWO,
        b"[%s%s]\n[%s]" % (ONE, b" " * (1 << 21), TWO),
    ],
)
def test_what_follows_an_array_is_read_too(tmp_path: Path, content: bytes) -> None:
    assert list(TextFile(written(tmp_path, "a.json", content))) == ["a", "b"]


@pytest.mark.parametrize("rest", [b"]", b"} x", b"rest of a cut record", b"["])
def test_what_follows_an_array_and_is_no_json_is_named_by_its_line(
    tmp_path: Path, rest: bytes
) -> None:
    path = written(tmp_path, "a.json", b"[%s,\n%s]\n\n%s\n" % (ONE, TWO, rest))
    message = problem(path)
    assert "a.json line 4: " in message or (rest == b"[" and "no closing ]" in message)


@pytest.mark.parametrize(
    ("first", "bad"),
    [
        (b"", 0),
        (b" " * 5000, 0),
        (b"\xef\xbb\xbf\r\n", 0),
        (b"a header", 1),
        (b'nd of a cut record"}', 1),
        (b'{"text": "cut of', 1),
        (b'{"text": broken}', 1),
        (b'{"text": "a"} x', 1),
        (b'{"text": "\xff"}', 1),
        (b'\n{"content": "a"}', 1),
        (b'{"text": "%s" "' % (b"long " * 1000), 1),
    ],
)
def test_json_of_lines_may_begin_with_a_blank_or_bad_one(
    tmp_path: Path, first: bytes, bad: int
) -> None:
    path = written(tmp_path, "a.json", first + b"\n" + LINES.encode())
    reader = TextFile(path, skip_bad_lines=True)
    assert list(reader) == TEXTS and reader.bad == bad
    if bad:
        number = 2 if first.startswith(b"\n") else 1
        assert f"a.json line {number}: " in problem(path)


@pytest.mark.parametrize("content", [ONE + TWO, ONE + b",\n" + TWO + b",\n", ONE + b" \r\n" + TWO])
def test_records_joined_in_other_ways(tmp_path: Path, content: bytes) -> None:
    assert list(TextFile(written(tmp_path, "a.json", content))) == ["a", "b"]


def test_what_is_wrong_inside_a_record_of_an_array_is_named_by_its_own_line(tmp_path: Path) -> None:
    content = b'[\n{"text": "a"},\n{\n"text": "b",\n"meta" 1\n}\n]'
    assert "line 5: invalid JSON" in problem(written(tmp_path, "a.json", content))


def test_array_longer_than_a_chunk(tmp_path: Path) -> None:
    texts = [f"{n} " * 300 for n in range(3000)]
    path = written(tmp_path, "long.json", json.dumps([{"text": t} for t in texts]).encode())
    assert list(TextFile(path)) == texts


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
        (b'{"text": "a\x01"}', "Invalid control character at column 12"),
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


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.jsonl.zst"])
def test_a_disk_that_fails_is_no_mistake_of_the_user(tmp_path: Path, name: str) -> None:
    (tmp_path / name).symlink_to("/proc/self/mem")  # Reading at its beginning is an EIO.
    with pytest.raises(RunError, match=rf"{name} cannot be read: .*Input/output error.*start"):
        list(TextFile(tmp_path / name))


def test_folder_in_place_of_a_file_is_a_mistake_of_the_user(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").mkdir()
    assert "cannot be read" in problem(tmp_path / "a.jsonl")


def test_missing_file_is_one_sentence(tmp_path: Path) -> None:
    assert "cannot be read" in problem(tmp_path / "a.parquet")


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
