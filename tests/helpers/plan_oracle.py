"""One training step, segment by segment, in simpy: slow, plain, and written apart from `node.lab.plan`.

Each pass is a list of pieces of work as `ExchangedLlama.overlapped` yields them; pieces of all passes are dealt in
turns, and the backward goes through what the forward recorded in the reverse order, as autograd does.

Each node is a process that computes, sends and waits, in the order of `node.model` and autograd. The network is what
`netem.shaper` does: links in order, a NIC's links in turns of one segment, a receiving NIC in order of arrival. What
`node.lab.plan.simulate` says in closed form is compared with this.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Hashable
from functools import partial

import numpy as np
import simpy

from helpers.worlds import sources_of
from node.exchange.routes import routes_for, span_of
from node.lab.plan.costs import Costs
from node.lab.plan.lines import Lines
from node.lab.plan.simulate import StepWork
from node.lab.plan.work import Work

SEGMENT_BYTES = 2000

OWN, PASSED_ON = 0, 1
"""Flows of a link, which take turns; each pipeline stage has its own."""

Process = Generator[simpy.Event, object, None]


class Network:
    """Segments from node to node; `arrived` tells when a message is there."""

    def __init__(self, clock: simpy.Environment, lines: Lines) -> None:
        ranks = range(len(lines.up_bps))
        self._clock, self._lines = clock, lines
        self._lanes: dict[tuple[int, int, Hashable], simpy.Store] = {}
        # Whoever waits for the NIC is served in order, and a lane asks for each segment anew: so lanes take turns.
        self._nics = [simpy.Resource(clock, 1) for _ in ranks]
        self._down_free_s = [0.0 for _ in ranks]
        self._arrivals: dict[Hashable, simpy.Event] = {}
        self._links = {(source, target): simpy.Resource(clock, 1) for source in ranks for target in ranks}

    def arrived(self, rank: int, key: Hashable) -> simpy.Event:
        return self._arrivals.setdefault((rank, key), self._clock.event())

    def send(self, source: int, target: int, key: Hashable, nbytes: float, flow: Hashable = OWN) -> None:
        if (source, target, flow) not in self._lanes:
            self._lanes[source, target, flow] = simpy.Store(self._clock)
            self._clock.process(self._send_segments(source, target, flow))
        whole, rest = divmod(nbytes, SEGMENT_BYTES)
        sizes = [SEGMENT_BYTES] * int(whole) + ([rest] if rest else [])
        for place, size in enumerate(sizes):
            self._lanes[source, target, flow].put((size, key if place == len(sizes) - 1 else None))

    def _send_segments(self, source: int, target: int, flow: Hashable) -> Process:
        rate_bps = min(self._lines.up_bps[source], self._lines.link_bps[source, target])
        limited = np.isfinite(self._lines.up_bps[source])
        shared = self._nics[source] if limited else self._links[source, target]
        while True:
            size, key = yield self._lanes[source, target, flow].get()  # type: ignore[misc]
            with shared.request() as turn:
                yield turn
                yield self._clock.timeout(8 * size / rate_bps)
            self._clock.process(self._fly(source, target, size, key))

    def _fly(self, source: int, target: int, size: float, key: Hashable) -> Process:
        yield self._clock.timeout(self._lines.latency_s[source, target])
        takes_s = 8 * size / self._lines.down_bps[target]
        through_s = max(self._down_free_s[target], self._clock.now - takes_s) + takes_s
        self._down_free_s[target] = through_s
        if key is not None:
            yield self._clock.timeout(through_s - self._clock.now)
            self.arrived(target, key).succeed()


def step_ends_s(step: StepWork, costs: Costs, lines: Lines) -> list[float]:
    """When each node is done with the step."""
    clock = simpy.Environment()
    network = Network(clock, lines)
    ends_s = [0.0 for _ in range(step.assignment.n_ranks)]

    def node(rank: int) -> Process:
        yield from _step(clock, network, step, costs, rank)
        ends_s[rank] = clock.now

    nodes = [clock.process(node(rank)) for rank in range(step.assignment.n_ranks)]
    clock.run(clock.all_of(nodes))
    return ends_s


def _step(clock: simpy.Environment, network: Network, step: StepWork, costs: Costs, rank: int) -> Process:
    works = [OnePass(clock, network, step, costs, rank, number) for number in range(step.passes)]
    pieces = [work.forward() for work in works]
    recorded: list[Callable[[], Process]] = []
    for turn in range(len(step.layers) + 1):
        for work, own in zip(works, pieces, strict=True):
            yield from own[turn]()
            recorded.append(work.backward(turn))
    for back in reversed(recorded):
        yield from back()
    yield clock.timeout(costs.seconds(step.optimizer)[rank])


class OnePass:
    """One pass on one node. Its turn t is what comes between the first halves of layers t−1 and t."""

    def __init__(
        self, clock: simpy.Environment, network: Network, step: StepWork, costs: Costs, rank: int, number: int
    ) -> None:
        self._clock, self._network, self._step, self._costs = clock, network, step, costs
        self._rank, self._number = rank, number
        assignment = step.assignment
        self._own, self._sources = assignment.chunks(rank), sources_of(assignment, rank)
        self._orders: dict[int, list[int]] = {}
        for index in range(len(step.layers)) if step.relays else ():
            for chunk in self._sources:
                clock.process(self.gather(index, chunk))

    def forward(self) -> list[Callable[[], Process]]:
        return [partial(self._turn, turn) for turn in range(len(self._step.layers) + 1)]

    def backward(self, turn: int) -> Callable[[], Process]:
        return partial(self._turn_back, turn)

    def _turn(self, turn: int) -> Process:
        if turn > 0:
            yield from self.receive(turn - 1)
        if turn < len(self._step.layers):
            yield from self.publish(turn)
        else:
            yield self.works(self._step.head_forward)

    def _turn_back(self, turn: int) -> Process:
        if turn < len(self._step.layers):
            yield from self.collect(turn)
        else:
            yield self.works(self._step.head_backward)
        if turn > 0:
            yield from self.give_back(turn - 1)

    def publish(self, index: int) -> Process:
        layer, assignment = self._step.layers[index], self._step.assignment
        yield self.works(layer.work.forward.before)
        for chunk in self._own:
            if self._step.relays:
                self._send_pieces(index, chunk, OWN)
                continue
            for reader in assignment.readers_of(chunk):
                nbytes = layer.payload_bytes * self._rows(chunk, reader)
                self._network.send(self._rank, reader, self._key("kv", index, chunk), nbytes)
        yield self.works(layer.work.forward.own)
        yield from self._shared(layer.work.forward.block)

    def _send_pieces(self, index: int, chunk: int, flow: int, only: int | None = None) -> None:
        """This node's part of a chunk that is relayed: all of it, or what it passes on of one piece."""
        nbytes = round(self._step.layers[index].payload_bytes)
        routes = routes_for(self._step.assignment, True, nbytes)
        for piece, target in routes.sends(self._rank, chunk):
            if only in (None, piece):
                begin, end = span_of(piece, routes.pieces(chunk), nbytes)
                self._network.send(self._rank, target, self._key("piece", index, chunk, piece), end - begin, flow)

    def relay(self, index: int, chunk: int, piece: int) -> Process:
        """Pass a piece on as soon as it is there."""
        yield self._arrived("piece", index, chunk, piece)
        self._send_pieces(index, chunk, PASSED_ON, piece)

    def gather(self, index: int, chunk: int) -> Process:
        """The payload is there when all its pieces are."""
        nbytes = round(self._step.layers[index].payload_bytes)
        pieces = range(routes_for(self._step.assignment, True, nbytes).pieces(chunk))
        for piece in pieces:
            self._clock.process(self.relay(index, chunk, piece))
        yield self._clock.all_of([self._arrived("piece", index, chunk, piece) for piece in pieces])
        self._arrived("kv", index, chunk).succeed()

    def receive(self, index: int) -> Process:
        work = self._step.layers[index].work.forward
        waiting = {chunk: self._arrived("kv", index, chunk) for chunk in self._sources}
        order = self._orders[index] = []
        while waiting:
            yield self._clock.any_of(waiting.values())
            chunk = next(chunk for chunk, arrival in waiting.items() if arrival.processed)
            del waiting[chunk]
            order.append(chunk)
            yield self.works(work.block, chunk)
        yield self.works(work.after)

    def give_back(self, index: int) -> Process:
        layer, assignment = self._step.layers[index], self._step.assignment
        yield self.works(layer.work.backward.after)
        for chunk in reversed(self._orders[index]):
            yield self.works(layer.work.backward.block, chunk)
            key = self._key("grad", index, chunk, self._rank)
            nbytes = layer.grad_bytes * self._rows(chunk, self._rank)
            self._network.send(self._rank, assignment.owner(chunk), key, nbytes)

    def collect(self, index: int) -> Process:
        work, assignment = self._step.layers[index].work.backward, self._step.assignment
        yield self.works(work.own)
        yield from self._shared(work.block)
        owed = [(chunk, reader) for chunk in self._own for reader in assignment.readers_of(chunk)]
        yield self._clock.all_of([self._arrived("grad", index, *one) for one in owed])
        yield self.works(work.before)

    def _rows(self, chunk: int, reader: int) -> float:
        """The share of a chunk's rows that crosses."""
        rows_CR = self._step.rows_CR
        return 1.0 if rows_CR is None else float(rows_CR[chunk, reader])

    def _shared(self, block: Work) -> Process:
        for chunk in self._own[:-1]:
            yield self.works(block, chunk)

    def works(self, work: Work, chunk: int | None = None) -> simpy.Event:
        seconds = self._costs.seconds(work)
        return self._clock.timeout(seconds[self._rank] if chunk is None else seconds[chunk, self._rank])

    def _arrived(self, kind: str, *about: int) -> simpy.Event:
        return self._network.arrived(self._rank, self._key(kind, *about))

    def _key(self, kind: str, *about: int) -> Hashable:
        return (kind, self._number, *about)
