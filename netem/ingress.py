"""The receiving NIC in scope `nic`, which all senders to a node share. Arithmetic, no I/O, no clock.

Start-time fair queueing (Goyal, Vin and Cheng, 1996) over senders: the sender that has been served least is served
next. Senders that have more for this node than their share get equal shares, and a sender that has less gets all that
it asks for: max-min fairness, segment by segment. A segment is acknowledged only after it has passed, so credit slows
the senders down and bounds the waiting bytes to one window per sender; `netem.engine` drops the frames of a sender that
ignores its credit.

Virtual cut-through: a segment's bytes come in while its sender serialises them, so its service may begin that long
before its arrival, and a transfer that has the NIC for itself is not delayed twice.

The arrival is the one that the sender's shaper computed (`SenderClock`), not the time at which this host read the
frame. A frame that is read late, because the process waited for a core, is served as if it had been read in time.
Otherwise the NIC would lose each such wait, and a full line would fall behind by the longest of them.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator
from typing import Generic, NamedTuple, TypeVar

from netem.bucket import TokenBucket

_LEAST_IDLE_S = 0.0001  # shorter pauses are not recorded
_MOST_IDLE = 64  # how many pauses are recorded; the oldest are forgotten first
_WINDOW_S = 5.0  # clocks of two machines drift apart, by half a millisecond per second at most (NTP's slew)
_MOST_LATE_S = 1.0  # the latest that a host may read a frame; a stamp that says more is wrong, or its clock was reset

T = TypeVar("T")


class SenderClock:
    """When the frames of one sender were due, by this host's clock. The least delay seen lately is that of the wire."""

    __slots__ = ("_before_s", "_least_s", "_since")

    def __init__(self) -> None:
        self._least_s = self._before_s = math.inf  # least delay in the window before, and in this one
        self._since = -math.inf

    def arrival(self, stamp_s: float, now: float) -> float:
        """When a frame with this stamp, read `now`, was due: never after `now`, and at most 1 s before it."""
        if now - self._since >= _WINDOW_S:
            self._before_s = self._least_s if now - self._since < 2 * _WINDOW_S else math.inf
            self._least_s, self._since = math.inf, now
        self._least_s = min(self._least_s, now - stamp_s)
        due = stamp_s + min(self._least_s, self._before_s)
        return max(now - _MOST_LATE_S, min(now, due))  # `min` again: rounding may have made it later


class _Waiting(NamedTuple, Generic[T]):
    item: T
    nbytes: int
    arrival: float
    ready: float


