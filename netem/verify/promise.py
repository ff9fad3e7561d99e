"""How long a transfer should take, and whether a measured one is right. Arithmetic: no clock, no processes.

The promised time of a transfer is ``latency + (bits on the wire - burst) / rate``: bits as the shaper counts them
(headers included), less the burst that may leave at once after idle time. `error` compares the two times:
``promised / measured - 1``, negative if the host was slower. `measured_bps` is the rate with the same error, so that
``error == measured_bps / rate_bps - 1`` holds for a small transfer, which is mostly latency, and for a large one, where
it is bits over time.

A host takes some time of its own for a message of any size on any network: 0.2 ms if it is idle, 10 ms if its two cores
have other work. If that is more than half of the 3 % that a row may be off, and may explain the error, the row says
nothing about the network: it is shown, and not judged.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Literal

import msgspec

from netem.units import format_rate, format_size, format_time

TOLERANCE = 0.03
_EXPLAINED_DELAYS = 3  # in a shaped transfer, more than one thread may wake up late

Reference = Literal["clock", "tbf"]
Verdict = Literal["true", "untrusted"]


class Promise(msgspec.Struct, frozen=True):
    """The promised figures from one node to another. With `rate_bps` None, nothing is promised."""

    rate_bps: float | None
    latency_s: float = 0.0
    burst_bytes: int = 0

    def time_s(self, wire_bytes: float) -> float:
        """When the last of `wire_bytes` arrives, if all were sent at time 0 after idle time."""
        if self.rate_bps is None:
            return self.latency_s
        return self.latency_s + max(0.0, wire_bytes - self.burst_bytes) * 8 / self.rate_bps


class Host(msgspec.Struct, frozen=True):
    """What this host can carry between two processes."""

    loopback_bps: float
    """Payload rate of one flow between two endpoints, unshaped."""
    shaped_bps: float
    """The same with a shaper whose rate is so high that it never waits."""
    delay_s: float
    """Time from `send` in one process to arrival in the other, of 64 KiB, unshaped; nine in ten take no longer."""
    busy_delay_s: float
    """The same while all cores have other work."""
    cores: int

    def own_delay_s(self, busy: bool) -> float:
        return self.busy_delay_s if busy else self.delay_s


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One measurement: the median of its repeats. `bytes` are payload, of each flow if there are several."""

    profile: str
    bytes: int
    flows: int
    busy: bool
    """Whether all cores had other work."""
    reference: Reference
    """What shaped the transfer: our `clock`, or the kernel's `tbf`."""
    rate_bps: float | None
    """The promised rate of the link, or of the measured share of it."""
    measured_bps: float
    error: float | None
    promised_s: float
    measured_s: float
    judged: bool
    case: str = ""
    """In the suites: the case that this row measures."""

    @property
    def missed(self) -> bool:
        """Whether this row alone makes the verdict `untrusted`."""
        return self.reference == "clock" and self.judged and self.error is not None and abs(self.error) > TOLERANCE

    def __str__(self) -> str:
        flows = f" in {self.flows} flows" if self.flows > 1 else ""
        case = f", {self.case}" if self.case else ""
        return f"{self.profile}{case}, {format_size(self.bytes)}{flows}, cores {'busy' if self.busy else 'idle'}"


class Certificate(msgspec.Struct, frozen=True):
    """All measurements and the verdict. `skipped` says what could not be measured, and why."""

    host: Host
    rows: list[Row]
    verdict: Verdict
    reason: str
    skipped: str | None = None


