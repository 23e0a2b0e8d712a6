"""Rows of the embedding and the head for tokens that the weights do not know yet.

Invariant: a new row is the mean of the rows of the known tokens, so a new token begins as the
average one; rows of known tokens keep every bit.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Rows summed at once: the fp32 copy of a block stays far below the table itself.
_ROWS = 1024


@dataclass(frozen=True)
class NewRows:
    """`old`: ids of the tokens whose rows are averaged; `new`: ids that get the mean."""

    old: Sequence[int]
    new: Sequence[int]

    @property
    def vocab_size(self) -> int:
        """Rows that a table needs for all of these ids."""
        return max(*self.old, *self.new) + 1


def new_rows(tokenizer: Any, vocab_size: int, added: Collection[str] = ()) -> NewRows | None:
    """What a model of `vocab_size` rows lacks for a tokenizer; None if it has everything.

    Args:
        added: tokens just added to the tokenizer; their ids may lie in rows that the table has to
            spare, which nothing has trained.
    """
    ids = set(tokenizer.get_vocab().values())
    new = {index for index in ids if index >= vocab_size}
    new |= {tokenizer.convert_tokens_to_ids(token) for token in added}
    if not new:
        return None
    return NewRows(sorted(ids - new), sorted(new))


def mean_row(stored: Tensor, old: Sequence[int]) -> Tensor:
    """The mean [width] of those rows of a table [rows, width] that are stored.

    It is taken in at least fp32 and rounded to the table's precision.
    """
    known = torch.tensor([index for index in old if index < len(stored)], dtype=torch.long)
    total = torch.zeros(stored.shape[1], dtype=torch.float64)
    for ids in known.split(_ROWS):
        total += stored[ids].float().sum(0, dtype=torch.float64)
    return (total / len(known)).to(stored.dtype)


def grown_table(stored: Tensor, num_rows: int, new: Sequence[int], mean: Tensor) -> Tensor:
    """A copy of a table [rows, width] with `num_rows` rows, the `new` ones filled with the mean.

    Rows beyond the stored ones that belong to no token get the mean too.
    """
    table = stored.new_empty((num_rows, *stored.shape[1:]))
    table[: len(stored)] = stored
    table[len(stored) :] = table[list(new)] = mean
    return table
