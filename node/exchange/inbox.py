"""What arrives at a node: validated before a byte is allocated, held until the trainer asks for it.

The endpoint's I/O thread calls `admit` and `deliver`; the trainer's thread waits in `first_of` and `take`. Every
wait has a deadline, and ends at once when the run is aborted. Memory is bounded: each payload of the passes in flight
is held once, at the size that the configuration gives it, and ring shards up to a cap.

Where payloads are relayed they come in pieces (`node.exchange.pieces`). A piece that this node owes to others is
checked and passed on at once from the I/O thread, whatever the trainer does.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple, Protocol

from coordinator import ring
from coordinator.assignment import Assignment
from coordinator.messages import CONTROL_TAG, COORDINATOR, control_buffer
from netem.errors import (
    GenerationOver,
    IsthmusError,
    NotAdmitted,
    PeerLate,
    PeerSilent,
    ProtocolError,
    RunAborted,
)
from netem.names import plain
from node.exchange.chunks import most_ahead
from node.exchange.keys import ChunkKey, Key, RingKey
from node.exchange.passes import PassSpec
from node.exchange.payload import PayloadFormat
from node.exchange.pieces import Owed, PassOn, Pieces, check_bytes, message_bytes, room
from node.exchange.routes import Routes, routes_for
from node.exchange.tags import ChunkTag, RingTag, decode_tag
from node.exchange.transfer_tags import TransferTag

log = logging.getLogger("isthmus.node")

_WHAT = {
    "kv": "keys and values",
    "grad": "gradient",
    "done": "acknowledgement",
    "theta": "rotation parameters",
    "dtheta": "gradient of the rotation parameters",
}

MAX_RING_MESSAGE_BYTES = 16 << 20


class Members(NamedTuple):
    """The members of one generation, as seen from one of them."""

    generation: int
    assignment: Assignment
    rank: int
    peers: tuple[str, ...]
    """Names on the wire (`netem.names`), by rank."""
    relays: bool = False
    """Whether readers pass payloads on."""

    def routes(self, nbytes: int) -> Routes:
        """The ways of payloads of `nbytes` bytes."""
        return routes_for(self.assignment, self.relays, nbytes)

    @property
    def previous_rank(self) -> int:
        """The rank before this one in the ring."""
        return ring.previous_position(len(self.peers), self.rank)


class _Held(NamedTuple):
    buffer: memoryview
    arrived_s: float


class Conversation(Protocol):
    """The node's side of the coordinator's protocol (`coordinator.client.Session`)."""

    def on_message(self, body: memoryview) -> None: ...

    def on_failure(self, error: IsthmusError) -> None: ...

    def suspect(self, peer: str, reason: str) -> None: ...

    def on_abort(self, callback: Callable[[str], None]) -> None: ...

    def on_generation(self, callback: Callable[[int], None]) -> None: ...


class Transfers(Protocol):
    """Takes what members send of their state when a node joins (`node.worker.handover`). Neither call may block."""

    def admit(self, peer: str, tag: TransferTag, total_bytes: int) -> memoryview | None: ...

    def deliver(self, peer: str, tag: TransferTag, buffer: memoryview) -> None: ...


class Files(Protocol):
    """Takes what the coordinator says about files (`coordinator.files.courier`). Neither call may block."""

    def admit(self, tag: bytes, total_bytes: int) -> memoryview | None: ...

    def deliver(self, tag: bytes, buffer: memoryview) -> None: ...


class Inbox:
    """A `netem.endpoint.Receiver`: control messages go to the conversation, states to `transfers`, tensors wait here.

    A peer may be as many passes ahead of this node as may be in flight.
    """

    def __init__(self, payload: PayloadFormat, ring_cap_bytes: int = 0) -> None:
        self._payload = payload
        self._conversation: Conversation | None = None
        self.ring_cap_bytes = ring_cap_bytes
        self._ring_held_bytes = 0
        self._changed = threading.Condition()
        self._held: dict[Key, _Held] = {}
        self._pieces = Pieces()
        self._admitted: set[Key] = set()
        self._world: Members | None = None
        self._generation = 0  # the newest that the coordinator has announced
        self._newest = 0
        self._open: set[int] = set()
        self._failure: IsthmusError | None = None
        self.transfers: Transfers | None = None
        self.files: Files | None = None

    def follow(self, conversation: Conversation) -> None:
        """Hand control messages to `conversation`. It ends every wait when a generation or the run is over."""
        self._conversation = conversation
        conversation.on_generation(self.announce)
        conversation.on_abort(lambda reason: self.abort(RunAborted(reason)))

    # The trainer's thread.

    def enter(self, members: Members) -> None:
        """A generation begins here, with nothing held: tensors may come from its members, and from nobody else."""
        with self._changed:
            self._world = members
            self._held.clear()
            self._pieces.clear()
            self._admitted.clear()
            self._ring_held_bytes = 0
            self._newest = 0
            self._open.clear()

    def relay_through(self, pass_on: PassOn) -> None:
        """Pass pieces on with this until the generation is over. All members are dialled."""
        with self._changed:
            owed = self._pieces.pass_through(pass_on)
        for piece in owed:
            pass_on(piece)

    def begin(self, pass_no: int) -> None:
        """Pass `pass_no` begins here. Passes are begun in order."""
        with self._changed:
            assert pass_no > self._newest
            self._newest = pass_no
            self._open.add(pass_no)

    def end(self, pass_no: int, generation: int) -> None:
        """Pass `pass_no` is over: whatever is left of it is dropped, and whatever comes later too.

        A pass of an older generation changes nothing: it may have been abandoned there, and be noticed only now.
        """
        with self._changed:
            if not self._is_of_now(generation):
                return
            self._open.discard(pass_no)
            for key in [key for key in self._admitted if isinstance(key, ChunkKey) and key.pass_no == pass_no]:
                self._admitted.discard(key)
                self._held.pop(key, None)
                self._pieces.drop(key.whole)

    def first_of(self, keys: Iterable[Key], timeout_s: float) -> Key:
        """Wait until one of `keys` has arrived; the first of them, in their order, that has."""
        wanted = tuple(keys)
        with self._changed:
            self._wait(lambda: any(key in self._held for key in wanted), wanted, timeout_s)
            return next(key for key in wanted if key in self._held)

    def arrival(self, key: Key) -> tuple[float, int]:
        """When a message that is here had arrived, in seconds of the monotonic clock, and its bytes."""
        with self._changed:
            held = self._held[key]
            return held.arrived_s, len(held.buffer)

    def take(self, key: Key, timeout_s: float) -> memoryview:
        """Wait for `key` and hand its bytes over."""
        with self._changed:
            self._wait(lambda: key in self._held, (key,), timeout_s)
            buffer = self._held.pop(key).buffer
            if isinstance(key, RingKey):
                self._ring_held_bytes -= len(buffer)
                self._admitted.discard(key)  # a chunk's stays until its pass is over, so that no second one is let in
            return buffer

    def abort(self, error: IsthmusError) -> None:
        """End every wait, now and later, for messages that have not arrived, with `error`. The first error is kept."""
        with self._changed:
            self._failure = self._failure or error
            self._changed.notify_all()

    def raise_if_over(self) -> None:
        """Raise what ends every wait: what `abort` was given, or `GenerationOver` where a later one is announced."""
        if (over := self._over()) is not None:
            raise over

    def _over(self) -> IsthmusError | None:
        if self._failure is None and self._world is not None and self._generation > self._world.generation:
            return GenerationOver(f"generation {self._world.generation} is over: {self._generation} has begun")
        return self._failure

    def _wait(self, arrived: Callable[[], bool], keys: tuple[Key, ...], timeout_s: float) -> None:
        done = self._changed.wait_for(lambda: arrived() or self._over() is not None, timeout_s)
        if not done:
            what = f"waited {timeout_s:g} s for {self._describe(keys[0])}: coordinator.step_timeout_s"
            raise PeerLate(self._sender_of(keys[0]), what)
        if not arrived():
            self.raise_if_over()

    def _sender_of(self, key: Key) -> str:
        """Who is waited for: of a relayed payload that has begun to come, the sender of a piece that has not."""
        assert self._world is not None
        if isinstance(key, RingKey):
            return self._previous()
        if (missing := self._pieces.missing(key)) is None:
            return self._world.peers[key.rank]
        number, nbytes = missing
        source = self._world.routes(nbytes).source(self._world.rank, key.chunk, number)
        return self._world.peers[key.rank if source is None else source]

    def _describe(self, key: Key) -> str:
        if isinstance(key, RingKey):
            return f"hop {key.hop} of averaging round {key.round_id} from {plain(self._previous())}"
        assert self._world is not None
        what = _WHAT[key.kind]
        hops = ", which other nodes may pass on" if self._world.relays and key.kind == "kv" else ""
        return f"the {what} of chunk {key.chunk}, layer {key.layer} from {plain(self._world.peers[key.rank])}{hops}"

    def _previous(self) -> str:
        """The node before this one in the ring."""
        assert self._world is not None
        return self._world.peers[self._world.previous_rank]

    # The I/O thread: netem.endpoint.Receiver.

    def admit(self, peer: str, generation: int, tag: bytes, total_bytes: int) -> memoryview | None:
        if peer == COORDINATOR:
            if self.files is not None and tag != CONTROL_TAG:
                return self.files.admit(tag, total_bytes)
            return control_buffer(tag, total_bytes, peer)
        if not self._is_member(peer):
            return None
        named = decode_tag(tag, peer)
        with self._changed:
            if not self._is_of_now(generation):
                return None
            if isinstance(named, TransferTag):
                return self.transfers.admit(peer, named, total_bytes) if self.transfers else None
            if isinstance(named, RingTag):
                key: Key | None = self._admit_ring(named, total_bytes, peer)
            else:
                key = self._admit_chunk(named, total_bytes, peer)
            if key is None:
                return None
            if key in self._admitted:
                raise ProtocolError(f"{self._describe(key)} came twice", peer=peer, generation=generation)
            self._admitted.add(key)
            if isinstance(key, RingKey):
                self._ring_held_bytes += total_bytes
            elif isinstance(named, ChunkTag) and named.piece is not None:
                return self._pieces.room(key.whole, named.piece, self._payload_bytes(named))
        return room(total_bytes)

    def deliver(self, peer: str, generation: int, tag: bytes, buffer: memoryview) -> None:
        if peer == COORDINATOR:
            if self.files is not None and tag != CONTROL_TAG:
                self.files.deliver(tag, buffer)
            elif self._conversation:
                self._conversation.on_message(buffer)
            return
        named = decode_tag(tag, peer)
        if isinstance(named, ChunkTag):
            check_bytes(named, buffer, peer)
        with self._changed:
            if not self._is_of_now(generation):
                return  # it was admitted just before this generation began
            if isinstance(named, TransferTag):
                if self.transfers:
                    self.transfers.deliver(peer, named, buffer)
                return
            assert self._world is not None
            key = self._key(named, self._world.peers.index(peer))
            if key not in self._admitted:  # its pass may have ended while it came in
                return
            pass_on = None
            whole: memoryview | None = buffer
            if isinstance(named, ChunkTag) and named.piece is not None and isinstance(key, ChunkKey):
                routes = self._world.routes(self._payload_bytes(named))
                ranks = routes.targets(self._world.rank, named.chunk, named.piece.number)
                owed = Owed(ranks, named, tag, buffer)
                key, whole, pass_on = key.whole, self._pieces.came(key.whole, key.piece), self._pieces.owe(owed)
            if whole is not None:
                self._held[key] = _Held(whole, time.monotonic())
                self._changed.notify_all()
        if pass_on is not None:
            pass_on(owed)

    def failed(self, error: IsthmusError) -> None:
        """A member broke the protocol or is silent, which the coordinator is told; it decides who goes on. Where it is
        the coordinator, or the endpoint that failed, this node cannot go on."""
        peer = error.peer if isinstance(error, ProtocolError | PeerSilent | NotAdmitted) else ""
        if isinstance(error, NotAdmitted) and peer != COORDINATOR:
            return  # it is dialled again; if it goes on refusing, it counts as silent in time
        if peer == COORDINATOR and isinstance(error, PeerSilent):
            log.warning("%s; waiting for it to come back", error)  # for as long as the conversation is patient
            return
        if peer not in ("", COORDINATOR):
            if self._is_member(peer) and self._conversation:
                self._conversation.suspect(peer, str(error))
            return
        if self._conversation:
            self._conversation.on_failure(error)
        self.abort(error)

    def announce(self, generation: int) -> None:
        """The coordinator has said that `generation` has begun: every wait in an older one ends."""
        with self._changed:
            self._generation = max(generation, self._generation)
            self._changed.notify_all()

    def _is_of_now(self, generation: int) -> bool:
        return self._world is not None and generation == self._world.generation

    def _is_member(self, peer: str) -> bool:
        """Whether `peer` is a member. None is before the roster is known: no tensor is sent before all have it."""
        return self._world is not None and peer in self._world.peers

    def _key(self, tag: ChunkTag | RingTag, rank: int) -> Key:
        if isinstance(tag, RingTag):
            return RingKey(tag.round_id, tag.hop, tag.bucket)
        if tag.piece is None:
            return ChunkKey(tag.kind, tag.pass_no, tag.layer, tag.chunk, rank)
        assert self._world is not None
        owner = self._world.assignment.owner(tag.chunk)  # whoever passes it on
        return ChunkKey(tag.kind, tag.pass_no, tag.layer, tag.chunk, owner, tag.piece.number)

    def _payload_bytes(self, tag: ChunkTag) -> int:
        return self._payload.chunk_bytes(tag.layer, PassSpec(tag.tokens, tag.compressed))

    def _admit_ring(self, tag: RingTag, total_bytes: int, peer: str) -> Key:
        """A shard comes from the node before this one in the ring, and there is room for it."""
        if peer != self._previous():
            raise ProtocolError("sent a ring shard, and is not the node before this one in the ring", peer=peer)
        if not 0 < total_bytes <= MAX_RING_MESSAGE_BYTES:
            raise ProtocolError(f"a ring shard of {total_bytes} bytes", peer=peer)
        if self._ring_held_bytes + total_bytes > self.ring_cap_bytes:
            raise ProtocolError(f"more than {self.ring_cap_bytes} bytes of ring shards unasked for", peer=peer)
        return RingKey(tag.round_id, tag.hop, tag.bucket)

    def _admit_chunk(self, tag: ChunkTag, total_bytes: int, peer: str) -> Key | None:
        """The tag must name a payload that this peer owes us, with the very shapes that the configuration gives it."""
        assert self._world is not None
        assignment, me = self._world.assignment, self._world.rank
        rank = self._world.peers.index(peer)
        if tag.pass_no <= self._newest and tag.pass_no not in self._open:
            return None
        if tag.pass_no > self._newest + most_ahead(self._payload):
            raise ProtocolError(f"is at pass {tag.pass_no}, this node at {self._newest}", peer=peer)
        if tag.chunk >= assignment.n_chunks or tag.layer >= self._payload.layers:
            raise ProtocolError(
                f"chunk {tag.chunk}, layer {tag.layer}: this model has no such chunk or layer", peer=peer
            )
        owner, readers = assignment.owner(tag.chunk), assignment.readers_of(tag.chunk)
        if tag.kind in ("theta", "dtheta"):  # between the owners of two neighbours
            readers = tuple(rank for rank in readers if tag.chunk + 1 in assignment.chunks(rank))
        sender = owner if tag.kind == "kv" and tag.piece is not None else rank  # who passes it on is checked below
        owed = owner == sender and me in readers if tag.kind in ("kv", "theta") else owner == me and rank in readers
        if not owed:
            raise ProtocolError(f"sent {tag.kind} of chunk {tag.chunk}, which it does not owe this node", peer=peer)
        spec = PassSpec(tag.tokens, tag.compressed)
        if spec not in self._payload.passes:
            raise ProtocolError(f"chunks of {tag.tokens} tokens, compressed={tag.compressed}: unexpected", peer=peer)
        if tag.format != (name := self._payload.format_name(tag.layer, spec, tag.kind)):
            raise ProtocolError(f"numbers in {tag.format}, expected {name}", peer=peer)
        rows = self._payload.rows_of(tag.kind, spec, tag.shapes)
        tensors = self._payload.message(tag.kind, tag.layer, spec, rows)
        if tensors is None:
            raise ProtocolError(f"sent {tag.kind}, which layer {tag.layer} does not send in this pass", peer=peer)
        nbytes = sum(tensor.nbytes for tensor in tensors)
        expected_bytes = message_bytes(tag, self._world.routes(nbytes), nbytes, me, rank, peer)
        if tag.shapes != tuple(tensor.shape for tensor in tensors) or total_bytes != expected_bytes:
            raise ProtocolError(f"shapes {tag.shapes} in {total_bytes} bytes, expected {tensors}", peer=peer)
        return self._key(tag, rank)
