"""Messages alone on the kernel's wire: Isthmus's endpoint, plain ZeroMQ and plain TCP, and what each uses of the rate.

What a NIC could carry is its rate times the time until the last message has arrived. Its utilisation is what the
busiest NIC has passed of that, as the kernel's bucket counts it, with the headers of Ethernet, IP and TCP and with
acknowledgements; the share of payload is smaller by the headers, about 4 %. Between two hosts one NIC sends to another;
"each to each" is the pattern of a layer's keys and values, where every NIC sends and receives at its full rate.
"""

from __future__ import annotations

from contextlib import ExitStack
from statistics import median
from typing import NamedTuple

from netem.network import Profile
from netem.verify.child import Part
from netem.verify.lan import Lan
from netem.verify.measure import patience_s, took_s
from netem.verify.party import Kind, Party, run_transfer
from netem.verify.promise import Promise

RAW = "node.lab.bench.raw_zmq"


class Carried(NamedTuple):
    """One row."""

    carrier: str
    pattern: str
    nbytes: int
    """Payload of each message."""
    took_s: float
    payload_share: float
    utilisation: float


CARRIERS: tuple[tuple[str, Kind, str], ...] = (
    ("isthmus", "endpoint", "netem.verify.child"),
    ("ZeroMQ", "endpoint", RAW),
    ("TCP", "tcp", "netem.verify.child"),
)


def measure_wire(net: Lan, sizes: tuple[int, ...], repeats: int) -> list[Carried]:
    """Measure on a shaped `net`; the carriers take turns."""
    assert net.rate_bps is not None
    names = [f"node-{place}" for place in range(len(net.hosts))]
    rows = []
    with ExitStack() as stack:
        parties = {carrier[0]: _parties(stack, net, names, carrier, max(sizes)) for carrier in CARRIERS}
        for pattern, readers in _patterns(names).items():
            fan = max(map(len, readers.values()))
            # The plain TCP of netem.verify sends or reads, not both.
            ready = {carrier: all_ for carrier, all_ in parties.items() if carrier != "TCP" or fan == 1}
            for nbytes in sizes:
                sends = {name: [Part(peer, 0, nbytes) for peer in peers] for name, peers in readers.items()}
                samples: dict[str, list[tuple[float, float]]] = {carrier: [] for carrier in ready}
                for _ in range(repeats):
                    for carrier, ready_parties in ready.items():
                        samples[carrier].append(_transfer(net, sends, ready_parties, nbytes * fan))
                for carrier, taken in samples.items():
                    took = median(time_s for time_s, _ in taken)
                    share = 8 * nbytes * fan / net.rate_bps / took
                    rows.append(Carried(carrier, pattern, nbytes, took, share, median(used for _, used in taken)))
    return rows


def _transfer(net: Lan, sends: dict[str, list[Part]], parties: list[Party], nbytes: int) -> tuple[float, float]:
    """The time of one transfer, and the utilisation of the busiest NIC in it."""
    assert net.rate_bps is not None
    before = net.sent_bytes()
    time_s = took_s(run_transfer(sends, parties, patience_s(Promise(net.rate_bps), nbytes)))
    passed = [b - a for old, new in zip(before, net.sent_bytes(), strict=True) for a, b in zip(old, new, strict=True)]
    return time_s, 8 * max(passed) / (net.rate_bps * time_s)


def _patterns(names: list[str]) -> dict[str, dict[str, list[str]]]:
    found = {"one to one": {names[0]: [names[1]]}}
    if len(names) > 2:
        found["each to each"] = {name: [peer for peer in names if peer != name] for name in names}
    return found


def _parties(
    stack: ExitStack, net: Lan, names: list[str], carrier: tuple[str, Kind, str], largest_bytes: int
) -> list[Party]:
    _, kind, module = carrier
    parties = [
        stack.enter_context(
            Party(name, kind, Profile(), largest_bytes, host=host.address, prefix=host.prefix, module=module)
        )
        for name, host in zip(names, net.hosts, strict=True)
    ]
    # Plain TCP dials where it sends, which is from the first to the second only.
    pairs = [(0, 1)] if kind == "tcp" else [(i, j) for i in range(len(names)) for j in range(len(names)) if i != j]
    for source, target in pairs:
        parties[source].connect(parties[target])
    return parties
