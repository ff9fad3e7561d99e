"""Averaging rounds: vectors are summed over all nodes round the ring, and the sum is used by all of them or by none.

The coordinator names a round and its weights. The data goes from node to node (`coordinator.ring`) over the shaped
links. Every node votes with a digest of the result, and uses the result only once the coordinator has committed the
round. Every shard is summed in one order and then copied, so all nodes hold the same bits.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor

from coordinator import ring
from node.exchange.formats import TensorSpec
from node.measure.spans import ROUND, Spans
from node.subspace.basis import digest

BUCKET_ELEMENTS = 1 << 20
"""Elements of one bucket (4 MB). Buckets go round the ring one behind the other, so that links are not idle."""


class ShardWire(Protocol):
    """A way to the other nodes for shards (`node.exchange.wire.Wire`)."""

    def send_shard(self, rank: int, round_id: int, hop: int, bucket: int, shard: Tensor) -> None: ...

    def take_shard(self, round_id: int, hop: int, bucket: int, spec: TensorSpec) -> Tensor: ...


class VotingSession(Protocol):
    """The part of a session with the coordinator that agrees on a round's result (`coordinator.client.Session`)."""

    def vote(self, round_id: int, ok: bool, digest: str, reason: str = "") -> object: ...


class Averager:
    """One node's part in the rounds of one generation. `recorder` is told how long they take."""

    def __init__(
        self,
        rank: int,
        world_size: int,
        wire: ShardWire | None,
        session: VotingSession,
        recorder: Spans | None = None,
    ) -> None:
        self._spans = recorder or Spans()
        self._rank = rank
        self._world_size = world_size
        self._wire = wire
        self._session = session

    def total(self, round_id: int, vector: Tensor) -> Tensor:
        """The sum of all nodes' float32 vectors, which have equal lengths, once all nodes have it.

        Raises `RunAborted` where the round is aborted. `vector` must not change while the round goes on.
        """
        with self._spans.span(ROUND):
            result = all_reduce(vector, self._rank, self._world_size, self._wire, round_id)
            self._session.vote(round_id, True, digest([result]))
        return result


def all_reduce(vector: Tensor, rank: int, world_size: int, wire: ShardWire | None, round_id: int) -> Tensor:
    """Sum `vector` over the ring. Returns a new tensor on the CPU, the same bits on every rank."""
    vector = vector.detach().to("cpu", torch.float32)
    if world_size == 1:
        return vector.clone()
    assert wire
    buckets = [_Bucket(part, world_size) for part in vector.split(BUCKET_ELEMENTS)]
    hops = ring.schedule(world_size, rank)
    following = ring.next_position(world_size, rank)
    for index, bucket in enumerate(buckets):
        bucket.send(wire, following, round_id, index, hops[0], 0)
    for number, hop in enumerate(hops):
        for index, bucket in enumerate(buckets):
            bucket.receive(wire, round_id, index, hop, number)
            if number + 1 < len(hops):
                bucket.send(wire, following, round_id, index, hops[number + 1], number + 1)
    return torch.cat([bucket.joined() for bucket in buckets])


class _Bucket:
    """A part of the vector in shards. A shard that was sent is never written to: the endpoint may send it again."""

    def __init__(self, part: Tensor, world_size: int) -> None:
        self._shards = [part[start:stop] for start, stop in ring.shards(len(part), world_size)]

    def send(self, wire: ShardWire, rank: int, round_id: int, index: int, hop: ring.Hop, number: int) -> None:
        shard = self._shards[hop.send_shard]
        if len(shard):
            wire.send_shard(rank, round_id, number, index, shard)

    def receive(self, wire: ShardWire, round_id: int, index: int, hop: ring.Hop, number: int) -> None:
        own = self._shards[hop.receive_shard]
        if not len(own):
            return
        arrived = wire.take_shard(round_id, number, index, TensorSpec(tuple(own.shape), own.dtype))
        self._shards[hop.receive_shard] = arrived.add_(own) if hop.phase == "reduce-scatter" else arrived

    def joined(self) -> Tensor:
        return torch.cat(self._shards)


def flatten(tensors: Iterable[Tensor]) -> Tensor:
    """All tensors' elements in one float32 vector on the CPU."""
    return torch.cat([tensor.detach().reshape(-1).to("cpu", torch.float32) for tensor in tensors])


def unflatten_into(vector: Tensor, tensors: Iterable[Tensor]) -> None:
    """Write a vector made by `flatten` back into tensors of the same shapes."""
    start = 0
    for tensor in tensors:
        tensor.copy_(vector[start : start + tensor.numel()].view_as(tensor))
        start += tensor.numel()
    assert start == len(vector)
