"""Timed transfers between processes: the host's own figures, and rows under our shaper or the kernel's bucket."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

from netem.limits import KIB, MIB
from netem.network import Profile
from netem.verify.child import Part, Transferred
from netem.verify.kernel import kernel
from netem.verify.party import Kind, Party, busy_cores, run_transfer
from netem.verify.promise import Host, Promise, Row, judge_row

_LEAD_S = 0.02  # from the command to the start, so that all processes have read it by then
_UNHINDERED_BPS = 1e12
_REST_S = 0.005

Say = Callable[[str], None]
Sample = tuple[float, Mapping[str, Transferred]]


@contextmanager
def endpoints(profile: Profile, names: Sequence[str], largest_bytes: int) -> Iterator[list[Party]]:
    """A process with an endpoint for each of `names`; each is connected to all others."""
    with ExitStack() as stack:
        parties = [stack.enter_context(Party(name, "endpoint", profile, largest_bytes)) for name in names]
        for party in parties:
            for peer in parties:
                if peer is not party:
                    party.connect(peer)
        yield parties


def time_transfers(
    sends: dict[str, list[Part]], parties: Sequence[Party], promise: Promise, repeats: int
) -> list[Sample]:
    """All `sends` at the same moment, `repeats` times, with enough rest in between for the burst to return."""
    nbytes = sum(part.nbytes * part.count for parts in sends.values() for part in parts)
    rest_s = _REST_S + promise.latency_s + (promise.burst_bytes * 8 / promise.rate_bps if promise.rate_bps else 0.0)
    samples: list[Sample] = []
    for _ in range(repeats):
        time.sleep(rest_s)
        samples.append(run_transfer(sends, parties, patience_s(promise, nbytes), lead_s=_LEAD_S))
    return samples


def took_s(sample: Sample) -> float:
    """The time until the last message had arrived, in seconds."""
    at, answers = sample
    return max(arrival.at for answer in answers.values() for arrival in answer.arrivals) - at


def wire_bytes(sample: Sample, sender: str) -> int:
    """Bytes that `sender` put on the wire, with all headers."""
    return sample[1][sender].wire_bytes


def measure_host(say: Say) -> Host:
    """How much two processes of this host can carry, and how long they take for one message."""
    cores, load = os.cpu_count() or 1, os.getloadavg()[0]
    if load > cores / 2:
        say(f"this host has other work (load {load:.1f} on {cores} cores), which lowers the figures below")
    say("measuring what this host carries, unshaped and shaped")
    flood = {"node-0": [Part("node-1", 0, 4 * MIB, 64)]}
    with endpoints(Profile(name="host"), ("node-0", "node-1"), 4 * MIB) as parties:
        loopback_bps = _flood_bps(parties, flood)
        delay_s = _delay_s(parties)
        with busy_cores():
            busy_delay_s = _delay_s(parties)
    with endpoints(Profile(name="host", rate_bps=_UNHINDERED_BPS), ("node-0", "node-1"), 4 * MIB) as parties:
        shaped_bps = _flood_bps(parties, flood)
    return Host(loopback_bps, shaped_bps, delay_s, busy_delay_s, cores)


def _flood_bps(parties: Sequence[Party], flood: dict[str, list[Part]]) -> float:
    nbytes = sum(part.nbytes * part.count for parts in flood.values() for part in parts)
    return statistics.median(nbytes * 8 / took_s(sample) for sample in time_transfers(flood, parties, Promise(None), 3))


def _delay_s(parties: Sequence[Party]) -> float:
    """The time within which nine in ten messages of one segment arrive. A long transfer is late only at its end, by as
    much as one such message."""
    beep = {"node-0": [Part("node-1", 0, 64 * KIB)]}
    times_s = sorted(took_s(sample) for sample in time_transfers(beep, parties, Promise(None), 50))
    return times_s[len(times_s) * 9 // 10]


def clock_row(
    parties: Sequence[Party],
    profile: Profile,
    promise: Promise,
    nbytes: int,
    flows: int,
    busy: bool,
    host: Host,
    *,
    repeats: int,
    case: str = "",
) -> Row:
    """A row of transfers from the first party to the second, under our shaper."""
    source, target = (party.name for party in parties)
    sends = {source: [Part(target, flow, nbytes) for flow in range(flows)]}
    samples = time_transfers(sends, parties, promise, repeats)
    figures = [(took_s(sample), float(wire_bytes(sample, source))) for sample in samples]
    delay_s = host.own_delay_s(busy)
    return judge_row(promise, figures, delay_s, profile=profile.name, nbytes=nbytes, flows=flows, busy=busy, case=case)


def kernel_rows(
    name: str, rate_bps: float, sizes: Sequence[tuple[int, int]], busy: bool, host: Host, quick: bool
) -> list[Row]:
    """The same transfers (bytes, flows) over TCP under the kernel's bucket of that rate, which has no latency.

    Transfers of up to twice the burst are left out: the host, and not the bucket, would determine their time.
    """
    rows = []
    tcp: Kind = "tcp"
    with kernel(rate_bps) as built, ExitStack() as stack:
        fitting = [(nbytes, flows) for nbytes, flows in sizes if nbytes * flows > 2 * built.promise.burst_bytes]
        largest_bytes = max((nbytes for nbytes, _ in fitting), default=1)
        most_flows = max((flows for _, flows in fitting), default=1)
        nothing = Profile()
        target = stack.enter_context(Party("b", tcp, nothing, 1, host=built.receiver_host, prefix=built.receiver))
        source = stack.enter_context(
            Party("a", tcp, nothing, largest_bytes, host=built.sender_host, prefix=built.sender)
        )
        source.connect(target, most_flows)
        for nbytes, flows in fitting:
            sends = {"a": [Part("b", flow, nbytes) for flow in range(flows)]}
            figures = []
            for _ in range(repeats_for(built.promise, nbytes * flows, quick)):
                before_bytes = built.sent_bytes()
                (sample,) = time_transfers(sends, (source, target), built.promise, 1)
                figures.append((took_s(sample), float(built.sent_bytes() - before_bytes)))
            rows.append(
                judge_row(
                    built.promise,
                    figures,
                    host.own_delay_s(busy),
                    profile=name,
                    nbytes=nbytes,
                    flows=flows,
                    busy=busy,
                    reference="tbf",
                )
            )
    return rows


def repeats_for(promise: Promise, nbytes: int, quick: bool) -> int:
    """How often to repeat a transfer: short ones more often, since other work on the host affects them more."""
    expected_s = promise.time_s(nbytes)
    usual = 5 if expected_s < 0.3 else 3 if expected_s < 1.0 else 1
    return min(usual, 3) if quick else usual


def patience_s(promise: Promise, nbytes: int) -> float:
    """How long a transfer may take before it counts as failed."""
    return 10 * promise.time_s(nbytes) + 30.0
