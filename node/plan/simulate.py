"""One training step on all nodes, simulated: when each stage begins and ends, who waits, and for how long.

The order of events is that of `node.model.llama.Attention.forward`, `node.exchange.chunks` and autograd: payloads leave
before the own chunk is attended to; own chunks' blocks, then others' in order of arrival; in the backward the blocks in
the reverse of that order, each gradient leaving before the next block is computed; then the own chunk, then the wait
for all readers' gradients. A node does one thing at a time, sending and receiving cost it nothing but what `costs`
says, and it is never held back from sending.

What a node does in a layer depends on others only through that layer's messages, so a step is simulated layer by layer,
all nodes at once, and needs no queue of events: 64 nodes and 32 layers take a fraction of a second.

Shapes: R ranks, C chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from coordinator.assignment import Assignment
from node.plan.costs import Costs
from node.plan.lines import Indices, Lines, Traffic
from node.plan.work import Array, LayerWork, Reading, Work, reading


class Layer(NamedTuple):
    """What one layer computes and sends."""

    work: LayerWork
    payload_bytes: float
    """Of one chunk, to one reader, one way; 0 where nothing is exchanged."""
    theta_bytes: float = 0.0


class StepWork(NamedTuple):
    """A whole step. Layers of one kind are one object: their times are computed once."""

    assignment: Assignment
    layers: Sequence[Layer]
    head_forward: Work
    head_backward: Work
    optimizer: Work


class Outcome(NamedTuple):
    """A step, without averaging."""

    step_s: float
    """Until the last node is done."""
    ends_s: Array
    """[R] when each is done."""
    busy_s: Array
    """[R] what each computes."""
    waited_s: Array
    """[R] what each waits for messages amid the step (`exposed_s` in metrics.jsonl)."""
    sent_bytes: Array
    """[R, R] payload bytes by link."""


class _Times(NamedTuple):
    before: Array
    own: Array
    block: Array
    after: Array


SHARING_ROUNDS, SHARING_PRECISION = 20, 2e-3


def simulate(step: StepWork, costs: Costs, lines: Lines) -> Outcome:
    """One step. Where nodes share cores, each is slowed by those that compute at the same time (on average)."""
    if not 0 < costs.cores < step.assignment.n_ranks:
        return _simulate(step, costs, lines)
    factor = 1.0
    outcome = _simulate(step, costs, lines)
    for _ in range(SHARING_ROUNDS):
        others = outcome.busy_s.sum() / outcome.step_s * (1 - 1 / step.assignment.n_ranks)
        wanted = max(1.0, (1.0 + others) / costs.cores)
        if abs(wanted - factor) < SHARING_PRECISION * factor:
            break
        factor = 0.5 * (factor + wanted)
        outcome = _simulate(step, costs.slowed(factor), lines)
    return outcome


def _simulate(step: StepWork, costs: Costs, lines: Lines) -> Outcome:
    who = reading(step.assignment)
    run = _Run(step.assignment, who, lines)
    times: dict[int, tuple[_Times, _Times]] = {}
    for layer in step.layers:
        if id(layer) not in times:
            times[id(layer)] = (_times(costs, layer.work.forward), _times(costs, layer.work.backward))
    for layer in step.layers:
        run.forward(layer, times[id(layer)][0])
    run.compute(costs.seconds(step.head_forward) + costs.seconds(step.head_backward))
    for layer in reversed(step.layers):
        run.backward(layer, times[id(layer)][1])
    run.compute(costs.seconds(step.optimizer) + costs.step_s)
    return Outcome(float(run.now.max()), run.now, run.busy_s, run.waited_s, run.traffic.sent_bytes)


class _Run:
    """The nodes' clocks as they go through the layers."""

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

    def compute(self, seconds: Array) -> None:
        self.now = self.now + seconds
        self.busy_s += seconds

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
        """Blocks of other nodes' chunks as they come: the last of those that come late decides when all are done."""
        there = np.where(self._remote, np.maximum(arrived, self.now), np.inf)
        order = np.argsort(there, axis=0, kind="stable")  # of those that wait already, the first chunk first
        self._orders.append(order)
        blocks = np.take_along_axis(np.where(self._remote, block_s, 0.0), order, 0)
        came = np.take_along_axis(np.where(self._remote, arrived, -np.inf), order, 0)
        from_here = np.cumsum(blocks[::-1], axis=0)[::-1]
        total = blocks.sum(0)
        done = np.maximum(self.now + total, (came + from_here).max(0))
        self.busy_s += total
        self.waited_s += done - (self.now + total)
        self.now = done


def _times(costs: Costs, stages: tuple[Work, Work, Work, Work]) -> _Times:
    return _Times(*(costs.seconds(work) for work in stages))
