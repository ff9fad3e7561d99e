"""A network in numbers: bits per second, seconds, bytes. The shaper and the planner use these.

`Profile.link` describes one link, `nic_up_bps` and `nic_down_bps` a node's NICs, and `pair_bps` all of them together.
Times and rates are those of this host's wall clock. Under time dilation F (`dilated`) the emulated clock runs F times
slower: a second of the emulated network takes F seconds here, so rates are divided by F and latencies multiplied. A
report divides wall-clock times by `dilation` and multiplies rates, to give the figures of the emulated network. Compute
is not slowed: on the emulated clock it seems F times faster. So an emulated time is that of a computer F times as fast,
and can be compared only with runs of the same F, or with such a computer. Timeouts of the protocol (`netem.limits`,
heartbeats) stay in wall-clock seconds; the link's round trip is added to them.

`netem.profile` reads a network as people write it.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Literal, TypeVar

import msgspec

from netem.limits import KIB, MIB
from netem.names import plain
from netem.units import format_rate, format_time

Scope = Literal["link", "nic"]

ANY = "*"
CUT_BPS = 0.0
"""The rate of a link or line that is cut: nothing passes until it has another rate."""

_STALL_S = 0.1  # credit covers a stall of this length in either process, on top of the round trip
_STALL_BYTES = 32 * MIB
_LEAST_WINDOW_BYTES = MIB
_ACK_SHARE = 0.2  # of the time that credit lasts beyond a round trip; the rest is for stalls of either process
_LEAST_ACK_DELAY_S = 0.005  # with less, most segments would need an acknowledgement of their own
_RTO_FLOOR_S = 0.2  # Linux: RTO = smoothed RTT + at least 200 ms (TCP_RTO_MIN); RFC 6298 asks for a whole second

T = TypeVar("T")


class Shape(msgspec.Struct, frozen=True):
    """The figures of one link. `rate_bps` None is unlimited (in scope `nic`, limited by the NICs); 0 is cut."""

    rate_bps: float | None
    latency_s: float
    burst_bytes: int
    jitter_s: float = 0.0
    """Each segment's latency is drawn from latency ± jitter."""
    loss: float = 0.0
    """Probability that a packet is lost, and so arrives one retransmission timeout later."""
    timeout_s: float = 0.0
    """The retransmission timeout."""


class Pair(msgspec.Struct, frozen=True):
    """Other figures for the links from `source` to `target`: nodes, patterns or sites. None is inherited; for the
    rate, None is unlimited if `has_rate`, and else inherited."""

    source: str
    target: str
    has_rate: bool = False
    rate_bps: float | None = None
    latency_s: float | None = None
    jitter_s: float | None = None
    loss: float | None = None


class Line(msgspec.Struct, frozen=True):
    """Another rate for one direction of a node's line. `node` is a name, a pattern or a site."""

    node: str
    direction: Literal["up", "down"]
    rate_bps: float | None


class Site(msgspec.Struct, frozen=True):
    """Nodes in one place, given by names or patterns ("node-[0-3]")."""

    name: str
    nodes: tuple[str, ...]


