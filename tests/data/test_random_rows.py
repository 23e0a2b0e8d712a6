"""Rows for measuring: the same for every rank and run, through the loader of all other rows."""

import numpy as np
import pytest

from llama_lib.config import parse_options
from llama_lib.data.loader import IGNORED, BatchLoader
from llama_lib.data.random_rows import RandomRows, random_data
from llama_lib.run_data import data_option_problems, ignored_data_settings, is_random, open_data


def test_a_sample_is_the_same_row_for_everybody():
    first, second = (RandomRows(100, 16, 7, document_mask=False) for _ in range(2))
    (row,), _ = first.rows([5], [5])
    (again, other), _ = second.rows([5, 6], [5, 6])
    assert np.array_equal(row.ids, again.ids) and not np.array_equal(row.ids, other.ids)
    (reseeded,), _ = RandomRows(100, 16, 8, document_mask=False).rows([5], [5])
    assert not np.array_equal(row.ids, reseeded.ids)
    assert row.ids.dtype == np.int64 and row.labels is row.ids


def test_all_ids_of_the_vocabulary_appear_and_no_others():
    rows, _ = RandomRows(50, 1000, 0, document_mask=False).rows([0, 1], [0, 1])
    assert set(np.concatenate([row.ids for row in rows]).tolist()) == set(range(50))


def test_a_document_mask_sees_one_document():
    (row,), num_labels = RandomRows(100, 16, 0, document_mask=True).rows([0, 1, 2], [1])
    assert row.documents is not None and set(row.documents.tolist()) == {0}
    assert row.labels[0] == IGNORED and np.array_equal(row.labels[1:], row.ids[1:])
    assert num_labels == 3 * 15


def test_ranks_share_a_batch_without_overlap():
    data = random_data(100, 8, 1, document_mask=False)
    whole = BatchLoader(data.open_rows({}), 4).batch(3)
    parts = [BatchLoader(data.open_rows({}), 4, rank, 2).batch(3) for rank in range(2)]
    ids = np.concatenate([part.micro_batches[0].ids for part in parts])
    assert np.array_equal(ids, whole.micro_batches[0].ids)
    assert whole.num_labels == parts[0].num_labels == 4 * 7
    assert whole.tokens == {"random": 32}


def test_other_rows_have_another_identity():
    found = {
        random_data(*facts, document_mask=False).identity
        for facts in [(100, 8, 1), (101, 8, 1), (100, 9, 1), (100, 8, 2)]
    }
    assert len(found) == 4
    assert random_data(100, 8, 1, False).identity == random_data(100, 8, 1, False).identity


class Config:
    vocab_size = 100


def test_random_is_a_word_of_the_benchmark_alone():
    options = parse_options("benchmark", ["-l", "8"])
    assert is_random(options) and data_option_problems(options) == []
    data, tokenizer = open_data(options, Config(), None)
    rows = data.open_rows({})
    assert tokenizer is None and rows.max_length == 8
    ids = [row.ids.max() for row in rows.rows(range(200), range(200))[0]]
    assert max(ids) == Config.vocab_size - 1
    assert not is_random(parse_options("pretrain", ["-d", "random"]))
    assert not is_random(parse_options("benchmark", ["-d", "./random"]))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["-d", "random", "a.jsonl"], "-d ./random"),
        (["-d", "random:0.5", "a.jsonl:0.5"], "cannot be mixed"),
        (["--streaming"], "--streaming reads text"),
        (["--eval_data", "a.jsonl"], "--eval_data needs a tokenizer"),
    ],
)
def test_what_does_not_go_with_random_rows(argv, message):
    (problem,) = data_option_problems(parse_options("benchmark", argv))
    assert message in problem


def test_settings_without_effect_are_said():
    argv = ["--packing", "best_fit", "--eval_interval", "5", "--tokenizer", "sample"]
    lines = ignored_data_settings(parse_options("benchmark", argv), None)
    assert len(lines) == 3 and all("the rows are random ids" in line for line in lines)
