"""The wire: it joins the chunk exchange and the averaging ring to a `netem` endpoint, as buffers out and tensors in.

Where payloads are relayed (`node.exchange.routes`), the trainer sends the pieces of its own chunks, and what other
readers of a chunk get from this node is passed on from the I/O thread, as it came and as soon as it came.

On the CPU nothing is copied on the way out (the endpoint holds the tensor's memory until it is acknowledged), and
what arrives becomes a tensor over the buffer that it was received into. On a GPU both cross through host memory.
"""

from __future__ import annotations

import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial, reduce
from typing import NamedTuple, Protocol

import msgspec
import torch
from torch import Tensor

from netem.errors import PeerLate, ProtocolError, QueueFull
from netem.names import plain
from node.exchange.formats import TensorSpec
from node.exchange.inbox import Inbox, Members
from node.exchange.judge import MOST_PAYLOAD, MOST_SHARD, objection
from node.exchange.keys import ChunkKey, Key, RingKey
from node.exchange.passes import PassKey, PassSpec
from node.exchange.payload import PayloadFormat
from node.exchange.pieces import Owed
from node.exchange.routes import Routes, span_of
from node.exchange.tags import ChunkTag, Piece, RingTag, Tag, encode_tag
from node.measure import spans
from node.measure.spans import Kind, Record, Sent, Spans, Taken

ROOM_POLL_S = 0.25
"""Interval at which a trainer that waits for room to send checks whether the run is over."""

AVERAGING_FLOW = 1
"""Shards share a link fairly with payloads, which would otherwise wait behind those that are queued."""


PASSED_ON_FLOW = 2
"""Pieces that are passed on share a link fairly with this node's own payloads: their readers wait for both."""


class _Way(NamedTuple):
    """What the trainer does with messages of one kind, as spans."""

    send: Kind
    room: Kind
    wait: Kind


_FORWARD = _Way(spans.SEND, spans.ROOM_FORWARD, spans.WAIT_PAYLOAD)
_BACKWARD = _Way(spans.SEND, spans.ROOM_BACKWARD, spans.WAIT_GRADIENT)
_RING = _Way(spans.SEND_SHARD, spans.ROOM_SHARD, spans.WAIT_SHARD)


class Sender(Protocol):
    """The part of `netem.endpoint.Endpoint` that sends."""

    def send(
        self, peer: str, tag: bytes, buffers: Sequence[memoryview] = (), *, flow: int = 0, timeout_s: float = 0.0
    ) -> None: ...

    def pass_on(self, peer: str, tag: bytes, buffer: memoryview, generation: int, *, flow: int = 0) -> None: ...


