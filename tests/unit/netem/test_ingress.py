"""How senders share the NIC of their receiver."""

import math
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from netem.ingress import Ingress, SenderClock

RATE = 8e6  # a megabyte a second

Arrivals = list[tuple[float, str, int]]


def through(arrivals: Arrivals, rate_bps: float | None = RATE, late_s: float = 0.0) -> list[tuple[float, str, int]]:
    """When each segment is through, whose it is and of how many bytes, polled `late_s` after each time asked for."""
    ingress: Ingress[tuple[str, int]] = Ingress(rate_bps)
    waiting, done, now = sorted(arrivals), [], 0.0
    while waiting or ingress.next_time() < math.inf:
        now = max(now, min(waiting[0][0] if waiting else math.inf, ingress.next_time() + late_s))
        while waiting and waiting[0][0] <= now:
            at, sender, nbytes = waiting.pop(0)
            ingress.push(sender, (sender, nbytes), nbytes, at)
        done += [(now, *item) for item in ingress.poll(now)]
    return done


def steady(sender: str, rate_bps: float, seconds: float, nbytes: int = 10_000) -> Arrivals:
    gap_s = nbytes * 8 / rate_bps
    return [((number + 1) * gap_s, sender, nbytes) for number in range(int(seconds / gap_s))]


def test_a_single_sender_is_not_delayed() -> None:
    arrivals = steady("a", RATE, 2.0)
    assert [at for at, _, _ in through(arrivals)] == pytest.approx([at for at, _, _ in arrivals])


def test_without_a_rate_all_are_through_at_once() -> None:
    arrivals = [(1.0, "a", 10_000), (1.0, "b", 10_000), (2.0, "a", 1)]
    assert [at for at, _, _ in through(arrivals, None)] == [1.0, 1.0, 2.0]


def test_two_senders_take_the_time_of_both() -> None:
    done = through(steady("a", RATE, 1.0) + steady("b", RATE, 1.0))
    assert done[-1][0] == pytest.approx(2.0, abs=0.011)
    half = Counter(sender for at, sender, _ in done if at <= 1.0)
    assert abs(half["a"] - half["b"]) <= 1


def test_a_sender_of_little_is_hardly_held_up_by_one_of_much() -> None:
    bulk = [(0.0, "bulk", 10_000)] * 100
    small = [(0.105 * (number + 1), "small", 100) for number in range(8)]
    done = through(bulk + small)
    for (at, _, _), (asked, _, _) in zip([entry for entry in done if entry[1] == "small"], small, strict=True):
        assert at - asked < 0.011  # the segment in service, and its own


senders = st.lists(st.tuples(st.floats(0.1, 2.0), st.sampled_from([1_000, 5_000, 10_000])), min_size=1, max_size=6)


def max_min(demands: list[float], capacity: float) -> list[float]:
    """Water filling."""
    shares, left = [0.0] * len(demands), list(range(len(demands)))
    while left:
        each = capacity / len(left)
        content = [index for index in left if demands[index] <= each]
        if not content:
            for index in left:
                shares[index] = each
            break
        for index in content:
            shares[index] = demands[index]
            capacity -= demands[index]
            left.remove(index)
    return shares


@settings(max_examples=30, deadline=None)
@given(senders)
def test_shares_are_max_min_fair_whatever_is_sent_in_which_segments(plan: list[tuple[float, int]]) -> None:
    seconds = 3.0
    arrivals: Arrivals = []
    for index, (demand, nbytes) in enumerate(plan):
        arrivals += steady(str(index), demand * RATE, seconds, nbytes)
    served = Counter[str]()
    for at, sender, nbytes in through(arrivals):
        if at <= seconds:
            served[sender] += nbytes
    fair = max_min([demand * RATE for demand, _ in plan], RATE)
    for index, share_bps in enumerate(fair):
        assert served[str(index)] == pytest.approx(share_bps / 8 * seconds, abs=5 * 10_000)


bursts = st.lists(st.tuples(st.floats(0, 1), st.sampled_from("abc"), st.integers(1, 20_000)), min_size=1, max_size=40)


@settings(deadline=None)
@given(bursts, st.floats(0, 0.05))
def test_no_window_carries_more_than_the_rate_and_all_comes_through_in_order(arrivals: Arrivals, late_s: float) -> None:
    done = through(arrivals, late_s=late_s)
    for sender in "abc":
        sent = [nbytes for _, name, nbytes in sorted(arrivals) if name == sender]
        assert [nbytes for _, name, nbytes in done if name == sender] == sent
    if late_s:
        return
    for first in range(len(done)):
        carried = 0
        for at, _, nbytes in done[first:]:
            carried += nbytes
            assert carried <= RATE / 8 * (at - done[first][0]) + done[first][2] + 20_000 + 1e-3


@settings(deadline=None)
@given(bursts)
def test_it_never_rests_while_something_waits(arrivals: Arrivals) -> None:
    """All is through when a server at the rate, without any pause but for want of work, would have it through."""
    free_at = 0.0
    for at, _, nbytes in sorted(arrivals):
        free_at = max(free_at, at) + nbytes * 8 / RATE
    assert through(arrivals)[-1][0] <= free_at + 1e-9


