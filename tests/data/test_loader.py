"""The order of rows: nothing lost, nothing twice, the same for every number of ranks."""

import itertools
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from llama_lib.data.indexed import IndexedReader, IndexedWriter
from llama_lib.data.loader import BatchLoader, rows_hash
from llama_lib.data.order import RowOrder
from llama_lib.data.prepared import PreparedDataset
from llama_lib.errors import UserError

LENGTHS = np.random.default_rng(0).integers(1, 60, 37)
TOTAL = int(LENGTHS.sum())


@pytest.fixture
def dataset(tmp_path: Path) -> PreparedDataset:
    """Two sources in which each id occurs once, so that a row tells where it comes from."""
    ids, readers = np.arange(TOTAL), {}
    for name, lengths, part in (
        ("a", LENGTHS[:20], ids[: LENGTHS[:20].sum()]),
        ("b", LENGTHS[20:], ids[LENGTHS[:20].sum() :]),
    ):
        with IndexedWriter(tmp_path / name, np.int32) as writer:
            writer.write(part, lengths)
        readers[name] = IndexedReader(tmp_path / name)
    return PreparedDataset(tmp_path, {}, readers)


def loader(dataset: PreparedDataset, max_length: int = 16, seed: int = 1, **more: int):  # type: ignore[no-untyped-def]
    order = RowOrder(dataset.document_lengths, max_length, seed)
    return BatchLoader(dataset, order, **{"global_batch": 8, **more})


@pytest.mark.parametrize("max_length", [1, 7, 16, 64, TOTAL - 1, TOTAL, TOTAL + 1, 3 * TOTAL + 5])
@pytest.mark.parametrize("num_epochs", [1, 2, 5])
def test_no_token_is_lost_or_doubled(
    dataset: PreparedDataset, max_length: int, num_epochs: int
) -> None:
    rows = loader(dataset, max_length)
    counts: Counter[int] = Counter()
    for sample in range(rows.order.num_rows(num_epochs)):
        row = rows.row(sample)
        assert row.shape == (max_length,) and row.dtype == np.int64
        counts.update(row.tolist())
    dropped = rows.order.dropped_tokens(num_epochs)
    assert counts.total() + dropped == num_epochs * TOTAL
    assert dropped < max_length
    # each id once per epoch, but for the few that the end of the run drops
    if max_length <= TOTAL:
        assert set(counts.values()) <= {num_epochs, num_epochs - 1}
    assert sum(num_epochs - counts[token] for token in range(TOTAL)) == dropped


def test_rows_follow_the_documents_and_carry_into_the_next_epoch(dataset: PreparedDataset) -> None:
    rows = loader(dataset, max_length=16)
    starts = np.concatenate([[0], np.cumsum(LENGTHS)])
    for sample in range(rows.order.num_rows(3)):
        pieces = rows.order.row_documents(sample)
        assert sum(piece.length for piece in pieces) == 16
        expected = [
            starts[document] + np.arange(start, start + length)
            for document, start, length in pieces
        ]
        np.testing.assert_array_equal(rows.row(sample), np.concatenate(expected))
    assert TOTAL % 16, "the test needs a partial row"
    carried = rows.order.num_rows(1)
    assert rows.order.epoch_of(carried) == 0 and rows.order.epoch_of(carried + 1) == 1
    # its head are the only tokens of epoch 0 no other row has
    seen = {token for sample in range(carried) for token in rows.row(sample).tolist()}
    head = rows.row(carried)[: TOTAL % 16].tolist()
    assert set(head) == set(range(TOTAL)) - seen


def test_order_is_a_function_of_seed_and_epoch(dataset: PreparedDataset) -> None:
    def epoch(seed: int, number: int) -> list[int]:
        rows = loader(dataset, seed=seed)
        first, last = rows.order.num_rows(number), rows.order.num_rows(number + 1)
        return [token for sample in range(first, last) for token in rows.row(sample).tolist()]

    assert epoch(1, 0) == epoch(1, 0)
    assert epoch(1, 0) != epoch(2, 0)
    assert epoch(1, 0) != epoch(1, 1)
    documents = {RowOrder(LENGTHS, 16, 1).row_documents(sample)[0].document for sample in range(8)}
    assert len(documents) > 3, "rows of one document do not stand side by side"


