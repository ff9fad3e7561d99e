"""The running coordinator: `Run` with an endpoint, a clock and callbacks around it.

The endpoint's I/O thread puts what arrives on a queue, with its time. The loop in the calling thread hands events and
ticks to the machine and carries out its actions. All decisions about members are in `run`. This module only limits
strangers, that is, peers that are not members: to a few at once, and to a few small messages from each.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

import msgspec

from coordinator.config import CoordinatorConfig
from coordinator.doorkeeper import Doorkeeper
from coordinator.events import (
    Action,
    Cancelled,
    CheckpointComplete,
    CheckpointFailed,
    Event,
    Fault,
    Faulted,
    Finish,
    Follow,
    Forget,
    PeerLost,
    Received,
    Record,
    Say,
    Send,
    Tick,
)
from coordinator.files.collector import Collector, Reply
from coordinator.files.messages import FileMessage, file_tag, read_file_tag
from coordinator.messages import (
    CONTROL_TAG,
    COORDINATOR,
    MAX_BODY_BYTES,
    RUN_ID,
    CoordinatorMessage,
    Refused,
    Watch,
    Watched,
    control_buffer,
    decode_from_node,
    encode,
    shorten,
)
from coordinator.plan import RunPlan
from coordinator.run import Phase, Run
from coordinator.state import SavedState
from netem.endpoint import Endpoint
from netem.errors import IsthmusError, PeerSilent, ProtocolError
from netem.limits import URGENT_SEGMENT_BYTES, Limits
from netem.names import plain

log = logging.getLogger("isthmus.coordinator")

_FLUSH_TIMEOUT_S = 2.0
_TELL_EVERY_S = 10.0
_MAX_BATCH = 10_000  # arrivals between two ticks; a flood must not stop the clock
LIMITS = Limits(
    max_strangers=64,
    max_stranger_bytes=64 << 10,
    max_open_messages=16,
    max_message_bytes=MAX_BODY_BYTES,
    max_tag_bytes=256,
    max_frame_bytes=URGENT_SEGMENT_BYTES,
    max_unread_frames=4,
)
"""Of an endpoint that takes control messages, also of strangers."""
_STRANGER_BYTES = 16 << 10  # most bytes in one message of a stranger; a Join is far smaller
_STRANGER_MESSAGES = 4  # most messages of one stranger that wait to be handled
_STRANGERS_MESSAGES = 1024  # most messages of all strangers that wait to be handled


class RunOutcome(NamedTuple):
    """How the run ended; `reason` says why where it is not `ok`."""

    ok: bool
    reason: str


class _Arrival(NamedTuple):
    peer: str
    body: memoryview
    arrived_s: float
    stranger: bool


class _FileArrival(NamedTuple):
    peer: str
    message: FileMessage
    data: memoryview


class _Inbox:
    """The endpoint's receiver. It runs on the I/O thread, so it only checks sizes and puts messages on the queue.

    The serving thread replaces `members` as a whole.
    """

    def __init__(self) -> None:
        self.queue: queue.SimpleQueue[_Arrival | _FileArrival | Event] = queue.SimpleQueue()
        self.members: frozenset[str] = frozenset()
        self._lock = threading.Lock()
        self._waiting: Counter[str] = Counter()  # messages of strangers, by peer

    def admit(self, peer: str, generation: int, tag: bytes, total_bytes: int) -> memoryview | None:
        if peer not in self.members and not self._hears(peer, total_bytes):
            return None
        if tag == CONTROL_TAG:
            return control_buffer(tag, total_bytes, peer)
        if peer not in self.members:
            raise ProtocolError("a stranger may send control messages only", peer=peer)
        read_file_tag(tag, total_bytes, peer)
        return memoryview(bytearray(total_bytes))

    def deliver(self, peer: str, generation: int, tag: bytes, buffer: memoryview) -> None:
        if tag != CONTROL_TAG:
            self.queue.put(_FileArrival(peer, read_file_tag(tag, len(buffer), peer), buffer))
            return
        stranger = peer not in self.members
        if stranger:
            with self._lock:
                self._waiting[peer] += 1
        self.queue.put(_Arrival(peer, buffer, time.monotonic(), stranger))

    def failed(self, error: IsthmusError) -> None:
        if isinstance(error, PeerSilent):
            self.queue.put(PeerLost(error.peer, str(error)))
        elif isinstance(error, ProtocolError) and error.peer:
            if error.peer in self.members:  # a stranger that breaks the protocol is ignored
                self.queue.put(Faulted(error.peer, str(error)))
        else:
            self.queue.put(Cancelled(f"the network failed: {error}"))

    def handled(self, arrival: _Arrival) -> None:
        """Note that a stranger's message has been taken from the queue."""
        with self._lock:
            self._waiting -= Counter((arrival.peer,))  # subtraction also drops counts of 0

    def _hears(self, stranger: str, total_bytes: int) -> bool:
        with self._lock:
            few = self._waiting[stranger] < _STRANGER_MESSAGES and self._waiting.total() < _STRANGERS_MESSAGES
        return few and total_bytes <= _STRANGER_BYTES


