"""A profile's certificate: the transfers that are made for it, and how long they take.

Every kind of link that a profile has among eight nodes is measured once: 64 KB to 64 MB, in one flow and in four, with
idle and with busy cores; and again under the kernel's bucket, if this host has it. Transfers that take longer than
`LONGEST_S` on the profile are left out.
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
_MOST_KINDS = 4
_HOST_S = 6.0  # to measure the host, and to start processes
_START_S = 1.5
_PAUSE_S = 0.04  # between two transfers


class LinkKind(NamedTuple):
    """One kind of link of a profile, and two nodes that have such a link."""

    source: str
    target: str
    promise: Promise


class Measurement(NamedTuple):
    """The transfers over one kind of link: (bytes, flows), each with idle and with busy cores."""

    profile: Profile
    link: LinkKind
    sizes: list[tuple[int, int]]
    case: str


def link_kinds(profile: Profile) -> list[LinkKind]:
    """The kinds of links between eight nodes, with the first pair of each. Links that are cut are left out."""
    found: dict[Promise, LinkKind] = {}
    names = [f"node-{index}" for index in range(_NODES)]
    for source in names:
        for target in names:
            rate_bps = profile.pair_bps(source, target)
            if source != target and rate_bps != CUT_BPS:
                shape = profile.link(source, target)
                promise = Promise(rate_bps, shape.latency_s, shape.burst_bytes)
                found.setdefault(promise, LinkKind(source, target, promise))
    return list(found.values())[:_MOST_KINDS]


def steady(profile: Profile) -> Profile:
    """The profile without jitter and loss: they are random, so the time of one transfer could not be promised."""
    replace = msgspec.structs.replace
    pairs = tuple(replace(pair, jitter_s=None, loss=None) for pair in profile.pairs)
    return replace(profile, jitter_s=0.0, loss=0.0, pairs=pairs)


def measurements(profile: Profile, quick: bool) -> list[Measurement]:
    """All that is measured for `profile`."""
    network = steady(profile)
    planned = []
    found = link_kinds(network)
    for link in found:
        sizes = [
            (nbytes, flows)
            for flows in FLOWS
            for nbytes in (QUICK_SIZES_BYTES if quick else SIZES_BYTES)
            if link.promise.time_s(nbytes * flows) <= LONGEST_S
        ]
        case = f"{link.source} → {link.target}" if len(found) > 1 else ""
        planned.append(Measurement(network, link, sizes, case))
    return planned


def estimate_s(planned: Sequence[Measurement], quick: bool, with_kernel: bool) -> float:
    """About how long these measurements take, in seconds."""
    total_s = _HOST_S
    for one in planned:
        promise = one.link.promise
        once_s = _START_S
        for nbytes, flows in one.sizes:
            once_s += repeats_for(promise, nbytes * flows, quick) * (promise.time_s(nbytes * flows) + _PAUSE_S)
        total_s += once_s * 2 * (2 if with_kernel and promise.rate_bps is not None else 1)
    return total_s


def certify_profiles(profiles: Sequence[Profile], quick: bool, say: Say) -> Certificate:
    """Measure the profiles, and judge. `say` gets the progress. Raises `IsthmusError` if a transfer fails."""
    skipped = unavailable()
    planned = [one for profile in profiles for one in measurements(profile, quick)]
    say(f"about {estimate_s(planned, quick, skipped is None):.0f} s" + (f"; {skipped}" if skipped else ""))
    host = measure_host(say)
    notes = [skipped] if skipped else []
    notes += [f"{p.name}: measured without its jitter and loss" for p in profiles if steady(p) != p]
    rows: list[Row] = []
    for one in planned:
        rate_bps = one.link.promise.rate_bps
        for busy in (False, True):
            say(f"{' '.join(filter(None, (one.profile.name, one.case)))}, cores {'busy' if busy else 'idle'}")
            with busy_cores() if busy else nullcontext():
                rows += _clock_rows(one, busy, host, quick)
                if skipped is None and rate_bps is not None and rate_bps <= host.loopback_bps:
                    rows += kernel_rows(one.profile.name, rate_bps, one.sizes, busy, host, quick)
        if skipped is None and rate_bps is not None and rate_bps > host.loopback_bps:
            notes.append(f"{one.profile.name}: no kernel tbf at {format_rate(rate_bps)}, which this host cannot carry")
    dilation = max((profile.dilation for profile in profiles), default=1.0)
    return certify(host, rows, "; ".join(notes) or None, dilation)


def _clock_rows(measurement: Measurement, busy: bool, host: Host, quick: bool) -> Iterator[Row]:
    profile, link, sizes, case = measurement
    largest_bytes = max((nbytes for nbytes, _ in sizes), default=1)
    with endpoints(profile, (link.source, link.target), largest_bytes) as parties:
        for nbytes, flows in sizes:
            repeats = repeats_for(link.promise, nbytes * flows, quick)
            yield clock_row(parties, profile, link.promise, nbytes, flows, busy, host, repeats=repeats, case=case)
