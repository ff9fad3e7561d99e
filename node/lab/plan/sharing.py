"""A line that several queues of messages share equally, as an emulated NIC or link serves its flows in turns.

Rates are fluid. Virtual time is the bytes that each busy queue has been served, so that a message leaves when virtual
time has come to where it was when the message became the first of its queue, plus its bytes.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Hashable
from typing import Generic, NamedTuple, TypeVar

import numpy as np

T = TypeVar("T")


class Left(NamedTuple, Generic[T]):
    """A message that has left, the queue in which it was, and when it began to leave."""

    message: T
    queue: Hashable
    begin_s: float


class SharedLine(Generic[T]):
    """Queues that share one rate equally; each keeps its messages in order."""

    def __init__(self, rate_bps: float, free_s: float = 0.0) -> None:
        self._bytes_per_s = rate_bps / 8
        self._queues: dict[Hashable, deque[tuple[float, T]]] = {}
        self._heads: list[tuple[float, int, float, Hashable]] = []  # (virtual end, order, begin, queue) of each
        self._virtual = 0.0
        self._now = free_s
        self._order = 0

    @property
    def busy(self) -> int:
        """The number of queues that are served now."""
        return len(self._heads)

    @property
    def now_s(self) -> float:
        """When the last message came or left."""
        return self._now

    def add(self, queue: Hashable, message: T, nbytes: float, now: float) -> bool:
        """The message is ready at `now`; times rise from call to call. Returns whether it is served at once."""
        waiting = self._queues.setdefault(queue, deque())
        waiting.append((nbytes, message))
        if len(waiting) > 1:
            return False
        self._advance(max(now, self._now))
        self._begin(queue, self._virtual + nbytes)
        return True

    def next_s(self) -> float:
        """When the next message has left; infinite where none waits."""
        if not self._heads:
            return np.inf
        left_bytes = max(0.0, self._heads[0][0] - self._virtual) * len(self._heads)
        return self._now + left_bytes / self._bytes_per_s

    def pop(self) -> Left[T]:
        """The message that leaves at `next_s`."""
        self._advance(self.next_s())
        end, _, begin_s, queue = heapq.heappop(self._heads)
        waiting = self._queues[queue]
        _, message = waiting.popleft()
        if waiting:
            self._begin(queue, end + waiting[0][0])
        return Left(message, queue, begin_s)

    def _begin(self, queue: Hashable, virtual_end: float) -> None:
        self._order += 1
        heapq.heappush(self._heads, (virtual_end, self._order, self._now, queue))

    def _advance(self, now: float) -> None:
        if self._heads and np.isfinite(self._bytes_per_s):
            self._virtual += (now - self._now) * self._bytes_per_s / len(self._heads)
        self._now = now
