"""From files to a prepared dataset: contents, held-out text, cache, refusals, faults."""

import errno
import gzip
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from llama_lib.data import (
    assemble,
    build,
    estimate,
    fates,
    progress,
    tokenise,
    tokenised,
    work_folder,
)
from llama_lib.data import prepare as prepare_module
from llama_lib.data.inspect import main as inspect_main
from llama_lib.data.once import Turn, once, raise_failure
from llama_lib.data.prepare import PrepareRequest, main, prepare
from llama_lib.data.prepared import PreparedDataset, unigram_entropy
from llama_lib.data.sources import Source
from llama_lib.data.work_folder import alone_at
from llama_lib.errors import RunError, UserError

REDPAJAMA = Path(__file__).parents[3] / "shared" / "data" / "redpajama"


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def texts_of(dataset: PreparedDataset | None, tokenizer_path: Path) -> list[str]:
    assert dataset is not None
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
    documents = [dataset.tokens(n).tolist() for n in range(dataset.num_documents)]
    assert all(ids[-1] == 2 and 2 not in ids[:-1] for ids in documents)
    return [tokenizer.decode(ids[:-1]) for ids in documents]


@pytest.fixture
def request_for(tmp_path: Path, tokenizer_path: Path):  # type: ignore[no-untyped-def]
    def make(*datasets: object, **options: object) -> PrepareRequest:
        options = {"cache_dir": tmp_path / "cache", "tokenizer": str(tokenizer_path), **options}
        return PrepareRequest([str(dataset) for dataset in datasets], **options)  # type: ignore[arg-type]

    return make


def test_every_document_lands_on_exactly_one_side(request_for, write_jsonl, tokenizer_path) -> None:
    texts = {name: [f"{name} document {n}" for n in range(200)] for name in ("a", "b")}
    paths = [write_jsonl(f"{name}.jsonl", lines) for name, lines in texts.items()]
    dataset = prepare(request_for(*paths, eval_ratio=0.1))
    trained = texts_of(dataset, tokenizer_path)
    held_out = texts_of(dataset.held_out, tokenizer_path)
    assert sorted(trained + held_out) == sorted(texts["a"] + texts["b"])
    assert 20 <= len(held_out) <= 60  # 0.1 of 400
    assert dataset.sources == ["a", "b"]
    assert dataset.num_tokens == dataset.document_lengths.sum()
    number = trained.index(next(text for text in trained if text.startswith("b")))
    assert dataset.locate(number) == ("b", 0)
    located = [dataset.locate(n)[0] for n in range(dataset.num_documents)]
    assert located == [text[0] for text in trained]
    # what is held out does not depend on the order or company of the documents
    write_jsonl("a.jsonl", texts["a"][::-1])
    again = prepare(request_for(paths[0], eval_ratio=0.1))
    assert set(texts_of(again.held_out, tokenizer_path)) == {
        text for text in held_out if text.startswith("a")
    }


@pytest.mark.parametrize(("ratio", "held_out"), [(1e-9, 1), (0.999999999, 4), (0.0, 0)])
def test_each_side_gets_a_document_if_there_are_two(
    request_for, write_jsonl, ratio: float, held_out: int
) -> None:
    dataset = prepare(request_for(write_jsonl("a.jsonl", list("vwxyz")), eval_ratio=ratio))
    assert dataset.num_documents == 5 - held_out
    assert (dataset.held_out.num_documents if dataset.held_out else 0) == held_out


def test_one_text_however_often_repeated_is_trained_on(request_for, write_jsonl) -> None:
    dataset = prepare(request_for(write_jsonl("a.jsonl", ["same"] * 3), eval_ratio=0.9))
    assert dataset.num_documents == 3 and dataset.held_out is None


def test_eval_data_is_never_trained_on(request_for, write_jsonl, tokenizer_path) -> None:
    data = write_jsonl("a.jsonl", ["one", "two", "three"])
    held_out = write_jsonl("held.jsonl", ["two", "four"])
    dataset = prepare(request_for(data, eval_data=[str(held_out)]))
    assert texts_of(dataset, tokenizer_path) == ["one", "three"]
    assert texts_of(dataset.held_out, tokenizer_path) == ["two", "four"]
    with pytest.raises(UserError, match="3 of -d are in --eval_data too"):
        prepare(request_for(data, eval_data=[str(data)]))


