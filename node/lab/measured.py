"""A run's measured steps: its config and the medians of its ordinary steps, read from its folder.

The planner is fitted to them (`plan.fit`), and the tunnel is judged by them (`tunnel.check`). An ordinary step has the
full context, comes after the warm start, and averages no weights; where gradients are averaged in each step, every step
counts. The first few are left out, since allocators and caches are cold.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median
from typing import NamedTuple

from coordinator.events import PER_LINK
from coordinator.records import rates
from coordinator.records.folder import CONFIG, METRICS
from coordinator.records.rates import Record, nodes_of, number
from netem.config import load_toml
from netem.errors import ConfigError
from node.config import Config, recorded_config
from node.watch.recorded import read_run

COLD_STEPS = 3
"""Ordinary steps at the beginning that do not count."""
LEAST_STEPS = 3
"""Ordinary steps that must be left."""


class Measured(NamedTuple):
    """Medians over the ordinary steps of one run, in seconds of the wall clock."""

    name: str
    config: Config
    steps: int
    step_s: float
    """Duration of a step on the slowest node, without what is before it (waiting for Go) and after it."""
    busy_s: float
    """Time that a node neither waits nor averages; the mean over nodes."""
    busy_by_node_s: dict[str, float]
    """The same by node."""
    round_s: float
    """One averaging round, on the node that came to it last; 0 where there was none."""
    framing: float = 1.0
    """Bytes on the wire over payload bytes."""
    lateness: float = 0.0
    """Share of the emulated transfer times by which this host was late."""
    untrusted: str | None = None
    """Why the figures cannot be trusted, if so."""

    @property
    def overhead(self) -> float:
        """How much longer payloads took than their bytes alone take at the profile's rate."""
        return self.framing * (1 + self.lateness)


def read_measured(path: Path) -> Measured:
    """Read a run's folder, or the metrics.jsonl in it. Raises `ConfigError` where it holds too few ordinary steps."""
    folder = path.parent if path.name == METRICS else path
    records = read_run(folder).records
    config = recorded_config(load_toml(folder / CONFIG))
    # The step after the warm start takes the basis; those after unplugging send K and V whole again.
    compress, steps = config.compress, config.train.steps
    usual = [step for step in range(compress.warm_start_steps + 2, steps + 1) if not compress.is_unplugged_at(step)]
    warm = [record for record in records if number(record, "step") in usual and _is_timed(record)]
    averaged = [record for record in warm if number(record, "averaging_s") > 0]
    exact = config.train.sync_every == 1
    ordinary = [record for record in warm if exact or number(record, "averaging_s") == 0][COLD_STEPS:]
    if len(ordinary) < LEAST_STEPS:
        raise ConfigError(
            f"{folder}: {len(ordinary)} ordinary steps at full context without averaging, beside the first "
            f"{COLD_STEPS}; expected {LEAST_STEPS} or more"
        )
    payload_bytes = sum(rates.total(ordinary, key) for key in rates.PAYLOADS)
    return Measured(
        name=folder.name,
        config=config,
        steps=len(ordinary),
        step_s=median(max(map(_training_s, nodes_of(record).values())) for record in ordinary),
        busy_s=median(fmean(_busy_s(node) for node in nodes_of(record).values()) for record in ordinary),
        busy_by_node_s={
            name: median(_busy_s(nodes_of(record).get(name, {})) for record in ordinary)
            for name in rates.node_names(ordinary)
        },
        round_s=_round_s(ordinary if exact else averaged),
        framing=rates.total(ordinary, "sent_wire_bytes") / payload_bytes if payload_bytes else 1.0,
        lateness=_lateness(records),
        untrusted=rates.untrusted(records),
    )


def _is_timed(record: Record) -> bool:
    return number(record, "step_s") > 0 and bool(nodes_of(record))


def _training_s(node: Record) -> float:
    apart = sum(number(node, part) for part in ("barrier_s", "checkpoint_s", "evaluation_s"))
    return max(0.0, number(node, "step_s") - apart)


def _busy_s(node: Record) -> float:
    return max(0.0, _training_s(node) - number(node, "exposed_s") - number(node, "averaging_s"))


def _round_s(records: Sequence[Record]) -> float:
    """The node that comes to a round last waits for nobody in it, so it has the shortest time."""
    rounds_s = [min(number(node, "averaging_s") for node in nodes_of(record).values()) for record in records]
    return median(rounds_s) if rounds_s else 0.0


def _lateness(records: Sequence[Record]) -> float:
    """The share over all links and records."""
    sums = {"promised_s": 0.0, "missed_s": 0.0}
    for record in records:
        for values in nodes_of(record).values():
            for key in values:
                what = key.rpartition("/")[2]
                if key.startswith(PER_LINK) and what in sums:
                    sums[what] += number(values, key)
    return sums["missed_s"] / sums["promised_s"] if sums["promised_s"] else 0.0
