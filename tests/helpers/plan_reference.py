"""One training step, segment by segment and event by event: slow, plain, and written apart from `node.lab.plan`.

Each node is a program that computes, sends and waits, in the order of `node.model.llama` and autograd; the network is
what `netem.shaper` does: links in order, a NIC's links in turns of a segment, a receiving NIC in order of arrival. What
`node.lab.plan.simulate` says in closed form is compared with this.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable, Generator

import numpy as np

from node.lab.plan.costs import Costs
from node.lab.plan.lines import Lines
from node.lab.plan.simulate import StepWork

SEGMENT_BYTES = 2000
Action = tuple[str, object]
Program = Generator[Action, object, None]


class Events:
    """A clock that jumps."""

    def __init__(self) -> None:
        self.now = 0.0
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._count = itertools.count()

    def at(self, time: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._queue, (time, next(self._count), act))

    def run(self) -> None:
        while self._queue:
            self.now, _, act = heapq.heappop(self._queue)
            act()


class Network:
    """Segments from node to node."""

    def __init__(self, events: Events, lines: Lines, arrived: Callable[[int, object], None]) -> None:
        ranks = len(lines.up_bps)
        self._events, self._lines, self._arrived = events, lines, arrived
        self._lanes: list[dict[int, deque[tuple[object, float, bool]]]] = [{} for _ in range(ranks)]
        self._ring: list[deque[int]] = [deque() for _ in range(ranks)]
        self._busy: set[object] = set()
        self._down_free = [0.0] * ranks

    def send(self, source: int, target: int, key: object, nbytes: float) -> None:
        lane = self._lanes[source].setdefault(target, deque())
        if not lane:
            self._ring[source].append(target)
        sizes = [SEGMENT_BYTES] * int(nbytes // SEGMENT_BYTES)
        sizes += [rest] if (rest := nbytes % SEGMENT_BYTES) else []
        lane.extend((key, size, place == len(sizes) - 1) for place, size in enumerate(sizes))
        self._start(source)

    def _start(self, source: int) -> None:
        """Begin what may: one segment at the NIC if it has a rate, else one on each link."""
        shared = np.isfinite(self._lines.up_bps[source])
        for target in list(self._ring[source]):
            port = source if shared else (source, target)
            lane = self._lanes[source][target]
            if port in self._busy or not lane:
                continue
            self._busy.add(port)
            self._ring[source].remove(target)
            key, size, last = lane.popleft()
            rate = min(self._lines.up_bps[source], self._lines.link_bps[source, target])
            departs = self._events.now + 8 * size / rate
            self._events.at(departs, lambda p=port, t=target: self._departed(source, t, p))
            arrives = departs + self._lines.latency_s[source, target]
            self._events.at(arrives, lambda t=target, k=key, s=size, e=last: self._comes(t, k, s, e))

    def _departed(self, source: int, target: int, port: object) -> None:
        self._busy.discard(port)
        if self._lanes[source][target]:
            self._ring[source].append(target)
        self._start(source)

    def _comes(self, target: int, key: object, size: float, last: bool) -> None:
        duration = 8 * size / self._lines.down_bps[target]
        through = max(self._down_free[target], self._events.now - duration) + duration
        self._down_free[target] = through
        if last:
            self._events.at(through, lambda: self._arrived(target, key))


class Swarm:
    """All nodes of one step."""

    def __init__(self, step: StepWork, costs: Costs, lines: Lines) -> None:
        self._step, self._costs = step, costs
        self._events = Events()
        self._network = Network(self._events, lines, self._arrived)
        ranks = range(step.assignment.n_ranks)
        self._inbox: list[set[object]] = [set() for _ in ranks]
        self._waiting: list[tuple[Program, list[object], bool] | None] = [None for _ in ranks]
        self.ends = [0.0 for _ in ranks]
        for rank in ranks:
            self._advance(rank, self._program(rank), None)
        self._events.run()
        assert not any(self._waiting), "no node is left waiting"

    def _advance(self, rank: int, program: Program, answer: object) -> None:
        while True:
            try:
                verb, what = program.send(answer)
            except StopIteration:
                self.ends[rank] = self._events.now
                return
            answer = None
            if verb == "compute":
                self._events.at(self._events.now + what, lambda: self._advance(rank, program, None))  # type: ignore[operator]
                return
            if verb == "send":
                self._network.send(rank, *what)  # type: ignore[misc]
                continue
            self._waiting[rank] = (program, list(what), verb == "all")  # type: ignore[call-overload]
            self._wake(rank)
            return

    def _arrived(self, rank: int, key: object) -> None:
        self._inbox[rank].add(key)
        self._wake(rank)

    def _wake(self, rank: int) -> None:
        if (waiting := self._waiting[rank]) is None:
            return
        program, keys, everything = waiting
        there = [key for key in keys if key in self._inbox[rank]]
        if len(there) == len(keys) or (there and not everything):
            self._waiting[rank] = None
            self._events.at(self._events.now, lambda: self._advance(rank, program, there[0] if there else None))

    def _program(self, rank: int) -> Program:
        step, cost = self._step, self._costs.seconds
        assignment = step.assignment
        own, sources = assignment.chunks(rank), assignment.sources_of(rank)
        shared = [chunk for chunk in own if chunk < own[-1]]
        orders: list[list[int]] = []
        for index, layer in enumerate(step.layers):
            work = layer.work.forward
            yield "compute", cost(work.before)[rank]
            for chunk in own:
                for reader in assignment.readers_of(chunk):
                    yield "send", (reader, ("kv", index, chunk), layer.payload_bytes)
            yield "compute", cost(work.own)[rank] + sum(cost(work.block)[chunk, rank] for chunk in shared)
            left, order = list(sources), []
            while left:
                _, _, chunk = yield "any", [("kv", index, chunk) for chunk in left]  # type: ignore[misc]
                left.remove(chunk)
                order.append(chunk)
                yield "compute", cost(work.block)[chunk, rank]
            orders.append(order)
            yield "compute", cost(work.after)[rank]
        yield "compute", cost(step.head_forward)[rank] + cost(step.head_backward)[rank]
        for index, layer in reversed(list(enumerate(step.layers))):
            work = layer.work.backward
            yield "compute", cost(work.after)[rank]
            for chunk in reversed(orders[index]):
                yield "compute", cost(work.block)[chunk, rank]
                yield "send", (assignment.owner(chunk), ("grad", index, chunk, rank), layer.payload_bytes)
            yield "compute", cost(work.own)[rank] + sum(cost(work.block)[chunk, rank] for chunk in shared)
            owed = [("grad", index, chunk, reader) for chunk in own for reader in assignment.readers_of(chunk)]
            if owed:
                yield "all", owed
            yield "compute", cost(work.before)[rank]
        yield "compute", cost(step.optimizer)[rank]
