"""Who goes next, and when: the scheduler by itself, with links that have all the credit they want."""

from collections import Counter
from itertools import pairwise

import pytest
from helpers.fake_wire import Side, Wire, lane_of, message
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from netem.profile import Pair, Profile
from netem.segments import Message, Segment
from netem.shaper import Shaper

KIB = 1024
RATE = 8e6  # 1 MB a second: a segment of 1000 bytes on the wire takes 1 ms
LAB = Profile(rate_bps=RATE, latency_s=0.01, window_bytes=10**9, segment_size_bytes=10 * KIB)
NIC = Profile(scope="nic", rate_bps=RATE, latency_s=0.01, window_bytes=10**9, segment_size_bytes=10 * KIB)


def drive(shaper: Shaper, until: float, late_s: float = 0.0) -> list[tuple[float, str, Segment]]:
    """What is written until then, waking `late_s` after each time the shaper asks for."""
    now, written = 0.0, []
    while now <= until:
        written += [(arrival, lane.peer, segment) for arrival, lane, segment in shaper.poll(now)]
        now = max(now, shaper.next_time()) + late_s
    return written


@pytest.mark.parametrize("late_s", [0.0, 0.004, 0.03])
@pytest.mark.parametrize("profile", [LAB, NIC], ids=["link", "nic"])
def test_a_transfer_takes_size_over_rate_plus_latency_however_late_its_thread_wakes(
    profile: Profile, late_s: float
) -> None:
    shaper = Shaper("a", profile)
    lane_of(shaper, "b").enqueue(message(1_000_000))
    written = drive(shaper, 10.0, late_s)
    wire_bytes = sum(segment.wire_bytes for _, _, segment in written)
    assert written[-1][0] == pytest.approx(wire_bytes * 8 / RATE + 0.01, rel=1e-6)
    assert 1_000_000 < wire_bytes < 1_010_000


def test_latency_uses_up_no_rate() -> None:
    far = Profile(rate_bps=RATE, latency_s=5.0, window_bytes=10**9)
    shaper = Shaper("a", far)
    lane = lane_of(shaper, "b")
    for _ in range(10):
        lane.enqueue(message(100_000))
    assert drive(shaper, 30.0)[-1][0] == pytest.approx(6.0, rel=0.01)


def test_an_idle_link_saves_nothing_up() -> None:
    shaper = Shaper("a", LAB)
    lane = lane_of(shaper, "b")
    list(shaper.poll(0.0))
    lane.enqueue(message(10_000, at=100.0))
    assert next(iter(drive_from(shaper, 100.0)))[0] == pytest.approx(100.0 + 0.01 + 0.01, rel=1e-3)


def drive_from(shaper: Shaper, now: float) -> list[tuple[float, str, Segment]]:
    written = []
    for _ in range(100):
        written += [(arrival, lane.peer, segment) for arrival, lane, segment in shaper.poll(now)]
        now = min(shaper.next_time(), now + 1.0)
    return written


def test_segments_are_cut_and_complete() -> None:
    shaper = Shaper("a", LAB)
    lane_of(shaper, "b").enqueue(message(25 * KIB, b"tag"))
    segments = [segment for _, _, segment in drive(shaper, 1.0)]
    assert [(s.offset, s.nbytes, s.last) for s in segments] == [
        (0, 10 * KIB, False),
        (10 * KIB, 10 * KIB, False),
        (20 * KIB, 5 * KIB, True),
    ]


def test_control_overtakes_bulk_after_the_segment_that_is_leaving() -> None:
    shaper = Shaper("a", LAB)
    lane = lane_of(shaper, "b")
    lane.enqueue(message(1_000_000, b"bulk"))
    list(shaper.poll(0.0))
    lane.enqueue(message(100, b"now", urgent=True, at=0.001))
    order = [segment.message.tag for _, _, segment in drive(shaper, 0.1) if segment.message]
    assert order.index(b"now") == 1


def shares(shaper: Shaper, until: float, key: str) -> Counter[object]:
    """Wire bytes per flow or per peer in a stretch in which all are busy."""
    counted: Counter[object] = Counter()
    for arrival, peer, segment in drive(shaper, until):
        if arrival <= until:
            assert segment.message is not None
            counted[peer if key == "peer" else segment.message.flow] += segment.wire_bytes
    return counted


