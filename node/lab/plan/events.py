"""A clock of events, and processes that run on it: generators that wait for a time or for mail."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Generator

Happens = Callable[[float], None]
"""What happens at a time, which it is told."""


class Mail:
    """Things that have come for a process, as (time, number) in order of arrival."""

    def __init__(self) -> None:
        self.there: deque[tuple[float, int]] = deque()
        self.reader: Process | None = None
        """The process that waits for the next one."""


Process = Generator["float | Mail", None, None]
"""It yields the time until which it waits, or the mail of which it waits for the next thing."""


class Clock:
    """Events in order of time; those of one time in the order in which they were asked for."""

    def __init__(self) -> None:
        self._events: list[tuple[float, int, Happens]] = []
        self._order = 0

    def at(self, when_s: float, happens: Happens) -> None:
        """Let it happen then, which is not before now."""
        self._order += 1
        heapq.heappush(self._events, (when_s, self._order, happens))

    def start(self, process: Process) -> None:
        """Let a process begin, at the time 0."""
        self.at(0.0, lambda _: self._go_on(process))

    def deliver(self, mail: Mail, number: int, now: float) -> None:
        """Put something into the mail; whoever waits for it goes on."""
        mail.there.append((now, number))
        if mail.reader is not None:
            process, mail.reader = mail.reader, None
            self._go_on(process)

    def run(self) -> None:
        """Until nothing more happens."""
        while self._events:
            now, _, happens = heapq.heappop(self._events)
            happens(now)

    def _go_on(self, process: Process) -> None:
        for wish in process:
            if isinstance(wish, float):
                self.at(wish, lambda _: self._go_on(process))
                return
            if not wish.there:
                wish.reader = process
                return
