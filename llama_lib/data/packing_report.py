"""What a way of packing costs: padding, split documents, attention across documents.

Invariant: the numbers are those of the rows a run gets, counted over one epoch.
"""

from dataclasses import dataclass

import numpy as np

from llama_lib.data.order import Integers, Order

_ROWS_AT_ONCE = 1 << 14


@dataclass(frozen=True)
class PackingReport:
    """Counts over the rows of one epoch.

    Attributes:
        tokens: training tokens in the rows; `padding` tokens fill the rest of them.
        left_over: tokens behind the last whole row; the next epoch begins with them.
        split: documents that are not whole in one row.
        split_tokens: tokens of these documents.
        fitting: those of them that are no longer than a row, so that another packing keeps them.
        pairs: (token, earlier token or itself) in the same row: the work of causal attention.
        pairs_across: those whose tokens are of two documents; a document mask leaves them out.
    """

    rows: int
    tokens: int
    padding: int
    left_over: int
    split: int
    split_tokens: int
    fitting: int
    pairs: int
    pairs_across: int

    @property
    def fill(self) -> float:
        return self.tokens / max(1, self.tokens + self.padding)

    @property
    def share_across(self) -> float:
        return self.pairs_across / max(1, self.pairs)


def packing_report(order: Order, document_lengths: Integers) -> PackingReport:
    """Count through the rows of the first epoch; documents are never read."""
    rows = order.num_rows(1)
    is_split = np.zeros(len(document_lengths), bool)
    tokens = pairs = own_pairs = 0
    for first in range(0, rows, _ROWS_AT_ONCE):
        pieces = order.pieces(np.arange(first, min(first + _ROWS_AT_ONCE, rows)))
        is_split[pieces.document[pieces.length < document_lengths[pieces.document]]] = True
        filled = np.bincount(pieces.row, weights=pieces.length).astype(np.int64)
        tokens += int(filled.sum())
        pairs += int((filled * (filled + 1) // 2).sum())
        own_pairs += int((pieces.length * (pieces.length + 1) // 2).sum())
    return PackingReport(
        rows=rows,
        tokens=tokens,
        padding=rows * order.max_length - tokens,
        left_over=int(document_lengths.sum(dtype=np.int64)) - tokens,
        split=int(is_split.sum()),
        split_tokens=int(document_lengths[is_split].sum(dtype=np.int64)),
        fitting=int((document_lengths[is_split] <= order.max_length).sum()),
        pairs=pairs,
        pairs_across=pairs - own_pairs,
    )


_COLUMNS = "{:<10} {:>12} {:>8} {:>22} {:>10} {:>10} {:>15} {:>12} {:>18}"


def packing_table(reports: dict[str, PackingReport], num_documents: int) -> list[str]:
    """The reports side by side."""
    lines = [
        _COLUMNS.format(
            "packing",
            "rows",
            "fill",
            "documents split",
            "of tokens",
            "would fit",
            "padding tokens",
            "left over",
            "across documents",
        )
    ]
    for name, report in reports.items():
        total = max(1, report.tokens + report.left_over)
        lines.append(
            _COLUMNS.format(
                name,
                f"{report.rows:,}",
                f"{report.fill:.2%}",
                f"{report.split:,} ({report.split / num_documents:.2%})",
                f"{report.split_tokens / total:.2%}",
                f"{report.fitting:,}",
                f"{report.padding:,}",
                f"{report.left_over:,}",
                f"{report.share_across:.2%}",
            )
        )
    return lines
