"""Following metrics.jsonl while a run writes it: the records of whole lines, as they come.

`recorder` writes the file, and `metrics` reads one that is finished.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from coordinator.records.metrics import parse_record

_MOST_BYTES = 8 << 20  # read at once, so that a long file does not fill the memory


class Follower:
    """Reads a run's metrics file from where it last stopped. The file need not exist yet.

    A line counts once it is whole. Where the file was replaced or cut short, as a resumed run does with a torn last
    line, reading goes on at the new end.
    """

    def __init__(self, path: Path, *, from_end: bool = False) -> None:
        """With `from_end`, the whole lines that are there now are skipped."""
        self._path = path
        self._offset_bytes = 0
        self._number = 0
        self._identity: tuple[int, int] | None = None
        if from_end and path.is_file():
            content = path.read_bytes()
            self._offset_bytes = content.rfind(b"\n") + 1
            self._number = content.count(b"\n")
            self._identity = self._identify(path.stat())

    def read(self) -> list[dict[str, Any]]:
        """The records that have been completed since the last call; at most some megabytes of them at once.

        Raises `ConfigError` where a line is no record.
        """
        try:
            with self._path.open("rb") as file:
                status = os.fstat(file.fileno())
                identity = self._identify(status)
                if self._identity not in (None, identity):
                    self._offset_bytes = self._number = 0
                self._identity = identity
                self._offset_bytes = min(self._offset_bytes, status.st_size)
                file.seek(self._offset_bytes)
                block = file.read(_MOST_BYTES)
                while block and b"\n" not in block and (more := file.read(_MOST_BYTES)):
                    block += more
        except FileNotFoundError:
            return []
        whole = block[: block.rfind(b"\n") + 1]
        self._offset_bytes += len(whole)
        records = []
        for line in whole.split(b"\n")[:-1]:
            self._number += 1
            records.append(parse_record(self._path, self._number, line))
        return records

    @staticmethod
    def _identify(status: os.stat_result) -> tuple[int, int]:
        return status.st_dev, status.st_ino
