"""What an endpoint's I/O thread does: it joins the state machines to the sockets and the clock.

The decisions are elsewhere: `netem.shaper` computes when segments are written, `netem.ingress` when they have passed
the receiving NIC, `netem.link` which one is next in order, `netem.assembly` where its bytes go, `netem.peers` which
peers are heard. `netem.sockets` has ZeroMQ. There are no locks in here: only the I/O thread calls this module, and
`netem.endpoint` passes it the commands of other threads.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

from netem import frames
from netem.assembly import Assembler, Receiver
from netem.counters import LinkCounters
from netem.errors import PeerSilent, ProtocolError
from netem.ingress import Ingress
from netem.limits import Limits
from netem.link import Link, Silence, Terms, Verdict
from netem.network import Profile
from netem.peers import STRANGERS, Peer, Peers
from netem.schedule import Schedule
from netem.segments import Message
from netem.shaper import Shaper
from netem.sockets import Frame, Sockets

_TICK_S = 0.05  # how often the links' timers are checked while something is unacknowledged
_IDLE_S = 1.0
_WINDOWS_WAITING = 4  # most bytes of a peer that may wait for the receiving NIC, in windows

_clock = time.monotonic


class Engine:
    """The state of one endpoint. `settle` is called with messages that are acknowledged or dropped."""

    def __init__(
        self,
        name: str,
        run_id: str,
        profile: Profile,
        receiver: Receiver,
        sockets: Sockets,
        limits: Limits,
        settle: Callable[[Sequence[Message]], None],
    ) -> None:
        self.profile = profile
        self.generation = 0
        self.closing_by = math.inf
        self.peers = Peers(limits.max_strangers, self._open_peer, self._evict)
        self._name = name
        self._run_id = run_id
        self._receiver = receiver
        self._sockets = sockets
        self._limits = limits
        self._settle = settle
        self._shaper = Shaper(name, profile)
        self._ingress: Ingress[tuple[str, frames.Header, memoryview]] | None = None
        if profile.scope == "nic":
            self._ingress = Ingress(profile.nic_down_bps(name) or None)
        self._incarnation = 0
        self._next_tick = -math.inf
        self._schedule = Schedule(profile)
        self._began = 0.0
        self._changes_at = math.inf

    def turn(self) -> bool:
        """Write and read what is due. False if there was nothing to read: the caller then waits until `next_time`."""
        now = _clock()
        if now >= self._changes_at:
            self._reshape(now)
        self._write(now)
        if self.closing_by < math.inf:
            if self._shaper.next_time() == math.inf:
                self.closing_by = -math.inf
            return False
        busy = self._read()
        self._tick(_clock())
        return busy

    def next_time(self) -> float:
        """When `turn` is to be called next, if no frame arrives before."""
        at = min(self._shaper.next_time(), self.closing_by, self._changes_at, _clock() + _IDLE_S)
        if self._ingress is not None:
            at = min(at, self._ingress.next_time())
        if any(peer.link.in_flight_bytes or peer.lane.open for _, peer in self.peers):
            at = min(at, self._next_tick)
        return at

    def _write(self, now: float) -> None:
        for arrival, lane, segment in self._shaper.poll(now):
            # A frame that cannot be routed is lost; the link's timer sends it again.
            self._sockets.write(lane.peer, frames.stamped(segment.header, arrival), segment.payload)
            lane.link.written(segment, now)
            counters = self.peers.counters_of(lane.peer)
            counters.segments += 1
            counters.wire_bytes += segment.wire_bytes
            if segment.resent:
                counters.resent_bytes += segment.wire_bytes
            elif segment.message is not None:
                counters.payload_bytes += segment.nbytes
                counters.messages += segment.last
            written = _clock()
            late_s = written - arrival
            message = segment.message
            if message is not None and segment.last and not segment.resent and lane.rate_bps and not message.urgent:
                counters.note_transfer(written - message.queued_at, late_s, lane.stalled_s - message.stalled_before_s)
            counters.lateness_s += late_s
            if late_s > counters.lateness_max_s:
                counters.lateness_max_s = late_s

    def _read(self) -> bool:
        busy = False
        for peer, parts in self._sockets.read():
            busy = True
            self._arrived(peer, parts)
        for refusal in self._sockets.refused():
            self._receiver.failed(refusal)
        if self._ingress is not None:
            for name, header, payload in self._ingress.poll(_clock()):
                if self.peers.may_meet(name):
                    self._take(self.peers.meet(name), header, payload)
        return busy

    def _arrived(self, name: str, parts: list[Frame]) -> None:
        """Check a frame. An invalid one is reported if it comes from a peer, and only counted otherwise."""
        try:
            if len(parts) != 2:
                raise ProtocolError(f"a frame of {len(parts)} parts in place of 2")
            first = parts[0].bytes
            head, stamp_s = frames.unstamped(first)
            header = frames.decode(head, max_tag_bytes=self._limits.max_tag_bytes)
            payload = parts[1].buffer
            frames.check_payload(header, payload.nbytes)
        except ProtocolError as error:
            self.peers.refuse(name, sum(len(part) for part in parts))
            if name in self.peers:
                self._receiver.failed(ProtocolError(str(error), peer=name))
            return
        nbytes = len(first) + payload.nbytes
        if header.run_id != self._run_id or not self.peers.may_meet(name):
            self.peers.refuse(name, nbytes)
            return
        peer = self.peers.hear(name, nbytes)
        queue = STRANGERS if self.peers.is_stranger(name) else name
        most_bytes = self._limits.max_stranger_bytes
        if queue == STRANGERS and most_bytes is not None and peer.heard_bytes > most_bytes:
            peer.counters.dropped += 1
            self._sockets.hang_up(name)
        elif self._ingress is None:
            self._take(peer, header, payload)
        elif self._ingress.waiting_bytes(queue) > _WINDOWS_WAITING * peer.most_window_bytes:
            peer.counters.dropped += 1  # the peer ignores its credit and would fill the memory; it sends again
        else:
            self._ingress.push(queue, (name, header, payload), nbytes, peer.clock.arrival(stamp_s, _clock()))

    def _take(self, peer: Peer, header: frames.Header, payload: memoryview) -> None:
        """A frame has passed the network: give it to the link and, if it is the next, to the assembler."""
        link = peer.link
        now = _clock()
        if link.renewed(header):
            peer.assembler.reset()
            peer.lane.restart()
        verdict = link.receive(header, now)
        if link.released:
            self._settle(peer.lane.finish(link.released))
            link.released.clear()
        if verdict is Verdict.NEXT:
            self._assemble(peer, header, payload, now)
        elif verdict is not Verdict.ACK:
            peer.counters.duplicates += 1

    def _assemble(self, peer: Peer, header: frames.Header, payload: memoryview, now: float) -> None:
        counters = peer.counters
        name = peer.lane.peer
        if not frames.intact(header, payload):
            counters.dropped += 1  # not accepted, so it is sent again
            self._receiver.failed(
                ProtocolError(
                    f"a segment of message {header.message} does not match its checksum; were its buffers changed "
                    "before it was acknowledged?",
                    peer=name,
                    generation=header.generation,
                )
            )
            return
        peer.link.accept(payload.nbytes, now)
        counters.received_payload_bytes += payload.nbytes
        try:
            counters.received_messages += peer.assembler.add(header, payload, self.generation)
        except ProtocolError as error:
            self._receiver.failed(error)
        counters.dropped += peer.assembler.take_dropped()

    def _tick(self, now: float) -> None:
        if now < self._next_tick:
            return
        self._next_tick = now + _TICK_S
        for name, peer in self.peers:
            if peer.link.check(now) is Silence.DEAD:
                self._receiver.failed(PeerSilent(name, self._limits.silent_s))

    # ── Commands, in the order in which they were given ──────────────────────────────────────────────────────────

    def connect(self, peer: str, address: str, answers_only: bool, key: str, encrypted: bool) -> None:
        """As `Endpoint.connect`."""
        self._sockets.connect(peer, address, answers_only, key, encrypted)
        self.trust(peer)

    def trust(self, name: str) -> None:
        """As `Endpoint.trust`. Strangers share one place in the queue of the NIC; a peer has one of its own."""
        if self._ingress is not None and self.peers.is_stranger(name):
            self._ingress.move(STRANGERS, name, lambda item: item[0] == name)
        self.peers.trust(name)

    def send(self, name: str, message: Message) -> None:
        """Queue a message; while the endpoint closes, drop it, and bulk of a generation that is over too."""
        stale = not message.urgent and 0 < message.generation < self.generation
        if stale or self.closing_by < math.inf:
            self._settle([message])
        else:
            self.peers.meet(name).lane.enqueue(message)

    def retire(self, generation: int) -> None:
        """Drop the bulk messages of earlier generations that still have bytes to send."""
        for _, peer in self.peers:
            self._settle(peer.lane.drop_older(generation))
            peer.assembler.retire(generation)
            peer.counters.dropped += peer.assembler.take_dropped()

    def forget(self, name: str) -> None:
        """Drop the peer and all that waits for it."""
        self._sockets.disconnect(name)
        self._sockets.bar(name)
        if self.peers.remove(name):
            self._settle(self._shaper.remove(name))

    def _evict(self, stranger: str) -> None:
        self._sockets.hang_up(stranger)
        self.forget(stranger)

    def follow(self, schedule: Schedule, began: float) -> None:
        """Apply `schedule` from now on; `began` is its time 0."""
        self._schedule, self._began = schedule, began
        self._reshape(_clock())

    def _reshape(self, now: float) -> None:
        elapsed_s = max(0.0, now - self._began)
        self._changes_at = self._began + self._schedule.next_change_s(elapsed_s)
        profile = self._schedule.profile_at(elapsed_s)
        if profile == self.profile:
            return
        self.profile = profile
        self._shaper.reshape(profile, now)
        if self._ingress is not None:
            self._ingress.reshape(profile.nic_down_bps(self._name) or None, now)
        for name, peer in self.peers:
            if not peer.lane.cut:  # a lane that is cut keeps its window
                peer.link.resize(self._terms(name))
                peer.most_window_bytes = max(peer.most_window_bytes, peer.link.peer_window_bytes)

    def begin_to_close(self, deadline: float) -> None:
        """Drop all messages; end when the owed acknowledgements have been written, or at `deadline`."""
        self.closing_by = deadline
        for _, peer in self.peers:
            self._settle(peer.lane.abandon())
            peer.link.restart()

    def _open_peer(self, name: str, counters: LinkCounters) -> Peer:
        # Wall-clock nanoseconds: a process that is started again has a higher number than it had before.
        self._incarnation = max(time.time_ns(), self._incarnation + 1)
        link = Link(self._run_id, self._incarnation, self._terms(name))
        assembler = Assembler(name, self._receiver, self._limits)
        return Peer(link, self._shaper.add(name, link), assembler, counters)

    def _terms(self, peer: str) -> Terms:
        profile, limits = self.profile, self._limits
        round_trip_s = profile.round_trip_s(self._name, peer)
        return Terms(
            window_bytes=profile.credit_bytes(self._name, peer),
            peer_window_bytes=profile.credit_bytes(peer, self._name),
            resend_s=limits.resend_s + round_trip_s,
            silent_s=limits.silent_s + round_trip_s,
            ack_delay_s=profile.ack_delay_s(peer, self._name),
        )
