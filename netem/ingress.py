"""The receiving NIC, in scope `nic`: what all senders share on the way in. Arithmetic, no I/O, no clock.

Start-time fair queueing (Goyal, Vin and Cheng, 1996) over senders: whoever has been served least is served next, so
senders that have more for this node than their share get equal shares, and one that has less gets all it wants:
max-min fairness, segment by segment. Nothing is acknowledged before it is through, so credit pushes back on the
senders and bounds what waits here: a window of each.

Virtual cut-through: a segment has been trickling in while it was serialised at its sender, so it may be served from
that long before its arrival on, and an uncontended transfer is not delayed twice.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from typing import Generic, NamedTuple, TypeVar

from netem.bucket import TokenBucket

_TOLERANCE_S = 0.001  # a receiver that wakes late sees arrivals bunched; so much of it is not held against them

T = TypeVar("T")


class _Waiting(NamedTuple, Generic[T]):
    item: T
    nbytes: int
    arrival: float
    ready: float


class Ingress(Generic[T]):
    """Items of type `T` on their way through one NIC. `rate_bps=None` is unlimited."""

    def __init__(self, rate_bps: float | None) -> None:
        self._bucket = TokenBucket(rate_bps, _tolerance_bytes(rate_bps))
        self._queues: dict[str, deque[_Waiting[T]]] = {}  # of those that have something waiting
        self._served: dict[str, float] = {}  # virtual time, in bytes: where each sender's next segment starts
        self._virtual = 0.0
        self._leaving: deque[tuple[float, T]] = deque()

    def push(self, sender: str, item: T, nbytes: int, arrival: float) -> None:
        """Something of `nbytes` on the wire has arrived: not before anything that was pushed earlier."""
        if sender not in self._queues:
            self._queues[sender] = deque()
            self._served[sender] = max(self._virtual, self._served.get(sender, 0.0))  # idle time earns nothing
        self._queues[sender].append(_Waiting(item, nbytes, arrival, arrival - self._bucket.duration(nbytes)))

    def poll(self, now: float) -> Iterator[T]:
        """What is through by `now`, in order."""
        while self._queues and (start := self._next_start()) <= now:
            self._serve(start)
        while self._leaving and self._leaving[0][0] <= now:
            yield self._leaving.popleft()[1]

    def next_time(self) -> float:
        """When `poll` has something to do next."""
        at = self._leaving[0][0] if self._leaving else math.inf
        return min(at, self._next_start()) if self._queues else at

    def reshape(self, rate_bps: float | None, now: float) -> None:
        """From `now` on, another rate; what is halfway through goes on at that."""
        before_bps = self._bucket.rate_bps
        self._bucket.reshape(rate_bps, _tolerance_bytes(rate_bps), now)
        if before_bps is None:
            return
        last = now
        for place, (through, item) in enumerate(self._leaving):
            if through > now:
                rest_bytes = (through - last) * before_bps / 8
                last = through
                self._leaving[place] = (self._bucket.reserve(rest_bytes, now), item)

    def _next_start(self) -> float:
        """When the next segment's turn begins."""
        return max(self._bucket.free_at, min(queue[0].ready for queue in self._queues.values()))

    def _serve(self, start: float) -> None:
        there = [sender for sender, queue in self._queues.items() if queue[0].ready <= start]
        sender = min(there, key=self._served.__getitem__)
        entry = self._queues[sender].popleft()
        self._virtual = self._served[sender]
        self._served[sender] += entry.nbytes
        if not self._queues[sender]:
            del self._queues[sender]
            self._forget_even()
        through = max(self._bucket.reserve(entry.nbytes, entry.ready), entry.arrival)
        if self._leaving:
            through = max(through, self._leaving[-1][0])
        self._leaving.append((through, entry.item))

    def _forget_even(self) -> None:
        """Senders that are idle and not ahead of the others need no memory."""
        for sender, served in list(self._served.items()):
            if sender not in self._queues and (not self._queues or served <= self._virtual):
                del self._served[sender]


def _tolerance_bytes(rate_bps: float | None) -> int:
    return 0 if rate_bps is None else round(rate_bps / 8 * _TOLERANCE_S)
