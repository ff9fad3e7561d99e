"""What one direction of a real link carries, measured by our own frames. Machines without I/O or clock.

A probe is a message that its receiver echoes at once, with the times at which the probe came and the echo left.
`Trickle` sends small probes at even intervals, and finds latency, jitter, the share that is answered, and how far the
two clocks are apart (as NTP does: Mills, RFC 5905, section 8). `Fill` keeps so many probes under way that the link
stays full, and finds its rate. Times are seconds; those of one machine come from one clock that does not go back.
"""

from __future__ import annotations

import math
from collections import deque
from typing import NamedTuple

from netem.limits import KIB, MIB

SMALL_BYTES = 1200
"""A probe of the trickle fills about one packet."""
EVERY_S = 0.02
LEAST_BLOCK_BYTES, MOST_BLOCK_BYTES = 8 * KIB, 256 * KIB
LEAST_WINDOW_BYTES, MOST_WINDOW_BYTES = 32 * KIB, 16 * MIB
_BLOCK_S = 0.01  # a block lasts about so long on the link
_QUEUE_S = 0.15  # a link whose queue is about so long is full
_RATE_OVER_S = 0.5
_WARM_SHARE = 0.6  # TCP finds the rate of the link meanwhile


class Echo(NamedTuple):
    """The answer to one probe: when it left and its echo came back, by the clock here, and when it came there and its
    echo left, by the clock there."""

    number: int
    sent_s: float
    came_s: float
    echoed_s: float
    back_s: float

    @property
    def round_trip_s(self) -> float:
        """Without the time that the receiver took."""
        return max(0.0, (self.back_s - self.sent_s) - (self.echoed_s - self.came_s))

    @property
    def ahead_s(self) -> float:
        """By how much the clock there is ahead of the one here."""
        return ((self.came_s - self.sent_s) + (self.echoed_s - self.back_s)) / 2


class Calm(NamedTuple):
    """A link that carries next to nothing. Latencies are one way, half of a round trip."""

    sent: int
    echoed: int
    latency_s: float
    """The median."""
    jitter_s: float
    """Nine in ten probes differ from the median by no more."""
    ahead_s: float
    """By how much the clock there is ahead; from the fastest probe."""


class Trickle:
    """Small probes for `duration_s` seconds."""

    def __init__(self, now_s: float, duration_s: float) -> None:
        self._began_s = now_s
        self._count = max(1, round(duration_s / EVERY_S))
        self._sent = 0
        self._echoes: dict[int, Echo] = {}

    @property
    def all_sent(self) -> bool:
        """Whether the last probe has left."""
        return self._sent == self._count

    @property
    def all_back(self) -> bool:
        """Whether every probe has been answered."""
        return len(self._echoes) == self._count

    def next_s(self) -> float:
        """When the next probe is due; infinite after the last one."""
        return math.inf if self.all_sent else self._began_s + self._sent * EVERY_S

    def due(self, now_s: float) -> list[int]:
        """The sizes in bytes of the probes that are to leave now."""
        before = self._sent
        while self.next_s() <= now_s:
            self._sent += 1
        return [SMALL_BYTES] * (self._sent - before)

    def echoed(self, echo: Echo) -> None:
        """An answer has come. One that comes twice, or to a probe that was never sent, changes nothing."""
        if 0 <= echo.number < self._sent:
            self._echoes.setdefault(echo.number, echo)

    def figures(self) -> Calm:
        """What was found so far; infinite latency if nothing was answered."""
        if not self._echoes:
            return Calm(self._sent, 0, math.inf, 0.0, 0.0)
        trips_s = sorted(echo.round_trip_s for echo in self._echoes.values())
        middle_s = trips_s[len(trips_s) // 2]
        apart_s = sorted(abs(trip_s - middle_s) for trip_s in trips_s)
        fastest = min(self._echoes.values(), key=lambda echo: echo.round_trip_s)
        jitter_s = apart_s[min(len(apart_s) - 1, len(apart_s) * 9 // 10)] / 2
        return Calm(self._sent, len(self._echoes), middle_s / 2, min(jitter_s, middle_s / 2), fastest.ahead_s)


class Fill:
    """As many bytes as the link takes for `duration_s` seconds.

    What is under way grows until probes begin to queue, and no further, so that a slow link is soon empty again.
    `round_trip_s` is that of the link at rest.
    """

    def __init__(self, now_s: float, duration_s: float, round_trip_s: float) -> None:
        self._began_s = now_s
        self._ends_s = now_s + duration_s
        self._round_trip_s = round_trip_s
        self._window_bytes = LEAST_WINDOW_BYTES
        self._under_way: dict[int, int] = {}  # bytes by number
        self._number = 0
        self._back: list[tuple[float, int]] = []  # when bytes were known to have arrived
        self._recent: deque[tuple[float, int]] = deque()

    def is_over(self, now_s: float) -> bool:
        """Whether its time has passed, and all that was sent has been answered."""
        return now_s >= self._ends_s and not self._under_way

    def due(self, now_s: float) -> list[int]:
        """The sizes in bytes of the probes that are to leave now."""
        if now_s >= self._ends_s:
            return []
        rate_bps = self._recent_bps(now_s)
        block_bytes = min(MOST_BLOCK_BYTES, max(LEAST_BLOCK_BYTES, round(rate_bps / 8 * _BLOCK_S)))
        room_bytes = self._window_bytes - sum(self._under_way.values())
        sizes = [block_bytes] * max(0, room_bytes // block_bytes)
        for nbytes in sizes:
            self._under_way[self._number] = nbytes
            self._number += 1
        return sizes

    def echoed(self, echo: Echo) -> None:
        """An answer has come; any that is not awaited changes nothing."""
        nbytes = self._under_way.pop(echo.number, None)
        if nbytes is None:
            return
        self._back.append((echo.back_s, nbytes))
        self._recent.append((echo.back_s, nbytes))
        queued_s = echo.round_trip_s - self._round_trip_s
        if queued_s < _QUEUE_S:  # doubled within a round trip, as TCP's slow start does
            self._window_bytes = min(self._window_bytes + nbytes, MOST_WINDOW_BYTES)
        elif queued_s > 2 * _QUEUE_S:
            self._window_bytes = max(self._window_bytes - nbytes // 4, LEAST_WINDOW_BYTES)

    def rate_bps(self) -> float:
        """Payload bits a second in the later part of the time; 0 if too little came to say."""
        warm_s = self._began_s + _WARM_SHARE * (self._ends_s - self._began_s)
        late = [(at_s, nbytes) for at_s, nbytes in self._back if at_s >= warm_s]
        if len(late) < 2 or late[-1][0] <= late[0][0]:
            return 0.0
        return 8 * sum(nbytes for _, nbytes in late[1:]) / (late[-1][0] - late[0][0])

    def _recent_bps(self, now_s: float) -> float:
        while self._recent and self._recent[0][0] < now_s - _RATE_OVER_S:
            self._recent.popleft()
        over_s = min(_RATE_OVER_S, max(now_s - self._began_s, _BLOCK_S))
        return 8 * sum(nbytes for _, nbytes in self._recent) / over_s