class Profile(msgspec.Struct, frozen=True, kw_only=True):
    """A network. `rate_bps` None is unlimited; windows and segments are sized by rate unless set.

    Nodes are given by either of their names (`netem.names`). If several lines or pairs match, the last one wins.
    """

    name: str = "unshaped"
    scope: Scope = "link"
    rate_bps: float | None = None
    """The rate of each link, or of each NIC; `lines` and `pairs` may have others."""
    latency_s: float = 0.0
    jitter_s: float = 0.0
    loss: float = 0.0
    burst_bytes: int = 0
    window_bytes: int | None = None
    segment_size_bytes: int | None = None
    sites: tuple[Site, ...] = ()
    lines: tuple[Line, ...] = ()
    pairs: tuple[Pair, ...] = ()
    seed: int = 0
    dilation: float = 1.0
    """Wall-clock seconds in one emulated second. All other figures are in wall-clock seconds."""

    def link(self, source: str, target: str) -> Shape:
        """The link from `source` to `target`, without the NICs that it shares.

        In scope `link` its rate is the sender's up rate or the receiver's down rate, whichever is slower, unless a pair
        has another. In either scope it is cut if one of these three is `CUT_BPS`.
        """
        source, target = plain(source), plain(target)
        lines_bps = slowest(self._line_bps(source, "up"), self._line_bps(target, "down"))
        rate_bps = lines_bps if self.scope == "link" else None
        latency_s, jitter_s, loss = self._latency_s(source, target), self.jitter_s, self.loss
        for pair in self._pairs(source, target):
            rate_bps = pair.rate_bps if pair.has_rate else rate_bps
            jitter_s = _given(pair.jitter_s, jitter_s)
            loss = _given(pair.loss, loss)
        if lines_bps == CUT_BPS:
            rate_bps = CUT_BPS
        timeout_s = latency_s + self._latency_s(target, source) + _RTO_FLOOR_S * self.dilation if loss else 0.0
        return Shape(rate_bps, latency_s, self.burst_bytes, min(jitter_s, latency_s), loss, timeout_s)

    def nic_up_bps(self, node: str) -> float | None:
        """The rate at which `node` sends to all peers together; None in scope `link`, or if it is unlimited."""
        return self._line_bps(plain(node), "up") if self.scope == "nic" else None

    def nic_down_bps(self, node: str) -> float | None:
        """The rate at which `node` receives from all peers together; None as in `nic_up_bps`."""
        return self._line_bps(plain(node), "down") if self.scope == "nic" else None

    def pair_bps(self, source: str, target: str) -> float | None:
        """The rate of a pair that has the NICs for itself: the slowest of its link and the two NICs."""
        return slowest(self.link(source, target).rate_bps, self.nic_up_bps(source), self.nic_down_bps(target))

    def segment_bytes(self, rate_bps: float | None) -> int:
        """64 KiB up to 1 Gbit/s, so that turns are short; 1 MiB above, where the cost per segment matters."""
        if self.segment_size_bytes is not None:
            return self.segment_size_bytes
        return MIB if rate_bps is None or rate_bps > 1e9 else 64 * KIB

    def credit_bytes(self, source: str, target: str) -> int:
        """The window of the link: the bytes of a round trip and of a stall of either process, unless it is set."""
        if self.window_bytes is not None:
            return self.window_bytes
        rate_bps = self.pair_bps(source, target)
        if rate_bps is None:
            return _STALL_BYTES
        bytes_per_s = rate_bps / 8
        window_bytes = bytes_per_s * self._latencies_s(source, target) + min(bytes_per_s * _STALL_S, _STALL_BYTES)
        return max(round(window_bytes), _LEAST_WINDOW_BYTES)

    def ack_delay_s(self, source: str, target: str) -> float:
        """How long `target` may wait for data that carries its acknowledgement of what `source` sent."""
        rate_bps = self.pair_bps(source, target)
        spare_s = _STALL_S
        if rate_bps:
            window_s = 8 * self.credit_bytes(source, target) / rate_bps
            spare_s = min(spare_s, window_s - self._latencies_s(source, target))
        return max(_ACK_SHARE * spare_s, _LEAST_ACK_DELAY_S)

    def round_trip_s(self, source: str, target: str) -> float:
        """The longest regular time to an acknowledgement: with a full window ahead, and one lost packet on the way."""
        rate_bps = self.pair_bps(source, target)
        queue_s = 8 * self.credit_bytes(source, target) / rate_bps if rate_bps else 0.0
        return self._latencies_s(source, target) + queue_s + self.link(target, source).timeout_s

    def means(self, node: str, who: str) -> bool:
        """Whether `who`, a name, a pattern or a site, matches `node`."""
        return any(_among(node, site.nodes) for site in self.sites if site.name == who) or fnmatchcase(node, who)

    @property
    def shaped(self) -> bool:
        """Whether anything is emulated."""
        return any((self.rate_bps is not None, self.latency_s, self.loss, self.lines, self.pairs))

    def dilated(self, factor: float) -> Profile:
        """The same network on a clock that runs `factor` times slower; bytes and probabilities stay."""
        assert factor >= 1

        def rate(rate_bps: float | None) -> float | None:
            return None if rate_bps is None else rate_bps / factor

        def time(time_s: float | None) -> float | None:
            return None if time_s is None else time_s * factor

        change = msgspec.structs.replace
        return change(
            self,
            rate_bps=rate(self.rate_bps),
            latency_s=self.latency_s * factor,
            jitter_s=self.jitter_s * factor,
            lines=tuple(change(line, rate_bps=rate(line.rate_bps)) for line in self.lines),
            pairs=tuple(
                change(pair, rate_bps=rate(pair.rate_bps), latency_s=time(pair.latency_s), jitter_s=time(pair.jitter_s))
                for pair in self.pairs
            ),
            dilation=self.dilation * factor,
        )

    def _line_bps(self, node: str, direction: str) -> float | None:
        rate_bps = self.rate_bps
        for line in self.lines:
            if line.direction == direction and self.means(node, line.node):
                rate_bps = line.rate_bps
        return rate_bps

    def _pairs(self, source: str, target: str) -> list[Pair]:
        return [pair for pair in self.pairs if self.means(source, pair.source) and self.means(target, pair.target)]

    def _latencies_s(self, source: str, target: str) -> float:
        there, back = self.link(source, target), self.link(target, source)
        return there.latency_s + there.jitter_s + back.latency_s + back.jitter_s

    def _latency_s(self, source: str, target: str) -> float:
        latency_s = self.latency_s
        for pair in self._pairs(source, target):
            latency_s = _given(pair.latency_s, latency_s)
        return latency_s

    def __str__(self) -> str:
        """A line of text, in figures of the emulated network."""
        what = "each NIC" if self.scope == "nic" else "each link"
        parts = [f"{self._rates()} for {what}", f"latency {format_time(self.latency_s / self.dilation)}"]
        if self.jitter_s:
            parts[-1] += f" ± {format_time(self.jitter_s / self.dilation)}"
        if self.loss:
            parts.append(f"loss {100 * self.loss:.3g} %")
        if self.sites:
            parts.append(f"{len(self.sites)} sites")
        if self.dilation != 1:
            parts.append(f"time dilated {self.dilation:g} times")
        return f"{self.name} ({', '.join(parts)})"

    def _rates(self) -> str:
        up, down = (self._emulated_rate(direction) for direction in ("up", "down"))
        return up if up == down else f"{up} up and {down} down"

    def _emulated_rate(self, direction: str) -> str:
        """The rate of a node for which no line has its own."""
        rate_bps = self.rate_bps
        for line in self.lines:
            if line.direction == direction and line.node == ANY:
                rate_bps = line.rate_bps
        return format_rate(None if rate_bps is None else rate_bps * self.dilation)


UNSHAPED = Profile()


def slowest(*rates_bps: float | None) -> float | None:
    """The least of the rates; None, which is unlimited, if all are None."""
    return min((rate_bps for rate_bps in rates_bps if rate_bps is not None), default=None)


def _given(value: T | None, otherwise: T) -> T:
    return otherwise if value is None else value


def _among(node: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(node, pattern) for pattern in patterns)