def test_order_of_this_release_never_changes() -> None:
    # A resumed run relies on it; numpy promises this stream for good.
    order = RowOrder(np.array([5, 3, 8, 2]), 4, 42)
    assert [order.row_documents(sample) for sample in range(6)] == [
        [(0, 4, 1), (1, 0, 3)],
        [(3, 0, 2), (2, 0, 2)],
        [(2, 2, 4)],
        [(0, 0, 4)],
        [(2, 6, 2), (3, 0, 2)],
        [(1, 0, 3), (0, 0, 1)],
    ]


def test_any_position_is_reached_at_once() -> None:
    lengths = np.full(100_000, 700, np.int32)
    order = RowOrder(lengths, 4096, 0)
    start = time.perf_counter()
    order.row_documents(10**9)
    assert time.perf_counter() - start < 0.5
    start = time.perf_counter()
    order.row_documents(10**9 + 1)
    assert time.perf_counter() - start < 0.01


@pytest.mark.parametrize(("dp_size", "accumulation"), [(1, 1), (2, 1), (1, 2), (2, 2), (4, 2)])
def test_global_batch_is_the_same_for_every_number_of_ranks(
    dataset: PreparedDataset, dp_size: int, accumulation: int
) -> None:
    for step in (0, 3, 11):
        ranks = [
            loader(dataset, dp_rank=rank, dp_size=dp_size, accumulation=accumulation)
            for rank in range(dp_size)
        ]
        samples = sorted(itertools.chain(*(part for rank in ranks for part in rank.samples(step))))
        assert samples == list(range(8 * step, 8 * step + 8))
        batches = [rank.batch(step) for rank in ranks]
        assert all(len(parts) == accumulation for parts in batches)
        shape = (8 // dp_size // accumulation, 16)
        assert all(part.shape == shape for parts in batches for part in parts)
        rows = sorted(row.tolist() for parts in batches for part in parts for row in part)
        assert rows == sorted(row.tolist() for row in loader(dataset).batch(step)[0])
        assert {rank.batch_hash(step) for rank in ranks} == {loader(dataset).batch_hash(step)}


def test_hashes_tell_steps_and_ranks_apart(dataset: PreparedDataset) -> None:
    one, other = (loader(dataset, dp_rank=rank, dp_size=2) for rank in range(2))
    assert rows_hash(one.batch(0)) == rows_hash(one.batch(0))
    assert rows_hash(one.batch(0)) != rows_hash(other.batch(0))
    assert one.batch_hash(0) != one.batch_hash(1)


def test_prefetched_steps_are_the_steps(dataset: PreparedDataset) -> None:
    rows = loader(dataset, accumulation=2)
    for step, batch in zip(range(3, 9), rows.steps(3, 9), strict=True):
        np.testing.assert_array_equal(np.stack(batch), np.stack(rows.batch(step)))
    assert list(rows.steps(4, 4)) == []


def test_data_wait_counts_only_what_the_caller_waits(
    dataset: PreparedDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = loader(dataset)
    build = rows.batch
    monkeypatch.setattr(rows, "batch", lambda step: (time.sleep(0.1), build(step))[1])
    steps = rows.steps(0, 3)
    next(steps)
    assert rows.data_wait > 0.09
    time.sleep(0.2)  # the step that hides the next batch
    next(steps)
    assert rows.data_wait < 0.05
    steps.close()


def test_resumed_with_another_global_batch_it_goes_on_with_the_next_sample(
    dataset: PreparedDataset,
) -> None:
    # 5 steps of 8 samples are done; from then on steps have 16.
    resumed = loader(dataset, global_batch=16, first_sample=5 * 8 - 5 * 16)
    before = loader(dataset)
    expected = np.concatenate([before.batch(5)[0], before.batch(6)[0]])
    np.testing.assert_array_equal(resumed.batch(5)[0], expected)


def test_batch_that_cannot_be_shared_is_refused(dataset: PreparedDataset) -> None:
    with pytest.raises(UserError, match="multiple of 6"):
        loader(dataset, global_batch=8, dp_size=3, accumulation=2)
