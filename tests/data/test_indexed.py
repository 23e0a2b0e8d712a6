"""Token files against megatron-core's own reader, and the cost of opening."""

import importlib.util
import json
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from llama_lib.data.indexed import IndexedReader, IndexedWriter, token_dtype
from llama_lib.data.megatron import open_megatron
from llama_lib.data.prepared import FORMAT, VERSION, PreparedDataset
from llama_lib.errors import RunError

# Reads what we wrote with megatron-core, and writes it again.
MEGATRON = """
import json, sys
import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
read = {}
for name in sys.argv[2:]:
    prefix = f"{sys.argv[1]}/{name}"
    dataset = IndexedDataset(prefix)
    documents = [dataset[number].tolist() for number in range(len(dataset))]
    read[name] = {"documents": documents, "borders": dataset.document_indices.tolist()}
    builder = IndexedDatasetBuilder(f"{prefix}-megatron.bin", dtype=getattr(np, name))
    for ids in documents:
        builder.add_document(np.array(ids, dtype=getattr(np, name)), [len(ids)])
    builder.finalize(f"{prefix}-megatron.idx")
print()
print(json.dumps(read))
"""
LENGTHS = np.array([3, 1, 7, 2])


def written(prefix: Path, dtype: type) -> list[np.ndarray]:
    ids = np.arange(LENGTHS.sum()) * 1000 % 60000
    with IndexedWriter(prefix, dtype) as writer:
        writer.write(ids[:4], LENGTHS[:2])
        writer.write(ids[4:], LENGTHS[2:])
    return np.split(ids, np.cumsum(LENGTHS)[:-1])


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_written_documents_are_read_back(tmp_path: Path, dtype: type) -> None:
    documents = written(tmp_path / "a", dtype)
    reader = IndexedReader(tmp_path / "a")
    assert len(reader) == 4 and reader.dtype == dtype
    for number, ids in enumerate(documents):
        np.testing.assert_array_equal(reader.tokens(number), ids)
    np.testing.assert_array_equal(reader.tokens(2, 1, 4), documents[2][1:5])
    with pytest.raises(IndexError):
        reader.tokens(0, 2, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.idx"]


def test_megatron_core_reads_the_same_documents_and_writes_the_same_bytes(tmp_path: Path) -> None:
    if importlib.util.find_spec("megatron") is None:
        pytest.skip("needs megatron-core, see requirements-dev.txt")
    dtypes = {"uint16": np.uint16, "int32": np.int32}
    documents = {name: written(tmp_path / name, dtype) for name, dtype in dtypes.items()}
    # In a process of its own: importing megatron-core changes settings of torch and warns a lot.
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", MEGATRON, str(tmp_path), *dtypes],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    theirs = json.loads(done.stdout.splitlines()[-1])
    for name, ids in documents.items():
        assert theirs[name]["documents"] == [document.tolist() for document in ids]
        assert theirs[name]["borders"] == [0, 1, 2, 3, 4]
        for suffix in ("bin", "idx"):
            ours = (tmp_path / f"{name}.{suffix}").read_bytes()
            assert ours == (tmp_path / f"{name}-megatron.{suffix}").read_bytes()


def test_dtype_rule() -> None:
    assert token_dtype(32000) == np.uint16
    assert token_dtype(65499) == np.uint16
    assert token_dtype(65500) == np.int32
    assert token_dtype(128256) == np.int32


def sparse(prefix: Path, documents: int, length: int) -> None:
    """A pair of files whose size is real to the reader, while nothing is stored."""
    with Path(f"{prefix}.bin").open("wb") as file:
        file.truncate(2 * documents * length)
    with Path(f"{prefix}.idx").open("wb") as file:
        file.write(struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 8, documents, documents + 1))
        end = file.tell() + 4 * documents
        file.seek(end - 4)
        file.write(struct.pack("<i", length))
        file.seek(end + 8 * documents - 8)
        file.write(struct.pack("<q", 2 * (documents - 1) * length))
        file.truncate(end + 8 * documents + 8 * (documents + 1))


def test_opening_costs_the_same_for_ten_megabytes_and_a_gigabyte(tmp_path: Path) -> None:
    """Of tokens: as a dataset with a manifest, and as a bare pair of files."""
    times: dict[str, list[float]] = {}
    for name, documents in (("small", 10_000), ("large", 1_000_000)):
        folder = tmp_path / name
        folder.mkdir()
        sparse(folder / "a", documents, 500)
        counts = {"documents": documents, "tokens": 500 * documents, "bytes": 1}
        tokenizer = {"hash": "", "vocab_size": 300}
        manifest = {"format": FORMAT, "version": VERSION, "tokenizer": tokenizer, "options": {}}
        sources = {"a": {**counts, "files": [{"name": "a.jsonl", "documents": documents}]}}
        content = json.dumps({**manifest, **counts, "sources": sources})
        (folder / "manifest.json").write_text(content)
        opened = {
            name: lambda folder=folder: PreparedDataset.open(folder),
            f"{name} pair": lambda folder=folder, tokenizer=tokenizer: open_megatron(
                folder / "a", tokenizer, folder
            ),
        }
        for kind, open_it in opened.items():
            times[kind] = []
            for _ in range(5):
                start = time.perf_counter()
                dataset = open_it()
                dataset.tokens(documents - 1)
                times[kind].append(time.perf_counter() - start)
            assert dataset.num_tokens == 500 * documents
    assert (tmp_path / "large" / "a.bin").stat().st_size == 1_000_000_000
    for kind in ("", " pair"):
        small, large = min(times[f"small{kind}"]), min(times[f"large{kind}"])
        assert large < 0.05 and large < small + 0.01


def test_memory_of_the_writer_is_flat(tmp_path: Path) -> None:
    import tracemalloc

    ids, lengths = np.zeros(1000, np.uint16), np.ones(1000, np.int64)
    tracemalloc.start()
    with IndexedWriter(tmp_path / "a", np.uint16) as writer:
        for _ in range(1000):
            writer.write(ids, lengths)
        peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000
    assert len(IndexedReader(tmp_path / "a")) == 1_000_000


@pytest.mark.parametrize("damage", ["missing", "header", "index", "tokens"])
def test_damaged_files_are_refused(tmp_path: Path, damage: str) -> None:
    written(tmp_path / "a", np.uint16)
    index, tokens = tmp_path / "a.idx", tmp_path / "a.bin"
    if damage == "missing":
        tokens.unlink()
    elif damage == "header":
        index.write_bytes(b"X" + index.read_bytes()[1:])
    elif damage == "index":
        index.write_bytes(index.read_bytes()[:-1])
    else:
        tokens.write_bytes(tokens.read_bytes()[:-2])
    with pytest.raises(RunError, match=r"(p|P)repare the data again"):
        IndexedReader(tmp_path / "a")
