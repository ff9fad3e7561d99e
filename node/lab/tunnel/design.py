"""From a target to the tunnel of one mode: which network, and how many steps between averagings."""

from __future__ import annotations

from typing import NamedTuple

from netem.network import Profile
from node.config import Config
from node.lab.plan.costs import Costs
from node.lab.plan.lines import Lines, lines_of
from node.lab.plan.predict import Model
from node.lab.tunnel.bench import Bench, crowded
from node.lab.tunnel.network import scaled, target_profile
from node.lab.tunnel.similitude import Body, Numbers, Scale, body_of, numbers, similar, similar_sync
from node.lab.tunnel.small import Mode, target_in

ROUNDS = 6
"""Of guessing the network from how crowded the cores are, and that from the network."""


class Goal(NamedTuple):
    """The target in one mode."""

    mode: Mode
    config: Config
    body: Body
    profile: Profile
    lines: Lines
    numbers: Numbers
    tokens: int
    """Of a step."""
    step_s: float
    """As planned, with its part of an averaging round."""

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.step_s


class Design(NamedTuple):
    """The tunnel for it."""

    body: Body
    """The small model, as fast as it is taken to compute there."""
    scale: Scale
    lines: Lines
    profile: Profile
    sync_every: int
    numbers: Numbers


def goal(target: Config, mode: Mode, costs: Costs) -> Goal:
    """Raises `ConfigError` where the mode, or its network, is no good."""
    config = target_in(target, mode)
    model, profile = Model(config), target_profile(config.net)
    lines = lines_of(profile, config.coordinator.nodes)
    body = body_of(model, costs)
    wanted = numbers(body, lines, config.train.sync_every)
    return Goal(mode, config, body, profile, lines, wanted, model.tokens, model.step_s(costs, lines))


def design(goal: Goal, body: Body, framing: float = 1.0, slower: float = 1.0) -> Design:
    """The tunnel for a small model that computes like `body`. On the wire there are `framing` times as many bytes
    as payloads have, and an averaging round takes `slower` times as long as it is reckoned to: so a run saw them."""
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
    """From the bench alone: the slower the network, the emptier the cores, and the faster the small model computes."""
    found = design(goal, bench.body)
    for _ in range(ROUNDS):
        found = design(goal, crowded(bench, small, found.lines, cores))
    return found
