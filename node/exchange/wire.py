"""The wire: it joins the chunk exchange and the averaging ring to a `netem` endpoint, as buffers out and tensors in.

On the CPU nothing is copied on the way out (the endpoint holds the tensor's memory until it is acknowledged), and
what arrives becomes a tensor over the buffer that it was received into. On a GPU both cross through host memory.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from netem.errors import ProtocolError, QueueFull, RunAborted
from netem.names import plain
from node.exchange.formats import TensorSpec
from node.exchange.inbox import ChunkKey, Inbox, Key, Members, RingKey
from node.exchange.passes import PassKey
from node.exchange.payload import PayloadFormat
from node.exchange.tags import ChunkTag, RingTag, Tag, encode_tag

ROOM_POLL_S = 0.25
"""Interval at which a trainer that waits for room to send checks whether the run is over."""


class Sender(Protocol):
    """The part of `netem.endpoint.Endpoint` that sends."""

    def send(self, peer: str, tag: bytes, buffers: Sequence[memoryview] = (), *, timeout_s: float = 0.0) -> None: ...


class Wire:
    """One node's way to its peers. Counts payload bytes by what they are for (`sent_bytes`)."""

    def __init__(
        self, sender: Sender, inbox: Inbox, members: Members, payload: PayloadFormat, timeout_s: float
    ) -> None:
        self.sent_bytes: Counter[str] = Counter()
        self._sender = sender
        self._inbox = inbox
        self._members = members
        self._payload = payload
        self._timeout_s = timeout_s

    def begin(self, number: int) -> None:
        self._inbox.begin(number)

    def end(self, number: int) -> None:
        self._inbox.end(number, self._members.generation)

    def send(self, rank: int, kind: str, layer: int, chunk: int, key: PassKey, tensors: tuple[Tensor, ...]) -> None:
        spec = key.spec
        shapes = tuple(tuple(tensor.shape) for tensor in tensors)
        name = self._payload.format_name(layer, spec, kind)
        tag = ChunkTag(kind, key.number, layer, chunk, *spec, name, shapes)  # type: ignore[arg-type]
        if not key.trains:
            self._send(rank, tag, tensors, "evaluation")
            return
        compressed = spec.compressed and self._payload.compresses(layer)
        if kind in ("kv", "grad"):  # rotation parameters between neighbours replace no K and V
            for use in ("uncompressed", "replaced") if compressed else ("uncompressed",):
                self.sent_bytes[use] += self._payload.uncompressed_bytes(spec)
        self._send(rank, tag, tensors, "compressed" if compressed else "dense")

    def first_of(self, kind: str, layer: int, chunks: dict[int, int], number: int) -> int:
        keys = [ChunkKey(kind, number, layer, chunk, rank) for chunk, rank in sorted(chunks.items())]
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
        self._send(rank, RingTag(round_id, hop, bucket), (shard,), "averaging")

    def take_shard(self, round_id: int, hop: int, bucket: int, spec: TensorSpec) -> Tensor:
        (shard,) = self._take(RingKey(round_id, hop, bucket), (spec,), torch.device("cpu"))
        return shard

    def _send(self, rank: int, tag: Tag, tensors: tuple[Tensor, ...], use: str) -> None:
        buffers = [as_buffer(tensor) for tensor in tensors]
        self.sent_bytes[use] += sum(len(buffer) for buffer in buffers)
        send = partial(self._sender.send, self._members.peers[rank], encode_tag(tag), buffers)
        try:
            send()
        except QueueFull:
            self._await_room(send, rank, exposed=isinstance(tag, ChunkTag))

    def _await_room(self, send: Callable[..., None], rank: int, exposed: bool) -> None:
        """Hold the trainer back until the network has caught up, the run is over, or the deadline has passed."""
        began = time.monotonic()
        waiting = True
        while waiting:
            self._inbox.raise_if_over()
            try:
                send(timeout_s=ROOM_POLL_S)
                waiting = False
            except QueueFull as error:
                if time.monotonic() - began >= self._timeout_s:
                    to = plain(self._members.peers[rank])
                    what = f"waited {self._timeout_s:g} s for room to send to {to}: coordinator.step_timeout_s"
                    raise RunAborted(f"{what}; {error}") from None
        if exposed:
            self._inbox.waited_s += time.monotonic() - began

    def _take(self, key: Key, specs: tuple[TensorSpec, ...], device: torch.device) -> tuple[Tensor, ...]:
        buffer = self._inbox.take(key, self._timeout_s)
        expected_bytes = sum(spec.nbytes for spec in specs)
        if len(buffer) != expected_bytes:  # it was admitted at a size that is right for another pass or shard
            raise ProtocolError(f"{key} came with {len(buffer)} bytes, expected {expected_bytes}")
        return split_buffer(buffer, specs, device)


def as_buffer(tensor: Tensor) -> memoryview:
    """The tensor's bytes in row-major order, without a copy where it is contiguous and on the CPU."""
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]


def split_buffer(buffer: memoryview, specs: tuple[TensorSpec, ...], device: torch.device) -> tuple[Tensor, ...]:
    """Tensors over consecutive parts of `buffer`."""
    if not specs:
        return ()
    flat = torch.frombuffer(buffer, dtype=torch.uint8)
    tensors, start = [], 0
    for spec in specs:
        part = flat[start : start + spec.nbytes]
        if start % spec.dtype.itemsize:
            part = part.clone()  # a float32 after an odd number of bfloat16 would not be aligned
        tensors.append(part.view(spec.dtype).reshape(spec.shape).to(device))
        start += spec.nbytes
    return tuple(tensors)
