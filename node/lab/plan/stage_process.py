"""One stage of one node, as a process: what it computes, sends and waits for in a step.

Within a pass the order is that of `simulate`, layer by layer: payloads leave, the own chunks attend to themselves, and
then to the chunks of others in order of arrival; in the backward each gradient leaves before the next block.

Shapes: R ranks, S stages, L layers, C chunks.
"""

from __future__ import annotations

from collections.abc import Generator, Hashable
from functools import partial

import numpy as np

from node.exchange.routes import Routes, routes_for, span_of
from node.lab.plan.costs import Costs
from node.lab.plan.events import Clock, Happens, Mail, Process
from node.lab.plan.fluid import Network
from node.lab.plan.lines import Lines
from node.lab.plan.simulate import BACKWARD, FORWARD, StepWork, all_times
from node.lab.plan.stages import Stages, order
from node.lab.plan.work import Array, Work, reading


class Site:
    """What all processes of a step share."""

    def __init__(self, step: StepWork, stages: Stages, costs: Costs, lines: Lines, slower_SR: Array) -> None:
        self.step, self.stages, self.costs, self.slower_SR = step, stages, costs, slower_SR
        self.clock = Clock()
        self.network = Network(lines, self.clock)
        self.times = [all_times(step.layers, costs, slower_R) for slower_R in slower_SR]
        self.waits_s = np.zeros((2, len(step.layers), step.assignment.n_ranks))
        """[2, L, R] waits for messages of other nodes with the same stages, forward and backward."""
        self.readers = reading(step.assignment)
        self.processes: dict[tuple[int, int], StageProcess] = {}
        """By stage and rank."""


