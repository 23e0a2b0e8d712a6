"""Loading, hashing, saving and refusing tokenizers, and the one trained on the sample."""

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, GPT2TokenizerFast, PreTrainedTokenizerFast

from llama_lib.data.once import beside
from llama_lib.data.sample import write_sample
from llama_lib.data.tokenizer import (
    check_vocabulary,
    fast_tokenizer,
    load_tokenizer,
    sample_tokenizer,
    save_tokenizer,
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


def test_the_samples_way_of_training_keeps_its_hash() -> None:
    # Prepared data and checkpoints of earlier releases carry such hashes.
    texts = [f"word{n % 17} number {n}" for n in range(500)]
    assert tokenizer_hash(train_tokenizer(texts, 320)).startswith("e7fd92f5c61ff6c0")


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
    # What only splits text, and trains no documents, needs no end of documents.
    assert fast_tokenizer(str(tmp_path / "no_eos")).is_fast
    with pytest.raises(UserError, match=r"no tokenizer can be loaded .* with --compare\."):
        fast_tokenizer(str(tmp_path / "absent"), flag="--compare")


@pytest.mark.parametrize("damage", ["cut", "no tokenizer", "settings"])
def test_damaged_tokenizer_is_one_short_line(
    tokenizer_path: Path, tmp_path: Path, damage: str
) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(tokenizer_path, folder)
    content = (folder / "tokenizer.json").read_text()
    if damage == "cut":
        (folder / "tokenizer.json").write_text(content[: len(content) // 2])
    elif damage == "no tokenizer":
        (folder / "tokenizer.json").write_text("{}")
    else:
        (folder / "tokenizer_config.json").write_text("[]")
    with pytest.raises(UserError) as caught:
        load_tokenizer(str(folder))
    message = str(caught.value)
    assert "no tokenizer can be loaded from" in message and message.endswith("--tokenizer.")
    assert "\n" not in message


def test_the_list_of_all_models_is_cut(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="model_type") as caught:
        load_tokenizer(str(tmp_path))
    ours = len("no tokenizer can be loaded from ''") + len(str(tmp_path)) + 100
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200 + ours


def test_home_folder_is_expanded(tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tokenizer_path.parent))
    assert len(load_tokenizer(f"~/{tokenizer_path.name}")) == 300


def test_equal_process_numbers_on_one_disk_do_not_clash(tmp_path: Path) -> None:
    """As of two containers; threads have equal ones, too."""
    old = os.umask(0o022)
    try:
        with beside(tmp_path / "a") as first, beside(tmp_path / "a") as second:
            assert first != second and first.name == second.name == "a"
            first.write_text("first")
            second.write_text("second")
            second.replace(tmp_path / "a")
            first.replace(tmp_path / "a")
    finally:
        os.umask(old)
    assert (tmp_path / "a").read_text() == "first"
    # Others may read it, and nothing else is left.
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o644
    assert list(tmp_path.iterdir()) == [tmp_path / "a"]


def test_sample_written_by_many_at_once_is_whole(tmp_path: Path) -> None:
    expected = [path.read_bytes() for path in write_sample(tmp_path / "alone")]
    with ThreadPoolExecutor(8) as pool:
        for paths in pool.map(lambda _: write_sample(tmp_path / "shared"), range(8)):
            assert [path.read_bytes() for path in paths] == expected
    assert len(list((tmp_path / "shared").iterdir())) == len(expected)


def test_saved_folder_names_its_class_and_holds_what_is_put_beside(tmp_path: Path) -> None:
    save_tokenizer(train_tokenizer(TEXTS, 270), tmp_path / "out", {"notes.txt": "caf\u00e9"})
    config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert (tmp_path / "out" / "notes.txt").read_text(encoding="utf-8") == "caf\u00e9"
    assert type(AutoTokenizer.from_pretrained(tmp_path / "out")) is PreTrainedTokenizerFast
    # A class of its own keeps its name, and nothing but the folder is left.
    other = GPT2TokenizerFast(tokenizer_object=train_tokenizer(TEXTS, 270).backend_tokenizer)
    save_tokenizer(other, tmp_path / "gpt2")
    assert type(AutoTokenizer.from_pretrained(tmp_path / "gpt2")) is GPT2TokenizerFast
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpt2", "out"]
