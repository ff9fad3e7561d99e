"""The exchange of chunks: who sends what to whom in a pass, and the handle of a pass that is under way.

`ChunkExchange.begin` gives a `Pass`, which autograd's context holds until the pass is over, so that several can be in
flight: micro-batches that overlap, evaluations. `Pass.publish` sends the own chunks' payloads to their readers and
returns at once. `Pass.arrivals` yields the payloads of other nodes' earlier chunks as they come. In the backward each
reader returns a chunk's gradient as soon as it is known, and `publish` waits for the readers' gradients only then, and
adds them in order of rank (`node.exchange.functions`).

Everything crosses in a format (`node.exchange.formats`), also where it stays on its node: what own later chunks see is
what the others get, so the model is one function of the tokens whoever owns which chunk. Of the gradients each node
rounds one sum for each chunk, over its own readers, and returns it once. (A sum for each reader would not depend on who
owns what, and would cost as many times the bytes as a node owns later chunks.) So in float32 N nodes equal one; in
formats that round, a draw depends on who owns what, its mean does not, and N nodes are about as near to exact as one is
(test_format_ranks).

Where attention stays within a document, a pass has `node.exchange.documents`: of each chunk a reader gets only the rows
that its chunks attend to, and returns gradients of these; it gets nothing of a chunk of which it sees no row.

The attention does not know of sockets, and this module does not know of attention.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Generator, Tensor

from coordinator.assignment import Assignment
from node.config.seeds import derive
from node.exchange import functions
from node.exchange.documents import Documents, Run
from node.exchange.formats import Packed, TensorSpec
from node.exchange.passes import PassKey, PassSpec
from node.exchange.payload import Payload, PayloadFormat
from node.measure.spans import DECODE, ENCODE, Kind, Spans

Arrived = dict[tuple[str, int], Packed]
"""Messages as they came, by kind and chunk."""

FORWARD_PASSES_AHEAD = 2
"""Forward-only passes, at least, that an owner may be ahead of its readers."""


def passes_ahead(payload: PayloadFormat) -> int:
    """How many passes a node may be ahead of another: all that may be in flight together."""
    return max(payload.micro_batches, FORWARD_PASSES_AHEAD)


def most_ahead(payload: PayloadFormat) -> int:
    """How many passes ahead a node may get. Where attention stays within a document, an owner whose chunks nobody reads
    in a training pass waits for no gradients of it, so it may also be through with all training passes of a step."""
    return passes_ahead(payload) + (payload.micro_batches if payload.documents else 0)


class ChunkWire(Protocol):
    """What carries payloads between nodes (`node.exchange.wire`; tests have their own)."""

    def begin(self, number: int) -> None:
        """A pass begins here: its payloads will be asked for."""

    def end(self, number: int) -> None:
        """A pass is over: whatever is left of it is dropped, and what still comes of it too."""

    def send(self, rank: int, kind: str, layer: int, chunk: int, key: PassKey, tensors: Packed) -> None:
        """Hand tensors over for `rank`; returns at once. They must not change afterwards."""

    def publish(self, ranks: tuple[int, ...], layer: int, chunk: int, key: PassKey, tensors: Packed) -> None:
        """The same for an own chunk's payload, which all of `ranks` get."""

    def first_of(self, kind: str, layer: int, chunks: dict[int, int], number: int) -> int:
        """Wait for the payload of any of `chunks` (chunk: its owner's rank); which chunk came."""

    def take(
        self,
        kind: str,
        layer: int,
        chunk: int,
        rank: int,
        number: int,
        specs: tuple[TensorSpec, ...],
        device: torch.device,
    ) -> Packed:
        """Wait for one payload of pass `number`, and return its tensors."""


