"""The prediction for one config on one network with one kind of device.

`Model` holds all that does not depend on the network, so that many networks can be tried (`Model.step_s`, bisection).
Utilisation is the duration of the step on a network without limits (same schedule, same imbalance) over its duration on
this network.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

import msgspec
import numpy as np

from netem.profile import Profile, resolve
from node.config import Config
from node.exchange.passes import PassSpec
from node.lab.plan.averaging import averaging_bytes, averaging_s, form_of
from node.lab.plan.costs import Costs
from node.lab.plan.documents import expected
from node.lab.plan.lines import Lines, lines_of
from node.lab.plan.memory import Memory, tightest
from node.lab.plan.simulate import Layer, Outcome, StepWork, simulate
from node.lab.plan.work import Array, head_work, layer_work, optimizer_work, parameters
from node.measure.devices import Device
from node.subspace.ranks import rank_table
from node.train.from_config import payload_format

UTILISATIONS = (0.5, 0.9, 0.95)
LEAST_BPS, MOST_BPS = 1e4, 1e15
PRECISION = 1.01
"""A bandwidth is searched to this factor."""


class Model:
    """The work of a config's ordinary step: the full context, after the warm start."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.spec = PassSpec(config.model.chunk_tokens, config.compress.compresses)
        self.payload = payload_format(config)
        self.tokens = config.model.context * config.train.batch
        self.parameters = parameters(config)
        self._grad_share = _grad_share(config, self.spec) if self.payload.budget_bytes else 1.0
        self.step = StepWork(
            config.assignment(),
            self._layers(),
            *head_work(config, self.spec),
            optimizer_work(config),
            config.train.micro_batches,
            expected(config, config.assignment(), self.spec.tokens).rows_CR,
            config.coordinator.relays,
        )

    @property
    def flops(self) -> float:
        """FLOPs of a step, all nodes."""
        works = [self.step.head_forward, self.step.head_backward]
        works += [stage.total() for layer in self.step.layers for way in layer.work for stage in way]
        return self.step.passes * float(sum(work.flops.sum() for work in works))

    def payload_bytes(self, layer: int, kind: str = "kv") -> float:
        """Bytes of one chunk of one layer in one pass, to one reader ("kv"), or of the gradient back ("grad")."""
        if layer < self.config.local_layers:
            return 0.0
        if self.payload.compresses(layer) and self.payload.budget_bytes:  # ranks are chosen in the run
            share = self._grad_share if kind == "grad" else 1.0
            return share * self.payload.budget_bytes / len(self.config.compressed)
        return float(self.payload.chunk_bytes(layer, self.spec, kind))

    def simulate(self, costs: Costs, lines: Lines) -> Outcome:
        """One step without averaging."""
        return simulate(self.step, costs, lines)

    def layers_s(self, costs: Costs) -> Array:
        """[R] compute time of all layers in a step, messages left out: attention, feed-forward and codecs."""
        seconds_R = np.zeros(self.step.assignment.n_ranks)
        for layer in self.step.layers:
            for way in layer.work:
                seconds_R += sum(costs.seconds(stage.without_messages().total()) for stage in way)
        return self.step.passes * seconds_R

    def evenness(self, costs: Costs) -> float:
        """Compute time of the layers on the node that has least of it, as a share of the one that has most."""
        seconds_R = self.layers_s(costs)
        return float(seconds_R.min() / seconds_R.max())

    def averaging_s(self, lines: Lines) -> float:
        """One round."""
        return averaging_s(self.parameters, lines, form_of(self.config))

    def step_s(self, costs: Costs, lines: Lines) -> float:
        """A step with its part of a round."""
        return self.simulate(costs, lines).step_s + self.averaging_s(lines) / self.config.train.sync_every

    def _layers(self) -> list[Layer]:
        """One object for all layers of a kind, so that the simulation reckons their times once."""
        kinds: dict[tuple[float, float, bool], Layer] = {}
        layers = []
        for index in range(self.config.model.layers):
            sizes = self.payload_bytes(index), self.payload_bytes(index, "grad")
            kind = (*sizes, self.payload.compresses(index))
            if kind not in kinds:
                theta_bytes = self.payload.theta_bytes(index, self.spec) if sizes[0] else 0
                work = layer_work(self.config, index, self.spec, *sizes)
                kinds[kind] = Layer(work, *sizes, float(theta_bytes))
            layers.append(kinds[kind])
        return layers


def _grad_share(config: Config, spec: PassSpec) -> float:
    """Bytes of a compressed gradient over those of its payload, where all ranks are as large as a budget allows."""
    table = rank_table(config.model, config.compress)
    payload = payload_format(config, table)

    def nbytes(rank: int) -> int:
        return sum(payload.codec_bytes(key, rank) for key in table.keys)

    least, greatest = payload.rank_bounds
    table.choose(
        dict.fromkeys(table.keys, max(least, bisect_right(range(1, greatest + 1), payload.budget_bytes, key=nbytes)))
    )
    sizes = {kind: sum(payload.chunk_bytes(layer, spec, kind) for layer in table.layers) for kind in ("kv", "grad")}
    return sizes["grad"] / sizes["kv"]


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
    owned: tuple[tuple[int, ...], ...]
    """Chunks of each node."""
    relays: bool
    """Whether readers pass payloads on."""
    passes: int
    """Passes of a step that are in flight together."""
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
    """Of the node that comes nearest to the memory of its device."""
    memory_node: int
    memory_limit_bytes: float
    bottleneck: str
    remedies: tuple[Remedy, ...]
    bandwidths: tuple[Bandwidth, ...]

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
    outcome, free_s = model.simulate(costs, lines), model.simulate(costs, unlimited(lines)).step_s
    busiest, communication_s = _busiest(outcome, lines)
    round_s = model.averaging_s(lines)
    step_s = outcome.step_s + round_s / config.train.sync_every
    remedies = _remedies(model, costs, lines, outcome.step_s, round_s)
    room = tightest(config, model.spec, model.payload, on)
    forward_waits, backward_waits = outcome.waits_s.max(2).tolist()
    assignment = model.step.assignment
    return Prediction(
        network=str(profile),
        scope=profile.scope,
        dilation=profile.dilation,
        nodes=config.coordinator.nodes,
        chunks=config.model.chunks,
        owned=tuple(assignment.chunks(rank) for rank in range(assignment.n_ranks)),
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
        waited_s=tuple(outcome.waited_s.tolist()),
        evenness=model.evenness(costs),
        forward_waits_s=tuple(forward_waits),
        backward_waits_s=tuple(backward_waits),
        communication_s=communication_s,
        averaging_s=round_s,
        sync_every=config.train.sync_every,
        averaging_bytes=averaging_bytes(model.parameters, config.coordinator.nodes, form_of(config)),
        sent_bytes=tuple(tuple(row) for row in outcome.sent_bytes.tolist()),
        memory=room.needed,
        memory_node=room.rank,
        memory_limit_bytes=room.limit_bytes,
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
