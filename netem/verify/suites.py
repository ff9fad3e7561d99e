"""The tables of docs/netem, beyond a certificate. Each suite is a function that measures its rows.

`kernel`: our shaper and the kernel's bucket side by side. `fairness`: flows of one link with messages of different
sizes. `nic`: two senders to one NIC, and one NIC to two receivers. `rings`: n nodes in a ring, and each to each, up to
more than this host can carry. `dilation`: 100 Gbit/s on a clock that runs slower.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import NamedTuple

import msgspec

from netem.network import Profile
from netem.verify.child import Part
from netem.verify.kernel import unavailable
from netem.verify.measure import (
    Say,
    clock_row,
    endpoints,
    kernel_rows,
    measure_host,
    repeats_for,
    time_transfers,
    took_s,
    wire_bytes,
)
from netem.verify.party import busy_cores
from netem.verify.promise import Certificate, Host, Promise, Row, certify, judge_row

MB = 1_000_000
_RATE_BPS = 300e6
_LATENCY_S = 0.025
_FAIRNESS_BYTES = 16 * MB  # total of each flow, for any size of its messages


class Suite(NamedTuple):
    """`rows` measures the rows; with `quick` it leaves some out. `minutes` is the time for all of them."""

    title: str
    minutes: int
    rows: Callable[[Host, bool, Say], Iterator[Row]]
    needs_kernel: bool = False


def run_suite(name: str, quick: bool, say: Say) -> Certificate:
    """Measure one suite, and judge. Raises `IsthmusError` if a transfer fails."""
    suite = SUITES[name]
    say(f"{'less than ' if quick else 'about '}{suite.minutes} min")
    skipped = unavailable() if suite.needs_kernel else None
    host = measure_host(say)
    return certify(host, list(suite.rows(host, quick, say)), skipped)


def _kernel(host: Host, quick: bool, say: Say) -> Iterator[Row]:
    available = unavailable() is None
    sizes = [(size * MB, flows) for flows in (1, 4) for size in ((1, 4, 16) if quick else (1, 4, 16, 64))]
    for rate_bps in (50e6, 300e6, 1e9):
        profile = Profile(name=f"{rate_bps / 1e6:.0f} Mbit/s", rate_bps=rate_bps)
        promise = Promise(rate_bps)
        for busy in (False, True):
            say(f"{profile.name}, cores {'busy' if busy else 'idle'}")
            # 4 × 64 MB at 50 Mbit/s takes 41 s, and shows no more than 4 × 16 MB.
            fitting = [(nbytes, flows) for nbytes, flows in sizes if promise.time_s(nbytes * flows) < 15]
            with busy_cores() if busy else nullcontext():
                with endpoints(profile, ("node-0", "node-1"), 64 * MB) as parties:
                    for nbytes, flows in fitting:
                        repeats = repeats_for(promise, nbytes * flows, quick)
                        yield clock_row(parties, profile, promise, nbytes, flows, busy, host, repeats=repeats)
                if available:
                    yield from kernel_rows(profile.name, rate_bps, fitting, busy, host, quick)


def _fairness(host: Host, quick: bool, say: Say) -> Iterator[Row]:
    """Four flows with equal totals, in messages of different sizes. If each has its share, all end together."""
    profile = Profile(name="300 Mbit/s", rate_bps=_RATE_BPS, latency_s=_LATENCY_S)
    sizes = (64_000, 1 * MB, 4 * MB, 16 * MB)
    alike = ((size,) * 4 for size in sizes)
    mixtures = [sizes] if quick else [*alike, sizes]
    for busy in (False, True):
        with (
            busy_cores() if busy else nullcontext(),
            endpoints(profile, ("node-0", "node-1"), max(sizes)) as parties,
        ):
            for mixture in mixtures:
                mixed = len(set(mixture)) > 1
                say(f"{'different' if mixed else 'equal'} messages, cores {'busy' if busy else 'idle'}")
                parts = [Part("node-1", i, size, _FAIRNESS_BYTES // size) for i, size in enumerate(mixture)]
                samples = time_transfers({"node-0": parts}, parties, Promise(_RATE_BPS, _LATENCY_S), 1 if quick else 3)
                for flow, size in enumerate(mixture):
                    figures = []
                    for sample in samples:
                        at, answers = sample
                        ended = next(a.at for a in answers["node-1"].arrivals if a.flow == flow)
                        figures.append((ended - at, wire_bytes(sample, "node-0") / 4))
                    yield judge_row(
                        Promise(_RATE_BPS / 4, _LATENCY_S), figures, host.own_delay_s(busy), profile=profile.name,
                        nbytes=size, flows=4, busy=busy, case=f"flow {flow} {'among others' if mixed else 'of equals'}",
                    )  # fmt: skip


def _nic(host: Host, quick: bool, say: Say) -> Iterator[Row]:
    profile = Profile(name="300 Mbit/s a NIC", scope="nic", rate_bps=_RATE_BPS, latency_s=_LATENCY_S)
    names = ("node-0", "node-1", "node-2")
    cases = {
        "two senders into one NIC": {"node-0": ["node-2"], "node-1": ["node-2"]},
        "one NIC to two receivers": {"node-0": ["node-1", "node-2"]},
    }
    for busy in (False, True):
        with busy_cores() if busy else nullcontext(), endpoints(profile, names, 64 * MB) as parties:
            for case, readers in cases.items():
                for size in (4, 16) if quick else (1, 4, 16, 64):
                    say(f"{case}, {size} MB, cores {'busy' if busy else 'idle'}")
                    sends = {name: [Part(peer, 0, size * MB) for peer in peers] for name, peers in readers.items()}
                    promise = Promise(_RATE_BPS / 2, _LATENCY_S)
                    samples = time_transfers(sends, parties, promise, repeats_for(promise, size * MB, quick))
                    figures = [
                        (took_s(sample), sum(wire_bytes(sample, name) for name in sends) / 2) for sample in samples
                    ]
                    yield judge_row(
                        promise, figures, host.own_delay_s(busy), profile=profile.name, nbytes=size * MB, flows=1,
                        busy=busy, case=case,
                    )  # fmt: skip


def _rings(host: Host, quick: bool, say: Say) -> Iterator[Row]:
    """The time until the last arrival. A node's messages share its NIC in scope `nic`, and nothing in scope `link`."""
    for count in (2, 4) if quick else (2, 4, 8):
        names = [f"node-{index}" for index in range(count)]
        ring = {name: [names[(index + 1) % count]] for index, name in enumerate(names)}
        everyone = {name: [peer for peer in names if peer != name] for name in names}
        for scope in ("link", "nic"):
            profile = Profile(name=f"300 Mbit/s a {scope}", scope=scope, rate_bps=_RATE_BPS, latency_s=_LATENCY_S)
            with endpoints(profile, names, 8 * MB) as parties:
                for what, readers in (("a ring", ring), ("each to each", everyone)):
                    say(f"{count} nodes, {what}, {profile.name}")
                    fan = len(readers[names[0]])
                    share = fan if scope == "nic" else 1
                    promise = Promise(_RATE_BPS / share, _LATENCY_S)
                    busiest_bps = _RATE_BPS / share * fan * count
                    for size in (1 * MB, 8 * MB):
                        sends = {name: [Part(peer, 0, size) for peer in peers] for name, peers in readers.items()}
                        samples = time_transfers(sends, parties, promise, 3 if quick else 5)
                        figures = [
                            (took_s(sample), max(wire_bytes(sample, name) for name in names) / fan)
                            for sample in samples
                        ]
                        yield judge_row(
                            promise, figures, host.delay_s, profile=profile.name, nbytes=size, flows=1,
                            case=f"{count} nodes, {what}: {busiest_bps / 1e9:.1f} Gbit/s in all",
                        )  # fmt: skip


