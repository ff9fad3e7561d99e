"""A test of the planner on runs: half of them are used to fit the costs, the others are predicted.

Every other run, in order of names, is used for the fit. Strategies are runs of one model on the same number of nodes;
the order of two is kept where the faster one is also predicted to be faster. Pairs that were measured within `TIE` of
each other show nothing and do not count.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from statistics import median
from typing import NamedTuple

from netem.errors import ConfigError
from netem.profile import Profile, resolve
from netem.tables import markdown_table
from netem.units import format_rate, format_time
from node.config import Config
from node.lab.plan.costs import Costs
from node.lab.plan.fit import Case, fit
from node.lab.plan.text import seconds, terms

LEAST_RUNS = 2
TIE = 0.10


class Row(NamedTuple):
    """One run and its prediction."""

    case: Case
    fitted: bool
    step_s: float
    busy_s: float

    @property
    def error(self) -> float:
        """Error of the predicted step, as a share of the measured one."""
        return self.step_s / self.case.measured.step_s - 1


class Validation(NamedTuple):
    """All runs with their predictions, and the fitted costs."""

    costs: Costs
    rows: tuple[Row, ...]

    @property
    def median_error(self) -> float:
        """The median of absolute errors, over runs that the fit has not seen."""
        return median(abs(row.error) for row in self.rows if not row.fitted)

    @property
    def order(self) -> tuple[int, int]:
        """The number of pairs of strategies whose order is kept, and the number of all pairs."""
        kept = total = 0
        for one, other in combinations(self.rows, 2):
            measured = one.case.measured.step_s / other.case.measured.step_s
            if _setting(one) == _setting(other) and abs(measured - 1) > TIE:
                total += 1
                kept += (measured > 1) == (one.step_s > other.step_s)
        return kept, total


def validate(cases: Sequence[Case], cores: int | None = None) -> Validation:
    """Fit to every other run and predict all; `cores` as in `fit`. Raises `ConfigError` where there are too few."""
    if len(cases) < LEAST_RUNS:
        raise ConfigError(f"--validate: {len(cases)} runs; expected at least {LEAST_RUNS}, half of them for the fit")
    cases = sorted(cases, key=lambda case: case.measured.name)
    costs = fit(cases[::2], cores)
    rows = [Row(case, place % 2 == 0, *case.predict(costs)) for place, case in enumerate(cases)]
    return Validation(costs, tuple(rows))


def table(validation: Validation) -> str:
    """All rows and the conclusion, as Markdown."""
    head = [
        "run",
        "nodes",
        "mode",
        "chunks",
        "passes",
        "network",
        "steps",
        "measured",
        "predicted",
        "error",
        "compute",
        "predicted",
        "for",
    ]
    rows = []
    for row in validation.rows:
        measured = row.case.measured
        config = measured.config
        rows.append(
            [
                measured.name,
                str(config.coordinator.nodes),
                config.compress.mode,
                _ownership(config),
                str(config.train.micro_batches),
                _network(resolve(config.net)),
                str(measured.steps),
                seconds(measured.step_s),
                seconds(row.step_s),
                f"{row.error:+.1%}",
                seconds(measured.busy_s),
                seconds(row.busy_s),
                "fit" if row.fitted else "test",
            ]
        )
    kept, total = validation.order
    unseen = [row for row in validation.rows if not row.fitted]
    worst = max(unseen, key=lambda row: abs(row.error))
    lines = [
        markdown_table(head, rows),
        "",
        f"Median error of the step over {len(unseen)} runs that the fit has not seen: {validation.median_error:.1%}; "
        f"the largest is {worst.error:+.1%} ({worst.case.measured.name}).",
        "Order of strategies (pairs of runs of one model on the same number of nodes that differ by more than "
        f"{TIE:.0%}): kept in {kept} of {total}.",
        "",
        fitted(validation.costs),
    ]
    return "\n".join(lines)


def fitted(costs: Costs) -> str:
    """The costs, by name."""
    cores = costs.cores or "no shared"
    return f"Fitted: {costs.flops_per_s / 1e9:.3g} GFLOP/s, {terms(costs)}, on {cores} cores."


def _network(profile: Profile) -> str:
    each = "NIC" if profile.scope == "nic" else "link"
    return f"{format_rate(profile.rate_bps)} a {each}, {format_time(profile.latency_s)}"


def _ownership(config: Config) -> str:
    counts = config.coordinator.chunks_per_node
    return ", ".join(map(str, counts)) if counts else config.coordinator.assignment


def _setting(row: Row) -> tuple[object, int]:
    config = row.case.measured.config
    return config.model, config.coordinator.nodes
