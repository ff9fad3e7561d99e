"""The prediction for one config on one network with one kind of device.

`Model` holds all that does not depend on the network, so that many networks can be tried (`Model.step_s`, bisection).
Utilisation is the duration of the step on a network without limits (same schedule, same imbalance) over its duration on
this network.
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec
import numpy as np

from netem.profile import Profile, resolve
from node.config import Config
from node.exchange.passes import PassSpec
from node.exchange.payload import PayloadFormat
from node.lab.plan.averaging import averaging_bytes, averaging_s
from node.lab.plan.costs import Costs
from node.lab.plan.lines import Lines, lines_of
from node.lab.plan.memory import Memory, memory
from node.lab.plan.simulate import Layer, Outcome, StepWork, simulate
from node.lab.plan.work import head_work, layer_work, optimizer_work, parameters
from node.measure.devices import Device

UTILISATIONS = (0.5, 0.9, 0.95)
LEAST_BPS, MOST_BPS = 1e4, 1e15
PRECISION = 1.01
"""A bandwidth is searched to this factor."""


class Model:
    """The work of a config's ordinary step: the full context, after the warm start."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.spec = PassSpec(config.model.chunk_tokens, config.compressed_layers > 0)
        self.payload = PayloadFormat(config)
        self.tokens = config.model.context * config.train.batch
        self.parameters = parameters(config)
        self.step = StepWork(config.assignment(), self._layers(), *head_work(config, self.spec), optimizer_work(config))

    @property
    def flops(self) -> float:
        """FLOPs of a step, all nodes."""
        works = [self.step.head_forward, self.step.head_backward]
        works += [stage.total() for layer in self.step.layers for way in layer.work for stage in way]
        return float(sum(work.flops.sum() for work in works))

    def payload_bytes(self, layer: int) -> float:
        """Bytes of one chunk of one layer, to one reader, one way."""
        if layer < self.config.local_layers:
            return 0.0
        if self.payload.compresses(layer) and self.payload.budget_bytes:
            return self.payload.budget_bytes / self.config.compressed_layers  # ranks are chosen in the run
        return float(self.payload.chunk_bytes(layer, self.spec))

    def simulate(self, costs: Costs, lines: Lines) -> Outcome:
        """One step without averaging."""
        return simulate(self.step, costs, lines)

    def averaging_s(self, lines: Lines) -> float:
        """One round."""
        return averaging_s(self.parameters, lines)

    def step_s(self, costs: Costs, lines: Lines) -> float:
        """A step with its part of a round."""
        return self.simulate(costs, lines).step_s + self.averaging_s(lines) / self.config.train.sync_every

    def _layers(self) -> list[Layer]:
        """One object for all layers of a kind, so that the simulation reckons their times once."""
        kinds: dict[tuple[float, bool], Layer] = {}
        layers = []
        for index in range(self.config.model.layers):
            nbytes = self.payload_bytes(index)
            kind = (nbytes, self.payload.compresses(index))
            if kind not in kinds:
                theta_bytes = self.payload.theta_bytes(index, self.spec) if nbytes else 0
                kinds[kind] = Layer(layer_work(self.config, index, self.spec, nbytes), nbytes, float(theta_bytes))
            layers.append(kinds[kind])
        return layers


class Bandwidth(NamedTuple):
    """The rate at which a utilisation is reached; None where latency alone makes it impossible."""

    utilisation: float
    rate_bps: float | None


class Remedy(NamedTuple):
    """An improvement, and the duration of a step with it."""

    what: str
    step_s: float


class Prediction(msgspec.Struct, frozen=True, kw_only=True):
    """The figures of a step; times in seconds."""

    network: str
    scope: str
    dilation: float
    """Wall-clock seconds in one second of the emulated network. All times here are of the wall clock."""
    nodes: int
    chunks: int
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
    """By node."""
    waited_s: tuple[float, ...]
    """By node: waiting for messages in the middle of the step."""
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
    memory_limit_bytes: float
    bottleneck: str
    remedies: tuple[Remedy, ...]
    bandwidths: tuple[Bandwidth, ...]

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.step_s

    @property
    def fits(self) -> bool:
        """Whether the fullest node's device has the memory."""
        return self.memory.device <= self.memory_limit_bytes

    @property
    def exposed_s(self) -> float:
        """Communication that compute does not hide, averaging included."""
        return self.step_s - self.free_s

    @property
    def utilisation(self) -> float:
        return self.free_s / self.step_s


def predict(config: Config, costs: Costs, device: Device) -> Prediction:
    """Predict a config. Raises `ConfigError` where the network or the payloads are impossible."""
    profile = resolve(config.net)
    model = Model(config)
    lines = lines_of(profile, config.coordinator.nodes)
    outcome, free_s = model.simulate(costs, lines), model.simulate(costs, unlimited(lines)).step_s
    busiest, communication_s = _busiest(outcome, lines)
    round_s = model.averaging_s(lines)
    step_s = outcome.step_s + round_s / config.train.sync_every
    remedies = _remedies(model, costs, lines, outcome.step_s, round_s)
    return Prediction(
        network=str(profile),
        scope=profile.scope,
        dilation=profile.dilation,
        nodes=config.coordinator.nodes,
        chunks=config.model.chunks,
        context=config.model.context,
        tokens=model.tokens,
        parameters=model.parameters,
        flops=model.flops,
        step_s=step_s,
        exchange_step_s=outcome.step_s,
        free_s=free_s,
        compute_s=tuple(outcome.busy_s.tolist()),
        waited_s=tuple(outcome.waited_s.tolist()),
        communication_s=communication_s,
        averaging_s=round_s,
        sync_every=config.train.sync_every,
        averaging_bytes=averaging_bytes(model.parameters, config.coordinator.nodes),
        sent_bytes=tuple(tuple(row) for row in outcome.sent_bytes.tolist()),
        memory=memory(config, model.spec, model.payload, device),
        memory_limit_bytes=device.memory_bytes,
        bottleneck=_bottleneck(remedies, busiest, step_s, config),
        remedies=remedies,
        bandwidths=_bandwidths(model, costs, _at_least_one_rate(lines, profile), free_s),
    )


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
    while high / low > PRECISION:
        middle = float(np.sqrt(low * high))
        low, high = (low, middle) if reaches(middle) else (middle, high)
    return high


def _bandwidths(model: Model, costs: Costs, lines: Lines, free_s: float) -> tuple[Bandwidth, ...]:
    """The rates for `UTILISATIONS`, which rise with them. One node needs no network."""
    found: list[Bandwidth] = []
    if model.step.assignment.n_ranks == 1:
        return ()
    least_bps = LEAST_BPS
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
