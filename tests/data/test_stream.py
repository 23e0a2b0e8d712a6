"""A stream gives every document once an epoch, in one order, whoever reads it and from where."""

import contextlib
import itertools
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llama_lib.data import tokenise
from llama_lib.data.chunks import Place
from llama_lib.data.loader import BatchLoader
from llama_lib.data.position import Position
from llama_lib.data.prepare import PrepareRequest, prepare
from llama_lib.data.stream import Stream, StreamedRows
from llama_lib.data.tokenise import text_hash
from llama_lib.errors import RunError, UserError
from tests.data.streams import first_boundary, ids, read, stream, texts, tokenised, write

KINDS = ("jsonl", "jsonl.gz", "jsonl.zst", "parquet", "whole.parquet")
ONE_AND_ALL = [KINDS, *(pytest.param((kind,), marks=pytest.mark.full) for kind in KINDS)]


def files(folder: Path, *kinds: str, count: int = 150) -> list[Path]:
    return [
        write(folder / f"{kind.replace('.', '_')}{number}.{kind}", texts(f"{kind}{number}", count))
        for kind in kinds
        for number in range(2)
    ]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return files(tmp_path_factory.mktemp("mixed"), *KINDS)


@pytest.mark.parametrize("kinds", ONE_AND_ALL, ids=" ".join)
def test_every_token_of_every_document_comes_once_an_epoch(
    tmp_path: Path, tokenizer_path: Path, cache_dir: Path, kinds: tuple[str, ...]
) -> None:
    paths = files(tmp_path, *kinds)
    documents = tokenised(read(paths), tokenizer_path)
    total = sum(map(len, documents.values()))
    rows = stream(paths, tokenizer_path, cache_dir).rows()
    assert total % rows.max_length, "the test needs a row that carries into the next epoch"
    end = first_boundary(rows, 2 * total)
    counts = {key: np.zeros(len(tokens), int) for key, tokens in documents.items()}
    content = ids(rows, range(end))
    for row, passages in zip(content, rows.passages(range(end)), strict=True):
        place = 0
        for _, file, number, start, length in passages:
            expected = documents[file, number][start : start + length]
            assert row[place : place + length].tolist() == expected
            counts[file, number][start : start + length] += 1
            place += length
        assert place == rows.max_length
    for count in counts.values():
        assert set(count.tolist()) <= {2, 3}
    assert sum(int(count.sum()) for count in counts.values()) == end * rows.max_length
    rows.close()


def test_tokens_are_those_of_prepare(
    mixed: list[Path], tokenizer_path: Path, cache_dir: Path, tmp_path: Path
) -> None:
    request = PrepareRequest(
        [str(path) for path in mixed], str(tokenizer_path), eval_ratio=0.0, cache_dir=tmp_path
    )
    prepared = prepare(request)
    expected = Counter(
        prepared.tokens(number).astype(int).tobytes() for number in range(prepared.num_documents)
    )
    rows = stream(mixed, tokenizer_path, cache_dir, window=1000).rows()
    end = first_boundary(rows, prepared.num_tokens)
    documents: dict[Any, dict[int, int]] = {}
    for row, passages in zip(ids(rows, range(end)), rows.passages(range(end)), strict=True):
        parts = np.split(row, np.cumsum([passage.length for passage in passages])[:-1])
        for passage, part in zip(passages, parts, strict=True):
            tokens = documents.setdefault((passage.source, passage.number), {})
            tokens |= dict(enumerate(part.tolist(), passage.start))
    whole = Counter(
        np.array([tokens[place] for place in range(len(tokens))], int).tobytes()
        for tokens in documents.values()
    )
    assert whole == expected
    rows.close()


