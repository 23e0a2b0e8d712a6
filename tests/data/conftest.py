"""A small tokenizer and small files to prepare."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llama_lib.data.readers import TextFile
from llama_lib.data.tokenizer import save_tokenizer, train_tokenizer
from llama_lib.errors import UserError

WriteJsonl = Callable[..., Path]


def parquet(folder: Path, columns: dict) -> Path:
    path = folder / "data.parquet"
    pq.write_table(pa.table(columns), path)
    return path


def problem(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        list(TextFile(path))
    return str(caught.value)


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer") / "small"
    texts = [f"the cat sat on mat number {i}, and so did the other {i * 7} cats" for i in range(99)]
    save_tokenizer(train_tokenizer(texts, 300), folder)
    return folder


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache for the tests that use the sample, so that its tokenizer is trained once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def write_jsonl(tmp_path: Path) -> WriteJsonl:
    def write(name: str, texts: list[Any]) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        return path

    return write
