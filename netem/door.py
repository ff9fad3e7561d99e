"""Which connections an endpoint keeps: caps on callers that have not proved who they are. No I/O, no clock.

A connection is new until the caller has proved that it may call. The number of new connections is bounded, in all and
for each source address, and so is their rate for each source. The number of all connections is bounded too, so that
file descriptors remain for what the process itself opens. `netem.porter` has the sockets.
"""

from __future__ import annotations

import msgspec


class DoorLimits(msgspec.Struct, frozen=True, kw_only=True):
    """The caps."""

    handshake_s: float = 5.0
    """How long a caller may take to prove who it is."""
    most_new: int = 128
    most_new_of_a_source: int = 64
    most: int = 1024
    new_per_s: float = 100.0
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
        self._new: dict[int, float] = {}  # when those came that have not proved who they are, the oldest first
        self._new_of: dict[str, dict[int, None]] = {}  # the same by source
        self._free_at: dict[str, float] = {}  # by source: the theoretical arrival time of GCRA

    def __len__(self) -> int:
        return len(self._sources)

    def accepted(self, descriptor: int, source: str, now: float) -> int | None:
        """A connection has come. The descriptor of one to be closed for it, which may be the same; None for none.

        A caller with a key proves that within a few round trips. So where there are too many new connections, the
        oldest of them is closed, and not the newest: those that only sit there make room for one that has a key.
        """
        self.closed(descriptor)  # its end was not noticed
        self.counters.accepted += 1
        if not self._in_time(source, now):
            self.counters.hasty += 1
            return descriptor
        if len(self._sources) >= self._limits.most and not self._new:
            self.counters.crowded += 1
            return descriptor
        oldest = self._too_many(source)
        self._sources[descriptor] = source
        self._new[descriptor] = now
        self._new_of.setdefault(source, {})[descriptor] = None
        if oldest is not None:
            self.counters.crowded += 1
            self.closed(oldest)
        return oldest

    def proved(self, descriptor: int) -> None:
        """The caller on this connection has proved who it is."""
        if self._new.pop(descriptor, None) is not None:
            self._settle(descriptor)

    def closed(self, descriptor: int) -> None:
        """The connection is gone."""
        if descriptor in self._sources:
            self.proved(descriptor)
            del self._sources[descriptor]

    def _too_many(self, source: str) -> int | None:
        """The oldest new connection, of this source or of all, if there is no room for another one."""
        own = self._new_of.get(source, {})
        if len(own) >= self._limits.most_new_of_a_source:
            return next(iter(own))
        if len(self._new) >= self._limits.most_new or len(self._sources) >= self._limits.most:
            return next(iter(self._new))
        return None

    def _settle(self, descriptor: int) -> None:
        source = self._sources[descriptor]
        del self._new_of[source][descriptor]
        if not self._new_of[source]:
            del self._new_of[source]

    def _in_time(self, source: str, now: float) -> bool:
        """The virtual-scheduling form of a token bucket, for each source."""
        step_s = 1 / self._limits.new_per_s
        free_at = max(self._free_at.get(source, now), now)
        if free_at - now > self._limits.most_new_of_a_source * step_s:
            return False
        if source not in self._free_at and len(self._free_at) >= self._limits.most:
            self._free_at = {one: at for one, at in self._free_at.items() if at > now}
            if len(self._free_at) >= self._limits.most:
                return False
        self._free_at[source] = free_at + step_s
        return True
