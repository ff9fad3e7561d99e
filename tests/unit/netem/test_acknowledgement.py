"""When a link acknowledges: on data if there is any, within its delay if there is none, and before credit runs out."""

import math
import random

import msgspec
import pytest
from helpers.fake_wire import ENDLESS, Side, Wire, bad, lane_of, message
from hypothesis import given, settings
from hypothesis import strategies as st

from netem.frames import VERSION, Header, Kind, decode
from netem.limits import Limits
from netem.link import Link, Terms
from netem.profile import Profile
from netem.shaper import Shaper

KIB = 1024
FAST = Profile(rate_bps=100e6, latency_s=0.005, window_bytes=8 * KIB, segment_size_bytes=KIB)

messages = st.lists(
    st.tuples(st.integers(0, 6 * KIB), st.booleans(), st.integers(0, 2)),  # payload bytes, urgent, flow
    max_size=25,
)


def met(terms: Terms) -> Link:
    """A link that has heard of its peer."""
    link = Link("run", 5, terms)
    link.renewed(Header(VERSION, "run", Kind.DATA, 0, incarnation=9, heard=0, sequence=0, ack=0))
    return link


def test_an_acknowledgement_waits_for_data_but_not_past_half_of_the_peers_window() -> None:
    link = met(Terms(4 * KIB, 2 * KIB, resend_s=1.0, silent_s=10.0, ack_delay_s=0.01))
    link.accept(512, 1.0)
    assert (link.ack_due, link.ack_overdue) == (pytest.approx(1.01), pytest.approx(1.02))
    link.accept(511, 1.001)
    assert (link.ack_due, link.ack_overdue) == (pytest.approx(1.01), pytest.approx(1.02))
    link.accept(1, 1.002)
    assert (link.ack_due, link.ack_overdue) == (1.002, 1.002)
    link.acknowledgement()
    assert (link.ack_due, link.ack_overdue) == (math.inf, math.inf)
    link.accept(512, 2.0)  # counted from the acknowledgement on
    assert link.ack_due == pytest.approx(2.01)


def test_every_new_segment_carries_what_is_owed() -> None:
    link = met(ENDLESS)
    link.accept(4 * KIB, 1.0)
    whole = message(100)
    segment = whole.cut(100)
    whole.ident = 0
    link.stamp(segment)
    assert decode(segment.header, max_tag_bytes=0).ack == 1
    assert (link.ack_due, link.ack_overdue) == (math.inf, math.inf)


def acknowledgements(side: Side) -> list[float]:
    """When frames that only acknowledge were due at the peer."""
    return [arrival for arrival, segment in side.segments if segment.message is None]


@settings(max_examples=40, deadline=None)
@given(messages, messages, st.sampled_from([KIB, 3 * KIB, 4 * KIB]))
def test_no_sender_without_credit_waits_for_the_delay(
    there: list[tuple[int, bool, int]], back: list[tuple[int, bool, int]], segment_bytes: int
) -> None:
    profile = msgspec.structs.replace(FAST, segment_size_bytes=segment_bytes)
    never = Limits(resend_s=1e8, silent_s=1e9)
    left, right = (Side(*names, profile, 1, never, ack_delay_s=1e7) for names in (("a", "b"), ("b", "a")))
    for side, plan in ((left, there), (right, back)):
        for nbytes, urgent, flow in plan:
            side.send(b"", bytes(nbytes), urgent=urgent, flow=flow)
    wire = Wire(left, right)
    assert wire.run(60.0, lambda: len(right.received) == len(there) and len(left.received) == len(back))
    assert left.resent == right.resent == 0


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.floats(0.0, 0.1), st.integers(0, 2 * KIB)), min_size=1, max_size=12))
def test_where_nothing_goes_back_each_message_is_acknowledged_within_the_delay(plan: list[tuple[float, int]]) -> None:
    left, right = Side("a", "b", FAST, 1), Side("b", "a", FAST, 1)
    wire = Wire(left, right)
    for count, (pause_s, nbytes) in enumerate(plan, start=1):
        wire.run(wire.now + pause_s)
        left.send(b"", bytes(nbytes))
        assert wire.run(wire.now + 1.0, lambda count=count: len(right.received) == count)  # type: ignore[misc]
        delay_s = FAST.ack_delay_s("a", "b") + FAST.latency_s + 0.002  # which the shaper may put a choice off
        assert wire.run(wire.now + delay_s, lambda count=count: len(left.completed) == count)  # type: ignore[misc]
    assert len(acknowledgements(right)) <= len(plan)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32), st.floats(0, 0.3), st.floats(0, 0.3), st.floats(0, 0.05))
def test_where_nothing_goes_back_all_is_acknowledged_over_a_bad_wire(
    seed: int, loss: float, repetition: float, disorder_s: float
) -> None:
    left, right = Side("a", "b", FAST, 1), Side("b", "a", FAST, 1)
    wire = Wire(left, right, bad(random.Random(seed), loss, repetition, disorder_s))
    for number in range(12):
        left.send(bytes([number]), bytes(3 * KIB))
    assert wire.run(3600.0, lambda: not left.lane.open)
    assert right.tags == left.completed == [bytes([number]) for number in range(12)]


def test_while_data_goes_both_ways_no_frame_only_acknowledges() -> None:
    profile = Profile(rate_bps=100e6, latency_s=0.005, segment_size_bytes=KIB)
    left, right = Side("a", "b", profile, 1), Side("b", "a", profile, 1)
    wire = Wire(left, right)
    for side in (left, right):
        side.send(b"x", bytes(1000 * KIB))
    assert wire.run(60.0, lambda: len(left.received) == len(right.received) == 1)
    assert acknowledgements(left) == acknowledgements(right) == []


@pytest.mark.parametrize(("others", "has_data", "frames"), [(1, True, 0), (2, True, 1), (1, False, 1)])
def test_at_a_shared_nic_an_acknowledgement_waits_for_its_turn_up_to_twice_the_delay(
    others: int, has_data: bool, frames: int
) -> None:
    shaper = Shaper("a", Profile(scope="nic", rate_bps=8e6, segment_size_bytes=10 * KIB))
    link = met(ENDLESS._replace(ack_delay_s=0.01))
    lanes = [shaper.add("b", link), *(lane_of(shaper, f"c{index}") for index in range(others))]
    for lane in lanes[0 if has_data else 1 :]:
        lane.enqueue(message(100 * KIB))
    list(shaper.poll(0.0))
    link.accept(100, 0.001)
    turn_s = 0.0103  # of one segment
    went = [segment for turn in range(1, 6) for _, _, segment in shaper.poll(turn * turn_s)]
    assert [segment.message is None for segment in went].count(True) == frames
