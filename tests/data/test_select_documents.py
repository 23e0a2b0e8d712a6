"""Which documents are trained on: lengths, duplicates, subsets, budgets; each reason counted."""

import contextlib
import errno
import json
import os
import resource
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from llama_lib.data import assemble, dedup, fates, tokenised
from llama_lib.data.dedup import Duplicates
from llama_lib.data.draw import Draw, drawn
from llama_lib.data.prepare import PrepareRequest, prepare
from llama_lib.data.prepared import PreparedDataset
from llama_lib.data.sources import Source
from llama_lib.data.tokenised import DOCUMENT, Stored, Tokenised
from llama_lib.errors import UserError


def texts_of(dataset: PreparedDataset, source: str | None = None) -> list[str]:
    tokenizer = AutoTokenizer.from_pretrained(dataset.tokenizer_path)
    chosen = dataset.only(source) if source else dataset
    return [tokenizer.decode(chosen.tokens(n)[:-1].tolist()) for n in range(chosen.num_documents)]


@pytest.fixture
def request_for(tmp_path: Path, tokenizer_path: Path):  # type: ignore[no-untyped-def]
    def make(*datasets: object, **options: object) -> PrepareRequest:
        options = {
            "cache_dir": tmp_path / "cache",
            "tokenizer": str(tokenizer_path),
            "eval_ratio": 0.0,
            "workers": 1,
            **options,
        }
        return PrepareRequest([str(dataset) for dataset in datasets], **options)  # type: ignore[arg-type]

    return make


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def left_out(dataset: PreparedDataset, source: str | None = None) -> dict[str, int]:
    facts = dataset.manifest["sources"][source] if source else dataset.manifest
    return {name: count for name, count in facts["left_out"].items() if count}


def test_every_filter_is_counted(request_for, write_jsonl, tmp_path) -> None:
    tokens = {text: len(text) + 1 for text in ("xx", "xxxxx", "zzzzz", "qqqqqqqqq")}
    a = write_jsonl("a.jsonl", ["xx", "xxxxx", "", "zzzzz", "qqqqqqqqq", "xxxxx", "kkkkk"])
    with a.open("a") as file:
        file.write("nonsense\n")
    b = write_jsonl("b.jsonl", ["", "zzzzz", "wwwww", "xx"])
    held_out = write_jsonl("held.jsonl", ["kkkkk", "other"])
    dataset = prepare(
        request_for(
            a,
            b,
            skip_bad_lines=True,
            eval_data=[str(held_out)],
            dedup=True,
            min_length=tokens["xxxxx"],
            max_length=tokens["xxxxx"],
        )
    )
    assert dataset.document_lengths.tolist() == [tokens["xxxxx"]] * 3
    assert texts_of(dataset, "a") == ["xxxxx", "zzzzz"]
    assert texts_of(dataset, "b") == ["wwwww"]
    assert left_out(dataset, "a") == {
        "bad_lines": 1,
        "empty_texts": 1,
        "too_short": 1,
        "too_long": 1,
        "duplicates": 1,
        "in_eval_data": 1,
    }
    # the first in order stays, over files and sources; of those left out each has one reason
    assert left_out(dataset, "b") == {"empty_texts": 1, "too_short": 1, "duplicates": 1}
    assert left_out(dataset)["too_short"] == 2
    assert dataset.held_out is not None and texts_of(dataset.held_out) == ["kkkkk", "other"]


def test_files_of_a_source_are_told_apart(request_for, tmp_path, write_jsonl) -> None:
    for number in range(2):
        write_jsonl(
            f"x-0000{number}-of-00002.jsonl", [f"{number} {n}" for n in range(5)] + ["same"]
        )
    dataset = prepare(request_for(tmp_path / "x-*.jsonl", dedup=True))
    assert dataset.sources == ["x"]
    texts = texts_of(dataset)
    assert len(texts) == 11
    for number, text in enumerate(texts):
        file = dataset.file_of("x", number)
        assert file == f"x-0000{text[0] if text != 'same' else 0}-of-00002.jsonl"
    with pytest.raises(IndexError):
        dataset.file_of("x", 11)


