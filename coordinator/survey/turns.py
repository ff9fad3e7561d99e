"""Who measures what, one turn after another: all dial each other, then a trickle on all links, each link full by
itself, and all full at once.

Links whose ends are different take their turns together, in the rounds of a tournament, so that n guests need about
2 (n − 1) turns and not n (n − 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

MEET_S = 1.0
CALM_S = 5.0
FILL_S = 3.0
ALL_S = 3.0


class Plan(NamedTuple):
    """One turn: who sends to whom."""

    fill: bool
    duration_s: float
    targets: dict[str, list[str]]
    """Receivers by sender."""
    alone: bool = True
    """Whether each guest sends or receives on one link only."""


def plan_turns(peers: Sequence[str]) -> list[Plan]:
    """The turns of these guests. What the second one finds takes the place of what the first one did."""
    everyone = {peer: [other for other in peers if other != peer] for peer in peers}
    turns = [Plan(False, MEET_S, everyone, alone=False), Plan(False, CALM_S, everyone, alone=False)]
    for pairs in rounds(peers):
        turns.append(Plan(True, FILL_S, {one: [other] for one, other in pairs}))
        turns.append(Plan(True, FILL_S, {other: [one] for one, other in pairs}))
    turns.append(Plan(True, ALL_S, everyone, alone=False))
    return turns


def rounds(peers: Sequence[str]) -> list[list[tuple[str, str]]]:
    """Rounds of a tournament in which each meets each other once (the circle method): one stays, the others move on."""
    ring: list[str | None] = [*peers, *([None] if len(peers) % 2 else [])]
    found = []
    for _ in range(len(ring) - 1):
        half = len(ring) // 2
        pairs = zip(ring[:half], reversed(ring[half:]), strict=True)
        found.append([(one, other) for one, other in pairs if one is not None and other is not None])
        ring = [ring[0], ring[-1], *ring[1:-1]]
    return found
