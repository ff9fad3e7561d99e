"""What "auto" stands for in `coordinator.assignment` and `coordinator.relay`: what makes the step shortest.

There are three candidates: contiguous runs of equal length, contiguous runs of unequal length, and zigzag. Contiguous
runs leave early nodes idle, since late chunks have more to attend to; zigzag balances that, but sends up to twice as
much; shorter runs for late or slow nodes lie in between. The lengths of unequal runs are searched for, from those that
balance compute and those that send least. A candidate that does not fit the memory of a node is out.

Each may have its payloads relayed or not (`node.exchange.routes`), which shortens a step where all links of a node
share a line up that is narrower than its line down. Where links have rates of their own, there is no relay.

Everything here is a pure function of the config, the costs and the devices. `isthmus run`, `isthmus coordinator` and
`isthmus plan` all choose by it (`settle`), and so agree.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import msgspec
import numpy as np

from coordinator.assignment import Assignment, Mode
from coordinator.plan import Worker
from netem.errors import ConfigError
from netem.profile import resolve
from node.config import Config
from node.lab.plan.costs import Costs, stated_for
from node.lab.plan.lines import Lines, lines_of
from node.lab.plan.memory import Room, tightest
from node.lab.plan.model import Model
from node.lab.plan.work import Array
from node.measure.devices import Device, default_device, devices

TIE = 1e-3
"""Of steps that differ by less than this share, the first in the list is taken."""
RELAY_GAIN = 0.02
"""A relay is taken where it shortens the step by this share at least: the planner is not more exact."""
BLENDS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Starts of the search between runs that balance compute (0) and runs of equal length (1)."""
SEARCH_EFFORT = 6000
"""Sets how many steps are simulated to improve the lengths of runs, so that it takes about a second: some 50 of a few
layers and nodes, none of many."""


class Candidate(NamedTuple):
    """One way to assign the chunks, and the step that it gives."""

    name: str
    config: Config
    step_s: float
    """With its share of an averaging round."""
    evenness: float
    room: Room


class Choice(NamedTuple):
    """The candidates, and the one that was taken."""

    candidates: tuple[Candidate, ...]
    best: Candidate


def settle(config: Config, costs: Costs | None = None, on: Sequence[Device] = ()) -> tuple[Config, Choice | None]:
    """The config with each "auto" replaced as in the best candidate, and the choice; without one where there is
    nothing to choose.

    `costs` and `on`, the device of each node, are those of `coordinator.node_speeds` and `run.device` by default.
    Raises `ConfigError` where the network or the payloads are impossible.
    """
    if config.coordinator.relay == "auto" and not may_relay(config):
        config = _with_relay(config, "never")
    if "auto" not in (config.coordinator.assignment, config.coordinator.relay):
        return config, None
    on = on or devices(default_device(config.run.device), config.coordinator.nodes)
    choice = choose(config, stated_for(config, on) if costs is None else costs, on)
    if config.coordinator.assignment == "auto":
        return _with_replan(choice.best.config), choice
    return choice.best.config, choice


def share_out(config: Config, workers: Sequence[Worker]) -> Assignment:
    """The chunks of the nodes that are there in a later generation of a run, by rank, as the planner finds the step
    shortest at the speeds that were measured; at those of the config where some were not.

    Raises `ConfigError` where they do not fit into the memory of a node that says how much it has.
    """
    given = config.coordinator.node_speeds
    speeds = tuple(worker.flops_per_s / 1e12 for worker in workers)
    if not all(speeds):
        speeds = tuple(given[worker.place] for worker in workers) if given else ()
    owners = msgspec.structs.replace(
        config.coordinator,
        nodes=len(workers),
        min_nodes=1,
        chunks_per_node=(),
        node_speeds=speeds,
        assignment="auto",
    )
    config = msgspec.structs.replace(config, coordinator=owners)
    device = devices(default_device(config.run.device), 1)[0]
    on = [device._replace(memory_bytes=worker.memory_bytes or math.inf) for worker in workers]
    best = choose(config, stated_for(config, on), on, [worker.name for worker in workers]).best
    if not best.room.fits:
        name, needed_gb = workers[best.room.rank].name, best.room.needed.device / 1e9
        raise ConfigError(
            f"the chunks do not fit on {len(workers)} nodes: {name} would need about {needed_gb:.3g} GB of its GPU, "
            f"which has {best.room.limit_bytes / 1e9:.3g} GB"
        )
    return best.config.assignment()


