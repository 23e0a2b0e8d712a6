"""What `inspect` says about rows, against the rows themselves."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llama_lib.data.arrange import arrange
from llama_lib.data.inspect import main
from llama_lib.data.loader import PreparedRows
from llama_lib.data.packing_report import packing_report
from llama_lib.data.prepare import PrepareRequest, prepare
from llama_lib.data.prepared import PreparedDataset
from llama_lib.errors import UserError
from tests.data.test_loader import PAD, write_dataset

WORDS = ["cat", "mat", "number", "other", "so", "the", "sat", "on"]


def brute_force(ids: np.ndarray, lengths: np.ndarray) -> dict[str, int]:
    """The numbers of a report from the ids of all rows, each of which occurs once in the data."""
    ends = np.cumsum(lengths)
    rows = [np.searchsorted(ends, row[row != PAD], side="right") for row in ids]
    pairs = across = 0
    whole = 0
    for documents in rows:
        size = len(documents)
        pairs += int(np.tri(size).sum())
        across += int((np.tri(size) * (documents[:, None] != documents[None, :])).sum())
        numbers, counts = np.unique(documents, return_counts=True)
        whole += int((counts == lengths[numbers]).sum())
    seen = np.unique(np.concatenate(rows))
    is_whole = {
        int(number)
        for documents in rows
        for number in documents
        if (documents == number).sum() == lengths[number]
    }
    split = [number for number in seen.tolist() if number not in is_whole]
    assert whole == len(is_whole), "no document is whole twice"
    return {
        "rows": len(rows),
        "tokens": int((ids != PAD).sum()),
        "padding": int((ids == PAD).sum()),
        "left_over": int(lengths.sum() - (ids != PAD).sum()),
        "split": len(split),
        "split_tokens": int(lengths[split].sum()),
        "fitting": int((lengths[split] <= ids.shape[1]).sum()),
        "pairs": pairs,
        "pairs_across": across,
    }


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
@pytest.mark.parametrize("max_length", [8, 50, 333])
def test_report_counts_what_the_rows_hold(packing: str, max_length: int, tmp_path: Path) -> None:
    lengths = np.random.RandomState(max_length).randint(1, 90, 150)
    dataset = write_dataset(tmp_path, {"a": lengths[:100], "b": lengths[100:]})
    order = arrange(dataset, max_length, 3, packing, tmp_path)
    rows = PreparedRows(dataset, order, PAD, False).rows([], range(order.num_rows(1)))[0]
    report = packing_report(order, dataset.document_lengths)
    expected = brute_force(np.stack([row.ids for row in rows]), lengths)
    assert {name: getattr(report, name) for name in expected} == expected
    assert report.fill == expected["tokens"] / (expected["rows"] * max_length)
    assert report.share_across == expected["pairs_across"] / expected["pairs"]
    # a document mask leaves out what is not on the blocks of the diagonal
    masked = PreparedRows(dataset, order, PAD, True).rows([], range(order.num_rows(1)))[0]
    own = 0
    for row in masked:
        assert row.documents is not None
        text = row.documents[row.ids != PAD]
        own += int((np.tri(len(text)) * (text[:, None] == text[None, :])).sum())
    assert own == expected["pairs"] - expected["pairs_across"]


def test_report_in_parts_is_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = np.random.RandomState(0).randint(1, 90, 150)
    order = arrange(write_dataset(tmp_path, {"a": lengths}), 50, 3, "concat", tmp_path)
    whole = packing_report(order, lengths)
    monkeypatch.setattr("llama_lib.data.packing_report._ROWS_AT_ONCE", 7)
    assert packing_report(order, lengths) == whole


def test_less_data_than_a_row_is_all_left_over(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path, {"a": np.array([3, 4])})
    concat, best_fit = (
        packing_report(arrange(dataset, 10, 0, packing, tmp_path), dataset.document_lengths)
        for packing in ("concat", "best_fit")
    )
    assert (concat.rows, concat.left_over, concat.fill, concat.share_across) == (0, 7, 0, 0)
    assert (best_fit.rows, best_fit.padding, best_fit.left_over) == (1, 3, 0)


# -- the command -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, tokenizer_path: Path) -> PreparedDataset:
    folder = tmp_path_factory.mktemp("inspect")
    source = np.random.RandomState(1)
    texts = [" ".join(source.choice(WORDS, source.randint(1, 60))) for _ in range(80)]
    (folder / "one.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in texts[:50])
    )
    (folder / "two.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in texts[50:])
    )
    request = PrepareRequest(
        datasets=[str(folder / "one.jsonl"), str(folder / "two.jsonl")],
        tokenizer=str(tokenizer_path),
        output=str(folder / "out"),
        eval_ratio=0.0,
        workers=1,
        cache_dir=str(folder / "cache"),
    )
    return prepare(request)


def shown(prepared: PreparedDataset, capsys: Any, *words: str) -> str:
    cache = ["--cache_dir", str(prepared.path.parent / "cache")]
    assert main([str(prepared.path), *words, *cache]) == 0
    return capsys.readouterr().out


def test_packings_are_shown_side_by_side(prepared: PreparedDataset, capsys: Any) -> None:
    text = shown(prepared, capsys, "--packing", "-l", "64", "--seed", "5")
    lines = {line.split()[0]: line for line in text.splitlines() if line.strip()}
    cache = prepared.path.parent / "cache"
    for packing in ("concat", "best_fit"):
        report = packing_report(arrange(prepared, 64, 5, packing, cache), prepared.document_lengths)
        fields = lines[packing].split()
        assert fields[1] == f"{report.rows:,}" and fields[2] == f"{report.fill:.2%}"
        assert fields[3:5] == [f"{report.split:,}", f"({report.split / 80:.2%})"]
        expected = [report.fitting, report.padding, report.left_over]
        assert fields[6:9] == [f"{number:,}" for number in expected]
        assert fields[9] == f"{report.share_across:.2%}"
    assert lines["concat"].split()[7] == "0", "concat pads nothing"
    assert lines["best_fit"].split()[6] == "0", "best_fit splits none that fits"
    assert lines["best_fit"].split()[8] == "0", "best_fit leaves nothing over"


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_row_is_decoded_with_its_documents(
    prepared: PreparedDataset, capsys: Any, packing: str
) -> None:
    text = shown(prepared, capsys, "--row", "3", "-l", "64", "--packing_of", packing)
    order = arrange(prepared, 64, 42, packing, prepared.path.parent / "cache")
    pieces = order.row_documents(3)
    texts = [
        json.loads(line)["text"]
        for name in ("one", "two")
        for line in (prepared.path.parent / f"{name}.jsonl").read_text().splitlines()
    ]
    parts = text.split("\n\n")
    filled = sum(piece.length for piece in pieces)
    expected = f"row 3 (epoch 0): {filled} tokens in {len(pieces)} piece(s), {64 - filled} padding"
    assert parts[0] == expected
    for part, (document, start, length) in zip(parts[1:], pieces, strict=True):
        head, _, body = part.strip("\n").partition("\n")
        file, number = ("one", document) if document < 50 else ("two", document - 50)
        total = prepared.document_lengths[document]
        assert head == (
            f"document {document} (number {number} of {file}, in {file}.jsonl), tokens {start} to "
            f"{start + length - 1} of {total}:"
        )
        decoded = body.replace("<s>", "").replace("</s>", "").strip()
        assert decoded and decoded in texts[document]
        if length == total:
            assert decoded == texts[document]


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--packing"], "give -l N"),
        (["--row", "1"], "give -l N"),
        (["--packing", "-l", "0"], "give -l N"),
        (["--row", "-1", "-l", "8"], "--row -1"),
        (["--packing", "-l", "8", "--seed", "-1"], "--seed -1"),
        (["--document", "80"], "documents 0 to 79"),
    ],
)
def test_wrong_questions_are_refused(
    prepared: PreparedDataset, words: list[str], problem: str
) -> None:
    with pytest.raises(UserError, match=problem):
        main([str(prepared.path), *words])


def test_folder_that_is_no_dataset_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no prepared dataset"):
        main([str(tmp_path)])
