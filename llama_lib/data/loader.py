"""Batches of the global order for one data-parallel rank, built one step ahead.

Invariant: step k holds samples k*G .. (k+1)*G-1 of the order, G the global batch in rows, counted
from `first_sample`, whatever the number of ranks and accumulation steps; nothing but the step
number decides a batch.
"""

import hashlib
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from llama_lib.data.order import RowOrder
from llama_lib.data.prepared import PreparedDataset
from llama_lib.errors import UserError

Rows = npt.NDArray[np.int64]


class BatchLoader:
    """Rows of `max_length` ids, and the micro-batches of every step for one rank.

    `first_sample` is the sample step 0 would begin with: 0, unless a run was resumed with another
    global batch. `data_wait` is how many seconds the caller of `steps` waited for its latest step.
    """

    def __init__(
        self,
        dataset: PreparedDataset,
        order: RowOrder,
        global_batch: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        accumulation: int = 1,
        first_sample: int = 0,
    ) -> None:
        share = dp_size * accumulation
        if global_batch < 1 or global_batch % share:
            raise UserError(
                f"a global batch of {global_batch} rows cannot be shared by {dp_size} data-"
                f"parallel ranks with {accumulation} accumulation steps: expected a "
                f"multiple of {share} (--batch_size, --accumulation_steps, --global_batch_tokens)."
            )
        self.dataset = dataset
        self.order = order
        self.global_batch = global_batch
        self.dp_rank = dp_rank
        self.dp_size = dp_size
        self.accumulation = accumulation
        self.first_sample = first_sample
        self.batch_size = global_batch // share
        self.data_wait = 0.0

    def samples(self, step: int) -> list[range]:
        """Samples of each micro-batch of this rank; step counts from 0."""
        starts = (
            self.first_sample
            + step * self.global_batch
            + (part * self.dp_size + self.dp_rank) * self.batch_size
            for part in range(self.accumulation)
        )
        return [range(start, start + self.batch_size) for start in starts]

    def row(self, sample: int) -> Rows:
        """Ids of one sample [max_length]."""
        row = np.empty(self.order.max_length, np.int64)
        filled = 0
        for document, start, length in self.order.row_documents(sample):
            row[filled : filled + length] = self.dataset.tokens(document, start, length)
            filled += length
        return row

    def batch(self, step: int) -> list[Rows]:
        """The micro-batches of a step for this rank, each [batch_size, max_length]."""
        return [np.stack([self.row(sample) for sample in part]) for part in self.samples(step)]

    def steps(self, start: int, stop: int) -> Iterator[list[Rows]]:
        """Batches of the steps start..stop-1; a thread builds the next while one is in use."""
        if start >= stop:
            return
        with ThreadPoolExecutor(1, thread_name_prefix="batches") as pool:
            following = pool.submit(self.batch, start)
            for step in range(start, stop):
                asked = time.perf_counter()
                batch = following.result()
                self.data_wait = time.perf_counter() - asked
                if step + 1 < stop:
                    following = pool.submit(self.batch, step + 1)
                yield batch

    def batch_hash(self, step: int) -> str:
        """sha256 of the sample numbers and ids of the whole global batch: equal on every rank."""
        first = self.first_sample + step * self.global_batch
        digest = hashlib.sha256()
        for sample in range(first, first + self.global_batch):
            digest.update(sample.to_bytes(8, "little"))
            digest.update(self.row(sample).astype("<i8").tobytes())
        return digest.hexdigest()


def rows_hash(micro_batches: list[Rows]) -> str:
    """sha256 of the ids of one rank's step: ranks of one model replica compare it."""
    digest = hashlib.sha256()
    for rows in micro_batches:
        digest.update(rows.astype("<i8").tobytes())
    return digest.hexdigest()
