"""Network profiles as people write them: TOML with units, strict.

`NetConfig` is the `[net]` section of a run's config; `ProfileConfig` is the content of a profile's TOML file or inline
table. Both hold strings with units, as written. `resolve` turns them into the numbers of a `Profile` (`netem.network`),
which all other modules use. `resolve_schedule` adds what changes over time (`netem.schedule`). Built-in profiles are
the files in `netem/profiles/`.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from netem.changes import Change, ChangeConfig, Heal, change_of, heals_something
from netem.config import Section, Tree, convert, load_toml, user_path
from netem.errors import ConfigError
from netem.limits import KIB
from netem.network import ANY, UNSHAPED, Line, Pair, Profile, Scope, Shape, Site, slowest
from netem.schedule import Schedule, Timed, TracedLine
from netem.trace import TraceConfig, trace_of
from netem.units import parse_latency, parse_rate, parse_share, parse_size, parse_time

__all__ = [
    "UNSHAPED",
    "NetConfig",
    "Pair",
    "Profile",
    "ProfileConfig",
    "Shape",
    "builtin_names",
    "resolve",
    "resolve_schedule",
]


class LinkConfig(Section, frozen=True):
    """`[inside]`, `[between]`: links that differ from the rest. A key that is left out is inherited."""

    rate: Annotated[str | None, Meta(description="rate of each such link, such as '50 Mbit/s'")] = None
    latency: Annotated[str | None, Meta(description="one-way latency, such as '80 ms'")] = None
    jitter: Annotated[str | None, Meta(description="how far latency varies, such as '5 ms'")] = None
    loss: Annotated[str | None, Meta(description="share of packets that are lost, such as '0.1 %'")] = None


class PairConfig(LinkConfig, frozen=True, kw_only=True, rename={"source": "from", "target": "to"}):
    """`[[pairs]]`: a link from one node to another that differs from the rest, or both links of a pair."""

    source: Annotated[str, Meta(description="sending node's name, a pattern (node-*), or a site's name")]
    target: Annotated[str, Meta(description="receiving node's name, a pattern, or a site's name")]
    both: Annotated[bool, Meta(description="whether the link back has these figures too")] = False


class LineConfig(Section, frozen=True):
    """`[[lines]]`: a node whose own line differs from the rest."""

    node: Annotated[str, Meta(description="the node's name, a pattern, or a site's name")]
    up: Annotated[str | None, Meta(description="the rate at which it sends")] = None
    down: Annotated[str | None, Meta(description="the rate at which it receives")] = None


class TimedConfig(ChangeConfig, frozen=True, kw_only=True):
    """`[[schedule]]`: a change and its time."""

    at: Annotated[str, Meta(description="when, counted from the run's start, such as '30 s'")]


class ProfileConfig(Section, frozen=True):
    """The content of a profile file."""

    rate: Annotated[
        str | None, Meta(description="'300 Mbit/s' of each link, or of each NIC and direction; 'unlimited'")
    ] = None
    up: Annotated[str | None, Meta(description="the rate at which a node sends, in place of rate")] = None
    down: Annotated[str | None, Meta(description="the rate at which a node receives, in place of rate")] = None
    latency: Annotated[str, Meta(description="one-way latency")] = "0 ms"
    jitter: Annotated[str, Meta(description="largest random change of a segment's latency; order is kept")] = "0 ms"
    loss: Annotated[str, Meta(description="share of packets that are lost, and repeated by TCP after a timeout")] = (
        "0 %"
    )
    burst: Annotated[str, Meta(description="bytes that may leave at once after idle time")] = "0 B"
    scope: Annotated[
        Scope, Meta(description="what has the rate: 'link' is each pair and direction, 'nic' each node and direction")
    ] = "link"
    sites: Annotated[
        dict[str, tuple[str, ...]], Meta(description="nodes in one place, such as east = ['node-0', 'node-[1-3]']")
    ] = msgspec.field(default_factory=dict)
    inside: Annotated[LinkConfig | None, Meta(description="links inside a site, if they differ")] = None
    between: Annotated[LinkConfig | None, Meta(description="links between sites, if they differ")] = None
    lines: Annotated[tuple[LineConfig, ...], Meta(description="nodes whose line differs from the rest")] = ()
    pairs: Annotated[tuple[PairConfig, ...], Meta(description="links that differ from the rest")] = ()
    schedule: Annotated[tuple[TimedConfig, ...], Meta(description="changes during a run")] = ()
    traces: Annotated[tuple[TraceConfig, ...], Meta(description="lines whose rate follows a trace")] = ()

    def check(self, path: str) -> None:
        _resolve("", self, path)


class NetConfig(Section, frozen=True):
    """`[net]`: the emulated network."""

    profile: Annotated[
        str | ProfileConfig,
        Meta(description="The name of a built-in profile, the path of a profile's TOML file, or an inline table."),
    ] = "internet-300mbps"
    rate: Annotated[
        str | None, Meta(description="Rate up and down, such as '50 Mbit/s', in place of the profile's.")
    ] = None
    latency: Annotated[str | None, Meta(description="One-way latency, such as '25 ms', in place of the profile's.")] = (
        None
    )
    scope: Annotated[
        Scope | None,
        Meta(
            description="link: each link has the rate to itself; nic: all links of a node share it. In place of the "
            "profile's."
        ),
    ] = None
    window: Annotated[
        str | None,
        Meta(
            description="Bytes that may be under way on each link, such as '8 MB'; by default as many as keep it full."
        ),
    ] = None
    dilation: Annotated[
        float,
        Meta(
            description="Factor by which the network is slowed: rates are divided by it and latencies multiplied. "
            "Compute then seems faster by the same factor, and rates that this host cannot carry come into reach.",
            ge=1,
            le=1e6,
        ),
    ] = 1.0
    seed: Annotated[int, Meta(description="Seed of jitter and loss.", ge=0)] = 0

    def check(self, path: str) -> None:
        resolve_schedule(self, path)


def builtin_names() -> list[str]:
    """The names of the profiles that come with Isthmus."""
    return sorted(entry.name.removesuffix(".toml") for entry in _folder().iterdir() if entry.name.endswith(".toml"))


def resolve(config: NetConfig, path: str = "net.") -> Profile:
    """The `Profile` that `config` describes, before any change. Raises `ConfigError`; `path` is the prefix of the keys
    that it names."""
    name, profile, _ = _read(config, path)
    window_bytes = None if config.window is None else parse_size(config.window, f"{path}window")
    if window_bytes is not None and window_bytes < 64 * KIB:
        raise ConfigError(f"{path}window = {config.window!r}: at least one segment, '66 KB'")
    network = msgspec.structs.replace(_resolve(name, profile, path), window_bytes=window_bytes, seed=config.seed)
    return network.dilated(config.dilation)


def resolve_schedule(config: NetConfig, path: str = "net.") -> Schedule:
    """The same over time, with the profile's scheduled changes and its lines' traces. Raises `ConfigError`.

    Paths of traces are relative to the folder of the profile's file.
    """
    _, profile, folder = _read(config, path)
    at = f"{path}profile."
    traced = []
    for index, line in enumerate(profile.traces):
        directions = ("up", "down") if line.direction == "both" else (line.direction,)
        trace = trace_of(line, f"{at}traces[{index}].", folder).dilated(config.dilation)
        traced.append(TracedLine(line.node, directions, trace))
    return Schedule(resolve(config, path), traced=tuple(traced)).with_timed(_timed(profile, config.dilation, at))


def _read(config: NetConfig, path: str) -> tuple[str, ProfileConfig, Path]:
    """The profile's name, its content with the overrides of `config`, and its folder."""
    if isinstance(config.profile, ProfileConfig):
        name, profile, folder = "inline", config.profile, Path()
    else:
        is_path, key = _is_path(config.profile), f"{path}profile"
        name = Path(config.profile).stem if is_path else config.profile
        profile = convert(ProfileConfig, _load(config.profile, key), key)
        folder = user_path(config.profile, key).parent if is_path else Path(str(_folder()))
    changes: dict[str, Any] = {
        key: getattr(config, key) for key in ("rate", "latency", "scope") if getattr(config, key) is not None
    }
    if changes:
        name += " with " + ", ".join(f"{key} {value}" for key, value in changes.items())
        if config.rate is not None:
            traces = tuple(line for line in profile.traces if line.node != ANY)
            changes |= {"up": None, "down": None, "traces": traces}
        profile = msgspec.structs.replace(profile, **changes)
    return name, profile, folder