def judge_row(
    promise: Promise,
    samples: Sequence[tuple[float, float]],
    delay_s: float,
    *,
    profile: str,
    nbytes: int,
    flows: int = 1,
    busy: bool = False,
    reference: Reference = "clock",
    case: str = "",
) -> Row:
    """A row from `samples`, the seconds and wire bytes (over all flows) of each repeat.

    `delay_s` is the host's own delay. Without a promised rate there is no error.
    """
    wire_bytes = statistics.median(sample[1] for sample in samples)
    measured_s = max(statistics.median(sample[0] for sample in samples), 1e-9)
    promised_s = promise.time_s(wire_bytes)
    error = promised_s / measured_s - 1 if promise.rate_bps is not None else None
    long_enough = promised_s * TOLERANCE / 2 >= delay_s
    measured_bps = wire_bytes * 8 / measured_s
    if promise.rate_bps is not None and error is not None:
        measured_bps = promise.rate_bps * (1 + error)
    return Row(
        profile=profile,
        bytes=nbytes,
        flows=flows,
        busy=busy,
        reference=reference,
        rate_bps=promise.rate_bps,
        measured_bps=measured_bps,
        error=error,
        promised_s=promised_s,
        measured_s=measured_s,
        judged=error is not None and (long_enough or abs(measured_s - promised_s) > _EXPLAINED_DELAYS * delay_s),
        case=case,
    )


def certify(host: Host, rows: Sequence[Row], skipped: str | None = None, dilation: float = 1.0) -> Certificate:
    """The verdict on all rows of our shaper. The kernel's rows are for comparison, and do not count.

    `dilation` is the factor at which the rows were measured; a proposed dilation is a multiple of it.
    """
    ours = [row for row in rows if row.reference == "clock"]
    beyond = max((row for row in ours if row.rate_bps), key=lambda row: row.rate_bps or 0.0, default=None)
    if beyond is not None and beyond.rate_bps is not None and beyond.rate_bps > host.loopback_bps:
        factor = mending_dilation(beyond.rate_bps, host.shaped_bps) * dilation
        reason = (
            f"{beyond.profile} asks for {format_rate(beyond.rate_bps)}, and this host carries "
            f"{format_rate(round_rate(host.loopback_bps))} over loopback; slow the emulated clock down: "
            f"--net.dilation {factor:g}"
        )
        return Certificate(host, list(rows), "untrusted", reason, skipped)
    missed = [row for row in ours if row.missed]
    if missed:
        worst = max(missed, key=lambda row: abs(row.error or 0.0))
        return Certificate(host, list(rows), "untrusted", _reason(worst, len(missed), len(ours)), skipped)
    judged = [abs(row.error or 0.0) for row in ours if row.judged]
    if not judged and any(row.rate_bps for row in ours):
        reason = f"no row is long enough to judge: this host's own delay is {_delays(host)}"
        return Certificate(host, list(rows), "untrusted", reason, skipped)
    if not judged:
        return Certificate(host, list(rows), "true", "the profile promises no rate that could be missed", skipped)
    short = len(ours) - len(judged)
    reason = f"{len(judged)} of {len(ours)} rows judged, at most {max(judged):.1%} off"
    if short:
        reason += f"; {short} too short to judge: this host's own delay is {_delays(host)}"
    return Certificate(host, list(rows), "true", reason, skipped)


def mending_dilation(asked_bps: float, carried_bps: float) -> float:
    """The smallest of 2, 5, 10, 20, 50 … that brings `asked_bps` under half of what the host carries."""
    least = max(2.0, 2 * asked_bps / carried_bps)
    exponent = math.floor(math.log10(least))
    steps = (digit * 10.0**power for power in (exponent, exponent + 1) for digit in (1, 2, 5))
    return next(step for step in steps if step >= least * (1 - 1e-9))


def round_rate(rate_bps: float) -> float:
    """The rate in two digits: a host's figure has no more accuracy."""
    return float(f"{rate_bps:.2g}")


def _delays(host: Host) -> str:
    idle, busy = (format_time(float(f"{host.own_delay_s(busy):.2g}")) for busy in (False, True))
    return f"{idle} idle and {busy} busy"


def _reason(worst: Row, missed: int, rows: int) -> str:
    assert worst.error is not None
    way = "slower" if worst.error < 0 else "faster"
    return (
        f"{missed} of {rows} rows are more than {TOLERANCE:.0%} off; the worst is {worst}: "
        f"{abs(worst.error):.1%} {way} than promised"
    )
