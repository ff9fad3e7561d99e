"""The endpoint's peer table and per-peer counters: no I/O.

Strangers are peers that this endpoint neither dialled nor was told to trust. Their number is bounded by
`max_strangers`, and their buffers by `Receiver.admit`. A new stranger replaces the one that has been silent for
longest, and never a peer that is trusted.
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
"""The name under which `counters` has the traffic of unknown callers, such as a port scanner, and of past strangers."""


class Peer:
    """All that the endpoint keeps for one peer."""

    __slots__ = ("assembler", "clock", "counters", "heard_bytes", "lane", "link", "most_window_bytes")

    def __init__(self, link: Link, lane: Lane, assembler: Assembler, counters: LinkCounters) -> None:
        self.link = link
        self.lane = lane
        self.assembler = assembler
        self.counters = counters
        self.clock = SenderClock()
        self.heard_bytes = 0  # on the wire
        self.most_window_bytes = link.peer_window_bytes  # the largest so far: frames sent within it may still come


class Peers:
    """The peers by name. `open_peer` makes a peer from its name and counters; `evict` must `remove` a stranger and
    close its connection."""

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
        self._strangers: dict[str, None] = {}  # the one that has been silent for longest first
        self._counters: dict[str, LinkCounters] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._peers

    def __iter__(self) -> Iterator[tuple[str, Peer]]:
        """The peers of this moment; they may be removed during the loop."""
        return iter(list(self._peers.items()))

    def may_meet(self, name: str) -> bool:
        """Whether the peer is known, or is a stranger with a name (a name that ZeroMQ made up begins with a zero)."""
        return name in self._peers or (name[:1] > "\0" and self._max_strangers > 0)

    def meet(self, name: str) -> Peer:
        """The peer; if it is new, it is a stranger from now on."""
        peer = self._peers.get(name)
        if peer is None:
            if len(self._strangers) >= max(1, self._max_strangers):
                self._evict(next(iter(self._strangers)))
            self._strangers[name] = None
            peer = self._peers[name] = self._open_peer(name, self._counters.setdefault(name, LinkCounters()))
        return peer

    def is_stranger(self, name: str) -> bool:
        """Whether the peer was neither dialled nor trusted."""
        return name in self._strangers

    def hear(self, name: str, nbytes: int) -> Peer:
        """The peer, from which a frame of `nbytes` has just come."""
        peer = self.meet(name)
        peer.heard_bytes += nbytes
        peer.counters.received_wire_bytes += nbytes
        if name in self._strangers:
            self._strangers[name] = self._strangers.pop(name)  # moved to the end
        return peer

    def trust(self, name: str) -> None:
        """The peer is no stranger from now on; it is added if it is new."""
        self.meet(name)
        self._strangers.pop(name, None)

    def remove(self, name: str) -> bool:
        """Forget the peer; True if it was there. A stranger's counters are added to those of all strangers."""
        known = self._peers.pop(name, None) is not None
        if name in self._strangers:
            del self._strangers[name]
            self._counters.setdefault(STRANGERS, LinkCounters()).add(self._counters.pop(name))
        return known

    def refuse(self, name: str, nbytes: int) -> None:
        """Count a frame that is dropped. Unknown callers share one entry, or they could fill the table."""
        counters = self._counters.setdefault(name if name in self._peers else STRANGERS, LinkCounters())
        counters.dropped += 1
        counters.received_wire_bytes += nbytes

    def counters_of(self, name: str) -> LinkCounters:
        """The live totals of a peer; they stay when the peer is removed."""
        return self._counters[name]

    def counters(self) -> dict[str, LinkCounters]:
        """A copy of the totals for each peer. Any thread may call this."""
        return {peer: copy.copy(counters) for peer, counters in list(self._counters.items())}