class Ingress(Generic[T]):
    """Items of type `T` that pass one NIC. `rate_bps=None` is unlimited."""

    def __init__(self, rate_bps: float | None) -> None:
        self._bucket = TokenBucket(rate_bps)
        self._idle: list[tuple[float, float]] = []  # the bucket's latest pauses, in order
        self._queues: dict[str, deque[_Waiting[T]]] = {}  # by sender; only senders with waiting items
        self._waiting_bytes: dict[str, int] = {}  # the same senders
        self._served: dict[str, float] = {}  # virtual time, in bytes: where each sender's next segment starts
        self._virtual = 0.0
        self._leaving: deque[tuple[float, T]] = deque()

    def push(self, sender: str, item: T, nbytes: int, arrival: float) -> None:
        """An item of `nbytes` on the wire has arrived. The items of one sender stay in order."""
        if sender not in self._queues:
            self._queues[sender] = deque()
            self._served[sender] = max(self._virtual, self._served.get(sender, 0.0))  # idle time earns nothing
        self._waiting_bytes[sender] = self.waiting_bytes(sender) + nbytes
        self._queues[sender].append(_Waiting(item, nbytes, arrival, arrival - self._bucket.duration(nbytes)))

    def waiting_bytes(self, sender: str) -> int:
        """Bytes of this sender that have not been served."""
        return self._waiting_bytes.get(sender, 0)

    def move(self, sender: str, to: str, mine: Callable[[T], bool]) -> None:
        """From now on those waiting items of `sender` that are `mine` wait as items of `to`, which has none yet."""
        entries = [entry for entry in self._queues.get(sender, ()) if mine(entry.item)]
        if not entries:
            return
        kept = deque(entry for entry in self._queues.pop(sender) if not mine(entry.item))
        self._waiting_bytes[sender] -= sum(entry.nbytes for entry in entries)
        if kept:
            self._queues[sender] = kept
        else:
            del self._waiting_bytes[sender]
        self._queues[to] = deque(entries)
        self._served[to] = max(self._virtual, self._served.get(to, 0.0))
        self._waiting_bytes[to] = sum(entry.nbytes for entry in entries)

    def poll(self, now: float) -> Iterator[T]:
        """The items that have passed by `now`, in order."""
        while self._queues and (start := self._next_start()) <= now:
            self._serve(start)
        while self._leaving and self._leaving[0][0] <= now:
            yield self._leaving.popleft()[1]

    def next_time(self) -> float:
        """When `poll` is to be called next; infinite if nothing waits."""
        at = self._leaving[0][0] if self._leaving else math.inf
        return min(at, self._next_start()) if self._queues else at

    def reshape(self, rate_bps: float | None, now: float) -> None:
        """Take another rate from `now` on; items that have partly passed continue at that rate."""
        before_bps = self._bucket.rate_bps
        self._bucket.reshape(rate_bps, 0, now)
        self._idle.clear()
        if before_bps is None:
            return
        last = now
        for place, (through, item) in enumerate(self._leaving):
            if through > now:
                rest_bytes = (through - last) * before_bps / 8
                last = through
                self._leaving[place] = (self._bucket.reserve(rest_bytes, now), item)

    def _next_start(self) -> float:
        """When the service of the next item begins."""
        return max(self._bucket.free_at, min(queue[0].ready for queue in self._queues.values()))

    def _serve(self, start: float) -> None:
        there = [sender for sender, queue in self._queues.items() if queue[0].ready <= start]
        sender = min(there, key=self._served.__getitem__)
        entry = self._queues[sender].popleft()
        self._virtual = self._served[sender]
        self._served[sender] += entry.nbytes
        self._waiting_bytes[sender] -= entry.nbytes
        if not self._queues[sender]:
            del self._queues[sender], self._waiting_bytes[sender]
            self._forget_even()
        through = max(self._bucket.reserve(entry.nbytes - self._made_up_bytes(entry), entry.ready), entry.arrival)
        if self._leaving:
            through = max(through, self._leaving[-1][0])
        self._leaving.append((through, entry.item))

    def _made_up_bytes(self, entry: _Waiting[T]) -> float:
        """How many of its bytes would have passed in recorded pauses, had this host read it in time."""
        free_at, rate_bps = self._bucket.free_at, self._bucket.rate_bps
        if rate_bps is None:
            return 0.0
        if entry.ready >= free_at:
            if entry.ready - free_at >= _LEAST_IDLE_S:
                self._idle.append((free_at, entry.ready))
                del self._idle[:-_MOST_IDLE]
            return 0.0
        missing_s = self._bucket.duration(entry.nbytes)
        place = bisect_right(self._idle, entry.ready, key=_end)  # earlier pauses ended before it was ready
        while missing_s > 0 and place < len(self._idle):
            begin, end = self._idle[place]
            start = max(begin, entry.ready)
            stop = min(start + missing_s, end)
            missing_s -= stop - start
            left = [(one, other) for one, other in ((begin, start), (stop, end)) if other - one >= _LEAST_IDLE_S]
            self._idle[place : place + 1] = left
            place += len(left)
        del self._idle[:-_MOST_IDLE]
        return entry.nbytes - missing_s * rate_bps / 8

    def _forget_even(self) -> None:
        """Forget senders that are idle and have had no more than the others."""
        for sender, served in list(self._served.items()):
            if sender not in self._queues and (not self._queues or served <= self._virtual):
                del self._served[sender]


def _end(pause: tuple[float, float]) -> float:
    return pause[1]