class ChunkExchange:
    """One node's view of who owns which chunk, and the way to the others. `spans` is told what its passes do."""

    def __init__(
        self,
        assignment: Assignment,
        rank: int,
        payload: PayloadFormat,
        wire: ChunkWire | None = None,
        recorder: Spans | None = None,
    ) -> None:
        self.spans = recorder or Spans()
        self.own = tuple(assignment.chunks(rank))
        self.payload = payload
        self.rank = rank
        self.wire = wire
        self._assignment = assignment
        self._begun = 0
        self._unread: deque[PassKey] = deque()  # forward-only passes that readers may still be at
        self._earlier = tuple(sorted(set(range(self.own[-1])) - set(self.own)))

    def begin(
        self, spec: PassSpec, *, trains: bool, draw: tuple[int, ...] = (0,), documents: Documents | None = None
    ) -> Pass:
        """Begin a pass. Every node must begin the same passes in the same order.

        `draw` names the random numbers that round this pass's gradients: the training step's number, and where a step
        has several passes, which of them it is. A resumed run draws the same. `documents` are those of the pass's
        contexts, where attention stays within a document.
        """
        assert (documents is not None) == self.payload.documents
        self._begun += 1
        key = PassKey(self._begun, spec, trains)
        if self.wire:
            self.wire.begin(key.number)
            while self._unread and self._unread[0].number <= key.number - passes_ahead(self.payload):
                self._await_readers(self._unread.popleft())
        return Pass(self, key, draw, documents)

    def earlier(self, layer: int) -> tuple[int, ...]:
        """Other nodes' chunks that some own chunk attends to, in order."""
        return self._earlier if self.payload.exchanges(layer) else ()

    def shared(self, layer: int) -> tuple[int, ...]:
        """Own chunks that later own chunks attend to."""
        return self.own[:-1] if self.payload.exchanges(layer) else ()

    def first_reader(self, chunk: int) -> int:
        """Place (in `own`) of the first own chunk that sees `chunk`."""
        return sum(own <= chunk for own in self.own)

    def remote_readers(self, layer: int, chunk: int) -> tuple[int, ...]:
        """Ranks, in order, that get `chunk` from this node."""
        return tuple(sorted(self._assignment.readers_of(chunk))) if self.payload.exchanges(layer) else ()

    def tails(self, documents: Documents, chunk: int, rank: int) -> list[Run]:
        """The rows of `chunk` to which chunks of `rank` attend."""
        return documents.tails(chunk, self._assignment.chunks(rank))

    def owner(self, chunk: int) -> int:
        """The rank that owns `chunk`."""
        return self._assignment.owner(chunk)

    def say_done(self, key: PassKey) -> None:
        """A forward-only pass has ended here. Its readers owe no gradients, so they say "done": otherwise the owner of
        the first chunks, which waits for nobody, would run ahead and fill the others' memory."""
        if self.wire:
            self._unread.append(key)
            for chunk in self.earlier(self._last_layer):
                self.wire.send(self.owner(chunk), "done", 0, chunk, key, ())

    @property
    def _last_layer(self) -> int:
        return self.payload.layers - 1  # it exchanges, if any layer does

    def _await_readers(self, key: PassKey) -> None:
        assert self.wire
        for chunk in self.own:
            for rank in self.remote_readers(self._last_layer, chunk):
                self.wire.take("done", 0, chunk, rank, key.number, (), torch.device("cpu"))
        self.wire.end(key.number)


