"""Rows and batches: the right ids, labels and documents, the same for every number of ranks."""

import itertools
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llama_lib.data.arrange import arrange
from llama_lib.data.indexed import IndexedReader, IndexedWriter
from llama_lib.data.loader import IGNORED, BatchLoader, PreparedRows, Row, StepRows, rows_hash
from llama_lib.data.order import RowOrder
from llama_lib.data.position import Position
from llama_lib.data.prepared import PreparedDataset
from llama_lib.errors import UserError

LENGTHS = np.random.default_rng(0).integers(1, 60, 37)
TOTAL = int(LENGTHS.sum())
STARTS = np.cumsum(LENGTHS) - LENGTHS
PAD = 999_999


def write_dataset(folder: Path, sources: dict[str, np.ndarray]) -> PreparedDataset:
    """Sources in which each id occurs once, so that a row tells where it comes from."""
    readers: dict[str, Any] = {}
    first = 0
    for name, lengths in sources.items():
        with IndexedWriter(folder / name, np.int32) as writer:
            writer.write(np.arange(first, first + lengths.sum()), lengths)
        first += int(lengths.sum())
        readers[name] = IndexedReader(folder / name)
    return PreparedDataset(folder, {}, readers)


@pytest.fixture
def dataset(tmp_path: Path) -> PreparedDataset:
    return write_dataset(tmp_path, {"a": LENGTHS[:20], "b": LENGTHS[20:]})


def source(
    dataset: PreparedDataset,
    max_length: int = 16,
    packing: str = "concat",
    mask: bool = False,
    seed: int = 1,
) -> PreparedRows:
    order = arrange(dataset, max_length, seed, packing, dataset.path / "cache")
    return PreparedRows(dataset, order, PAD, mask)


def loader(dataset: PreparedDataset, global_batch: int = 8, **more: Any) -> BatchLoader:
    return BatchLoader(source(dataset), global_batch, **more)


# -- rows ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("max_length", [1, 16, 100, TOTAL + 5])
def test_rows_hold_what_the_order_says(
    dataset: PreparedDataset, packing: str, mask: bool, max_length: int
) -> None:
    rows = source(dataset, max_length, packing, mask)
    samples = list(range(rows.order.num_rows(2) + 3))
    found, num_labels = rows.rows(samples, samples)
    labelled = 0
    for sample, row in zip(samples, found, strict=True):
        pieces = rows.order.row_documents(sample)
        ids: list[int] = []
        labels: list[int] = []
        documents: list[int] = []
        tokens: Counter[str] = Counter()
        for number, (document, start, length) in enumerate(pieces):
            text = list(range(STARTS[document] + start, STARTS[document] + start + length))
            ids += text
            labels += [IGNORED, *text[1:]] if mask else text
            documents += [number] * length
            tokens["a" if document < 20 else "b"] += length
        padding = max_length - len(ids)
        assert row.ids.dtype == row.labels.dtype == np.int64
        assert row.ids.tolist() == ids + [PAD] * padding
        assert row.labels.tolist() == labels + [IGNORED] * padding
        if mask:
            assert row.documents is not None and row.documents.dtype == np.int32
            assert row.documents.tolist() == documents + [len(pieces)] * padding
        else:
            assert row.documents is None
        assert row.tokens == dict(tokens)
        # The model shifts: the first label has nothing to predict it from.
        labelled += int((row.labels[1:] != IGNORED).sum())
    assert num_labels == labelled


def test_only_the_wanted_rows_are_made_but_the_labels_of_all_are_counted(
    dataset: PreparedDataset,
) -> None:
    rows = source(dataset, packing="best_fit", mask=True)
    every, num_labels = rows.rows(range(10, 18), range(10, 18))
    some, same = rows.rows(range(10, 18), [16, 11])
    assert [row.ids.tolist() for row in some] == [every[6].ids.tolist(), every[1].ids.tolist()]
    assert same == num_labels


