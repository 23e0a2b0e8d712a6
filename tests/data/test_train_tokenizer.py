"""Tokenizers in the styles of Llama 2 and 3: exact, known to plain transformers, fast, refusing."""

import io
import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import gigatoken
import numpy as np
import pytest
import regex
import sentencepiece
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoTokenizer, LlamaTokenizerFast, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

from llama_lib.data.sources import records, resolve
from llama_lib.data.tokenise import prove
from llama_lib.data.tokenizer_command import main
from llama_lib.data.train_tokenizer import STYLES, train_style
from llama_lib.errors import UserError
from tests.data.conftest import WriteJsonl

VOCAB_SIZE = 2000
REDPAJAMA = Path(__file__).parents[2].parent / "shared" / "data" / "redpajama"

# What is most likely to be lost: blanks and their mark, the characters that stand in for it,
# spelt-out byte and special tokens, line ends, marks that combine, and what no standard assigns.
TRAPS = [
    *[" ", "  ", "   ", "\t", "\n", "\r\n", "\r", "\u2581", "\u2581\u2581", " \u2581", "\u2581 "],
    *["\x1a", "\x1a\x1a", "\x00", "\x07", "\x7f", "\x85", "\u00a0", "\u3000", "\u2028", "\ufeff"],
    *["<0x1A>", "<0x20>", "<0xE2>", "<0x0a>", "<0x", "<unk>", "<s>", "</s>", "<pad>", "<", ">"],
    *["<|begin_of_text|>", "<|eot_id|>", "<|", "\u0120", "\u010a", "\u0100", "##", "\u2580"],
    *["e\u0301", "\u0301", "\u0308\u0301", "\u200d", "\U0001f468\u200d\U0001f469", "\U0001f1e9"],
    *["\ud7ff", "\ue000", "\uffff", "\ufffe", "\ufffd", "\U000e0fff", "\U0010ffff", "\u0378"],
    *["the", " the", "The", "it's", "'LL", "12345", "1,000.5", "def f(x):\n    return x", "..."],
    *["\u4f60\u597d", "\u3053\u3093", "\u0e2a\u0e27", "\u0645\u0631", "\ufb01", "\u00bd", "\u00df"],
]


def arbitrary_texts(count: int, seed: int) -> list[str]:
    """Random texts out of traps and of any code points but surrogates, which are no text."""
    draw = random.Random(seed)

    def piece() -> str:
        kind = draw.random()
        if kind < 0.55:
            return draw.choice(TRAPS)
        if kind < 0.7:
            return chr(draw.randrange(0x80))
        if kind < 0.85:
            return chr(draw.choice([0x2500, 0x0300, 0x2000, 0xFE00]) + draw.randrange(0x100))
        point = draw.randrange(0x110000 - 0x800)
        return chr(point if point < 0xD800 else point + 0x800)

    texts = ["", *TRAPS, *(f"{trap}{trap}" for trap in TRAPS)]
    texts += ["".join(piece() for _ in range(draw.randint(1, 20))) for _ in range(count)]
    return texts


