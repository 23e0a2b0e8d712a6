"""Find texts that came before, by hash, with flat memory: buckets on disk, one at a time.

Invariant: of equal hashes the one with the lowest number stays, whatever the number of buckets.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

# 32 bytes each while sorted, so some 16 MB at a time. Chosen.
_BUCKET_DOCUMENTS = 1 << 19
_MOST_BUCKETS = 1 << 12
_RECORD = np.dtype([("high", "<u8"), ("low", "<u8"), ("number", "<u8")])


def words(hashes: npt.NDArray[np.bytes_]) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
    """The first and the last 8 bytes of hashes [n] of 16 bytes, as numbers."""
    pairs = np.ascontiguousarray(hashes).view(">u8").reshape(-1, 2).astype(np.uint64)
    return pairs[:, 0], pairs[:, 1]


class Duplicates:
    """Collects the hashes of numbered documents; `numbers` are those that came before."""

    def __init__(self, folder: Path, documents: int) -> None:
        buckets = -(-documents // _BUCKET_DOCUMENTS)
        self._bits = min(max(buckets - 1, 0).bit_length(), _MOST_BUCKETS.bit_length() - 1)
        self._folder = folder
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)

    def add(self, hashes: npt.NDArray[np.bytes_], numbers: npt.NDArray[np.integer]) -> None:
        """Documents in ascending order of their numbers, after all that were added before."""
        records = np.empty(len(hashes), _RECORD)
        records["high"], records["low"] = words(hashes)
        records["number"] = numbers
        if not self._bits or not len(records):
            self._append(0, records)
            return
        bucket = records["high"] >> np.uint64(64 - self._bits)
        order = np.argsort(bucket, kind="stable")
        found, starts = np.unique(bucket[order], return_index=True)
        for number, part in zip(found, np.split(records[order], starts[1:]), strict=True):
            self._append(int(number), part)

    def numbers(self) -> Iterator[npt.NDArray[np.uint64]]:
        """Numbers of the documents to leave out, bucket by bucket."""
        for path in sorted(self._folder.iterdir()):
            records = np.fromfile(path, _RECORD)
            # Stable, and a bucket is in ascending order: the first of equals stays first.
            order = np.lexsort((records["low"], records["high"]))
            records = records[order]
            repeated = np.zeros(len(records), bool)
            repeated[1:] = (records["high"][1:] == records["high"][:-1]) & (
                records["low"][1:] == records["low"][:-1]
            )
            yield np.sort(records["number"][repeated])

    def _append(self, bucket: int, records: npt.NDArray[np.void]) -> None:
        if len(records):
            with (self._folder / f"{bucket:04d}").open("ab") as file:
                # Not tofile, whose error does not say that the disk is full.
                file.write(records.view(np.uint8).data)

    def __enter__(self) -> "Duplicates":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)
