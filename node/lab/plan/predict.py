"""The prediction for one config on one network with one kind of device.

Utilisation is the duration of the step on a network without limits (same schedule, same imbalance) over its duration on
this network.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import msgspec
import numpy as np

from netem.profile import Profile, resolve
from node.config import Config
from node.lab.plan.costs import Costs
from node.lab.plan.lines import Lines, lines_of
from node.lab.plan.memory import Memory, tightest
from node.lab.plan.model import Model
from node.lab.plan.simulate import Outcome
from node.measure.devices import Device

UTILISATIONS = (0.5, 0.9, 0.95)
LEAST_BPS, MOST_BPS = 1e4, 1e15
PRECISION = 1.01
"""A bandwidth is searched to this factor."""
STAGES_PRECISION = 1.04
"""The same where a step is simulated event by event, which takes long."""
MOST_MESSAGES = 100_000
"""In a step with more messages than this, nothing is searched for: one simulation takes several seconds."""


class Bandwidth(NamedTuple):
    """The rate at which a utilisation is reached; None where latency alone makes it impossible."""

    utilisation: float
    rate_bps: float | None


class Remedy(NamedTuple):
    """An improvement, and the duration of a step with it."""

    what: str
    step_s: float


class Across(NamedTuple):
    """A step where the stages of a pipeline are in different nodes too."""

    parts: int
    """Groups of nodes, each with its part of the layers."""
    step_s: float
    """With its share of an averaging round."""
    boundary_bytes: float
    """Activations of one pass from one node to the next."""
    fits: bool
    """Whether every device has the memory."""


class Prediction(msgspec.Struct, frozen=True, kw_only=True):
    """The figures of a step; times in seconds."""

    network: str
    scope: str
    dilation: float
    """Wall-clock seconds in one second of the emulated network. All times here are of the wall clock."""
    nodes: int
    chunks: int
    owned: tuple[tuple[int, ...], ...]
    """Chunks of each node."""
    stages: int
    """Pipeline stages of each node."""
    shards: int
    """Devices of each stage."""
    relays: bool
    """Whether readers pass payloads on."""
    passes: int
    """Passes of a step: in flight together, or one after another through the stages."""
    context: int
    tokens: int
    parameters: int
    flops: float
    step_s: float
    """With its share of an averaging round."""
    exchange_step_s: float
    """An ordinary step, without averaging."""
    free_s: float
    """An ordinary step on a network without limits: compute, and waiting for nodes that compute longer."""
    compute_s: tuple[float, ...]
    """By node, on its busiest device."""
    waited_s: tuple[float, ...]
    """By node: waiting for messages of other nodes in the middle of the step; the mean over its stages."""
    bubbles: float
    """Share of the step on a network without limits in which the devices of the fullest node wait for each other: the
    mean over its stages."""
    boundary_bytes: float
    """Activations that one stage of the fullest node passes to the next in a step, all shards. The gradient that comes
    back is as large."""
    evenness: float
    """Compute time of attention, feed-forward and codecs on the node that has least of it, as a share of the node that
    has most."""
    forward_waits_s: tuple[float, ...]
    """By layer: waiting for messages in the forward, on the node that waits longest; all passes."""
    backward_waits_s: tuple[float, ...]
    communication_s: float
    """The longest time that the exchange occupies one link or NIC."""
    averaging_s: float
    """One round."""
    sync_every: int
    averaging_bytes: float
    """Sent by a node in one round; the mean over nodes."""
    sent_bytes: tuple[tuple[float, ...], ...]
    """By sender and receiver, exchange only."""
    memory: Memory
    """Of the device that is nearest to its memory."""
    memory_node: int
    memory_stage: int
    memory_limit_bytes: float
    bottleneck: str
    remedies: tuple[Remedy, ...]
    messages: int
    """Messages that were simulated one by one."""
    bandwidths: tuple[Bandwidth, ...]
    """None where there are too many messages."""
    across: tuple[Across, ...]
    """Of a node with pipeline stages: the same with stages in different nodes."""

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.step_s

    @property
    def fits(self) -> bool:
        """Whether every node's device has the memory."""
        return self.memory.device <= self.memory_limit_bytes

    @property
    def exposed_s(self) -> float:
        """Communication that compute does not hide, averaging included."""
        return self.step_s - self.free_s

    @property
    def utilisation(self) -> float:
        return self.free_s / self.step_s


