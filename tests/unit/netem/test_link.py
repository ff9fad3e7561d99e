"""The link over a wire that loses, repeats and reorders, and between processes that die and return."""

import random

import pytest
from helpers.fake_wire import Side, Wire, bad
from hypothesis import given, settings
from hypothesis import strategies as st

from netem.frames import VERSION, Header, Kind
from netem.limits import Limits
from netem.link import Link, Silence, Terms, Verdict
from netem.profile import Profile
from netem.segments import Message, Segment

KIB = 1024
FAST = Profile(rate_bps=100e6, latency_s=0.005, window_bytes=8 * KIB, segment_size_bytes=KIB)


def make_link(incarnation: int = 5, silent_s: float = 10.0) -> Link:
    return Link("run", incarnation, Terms(4 * KIB, 4 * KIB, 1.0, silent_s, ack_delay_s=0.01))


def header(kind: Kind = Kind.DATA, *, incarnation: int = 9, heard: int = 0, sequence: int = 0, ack: int = 0) -> Header:
    return Header(VERSION, "run", kind, 0, incarnation, heard, sequence, ack)


messages = st.lists(
    st.tuples(st.integers(0, 6 * KIB), st.booleans(), st.integers(0, 2)),  # payload bytes, urgent, flow
    max_size=25,
)


@settings(max_examples=60, deadline=None)
@given(messages, messages, st.integers(0, 2**32), st.floats(0, 0.3), st.floats(0, 0.3), st.floats(0, 0.05))
def test_everything_arrives_exactly_once_in_order_over_a_bad_wire(
    there: list[tuple[int, bool, int]],
    back: list[tuple[int, bool, int]],
    seed: int,
    loss: float,
    repetition: float,
    disorder_s: float,
) -> None:
    chance = random.Random(seed)
    left, right = Side("a", "b", FAST, 1), Side("b", "a", FAST, 1)
    wire = Wire(left, right, bad(chance, loss, repetition, disorder_s))
    expected = []
    for source, target, plan in ((left, right, there), (right, left, back)):
        sent = []
        for number, (nbytes, urgent, flow) in enumerate(plan):
            payload = chance.randbytes(nbytes)
            tag = bytes([number])
            source.send(tag, payload, urgent=urgent, flow=flow)
            sent.append(((urgent, 0 if urgent else flow), tag, payload))
        expected.append((source, target, sent))

    assert wire.run(3600.0, lambda: not left.lane.open and not right.lane.open)

    for source, target, sent in expected:
        got = [(tag, payload) for _, tag, payload, _ in target.received]
        assert sorted(got) == sorted((tag, payload) for _, tag, payload in sent)
        for queue in {queue for queue, _, _ in sent}:
            of_queue = {tag for other, tag, _ in sent if other == queue}
            assert [tag for tag, _ in got if tag in of_queue] == sorted(of_queue)
        assert source.peak_in_flight <= FAST.credit_bytes("a", "b") * 9 // 8
        assert sorted(source.completed) == sorted(tag for _, tag, _ in sent)


def test_a_good_wire_needs_no_repetition() -> None:
    left, right = Side("a", "b", FAST, 1), Side("b", "a", FAST, 1)
    for number in range(50):
        left.send(bytes([number]), bytes(5 * KIB))
        right.send(bytes([number]), bytes(5 * KIB))
    assert Wire(left, right).run(60.0, lambda: len(left.received) == len(right.received) == 50)
    assert left.resent == right.resent == 0


def test_bulk_never_exceeds_the_window_and_control_still_goes() -> None:
    left, right = Side("a", "b", FAST, 1), Side("b", "a", FAST, 1)
    wire = Wire(left, right)
    wire.cut = True  # nothing is acknowledged
    left.send(b"bulk", bytes(100 * KIB))
    wire.run(0.4)
    assert left.link.in_flight_bytes == 8 * KIB
    left.send(b"control", bytes(KIB), urgent=True)
    wire.run(0.45)
    assert left.link.in_flight_bytes == 9 * KIB
    assert left.segments[-1][1].message.tag == b"control"