def _timed(profile: ProfileConfig, dilation: float, at: str) -> list[Timed]:
    """The changes that `profile` schedules, in wall-clock seconds. A heal must have a cut before it."""
    timed = []
    for index, entry in enumerate(profile.schedule):
        key = f"{at}schedule[{index}]."
        at_s = parse_time(entry.at, f"{key}at") * dilation
        timed.append((at_s, key, change_of(entry, key)))
    before: list[Change] = []
    for _, key, change in sorted(timed, key=lambda one: one[0]):
        if isinstance(change, Heal) and not heals_something(change, before):
            raise ConfigError(f"{key}heal = {list(change.ends)}: expected two nodes that an earlier entry cuts")
        before.append(change)
    return [Timed(at_s=at_s, change=change) for at_s, _, change in timed]


def _resolve(name: str, config: ProfileConfig, path: str) -> Profile:
    """Raises `ConfigError` for a value that is no quantity, is missing, or contradicts another."""
    if config.rate is None and (config.up is None or config.down is None):
        raise ConfigError(f"{path}rate: expected a rate such as '300 Mbit/s', or both up and down")
    if (config.inside or config.between) and not config.sites:
        raise ConfigError(f"{path}sites: expected sites, since inside or between is given")
    latency_s = parse_latency(config.latency, f"{path}latency")
    jitter_s = parse_latency(config.jitter, f"{path}jitter")
    if jitter_s > latency_s:
        raise ConfigError(f"{path}jitter = {config.jitter!r}: expected at most the latency ({config.latency})")
    up_bps = parse_rate(config.up or config.rate or "", f"{path}{'up' if config.up else 'rate'}")
    down_bps = parse_rate(config.down or config.rate or "", f"{path}{'down' if config.down else 'rate'}")
    lines = [Line(ANY, "up", up_bps), Line(ANY, "down", down_bps)] if up_bps != down_bps else []
    for index, line in enumerate(config.lines):
        at = f"{path}lines[{index}]."
        lines += [Line(line.node, "up", parse_rate(line.up, f"{at}up"))] if line.up else []
        lines += [Line(line.node, "down", parse_rate(line.down, f"{at}down"))] if line.down else []
    return Profile(
        name=name,
        scope=config.scope,
        rate_bps=slowest(up_bps, down_bps),
        latency_s=latency_s,
        jitter_s=jitter_s,
        loss=parse_share(config.loss, f"{path}loss"),
        burst_bytes=parse_size(config.burst, f"{path}burst"),
        sites=tuple(Site(site, nodes) for site, nodes in config.sites.items()),
        lines=tuple(lines),
        pairs=tuple(_pairs(config, path)),
    )


