"""Token files in the Megatron indexed-dataset format: `<name>.bin` (ids) and `<name>.idx` (index).

Invariant: opening is memory-mapped and costs the same for any size; writing needs flat memory. We
write one sequence per document, so the document index is 0..documents inclusive, which
megatron-core asserts; files of others may have several, and each of them is a document to us.
"""

import hashlib
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import IO

import numpy as np
import numpy.typing as npt

from llama_lib.errors import RunError

_MAGIC = b"MMIDIDX\x00\x00"
_VERSION = 1
# magic, version, dtype code, number of sequences, number of document borders
_HEADER = struct.Struct("<9sQBQQ")
# All integers of megatron-core's own table; we write uint16 and int32.
_DTYPE_CODES: dict[np.dtype, int] = {
    np.dtype(kind): code
    for kind, code in (
        (np.uint8, 1),
        (np.int8, 2),
        (np.int16, 3),
        (np.int32, 4),
        (np.int64, 5),
        (np.uint16, 8),
    )
}
_CHUNK = 1 << 20


def token_dtype(vocab_size: int) -> np.dtype:
    """uint16 below 65,500 ids, else int32: the rule of Megatron's own preprocessing."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


class IndexedWriter:
    """Append documents to `<prefix>.bin`; `close` writes `<prefix>.idx` and syncs both.

    The sizes wait in `<prefix>.sizes` meanwhile, so memory does not grow with the documents.
    """

    def __init__(self, prefix: Path, dtype: npt.DTypeLike) -> None:
        self.prefix = prefix
        self.dtype = np.dtype(dtype)
        self.documents = 0
        self.tokens = 0
        self._hash = hashlib.sha256()
        self._bin = Path(f"{prefix}.bin").open("wb")  # noqa: SIM115 - closed by close()
        self._sizes_path = Path(f"{prefix}.sizes")
        self._sizes = self._sizes_path.open("wb")

    def write(self, ids: npt.NDArray[np.integer], lengths: npt.NDArray[np.integer]) -> None:
        """Append len(lengths) documents whose ids stand one after another in `ids`."""
        if len(ids) != int(lengths.sum()):
            raise ValueError(f"{len(ids)} ids for documents of {int(lengths.sum())}")
        if len(lengths) and int(lengths.max()) >= 1 << 31:
            raise RunError("a document has 2^31 tokens or more, which the format cannot hold")
        content = np.ascontiguousarray(ids, dtype=self.dtype).data
        self._bin.write(content)
        self._hash.update(content)
        self._sizes.write(lengths.astype("<i4").tobytes())
        self.documents += len(lengths)
        self.tokens += len(ids)

    def sha256(self) -> str:
        """Hash of the ids written so far, as they stand in the file."""
        return self._hash.hexdigest()

    def close(self) -> None:
        """Write the index; the files are on the disk when this returns."""
        _sync_and_close(self._bin)
        self._sizes.close()
        with open(f"{self.prefix}.idx", "wb") as index:
            code = _DTYPE_CODES[self.dtype]
            index.write(_HEADER.pack(_MAGIC, _VERSION, code, self.documents, self.documents + 1))
            for sizes in self._size_chunks():
                index.write(sizes.tobytes())
            offset = 0
            for sizes in self._size_chunks():
                ends = offset + np.cumsum(sizes, dtype="<i8") * self.dtype.itemsize
                index.write((ends - sizes * np.int64(self.dtype.itemsize)).tobytes())
                offset = int(ends[-1])
            for first in range(0, self.documents + 1, _CHUNK):
                last = min(first + _CHUNK, self.documents + 1)
                index.write(np.arange(first, last, dtype="<i8").tobytes())
            _sync_and_close(index)
        self._sizes_path.unlink()

    def _size_chunks(self) -> Iterator[npt.NDArray[np.int32]]:
        with self._sizes_path.open("rb") as file:
            while chunk := file.read(4 * _CHUNK):
                yield np.frombuffer(chunk, dtype="<i4")

    def __enter__(self) -> "IndexedWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._bin.close()
            self._sizes.close()


class IndexedReader:
    """`<prefix>.bin` and `.idx`, memory-mapped.

    `lengths` int32 [documents] counts tokens, `offsets` int64 [documents] counts tokens from the
    start of the file, `ids` is the whole file as one flat array.
    """

    def __init__(self, prefix: Path) -> None:
        bin_path, index_path = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
        for path in (bin_path, index_path):
            if not path.is_file():
                raise RunError(f"{path} is missing: prepare the data again.")
        self.prefix = prefix
        with index_path.open("rb") as file:
            header = file.read(_HEADER.size)
        if len(header) < _HEADER.size or header[: len(_MAGIC)] != _MAGIC:
            raise RunError(f"{index_path} is no Megatron index: prepare the data again.")
        _, version, code, documents, borders = _HEADER.unpack(header)
        dtypes = {value: key for key, value in _DTYPE_CODES.items()}
        size = _HEADER.size + 12 * documents + 8 * borders
        if version != _VERSION or code not in dtypes or index_path.stat().st_size != size:
            raise RunError(f"{index_path} is damaged: prepare the data again.")
        self.dtype = dtypes[code]
        count = bin_path.stat().st_size // self.dtype.itemsize
        self.ids: npt.NDArray[np.integer] = _mapped(bin_path, self.dtype, 0, count)
        self.lengths = _mapped(index_path, np.dtype("<i4"), _HEADER.size, documents)
        self._byte_offsets = _mapped(
            index_path, np.dtype("<i8"), _HEADER.size + 4 * documents, documents
        )
        end = self.offset(documents - 1) + int(self.lengths[-1]) if documents else 0
        if end != len(self.ids):
            raise RunError(
                f"{bin_path} is damaged: {len(self.ids)} tokens, the index expects {end}. "
                "Prepare the data again."
            )

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def num_tokens(self) -> int:
        return len(self.ids)

    def chunks(self, size: int) -> Iterator[npt.NDArray[np.integer]]:
        """All ids in order, `size` at a time."""
        for first in range(0, len(self.ids), size):
            yield self.ids[first : first + size]

    def number_in_file(self, document: int) -> int:
        """All documents of the file are here, so their numbers are its own."""
        return document

    def offset(self, document: int) -> int:
        """Position of the document's first token in `ids`."""
        return int(self._byte_offsets[document]) // self.dtype.itemsize

    def tokens(
        self, document: int, start: int = 0, count: int | None = None
    ) -> npt.NDArray[np.integer]:
        """Ids start..start+count of a document, a view on the file."""
        length = int(self.lengths[document])
        count = length - start if count is None else count
        if not 0 <= start <= start + count <= length:
            raise IndexError(f"ids {start}..{start + count} of a document of {length}")
        first = self.offset(document) + start
        return self.ids[first : first + count]


def _mapped(path: Path, dtype: np.dtype, offset: int, count: int) -> npt.NDArray[np.integer]:
    if not count:
        return np.empty(0, dtype)
    return np.asarray(np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=(count,)))


def _sync_and_close(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()