def test_eval_data_of_text_and_tokens_together(
    request_for, write_jsonl, tokenizer_path, tmp_path, capsys
) -> None:
    tokens = prepare(
        request_for(write_jsonl("t.jsonl", ["three", "six"]), eval_ratio=0, output=tmp_path / "t")
    )
    held_out = write_jsonl("held.jsonl", ["two"])
    data = write_jsonl("a.jsonl", ["one", "two", "three", *(f"{n}" for n in range(90))])
    capsys.readouterr()
    words = [str(tokens.path), str(held_out)]
    dataset = prepare(request_for(data, eval_data=words, eval_ratio=0.5))
    shown = capsys.readouterr().err
    assert shown.count("warning: --eval_data") == 1 and f"{tokens.path} holds tokens" in shown
    # text is excluded by text; by tokens it cannot be; nothing else is held out
    assert texts_of(dataset, tokenizer_path) == ["one", "three", *(f"{n}" for n in range(90))]
    assert texts_of(dataset.held_out, tokenizer_path) == ["three", "six", "two"]
    only_tokens = prepare(request_for(data, eval_data=words[:1], eval_ratio=0.5))
    assert only_tokens.num_documents == 93
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"--eval_data .* is prepared already.*pretrain\.py"):
        prepare(request_for(data, eval_data=words, output=out))
    assert not out.exists()


def test_manifest_holds_what_is_promised(request_for, write_jsonl) -> None:
    path = write_jsonl("a.jsonl", ["one", "", "three"])
    with path.open("a") as file:
        file.write("nonsense\n")
    dataset = prepare(request_for(path, eval_ratio=0, skip_bad_lines=True, seed=7))
    manifest = dataset.manifest
    assert (manifest["documents"], manifest["bytes"], manifest["seed"]) == (2, 8, 7)
    assert manifest["tokens"] == dataset.num_tokens
    assert manifest["options"]["skip_bad_lines"] is True
    assert manifest["tokenizer"]["eos_token_id"] == 2
    assert manifest["sources"]["a"]["files"] == [
        {"name": "a.jsonl", "bad_lines": 1, "empty_texts": 1, "documents": 2}
    ]


def test_bytes_do_not_depend_on_workers_or_engine(
    request_for, write_jsonl, tmp_path, monkeypatch
) -> None:
    paths = [write_jsonl(f"{n}.jsonl", [f"{n} {m}" * (m % 9 + 1) for m in range(99)]) for n in "ab"]
    compressed = tmp_path / "c.jsonl.gz"
    compressed.write_bytes(gzip.compress(paths[0].read_bytes()))
    paths = [*paths, compressed]
    one = prepare(request_for(*paths, workers=1, output=tmp_path / "one"))
    assert one.held_out is not None and len(one.sources) == 3
    expected = files_of(one.path)
    monkeypatch.setattr(tokenised, "PART_BYTES", 700)
    for workers in (1, 2, 3):
        folder = tmp_path / f"workers-{workers}"
        prepare(request_for(*paths, workers=workers, output=folder))
        assert files_of(folder) == expected
    monkeypatch.setattr(tokenised, "_BATCH_CHARACTERS", 500)
    monkeypatch.setattr(assemble, "_CHUNK_TOKENS", 100)
    monkeypatch.setattr(fates, "_CHUNK", 7)
    monkeypatch.setattr(tokenise, "_difference", lambda *_: "not wanted")
    prepare(request_for(*paths, workers=1, output=tmp_path / "slow"))
    assert files_of(tmp_path / "slow") == expected


def test_second_call_opens_what_the_first_prepared(request_for, write_jsonl, monkeypatch) -> None:
    path = write_jsonl("a.jsonl", ["one", "two"])
    first = prepare(request_for(path))

    def never(*_: object) -> None:
        raise AssertionError("prepared twice")

    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "build", never)
        assert prepare(request_for(path, seed=1)).manifest_hash == first.manifest_hash
        with pytest.raises(AssertionError, match="prepared twice"):
            prepare(request_for(path, eval_ratio=0.5))
    time.sleep(0.01)
    write_jsonl("a.jsonl", ["one", "TWO"])
    assert prepare(request_for(path)).manifest_hash != first.manifest_hash


