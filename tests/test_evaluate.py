"""Held-out losses: which tokens count, and what each of them may see."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from llama_lib.data.prepare import PrepareRequest, prepare
from llama_lib.data.prepared import PreparedDataset
from llama_lib.data.sample import sample_records
from llama_lib.data.tokenizer import save_tokenizer, train_tokenizer
from llama_lib.document_attention import DenseMask, document_positions, use_document_attention
from llama_lib.evaluate import TOTAL, HeldOut, measure, row_documents

LENGTH = 24
VOCABULARY = 300
TOLERANCE = 1e-4
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> PreparedDataset:
    """Two sources of short documents, some longer than a row, none ending where a row does."""
    folder = tmp_path_factory.mktemp("held-out")
    texts = [str(record["text"]) for record in sample_records("documentation")][:8]
    save_tokenizer(train_tokenizer(texts, VOCABULARY), folder / "tokenizer")
    for number, source in enumerate(("one", "two")):
        pieces = [text[:size] for text in texts for size in (9 + number, 30, 90)]
        lines = [json.dumps({"text": f"{number} {piece}"}) + "\n" for piece in pieces]
        (folder / f"{source}.jsonl").write_text("".join(lines))
    return prepare(
        PrepareRequest(
            datasets=[str(folder / "one.jsonl"), str(folder / "two.jsonl")],
            tokenizer=str(folder / "tokenizer"),
            output=folder / "prepared",
            cache_dir=folder / "cache",
            eval_ratio=0.0,
            workers=1,
        )
    )


def model(masked: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY + 8,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    llama = LlamaForCausalLM(config)
    for weight in llama.parameters():
        weight.data.mul_(4)  # attention is near uniform at initialisation and would hide little
    if masked:
        use_document_attention(llama)
    return llama


def engine(llama: LlamaForCausalLM, rank: int) -> SimpleNamespace:
    """`score` of one of two replicas, the other's part left out."""

    def score(batches):
        total, correct, labels = 0.0, 0, 0
        for batch in batches:
            inputs = {"input_ids": batch.input_ids}
            if batch.documents is not None:
                inputs["attention_mask"] = DenseMask.of(batch.documents, CPU)
                inputs["position_ids"] = document_positions(batch.documents)
            with torch.no_grad():
                logits = llama(**inputs).logits[:, :-1].flatten(0, 1)
            targets = batch.labels[:, 1:].flatten()
            total += cross_entropy(logits, targets, reduction="sum").item()
            correct += int((logits.argmax(-1) == targets).sum())
            labels += int((targets != -100).sum())
        return SimpleNamespace(loss_sum=total, correct=correct, labels=labels)

    return SimpleNamespace(dp_rank=rank, score=score)


def expected_losses(dataset: PreparedDataset, masked: bool) -> dict[str, float]:
    """Every piece of a document by itself (or every row), in plain transformers."""
    llama = model(masked=False)
    found, number = {}, 0
    sums = np.zeros(2)
    for source in dataset.sources:
        total, labels, row, filled = 0.0, 0, [], 0
        pieces = []
        for _ in range(len(dataset.readers[source])):
            ids = dataset.tokens(number).astype(np.int64)
            number += 1
            while len(ids):
                part = ids[: LENGTH - filled]
                row.append(part)
                ids, filled = ids[len(part) :], filled + len(part)
                if filled == LENGTH:
                    pieces += row if masked else [np.concatenate(row)]
                    row, filled = [], 0
        if row:
            pieces += row if masked else [np.concatenate(row)]
        for piece in pieces:
            if len(piece) < 2:
                continue
            ids = torch.from_numpy(piece)[None]
            with torch.no_grad():
                logits = llama(input_ids=ids).logits[0, :-1]
            total += cross_entropy(logits, ids[0, 1:], reduction="sum").item()
            labels += len(piece) - 1
        found[source] = total / labels
        sums += total, labels
    return {**found, TOTAL: sums[0] / sums[1]}


@pytest.mark.parametrize("masked", [True, False])
def test_the_mean_over_tokens_that_documents_have_alone(dataset, masked):
    """Over all of them: one row after every global batch was once left out."""
    held_out = HeldOut(dataset, LENGTH, document_mask=masked)
    plan = SimpleNamespace(global_batch=6, dp=2, batch_size=3)
    parts = [measure(engine(model(masked), rank), held_out, plan, 10**6) for rank in range(2)]
    losses = {source: sum(part[source].loss for part in parts) for source in parts[0]}
    assert losses == pytest.approx(expected_losses(dataset, masked), rel=TOLERANCE)


def test_accuracy_is_the_share_of_likeliest_tokens_that_are_right(dataset):
    plan = SimpleNamespace(global_batch=4, dp=1, batch_size=4)
    found = measure(engine(model(False), 0), HeldOut(dataset, LENGTH), plan, 10**6)
    right, labels = 0, 0
    for source in dataset.sources:
        for row in dataset.only(source).rows(LENGTH):
            ids = torch.from_numpy(row.astype(np.int64))[None]
            with torch.no_grad():
                guesses = model(False)(input_ids=ids).logits[0, :-1].argmax(-1)
            right, labels = right + int((guesses == ids[0, 1:]).sum()), labels + len(row) - 1
    assert 0 < right < labels
    assert found[TOTAL].accuracy == pytest.approx(right / labels)


def test_the_mask_changes_the_loss(dataset):
    """Or the test above could not tell one from the other."""
    with_mask, without = (expected_losses(dataset, masked) for masked in (True, False))
    assert abs(with_mask[TOTAL] / without[TOTAL] - 1) > 10 * TOLERANCE


def test_rows_hold_every_token_once(dataset):
    for source in dataset.sources:
        plain = list(HeldOut(dataset, LENGTH).rows(source))
        masked = list(HeldOut(dataset, LENGTH, document_mask=True).rows(source))
        tokens = dataset.readers[source].ids
        for rows in (plain, masked):
            assert len(rows) == -(-len(tokens) // LENGTH)
            assert np.array_equal(np.concatenate([row.ids for row in rows])[: len(tokens)], tokens)
        assert all(row.documents is None for row in plain)
        for row, other in zip(masked, plain, strict=True):
            begins = np.flatnonzero(np.diff(row.documents)) + 1
            expected = other.labels.copy()
            expected[begins] = -100
            assert np.array_equal(row.labels, expected)


def test_documents_are_numbered_within_a_row():
    ends = np.array([3, 4, 4, 12])  # one of one token, an empty one, a long one
    assert row_documents(ends, 0, 6, 0).tolist() == [0, 0, 0, 1, 2, 2]
    assert row_documents(ends, 6, 12, 0).tolist() == [0] * 6
    assert row_documents(ends, 2, 5, 3).tolist() == [0, 1, 2, 3, 3, 3]
    assert row_documents(ends, 2, 5, 3).dtype == np.int32
