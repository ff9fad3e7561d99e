"""Compressed files, opened as streams of bytes: gzip, xz, bzip2 and Zstandard, chosen by the ending of the name."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from pathlib import Path
from typing import IO, TYPE_CHECKING

import zstandard

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

PACKED_SUFFIXES = (".gz", ".xz", ".zst", ".bz2")
DAMAGE = (lzma.LZMAError, zlib.error, zstandard.ZstdError, gzip.BadGzipFile, EOFError)
"""What reading a damaged or shortened file raises; bzip2 raises a plain `OSError` too."""

_READ_BYTES = 1 << 17
# The widest window that `zstd --long=31` writes; the library alone refuses more than 128 MiB.
_MOST_WINDOW_BYTES = 1 << 31


def plain_suffixes(path: Path) -> tuple[str, bool]:
    """The ending that tells the kind of content, in lower case, and whether a packed file's ending follows it."""
    last = path.suffix.lower()
    return (Path(path.stem).suffix.lower(), True) if last in PACKED_SUFFIXES else (last, False)


def open_packed(path: Path) -> IO[bytes] | gzip.GzipFile:
    """The bytes of `path`, unpacked as they are read. Reading raises `OSError`, or one of `DAMAGE`."""
    match path.suffix.lower():
        case ".gz":
            return gzip.open(path, "rb")
        case ".xz":
            return lzma.open(path, "rb")
        case ".bz2":
            return bz2.open(path, "rb")
        case ".zst":
            return io.BufferedReader(_ZstdFile(path), _READ_BYTES)
    return path.open("rb")


class _ZstdFile(io.RawIOBase):
    """All frames of a Zstandard file, in order. The library's own reader does not notice a file that is cut short."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")
        self._library = zstandard.ZstdDecompressor(max_window_size=_MOST_WINDOW_BYTES)
        self._frame: zstandard.ZstdDecompressionObj | None = None
        self._packed = b""
        self._unpacked = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        """Fill `buffer` with unpacked bytes and return how many; 0 at the end of the file."""
        while not self._unpacked and self._unpack():
            pass
        target = memoryview(buffer).cast("B")
        count = min(len(target), len(self._unpacked))
        target[:count] = self._unpacked[:count]
        self._unpacked = self._unpacked[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()

    def _unpack(self) -> bool:
        """Unpack a block of the file; False at its end."""
        self._packed = self._packed or self._file.read(_READ_BYTES)
        if not self._packed:
            if self._frame is not None:
                raise EOFError("the last Zstandard frame has no end")
            return False
        if self._frame is None:
            self._frame = self._library.decompressobj()
        self._unpacked = memoryview(self._frame.decompress(self._packed))
        self._packed = b""
        if self._frame.eof:
            self._packed, self._frame = self._frame.unused_data, None
        return True