@pytest.mark.parametrize(
    ("dp_size", "accumulation", "workers"),
    [
        (2, 2, 1),
        *(pytest.param(*case, marks=pytest.mark.full) for case in ((1, 1, 2), (1, 2, 0))),
        *(pytest.param(*case, marks=pytest.mark.full) for case in ((2, 1, 0), (4, 1, 1))),
    ],
)
def test_batches_are_the_same_for_every_number_of_ranks_and_workers(
    mixed: list[Path],
    tokenizer_path: Path,
    cache_dir: Path,
    dp_size: int,
    accumulation: int,
    workers: int,
) -> None:
    reference = stream(mixed, tokenizer_path, cache_dir, document_mask=True).rows()
    same = stream(mixed, tokenizer_path, cache_dir, document_mask=True, workers=workers)
    loaders = [BatchLoader(same.rows(), 8, rank, dp_size, accumulation) for rank in range(dp_size)]
    for step in (0, 1, 30):
        samples = list(range(8 * step, 8 * step + 8))
        expected, num_labels = reference.rows(samples, samples)
        parts = [loader.batch(step) for loader in loaders]
        assert {part.num_labels for part in parts} == {num_labels}
        for field in ("ids", "labels", "documents"):
            found = [
                getattr(part.micro_batches[number], field)
                for number in range(accumulation)
                for part in parts
            ]
            wanted = np.stack([getattr(row, field) for row in expected])
            np.testing.assert_array_equal(np.concatenate(found), wanted)
        consumed: Counter[str] = Counter()
        for part in parts:
            consumed.update(part.tokens)
        assert consumed.total() == 8 * reference.max_length
    for rows in [reference, *(loader.source for loader in loaders)]:
        rows.close()


def test_masked_rows_count_their_labels(
    mixed: list[Path], tokenizer_path: Path, cache_dir: Path
) -> None:
    masked = stream(mixed, tokenizer_path, cache_dir, document_mask=True).rows()
    plain = stream(mixed, tokenizer_path, cache_dir).rows()
    rows, num_labels = masked.rows(range(20), range(20))
    assert num_labels == sum(int((row.labels[1:] != -100).sum()) for row in rows)
    bare, all_labels = plain.rows(range(20), range(20))
    assert all_labels == 20 * 47 > num_labels
    assert all(row.documents is None and (row.labels == row.ids).all() for row in bare)
    np.testing.assert_array_equal([row.ids for row in rows], [row.ids for row in bare])
    ends = [int(row.documents.max()) + 1 for row in rows if row.documents is not None]
    assert ends == [len(passages) for passages in masked.passages(range(20))]
    masked.close()
    plain.close()


def test_plain_files_are_cut_into_parts_that_are_read_by_themselves(
    mixed: list[Path], tokenizer_path: Path, cache_dir: Path
) -> None:
    corpus = stream(mixed, tokenizer_path, cache_dir).corpora[0]
    kinds = {path.name.partition(".")[2] for path in mixed}
    assert kinds == set(KINDS)
    for number, file in enumerate(corpus.files):
        parts = corpus.parts[corpus.parts[:, 0] == number]
        if file.name.endswith(("gz", "zst")):
            assert number in corpus.whole_files and not len(parts)
        elif "whole" in file.name:
            assert parts[:, 1:].tolist() == [[0, 1, True]]
        else:
            assert len(parts) > 2 and not parts[:, 3].any()
    lines = "\n".join(stream(mixed, tokenizer_path, cache_dir).describe())
    assert "10 file(s)" in lines and "windows of 4 chunks" in lines
    assert "4 file(s) can only be read from the beginning" in lines


def test_chunks_of_every_epoch_are_the_same_in_another_order(
    mixed: list[Path], tokenizer_path: Path, cache_dir: Path
) -> None:
    def chunks(seed: int) -> list[list[tuple[int, int, int, int]]]:
        corpus = stream(mixed, tokenizer_path, cache_dir, seed=seed).corpora[0]
        epochs: list[list[tuple[int, int, int, int]]] = [[], []]
        for task in itertools.takewhile(lambda t: t.place.epoch < 2, corpus.tasks(Place(0, 0, 0))):
            first = task.records[0] if task.records else 0
            key = (task.file, task.part.start, first, len(task.documents or ()))
            epochs[task.place.epoch].append(key)
        return epochs

    one, two = chunks(1)
    assert len(one) == len(set(one)) > 50
    assert one != two and sorted(one) == sorted(two)
    assert chunks(1) == [one, two]
    other = chunks(2)[0]
    assert other != one and sorted(other) == sorted(one)


