"""The endpoint: one I/O thread that joins the state machines to the sockets and the clock.

The only thing that the upper floors see of the network. It decides nothing itself: `netem.shaper` says what is
written when, `netem.link` what arrives, `netem.assembly` where it goes, `netem.peers` who is heard; `netem.sockets`
holds ZeroMQ. Other threads hand in commands through a queue; they are made to wait only where they give a time limit
(`send`, `flush`, `close`).
"""

from __future__ import annotations

import math
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from netem import frames
from netem.assembly import Assembler, Receiver
from netem.counters import LinkCounters
from netem.errors import ConfigError, IsthmusError, PeerSilent, ProtocolError, QueueFull
from netem.ingress import Ingress
from netem.limits import MAX_NAME_BYTES, Limits
from netem.link import Link, Silence, Verdict
from netem.names import SEPARATOR, plain
from netem.network import Profile
from netem.peers import STRANGERS, Peer, Peers
from netem.schedule import Schedule
from netem.segments import Message
from netem.shaper import Shaper
from netem.sockets import Frame, Sockets, parse_address

if TYPE_CHECKING:
    from typing_extensions import Buffer

_DEFAULT_LIMITS = Limits()
_TICK_S = 0.05  # how often the links' timers are looked at while something is unacknowledged
_IDLE_S = 1.0
_LINGER_S = 0.2

_clock = time.monotonic


def unique(name: str) -> str:
    """A name for an endpoint that no other process has, and that only those can guess who are told (`netem.names`)."""
    return f"{name}{SEPARATOR}{secrets.token_hex(8)}"


