"""Which samples each step takes, against the plain list of all samples."""

import time

import numpy as np
import pytest

from llama_lib.data.position import Position, merged


def test_without_skips_step_k_has_the_kth_batch() -> None:
    position = Position()
    assert position.samples(0, 4) == [0, 1, 2, 3]
    assert position.samples(3, 4) == [12, 13, 14, 15]
    assert position.next_sample(3, 4) == 12


def test_another_global_batch_goes_on_with_the_next_sample() -> None:
    # Five steps of 8 are done; from then on steps have 16.
    after = Position(step=5, sample=Position().next_sample(5, 8))
    assert after.samples(5, 16) == list(range(40, 56))
    assert after.samples(6, 16) == list(range(56, 72))
    with pytest.raises(ValueError, match="before step 5"):
        after.samples(4, 16)


def test_steps_are_left_out_exactly() -> None:
    # --skip_steps 3:5 with batches of 4: steps 3 and 4 (from 1) had the samples 8 .. 15.
    before = Position()
    after = before.skipping(3, 5, 4)
    assert after.skips == ((8, 16),)
    assert after.samples(1, 4) == before.samples(1, 4)
    # step 3 now has what step 5 had
    assert [after.samples(step, 4) for step in (2, 3)] == [before.samples(s, 4) for s in (4, 5)]


def test_a_second_skip_counts_the_steps_of_the_run_as_it_is() -> None:
    once = Position().skipping(3, 5, 4)
    twice = once.skipping(2, 4, 4)
    # step 2 had 4 .. 7, step 3 what came after the first gap
    assert twice.skips == ((4, 20),)
    assert twice.samples(1, 4) == [20, 21, 22, 23]


def test_a_resumed_run_skips_in_its_own_numbering() -> None:
    position = Position(step=10, sample=33, skips=((0, 4), (50, 52)))
    after = position.skipping(13, 14, 8)
    # steps of 8 from sample 33: 11 has 33..40, 12 41..48, 13 49 and 52..58
    assert position.samples(12, 8) == [49, *range(52, 59)]
    assert after == Position(10, 33, ((0, 4), (49, 59)))
    with pytest.raises(ValueError, match="before step 10"):
        position.skipping(10, 14, 8)
    with pytest.raises(ValueError, match="are none"):
        position.skipping(12, 12, 8)


def test_samples_are_those_of_the_list_without_the_skipped() -> None:
    source = np.random.RandomState(0)
    for _ in range(300):
        starts = source.randint(0, 120, int(source.randint(0, 5)))
        skips = tuple((int(start), int(start + source.randint(0, 30))) for start in starts)
        begin, step, batch = (int(source.randint(*limits)) for limits in ((0, 60), (0, 9), (1, 20)))
        skipped = {sample for first, stop in skips for sample in range(first, stop)}
        left = [sample for sample in range(begin, 1000) if sample not in skipped]
        position = Position(step, begin, skips)
        for number in range(6):
            expected = left[number * batch : (number + 1) * batch]
            assert position.samples(step + number, batch) == expected
            assert position.next_sample(step + number, batch) == expected[0]


def test_ranges_are_merged() -> None:
    assert merged(((5, 9), (1, 3), (3, 4), (20, 20), (8, 12))) == ((1, 4), (5, 12))


def test_any_step_is_found_at_once() -> None:
    position = Position(skips=tuple((first, first + 3) for first in range(0, 1000, 10)))
    start = time.process_time()
    assert position.samples(10**9, 1024)[0] == 10**9 * 1024 + 300
    assert time.process_time() - start < 0.05