def choose(config: Config, costs: Costs, on: Sequence[Device], names: Sequence[str] = ()) -> Choice:
    """Compare the candidates. Where none fits, the best is the shortest step of those that miss by the least. `names`
    are those of the nodes, by rank, in the network; by default they are as `isthmus run` names them."""
    direct = _with_relay(config, "never") if config.coordinator.relay == "auto" else config
    search = _Search(direct, costs, on, names)
    found = _assignments(direct, search)
    distinct = {one.config.assignment(): one for one in reversed(found)}
    found = [one for one in found if distinct[one.config.assignment()] is one]
    least = min(one.room.overshoot for one in found)
    able = [one for one in found if one.room.overshoot == least]
    if config.coordinator.relay == "auto":
        relayed = [search.candidate(f"{one.name}, relayed", _with_relay(one.config, "always")) for one in found]
        found += relayed
        able += [
            other
            for one, other in zip(found, relayed, strict=False)
            if one in able and other.step_s <= (1 - RELAY_GAIN) * one.step_s
        ]
    shortest_s = min(one.step_s for one in able)
    return Choice(tuple(found), next(one for one in able if one.step_s * (1 - TIE) <= shortest_s))


def may_relay(config: Config) -> bool:
    """Whether a relay can shorten a step at all: links share a line, and somebody is there to pass something on."""
    owners = config.coordinator
    return resolve(config.net).scope == "nic" and owners.nodes > 2 and not config.data.document_masking


def _assignments(config: Config, search: _Search) -> list[Candidate]:
    """The candidates for who owns what; only one where the config says it."""
    owners = config.coordinator
    if owners.assignment != "auto":
        return [search.candidate(owners.assignment, config)]
    found = [search.candidate("contiguous, equal shares", _with(config, "contiguous"))]
    if (counts := search.unequal()) != search.equal:
        found.append(search.candidate("contiguous, unequal shares", _with(config, "contiguous", counts)))
    found.append(search.candidate("zigzag", _with(config, "zigzag")))
    return found


class _Search:
    """Predicted steps of one config under other assignments."""

    def __init__(self, config: Config, costs: Costs, on: Sequence[Device], names: Sequence[str]) -> None:
        self._config, self._costs, self._on = config, costs, on
        self._chunks, self._nodes = config.model.chunks, config.coordinator.nodes
        self._lines: Lines = lines_of(resolve(config.net), self._nodes, names)
        self._steps: dict[tuple[int, ...], tuple[float, float]] = {}
        self.equal = _lengths(_with(config, "contiguous"))

    def candidate(self, name: str, config: Config) -> Candidate:
        model = Model(config)
        step_s = model.step_s(self._costs, self._lines)
        return Candidate(name, config, step_s, model.evenness(self._costs), self._room(model))

    def unequal(self) -> tuple[int, ...]:
        """Lengths of contiguous runs with the shortest step that was found."""
        best = min(self._starts(), key=self._step)
        size = self._config.model.layers * self._config.train.micro_batches * self._nodes
        most = SEARCH_EFFORT // (64 + size)
        moves = [(giver, taker) for giver in range(self._nodes) for taker in range(self._nodes) if giver != taker]
        place, since = 0, 0
        while since < len(moves) and len(self._steps) < most:
            giver, taker = moves[place % len(moves)]
            moved = _moved(best, giver, taker)
            if moved is not None and self._step(moved) < self._step(best):
                best, since = moved, 0  # and the same move once more
            else:
                place, since = place + 1, since + 1
        return best

    def _step(self, counts: tuple[int, ...]) -> tuple[float, float]:
        """(by how much it does not fit, seconds): the smaller, the better."""
        if counts not in self._steps:
            model = Model(_with(self._config, "contiguous", counts))
            step_s = model.simulate(self._costs, self._lines).step_s
            self._steps[counts] = self._room(model).overshoot, step_s
        return self._steps[counts]

    def _starts(self) -> list[tuple[int, ...]]:
        balanced = balanced_runs(self._chunk_seconds(), self._costs.speeds or (1.0,) * self._nodes)
        blends = [
            tuple(_rounded([(1 - share) * a + share * b for a, b in zip(balanced, self.equal, strict=True)]))
            for share in BLENDS
        ]
        last = (*(1,) * (self._nodes - 1), self._chunks - self._nodes + 1)  # sends least
        return list(dict.fromkeys([self.equal, *blends, last]))

    def _chunk_seconds(self) -> Array:
        """Compute time of each chunk in a step, on a node of mean speed."""
        owners = self._config.coordinator
        alone = msgspec.structs.replace(owners, nodes=self._chunks, node_speeds=())
        model = Model(_with(msgspec.structs.replace(self._config, coordinator=alone), "contiguous"))
        head = self._costs.alike().seconds(model.step.head_forward + model.step.head_backward)
        return model.layers_s(self._costs.alike()) + model.step.passes * head

    def _room(self, model: Model) -> Room:
        return tightest(model, self._on)


