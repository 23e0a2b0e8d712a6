"""Walk through a stream: chunks made ahead, windows shuffled, rows cut, every place remembered.

Invariant: the rows from a remembered place on are those of an uninterrupted walk.
"""

from __future__ import annotations

import queue
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from llama_lib.data.chunk_work import Chunk, Settings
from llama_lib.data.chunks import Corpus, Place, Task
from llama_lib.data.windows import Group, Tokens, joined, shuffled
from llama_lib.data.workers import WorkerPool
from llama_lib.errors import LlamaLibError, RunError, UserError
from llama_lib.progress import made

_POLL_SECONDS = 0.2
_FIELDS = ("sample", "epoch", "unit", "chunk", "window", "token")


class Start(NamedTuple):
    """Where a group of rows begins: its first sample, and the token of a window it starts with.

    The window is number `window` of its epoch and begins at `place`.
    """

    sample: int
    place: Place
    window: int
    token: int


class Walker:
    """The rows of one corpus, in order; going back is possible, but reads the window again.

    `state` is what an earlier walk gave, {} for the beginning. `engine_of` says which tokenizer is
    proven for a source. `num_chunks` counts the chunks that were tokenised.
    """

    def __init__(
        self,
        corpus: Corpus,
        settings: Settings,
        engine_of: Callable[[int], str],
        max_length: int,
        window: int,
        workers: int,
        state: dict[str, Any],
    ) -> None:
        self.corpus, self.max_length, self.window = corpus, max_length, window
        self.num_chunks = 0
        self._settings, self._engine_of, self._workers = settings, engine_of, workers
        self._starts = [_read(state)]
        self._index = -1
        self._group: Group | None = None
        self._rest, self._cursor, self._drop = Tokens.none(), (Place(0, 0, 0), 0), 0
        self._feed: _Feed | None = None
        self._bad: dict[tuple[int, int, int], int] = {}
        self._excluded: dict[tuple[int, int, int], int] = {}
        self._lock = threading.RLock()

    def row(self, sample: int) -> Tokens:
        """The tokens of one row [max_length], and the pieces of documents it is made of."""
        with self._lock:
            group, number = self._find(sample)
            return group.row(number)

    def num_pieces(self, sample: int) -> int:
        with self._lock:
            group, number = self._find(sample)
            return int(group.num_pieces[number])

    def state(self, sample: int) -> dict[str, Any]:
        """What a walk needs to begin with this sample: where the group it is in begins."""
        start = self._start_of(sample)
        values = (start.sample, *start.place, start.window, start.token)
        return dict(zip(_FIELDS, values, strict=True))

    def epoch_of(self, sample: int) -> int:
        """Epoch in which the walk has to begin for this sample, from 0."""
        return self._start_of(sample).place.epoch

    @property
    def last_epoch(self) -> int:
        """Epoch of the rows it came to, from 0."""
        return self._starts[-1].place.epoch

    @property
    def bad_lines(self) -> dict[int, int]:
        """Bad records of each file that has some, as far as it was read."""
        counts: dict[int, int] = {}
        for (file, *_), bad in list(self._bad.items()):
            counts[file] = counts.get(file, 0) + bad
        return counts

    @property
    def num_excluded(self) -> int:
        """Documents left out because they are held out, as far as the stream was read."""
        return sum(list(self._excluded.values()))

    def close(self) -> None:
        """End the thread and the processes; whoever asks for a row afterwards starts them again."""
        with self._lock:
            if self._feed is not None:
                self._feed.close()
            self._feed = self._group = None

    def _start_of(self, sample: int) -> Start:
        # Without the lock where the place is known: another thread may be at work far ahead.
        if sample > self._starts[-1].sample:
            with self._lock:
                self._find(sample - 1)
        return self._starts[self._index_of(sample)]

    def _index_of(self, sample: int) -> int:
        if sample < self._starts[0].sample:
            raise ValueError(f"sample {sample} lies before {self._starts[0].sample}, the first one")
        return bisect_right(self._starts, sample, key=lambda start: start.sample) - 1

    def _find(self, sample: int) -> tuple[Group, int]:
        index = self._index_of(sample)
        if self._group is None or index < self._index:
            self._begin(index)
        while True:
            start = self._starts[self._index]
            if self._group is not None and sample < start.sample + self._group.num_rows:
                return self._group, sample - start.sample
            self._advance()

    def _begin(self, index: int) -> None:
        """Make the group number `index` the next one to be formed."""
        self.close()
        start = self._starts[index]
        self._index = index - 1
        self._rest = Tokens.none()
        self._cursor = (start.place, start.window)
        self._drop = start.token
        self._feed = _Feed(self._chunks(start.place), self.window)

    def _advance(self) -> None:
        """Form the next group: of as many windows as it takes to complete a row."""
        rest, fruitful = self._rest, self._cursor[0].epoch
        while True:
            place, number = self._cursor
            window, self._cursor = self._window(place, number)
            if len(window.ids):
                fruitful = place.epoch
            elif place.epoch > fruitful + 1:
                raise UserError(
                    "no document is left to train on: every text of the stream is empty, bad or "
                    "held out."
                )
            used = window.cut(self._drop, len(window.ids))
            self._drop = 0
            if len(rest.ids) + len(used.ids) >= self.max_length:
                break
            rest = joined([rest, used])
        group = Group(rest, used, self.max_length, self.corpus.seed, place.epoch, number)
        self._group, self._rest = group, group.rest
        self._index += 1
        if self._index + 1 == len(self._starts):
            sample = self._starts[self._index].sample + group.num_rows
            begin = Start(sample, place, number, len(window.ids) - len(group.rest.ids))
            self._starts.append(begin if len(group.rest.ids) else Start(sample, *self._cursor, 0))

    def _window(self, place: Place, number: int) -> tuple[Tokens, tuple[Place, int]]:
        """A window's tokens, shuffled, and the window behind it; it ends with its epoch."""
        assert self._feed is not None
        chunks: list[Tokens] = []
        after = place
        while len(chunks) < self.window and after.epoch == place.epoch:
            chunk = self._feed.next()
            if chunk.task.place != after:
                raise RunError(f"the stream came to {chunk.task.place}, expected {after}.")
            self._note(chunk)
            chunks.append(chunk.tokens)
            after = chunk.task.after
        following = number + 1 if after.epoch == place.epoch else 0
        return shuffled(chunks, self.corpus.seed, place.epoch, number), (after, following)

    def _note(self, chunk: Chunk) -> None:
        self.num_chunks += 1
        made()
        # The second epoch meets the same records again, under other places.
        key = (chunk.task.file, chunk.task.part.start, chunk.first_record)
        if chunk.bad:
            self._bad[key] = chunk.bad
        if chunk.excluded:
            self._excluded[key] = chunk.excluded

    def _chunks(self, place: Place) -> Iterator[Chunk]:
        def tasks() -> Iterator[Task | LlamaLibError]:
            try:
                for task in self.corpus.tasks(place):
                    source = self.corpus.files[task.file].source
                    yield replace(task, engine=self._engine_of(source))
            except LlamaLibError as error:
                yield error

        with WorkerPool(self._settings, self._workers, apart=True) as pool:
            yield from pool.map(tasks(), ahead=2)


