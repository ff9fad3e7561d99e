"""What happens to a run, and when: drawn from a seed, without I/O.

Every disturbance has an end, after which its victim has time to recover before it is chosen again. At any time at least
`spared` nodes are left alone, so that the run can go on.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from netem.errors import ConfigError
from node.config.seeds import derive

COORDINATOR = "coordinator"


class Kind(StrEnum):
    """A disturbance. All but `KILL` end by themselves; what was killed is started again."""

    KILL = "kill"  # the process is killed, and started again
    STOP = "stop"  # the process is stopped (SIGSTOP), and continued
    HANG = "hang"  # the trainer stands still, and the process' heartbeats go on
    SLOW = "slow"  # the process runs for a fifth of the time
    DEAF = "deaf"  # nothing that peers send reaches the node
    MUTE = "mute"  # nothing that the node answers on its callers' connections reaches them
    CUT = "cut"  # both
    DELAY = "delay"  # what peers send reaches the node later, by a time that varies
    CORRUPT = "corrupt"  # now and then one bit of what peers send is another one
    TRUNCATE = "truncate"  # now and then a connection of a peer breaks off in the middle of a message
    LEADER = "leader"  # the coordinator is killed, and started again


ON_THE_WIRE = (Kind.DEAF, Kind.MUTE, Kind.CUT, Kind.DELAY, Kind.CORRUPT, Kind.TRUNCATE)
"""What `door` does."""

KINDS = tuple(Kind)


@dataclass(frozen=True)
class Disturbance:
    """One thing that happens to one process, from `at_s` after the training began, for `lasts_s`."""

    at_s: float
    lasts_s: float
    kind: Kind
    victim: str

    @property
    def until_s(self) -> float:
        """When it is over."""
        return self.at_s + self.lasts_s

    def __str__(self) -> str:
        return f"{self.at_s:6.1f} s  {self.kind:8} {self.victim} for {self.lasts_s:.1f} s"


@dataclass(frozen=True)
class Plan:
    """How a schedule is drawn. Times are in seconds."""

    seed: int
    duration_s: float
    kinds: tuple[Kind, ...] = KINDS
    mean_gap_s: float = 20.0
    """From the beginning of one disturbance to that of the next, on average."""
    longest_s: float = 10.0
    """No disturbance lasts longer."""
    recovery_s: float = 20.0
    """A victim is left alone for so long afterwards."""
    spared: int = 1
    """At the least so many nodes are undisturbed at any time."""


def draw(plan: Plan, nodes: Sequence[str]) -> list[Disturbance]:
    """The disturbances of a run with these nodes, in order of time; equal plans give equal schedules.

    The last one ends, with the time to recover from it, before the duration is over.
    """
    if len(nodes) <= plan.spared:
        raise ConfigError(f"{len(nodes)} nodes, of which {plan.spared} are spared: none is left to disturb")
    source = random.Random(derive(plan.seed, "chaos"))
    found: list[Disturbance] = []
    at_s = source.expovariate(1 / plan.mean_gap_s)
    while at_s < plan.duration_s:
        kind = source.choice(plan.kinds)
        lasts_s = source.uniform(0.1, 1.0) * plan.longest_s
        victims = [COORDINATOR] if kind is Kind.LEADER else list(nodes)
        victim = source.choice(victims)
        wanted = Disturbance(at_s, lasts_s, kind, victim)
        if wanted.until_s + plan.recovery_s <= plan.duration_s and _is_fair(wanted, found, plan, nodes):
            found.append(wanted)
        at_s += source.expovariate(1 / plan.mean_gap_s)
    return found


def _is_fair(wanted: Disturbance, earlier: Sequence[Disturbance], plan: Plan, nodes: Sequence[str]) -> bool:
    busy = {one.victim for one in earlier if wanted.at_s < one.until_s + plan.recovery_s}
    if wanted.victim in busy or COORDINATOR in busy:
        return False
    left = len(set(nodes) - busy - {wanted.victim})
    return left >= plan.spared
