"""Traces: the measured rate of a line over time. Strict parsers, and a step function.

A trace has rows of time and rate, in TOML or CSV, or is in Mahimahi's packet-delivery format (Netravali et al., USENIX
ATC 2015): each line is an opportunity to deliver a packet of 1,504 bytes, in whole milliseconds, and the trace repeats.
A line of this network has a rate and no packet slots, so opportunities become rates over windows; each window carries
as many bytes as its opportunities. Errors name the file and the line.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from netem.config import Section
from netem.errors import ConfigError
from netem.network import ANY, CUT_BPS
from netem.units import parse_rate, parse_time

PACKET_BYTES = 1504
"""Bytes of one opportunity in Mahimahi: an Ethernet payload and the four bytes of a TUN header."""
CUT = "cut"
"""The rate of a trace while nothing passes."""
MOST_ROWS = 1_000_000
_WITH_UNITS, _NUMBERS = ["time", "rate"], ["time_s", "rate_bps"]


class TraceConfig(Section, frozen=True):
    """`[[traces]]`: a line whose rate follows a trace."""

    node: Annotated[str, Meta(description="the line's node: a name, a pattern or a site; all nodes by default")] = ANY
    direction: Annotated[
        Literal["up", "down", "both"], Meta(description="the direction of the line that follows the trace")
    ] = "both"
    rows: Annotated[
        tuple[tuple[str, str], ...], Meta(description="times and rates, the first at 0 s; 'cut' lets nothing pass")
    ] = ()
    csv: Annotated[
        str | None, Meta(description="a CSV file with the header time,rate (with units) or time_s,rate_bps (numbers)")
    ] = None
    mahimahi: Annotated[str | None, Meta(description="a file in Mahimahi's packet-delivery format")] = None
    window: Annotated[str, Meta(description="for mahimahi: length of the windows over which rates are taken")] = (
        "100 ms"
    )
    period: Annotated[
        str | None,
        Meta(description="for rows and csv: time after which the trace repeats; by default the last rate stays"),
    ] = None


class Trace(msgspec.Struct, frozen=True):
    """A step function: `rates_bps[i]` from `times_s[i]` on. Times rise from 0; with `period_s` the trace repeats."""

    times_s: tuple[float, ...]
    rates_bps: tuple[float | None, ...]
    period_s: float | None = None

    def rate_at(self, t_s: float) -> float | None:
        """The rate at `t_s`, at least 0; None is unlimited."""
        _, index = self._place(t_s)
        return self.rates_bps[index]

    def next_change_s(self, t_s: float) -> float:
        """When the row after the one at `t_s` begins; infinite after the last one."""
        began_s, index = self._place(t_s)
        if index + 1 < len(self.times_s):
            return began_s + self.times_s[index + 1]
        if self.period_s is None or len(self.times_s) == 1:
            return math.inf
        return self._begins_s(t_s, 1)

    def dilated(self, factor: float) -> Trace:
        """The same trace on a clock that runs `factor` times slower."""
        return Trace(
            tuple(time_s * factor for time_s in self.times_s),
            tuple(None if rate_bps is None else rate_bps / factor for rate_bps in self.rates_bps),
            None if self.period_s is None else self.period_s * factor,
        )

    def _place(self, t_s: float) -> tuple[float, int]:
        """The start of the period at `t_s`, and the row, with the same rounding as in `next_change_s`."""
        began_s = self._begins_s(t_s, 0)
        return began_s, bisect_right(self.times_s, t_s, key=lambda time_s: began_s + time_s) - 1

    def _begins_s(self, t_s: float, later: int) -> float:
        """The start of the period at `t_s`, or of the one `later` periods after it."""
        if self.period_s is None:
            return 0.0
        number = math.floor(t_s / self.period_s)
        if (number + 1) * self.period_s <= t_s:
            number += 1
        elif number * self.period_s > t_s:
            number -= 1
        return (number + later) * self.period_s


def trace_of(config: TraceConfig, path: str, folder: Path) -> Trace:
    """The trace that `config` describes; file paths are relative to `folder`. Raises `ConfigError`."""
    given = [key for key in ("rows", "csv", "mahimahi") if getattr(config, key)]
    if len(given) != 1:
        raise ConfigError(f"{path.rstrip('.')}: expected exactly one of rows, csv and mahimahi")
    if config.mahimahi is not None:
        if config.period is not None:
            raise ConfigError(f"{path}period = {config.period!r}: goes with rows and csv; mahimahi has its own")
        window_s = parse_time(config.window, f"{path}window")
        if window_s <= 0:
            raise ConfigError(f"{path}window = {config.window!r}: expected more than 0")
        return parse_mahimahi(*_lines(config.mahimahi, f"{path}mahimahi", folder), window_s)
    if config.csv is not None:
        pairs = parse_csv(*_lines(config.csv, f"{path}csv", folder))
    else:
        pairs = [_row(time, rate, f"{path}rows[{index}]", units=True) for index, (time, rate) in enumerate(config.rows)]
    period_s = None if config.period is None else parse_time(config.period, f"{path}period")
    times_s, rates_bps = zip(*_ascending(pairs), strict=True)
    trace = Trace(times_s, rates_bps, period_s)
    if period_s is not None and period_s <= trace.times_s[-1]:
        raise ConfigError(f"{path}period = {config.period!r}: expected more than the time of the last row")
    return trace


def parse_csv(name: str, lines: Sequence[str]) -> list[tuple[str, float, float | None]]:
    """Place, time and rate of each row of a CSV file. Raises `ConfigError` with the line's number."""
    header = [cell.strip() for cell in lines[0].split(",")] if lines else []
    if header not in (_WITH_UNITS, _NUMBERS):
        raise ConfigError(f"{name}, line 1: expected the header {','.join(_WITH_UNITS)} or {','.join(_NUMBERS)}")
    pairs = []
    for number, line in enumerate(lines[1:], start=2):
        cells = line.split(",")
        if len(cells) != 2:
            raise ConfigError(f"{name}, line {number}: {line!r}: expected a time, a comma and a rate")
        pairs.append(_row(cells[0], cells[1], f"{name}, line {number}", units=header == _WITH_UNITS))
    if not pairs:
        raise ConfigError(f"{name}, line 2: expected a time and a rate")
    return pairs