class _Feed:
    """Takes chunks ahead in a thread of its own, at most `ahead` of them."""

    def __init__(self, chunks: Iterator[Chunk], ahead: int) -> None:
        self._chunks = chunks
        self._queue: queue.Queue[Chunk | BaseException] = queue.Queue(ahead)
        self._stop = threading.Event()
        # A daemon: a download that hangs must not keep the program from ending.
        self._thread = threading.Thread(target=self._run, name="stream", daemon=True)
        self._thread.start()

    def next(self) -> Chunk:
        item = self._queue.get()
        if isinstance(item, BaseException):
            self._queue.put(item)  # for whoever asks again
            raise item
        return item

    def close(self) -> None:
        self._stop.set()
        self._thread.join(timeout=5 * _POLL_SECONDS)

    def _run(self) -> None:
        try:
            for chunk in self._chunks:
                if not self._put(chunk):
                    return
        except BaseException as error:
            self._put(error)
        finally:
            self._chunks.close()  # type: ignore[attr-defined]

    def _put(self, item: Chunk | BaseException) -> bool:
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=_POLL_SECONDS)
                return True
            except queue.Full:
                continue
        return False


def _read(state: dict[str, Any]) -> Start:
    if not state:
        return Start(0, Place(0, 0, 0), 0, 0)
    try:
        sample, epoch, unit, chunk, window, token = (int(state[name]) for name in _FIELDS)
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(f"the state of the stream is damaged: {state!r} ({error!r}).") from error
    return Start(sample, Place(epoch, unit, chunk), window, token)