def sample_texts(cache_dir: Path) -> list[str]:
    sources = resolve("sample", cache_dir)
    return [text for source in sources for text in list(records(source))[:60]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> dict[str, Path]:
    """A tokenizer of each style, trained by the command on a part of the sample."""
    folder = tmp_path_factory.mktemp("styles")
    data = folder / "text.jsonl"
    texts = sample_texts(cache_dir)
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    for style in STYLES:
        arguments = ["--input", str(data), "--style", style, "--vocab_size", str(VOCAB_SIZE)]
        assert main([*arguments, "--output", str(folder / style), "--report_mib", "0.1"]) == 0
    return {style: folder / style for style in STYLES}


def again(texts: Iterable[str]) -> Callable[[], list[str]]:
    kept = list(texts)
    return lambda: kept


@pytest.mark.parametrize("style", STYLES)
def test_any_text_comes_back_exactly(folders: dict[str, Path], style: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folders[style])
    texts = arbitrary_texts(4000, seed=7)
    ids = tokenizer(texts, add_special_tokens=False).input_ids
    back = tokenizer.batch_decode(ids)
    assert [text for text, other in zip(texts, back, strict=True) if text != other] == []
    # Nothing is unknown, unless the text itself says <unk>.
    if tokenizer.unk_token is not None:
        for text, row in zip(texts, ids, strict=True):
            assert row.count(tokenizer.unk_token_id) == text.count("<unk>")


@pytest.mark.parametrize("style", STYLES)
def test_gigatoken_gives_the_ids_of_the_tokenizer(
    folders: dict[str, Path], cache_dir: Path, style: str
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folders[style])
    fast = gigatoken.Tokenizer.from_json(tokenizer.backend_tokenizer.to_str())
    texts = [*arbitrary_texts(1500, seed=11), *sample_texts(cache_dir), " " * 5000, "x" * 5000]
    expected = tokenizer(texts, add_special_tokens=False).input_ids
    assert fast.encode_batch(texts, parallel=False).to_list() == expected
    # So preparing data uses it.
    assert prove(tokenizer, probes=texts).recipe.engine == "gigatoken"


@pytest.mark.full
@pytest.mark.parametrize("vocab_size", [16384, 32000])
@pytest.mark.parametrize("style", STYLES)
def test_real_text_at_real_size(tmp_path: Path, style: str, vocab_size: int) -> None:
    if not REDPAJAMA.is_dir():
        pytest.skip("needs the RedPajama samples")
    texts = [text for source in resolve(str(REDPAJAMA), tmp_path) for text in records(source)]
    tokenizer = train_style(again(texts), vocab_size, style)
    assert len(tokenizer) == vocab_size
    ids = tokenizer(texts, add_special_tokens=False).input_ids
    assert tokenizer.batch_decode(ids) == texts
    fast = gigatoken.Tokenizer.from_json(tokenizer.backend_tokenizer.to_str())
    assert fast.encode_batch(texts, parallel=False).to_list() == ids


@pytest.mark.parametrize("style", STYLES)
def test_plain_transformers_loads_the_folder(folders: dict[str, Path], style: str) -> None:
    config = json.loads((folders[style] / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    tokenizer = AutoTokenizer.from_pretrained(folders[style])
    assert type(tokenizer) is PreTrainedTokenizerFast
    assert len(tokenizer) == VOCAB_SIZE == max(tokenizer.get_vocab().values()) + 1
    special = STYLES[style].special
    assert tokenizer.convert_tokens_to_ids(list(special)) == list(range(len(special)))
    assert sorted(tokenizer.all_special_ids) == list(range(len(special)))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    assert tokenizer.pad_token_id not in (1, 2)
    # One BOS in front, no EOS, as the Llama tokenizers; decoded without it, the text is the same.
    encoded = tokenizer(["a cat", "  two  blanks"], padding=True)
    assert set(encoded) == {"input_ids", "attention_mask"}
    bare = tokenizer("a cat", add_special_tokens=False).input_ids
    assert tokenizer("a cat").input_ids == [1, *bare]
    assert tokenizer("a cat", "a cat").input_ids == [1, *bare, 1, *bare]
    assert tokenizer.batch_decode(encoded.input_ids, skip_special_tokens=True) == [
        "a cat",
        "  two  blanks",
    ]
    plain = Tokenizer.from_file(str(folders[style] / "tokenizer.json"))
    for text in arbitrary_texts(200, seed=3):
        assert plain.encode(text).ids == tokenizer(text).input_ids


def test_llama2_has_a_token_for_every_byte(folders: dict[str, Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folders["llama2"])
    vocabulary = tokenizer.get_vocab()
    assert [vocabulary[f"<0x{byte:02X}>"] for byte in range(256)] == list(range(4, 260))
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    assert model["byte_fallback"] is True and model["unk_token"] == "<unk>"
    assert tokenizer.tokenize("\U0001f600") == ["<0xF0>", "<0x9F>", "<0x98>", "<0x80>"]
    # Digits stand alone, words carry the blank before them, no piece joins two words.
    assert tokenizer.tokenize("of 123") == ["of", "\u2581", "1", "2", "3"]
    assert tokenizer.tokenize("of the") == ["of", "\u2581the"]
    learned = [token for token in vocabulary if vocabulary[token] >= 260]
    assert not [token for token in learned if "\u2581" in token.lstrip("\u2581")]
    assert not [token for token in learned if "<0x" in token]


def test_llama2_learns_what_sentencepiece_learns(cache_dir: Path, tmp_path: Path) -> None:
    texts = sample_texts(cache_dir)[:60]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        # It reads sentences, not documents.
        sentence_iterator=iter(line for text in texts for line in text.split("\n")),
        model_writer=model,
        vocab_size=1000,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        character_coverage=0.99995,
        minloglevel=2,
    )
    theirs = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    ours = train_style(again(texts), 1000, "llama2")
    pieces = {theirs.id_to_piece(n) for n in range(1000)} - {"<unk>", "<s>", "</s>"}
    assert len(pieces & set(ours.get_vocab())) > 0.9 * len(pieces)
    lines = [line for text in texts for line in text.split("\n")]
    their_tokens = sum(map(len, theirs.encode(lines)))
    our_tokens = sum(map(len, ours(lines, add_special_tokens=False).input_ids))
    assert our_tokens == pytest.approx(their_tokens, rel=0.03)


def test_llama3_splits_as_llama3_does(folders: dict[str, Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folders["llama3"])
    # The pattern as transformers knows it, in another engine of regular expressions.
    pattern = regex.compile(TikTokenConverter(vocab_file="none").pattern)
    for text in [*TRAPS, "It's 12345 o'clock;\r\n\r\n  they'LL say  \n\tx=[1,2]\u3000\u4f60\u597d"]:
        pieces = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
        assert [text[start:end] for _, (start, end) in pieces] == pattern.findall(text)


@pytest.mark.parametrize("style", STYLES)
def test_training_is_deterministic(cache_dir: Path, style: str) -> None:
    texts = sample_texts(cache_dir)[:30]
    first, second = (train_style(again(texts), 600, style) for _ in range(2))
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()
    assert len(first) == 600


def test_text_without_blanks_or_only_of_traps() -> None:
    for training in (
        ["\u4f60\u597d\u4e16\u754c" * 200, "\u4f60 a"],
        ["\x1a"],
        ["\u2581 \u2581\x1a"],
    ):
        for style in STYLES:
            tokenizer = train_style(again(training), 300, style)
            texts = arbitrary_texts(300, seed=5)
            assert (
                tokenizer.batch_decode(tokenizer(texts, add_special_tokens=False).input_ids)
                == texts
            )


def test_long_runs_give_no_endless_tokens() -> None:
    text = "=" * 5000 + "\n" + " " * 5000 + "word " * 100
    for style, longest in (("llama2", 16), ("llama3", 128)):
        vocabulary = train_style(again([text]), 400, style).get_vocab()
        assert max(len(token) for token in vocabulary if "=" in token) == longest


def test_rare_characters_are_left_to_their_bytes() -> None:
    texts = ["plain words " * 2000, "one \u4f60"]
    common = train_style(again(texts), 300, "llama2").get_vocab()
    assert "\u4f60" not in common and "w" in common
    every = train_style(again(texts), 300, "llama2", character_coverage=1.0).get_vocab()
    assert "\u4f60" in every


# -- a reference ---------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["normalizer", "metaspace"])
def llama2_reference(
    tmp_path_factory: pytest.TempPathFactory, cache_dir: Path, request: pytest.FixtureRequest
) -> Path:
    """A tokenizer made as Llama 2's was: by SentencePiece, converted by transformers, both ways."""
    folder = tmp_path_factory.mktemp("reference")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sample_texts(cache_dir)[0].split("\n") * 20),
        model_prefix=str(folder / "m"),
        vocab_size=320,
        hard_vocab_limit=False,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    LlamaTokenizerFast(
        vocab_file=str(folder / "m.model"),
        add_prefix_space=True,
        legacy=request.param == "normalizer",
    ).save_pretrained(folder / "llama")
    assert (parts(folder / "llama")["normalizer"] is None) == (request.param == "metaspace")
    return folder / "llama"


def parts(folder: Path) -> dict[str, Any]:
    content = json.loads((folder / "tokenizer.json").read_text())
    return {
        name: content[name] for name in ("normalizer", "pre_tokenizer", "decoder", "post_processor")
    }


def test_parts_of_a_llama2_reference(
    tmp_path: Path, llama2_reference: Path, write_jsonl: WriteJsonl, cache_dir: Path
) -> None:
    data = write_jsonl("text.jsonl", sample_texts(cache_dir)[:20])
    output = tmp_path / "out"
    arguments = ["--input", str(data), "--output", str(output), "--vocab_size", "700"]
    assert main([*arguments, "--reference", str(llama2_reference)]) == 0
    assert parts(output) == parts(llama2_reference)
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert tokenizer.convert_tokens_to_ids(["<unk>", "<s>", "</s>", "<pad>"]) == [0, 1, 2, 3]
    assert len(tokenizer) == 700
    # Training saw the reference's parts: the first word begins with its dummy blank.
    assert tokenizer.tokenize("the")[0] == "\u2581the"
    ids = tokenizer("the cat \U0001f600").input_ids
    assert ids[0] == 1 and tokenizer.decode(ids[1:]) == "the cat \U0001f600"
    # Both stand in the report.
    report = json.loads((output / "report.json").read_text())
    assert set(report["total"]["tokenizers"]) == {"out", "llama"}


def byte_level_reference(folder: Path, begin: str) -> Path:
    """Byte-level BPE in lower case, with the begin token at an id of its own."""
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(["a cat"], trainers.BpeTrainer(initial_alphabet=alphabet))
    backend.add_special_tokens([AddedToken(begin, special=True)])
    number = backend.token_to_id(begin)
    assert number > 200
    backend.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{begin} $A", pair=f"{begin} $A $B", special_tokens=[(begin, number)]
            ),
        ]
    )
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=begin).save_pretrained(folder)
    return folder


