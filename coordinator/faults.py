"""What went wrong in a run, one structured event for each fault. A machine without I/O.

A fault is noted when it is found, and told when the run has gone on, so that the event says what it cost; a pause or
the run's end tells it at once. `coordinator.records.faults` writes events to files.
"""

from __future__ import annotations

from coordinator.events import Fault


class Faults:
    """The faults that are not told yet."""

    def __init__(self) -> None:
        self._open: list[tuple[Fault, float]] = []

    def note(self, fault: Fault, now_s: float) -> None:
        """A fault is found."""
        self._open.append((fault, now_s))

    def tell(self, done: str, now_s: float) -> list[Fault]:
        """What was done about the faults since the last call; each has cost the time since it was found."""
        told = [fault._replace(done=done, cost_s=now_s - found_s) for fault, found_s in self._open]
        self._open.clear()
        return told
