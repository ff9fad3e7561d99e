"""Averaging rounds: vectors are summed over all nodes round the ring, and the sum is used by all of them or by none.

The coordinator names a round and its weights. The data goes from node to node (`coordinator.ring`) over the shaped
links, in one of the formats of `node.train.ring_formats`. Every node votes with a digest of the result, and uses the
result only once the coordinator has committed the round. Every shard is summed in one order and then copied, so all
nodes hold the same bits.

A round may travel while the trainer computes (`Averager.begin`): its hops run on a thread of their own, over the same
wire. Each wait of that thread has the wire's deadline and ends when the run or the generation is over. What went wrong
there is raised where the trainer waits for the result, and `Averager.close` waits for the thread.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from coordinator import ring
from node.exchange.formats import TensorSpec
from node.measure.spans import ROUND, Spans
from node.site.site import ALONE, Site
from node.subspace.basis import digest
from node.train.ring_formats import FLOAT32, RingFormat

BUCKET_ELEMENTS = 1 << 20
"""Elements of one bucket (4 MB in float32). Buckets go round the ring one behind the other, so that links are not
idle."""

BUCKETS_UNDER_STEPS = 4
"""Buckets that a round has on the wire at once while the trainer computes, so that payloads need not wait behind a
whole model."""


class ShardWire(Protocol):
    """A way to the other nodes for shards (`node.exchange.wire.Wire`). Both calls may come from two threads at once."""

    def send_shard(self, rank: int, round_id: int, hop: int, bucket: int, shard: Tensor) -> None: ...

    def take_shard(self, round_id: int, hop: int, bucket: int, spec: TensorSpec) -> Tensor: ...


class VotingSession(Protocol):
    """The part of a session with the coordinator that agrees on a round's result (`coordinator.client.Session`)."""

    def vote(self, round_id: int, ok: bool, digest: str, reason: str = "") -> object: ...


class RingSum(NamedTuple):
    """The sum of all nodes' vectors, and what this node's rounding has left out of it so far; None where its format
    feeds nothing back."""

    total: Tensor
    residual: Tensor | None


class Flight(NamedTuple):
    """A round that travels while the trainer computes: its result, and the thread on which its hops run."""

    ring: Future[RingSum]
    thread: ThreadPoolExecutor

    def land(self) -> RingSum:
        """Wait for the result; the thread has ended then. Raises what went wrong under way."""
        self.thread.shutdown(wait=True)
        return self.ring.result()


