"""Network profiles: rates, latencies and who shares what, as data.

`NetConfig` is the `[net]` section of a run's config, `ProfileConfig` the content of a profile's TOML file or inline
table; both are strings with units, as written. `resolve` turns them into a `Profile`: numbers in bits per second,
seconds and bytes, which is all that `netem.shaper` looks at. Built-in profiles are the files in `netem/profiles/`.
"""

from __future__ import annotations

import tomllib
from importlib import resources
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from netem.config import Section, Tree, convert, load_toml
from netem.errors import ConfigError
from netem.limits import KIB, MIB
from netem.names import plain
from netem.units import format_rate, format_time, parse_rate, parse_size, parse_time

Scope = Literal["link", "nic"]

ANY = "*"
_STALL_S = 0.1  # credit covers so long a stall of either process on top of the round trip
_STALL_BYTES = 32 * MIB
_LEAST_WINDOW_BYTES = MIB


class PairConfig(Section, frozen=True, rename={"source": "from", "target": "to"}):
    """`[[pairs]]`: one direction between two nodes that differs from the rest. What is left out is inherited."""

    source: Annotated[str, Meta(description="sending node's name, or *")]
    target: Annotated[str, Meta(description="receiving node's name, or *")]
    rate: Annotated[str | None, Meta(description="rate of this link, such as '50 Mbit/s'")] = None
    latency: Annotated[str | None, Meta(description="one-way latency of this link, such as '80 ms'")] = None


class ProfileConfig(Section, frozen=True):
    """The content of a profile file."""

    rate: Annotated[str, Meta(description="'300 Mbit/s' of each link, or of each NIC and direction; 'unlimited'")]
    latency: Annotated[str, Meta(description="one-way latency")] = "0 ms"
    burst: Annotated[str, Meta(description="bytes that may leave at once after idle time")] = "0 B"
    scope: Annotated[Scope, Meta(description="what has the rate: each link, or each NIC over all its links")] = "link"
    pairs: Annotated[tuple[PairConfig, ...], Meta(description="links that differ from the rest")] = ()

    def check(self, path: str) -> None:
        _resolve("", self, None, path)


class NetConfig(Section, frozen=True):
    """`[net]`: the emulated network."""

    profile: Annotated[
        str | ProfileConfig,
        Meta(description="a built-in profile's name, the path of a profile's TOML file, or an inline table"),
    ] = "internet-300mbps"
    rate: Annotated[str | None, Meta(description="in place of the profile's rate")] = None
    latency: Annotated[str | None, Meta(description="in place of the profile's latency")] = None
    scope: Annotated[Scope | None, Meta(description="in place of the profile's scope")] = None
    window: Annotated[
        str | None, Meta(description="credit per link, such as '8 MB'; by default what the link needs to stay full")
    ] = None

    def check(self, path: str) -> None:
        resolve(self, path)


class Shape(msgspec.Struct, frozen=True):
    """One link: `rate_bps` None is unlimited (in scope `nic`: limited by the NICs alone)."""

    rate_bps: float | None
    latency_s: float
    burst_bytes: int


class Pair(msgspec.Struct, frozen=True):
    """An override of one direction. `has_rate` tells an unlimited rate from one that is inherited."""

    source: str
    target: str
    has_rate: bool
    rate_bps: float | None
    latency_s: float | None