def test_time_without_credit_is_not_made_up_for() -> None:
    far = Profile(rate_bps=100e6, latency_s=0.1, window_bytes=8 * KIB, segment_size_bytes=KIB)
    left, right = Side("a", "b", far, 1), Side("b", "a", far, 1)
    left.send(b"bulk", bytes(40 * KIB))
    assert Wire(left, right).run(60.0, lambda: bool(right.received))
    assert right.now > 4 * 0.2  # five windows: the last one is sent after four round trips
    for arrival, segment in left.segments:
        assert segment.written_at - arrival < 1e-9  # none is held to have left before its credit came


def test_credit_is_back_at_the_acknowledgement_that_was_waited_for_and_not_at_later_ones() -> None:
    """Otherwise a segment that nothing holds up would count from the latest acknowledgement on."""
    link = make_link()  # a window of four segments
    sent(link, 4)
    assert not link.has_credit(KIB, False)
    acknowledge(link, 1, 0.5)
    assert link.ready_at == 0.5
    acknowledge(link, 2, 0.7)
    assert link.ready_at == 0.5


def test_a_dead_peer_costs_one_segment_a_timeout_and_is_reported_once() -> None:
    left, right = Side("a", "b", FAST, 1), Side("b", "a", FAST, 1)
    wire = Wire(left, right)
    wire.cut = True
    left.send(b"x", bytes(100 * KIB))
    wire.run(19.9)
    assert left.silent_at == float("inf")
    wire.run(20.2)
    assert left.silent_at == pytest.approx(20.0, abs=0.15)
    written = len(left.segments)
    assert written < 8 + 8
    left.silent_at = 0.0
    wire.run(40.0)
    assert left.silent_at == 0.0
    assert len(left.segments) <= written + 2


def test_a_healed_wire_goes_on_where_it_was() -> None:
    left, right = Side("a", "b", FAST, 1), Side("b", "a", FAST, 1)
    wire = Wire(left, right)
    left.send(b"x", bytes(1000 * KIB))
    wire.run(0.05)
    assert right.received == []
    wire.cut = True
    wire.run(5.0)
    wire.cut = False
    assert wire.run(60.0, lambda: right.tags == [b"x"])
    assert left.silent_at == float("inf")


def test_a_peer_that_returns_gets_again_what_it_had_not_acknowledged_as_a_whole() -> None:
    left, right = Side("a", "b", FAST, 1), Side("b", "a", FAST, 1)
    wire = Wire(left, right)
    left.send(b"first", bytes(KIB))
    assert wire.run(1.0, lambda: left.completed == [b"first"])
    left.send(b"second", b"2" * 200 * KIB)
    wire.run(wire.now + 0.01)
    reborn = Side("b", "a", FAST, 2)
    wire.sides[1] = reborn
    left.send(b"third", bytes(KIB))
    assert wire.run(20.0, lambda: reborn.tags == [b"second", b"third"])
    assert reborn.received[0][2] == b"2" * 200 * KIB
    assert wire.run(40.0, lambda: not left.lane.open)


def test_a_peer_that_returned_can_speak_first() -> None:
    left, right = Side("a", "b", FAST, 1), Side("b", "a", FAST, 1)
    wire = Wire(left, right)
    right.send(b"old", bytes(KIB))
    assert wire.run(1.0, lambda: left.tags == [b"old"])
    reborn = Side("b", "a", FAST, 2)
    wire.sides[1] = reborn
    reborn.send(b"new", bytes(KIB))
    assert wire.run(5.0, lambda: left.tags == [b"old", b"new"] and not reborn.lane.open)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0.001, 1.5), min_size=1, max_size=4), st.integers(0, 2**32), st.booleans())
