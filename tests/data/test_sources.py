"""What `-d` takes, how the sources are called, and what is refused."""

import json
import os
import sysconfig
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llama_lib.data.readers import TextFile
from llama_lib.data.sample import sample_records
from llama_lib.data.sources import is_on_hub, records, resolve
from llama_lib.errors import UserError
from tests.data.conftest import WriteJsonl

REDPAJAMA = Path(__file__).parents[3] / "shared" / "data" / "redpajama"


def names(*datasets: object, cache_dir: Path = Path("unused")) -> list[str]:
    return [source.name for source in resolve([str(d) for d in datasets], cache_dir)]


def refusal(*datasets: object) -> str:
    with pytest.raises(UserError) as caught:
        names(*datasets)
    return str(caught.value)


def test_file_folder_and_glob(tmp_path: Path, write_jsonl: WriteJsonl) -> None:
    write_jsonl("data/arxiv_sample.jsonl", ["a"])
    write_jsonl("data/deep/book_sample.jsonl", ["b"])
    (tmp_path / "data" / "README.md").write_text("not data")
    (tmp_path / "data" / ".hidden.jsonl").write_text("not data")
    both = ["arxiv_sample", "book_sample"]
    assert names(tmp_path / "data") == both
    assert names(tmp_path / "data" / "**" / "*.jsonl") == both
    assert names(tmp_path / "data" / "arxiv_sample.jsonl") == ["arxiv_sample"]
    sources = resolve(str(tmp_path / "data"), tmp_path)
    assert [list(records(source)) for source in sources] == [["a"], ["b"]]


def test_equal_stems_are_told_apart_by_their_folders(write_jsonl: WriteJsonl) -> None:
    paths = [write_jsonl(f"{folder}/part.jsonl", ["x"]) for folder in ("a", "b", "c/a")]
    assert len(set(names(*paths))) == 3
    assert names(*paths[:2]) == ["a_part", "b_part"]


def test_stem_without_its_suffixes_and_unsafe_characters(write_jsonl: WriteJsonl) -> None:
    assert names(write_jsonl("my data (1).jsonl", ["x"])) == ["my_data_1_"]
    assert names(write_jsonl("c4.00001.json", ["x"])) == ["c4.00001"]


def test_shards_of_one_split_are_one_source(tmp_path: Path) -> None:
    for shard in range(3):
        table = pa.table({"text": [f"shard {shard}"]})
        pq.write_table(table, tmp_path / f"train-0000{shard}-of-00003.parquet")
    (source,) = resolve(str(tmp_path), tmp_path)
    assert source.name == "train"
    assert list(records(source)) == ["shard 0", "shard 1", "shard 2"]


def test_refusals_name_the_mend(tmp_path: Path, write_jsonl: WriteJsonl) -> None:
    assert "no file matches" in refusal(tmp_path / "*.jsonl")
    assert "no such file" in refusal(tmp_path / "absent.jsonl")
    assert "no such file" in refusal("data/absent.jsonl")
    (tmp_path / "empty.jsonl").touch()
    assert "empty.jsonl is empty" in refusal(tmp_path / "empty.jsonl")
    (tmp_path / "notes.txt").write_text("x")
    assert "expected one of .jsonl" in refusal(tmp_path / "notes.txt")
    path = write_jsonl("twice.jsonl", ["x"])
    assert "given twice" in refusal(path, tmp_path / "tw*.jsonl")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("x")
    assert "found .txt, expected .jsonl" in refusal(tmp_path / "texts")


def test_links_to_blobs_keep_the_names_that_were_given(
    tmp_path: Path, write_jsonl: WriteJsonl
) -> None:
    """Snapshot folders of the hub's cache and DVC's files are such links."""
    snapshot = tmp_path / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    for name, text in (("wiki.jsonl", "w"), ("books.jsonl", "b")):
        blob = write_jsonl(f"blobs/{name[::-1].encode().hex()}", [text])
        (snapshot / name).symlink_to(os.path.relpath(blob, snapshot))
    assert names(snapshot) == ["books", "wiki"]
    assert names(snapshot / "wiki.jsonl", snapshot / "b*") == ["wiki", "books"]
    sources = resolve(str(snapshot), tmp_path)
    assert [source.files for source in sources] == [
        (snapshot / "books.jsonl",),
        (snapshot / "wiki.jsonl",),
    ]
    assert [list(records(source)) for source in sources] == [["b"], ["w"]]