class Wire:
    """One node's way to its peers. Counts payload bytes by what they are for (`sent_bytes`), and tells `recorder` what
    the trainer waits for. With `judges`, numbers that are not finite or absurdly large raise `ProtocolError`, which
    names the peer; without, they come through, for a run that leaves such a step out (`train.nonfinite`)."""

    def __init__(
        self,
        sender: Sender,
        inbox: Inbox,
        members: Members,
        payload: PayloadFormat,
        timeout_s: float,
        recorder: Spans | None = None,
        judges: bool = True,
    ) -> None:
        self.sent_bytes: Counter[str] = Counter()
        self._counting = threading.Lock()  # the trainer, a round's own thread and the I/O thread send
        self._sender = sender
        self._inbox = inbox
        self._members = members
        self._payload = payload
        self._timeout_s = timeout_s
        self._spans = recorder or Spans()
        self._judges = judges
        if members.relays:
            inbox.relay_through(self._pass_on)

    def begin(self, number: int) -> None:
        self._inbox.begin(number)

    def end(self, number: int) -> None:
        self._inbox.end(number, self._members.generation)

    def send(self, rank: int, kind: str, layer: int, chunk: int, key: PassKey, tensors: tuple[Tensor, ...]) -> None:
        tag = self._tag(kind, layer, chunk, key, tensors)
        self._count_chunk(tag, _size(tensors), key.trains)
        with self._span(_way(tag).send, tag):
            self._note_sent(rank, tag, _size(tensors), self._send(rank, tag, tensors))

    def publish(
        self, ranks: tuple[int, ...], layer: int, chunk: int, key: PassKey, tensors: tuple[Tensor, ...]
    ) -> None:
        nbytes = _size(tensors)
        routes = self._members.routes(nbytes)
        if not routes.relays(chunk):
            tensors = tuple(on_host(tensor) for tensor in tensors)  # it leaves a GPU once for all readers
            for rank in ranks:
                self.send(rank, "kv", layer, chunk, key, tensors)
            return
        tag = self._tag("kv", layer, chunk, key, tensors)
        with self._span(_way(tag).send, tag):
            sent_s = self._send_pieces(routes, tag, tensors, key.trains)
            for rank in ranks:  # a trace shows who got it from whom, and not by which ways
                self._note_sent(rank, tag, nbytes, sent_s)

    def _send_pieces(self, routes: Routes, tag: ChunkTag, tensors: tuple[Tensor, ...], trains: bool) -> float:
        """This node's part of a relayed payload; when the first piece was sent. A reader may have all pieces before
        the last is sent to another."""
        whole = [as_buffer(tensor) for tensor in tensors]
        of = routes.pieces(tag.chunk)
        parts = [cut(whole, *span_of(number, of, _size(whole))) for number in range(of)]
        pieces = [Piece(number, of, _checksum(part), trains) for number, part in enumerate(parts)]
        tags = [msgspec.structs.replace(tag, piece=piece) for piece in pieces]
        sent_s = []
        for number, rank in routes.sends(self._members.rank, tag.chunk):
            self._count_chunk(tags[number], _size(parts[number]), trains)
            sent_s.append(self._send(rank, tags[number], parts[number]))
        return sent_s[0]

    def _pass_on(self, owed: Owed) -> None:
        """Send a piece that has come to the readers that get it from this node."""
        assert owed.named.piece is not None
        for rank in owed.ranks:
            self._count_chunk(owed.named, len(owed.buffer), owed.named.piece.trains)
            peer, generation = self._members.peers[rank], self._members.generation
            self._sender.pass_on(peer, owed.tag, owed.buffer, generation, flow=PASSED_ON_FLOW)

    def first_of(self, kind: str, layer: int, chunks: dict[int, int], number: int) -> int:
        keys = [ChunkKey(kind, number, layer, chunk, rank) for chunk, rank in sorted(chunks.items())]
        with self._span(_way(keys[0]).wait, keys[0]):
            key = self._inbox.first_of(keys, self._timeout_s)
        assert isinstance(key, ChunkKey)
        return key.chunk

    def take(
        self,
        kind: str,
        layer: int,
        chunk: int,
        rank: int,
        number: int,
        specs: tuple[TensorSpec, ...],
        device: torch.device,
    ) -> tuple[Tensor, ...]:
        return self._take(ChunkKey(kind, number, layer, chunk, rank), specs, device)

    def send_shard(self, rank: int, round_id: int, hop: int, bucket: int, shard: Tensor) -> None:
        """Part of a vector that an averaging round passes on."""
        self._count("averaging", shard.nbytes)
        tag = RingTag(round_id, hop, bucket)
        with self._span(_way(tag).send, tag):
            self._note_sent(rank, tag, shard.nbytes, self._send(rank, tag, (shard,)))

    def take_shard(self, round_id: int, hop: int, bucket: int, spec: TensorSpec) -> Tensor:
        (shard,) = self._take(RingKey(round_id, hop, bucket), (spec,), torch.device("cpu"))
        return shard

    def _tag(self, kind: str, layer: int, chunk: int, key: PassKey, tensors: tuple[Tensor, ...]) -> ChunkTag:
        shapes = tuple(tuple(tensor.shape) for tensor in tensors)
        name = self._payload.format_name(layer, key.spec, kind)
        return ChunkTag(kind, key.number, layer, chunk, *key.spec, name, shapes)  # type: ignore[arg-type]

    def _count_chunk(self, tag: ChunkTag, nbytes: int, trains: bool) -> None:
        """Count a payload, a piece of one, or a gradient, and what it replaces."""
        if not trains:
            self._count("evaluation", nbytes)
            return
        spec = PassSpec(tag.tokens, tag.compressed)
        compressed = spec.compressed and self._payload.compresses(tag.layer)
        self._count("compressed" if compressed else "dense", nbytes)
        if tag.kind in ("kv", "grad"):  # rotation parameters between neighbours replace no K and V
            rows = self._payload.rows_of(tag.kind, spec, tag.shapes)
            begin, end = 0, self._payload.uncompressed_bytes(spec, rows)
            if tag.piece is not None:
                begin, end = span_of(tag.piece.number, tag.piece.of, end)
            for use in ("uncompressed", "replaced") if compressed else ("uncompressed",):
                self._count(use, end - begin)

    def _count(self, use: str, nbytes: int) -> None:
        with self._counting:
            self.sent_bytes[use] += nbytes

    def _send(self, rank: int, tag: Tag, parts: Sequence[Tensor | memoryview]) -> float:
        """Returns when, just before the network had it: its reader may take it before this thread goes on."""
        flow = AVERAGING_FLOW if isinstance(tag, RingTag) else 0
        buffers = [as_buffer(part) if isinstance(part, Tensor) else part for part in parts]
        send = partial(self._sender.send, self._members.peers[rank], encode_tag(tag), buffers, flow=flow)
        sent_s = self._spans.clock()
        try:
            send()
        except QueueFull:
            with self._span(_way(tag).room, tag):
                sent_s = self._await_room(send, rank)
        return sent_s

    def _note_sent(self, rank: int, tag: Tag, nbytes: int, sent_s: float) -> None:
        """Keep when a message was sent; called in the span of the sending, from which a trace's arrow leads."""
        if self._spans.record is not None:
            self._spans.note_sent(Sent(_name(tag), rank, nbytes, sent_s))

    def _await_room(self, send: Callable[..., None], rank: int) -> float:
        """Hold the trainer back until the network has caught up, the run is over, or the deadline has passed. Returns
        when it was sent."""
        began = time.monotonic()
        while True:
            self._inbox.raise_if_over()
            sent_s = self._spans.clock()
            try:
                send(timeout_s=ROOM_POLL_S)
            except QueueFull as error:
                if time.monotonic() - began >= self._timeout_s:
                    peer = self._members.peers[rank]
                    what = f"waited {self._timeout_s:g} s for room to send to {plain(peer)}: coordinator.step_timeout_s"
                    raise PeerLate(peer, f"{what}; {error}") from None
            else:
                return sent_s

    def _take(self, key: Key, specs: tuple[TensorSpec, ...], device: torch.device) -> tuple[Tensor, ...]:
        with self._span(_way(key).wait, key):
            if self._spans.record is not None:
                self._note_taken(key, self._spans.record)
            buffer = self._inbox.take(key, self._timeout_s)
        expected_bytes = sum(spec.nbytes for spec in specs)
        if len(buffer) != expected_bytes:  # it was admitted at a size that is right for another pass or shard
            raise ProtocolError(f"{key} came with {len(buffer)} bytes, expected {expected_bytes}")
        tensors = split_buffer(buffer, specs)
        if self._judges:
            self._judge(key, tensors)
        return tuple(tensor.to(device) for tensor in tensors)

    def _judge(self, key: Key, tensors: tuple[Tensor, ...]) -> None:
        """Refuse numbers with which no step can be done."""
        chunk = isinstance(key, ChunkKey)
        if fault := objection(tensors, MOST_PAYLOAD if chunk else MOST_SHARD):
            peer = self._members.peers[key.rank if isinstance(key, ChunkKey) else self._members.previous_rank]
            raise ProtocolError(f"sent {_name(key)} with numbers that are {fault}", peer=peer)

    def _span(self, kind: Kind, of: Tag | Key) -> AbstractContextManager[None]:
        """A round may go on beside the trainer's thread; what the trainer waits for in one is the averager's to say."""
        if isinstance(of, RingTag | RingKey):
            return self._spans.aside(kind)
        return self._spans.span(kind, of.layer, of.pass_no)

    def _note_taken(self, key: Key, record: Record) -> None:
        """Wait for a message, and keep when it came."""
        self._inbox.first_of((key,), self._timeout_s)
        arrived_s, nbytes = self._inbox.arrival(key)
        rank = key.rank if isinstance(key, ChunkKey) else self._members.previous_rank
        record.taken.append(Taken(_name(key), rank, nbytes, arrived_s, self._spans.clock()))


