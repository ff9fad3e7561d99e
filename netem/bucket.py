"""The token bucket as arithmetic on time: `reserve(nbytes, ready) -> departure`.

This is the virtual-scheduling form (GCRA, ITU-T I.371): one number stands for the bucket's level, the time at which
everything reserved so far will have been sent at the exact rate. Deadlines are absolute, so a caller that comes late
loses nothing: it passes the time at which its bytes were ready, not the time at which it woke up. Idle time earns no
credit beyond the burst. There is no clock in here; `netem.shaper` decides which segment reserves, and when.
"""

from __future__ import annotations

from collections.abc import Iterable


class TokenBucket:
    """One rate limit: a link, or one direction of a NIC. `rate_bps=None` is unshaped.

    Between two departures d1 ≤ d2, the bytes that depart after d1 and up to d2 are at most
    ``rate · (d2 - d1) + burst``. With a burst of 0 a departure is the end of the segment's serialisation.
    """

    __slots__ = ("_burst_s", "_busy_until", "_seconds_per_byte", "rate_bps")

    def __init__(self, rate_bps: float | None, burst_bytes: int = 0) -> None:
        self._set(rate_bps, burst_bytes)
        self._busy_until = float("-inf")

    @property
    def free_at(self) -> float:
        """The time from which a reservation no longer waits for earlier ones. A scheduler need not decide before it."""
        return self._busy_until - self._burst_s

    def duration(self, nbytes: int) -> float:
        """How long `nbytes` take at the rate, in seconds."""
        return nbytes * self._seconds_per_byte

    def reshape(self, rate_bps: float | None, burst_bytes: int, now: float) -> None:
        """Take another rate and burst from `now` on, without credit for the time before.

        Bytes that would have left later than `now` are forgotten; the caller reserves them again.
        """
        used_bytes = 0.0
        if self._seconds_per_byte and self._busy_until > now:
            used_bytes = min(self._busy_until - now, self._burst_s) / self._seconds_per_byte
        self._set(rate_bps, burst_bytes)
        self._busy_until = now + min(used_bytes, burst_bytes) * self._seconds_per_byte

    def reserve(self, nbytes: float, ready: float) -> float:
        """Reserve `nbytes` that could leave from `ready` on; return the time at which the last byte has left."""
        start = self._busy_until if self._busy_until > ready else ready
        self._busy_until = start + nbytes * self._seconds_per_byte
        departure = self._busy_until - self._burst_s
        return departure if departure > ready else ready

    def _set(self, rate_bps: float | None, burst_bytes: int) -> None:
        assert rate_bps is None or rate_bps > 0
        assert burst_bytes >= 0
        self.rate_bps = rate_bps
        self._seconds_per_byte = 0.0 if rate_bps is None else 8.0 / rate_bps
        self._burst_s = burst_bytes * self._seconds_per_byte


def reserve_jointly(buckets: Iterable[TokenBucket], nbytes: float, ready: float) -> float:
    """Reserve `nbytes` in all of `buckets` for the same moment; return the departure, the latest of theirs.

    Reserving in one after the other would shape twice, and double the time of a message of one segment.
    """
    buckets = tuple(buckets)
    for bucket in buckets:
        ready = max(ready, bucket.free_at)
    return max((bucket.reserve(nbytes, ready) for bucket in buckets), default=ready)
