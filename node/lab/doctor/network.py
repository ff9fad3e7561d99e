"""The profile that a measured network is. Machines become node-0, node-1 and so on in the order of their names, which
is how a run on one machine that emulates this network, and the planner, call their nodes.

Where links together carry clearly less than each of them alone, machines have a line that its links share (scope
`nic`); otherwise each link has a rate of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median
from typing import NamedTuple

from coordinator.survey.host import Survey, Way
from netem.config import Tree, dump_toml
from netem.units import format_rate, format_time

SHARED = 0.7
"""Links that carry no more than this share of their sum at once have a common line."""
CLOSE = 0.15
"""Rates that differ by no more are written as one."""
CLOSE_S = 0.002
LEAST_JITTER_S = 0.0005
LEAST_LOSS = 0.002
LEAST_SEGMENTS = 50


class Figures(NamedTuple):
    """A way that works."""

    rate_bps: float
    latency_s: float
    jitter_s: float
    loss: float | None


def figures_of(way: Way) -> Figures | None:
    """What a way carries; None where it does not work."""
    link = way.link
    if not link.echoed or not way.rate_bps:
        return None
    return Figures(way.rate_bps, link.latency_s, link.jitter_s, loss_of(way))


def loss_of(way: Way) -> float | None:
    """The share of TCP's segments at rest that had to be sent again; None where that is not known."""
    link = way.link
    return link.repeated / link.segments if link.segments >= LEAST_SEGMENTS else None


def nodes_of(survey: Survey) -> dict[str, str]:
    """Names in the profile by names of machines."""
    return {guest.name: f"node-{place}" for place, guest in enumerate(survey.guests)}


def profile_of(survey: Survey) -> Tree:
    """The content of a profile's file; empty where no way works."""
    nodes = nodes_of(survey)
    ways = {
        (nodes[source], nodes[target]): (way, figures)
        for (source, target), way in survey.ways.items()
        if (figures := figures_of(way)) is not None
    }
    if not ways:
        return {}
    found = {ends: figures for ends, (_, figures) in ways.items()}
    shared = {ends: way.shared_bps for ends, (way, _) in ways.items()}
    tree = _lines(found, shared) if _share_lines(found, shared) else _links(found)
    latency_s = median(one.latency_s for one in found.values())
    jitter_s = min(median(one.jitter_s for one in found.values()), latency_s)
    tree["latency"] = _time(latency_s)
    if jitter_s >= LEAST_JITTER_S:
        tree["jitter"] = _time(min(jitter_s, latency_s))
    pairs = {(pair["from"], pair["to"]): pair for pair in tree.pop("pairs", [])}
    for (source, target), one in found.items():
        pair = pairs.get((source, target), {"from": source, "to": target})
        if abs(one.latency_s - latency_s) > max(CLOSE_S, CLOSE * latency_s):
            pair["latency"] = _time(one.latency_s)
        if (one.loss or 0.0) >= LEAST_LOSS:
            pair["loss"] = f"{min(100 * (one.loss or 0.0), 49):.2g} %"
        if len(pair) > 2:
            pairs[source, target] = pair
    return tree | ({"pairs": list(pairs.values())} if pairs else {})


def as_toml(tree: Tree, survey: Survey) -> str:
    """The profile's file."""
    names = [f"# {node} is {name}" for name, node in nodes_of(survey).items()]
    broken = [f"# no connection from {one} to {two}" for (one, two), way in survey.ways.items() if not way.link.echoed]
    return "\n".join(["# Measured by isthmus doctor.", *names, *broken, dump_toml(tree)])


Ends = tuple[str, str]


def _share_lines(found: Mapping[Ends, Figures], shared: Mapping[Ends, float]) -> bool:
    votes = []
    for side in (0, 1):
        for node in {ends[side] for ends in found}:
            own = [ends for ends in found if ends[side] == node]
            if len(own) > 1:
                votes.append(sum(shared[ends] for ends in own) <= SHARED * sum(found[ends].rate_bps for ends in own))
    return sum(votes) * 2 > len(votes)


def _lines(found: Mapping[Ends, Figures], shared: Mapping[Ends, float]) -> Tree:
    """Scope `nic`: each machine's line up and down, and ways that are slower than both ends' lines."""
    rates: dict[str, dict[str, float]] = {"up": {}, "down": {}}
    for side, direction in enumerate(("up", "down")):
        for node in {ends[side] for ends in found}:
            own = [ends for ends in found if ends[side] == node]
            rates[direction][node] = max(sum(shared[ends] for ends in own), *(found[ends].rate_bps for ends in own))
    common = {direction: median(of.values()) for direction, of in rates.items()}
    tree: Tree = {"scope": "nic", **{direction: _rate(rate_bps) for direction, rate_bps in common.items()}}
    lines: list[Tree] = []
    for node in sorted({node for ends in found for node in ends}):
        line = {way: _rate(of[node]) for way, of in rates.items() if node in of and not _close(of[node], common[way])}
        if line:
            lines.append({"node": node, **line})
    pairs = [
        {"from": source, "to": target, "rate": _rate(one.rate_bps)}
        for (source, target), one in found.items()
        if one.rate_bps < (1 - CLOSE) * min(rates["up"][source], rates["down"][target])
    ]
    return tree | ({"lines": lines} if lines else {}) | {"pairs": pairs}


def _links(found: Mapping[Ends, Figures]) -> Tree:
    """Scope `link`: a rate for all, and the ways that differ."""
    common_bps = median(one.rate_bps for one in found.values())
    pairs = [
        {"from": source, "to": target, "rate": _rate(one.rate_bps)}
        for (source, target), one in found.items()
        if not _close(one.rate_bps, common_bps)
    ]
    return {"scope": "link", "rate": _rate(common_bps), "pairs": pairs}


def _close(one: float, other: float) -> bool:
    return abs(one - other) <= CLOSE * other


def _rate(rate_bps: float) -> str:
    return format_rate(max(1000.0, float(f"{rate_bps:.3g}")))


def _time(seconds: float) -> str:
    return format_time(float(f"{seconds:.3g}"))