def _way(of: Tag | Key) -> _Way:
    """Gradients belong to the backward, all else of a pass to the forward."""
    if isinstance(of, RingTag | RingKey):
        return _RING
    return _BACKWARD if of.kind in ("grad", "dtheta") else _FORWARD


def _name(of: Tag | Key) -> str:
    """What both sender and reader call a message in a trace."""
    if isinstance(of, RingTag | RingKey):
        return f"shard {of.bucket} of round {of.round_id}, hop {of.hop}"
    return f"{of.kind} of chunk {of.chunk}, layer {of.layer}, pass {of.pass_no}"


def as_buffer(tensor: Tensor) -> memoryview:
    """The tensor's bytes in row-major order, without a copy where it is contiguous and on the CPU."""
    flat = on_host(tensor).reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]


def on_host(tensor: Tensor) -> Tensor:
    """The tensor's values in host memory, in row-major order; without a copy where they are so already."""
    return tensor.detach().to("cpu").contiguous()


def cut(buffers: Sequence[memoryview], begin: int, end: int) -> list[memoryview]:
    """Bytes `begin` to `end` of the buffers in a row, without a copy."""
    found, start = [], 0
    for buffer in buffers:
        found.append(buffer[max(0, begin - start) : max(0, end - start)])
        start += len(buffer)
    return [part for part in found if part]


def _size(parts: Sequence[Tensor | memoryview]) -> int:
    return sum(part.nbytes for part in parts)


def _checksum(buffers: Sequence[memoryview]) -> int:
    return reduce(lambda checksum, buffer: zlib.crc32(buffer, checksum), buffers, 0)


def split_buffer(buffer: memoryview, specs: tuple[TensorSpec, ...]) -> tuple[Tensor, ...]:
    """Tensors over consecutive parts of `buffer`."""
    if not specs:
        return ()
    flat = torch.frombuffer(buffer, dtype=torch.uint8)
    tensors, start = [], 0
    for spec in specs:
        part = flat[start : start + spec.nbytes]
        if start % spec.dtype.itemsize:
            part = part.clone()  # a float32 after an odd number of bfloat16 would not be aligned
        tensors.append(part.view(spec.dtype).reshape(spec.shape))
        start += spec.nbytes
    return tuple(tensors)