def test_prepared_rows_need_nothing_to_start_anywhere(dataset: PreparedDataset) -> None:
    rows = source(dataset)
    assert rows.state(10**6) == {}
    assert rows.epoch_of(10**6) == rows.order.epoch_of(10**6) > 1000
    rows.close()


# -- batches ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dp_size", "accumulation"), [(1, 1), (2, 1), (1, 2), (2, 2), (4, 2)])
def test_global_batch_is_the_same_for_every_number_of_ranks(
    dataset: PreparedDataset, dp_size: int, accumulation: int
) -> None:
    whole = loader(dataset)
    for step in (0, 3, 11):
        expected = whole.batch(step)
        batches = [
            loader(dataset, dp_rank=rank, dp_size=dp_size, accumulation=accumulation).batch(step)
            for rank in range(dp_size)
        ]
        assert all(batch.samples == list(range(8 * step, 8 * step + 8)) for batch in batches)
        assert all(len(batch.micro_batches) == accumulation for batch in batches)
        shape = (8 // dp_size // accumulation, 16)
        parts = [part for batch in batches for part in batch.micro_batches]
        assert all(part.ids.shape == part.labels.shape == shape for part in parts)
        # micro-batch after micro-batch, in each rank after rank, the samples ascend
        by_sample = [
            row
            for parts in zip(*(batch.micro_batches for batch in batches), strict=True)
            for part in parts
            for row in part.ids.tolist()
        ]
        assert by_sample == expected.micro_batches[0].ids.tolist()
        assert {batch.num_labels for batch in batches} == {8 * 15} == {expected.num_labels}
        together = sum((Counter(batch.tokens) for batch in batches), Counter())
        assert together == Counter(expected.tokens) and together.total() == 8 * 16


def test_batches_stack_rows_with_their_documents(dataset: PreparedDataset) -> None:
    rows = source(dataset, packing="best_fit", mask=True)
    step = BatchLoader(rows, 6, accumulation=2).batch(2)
    expected, num_labels = rows.rows(range(12, 18), range(12, 18))
    assert step.num_labels == num_labels and len(step.micro_batches) == 2
    for index, part in enumerate(step.micro_batches):
        here = expected[3 * index : 3 * index + 3]
        assert part.ids.tolist() == [row.ids.tolist() for row in here]
        assert part.labels.tolist() == [row.labels.tolist() for row in here]
        assert part.documents is not None and part.documents.dtype == np.int32
        assert part.documents.tolist() == [
            row.documents.tolist() for row in here if row.documents is not None
        ]


def test_rows_with_and_without_padding_share_a_batch(dataset: PreparedDataset) -> None:
    rows = source(dataset, packing="best_fit")
    fills = [sum(p.length for p in rows.order.row_documents(s)) for s in range(40)]
    assert {16} < set(fills), "the test needs rows of both kinds"
    batch = BatchLoader(rows, 40).batch(0).micro_batches[0]
    assert ((batch.labels != IGNORED).sum(1) == fills).all()
    assert (batch.ids[batch.labels == IGNORED] == PAD).all()


def test_hashes_tell_steps_and_ranks_apart(dataset: PreparedDataset) -> None:
    one, other = (loader(dataset, dp_rank=rank, dp_size=2) for rank in range(2))
    assert rows_hash(one.batch(0)) == rows_hash(one.batch(0))
    assert rows_hash(one.batch(0)) != rows_hash(other.batch(0))
    assert rows_hash(one.batch(0)) != rows_hash(one.batch(1))


def test_batches_are_those_of_the_first_version(tmp_path: Path) -> None:
    # The hash of step 12 that rank 1 of version 0.1.0 wrote into its log.
    lengths = np.random.RandomState(5).randint(1, 60, 37)
    data = write_dataset(tmp_path, {"a": lengths})
    batch = loader(data, dp_rank=1, dp_size=2, accumulation=2).batch(11)
    assert rows_hash(batch) == "a0eee0925dd2eaad97a27432e9556a90103cf3e5a002c1e46d025bad8dd27f91"


def test_prefetched_steps_are_the_steps(dataset: PreparedDataset) -> None:
    rows = loader(dataset, accumulation=2)
    for step, batch in zip(range(3, 9), rows.steps(3, 9), strict=True):
        assert rows_hash(batch) == rows_hash(rows.batch(step))
        assert batch.samples == rows.batch(step).samples
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
    before = loader(dataset)
    resumed = loader(dataset, 16, position=Position(5, before.position.next_sample(5, 8)))
    expected = np.concatenate([before.batch(step).micro_batches[0].ids for step in (5, 6)])
    assert resumed.batch(5).micro_batches[0].ids.tolist() == expected.tolist()


def test_skipped_steps_have_no_batch(dataset: PreparedDataset) -> None:
    before = loader(dataset)
    after = loader(dataset, position=before.position.skipping(3, 5, 8), dp_size=2, dp_rank=1)
    assert after.batch(2).samples == before.batch(4).samples
    both = before.batch(4).micro_batches[0].ids
    assert after.batch(2).micro_batches[0].ids.tolist() == both[4:].tolist()


def test_batch_that_cannot_be_shared_is_refused(dataset: PreparedDataset) -> None:
    with pytest.raises(UserError, match="multiple of 6"):
        loader(dataset, global_batch=8, dp_size=3, accumulation=2)


class Counting:
    """A source of another kind: the loader asks for the whole batch and for a rank's part."""

    max_length = 4

    def __init__(self) -> None:
        self.asked: list[tuple[list[int], list[int]]] = []
        self.closed = False

    def rows(self, samples: Sequence[int], wanted: Sequence[int]) -> tuple[list[Row], int]:
        self.asked.append((list(samples), list(wanted)))
        rows = [np.full(4, sample) for sample in wanted]
        return [Row(ids, ids, None, {"x": int(ids[0])}) for ids in rows], 77

    def epoch_of(self, sample: int) -> int:
        return 0

    def state(self, sample: int) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        self.closed = True


def test_any_source_of_rows_serves(dataset: PreparedDataset) -> None:
    rows = Counting()
    batches = BatchLoader(rows, 8, dp_rank=1, dp_size=2, accumulation=2)
    step: StepRows = batches.batch(1)
    assert rows.asked == [(list(range(8, 16)), [10, 11, 14, 15])]
    assert [part.ids[:, 0].tolist() for part in step.micro_batches] == [[10, 11], [14, 15]]
    assert step.num_labels == 77 and step.tokens == {"x": 50}
    assert step.samples == list(range(8, 16))
    batches.close()
    assert rows.closed


@pytest.mark.parametrize(
    ("packing", "mask"), [("concat", False), ("concat", True), ("best_fit", True)]
)
def test_rows_cost_little(tmp_path: Path, packing: str, mask: bool) -> None:
    lengths = np.random.RandomState(0).lognormal(6.2, 1.2, 5000).astype(np.int32) + 1
    data = write_dataset(tmp_path, {"a": lengths})
    batches = BatchLoader(source(data, 2048, packing, mask), 64)
    batches.batch(0)
    start = time.process_time()
    for step in range(1, 21):
        batches.batch(step)
    # Measured 20,000 to 60,000 rows per second of CPU; a tiny model trains some 10 on a CPU.
    assert 20 * 64 / (time.process_time() - start) > 1000


def test_every_rank_sees_its_own_rows_and_together_all(dataset: PreparedDataset) -> None:
    assert isinstance(source(dataset).order, RowOrder)
    ranks = [loader(dataset, dp_rank=rank, dp_size=4) for rank in range(4)]
    steps = source(dataset).order.num_rows(1) // 8
    ids = [
        part.ids
        for rank, step in itertools.product(ranks, range(steps))
        for part in rank.batch(step).micro_batches
    ]
    seen = np.concatenate(ids).ravel()
    assert len(seen) == len(set(seen.tolist())) == steps * 8 * 16
