"""Which connections an endpoint keeps: caps on callers that have not proved who they are. No I/O, no clock.

A connection is new until the time for its handshake is over. By then ZeroMQ has closed it, unless the caller has proved
that it may call. The number of new connections is bounded, in all and for each source address, and so is their rate for
each source. The number of all connections is bounded too, so that file descriptors remain for what the process itself
opens. `netem.porter` has the sockets.
"""

from __future__ import annotations

from collections import Counter, deque

import msgspec


class DoorLimits(msgspec.Struct, frozen=True, kw_only=True):
    """The caps."""

    handshake_s: float = 5.0
    """How long a caller may take to prove who it is."""
    most_new: int = 128
    most_new_of_a_source: int = 64
    most: int = 1024
    new_per_s: float = 32.0
    """Connections a second that one source may open in the long run; `most_new_of_a_source` at once."""


class DoorCounters(msgspec.Struct):
    """How many connections came, and why some were closed."""

    accepted: int = 0
    """Connections that were taken, of whatever fate."""
    keyless: int = 0
    """Handshakes of callers without a key, or with a wrong one."""
    denied: int = 0
    """Handshakes of callers whose key or proof is not one of those that may call."""
    abandoned: int = 0
    """Handshakes that took too long, or that the caller broke off."""
    crowded: int = 0
    """Connections closed because there were too many, or too many of their source."""
    hasty: int = 0
    """Connections closed because their source opened them too fast."""
    misnamed: int = 0
    """Connections closed because the caller used a name that belongs to another key."""
    noisy: int = 0
    """Connections closed because a stranger sent too much."""

    @property
    def refused(self) -> int:
        return self.keyless + self.denied + self.abandoned + self.crowded + self.hasty + self.misnamed + self.noisy

    def __str__(self) -> str:
        """The refusals for people: ``3 without the right key, 2 too many at once``."""
        kinds = {
            "without the right key": self.keyless + self.denied,
            "without a whole handshake": self.abandoned,
            "too many at once": self.crowded,
            "too fast": self.hasty,
            "under another's name": self.misnamed,
            "too much said": self.noisy,
        }
        return ", ".join(f"{count} {kind}" for kind, count in kinds.items() if count)


class Door:
    """The inbound connections of one endpoint, by descriptor. Times are seconds on the caller's clock."""

    def __init__(self, limits: DoorLimits) -> None:
        self.counters = DoorCounters()
        self._limits = limits
        self._sources: dict[int, str] = {}  # of all connections that are open
        self._new: dict[int, float] = {}  # when those came that may be without proof
        self._order: deque[tuple[float, int]] = deque()  # the same and closed ones, in order
        self._new_of: Counter[str] = Counter()
        self._free_at: dict[str, float] = {}  # by source: the GCRA's theoretical arrival time

    def __len__(self) -> int:
        return len(self._sources)

    def accepted(self, descriptor: int, source: str, now: float) -> bool:
        """A connection has come; False if it is to be closed at once."""
        self._expire(now)
        self.closed(descriptor)  # its end was not noticed
        self.counters.accepted += 1
        limits = self._limits
        if not self._in_time(source, now):
            self.counters.hasty += 1
            return False
        crowd = len(self._new) >= limits.most_new or self._new_of[source] >= limits.most_new_of_a_source
        if crowd or len(self._sources) >= limits.most:
            self.counters.crowded += 1
            return False
        self._sources[descriptor] = source
        self._new[descriptor] = now
        self._new_of[source] += 1
        self._order.append((now, descriptor))
        return True

    def closed(self, descriptor: int) -> None:
        """The connection is gone."""
        source = self._sources.pop(descriptor, None)
        if source is not None and self._new.pop(descriptor, None) is not None:
            self._settle(source)

    def _expire(self, now: float) -> None:
        while self._order and self._order[0][0] + self._limits.handshake_s <= now:
            came, descriptor = self._order.popleft()
            if self._new.get(descriptor) == came:
                del self._new[descriptor]
                self._settle(self._sources[descriptor])

    def _settle(self, source: str) -> None:
        self._new_of[source] -= 1
        if not self._new_of[source]:
            del self._new_of[source]

    def _in_time(self, source: str, now: float) -> bool:
        """The virtual-scheduling form of a token bucket, for each source."""
        step_s = 1 / self._limits.new_per_s
        tolerance_s = self._limits.most_new_of_a_source * step_s
        free_at = max(self._free_at.get(source, now), now)
        if free_at - now > tolerance_s:
            return False
        if source not in self._free_at and len(self._free_at) >= self._limits.most:
            self._free_at = {one: at for one, at in self._free_at.items() if at > now}
            if len(self._free_at) >= self._limits.most:
                return False
        self._free_at[source] = free_at + step_s
        return True