class CoordinatorServer:
    """One run's coordinator. It listens at `address` at once; `serve` blocks until the run is over.

    `record`, `fault` and `checkpoint_complete`, which takes a step and the number of nodes that wrote it, are called on
    the serving thread; an `OSError` from them ends the run. `show` gives the records after a line's number to those who
    watch, with where the run is in words. `keep` puts the run's state on disk before anything that follows from it is
    sent, and `state` is what an earlier coordinator has kept: this one goes on from it. `collector` takes and gives the
    files of checkpoints. Raises `ConfigError` where the
    chunks cannot be assigned or the address cannot be bound.
    """

    def __init__(
        self,
        config: CoordinatorConfig,
        plan: RunPlan,
        *,
        record: Callable[[Record], None],
        checkpoint_complete: Callable[[int, int], None],
        fault: Callable[[Fault], None] = lambda fault: None,
        show: Callable[[int, str], Watched] | None = None,
        keep: Callable[[SavedState], None] = lambda state: None,
        state: SavedState | None = None,
        collector: Collector | None = None,
    ) -> None:
        self._record = record
        self._fault = fault
        self._checkpoint_complete = checkpoint_complete
        self._show = show
        self._keep = keep
        self._collector = collector
        self._kept: SavedState | None = None
        self._restarts_from = state
        self._epoch_s = time.time() - time.monotonic()
        self._tick_s = min(0.25, config.heartbeat_interval_s / 2)
        self._still_s = max(config.heartbeat_timeout_s / 2, 2 * self._tick_s)
        self._turned_s = time.monotonic()
        self._run = Run(config, plan, time.monotonic())
        self._door = door = Doorkeeper(config, plan.run_name)
        self.operator_file = door.operator_file
        self._inbox = _Inbox()
        self._generation = 0
        self._told, self._tell_at_s = 0, 0.0  # refusals at the door
        self._outcome: RunOutcome | None = None
        profile = plan.schedule.profile
        self._endpoint = Endpoint(
            COORDINATOR,
            RUN_ID,
            profile,
            self._inbox,
            bind=config.address,
            limits=msgspec.structs.replace(LIMITS, max_strangers=LIMITS.max_strangers + config.layout.processes),
            access=door.access,
            door=door.limits,
        )
        self.address = self._endpoint.address

    def serve(self) -> RunOutcome:
        """Serve the run to its end, then close the endpoint. May be called once."""
        try:
            if self._restarts_from is not None:
                self._restart(self._restarts_from)
            self._turned_s = time.monotonic()
            while self._outcome is None:
                self._turn()
            self._endpoint.flush(_FLUSH_TIMEOUT_S)
            return self._outcome
        finally:
            self._endpoint.close()

    def _restart(self, state: SavedState) -> None:
        """Go on from what an earlier coordinator of this run has saved."""
        began_s = state.began_s - self._epoch_s
        actions = self._run.restart(msgspec.structs.replace(state, began_s=began_s), time.monotonic())
        self._share_members()
        self._act(actions, deque())

    def stop(self, reason: str) -> None:
        """End the run from another thread or a signal handler; all nodes are told `reason`."""
        self._inbox.queue.put(Cancelled(reason))

    def _turn(self) -> None:
        """Handle what has arrived, in order and at its time of arrival; then let time pass. A turn that took very long
        is a process, or a machine, that was stopped."""
        try:
            item = self._inbox.queue.get(timeout=self._tick_s)
            for _ in range(_MAX_BATCH):
                self._take(item)
                item = self._inbox.queue.get_nowait()
        except queue.Empty:
            pass
        now_s = time.monotonic()
        if now_s - self._turned_s > self._still_s:
            self._act(self._run.excuse(now_s - self._turned_s, now_s), deque())
        self._turned_s = now_s
        self._handle(Tick(), now_s)
        self._reply(self._collector.tick(now_s) if self._collector else [])
        self._tell_of_refusals(time.monotonic())

    def _tell_of_refusals(self, now_s: float) -> None:
        """Log now and then how many callers were refused at the door."""
        counters = self._endpoint.door()
        if counters is None or now_s < self._tell_at_s or counters.refused == self._told:
            return
        self._told, self._tell_at_s = counters.refused, now_s + _TELL_EVERY_S
        log.warning("connections refused so far: %d (%s)", counters.refused, counters)

    def _take(self, item: _Arrival | _FileArrival | Event) -> None:
        if isinstance(item, _FileArrival):
            if self._collector is not None and item.peer in self._run.membership:
                self._reply(self._collector.receive(*item, time.monotonic()))
            return
        if not isinstance(item, _Arrival):
            self._handle(item, time.monotonic())
            return
        if item.stranger:
            self._inbox.handled(item)
        try:
            message = decode_from_node(item.body, item.peer)
            if item.stranger and (reason := self._door.refusal(item.peer, message)) is not None:
                self._send(item.peer, Refused(reason=reason))
                return
            event: Event = Received(item.peer, message)
        except ProtocolError as error:
            if item.peer not in self._run.membership:
                # Most likely it is another version of isthmus, which understands at least a refusal.
                self._send(item.peer, Refused(reason=shorten(f"not understood: {error}; is it the same isthmus?")))
                return
            event = Faulted(item.peer, str(error))
        if isinstance(event, Received) and isinstance(event.message, Watch):
            self._send(item.peer, self._watched(event.message))
        else:
            self._handle(event, item.arrived_s)

    def _watched(self, watch: Watch) -> Watched | Refused:
        """What a person who watches the run is told. It does not touch the machine."""
        membership = self._run.membership
        if (reason := membership.refusal_to_talk("this command", watch)) is not None:
            return Refused(reason=shorten(reason))
        if self._show is None:
            return Refused(reason="this coordinator keeps no records that could be watched")
        joining = self._run.phase is Phase.JOINING
        return self._show(watch.after, membership.waiting_text() if joining else self._run.phase.value)

    def _handle(self, event: Event, now_s: float) -> None:
        """Hand the event to the machine and carry out its actions, and so for the events that follow from that."""
        pending = deque([event])
        while pending and self._outcome is None:
            event = pending.popleft()
            try:
                actions = self._run.handle(event, now_s)
            except ProtocolError as error:
                pending.append(Faulted(error.peer, str(error)))
                continue
            self._share_members()
            self._act(actions, pending)

    def _act(self, actions: list[Action], pending: deque[Event]) -> None:
        """Carry out the actions, once the state that they follow from is on disk. What fails is added to `pending`."""
        consequence = self._save() if actions else None
        if consequence is not None:
            pending.append(consequence)
        for action in actions:
            consequence = self._carry_out(action)
            if consequence is not None:
                pending.append(consequence)

    def _save(self) -> Event | None:
        """Put the state on disk where it has changed. Returns an event where that fails."""
        state = self._run.saved()
        if state is None or state == self._kept:
            return None
        try:
            began_s = state.began_s + self._epoch_s
            self._keep(msgspec.structs.replace(state, address=self.address, began_s=began_s))
        except OSError as error:
            return Cancelled(f"the coordinator cannot write its state: {error}")
        self._kept = state
        return None

    def _share_members(self) -> None:
        """Tell the I/O thread who the members are, where that has changed."""
        membership = self._run.membership
        if membership.generation != self._generation:
            self._generation = membership.generation
            before, self._inbox.members = self._inbox.members, frozenset(membership.peers)
            for peer in self._inbox.members - before:
                self._endpoint.trust(peer)
                log.info("%s joined; %s are here", membership.describe([peer]), membership.count_text())
            if self._run.phase not in (Phase.STOPPING, Phase.FINISHED):
                for peer in before - self._inbox.members:
                    log.info("%s has gone; %s are here", plain(peer), membership.count_text())

    def _carry_out(self, action: Action) -> Event | None:
        """Carry out one action. Returns an event where that fails."""
        try:
            match action:
                case Send(peer, message):
                    return self._send(peer, message)
                case Forget(peer):
                    self._endpoint.forget(peer)
                    if self._collector is not None:
                        self._collector.lose(peer)
                case Follow(schedule, began_s):
                    self._endpoint.follow(schedule, began_s)
                case Record():
                    self._record(action._replace(refused=self._door.newly_refused(self._endpoint.door())))
                case CheckpointComplete(step, nodes):
                    self._checkpoint_complete(step, nodes)
                case Fault():
                    log.warning("%s", action)
                    self._fault(action)
                case Say(text):
                    log.warning("%s", text)
                case CheckpointFailed(step, reason):
                    log.warning("no checkpoint after step %d, training goes on: %s", step, reason)
                case Finish(ok, reason):
                    self._outcome = RunOutcome(ok, reason)
        except OSError as error:
            return Cancelled(f"the coordinator cannot write its files: {error}")
        return None

    def _reply(self, replies: list[Reply]) -> None:
        """Send what concerns files. A member that cannot be reached is found lost otherwise."""
        for peer, message, data in replies:
            with suppress(IsthmusError):
                self._endpoint.send(peer, file_tag(message), [data] if data else [], urgent=True)

    def _send(self, peer: str, message: CoordinatorMessage) -> Event | None:
        try:
            self._endpoint.send(peer, CONTROL_TAG, [encode(self._door.sealed(message))], urgent=True)
        except IsthmusError as error:
            return PeerLost(peer, str(error))
        return None