def predict(config: Config, costs: Costs, on: Sequence[Device]) -> Prediction:
    """Predict a config with these devices, one for each node. Raises `ConfigError` where the network or the payloads
    are impossible, or the assignment is still to be chosen."""
    profile = resolve(config.net)
    model = Model(config)
    lines = lines_of(profile, config.coordinator.nodes)
    outcome, free = model.simulate(costs, lines), model.simulate(costs, unlimited(lines))
    free_s = free.step_s
    busiest, communication_s = _busiest(outcome, lines)
    round_s = model.averaging_s(lines)
    step_s = outcome.step_s + round_s / config.train.sync_every
    remedies = _remedies(model, costs, lines, outcome.step_s, round_s)
    room = tightest(model, on)
    forward_waits, backward_waits = outcome.waits_s.max(2).tolist()
    assignment, large = model.step.assignment, model.messages > MOST_MESSAGES
    return Prediction(
        network=str(profile),
        scope=profile.scope,
        dilation=profile.dilation,
        nodes=config.coordinator.nodes,
        chunks=config.model.chunks,
        owned=tuple(assignment.chunks(rank) for rank in range(assignment.n_ranks)),
        stages=model.layout.stages,
        shards=model.layout.shards,
        relays=model.step.relays,
        passes=model.step.passes,
        context=config.model.context,
        tokens=model.tokens,
        parameters=model.parameters,
        flops=model.flops,
        step_s=step_s,
        exchange_step_s=outcome.step_s,
        free_s=free_s,
        compute_s=tuple(outcome.busy_s.tolist()),
        waited_s=tuple((outcome.waited_s / model.layout.stages).tolist()),
        bubbles=bubbles(free),
        boundary_bytes=model.step.passes * float(model.stages.boundary_bytes.max()) if model.layout.stages > 1 else 0,
        evenness=model.evenness(costs),
        forward_waits_s=tuple(forward_waits),
        backward_waits_s=tuple(backward_waits),
        communication_s=communication_s,
        averaging_s=round_s,
        sync_every=config.train.sync_every,
        averaging_bytes=model.averaging_bytes(),
        sent_bytes=tuple(tuple(row) for row in outcome.sent_bytes.tolist()),
        memory=room.needed,
        memory_node=room.rank,
        memory_stage=room.stage,
        memory_limit_bytes=room.limit_bytes,
        bottleneck=_bottleneck(remedies, busiest, step_s, config),
        remedies=remedies,
        messages=model.messages,
        bandwidths=() if large else _bandwidths(model, costs, _at_least_one_rate(lines, profile), free_s, outcome),
        across=() if large or model.layout.stages == 1 else _across(config, costs.alike(), lines, on),
    )


def _across(config: Config, costs: Costs, lines: Lines, on: Sequence[Device]) -> tuple[Across, ...]:
    """The layers dealt to two groups of nodes or more, as far as numbers divide."""
    nodes, stages = config.coordinator.nodes, config.coordinator.stages
    found = []
    for parts in range(2, nodes + 1):
        if nodes % parts == 0 and parts * stages <= config.model.layers:
            model = Model(config, parts)
            boundary_bytes = float(model.stages.boundary_bytes.max())
            found.append(Across(parts, model.step_s(costs, lines), boundary_bytes, tightest(model, on).fits))
    return tuple(found)


def bubbles(free: Outcome) -> float:
    """The share of a step in which the devices of the fullest node wait for each other; `free` is a step on a network
    without limits. A node without stages has none."""
    if len(free.devices_busy_s) == 1:
        return 0.0
    return 1.0 - float(free.devices_busy_s.mean(0).max()) / free.step_s


def unlimited(lines: Lines) -> Lines:
    """The same nodes on a network without limits."""
    return lines.scaled(np.inf).without_latency()