class Endpoint:
    """One node's place in the emulated network. `profile` shapes what leaves here, between `name` and each peer.

    Raises `ConfigError` where `bind` is not "tcp://INTERFACE:PORT", or cannot be bound. With `bind=None` nobody can
    dial this endpoint; it is answered over the connections that it opened. `address` is where it is bound, with the
    port resolved, or empty. Two processes that can meet must not bear one `name`: see `unique`.
    """

    def __init__(
        self,
        name: str,
        run_id: str,
        profile: Profile,
        receiver: Receiver,
        *,
        bind: str | None,
        limits: Limits = _DEFAULT_LIMITS,
    ) -> None:
        _check_name(name, "name", MAX_NAME_BYTES)
        _check_name(run_id, "run_id", 64)
        self.name = name
        self._run_id = run_id
        self._profile = profile
        self._receiver = receiver
        self._limits = limits
        self._sockets = Sockets(name, bind, limits)
        self.address = self._sockets.address
        self._shaper = Shaper(name, profile)
        self._ingress: Ingress[tuple[str, frames.Header, memoryview]] | None = None
        if profile.scope == "nic":
            self._ingress = Ingress(profile.nic_down_bps(name) or None)
        self._peers = Peers(limits.max_strangers, self._open_peer, self._forget)
        self._incarnation = 0
        self._generation = 0
        self._next_tick = -math.inf
        self._closing_by = math.inf
        self._schedule = Schedule(profile)
        self._began = 0.0
        self._changes_at = math.inf
        # Shared with the callers' threads.
        self._commands: deque[Callable[[], None]] = deque()
        self._awake = False
        self._settled = threading.Condition()
        self._queued_bytes = 0
        self._queued_messages = 0
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name=f"netem {name}", daemon=True)
        self._thread.start()

    # ── Called by any thread ─────────────────────────────────────────────────────────────────────────────────────

    def connect(self, peer: str, address: str, *, answers_only: bool = False) -> None:
        """Dial `peer` at "tcp://HOST:PORT". It need not be there yet. Again with another address: dial that instead.

        With `answers_only`, the peer is heard over this connection alone: who calls us under its name is a stranger.
        """
        parse_address(address, f"address of {plain(peer)}", dial=True)
        _check_name(peer, "peer", MAX_NAME_BYTES)
        self._submit(lambda: self._connect(peer, address, answers_only))

    def trust(self, peer: str) -> None:
        """The peer, which called us, is a stranger no more."""
        self._submit(lambda: self._peers.trust(peer))

    def send(
        self,
        peer: str,
        tag: bytes,
        buffers: Sequence[Buffer] = (),
        *,
        urgent: bool = False,
        flow: int = 0,
        timeout_s: float = 0.0,
    ) -> None:
        """Queue one message: an opaque `tag`, and contiguous buffers that arrive as one.

        The buffers are not copied and must not change until the message is acknowledged. Urgent messages go before
        all others; bulk messages of one `flow` keep their order, and flows share a link fairly.

        Returns at once where there is room, which an urgent message always has, and any where none waits; else waits
        up to `timeout_s` for it, and raises `QueueFull` then. Room comes from the I/O threads alone, here and at the
        peer: no thread that sends is needed for it, so two that wait for room cannot wait for each other.
        Raises `IsthmusError` where the endpoint is closed.
        """
        assert not timeout_s or threading.current_thread() is not self._thread, "nobody else would make room"
        views = [memoryview(buffer) for buffer in buffers]
        message = Message(
            tag,
            [view.cast("B") for view in views if view.nbytes],
            generation=self._generation,
            urgent=urgent,
            flow=flow,
            queued_at=_clock(),
        )
        if len(tag) > self._limits.max_tag_bytes or message.total_bytes > self._limits.max_message_bytes:
            raise IsthmusError(
                f"a message to {plain(peer)} with a tag of {len(tag)} and a payload of {message.total_bytes} bytes; "
                f"at most {self._limits.max_tag_bytes} and {self._limits.max_message_bytes} are allowed"
            )
        with self._settled:
            room = urgent or self._settled.wait_for(lambda: self._stopped or self._has_room(message), timeout_s)
            if self._stopped:
                raise IsthmusError(f"{plain(self.name)}: the endpoint is closed")
            if not room:
                raise QueueFull(
                    f"{plain(self.name)}: {self._queued_bytes} bytes wait to be sent, at most "
                    f"{self._limits.max_queued_bytes} may; the network ({self._profile}) is slower than what is sent"
                )
            if not urgent:
                self._queued_bytes += message.total_bytes
            self._queued_messages += 1
        self._submit(lambda: self._send(peer, message))

    def set_generation(self, generation: int) -> None:
        """The membership's version: stamped on what is sent from now on; what arrives with an older one is dropped.

        Bulk of older generations that is not yet on the way is dropped as well. Generation 0, in which an endpoint
        begins, is beside all others and never stale: who is not a member yet, or speaks for nobody, may be heard.
        """
        self._generation = generation
        self._submit(lambda: self._retire(generation))

    def reshape(self, profile: Profile) -> None:
        """The network changes, as soon as the I/O thread comes round: rates, latencies, links that are cut or healed.

        Nothing in flight is lost, and order is kept. Over a link that is cut nothing passes, and its peers fall silent
        as they would. What leaves here is shaped here, so each endpoint is to be told. Raises `ConfigError` where the
        scope or the dilation is another: those hold for a whole run.
        """
        self.follow(Schedule(profile), 0.0)

    def follow(self, schedule: Schedule, began: float) -> None:
        """Be what `schedule` says from now on, at its times; `began`, of the monotonic clock, is its 0.

        As `reshape`, whenever something changes. Another schedule takes this one's place.
        """
        for key in ("scope", "dilation"):
            before, after = getattr(self._profile, key), getattr(schedule.profile, key)
            if before != after:
                raise ConfigError(f"net.{key} = {after!r}: expected {before!r}; it cannot change in a run")
        self._submit(lambda: self._follow(schedule, began))

    def forget(self, peer: str) -> None:
        """Drop the peer: what waits for it, what it has half sent, and the connection to it. Its counters stay.

        Should it speak again, it is met as new.
        """
        self._submit(lambda: self._forget(peer))

    def counters(self) -> dict[str, LinkCounters]:
        """A copy of the totals for each peer."""
        return self._peers.counters()

    def flush(self, timeout_s: float) -> bool:
        """Wait until all that was sent has been acknowledged. False if the time was not enough."""
        with self._settled:
            done = self._settled.wait_for(lambda: not self._queued_messages or self._stopped, timeout_s)
            return done and not self._queued_messages

    def close(self, timeout_s: float = 5.0) -> None:
        """Say the acknowledgements that are owed, drop the rest (see `flush`), and end the thread. Twice is fine."""
        deadline = _clock() + timeout_s
        self._submit(lambda: self._begin_to_close(deadline))
        self._thread.join(timeout_s + 2 * _LINGER_S)
        if self._thread.is_alive():
            name = plain(self.name)
            raise IsthmusError(f"{name}: the I/O thread did not end within {timeout_s:g} s; a callback blocks it")

    def _has_room(self, message: Message) -> bool:
        return not self._queued_bytes or self._queued_bytes + message.total_bytes <= self._limits.max_queued_bytes

    def _submit(self, command: Callable[[], None]) -> None:
        self._commands.append(command)
        with self._settled:  # flag and wake-up change together, or a late byte would keep the thread spinning
            if not self._awake and not self._stopped:
                self._awake = True
                self._sockets.wake()

    # ── The I/O thread ───────────────────────────────────────────────────────────────────────────────────────────

    def _run(self) -> None:
        try:
            while _clock() < self._closing_by:
                self._turn()
        except BaseException as error:
            self._receiver.failed(IsthmusError(f"{plain(self.name)}: the I/O thread broke: {error!r}"))
            raise
        finally:
            with self._settled:
                self._stopped = True
                self._settled.notify_all()
            self._sockets.close(_LINGER_S)

    def _turn(self) -> None:
        if self._awake:
            with self._settled:  # before the queue is emptied: a command after that wakes again
                self._awake = False
                self._sockets.woken()
            while self._commands:
                self._commands.popleft()()
        now = _clock()
        if now >= self._changes_at:
            self._reshape(now)
        self._write(now)
        if self._closing_by < math.inf:
            if self._shaper.next_time() == math.inf:
                self._closing_by = -math.inf
            busy = False
        else:
            busy = self._read()
            self._tick(_clock())
        if not busy:
            self._sockets.wait(self._next_time() - _clock())

    def _next_time(self) -> float:
        at = min(self._shaper.next_time(), self._closing_by, self._changes_at, _clock() + _IDLE_S)
        if self._ingress is not None:
            at = min(at, self._ingress.next_time())
        if any(peer.link.in_flight_bytes or peer.lane.open for _, peer in self._peers):
            at = min(at, self._next_tick)
        return at

    def _write(self, now: float) -> None:
        for arrival, lane, segment in self._shaper.poll(now):
            # One that cannot be routed is lost, like any other; the link's timer sees to it.
            self._sockets.write(lane.peer, segment.header, segment.payload)
            lane.link.written(segment, now)
            counters = self._peers.counters_of(lane.peer)
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
        if self._ingress is not None:
            for name, header, payload in self._ingress.poll(_clock()):
                if self._peers.may_meet(name):
                    self._take(self._peers.meet(name), header, payload)
        return busy

    def _arrived(self, name: str, parts: list[Frame]) -> None:
        """Check a frame. Nonsense is reported if it comes from a peer, and only counted if it comes from nobody."""
        nbytes = sum(len(part) for part in parts)
        try:
            if len(parts) != 2:
                raise ProtocolError(f"a frame of {len(parts)} parts in place of 2")
            header = frames.decode(parts[0].bytes, max_tag_bytes=self._limits.max_tag_bytes)
            payload = parts[1].buffer
            frames.check_payload(header, payload.nbytes)
        except ProtocolError as error:
            self._peers.refuse(name, nbytes)
            if name in self._peers:
                self._receiver.failed(ProtocolError(str(error), peer=name))
            return
        if header.run_id != self._run_id or not self._peers.may_meet(name):
            self._peers.refuse(name, nbytes)
            return
        peer = self._peers.hear(name)
        peer.counters.received_wire_bytes += nbytes
        if self._ingress is None:
            self._take(peer, header, payload)
        else:
            self._ingress.push(name, (name, header, payload), nbytes, _clock())

    def _take(self, peer: Peer, header: frames.Header, payload: memoryview) -> None:
        """A frame is through the network: hand it to the link and, if it is the next, to the assembler."""
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
            counters.received_messages += peer.assembler.add(header, payload, self._generation)
        except ProtocolError as error:
            self._receiver.failed(error)
        counters.dropped += peer.assembler.take_dropped()

    def _tick(self, now: float) -> None:
        if now < self._next_tick:
            return
        self._next_tick = now + _TICK_S
        for name, peer in self._peers:
            if peer.link.check(now) is Silence.DEAD:
                self._receiver.failed(PeerSilent(name, self._limits.silent_s))

    # ── Commands, in the order in which they were given ──────────────────────────────────────────────────────────

    def _connect(self, peer: str, address: str, answers_only: bool) -> None:
        self._sockets.connect(peer, address, answers_only)
        self._peers.trust(peer)

    def _send(self, name: str, message: Message) -> None:
        if self._closing_by < math.inf:
            self._settle([message])
        else:
            self._peers.meet(name).lane.enqueue(message)

    def _retire(self, generation: int) -> None:
        for _, peer in self._peers:
            self._settle(peer.lane.drop_older(generation))
            peer.assembler.retire(generation)
            peer.counters.dropped += peer.assembler.take_dropped()

    def _forget(self, name: str) -> None:
        self._sockets.disconnect(name)
        if self._peers.remove(name):
            self._settle(self._shaper.remove(name))

    def _follow(self, schedule: Schedule, began: float) -> None:
        self._schedule, self._began = schedule, began
        self._reshape(_clock())

    def _reshape(self, now: float) -> None:
        elapsed_s = max(0.0, now - self._began)
        self._changes_at = self._began + self._schedule.next_change_s(elapsed_s)
        profile = self._schedule.profile_at(elapsed_s)
        if profile == self._profile:
            return
        self._profile = profile
        self._shaper.reshape(profile, now)
        if self._ingress is not None:
            self._ingress.reshape(profile.nic_down_bps(self.name) or None, now)
        for name, peer in self._peers:
            if not peer.lane.cut:  # one that is cut keeps what it had
                peer.link.resize(*self._sizes(name))

    def _begin_to_close(self, deadline: float) -> None:
        self._closing_by = deadline
        for _, peer in self._peers:
            self._settle(peer.lane.abandon())
            peer.link.restart()

    def _settle(self, messages: Sequence[Message]) -> None:
        """These are no longer waited for: acknowledged, or dropped."""
        if not messages:
            return
        with self._settled:
            self._queued_messages -= len(messages)
            self._queued_bytes -= sum(message.total_bytes for message in messages if not message.urgent)
            self._settled.notify_all()

    def _open_peer(self, name: str, counters: LinkCounters) -> Peer:
        # Wall-clock nanoseconds: a process that is started again has a higher number than it had before.
        self._incarnation = max(time.time_ns(), self._incarnation + 1)
        window_bytes, resend_s, silent_s = self._sizes(name)
        link = Link(
            self._run_id,
            self._incarnation,
            window_bytes=window_bytes,
            resend_s=resend_s,
            silent_s=silent_s,
            ack_delay_s=self._limits.ack_delay_s,
        )
        assembler = Assembler(name, self._receiver, self._limits)
        return Peer(link, self._shaper.add(name, link), assembler, counters)

    def _sizes(self, peer: str) -> tuple[int, float, float]:
        """The link's window in bytes, after how many seconds it sends again, and after how many a peer is silent."""
        round_trip_s = self._profile.round_trip_s(self.name, peer)
        window_bytes = self._profile.credit_bytes(self.name, peer)
        return window_bytes, self._limits.resend_s + round_trip_s, self._limits.silent_s + round_trip_s


def _check_name(name: str, key: str, max_bytes: int) -> None:
    if not name or not name.isprintable() or not name.isascii() or len(name) > max_bytes or name == STRANGERS:
        raise ConfigError(f"{key} = {name!r}: expected 1 to {max_bytes} printable ASCII characters")
