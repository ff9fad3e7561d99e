"""The differentiable exchange: an operation on tensors whose backward is the mirror of its forward.

`publish` sends the own chunks' payloads to their readers and returns at once. `arrivals` yields the payloads of all
earlier chunks as they come, local ones first. In the backward each reader returns a chunk's gradient as soon as it
is known, and `publish` waits for the readers' gradients only then, and adds them in order of rank.

The *anchor* is a scalar that `publish` makes and that everything else of the layer takes: autograd therefore
cannot start the waiting half of the backward before this node has sent all it owes to others, so nodes never wait
for each other in a circle.

The attention does not know of sockets, and this module does not know of attention.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import Function

from coordinator.assignment import Assignment
from node.exchange.payload import PayloadFormat, TensorSpec
from node.schedule import PassSpec

Payload = tuple[Tensor, ...]

FORWARD_PASSES_AHEAD = 2
"""Forward-only passes that an owner may be ahead of its readers."""


class Wire(Protocol):
    """What carries payloads between nodes (`node.exchange.wire`; tests have their own)."""

    def begin(self, pass_no: int, trains: bool) -> None:
        """A pass begins, with or without a backward; what was left of earlier ones is dropped."""

    def send(self, rank: int, kind: str, layer: int, chunk: int, spec: PassSpec, tensors: Payload) -> None:
        """Hand tensors over for `rank`; returns at once. They must not change afterwards."""

    def first_of(self, kind: str, layer: int, chunks: dict[int, int]) -> int:
        """Wait for the payload of any of `chunks` (chunk: its owner's rank); which chunk came."""

    def take(
        self,
        kind: str,
        layer: int,
        chunk: int,
        rank: int,
        specs: tuple[TensorSpec, ...],
        device: torch.device,
    ) -> Payload:
        """Wait for one payload and return its tensors."""

    def await_done(self, pass_no: int, chunk: int, rank: int) -> None:
        """Wait until a reader says that it has finished with `chunk` in a pass without gradients."""


class ChunkExchange:
    """One node's view of who owns which chunk, and the way to the others."""

    def __init__(self, assignment: Assignment, rank: int, payload: PayloadFormat, wire: Wire | None = None) -> None:
        self.own = tuple(assignment.chunks(rank))
        self.payload = payload
        self.rank = rank
        self._assignment = assignment
        self._wire = wire
        self._pass_no = 0
        self._spec = PassSpec(0, False)
        self._unfinished: deque[int] = deque()  # forward-only passes that readers may still be at
        last = self.own[-1]
        self.earlier = () if payload.silent else tuple(range(last))
        """Chunks that some own chunk attends to besides itself, in order."""

    def begin(self, spec: PassSpec, trains: bool) -> None:
        """Begin a pass, with or without a backward. Every node must make the same passes in the same order."""
        self._pass_no += 1
        self._spec = spec
        if self._wire:
            self._wire.begin(self._pass_no, trains)
            while self._unfinished and self._unfinished[0] <= self._pass_no - FORWARD_PASSES_AHEAD:
                self._await_readers(self._unfinished.popleft())

    def finish_forward(self) -> None:
        """End a pass that has no backward. Its readers owe no gradients, so they say "done": the owner of the first
        chunks, which waits for nobody, would else run ahead and fill the others' memory."""
        if self._wire:
            self._unfinished.append(self._pass_no)
            for chunk in self.earlier:
                if chunk not in self.own:
                    self.send(self.owner(chunk), "done", 0, chunk, ())

    def first_reader(self, chunk: int) -> int:
        """Place (in `own`) of the first own chunk that sees `chunk`."""
        return sum(own <= chunk for own in self.own)

    def publish(self, layer: int, payload_CB: Payload) -> tuple[Tensor, Payload]:
        """Send the own chunks' payload tensors [C, B, …] to their readers. Returns (anchor, the same tensors)."""
        anchor, *tensors = _Publish.apply(self, layer, *payload_CB)
        return anchor, tuple(tensors)

    def arrivals(self, layer: int, anchor: Tensor, own_payload_CB: Payload) -> Iterator[tuple[int, Payload]]:
        """Yield (chunk, payload tensors [B, …]) of every chunk in `earlier`: local ones, then others as they come."""
        place = {chunk: index for index, chunk in enumerate(self.own)}
        remote = frozenset(self.earlier) - frozenset(self.own)
        for chunk in self.earlier:
            if chunk in place:
                yield chunk, tuple(tensor[place[chunk]] for tensor in own_payload_CB)
        while remote:
            chunk = self._first_of(layer, remote)
            remote -= {chunk}
            yield chunk, _Receive.apply(self, layer, chunk, anchor)

    def remote_readers(self, chunk: int) -> tuple[int, ...]:
        """Ranks, in order, that get `chunk` from this node."""
        return () if self.payload.silent else tuple(sorted(self._assignment.readers_of(chunk)))

    def send(self, rank: int, kind: str, layer: int, chunk: int, tensors: Payload) -> None:
        assert self._wire
        self._wire.send(rank, kind, layer, chunk, self._spec, tensors)

    def take(self, kind: str, layer: int, chunk: int, rank: int, device: torch.device) -> Payload:
        assert self._wire
        return self._wire.take(kind, layer, chunk, rank, self.payload.tensors(layer, self._spec), device)

    def owner(self, chunk: int) -> int:
        return self._assignment.owner(chunk)

    def _first_of(self, layer: int, chunks: frozenset[int]) -> int:
        assert self._wire
        return self._wire.first_of("kv", layer, {chunk: self.owner(chunk) for chunk in chunks})

    def _await_readers(self, pass_no: int) -> None:
        assert self._wire
        for chunk in self.own:
            for rank in self.remote_readers(chunk):
                self._wire.await_done(pass_no, chunk, rank)


class _Publish(Function):
    @staticmethod
    def forward(ctx: Any, exchange: ChunkExchange, layer: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.exchange, ctx.layer, ctx.tensors = (
            exchange,
            layer,
            [(t.shape, t.dtype, t.device) for t in tensors],
        )
        for place, chunk in enumerate(exchange.own):
            for rank in exchange.remote_readers(chunk):
                exchange.send(rank, "kv", layer, chunk, tuple(tensor[place] for tensor in tensors))
        anchor = torch.zeros((), device=tensors[0].device)
        return anchor, *(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, _anchor: Tensor | None, *local: Tensor | None) -> tuple[Tensor | None, ...]:
        exchange: ChunkExchange = ctx.exchange
        grads = [
            torch.zeros(shape, dtype=dtype, device=device) if grad is None else grad.clone()
            for (shape, dtype, device), grad in zip(ctx.tensors, local, strict=True)
        ]
        for place, chunk in enumerate(exchange.own):
            for rank in exchange.remote_readers(chunk):
                returned = exchange.take("grad", ctx.layer, chunk, rank, grads[0].device)
                for grad, part in zip(grads, returned, strict=True):
                    grad[place] += part
        return None, None, *grads


class _Receive(Function):
    @staticmethod
    def forward(ctx: Any, exchange: ChunkExchange, layer: int, chunk: int, anchor: Tensor) -> tuple[Tensor, ...]:
        ctx.exchange, ctx.layer, ctx.chunk = exchange, layer, chunk
        return exchange.take("kv", layer, chunk, exchange.owner(chunk), anchor.device)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        exchange: ChunkExchange = ctx.exchange
        exchange.send(exchange.owner(ctx.chunk), "grad", ctx.layer, ctx.chunk, grads)
        return None, None, None, torch.zeros((), device=grads[0].device)
