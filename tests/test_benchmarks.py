"""The benchmark scripts' arithmetic and comparisons; at a tiny size the whole of them."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from benchmarks.data_costs import open_tokens, wait_of, write_tokens
from benchmarks.measure import ROOT, Measured, measure, memory_of
from benchmarks.prepare import (
    OURS,
    USUAL,
    compare,
    expected_blocks,
    parse_size,
    repeats,
    summary,
    table,
    write_text,
)
from llama_lib.data.indexed import IndexedReader, IndexedWriter
from llama_lib.data.prepare import PrepareRequest, prepare
from llama_lib.data.prepared import PreparedDataset
from llama_lib.data.tokenizer import save_tokenizer, train_tokenizer

POOL = ["a short text", "two lines\nof \u00fcml\u00e4uts", "x" * 300]


def arrow(path: Path, rows: list[list[int]]) -> str:
    table = pa.table({"input_ids": pa.array(rows, pa.list_(pa.int32()))})
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=3)
    return str(path)


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    texts = [f"text number {number} of some" for number in range(7)]
    save_tokenizer(train_tokenizer(texts, 300), tmp_path / "tokenizer")
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    request = PrepareRequest(
        [str(path)],
        str(tmp_path / "tokenizer"),
        eval_ratio=0,
        cache_dir=tmp_path / "cache",
        output=tmp_path / "prepared",
        workers=1,
    )
    return prepare(request).path


def usual_facts(prepared: Path, folder: Path, block_size: int = 8) -> dict[str, Any]:
    """What the usual way leaves, of two processes with a file each, with the ids of `prepared`."""
    dataset = PreparedDataset.open(prepared)
    documents = [dataset.tokens(number).tolist() for number in range(dataset.num_documents)]
    parts = [documents[:4], documents[4:]]
    blocks = []
    for part in parts:
        ids = [id for document in part for id in document]
        end = len(ids) // block_size * block_size
        blocks.append([ids[start : start + block_size] for start in range(0, end, block_size)])
    return {
        "documents": len(documents),
        "tokenised": [arrow(folder / f"t{n}.arrow", part) for n, part in enumerate(parts)],
        "blocks": [arrow(folder / f"b{n}.arrow", part) for n, part in enumerate(blocks)],
    }


def test_equal_ids_pass_and_any_difference_ends_the_benchmark(
    prepared: Path, tmp_path: Path
) -> None:
    dataset = PreparedDataset.open(prepared)
    facts = usual_facts(prepared, tmp_path)
    assert compare(prepared, facts, processes=2, block_size=8) == dataset.num_tokens
    documents = [dataset.tokens(number).tolist() for number in range(dataset.num_documents)]

    def refusal(**changed: Any) -> str:
        with pytest.raises(SystemExit) as caught:
            compare(prepared, {**facts, **changed}, processes=2, block_size=8)
        return str(caught.value)

    assert "8 documents" not in refusal(documents=8) and "7 documents" in refusal(documents=8)
    other = [list(document) for document in documents]
    other[5][2] += 1
    assert "ids differ" in refusal(tokenised=[arrow(tmp_path / "x.arrow", other)])
    swapped = [documents[1], documents[0], *documents[2:]]
    assert "ids differ" in refusal(tokenised=[arrow(tmp_path / "x.arrow", swapped)])
    assert "the usual way has" in refusal(tokenised=[arrow(tmp_path / "x.arrow", documents[:-1])])
    assert "blocks are not" in refusal(blocks=facts["blocks"][::-1])
    assert "blocks are not" in refusal(blocks=facts["blocks"][:1])
    assert "more blocks" in refusal(blocks=facts["blocks"] + facts["blocks"][:1])


def test_blocks_expected_of_more_than_one_batch_of_documents(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "x", np.uint16) as writer:
        writer.write(np.arange(2 * 2501) % 60_000, np.full(2501, 2))
    parts = list(expected_blocks(IndexedReader(tmp_path / "x"), processes=2, block_size=300))
    # 1251 and 1250 documents of two ids, in batches of 1000: 2000, 502, 2000 and 500 ids.
    assert [len(part) for part in parts] == [1800, 300, 1800, 300]
    assert [int(part[0]) for part in parts] == [0, 2000, 2502, 4502]


def test_text_is_drawn_to_its_size_and_the_same_every_time(tmp_path: Path) -> None:
    facts = write_text(tmp_path / "a.jsonl", POOL, 5000)
    assert write_text(tmp_path / "b.jsonl", POOL, 5000) == facts
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    with (tmp_path / "a.jsonl").open(encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    assert set(texts) == set(POOL) and len(texts) == facts["documents"]
    assert sum(len(text.encode()) for text in texts) == facts["bytes"]
    assert 5000 <= facts["bytes"] < 5300


def test_sizes_and_repeats() -> None:
    assert [parse_size(text) for text in ("10m", "1g", "250K")] == [10**7, 10**9, 250_000]
    assert [repeats(parse_size(text)) for text in ("2m", "10m", "100m", "1g")] == [5, 5, 3, 1]
    for wrong in ("10", "m", "1.5g", "-1m"):
        with pytest.raises(SystemExit, match="expected a number"):
            parse_size(wrong)


def runs_of(size: str, text_bytes: int, ours: list[float], usual: list[float]) -> list[dict]:
    return [
        {"size": size, "tokenizer": "t", "way": way, "seconds": seconds, "cpu_seconds": seconds}
        | {"text_bytes": text_bytes, "tokens": 7, "peak_pss_mb": seconds * 10}
        | {"peak_anonymous_mb": 1.0, "peak_rss_mb": 2.0}
        for way, all_seconds in ((OURS, ours), (USUAL, usual))
        for seconds in all_seconds
    ]


def test_summary_takes_medians_and_the_rate_between_two_sizes() -> None:
    runs = runs_of("10m", 10**7, [2.0, 1.0, 9.0], [8.0, 10.0, 30.0])
    runs += runs_of("100m", 10**8, [5.0, 3.5], [100.0, 100.0])
    small, large = summary(runs)
    assert small["times_faster"] == 5.0
    assert small[OURS]["median_seconds"] == 2.0 and small[OURS]["best_seconds"] == 1.0
    assert small[OURS]["mb_per_second"] == 5.0 and small[USUAL]["mb_per_second"] == 1.0
    assert small[OURS]["peak_pss_mb"] == 90.0 and small["memory_share"] == 0.3
    assert "marginal_mb_per_second" not in small[OURS]
    # 90 MB more in 2.25 and in 90 seconds more.
    assert large[OURS]["marginal_mb_per_second"] == 40.0
    assert large[USUAL]["marginal_mb_per_second"] == 1.0
    text = table([small, large])
    assert "5.0x" in text and len(text.splitlines()) == 3


def test_memory_of_a_whole_process_tree_is_measured(tmp_path: Path) -> None:
    grandchild = "import time; x = b'1' * 150_000_000; time.sleep(1.5)"
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {grandchild!r}])"
    measured = measure([sys.executable, "-c", child], tmp_path / "log")
    assert isinstance(measured, Measured)
    assert 150 < measured.peak_anonymous_mb < 250
    assert measured.peak_anonymous_mb <= measured.peak_pss_mb <= measured.peak_rss_mb
    assert measured.peak_processes == 2 and measured.memory_samples >= 5
    assert 1.5 < measured.seconds < 30 and 0 < measured.cpu_seconds < measured.seconds


def test_a_failed_command_is_no_measurement(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"(?s)status 3.*the reason"):
        measure([sys.executable, "-c", "print('the reason'); exit(3)"], tmp_path / "log")


def test_memory_of_an_ended_process_is_none() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    assert memory_of(process.pid) is None


def test_generated_tokens_have_their_size_and_open(prepared: Path, tmp_path: Path) -> None:
    for num_bytes in (2, 100_000, 8_000_000):
        folder = tmp_path / f"tokens-{num_bytes}"
        facts = write_tokens(folder, num_bytes, prepared)
        assert facts["tokens"] == num_bytes // 2
        dataset = PreparedDataset.open(folder)
        assert dataset.num_tokens == facts["tokens"]
        assert dataset.num_documents == facts["documents"]
        assert dataset.document_lengths.min() >= 1
        assert 0 < open_tokens(str(folder)) < 1000


def test_share_of_the_wait_leaves_the_first_record_out() -> None:
    records = [
        {"data_wait_s": 5.0, "step_time_s": 6.0},
        {"data_wait_s": 0.001, "step_time_s": 0.2},
        {"data_wait_s": 0.003, "step_time_s": 0.2},
    ]
    assert wait_of(records) == {
        "records": 2,
        "data_wait_ms": 2.0,
        "step_ms": 200.0,
        "wait_percent": 1.0,
        "worst_wait_percent": 1.5,
    }
    with pytest.raises(SystemExit, match="raise --steps"):
        wait_of(records[:1])


@pytest.mark.full
def test_prepare_benchmark_from_end_to_end(tmp_path: Path) -> None:
    save_tokenizer(train_tokenizer(POOL * 20, 300), tmp_path / "small")
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": each}) + "\n" for each in POOL))
    command = [sys.executable, "-m", "benchmarks.prepare", "--sizes", "30k", "--repeats", "2"]
    command += ["--tokenizers", str(tmp_path / "small"), "--processes", "2", "--text", str(text)]
    command += ["--block_size", "64", "--work_dir", str(tmp_path / "work")]
    command += ["--result", str(tmp_path / "result.json")]
    (tmp_path / "work").mkdir()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "work").iterdir()) == []
    result = json.loads((tmp_path / "result.json").read_text())
    assert [run["way"] for run in result["runs"]] == [OURS, USUAL, USUAL, OURS]
    assert all(run["same_ids"] and run["tokens"] > 0 for run in result["runs"])
    assert set(result["runs"][1]["stages"]) == {
        "imports",
        "load_dataset",
        "map_tokenise",
        "map_group",
    }
    assert result["command"].startswith("python -m benchmarks.prepare --sizes 30k")
    assert result["text"]["distinct_documents"] == len(POOL)
    assert "small" in done.stdout


@pytest.mark.full
def test_data_costs_from_end_to_end(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.data_costs", "--sizes", "100k", "1m"]
    command += ["--stream_size", "500k", "--repeats", "2", "--seconds", "0.2", "--steps", "20"]
    command += ["--max_length", "128", "--result", str(tmp_path / "result.json")]
    command += ["--variants", "best_fit, document mask", "streaming", "--work_dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert [line["size"] for line in result["opening"]] == ["100k", "1m"]
    assert all(len(line["cold_ms"]["raw"]) == 2 for line in result["opening"])
    assert [line["variant"] for line in result["training"]] == [
        "best_fit, document mask",
        "streaming",
    ]
    assert all(line["records"] == 1 and line["step_ms"] > 0 for line in result["training"])
    assert len(result["rows"]) == 3
    assert all(line["rows_per_second"] > 0 for line in result["rows"])