def test_ready_made_rows_are_streamed_as_they_are(
    tmp_path: Path, tokenizer_path: Path, cache_dir: Path
) -> None:
    chance = np.random.default_rng(0)
    made = [chance.integers(0, 256, size).tolist() for size in (5, 0, 48, 100, 7)]
    pq.write_table(pa.table({"input_ids": made}), tmp_path / "a.parquet")
    rows = stream([tmp_path / "a.parquet"], tokenizer_path, cache_dir).rows()
    content = ids(rows, range(20))
    for row, passages in zip(content, rows.passages(range(20)), strict=True):
        wanted = [made[p.number][p.start : p.start + p.length] for p in passages]
        assert row.tolist() == list(itertools.chain(*wanted))
    rows.close()
    masked = stream([tmp_path / "a.parquet"], tokenizer_path, cache_dir, document_mask=True).rows()
    with pytest.raises(UserError, match="do not say where documents end"):
        ids(masked, [0])
    pq.write_table(pa.table({"input_ids": [[1, 2, 10**6]]}), tmp_path / "b.parquet")
    wrong = stream([tmp_path / "b.parquet"], tokenizer_path, cache_dir).rows()
    with pytest.raises(UserError, match=r"b\.parquet holds the ids 1 to 1000000"):
        ids(wrong, [0])


def document_order(rows: StreamedRows, end: int) -> list[tuple[str, int]]:
    """Documents by where they first show up."""
    passages = itertools.chain(*rows.passages(range(end)))
    return list(dict.fromkeys((passage.file, passage.number) for passage in passages))


def test_order_is_a_function_of_seed_and_epoch(
    mixed: list[Path], tokenizer_path: Path, cache_dir: Path
) -> None:
    total = sum(map(len, tokenised(read(mixed), tokenizer_path).values()))

    def order(**options: Any) -> list[np.ndarray]:
        rows = stream(mixed, tokenizer_path, cache_dir, **options).rows()
        half = total // 2 // rows.max_length
        once = total // rows.max_length + 1
        found = [ids(rows, range(half)), ids(rows, range(once, once + half))]
        rows.close()
        return found

    first, second = order()
    np.testing.assert_array_equal(order()[0], first)
    assert not np.array_equal(first, second)
    assert not np.array_equal(order(seed=8)[0], first)
    assert not np.array_equal(order(window=5)[0], first)


