"""When the segments that `netem.lane` chooses leave, and when they arrive. Arithmetic, no I/O, no clock.

A segment leaves once the buckets that it passes have let it through. It arrives later (`netem.delay`), which uses up no
rate, and is held here until then: `poll` returns segments that are to be written at once.

`reshape` takes another profile at any time: segments that have left arrive as they would have, a segment that is partly
out continues at the new rate, and a lane that is cut keeps everything until it is healed.

The receiver's side of scope `nic` is `netem.ingress`. Read `netem.engine` next.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator
from typing import NamedTuple

from netem.bucket import TokenBucket
from netem.delay import Delay
from netem.lane import Lane, Port
from netem.link import Link
from netem.names import plain
from netem.network import Profile, Shape
from netem.segments import Message, Segment

_BATCH = 32  # segments scheduled at once; more would keep the thread of an unshaped link from reading


class Due(NamedTuple):
    """A scheduled segment. `arrival` is the emulated time of its arrival, when it is to be written."""

    arrival: float
    order: int
    departure: float
    lane: Lane
    segment: Segment
    epoch: int


class Shaper:
    """All lanes of one endpoint. Times are seconds on the caller's clock."""

    def __init__(self, name: str, profile: Profile) -> None:
        self._name = name
        self._profile = profile
        self._ports: list[Port] = []
        self._lanes: dict[str, Lane] = {}
        self._held: list[Due] = []
        self._stuck: list[tuple[Due, float]] = []  # partly out of a lane that is cut, with the bytes that have not left
        self._order = 0
        self._egress: Port | None = None
        if profile.scope == "nic":
            self._egress = Port(name, TokenBucket(*self._nic()), self._segment_bytes())
            self._ports.append(self._egress)

    def add(self, peer: str, link: Link) -> Lane:
        """Open the lane to a peer."""
        assert peer not in self._lanes
        shape = self._profile.link(self._name, peer)
        delay = Delay(shape, f"{self._profile.seed} {plain(self._name)} {plain(peer)}")
        port = self._egress
        if port is None:
            port = Port(self._name, _bucket(shape), self._profile.segment_bytes(shape.rate_bps))
            self._ports.append(port)
        lane = Lane(peer, link, port, self._own_bucket(shape), delay)
        lane.pair_bps = self._profile.pair_bps(self._name, peer)
        port.lanes.append(lane)
        self._lanes[peer] = lane
        return lane

    def remove(self, peer: str) -> list[Message]:
        """Close a lane; return its messages, which are dropped."""
        lane = self._lanes.pop(peer)
        lane.epoch += 1
        lane.port.lanes.remove(lane)
        if lane.port is not self._egress:
            self._ports.remove(lane.port)
        return lane.abandon()

    def reshape(self, profile: Profile, now: float) -> None:
        """Take another profile, of the same scope, from `now` on. No segment is lost."""
        assert profile.scope == self._profile.scope
        for port in self._ports:
            self._schedule(port, now)  # what could begin before `now` leaves at the old rate
        self._profile = profile
        leaving = sorted((due for due in self._held if due.departure > now), key=lambda due: (due.departure, due.order))
        halfway = self._stuck + [(due, _bytes_to_go(due, now)) for due in leaving]
        self._held = [due for due in self._held if due.departure <= now]
        heapq.heapify(self._held)
        if self._egress is not None:
            self._egress.bucket.reshape(*self._nic(), now)
            self._egress.segment_bytes = self._segment_bytes()
        for lane in self._lanes.values():
            self._reshape_lane(lane, now)
        self._stuck = []
        for due, nbytes in halfway:
            if due.epoch != due.lane.epoch:
                continue
            if due.lane.cut:
                self._stuck.append((due, nbytes))
            else:
                self._hold(due.lane, due.segment, due.lane.reserve(nbytes, now))

    def poll(self, now: float) -> Iterator[tuple[float, Lane, Segment]]:
        """Schedule all segments that may begin by `now`; yield those that have arrived by `now`, with their arrival."""
        for port in self._ports:
            self._schedule(port, now)
        held = self._held
        while held and held[0].arrival <= now:
            due = heapq.heappop(held)
            if due.epoch == due.lane.epoch:
                yield due.arrival, due.lane, due.segment

    def next_time(self) -> float:
        """When `poll` is to be called next; infinite if nothing can happen before a new message or a frame comes."""
        earliest = self._held[0].arrival if self._held else math.inf
        for port in self._ports:
            earliest = min(earliest, port.wakes_at())
        return earliest

    def _schedule(self, port: Port, now: float) -> None:
        for _ in range(_BATCH):
            if port.bucket.free_at > now:
                return
            choice = port.choose(now)
            if choice is None:
                return
            lane, segment, ready = choice
            if self._profile.window_bytes is None:
                lane.count_stall(segment, ready)
            self._hold(lane, segment, lane.reserve(segment.wire_bytes, ready))

    def _hold(self, lane: Lane, segment: Segment, departure: float) -> None:
        self._order += 1
        arrival = lane.delay.arrival(departure, segment.wire_bytes)
        heapq.heappush(self._held, Due(arrival, self._order, departure, lane, segment, lane.epoch))

    def _reshape_lane(self, lane: Lane, now: float) -> None:
        shape = self._profile.link(self._name, lane.peer)
        own = self._own_bucket(shape)
        if lane.port is not self._egress:
            lane.port.bucket.reshape(shape.rate_bps or None, shape.burst_bytes, now)
            lane.port.segment_bytes = self._profile.segment_bytes(shape.rate_bps)
        elif own is not None and lane.bucket is not None:
            lane.bucket.reshape(own.rate_bps, shape.burst_bytes, now)
        else:
            lane.bucket = own
        lane.delay.shape = shape
        lane.reshaped_at = now
        lane.pair_bps = self._profile.pair_bps(self._name, lane.peer)
        if not lane.cut:
            lane.link.stuck_since = None
        elif lane.open:
            lane.link.stick(now)
        under_way = [due.arrival for due in self._held if due.lane is lane]
        lane.delay.latest = max(under_way, default=-math.inf)

    def _own_bucket(self, shape: Shape) -> TokenBucket | None:
        """The bucket of a link that shares a NIC, where it has a rate of its own."""
        return _bucket(shape) if self._egress is not None and shape.rate_bps else None

    def _nic(self) -> tuple[float | None, int]:
        """Rate and burst of the egress bucket. If the NIC is cut, its links are cut instead, one by one."""
        return self._profile.nic_up_bps(self._name) or None, self._profile.burst_bytes

    def _segment_bytes(self) -> int:
        return self._profile.segment_bytes(self._profile.nic_up_bps(self._name))


def _bucket(shape: Shape) -> TokenBucket:
    """The bucket of a link. That of a cut link has no rate, and is not used: its lane lets no segment begin."""
    return TokenBucket(shape.rate_bps or None, shape.burst_bytes)


def _bytes_to_go(due: Due, now: float) -> float:
    """How many bytes of a segment have not left by `now`."""
    rate_bps = due.lane.rate_bps
    assert rate_bps is not None, "a segment without a rate leaves at once"
    return min((due.departure - now) * rate_bps / 8, due.segment.wire_bytes)
