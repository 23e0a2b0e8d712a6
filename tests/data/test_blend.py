"""Mixtures: exact shares at every block, any place found at once, repetition counted."""

import time
from collections import Counter
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from llama_lib.data import shared
from llama_lib.data.arrange import arrange
from llama_lib.data.blend import Apportionment, Blend
from llama_lib.data.order import Piece, RowOrder
from llama_lib.data.packing import PackedOrder
from llama_lib.errors import UserError

SLIMPAJAMA = (52.2, 26.7, 5.2, 4.2, 4.6, 3.8, 3.3)


@pytest.mark.parametrize(
    "weights",
    [
        (1.0,),
        (0.7, 0.3),
        (1.0, 1.0, 1.0),
        SLIMPAJAMA,
        (90.0, *(1.0,) * 10),
        (0.333333333, 0.666666667),
        (1e-3, 1.0, 5e-3),
    ],
)
def test_shares_are_exact_to_a_row_at_the_end_of_every_block(weights: tuple[float, ...]) -> None:
    mixture = Apportionment(weights, seed=1)
    shares = [Fraction(str(weight)) for weight in weights]
    blocks = 3000 if mixture.block < 100 else 30
    parts, numbers = mixture.locate(np.arange(blocks * mixture.block))
    counts = np.zeros(len(weights), np.int64)
    for block in range(blocks):
        counts += np.bincount(
            parts[block * mixture.block : (block + 1) * mixture.block], minlength=len(weights)
        )
        rows = (block + 1) * mixture.block
        for count, share in zip(counts.tolist(), shares, strict=True):
            assert abs(count - rows * share / sum(shares)) < 1
    # each part's rows are numbered through
    for part in range(len(weights)):
        assert numbers[parts == part].tolist() == list(range(int(counts[part])))


def test_blocks_are_as_short_as_the_smallest_share_allows() -> None:
    assert Apportionment((0.7, 0.3), 0).block == 4
    assert Apportionment((1.0, 1.0), 0).block == 2
    assert Apportionment(SLIMPAJAMA, 0).block == 31


def test_blocks_are_shuffled_by_the_seed() -> None:
    def parts(seed: int) -> list[int]:
        return Apportionment((0.5, 0.5), seed).locate(np.arange(2000))[0].tolist()

    assert parts(1) == parts(1) != parts(2)
    assert 0.4 < np.mean(parts(1)[::2]) < 0.6, "no part has all the even places"


def test_mixture_of_this_release_never_changes() -> None:
    # A resumed run relies on it.
    parts, numbers = Apportionment((5, 3, 1.2), 42).locate(np.arange(1000, 1018))
    assert parts.tolist() == [0, 1, 0, 1, 2, 0, 0, 0, 2, 0, 0, 2, 1, 1, 0, 0, 1, 0]
    assert numbers.tolist() == [
        543,
        327,
        544,
        328,
        130,
        545,
        546,
        547,
        131,
        548,
        549,
        132,
        329,
        330,
        550,
        551,
        331,
        552,
    ]
    assert Apportionment((5, 3, 1.2), 42).counts(8 * 13) == [57, 33, 14]


def test_any_place_is_found_without_walking_to_it() -> None:
    mixture = Apportionment(SLIMPAJAMA, 3)
    all_parts, all_numbers = mixture.locate(np.arange(50_000))
    for sample in (0, 17, 30, 31, 1023, 12_345, 49_999):
        parts, numbers = Apportionment(SLIMPAJAMA, 3).locate(np.array([sample]))
        assert (parts[0], numbers[0]) == (all_parts[sample], all_numbers[sample])
        counts = Apportionment(SLIMPAJAMA, 3).counts(sample)
        assert counts == np.bincount(all_parts[:sample], minlength=7).tolist()
    start = time.process_time()
    mixture.locate(np.array([10**12]))
    assert time.process_time() - start < 0.1


@pytest.mark.parametrize("weights", [(1.0, 0.0), (1.0, -1.0)])
def test_weights_that_are_none_are_refused(weights: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="not all positive"):
        Apportionment(weights, 0)


def test_weight_of_almost_nothing_is_refused() -> None:
    with pytest.raises(UserError, match="1e-09 is less than one row in"):
        Apportionment((1.0, 1e-9), 0)


# -- blends of documents ---------------------------------------------------------------------------

SOURCE = np.random.RandomState(7)
# The weighted entries interleave the sources: b is one entry, a and c another.
LENGTHS = {name: SOURCE.randint(1, 50, count) for name, count in (("a", 30), ("b", 12), ("c", 25))}
WEIGHTS = ((0.7, ("a", "c")), (0.3, ("b",)))


def dataset(weights: Any = WEIGHTS, **lengths: np.ndarray) -> Any:
    """What an order needs of a prepared dataset."""

    class Reader:
        def __init__(self, lengths: np.ndarray) -> None:
            self.lengths = lengths.astype(np.int32)

        def __len__(self) -> int:
            return len(self.lengths)

    readers = {name: Reader(values) for name, values in (lengths or LENGTHS).items()}
    return SimpleNamespace(readers=readers, weights=weights, manifest_hash=str(weights))


