"""One training step, simulated on all nodes: when each stage begins and ends, which nodes wait, and for how long.

The order of events is that of `node.model.exchanged`, `node.exchange.chunks` and autograd: payloads leave before the
own chunk is attended to; then come the blocks of own chunks, then those of others in order of arrival. In
the backward the blocks come in reverse, and each gradient leaves before the next block is computed; then comes the own
chunk, then the wait for the gradients of all readers. A node does one thing at a time. Sending and receiving cost it
only the time in `costs`, and nothing ever holds it back from sending.

In each layer, a node depends on others only through the messages of that layer. So a step is simulated layer by layer,
all nodes at once, without a queue of events: 64 nodes and 32 layers take a fraction of a second.

Shapes: R ranks, C chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from coordinator.assignment import Assignment
from node.lab.plan.costs import Costs
from node.lab.plan.lines import Indices, Lines, Traffic
from node.lab.plan.work import Array, LayerWork, Reading, Work, reading


class Layer(NamedTuple):
    """The work and the messages of one layer."""

    work: LayerWork
    payload_bytes: float
    """Payload of one chunk, to one reader, one way; 0 where nothing is exchanged."""
    theta_bytes: float = 0.0


class StepWork(NamedTuple):
    """A whole step. Layers of one kind are one object, so that their times are computed once."""

    assignment: Assignment
    layers: Sequence[Layer]
    head_forward: Work
    head_backward: Work
    optimizer: Work


class Outcome(NamedTuple):
    """A step without averaging."""

    step_s: float
    """Time until the last node is done."""
    ends_s: Array
    """[R] when each node is done."""
    busy_s: Array
    """[R] compute time of each node."""
    waited_s: Array
    """[R] time that each node waits for messages within the step (`exposed_s` in metrics.jsonl)."""
    sent_bytes: Array
    """[R, R] payload bytes by link."""


class _Times(NamedTuple):
    before: Array
    own: Array
    block: Array
    after: Array


SHARING_ROUNDS, SHARING_PRECISION = 30, 1e-3


def simulate(step: StepWork, costs: Costs, lines: Lines) -> Outcome:
    """One step. Where nodes share cores, each is slowed by others that compute at the same time. By how much depends on
    when they compute, and that on how much they are slowed, so both are found by iteration."""
    slower_R = np.ones(step.assignment.n_ranks)
    run = _simulate(step, costs, lines, slower_R)
    if 0 < costs.cores < len(slower_R):
        for _ in range(SHARING_ROUNDS):
            wanted_R = crowding(run.computes(), costs.cores)
            if np.abs(wanted_R - slower_R).max() < SHARING_PRECISION * slower_R.max():
                break
            slower_R = 0.5 * (slower_R + wanted_R)
            run = _simulate(step, costs, lines, slower_R)
    return Outcome(float(run.now.max()), run.now, run.busy_s, run.waited_s, run.traffic.sent_bytes)


def crowding(computes: Sequence[Array], cores: int) -> Array:
    """By what factor each node is slowed, [R]. A node computes from [:, 0] to [:, 1] of its spans; nodes that compute
    at the same time share the cores evenly."""
    times = np.unique(np.concatenate([spans.ravel() for spans in computes]))
    lengths = np.diff(times)
    active = np.zeros((len(computes), len(times)))
    for rank, spans in enumerate(computes):
        np.add.at(active[rank], np.searchsorted(times, spans[:, 0]), 1)
        np.add.at(active[rank], np.searchsorted(times, spans[:, 1]), -1)
    active = active.cumsum(1)[:, :-1]
    share = np.minimum(1.0, cores / np.maximum(1.0, active.sum(0)))
    taken, done = (active * lengths).sum(1), (active * lengths * share).sum(1)
    slower_R: Array = np.divide(taken, done, out=np.ones_like(taken), where=done > 0)
    return slower_R


def _simulate(step: StepWork, costs: Costs, lines: Lines, slower_R: Array) -> _Run:
    who = reading(step.assignment)
    run = _Run(step.assignment, who, lines)
    times: dict[int, tuple[_Times, _Times]] = {}
    for layer in step.layers:
        if id(layer) not in times:
            times[id(layer)] = (
                _times(costs, layer.work.forward, slower_R),
                _times(costs, layer.work.backward, slower_R),
            )
    for layer in step.layers:
        run.forward(layer, times[id(layer)][0])
    run.compute((costs.seconds(step.head_forward) + costs.seconds(step.head_backward)) * slower_R)
    for layer in reversed(step.layers):
        run.backward(layer, times[id(layer)][1])
    run.compute((costs.seconds(step.optimizer) + costs.step_s) * slower_R)
    return run


class _Run:
    """The clocks of all nodes on their way through the layers."""

    def __init__(self, assignment: Assignment, who: Reading, lines: Lines) -> None:
        self.traffic = Traffic(lines, assignment)
        self.now = np.zeros(assignment.n_ranks)
        self.busy_s = np.zeros(assignment.n_ranks)
        self.waited_s = np.zeros(assignment.n_ranks)
        self._remote, self._local = who.remote, who.local
        self._owned = np.zeros(who.remote.shape, dtype=bool)
        for rank in range(assignment.n_ranks):
            self._owned[np.array(assignment.chunks(rank)), rank] = True
        self._orders: list[Indices] = []
        self._begins: list[Array] = []
        self._ends: list[Array] = []

    def compute(self, seconds: Array) -> None:
        self._computes(self.now, self.now + seconds)
        self.now = self.now + seconds
        self.busy_s += seconds

    def computes(self) -> list[Array]:
        """When each node computes: its spans, each a row of [from, to]."""
        begins, ends = np.stack(self._begins), np.stack(self._ends)
        return [np.stack([begins[:, rank], ends[:, rank]], axis=1) for rank in range(begins.shape[1])]

    def _computes(self, begin_R: Array, end_R: Array) -> None:
        self._begins.append(begin_R)
        self._ends.append(end_R)

    def wait(self, until: Array) -> None:
        until = np.maximum(until, self.now)
        self.waited_s += until - self.now
        self.now = until

    def forward(self, layer: Layer, times: _Times) -> None:
        self.compute(times.before)
        if layer.theta_bytes:
            self.wait(self.traffic.hand_on(self.now, layer.theta_bytes))
        arrived = self.traffic.publish(self.now, layer.payload_bytes) if layer.payload_bytes else None
        self.compute(times.own + np.where(self._local, times.block, 0.0).sum(0))
        if arrived is not None:
            self._attend(arrived, times.block)
        self.compute(times.after)

    def backward(self, layer: Layer, times: _Times) -> None:
        self.compute(times.after)
        returned = None
        if layer.payload_bytes:
            order = self._orders.pop()[::-1]
            blocks = np.take_along_axis(np.where(self._remote, times.block, 0.0), order, 0)
            leaves = np.empty(self._remote.shape)
            np.put_along_axis(leaves, order, self.now + np.cumsum(blocks, axis=0), 0)
            returned = self.traffic.send_back(leaves, layer.payload_bytes)
            self.compute(blocks.sum(0))
        self.compute(times.own + np.where(self._local, times.block, 0.0).sum(0))
        if returned is not None:
            last_C = np.where(self._remote, returned, -np.inf).max(1)
            self.wait(np.where(self._owned, last_C[:, None], -np.inf).max(0))
        if layer.theta_bytes:
            self.wait(self.traffic.hand_on(self.now, layer.theta_bytes, back=True))
        self.compute(times.before)

    def _attend(self, arrived: Array, block_s: Array) -> None:
        """Compute the blocks of other nodes' chunks in order of arrival."""
        there = np.where(self._remote, np.maximum(arrived, self.now), np.inf)
        order = np.argsort(there, axis=0, kind="stable")  # chunks that are there already go by their number
        self._orders.append(order)
        blocks = np.take_along_axis(np.where(self._remote, block_s, 0.0), order, 0)
        came = np.take_along_axis(np.where(self._remote, arrived, -np.inf), order, 0)
        from_here = np.cumsum(blocks[::-1], axis=0)[::-1]
        total = blocks.sum(0)
        after = np.cumsum(blocks, axis=0)
        ends = after + np.maximum.accumulate(np.maximum(came, self.now) - (after - blocks), axis=0)
        for begin_R, end_R in zip(ends - blocks, ends, strict=True):
            self._computes(begin_R, end_R)
        done = np.maximum(self.now + total, (came + from_here).max(0))
        self.busy_s += total
        self.waited_s += done - (self.now + total)
        self.now = done


def _times(costs: Costs, stages: tuple[Work, Work, Work, Work], slower_R: Array) -> _Times:
    return _Times(*(costs.seconds(work) * slower_R for work in stages))
