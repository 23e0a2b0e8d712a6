"""A pool of processes for work on data; each imports what its work needs and nothing else.

Invariant: results come in the order of the items whatever the number of processes, so the first
error is the same too; no process outlives the one that started it by more than the item at hand.
"""

import os
import signal
import subprocess
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from multiprocessing.connection import Connection, Pipe, wait
from types import TracebackType
from typing import Any, Generic, TypeVar

from llama_lib.errors import LlamaLibError, RunError

Item = TypeVar("Item")
Result = TypeVar("Result")

Report = Callable[[Any], None]
Work = Callable[[Item, Report], Result]
Setup = Callable[[], Work[Item, Result]]

# One thread each: the processes are the parallelism. Libraries read these when they are loaded.
_ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "RAYON_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
_NO_MORE = object()
_START = "from llama_lib.data.workers import serve; serve({number})"


class WorkerPool(Generic[Item, Result]):
    """`setup()` is called once in every process and gives the function that does the work.

    The function takes an item and a `report`, to tell how far it is; both it and `setup` have to
    be of a module, since they are pickled. With one worker, or none, the work is done in this
    process; with `apart` one worker is a process as well, for a program that is busy itself.
    Processes are started here and not by multiprocessing, whose children import the
    program's main module again: that of a training run brings torch and all it needs.
    """

    def __init__(self, setup: Setup[Item, Result], workers: int, apart: bool = False) -> None:
        self._setup = setup
        self._work: Work[Item, Result] | None = None
        self._processes: dict[Connection, subprocess.Popen[bytes]] = {}
        try:
            for _ in range(workers if apart or workers > 1 else 0):
                self._start()
            # A large setup fills the pipe until it is read: only now do all processes come up.
            for worker in list(self._processes):
                self._send(worker, setup)
        except BaseException:
            self.close()
            raise

    def map(
        self,
        items: Iterable[Item],
        on_report: Callable[[int, Any], None] = lambda number, value: None,
        ahead: int = 4,
    ) -> Iterator[Result]:
        """Results in order; at most `ahead` items per process are begun before they are taken.

        `on_report` gets the number of the item and what its work reports. An error of the work is
        raised when its turn comes. A pool whose results are not taken to the end is closed.
        """
        if not self._processes:
            self._work = self._work or self._setup()
            for number, one in enumerate(items):
                yield self._work(one, partial(on_report, number))
            return
        remaining: Iterator[Any] = iter(items)
        idle = deque(self._processes)
        busy: dict[Connection, int] = {}
        done: dict[int, tuple[str, Any]] = {}
        given = taken = 0
        finished = False
        try:
            while True:
                while idle and not finished and given - taken < ahead * len(self._processes):
                    item: Any = next(remaining, _NO_MORE)
                    if item is _NO_MORE:
                        finished = True
                        break
                    worker = idle.popleft()
                    busy[worker] = given
                    given += 1
                    self._send(worker, item)
                if taken in done:
                    kind, value = done.pop(taken)
                    taken += 1
                    if kind == "error":
                        raise value
                    yield value
                    continue
                if not busy:
                    return
                for worker in _ready(list(busy)):
                    kind, value = self._receive(worker)
                    if kind == "report":
                        on_report(busy[worker], value)
                    else:
                        done[busy.pop(worker)] = (kind, value)
                        idle.append(worker)
        finally:
            if busy:
                self.close()

    def close(self) -> None:
        """End the processes; what they are at work on is given up."""
        for connection, process in self._processes.items():
            connection.close()
            process.terminate()
        for process in self._processes.values():
            process.wait()
        self._processes.clear()

    def __enter__(self) -> "WorkerPool[Item, Result]":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _start(self) -> None:
        ours, theirs = Pipe()
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-c", _START.format(number=theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env={**os.environ, **_ONE_THREAD, "PYTHONPATH": os.pathsep.join(sys.path)},
            )
        self._processes[ours] = process

    def _send(self, worker: Connection, value: Any) -> None:
        try:
            worker.send(value)
        except OSError as error:
            raise self._ended(worker) from error

    def _receive(self, worker: Connection) -> tuple[str, Any]:
        try:
            return worker.recv()
        except (EOFError, OSError) as error:
            raise self._ended(worker) from error

    def _ended(self, worker: Connection) -> RunError:
        code = self._processes[worker].wait()
        how = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
        return RunError(
            f"a process that tokenises {how}. If memory ran out, use fewer of them: --workers."
        )


def _ready(workers: list[Connection]) -> list[Connection]:
    """Those that have something to say; waits for the first."""
    return [worker for worker in wait(workers) if isinstance(worker, Connection)]


def serve(number: int) -> None:
    """Life of one process: a setup, then items until the other end closes."""
    # A Ctrl-C goes to all processes of a terminal; the one that holds the pool ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = os.getppid()
    with Connection(number) as connection:

        def report(value: Any) -> None:
            if os.getppid() != parent:
                raise SystemExit(1)
            connection.send(("report", value))

        try:
            setup = connection.recv()
            work = None
            while True:
                item = connection.recv()
                try:
                    work = work or setup()
                    answer = ("result", work(item, report))
                except (LlamaLibError, OSError) as error:
                    answer = ("error", error)
                except Exception:
                    answer = ("error", RunError(traceback.format_exc()))
                connection.send(answer)
        except (EOFError, BrokenPipeError, ConnectionResetError):
            return