class StageProcess:
    """The process of one stage of one rank."""

    def __init__(self, site: Site, stage: int, rank: int) -> None:
        site.processes[stage, rank] = self
        assignment = site.step.assignment
        self._site, self._step, self._stage, self._rank = site, site.step, stage, rank
        self._layers = site.stages.layers[stage]
        self._is_last = stage == len(site.stages.layers) - 1
        self._local = site.readers.local[:, rank]
        self._sources = int(site.readers.remote[:, rank].sum())
        self._own = assignment.chunks(rank)
        self._owed = sum(len(assignment.readers_of(chunk)) for chunk in self._own)
        self._mail: dict[Hashable, Mail] = {}
        self._pieces: dict[Hashable, int] = {}
        self._orders: dict[tuple[int, int], list[int]] = {}
        self._now = 0.0
        self.busy_s = self.bubbles_s = self.ends_s = 0.0
        self.spans: list[tuple[float, float]] = []
        """When it computes."""

    def run(self) -> Process:
        """The whole step."""
        stages = self._site.stages
        for way, number in order(stages.schedule, self._stage, len(stages.layers), self._step.passes):
            yield from self._forward(number) if way == FORWARD else self._backward(number)
        self._compute(self._seconds(stages.optimizers[self._stage]) + self._site.costs.step_s * self._slower)
        self.ends_s = self._now

    def mail(self, kind: str, number: int, layer: int = -1) -> Mail:
        """What comes of this kind for a pass and a layer."""
        return self._mail.setdefault((kind, number, layer), Mail())

    def _forward(self, number: int) -> Process:
        if self._stage:
            yield from self._await_stage("activations", number)
        for layer in self._layers:
            times, sizes = self._site.times[self._stage][layer][FORWARD], self._step.layers[layer]
            self._compute(times.before[self._rank])
            if sizes.theta_bytes:
                yield from self._hand_on(number, layer, FORWARD)
            if sizes.payload_bytes:
                yield self._now
                for chunk in self._own:
                    self._send_pieces(number, layer, chunk, self._now)
            self._compute(times.own[self._rank] + times.block[self._local, self._rank].sum())
            if sizes.payload_bytes:
                yield from self._attend(number, layer, times.block)
            self._compute(times.after[self._rank])
        if self._is_last:
            self._compute(self._seconds(self._step.head_forward))
        else:
            yield from self._pass_on("activations", number, self._stage + 1)

    def _backward(self, number: int) -> Process:
        if self._is_last:
            self._compute(self._seconds(self._step.head_backward))
        else:
            yield from self._await_stage("gradients", number)
        for layer in reversed(self._layers):
            times, sizes = self._site.times[self._stage][layer][BACKWARD], self._step.layers[layer]
            self._compute(times.after[self._rank])
            for chunk in reversed(self._orders.pop((number, layer), [])):
                self._compute(times.block[chunk, self._rank])
                yield self._now
                self._send_back(number, layer, chunk)
            self._compute(times.own[self._rank] + times.block[self._local, self._rank].sum())
            for _ in range(self._owed if sizes.grad_bytes else 0):
                yield from self._await(self.mail("gradient", number, layer), BACKWARD, layer)
            if sizes.theta_bytes:
                yield from self._hand_on(number, layer, BACKWARD)
            self._compute(times.before[self._rank])
        if self._stage:
            yield from self._pass_on("gradients", number, self._stage - 1)

    def _attend(self, number: int, layer: int, block_s: Array) -> Process:
        """The blocks of others' chunks, in order of arrival."""
        taken = self._orders[number, layer] = []
        for _ in range(self._sources):
            chunk = yield from self._await(self.mail("payload", number, layer), FORWARD, layer)
            taken.append(chunk)
            self._compute(block_s[chunk, self._rank])

    def _send_pieces(self, number: int, layer: int, chunk: int, now: float, only: int | None = None) -> None:
        """Send the own part of a chunk: all of an own one, or what is passed on of one piece."""
        routes, nbytes = self._routes(layer)
        for piece, target in routes.sends(self._rank, chunk):
            if only in (None, piece):
                begin, end = span_of(piece, routes.pieces(chunk), round(nbytes))
                size = float(end - begin) if self._step.relays else nbytes * self._rows(chunk, target)
                comes = partial(self._peer(target)._comes, number, layer, chunk, piece)
                self._send(target, self._stage, only is None, size, now, comes)

    def _comes(self, number: int, layer: int, chunk: int, piece: int, now: float) -> None:
        """A piece of a payload is there: it is passed on, and with the last piece the payload is there."""
        routes, _ = self._routes(layer)
        if routes.targets(self._rank, chunk, piece):
            self._send_pieces(number, layer, chunk, now, piece)
        key = number, layer, chunk
        self._pieces[key] = self._pieces.get(key, 0) + 1
        if self._pieces[key] == routes.pieces(chunk):
            self._site.clock.deliver(self.mail("payload", number, layer), chunk, now)

    def _routes(self, layer: int) -> tuple[Routes, float]:
        nbytes = self._step.layers[layer].payload_bytes
        return routes_for(self._step.assignment, self._step.relays, round(nbytes)), nbytes

    def _rows(self, chunk: int, reader: int) -> float:
        """The share of a chunk's rows that crosses to a reader."""
        return 1.0 if self._step.rows_CR is None else float(self._step.rows_CR[chunk, reader])

    def _send_back(self, number: int, layer: int, chunk: int) -> None:
        owner = self._step.assignment.owner(chunk)
        nbytes = self._step.layers[layer].grad_bytes * self._rows(chunk, self._rank)
        self._mail_to(owner, self._stage, "gradient", number, layer, nbytes)

    def _hand_on(self, number: int, layer: int, way: int) -> Process:
        """Send θ of each own chunk to the owner of the next (or its gradient back), and wait for one's own."""
        owner, nbytes = self._step.assignment.owner, self._step.layers[layer].theta_bytes
        last = self._step.assignment.n_chunks - 1
        after = [owner(chunk + 1) for chunk in self._own if chunk < last and owner(chunk + 1) != self._rank]
        before = [owner(chunk - 1) for chunk in self._own if chunk and owner(chunk - 1) != self._rank]
        yield self._now
        kind = f"theta {way}"
        for target in after if way == FORWARD else before:
            self._mail_to(target, self._stage, kind, number, layer, nbytes)
        for _ in before if way == FORWARD else after:
            yield from self._await(self.mail(kind, number, layer), way, layer)

    def _pass_on(self, kind: str, number: int, stage: int) -> Process:
        """Activations or their gradient to the next or the last stage."""
        yield self._now
        nbytes = float(self._site.stages.boundary_bytes[self._rank])
        if self._node(self._rank, stage) != self._node(self._rank, self._stage):
            self._mail_to(self._rank, stage, kind, number, -1, nbytes)
            return
        mail = self._site.processes[stage, self._rank].mail(kind, number)
        there_s = self._now + self._site.costs.inside_s(nbytes)
        self._site.clock.at(there_s, lambda now: self._site.clock.deliver(mail, number, now))

    def _mail_to(self, rank: int, stage: int, kind: str, number: int, layer: int, nbytes: float) -> None:
        """Send something over the network now."""
        mail = self._site.processes[stage, rank].mail(kind, number, layer)
        self._send(rank, stage, True, nbytes, self._now, partial(self._site.clock.deliver, mail, 0))

    def _send(self, rank: int, stage: int, own: bool, nbytes: float, now: float, comes: Happens) -> None:
        """Over the lines of both nodes. Each process has two flows to each other: its own messages, and those that it
        passes on."""
        here, there = self._node(self._rank, self._stage), self._node(rank, stage)
        self._site.network.send(here, there, (self._stage, stage, own), nbytes, now, comes)

    def _await_stage(self, kind: str, number: int) -> Process:
        came_s, _ = yield from _taken(self.mail(kind, number))
        self.bubbles_s += max(0.0, came_s - self._now)
        self._now = max(self._now, came_s)

    def _await(self, mail: Mail, way: int, layer: int) -> Generator[float | Mail, None, int]:
        came_s, what = yield from _taken(mail)
        self._site.waits_s[way, layer, self._rank] += max(0.0, came_s - self._now)
        self._now = max(self._now, came_s)
        return what

    def _compute(self, seconds: float) -> None:
        if self._site.costs.cores:
            self.spans.append((self._now, self._now + float(seconds)))
        self._now += float(seconds)
        self.busy_s += float(seconds)

    def _seconds(self, work: Work) -> float:
        return float(self._site.costs.seconds(work)[self._rank]) * self._slower

    @property
    def _slower(self) -> float:
        return float(self._site.slower_SR[self._stage, self._rank])

    def _peer(self, rank: int) -> StageProcess:
        return self._site.processes[self._stage, rank]

    def _node(self, rank: int, stage: int) -> int:
        return stage // self._site.stages.inside * self._step.assignment.n_ranks + rank


def _taken(mail: Mail) -> Generator[float | Mail, None, tuple[float, int]]:
    """The next thing of the mail, and when it came."""
    while not mail.there:
        yield mail
    return mail.there.popleft()
