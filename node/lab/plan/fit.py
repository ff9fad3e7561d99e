"""Costs fitted to measured runs: six figures, by least squares through the simulation.

The fit minimises the relative error of each run's step, and, at half the weight, of the compute time of its nodes. A
weak prior (`STIFFNESS`) keeps each figure near the value measured on a plain CPU core unless the runs contradict it;
without the prior, few or similar runs would leave some of the six undetermined.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

import msgspec
import numpy as np

from netem.errors import ConfigError
from netem.profile import resolve
from node.lab.measured import Measured
from node.lab.plan.costs import Costs
from node.lab.plan.lines import Lines, lines_of
from node.lab.plan.model import Model
from node.lab.plan.work import Array

NAMES = ("flops_per_s", "element_s", "call_s", "message_s", "byte_s", "step_s")
PRIOR = Costs(flops_per_s=3e10, element_s=1e-9, call_s=3e-4, message_s=3e-4, byte_s=1e-9, step_s=5e-3)
STIFFNESS = 0.02
"""Weight of a deviation by a factor e from the prior, relative to an error of 100 % in a step."""
BUSY_WEIGHT = 0.5
ROUNDS = 25
STEP_LIMIT = 1.0
"""Most that a round changes the logarithm of a figure: a factor e."""
DIFFERENCE = 1e-3


class Case(NamedTuple):
    """A run, ready to be simulated."""

    measured: Measured
    model: Model
    lines: Lines

    def predict(self, costs: Costs) -> tuple[float, float]:
        """Seconds of an ordinary step, and of a node's compute in it (mean over nodes)."""
        outcome = self.model.simulate(costs, self.lines)
        rounds_s = self.model.averaging_s(self.lines) if self.measured.config.train.sync_every == 1 else 0.0
        return outcome.step_s + rounds_s, float(outcome.busy_s.mean())


def case(measured: Measured) -> Case:
    """The run with its model and lines. Raises `ConfigError` where its network can no longer be read."""
    config = measured.config
    return Case(measured, Model(config), lines_of(resolve(config.net), config.coordinator.nodes))


def fit(runs: Sequence[Case], cores: int | None = None) -> Costs:
    """The costs that predict these runs best. `cores` is the number that all nodes of a run share, by default the cores
    of this machine."""
    if not runs:
        raise ConfigError("--fit: give at least one run, such as outputs/tiny/metrics.jsonl")
    if any(run.measured.config.run.device != "cpu" for run in runs):
        cores = 0
    prior = msgspec.structs.replace(PRIOR, cores=os.cpu_count() or 1 if cores is None else cores)
    logs = np.zeros(len(NAMES))
    damping = 1e-2
    errors = _errors(runs, prior, logs)
    for _ in range(ROUNDS):
        slopes = np.stack(
            [(_errors(runs, prior, logs + DIFFERENCE * unit) - errors) / DIFFERENCE for unit in np.eye(len(NAMES))],
            axis=1,
        )
        normal = slopes.T @ slopes
        move = np.linalg.solve(normal + damping * np.diag(normal.diagonal() + 1e-9), -slopes.T @ errors)
        tried = logs + np.clip(move, -STEP_LIMIT, STEP_LIMIT)
        after = _errors(runs, prior, tried)
        if after @ after < errors @ errors:  # Levenberg and Marquardt
            done = errors @ errors - after @ after < 1e-7
            logs, errors, damping = tried, after, damping / 3
            if done:
                break
        else:
            damping *= 5
    return _costs(prior, logs)


def _errors(runs: Sequence[Case], prior: Costs, logs: Array) -> Array:
    """Log ratios of predicted to measured, and the distance from the prior."""
    costs = _costs(prior, logs)
    errors = []
    for run in runs:
        step_s, busy_s = run.predict(costs)
        errors.append(np.log(step_s / run.measured.step_s))
        errors.append(BUSY_WEIGHT * np.log(max(busy_s, 1e-9) / max(run.measured.busy_s, 1e-9)))
    return np.concatenate([np.array(errors), STIFFNESS * logs])


def _costs(prior: Costs, logs: Array) -> Costs:
    changes = {name: getattr(prior, name) * float(np.exp(log)) for name, log in zip(NAMES, logs, strict=True)}
    return msgspec.structs.replace(prior, **changes)
