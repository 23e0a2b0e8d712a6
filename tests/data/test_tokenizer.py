"""Training, hashing and refusing tokenizers; encoding against the tokenizer's own `__call__`."""

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from llama_lib.data import tokenise
from llama_lib.data.sources import records, resolve
from llama_lib.data.tokenise import Encoder, in_order
from llama_lib.data.tokenizer import (
    check_vocabulary,
    load_tokenizer,
    main,
    sample_tokenizer,
    tokenizer_hash,
    train_tokenizer,
)
from llama_lib.errors import UserError

TEXTS = ["a cat sat on a mat", " two  blanks\n\n\tand lines", "\u4f60\u597d \U0001f600", "</s> x"]


def test_trained_tokenizer_keeps_any_text_and_llama_ids(tokenizer_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
    assert tokenizer.convert_tokens_to_ids(["<unk>", "<s>", "</s>"]) == [0, 1, 2]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 0)
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert tokenizer.decode(ids) == text
        assert 0 not in ids


def test_training_is_deterministic() -> None:
    texts = [f"word{n % 17} number {n}" for n in range(500)]
    first, second = (train_tokenizer(iter(texts), 320) for _ in range(2))
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()


def test_hash_survives_saving_and_tells_tokenizers_apart(
    tokenizer_path: Path, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(str(tokenizer_path))
    tokenizer.save_pretrained(tmp_path / "copy")
    used = load_tokenizer(str(tmp_path / "copy"))
    used("truncated text", truncation=True, max_length=2)  # leaves its mark in the backend
    assert tokenizer_hash(used) == tokenizer_hash(tokenizer)
    assert tokenizer_hash(train_tokenizer(TEXTS, 270)) != tokenizer_hash(tokenizer)


def test_sample_tokenizer_is_trained_once_per_cache(cache_dir: Path) -> None:
    folder = sample_tokenizer(cache_dir)
    before = (folder / "tokenizer.json").stat().st_mtime_ns
    assert sample_tokenizer(cache_dir) == folder
    assert (folder / "tokenizer.json").stat().st_mtime_ns == before
    assert len(load_tokenizer("sample", cache_dir)) == 4096


def test_vocabulary_larger_than_the_models_is_refused(tokenizer_path: Path) -> None:
    tokenizer = load_tokenizer(str(tokenizer_path))
    assert check_vocabulary(tokenizer, 300) == []
    (problem,) = check_vocabulary(tokenizer, 299)
    assert "300 ids" in problem and "299" in problem and "--tokenizer" in problem


def test_bad_tokenizers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no tokenizer can be loaded from .*--tokenizer"):
        load_tokenizer(str(tmp_path / "absent"))
    bare = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=bare).save_pretrained(tmp_path / "no_eos")
    with pytest.raises(UserError, match="no eos_token"):
        load_tokenizer(str(tmp_path / "no_eos"))


def test_command_trains_a_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "a.jsonl"
    data.write_text("".join(json.dumps({"text": f"line {n}"}) + "\n" for n in range(50)))
    arguments = ["-d", str(data), "--vocab_size", "280", "--cache_dir", str(tmp_path / "cache")]
    assert main([*arguments, "--output", str(tmp_path / "out")]) == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("line 7").input_ids
    assert "ids" in capsys.readouterr().out
    with pytest.raises(UserError, match="not empty"):
        main([*arguments, "--output", str(tmp_path / "out")])
    with pytest.raises(UserError, match="--vocab_size 100 is too small"):
        main(["-d", str(data), "--vocab_size", "100", "--output", str(tmp_path / "small")])


@pytest.mark.parametrize("workers", [1, 2])
def test_ids_equal_the_tokenizers_own(cache_dir: Path, workers: int) -> None:
    tokenizer = load_tokenizer("sample", cache_dir)
    texts = [t for source in resolve("sample", cache_dir) for t in list(records(source))[:20]]
    encoder = Encoder(tokenizer, workers)
    assert encoder.engine == "gigatoken"
    ids, lengths = encoder.encode(TEXTS + texts)
    expected = tokenizer(TEXTS + texts, add_special_tokens=False).input_ids
    assert lengths.tolist() == [len(row) + 1 for row in expected]
    assert ids.tolist() == [token for row in expected for token in [*row, 2]]


def test_begin_token_is_optional(tokenizer_path: Path) -> None:
    tokenizer = load_tokenizer(str(tokenizer_path))
    plain, _ = Encoder(tokenizer, 1).encode(["cat", "mat"])
    begun, lengths = Encoder(tokenizer, 1, add_bos=True).encode(["cat", "mat"])
    assert begun[begun != 1].tolist() == plain.tolist()
    assert begun[np.cumsum(lengths) - lengths].tolist() == [1, 1]


def test_engines_and_threads_give_the_same_ids(
    tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    tokenizer = load_tokenizer(str(tokenizer_path))
    fast = Encoder(tokenizer, 2)
    monkeypatch.setattr(tokenise, "_proven_gigatoken", lambda *_: (None, "not wanted"))
    slow = Encoder(tokenizer, 2)
    assert (fast.engine, slow.engine, slow.threads) == ("gigatoken", "tokenizers", 2)
    batches = [[f"{text} {n}" for text in TEXTS] for n in range(9)]
    for one, other in zip(
        in_order(fast.encode, batches, 1), in_order(slow.encode, batches, 2), strict=True
    ):
        np.testing.assert_array_equal(one[0], other[0])
        np.testing.assert_array_equal(one[1], other[1])


def test_gigatoken_is_not_used_where_its_ids_differ(
    tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    tokenizer = load_tokenizer(str(tokenizer_path))

    class Wrong(tokenise.Encoder):
        def _with_backend(self, texts):  # type: ignore[no-untyped-def]
            return [ids + 1 for ids in super()._with_backend(texts)]

    encoder = Wrong(tokenizer, 1)
    assert encoder.engine == "tokenizers" and "ids differ" in encoder.note


def test_tokenizer_gigatoken_does_not_know_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "cat": 2}, unk_token="<unk>"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", eos_token="</s>"
    )
    encoder = Encoder(tokenizer, 1)
    assert encoder.engine == "tokenizers" and encoder.note
    assert encoder.encode(["CAT dog", "cat"])[0].tolist() == [2, 0, 1, 2, 1]


def test_order_is_kept_when_later_batches_are_ready_first() -> None:
    import time

    def slow_first(number: int) -> int:
        time.sleep(0.05 if number % 2 == 0 else 0)
        return number

    assert list(in_order(slow_first, range(10), 3)) == list(range(10))
