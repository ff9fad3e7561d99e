"""Which connections are kept, and which are closed when there are too many."""

import random

from netem.door import Door, DoorCounters, DoorLimits

LIMITS = DoorLimits(most_new=4, most_new_of_a_source=3, most=8, new_per_s=10.0)
FAST = DoorLimits(most_new=4, most_new_of_a_source=3, most=8, new_per_s=1e9)


def test_there_is_room_for_those_that_prove_themselves() -> None:
    door = Door(FAST)
    for descriptor in range(8):
        assert door.accepted(descriptor, "a", float(descriptor)) is None
        door.proved(descriptor)
    assert len(door) == 8
    assert door.accepted(8, "b", 9.0) == 8, "all places are taken by callers with a key"
    door.closed(3)
    assert door.accepted(8, "b", 9.0) is None
    assert door.counters == DoorCounters(accepted=10, crowded=1)


def test_the_oldest_without_proof_makes_room_first_of_its_own_source() -> None:
    door = Door(FAST)
    assert [door.accepted(descriptor, "b", 0.0) for descriptor in (1, 2, 3)] == [None] * 3
    assert door.accepted(10, "a", 1.0) is None
    assert door.accepted(11, "a", 2.0) == 1, "most_new"
    door.proved(2)
    assert [door.accepted(12, "a", 3.0), door.accepted(13, "a", 4.0)] == [None, 10]
    assert door.counters.crowded == 2


def test_a_connection_whose_end_was_missed_is_counted_once() -> None:
    door = Door(FAST)
    for now in range(10):
        assert door.accepted(5, "a", float(now)) is None
    assert len(door) == 1
    door.closed(5)
    door.closed(5)
    door.proved(5)
    assert len(door) == 0


def test_a_source_that_is_too_fast_is_held_off_and_others_are_not() -> None:
    door = Door(LIMITS)
    kept = 0
    for number in range(100):
        kept += door.accepted(number, "a", number * 0.01) is None
        door.closed(number)
    assert 3 + 10 <= kept <= 3 + 10 + 2, "the burst, and ten a second"
    assert door.accepted(200, "b", 1.0) is None
    assert door.counters.hasty == 100 - kept
    assert door.accepted(201, "a", 9.0) is None


def test_no_count_grows_without_end_whatever_comes() -> None:
    draw = random.Random(7)
    door = Door(LIMITS)
    now = 0.0
    open_ = set()
    for _ in range(20_000):
        now += draw.choice([0.0, 0.001, 0.5])
        descriptor = draw.randrange(40)
        match draw.randrange(4):
            case 0:
                door.closed(descriptor)
                open_.discard(descriptor)
            case 1:
                door.proved(descriptor)
            case _:
                open_.discard(descriptor)
                shut = door.accepted(descriptor, f"10.0.0.{draw.randrange(60)}", now)
                if shut != descriptor:
                    open_.add(descriptor)
                open_.discard(shut)
        assert len(door) == len(open_) <= LIMITS.most
        assert len(door._new) <= LIMITS.most_new
        assert sum(map(len, door._new_of.values())) == len(door._new)
        assert len(door._free_at) <= LIMITS.most
