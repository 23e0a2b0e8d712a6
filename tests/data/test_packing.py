"""Best-fit packing: as good as the textbook's, nothing lost, fast."""

import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from llama_lib.data import packing, shared
from llama_lib.data.arrange import PACKINGS
from llama_lib.data.order import Piece
from llama_lib.data.packing import PackedOrder, best_fit
from llama_lib.data.shared import SharedArrays


def plain_best_fit(lengths: list[int], max_length: int) -> list[list[int]]:
    """Best-fit decreasing as the textbook says it: the lengths in each row."""
    rows: list[list[int]] = []
    for length in sorted(lengths, reverse=True):
        fitting = [row for row in rows if sum(row) + length <= max_length]
        if fitting:
            max(fitting, key=sum).append(length)
        else:
            rows.append([length])
    return rows


def in_rows(placed: np.ndarray, lengths: np.ndarray) -> list[list[int]]:
    rows: list[list[int]] = [[] for _ in range(int(placed.max()) + 1)]
    for row, length in zip(placed.tolist(), lengths.tolist(), strict=True):
        rows[row].append(length)
    return rows


def test_small_example_by_hand() -> None:
    # 9 | 7 3 | 5 2 2: the 3 goes to the 7, which it fills; both 2 to the 5, for want of room.
    lengths = np.array([9, 7, 5, 3, 2, 2])
    assert best_fit(lengths, 10).tolist() == [0, 1, 2, 1, 2, 2]
    assert best_fit(lengths[::-1].copy(), 10).tolist() == [2, 2, 1, 2, 1, 0]


@pytest.mark.parametrize("longest", [5, 30, 120])
def test_rows_are_those_of_the_textbook(longest: int) -> None:
    source = np.random.RandomState(longest)
    for _ in range(150):
        max_length = int(source.randint(1, longest))
        lengths = source.randint(1, max_length + 1, int(source.randint(1, 90)))
        rows = in_rows(best_fit(lengths, max_length), lengths)
        expected = plain_best_fit(lengths.tolist(), max_length)
        # As many rows, each as full. Which of two equally full rows takes a document is open.
        assert sorted(map(sum, rows)) == sorted(map(sum, expected))
        assert sorted(length for row in rows for length in row) == sorted(lengths.tolist())


def packed(
    folder: Path, lengths: list[int] | np.ndarray, max_length: int, seed: int = 1
) -> PackedOrder:
    array = np.array(lengths, np.int32)
    name = f"{max_length}-{seed}-{hash(array.tobytes())}"
    return PackedOrder(array, max_length, seed, SharedArrays(folder, name))


def test_long_documents_are_split_not_dropped(tmp_path: Path) -> None:
    order = packed(tmp_path, [5, 3, 2, 9, 12, 7], 10)
    rows = [order.row_documents(sample) for sample in range(order.num_rows(1))]
    assert sorted(sorted(row) for row in rows) == [
        [(0, 0, 5), (2, 0, 2), (4, 10, 2)],
        [(1, 0, 3), (5, 0, 7)],
        [(3, 0, 9)],
        [(4, 0, 10)],
    ]
    # Labels: all but the first of a row, or of a piece.
    samples = np.arange(4)
    assert order.num_labels(samples, False) == 38 - 4
    assert order.num_labels(samples, True) == 38 - 7


def test_packing_of_this_release_never_changes(tmp_path: Path) -> None:
    # A resumed run relies on it.
    order = packed(tmp_path, [5, 3, 2, 9, 12, 7], 10, seed=42)
    assert [order.row_documents(sample) for sample in range(8)] == [
        [(3, 0, 9)],
        [(1, 0, 3), (5, 0, 7)],
        [(4, 10, 2), (0, 0, 5), (2, 0, 2)],
        [(4, 0, 10)],
        [(1, 0, 3), (5, 0, 7)],
        [(3, 0, 9)],
        [(4, 0, 10)],
        [(4, 10, 2), (0, 0, 5), (2, 0, 2)],
    ]


LENGTHS = np.random.RandomState(3).randint(0, 90, 300)


