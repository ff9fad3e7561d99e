"""How long a node that was lost again and again waits before it is let in once more. A small machine without I/O.

The first loss costs no time. From the second one on the wait doubles: `unit_s`, three times that, seven times, and so
on. Losses are counted by the node's plain name, which a process that is started again keeps, and are forgotten once the
node has stayed for `FORGOTTEN_S`.
"""

from __future__ import annotations

from dataclasses import dataclass

LONGEST_S = 3600.0
FORGOTTEN_S = 3600.0
MOST_NAMES = 4096
"""Names that are remembered at once; the one that was lost the longest time ago makes room."""


@dataclass
class _Losses:
    count: int
    last_s: float


class HoldOff:
    """The losses of one run's nodes."""

    def __init__(self, unit_s: float) -> None:
        self._unit_s = unit_s
        self._losses: dict[str, _Losses] = {}

    def lose(self, name: str, now_s: float) -> None:
        """A node was lost, left, or had to go."""
        before = self._losses.pop(name, None)
        count = before.count if before and now_s - before.last_s < FORGOTTEN_S else 0
        if len(self._losses) >= MOST_NAMES:
            del self._losses[next(iter(self._losses))]
        self._losses[name] = _Losses(count + 1, now_s)

    def until_s(self, name: str) -> float:
        """The time from which the node may be a member again; 0 where it was never lost."""
        losses = self._losses.get(name)
        if losses is None:
            return 0.0
        wait_s = min(self._unit_s * (2.0 ** min(losses.count - 1, 60) - 1.0), LONGEST_S)
        return losses.last_s + wait_s
