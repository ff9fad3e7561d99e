"""The whole benchmark: arms in turns on one wire, the local step, messages alone, and the scaling.

Everything that is compared is measured in one call on one machine. Arms take turns, round by round, so that other load
affects all of them; the figure of an arm is the median over all its measured steps.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

from netem.errors import IsthmusError
from netem.verify.lan import Lan, lan
from node.config import load_config, save_config
from node.lab.bench.arms import BASELINE, NODES, PEERS, QUICK_NODES, QUICK_PEERS, SCALED_NODES, NodeArm, PeerArm
from node.lab.bench.local import Local, measure_local
from node.lab.bench.nodes import run_nodes
from node.lab.bench.peers import peers
from node.lab.bench.wire import Carried, measure_wire

Say = Callable[[str], None]
MB = 1_000_000


class Plan(NamedTuple):
    """What is measured, and how often."""

    config: Path
    overrides: tuple[str, ...]
    nodes: int
    rate_bps: float
    peer_arms: tuple[PeerArm, ...]
    node_arms: tuple[NodeArm, ...]
    rounds: int
    peer_steps: int
    """Steps of a peer in each round, beside one cold step."""
    node_steps: int
    local_rounds: int
    wire_sizes: tuple[int, ...]
    scaling: tuple[Point, ...]


class Point(NamedTuple):
    """One change from the benchmark's setting: nodes, tokens of a context as a share of its own, the NIC's rate."""

    nodes: int
    context_share: float
    rate_bps: float | None


class ArmFigures(NamedTuple):
    """An arm's measured steps."""

    name: str
    steps_s: list[float]
    utilisation: float | None = None
    """Of the busiest sender's NIC, as a mean over the step; only of Isthmus, which counts its bytes."""
    off: dict[str, float] | None = None
    """How far a peer's loss and gradient are from those of one process."""
    compresses: bool = False

    @property
    def step_s(self) -> float:
        return median(self.steps_s)


class Scaled(NamedTuple):
    """The arms at one point of the scaling."""

    point: Point
    context: int
    step_s: dict[str, float]


class Found(NamedTuple):
    """Everything that was measured."""

    arms: list[ArmFigures]
    left_out: dict[str, str]
    """Arms that do not work here, and why."""
    local: list[Local]
    wire: list[Carried]
    scaled: list[Scaled]
    load: tuple[float, float]
    """The machine's load average before and after, over one minute."""
    cores: int


def plan(config: Path, overrides: tuple[str, ...], nodes: int, rate_bps: float, quick: bool) -> Plan:
    """What to measure; with `quick` less of it."""
    if quick:
        return Plan(config, overrides, nodes, rate_bps, QUICK_PEERS, QUICK_NODES, 1, 3, 5, 5, (8 * MB,), ())
    points = [Point(count, 1.0, rate_bps) for count in (2, 4) if count < nodes]
    points += [Point(nodes, 2.0, rate_bps)]
    points += [Point(nodes, 1.0, rate) for rate in (rate_bps / 3, rate_bps * 10 / 3, None)]
    return Plan(config, overrides, nodes, rate_bps, PEERS, NODES, 2, 3, 5, 9, (1 * MB, 8 * MB), tuple(points))


def measure(wanted: Plan, folder: Path, say: Say) -> Found:
    """Measure everything; raw files go to `folder`. Raises `IsthmusError` where a process fails."""
    before = os.getloadavg()[0]
    say("a local step against a plain Llama")
    chunks = load_config(wanted.config, wanted.overrides).model.chunks
    local = [measure_local(wanted.config, count, wanted.local_rounds, folder) for count in sorted({1, chunks})]
    with lan(wanted.nodes, wanted.rate_bps) as net:
        say("messages alone on the wire")
        wire = measure_wire(net, wanted.wire_sizes, 3)
        arms, left_out = _arms(net, wanted, folder, say)
    scaled = [_point(point, wanted, folder, say) for point in wanted.scaling]
    return Found(arms, left_out, local, wire, scaled, (before, os.getloadavg()[0]), os.cpu_count() or 1)