class Profile(msgspec.Struct, frozen=True, kw_only=True):
    """A network, in numbers. `rate_bps` None is unlimited; windows and segments are sized by rate unless set."""

    name: str = "unshaped"
    scope: Scope = "link"
    rate_bps: float | None = None
    latency_s: float = 0.0
    burst_bytes: int = 0
    window_bytes: int | None = None
    segment_size_bytes: int | None = None
    pairs: tuple[Pair, ...] = ()

    @property
    def nic_rate_bps(self) -> float | None:
        """The rate of each NIC and direction; None in scope `link` and where it is unlimited."""
        return self.rate_bps if self.scope == "nic" else None

    def link(self, source: str, target: str) -> Shape:
        """The link from `source` to `target`, by either of their names (`netem.names`).

        Of several pairs that match, later ones go over earlier ones.
        """
        source, target = plain(source), plain(target)
        rate_bps = None if self.scope == "nic" else self.rate_bps
        latency_s = self.latency_s
        for pair in self.pairs:
            if pair.source in (source, ANY) and pair.target in (target, ANY):
                if pair.has_rate:
                    rate_bps = pair.rate_bps
                if pair.latency_s is not None:
                    latency_s = pair.latency_s
        return Shape(rate_bps, latency_s, self.burst_bytes)

    def segment_bytes(self, rate_bps: float | None) -> int:
        """64 KiB up to 1 Gbit/s, so that turns are short; 1 MiB above, where cost per segment decides."""
        if self.segment_size_bytes is not None:
            return self.segment_size_bytes
        return MIB if rate_bps is None or rate_bps > 1e9 else 64 * KIB

    def credit_bytes(self, source: str, target: str) -> int:
        """The window of the link: the round trip's bytes, plus a stall of either process, unless it is set."""
        if self.window_bytes is not None:
            return self.window_bytes
        bytes_per_s = self._bytes_per_s(source, target)
        if bytes_per_s is None:
            return _STALL_BYTES
        window_bytes = bytes_per_s * self._latencies_s(source, target) + min(bytes_per_s * _STALL_S, _STALL_BYTES)
        return max(round(window_bytes), _LEAST_WINDOW_BYTES)

    def round_trip_s(self, source: str, target: str) -> float:
        """How long an acknowledgement may take that has a full window before it."""
        bytes_per_s = self._bytes_per_s(source, target)
        queue_s = 0.0 if bytes_per_s is None else self.credit_bytes(source, target) / bytes_per_s
        return self._latencies_s(source, target) + queue_s

    def _bytes_per_s(self, source: str, target: str) -> float | None:
        rates = [rate for rate in (self.link(source, target).rate_bps, self.nic_rate_bps) if rate is not None]
        return min(rates) / 8 if rates else None

    def _latencies_s(self, source: str, target: str) -> float:
        return self.link(source, target).latency_s + self.link(target, source).latency_s

    def __str__(self) -> str:
        what = "each NIC" if self.scope == "nic" else "each link"
        return f"{self.name} ({format_rate(self.rate_bps)} for {what}, latency {format_time(self.latency_s)})"


UNSHAPED = Profile()


def builtin_names() -> list[str]:
    """The profiles that come with Isthmus."""
    return sorted(entry.name.removesuffix(".toml") for entry in _folder().iterdir() if entry.name.endswith(".toml"))


def resolve(config: NetConfig, path: str = "net.") -> Profile:
    """The `Profile` that `config` asks for. Raises `ConfigError`; `path` prefixes the keys it names."""
    if isinstance(config.profile, ProfileConfig):
        name, profile = "inline", config.profile
    else:
        name = Path(config.profile).stem if _is_path(config.profile) else config.profile
        profile = convert(ProfileConfig, _load(config.profile, f"{path}profile"), f"{path}profile")
    changes = {key: getattr(config, key) for key in ("rate", "latency", "scope") if getattr(config, key) is not None}
    if changes:
        name += " with " + ", ".join(f"{key} {value}" for key, value in changes.items())
        profile = msgspec.structs.replace(profile, **changes)
    window_bytes = None if config.window is None else parse_size(config.window, f"{path}window")
    if window_bytes is not None and window_bytes < 64 * KIB:
        raise ConfigError(f"{path}window = {config.window!r}: at least one segment, '66 KB'")
    return _resolve(name, profile, window_bytes, path)


def _resolve(name: str, config: ProfileConfig, window_bytes: int | None, path: str) -> Profile:
    latency_s = parse_time(config.latency, f"{path}latency")
    pairs = []
    for index, pair in enumerate(config.pairs):
        at = f"{path}pairs[{index}]."
        rate_bps = None if pair.rate is None else parse_rate(pair.rate, f"{at}rate")
        pair_latency_s = None if pair.latency is None else parse_time(pair.latency, f"{at}latency")
        pairs.append(Pair(pair.source, pair.target, pair.rate is not None, rate_bps, pair_latency_s))
    return Profile(
        name=name,
        scope=config.scope,
        rate_bps=parse_rate(config.rate, f"{path}rate"),
        latency_s=latency_s,
        burst_bytes=parse_size(config.burst, f"{path}burst"),
        window_bytes=window_bytes,
        pairs=tuple(pairs),
    )


def _is_path(text: str) -> bool:
    return text.endswith(".toml") or "/" in text


def _load(text: str, key: str) -> Tree:
    if _is_path(text):
        return load_toml(Path(text))
    if text not in builtin_names():
        raise ConfigError(
            f"{key} = {text!r}: no such profile; built in are {', '.join(builtin_names())}, "
            "or give the path of a TOML file, such as my-network.toml"
        )
    return tomllib.loads((_folder() / f"{text}.toml").read_text(encoding="utf-8"))


def _folder() -> resources.abc.Traversable:
    return resources.files("netem") / "profiles"
