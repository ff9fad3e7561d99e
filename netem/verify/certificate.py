"""A profile's certificate: which transfers are made for it, and how long that takes.

Every kind of link that a profile has among eight nodes is measured, once: 64 KB to 64 MB, in one flow and in four,
with idle and with busy cores; and again under the kernel's bucket where there is one. Transfers that the profile
itself makes longer than `LONGEST_S` are left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import msgspec

from netem.network import CUT_BPS, Profile
from netem.units import format_rate
from netem.verify.kernel import unavailable
from netem.verify.measure import Say, clock_row, endpoints, kernel_rows, measure_host, repeats_for
from netem.verify.party import busy_cores
from netem.verify.promise import Certificate, Host, Promise, Row, certify

SIZES_BYTES = (64_000, 256_000, 1_000_000, 4_000_000, 16_000_000, 64_000_000)
QUICK_SIZES_BYTES = (64_000, 1_000_000, 16_000_000)
FLOWS = (1, 4)
LONGEST_S = 8.0

_NODES = 8
_MOST_WAYS = 4
_HOST_S = 6.0  # the host's own figures, and starting processes
_START_S = 1.5
_PAUSE_S = 0.04  # between two transfers


class Way(NamedTuple):
    """One kind of link of a profile, and two nodes that have it."""

    source: str
    target: str
    promise: Promise


class Plan(NamedTuple):
    """What is to be measured of one way: (bytes, flows), each with idle and with busy cores."""

    profile: Profile
    way: Way
    sizes: list[tuple[int, int]]
    case: str


def ways(profile: Profile) -> list[Way]:
    """Every kind of link between eight nodes: the first pair of each. A link that is cut promises nothing."""
    found: dict[Promise, Way] = {}
    names = [f"node-{index}" for index in range(_NODES)]
    for source in names:
        for target in names:
            rate_bps = profile.pair_bps(source, target)
            if source != target and rate_bps != CUT_BPS:
                shape = profile.link(source, target)
                promise = Promise(rate_bps, shape.latency_s, shape.burst_bytes)
                found.setdefault(promise, Way(source, target, promise))
    return list(found.values())[:_MOST_WAYS]


def steady(profile: Profile) -> Profile:
    """Without jitter and loss: they are chance, and of one transfer's time nothing would be promised."""
    replace = msgspec.structs.replace
    pairs = tuple(replace(pair, jitter_s=None, loss=None) for pair in profile.pairs)
    return replace(profile, jitter_s=0.0, loss=0.0, pairs=pairs)


def plan(profile: Profile, quick: bool) -> list[Plan]:
    """What is measured of `profile`."""
    network = steady(profile)
    plans = []
    found = ways(network)
    for way in found:
        sizes = [
            (nbytes, flows)
            for flows in FLOWS
            for nbytes in (QUICK_SIZES_BYTES if quick else SIZES_BYTES)
            if way.promise.time_s(nbytes * flows) <= LONGEST_S
        ]
        case = f"{way.source} → {way.target}" if len(found) > 1 else ""
        plans.append(Plan(network, way, sizes, case))
    return plans


def estimate_s(plans: Sequence[Plan], quick: bool, with_kernel: bool) -> float:
    """How long the measurement takes, about."""
    total_s = _HOST_S
    for planned in plans:
        promise = planned.way.promise
        once_s = _START_S
        for nbytes, flows in planned.sizes:
            once_s += repeats_for(promise, nbytes * flows, quick) * (promise.time_s(nbytes * flows) + _PAUSE_S)
        total_s += once_s * 2 * (2 if with_kernel and promise.rate_bps is not None else 1)
    return total_s


def certify_profiles(profiles: Sequence[Profile], quick: bool, say: Say) -> Certificate:
    """Measure, and judge. `say` is told what is being done. Raises `IsthmusError` where a transfer fails."""
    skipped = unavailable()
    plans = [planned for profile in profiles for planned in plan(profile, quick)]
    say(f"about {estimate_s(plans, quick, skipped is None):.0f} s" + (f"; {skipped}" if skipped else ""))
    host = measure_host(say)
    notes = [skipped] if skipped else []
    notes += [f"{p.name}: measured without its jitter and loss" for p in profiles if steady(p) != p]
    rows: list[Row] = []
    for planned in plans:
        rate_bps = planned.way.promise.rate_bps
        for busy in (False, True):
            say(f"{' '.join(filter(None, (planned.profile.name, planned.case)))}, cores {'busy' if busy else 'idle'}")
            with busy_cores() if busy else nullcontext():
                rows += _clock_rows(planned, busy, host, quick)
                if skipped is None and rate_bps is not None and rate_bps <= host.loopback_bps:
                    rows += kernel_rows(planned.profile.name, rate_bps, planned.sizes, busy, host, quick)
        if skipped is None and rate_bps is not None and rate_bps > host.loopback_bps:
            notes.append(
                f"{planned.profile.name}: no kernel tbf at {format_rate(rate_bps)}, which this host cannot carry"
            )
    dilation = max((profile.dilation for profile in profiles), default=1.0)
    return certify(host, rows, "; ".join(notes) or None, dilation)


def _clock_rows(planned: Plan, busy: bool, host: Host, quick: bool) -> Iterator[Row]:
    profile, way, sizes, case = planned
    largest_bytes = max((nbytes for nbytes, _ in sizes), default=1)
    with endpoints(profile, (way.source, way.target), largest_bytes) as parties:
        for nbytes, flows in sizes:
            repeats = repeats_for(way.promise, nbytes * flows, quick)
            yield clock_row(parties, profile, way.promise, nbytes, flows, busy, host, repeats=repeats, case=case)
