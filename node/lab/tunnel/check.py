"""What a run of the tunnel had, from its metrics.jsonl, against what its target has.

Compute is what the fullest node spent on neither waiting nor averaging, in ordinary steps; the bench says how it
divides among layers and ways. Communication is what the profile says, times all bytes on the wire over payload bytes,
times what transfers took over what they should have taken. The averaging round is that of the last step, as the node
had it that came to it last.
"""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import NamedTuple

from coordinator.events import PER_LINK
from coordinator.records import rates
from coordinator.records.rates import Record, nodes_of, number
from netem.errors import RunAborted
from node.config import Config
from node.lab.plan.averaging import averaging_s
from node.lab.tunnel.design import Design, Goal
from node.lab.tunnel.similitude import Body, Numbers, numbers
from node.lab.tunnel.small import COLD_STEPS, LEAST_STEPS
from node.watch.report import read_run

TOLERANCE = 0.10


class Measured(NamedTuple):
    """Medians over the ordinary steps of one run, in seconds of the wall clock."""

    steps: int
    step_s: float
    """Of the slowest node."""
    busy_s: float
    """What the fullest node computed."""
    round_s: float
    """One averaging round."""
    framing: float
    """Bytes on the wire over payload bytes."""
    lateness: float
    """Share of the emulated transfer times by which this host was late."""
    untrusted: str | None

    @property
    def overhead(self) -> float:
        """How much longer payloads took than their bytes alone at the profile's rate."""
        return self.framing * (1 + self.lateness)


class Verdict(NamedTuple):
    """A run beside its target."""

    measured: Measured
    body: Body
    """The small model, as fast as it was."""
    numbers: Numbers
    slower: float
    """An averaging round, over what it was reckoned to take."""
    off: dict[str, float]
    """By number: how far from the target's, as a share of it."""
    step_s: float
    """With its part of an averaging round, wall-clock."""
    target_step_s: float
    """The same on the target's clock."""
    tokens_per_s: float
    """The target's tokens, on its clock."""

    @property
    def missed(self) -> list[str]:
        """The numbers that were off by more than the tolerance."""
        return [name for name, off in self.off.items() if abs(off) > TOLERANCE]

    @property
    def held(self) -> bool:
        return not self.missed and self.measured.untrusted is None


def read_measured(folder: Path, config: Config, rank: int) -> Measured:
    """Raises `RunAborted` where too few ordinary steps are recorded."""
    records = read_run(folder).records
    after_start = [record for record in records if number(record, "step") > config.warmup_steps + 1]
    exact = config.train.sync_every == 1
    ordinary = [record for record in after_start if exact or not number(record, "averaging_s")][COLD_STEPS:]
    if len(ordinary) < LEAST_STEPS:
        raise RunAborted(f"{folder}: {len(ordinary)} steps that count; expected {LEAST_STEPS} or more")
    fullest = [nodes_of(record)[f"node-{rank}"] for record in ordinary]
    rounds = ordinary if exact else [record for record in after_start if number(record, "averaging_s")]
    return Measured(
        steps=len(ordinary),
        step_s=median(number(record, "step_s") for record in ordinary),
        busy_s=median(
            number(node, "step_s") - number(node, "exposed_s") - number(node, "averaging_s") for node in fullest
        ),
        round_s=median(min(number(node, "averaging_s") for node in nodes_of(record).values()) for record in rounds),
        framing=rates.total(ordinary, "sent_wire_bytes") / sum(rates.total(ordinary, key) for key in rates.PAYLOADS),
        lateness=_lateness(records),
        untrusted=rates.untrusted(records),
    )


def judge(goal: Goal, made: Design, bench_body: Body, measured: Measured) -> Verdict:
    """Set a run in the tunnel `made` against its target; `bench_body` says how compute divides."""
    body = bench_body.slowed(measured.busy_s / bench_body.step_s)
    had = numbers(body, made.lines.scaled(1 / measured.overhead), made.sync_every)
    had = had._replace(averaging=measured.round_s / (made.sync_every * body.step_s))
    wanted = goal.numbers.compared()
    exact = made.sync_every == 1
    step_s = measured.step_s + (0.0 if exact else measured.round_s / made.sync_every)
    target_step_s = step_s * goal.body.layer_s / body.layer_s
    reckoned_s = averaging_s(body.parameters, made.lines)
    return Verdict(
        measured=measured,
        body=body,
        numbers=had,
        slower=measured.round_s / reckoned_s if reckoned_s else 1.0,
        off={name: value / wanted[name] - 1 for name, value in had.compared().items() if wanted[name] > 0},
        step_s=step_s,
        target_step_s=target_step_s,
        tokens_per_s=goal.tokens / target_step_s,
    )


def _lateness(records: list[Record]) -> float:
    """Over all links and records."""
    sums = {"promised_s": 0.0, "missed_s": 0.0}
    for record in records:
        for values in nodes_of(record).values():
            for key in values:
                what = key.rpartition("/")[2]
                if key.startswith(PER_LINK) and what in sums:
                    sums[what] += number(values, key)
    return sums["missed_s"] / sums["promised_s"] if sums["promised_s"] else 0.0
