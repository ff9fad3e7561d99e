"""Which segment is next: lanes with their queues, and the ports that they share. No I/O, no clock.

Each peer has a lane with an urgent queue and bulk flows; flows take turns by deficit round robin. In scope `link`
every lane has a port of its own with the link's bucket. In scope `nic` all lanes share one port with the egress bucket,
and a lane may have a slower bucket of its own too. A segment is chosen as late as possible, when its serialisation
begins, so that control messages overtake bulk. `netem.shaper` computes when it leaves and arrives.
"""

from __future__ import annotations

import math
from collections import deque

from netem.bucket import TokenBucket, reserve_jointly
from netem.delay import Delay
from netem.limits import URGENT_SEGMENT_BYTES
from netem.link import Link
from netem.network import CUT_BPS, slowest
from netem.segments import Message, Segment

_MOST_SLACK_S = 0.002


class Flow:
    """Messages to one peer that keep their order. The flows of a lane take turns."""

    __slots__ = ("deficit", "fresh", "lane", "messages", "served", "waiting")

    def __init__(self, lane: Lane) -> None:
        self.lane = lane
        self.messages: deque[Message] = deque()
        self.deficit = 0
        self.fresh = False  # has joined the port's ring, and has had no turn yet
        self.waiting = False  # is in the port's ring
        self.served = False  # has had its quantum for this turn


class Lane:
    """The queues of messages to one peer, and the link that numbers their segments."""

    def __init__(self, peer: str, link: Link, port: Port, bucket: TokenBucket | None, delay: Delay) -> None:
        self.peer = peer
        self.place = (peer < port.name, peer)  # order among the port's lanes: names after the node's own first
        self.link = link
        self.port = port
        self.bucket = bucket  # its own, in addition to the port's
        self.delay = delay
        self.epoch = 0  # rises when segments under way are no longer to be sent
        self.urgent: deque[Message] = deque()
        self.flows: dict[int, Flow] = {}
        self.open: dict[int, Message] = {}  # not yet acknowledged as a whole, in order of identity
        self.stalled_s = 0.0  # total time that the link was idle because this host gave credit late
        self.reshaped_at = -math.inf
        self.pair_bps: float | None = None  # what the profile lets through while no other lane is used
        self._since_stall_bytes = 0
        self._next_ident = 0

    @property
    def cut(self) -> bool:
        return self.delay.shape.rate_bps == CUT_BPS

    @property
    def free_at(self) -> float:
        if self.cut:
            return math.inf
        return -math.inf if self.bucket is None else self.bucket.free_at

    @property
    def slack_s(self) -> float:
        """How long a choice may be put off. The segment's latency is longer, so it is not late for that."""
        shape = self.delay.shape
        return min((shape.latency_s - shape.jitter_s) / 4, _MOST_SLACK_S)

    @property
    def rate_bps(self) -> float | None:
        """The rate at which its next segment leaves."""
        own_bps = None if self.bucket is None else self.bucket.rate_bps
        return slowest(own_bps, self.port.bucket.rate_bps)

    def reserve(self, nbytes: float, ready: float) -> float:
        """Reserve bytes in all buckets that they pass; return their departure."""
        buckets = (self.port.bucket,) if self.bucket is None else (self.port.bucket, self.bucket)
        return reserve_jointly(buckets, nbytes, ready)

    def count_stall(self, segment: Segment, ready: float) -> None:
        """Count the time for which the link was idle, and `segment` waited for credit until `ready`.

        The window covers the round trip and more, so late credit is the fault of this host: of the receiving process
        or of this one. After a loss or a change of the link, late credit is right, and nothing is counted. Where lanes
        share a NIC, only the time beyond that of equal turns of all lanes is counted.
        """
        message = segment.message
        if message is None or message.urgent or self.delay.shape.loss or message.queued_at < self.reshaped_at:
            return
        idle_s = ready - max(message.queued_at, self.port.bucket.free_at)
        if idle_s > 0 and self.pair_bps and self.rate_bps:
            slowest_s = len(self.port.lanes) * self._since_stall_bytes * 8 / self.pair_bps
            self.stalled_s += max(0.0, idle_s + self._since_stall_bytes * 8 / self.rate_bps - slowest_s)
            self._since_stall_bytes = 0
        self._since_stall_bytes += segment.wire_bytes

    def enqueue(self, message: Message) -> None:
        message.ident = self._next_ident
        message.stalled_before_s = self.stalled_s
        self._next_ident += 1
        self.open[message.ident] = message
        if self.cut:
            self.link.stick(message.queued_at)
        self._queue(message)

    def restart(self) -> None:
        """Queue all messages again, from their first byte, that were not acknowledged as a whole."""
        self._clear()
        self.epoch += 1
        for message in self.open.values():
            message.rewind()
            self._queue(message)

    def abandon(self) -> list[Message]:
        """Drop and return all messages. Segments that have been scheduled are still sent."""
        self._clear()
        dropped = list(self.open.values())
        self.open.clear()
        self.link.stuck_since = None
        return dropped

    def drop_older(self, generation: int) -> list[Message]:
        """Drop and return the bulk messages of generations before `generation` that still have bytes to send.

        The peer would drop them as well, but only after they had used the link.
        """
        dropped = []
        for flow in self.flows.values():
            stale = [message for message in flow.messages if 0 < message.generation < generation]
            if stale:
                flow.messages = deque(m for m in flow.messages if not 0 < m.generation < generation)
                dropped += stale
        for message in dropped:
            del self.open[message.ident]
        if not self.open:
            self.link.stuck_since = None
        return dropped

    def finish(self, released: list[Segment]) -> list[Message]:
        """The messages that are complete with the acknowledged segments `released`."""
        done = []
        for segment in released:
            message = segment.message
            if segment.last and message is not None and self.open.pop(message.ident, None) is not None:
                done.append(message)
        return done

    def sendable(self, segment_bytes: int) -> bool:
        """Whether credit allows a segment to be sent, acknowledgements apart."""
        link = self.link
        if link.must_repeat:
            return True
        if self.urgent and link.has_credit(self.urgent[0].next_bytes(urgent_bytes(segment_bytes)), True):
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
            self.port.join(flow)

    def _clear(self) -> None:
        self.urgent.clear()
        for flow in self.flows.values():
            flow.messages.clear()