def test_parts_of_a_byte_level_reference(tmp_path: Path) -> None:
    reference = byte_level_reference(tmp_path / "reference", "<|begin_of_text|>")
    tokenizer = train_style(
        again(["The CAT sat, the cat SAT 12345"] * 9),
        330,
        reference=AutoTokenizer.from_pretrained(reference),
    )
    tokenizer.save_pretrained(tmp_path / "out")
    ours, theirs = parts(tmp_path / "out"), parts(reference)
    template = theirs["post_processor"]["processors"][1]
    template["special_tokens"]["<|begin_of_text|>"]["ids"] = [1]
    assert ours == theirs
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = loaded("The CAT").input_ids
    assert ids == loaded("the cat").input_ids and ids[0] == 1
    # GPT-2's pre-tokenization keeps all digits together, Llama 3's only three.
    assert "\u012012345" in loaded.get_vocab()
    assert not [token for token in loaded.get_vocab() if "CAT" in token]


def test_references_that_fit_no_style_are_refused(
    tmp_path: Path, llama2_reference: Path, write_jsonl: WriteJsonl
) -> None:
    data = write_jsonl("text.jsonl", ["some text"])
    run = ["--input", str(data), "--vocab_size", "400", "--output", str(tmp_path / "out")]
    with pytest.raises(UserError, match="in the style of llama2: got --style llama3"):
        main([*run, "--style", "llama3", "--reference", str(llama2_reference)])
    words = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path / "words")
    with pytest.raises(UserError, match=r"words fits no style: its model is WordLevel"):
        main([*run, "--reference", str(tmp_path / "words")])
    strange = byte_level_reference(tmp_path / "strange", "<|strange|>")
    with pytest.raises(UserError, match=r"puts <\|strange\|> around each text"):
        main([*run, "--reference", str(strange)])
    with pytest.raises(UserError, match=r"no tokenizer can be loaded .* --reference"):
        main([*run, "--reference", str(tmp_path / "absent")])
    with pytest.raises(UserError, match=r"no tokenizer can be loaded .* --compare"):
        main([*run, "--compare", str(tmp_path / "absent")])
    assert not (tmp_path / "out").exists()


@pytest.mark.full
@pytest.mark.parametrize("style", STYLES)
def test_memory_is_flat_in_the_number_of_documents(style: str) -> None:
    program = (
        "import resource, random, sys\n"
        "from llama_lib.data.train_tokenizer import train_style\n"
        "draw = random.Random(0)\n"
        "words = [''.join(draw.choices('abcdefgh', k=6)) for _ in range(3000)]\n"
        "def texts():\n"
        "    draw = random.Random(1)\n"
        "    for _ in range(int(sys.argv[1])):\n"
        "        yield ' '.join(draw.choices(words, k=500))\n"
        "train_style(texts, 400, sys.argv[2])\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
    )

    def peak(count: int) -> int:
        command = [sys.executable, "-c", program, str(count), style]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    # 3.5 and 35 MB of text: kept, the texts alone would be 31 MB more.
    assert peak(10000) - peak(1000) < 16 * 1024


def test_ids_fit_what_they_are_stored_as(folders: dict[str, Path]) -> None:
    for folder in folders.values():
        tokenizer = AutoTokenizer.from_pretrained(folder)
        ids = np.array(tokenizer("\x1a\u2581 text", add_special_tokens=False).input_ids)
        assert ids.max() < VOCAB_SIZE == len(tokenizer)
