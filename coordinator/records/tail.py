"""The last records of a run, kept in memory for those who watch it from elsewhere (`coordinator.operator`)."""

from __future__ import annotations

import json
import threading
from collections import deque
from collections.abc import Mapping
from typing import Any

MOST_LINES = 200
MOST_BYTES = 700_000
"""Of all lines that are kept, and so of an answer: a control message holds 1 MiB."""


class Tail:
    """Lines of metrics.jsonl, numbered from 1 on in the order in which they came. May be used from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lines: deque[str] = deque()
        self._bytes = 0
        self._count = 0

    def add(self, record: Mapping[str, Any]) -> None:
        """Keep a record. One that is too long for a message is kept without the figures of its nodes."""
        line = json.dumps(record, allow_nan=False)
        if len(line) > MOST_BYTES:
            line = json.dumps({**record, "nodes": {}}, allow_nan=False)
        with self._lock:
            self._count += 1
            self._lines.append(line)
            self._bytes += len(line)
            while len(self._lines) > MOST_LINES or self._bytes > MOST_BYTES:
                self._bytes -= len(self._lines.popleft())

    def after(self, number: int) -> tuple[list[str], int]:
        """The lines after that number, as far as they are kept, and the number of the last one.

        A number that has not come yet is that of an earlier coordinator of this run: then all lines are given.
        """
        with self._lock:
            first = self._count - len(self._lines)
            skip = max(0, number - first) if number <= self._count else 0
            return list(self._lines)[skip:], self._count
