"""What becomes of a segment between its departure and its arrival: latency, jitter, and loss as TCP makes of it.

None of it uses up rate, all of it keeps order: a segment that is held up holds up those behind it, as in any stream.
A lost packet is repeated by TCP after its retransmission timeout, which doubles while repeats are lost too; nothing is
ever lost or changed for those above. That is the dearest reading of a loss: with many packets behind it TCP often
notices after one round trip. That TCP also sends less after a loss is not emulated; credit that does not come back
is. Jitter is drawn for each segment by itself, so a dense stream arrives near the latest of its neighbours.

Chance is a hash of the seed, the link and the segment's number on it: the same run draws the same, however its
threads take turns.
"""

from __future__ import annotations

import hashlib
import math

from netem.network import Shape

_PACKET_BYTES = 1448  # TCP's payload in a frame of 1500 bytes, with timestamps
_MOST_REPEATS = 6
_SCALE = 2.0**-64


class Delay:
    """One link's. `seed` names the link too."""

    def __init__(self, shape: Shape, seed: str) -> None:
        self.shape = shape
        self.latest = -math.inf
        """The latest arrival so far: nothing arrives before it."""
        self._seed = seed.encode()
        self._count = 0

    def arrival(self, departure: float, wire_bytes: int) -> float:
        """When the next segment, which has left at `departure`, is there."""
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
        """How long TCP takes longer: the sum of the timeouts until nothing of the segment is missing."""
        loss = self.shape.loss
        missing = 1 - (1 - loss) ** max(1, math.ceil(wire_bytes / _PACKET_BYTES))  # probability: some packet is
        repeats = 0
        while chance < missing and repeats < _MOST_REPEATS:
            repeats += 1
            missing *= loss
        return self.shape.timeout_s * ((1 << repeats) - 1)
