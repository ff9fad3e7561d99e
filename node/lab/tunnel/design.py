"""From a target to the tunnel of one mode: its network, and the number of steps between averagings."""

from __future__ import annotations

from typing import NamedTuple

from netem.network import Profile
from node.config import Config
from node.lab.plan.costs import Costs
from node.lab.plan.lines import Lines, lines_of
from node.lab.plan.model import Model
from node.lab.tunnel.bench import Bench, crowded
from node.lab.tunnel.network import scaled, target_profile
from node.lab.tunnel.similitude import Body, Numbers, Scale, body_of, numbers, similar, similar_sync
from node.lab.tunnel.small import Mode, target_in

ROUNDS = 6
"""Rounds of estimating the network from the load of the cores, and that load from the network."""


class Goal(NamedTuple):
    """The target in one mode."""

    mode: Mode
    config: Config
    body: Body
    profile: Profile
    lines: Lines
    numbers: Numbers
    tokens: int
    """Tokens of a step."""
    step_s: float
    """The planned step, with its share of an averaging round."""

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.step_s


class Design(NamedTuple):
    """The tunnel for a target in one mode."""

    body: Body
    """The small model, as fast as it is expected to compute."""
    scale: Scale
    lines: Lines
    profile: Profile
    sync_every: int
    numbers: Numbers


def goal(target: Config, mode: Mode, costs: Costs) -> Goal:
    """The target in a mode. Raises `ConfigError` where the mode or its network is impossible."""
    config = target_in(target, mode)
    model, profile = Model(config), target_profile(config.net)
    lines = lines_of(profile, config.coordinator.nodes)
    body = body_of(model, costs)
    wanted = numbers(body, lines, config.train.sync_every)
    return Goal(mode, config, body, profile, lines, wanted, model.tokens, model.step_s(costs, lines))


def design(goal: Goal, body: Body, framing: float = 1.0, slower: float = 1.0) -> Design:
    """The tunnel for a small model that computes like `body`. A run may have shown that the wire carries `framing`
    times the bytes of the payloads, and that an averaging round takes `slower` times its expected duration."""
    scale = similar(goal.body, body, goal.lines)
    scale = scale._replace(rate=scale.rate * framing)
    lines = scale.lines(goal.lines)
    exact = goal.config.train.sync_every == 1
    sync_every = 1 if exact else similar_sync(goal.numbers.averaging, body, lines, slower)
    profile = scaled(goal.profile, scale)
    made = numbers(body, lines.scaled(1 / framing), sync_every)
    made = made._replace(averaging=numbers(body, lines, sync_every).averaging * slower)
    return Design(body, scale, lines, profile, sync_every, made)


def first_design(goal: Goal, bench: Bench, small: Config, cores: int) -> Design:
    """The tunnel by the bench alone. A slower network leaves more cores idle, so that each node computes faster."""
    found = design(goal, bench.body)
    for _ in range(ROUNDS):
        found = design(goal, crowded(bench, small, found.lines, cores))
    return found
