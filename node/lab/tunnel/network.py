"""The target's network, scaled, and written as a profile that `netem.profile` reads.

Rates are multiplied by one factor, latencies and jitter divided by another, and bursts scaled with the payloads; scope,
sites, lines, pairs and the share of lost packets stay.
"""

from __future__ import annotations

import msgspec

from netem.config import Tree, dump_toml
from netem.errors import ConfigError
from netem.network import Pair, Profile, slowest
from netem.profile import NetConfig, resolve, resolve_schedule
from netem.units import UNLIMITED
from node.lab.tunnel.similitude import Scale

DIGITS = 6
"""Digits of a scaled quantity, far more than any measurement here has."""


def target_profile(net: NetConfig) -> Profile:
    """The target's network. Raises `ConfigError` where it sets a dilation or a window, changes over time, or limits no
    rate."""
    for key, plain in (("dilation", 1.0), ("window", None)):
        if getattr(net, key) != plain:
            raise ConfigError(f"net.{key} = {getattr(net, key)!r}: the tunnel sets it; leave it out of the target")
    schedule = resolve_schedule(net)
    if schedule.timed or schedule.traced:
        raise ConfigError(f"--net {schedule.profile.name}: changes over time; the tunnel needs a network that stays")
    profile = resolve(net)
    rates_bps = [line.rate_bps for line in profile.lines] + [pair.rate_bps for pair in profile.pairs]
    if slowest(profile.rate_bps, *rates_bps) is None:
        raise ConfigError(f"--net {profile.name}: has no rate; the tunnel has nothing to keep in proportion")
    return profile


def scaled(profile: Profile, scale: Scale) -> Profile:
    """The tunnel's network."""

    def rate(rate_bps: float | None) -> float | None:
        return None if rate_bps is None else rate_bps * scale.rate

    def time(time_s: float | None) -> float | None:
        return None if time_s is None else time_s / scale.time

    change = msgspec.structs.replace
    return change(
        profile,
        name="tunnel",
        rate_bps=rate(profile.rate_bps),
        latency_s=profile.latency_s / scale.time,
        jitter_s=profile.jitter_s / scale.time,
        burst_bytes=round(profile.burst_bytes * scale.bytes),
        lines=tuple(change(line, rate_bps=rate(line.rate_bps)) for line in profile.lines),
        pairs=tuple(
            change(pair, rate_bps=rate(pair.rate_bps), latency_s=time(pair.latency_s), jitter_s=time(pair.jitter_s))
            for pair in profile.pairs
        ),
    )


def profile_toml(profile: Profile, comment: str) -> str:
    """The text of the profile's file; `comment` is at its head, line by line."""
    tree: Tree = {
        "rate": _rate(profile.rate_bps),
        "latency": _time(profile.latency_s),
        "jitter": _time(profile.jitter_s),
        "loss": f"{100 * profile.loss:.{DIGITS}g} %",
        "burst": f"{profile.burst_bytes} B",
        "scope": profile.scope,
        "lines": [{"node": line.node, line.direction: _rate(line.rate_bps)} for line in profile.lines],
        "pairs": [_pair(pair) for pair in profile.pairs],
        "sites": {site.name: list(site.nodes) for site in profile.sites},
    }
    head = "".join(f"# {line}\n" for line in comment.splitlines())
    return head + dump_toml({key: value for key, value in tree.items() if value not in ([], {})})


def _pair(pair: Pair) -> Tree:
    tree: Tree = {"from": pair.source, "to": pair.target}
    if pair.has_rate:
        tree["rate"] = _rate(pair.rate_bps)
    if pair.latency_s is not None:
        tree["latency"] = _time(pair.latency_s)
    if pair.jitter_s is not None:
        tree["jitter"] = _time(pair.jitter_s)
    if pair.loss is not None:
        tree["loss"] = f"{100 * pair.loss:.{DIGITS}g} %"
    return tree


def _rate(rate_bps: float | None) -> str:
    return UNLIMITED if rate_bps is None else f"{rate_bps / 1e6:.{DIGITS}g} Mbit/s"


def _time(time_s: float) -> str:
    return f"{time_s * 1e3:.{DIGITS}g} ms"
