"""What `-d` takes, how the sources are called, and what is refused."""

import sysconfig
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llama_lib.data.sample import sample_records
from llama_lib.data.sources import records, resolve
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


def test_all_problems_come_in_one_message(tmp_path: Path) -> None:
    message = refusal(tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    assert "a.jsonl" in message and "b.jsonl" in message


def test_save_to_disk_folder_says_how_to_export_it(tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_dict({"text": ["x"]}).save_to_disk(tmp_path / "saved")
    assert "to_parquet" in refusal(tmp_path / "saved")


def test_arrow_cache_files_of_the_datasets_library_are_read(tmp_path: Path) -> None:
    import datasets

    from llama_lib.data.readers import TextFile

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