def expected_rows(order: RowOrder | PackedOrder, samples: range, names: str) -> list[list[Piece]]:
    """Rows of a component on its own, its documents numbered as in the whole dataset."""
    firsts = {"a": 0, "b": 30, "c": 42}
    numbers = [firsts[name] + i for name in names for i in range(len(LENGTHS[name]))]
    return [
        [Piece(numbers[document], start, length) for document, start, length in row]
        for row in map(order.row_documents, samples)
    ]


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_each_part_goes_through_its_own_order(packing: str, tmp_path: Path) -> None:
    blend = arrange(dataset(), 32, 5, packing, tmp_path)
    assert isinstance(blend, Blend)
    rows = [blend.row_documents(sample) for sample in range(400)]
    of_b = [row for row in rows if 30 <= row[0].document < 42]
    others = [row for row in rows if not 30 <= row[0].document < 42]
    share = sum(piece.length for row in of_b for piece in row)
    share /= sum(piece.length for row in rows for piece in row)
    assert share == pytest.approx(0.3, abs=0.005), "weights are shares of tokens, not of rows"
    if packing == "concat":
        assert len(of_b) == 120
    alone_b = arrange(dataset(None, b=LENGTHS["b"]), 32, 5, packing, tmp_path)
    alone = arrange(dataset(None, a=LENGTHS["a"], c=LENGTHS["c"]), 32, 5, packing, tmp_path)
    assert isinstance(alone_b, RowOrder | PackedOrder) and isinstance(alone, RowOrder | PackedOrder)
    assert of_b == expected_rows(alone_b, range(len(of_b)), "b")
    assert others == expected_rows(alone, range(400 - len(of_b)), "ac")
    # As many rows as the parts have together, padding included.
    assert blend.num_rows(3) == 3 * (alone_b.num_rows(1) + alone.num_rows(1))
    # b is small: its rows are used again, and that is counted
    repetitions = blend.repetitions(400)
    assert list(repetitions) == ["a and 1 more", "b"]
    assert repetitions["b"] == pytest.approx(len(of_b) / alone_b.num_rows(1000) * 1000, rel=1e-3)
    assert repetitions["a and 1 more"] < 7 < 12 < repetitions["b"]


def test_many_samples_at_once_are_the_samples_one_by_one(tmp_path: Path) -> None:
    blend = arrange(dataset(), 32, 5, "concat", tmp_path)
    samples = np.array([300, 2, 2, 77, 1_000_000])
    pieces = blend.pieces(samples)
    for index, sample in enumerate(samples.tolist()):
        here = pieces.row == index
        columns = (pieces.document[here], pieces.start[here], pieces.length[here])
        together = list(zip(*(column.tolist() for column in columns), strict=True))
        assert together == blend.row_documents(sample)
    expected = sum(p.length - 1 for s in samples.tolist() for p in blend.row_documents(s))
    assert blend.num_labels(samples, True) == expected
    assert blend.num_labels(samples, False) == 5 * 31
    assert blend.epoch_of(blend.num_rows(1) + 1) == 1


def test_nothing_of_a_part_is_lost(tmp_path: Path) -> None:
    blend = arrange(dataset(), 32, 5, "concat", tmp_path)
    counts: Counter[tuple[int, int]] = Counter()
    for sample in range(2000):
        for document, start, length in blend.row_documents(sample):
            counts.update((document, token) for token in range(start, start + length))
    lengths = np.concatenate(list(LENGTHS.values())).tolist()
    seen = {(d, t) for d, length in enumerate(lengths) for t in range(length)}
    assert counts.keys() == seen
    times = {30 <= document < 42: set() for document in (0, 30)}  # type: ignore[var-annotated]
    for (document, _), count in counts.items():
        times[30 <= document < 42].add(count)
    assert all(max(values) - min(values) <= 1 for values in times.values())


def test_large_blends_are_those_of_small_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = arrange(dataset(), 32, 5, "concat", tmp_path / "small")
    expected = [small.row_documents(sample) for sample in range(300)]
    monkeypatch.setattr(shared, "LARGE", 3)
    large = arrange(dataset(), 32, 5, "concat", tmp_path / "large")
    assert [large.row_documents(sample) for sample in range(300)] == expected
    kept = {path.name for path in (tmp_path / "large").rglob("*.npy")}
    assert kept == {"lengths.npy", "documents.npy", "ends.npy", "order.npy"}


def test_weighted_source_without_documents_is_refused(tmp_path: Path) -> None:
    empty = dataset(((0.5, ("a",)), (0.5, ("b",))), a=np.array([3]), b=np.array([], int))
    with pytest.raises(UserError, match=r"b has weight 0\.5 but no documents"):
        arrange(empty, 4, 0, "concat", tmp_path)


def test_weights_for_some_of_the_sources_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="weights for"):
        arrange(dataset(((0.5, ("a",)), (0.5, ("b",)))), 32, 0, "concat", tmp_path)


def test_other_data_have_other_files(tmp_path: Path) -> None:
    for length in (32, 16):
        for seed in (1, 2):
            arrange(dataset(None), length, seed, "best_fit", tmp_path)
    arrange(dataset(None, a=LENGTHS["a"]), 32, 1, "best_fit", tmp_path)
    assert len(list((tmp_path / "packing").iterdir())) == 5
