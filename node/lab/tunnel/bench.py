"""What the small model computes on this host, layer by layer: medians over steps of its ranks, alone and all at once.

A process for each rank, as in a run. Each makes a step while the others rest, which tells what a layer takes, forward
and backward; then all begin a step together and wait for the last, which tells how much slower it gets where they share
the cores and no network holds them back (`Bench.crowding`). A run that waits for its network is taken to lie in
between (`crowded`). That is a first guess: waking from waits costs time too, and only a run tells how much (`check`).
Modes take turns, step by step, so that whatever else the machine does meets them alike.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean, median
from typing import IO, NamedTuple

import numpy as np

from netem.errors import RunAborted
from node.config import Config
from node.lab.plan.costs import Costs
from node.lab.plan.lines import Lines
from node.lab.plan.predict import Model, unlimited
from node.lab.tunnel.bench_node import StepTimes, mode_of
from node.lab.tunnel.similitude import Body, kinds_of

COLD_STEPS = 1
REPEATS = 3
LIMIT_S = 1800.0
LOG_LINES_SHOWN = 6
MODES = ("subspace", "dense")


class Bench(NamedTuple):
    """One mode, measured."""

    body: Body
    """Alone."""
    rank: int
    """The fullest node, whose times those are."""
    evenness: float
    """What a node computes in a step, the mean over nodes, as a share of the fullest."""
    crowding: float
    """How much longer the fullest takes when all compute at once."""


class Repeat(NamedTuple):
    """Steps of every rank."""

    alone: list[StepTimes]
    together: list[StepTimes]


def measure(
    config: Config, config_path: Path, log_path: Path, modes: Sequence[str] = MODES, repeats: int = REPEATS
) -> dict[str, Bench]:
    """Measure `config`, saved at `config_path`, by compress.mode. Raises `RunAborted` where a rank fails."""
    taken: dict[str, list[Repeat]] = {mode: [] for mode in modes}
    with log_path.open("wb") as log, _ranks(config, config_path, log) as ranks:
        try:
            for rank in ranks:
                _answer(rank)  # it is ready
            for _ in range(COLD_STEPS + repeats):
                for mode, so_far in taken.items():
                    so_far.append(_repeat(ranks, mode))
        except (BrokenPipeError, EOFError):
            lines = log_path.read_text(errors="replace").splitlines()[-LOG_LINES_SHOWN:]
            shown = "".join(f"\n    {line}" for line in lines)
            raise RunAborted(f"a rank of the bench ended, or all took over {LIMIT_S:g} s: {log_path}{shown}") from None
    return {mode: bench_of(mode_of(config, mode), so_far[COLD_STEPS:]) for mode, so_far in taken.items()}


def bench_of(config: Config, repeats: Sequence[Repeat]) -> Bench:
    """Medians over repeats."""
    model = Model(config)
    alone_R = [median(repeat.alone[rank].step_s for repeat in repeats) for rank in range(config.coordinator.nodes)]
    rank = int(np.argmax(alone_R))
    layers_s = np.median([repeat.alone[rank].layers_s for repeat in repeats], axis=0)
    together_s = median(repeat.together[rank].step_s for repeat in repeats)
    body = Body(config.assignment(), kinds_of(model, layers_s.tolist()), alone_R[rank], model.parameters)
    return Bench(body, rank, fmean(alone_R) / alone_R[rank], max(1.0, together_s / alone_R[rank]))


def crowded(bench: Bench, config: Config, lines: Lines, cores: int) -> Body:
    """The body as it computes amid the others on these lines: between alone and all at once, where the planner's
    simulation sees them, with as many cores."""
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
    instant = model.simulate(Costs(flops_per_s=1.0), unlimited_lines(model))
    return [float(flops) for flops in instant.busy_s]


def unlimited_lines(model: Model) -> Lines:
    """No network at all between the model's ranks."""
    ranks = model.step.assignment.n_ranks
    free = np.full(ranks, np.inf)
    return Lines(np.full((ranks, ranks), np.inf), np.zeros((ranks, ranks)), free, free)


def _repeat(ranks: Sequence[subprocess.Popen[str]], mode: str) -> Repeat:
    alone = []
    for rank in ranks:
        _tell(rank, mode)
        alone.append(_times(_answer(rank)))
    for rank in ranks:
        _tell(rank, mode)
    return Repeat(alone, [_times(_answer(rank)) for rank in ranks])


@contextmanager
def _ranks(config: Config, config_path: Path, log: IO[bytes]) -> Iterator[list[subprocess.Popen[str]]]:
    """The child processes; killed after `LIMIT_S`, and at the end."""
    command = [sys.executable, "-m", "node.lab.tunnel.bench_node", str(config_path)]
    children: list[subprocess.Popen[str]] = []

    def stop() -> None:
        for child in children:
            child.kill()

    clock = threading.Timer(LIMIT_S, stop)
    clock.daemon = True
    try:
        for rank in range(config.coordinator.nodes):
            child = subprocess.Popen(
                [*command, str(rank)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=os.environ | {"OMP_WAIT_POLICY": "PASSIVE"},
                start_new_session=True,
            )
            children.append(child)
        clock.start()
        yield children
    finally:
        clock.cancel()
        stop()
        for child in children:
            child.communicate()


def _tell(rank: subprocess.Popen[str], mode: str) -> None:
    assert rank.stdin
    rank.stdin.write(f"{mode}\n")
    rank.stdin.flush()


def _answer(rank: subprocess.Popen[str]) -> str:
    """Its next line. Raises `EOFError` where it has ended."""
    assert rank.stdout
    if not (line := rank.stdout.readline()):
        raise EOFError
    return line


def _times(answer: str) -> StepTimes:
    return StepTimes(**json.loads(answer))
