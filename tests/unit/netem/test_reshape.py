"""A network that changes while it runs: nothing is lost, nothing overtakes, and the new figures hold at once."""

from collections.abc import Iterable
from itertools import pairwise

import pytest
from helpers.fake_wire import Side, Wire, lane_of, message
from hypothesis import given, settings
from hypothesis import strategies as st

from netem.network import CUT_BPS, Line, Pair, Profile
from netem.segments import Segment
from netem.shaper import Shaper

KIB = 1024
MEGABYTE_PER_S = 8e6
LATENCY_S = 0.01


def profile(rate_bps: float | None, scope: str = "link", latency_s: float = LATENCY_S, burst_bytes: int = 0) -> Profile:
    cut = rate_bps == CUT_BPS
    pair = Pair("a", "b", has_rate=True, rate_bps=CUT_BPS)
    return Profile(
        scope="nic" if scope == "nic" else "link",
        rate_bps=MEGABYTE_PER_S if cut else rate_bps,
        latency_s=latency_s,
        burst_bytes=burst_bytes,
        window_bytes=10**9,
        segment_size_bytes=10 * KIB,
        pairs=(pair,) if cut else (),
    )


Written = list[tuple[float, Segment]]


def drive(shaper: Shaper, changes: Iterable[tuple[float, Profile]], until: float) -> Written:
    """What arrives, with its times, while the profile changes at those times."""
    now, written, waiting = 0.0, [], list(changes)
    while now <= until:
        while waiting and waiting[0][0] <= now:
            shaper.reshape(waiting.pop(0)[1], now)
        written += [(arrival, segment) for arrival, _, segment in shaper.poll(now)]
        now = max(now, min(shaper.next_time(), waiting[0][0] if waiting else until + 1))
    return written


def begin(first: Profile, nbytes: int) -> Shaper:
    shaper = Shaper("a", first)
    lane_of(shaper, "b").enqueue(message(nbytes))
    return shaper


@pytest.mark.parametrize("scope", ["link", "nic"])
@pytest.mark.parametrize(("before", "after"), [(1e5, 1e8), (1e8, 1e5), (None, 1e6), (1e6, None)])
def test_a_new_rate_holds_from_its_moment_on(scope: str, before: float | None, after: float | None) -> None:
    shaper = begin(profile(before, scope), 0)
    drive(shaper, [], 0.5)
    lane_of(shaper, "c").enqueue(message(1_000_000, at=0.5))
    written = drive_on(shaper, 0.5, 0.6, profile(after, scope), 200.0)
    before_bytes = 1_000_000 if before is None else min(0.1 * before / 8, 1_000_000)
    rest_s = 0.0 if after is None else max(0.0, 1_000_000 - before_bytes) * 8 / after
    end = 0.6 + rest_s if before_bytes < 1_000_000 else 0.5 + (8e6 / before if before else 0.0)
    assert written[-1][0] == pytest.approx(end + LATENCY_S, rel=0.01)  # headers weigh little


def drive_on(shaper: Shaper, start: float, change_at: float, after: Profile, until: float) -> Written:
    now, written, changed = start, [], False
    while now <= until:
        if now >= change_at and not changed:
            shaper.reshape(after, now)
            changed = True
        written += [(arrival, segment) for arrival, _, segment in shaper.poll(now)]
        now = max(now, min(shaper.next_time(), until + 1 if changed else change_at))
    return written


@pytest.mark.parametrize("scope", ["link", "nic"])
def test_over_a_cut_link_nothing_passes_until_it_is_healed(scope: str) -> None:
    whole = profile(MEGABYTE_PER_S, scope)
    written = drive(begin(whole, 1_000_000), [(0.5, profile(CUT_BPS, scope)), (3.0, whole)], 10.0)
    assert not [at for at, _ in written if 0.5 + LATENCY_S < at < 3.0]
    assert sum(segment.nbytes for _, segment in written) == 1_000_000
    assert written[-1][0] == pytest.approx(3.5 + LATENCY_S, rel=0.01)


def test_time_behind_a_cut_is_no_credit() -> None:
    whole, cut = profile(MEGABYTE_PER_S), profile(CUT_BPS)
    shaper = begin(whole, 0)
    drive(shaper, [(0.5, cut)], 1.0)
    shaper._lanes["b"].enqueue(message(1_000_000, at=1.0))
    written = drive_on(shaper, 1.0, 3.0, whole, 10.0)
    assert written[-1][0] == pytest.approx(4.0 + LATENCY_S, rel=0.01)


def test_a_cut_leaves_the_other_links_of_a_nic_alone() -> None:
    shaper = Shaper("a", profile(CUT_BPS, "nic"))
    lane_of(shaper, "b").enqueue(message(100_000))
    lane_of(shaper, "c").enqueue(message(1_000_000))
    written = drive(shaper, [], 5.0)
    assert sum(segment.nbytes for _, segment in written) == 1_000_000
    assert written[-1][0] == pytest.approx(1.0 + LATENCY_S, rel=0.01)