def test_same_data_elsewhere_has_the_same_manifest_hash(request_for, write_jsonl) -> None:
    texts = ["one", "two", "three"]
    here = prepare(request_for(write_jsonl("x/a.jsonl", texts)))
    there = prepare(request_for(write_jsonl("y/a.jsonl", texts)))
    assert here.path != there.path
    assert here.manifest_hash == there.manifest_hash


def test_prepared_dataset_is_taken_as_it_is(
    request_for, write_jsonl, tmp_path, cache_dir, tokenizer_path
) -> None:
    made = prepare(request_for(write_jsonl("a.jsonl", ["one", "two"]), output=tmp_path / "made"))
    moved = tmp_path / "moved"
    shutil.move(made.path, moved)
    opened = prepare(PrepareRequest([str(moved)], cache_dir=tmp_path / "other"))
    assert opened.manifest_hash == made.manifest_hash
    assert prepare(request_for(moved)).manifest_hash == made.manifest_hash
    with pytest.raises(UserError, match="another tokenizer"):
        prepare(PrepareRequest([str(moved)], tokenizer="sample", cache_dir=cache_dir))
    with pytest.raises(UserError, match="vocab_size is 200"):
        prepare(PrepareRequest([str(moved)], vocab_size=200))
    held_out = write_jsonl("held.jsonl", ["later"])
    with_eval = prepare(
        PrepareRequest([str(moved)], cache_dir=tmp_path / "other", eval_data=[str(held_out)])
    )
    assert texts_of(with_eval.held_out, tokenizer_path) == ["later"]
    assert with_eval.manifest_hash != made.manifest_hash


def test_refusals(request_for, write_jsonl, tmp_path) -> None:
    path = write_jsonl("a.jsonl", ["one", "two"])
    with pytest.raises(UserError, match=r"299.*--tokenizer"):
        prepare(request_for(path, vocab_size=299))
    with pytest.raises(UserError) as caught:
        prepare(request_for(eval_ratio=2, workers=-1))
    assert len(caught.value.problems) == 3
    with pytest.raises(UserError, match="no tokenizer is given"):
        prepare(request_for(path, tokenizer=None))
    with pytest.raises(UserError, match="every text is empty"):
        prepare(request_for(write_jsonl("empty.jsonl", ["", ""])))
    with pytest.raises(UserError, match="not empty"):
        prepare(request_for(path, output=tmp_path))
    prepare(request_for(path, output=tmp_path / "out"))
    prepare(request_for(path, output=tmp_path / "out"))
    with pytest.raises(UserError, match="other text, tokenizer or options"):
        prepare(request_for(path, output=tmp_path / "out", eval_ratio=0.5))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be made"):
        prepare(request_for(path, cache_dir=tmp_path / "file" / "cache"))


def test_all_that_needs_no_data_is_told_at_once(request_for, write_jsonl, tmp_path) -> None:
    path = write_jsonl("a.jsonl", ["one", "two"])
    with pytest.raises(UserError) as caught:
        prepare(
            request_for(
                path, seed=-1, num_token=["8:1x"], mixture="slimpyjama", output=tmp_path, workers=-1
            )
        )
    found = "\n".join(caught.value.problems)
    assert len(caught.value.problems) == 5
    for part in ("--seed -1", "8:1x", "slimpyjama", "not empty", "--workers -1"):
        assert part in found
    with pytest.raises(UserError, match="needs --mixture"):
        prepare(request_for(path, num_token=["8:1k"]))


def test_weights_are_refused_by_the_command(tmp_path, write_jsonl, tokenizer_path) -> None:
    words = [f"{write_jsonl(f'{name}.jsonl', ['one'])}:0.5" for name in "ab"]
    arguments = ["-d", *words, "--tokenizer", str(tokenizer_path), "--output", str(tmp_path / "o")]
    with pytest.raises(UserError, match=r"weights.*belong to pretrain\.py -d") as caught:
        main([*arguments, "--seed", "-1"])
    assert len(caught.value.problems) == 2
    assert not (tmp_path / "o").exists()


