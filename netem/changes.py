"""Changes of a network while it runs: rates and latencies that are set, links that are cut and healed. No clock.

`ChangeConfig` is a change as people write it, with units. `Change` is the same in numbers, on the emulated clock.
`changed` applies changes to a profile. `netem.schedule` knows when they happen.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated

import msgspec
from msgspec import Meta

from netem.config import Section
from netem.errors import ConfigError
from netem.names import OPERATOR
from netem.network import ANY, CUT_BPS, Line, Pair, Profile
from netem.units import format_rate, format_time, parse_latency, parse_rate

Who = Annotated[str, Meta(min_length=1, max_length=64)]
"""A node's name, a pattern, or a site's name."""


class _Change(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="change", tag=str.lower):
    """The base class of all changes. What may come over the wire is bounded here."""


class Tune(_Change, frozen=True, kw_only=True):
    """Set a rate or latency: for one node's line, for one pair in both directions, or without `ends` for everything.

    Without `ends`, lines, pairs and traces that differed from the rest no longer differ.
    """

    ends: Annotated[tuple[Who, ...], Meta(max_length=2)] = ()
    has_rate: bool = False
    rate_bps: Annotated[float, Meta(gt=0, le=1e15)] | None = None
    """None means unlimited if `has_rate` is set."""
    latency_s: Annotated[float, Meta(ge=0, le=3600)] | None = None

    def __str__(self) -> str:
        rate = [f"rate {format_rate(self.rate_bps)}"] if self.has_rate else []
        latency = [] if self.latency_s is None else [f"latency {format_time(self.latency_s)}"]
        return f"{', '.join(rate + latency)} {self._where()}"

    def _where(self) -> str:
        if not self.ends:
            return "everywhere"
        return f"for {self.ends[0]}" if len(self.ends) == 1 else f"between {self.ends[0]} and {self.ends[1]}"


class Cut(_Change, frozen=True, kw_only=True):
    """Nothing passes between these two in either direction until the cut is healed. Rates that are set meanwhile take
    effect then."""

    ends: tuple[Who, Who]

    def __str__(self) -> str:
        return f"{self.ends[0]} and {self.ends[1]} cut"


class Heal(_Change, frozen=True, kw_only=True):
    """Undo the cut between these two; without `ends`, undo all cuts."""

    ends: Annotated[tuple[Who, ...], Meta(max_length=2)] = ()

    def __str__(self) -> str:
        return f"{self.ends[0]} and {self.ends[1]} healed" if self.ends else "all cuts healed"


class Reset(_Change, frozen=True, kw_only=True):
    """Go back to what the profile states."""

    def __str__(self) -> str:
        return "back to the profile"


Change = Tune | Cut | Heal | Reset


class ChangeConfig(Section, frozen=True):
    """A change: rate or latency (of a node, a pair, or everything), or else one of cut, heal and reset."""

    rate: Annotated[str | None, Meta(description="rate from then on, such as '50 Mbit/s'")] = None
    latency: Annotated[str | None, Meta(description="one-way latency from then on, such as '80 ms'")] = None
    node: Annotated[
        str | None, Meta(description="the node whose line changes, up and down: a name, a pattern, a site")
    ] = None
    pair: Annotated[
        tuple[str, str] | None, Meta(description="two nodes, between which the links change, both ways")
    ] = None
    cut: Annotated[tuple[str, str] | None, Meta(description="two nodes, between which nothing passes from then on")] = (
        None
    )
    heal: Annotated[bool | tuple[str, str], Meta(description="undo the cut between these two; true: undo all cuts")] = (
        False
    )
    reset: Annotated[bool, Meta(description="go back to the profile's own rates and latencies, without cuts")] = False


def change_of(config: ChangeConfig, path: str) -> Change:
    """The change in numbers. Raises `ConfigError`; `path` is the prefix of the keys that it names."""
    tunes = config.rate is not None or config.latency is not None
    kinds = (tunes, config.cut is not None, config.heal is not False, config.reset)
    if sum(kinds) != 1:
        raise ConfigError(f"{path.rstrip('.')}: expected either rate or latency, or one of cut, heal and reset")
    for key in ("node", "pair"):
        if getattr(config, key) is not None and not tunes:
            raise ConfigError(f"{path}{key} = {getattr(config, key)!r}: goes with rate or latency only")
    if config.node is not None and config.pair is not None:
        raise ConfigError(f"{path}node = {config.node!r}: expected node or pair, not both")
    if config.cut is not None:
        return Cut(ends=_two(config.cut, f"{path}cut"))
    if config.heal is not False:
        return Heal(ends=() if config.heal is True else _two(config.heal, f"{path}heal"))
    if config.reset:
        return Reset()
    one = () if config.node is None else (_who(config.node, f"{path}node"),)
    return Tune(
        ends=one if config.pair is None else _two(config.pair, f"{path}pair"),
        has_rate=config.rate is not None,
        rate_bps=None if config.rate is None else parse_rate(config.rate, f"{path}rate"),
        latency_s=None if config.latency is None else parse_latency(config.latency, f"{path}latency"),
    )


def changed(profile: Profile, changes: Sequence[Change]) -> Profile:
    """`profile` after `changes`, in their order. Setting a rate does not undo a cut."""
    tunes: list[Tune] = []
    for change in changes:
        match change:
            case Tune():
                tunes.append(change)
            case Reset():
                tunes.clear()
    for tune in tunes:
        profile = _tuned(profile, tune)
    cuts = open_cuts(changes)
    pairs = tuple(way for cut in cuts for way in _both_ways(cut.ends, has_rate=True, rate_bps=CUT_BPS))
    if cuts:  # the operator who is to heal them must still get answers
        pairs += (Pair(ANY, OPERATOR, has_rate=True),)
    return msgspec.structs.replace(profile, pairs=profile.pairs + pairs)


def open_cuts(changes: Iterable[Change]) -> list[Cut]:
    """The cuts that are not healed after `changes`."""
    cuts: list[Cut] = []
    for change in changes:
        match change:
            case Cut():
                cuts.append(change)
            case Heal():
                cuts = [cut for cut in cuts if change.ends and set(cut.ends) != set(change.ends)]
            case Reset():
                cuts = []
    return cuts


def heals_something(heal: Heal, changes: Iterable[Change]) -> bool:
    """Whether `heal`, after `changes`, names a cut that there is. Healing all cuts is allowed when
    there are none."""
    return not heal.ends or any(set(cut.ends) == set(heal.ends) for cut in open_cuts(changes))


def _tuned(profile: Profile, tune: Tune) -> Profile:
    rate_bps = None if tune.rate_bps is None else tune.rate_bps / profile.dilation
    latency_s = None if tune.latency_s is None else tune.latency_s * profile.dilation
    replace = msgspec.structs.replace
    if not tune.ends:
        if tune.has_rate:
            pairs = tuple(replace(pair, has_rate=False, rate_bps=None) for pair in profile.pairs)
            profile = replace(profile, rate_bps=rate_bps, lines=(), pairs=pairs)
        if latency_s is not None:
            pairs = tuple(replace(pair, latency_s=None) for pair in profile.pairs)
            profile = replace(profile, latency_s=latency_s, pairs=pairs)
        return profile
    if len(tune.ends) == 2:
        ways = _both_ways(tune.ends, has_rate=tune.has_rate, rate_bps=rate_bps, latency_s=latency_s)
        return replace(profile, pairs=profile.pairs + ways)
    node = tune.ends[0]
    if tune.has_rate:
        lines = (Line(node, "up", rate_bps), Line(node, "down", rate_bps))
        profile = replace(profile, lines=profile.lines + lines)
    if latency_s is not None:
        profile = replace(profile, pairs=profile.pairs + _both_ways((node, ANY), latency_s=latency_s))
    return profile


def _both_ways(
    ends: tuple[str, ...], *, has_rate: bool = False, rate_bps: float | None = None, latency_s: float | None = None
) -> tuple[Pair, Pair]:
    there = Pair(ends[0], ends[1], has_rate=has_rate, rate_bps=rate_bps, latency_s=latency_s)
    return there, msgspec.structs.replace(there, source=ends[1], target=ends[0])


def _two(ends: tuple[str, str], key: str) -> tuple[str, str]:
    if ends[0] == ends[1] and not set("*?[") & set(ends[0]):
        raise ConfigError(f"{key} = {list(ends)}: expected two different nodes")
    return _who(ends[0], key), _who(ends[1], key)


def _who(text: str, key: str) -> str:
    if not 0 < len(text) <= 64:
        raise ConfigError(f"{key} = {text!r}: expected a node's name, a pattern or a site's name")
    return text
