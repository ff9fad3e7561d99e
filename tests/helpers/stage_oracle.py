"""One training step of nodes with pipeline stages, segment by segment, in simpy; written apart from `node.lab.plan`.

Each stage of each node is a process, which has the passes of `plan_oracle` for its own layers, one after another.
"""

from __future__ import annotations

from collections.abc import Hashable

import simpy

from helpers.plan_oracle import OWN, Network, OnePass, Process
from node.lab.plan.costs import Costs
from node.lab.plan.lines import Lines
from node.lab.plan.simulate import StepWork
from node.lab.plan.stages import Stages


def staged_ends_s(step: StepWork, stages: Stages, costs: Costs, lines: Lines) -> list[float]:
    """When each device is done with the step: the stages of rank 0, then those of rank 1, and so on."""
    clock = simpy.Environment()
    network = Network(clock, lines)
    places = [(rank, stage) for rank in range(step.assignment.n_ranks) for stage in range(len(stages.layers))]
    devices = {place: _Device(clock, network, step, stages, costs, *place) for place in places}
    clock.run(clock.all_of([clock.process(device.step(devices)) for device in devices.values()]))
    return [device.end_s for device in devices.values()]


def actions(stages: Stages, stage: int, passes: int) -> list[tuple[bool, int]]:
    """(whether forward, pass) in order: a forward where the schedule allows one more in flight, or else a backward."""
    most = passes if stages.schedule == "gpipe" else len(stages.layers) - stage
    found: list[tuple[bool, int]] = []
    forwards = backwards = 0
    while backwards < passes:
        if forwards < passes and forwards - backwards < most:
            found.append((True, forwards))
            forwards += 1
        else:
            found.append((False, backwards))
            backwards += 1
    return found


class _OfStage(Network):
    """The network as the processes of one stage see it: each has a flow of its own to every node."""

    def __init__(self, network: Network, stages: Stages, stage: int) -> None:
        self._network, self._stage = network, stage
        self._first = stage // stages.inside * len(stages.boundary_bytes)

    def arrived(self, rank: int, key: Hashable) -> simpy.Event:
        return self._network.arrived(self._first + rank, key)

    def send(self, source: int, target: int, key: Hashable, nbytes: float, flow: Hashable = OWN) -> None:
        self._network.send(self._first + source, self._first + target, key, nbytes, (self._stage, flow))


class _Device:
    def __init__(
        self,
        clock: simpy.Environment,
        network: Network,
        step: StepWork,
        stages: Stages,
        costs: Costs,
        rank: int,
        stage: int,
    ) -> None:
        self._clock, self._network, self._step, self._stages, self._costs = clock, network, step, stages, costs
        self._rank, self._stage = rank, stage
        self._node = stage // stages.inside * len(stages.boundary_bytes) + rank
        own = _OfStage(network, stages, stage)
        self._passes = [OnePass(clock, own, step, costs, rank, number) for number in range(step.passes)]
        self._came: dict[Hashable, simpy.Event] = {}
        self.end_s = 0.0

    def step(self, devices: dict[tuple[int, int], _Device]) -> Process:
        for forward, number in actions(self._stages, self._stage, self._step.passes):
            work, layers = self._passes[number], self._stages.layers[self._stage]
            before, after = (
                devices.get((self._rank, self._stage + side)) for side in ((-1, 1) if forward else (1, -1))
            )
            if before is not None:
                yield self.came(forward, number)
            elif not forward:
                yield work.works(self._step.head_backward)
            for index in layers if forward else reversed(layers):
                yield from work.publish(index) if forward else work.give_back(index)
                yield from work.receive(index) if forward else work.collect(index)
            if after is not None:
                self._clock.process(self._hand_to(after, forward, number))
            elif forward:
                yield work.works(self._step.head_forward)
        yield self._clock.timeout(self._costs.seconds(self._stages.optimizers[self._stage])[self._rank])
        self.end_s = self._clock.now

    def came(self, forward: bool, number: int) -> simpy.Event:
        """What the stage before has to hand over."""
        return self._came.setdefault((forward, number), self._clock.event())

    def _hand_to(self, other: _Device, forward: bool, number: int) -> Process:
        nbytes = self._stages.boundary_bytes[self._rank]
        if other._node == self._node:
            yield self._clock.timeout(8 * nbytes / self._costs.inside_bps)
        else:
            key = ("boundary", other._stage, forward, number)
            self._network.send(self._node, other._node, key, nbytes, (self._stage, other._stage))
            yield self._network.arrived(other._node, key)
        other.came(forward, number).succeed()