def _pairs(config: ProfileConfig, path: str) -> Iterator[Pair]:
    """The links between sites, then those inside them, then single pairs: later ones win."""
    if config.between is not None:
        yield _pair(ANY, ANY, config.between, f"{path}between.")
    if config.inside is not None:
        for site in config.sites:
            yield _pair(site, site, config.inside, f"{path}inside.")
    for index, pair in enumerate(config.pairs):
        at = f"{path}pairs[{index}]."
        yield _pair(pair.source, pair.target, pair, at)
        if pair.both:
            yield _pair(pair.target, pair.source, pair, at)


def _pair(source: str, target: str, link: LinkConfig, at: str) -> Pair:
    return Pair(
        source,
        target,
        has_rate=link.rate is not None,
        rate_bps=None if link.rate is None else parse_rate(link.rate, f"{at}rate"),
        latency_s=None if link.latency is None else parse_latency(link.latency, f"{at}latency"),
        jitter_s=None if link.jitter is None else parse_latency(link.jitter, f"{at}jitter"),
        loss=None if link.loss is None else parse_share(link.loss, f"{at}loss"),
    )


def _is_path(text: str) -> bool:
    return text.endswith(".toml") or "/" in text


def _load(text: str, key: str) -> Tree:
    if _is_path(text):
        return load_toml(user_path(text, key))
    if text not in builtin_names():
        raise ConfigError(
            f"{key} = {text!r}: no such profile; built in are {', '.join(builtin_names())}, "
            "or give the path of a TOML file, such as my-network.toml"
        )
    return tomllib.loads((_folder() / f"{text}.toml").read_text(encoding="utf-8"))


def _folder() -> resources.abc.Traversable:
    return resources.files("netem") / "profiles"
