"""Quantities as people write them: "300 Mbit/s", "25 ms", "64 KB", "0.1 %".

Parsing is strict: a number, a space or none, and one unit from a closed list, since "300 Mb" has cost
people a factor of eight. Rates are in bits per second, times in seconds, sizes in bytes. Units are decimal
(KB = 1000 bytes) except KiB, MiB and GiB. Each quantity has bounds, which messages give in its own unit.
Users of these texts: `netem.profile`.
"""

from __future__ import annotations

import re

from netem.errors import ConfigError

UNLIMITED = "unlimited"

LEAST_RATE, MOST_RATE = "1 kbit/s", "1000 Tbit/s"
MOST_LATENCY = "60 min"
MOST_TIME = "100000 min"
"""About ten weeks: what happens later in a run than that is not scheduled."""
MOST_SIZE = "1000 GB"

_MICRO, _GREEK_MU = "\u00b5", "\u03bc"
"""Two characters that look alike; keyboards give the one or the other."""

_RATES = {"bit/s": 1.0, "kbit/s": 1e3, "Mbit/s": 1e6, "Gbit/s": 1e9, "Tbit/s": 1e12}
_TIMES = {"ns": 1e-9, "us": 1e-6, f"{_MICRO}s": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0}
_SIZES = {
    "B": 1.0,
    "KB": 1e3,
    "MB": 1e6,
    "GB": 1e9,
    "KiB": 1024.0,
    "MiB": 1024.0**2,
    "GiB": 1024.0**3,
}
_SHARES = {"%": 0.01}
_QUANTITY = re.compile(r"\s*(\d+(?:\.\d+)?(?:e[+-]?\d+)?)\s*([^\d\s.]\S*)?\s*", re.ASCII)


def parse_rate(text: str, key: str = "rate") -> float | None:
    """Bits per second of "300 Mbit/s"; None for "unlimited". `key` is named in the `ConfigError`."""
    if text.strip() == UNLIMITED:
        return None
    rate_bps = _parse(text, key, _RATES, "a rate such as '300 Mbit/s', or 'unlimited'")
    if rate_bps < _value(LEAST_RATE, _RATES):
        raise ConfigError(
            f"{key} = {text!r}: expected a rate of at least {LEAST_RATE!r}; to take a link away, leave its node out, "
            "or cut the link"
        )
    if rate_bps > _value(MOST_RATE, _RATES):
        raise ConfigError(f"{key} = {text!r}: expected a rate of at most {MOST_RATE!r}, or 'unlimited'")
    return rate_bps


def parse_latency(text: str, key: str = "latency") -> float:
    """Seconds of "25 ms", the time that something takes to arrive; at most an hour."""
    return parse_time(text, key, MOST_LATENCY)


def parse_time(text: str, key: str = "time", most: str = MOST_TIME) -> float:
    """Seconds of "30 s"; at most `most`, which is itself such a text."""
    time_s = _parse(text, key, _TIMES, "a time such as '25 ms'")
    if time_s > _value(most, _TIMES):
        raise ConfigError(f"{key} = {text!r}: expected a time of at most {most!r}")
    return time_s


def parse_size(text: str, key: str = "burst") -> int:
    """Whole bytes of "64 KB"."""
    size_bytes = _parse(text, key, _SIZES, "a size such as '64 KB'")
    if size_bytes > _value(MOST_SIZE, _SIZES):
        raise ConfigError(f"{key} = {text!r}: expected a size of at most {MOST_SIZE!r}")
    return round(size_bytes)


def parse_share(text: str, key: str = "loss") -> float:
    """A share of 1 of "0.1 %"; below one half, since a network that loses more is none."""
    share = _parse(text, key, _SHARES, "a share such as '0.1 %'")
    if share >= 0.5:
        raise ConfigError(f"{key} = {text!r}: expected less than '50 %'")
    return share


def format_rate(rate_bps: float | None) -> str:
    """ "300 Mbit/s"; three significant digits or more, such that whole figures stay whole."""
    if rate_bps is None:
        return UNLIMITED
    return _format(rate_bps, {unit: _RATES[unit] for unit in ("bit/s", "kbit/s", "Mbit/s", "Gbit/s", "Tbit/s")})


def format_time(seconds: float) -> str:
    """ "25 ms"."""
    return _format(seconds, {unit: _TIMES[unit] for unit in ("ns", "us", "ms", "s")})


def format_size(nbytes: float) -> str:
    """ "64 KB"."""
    return _format(nbytes, {unit: _SIZES[unit] for unit in ("B", "KB", "MB", "GB")})


def _parse(text: str, key: str, units: dict[str, float], expected: str) -> float:
    """The quantity in the base unit; infinite where it is too large for a number."""
    match = _QUANTITY.fullmatch(text)
    if match is None:
        raise ConfigError(f"{key} = {text!r}: expected {expected}")
    number, unit = match.groups()
    unit = unit and unit.replace(_GREEK_MU, _MICRO)
    if unit not in units:
        problem = f"{unit!r} is not a unit here" if unit else "the unit is missing"
        raise ConfigError(f"{key} = {text!r}: {problem}; expected {expected} ({', '.join(units)})")
    return float(number) * units[unit]


def _value(text: str, units: dict[str, float]) -> float:
    number, unit = text.split()
    return float(number) * units[unit]


def _format(value: float, units: dict[str, float]) -> str:
    """The largest unit in which the value is at least 1, `units` being in ascending order."""
    fitting = [unit for unit, scale in units.items() if value >= scale * (1 - 1e-12)]
    unit = fitting[-1] if fitting else next(iter(units))
    scaled = value / units[unit]
    text = f"{scaled:.6g}" if abs(scaled - round(scaled, 3)) < 1e-9 * max(scaled, 1) else f"{scaled:.3g}"
    return f"{text} {unit}"
