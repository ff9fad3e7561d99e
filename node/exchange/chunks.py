"""The differentiable exchange: an operation on tensors whose backward is the mirror of its forward.

`publish` sends the own chunks' payloads to their readers and returns at once. `arrivals` yields the payloads of other
nodes' earlier chunks as they come. In the backward each reader returns a chunk's gradient as soon as it
is known, and `publish` waits for the readers' gradients only then, and adds them in order of rank.

All of it crosses in a format (`node.exchange.formats`), also where it stays on its node: what own later chunks see is
what the others get, so the model is one function of the tokens whoever owns what. Of gradients each node rounds one
sum for each chunk, over its own readers, and returns it once. (A sum for each reader would not depend on who owns what,
and cost as many times the bytes as a node owns later chunks.) So in float32 N nodes equal one; in formats that round, a
draw depends on who owns what, its mean does not, and N nodes are about as near to exact as one is (test_format_ranks).

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
from torch import Generator, Tensor
from torch.autograd import Function

from coordinator.assignment import Assignment
from node.config.seeds import derive
from node.exchange.formats import Packed, TensorSpec
from node.exchange.passes import PassSpec
from node.exchange.payload import Payload, PayloadFormat

FORWARD_PASSES_AHEAD = 2
"""Forward-only passes that an owner may be ahead of its readers; `node.exchange.inbox` takes none from further."""


class Wire(Protocol):
    """What carries payloads between nodes (`node.exchange.wire`; tests have their own)."""

    def begin(self, pass_no: int, trains: bool) -> None:
        """A pass begins, with or without a backward; what was left of earlier ones is dropped."""

    def send(self, rank: int, kind: str, layer: int, chunk: int, spec: PassSpec, tensors: Packed) -> None:
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
    ) -> Packed:
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
        self._step = 0
        self._unfinished: deque[int] = deque()  # forward-only passes that readers may still be at
        self._earlier = tuple(sorted(set(range(self.own[-1])) - set(self.own)))
        self._last_layer = payload.layers - 1  # exchanges, if any layer does

    def at_step(self, step: int) -> None:
        """A training step begins. Its number seeds the rounding of gradients, so that a resumed run draws the same."""
        self._step = step

    def earlier(self, layer: int) -> tuple[int, ...]:
        """Other nodes' chunks that some own chunk attends to, in order."""
        return self._earlier if self.payload.exchanges(layer) else ()

    def shared(self, layer: int) -> tuple[int, ...]:
        """Own chunks that later own chunks attend to."""
        return self.own[:-1] if self.payload.exchanges(layer) else ()

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
            for chunk in self.earlier(self._last_layer):
                self.send(self.owner(chunk), "done", 0, chunk, ())

    def first_reader(self, chunk: int) -> int:
        """Place (in `own`) of the first own chunk that sees `chunk`."""
        return sum(own <= chunk for own in self.own)

    def publish(self, layer: int, payload_CB: Payload) -> tuple[Tensor, Payload]:
        """Send the own chunks' payload tensors [C, B, …] to their readers. Returns (anchor, what every reader sees)."""
        anchor, *tensors = _Publish.apply(self, layer, *payload_CB)
        return anchor, tuple(tensors)

    def hand_on(self, layer: int, made_CBp: Tensor) -> Tensor:
        """θ [C, B, p] for the own chunks, each that of the chunk before it: `made` of its K and V by its owner, who
        sends it here. The first chunk of the context has θ = 0. Every owner sends before it waits, forward and
        backward."""
        handed: Tensor = _HandOn.apply(self, layer, made_CBp)
        return handed

    def arrivals(self, layer: int, anchor: Tensor) -> Iterator[tuple[int, Payload]]:
        """Yield (chunk, payload tensors [B, …]) of every chunk in `earlier`, as they come."""
        waiting = frozenset(self.earlier(layer))
        while waiting:
            chunk = self._first_of(layer, waiting)
            waiting -= {chunk}
            yield chunk, _Receive.apply(self, layer, chunk, anchor)

    def remote_readers(self, layer: int, chunk: int) -> tuple[int, ...]:
        """Ranks, in order, that get `chunk` from this node."""
        return tuple(sorted(self._assignment.readers_of(chunk))) if self.payload.exchanges(layer) else ()

    def pack(self, layer: int, payload: Payload) -> Packed:
        """What crosses for payload tensors [..., B, …]."""
        return self.payload.pack(layer, self._spec, payload)

    def pack_gradient(self, layer: int, chunk: int, grads: Payload) -> Packed:
        """What crosses for the gradient that this node's chunks have for `chunk`: its own stream of draws, named by the
        first of them, whatever rank they are at."""
        return self.payload.pack(layer, self._spec, grads, self._draws(layer, chunk, grads[0].device))

    def own_gradients(self, layer: int, grads_C: Payload) -> Payload:
        """The gradients that this node's chunks have for the `shared` ones, as if they had crossed."""
        draws = [self._draws(layer, chunk, grads_C[0].device) for chunk in self.shared(layer)]
        return self.unpack(layer, self.payload.pack(layer, self._spec, grads_C, draws))

    def unpack(self, layer: int, packed: Packed) -> Payload:
        return self.payload.unpack(layer, self._spec, packed)

    def send(self, rank: int, kind: str, layer: int, chunk: int, tensors: Packed) -> None:
        assert self._wire
        self._wire.send(rank, kind, layer, chunk, self._spec, tensors)

    def take(self, kind: str, layer: int, chunk: int, rank: int, device: torch.device) -> Payload:
        assert self._wire
        specs = self.payload.tensors(layer, self._spec)
        return self.unpack(layer, self._wire.take(kind, layer, chunk, rank, specs, device))

    def take_theta(self, kind: str, layer: int, chunk: int, rank: int, device: torch.device) -> Tensor:
        assert self._wire
        (theta,) = self._wire.take(kind, layer, chunk, rank, (self.payload.theta(layer),), device)
        return theta

    def owner(self, chunk: int) -> int:
        return self._assignment.owner(chunk)

    def _first_of(self, layer: int, chunks: frozenset[int]) -> int:
        assert self._wire
        return self._wire.first_of("kv", layer, {chunk: self.owner(chunk) for chunk in chunks})

    def _draws(self, layer: int, chunk: int, device: torch.device) -> Generator:
        """Of one chunk's gradient, by the first of this node's chunks that reads it."""
        reader = self.own[self.first_reader(chunk)]
        return Generator(device).manual_seed(derive(self.payload.seed, "gradient", self._step, layer, chunk, reader))

    def _await_readers(self, pass_no: int) -> None:
        assert self._wire
        for chunk in self.own:
            for rank in self.remote_readers(self._last_layer, chunk):
                self._wire.await_done(pass_no, chunk, rank)


