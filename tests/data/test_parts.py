"""The parts of a file hold every record of it once, in order, whatever their size."""

import errno
import gzip
import json
import random
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llama_lib.data.parts import Part, is_seekable, parts_of
from llama_lib.data.readers import TextFile
from llama_lib.errors import RunError, UserError


def texts_of(parts: list[Part], skip_bad_lines: bool = False) -> list[str]:
    return [text for part in parts for text in TextFile(part.path, skip_bad_lines, part)]


def random_file(rng: random.Random, path: Path) -> list[str]:
    """A file of every kind of line that there is; the texts that Python's own parser finds."""
    lines = []
    for _ in range(rng.randrange(1, 40)):
        text = "".join(rng.choice("ab \u00e9\u4f60\U0001f600\u2028\x85\n\r") for _ in range(9))
        text *= rng.choice((0, 1, 1, 2, 30))
        line = json.dumps({"text": text}, ensure_ascii=rng.random() < 0.3)
        lines.append(rng.choice((line, line, line, "", "  ", f" {line}\t")))
    ending = rng.choice(("\n", "\r\n"))
    content = ending.join(lines) + rng.choice(("", ending, ending * 3))
    path.write_bytes(rng.choice((b"", b"\xef\xbb\xbf")) + content.encode())
    lines = content.split("\n")
    return [json.loads(line)["text"] for line in lines if line.strip()]


@pytest.mark.parametrize("seed", range(40))
def test_every_size_gives_the_records_of_the_whole_file(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    path = tmp_path / "a.jsonl"
    expected = random_file(rng, path)
    size = path.stat().st_size
    if expected:
        assert list(TextFile(path)) == expected
    for num_bytes in {1, 2, 3, 7, 64, size, size + 1, *(rng.randrange(1, size + 1) for _ in "abc")}:
        parts = parts_of(path, num_bytes)
        if expected or len(parts) > 1:
            assert texts_of(parts) == expected
        assert [part.start for part in parts[1:]] == [part.stop for part in parts[:-1]]
        assert (parts[0].start, parts[-1].stop) == (0, size)
        assert sum(TextFile(path, part=part).size for part in parts) == size


def test_parts_have_about_the_size_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "abc"}\n' * 6400)  # 102,400 bytes
    for num_bytes, number in ((1 << 20, 1), (51_200, 2), (10_000, 10), (1000, 102)):
        parts = parts_of(path, num_bytes)
        assert len(parts) == number
        assert all(num_bytes / 2 < part.stop - part.start < num_bytes * 2 for part in parts) or (
            number == 1
        )
        assert parts == parts_of(path, num_bytes)


def test_a_line_longer_than_a_part_is_read_by_one_part_only(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    long = "x" * 3_000_000
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("a", long, "b")))
    parts = parts_of(path, 10_000)
    found = {n: texts for n, part in enumerate(parts) if (texts := texts_of([part]))}
    assert found == {0: ["a", long], len(parts) - 1: ["b"]}


@pytest.mark.parametrize("num_bytes", [5, 40, 1000])
def test_a_bad_line_has_its_true_number_in_every_part(tmp_path: Path, num_bytes: int) -> None:
    lines = [json.dumps({"text": f"\u4f60 {n}"}, ensure_ascii=False) for n in range(50)]
    lines[30:30] = ["", '{"text": 7}']
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(UserError, match=r"a\.jsonl line 32: `text` is int"):
        texts_of(parts_of(path, num_bytes))
    readers = [TextFile(path, True, part) for part in parts_of(path, num_bytes)]
    assert sum(len(list(reader)) for reader in readers) == 50
    assert sum(reader.bad for reader in readers) == 1
    (last_bad,) = [reader.last_bad for reader in readers if reader.bad]
    found = re.fullmatch(r"line (\d+)(?: from byte (\d+) on)?: `text` is int, .*", last_bad)
    assert found is not None
    number, first_byte = int(found[1]), int(found[2] or 0)
    assert path.read_bytes()[first_byte:].split(b"\n")[number - 1] == b'{"text": 7}'


def test_position_runs_from_the_beginning_to_the_end_of_the_part(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"text {n}"}) + "\n" for n in range(1000)))
    for part in parts_of(path, 5000):
        reader = TextFile(path, part=part)
        positions = [reader.position for _ in reader]
        assert positions == sorted(positions)
        assert 0 < positions[0] < 100 and reader.size - 100 < positions[-1] <= reader.size
        assert reader.position == reader.size


def test_parquet_parts_are_row_groups(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    texts = [f"text number {n} " * 20 for n in range(1000)]
    table = pa.table({"text": texts, "other": list(range(1000))})
    pq.write_table(table, path, row_group_size=90, compression="none", use_dictionary=False)
    assert parts_of(path, 1 << 30) == [Part(path, 0, 12)]
    for num_bytes in (1, 60_000, 150_000):
        parts = parts_of(path, num_bytes)
        assert texts_of(parts) == texts
        assert parts[0].start == 0 and parts[-1].stop == 12
        assert sum(TextFile(path, part=part).size for part in parts) == path.stat().st_size
    assert len(parts_of(path, 1)) == 12
    assert len(parts_of(path, 60_000)) == 6
    reader = TextFile(path, part=Part(path, 3, 5))
    positions = [reader.position for _ in reader]
    assert positions == sorted(positions) and reader.position == reader.size


def test_bad_row_has_its_true_number_in_every_row_group(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pa.table({"text": [None if n == 57 else f"text {n}" for n in range(100)]})
    pq.write_table(table, path, row_group_size=10)
    with pytest.raises(UserError, match=r"row 58: `text` is null"):
        texts_of(parts_of(path, 1))
    assert len(texts_of(parts_of(path, 1), skip_bad_lines=True)) == 99


def test_files_that_can_only_be_read_whole_have_one_part(tmp_path: Path) -> None:
    content = b'{"text": "abc"}\n' * 1000
    for name, written in (
        ("a.jsonl.gz", gzip.compress(content)),
        ("a.json", content),
    ):
        path = tmp_path / name
        path.write_bytes(written)
        assert not is_seekable(path)
        assert parts_of(path, 10) == [Part(path, 0, len(written))]
        assert texts_of(parts_of(path, 10)) == ["abc"] * 1000
        with pytest.raises(ValueError, match="no parts"):
            TextFile(path, part=Part(path, 10, 20))
    assert is_seekable(Path("a.JSONL")) and is_seekable(Path("a.parquet"))
    assert not is_seekable(Path("a.jsonl.zst")) and not is_seekable(Path("a.arrow"))


def test_only_a_part_may_be_without_a_record(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n" * 50 + '{"text": "a"}\n')
    parts = parts_of(path, 16)
    assert [texts_of([part]) for part in parts] == [[], [], [], ["a"]]
    path.write_text("\n" * 64)
    assert texts_of(parts_of(path, 16)) == []
    with pytest.raises(UserError, match="is empty"):
        texts_of(parts_of(path, 64))


def test_cutting_a_file_on_a_disk_that_fails_is_no_mistake_of_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise OSError(errno.ETIMEDOUT, "Connection timed out")

    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "a.parquet")
    monkeypatch.setattr(pq, "ParquetFile", fails)
    with pytest.raises(RunError, match=r"a\.parquet cannot be read: .*timed out"):
        parts_of(tmp_path / "a.parquet", 10)


def test_damaged_parquet_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(b"not parquet at all")
    with pytest.raises(UserError, match=r"a\.parquet is damaged, or no parquet file"):
        parts_of(path, 10)
    with pytest.raises(UserError, match="cannot be read"):
        parts_of(tmp_path / "absent.parquet", 10)
