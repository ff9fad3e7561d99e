"""From the records of a run in the tunnel to times on the target's clock.

A step counts as long as its slowest node neither averaged nor evaluated, plus the share of an averaging round that a
step of the target has, times the ratio of the target's compute to the small model's. The runs themselves average far
more often than the target, since they are so short; the rounds of those averagings, and those of the basis, are left
out of the clock. The pause of an interrupted run does not count either.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from coordinator.records.rates import Record, nodes_of, number
from node.lab.experiment.stage import Stage
from node.lab.tunnel.check import Verdict


def emulated_s(records: Sequence[Record], stage: Stage, verdict: Verdict) -> list[float]:
    """The target's clock at the end of each record's step."""
    averaging_s = verdict.measured.round_s / stage.design.sync_every
    factor = stage.goal.body.layer_s / verdict.body.layer_s
    return list(accumulate(factor * (step_alone_s(record) + averaging_s) for record in records))


def step_alone_s(record: Record) -> float:
    """The duration of a step without its averaging rounds, on the slowest node."""
    nodes = nodes_of(record).values()
    return max((number(node, "step_s") - number(node, "averaging_s") for node in nodes), default=0.0)