def test_compressed_documents_move_within_a_window_and_others_over_all_files(
    tmp_path: Path, tokenizer_path: Path, cache_dir: Path
) -> None:
    def moves(path: Path) -> np.ndarray:
        rows = stream([path], tokenizer_path, cache_dir, window=3).rows()
        total = sum(map(len, tokenised(read([path]), tokenizer_path).values()))
        order = [number for _, number in document_order(rows, total // rows.max_length)]
        rows.close()
        return np.abs(np.array(order) - np.arange(len(order)))

    documents = [f"document {number} " + "on the mat " * 5 for number in range(1000)]
    per_window = 3 * 2000 // len(documents[0]) + 1
    compressed = moves(write(tmp_path / "a.jsonl.gz", documents))
    assert per_window / 2 < compressed.max() < 1.2 * per_window
    assert moves(write(tmp_path / "b.jsonl", documents)).max() > 5 * per_window


@pytest.mark.parametrize("kinds", ONE_AND_ALL, ids=" ".join)
def test_resumed_at_any_sample_the_rows_are_the_same(
    tmp_path: Path, tokenizer_path: Path, cache_dir: Path, kinds: tuple[str, ...]
) -> None:
    paths = files(tmp_path, *kinds, count=60)
    total = sum(map(len, tokenised(read(paths), tokenizer_path).values()))
    source = stream(paths, tokenizer_path, cache_dir)
    rows = source.rows()
    end = int(2.2 * total / rows.max_length)
    expected = ids(rows, range(end + 20))
    for sample in {0, 1, *range(5, end, max(1, end // 12)), end}:
        resumed = source.rows(rows.state(sample))
        np.testing.assert_array_equal(
            ids(resumed, range(sample, sample + 20)), expected[sample : sample + 20]
        )
        assert resumed.state(sample + 3) == rows.state(sample + 3)
        resumed.close()
    with pytest.raises(ValueError, match="sample 0 lies before"):
        ids(source.rows(rows.state(end)), [0])
    # Asked for again, in the same process.
    np.testing.assert_array_equal(ids(rows, range(3, 9)), expected[3:9])
    rows.close()


def test_resuming_opens_no_part_that_was_used_before(
    tmp_path: Path, tokenizer_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = files(tmp_path, "jsonl", "parquet", count=400)
    source = stream(paths, tokenizer_path, cache_dir, window=2)
    rows = source.rows()
    opened = watch_parts(monkeypatch)
    total = sum(map(len, tokenised(read(paths), tokenizer_path).values()))
    sample = int(0.7 * total / rows.max_length)
    ids(rows, range(sample + 30))
    rows.close()
    before = list(opened)
    state = rows.state(sample)
    opened.clear()
    resumed = source.rows(state)
    ids(resumed, range(sample, sample + 10))
    resumed.close()
    place = before.index(opened[0])
    assert place > 0.6 * len(before)
    assert not set(opened) & set(before[:place])
    assert resumed.num_chunks <= 3 * 2


def watch_parts(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """(file, start) of every part that is opened from now on, in this process."""
    from llama_lib.data import chunk_work, chunks
    from llama_lib.data.readers import TextFile

    opened: list[tuple[str, int]] = []

    class Watched(TextFile):
        def __init__(self, path: Path, skip_bad_lines: bool = False, part: Any = None) -> None:
            opened.append((path.name, part.start if part else -1))
            super().__init__(path, skip_bad_lines, part)

    monkeypatch.setattr(chunk_work, "TextFile", Watched)
    monkeypatch.setattr(chunks, "TextFile", Watched)
    return opened


def test_a_compressed_file_is_read_again_with_progress_and_no_other_file(
    tmp_path: Path,
    tokenizer_path: Path,
    cache_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    paths = [write(tmp_path / f"{n}.jsonl.zst", texts(str(n), 300)) for n in range(4)]
    source = stream(paths, tokenizer_path, cache_dir, window=2)
    opened = watch_parts(monkeypatch)
    rows = source.rows()
    total = sum(map(len, tokenised(read(paths), tokenizer_path).values()))
    sample = int(0.6 * total / rows.max_length)
    expected = ids(rows, range(sample, sample + 3))
    state = rows.state(sample)
    assert state["parts"][0]["chunk"] > 0
    rows.close()
    before = list(opened)
    capsys.readouterr()
    opened.clear()
    resumed = source.rows(state)
    np.testing.assert_array_equal(ids(resumed, range(sample, sample + 3)), expected)
    resumed.close()
    current = before.index(opened[0])
    assert current > 0 and opened[: len(before) - current] == before[current:][: len(opened)]
    path = tmp_path / opened[0][0]
    errors = capsys.readouterr().err
    assert f"re-reading {path} to where the run stood" in errors
    assert f"re-read {path}" in errors
    assert errors.count("re-reading") == 1


@pytest.mark.parametrize(("dp_size", "global_batch"), [(1, 12), (4, 16)])
def test_resumed_with_another_batch_it_goes_on_with_the_next_unseen_sample(
    mixed: list[Path], tokenizer_path: Path, cache_dir: Path, dp_size: int, global_batch: int
) -> None:
    source = stream(mixed, tokenizer_path, cache_dir)
    before = BatchLoader(source.rows(), 8)
    seen = [before.batch(step).micro_batches[0].ids for step in range(5)]
    state = before.source.state(40)
    position = Position(5, 40)
    ranks = [
        BatchLoader(source.rows(state), global_batch, rank, dp_size, position=position)
        for rank in range(dp_size)
    ]
    after = [rank.batch(step).micro_batches[0].ids for step in (5, 6) for rank in ranks]
    together = np.concatenate([*seen, *after])
    reference = source.rows()
    np.testing.assert_array_equal(together, ids(reference, range(40 + 2 * global_batch)))
    for rows in [reference, before.source, *(rank.source for rank in ranks)]:
        rows.close()


def test_skipped_samples_change_no_others(
    mixed: list[Path], tokenizer_path: Path, cache_dir: Path
) -> None:
    source = stream(mixed, tokenizer_path, cache_dir)
    one, other = source.rows(), source.rows()
    expected = ids(one, range(400))
    loader = BatchLoader(other, 8, position=Position(0, 0, ((20, 300),)))
    found = np.concatenate([loader.batch(step).micro_batches[0].ids for step in range(4)])
    np.testing.assert_array_equal(found, expected[[*range(20), *range(300, 312)]])
    one.close()
    other.close()


def test_held_out_texts_are_left_out(
    mixed: list[Path], tokenizer_path: Path, cache_dir: Path
) -> None:
    found = read(mixed)
    held_out = {key for number, key in enumerate(found) if number % 5 == 0}
    hashes = {text_hash(found[key].encode()) for key in held_out}
    rows = stream(mixed, tokenizer_path, cache_dir, excluded=hashes).rows()
    kept = tokenised({k: v for k, v in found.items() if k not in held_out}, tokenizer_path)
    end = first_boundary(rows, 2 * sum(map(len, kept.values())))
    assert set(document_order(rows, end)) == set(kept)
    assert rows.num_excluded == len(held_out)
    rows.close()


def test_weights_share_the_rows(mixed: list[Path], tokenizer_path: Path, cache_dir: Path) -> None:
    big, small = mixed[0], mixed[2]
    blend = stream([f"{big}:0.75", f"{small}:0.25"], tokenizer_path, cache_dir)
    assert any("75.00%" in line and "25.00%" in line for line in blend.describe())
    rows = blend.rows()
    found, _ = rows.rows(range(400), range(400))
    names = [next(iter(row.tokens)) for row in found]
    assert all(len(row.tokens) == 1 for row in found)
    assert Counter(names) == {blend.sources[0]: 300, blend.sources[1]: 100}
    for number, path in enumerate((big, small)):
        alone = stream([path], tokenizer_path, cache_dir).rows()
        own = [
            row.ids for row, name in zip(found, names, strict=True) if name == blend.sources[number]
        ]
        np.testing.assert_array_equal(own, ids(alone, range(len(own))))
        alone.close()
    for sample in (0, 37, 399):
        resumed = blend.rows(rows.state(sample))
        np.testing.assert_array_equal(
            ids(resumed, range(sample, sample + 9)), ids(rows, range(sample, sample + 9))
        )
        resumed.close()
    rows.close()


def test_states_are_right_while_the_next_batch_is_made(
    mixed: list[Path], tokenizer_path: Path, cache_dir: Path
) -> None:
    source = stream(mixed, tokenizer_path, cache_dir, window=1)
    loader = BatchLoader(source.rows(), 8)
    states = [loader.source.state(rows.samples[-1] + 1) for rows in loader.steps(0, 60)]
    epochs = {loader.source.epoch_of(sample) for sample in range(0, 480, 8)}
    loader.close()
    plain = source.rows()
    ids(plain, range(490))
    assert states == [plain.state(8 * step + 8) for step in range(60)]
    assert len({state["parts"][0]["sample"] for state in states}) > 10
    assert epochs == {0}
    plain.close()


def test_gigatoken_is_proven_on_every_source(
    tmp_path: Path,
    tokenizer_path: Path,
    cache_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    true_encoder = tokenise.gigatoken_encoder
    encoded: list[str] = []

    def wrong_on_odd(tokenizer_json: str) -> Any:
        encode = true_encoder(tokenizer_json)

        def altered(documents: Any) -> Any:
            encoded.extend(documents)
            rows = encode(documents)
            return [r + ("odd" in t) for t, r in zip(documents, rows, strict=True)]

        return altered

    monkeypatch.setattr(tokenise, "gigatoken_encoder", wrong_on_odd)
    good = write(tmp_path / "good.jsonl", texts("good", 60))
    odd = write(tmp_path / "odd.jsonl", [f"odd {text}" for text in texts("bad", 60)])
    documents = tokenised(read([good, odd]), tokenizer_path)
    rows = stream([good, odd], tokenizer_path, cache_dir).rows()
    end = first_boundary(rows, sum(map(len, documents.values())))
    for row, passages in zip(ids(rows, range(end)), rows.passages(range(end)), strict=True):
        wanted = [documents[p.file, p.number][p.start : p.start + p.length] for p in passages]
        assert row.tolist() == list(itertools.chain(*wanted))
    rows.close()
    errors = capsys.readouterr().err
    assert "tokenising odd with tokenizers" in errors and "tokenising good" not in errors
    assert set(read([good]).values()) <= set(encoded)


# -- what goes wrong ---------------------------------------------------------------------------


def change(path: Path) -> None:
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**9))


def test_a_changed_file_is_refused_on_resume_by_name(
    tmp_path: Path, tokenizer_path: Path, cache_dir: Path
) -> None:
    paths = files(tmp_path, "jsonl")

    def opened(which: list[Path] = paths, **options: Any) -> Stream:
        return stream(which, tokenizer_path, cache_dir, **options)

    rows = opened().rows()
    ids(rows, range(9))
    state = rows.state(9)
    rows.close()
    assert opened(workers=1).problems_of(state) == []
    with pytest.raises(UserError, match="the checkpoint was made from another stream"):
        opened(seed=8).rows(state)
    with pytest.raises(UserError, match=r"jsonl1\.jsonl belonged to the stream"):
        opened(paths[:1]).rows(state)
    change(paths[1])
    with pytest.raises(UserError, match=r"jsonl1\.jsonl was changed: \["):
        opened().rows(state)
    assert len(opened().problems_of(state)) == 1


def test_a_file_that_changes_or_goes_away_meanwhile_ends_the_run(
    tmp_path: Path, tokenizer_path: Path, cache_dir: Path
) -> None:
    for kind in ("jsonl", "jsonl.gz"):
        paths = files(tmp_path, kind, count=100)
        rows = stream(paths, tokenizer_path, cache_dir, window=1).rows()
        ids(rows, range(2))
        for path in paths:
            change(path)
        with pytest.raises(RunError, match="was changed while it was streamed"):
            ids(rows, range(5000))
        rows.close()
        rows = stream(paths, tokenizer_path, cache_dir, window=1).rows()
        ids(rows, range(2))
        for path in paths:
            path.unlink()
        with pytest.raises(RunError, match="cannot be read any more"):
            ids(rows, range(5000))
        rows.close()


def rows_before_an_error(rows: StreamedRows) -> int:
    with contextlib.closing(rows), contextlib.suppress(UserError):
        for sample in itertools.count():
            ids(rows, [sample])
    return sample


@pytest.mark.parametrize(("kind", "workers"), [("jsonl", 1), ("jsonl.gz", 2)])
def test_bad_lines_are_named_or_counted(
    tmp_path: Path, tokenizer_path: Path, cache_dir: Path, kind: str, workers: int
) -> None:
    documents: list[Any] = [f"document {number} " + "the cat " * 120 for number in range(200)]
    documents[150] = 5
    path = write(tmp_path / f"bad.{kind}", documents)
    rows = stream([path], tokenizer_path, cache_dir, workers=workers, window=1).rows()
    before = ids(rows, range(3))
    last = rows.state(1)
    with pytest.raises(UserError, match=r"bad\.jsonl.* line 151: `text` is int"):
        ids(rows, range(5000))
    assert rows_before_an_error(rows) == rows_before_an_error(
        stream([path], tokenizer_path, cache_dir, workers=0, window=1).rows()
    )
    rows.close()
    skipping = stream(
        [path], tokenizer_path, cache_dir, workers=workers, window=1, skip_bad_lines=True
    )
    # The run that ended at the bad line may go on without it.
    rows = skipping.rows(last)
    np.testing.assert_array_equal(ids(rows, range(1, 3)), before[1:])
    rows.close()
    rows = skipping.rows()
    good = [text for number, text in enumerate(documents) if number != 150]
    kept = tokenised({("", n): text for n, text in enumerate(good)}, tokenizer_path)
    end = first_boundary(rows, 2 * sum(map(len, kept.values())))
    assert rows.bad_lines == {str(path): 1}
    assert max(number for _, number in document_order(rows, end)) == 198
    rows.close()


def test_what_cannot_be_streamed_is_said_at_once(
    tmp_path: Path, tokenizer_path: Path, cache_dir: Path
) -> None:
    (tmp_path / "empty.jsonl").touch()
    path = write(tmp_path / "a.jsonl", ["one", "two"])
    with pytest.raises(UserError) as caught:
        stream([tmp_path / "empty.jsonl", f"{path}[5]"], tokenizer_path, cache_dir)
    assert "empty.jsonl is empty" in str(caught.value) and "draw 5 documents" in str(caught.value)
    rows = stream([write(tmp_path / "b.jsonl", ["", ""])], tokenizer_path, cache_dir).rows()
    with pytest.raises(UserError, match="no document is left to train on"):
        ids(rows, [0])
    rows.close()


def test_one_short_document_fills_rows_by_itself(
    tmp_path: Path, tokenizer_path: Path, cache_dir: Path
) -> None:
    path = write(tmp_path / "a.jsonl", ["the cat"])
    rows = stream([path], tokenizer_path, cache_dir).rows()
    tokens = tokenised(read([path]), tokenizer_path)["a.jsonl", 0]
    endless = tokens * 48
    assert ids(rows, range(3)).ravel().tolist() == endless[: 3 * 48]
    assert rows.epoch_of(0) == 0 and rows.epoch_of(2) == 96 // len(tokens)
    rows.close()