def test_flows_of_one_link_share_it_whatever_the_size_of_their_messages() -> None:
    shaper = Shaper("a", LAB)
    lane = lane_of(shaper, "b")
    for flow, nbytes in enumerate([4 * KIB, 10 * KIB, 16 * KIB, 2000 * KIB]):
        for _ in range(2000 * KIB // nbytes):
            lane.enqueue(message(nbytes, flow=flow))
    counted = shares(shaper, 2.0, "flow")
    mean = sum(counted.values()) / 4
    assert all(counted[flow] == pytest.approx(mean, rel=0.03) for flow in range(4))


def test_links_share_the_nic_of_their_sender() -> None:
    shaper = Shaper("a", NIC)
    for peer, nbytes in (("b", 8 * KIB), ("c", 300 * KIB), ("d", 2000 * KIB)):
        lane = lane_of(shaper, peer)
        for _ in range(2000 * KIB // nbytes):
            lane.enqueue(message(nbytes))
    counted = shares(shaper, 2.0, "peer")
    assert sum(counted.values()) == pytest.approx(2e6, rel=0.02)
    assert all(nbytes == pytest.approx(2e6 / 3, rel=0.03) for nbytes in counted.values())


def test_links_of_scope_link_do_not_share() -> None:
    shaper = Shaper("a", LAB)
    for peer in "bcd":
        lane_of(shaper, peer).enqueue(message(5_000_000))
    counted = shares(shaper, 2.0, "peer")
    assert all(nbytes == pytest.approx(2e6, rel=0.02) for nbytes in counted.values())


def test_a_slow_pair_leaves_the_rest_of_the_nic_to_the_others() -> None:
    slow = Pair("a", "b", has_rate=True, rate_bps=RATE / 10, latency_s=None)
    profile = Profile(scope="nic", rate_bps=RATE, window_bytes=10**9, segment_size_bytes=10 * KIB, pairs=(slow,))
    shaper = Shaper("a", profile)
    for peer in "bc":
        lane_of(shaper, peer).enqueue(message(5_000_000))
    counted = shares(shaper, 2.0, "peer")
    assert counted["b"] == pytest.approx(2e5, rel=0.1)
    assert counted["c"] == pytest.approx(1.8e6, rel=0.05)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 50 * KIB), st.sampled_from("bcd"), st.integers(0, 2), st.booleans()), max_size=40
    ),
    st.sampled_from([LAB, NIC]),
    st.floats(0, 0.02),
)
def test_no_bucket_is_ever_outrun(plan: list[tuple[int, str, int, bool]], profile: Profile, late_s: float) -> None:
    shaper = Shaper("a", profile)
    lanes = {peer: lane_of(shaper, peer) for peer in "bcd"}
    for nbytes, peer, flow, urgent in plan:
        lanes[peer].enqueue(message(nbytes, flow=flow, urgent=urgent))
    written = drive(shaper, 60.0, late_s)
    assert sum(segment.nbytes for _, _, segment in written) == sum(nbytes for nbytes, _, _, _ in plan)
    groups = [[w for w in written if w[1] == peer] for peer in "bcd"] if profile is LAB else [written]
    for group in groups:
        group.sort(key=lambda entry: entry[0])
        for before, after in pairwise(group):
            assert after[0] - before[0] >= after[2].wire_bytes * 8 / RATE - 1e-9


arrivals = st.lists(
    st.tuples(st.floats(0, 0.1), st.integers(1, 50 * KIB), st.sampled_from("bcd"), st.integers(0, 2), st.booleans()),
    min_size=1,
    max_size=30,
)


@settings(max_examples=50, deadline=None)
@given(arrivals, st.integers(0, 30_000), st.sampled_from([0.0, 0.003]))
def test_over_any_arrivals_a_nic_never_outruns_rate_and_burst_and_never_rests_while_something_waits(
    plan: list[tuple[float, int, str, int, bool]], burst_bytes: int, late_s: float
) -> None:
    # Without latency a choice is never put off: what comes meanwhile could go first, and leave a gap before it.
    shaper = Shaper("a", structs.replace(NIC, latency_s=0.0, burst_bytes=burst_bytes))
    lanes = {peer: lane_of(shaper, peer) for peer in "bcd"}
    now, written = 0.0, []
    queued: list[Message] = []
    for gap_s, nbytes, peer, flow, urgent in plan:
        wanted = now + gap_s
        while now < wanted:
            written += [(arrival, lane.peer, segment) for arrival, lane, segment in shaper.poll(now)]
            now = min(wanted, max(now, shaper.next_time()) + late_s)
        queued.append(message(nbytes, flow=flow, urgent=urgent, at=now))
        lanes[peer].enqueue(queued[-1])
    while shaper.next_time() < float("inf"):
        written += [(arrival, lane.peer, segment) for arrival, lane, segment in shaper.poll(now)]
        now = max(now, shaper.next_time()) + late_s
    assert sum(segment.nbytes for _, _, segment in written) == sum(nbytes for _, nbytes, *_ in plan)
    for first in range(len(written)):
        carried = sum(segment.wire_bytes for _, _, segment in written[first + 1 :])
        assert carried <= RATE / 8 * (written[-1][0] - written[first][0]) + burst_bytes + 1e-3
    if late_s:
        return
    free_at = 0.0  # of a server at the rate that rests only for want of work, whatever the order
    for each in queued:
        wire_bytes = sum(segment.wire_bytes for _, _, segment in written if segment.message is each)
        free_at = max(free_at, each.queued_at) + wire_bytes * 8 / RATE
    assert written[-1][0] <= free_at + 1e-9


