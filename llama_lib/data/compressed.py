"""Open .gz and .zst files as streams of bytes.

Invariant: damaged or cut data is an OSError or EOFError, never a shorter file.
"""

import gzip
import io
from pathlib import Path
from typing import IO, Any

_BUFFER_BYTES = 1 << 18
# What is decompressed at once; text shrinks to about a fifth. Chosen.
_INPUT_BYTES = 1 << 16
# `zstd --long=31`, which large dumps are made with, looks back this far.
_LARGEST_WINDOW = 1 << 31


def decompressed(path: Path, raw: IO[bytes]) -> Any:
    """The content of an open file; the file itself if its name says that it is plain."""
    name = path.name.lower()
    if name.endswith(".gz"):
        return io.BufferedReader(gzip.GzipFile(fileobj=raw), _BUFFER_BYTES)
    if name.endswith(".zst"):
        return io.BufferedReader(_Zstandard(raw), _BUFFER_BYTES)
    return raw


class _Zstandard(io.RawIOBase):
    """The frames of a file, one after another.

    The library's own stream takes the end of the file for the end of the last frame.
    """

    def __init__(self, raw: IO[bytes]) -> None:
        import zstandard

        self._raw = raw
        self._error = zstandard.ZstdError
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=_LARGEST_WINDOW)
        self._frame: Any = None
        self._input = b""
        self._output = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._output:
            self._input = self._input or self._raw.read(_INPUT_BYTES)
            if not self._input:
                if self._frame is not None:
                    raise EOFError("the file ends within a zstandard frame")
                return 0
            self._decompress()
        length = min(len(buffer), len(self._output))
        buffer[:length] = self._output[:length]
        self._output = self._output[length:]
        return length

    def _decompress(self) -> None:
        if self._frame is None:
            self._frame = self._decompressor.decompressobj()
        try:
            self._output = memoryview(self._frame.decompress(self._input))
        except self._error as error:
            raise OSError(f"damaged zstandard data: {error}") from error
        self._input = b""
        if self._frame.eof:
            self._input = self._frame.unused_data
            self._frame = None
