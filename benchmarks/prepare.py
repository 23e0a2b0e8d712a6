"""Measure `llama_lib prepare` against the usual way, on the same text with the same tokenizer.

    python -m benchmarks.prepare --sizes 10m 100m 1g

The usual way (benchmarks/usual_prepare.py) is datasets.load_dataset("json"), datasets.map with the
transformers tokenizer and EOS after each document, and datasets.map into blocks as the run_clm
example of transformers does; it is finished when the blocks are on the disk. Ours is finished when
the prepared folder is. Both get the same number of processes, a fresh process and empty caches for
each run, one after the other in turns.

Invariant: a comparison is written only if both gave the same ids, all documents in file order.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.measure import (
    ROOT,
    add_output_flags,
    as_record,
    command_line,
    measure,
    surroundings,
    write_result,
)
from llama_lib.data.indexed import IndexedReader
from llama_lib.data.prepared import PreparedDataset
from llama_lib.data.sources import records, resolve

RESULT = ROOT / "benchmarks" / "results" / "prepare.json"
# Four real files of RedPajama, if they are there.
_REDPAJAMA = ROOT.parent / "shared" / "data" / "redpajama"
_UNITS = {"k": 10**3, "m": 10**6, "g": 10**9}
_PACKAGES = ("transformers", "tokenizers", "datasets", "pyarrow", "gigatoken", "numpy")
_REPEATS = ((20 * 10**6, 5), (200 * 10**6, 3))  # so many runs up to this size
_REPEATS_OF_LARGER = 1
OURS, USUAL = "llama_lib", "usual"


def main(argv: Sequence[str] | None = None) -> None:
    arguments = _arguments(argv)
    work = Path(tempfile.mkdtemp(prefix="prepare-benchmark-", dir=arguments.work_dir))
    try:
        result = run(arguments, work)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print(table(result["summary"]))
    print(f"written to {arguments.result}")


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.prepare")
    add = parser.add_argument
    add("--sizes", nargs="+", default=["10m", "100m", "1g"], help="bytes of text (10m 100m 1g)")
    add(
        "--tokenizers",
        nargs="+",
        default=["llama3", "llama2"],
        help="styles to train, or folders (llama3 llama2)",
    )
    add("--vocab_size", type=int, default=16384, help="of the tokenizers trained (16384)")
    add("--processes", type=int, default=len(os.sched_getaffinity(0)), help="of each (all cores)")
    add("--repeats", type=int, help="runs of each (5 up to 20m, 3 up to 200m, else 1)")
    add("--block_size", type=int, default=2048, help="tokens of the usual way's blocks (2048)")
    add("--text", nargs="+", default=[_default_text()], help="text to draw documents from")
    add_output_flags(parser, RESULT)
    return parser.parse_args(argv)


def _default_text() -> str:
    return str(_REDPAJAMA) if _REDPAJAMA.is_dir() else "sample"


def run(arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    """All measurements; a run begins when the one before it has left nothing behind."""
    result: dict[str, Any] = {
        "command": command_line("benchmarks.prepare"),
        **surroundings(_PACKAGES),
        "config": {
            "processes": arguments.processes,
            "block_size": arguments.block_size,
            "vocab_size": arguments.vocab_size,
        },
    }
    pool = [text for source in resolve(arguments.text, work) for text in records(source) if text]
    result["text"] = {
        "drawn_from": [Path(text).name for text in arguments.text],
        "distinct_documents": len(pool),
        "distinct_mb": round(sum(len(text.encode()) for text in pool) / 1e6, 2),
    }
    tokenizers = {
        name: tokenizer_folder(name, arguments.text, arguments.vocab_size, work)
        for name in arguments.tokenizers
    }
    result["runs"] = runs = []
    for size in arguments.sizes:
        num_bytes = parse_size(size)
        text = work / f"text-{size}.jsonl"
        facts = write_text(text, pool, num_bytes)
        for name, folder in tokenizers.items():
            for repeat in range(arguments.repeats or repeats(num_bytes)):
                pair = measure_pair(arguments, text, folder, work, repeat)
                for each in pair:
                    each = {"size": size, "tokenizer": Path(name).name, "repeat": repeat} | each
                    runs.append({**each, "text_bytes": facts["bytes"]})
                    print(f"{json.dumps(runs[-1])}", file=sys.stderr, flush=True)
                # The large sizes take an hour: what is measured stays, whatever happens then.
                result["summary"] = summary(runs)
                write_result(arguments.result, result)
        text.unlink()
    return result


def measure_pair(
    arguments: argparse.Namespace, text: Path, tokenizer: Path, work: Path, repeat: int
) -> list[dict[str, Any]]:
    """Both ways once, the order turned round with every repeat; their ids are compared."""
    ways = {OURS: measure_ours, USUAL: measure_usual}
    order = [OURS, USUAL] if repeat % 2 == 0 else [USUAL, OURS]
    records, folders = {}, {}
    for way in order:
        folders[way] = work / way
        folders[way].mkdir()
        records[way] = {"way": way} | ways[way](arguments, text, tokenizer, folders[way])
    facts = json.loads((folders[USUAL] / "facts.json").read_text())
    tokens = compare(folders[OURS] / "prepared", facts, arguments.processes, arguments.block_size)
    for folder in folders.values():
        shutil.rmtree(folder)
    return [records[way] | {"tokens": tokens, "same_ids": True} for way in order]


def measure_ours(
    arguments: argparse.Namespace, text: Path, tokenizer: Path, folder: Path
) -> dict[str, Any]:
    command = [sys.executable, "-m", "llama_lib", "prepare", "-d", str(text)]
    command += ["--tokenizer", str(tokenizer), "--output", str(folder / "prepared")]
    # All documents in file order, none held out: the usual way sets none aside either.
    command += ["--eval_ratio", "0", "--workers", str(arguments.processes)]
    command += ["--cache_dir", str(folder / "cache")]
    return as_record(measure(command, folder / "log"))


def measure_usual(
    arguments: argparse.Namespace, text: Path, tokenizer: Path, folder: Path
) -> dict[str, Any]:
    facts = folder / "facts.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "usual_prepare.py"), "--data", str(text)]
    command += ["--tokenizer", str(tokenizer), "--cache_dir", str(folder / "cache")]
    command += ["--num_proc", str(arguments.processes), "--block_size", str(arguments.block_size)]
    command += ["--facts", str(facts)]
    caches = {"HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1"}
    measured = as_record(measure(command, folder / "log", caches))
    return measured | {"stages": json.loads(facts.read_text())["stages"]}


def tokenizer_folder(name: str, text: Sequence[str], vocab_size: int, work: Path) -> Path:
    """A folder as it is, or a tokenizer of that style trained on the text."""
    if Path(name).is_dir():
        return Path(name).resolve()
    folder = work / f"tokenizer-{name}"
    command = [sys.executable, "-m", "llama_lib", "tokenizer", "--input", *text]
    command += ["--style", name, "--vocab_size", str(vocab_size), "--output", str(folder)]
    command += ["--cache_dir", str(work / "cache")]
    measure(command, work / "tokenizer.log")
    return folder


def parse_size(text: str) -> int:
    number, unit = text[:-1], text[-1:].lower()
    if unit not in _UNITS or not number.isdecimal():
        raise SystemExit(f"--sizes: got {text!r}, expected a number and k, m or g, such as 100m")
    return int(number) * _UNITS[unit]


def repeats(num_bytes: int) -> int:
    return next((count for size, count in _REPEATS if num_bytes <= size), _REPEATS_OF_LARGER)


def write_text(path: Path, pool: Sequence[str], num_bytes: int) -> dict[str, int]:
    """Documents drawn with replacement until they have so many bytes; the same ones every time."""
    draw = random.Random(0)
    facts = {"bytes": 0, "documents": 0}
    with path.open("w", encoding="utf-8") as file:
        while facts["bytes"] < num_bytes:
            text = draw.choice(pool)
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            facts["bytes"] += len(text.encode())
            facts["documents"] += 1
    return facts


def compare(prepared: Path, usual: dict[str, Any], processes: int, block_size: int) -> int:
    """Tokens of the dataset; ends the benchmark unless both ways have the same ids throughout.

    The usual way's blocks are compared too: with the whole blocks of every batch of 1000
    documents, of which the run_clm example drops the rest.
    """
    dataset = PreparedDataset.open(prepared)
    (source,) = dataset.sources
    reader = IndexedReader(prepared / source)
    if len(reader) != usual["documents"]:
        raise SystemExit(f"{len(reader)} documents, the usual way has {usual['documents']}")
    position = 0
    for ids in arrow_ids(usual["tokenised"]):
        if not np.array_equal(ids, reader.ids[position : position + len(ids)]):
            raise SystemExit(f"the ids differ between {position:,} and {position + len(ids):,}")
        position += len(ids)
    if position != len(reader.ids):
        raise SystemExit(f"{len(reader.ids):,} ids, the usual way has {position:,}")
    blocks = arrow_ids(usual["blocks"])
    for expected in expected_blocks(reader, processes, block_size):
        rest = expected
        while len(rest):
            ids = next(blocks, np.empty(0, np.int64))
            if not len(ids) or not np.array_equal(ids, rest[: len(ids)]):
                raise SystemExit("the usual way's blocks are not those of the run_clm example")
            rest = rest[len(ids) :]
    if next(blocks, None) is not None:
        raise SystemExit("the usual way has more blocks than the run_clm example")
    return position


def arrow_ids(paths: Sequence[str]) -> Iterator[npt.NDArray[np.integer]]:
    """The `input_ids` of Arrow stream files one after another, without borders."""
    import pyarrow as pa

    for path in paths:
        with pa.memory_map(path) as file:
            for batch in pa.ipc.open_stream(file):
                ids = batch.column("input_ids").flatten().to_numpy(zero_copy_only=False)
                if len(ids):
                    yield ids


def expected_blocks(
    reader: IndexedReader, processes: int, block_size: int
) -> Iterator[npt.NDArray[np.integer]]:
    """The ids that fill whole blocks, per batch of 1000 documents of each process' part."""
    # datasets gives each process a contiguous part, the first ones a document more.
    processes = min(processes, len(reader))
    each, more = divmod(len(reader), processes)
    first = 0
    for process in range(processes):
        last = first + each + (process < more)
        for start in range(first, last, 1000):
            end = min(start + 1000, last) - 1
            begin = reader.offset(start)
            count = reader.offset(end) + int(reader.lengths[end]) - begin
            yield reader.ids[begin : begin + count // block_size * block_size]
        first = last


def summary(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per size and tokenizer: medians of each way, their ratio, and the rate between two sizes."""
    lines: list[dict[str, Any]] = []
    for size, tokenizer in dict.fromkeys((run["size"], run["tokenizer"]) for run in runs):
        line: dict[str, Any] = {"size": size, "tokenizer": tokenizer}
        for way in (OURS, USUAL):
            chosen = [
                run
                for run in runs
                if (run["size"], run["tokenizer"], run["way"]) == (size, tokenizer, way)
            ]
            seconds = statistics.median(run["seconds"] for run in chosen)
            megabytes = chosen[0]["text_bytes"] / 1e6
            line |= {"text_mb": round(megabytes, 3), "tokens": chosen[0]["tokens"]}
            line[way] = {
                "runs": len(chosen),
                "median_seconds": round(seconds, 3),
                "best_seconds": min(run["seconds"] for run in chosen),
                "median_cpu_seconds": round(
                    statistics.median(run["cpu_seconds"] for run in chosen), 3
                ),
                "mb_per_second": round(megabytes / seconds, 3),
                **{
                    name: max(run[name] for run in chosen)
                    for name in ("peak_pss_mb", "peak_anonymous_mb", "peak_rss_mb")
                },
            }
        line["times_faster"] = round(
            line[USUAL]["median_seconds"] / line[OURS]["median_seconds"], 2
        )
        line["memory_share"] = round(line[OURS]["peak_pss_mb"] / line[USUAL]["peak_pss_mb"], 3)
        _add_marginal(line, lines)
        lines.append(line)
    return lines


def _add_marginal(line: dict[str, Any], lines: Sequence[dict[str, Any]]) -> None:
    """MB/s of the text by which a size exceeds the one before: the rate without the start-up."""
    before = [other for other in lines if other["tokenizer"] == line["tokenizer"]]
    for way in (OURS, USUAL) if before else ():
        more = line[way]["median_seconds"] - before[-1][way]["median_seconds"]
        megabytes = line["text_mb"] - before[-1]["text_mb"]
        # Of two sizes close to each other noise may be all there is.
        line[way]["marginal_mb_per_second"] = round(megabytes / more, 3) if more > 0 else None


def table(lines: Sequence[dict[str, Any]]) -> str:
    head = (
        f"{'text':>6} {'tokenizer':<12}{'ours s':>9}{'usual s':>9}{'ours MB/s':>11}"
        f"{'usual MB/s':>12}{'faster':>8}{'ours peak MB':>14}{'usual peak MB':>15}"
    )
    rows = [
        f"{line['size']:>6} {line['tokenizer']:<12}{line[OURS]['median_seconds']:>9.2f}"
        f"{line[USUAL]['median_seconds']:>9.2f}{line[OURS]['mb_per_second']:>11.2f}"
        f"{line[USUAL]['mb_per_second']:>12.2f}{line['times_faster']:>7.1f}x"
        f"{line[OURS]['peak_pss_mb']:>14,.0f}{line[USUAL]['peak_pss_mb']:>15,.0f}"
        for line in lines
    ]
    return "\n".join([head, *rows])


if __name__ == "__main__":
    main()
