"""How long the small model computes on this host, by layer: medians over steps of its ranks, alone and all at once.

Each rank is a process, as in a run. First each makes a step while the others are idle, which gives the time of a layer,
forward and backward. Then all make a step together, which gives how much slower it is where they share the cores and
never wait for a network (`Bench.crowding`). A run that waits for its network is assumed to lie in between (`crowded`).
That is a first estimate: waking up after a wait costs time too, and only a run shows how much (`check`). Modes take
turns, step by step, so that other load on the machine affects them alike.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median
from typing import NamedTuple

import numpy as np

from netem.children import Child, Children
from netem.errors import IsthmusError, RunAborted
from node.config import Config
from node.lab.plan.averaging import form_of
from node.lab.plan.costs import Costs
from node.lab.plan.lines import Lines, without_limits
from node.lab.plan.model import Model
from node.lab.plan.predict import unlimited
from node.lab.tunnel.bench_node import StepTimes, mode_of
from node.lab.tunnel.similitude import Body, kinds_of

COLD_STEPS = 1
REPEATS = 3
LIMIT_S = 1800.0
MODES = ("subspace", "dense")


class Bench(NamedTuple):
    """The measurement of one mode."""

    body: Body
    """The small model, each rank computing alone."""
    rank: int
    """The fullest node, to which the times of `body` belong."""
    evenness: float
    """Compute time of a node, the mean over nodes, as a share of the fullest node's."""
    crowding: float
    """The factor by which the fullest node is slower when all compute at once."""


class Repeat(NamedTuple):
    """Steps of every rank."""

    alone: list[StepTimes]
    together: list[StepTimes]


def measure(
    config: Config, config_path: Path, log_path: Path, modes: Sequence[str] = MODES, repeats: int = REPEATS
) -> dict[str, Bench]:
    """Measure `config`, saved at `config_path`, by compress.mode. Raises `RunAborted` where a rank fails."""
    taken: dict[str, list[Repeat]] = {mode: [] for mode in modes}
    log_path.unlink(missing_ok=True)
    deadline = time.monotonic() + LIMIT_S
    with Children() as children:
        ranks = [_start(children, config_path, log_path, rank) for rank in range(config.coordinator.nodes)]
        try:
            for rank in ranks:
                _answer(rank, deadline)  # it is ready
            for _ in range(COLD_STEPS + repeats):
                for mode, so_far in taken.items():
                    so_far.append(_repeat(ranks, mode, deadline))
        except IsthmusError as error:
            raise RunAborted(f"{error} (the log of all ranks is {log_path})") from None
    return {mode: bench_of(mode_of(config, mode), so_far[COLD_STEPS:]) for mode, so_far in taken.items()}


def bench_of(config: Config, repeats: Sequence[Repeat]) -> Bench:
    """Medians over repeats."""
    model = Model(config)
    alone_R = [median(repeat.alone[rank].step_s for repeat in repeats) for rank in range(config.coordinator.nodes)]
    rank = int(np.argmax(alone_R))
    # The bench makes a step in one pass, whose layers are whole in time; each of several passes has its part of that.
    layers_s = np.median([repeat.alone[rank].layers_s for repeat in repeats], axis=0) / model.step.passes
    together_s = median(repeat.together[rank].step_s for repeat in repeats)
    body = Body(
        config.assignment(), kinds_of(model, layers_s.tolist()), alone_R[rank], model.parameters, form_of(config)
    )
    return Bench(body, rank, fmean(alone_R) / alone_R[rank], max(1.0, together_s / alone_R[rank]))


def crowded(bench: Bench, config: Config, lines: Lines, cores: int) -> Body:
    """The body as it computes beside the others on these lines: between alone and all at once, by the share of slowing
    that the planner's simulation predicts for as many cores."""
    model = Model(config)
    flops = body_flops(model)[bench.rank]
    costs = Costs(flops_per_s=flops / bench.body.step_s, cores=cores)

    def slowed(on: Lines) -> float:
        return float(model.simulate(costs, on).busy_s[bench.rank]) / bench.body.step_s - 1

    most = slowed(unlimited(lines))
    share = min(1.0, slowed(lines) / most) if most > 0 else 1.0
    return bench.body.slowed(1 + (bench.crowding - 1) * share)


def body_flops(model: Model) -> list[float]:
    """FLOPs of a step by rank."""
    instant = model.simulate(Costs(flops_per_s=1.0), without_limits(model.step.assignment.n_ranks))
    return [float(flops) for flops in instant.busy_s]


def _repeat(ranks: Sequence[Child], mode: str, deadline: float) -> Repeat:
    alone = []
    for rank in ranks:
        rank.tell(mode.encode())
        alone.append(_times(_answer(rank, deadline)))
    for rank in ranks:
        rank.tell(mode.encode())
    return Repeat(alone, [_times(_answer(rank, deadline)) for rank in ranks])


def _start(children: Children, config_path: Path, log_path: Path, rank: int) -> Child:
    command = [sys.executable, "-m", "node.lab.tunnel.bench_node", str(config_path), str(rank)]
    environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE"}
    return children.start(f"rank {rank} of the bench", command, log_path=log_path, environment=environment, talks=True)


def _answer(rank: Child, deadline: float) -> bytes:
    """Its next line. Raises `IsthmusError` where it ends, or all have taken more than `LIMIT_S`."""
    return rank.hear(max(0.0, deadline - time.monotonic()))


def _times(answer: bytes) -> StepTimes:
    return StepTimes(**json.loads(answer))
