"""Encoding against the tokenizer's own `__call__`; the engine that may not be used."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llama_lib.data import estimate, tokenise
from llama_lib.data.sources import Source, records, resolve
from llama_lib.data.tokenise import Encoder, prove
from llama_lib.data.tokenizer import adds_bos, load_tokenizer, train_tokenizer
from llama_lib.data.train_tokenizer import train_style

TEXTS = ["a cat sat on a mat", " two  blanks\n\n\tand lines", "\u4f60\u597d \U0001f600", "</s> x"]


@pytest.mark.parametrize("engine", ["gigatoken", "tokenizers"])
def test_ids_equal_the_tokenizers_own(
    cache_dir: Path, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = load_tokenizer("sample", cache_dir)
    texts = [t for source in resolve("sample", cache_dir) for t in list(records(source))[:20]]
    if engine == "tokenizers":
        monkeypatch.setattr(tokenise, "_difference", lambda *_: "not wanted")
    proof = prove(tokenizer, probes=texts[:5])
    assert proof.recipe.engine == engine
    ids, lengths = Encoder(proof.recipe).encode(TEXTS + texts)
    expected = tokenizer(TEXTS + texts, add_special_tokens=False).input_ids
    assert ids.dtype == np.uint16
    assert lengths.tolist() == [len(row) + 1 for row in expected]
    assert ids.tolist() == [token for row in expected for token in [*row, 2]]
    measured = tokenizer(texts[:5], add_special_tokens=False).input_ids
    num_bytes = sum(len(text.encode()) for text in texts[:5])
    assert proof.bytes_per_token == num_bytes / sum(map(len, measured))


def test_begin_token_is_optional(tokenizer_path: Path) -> None:
    tokenizer = load_tokenizer(str(tokenizer_path))
    plain, _ = Encoder(prove(tokenizer).recipe).encode(["cat", "mat"])
    begun, lengths = Encoder(prove(tokenizer, add_bos=True).recipe).encode(["cat", "mat"])
    assert begun[begun != 1].tolist() == plain.tolist()
    assert begun[np.cumsum(lengths) - lengths].tolist() == [1, 1]
    ids, lengths = Encoder(prove(tokenizer).recipe).encode([])
    assert len(ids) == len(lengths) == 0


def test_gigatoken_is_not_used_where_its_ids_differ(
    tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = load_tokenizer(str(tokenizer_path))
    true = tokenise.gigatoken_encoder

    def wrong(content: str):  # type: ignore[no-untyped-def]
        encode = true(content)
        return lambda texts: [ids + ("a probe" in t) for t, ids in zip(texts, encode(texts))]  # noqa: B905

    monkeypatch.setattr(tokenise, "gigatoken_encoder", wrong)
    assert prove(tokenizer).recipe.engine == "gigatoken"
    proof = prove(tokenizer, probes=["fine", "a probe"])
    assert proof.recipe.engine == "tokenizers"
    assert "ids differ, first on the text 'a probe'" in proof.note


def test_texts_to_prove_on_are_taken_a_few_at_a_time(
    tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = load_tokenizer(str(tokenizer_path))
    monkeypatch.setattr(tokenise, "_PROBE_CHARACTERS", 1000)
    alive: set[int] = set()
    most = 0

    class Text(str):
        def __del__(self) -> None:
            alive.discard(id(self))

    def texts():  # type: ignore[no-untyped-def]
        nonlocal most
        for number in range(200):
            text = Text(f"the cat {number} " * 20)
            alive.add(id(text))
            most = max(most, len(alive))
            yield text

    loads: list[str] = []
    true = tokenise.gigatoken_encoder
    monkeypatch.setattr(
        tokenise, "gigatoken_encoder", lambda content: (loads.append(content), true(content))[1]
    )
    assert prove(tokenizer, probes=texts()).recipe.engine == "gigatoken"
    assert most < 20 and len(loads) == 1


def test_probes_of_many_sources_share_what_is_read(write_jsonl: Any) -> None:
    paths = [write_jsonl(f"{n}.jsonl", [f"{n} " + "x" * 300] * 9000) for n in range(3)]
    one = list(estimate.probes([Source("a", (paths[0],))]))
    assert sum(map(len, one)) == 64 << 10, "no more of one source than ever"
    many = [Source(f"{n}", (paths[n % 3],)) for n in range(5000)]
    taken = estimate.probes(many)
    first = [sum(map(len, (next(taken) for _ in range(4)))) for _ in range(50)]
    assert first == [1 << 10] * 50


def test_ids_do_not_change_where_the_engine_begins_anew(
    tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = prove(load_tokenizer(str(tokenizer_path))).recipe
    batches = [[f"the cat {n} {m} sat" for m in range(20)] for n in range(30)]
    plain = Encoder(recipe)
    expected = [plain.encode(batch)[0] for batch in batches]
    loads: list[str] = []
    true = tokenise.gigatoken_encoder
    monkeypatch.setattr(
        tokenise, "gigatoken_encoder", lambda content: (loads.append(content), true(content))[1]
    )
    monkeypatch.setattr(tokenise, "_LEAST_CHARACTERS", 1000)
    monkeypatch.setattr(tokenise, "_MOST_GROWTH", -(1 << 40))
    encoder = Encoder(recipe)
    for batch, ids in zip(batches, expected, strict=True):
        np.testing.assert_array_equal(encoder.encode(batch)[0], ids)
    assert len(loads) > 5


RANDOM_WORDS = """
import random, string, sys
sys.path.insert(0, sys.argv[1])
from llama_lib.data import tokenise
encoder = tokenise.Encoder(tokenise.Recipe(sys.stdin.read(), 4096, (), (2,), "gigatoken"))
before, peak, draw = tokenise._resident(), 0, random.Random(0)
for _ in range(100):
    words = ("".join(draw.choices(string.ascii_lowercase, k=8)) for _ in range(110_000))
    encoder.encode([" ".join(words)])
    peak = max(peak, tokenise._resident() - before)