def test_whoever_dies_and_when_the_living_still_understand_each_other(
    deaths: list[float], seed: int, both: bool
) -> None:
    chance = random.Random(seed)
    left, right = Side("a", "b", FAST, 1), Side("b", "a", FAST, 1)
    wire = Wire(left, right, lambda: [] if chance.random() < 0.1 else [chance.random() * 0.01])
    for life, pause_s in enumerate(deaths, start=2):
        for side in wire.sides:
            side.send(b"old", bytes(20 * KIB))
        wire.run(wire.now + pause_s)
        index = chance.randrange(2) if both else 1
        name, peer = ("b", "a") if index else ("a", "b")
        wire.sides[index] = Side(name, peer, FAST, life)
        wire.sides[index].now = wire.now
    one, two = wire.sides
    one.send(b"1", bytes(3 * KIB))
    two.send(b"2", bytes(3 * KIB))
    assert wire.run(wire.now + 600.0, lambda: not one.lane.open and not two.lane.open)
    assert two.tags.count(b"1") == 1
    assert one.tags.count(b"2") == 1


def test_verdicts() -> None:
    link = make_link()
    assert not link.renewed(header())  # the first life that is heard of is nothing new
    assert link.receive(header(), 0.0) is Verdict.NEXT
    link.accept(100, 0.0)
    assert link.receive(header(), 0.0) is Verdict.REPEATED
    assert link.receive(header(sequence=2), 0.0) is Verdict.EARLY
    assert link.receive(header(sequence=1), 0.0) is Verdict.NEXT
    assert link.receive(header(Kind.ACK), 0.0) is Verdict.ACK
    assert link.receive(header(incarnation=8), 0.0) is Verdict.FOREIGN  # an earlier life of the peer
    assert link.receive(header(heard=4, sequence=1), 0.0) is Verdict.FOREIGN  # meant for an earlier life of ours
    assert link.ack_due == 0.0  # which the peer is told
    assert link.receive(header(heard=5, sequence=1), 0.0) is Verdict.NEXT
    assert link.receive(header(heard=0, sequence=1), 0.0) is Verdict.FOREIGN  # it knew us already
    assert link.renewed(header(incarnation=10))
    assert link.receive(header(incarnation=10), 0.0) is Verdict.NEXT  # it starts over


def test_an_acknowledgement_of_what_was_never_sent_is_ignored() -> None:
    link = make_link()
    link.renewed(header())
    message = Message(b"", [memoryview(bytes(2 * KIB))])
    message.ident = 0
    for _ in range(2):
        link.stamp(message.cut(KIB))
    link.receive(header(Kind.ACK, heard=5, ack=3), 0.0)
    assert (link.in_flight_bytes, link.released) == (2 * KIB, [])
    link.receive(header(Kind.ACK, heard=0, ack=2), 0.0)  # from one who does not know us: not for this life
    assert link.released == []
    link.receive(header(Kind.ACK, heard=5, ack=2), 0.0)
    assert (link.in_flight_bytes, len(link.released)) == (0, 2)


def test_no_timer_runs_for_what_is_not_yet_on_the_wire() -> None:
    link = make_link()
    message = Message(b"", [memoryview(bytes(KIB))])
    message.ident = 0
    segment = message.cut(KIB)
    link.stamp(segment)
    assert link.check(1e6) is Silence.NONE
    link.written(segment, 1e6)
    assert link.check(1e6 + 0.9) is Silence.NONE
    assert link.check(1e6 + 1.1) is Silence.RESEND
    assert link.must_repeat
    assert link.repeat() is segment
    assert not link.must_repeat


def sent(link: Link, count: int) -> list[Segment]:
    """So many segments of 1 KiB, numbered and on the wire at 0."""
    whole = Message(b"", [memoryview(bytes(count * KIB))])
    whole.ident = 0
    segments = [whole.cut(KIB) for _ in range(count)]
    for segment in segments:
        link.stamp(segment)
        link.written(segment, 0.0)
    return segments


