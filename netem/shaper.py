"""Which segment goes next, when it has left, and when it arrives: scheduling as arithmetic, no I/O, no clock.

Each peer has a lane with an urgent queue and bulk flows; flows take turns by deficit round robin. In scope `link`
every lane has a port of its own with the link's bucket; in scope `nic` all lanes meet at one port with the egress
bucket, and a lane may have a slower bucket of its own on top. A segment is chosen as late as it may be, when its
serialisation begins, so that control overtakes bulk. It arrives at departure plus latency, which uses up no rate,
and is held here until then: what is handed out by `poll` is to be written at once.

`Ingress` is the receiver's side of scope `nic`. Read `netem.endpoint` next.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Iterator
from typing import Generic, NamedTuple, TypeVar

from netem.bucket import TokenBucket, reserve_jointly
from netem.link import Link
from netem.profile import Profile
from netem.segments import Message, Segment

_MOST_SLACK_S = 0.002
_BATCH = 32  # segments scheduled in one go, so that an unshaped link does not keep its thread from reading
INGRESS_TOLERANCE_S = 0.001  # a receiver that wakes late sees arrivals bunched; so much of it is not held against them

T = TypeVar("T")


class Flow:
    """Messages to one peer that keep their order, and share the lane with other flows."""

    __slots__ = ("deficit", "lane", "messages", "served", "waiting")

    def __init__(self, lane: Lane) -> None:
        self.lane = lane
        self.messages: deque[Message] = deque()
        self.deficit = 0
        self.waiting = False  # in the port's ring
        self.served = False  # has had its quantum for this turn


class Lane:
    """The way to one peer: its queues, and the link that numbers what goes."""

    def __init__(self, peer: str, link: Link, port: Port, bucket: TokenBucket | None, latency_s: float) -> None:
        self.peer = peer
        self.link = link
        self.port = port
        self.bucket = bucket
        self.latency_s = latency_s
        self.slack_s = min(latency_s / 4, _MOST_SLACK_S)
        self.epoch = 0  # rises when what is on the way has become pointless
        self.urgent: deque[Message] = deque()
        self.flows: dict[int, Flow] = {}
        self.open: dict[int, Message] = {}  # not yet acknowledged as a whole, in order of identity
        self._next_ident = 0

    @property
    def free_at(self) -> float:
        return -math.inf if self.bucket is None else self.bucket.free_at

    def enqueue(self, message: Message) -> None:
        message.ident = self._next_ident
        self._next_ident += 1
        self.open[message.ident] = message
        self._queue(message)

    def restart(self) -> None:
        """Queue again, from its first byte, all that has not been acknowledged as a whole."""
        self._clear()
        self.epoch += 1
        for message in self.open.values():
            message.rewind()
            self._queue(message)

    def abandon(self) -> list[Message]:
        """Empty the lane, but for what is on the way; return the messages given up."""
        self._clear()
        dropped = list(self.open.values())
        self.open.clear()
        return dropped

    def drop_older(self, generation: int) -> list[Message]:
        """Drop the bulk messages from before `generation` as far as they are not on the way; return them.

        The peer would drop them too, but only after they have used up the link.
        """
        dropped = []
        for flow in self.flows.values():
            stale = [message for message in flow.messages if 0 < message.generation < generation]
            if stale:
                flow.messages = deque(m for m in flow.messages if not 0 < m.generation < generation)
                dropped += stale
        for message in dropped:
            del self.open[message.ident]
        return dropped

    def finish(self, released: list[Segment]) -> list[Message]:
        """The messages that `released`, acknowledged segments, complete."""
        done = []
        for segment in released:
            message = segment.message
            if segment.last and message is not None and self.open.pop(message.ident, None) is not None:
                done.append(message)
        return done

    def sendable(self, segment_bytes: int) -> bool:
        """Whether something but an acknowledgement could go, as far as credit is concerned."""
        link = self.link
        if link.must_repeat:
            return True
        if self.urgent and link.has_credit(self.urgent[0].next_bytes(segment_bytes), True):
            return True
        for flow in self.flows.values():
            if flow.messages and link.has_credit(flow.messages[0].next_bytes(segment_bytes), False):
                return True
        return False

    def _queue(self, message: Message) -> None:
        if message.urgent:
            self.urgent.append(message)
            return
        flow = self.flows.get(message.flow)
        if flow is None:
            flow = self.flows[message.flow] = Flow(self)
        flow.messages.append(message)
        if not flow.waiting:
            flow.waiting = True
            self.port.ring.append(flow)

    def _clear(self) -> None:
        self.urgent.clear()
        for flow in self.flows.values():
            flow.messages.clear()


class Port:
    """Lanes that share one bucket, one segment at a time."""

    def __init__(self, bucket: TokenBucket, segment_bytes: int) -> None:
        self.bucket = bucket
        self.segment_bytes = segment_bytes
        self.lanes: deque[Lane] = deque()
        self.ring: deque[Flow] = deque()

    def wakes_at(self) -> float:
        """When the next segment is to be chosen, at the latest.

        That is a little after it could begin: deadlines are absolute, so a choice made late costs nothing while it
        is made well before the segment's arrival, and one wake-up then serves a choice and a write.
        """
        earliest = math.inf
        for lane in self.lanes:
            at = lane.free_at if lane.sendable(self.segment_bytes) else max(lane.link.ack_due, lane.free_at)
            at = max(at, self.bucket.free_at) + lane.slack_s
            if at < earliest:
                earliest = at
        return earliest

    def choose(self, now: float) -> tuple[Lane, Segment, float] | None:
        """The next segment, its header written, and since when it has been ready; None if there is none by `now`."""
        return self._control(now) or self._bulk(now)

    def _control(self, now: float) -> tuple[Lane, Segment, float] | None:
        for lane in self.lanes:
            link = lane.link
            if lane.free_at > now:
                continue
            if link.must_repeat:
                return self._turn(lane), link.repeat(), now
            if lane.urgent and link.has_credit(lane.urgent[0].next_bytes(self.segment_bytes), True):
                message = lane.urgent[0]
                return self._turn(lane), self._cut(lane, lane.urgent), max(message.queued_at, link.ready_at)
            if link.ack_due <= now and not self._bulk_carries(lane):
                ready = link.ack_due
                return self._turn(lane), link.acknowledgement(), ready
        return None

    def _bulk_carries(self, lane: Lane) -> bool:
        """Whether the acknowledgement that `lane` owes may ride on the segment that goes now anyway."""
        return len(self.lanes) == 1 and lane.sendable(self.segment_bytes)

    def _turn(self, lane: Lane) -> Lane:
        if len(self.lanes) > 1:
            self.lanes.remove(lane)
            self.lanes.append(lane)
        return lane

    def _bulk(self, now: float) -> tuple[Lane, Segment, float] | None:
        """Deficit round robin (Shreedhar and Varghese, 1995), one segment a call; the quantum is a full segment."""
        ring = self.ring
        visits = 2 * len(ring)
        while visits and ring:
            visits -= 1
            flow = ring[0]
            if not flow.messages:
                ring.popleft()
                flow.waiting = flow.served = False
                flow.deficit = 0  # an idle flow saves nothing up
                continue
            lane = flow.lane
            nbytes = flow.messages[0].next_bytes(self.segment_bytes)
            if lane.free_at <= now and lane.link.has_credit(nbytes, False):
                if not flow.served:
                    flow.served = True
                    flow.deficit += self.segment_bytes
                if nbytes <= flow.deficit:
                    flow.deficit -= nbytes
                    ready = max(flow.messages[0].queued_at, lane.link.ready_at)
                    return lane, self._cut(lane, flow.messages), ready
            flow.served = False
            ring.rotate(-1)
        return None

    def _cut(self, lane: Lane, queue: deque[Message]) -> Segment:
        segment = queue[0].cut(self.segment_bytes)
        if segment.last:
            queue.popleft()
        lane.link.stamp(segment)
        return segment


class Due(NamedTuple):
    """A segment that has arrived, in emulated time: write it now."""

    arrival: float
    order: int
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
        self._order = 0
        self._egress: Port | None = None
        if profile.nic_rate_bps is not None:
            bucket = TokenBucket(profile.nic_rate_bps, profile.burst_bytes)
            self._egress = Port(bucket, profile.segment_bytes(profile.nic_rate_bps))
            self._ports.append(self._egress)

    def add(self, peer: str, link: Link) -> Lane:
        """Open the lane to a peer."""
        assert peer not in self._lanes
        shape = self._profile.link(self._name, peer)
        bucket = TokenBucket(shape.rate_bps, shape.burst_bytes)
        port = self._egress
        if port is None:
            port = Port(bucket, self._profile.segment_bytes(shape.rate_bps))
            self._ports.append(port)
            lane = Lane(peer, link, port, None, shape.latency_s)
        else:
            lane = Lane(peer, link, port, None if shape.rate_bps is None else bucket, shape.latency_s)
        port.lanes.append(lane)
        self._lanes[peer] = lane
        return lane

    def remove(self, peer: str) -> list[Message]:
        """Close a lane; return the messages that are given up."""
        lane = self._lanes.pop(peer)
        lane.epoch += 1
        lane.port.lanes.remove(lane)
        if lane.port is not self._egress:
            self._ports.remove(lane.port)
        return lane.abandon()

    def poll(self, now: float) -> Iterator[tuple[float, Lane, Segment]]:
        """Schedule all that may begin by `now`; hand out what has arrived by `now`, with its time of arrival."""
        for port in self._ports:
            self._schedule(port, now)
        held = self._held
        while held and held[0].arrival <= now:
            due = heapq.heappop(held)
            if due.epoch == due.lane.epoch:
                yield due.arrival, due.lane, due.segment

    def next_time(self) -> float:
        """When `poll` has something to do next; infinite if only a new message or an acknowledgement can tell."""
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
            if lane.bucket is None:
                departure = port.bucket.reserve(segment.wire_bytes, ready)
            else:
                departure = reserve_jointly((port.bucket, lane.bucket), segment.wire_bytes, ready)
            self._order += 1
            heapq.heappush(self._held, Due(departure + lane.latency_s, self._order, lane, segment, lane.epoch))


class Ingress(Generic[T]):
    """The receiving NIC, in scope `nic`: what all senders share on the way in.

    Virtual cut-through: a segment has been trickling in while it was serialised at the sender, so its reservation
    starts that long before its arrival, and an uncontended transfer is not delayed twice. Nothing is acknowledged
    before it is through, so credit pushes back on the senders and bounds what is held here.
    """

    def __init__(self, rate_bps: float) -> None:
        self._bucket = TokenBucket(rate_bps, round(rate_bps / 8 * INGRESS_TOLERANCE_S))
        self._held: deque[tuple[float, T]] = deque()

    def push(self, item: T, nbytes: int, arrival: float) -> None:
        """Something of `nbytes` on the wire has arrived."""
        through = self._bucket.reserve(nbytes, arrival - self._bucket.duration(nbytes))
        self._held.append((max(through, arrival), item))

    def poll(self, now: float) -> Iterator[T]:
        """What is through by `now`, in order."""
        while self._held and self._held[0][0] <= now:
            yield self._held.popleft()[1]

    def next_time(self) -> float:
        return self._held[0][0] if self._held else math.inf
