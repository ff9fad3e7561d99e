"""Several nodes at once, in virtual time: their shapers and receiving NICs against what the network promises."""

import math

import pytest
from helpers.fake_wire import ENDLESS
from hypothesis import given, settings
from hypothesis import strategies as st

from netem.ingress import Ingress
from netem.link import Link
from netem.profile import Profile
from netem.segments import Message
from netem.shaper import Shaper

RATE = 300e6
NIC = Profile(scope="nic", rate_bps=RATE, latency_s=0.025, window_bytes=10**9)

Sends = dict[str, list[tuple[str, int]]]


def run(sends: Sends, profile: Profile = NIC, late_s: float = 0.0) -> tuple[dict[str, float], dict[str, int]]:
    """When the last segment is through at each receiver, and what each sender put on the wire.

    All messages are queued at 0; threads wake `late_s` after what they asked for.
    """
    names = sorted({*sends, *(peer for parts in sends.values() for peer, _ in parts)})
    shapers = {name: Shaper(name, profile) for name in names}
    nics: dict[str, Ingress[None]] = {name: Ingress(profile.rate_bps) for name in names}
    for name, parts in sends.items():
        lanes = {peer: shapers[name].add(peer, Link("r", 1, ENDLESS)) for peer in dict(parts)}
        for peer, nbytes in parts:
            lanes[peer].enqueue(Message(b"", [memoryview(bytes(nbytes))]))
    now, through, wire_bytes = 0.0, dict.fromkeys(names, 0.0), dict.fromkeys(names, 0)
    while now < math.inf:
        for name in names:
            for arrival, lane, segment in shapers[name].poll(now):
                wire_bytes[name] += segment.wire_bytes
                nics[lane.peer].push(name, None, segment.wire_bytes, arrival)
        for name in names:
            for _ in nics[name].poll(now):
                through[name] = now
        now = max(now, min(machine.next_time() for machine in (*shapers.values(), *nics.values()))) + late_s
    return through, wire_bytes


def each_to_each(count: int, nbytes: int) -> Sends:
    """In the order of names at each, as if it were one program."""
    names = [f"node-{index}" for index in range(count)]
    return {name: [(peer, nbytes) for peer in names if peer != name] for name in names}


@pytest.mark.parametrize("count", [2, 4, 8, 12])
def test_each_to_each_takes_what_its_lines_promise(count: int) -> None:
    """Did all nodes begin with the same peer, eight would be 4.3 % late at this size."""
    through, wire_bytes = run(each_to_each(count, 1_000_000))
    promised_s = NIC.latency_s + max(wire_bytes.values()) * 8 / RATE
    assert max(through.values()) == pytest.approx(promised_s, rel=1e-3)


@pytest.mark.parametrize("late_s", [0.004, 0.02])
def test_threads_that_wake_late_cost_their_own_time_and_no_rate(late_s: float) -> None:
    for sends in ({"a": [("b", 8_000_000)]}, each_to_each(4, 2_000_000)):
        through, wire_bytes = run(sends, late_s=late_s)
        promised_s = NIC.latency_s + max(wire_bytes.values()) * 8 / RATE
        assert max(through.values()) <= promised_s + late_s  # by when they were read, twice that


def test_two_senders_into_one_nic_and_one_nic_to_two_receivers_take_the_time_of_both() -> None:
    for sends in ({"a": [("c", 4_000_000)], "b": [("c", 4_000_000)]}, {"a": [("b", 4_000_000), ("c", 4_000_000)]}):
        through, wire_bytes = run(sends)
        promised_s = NIC.latency_s + sum(wire_bytes.values()) * 8 / RATE
        assert max(through.values()) == pytest.approx(promised_s, rel=1e-3)


names = st.sampled_from("abcde")
sends = st.dictionaries(
    names, st.lists(st.tuples(names, st.integers(1, 500_000)), min_size=1, max_size=8), min_size=1, max_size=5
).map(lambda found: {name: [(peer, n) for peer, n in parts if peer != name] for name, parts in found.items()})


@settings(max_examples=60, deadline=None)
@given(sends, st.sampled_from([0.0, 0.0, 0.003]))
def test_whoever_sends_to_whom_no_line_is_outrun_and_the_busiest_is_hardly_late(sends: Sends, late_s: float) -> None:
    """No line carries more than its rate, and none is idle for longer than turns of whole segments explain."""
    through, wire_bytes = run(sends, late_s=late_s)
    into: dict[str, int] = {}
    for parts in sends.values():
        for peer, nbytes in parts:
            into[peer] = into.get(peer, 0) + nbytes
    for peer, nbytes in into.items():
        assert through[peer] >= NIC.latency_s + (nbytes * 8 / RATE) * (1 - 1e-9)
    busiest_bytes = max((*wire_bytes.values(), *into.values()))
    # Lines in series, each fair for itself, are not an optimal timetable: at worst one waits for all of another.
    assert max(through.values()) <= NIC.latency_s + 2 * busiest_bytes * 8 / RATE + 0.02 + 3 * late_s
