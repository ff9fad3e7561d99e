"""Which pieces of one file are still missing, and when to ask for which. A machine without I/O or clock."""

from __future__ import annotations

from coordinator.files.messages import PIECE_BYTES, Offer

WINDOW = 16
"""Pieces that are asked for at once."""
RETRY_S = 10.0
"""A piece that has not come after this time is asked for again."""
LIMIT_S = 180.0
"""Without any piece for so long, the file does not come."""


class Taking:
    """One file on its way here. `progress_s` is when its last piece came."""

    def __init__(self, offer: Offer, now_s: float) -> None:
        self.offer = offer
        self.progress_s = now_s
        self._next = 0
        self._asked_s: dict[int, float] = {}

    @property
    def done(self) -> bool:
        """Whether every piece is here."""
        return self._next >= self.offer.total_bytes and not self._asked_s

    def wants(self, now_s: float) -> list[int]:
        """The offsets of the pieces that are to be asked for now."""
        offsets = [offset for offset, asked_s in self._asked_s.items() if now_s - asked_s >= RETRY_S]
        while self._next < self.offer.total_bytes and len(self._asked_s) < WINDOW:
            offsets.append(self._next)
            self._asked_s[self._next] = now_s
            self._next += PIECE_BYTES
        self._asked_s |= dict.fromkeys(offsets, now_s)
        return offsets

    def arrived(self, offset: int, nbytes: int, now_s: float) -> bool:
        """A piece has come: whether it is one that was awaited, of the right length."""
        wanted_bytes = min(PIECE_BYTES, self.offer.total_bytes - offset)
        if offset not in self._asked_s or nbytes != wanted_bytes:
            return False
        del self._asked_s[offset]
        self.progress_s = now_s
        return True

    def is_late(self, now_s: float) -> bool:
        """Whether nothing has come for too long."""
        return now_s - self.progress_s >= LIMIT_S