@pytest.mark.parametrize("max_length", [1, 7, 32, 64, 89, 1000, 20_000])
@pytest.mark.parametrize("window", [40, 1 << 20])
def test_every_token_is_in_one_row_of_an_epoch(
    max_length: int, window: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "WINDOW", window)
    order = packed(tmp_path, LENGTHS, max_length)
    for epoch in range(2):
        counts: Counter[tuple[int, int]] = Counter()
        for sample in range(order.num_rows(epoch), order.num_rows(epoch + 1)):
            assert order.epoch_of(sample) == epoch
            row = order.row_documents(sample)
            assert 0 < sum(piece.length for piece in row) <= max_length
            for document, start, length in row:
                counts.update((document, token) for token in range(start, start + length))
                # whole, or a part of a document that is longer than a row
                assert length == LENGTHS[document] or (
                    LENGTHS[document] > max_length and start % max_length == 0
                )
        expected = {(d, t) for d, length in enumerate(LENGTHS.tolist()) for t in range(length)}
        assert counts.keys() == expected and set(counts.values()) == {1}
    assert order.num_rows(1) >= -(-int(LENGTHS.sum()) // max_length)


def test_epochs_permute_the_rows_and_seeds_the_windows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "WINDOW", 40)

    def rows(order: PackedOrder, epoch: int) -> list[list[Piece]]:
        samples = range(order.num_rows(epoch), order.num_rows(epoch + 1))
        return [order.row_documents(sample) for sample in samples]

    order = packed(tmp_path, LENGTHS, 64)
    assert rows(order, 0) == rows(packed(tmp_path, LENGTHS, 64), 0)
    assert rows(order, 0) != rows(order, 1)
    assert sorted(rows(order, 0)) == sorted(rows(order, 1))
    assert sorted(rows(order, 0)) != sorted(rows(packed(tmp_path, LENGTHS, 64, seed=2), 0))


def test_short_documents_do_not_always_end_a_row(tmp_path: Path) -> None:
    order = packed(tmp_path, LENGTHS, 64)
    rows = [order.row_documents(sample) for sample in range(order.num_rows(1))]
    shortest_first = [row[0].length < row[-1].length for row in rows if len(row) > 1]
    assert 0.3 < np.mean(shortest_first) < 0.7


def test_packing_is_done_once_and_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = packed(tmp_path, LENGTHS, 64)
    monkeypatch.setattr(packing, "_write_packing", None)
    again = packed(tmp_path, LENGTHS, 64)
    assert again.row_documents(17) == first.row_documents(17)


def test_large_packings_are_those_of_small_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "WINDOW", 40)
    small = packed(tmp_path / "small", LENGTHS, 64)
    expected = [small.row_documents(sample) for sample in range(small.num_rows(3))]
    monkeypatch.setattr(shared, "LARGE", 3)
    large = packed(tmp_path / "large", LENGTHS, 64)
    assert [large.row_documents(sample) for sample in range(large.num_rows(3))] == expected
    kept = {path.name for path in (tmp_path / "large").rglob("*") if path.is_dir()}
    assert {"best_fit", "order-1-1", "order-1-2"} <= kept and "order-1-0" not in kept


def test_padded_rows_hold_one_document_each(tmp_path: Path) -> None:
    lengths = np.array([5, 3, 2, 9, 12, 7], np.int32)
    shared = SharedArrays(tmp_path, "padded")
    order = PACKINGS["padded"](lengths, 10, 1, shared)
    assert order.num_rows(1) == 7 and order.passes(14) == 2
    rows = [order.row_documents(sample) for sample in range(14)]
    pieces = [(0, 0, 5), (1, 0, 3), (2, 0, 2), (3, 0, 9), (4, 0, 10), (4, 10, 2), (5, 0, 7)]
    assert sorted(rows[:7]) == sorted(rows[7:]) == [[piece] for piece in pieces]
    assert rows[:7] != rows[7:]
    # Packed ones of the same documents are kept beside them.
    assert packed(tmp_path, lengths, 10).num_rows(1) == 4
    assert PackedOrder(lengths, 10, 1, shared).num_rows(1) == 4


def test_documents_without_tokens_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="0 tokens"):
        packed(tmp_path, [0, 0], 8)


def test_a_million_documents_take_seconds(tmp_path: Path) -> None:
    # Lengths like those of web text: a median of 500 tokens, a long tail.
    lengths = np.random.RandomState(0).lognormal(6.2, 1.2, 10**6).astype(np.int32) + 1
    start = time.process_time()
    order = packed(tmp_path, lengths, 4096)
    assert time.process_time() - start < 10
    fill = int(lengths.sum()) / (order.num_rows(1) * 4096)
    assert fill > 0.999
    start = time.process_time()
    order.row_documents(10**9)
    assert time.process_time() - start < 0.5