class Pass:
    """One pass under way: a forward and, where it trains, its backward.

    A training pass is over when the backward of its first exchanged layer is, or when nothing holds the handle any
    more (a forward that was abandoned). A pass without a backward is over after `finish_forward`, once its readers have
    said so.
    """

    def __init__(
        self, exchange: ChunkExchange, key: PassKey, draw: tuple[int, ...], documents: Documents | None = None
    ) -> None:
        self.exchange = exchange
        self.key = key
        self.draw = draw
        self.documents = documents
        self._tails: dict[tuple[int, int], list[Run]] = {}
        self._kept: dict[int, Arrived] = {}
        self._end: weakref.finalize[[int], Pass] | None = None
        if exchange.wire and key.trains:
            self._end = weakref.finalize(self, exchange.wire.end, key.number)
            self._end.atexit = False

    @property
    def spec(self) -> PassSpec:
        """How long the chunks are, and whether layers with a codec compress."""
        return self.key.spec

    def earlier(self, layer: int) -> tuple[int, ...]:
        """Other nodes' chunks that some own chunk attends to in this pass, in order."""
        earlier = self.exchange.earlier(layer)
        return tuple(chunk for chunk in earlier if self.tails(chunk, self.exchange.rank) != [])

    def remote_readers(self, layer: int, chunk: int) -> tuple[int, ...]:
        """Ranks, in order, that get anything of `chunk` from this node in this pass."""
        readers = self.exchange.remote_readers(layer, chunk)
        return tuple(rank for rank in readers if self.tails(chunk, rank) != [])

    def tails(self, chunk: int, rank: int) -> list[Run] | None:
        """The rows of `chunk` to which chunks of `rank` attend in this pass; None: all of them."""
        if self.documents is None:
            return None
        if (chunk, rank) not in self._tails:
            self._tails[chunk, rank] = self.exchange.tails(self.documents, chunk, rank)
        return self._tails[chunk, rank]

    def publish(self, layer: int, payload_CB: Payload) -> tuple[Tensor, Payload]:
        """Send the own chunks' payload tensors [C, B, …] to their readers. Returns (anchor, what every reader sees).

        The *anchor* is a scalar that everything else of the layer takes: autograd therefore cannot start the waiting
        half of the backward before this node has sent all that it owes to others, so nodes never wait for each other
        in a circle.
        """
        anchor, *tensors = functions.Publish.apply(self, layer, *payload_CB)
        return anchor, tuple(tensors)

    def hand_on(self, layer: int, made_CBp: Tensor) -> Tensor:
        """θ [C, B, p] for the own chunks, each that of the chunk before it: `made` from its K and V by its owner, who
        sends it here. The first chunk of the context has θ = 0. Every owner sends before it waits, forward and
        backward."""
        handed: Tensor = functions.HandOn.apply(self, layer, made_CBp)
        return handed

    def arrivals(self, layer: int, anchor: Tensor) -> Iterator[tuple[int, Payload]]:
        """Yield (chunk, payload tensors [B, …]) of every chunk in `earlier`, as they come."""
        waiting = {chunk: self.exchange.owner(chunk) for chunk in self.earlier(layer)}
        while waiting:
            chunk = self.first_arrival(layer, waiting)
            del waiting[chunk]
            yield chunk, functions.Receive.apply(self, layer, chunk, anchor)

    def finish_forward(self) -> None:
        """End a pass that has no backward."""
        assert not self.key.trains
        self.exchange.say_done(self.key)

    def finish_backward(self, layer: int, kind: str) -> None:
        """The backward of `layer` has all gradients of this kind that it waits for. The last of a pass are those of its
        first exchanged layer: of θ where that is handed on, otherwise of the payload."""
        if self._end and (layer, kind) == self.exchange.payload.last_gradient(self.spec):
            self._end()

    def pack(self, layer: int, payload: Payload) -> Packed:
        """What crosses for payload tensors [..., B, …]."""
        with self.span(ENCODE, layer):
            return self.exchange.payload.pack(layer, self.spec, payload)

    def pack_gradient(self, layer: int, chunk: int, grads: Payload) -> Packed:
        """What crosses for the gradient that this node's chunks have for `chunk`. It has a stream of draws of its own,
        which is named by the first of these chunks, whatever rank owns them."""
        with self.span(ENCODE, layer):
            draws = self._draws(layer, chunk, grads[0].device)
            grads = self.rows_for(chunk, self.exchange.rank, grads)
            return self.exchange.payload.pack(layer, self.spec, grads, "grad", draws)

    def own_gradients(self, layer: int, grads_C: Payload) -> Payload:
        """The gradients that this node's chunks have for the own chunks before them, as if they had crossed."""
        draws = [self._draws(layer, chunk, grads_C[0].device) for chunk in self.exchange.shared(layer)]
        return self.unpack(layer, self.exchange.payload.pack(layer, self.spec, grads_C, "grad", draws), "grad")

    def unpack(self, layer: int, packed: Packed, kind: str = "kv") -> Payload:
        """Back from `pack`, or from `pack_gradient`."""
        with self.span(DECODE, layer):
            return self.exchange.payload.unpack(layer, self.spec, packed, kind)

    def send(self, rank: int, kind: str, layer: int, chunk: int, tensors: Packed) -> None:
        """Hand tensors over for `rank`."""
        assert self.exchange.wire
        self.exchange.wire.send(rank, kind, layer, chunk, self.key, tensors)

    def send_to_readers(self, layer: int, chunk: int, payload: Packed) -> None:
        """Hand an own chunk's payload over for all its readers on other nodes."""
        ranks = self.remote_readers(layer, chunk)
        if self.documents is not None:  # each reader gets rows of its own
            for rank in ranks:
                self.send(rank, "kv", layer, chunk, self.rows_for(chunk, rank, payload))
        elif ranks:
            assert self.exchange.wire
            self.exchange.wire.publish(ranks, layer, chunk, self.key, payload)

    def take(self, kind: str, layer: int, chunk: int, rank: int, device: torch.device) -> Payload:
        """Wait for a payload, or for its gradient, and unpack it."""
        tails = self.tails(chunk, self.exchange.rank if kind == "kv" else rank)
        rows = None if tails is None else sum(run.end - run.begin for run in tails)
        specs = self.exchange.payload.tensors(layer, self.spec, kind, rows)
        found = self.unpack(layer, self.take_packed(kind, layer, chunk, rank, specs, device), kind)
        return found if tails is None else self._in_place(layer, tails, found)

    def rows_for(self, chunk: int, rank: int, tensors: Packed) -> Packed:
        """Of what one chunk has, [B, n, …], the rows to which chunks of `rank` attend, [rows, …]; θ [B, …] as it is."""
        tails = self.tails(chunk, rank)
        if tails is None:
            return tensors
        return tuple(torch.cat([x[c, b:e] for c, b, e in tails]) if x.dim() == 3 else x for x in tensors)

    def _in_place(self, layer: int, tails: Sequence[Run], payload: Payload) -> Payload:
        """Back from `rows_for`, with zeros in place of the rows that did not cross."""
        placed = []
        for part, x in zip(self.exchange.payload.parts(layer, self.spec), payload, strict=True):
            if part.by_token:
                rows, x = x, x.new_zeros(part.shape)
                for (context, begin, end), run in zip(tails, rows.split([e - b for _, b, e in tails]), strict=True):
                    x[context, begin:end] = run
            placed.append(x)
        return tuple(placed)

    def take_theta(self, kind: str, layer: int, chunk: int, rank: int, device: torch.device) -> Tensor:
        """Wait for a neighbour's θ, or for its gradient."""
        specs = (self.exchange.payload.theta(layer),)
        (theta,) = self.take_packed(kind, layer, chunk, rank, specs, device)
        return theta

    def span(self, kind: Kind, layer: int) -> Spans:
        """A span of this pass, for a `with` block."""
        return self.exchange.spans.span(kind, layer, self.key.number)

    def first_arrival(self, layer: int, waiting: dict[int, int]) -> int:
        """Wait for the payload of any chunk in `waiting` (chunk: its owner's rank); which chunk came."""
        assert self.exchange.wire
        return self.exchange.wire.first_of("kv", layer, waiting, self.key.number)

    def take_packed(
        self, kind: str, layer: int, chunk: int, rank: int, specs: tuple[TensorSpec, ...], device: torch.device
    ) -> Packed:
        """Wait for the tensors of one message."""
        assert self.exchange.wire
        packed = self.exchange.wire.take(kind, layer, chunk, rank, self.key.number, specs, device)
        if layer in self._kept and kind in ("kv", "theta"):
            self._kept[layer][kind, chunk] = packed
        return packed

    def keep(self, layer: int) -> None:
        """Keep what arrives in the forward of `layer`, for a `Replay`."""
        self._kept[layer] = {}

    def give_up(self, layer: int) -> Arrived:
        """What was kept of `layer`, in the order in which it came. The pass forgets it."""
        return self._kept.pop(layer)

    def _draws(self, layer: int, chunk: int, device: torch.device) -> Generator:
        """The random numbers for one chunk's gradient, by the first of this node's chunks that reads it."""
        exchange = self.exchange
        reader = exchange.own[exchange.first_reader(chunk)]
        return Generator(device).manual_seed(
            derive(exchange.payload.seed, "gradient", *self.draw, layer, chunk, reader)
        )


class Replay(Pass):
    """A layer's forward once more, in the backward of its pass: what arrived is as it was kept, and nothing is sent.

    Nothing is ever sent twice or waited for, since this handle does not touch the wire. The own chunks' payloads are
    made anew from the layer's input; forward payloads are rounded to nearest, so they come out the same.
    """

    def __init__(self, handle: Pass, layer: int) -> None:
        super().__init__(handle.exchange, handle.key._replace(trains=False), handle.draw, handle.documents)
        self._arrived = handle.give_up(layer)

    def send(self, rank: int, kind: str, layer: int, chunk: int, tensors: Packed) -> None:
        """It was sent in the forward."""

    def send_to_readers(self, layer: int, chunk: int, payload: Packed) -> None:
        """It was sent in the forward."""

    def first_arrival(self, layer: int, waiting: dict[int, int]) -> int:
        """The next chunk in the order of the forward, so that operations come in the same order."""
        return next(chunk for kind, chunk in self._arrived if kind == "kv")

    def take_packed(
        self, kind: str, layer: int, chunk: int, rank: int, specs: tuple[TensorSpec, ...], device: torch.device
    ) -> Packed:
        """What came in the forward."""
        return self._arrived.pop((kind, chunk))
