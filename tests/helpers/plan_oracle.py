"""One training step, segment by segment, in simpy: slow, plain, and written apart from `node.lab.plan`.

Each node is a process that computes, sends and waits, in the order of `node.model` and autograd. The network is what
`netem.shaper` does: links in order, a NIC's links in turns of one segment, a receiving NIC in order of arrival. What
`node.lab.plan.simulate` says in closed form is compared with this.
"""

from __future__ import annotations

from collections.abc import Generator, Hashable

import numpy as np
import simpy

from node.lab.plan.costs import Costs
from node.lab.plan.lines import Lines
from node.lab.plan.simulate import StepWork

SEGMENT_BYTES = 2000

Process = Generator[simpy.Event, object, None]


class Network:
    """Segments from node to node; `arrived` tells when a message is there."""

    def __init__(self, clock: simpy.Environment, lines: Lines) -> None:
        ranks = range(len(lines.up_bps))
        self._clock, self._lines = clock, lines
        self._lanes = {(source, target): simpy.Store(clock) for source in ranks for target in ranks}
        # Whoever waits for the NIC is served in order, and a lane asks for each segment anew: so lanes take turns.
        self._nics = [simpy.Resource(clock, 1 if np.isfinite(rate) else len(ranks)) for rate in lines.up_bps]
        self._down_free_s = [0.0 for _ in ranks]
        self._arrivals: dict[Hashable, simpy.Event] = {}
        for source, target in self._lanes:
            clock.process(self._send_segments(source, target))

    def arrived(self, rank: int, key: Hashable) -> simpy.Event:
        return self._arrivals.setdefault((rank, key), self._clock.event())

    def send(self, source: int, target: int, key: Hashable, nbytes: float) -> None:
        whole, rest = divmod(nbytes, SEGMENT_BYTES)
        sizes = [SEGMENT_BYTES] * int(whole) + ([rest] if rest else [])
        for place, size in enumerate(sizes):
            self._lanes[source, target].put((size, key if place == len(sizes) - 1 else None))

    def _send_segments(self, source: int, target: int) -> Process:
        rate_bps = min(self._lines.up_bps[source], self._lines.link_bps[source, target])
        while True:
            size, key = yield self._lanes[source, target].get()  # type: ignore[misc]
            with self._nics[source].request() as turn:
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
    assignment, cost = step.assignment, costs.seconds
    own, sources = assignment.chunks(rank), assignment.sources_of(rank)
    shared = [chunk for chunk in own if chunk < own[-1]]
    orders: list[list[int]] = []
    for index, layer in enumerate(step.layers):
        work = layer.work.forward
        yield clock.timeout(cost(work.before)[rank])
        for chunk in own:
            for reader in assignment.readers_of(chunk):
                network.send(rank, reader, ("kv", index, chunk), layer.payload_bytes)
        yield clock.timeout(cost(work.own)[rank] + sum(cost(work.block)[chunk, rank] for chunk in shared))
        waiting = {chunk: network.arrived(rank, ("kv", index, chunk)) for chunk in sources}
        orders.append([])
        while waiting:
            yield clock.any_of(waiting.values())
            chunk = next(chunk for chunk, arrival in waiting.items() if arrival.processed)
            del waiting[chunk]
            orders[-1].append(chunk)
            yield clock.timeout(cost(work.block)[chunk, rank])
        yield clock.timeout(cost(work.after)[rank])
    yield clock.timeout(cost(step.head_forward)[rank] + cost(step.head_backward)[rank])
    for index, layer in reversed(list(enumerate(step.layers))):
        work = layer.work.backward
        yield clock.timeout(cost(work.after)[rank])
        for chunk in reversed(orders[index]):
            yield clock.timeout(cost(work.block)[chunk, rank])
            network.send(rank, assignment.owner(chunk), ("grad", index, chunk, rank), layer.payload_bytes)
        yield clock.timeout(cost(work.own)[rank] + sum(cost(work.block)[chunk, rank] for chunk in shared))
        owed = [("grad", index, chunk, reader) for chunk in own for reader in assignment.readers_of(chunk)]
        yield clock.all_of([network.arrived(rank, key) for key in owed])
        yield clock.timeout(cost(work.before)[rank])
    yield clock.timeout(cost(step.optimizer)[rank])