def _dilation(host: Host, quick: bool, say: Say) -> Iterator[Row]:
    base = Profile(name="100 Gbit/s a NIC", scope="nic", rate_bps=100e9, latency_s=50e-6)
    for factor in (1, 50) if quick else (1, 5, 10, 50):
        profile = msgspec.structs.replace(base.dilated(factor), name=f"{base.name}, dilation {factor}")
        shape = profile.link("node-0", "node-1")
        promise = Promise(profile.pair_bps("node-0", "node-1"), shape.latency_s, shape.burst_bytes)
        with endpoints(profile, ("node-0", "node-1"), 256 * MB) as parties:
            for size in (4, 16, 64, 256):
                say(f"{profile.name}, {size} MB")
                assert promise.rate_bps is not None
                yield clock_row(
                    parties, profile, promise, size * MB, 1, False, host, repeats=5,
                    case=f"emulated {size * MB * 8 / 100e9 * 1e3:.3g} ms",
                )  # fmt: skip


SUITES = {
    "kernel": Suite("Our shaper and the kernel's token bucket", 6, _kernel, needs_kernel=True),
    "fairness": Suite("Four flows on one link, 300 Mbit/s", 2, _fairness),
    "nic": Suite("Several nodes at one NIC, 300 Mbit/s", 2, _nic),
    "rings": Suite("Rings, and each to each, 300 Mbit/s", 2, _rings),
    "dilation": Suite("100 Gbit/s, on a clock that runs slower", 2, _dilation),
}