def test_file_that_may_not_be_read_is_named(request_for, write_jsonl, monkeypatch) -> None:
    path = write_jsonl("a.jsonl", ["one"])

    def refused(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", refused)  # root may read everything
        with pytest.raises(UserError, match=r"a\.jsonl cannot be read: Permission denied"):
            prepare_module.file_key(path)


def test_bad_line_leaves_nothing_behind(request_for, write_jsonl, tmp_path) -> None:
    path = write_jsonl("a.jsonl", ["one", 2])
    with pytest.raises(UserError, match=r"a\.jsonl line 2"):
        prepare(request_for(path))
    assert not list((tmp_path / "cache" / "prepared").iterdir())


def test_too_small_a_disk_is_seen_before_the_start(
    request_for, write_jsonl, monkeypatch, capsys
) -> None:
    path = write_jsonl("a.jsonl", ["one two three"] * 100)
    usage = shutil.disk_usage(path)
    # Two bytes per token, a token per character here, and parts and their assembled copy are
    # there at once. The bytes around the text do not count.
    needed = 2 * 2 * 13 * 100

    def free(num_bytes: int) -> None:
        found = usage._replace(free=num_bytes)
        monkeypatch.setattr(estimate.shutil, "disk_usage", lambda _: found)

    free(needed // 6)
    with pytest.raises(UserError, match=r"GiB free.*--cache_dir"):
        prepare(request_for(path))
    # Only what surely does not fit is refused: the size is an estimate.
    free(needed * 9 // 10)
    prepare(request_for(path))
    assert "warning: " in capsys.readouterr().err
    free(needed * 11 // 10)
    prepare(request_for(path, eval_ratio=0))
    assert "warning: " not in capsys.readouterr().err


def test_text_in_files_is_measured_whatever_their_kind(write_jsonl, tmp_path) -> None:
    texts = [f"the cat {n} sat " * 30 for n in range(3000)]
    expected = sum(map(len, texts))
    plain = write_jsonl("plain.jsonl", texts)
    paths = [plain, tmp_path / "packed.jsonl.gz", tmp_path / "table.parquet"]
    paths[1].write_bytes(gzip.compress(plain.read_bytes()))
    table = pa.table({"text": texts, "other": ["x" * 500 + str(n) for n in range(3000)]})
    pq.write_table(table, paths[2], use_dictionary=False)
    sources = [Source(path.name, (path,)) for path in paths]
    for name, found in estimate.text_bytes(sources).items():
        assert found == pytest.approx(expected, rel=0.25), name


@pytest.mark.parametrize("damage", ["manifest", "version", "foreign", "tokens", "unfinished"])
def test_damaged_folders_are_not_opened(request_for, write_jsonl, tmp_path, damage: str) -> None:
    folder = tmp_path / "out"
    prepare(request_for(write_jsonl("a.jsonl", ["one", "two"]), eval_ratio=0, output=folder))
    manifest = folder / "manifest.json"
    if damage == "manifest":
        manifest.write_text(manifest.read_text()[:-9])
    elif damage == "version":
        manifest.write_text(manifest.read_text().replace('"version": 2', '"version": 99'))
    elif damage == "foreign":
        manifest.write_text("{}")
    elif damage == "tokens":
        content = json.loads(manifest.read_text())
        content["sources"]["a"]["tokens"] += 1
        manifest.write_text(json.dumps(content))
    else:
        manifest.unlink()
        with pytest.raises(UserError, match="unfinished or damaged"):
            prepare(request_for(folder))
    with pytest.raises((UserError, RunError)):
        PreparedDataset.open(folder)


def test_folders_of_the_first_version_still_open(request_for, write_jsonl, tmp_path) -> None:
    folder = tmp_path / "out"
    made = prepare(request_for(write_jsonl("a.jsonl", ["one", "two"]), output=folder))
    for path in (folder / "manifest.json", folder / "eval" / "manifest.json"):
        content = json.loads(path.read_text())
        content["version"] = 1
        for facts in content["sources"].values():
            for later in ("entry", "rows", "left_out"):
                facts.pop(later, None)
        path.write_text(json.dumps(content))
    opened = PreparedDataset.open(folder)
    assert opened.num_tokens == made.num_tokens and opened.held_out is not None
    assert opened.sources_of_entry == {0: ("a",)} and not opened.has_rows
    # The cache makes its own again: what is asked for is another version.
    assert prepare(request_for(folder)).manifest_hash == opened.manifest_hash


def test_unigram_entropy_against_its_definition(request_for, write_jsonl) -> None:
    dataset = prepare(request_for(write_jsonl("a.jsonl", ["the cat", "a mat"]), eval_ratio=0))
    ids = np.concatenate([dataset.tokens(n) for n in range(2)])
    shares = np.unique(ids, return_counts=True)[1] / len(ids)
    assert unigram_entropy(dataset) == pytest.approx(-sum(p * np.log(p) for p in shares))


def test_evaluation_rows_hold_every_token_once(request_for, write_jsonl) -> None:
    paths = [write_jsonl(f"{name}.jsonl", ["the cat sat"] * 7) for name in "ab"]
    dataset = prepare(request_for(*paths, eval_ratio=0))
    rows = list(dataset.rows(16))
    assert all(len(row) == 16 for row in rows[:-1]) and 0 < len(rows[-1]) <= 16
    stream = np.concatenate([reader.ids for reader in dataset.readers.values()])
    np.testing.assert_array_equal(np.concatenate(rows), stream)
    one = dataset.only("b")
    assert one.num_tokens == sum(len(row) for row in one.rows(16)) == dataset.num_tokens // 2


def test_commands(tmp_path, write_jsonl, tokenizer_path, capsys) -> None:
    path = write_jsonl("a.jsonl", ["the first text", "the second text"])
    out = str(tmp_path / "out")
    arguments = ["-d", str(path), "--tokenizer", str(tokenizer_path), "--output", out]
    assert main([*arguments, "--eval_ratio", "0", "--cache_dir", str(tmp_path / "cache")]) == 0
    capsys.readouterr()
    assert inspect_main([out, "--document", "1"]) == 0
    shown = capsys.readouterr().out
    assert "the second text</s>" in shown and "manifest hash" in shown
    with pytest.raises(UserError, match="--document 2"):
        inspect_main([out, "--document", "2"])


def test_options_of_the_command(tmp_path, write_jsonl, tokenizer_path, capsys) -> None:
    path = write_jsonl("a.jsonl", ["the cat", "the cat", "x", "the other cats sat on mat"])
    mixture = tmp_path / "mixture.json"
    mixture.write_text('{"a": 100}')
    common = ["--tokenizer", str(tokenizer_path), "--cache_dir", str(tmp_path / "cache")]
    common += ["--eval_ratio", "0", "--workers", "1"]
    filters = ["--dedup", "--min_length", "3", "--max_length", "20", "--seed", "3"]
    out = tmp_path / "filtered"
    assert main(["-d", f"{path}[1]", *common, *filters, "--output", str(out)]) == 0
    assert PreparedDataset.open(out).num_documents == 1
    assert "left out: 1 too short, 1 duplicates, 1 not drawn" in capsys.readouterr().err
    budget = ["--num_token", "4:8", "2:4", "--mixture", str(mixture)]
    assert main(["-d", str(path), *common, *budget, "--output", str(tmp_path / "rows")]) == 0
    rows = PreparedDataset.open(tmp_path / "rows")
    assert sorted(rows.document_lengths.tolist()) == [2, 2, 4, 4]


PREPARE = """
import sys
from llama_lib.data.prepare import main
main(sys.argv[1:])
"""


def started(path: Path, tokenizer: Path, tmp_path: Path, *more: str) -> subprocess.Popen:
    arguments = ["-d", str(path), "--tokenizer", str(tokenizer), "--cache_dir", str(tmp_path / "c")]
    return subprocess.Popen(
        [sys.executable, "-c", PREPARE, *arguments, "--output", str(tmp_path / "out"), *more],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )


def test_one_of_two_processes_prepares_and_the_other_waits(
    write_jsonl, tmp_path, tokenizer_path
) -> None:
    path = write_jsonl("a.jsonl", ["one", "two", "three"])
    out = tmp_path / "out"
    with once(tmp_path / "c", str(out.resolve()), "the test") as turn:
        turn.report(percent=43)
        both = [started(path, tokenizer_path, tmp_path) for _ in range(2)]
        deadline = time.monotonic() + 60
        # Each says so once it waits; this line is what a user sees.
        for process in both:
            assert process.stderr is not None
            line = ""
            while "waiting for tokenisation, 43%" not in line and time.monotonic() < deadline:
                line = process.stderr.readline()
            assert "waiting for tokenisation, 43%" in line
        assert not out.exists()
    messages = [process.communicate(timeout=60)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sorted("prepared" in message for message in messages) == [False, True]
    assert PreparedDataset.open(out).num_documents == 2


@pytest.mark.parametrize(
    ("dataset", "eval_data", "work"),
    [
        ("sample", [], "another process, which looks through the data"),
        ("data/*.jsonl", ["a.jsonl"], "another process, which looks through the data"),
        ("sample", ["organisation/name"], "the download of the data"),
        ("organisation/name", [], "the download of the data"),
    ],
)
def test_a_download_is_waited_for_only_where_there_is_one(
    dataset, eval_data, work, tmp_path, monkeypatch
) -> None:
    """With -d sample the second process waited for `the download of the data`."""

    class Asked(Exception):
        pass

    def asked(cache_dir: Path, key: str, work: str) -> None:
        raise Asked(work)

    monkeypatch.setattr(prepare_module, "once", asked)
    with pytest.raises(Asked, match=f"^{work}$"):
        prepare_module._resolve_once([dataset], eval_data, tmp_path, False)


def test_processes_with_other_caches_and_options_take_turns(
    write_jsonl, tmp_path, tokenizer_path
) -> None:
    path = write_jsonl("a.jsonl", ["one", "two", "three"])
    out = tmp_path / "out"
    with alone_at(out):
        caches = [["--cache_dir", str(tmp_path / name)] for name in "xy"]
        caches.append(["--cache_dir", str(tmp_path / "z"), "--dedup"])
        all_three = [started(path, tokenizer_path, tmp_path, *more) for more in caches]
        for process in all_three:
            assert process.stderr is not None
            line = process.stderr.readline()
            assert f"waiting for another process that prepares {out}" in line
        assert not out.exists() and not list(tmp_path.glob("out.work-*"))
    messages = [process.communicate(timeout=60)[1] for process in all_three]
    codes = [process.returncode for process in all_three]
    assert sum("prepared" in message for message in messages) >= 1
    done = PreparedDataset.open(out)
    if done.manifest["options"]["dedup"]:
        assert codes[2] == 0 and 0 not in codes[:2]
    else:
        assert codes[:2] == [0, 0] and codes[2] != 0
        assert "other text, tokenizer or options" in messages[2]
    assert not list(tmp_path.glob("out.*"))


def test_file_system_without_locks_is_refused_by_name(tmp_path, monkeypatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(work_folder.fcntl, "flock", no_locks)
    with pytest.raises(UserError, match=r"without file locks.*--output"), alone_at(tmp_path / "o"):
        raise AssertionError("went on without a lock")


def test_those_who_wait_hear_of_both_stages_and_of_failures(
    request_for, write_jsonl, tmp_path, monkeypatch
) -> None:
    paths = [write_jsonl(f"{n}.jsonl", [f"{n} {m} cats" for m in range(99)]) for n in range(20)]
    monkeypatch.setattr(progress, "_REPORT_SECONDS", 0.0)
    reports: list[dict] = []
    true = Turn.report
    monkeypatch.setattr(
        Turn, "report", lambda self, **state: (reports.append(state), true(self, **state))[0]
    )
    prepare(request_for(*paths, workers=1))
    percents = [state["percent"] for state in reports if "percent" in state]
    assert percents == sorted(percents) and percents[-1] == 100
    assert any(percent < 90 for percent in percents) and any(90 < p < 100 for p in percents)

    def broken(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(build, "_write_manifest", broken)
    with pytest.raises(RunError, match=r"disk of .* is full"):
        prepare(request_for(*paths, workers=1, eval_ratio=0.1))
    assert "is full" in reports[-1]["broken"]
    with pytest.raises(RunError, match="is full"):
        raise_failure(Turn(tmp_path / "board", reports[-1]))


@pytest.mark.skipif(not REDPAJAMA.is_dir(), reason="needs the shared RedPajama samples")
def test_real_redpajama_slices(cache_dir) -> None:
    request = PrepareRequest([str(REDPAJAMA)], tokenizer="sample", cache_dir=cache_dir)
    dataset = prepare(request)
    assert len(dataset.sources) == 4
    assert dataset.held_out is not None
    assert dataset.num_documents + dataset.held_out.num_documents == 240
    tokenizer = AutoTokenizer.from_pretrained(dataset.tokenizer_path)
    first = json.loads((REDPAJAMA / "book_sample.jsonl").open().readline())["text"]
    assert tokenizer.decode(dataset.tokens(0)[:-1].tolist()) == first