def needed_bps(model: Model, costs: Costs, lines: Lines, step_s: float, least_bps: float = LEAST_BPS) -> float | None:
    """The rate of the slowest line at which a step takes `step_s`, with all rates in proportion; None where no rate is
    enough. Averaging is included. The search is a bisection on the simulation, from `least_bps` upwards."""
    slowest_bps = lines.slowest_bps()

    def reaches(rate_bps: float) -> bool:
        return model.step_s(costs, lines.scaled(rate_bps / slowest_bps)) <= step_s

    if not reaches(MOST_BPS):
        return None
    low, high = least_bps, 8 * least_bps
    while not reaches(high):
        low, high = high, 8 * high
    while high / low > (PRECISION if len(model.stage_layers) == 1 else STAGES_PRECISION):
        middle = float(np.sqrt(low * high))
        low, high = (low, middle) if reaches(middle) else (middle, high)
    return high


def _bandwidths(model: Model, costs: Costs, lines: Lines, free_s: float, outcome: Outcome) -> tuple[Bandwidth, ...]:
    """The rates for `UTILISATIONS`, which rise with them. One node needs no network. The search begins where what was
    sent in `outcome` takes the whole step."""
    found: list[Bandwidth] = []
    if model.step.assignment.n_ranks == 1:
        return ()
    _, taken_s = _busiest(outcome, lines)
    least_bps = max(LEAST_BPS, 0.9 * lines.slowest_bps() * taken_s * UTILISATIONS[0] / free_s)
    for utilisation in UTILISATIONS:
        rate_bps = needed_bps(model, costs, lines, free_s / utilisation, least_bps)
        least_bps = rate_bps or least_bps
        found.append(Bandwidth(utilisation, rate_bps))
    return tuple(found)


def _at_least_one_rate(lines: Lines, profile: Profile) -> Lines:
    """Lines that can be scaled: where nothing is limited, all links or NICs (as the scope says) get the same rate."""
    if np.isfinite(lines.slowest_bps()):
        return lines
    if profile.scope == "nic":
        ones = np.ones_like(lines.up_bps)
        return lines._replace(up_bps=ones, down_bps=ones)
    ones = np.where(np.eye(len(lines.up_bps), dtype=bool), np.inf, 1.0)
    return lines._replace(link_bps=ones)


def _busiest(outcome: Outcome, lines: Lines) -> tuple[str, float]:
    """The name of the link or NIC that the exchange occupies longest, and for how long."""
    bits = 8 * outcome.sent_bytes
    links, ups, downs = bits / lines.link_bps, bits.sum(1) / lines.up_bps, bits.sum(0) / lines.down_bps
    source, target = np.unravel_index(int(links.argmax()), links.shape)
    found = (
        (links, f"link node-{source} → node-{target}"),
        (ups, f"NIC of node-{int(ups.argmax())} (sending)"),
        (downs, f"NIC of node-{int(downs.argmax())} (receiving)"),
    )
    taken_s, name = max(found, key=lambda kind: float(kind[0].max()))
    longest_s = float(taken_s.max())
    alike = int((taken_s > longest_s * (1 - 1e-3)).sum()) - 1
    return f"{name}, and {alike} more as busy" if alike and longest_s > 0 else name, longest_s


COMPUTE, BANDWIDTH, LATENCY, AVERAGING = (
    "devices twice as fast",
    "twice the bandwidth",
    "no latency",
    "no averaging",
)


def _remedies(model: Model, costs: Costs, lines: Lines, exchange_s: float, round_s: float) -> tuple[Remedy, ...]:
    every = model.config.train.sync_every
    fast, wide, near = costs.slowed(0.5), lines.scaled(2), lines.without_latency()
    return (
        Remedy(COMPUTE, model.simulate(fast, lines).step_s + round_s / every),
        Remedy(BANDWIDTH, model.simulate(costs, wide).step_s + round_s / every),
        Remedy(LATENCY, model.simulate(costs, near).step_s + round_s / every),
        Remedy(AVERAGING, exchange_s),
    )


def _bottleneck(remedies: tuple[Remedy, ...], busiest: str, step_s: float, config: Config) -> str:
    """The cause that the best remedy removes. More bandwidth helps both, but averaging has a name of its own."""
    best = min(remedies, key=lambda remedy: remedy.step_s)
    if best.what == COMPUTE or best.step_s > step_s * (1 - 1e-6):
        return "compute"
    every = config.train.sync_every
    rounds = "averaging every step" if every == 1 else f"averaging every {every} steps"
    names = {BANDWIDTH: busiest, LATENCY: "latency", AVERAGING: rounds}
    return names[best.what]
