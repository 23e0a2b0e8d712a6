"""The report's numbers against transformers and against counting by hand."""

import json
from collections import Counter
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from llama_lib.data.tokenizer_command import main
from llama_lib.data.tokenizer_report import Counting, report, report_table
from llama_lib.data.train_tokenizer import train_style
from tests.data.conftest import WriteJsonl

TEXTS = {
    "english": ["the cat sat on the mat", " two  blanks\n\n\tand lines", "x <unk> y"],
    "other": ["\u4f60\u597d \U0001f600 cat", "<0xE4> spelt out", "a \u2581 mark"],
}


def llama2_tokenizer() -> PreTrainedTokenizerFast:
    texts = ["the cat sat on the mat and two blanks"] * 50
    return train_style(lambda: texts, 300, "llama2")


def llama2_as_converted() -> PreTrainedTokenizerFast:
    """The same vocabulary with the usual treatment of blanks, which loses U+2581."""
    backend = Tokenizer.from_str(llama2_tokenizer().backend_tokenizer.to_str())
    backend.normalizer = normalizers.Replace(" ", "\u2581")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", clean_up_tokenization_spaces=False
    )


def test_measures_are_those_of_transformers() -> None:
    tokenizer = llama2_tokenizer()
    sources = {name: (Counter(documents=3), texts) for name, texts in TEXTS.items()}
    content = report(sources, {"ours": tokenizer}, 1 << 20)
    tokens = words = unknown = num_bytes = 0
    for name, texts in TEXTS.items():
        rows = [tokenizer.tokenize(text) for text in texts]
        # A text that spells <unk> holds the token, but nothing in it is unknown.
        fallen_back = sum(token.startswith("<0x") for row in rows for token in row)
        measured = content["sources"][name]["measured"]
        measures = content["sources"][name]["tokenizers"]["ours"]
        size = sum(len(text.encode()) for text in texts)
        assert measured == {
            "documents": 3,
            "bytes": size,
            "words": sum(len(text.split()) for text in texts),
        }
        assert measures["tokens"] == sum(map(len, rows))
        assert measures["bytes_per_token"] == size / measures["tokens"]
        assert measures["tokens_per_word"] == measures["tokens"] / measured["words"]
        assert measures["unknown_rate"] == fallen_back / measures["tokens"]
        assert measures["changed_documents"] == 0
        tokens += measures["tokens"]
        words += measured["words"]
        num_bytes += size
        unknown += fallen_back
    assert unknown > 10
    assert content["total"]["documents"] == 6
    total = content["total"]["tokenizers"]["ours"]
    assert total["tokens"] == tokens and total["unknown_rate"] == unknown / tokens
    assert total["bytes_per_token"] == num_bytes / tokens
    assert total["tokens_per_word"] == tokens / words


def test_unknown_words_and_changed_texts_are_counted() -> None:
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "cat": 1, "sat": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens([AddedToken("<unk>", special=True)])
    words = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    assert Counting(words).of(["cat sat", "dog <unk> cat"]) == Counter(
        tokens=5, unknown=1, changed=1
    )
    # The usual conversion of Llama 2's tokenizer loses U+2581; ours does not.
    assert Counting(llama2_as_converted()).of(TEXTS["other"])["changed"] == 1
    assert Counting(llama2_tokenizer()).of(TEXTS["other"])["changed"] == 0


def test_only_so_many_bytes_are_measured_and_it_is_said() -> None:
    texts = [f"{n:03}" * 100 for n in range(50)]  # 300 bytes each
    held = Counter(documents=50, bytes=15000)
    content = report({"a": (held, iter(texts))}, {"ours": llama2_tokenizer()}, 1000)
    assert content["sources"]["a"]["measured"]["documents"] == 4
    assert content["sources"]["a"]["documents"] == 50
    assert report_table(content)[-1].startswith("measured on the first ")
    whole = report({"a": (held, iter(texts))}, {"ours": llama2_tokenizer()}, 15000)
    assert whole["sources"]["a"]["measured"]["bytes"] == 15000
    assert not report_table(whole)[-1].startswith("measured")


def test_command_reports_side_by_side(
    tmp_path: Path, write_jsonl: WriteJsonl, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [str(write_jsonl(f"{name}.jsonl", texts)) for name, texts in TEXTS.items()]
    llama2_as_converted().save_pretrained(tmp_path / "usual")
    output = tmp_path / "mine"
    arguments = ["--input", *files, "--vocab_size", "320", "--style", "llama2"]
    compare = ["--compare", str(tmp_path / "usual"), "--character_coverage", "0.9"]
    assert main([*arguments, *compare, "--output", str(output)]) == 0
    content = json.loads((output / "report.json").read_text())
    lines = capsys.readouterr().out.splitlines()
    above, head, *rows = lines[:5]
    sizes = [len(AutoTokenizer.from_pretrained(path)) for path in (output, tmp_path / "usual")]
    assert above.split() == ["mine", f"({sizes[0]}", "ids)", "usual", f"({sizes[1]}", "ids)"]
    assert head.count("bytes/token") == head.count("tokens/word") == head.count("unknown %") == 2
    assert [row.split()[0] for row in rows] == ["english", "other", "all"]
    for row, entry in zip(rows, [*content["sources"].values(), content["total"]], strict=True):
        cells = row.replace(",", "").split()[1:]
        mine, usual = entry["tokenizers"]["mine"], entry["tokenizers"]["usual"]
        expected = [entry["documents"], entry["bytes"]]
        for measures in (mine, usual):
            expected += [measures["bytes_per_token"], measures["tokens_per_word"]]
            expected += [100 * measures["unknown_rate"], measures["changed_documents"]]
        assert [float(cell) for cell in cells] == pytest.approx(expected, abs=6e-4)
    # Numbers stand under their heads, the second name over its columns.
    assert {len(line) for line in (head, *rows)} == {len(head)}
    assert above.index("usual") == head.index("bytes/token", head.index("changed"))
    # A folder with a report in it is a tokenizer like any other.
    assert AutoTokenizer.from_pretrained(output)("the cat").input_ids[0] == 1