@settings(deadline=None)
@given(bursts, st.data())
def test_what_is_read_late_is_served_in_the_time_that_was_there_for_it(arrivals: Arrivals, data: st.DataObject) -> None:
    """However late segments are read, all is through as early as it would have been, or when the last one is read."""
    ingress: Ingress[None] = Ingress(RATE)
    free_at, read_at = 0.0, dict.fromkeys("abc", 0.0)
    pushes = []
    for at, sender, nbytes in sorted(arrivals):
        free_at = max(free_at, at) + nbytes * 8 / RATE
        read_at[sender] = max(read_at[sender], at + data.draw(st.floats(0, 0.05)))
        pushes.append((read_at[sender], at, sender, nbytes))
    last, through, count = 0.0, 0.0, 0
    for now, at, sender, nbytes in sorted(pushes):
        count += sum(1 for _ in ingress.poll(now))
        ingress.push(sender, None, nbytes, at)
        last = now
    while (at := ingress.next_time()) < math.inf:
        through = max(at, last)
        count += sum(1 for _ in ingress.poll(through))
    assert count == len(arrivals)
    # A pause too short to be remembered may be lost for each segment.
    assert through <= max(free_at, last) + 0.0001 * len(arrivals) + 1e-9


@given(st.floats(-1e6, 1e6), st.lists(st.tuples(st.floats(0, 1), st.floats(0, 0.1)), min_size=1, max_size=4))
def test_the_time_at_which_a_frame_was_due_is_found_from_the_quickest(
    offset_s: float, frames: list[tuple[float, float]]
) -> None:
    clock, now, quickest_s = SenderClock(), 0.0, math.inf
    for gap_s, late_s in frames:  # within one window
        due = now + gap_s
        now = due + late_s
        quickest_s = min(quickest_s, late_s)
        found = clock.arrival(due - offset_s, now)
        assert found <= now
        assert found == pytest.approx(due + quickest_s, abs=1e-6)


def test_a_clock_that_runs_faster_is_followed() -> None:
    clock = SenderClock()
    for second in range(1000):
        now = float(second)
        found = clock.arrival(now * (1 + 1e-4), now)  # it gains 0.1 ms a second, and nothing is ever late
        assert now - 0.0011 <= found <= now


def test_another_rate_holds_at_once_for_what_waits_and_what_is_halfway() -> None:
    ingress: Ingress[int] = Ingress(RATE / 100)
    for number in range(10):
        ingress.push("a", number, 10_000, 0.0)
    assert list(ingress.poll(0.5)) == [0]  # trickled in while it was sent
    ingress.reshape(RATE, 0.5)
    out: list[tuple[float, int]] = []
    now = 0.5
    while ingress.next_time() < math.inf:
        now = max(now, ingress.next_time())
        out += [(now, number) for number in ingress.poll(now)]
    assert [number for _, number in out] == list(range(1, 10))
    assert out[-1][0] == pytest.approx(0.5 + 0.085, abs=0.011)
    assert all(after[0] - before[0] <= 0.011 for before, after in pairwise(out))


@pytest.mark.parametrize("wrong_s", [3600.0, -3600.0, 1e12])
def test_a_stamp_that_is_far_off_takes_no_sender_out_of_the_nics_time(wrong_s: float) -> None:
    """Wrong, or of a peer whose clock began anew: what comes after it is at most a second early, and not for long."""
    clock = SenderClock()
    for step in range(1, 4000):
        now = 0.005 * step
        arrival = clock.arrival(5000.0 + now + (wrong_s if step == 200 else 0.0), now)
        assert now - 1.0 <= arrival <= now
    assert arrival == pytest.approx(now), "it is forgotten after two windows"


def test_the_least_delay_of_the_window_before_still_counts_and_an_older_one_does_not() -> None:
    """Clocks drift apart, so that a delay measured long ago says nothing about now."""
    clock = SenderClock()
    assert clock.arrival(0.0, 0.1) == pytest.approx(0.1)
    assert clock.arrival(4.7, 5.2) == pytest.approx(4.8)  # read 0.4 s after it was due
    assert clock.arrival(9.9, 10.3) == pytest.approx(10.3)  # 0.4 is the least that is known now


def test_after_a_pause_of_two_windows_nothing_is_known_of_the_delay() -> None:
    clock = SenderClock()
    clock.arrival(0.0, 0.1)
    assert clock.arrival(11.6, 12.1) == pytest.approx(12.1)


def test_what_waits_is_counted_by_sender_until_its_turn() -> None:
    ingress: Ingress[int] = Ingress(RATE)
    for number in range(4):
        ingress.push("a", number, 10_000, 0.0)
    ingress.push("b", 4, 500, 0.0)
    assert [ingress.waiting_bytes(sender) for sender in ("a", "b", "c")] == [40_000, 500, 0]
    list(ingress.poll(0.0105))
    assert ingress.waiting_bytes("a") == 10_000  # the first had trickled in, the second is through, one has begun
    list(ingress.poll(1.0))
    assert [ingress.waiting_bytes(sender) for sender in ("a", "b")] == [0, 0]


def test_items_that_move_to_another_place_in_the_queue_keep_their_order_and_leave_the_rest() -> None:
    ingress: Ingress[tuple[str, int]] = Ingress(RATE)
    for number in range(6):
        ingress.push("?", ("ab"[number % 2], number), 10_000, 0.0)
    ingress.move("?", "a", lambda item: item[0] == "a")
    ingress.move("?", "c", lambda item: item[0] == "c")
    assert (ingress.waiting_bytes("?"), ingress.waiting_bytes("a"), ingress.waiting_bytes("c")) == (30_000, 30_000, 0)
    ingress.move("?", "b", lambda item: True)
    assert ingress.waiting_bytes("?") == 0
    done = list(ingress.poll(10.0))
    assert [number for name, number in done if name == "a"] == [0, 2, 4]
    assert [number for name, number in done if name == "b"] == [1, 3, 5]
    assert ingress.next_time() == math.inf


def test_a_crowd_in_one_place_delays_a_sender_no_more_than_one_item() -> None:
    """As strangers do, who share a place (netem.engine)."""
    crowd = [(0.0, "?", 10_000)] * 300
    done = through([*crowd, (0.5, "member", 100)])
    assert next(at for at, sender, _ in done if sender == "member") < 0.5 + 0.011