def test_bulk_of_an_older_generation_is_dropped_before_it_costs_rate() -> None:
    shaper = Shaper("a", LAB)
    lane = lane_of(shaper, "b")
    for tag, generation, urgent in ((b"old", 1, False), (b"word", 1, True), (b"new", 2, False), (b"none", 0, False)):
        queued = message(50 * KIB, tag, urgent=urgent)
        queued.generation = generation
        lane.enqueue(queued)
    assert [dropped.tag for dropped in lane.drop_older(2)] == [b"old"]
    assert {s.message.tag for _, _, s in drive(shaper, 10.0) if s.message} == {b"word", b"new", b"none"}


def test_a_lane_that_is_removed_takes_what_it_held_with_it() -> None:
    shaper = Shaper("a", NIC)
    for peer in "bc":
        lane_of(shaper, peer).enqueue(message(100 * KIB, peer.encode()))
    list(shaper.poll(0.0))
    assert [dropped.tag for dropped in shaper.remove("b")] == [b"b"]
    assert {peer for _, peer, _ in drive(shaper, 10.0)} == {"c"}


def test_two_way_traffic_keeps_its_rate_with_acknowledgements_on_board() -> None:
    profile = Profile(rate_bps=RATE, latency_s=0.02, segment_size_bytes=10 * KIB)
    left, right = Side("a", "b", profile, 1), Side("b", "a", profile, 1)
    left.send(b"x", bytes(2_000_000))
    right.send(b"y", bytes(2_000_000))
    assert Wire(left, right).run(10.0, lambda: len(left.received) == len(right.received) == 1)
    assert left.received[0][3] == pytest.approx(2.02, rel=0.01)
    assert right.received[0][3] == pytest.approx(2.02, rel=0.01)
    assert all(segment.message is not None for _, segment in left.segments)  # none needed a frame of its own


flows = st.lists(
    st.tuples(st.sampled_from("bcd"), st.lists(st.integers(500, 40_000), min_size=1, max_size=5)),
    min_size=2,
    max_size=6,
)


@settings(max_examples=50, deadline=None)
@given(flows, st.sampled_from([NIC, LAB]))
def test_flows_that_always_have_something_are_served_alike(plan: list[tuple[str, list[int]]], profile: Profile) -> None:
    """Deficit round robin's own bound: two flows at one port are never more than three full segments apart."""
    shaper = Shaper("a", profile)
    lanes = {peer: lane_of(shaper, peer) for peer in sorted({peer for peer, _ in plan})}
    for flow, (peer, sizes) in enumerate(plan):
        for index in range(300_000 * len(sizes) // sum(sizes)):
            lanes[peer].enqueue(message(sizes[index % len(sizes)], flow=flow))
    waiting = {
        flow: sum(m.total_bytes for m in lanes[peer].flows[flow].messages) for flow, (peer, _) in enumerate(plan)
    }
    served: Counter[int] = Counter()
    now = 0.0
    while True:
        for _, lane, segment in shaper.poll(now):
            assert segment.message is not None
            served[segment.message.flow] += segment.nbytes
            waiting[segment.message.flow] -= segment.nbytes
            if waiting[segment.message.flow] <= 10 * KIB:
                return  # one has no more than a turn left: from here on it may fall behind
            alike = [served[flow] for flow, (peer, _) in enumerate(plan) if lanes[peer].port is lane.port]
            assert max(alike) - min(alike) <= 3 * 10 * KIB
        now = max(now, shaper.next_time())
