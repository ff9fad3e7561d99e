"""A run as the planner is to predict it: its config, and the medians of its ordinary steps, from its folder.

An ordinary step has the full context, is after the warm start, and has no averaging of weights (where gradients are
averaged in each step, every step has). The first few of them are left out: allocators and caches are cold.
"""

from __future__ import annotations

from pathlib import Path
from statistics import fmean, median
from typing import NamedTuple

from coordinator.records import rates
from coordinator.records.folder import CONFIG, METRICS
from coordinator.records.rates import Record, number
from netem.config import convert, load_toml
from netem.errors import ConfigError
from node.config import Config
from node.watch.report import read_run

COLD_STEPS = 3
LEAST_STEPS = 3


class Measured(NamedTuple):
    """Medians over the ordinary steps of one run, in seconds of the wall clock."""

    name: str
    config: Config
    steps: int
    step_s: float
    """Of the slowest node, as the recorder has it."""
    busy_s: float
    """What a node spent on neither waiting nor averaging; the mean over nodes."""
    averaging_s: float
    """In an ordinary step: above 0 only where gradients are averaged."""


def read_measured(path: Path) -> Measured:
    """Read a run's folder, or the metrics.jsonl in it. Raises `ConfigError` where it holds no ordinary steps."""
    folder = path.parent if path.name == METRICS else path
    run = read_run(folder)
    config = convert(Config, load_toml(folder / CONFIG))
    ordinary = [record for record in run.records if _is_ordinary(config, record)][COLD_STEPS:]
    if len(ordinary) < LEAST_STEPS:
        raise ConfigError(
            f"{folder}: {len(ordinary)} ordinary steps at full context without averaging, beside the first "
            f"{COLD_STEPS}; expected {LEAST_STEPS} or more"
        )
    return Measured(
        folder.name,
        config,
        len(ordinary),
        median(number(record, "step_s") for record in ordinary),
        median(_busy_s(record) for record in ordinary),
        median(number(record, "averaging_s") for record in ordinary),
    )


def _is_ordinary(config: Config, record: Record) -> bool:
    step = int(number(record, "step"))
    if step <= config.warmup_steps + 1:  # the step after the warm start takes the basis
        return False
    return config.train.sync_every == 1 or number(record, "averaging_s") == 0


def _busy_s(record: Record) -> float:
    nodes = rates.nodes_of(record).values()
    return fmean(
        max(0.0, number(node, "step_s") - number(node, "exposed_s") - number(node, "averaging_s")) for node in nodes
    )