def test_duplicates_are_found_whatever_the_number_of_buckets(
    tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = np.random.default_rng(0)
    texts = random.integers(0, 3000, 10_000)
    hashes = np.array([int(t * 7919).to_bytes(16, "big")[::-1] for t in texts], "S16")
    hashes[5] = hashes[6]  # ends in zeros, which numpy's strings do not show
    first: dict[bytes, int] = {}
    raw = [hashes[n : n + 1].tobytes() for n in range(len(hashes))]
    expected = [n for n, value in enumerate(raw) if first.setdefault(value, n) != n]
    assert 6000 < len(expected) < 8000
    for size in (1 << 19, 100):
        monkeypatch.setattr(dedup, "_BUCKET_DOCUMENTS", size)
        with Duplicates(tmp_path / "hashes", len(hashes)) as duplicates:
            for start in range(0, len(hashes), 999):
                part = slice(start, start + 999)
                duplicates.add(hashes[part], np.arange(len(hashes))[part])
            buckets = len(list((tmp_path / "hashes").iterdir()))
            found = np.concatenate(list(duplicates.numbers()))
        assert (buckets == 1) == (size == 1 << 19)
        assert sorted(found.tolist()) == expected
        assert not (tmp_path / "hashes").exists()


def test_draw_is_exact_seeded_and_even() -> None:
    for count, total in ((0 + 1, 1), (1, 1000), (999, 1000), (1000, 1000), (2000, 1000)):
        found = drawn(count, total, 7)
        assert len(found) == min(count, total) and len(set(found.tolist())) == len(found)
        assert found.tolist() == sorted(found.tolist())
        np.testing.assert_array_equal(drawn(count, total, 7), found)
    assert not np.array_equal(drawn(500, 1000, 7), drawn(500, 1000, 8))
    # three million: over several chunks
    found = drawn(100_000, 3_000_000, 1)
    assert len(found) == 100_000
    shares = np.bincount(found // 300_000, minlength=10)
    assert shares.min() > 9_500 and shares.max() < 10_500
    times = np.zeros(50, np.int64)
    for seed in range(2000):
        times[drawn(10, 50, seed)] += 1
    assert times.min() > 320 and times.max() < 480  # 400 +- 4.5 deviations
    assert Draw.of(5, 5, 0).threshold is None


def test_subset_of_an_entry_over_all_its_sources(request_for, tmp_path, write_jsonl) -> None:
    for name in ("one/a", "one/b", "two/c"):
        write_jsonl(f"{name}.jsonl", [f"{name} {n}" for n in range(100)] + [""])
    whole = prepare(request_for(tmp_path / "one", tmp_path / "two"))
    some = prepare(request_for(f"{tmp_path / 'one'}[30]", tmp_path / "two", seed=1))
    chosen = texts_of(some)
    assert Counter(text.split()[0] for text in chosen)["two/c"] == 100
    assert len(chosen) == 130
    assert 5 <= some.manifest["sources"]["a"]["documents"] <= 25  # of both sources
    assert [text for text in texts_of(whole) if text in set(chosen)] == chosen, "order is kept"
    assert left_out(some) == {"empty_texts": 3, "not_drawn": 170}
    again = prepare(request_for(f"{tmp_path / 'one'}[30]", tmp_path / "two", seed=1))
    other = prepare(request_for(f"{tmp_path / 'one'}[30]", tmp_path / "two", seed=2))
    assert again.path == some.path
    assert texts_of(other) != chosen and other.num_documents == 130
    assert len({d.manifest_hash for d in (whole, some, other)}) == 3
    everything = prepare(request_for(f"{tmp_path / 'one'}[1000]", tmp_path / "two"))
    assert texts_of(everything) == texts_of(whole)


def test_subset_is_drawn_after_the_filters_and_before_the_split(request_for, write_jsonl) -> None:
    path = write_jsonl("a.jsonl", ["twice"] * 50 + [f"number {n}" for n in range(99)])
    dataset = prepare(request_for(f"{path}[60]", dedup=True, eval_ratio=0.2, min_length=2))
    assert dataset.held_out is not None
    assert dataset.num_documents + dataset.held_out.num_documents == 60
    assert 4 <= dataset.held_out.num_documents <= 24
    assert left_out(dataset) == {"duplicates": 49, "not_drawn": 40}


def test_limit_of_one_shard_leaves_the_other_whole(request_for, tmp_path, write_jsonl) -> None:
    paths = [
        write_jsonl(f"x-0000{n}-of-00002.jsonl", [f"{n} {m}" for m in range(20)]) for n in range(2)
    ]
    dataset = prepare(request_for(f"{paths[0]}[5]", paths[1]))
    assert Counter(text[0] for text in texts_of(dataset)) == {"0": 5, "1": 20}
    # without a limit the shards are one source, also after they were two
    assert prepare(request_for(*paths)).sources == ["x"]


def limited_to(num_bytes: int) -> contextlib.AbstractContextManager[None]:
    @contextlib.contextmanager
    def limited() -> Iterator[None]:
        unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, unlimited[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)

    return limited()


def test_hashes_that_cannot_be_written_give_an_error_with_its_number(tmp_path) -> None:
    hashes = np.arange(50_000, dtype=">u8").repeat(2).view("S16")
    with (
        Duplicates(tmp_path / "hashes", len(hashes)) as duplicates,
        limited_to(1 << 16),
        pytest.raises(OSError) as caught,
    ):
        duplicates.add(hashes, np.arange(len(hashes)))
    assert caught.value.errno == errno.EFBIG


SMALL_DISK = """
import sys
from llama_lib.data.prepare import main
from llama_lib.errors import LlamaLibError
try:
    main(sys.argv[1:])
except LlamaLibError as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() != 0:
        pytest.skip("mounting a small tmpfs needs root")
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    mounted = subprocess.run(mount, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_room_for_the_fates_is_taken_before_they_are_mapped(small_disk: Path) -> None:
    (small_disk / "filler").write_bytes(bytes(1900 << 10))
    stored = Stored(0, "a", 0, 1, 1 << 20, 1, 0, 0, "", False, 0, 0)
    source = Tokenised(Source("a", (small_disk,)), ((small_disk, (stored,)),))
    # Writing to a page of a file that the disk has no room for ends a process by SIGBUS.
    with pytest.raises(OSError) as caught:
        fates.Fates([source], small_disk, fates.Rules())
    assert caught.value.errno == errno.ENOSPC


def test_a_disk_that_is_full_at_any_moment_gives_one_clean_error(
    small_disk: Path, tmp_path, write_jsonl, tokenizer_path
) -> None:
    path = write_jsonl("a.jsonl", [f"cat {n}" for n in range(12_000)])
    arguments = ["-d", str(path), "--tokenizer", str(tokenizer_path), "--dedup", "--workers", "1"]
    arguments += ["--cache_dir", str(tmp_path / "cache"), "--output", str(small_disk / "out")]
    filler = small_disk / "filler"
    endings = set()
    # Tokens 190 KB, what is known of the documents 290 KB, fates 12 KB, hashes 290 KB, result.
    for left in (100, 300, 485, 495, 600, 900):
        filler.write_bytes(bytes((2048 - left) << 10))
        done = subprocess.run(
            [sys.executable, "-c", SMALL_DISK, *arguments], capture_output=True, text=True
        )
        assert done.returncode in (0, 1), f"{left} KiB: {done.returncode} {done.stderr}"
        if done.returncode:
            assert "RunError: " in done.stderr and "is full. Free space" in done.stderr, left
        endings.add(done.returncode)
        shutil.rmtree(small_disk / "out", ignore_errors=True)
    filler.unlink()
    done = subprocess.run([sys.executable, "-c", SMALL_DISK, *arguments], capture_output=True)
    assert done.returncode == 0 and 1 in endings


def test_memory_of_the_choice_does_not_grow(request_for, write_jsonl, monkeypatch) -> None:
    """What is read at a time is a chunk, whatever the size of a part."""
    path = write_jsonl("a.jsonl", [f"{n}" for n in range(1000)])
    monkeypatch.setattr(fates, "_CHUNK", 64)
    read: list[int] = []
    true = np.fromfile

    def spied(file, dtype, count=-1, **more):  # type: ignore[no-untyped-def]
        found = true(file, dtype, count, **more)
        if dtype == DOCUMENT:
            read.append(len(found))
        return found

    monkeypatch.setattr(fates.np, "fromfile", spied)
    dataset = prepare(request_for(path, dedup=True))
    assert dataset.num_documents == 1000
    assert max(read) == 64 and sum(read) >= 4 * 1000


def test_options_that_cannot_be(request_for, write_jsonl) -> None:
    path = write_jsonl("a.jsonl", ["one", "two"])
    with pytest.raises(UserError) as caught:
        prepare(request_for(f"{path}[0]", min_length=9, max_length=8, mixture="even"))
    text = "\n".join(caught.value.problems)
    assert len(caught.value.problems) == 3
    assert "[0]" in text and "--min_length 9 is above" in text and "--mixture needs" in text
    with pytest.raises(UserError, match="--min_length 0"):
        prepare(request_for(path, min_length=0))
    with pytest.raises(UserError, match="choose one"):
        prepare(request_for(f"{path}:1", num_token=["8:1k"], mixture="even"))
    with pytest.raises(UserError, match="takes no"):
        prepare(request_for(path, eval_data=[f"{path}:1"]))
    with pytest.raises(UserError, match="2 are shorter than --min_length"):
        prepare(request_for(path, min_length=100))


@pytest.fixture
def mixture(tmp_path: Path) -> str:
    path = tmp_path / "mixture.json"
    path.write_text(json.dumps({"book": 75, "wiki": 25}))
    return str(path)


def test_budget_cuts_rows_of_each_source(
    request_for, write_jsonl, tmp_path, mixture, tokenizer_path, capsys
) -> None:
    words = ["the", "cat", "sat", "on", "mat", "number"]
    random = np.random.default_rng(1)
    texts = {
        name: [" ".join(random.choice(words, 20)) for _ in range(count)]
        for name, count in (("book", 200), ("wiki", 100), ("other", 50))
    }
    paths = [write_jsonl(f"{name}.jsonl", lines) for name, lines in texts.items()]
    options = {"num_token": ["64:1k", "32:0.512k"], "mixture": mixture}
    dataset = prepare(request_for(*paths, **options, eval_ratio=0.05))
    assert "other belongs to no entry" in capsys.readouterr().err
    assert dataset.sources == ["book", "wiki"] and dataset.has_rows
    # ceil(750 / 64) = 12 and ceil(384 / 32) = 12; ceil(250 / 64) = 4 and ceil(128 / 32) = 4
    for source, rows in (("book", {64: 12, 32: 12}), ("wiki", {64: 4, 32: 4})):
        assert Counter(dataset.only(source).document_lengths.tolist()) == rows
        assert dataset.manifest["sources"][source]["rows"] is True
    # the rows are the documents of the source in order, ends included
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
    assert dataset.held_out is not None
    kept_aside = set(texts_of(dataset.held_out))
    assert kept_aside and dataset.held_out.sources == ["book", "wiki"]
    stream = [
        token
        for text in texts["book"]
        if text not in kept_aside
        for token in [*tokenizer(text, add_special_tokens=False).input_ids, 2]
    ]
    flat = np.concatenate(list(dataset.readers["book"].chunks(1000)))
    assert flat.tolist() == stream[: len(flat)]
    budget = dataset.manifest["budget"]
    assert budget["rows"]["book"]["64"] == {"asked": 12, "made": 12}
    assert dataset.file_of("wiki", 7) == "wiki.jsonl"
    # As for ready-made rows: which of the bytes offered a row has taken is not known.
    assert dataset.manifest["bytes"] == 0 == dataset.manifest["sources"]["book"]["bytes"]
    assert dataset.held_out.manifest["bytes"] == sum(map(len, kept_aside))
    other = prepare(request_for(*paths, **options, eval_ratio=0.05, seed=5))
    assert other.manifest_hash != dataset.manifest_hash


def test_budget_that_the_text_cannot_fill_is_said_before_and_after(
    request_for, write_jsonl, mixture, tmp_path, capsys
) -> None:
    paths = [write_jsonl(f"{name}.jsonl", ["the cat sat"] * 40) for name in ("book", "wiki")]
    dataset = prepare(request_for(*paths, num_token=["16:4k"], mixture=mixture))
    shown = capsys.readouterr().err
    rows = dataset.manifest["budget"]["rows"]["book"]["16"]
    assert rows["asked"] == 188 and rows["made"] == dataset.readers["book"].num_tokens // 16
    assert "book: 3,008 tokens are asked for, its text has about" in shown
    assert f"book: {rows['made']:,} of 188 rows of 16 tokens made" in shown
    nothing = tmp_path / "nothing.json"
    nothing.write_text(json.dumps({"book": 0, "wiki": 0, "c4": 100}))
    with pytest.raises(UserError, match=r"gives 0 percent to all there is \(book, wiki\)"):
        prepare(request_for(*paths, num_token=["16:4k"], mixture=str(nothing)))
    with pytest.raises(UserError, match="no row could be made"):
        prepare(request_for(*paths, num_token=["100000:1m"], mixture=mixture))


def test_bytes_do_not_depend_on_workers_or_parts_whatever_is_chosen(
    request_for, write_jsonl, tmp_path, mixture, monkeypatch
) -> None:
    paths = [
        write_jsonl(
            f"{name}.jsonl", [f"{name[-1]} {n % 175} {'cat ' * (n % 35)}" for n in range(200)]
        )
        for name in ("book_1", "book_2", "wiki")
    ]
    rules = {"dedup": True, "min_length": 8, "max_length": 30, "eval_ratio": 0.1}
    budget = {"num_token": ["64:4k", "16:0.8k"], "mixture": mixture}
    for number, more in enumerate(({}, budget)):
        words = [f"{paths[0]}[90]", *paths[1:]]
        one = prepare(request_for(*words, **rules, **more, output=tmp_path / f"one-{number}"))
        assert len(one.sources) == 3
        reasons = {"too_short", "too_long", "duplicates", "not_drawn"}
        assert reasons <= left_out(one).keys()
        with monkeypatch.context() as patch:
            patch.setattr(tokenised, "PART_BYTES", 1000)
            patch.setattr(fates, "_CHUNK", 5)
            patch.setattr(assemble, "_CHUNK_TOKENS", 50)
            patch.setattr(dedup, "_BUCKET_DOCUMENTS", 64)
            for workers in (1, 2, 3):
                out = tmp_path / f"{workers}-{number}"
                prepare(request_for(*words, **rules, **more, output=out, workers=workers))
                assert contents(out) == contents(one.path)


def test_ready_made_rows_are_stored_as_they_are(request_for, tmp_path, write_jsonl) -> None:
    rows = [[5, 6, 7], [], [299, 0, 2, 2], [5, 6, 7]]
    pq.write_table(pa.table({"input_ids": rows}), tmp_path / "rows.parquet")
    text = write_jsonl("a.jsonl", ["unusual words", "sat"])
    dataset = prepare(request_for(tmp_path / "rows.parquet", text, min_length=8))
    found = [dataset.only("rows").tokens(n).tolist() for n in range(3)]
    assert found == [rows[0], rows[2], rows[3]]
    assert dataset.has_rows and dataset.manifest["sources"]["rows"]["rows"] is True
    assert dataset.manifest["sources"]["a"]["rows"] is False
    assert left_out(dataset, "rows") == {"empty_texts": 1}
    once = prepare(request_for(tmp_path / "rows.parquet", dedup=True))
    assert once.num_documents == 2 and left_out(once)["duplicates"] == 1
    pq.write_table(pa.table({"input_ids": [[5], [300]]}), tmp_path / "high.parquet")
    with pytest.raises(UserError, match=r"high\.parquet.* 300; .* 0 to 299.*--tokenizer"):
        prepare(request_for(tmp_path / "high.parquet"))
