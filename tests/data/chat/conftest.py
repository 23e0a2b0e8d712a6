"""A tokenizer whose every word is one token, so that lengths can be told beforehand."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llama_lib.data.chat.templates import use_template
from llama_lib.data.chat.training import ChatRequest
from llama_lib.data.tokenizer import save_tokenizer

WORDS = [f"w{number}" for number in range(200)]
# <|im_start|> user ... <|im_end|> <|im_start|> assistant ... <|im_end|>: the newlines are no words.
CHATML_TOKENS = 6

Request = Callable[..., ChatRequest]


def word_tokenizer(template: str | None = None) -> Any:
    vocabulary = ["<unk>", "<s>", "</s>", "user", "assistant", "system", *WORDS]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(vocabulary)}, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    if template is not None:
        use_template(tokenizer, template, ())
    return tokenizer


def words(count: int, first: int = 0) -> str:
    return " ".join(WORDS[(first + number) % len(WORDS)] for number in range(count))


def chat(*turns: str, system: str | None = None) -> dict[str, Any]:
    """A record of user and assistant in turn."""
    roles = ["user", "assistant"] * len(turns)
    begin = [] if system is None else [{"role": "system", "content": system}]
    return {
        "messages": begin
        + [{"role": role, "content": turn} for role, turn in zip(roles, turns, strict=False)]
    }


def sized(length: int, answer: int = 1, first: int = 0) -> dict[str, Any]:
    """A conversation of so many tokens of chatml, of which `answer` + 1 are an answer's."""
    question = length - CHATML_TOKENS - answer
    return chat(words(question, first), words(answer, first + question))


def write_records(path: Path, records: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.fixture(scope="session")
def chatml_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer") / "chatml"
    save_tokenizer(word_tokenizer("chatml"), folder)
    return folder


@pytest.fixture
def request_of(tmp_path: Path, chatml_folder: Path) -> Request:
    """A request without held-out conversations, in a cache of the test's own."""

    def request_of(*datasets: str, **changes: Any) -> ChatRequest:
        options = {"tokenizer": str(chatml_folder), "max_length": 64, "eval_ratio": 0.0}
        options |= {"cache_dir": tmp_path / "cache", "workers": 1}
        return ChatRequest(list(datasets), **{**options, **changes})

    return request_of