class Port:
    """Lanes of the node `name` that share one bucket, which sends one segment at a time."""

    def __init__(self, name: str, bucket: TokenBucket, segment_bytes: int) -> None:
        self.name = name
        self.bucket = bucket
        self.segment_bytes = segment_bytes
        self.lanes: deque[Lane] = deque()
        self.ring: deque[Flow] = deque()

    def wakes_at(self) -> float:
        """The latest time to choose the next segment.

        It is a little after the segment could begin. Deadlines are absolute, so a late choice costs nothing if it comes
        well before the segment's arrival, and one wake-up then serves both a choice and a write.
        """
        earliest = math.inf
        for lane in self.lanes:
            at = lane.free_at if lane.sendable(self.segment_bytes) else max(lane.link.ack_due, lane.free_at)
            at = max(at, self.bucket.free_at) + lane.slack_s
            if at < earliest:
                earliest = at
        return earliest

    def join(self, flow: Flow) -> None:
        """Put `flow`, which has a message, at the end of the ring; flows that came together are sorted by `place`.

        So when every node sends to every other at once, each begins with another peer. If all began with the same peer,
        its NIC would receive a segment from each of them before the last peer's NIC received any, and the last transfer
        would be late by that much; in a network of packets it is not.
        """
        since = flow.messages[0].queued_at - _MOST_SLACK_S
        behind: list[Flow] = []
        while self.ring and self._yields(self.ring[-1], flow, since):
            behind.append(self.ring.pop())
        flow.waiting = flow.fresh = True
        self.ring.append(flow)
        self.ring.extend(reversed(behind))

    @staticmethod
    def _yields(other: Flow, flow: Flow, since: float) -> bool:
        """Whether `flow` goes before `other`. Only where both came within a moment, so that no flow waits for long."""
        came_with_it = other.fresh and bool(other.messages) and other.messages[0].queued_at >= since
        return came_with_it and other.lane.place > flow.lane.place

    def choose(self, now: float) -> tuple[Lane, Segment, float] | None:
        """The next segment with its header, and the time at which it was ready; None if none is ready by `now`."""
        return self._control(now) or self._bulk(now)

    def _control(self, now: float) -> tuple[Lane, Segment, float] | None:
        for lane in self.lanes:
            link = lane.link
            if not (lane.urgent or link.ack_due <= now or link.must_repeat) or lane.free_at > now:
                continue
            if link.must_repeat:
                return self._turn(lane), link.repeat(), now
            urgent = urgent_bytes(self.segment_bytes)
            if lane.urgent and link.has_credit(lane.urgent[0].next_bytes(urgent), True):
                message = lane.urgent[0]
                return self._turn(lane), self._cut(lane, lane.urgent, urgent), max(message.queued_at, link.ready_at)
            if link.ack_due <= now and (link.ack_overdue <= now or not lane.sendable(self.segment_bytes)):
                ready = link.ack_due
                return self._turn(lane), link.acknowledgement(), ready
        return None

    def _turn(self, lane: Lane) -> Lane:
        if len(self.lanes) > 1:
            self.lanes.remove(lane)
            self.lanes.append(lane)
        return lane

    def _bulk(self, now: float) -> tuple[Lane, Segment, float] | None:
        """Deficit round robin (Shreedhar and Varghese, 1995): one segment per call; the quantum is a full segment."""
        ring = self.ring
        visits = 2 * len(ring)
        while visits and ring:
            visits -= 1
            flow = ring[0]
            if not flow.messages:
                ring.popleft()
                flow.waiting = flow.served = False
                flow.deficit = 0  # an idle flow keeps no credit
                continue
            lane = flow.lane
            nbytes = flow.messages[0].next_bytes(self.segment_bytes)
            if lane.free_at <= now and lane.link.has_credit(nbytes, False):
                if not flow.served:
                    flow.served, flow.fresh = True, False
                    flow.deficit += self.segment_bytes
                if nbytes <= flow.deficit:
                    flow.deficit -= nbytes
                    ready = max(flow.messages[0].queued_at, lane.link.ready_at)
                    return lane, self._cut(lane, flow.messages, self.segment_bytes), ready
            flow.served = flow.fresh = False
            ring.rotate(-1)
        return None

    def _cut(self, lane: Lane, queue: deque[Message], segment_bytes: int) -> Segment:
        segment = queue[0].cut(segment_bytes)
        if segment.last:
            queue.popleft()
        lane.link.stamp(segment)
        return segment


def urgent_bytes(segment_bytes: int) -> int:
    """The largest segment of an urgent message, where those of bulk have `segment_bytes`."""
    return min(segment_bytes, URGENT_SEGMENT_BYTES)