def common_settings(wanted: Plan, nodes: int, share: float = 1.0) -> list[str]:
    """Settings that all arms have in common: contiguous ownership, one chunk a node."""
    context = round(load_config(wanted.config, wanted.overrides).model.context * share)
    return [
        *wanted.overrides,
        f"--model.context={context}",
        f"--model.chunks={nodes}",
        f"--coordinator.nodes={nodes}",
        "--coordinator.assignment=contiguous",
        "--coordinator.chunks_per_node=[]",
    ]


def _arms(net: Lan, wanted: Plan, folder: Path, say: Say) -> tuple[list[ArmFigures], dict[str, str]]:
    common = common_settings(wanted, wanted.nodes)
    config_path = _peer_config(wanted, common, folder, "peers")
    peer_steps: dict[PeerArm, list[float]] = {}
    node_steps: dict[NodeArm, list[float]] = {arm: [] for arm in wanted.node_arms}
    used: dict[NodeArm, list[float]] = {arm: [] for arm in wanted.node_arms}
    off: dict[PeerArm, dict[str, float]] = {}
    left_out: dict[str, str] = {}
    with peers(net.hosts, net.device, config_path, folder / "peers.log") as ranks:
        for peer in wanted.peer_arms:
            checked = ranks.check(peer)
            if isinstance(checked, str):
                left_out[peer.name] = checked
            else:
                off[peer], peer_steps[peer] = checked, []
        for turn in range(wanted.rounds):
            for peer, steps_s in peer_steps.items():
                say(f"round {turn + 1} of {wanted.rounds}: {peer.name}")
                steps_s += ranks.steps_s(peer, 1 + wanted.peer_steps)[1:]
            for arm in wanted.node_arms:
                say(f"round {turn + 1} of {wanted.rounds}: {arm.name}")
                run = run_nodes(net, wanted.config, arm, common, wanted.node_steps, folder)
                node_steps[arm] += run.steps_s
                used[arm].append(run.busiest_bps / wanted.rate_bps)
    figures = [ArmFigures(peer.name, steps_s, None, off[peer]) for peer, steps_s in peer_steps.items()]
    figures += [
        ArmFigures(arm.name, steps_s, median(used[arm]), None, arm.compresses) for arm, steps_s in node_steps.items()
    ]
    return figures, left_out


def _point(point: Point, wanted: Plan, folder: Path, say: Say) -> Scaled:
    common = common_settings(wanted, point.nodes, point.context_share)
    name = f"scaled-{point.nodes}-{point.context_share:g}-{point.rate_bps or 0:g}"
    config_path = _peer_config(wanted, common, folder, name)
    context = load_config(config_path).model.context
    say(f"{point.nodes} nodes, {context} tokens, {rate_text(point.rate_bps)}")
    step_s: dict[str, float] = {}
    with lan(point.nodes, point.rate_bps) as net:
        with peers(net.hosts, net.device, config_path, folder / f"{name}.log") as ranks:
            step_s[BASELINE.name] = median(ranks.steps_s(BASELINE, 3)[1:])
        for arm in SCALED_NODES:
            step_s[arm.name] = median(run_nodes(net, wanted.config, arm, common, 3, folder).steps_s)
    return Scaled(point, context, step_s)


def _peer_config(wanted: Plan, common: Sequence[str], folder: Path, name: str) -> Path:
    config = load_config(wanted.config, [*common, "--compress.mode=dense", "--coordinator.address=tcp://127.0.0.1:0"])
    if config.model.context % (2 * config.coordinator.nodes) or config.model.heads % config.coordinator.nodes:
        raise IsthmusError(
            f"{wanted.config}: {config.model.context} tokens and {config.model.heads} heads cannot be shared out among "
            f"{config.coordinator.nodes} nodes, twice each for zigzag; name another config"
        )
    path = folder / f"{name}.toml"
    save_config(config, path)
    return path


def rate_text(rate_bps: float | None) -> str:
    """ "300 Mbit/s", or "unshaped"."""
    return "unshaped" if rate_bps is None else f"{rate_bps / 1e6:,.0f} Mbit/s"
