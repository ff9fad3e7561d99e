"""A file to which whole lines are appended, also where the disk is full for a while. One writer.

Lines that find no room wait in memory, in order, and are written as soon as there is room. So a full disk stops
nothing; what it costs is said by whoever asks for `waiting` and `lost`.
"""

from __future__ import annotations

import errno
import os
from collections import deque
from contextlib import suppress
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT)
"""Errors after which a disk may take more later."""
MOST_WAITING = 2000
"""Lines that wait in memory at the most; the oldest make room."""


class LineFile:
    """Appends to `path`, which is made with the first line, or by `open`. Raises `OSError`, which names the folder,
    where the disk fails other than by being full."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = -1
        self._size = 0
        self._waiting: deque[bytes] = deque()
        self.lost = 0
        """Lines that were given up because too many waited."""

    @property
    def waiting(self) -> int:
        """How many lines wait for room."""
        return len(self._waiting)

    def open(self) -> None:
        """Open the file, unless it is open."""
        if self._file < 0:
            self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            self._size = os.fstat(self._file).st_size

    def fileno(self) -> int:
        """The descriptor of the open file."""
        return self._file

    def add(self, line: str) -> None:
        """Write a line, after those that wait, or let it wait too."""
        self._waiting.append(line.encode() + b"\n")
        while len(self._waiting) > MOST_WAITING:
            self._waiting.popleft()
            self.lost += 1
        self.flush()

    def flush(self) -> None:
        """Write the lines that wait, as far as there is room."""
        try:
            if self._waiting:
                self.open()
            while self._waiting:
                self._write(self._waiting[0])
                self._waiting.popleft()
        except OSError as error:
            if error.errno not in FULL:  # one of a write names no file
                raise OSError(error.errno, error.strerror, str(self._path.parent)) from None

    def close(self) -> None:
        """Close the file; lines that still wait are lost. May be called twice."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _write(self, line: bytes) -> None:
        """The whole line, or nothing of it."""
        written = 0
        try:
            while written < len(line):
                written += os.write(self._file, line[written:])
        except OSError:
            if written:
                with suppress(OSError):
                    os.ftruncate(self._file, self._size)
            raise
        self._size += written