def test_files_are_absolute_behind_links_and_dots(
    tmp_path: Path, write_jsonl: WriteJsonl, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_jsonl("real/deep/a.jsonl", ["right"])
    write_jsonl("a.jsonl", ["wrong"])
    (tmp_path / "link").symlink_to("real/deep")
    write_jsonl("real/b.jsonl", ["beside"])
    monkeypatch.chdir(tmp_path)
    (source,) = resolve("link/a.jsonl", tmp_path)
    assert source.files == (tmp_path / "link" / "a.jsonl",)
    # `..` is the folder above the link's target.
    (source,) = resolve("link/../b.jsonl", tmp_path)
    assert source.files == (tmp_path / "real" / "b.jsonl",)
    (source,) = resolve("real/../real/./deep/a.jsonl", tmp_path)
    assert source.files == (path,)


def test_a_link_whose_own_name_has_no_ending(tmp_path: Path, write_jsonl: WriteJsonl) -> None:
    path = write_jsonl("data.jsonl", ["x"])
    (tmp_path / "newest").symlink_to(path)
    assert names(tmp_path / "newest") == ["data"]


def test_a_file_given_twice_by_a_link_names_both(tmp_path: Path, write_jsonl: WriteJsonl) -> None:
    path = write_jsonl("a.jsonl", ["x"])
    (tmp_path / "b.jsonl").symlink_to(path)
    assert f"{path} and {tmp_path}/b.jsonl are the same file" in refusal(tmp_path)


def test_linked_folders_are_read_once_each(
    tmp_path: Path, write_jsonl: WriteJsonl, capsys: pytest.CaptureFixture[str]
) -> None:
    write_jsonl("elsewhere/far/c.jsonl", ["c"])
    write_jsonl("data/a/a.jsonl", ["a"])
    write_jsonl("data/.store/b.jsonl", ["b"])
    for link, target in {
        "data/link": "../elsewhere",
        "data/again": "../elsewhere/far",
        "data/0": "a",  # of what is there anyway, the real folder is read
        "data/a/up": "..",
        "elsewhere/round": "../data",
        "elsewhere/far/above": "../..",
        "data/hidden": ".store",
    }.items():
        (tmp_path / link).symlink_to(target)
    sources = resolve(str(tmp_path / "data"), tmp_path)
    assert [source.name for source in sources] == ["a", "c", "b"]
    files = [str(file.relative_to(tmp_path)) for source in sources for file in source.files]
    assert files == ["data/a/a.jsonl", "data/again/c.jsonl", "data/hidden/b.jsonl"]
    assert capsys.readouterr().err == ""


def test_what_a_folder_holds_and_is_not_read_is_said_once(
    tmp_path: Path, write_jsonl: WriteJsonl, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    write_jsonl("data/a.jsonl", ["a"])
    for name in ("b.jsonl.xz", "deep/c.jsonl.xz", "notes.txt", "data.bin", "noending"):
        write_jsonl(f"data/{name}", ["x"])
    for name in ("README.md", "LICENSE", ".gitattributes", ".hidden.txt", "deep/readme.txt"):
        write_jsonl(f"data/{name}", ["x"])
    (tmp_path / "data" / "dataset_infos.json").write_text('{"default": {}}')
    (tmp_path / "data" / "gone.jsonl").symlink_to("nowhere.jsonl")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert names(tmp_path / "data") == ["a"]
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert names(tmp_path / "data") == names(tmp_path / "data") == ["a"]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{tmp_path}/data: not read: 2 .jsonl.xz, 1 ")
    for kind in ("1 .txt", "1 .bin", "1 noending", "1 link to nothing"):
        assert kind in line
    for name in ("README", "LICENSE", "git", "infos", "2 .txt"):
        assert name not in line


def test_a_folder_of_companions_alone_is_quiet(
    write_jsonl: WriteJsonl, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_jsonl("data/a.jsonl", ["a"])
    write_jsonl("data/README.md", ["x"])
    assert names(tmp_path / "data") == ["a"]
    assert capsys.readouterr().err == ""


def test_a_pattern_that_matches_a_link_to_nothing_is_refused(
    tmp_path: Path, write_jsonl: WriteJsonl
) -> None:
    write_jsonl("a.jsonl", ["a"])
    (tmp_path / "b.jsonl").symlink_to("nowhere.jsonl")
    assert "b.jsonl is a link to nothing" in refusal(tmp_path / "*.jsonl")


def test_all_problems_come_in_one_message(tmp_path: Path) -> None:
    message = refusal(tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    assert "a.jsonl" in message and "b.jsonl" in message


def test_the_entry_of_a_source(write_jsonl: WriteJsonl, tmp_path: Path) -> None:
    for name in ("data/a.jsonl", "data/b.jsonl", "c.jsonl"):
        write_jsonl(name, ["x"])
    words = [str(tmp_path / "c.jsonl"), str(tmp_path / "data")]
    found = resolve(words, tmp_path)
    assert [(source.name, source.entry) for source in found] == [("c", 0), ("a", 1), ("b", 1)]


def test_entries_with_limits_or_weights_share_no_source(tmp_path: Path) -> None:
    shards = [tmp_path / f"train-0000{shard}-of-00003.parquet" for shard in range(3)]
    for path in shards:
        pq.write_table(pa.table({"text": [path.name]}), path)
    words = [str(shards[0]), f"{tmp_path}/train-0000[12]*"]
    # What a shell makes of `-d train-*` is one source, whatever the words.
    assert [source.name for source in resolve(words, tmp_path)] == ["train"]
    apart = resolve(words, tmp_path, entries_apart=True)
    assert [(source.name, source.entry) for source in apart] == [
        ("train-00000-of-00003.parquet", 0),
        ("train-00001-of-00003.parquet", 1),
        ("train-00002-of-00003.parquet", 1),
    ]
    (whole,) = resolve(str(tmp_path), tmp_path, entries_apart=True)
    assert whole.name == "train" and len(whole.files) == 3


def saved(folder: Path, columns: dict, shards: int = 1) -> Path:
    import datasets

    datasets.Dataset.from_dict(columns).save_to_disk(folder, num_shards=shards)
    return folder


def test_save_to_disk_folder_is_one_source(tmp_path: Path) -> None:
    import datasets

    texts = [f"text {n}" for n in range(30)]
    folder = saved(tmp_path / "my corpus", {"text": texts, "n": list(range(30))}, shards=3)
    (folder / "cache-0123.arrow").write_bytes(b"what map() leaves behind")
    (source,) = resolve(str(folder), tmp_path)
    assert source.name == "my_corpus" and len(source.files) == 3
    assert list(records(source)) == list(datasets.load_from_disk(folder)["text"]) == texts

    # The order is that of state.json, not that of the names.
    state = json.loads((folder / "state.json").read_text())
    state["_data_files"].reverse()
    (folder / "state.json").write_text(json.dumps(state))
    (source,) = resolve(str(folder), tmp_path)
    assert list(records(source)) == list(datasets.load_from_disk(folder)["text"])
    assert next(records(source)) == "text 20"


def test_save_to_disk_folders_inside_a_folder_and_by_a_glob(
    tmp_path: Path, write_jsonl: WriteJsonl
) -> None:
    saved(tmp_path / "data" / "first", {"text": ["a"]})
    saved(tmp_path / "data" / "second", {"text": ["b"]})
    write_jsonl("data/third.jsonl", ["c"])
    assert names(tmp_path / "data") == ["first", "second", "third"]
    assert names(tmp_path / "data" / "*") == ["first", "second", "third"]
    assert names(tmp_path / "data" / "s*") == ["second"]
    assert names(f"{tmp_path}/data/**/[fs]*") == ["first", "second"]


def test_dataset_dict_gives_its_train_split(tmp_path: Path) -> None:
    import datasets

    splits = {name: datasets.Dataset.from_dict({"text": [name]}) for name in ("train", "test")}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "both")
    (source,) = resolve(str(tmp_path / "both"), tmp_path)
    assert source.name == "both" and list(records(source)) == ["train"]
    assert names(tmp_path / "both" / "test") == ["test"]

    datasets.DatasetDict({"test": splits["test"]}).save_to_disk(tmp_path / "one")
    message = refusal(tmp_path / "one")
    assert "no split `train`; found test" in message and f"-d {tmp_path}/one/test" in message


def test_damaged_save_to_disk_folders(tmp_path: Path) -> None:
    folder = saved(tmp_path / "a", {"text": ["x"] * 4}, shards=2)
    (folder / "data-00001-of-00002.arrow").unlink()
    assert "data-00001-of-00002.arrow is missing" in refusal(folder)
    (folder / "state.json").write_text("{")
    assert "state.json cannot be read" in refusal(folder)
    (folder / "state.json").unlink()
    assert "needs both state.json and dataset_info.json" in refusal(folder)
    folder = saved(tmp_path / "b", {"text": ["x"]})
    state = json.loads((folder / "state.json").read_text())
    state["_indices_data_files"] = [{"filename": "indices.arrow"}]
    (folder / "state.json").write_text(json.dumps(state))
    assert "flatten_indices" in refusal(folder)


def test_ready_made_rows_of_save_to_disk(tmp_path: Path) -> None:
    rows = [[1, 2, 3], [4, 5]]
    folder = saved(
        tmp_path / "rows", {"input_ids": rows, "attention_mask": [[1, 1, 1], [0, 1]]}, shards=2
    )
    (source,) = resolve(str(folder), tmp_path)
    read = [row.tolist() for path in source.files for row in TextFile(path)]
    assert read == [[1, 2, 3], [5]]
    with pytest.raises(UserError, match="ready-made rows of token ids; text is expected here"):
        list(records(source))


def test_text_and_rows_in_one_source_name_both_files(tmp_path: Path) -> None:
    tables = {"text": ["a"]}, {"input_ids": [[1]]}
    for shard, table in enumerate(tables):
        pq.write_table(pa.table(table), tmp_path / f"train-0000{shard}-of-00002.parquet")
    message = refusal(tmp_path)
    assert "train-00000-of-00002.parquet holds text" in message
    assert "train-00001-of-00002.parquet ready-made rows" in message
    (tmp_path / "train-00001-of-00002.parquet").rename(tmp_path / "rows.parquet")
    assert names(tmp_path) == ["rows", "train"]


def test_wrong_columns_are_found_before_anything_is_read(tmp_path: Path) -> None:
    for name in ("a", "b"):
        pq.write_table(pa.table({"content": ["x"]}), tmp_path / f"{name}.parquet")
    message = refusal(tmp_path)
    assert "a.parquet has no `text` column" in message
    assert "b.parquet has no `text` column" in message


def test_folders_that_hold_no_text(tmp_path: Path) -> None:
    (tmp_path / "prepared").mkdir()
    (tmp_path / "prepared" / "manifest.json").write_text("{}")
    assert "is a prepared dataset; text is expected" in refusal(tmp_path / "prepared")
    (tmp_path / "pair").mkdir()
    (tmp_path / "pair" / "wiki.idx").touch()
    assert f"-d {tmp_path}/pair/wiki" in refusal(tmp_path / "pair")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every folder")
def test_folder_that_may_not_be_read(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0)
    assert "locked cannot be read" in refusal(tmp_path / "locked")


def test_what_is_asked_for_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert is_on_hub("org/name") and is_on_hub("org/name:en") and is_on_hub("wikitext")
    for local in ("here", "sample", "data/*", "a.jsonl", "org/name.parquet", "no/such/folder"):
        assert not is_on_hub(local)


def test_arrow_cache_files_of_the_datasets_library_are_read(tmp_path: Path) -> None:
    import datasets

    texts = [f"text {n}" for n in range(2500)]
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    loaded = datasets.load_dataset(
        "parquet", data_files=str(tmp_path / "a.parquet"), split="train", cache_dir=str(tmp_path)
    )
    files = [Path(file["filename"]) for file in loaded.cache_files]
    assert [text for file in files for text in TextFile(file)] == texts


def test_sample_is_two_redpajama_shaped_sources_without_machine_paths(cache_dir: Path) -> None:
    sources = resolve("sample", cache_dir)
    assert [source.name for source in sources] == ["documentation", "library"]
    for source in sources:
        shaped = list(sample_records(source.name))
        assert all(set(record) == {"text", "meta"} for record in shaped)
        assert list(records(source)) == [record["text"] for record in shaped]
    size = sum(path.stat().st_size for source in sources for path in source.files)
    assert 2_000_000 < size < 20_000_000
    content = "".join(records(sources[1]))
    assert sysconfig.get_paths()["stdlib"] not in content
    assert "build_time_vars = {" not in content  # the generated configuration of one build


def test_sample_files_are_written_once(cache_dir: Path) -> None:
    def times() -> list[int]:
        sources = resolve("sample", cache_dir)
        return [path.stat().st_mtime_ns for source in sources for path in source.files]

    assert times() == times()


@pytest.mark.skipif(not REDPAJAMA.is_dir(), reason="needs the shared RedPajama samples")
def test_real_redpajama_slices() -> None:
    sources = resolve(str(REDPAJAMA), Path("unused"))
    assert [source.name for source in sources] == [
        "book_sample",
        "github_sample",
        "stackexchange_sample",
        "wikipedia_sample",
    ]
    assert [sum(1 for _ in records(source)) for source in sources] == [8, 93, 79, 60]
