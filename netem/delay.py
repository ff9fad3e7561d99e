"""How long a segment travels: latency, jitter, and the delay that TCP makes of a lost packet.

None of these uses up rate, and all of them keep order: a delayed segment delays those behind it, as in any stream. TCP
repeats a lost packet after its retransmission timeout, which doubles while the repeats are lost too, so data is never
lost or changed, only late. This is the most expensive case of a loss: when many packets follow, TCP often notices after
one round trip. TCP's lower rate after a loss is not emulated; the credit that comes back late is. Jitter is drawn for
each segment alone, so in a dense stream most segments arrive with the latest of their neighbours.

Random numbers are a hash of the seed, the link and the segment's number on it, so that a run draws the same numbers
however its threads are scheduled.
"""

from __future__ import annotations

import hashlib
import math

from netem.network import Shape

_PACKET_BYTES = 1448  # TCP's payload in a frame of 1500 bytes, with timestamps
_MOST_REPEATS = 6
_SCALE = 2.0**-64


class Delay:
    """The delays of one link. `seed` contains the link's name too."""

    def __init__(self, shape: Shape, seed: str) -> None:
        self.shape = shape
        self.latest = -math.inf
        """The latest arrival so far; no later segment arrives before it."""
        self._seed = seed.encode()
        self._count = 0

    def arrival(self, departure: float, wire_bytes: int) -> float:
        """When the next segment arrives, which has left at `departure`."""
        shape = self.shape
        at = departure + shape.latency_s
        if shape.jitter_s or shape.loss:
            even, odd = self._draw()
            at += shape.jitter_s * (2 * even - 1) + self._repeats_s(odd, wire_bytes)
        if at < self.latest:
            at = self.latest
        self.latest = at
        return at

    def _draw(self) -> tuple[float, float]:
        """Two numbers, each evenly spread over [0, 1)."""
        self._count += 1
        digest = hashlib.blake2b(self._count.to_bytes(8, "big"), digest_size=16, key=self._seed[:64]).digest()
        return int.from_bytes(digest[:8], "big") * _SCALE, int.from_bytes(digest[8:], "big") * _SCALE

    def _repeats_s(self, chance: float, wire_bytes: int) -> float:
        """The delay by lost packets: the sum of TCP's timeouts until all packets of the segment have arrived."""
        loss = self.shape.loss
        missing = 1 - (1 - loss) ** max(1, math.ceil(wire_bytes / _PACKET_BYTES))  # probability that any packet is
        repeats = 0
        while chance < missing and repeats < _MOST_REPEATS:
            repeats += 1
            missing *= loss
        return self.shape.timeout_s * ((1 << repeats) - 1)
