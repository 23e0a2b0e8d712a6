"""Rows for new tokens: the mean of the known ones, which stay as they are."""

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from llama_lib.checkpoint.resize import NewRows, grown_table, mean_row, new_rows
from llama_lib.data.tokenizer import train_tokenizer


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(["one text, and another one"] * 3, 300)


def grown(stored: torch.Tensor, num_rows: int, rows: NewRows) -> torch.Tensor:
    return grown_table(stored, num_rows, rows.new, mean_row(stored, rows.old))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_new_rows_are_the_mean_and_old_rows_keep_every_bit(dtype):
    torch.manual_seed(1)
    stored = (torch.randn(3000, 8) + 3).to(dtype)
    before = stored.clone()
    table = grown(stored, 3010, NewRows(range(2990), range(2998, 3004)))
    expected = stored[:2990].double().mean(0).to(dtype)
    assert table.shape == (3010, 8) and table.dtype == dtype
    assert torch.equal(table[:2998], stored[:2998])
    # Rows 3004 to 3009 belong to no token, but something must be in them.
    assert torch.equal(table[2998:], expected.expand(12, 8))
    assert torch.equal(stored, before), "the file's own tensor was written to"


def test_the_mean_is_not_summed_in_the_precision_of_the_table():
    """In bf16 a sum stays at 256 once the terms are ones."""
    ones = torch.ones(5000, 2, dtype=torch.bfloat16)
    table = grown(ones, 5001, NewRows(range(5000), [5000]))
    assert table[-1].tolist() == [1.0, 1.0]


def test_known_ids_without_a_stored_row_are_left_out_of_the_mean():
    stored = torch.tensor([[1.0], [3.0], [50.0]])
    assert grown(stored, 5, NewRows([0, 1, 3], [4])).flatten().tolist() == [1, 3, 50, 2, 2]


def test_a_tokenizer_that_fits_needs_nothing(tokenizer):
    assert new_rows(tokenizer, len(tokenizer)) is None
    assert new_rows(tokenizer, len(tokenizer) + 64) is None


def test_added_tokens_beyond_the_table_and_in_its_spare_rows(tokenizer):
    known = len(tokenizer)
    added = ["<|im_start|>", "<|im_end|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": added})
    for table_rows in (known, known + 1, known + 64):
        rows = new_rows(tokenizer, table_rows, added)
        assert rows == NewRows(list(range(known)), [known, known + 1])
        assert rows.vocab_size == len(tokenizer)


def test_a_tokenizer_larger_than_the_table_is_found_without_a_list(tokenizer):
    tokenizer.add_tokens(["<|user|>"])
    rows = new_rows(tokenizer, len(tokenizer) - 1)
    assert rows is not None and rows.new == [len(tokenizer) - 1]
