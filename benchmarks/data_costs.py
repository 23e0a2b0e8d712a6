"""Measure what data cost at run time: opening tokens, making rows, waiting for them in training.

    python -m benchmarks.data_costs

Opening and rows are measured in a fresh process each, on generated token files (10 MB and 1 GB of
ids, documents of log-normal length); waiting in real runs of pretrain.py -c tiny on the built-in
sample, from their metrics.jsonl.

Invariant: the tokens opened cold are not in the page cache: their pages are dropped beforehand.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure import (
    ROOT,
    add_output_flags,
    command_line,
    measure,
    memory_of,
    read_records,
    run_benchmark,
    surroundings,
)
from benchmarks.prepare import parse_size, write_text
from llama_lib.data.entries import parse_entries
from llama_lib.data.indexed import IndexedWriter
from llama_lib.data.loader import BatchLoader, RowSource
from llama_lib.data.prepared import MANIFEST, TOKENIZER_FOLDER, PreparedDataset
from llama_lib.data.sources import records, resolve
from llama_lib.data.training_data import prepared_data

RESULT = ROOT / "benchmarks" / "results" / "data_costs.json"
_PACKAGES = ("torch", "colossalai", "transformers", "gigatoken", "numpy")

VARIANTS: dict[str, list[str]] = {
    "concat": [],
    "best_fit": ["--packing", "best_fit"],
    "concat, document mask": ["--document_mask"],
    "best_fit, document mask": ["--packing", "best_fit", "--document_mask"],
    "streaming": ["--streaming"],
    "streaming, document mask": ["--streaming", "--document_mask"],
}
# Median 320 ids and mean about 530, a long tail: the shape of web text. Chosen.
_LOG_MEAN, _LOG_DEVIATION = 5.77, 1.0
_GLOBAL_BATCH = 32


def main(argv: Sequence[str] | None = None) -> None:
    run_benchmark(_arguments(argv), "data-costs-", run, table)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data_costs")
    add = parser.add_argument
    add("--sizes", nargs="+", default=["10m", "1g"], help="bytes of ids to open (10m 1g)")
    add("--stream_size", default="50m", help="bytes of text to stream (50m)")
    add("--repeats", type=int, default=10, help="openings of each size (10)")
    add("--seconds", type=float, default=5.0, help="of making rows, for each variant (5)")
    add("--max_length", type=int, default=2048, help="ids of a row, without training (2048)")
    add("--steps", type=int, default=200, help="of each training run (200)")
    add("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS, metavar="NAME")
    add_output_flags(parser, RESULT)
    return parser.parse_args(argv)


def run(arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    """All measurements, one after the other."""
    result: dict[str, Any] = {
        "command": command_line("benchmarks.data_costs"),
        **surroundings(_PACKAGES),
        "config": {"max_length": arguments.max_length, "global_batch": _GLOBAL_BATCH},
    }
    small = work / "sample"
    command = [sys.executable, "-m", "llama_lib", "prepare", "-d", "sample", "--output", str(small)]
    measure([*command, "--cache_dir", str(work / "cache")], work / "log")
    packings = [name for name in arguments.variants if not name.startswith("streaming")]

    result["opening"], result["rows"] = [], []
    for size in arguments.sizes:
        folder = work / f"tokens-{size}"
        facts = write_tokens(folder, parse_size(size), small)
        opening = measure_opening(folder, arguments.repeats)
        result["opening"].append({"size": size} | facts | opening)
        for name in packings:
            cost = in_fresh_process(
                prepared_rows, str(folder), name, arguments.max_length, arguments.seconds
            )
            result["rows"].append({"size": size, "variant": name} | cost)
        shutil.rmtree(folder)
    text = work / "text.jsonl"
    pool = [t for source in resolve("sample", work / "cache") for t in records(source) if t]
    write_text(text, pool, parse_size(arguments.stream_size))
    tokenizer = small / TOKENIZER_FOLDER
    for name in (name for name in arguments.variants if name not in packings):
        cost = in_fresh_process(
            streamed_rows, str(text), str(tokenizer), name, arguments.max_length, arguments.seconds
        )
        result["rows"].append({"size": arguments.stream_size, "variant": name} | cost)

    result["training"] = [
        measure_training(name, arguments.steps, work) for name in arguments.variants
    ]
    return result


def write_tokens(folder: Path, num_bytes: int, like: Path) -> dict[str, Any]:
    """A prepared dataset of so many bytes of ids; tokenizer and form of another one."""
    manifest = json.loads((like / MANIFEST).read_text())
    folder.mkdir()
    shutil.copytree(like / TOKENIZER_FOLDER, folder / TOKENIZER_FOLDER)
    random = np.random.default_rng(0)
    name, facts = next(iter(manifest["sources"].items()))
    with IndexedWriter(folder / name, np.uint16) as writer:
        while (left := num_bytes // 2 - writer.tokens) > 0:
            lengths = random.lognormal(_LOG_MEAN, _LOG_DEVIATION, 10_000).astype(np.int64) + 1
            ends = np.cumsum(lengths)
            # The last document is cut so that the size is met exactly.
            lengths = lengths[: int(np.searchsorted(ends, left)) + 1]
            lengths[-1] -= max(0, int(lengths.sum()) - left)
            ids = random.integers(3, manifest["tokenizer"]["vocab_size"], int(lengths.sum()))
            writer.write(ids.astype(np.uint16), lengths)
    counts = {"documents": writer.documents, "tokens": writer.tokens}
    source = {**facts, **counts, "sha256": writer.sha256()}
    source["files"] = [{**facts["files"][0], "documents": writer.documents}]
    manifest |= {**counts, "sources": {name: source}}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return counts


def measure_opening(folder: Path, repeats: int) -> dict[str, Any]:
    """Milliseconds to open a dataset and read its last document, each in a fresh process."""
    found: dict[str, list[float]] = {"cold": [], "warm": []}
    for _ in range(repeats):
        drop_from_page_cache(folder)
        for state in found:
            found[state].append(round(in_fresh_process(open_tokens, str(folder)), 3))
    return {
        f"{state}_ms": {"median": statistics.median(ms), "worst": max(ms), "raw": ms}
        for state, ms in found.items()
    }


def open_tokens(folder: str) -> float:
    start = time.perf_counter()
    dataset = PreparedDataset.open(folder)
    int(dataset.tokens(dataset.num_documents - 1).sum())
    return (time.perf_counter() - start) * 1000


def drop_from_page_cache(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb+") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def prepared_rows(folder: str, variant: str, max_length: int, seconds: float) -> dict[str, Any]:
    """Rows per second of a dataset, nothing else done; memory with and without."""
    memory = memory_of(os.getpid())
    start = time.perf_counter()
    dataset = PreparedDataset.open(folder)
    mask = "mask" in variant
    packing = variant.split(",")[0]
    cache = Path(folder) / "cache"
    data = prepared_data(dataset, max_length, 42, packing, mask, 0, cache)
    return _rows(data.open_rows({}), seconds, start, memory)


def streamed_rows(
    text: str, tokenizer: str, variant: str, max_length: int, seconds: float
) -> dict[str, Any]:
    """Rows per second of a stream that is tokenised in a thread."""
    from llama_lib.data.stream import open_stream

    cache = str(Path(text).with_name("cache"))
    memory = memory_of(os.getpid())
    start = time.perf_counter()
    stream = open_stream(
        parse_entries([text]),
        tokenizer,
        max_length,
        42,
        cache,
        document_mask="mask" in variant,
    )
    return _rows(stream.rows(), seconds, start, memory)


def _rows(
    source: RowSource, seconds: float, start: float, before: dict[str, int] | None
) -> dict[str, Any]:
    loader = BatchLoader(source, _GLOBAL_BATCH)
    steps: Any = loader.steps(0, sys.maxsize)
    next(steps)
    first = time.perf_counter() - start
    rows, begin = 0, time.perf_counter()
    while (spent := time.perf_counter() - begin) < seconds:
        next(steps)
        rows += _GLOBAL_BATCH
    steps.close()
    after = memory_of(os.getpid())
    loader.close()
    assert before and after
    return {
        "first_batch_seconds": round(first, 3),
        "rows_per_second": round(rows / spent, 1),
        "million_tokens_per_second": round(rows * source.max_length / spent / 1e6, 3),
        # Pages of the token files come and go with the page cache and are not counted.
        "memory_mb": round((after["anonymous"] - before["anonymous"]) / 1e6, 1),
    }


def measure_training(variant: str, steps: int, work: Path) -> dict[str, Any]:
    """A real run on the sample; the first record, with all that starts up, is left out."""
    folder = work / "run"
    command = [sys.executable, str(ROOT / "pretrain.py"), "-c", "tiny", "-d", "sample"]
    command += ["-b", "8", "-l", "128", "--max_steps", str(steps), "--log_interval", "10"]
    command += ["-o", str(folder), "-t", str(folder / "logs"), "--save_interval", str(steps)]
    command += ["--cache_dir", str(work / "cache"), *VARIANTS[variant]]
    measure(command, work / "log")
    metrics = read_records(folder / "logs" / "metrics.jsonl")
    shutil.rmtree(folder)
    return {"variant": variant, "steps": steps} | wait_of(metrics)


def wait_of(metrics: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean wait and mean step of all records but the first, and the share of the wait."""
    counted = metrics[1:]
    if not counted:
        raise SystemExit(f"{len(metrics)} record(s) in metrics.jsonl: raise --steps above 10")
    wait = statistics.fmean(record["data_wait_s"] for record in counted)
    step = statistics.fmean(record["step_time_s"] for record in counted)
    return {
        "records": len(counted),
        "data_wait_ms": round(wait * 1000, 4),
        "step_ms": round(step * 1000, 2),
        "wait_percent": round(100 * wait / step, 3),
        "worst_wait_percent": round(
            max(100 * record["data_wait_s"] / record["step_time_s"] for record in counted), 3
        ),
    }