def acknowledge(link: Link, ack: int, now: float) -> None:
    link.renewed(header())
    link.receive(header(Kind.ACK, heard=link.incarnation, ack=ack), now)


def test_after_a_lost_probe_all_of_the_rest_is_sent_again_at_once() -> None:
    link = make_link()
    segments = sent(link, 4)
    assert link.check(1.0) is Silence.RESEND
    assert link.repeat() is segments[0]
    assert not link.must_repeat  # the probe goes alone
    acknowledge(link, 1, 1.1)
    repeated = []
    while link.must_repeat:
        repeated.append(link.repeat())
    assert repeated == segments[1:]
    assert link.check(1.2) is Silence.NONE


def test_when_more_than_the_probe_had_arrived_nothing_else_is_sent_again() -> None:
    link = make_link()
    segments = sent(link, 4)
    assert link.check(1.0) is Silence.RESEND
    link.repeat()
    acknowledge(link, 2, 1.1)  # the timeout came too soon
    assert not link.must_repeat
    assert link.check(2.0) is Silence.NONE  # patience counts from the progress
    assert link.check(2.1) is Silence.RESEND
    assert link.repeat() is segments[2]


def test_an_acknowledgement_before_the_probe_has_left_withdraws_it() -> None:
    link = make_link()
    sent(link, 4)
    assert link.check(1.0) is Silence.RESEND
    acknowledge(link, 1, 1.05)
    assert not link.must_repeat


def test_patience_doubles_with_each_probe_up_to_32_times_and_is_whole_again_after_progress() -> None:
    link = make_link(silent_s=1e9)
    sent(link, 2)
    now = 0.0
    for patience_s in (1, 2, 4, 8, 16, 32, 32, 32):
        assert link.check(now + patience_s - 0.01) is Silence.NONE
        now += patience_s
        assert link.check(now) is Silence.RESEND
        link.repeat()
    acknowledge(link, 1, now)
    while link.must_repeat:
        link.repeat()
    assert link.check(now + 0.99) is Silence.NONE
    assert link.check(now + 1.0) is Silence.RESEND


def test_while_a_probe_is_out_nothing_new_goes() -> None:
    link = make_link()
    sent(link, 1)
    assert link.has_credit(KIB, urgent=False)
    link.check(1.0)
    link.repeat()
    assert not link.has_credit(KIB, urgent=True)
    acknowledge(link, 1, 1.5)
    assert link.has_credit(KIB, urgent=True)
    assert link.ready_at == 1.5  # what waited for credit was ready then, and not before


def test_losing_a_whole_window_costs_one_timeout_and_not_one_for_each_segment() -> None:
    left, right = Side("a", "b", FAST, 1), Side("b", "a", FAST, 1)
    wire = Wire(left, right)
    wire.cut = True
    left.send(b"x", bytes(8 * KIB))
    wire.run(0.1)
    wire.cut = False
    assert wire.run(1.0, lambda: right.tags == [b"x"])


def test_a_peer_that_is_heard_is_not_silent_even_if_it_acknowledges_nothing() -> None:
    link = make_link()
    link.renewed(header())
    message = Message(b"", [memoryview(bytes(KIB))])
    message.ident = 0
    segment = message.cut(KIB)
    link.stamp(segment)
    link.written(segment, 0.0)
    link.receive(header(Kind.ACK, heard=5), 9.0)
    assert link.check(11.0) is not Silence.DEAD
    assert link.check(19.1) is Silence.DEAD
    assert link.check(19.2) is not Silence.DEAD


def test_an_acknowledgement_that_was_known_already_is_no_progress() -> None:
    link = make_link()
    sent(link, 3)
    acknowledge(link, 1, 0.5)
    acknowledge(link, 1, 1.4)
    assert link.check(1.49) is Silence.NONE
    assert link.check(1.5) is Silence.RESEND


def test_limits_have_sane_defaults() -> None:
    limits = Limits()
    assert limits.resend_s < limits.silent_s
