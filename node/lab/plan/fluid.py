"""Messages between nodes in continuous time: shared lines up, latency, and NICs that receive in order of arrival.

`lines` reckons one layer's messages at once, for nodes that all do the same at the same time. Here every message is an
event, for processes that do different things at once and share the lines of their node, such as pipeline stages.

At a sending NIC, or on a link where each has a rate of its own, all flows take equal turns; a flow is one process's
messages to one node, in order. A receiving NIC serves what comes in order of arrival: a message is through when all
that came before its last byte is. Both are exact for fluids where all latencies are equal; where they differ, the
receiving NIC's queue is reckoned at the time of sending.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from typing import NamedTuple

import numpy as np

from node.lab.plan.events import Clock, Happens
from node.lab.plan.lines import Lines
from node.lab.plan.sharing import SharedLine

_Place = tuple[int, int | None]
"""A sender, and the receiver where each of its links has a rate of its own."""


class _Message(NamedTuple):
    target: int
    nbytes: float
    arrives: Happens


class _Inlet:
    """A receiving NIC: the queue before it, in seconds of its service."""

    def __init__(self, rate_bps: float) -> None:
        self.rate_bps = rate_bps
        self._queued_s = self._now = self._inflow = 0.0
        self._shares: dict[Hashable, float] = {}

    def flows(self, source: Hashable, rate_bps: float, now: float) -> None:
        """From now on so much comes from this source."""
        self.queued_s(now)
        self._shares[source] = rate_bps / self.rate_bps
        self._inflow = sum(self._shares.values())

    def add(self, nbytes: float, now: float) -> None:
        """So much comes at once, from a sender without limits."""
        self._queued_s = self.queued_s(now) + 8 * nbytes / self.rate_bps

    def queued_s(self, now: float) -> float:
        """How long what has come takes from now on."""
        self._queued_s = max(0.0, self._queued_s + (self._inflow - 1.0) * (now - self._now))
        self._now = now
        return self._queued_s


class Network:
    """Messages between the nodes of `lines`; `sent_bytes` counts them, [sender, receiver]."""

    def __init__(self, lines: Lines, clock: Clock) -> None:
        self._clock, self._latency_s = clock, lines.latency_s.tolist()
        self._links_bps, self._ups_bps = lines.link_bps.tolist(), lines.up_bps.tolist()
        self._lines: dict[_Place, SharedLine[_Message]] = {}
        self._under_way: dict[_Place, Counter[int]] = {}
        self._inlets = [_Inlet(rate_bps) if np.isfinite(rate_bps) else None for rate_bps in lines.down_bps.tolist()]
        self.sent_bytes = np.zeros_like(lines.link_bps)

    def send(self, source: int, target: int, flow: Hashable, nbytes: float, now: float, arrives: Happens) -> None:
        """Queue a message in its flow to `target`; `arrives` is called when all of it is there."""
        self.sent_bytes[source, target] += nbytes
        place = source, None if np.isfinite(self._ups_bps[source]) else target
        if place not in self._lines:
            self._lines[place], self._under_way[place] = SharedLine(self._rate_bps(place)), Counter()
        line = self._lines[place]
        if line.add((target, flow), _Message(target, nbytes, arrives), nbytes, now):
            self._under_way[place][target] += 1
            self._tell_inlets(place, now)
            self._clock.at(line.next_s(), lambda now: self._leave(place, now))

    def _rate_bps(self, place: _Place) -> float:
        source, target = place
        rate_bps: float = self._ups_bps[source] if target is None else self._links_bps[source][target]
        return rate_bps

    def _leave(self, place: _Place, now: float) -> None:
        line = self._lines[place]
        if line.next_s() > now:
            return  # it shares the line with one that came later, and leaves later
        busy = line.busy
        (target, nbytes, arrives), _, begin_s = line.pop()
        if line.busy < busy:
            self._under_way[place][target] -= 1
        if line.busy:
            self._clock.at(line.next_s(), lambda now: self._leave(place, now))
        source = place[0]
        alone_s = 8 * nbytes / self._links_bps[source][target]
        left_s = max(now, begin_s + alone_s)
        through_s = left_s + self._latency_s[source][target]
        if (inlet := self._inlets[target]) is not None:
            if not np.isfinite(self._rate_bps(place)):
                inlet.add(nbytes, now)
            through_s += inlet.queued_s(now)
        self._tell_inlets(place, now)
        self._clock.at(through_s, arrives)

    def _tell_inlets(self, place: _Place, now: float) -> None:
        rate_bps, busy = self._rate_bps(place), max(1, self._lines[place].busy)
        if np.isfinite(rate_bps):
            for target, count in self._under_way[place].items():
                if (inlet := self._inlets[target]) is not None:
                    inlet.flows(place, rate_bps * count / busy, now)