def test_a_line_that_is_cut_cuts_all_its_links_in_either_scope() -> None:
    for base in (profile(MEGABYTE_PER_S), profile(MEGABYTE_PER_S, "nic")):
        for line in (Line("a", "up", CUT_BPS), Line("b", "down", CUT_BPS)):
            network = Profile(scope=base.scope, rate_bps=base.rate_bps, lines=(line,))
            assert network.link("a", "b").rate_bps == CUT_BPS
            assert network.link("b", "a").rate_bps != CUT_BPS


def test_less_latency_lets_nothing_overtake() -> None:
    far, near = profile(MEGABYTE_PER_S, latency_s=1.0), profile(MEGABYTE_PER_S, latency_s=0.001)
    written = drive(begin(far, 1_000_000), [(0.5, near)], 5.0)
    assert [segment.offset for _, segment in written] == sorted(segment.offset for _, segment in written)
    assert written[-1][0] == pytest.approx(1.5, rel=0.02)  # behind the last one that was under way


rates = st.sampled_from([1e5, 1e6, 8e6, 1e8, CUT_BPS])
steps = st.lists(st.tuples(st.floats(0.001, 0.3), rates), min_size=1, max_size=8)
sizes = st.lists(st.integers(0, 60_000), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(steps, sizes, st.sampled_from(["link", "nic"]), st.integers(0, 30_000))
def test_however_it_changes_all_arrives_once_in_order_and_never_faster_than_the_rates_of_its_time(
    plan: list[tuple[float, float]], nbytes: list[int], scope: str, burst_bytes: int
) -> None:
    shaper = Shaper("a", profile(8e6, scope, burst_bytes=burst_bytes))
    lane = lane_of(shaper, "b")
    for size in nbytes:
        lane.enqueue(message(size))
    changes, now = [(0.0, 8e6)], 0.0
    for gap_s, rate_bps in plan:
        now += gap_s
        changes.append((now, rate_bps))
    changes.append((now + 1.0, 8e6))
    shapes = [(at, profile(rate_bps, scope, burst_bytes=burst_bytes)) for at, rate_bps in changes[1:]]
    written = drive(shaper, shapes, 1e4)
    order = [(segment.message.ident, segment.offset) for _, segment in written if segment.message]
    assert order == sorted(set(order))
    assert sum(segment.nbytes for _, segment in written) == sum(nbytes)

    def allowed(until: float) -> float:
        """Bytes that the rates let out by then."""
        ends = [at for at, _ in changes[1:]] + [float("inf")]
        return sum(
            rate_bps / 8 * max(0.0, min(until, end) - at) for (at, rate_bps), end in zip(changes, ends, strict=True)
        )

    bursts_bytes = burst_bytes * (1 + sum(rate_bps == CUT_BPS for _, rate_bps in changes))  # a cut is idle time
    for index, (begins, first) in enumerate(written):
        carried = 0
        for ends, segment in written[index + 1 :]:
            carried += segment.wire_bytes
            most = allowed(ends - LATENCY_S) - allowed(begins - LATENCY_S) + bursts_bytes + first.wire_bytes
            assert carried <= most * (1 + 1e-9) + 1
    assert all(before <= after for (before, _), (after, _) in pairwise(written))


def test_a_peer_behind_a_cut_link_falls_silent_even_if_nothing_was_under_way() -> None:
    whole = Profile(rate_bps=MEGABYTE_PER_S)
    cut = Profile(rate_bps=MEGABYTE_PER_S, pairs=(Pair("*", "*", has_rate=True, rate_bps=CUT_BPS),))
    left, right = Side("a", "b", whole, 1), Side("b", "a", whole, 2)
    wire = Wire(left, right)
    left.send(b"before")
    assert wire.run(1.0, lambda: right.tags == [b"before"] and left.completed == [b"before"])
    for side in (left, right):
        side.shaper.reshape(cut, wire.now)
    left.send(b"after", bytes(100_000))
    wire.run(wire.now + 60.0)
    assert left.silent_at == pytest.approx(20.0, abs=1.0)  # `silent_s` of these limits
    for side in (left, right):
        side.shaper.reshape(whole, wire.now)
    assert wire.run(wire.now + 10.0, lambda: right.tags == [b"before", b"after"])


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0.0, 0.002, 0.02]), st.sampled_from([0.0, 0.005]))
def test_with_jitter_and_loss_everything_is_delivered_once_in_order_and_nothing_is_sent_twice(
    seed: int, loss: float, jitter_s: float
) -> None:
    network = Profile(rate_bps=MEGABYTE_PER_S, latency_s=0.02, jitter_s=jitter_s, loss=loss, seed=seed)
    left, right = Side("a", "b", network, 1), Side("b", "a", network, 2)
    tags = [str(number).encode() for number in range(20)]
    for tag in tags:
        left.send(tag, bytes(int(tag) * 5_000))
        right.send(tag, bytes(int(tag) * 1_000))
    assert Wire(left, right).run(300.0, lambda: len(left.completed) == len(right.completed) == 20)
    assert left.tags == right.tags == tags
    if not loss:
        assert left.resent == right.resent == 0