def balanced_runs(chunk_s: Array, speeds: Sequence[float]) -> tuple[int, ...]:
    """Lengths of contiguous runs, at least 1 each, that make the longest time of any rank as short as possible."""
    until_s = np.concatenate([[0.0], np.cumsum(chunk_s)])
    chunks, ranks = len(chunk_s), len(speeds)

    def runs(limit_s: float) -> list[int]:
        """As many chunks to each rank as it does in `limit_s`; the last one gets the rest."""
        counts, begin = [], 0
        for rank, speed in enumerate(speeds[:-1]):
            end = int(np.searchsorted(until_s, until_s[begin] + limit_s * speed * (1 + 1e-12), side="right")) - 1
            end = min(max(end, begin + 1), chunks - (ranks - 1 - rank))
            counts.append(end - begin)
            begin = end
        return [*counts, chunks - begin]

    def longest_s(counts: Sequence[int]) -> float:
        ends = np.cumsum(counts)
        return float(((until_s[ends] - until_s[ends - counts]) / np.array(speeds)).max())

    low, high = 0.0, float(until_s[-1] / min(speeds))
    best = runs(high)
    while high - low > 1e-6 * high:
        middle = (low + high) / 2
        counts = runs(middle)
        if longest_s(counts) < longest_s(best):
            best = counts
        low, high = (low, middle) if longest_s(counts) <= middle * (1 + 1e-9) else (middle, high)
    return tuple(best)


def _with(config: Config, mode: Mode, counts: tuple[int, ...] = ()) -> Config:
    owners = msgspec.structs.replace(config.coordinator, assignment=mode, chunks_per_node=counts)
    return msgspec.structs.replace(config, coordinator=owners)


def _with_relay(config: Config, relay: Literal["never", "always"]) -> Config:
    return msgspec.structs.replace(config, coordinator=msgspec.structs.replace(config.coordinator, relay=relay))


def _with_replan(config: Config) -> Config:
    """The planner has chosen, and is asked again where nodes are lost or slow."""
    return msgspec.structs.replace(config, coordinator=msgspec.structs.replace(config.coordinator, replan="plan"))


def _lengths(config: Config) -> tuple[int, ...]:
    assignment = config.assignment()
    return tuple(len(assignment.chunks(rank)) for rank in range(assignment.n_ranks))


def _moved(counts: tuple[int, ...], giver: int, taker: int) -> tuple[int, ...] | None:
    """The lengths with one chunk less for `giver` and one more for `taker`; None where it would keep none."""
    if counts[giver] == 1:
        return None
    return tuple(count - (rank == giver) + (rank == taker) for rank, count in enumerate(counts))


def _rounded(parts: Sequence[float]) -> list[int]:
    """Whole numbers near these, with the same (whole) sum."""
    ends = np.floor(np.cumsum(parts) + 0.5).astype(int)  # ends that are 1 apart or more stay so
    counts: list[int] = np.diff(ends, prepend=0).tolist()
    return counts
