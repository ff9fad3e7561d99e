"""Whom an endpoint knows, and what is counted of whom: no I/O.

Strangers are peers that we neither dialled nor were told to trust. What they may hold is bounded by `max_strangers`,
and by what `Receiver.admit` lends them; a new one takes the place of the one longest unheard, and none ever displaces
a peer that is known.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

from netem.assembly import Assembler
from netem.counters import LinkCounters
from netem.ingress import SenderClock
from netem.lane import Lane
from netem.link import Link

STRANGERS = "?"
"""Under this name `counters` has what came from nobody we know, such as a port scanner, or know no longer."""


class Peer:
    """All that the endpoint keeps for one peer."""

    __slots__ = ("assembler", "clock", "counters", "lane", "link", "most_window_bytes")

    def __init__(self, link: Link, lane: Lane, assembler: Assembler, counters: LinkCounters) -> None:
        self.link = link
        self.lane = lane
        self.assembler = assembler
        self.counters = counters
        self.clock = SenderClock()
        self.most_window_bytes = link.window_bytes  # that it has had: what was sent in a larger one may still come


class Peers:
    """The peers by name. `open_peer` makes one of a name and its counters; `evict` is to `remove` a stranger and close
    what belongs to it."""

    def __init__(
        self,
        max_strangers: int,
        open_peer: Callable[[str, LinkCounters], Peer],
        evict: Callable[[str], None],
    ) -> None:
        self._max_strangers = max_strangers
        self._open_peer = open_peer
        self._evict = evict
        self._peers: dict[str, Peer] = {}
        self._strangers: dict[str, None] = {}  # the longest unheard first
        self._counters: dict[str, LinkCounters] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._peers

    def __iter__(self) -> Iterator[tuple[str, Peer]]:
        """A copy of what is there now, so that peers may be removed meanwhile."""
        return iter(list(self._peers.items()))

    def may_meet(self, name: str) -> bool:
        """Whom we know, or any stranger that has a name (the one that ZeroMQ gives begins with a zero)."""
        return name in self._peers or (name[:1] > "\0" and self._max_strangers > 0)

    def meet(self, name: str) -> Peer:
        """The peer; a stranger, if it is new."""
        peer = self._peers.get(name)
        if peer is None:
            if len(self._strangers) >= max(1, self._max_strangers):
                self._evict(next(iter(self._strangers)))
            self._strangers[name] = None
            peer = self._peers[name] = self._open_peer(name, self._counters.setdefault(name, LinkCounters()))
        return peer

    def hear(self, name: str) -> Peer:
        """The peer, that has just spoken."""
        peer = self.meet(name)
        if name in self._strangers:
            self._strangers[name] = self._strangers.pop(name)  # now the one last heard
        return peer

    def trust(self, name: str) -> None:
        """The peer, met by now, is a stranger no more."""
        self.meet(name)
        self._strangers.pop(name, None)

    def remove(self, name: str) -> bool:
        """Forget the peer; whether it was there. The counters of a stranger go to those of all strangers."""
        known = self._peers.pop(name, None) is not None
        if name in self._strangers:
            del self._strangers[name]
            self._counters.setdefault(STRANGERS, LinkCounters()).add(self._counters.pop(name))
        return known

    def refuse(self, name: str, nbytes: int) -> None:
        """Count a frame that is not taken. Strangers share one entry, or they could fill the table."""
        counters = self._counters.setdefault(name if name in self._peers else STRANGERS, LinkCounters())
        counters.dropped += 1
        counters.received_wire_bytes += nbytes

    def counters_of(self, name: str) -> LinkCounters:
        """The live totals of a peer, which outlast it."""
        return self._counters[name]

    def counters(self) -> dict[str, LinkCounters]:
        """A copy of the totals for each peer. From any thread."""
        return {peer: copy.copy(counters) for peer, counters in list(self._counters.items())}
