"""Small streams over files of every kind, and what the files hold, read without our readers."""

import gzip
import io
import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard
from transformers import AutoTokenizer

from llama_lib.data.entries import parse_entries
from llama_lib.data.stream import Stream, StreamedRows, open_stream

Texts = dict[tuple[str, int], str]

WORDS = ("the", "cat", "sat", "on", "a", "mat", "and", "so", "did", "other", "cats", "by", "number")


def texts(name: str, count: int, seed: int = 0) -> list[str]:
    """Documents that no other call gives, of very different lengths."""
    chance = random.Random(f"{name} {seed}")
    return [
        f"{name} {number} " + " ".join(chance.choices(WORDS, k=int(chance.paretovariate(0.9) * 3)))
        for number in range(count)
    ]


def write(path: Path, documents: Sequence[Any]) -> Path:
    """A file of the kind that its name says; one named `whole` has a single row group."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps({"text": text}) + "\n" for text in documents).encode()
    if path.suffix == ".parquet":
        rows = None if "whole" in path.name else 10
        table = pa.table({"text": list(documents)})
        # Dictionaries and statistics would make the index larger than such small groups.
        pq.write_table(
            table, path, row_group_size=rows, use_dictionary=False, write_statistics=False
        )
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines))
    elif path.suffix == ".zst":
        path.write_bytes(zstandard.compress(lines))
    else:
        path.write_bytes(lines)
    return path


def read(paths: Iterable[Path]) -> Texts:
    """(name of the file, number of the record in it) -> text."""
    found: Texts = {}
    for path in paths:
        content = path.read_bytes()
        if path.suffix == ".parquet":
            documents = pq.read_table(path)["text"].to_pylist()
        else:
            if path.suffix == ".gz":
                content = gzip.decompress(content)
            elif path.suffix == ".zst":
                with zstandard.ZstdDecompressor().stream_reader(io.BytesIO(content)) as stream:
                    content = stream.read()
            documents = [json.loads(line)["text"] for line in content.splitlines()]
        found |= {(path.name, number): text for number, text in enumerate(documents)}
    return found


def stream(paths: Iterable[Path | str], tokenizer: Path, cache_dir: Path, **options: Any) -> Stream:
    settings: dict[str, Any] = {
        "max_length": 48,
        "seed": 7,
        "window": 4,
        "chunk_bytes": 2000,
    }
    entries = parse_entries([str(path) for path in paths])
    return open_stream(entries, tokenizer, cache_dir=cache_dir, **{**settings, **options})


def tokenised(found: Texts, tokenizer: Path) -> dict[tuple[str, int], list[int]]:
    """The ids of each document by transformers, with the end of text behind it."""
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    return {
        key: [*loaded(text, add_special_tokens=False)["input_ids"], loaded.eos_token_id]
        for key, text in found.items()
        if text
    }


def first_boundary(rows: StreamedRows, num_tokens: int) -> int:
    """The first sample, after so many tokens, before which all rows of the same windows lie."""
    sample = -(-num_tokens // rows.max_length)
    while rows.state(sample)["parts"][0]["sample"] != sample:
        sample += 1
    return sample


def ids(rows: StreamedRows, samples: Sequence[int]) -> np.ndarray:
    found, _ = rows.rows(list(samples), list(samples))
    return np.stack([row.ids for row in found])