def table(result: dict[str, Any]) -> str:
    lines = [
        f"{'opening':<10}{'documents':>12}{'cold ms':>9}{'worst':>8}{'warm ms':>9}{'worst':>8}"
    ]
    for line in result["opening"]:
        cold, warm = line["cold_ms"], line["warm_ms"]
        lines.append(
            f"{line['size']:<10}{line['documents']:>12,}{cold['median']:>9.2f}{cold['worst']:>8.2f}"
            f"{warm['median']:>9.2f}{warm['worst']:>8.2f}"
        )
    lines += ["", f"{'rows of':<10}{'variant':<28}{'rows/s':>10}{'first s':>9}{'memory MB':>11}"]
    lines += [
        f"{line['size']:<10}{line['variant']:<28}{line['rows_per_second']:>10,.0f}"
        f"{line['first_batch_seconds']:>9.2f}{line['memory_mb']:>11,.1f}"
        for line in result["rows"]
    ]
    lines += ["", f"{'training':<28}{'wait ms':>10}{'step ms':>10}{'wait %':>9}{'worst %':>9}"]
    lines += [
        f"{line['variant']:<28}{line['data_wait_ms']:>10.3f}{line['step_ms']:>10.1f}"
        f"{line['wait_percent']:>9.2f}{line['worst_wait_percent']:>9.2f}"
        for line in result["training"]
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
