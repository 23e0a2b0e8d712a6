"""When Python looks for garbage: between two steps, not in the middle of one.

Invariant: what nothing but reference cycles keeps when a step is done, tensors among it, is freed
before the next step; a cycle that something else still keeps then is looked at again after at most
STEPS_PER_FULL_COLLECTION steps.
"""

import contextlib
import gc
from collections.abc import Iterator

# Objects that outlive a collection are looked at again in every so many only (chosen).
STEPS_PER_FULL_COLLECTION = 100


class Garbage:
    """Takes Python's collector over for the length of a loop.

    Left to itself it stops a step whenever enough objects were made, on every rank at another
    moment, and goes through the model's hundred thousand objects each time. Here those that exist
    when the loop begins are frozen, that is never looked at, and a collection is asked for when a
    step has been queued: it takes well under a millisecond.
    """

    def __init__(self) -> None:
        self._num_steps = 0

    @contextlib.contextmanager
    def between_steps(self) -> Iterator[None]:
        """Collect in the block only where `step_done` is called."""
        was_enabled = gc.isenabled()
        gc.collect()
        gc.freeze()
        gc.disable()
        try:
            yield
        finally:
            gc.unfreeze()
            if was_enabled:
                gc.enable()

    def step_done(self) -> None:
        self._num_steps += 1
        gc.collect(2 if self._num_steps % STEPS_PER_FULL_COLLECTION == 0 else 1)

    @contextlib.contextmanager
    def as_usual(self) -> Iterator[None]:
        """Python's own way, for what is no step: evaluation, sampling, saving."""
        gc.enable()
        try:
            yield
        finally:
            gc.disable()
