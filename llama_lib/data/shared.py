"""Arrays that one process of a host computes and all processes of the host map.

Invariant: a folder of arrays is complete or absent, so a killed process leaves nothing to trip
over; the arrays are read by memory map, so they take the memory of one copy however many read them.
"""

import contextlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from llama_lib.data.once import once
from llama_lib.errors import UserError

# Arrays with more entries than this (16 MiB of numbers) are shared; smaller ones each process
# computes in less time than sharing takes.
LARGE = 1 << 22

Arrays = dict[str, npt.NDArray[np.integer]]


def is_large(count: int) -> bool:
    return count > LARGE


class SharedArrays:
    """Sets of arrays in `<cache_dir>/packing/<key>/<name>/`; equal keys mean equal arrays."""

    def __init__(self, cache_dir: str | Path, key: str) -> None:
        self.cache_dir = Path(cache_dir).expanduser()
        self.folder = self.cache_dir / "packing" / key

    def load(self, name: str, build: Callable[[Path], None]) -> Arrays:
        """The arrays `build` writes into the folder it is given (see `create`), each by its name.

        The first process that asks builds them, others wait for it.
        """
        folder = self.folder / name
        while True:
            if not folder.is_dir():
                self._build_once(folder, build)
            try:
                arrays = {path.stem: _mapped(path) for path in folder.glob("*.npy")}
            except FileNotFoundError:
                continue
            if arrays:
                return arrays
            # Another run with the same data, in a later epoch, has removed them just now.

    def _build_once(self, folder: Path, build: Callable[[Path], None]) -> None:
        try:
            with once(self.cache_dir, str(folder), f"the data order in {folder}"):
                if not folder.is_dir():
                    self._build(folder, build)
        except OSError as error:
            raise UserError(
                f"the order of the data cannot be written to --cache_dir {self.cache_dir} "
                f"({error.strerror}); choose a folder with more room, that can be written to."
            ) from error

    def _build(self, folder: Path, build: Callable[[Path], None]) -> None:
        work = folder.with_name(f"{folder.name}.work-{os.uname().nodename}")
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        try:
            build(work)
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise
        for path in work.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        try:
            work.rename(folder)
        except OSError:
            # Another host with the same cache was faster: its arrays are the same.
            if not folder.is_dir():
                raise
            shutil.rmtree(work)

    def forget(self, name: str) -> None:
        """Remove arrays nobody needs any more; a process that still has them mapped keeps them."""
        gone = self.folder / f"{name}.gone-{os.uname().nodename}-{os.getpid()}"
        with contextlib.suppress(FileNotFoundError):
            (self.folder / name).rename(gone)
        shutil.rmtree(gone, ignore_errors=True)


def _mapped(path: Path) -> npt.NDArray[np.integer]:
    # A memmap object pays for its subclass at every slice; the view keeps the mapping alive.
    return np.asarray(np.load(path, mmap_mode="r"))


def create(folder: Path, name: str, dtype: npt.DTypeLike, count: int) -> npt.NDArray[np.integer]:
    """A new array in the folder, to be filled in place."""
    path = folder / f"{name}.npy"
    array = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=(count,))
    with path.open("r+b") as file:
        # A full disk is an error here; met while writing to the mapping it kills the process.
        os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return np.asarray(array)
