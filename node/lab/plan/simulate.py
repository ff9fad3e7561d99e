"""One training step, simulated on all nodes: when each stage begins and ends, which nodes wait, and for how long.

The order of events is that of `node.model.exchanged`, `node.exchange.chunks` and autograd. A layer has two halves. The
first sends the payloads and attends to the own chunks; the second attends to the chunks of others in order of arrival.
In the backward the second half comes first: its blocks in reverse, and each gradient leaves before the next block is
computed. Then comes the first half: the own chunks, then the wait for the gradients of all readers. A node does one
thing at a time. Sending and receiving cost it only the time in `costs`, and nothing ever holds it back from sending.

Where a step has several passes (`train.micro_batches`), they take turns: the second half of a layer and the first half
of the next one for each pass in order, and all of that in reverse in the backward (`node.train.passes`). So the
payloads of one pass travel while the others compute.

All nodes have the same order of halves, and in each half a node depends on others only through the messages of that
pass and layer. So a step is simulated half by half, all nodes at once, without a queue of events: 64 nodes and 32
layers take a fraction of a second.

Shapes: R ranks, C chunks, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from coordinator.assignment import Assignment
from node.lab.plan.costs import Costs
from node.lab.plan.lines import Indices, Lines, Traffic
from node.lab.plan.work import Array, LayerWork, Work, reading


class Layer(NamedTuple):
    """The work of one layer in one pass on a device, and its messages, those of all shards of a node together."""

    work: LayerWork
    payload_bytes: float
    """Payload of one chunk to one reader; 0 where nothing is exchanged."""
    grad_bytes: float
    """The gradient that the reader returns."""
    theta_bytes: float = 0.0
    gathered_bytes: float = 0.0
    """Weights that a device gets from others of its node, which hold them in shards."""


class StepWork(NamedTuple):
    """A whole step. Layers of one kind are one object, so that their times are computed once."""

    assignment: Assignment
    layers: Sequence[Layer]
    head_forward: Work
    """Of one pass, as everything but `optimizer`."""
    head_backward: Work
    optimizer: Work
    passes: int = 1
    """Passes that are in flight together and take turns."""
    rows_CR: Array | None = None
    """The share of each chunk's rows that crosses to each rank; without it, all rows do."""
    relays: bool = False
    """Whether readers pass payloads on."""


class Outcome(NamedTuple):
    """A step without averaging."""

    step_s: float
    """Time until the last node is done."""
    ends_s: Array
    """[R] when each node is done."""
    busy_s: Array
    """[R] compute time of each node."""
    waits_s: Array
    """[2, L, R] time that each node waits for messages, forward and backward, by layer; all passes."""
    sent_bytes: Array
    """[R, R] payload bytes by link."""
    devices_busy_s: Array
    """[S, R] compute time of each device, by stage and node; `busy_s` is that of the busiest."""
    bubbles_s: Array
    """[S, R] time that each device waits for other stages within the step."""

    @property
    def waited_s(self) -> Array:
        """[R] time that each node waits for messages within the step (`exposed_s` in metrics.jsonl)."""
        waited_R: Array = self.waits_s.sum((0, 1))
        return waited_R


class Times(NamedTuple):
    """Seconds of a layer's stages one way, as `work.Stages`."""

    before: Array
    own: Array
    block: Array
    after: Array


SHARING_ROUNDS, SHARING_PRECISION = 30, 1e-3
FORWARD, BACKWARD = 0, 1

Attempt = Callable[[Array], tuple[Outcome, list[Array]]]


def simulate(step: StepWork, costs: Costs, lines: Lines) -> Outcome:
    """One step."""

    def attempt(slower_R: Array) -> tuple[Outcome, list[Array]]:
        run = _simulate(step, costs, lines, slower_R)
        waited_1R = np.zeros((1, len(run.now)))
        return (
            Outcome(
                step_s=float(run.now.max()),
                ends_s=run.now,
                busy_s=run.busy_s,
                waits_s=run.waits_s,
                sent_bytes=run.traffic.sent_bytes,
                devices_busy_s=run.busy_s[None],
                bubbles_s=waited_1R,
            ),
            run.computes() if costs.cores else [],
        )

    return with_shared_cores(step.assignment.n_ranks, costs, attempt)


def with_shared_cores(count: int, costs: Costs, attempt: Attempt) -> Outcome:
    """The outcome for `count` processes. Where they share cores, each is slowed by others that compute at the same
    time. By how much depends on when they compute, and that on how much they are slowed, so both are found by
    iteration. `attempt` simulates processes that take so many times as long, and says when each computes."""
    slower = np.ones(count)
    outcome, computes = attempt(slower)
    if 0 < costs.cores < count:
        for _ in range(SHARING_ROUNDS):
            wanted = crowding(computes, costs.cores)
            if np.abs(wanted - slower).max() < SHARING_PRECISION * slower.max():
                break
            slower = 0.5 * (slower + wanted)
            outcome, computes = attempt(slower)
    return outcome


def crowding(computes: Sequence[Array], cores: float) -> Array:
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
    run = _Run(step, costs, lines, slower_R)
    layers, passes = range(len(step.layers)), range(step.passes)
    for layer in layers:
        for number in passes:
            if layer:
                run.finish_forward(number, layer - 1)
            run.begin_forward(number, layer)
    head_forward_s, head_backward_s = (
        costs.seconds(work) * slower_R for work in (step.head_forward, step.head_backward)
    )
    for number in passes:
        run.finish_forward(number, layers[-1])
        run.compute(head_forward_s)
    for number in reversed(passes):
        run.compute(head_backward_s)
        run.begin_backward(number, layers[-1])
    for layer in reversed(layers):
        for number in reversed(passes):
            run.finish_backward(number, layer)
            if layer:
                run.begin_backward(number, layer - 1)
    run.compute((costs.seconds(step.optimizer) + costs.step_s) * slower_R)
    return run


