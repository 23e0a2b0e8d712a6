"""One thread beside the training, which writes one checkpoint at a time.

Invariant: the thread uses the gloo group that is its own, and no other, for everything that ranks
have to agree on, and the main thread never uses that group; a failure in it is never lost.
"""

import os
import threading
import time
from collections.abc import Callable
from typing import Any

from llama_lib import coordination
from llama_lib.errors import RunError

# How much less than the training the thread gets of a core that both want. It is the training that
# everyone waits for; the lowest priority (19) would leave it holding Python's lock for too long.
NICE = 5


class Background:
    """Runs one piece of work after the other in a thread; made by all ranks together.

    Attributes:
        group: the ranks' gloo group for the thread.
        seconds: how long the last piece of work took.
    """

    def __init__(self) -> None:
        self.group: Any = coordination.new_group()
        self.seconds = 0.0
        self._thread: threading.Thread | None = None
        self._failure: str | None = None

    @property
    def is_busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    @property
    def failure(self) -> str | None:
        """What went wrong, as far as this rank knows yet."""
        return self._failure

    def start(self, work: Callable[[], None]) -> None:
        assert not self.is_busy, "one checkpoint at a time"

        def run() -> None:
            begin = time.perf_counter()
            try:
                # On Linux that of this thread alone. Relative: a run under `nice` may not go back.
                os.nice(NICE)
                work()
            except RunError as error:  # the same on every rank
                self._failure = str(error)
            except BaseException as error:  # this rank's alone: the others wait for it in vain
                self._failure = f"writing a checkpoint failed: {type(error).__name__}: {error}"
            self.seconds = time.perf_counter() - begin

        # A daemon: if the run ends in an error, it does not wait for ranks that may be gone.
        self._thread = threading.Thread(target=run, name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self, timeout: float | None = None) -> None:
        """Wait until the work is done, or for `timeout` seconds."""
        if self._thread is not None:
            self._thread.join(timeout)