class Averager:
    """One node's part in the rounds of one generation. `recorder` is told for how long they hold the trainer up.

    The processes of a site take part together, each in its column's ring: where one fails, all raise.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        wire: ShardWire | None,
        session: VotingSession,
        recorder: Spans | None = None,
        site: Site = ALONE,
    ) -> None:
        self._spans = recorder or Spans()
        self._site = site
        self.rank = rank
        self._world_size = world_size
        self._wire = wire
        self._session = session
        self._flights: list[Flight] = []

    def total(self, round_id: int, vector: Tensor) -> Tensor:
        """The sum of all nodes' float32 vectors, which have equal lengths, once all nodes have it.

        Raises `RunAborted` where the round is aborted. `vector` must not change while the round goes on.
        """
        return self.sum(round_id, vector, FLOAT32).total

    def sum(self, round_id: int, vector: Tensor, form: RingFormat, residual: Tensor | None = None) -> RingSum:
        """As `total`, in the format `form`. `residual` is what this node has left out of the sums before."""
        with self._spans.span(ROUND), self._site.together():
            result = all_reduce(vector, self.rank, self._world_size, self._wire, round_id, form, residual)
            self._vote(round_id, digest([result.total]))
        return result

    def agree(self, round_id: int) -> None:
        """A round without data. Returns once all nodes have come to it."""
        with self._spans.span(ROUND), self._site.together():
            self._vote(round_id, "")

    def begin(self, round_id: int, vector: Tensor, form: RingFormat, residual: Tensor | None = None) -> Flight:
        """Begin a round that travels while the trainer computes; `finish` takes what this returns."""
        thread = ThreadPoolExecutor(1, thread_name_prefix=f"averaging-{round_id}")
        args = (vector, self.rank, self._world_size, self._wire, round_id, form, residual, BUCKETS_UNDER_STEPS)
        flight = Flight(thread.submit(all_reduce, *args), thread)
        self._flights.append(flight)
        return flight

    def finish(self, round_id: int, flight: Flight) -> RingSum:
        """Wait for a round that was begun, and agree on its result. Raises what went wrong under way too."""
        self._flights.remove(flight)
        with self._spans.span(ROUND), self._site.together():
            result = flight.land()
            self._vote(round_id, digest([result.total]))
        return result

    def close(self) -> None:
        """Wait until no thread is left. The generation or the run must be over, which ends what they wait for."""
        for flight in self._flights:
            flight.thread.shutdown(wait=True)
        self._flights.clear()

    def _vote(self, round_id: int, value: str) -> None:
        self._session.vote(round_id, True, value)


def all_reduce(
    vector: Tensor,
    rank: int,
    world_size: int,
    wire: ShardWire | None,
    round_id: int,
    form: RingFormat = FLOAT32,
    residual: Tensor | None = None,
    at_once: int | None = None,
) -> RingSum:
    """Sum `vector` over the ring. Returns new tensors on the CPU, the sum with the same bits on every rank.

    With a format that feeds back, `residual` [elements] is added to `vector`, and the new one holds what this node's
    rounding then left out: over all nodes, vectors + residuals before = sum + residuals after. At most `at_once`
    buckets are on the wire; None stands for all.
    """
    vector = vector.detach().to("cpu", torch.float32)
    own = vector if residual is None else vector + residual
    errors = torch.zeros_like(own) if form.feeds_back or residual is not None else None
    if world_size == 1:
        return RingSum(own.clone(), errors)
    assert wire
    whole = Ring(wire, rank, world_size, round_id, form)
    left = [None] * len(own.split(BUCKET_ELEMENTS)) if errors is None else errors.split(BUCKET_ELEMENTS)
    buckets = [
        _Bucket(whole, index, part, error)
        for index, (part, error) in enumerate(zip(own.split(BUCKET_ELEMENTS), left, strict=True))
    ]
    for first in range(0, len(buckets), at_once or len(buckets)):
        _travel(whole.hops, buckets[first : first + (at_once or len(buckets))])
    return RingSum(torch.cat([bucket.joined() for bucket in buckets]), errors)


def bytes_sent(n_elements: int, form: RingFormat, world_size: int, rank: int) -> int:
    """Payload bytes that `rank` sends in one round over so many numbers."""
    whole, rest = divmod(n_elements, BUCKET_ELEMENTS)
    sent = 0
    for count, size in ((whole, BUCKET_ELEMENTS), (1, rest)):
        sent += count * sum(form.nbytes(length) for length in ring.lengths_sent(size, world_size, rank))
    return sent


class Ring:
    """What all buckets of one round share."""

    def __init__(self, wire: ShardWire, rank: int, world_size: int, round_id: int, form: RingFormat) -> None:
        self.wire, self.round_id, self.form = wire, round_id, form
        self.world_size = world_size
        self.hops = ring.schedule(world_size, rank)
        self.following = ring.next_position(world_size, rank)


def _travel(hops: Sequence[ring.Hop], buckets: Sequence[_Bucket]) -> None:
    for bucket in buckets:
        bucket.send(0)
    for number in range(len(hops)):
        for bucket in buckets:
            bucket.receive(number)
            if number + 1 < len(hops):
                bucket.send(number + 1)


class _Bucket:
    """A part of the vector in shards. A shard that was sent is never written to: the endpoint may send it again.

    A running sum is rounded anew at every hop of the reduce-scatter. The finished shard is rounded once, by the node
    that has it whole, which takes what the others will read; from then on its bytes are passed on as they are.
    `errors` is written to: what this node's rounding leaves out. Each node rounds each shard once.
    """

    def __init__(self, whole: Ring, index: int, part: Tensor, errors: Tensor | None) -> None:
        self._ring, self._index = whole, index
        bounds = ring.shards(len(part), whole.world_size)
        self._shards = [part[start:stop] for start, stop in bounds]
        self._errors = None if errors is None else [errors[start:stop] for start, stop in bounds]
        self._packed: dict[int, Tensor] = {}

    def send(self, number: int) -> None:
        hop = self._ring.hops[number]
        place = hop.send_shard
        if len(self._shards[place]):
            packed = self._packed.pop(place, None)
            if packed is None:
                packed = self._round(place, finished=hop.phase == "all-gather")
            self._ring.wire.send_shard(self._ring.following, self._ring.round_id, number, self._index, packed)

    def receive(self, number: int) -> None:
        hop, form = self._ring.hops[number], self._ring.form
        own = self._shards[hop.receive_shard]
        if not len(own):
            return
        spec = TensorSpec((form.nbytes(len(own)),), torch.uint8)
        packed = self._ring.wire.take_shard(self._ring.round_id, number, self._index, spec)
        arrived = form.decode(packed, len(own))
        if hop.phase == "all-gather":
            self._shards[hop.receive_shard], self._packed[hop.receive_shard] = arrived, packed
        else:
            self._shards[hop.receive_shard] = arrived.add_(own)

    def joined(self) -> Tensor:
        return torch.cat(self._shards)

    def _round(self, place: int, finished: bool) -> Tensor:
        """The bytes of a shard; a finished one becomes what they stand for."""
        shard, form = self._shards[place], self._ring.form
        packed = form.encode(shard)
        if self._errors is not None:
            torch.sub(shard, form.decode(packed, len(shard)), out=self._errors[place])
        if finished:
            self._shards[place] = form.decode(packed, len(shard))
        return packed


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