class _Run:
    """The clocks of all nodes on their way through the layers."""

    def __init__(self, step: StepWork, costs: Costs, lines: Lines, slower_R: Array) -> None:
        assignment, who = step.assignment, reading(step.assignment)
        self.traffic = Traffic(lines, assignment, step.rows_CR, step.relays)
        self.now = np.zeros(assignment.n_ranks)
        self.busy_s = np.zeros(assignment.n_ranks)
        self.waits_s = np.zeros((2, len(step.layers), assignment.n_ranks))
        self._remote, self._local = who.remote, who.local
        self._owned = np.zeros(who.remote.shape, dtype=bool)
        for rank in range(assignment.n_ranks):
            self._owned[np.array(assignment.chunks(rank)), rank] = True
        self._layers = step.layers
        self._times = all_times(step.layers, costs, slower_R)
        self._arrivals: dict[int, Array] = {}  # of each pass: when payloads arrive, or gradients in the backward
        self._orders: dict[tuple[int, int], Indices] = {}
        self._begins: list[Array] = []
        self._ends: list[Array] = []

    def compute(self, seconds: Array) -> None:
        """All nodes compute for so long, [R]."""
        self._computes(self.now, self.now + seconds)
        self.now = self.now + seconds
        self.busy_s += seconds

    def computes(self) -> list[Array]:
        """When each node computes: its spans, each a row of [from, to]."""
        begins, ends = np.stack(self._begins), np.stack(self._ends)
        return [np.stack([begins[:, rank], ends[:, rank]], axis=1) for rank in range(begins.shape[1])]

    def begin_forward(self, number: int, layer: int) -> None:
        """The half of a layer up to where pass `number` needs the payloads of others."""
        (times, _), work = self._times[layer], self._layers[layer]
        self.compute(times.before)
        if work.theta_bytes:
            self._wait(FORWARD, layer, self.traffic.hand_on(self.now, work.theta_bytes))
        if work.payload_bytes:
            self._arrivals[number] = self.traffic.publish(self.now, work.payload_bytes)
        self.compute(times.own + np.where(self._local, times.block, 0.0).sum(0))

    def finish_forward(self, number: int, layer: int) -> None:
        """The rest of the layer."""
        times, _ = self._times[layer]
        if (arrived := self._arrivals.pop(number, None)) is not None:
            self._orders[number, layer] = self._attend(layer, arrived, times.block)
        self.compute(times.after)

    def begin_backward(self, number: int, layer: int) -> None:
        """The half of a layer in which gradients leave for the owners of others' chunks."""
        _, times = self._times[layer]
        self.compute(times.after)
        if not (nbytes := self._layers[layer].grad_bytes):
            return
        order = self._orders.pop((number, layer))[::-1]
        blocks = np.take_along_axis(np.where(self._remote, times.block, 0.0), order, 0)
        leaves = np.empty(self._remote.shape)
        np.put_along_axis(leaves, order, self.now + np.cumsum(blocks, axis=0), 0)
        self._arrivals[number] = self.traffic.send_back(leaves, nbytes)
        self.compute(blocks.sum(0))

    def finish_backward(self, number: int, layer: int) -> None:
        """The rest of the layer, which waits for the gradients of the own chunks."""
        (_, times), work = self._times[layer], self._layers[layer]
        self.compute(times.own + np.where(self._local, times.block, 0.0).sum(0))
        if (returned := self._arrivals.pop(number, None)) is not None:
            last_C = np.where(self._remote, returned, -np.inf).max(1)
            self._wait(BACKWARD, layer, np.where(self._owned, last_C[:, None], -np.inf).max(0))
        if work.theta_bytes:
            self._wait(BACKWARD, layer, self.traffic.hand_on(self.now, work.theta_bytes, back=True))
        self.compute(times.before)

    def _wait(self, way: int, layer: int, until: Array) -> None:
        until = np.maximum(until, self.now)
        self.waits_s[way, layer] += until - self.now
        self.now = until

    def _attend(self, layer: int, arrived: Array, block_s: Array) -> Indices:
        """Compute the blocks of other nodes' chunks in order of arrival, which is returned."""
        there = np.where(self._remote, np.maximum(arrived, self.now), np.inf)
        order = np.argsort(there, axis=0, kind="stable")  # chunks that are there already go by their number
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
        self.waits_s[FORWARD, layer] += done - (self.now + total)
        self.now = done
        return order

    def _computes(self, begin_R: Array, end_R: Array) -> None:
        self._begins.append(begin_R)
        self._ends.append(end_R)


def all_times(layers: Sequence[Layer], costs: Costs, slower_R: Array) -> list[tuple[Times, Times]]:
    """(forward, backward) of every layer. What a layer gathers from the other devices of its node comes while the one
    before it computes, which takes about as long; only what is longer than that holds it up."""
    kinds: dict[int, tuple[Times, Times]] = {}
    for layer in layers:
        if id(layer) not in kinds:
            forward, backward = (Times(*(costs.seconds(work) * slower_R for work in way)) for way in layer.work)
            inside_s = costs.inside_s(layer.gathered_bytes)
            kinds[id(layer)] = _held_up(forward, inside_s), _held_up(backward, 2 * inside_s)  # and gradients scattered
    return [kinds[id(layer)] for layer in layers]


def _held_up(times: Times, inside_s: float) -> Times:
    computes_R = times.before + times.own + times.block.sum(0) + times.after
    return times._replace(before=times.before + np.maximum(0.0, inside_s - computes_R)) if inside_s else times
