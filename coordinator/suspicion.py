"""Which member holds the others up, from what they report of each other. A small machine without I/O.

A member that waits in vain reports the one that it waits for. That one may only wait itself, for a third, so whoever
has accused somebody is excused, and those who are accused and accuse nobody are found. Where a link fails, in one way
or both, the reports form a ring, and the member with the most accusers is found; between equals, the one of the higher
rank. The coordinator itself accuses those that are late at a barrier or a vote. Reports of one fault come at about the
same time; `patience_s` is how long the machine waits for more of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

COORDINATOR_ITSELF = ""


class Verdict(NamedTuple):
    """Members that should go, and what was said of them."""

    peers: tuple[str, ...]
    reason: str


class Suspicions:
    """The reports of one generation."""

    def __init__(self, patience_s: float) -> None:
        self._patience_s = patience_s
        self._reports: dict[tuple[str, str], str] = {}
        self._until_s = math.inf

    def note(self, accuser: str, accused: str, reason: str, now_s: float) -> None:
        """Take a report in. A repeated one changes nothing."""
        if not self._reports:
            self._until_s = now_s + self._patience_s
        self._reports.setdefault((accuser, accused), reason)

    def clear(self) -> None:
        """Another generation begins."""
        self._reports.clear()
        self._until_s = math.inf

    def extend(self, seconds: float) -> None:
        """Wait so much longer for more reports."""
        self._until_s += seconds

    def verdict(self, members: Sequence[str], now_s: float) -> Verdict | None:
        """Who is found, once the time has come; `members` are by rank."""
        if now_s <= self._until_s:
            return None
        accused = [peer for peer in members if any(peer == pair[1] for pair in self._reports)]
        accusers = {pair[0] for pair in self._reports}
        found = [peer for peer in accused if peer not in accusers]
        if not found:
            found = [max(accused, key=lambda peer: (self._count(peer), members.index(peer)))]
        reasons = [reason for (_, peer), reason in self._reports.items() if peer in found]
        return Verdict(tuple(found), "; ".join(dict.fromkeys(reasons)))

    def _count(self, peer: str) -> int:
        return sum(peer == accused for _, accused in self._reports)