print(peak)
"""


@pytest.mark.full
def test_memory_does_not_grow_with_the_distinct_words(cache_dir: Path) -> None:
    """100 MB of words that never come again; without an end to it they took 1.2 GB."""
    content = load_tokenizer("sample", cache_dir).backend_tokenizer.to_str()
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", RANDOM_WORDS, root],
        input=content,
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout) < 600 << 20


def test_tokenizer_gigatoken_does_not_know_falls_back() -> None:
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "cat": 2}, unk_token="<unk>"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", eos_token="</s>"
    )
    proof = prove(tokenizer)
    assert proof.recipe.engine == "tokenizers" and proof.note
    assert Encoder(proof.recipe).encode(["CAT dog", "cat"])[0].tolist() == [2, 0, 1, 2, 1]


def test_a_worker_imports_little(cache_dir: Path) -> None:
    content = load_tokenizer("sample", cache_dir).backend_tokenizer.to_str()
    code = (
        "import sys; from llama_lib.data.tokenised import TokenisePart\n"
        "from llama_lib.data.tokenise import Recipe\n"
        "TokenisePart(Recipe(sys.stdin.read(), 4096, (), (2,), 'gigatoken'), '.', False)()\n"
        "heavy = ('torch', 'transformers', 'datasets', 'pyarrow', 'awkward', 'tokenizers')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], input=content, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_documents_begin_as_prompts_will() -> None:
    """BOS where the tokenizer itself puts it in front of a text, and only there."""
    texts = ["the cat sat on the mat, and so did the other cats"] * 9
    plain = train_tokenizer(texts, 300)
    llama3 = train_style(lambda: texts, 300, "llama3")
    for tokenizer in (plain, llama3):
        ids, _ = Encoder(prove(tokenizer).recipe).encode(["cat"])
        assert ids.tolist() == [*tokenizer("cat")["input_ids"], tokenizer.eos_token_id]
    assert adds_bos(llama3) and not adds_bos(plain)
    ids, _ = Encoder(prove(llama3, add_bos=False).recipe).encode(["cat"])
    assert llama3.bos_token_id not in ids