class _Publish(Function):
    @staticmethod
    def forward(ctx: Any, exchange: ChunkExchange, layer: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.exchange, ctx.layer = exchange, layer
        ctx.tensors = [(tensor.shape, tensor.dtype, tensor.device) for tensor in tensors]
        anchor = torch.zeros((), device=tensors[0].device)
        if not exchange.payload.exchanges(layer):
            return anchor, *(tensor.view_as(tensor) for tensor in tensors)
        packed = exchange.pack(layer, tensors)
        for place, chunk in enumerate(exchange.own):
            for rank in exchange.remote_readers(layer, chunk):
                exchange.send(rank, "kv", layer, chunk, tuple(tensor[place] for tensor in packed))
        return anchor, *(tensor.view_as(tensor) for tensor in exchange.unpack(layer, packed))

    @staticmethod
    def backward(ctx: Any, _anchor: Tensor | None, *local: Tensor | None) -> tuple[Tensor | None, ...]:
        exchange: ChunkExchange = ctx.exchange
        totals = [
            torch.zeros(shape, dtype=torch.float32, device=device)
            if grad is None
            else grad.to(torch.float32, copy=True)
            for (shape, _, device), grad in zip(ctx.tensors, local, strict=True)
        ]
        if shared := len(exchange.shared(ctx.layer)):
            own = exchange.own_gradients(ctx.layer, tuple(total[:shared] for total in totals))
            for total, parts in zip(totals, own, strict=True):
                total[:shared] = parts
        for place, chunk in enumerate(exchange.own):
            for rank in exchange.remote_readers(ctx.layer, chunk):
                returned = exchange.take("grad", ctx.layer, chunk, rank, totals[0].device)
                for total, part in zip(totals, returned, strict=True):
                    total[place] += part
        grads = [total.to(dtype) for total, (_, dtype, _) in zip(totals, ctx.tensors, strict=True)]
        return None, None, *grads


class _HandOn(Function):
    @staticmethod
    def forward(ctx: Any, exchange: ChunkExchange, layer: int, made_CBp: Tensor) -> Tensor:
        ctx.exchange, ctx.layer = exchange, layer
        own = exchange.own
        for place, chunk in enumerate(own):
            if chunk + 1 < exchange.payload.chunks and chunk + 1 not in own:
                exchange.send(exchange.owner(chunk + 1), "theta", layer, chunk, (made_CBp[place],))
        handed = torch.zeros_like(made_CBp)
        for place, chunk in enumerate(own):
            if chunk - 1 in own:
                handed[place] = made_CBp[own.index(chunk - 1)]
            elif chunk > 0:
                rank = exchange.owner(chunk - 1)
                handed[place] = exchange.take_theta("theta", layer, chunk - 1, rank, made_CBp.device)
        return handed

    @staticmethod
    def backward(ctx: Any, grad_CBp: Tensor) -> tuple[Tensor | None, ...]:
        exchange: ChunkExchange = ctx.exchange
        own = exchange.own
        for place, chunk in enumerate(own):
            if chunk > 0 and chunk - 1 not in own:
                sent = grad_CBp[place].clone()  # autograd may go on with its own memory
                exchange.send(exchange.owner(chunk - 1), "dtheta", ctx.layer, chunk - 1, (sent,))
        made = torch.zeros_like(grad_CBp)
        for place, chunk in enumerate(own):
            if chunk + 1 in own:
                made[place] = grad_CBp[own.index(chunk + 1)]
            elif chunk + 1 < exchange.payload.chunks:
                rank = exchange.owner(chunk + 1)
                made[place] = exchange.take_theta("dtheta", ctx.layer, chunk, rank, grad_CBp.device)
        return None, None, made


class _Receive(Function):
    @staticmethod
    def forward(ctx: Any, exchange: ChunkExchange, layer: int, chunk: int, anchor: Tensor) -> tuple[Tensor, ...]:
        ctx.exchange, ctx.layer, ctx.chunk = exchange, layer, chunk
        return exchange.take("kv", layer, chunk, exchange.owner(chunk), anchor.device)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        exchange: ChunkExchange = ctx.exchange
        packed = exchange.pack_gradient(ctx.layer, ctx.chunk, grads)
        exchange.send(exchange.owner(ctx.chunk), "grad", ctx.layer, ctx.chunk, packed)
        return None, None, None, torch.zeros((), device=grads[0].device)
