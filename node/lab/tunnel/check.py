"""The numbers of a run in the tunnel against those of its target.

Compute is the time that the fullest node neither waited nor averaged, in ordinary steps (`node.lab.measured`); the
bench says how it divides among layers and directions. Communication follows from the profile, times all bytes on the
wire over payload bytes, times the measured over the expected duration of transfers.
"""

from __future__ import annotations

from typing import NamedTuple

from node.lab.measured import Measured
from node.lab.plan.averaging import averaging_s
from node.lab.tunnel.bench import Bench
from node.lab.tunnel.design import Design, Goal
from node.lab.tunnel.similitude import Body, Numbers, numbers

TOLERANCE = 0.10


class Verdict(NamedTuple):
    """A run beside its target."""

    measured: Measured
    body: Body
    """The small model, as fast as it was in the run."""
    numbers: Numbers
    slower: float
    """Measured over expected duration of an averaging round."""
    off: dict[str, float]
    """By number: its distance from the target's, as a share of that."""
    step_s: float
    """Wall-clock, with its share of an averaging round."""
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


def judge(goal: Goal, made: Design, bench: Bench, measured: Measured) -> Verdict:
    """Compare a run in the tunnel `made` with its target; `bench` says which node is the fullest, and how its compute
    divides."""
    body = bench.body.slowed(measured.busy_by_node_s[f"node-{bench.rank}"] / bench.body.step_s)
    had = numbers(body, made.lines.scaled(1 / measured.overhead), made.sync_every)
    had = had._replace(averaging=measured.round_s / (made.sync_every * body.step_s))
    wanted = goal.numbers.compared()
    exact = made.sync_every == 1
    step_s = measured.step_s + (0.0 if exact else measured.round_s / made.sync_every)
    target_step_s = step_s * goal.body.layer_s / body.layer_s
    reckoned_s = averaging_s(body.parameters, made.lines, body.averages_in)
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