def parse_mahimahi(name: str, lines: Sequence[str], window_s: float) -> Trace:
    """Rates over windows of about `window_s`, of which a whole number make up the trace. Raises `ConfigError`.

    As in Mahimahi, the last line is also the period. An opportunity between two windows belongs to the earlier one, so
    that each period carries all its opportunities, the one at its end included.
    """
    times_ms: list[int] = []
    for number, line in enumerate(lines, start=1):
        text = line.strip()
        if not (text.isascii() and text.isdigit() and len(text) <= 12):
            raise ConfigError(f"{name}, line {number}: {line!r}: expected a whole number of milliseconds")
        if times_ms and int(text) < times_ms[-1]:
            raise ConfigError(f"{name}, line {number}: {text}: expected at least {times_ms[-1]}, the line before")
        times_ms.append(int(text))
    if not times_ms or not times_ms[-1]:
        raise ConfigError(f"{name}: expected a last line of more than 0 milliseconds: it says how long the trace is")
    period_ms = times_ms[-1]
    windows = max(1, round(period_ms / 1000 / window_s))
    if windows > MOST_ROWS:
        raise ConfigError(f"{name}: {windows} windows of {window_s:g} s; expected at most {MOST_ROWS}")
    packets = [0] * windows
    for time_ms in times_ms:
        packets[max(0, -(-time_ms * windows // period_ms) - 1)] += 1
    width_s = period_ms / 1000 / windows
    times_s = tuple(index * width_s for index in range(windows))
    return Trace(times_s, tuple(count * PACKET_BYTES * 8 / width_s for count in packets), period_ms / 1000)


def _row(time: str, rate: str, where: str, *, units: bool) -> tuple[str, float, float | None]:
    if units:
        rate_bps = CUT_BPS if rate.strip() == CUT else parse_rate(rate.strip(), where)
        return where, parse_time(time, where), rate_bps
    return where, _number(time, where), _number(rate, where)


def _number(text: str, where: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise ConfigError(f"{where}: {text.strip()!r}: expected a number of 0 or more")
    return value


def _ascending(pairs: Iterable[tuple[str, float, float | None]]) -> Iterable[tuple[float, float | None]]:
    """The rows. Raises `ConfigError` if the first is not at time 0, or another one not after the row before it."""
    before_s = -1.0
    for where, time_s, rate_bps in pairs:
        if before_s < 0 and time_s != 0:
            raise ConfigError(f"{where}: {time_s:g} s: expected the first time to be 0")
        if time_s <= before_s:
            raise ConfigError(f"{where}: {time_s:g} s: expected more than {before_s:g} s, the row before")
        before_s = time_s
        yield time_s, rate_bps


def _lines(name: str, key: str, folder: Path) -> tuple[str, list[str]]:
    """The file's name for messages, and its lines."""
    path = folder / name
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        raise ConfigError(f"{key} = {name!r}: there is no such file in {folder}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{key} = {name!r}: cannot be read: {error}") from None
    if len(lines) > MOST_ROWS:
        raise ConfigError(f"{key} = {name!r}: {len(lines)} lines; expected at most {MOST_ROWS}")
    return name, lines
