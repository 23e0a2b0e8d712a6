"""Python's collector runs where it is asked to, and is left as it was found."""

import gc
import weakref

import pytest
import torch

from llama_lib.garbage import Garbage


def cycle() -> weakref.ref:
    """A tensor that only a cycle of references keeps."""
    holder = [torch.zeros(1)]
    holder.append(holder)
    return weakref.ref(holder[0])


@pytest.fixture
def collections():
    """Every collection, as it begins."""
    seen = []

    def note(phase, _):
        if phase == "start":
            seen.append(phase)

    gc.callbacks.append(note)
    yield seen
    gc.callbacks.remove(note)


def test_no_collection_in_a_step_and_no_leftover_after_it(collections):
    garbage = Garbage()
    with garbage.between_steps():
        collections.clear()
        left = cycle()
        kept = [[] for _ in range(100_000)]  # enough to start Python's own collection many times
        assert not collections and left() is not None
        garbage.step_done()
        assert left() is None
        assert len(collections) == 1
        del kept


def test_pauses_are_collected_as_usual():
    garbage = Garbage()
    with garbage.between_steps():
        with garbage.as_usual():
            assert gc.isenabled()
        assert not gc.isenabled()


@pytest.mark.parametrize("enabled", [True, False])
def test_it_is_left_as_it_was(enabled):
    before = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        with pytest.raises(RuntimeError), Garbage().between_steps():
            raise RuntimeError
        assert gc.isenabled() == enabled and gc.get_freeze_count() == 0
    finally:
        (gc.enable if before else gc.disable)()


def test_what_outlived_a_step_is_found_later():
    garbage = Garbage()
    with garbage.between_steps():
        holder = [torch.zeros(1)]
        holder.append(holder)
        left = weakref.ref(holder[0])
        for _ in range(3):
            garbage.step_done()
        del holder
        for _ in range(100):
            garbage.step_done()
        assert left() is None
