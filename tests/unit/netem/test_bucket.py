"""The bucket's arithmetic: no interval carries more than rate and burst, and nothing that was due is lost."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netem.bucket import TokenBucket, reserve_jointly

requests = st.lists(st.tuples(st.integers(1, 100_000), st.floats(0, 0.1)), min_size=1, max_size=60)


@given(requests, st.floats(1e5, 1e9), st.integers(0, 200_000))
def test_no_interval_carries_more_than_rate_and_burst(
    steps: list[tuple[int, float]], rate_bps: float, burst_bytes: int
) -> None:
    bucket = TokenBucket(rate_bps, burst_bytes)
    ready, departures, sizes = 0.0, [], []
    for nbytes, gap_s in steps:
        ready += gap_s
        departures.append(bucket.reserve(nbytes, ready))
        sizes.append(nbytes)
        assert departures[-1] >= ready
    for i in range(len(sizes)):
        for j in range(i, len(sizes)):
            carried = sum(sizes[i + 1 : j + 1])
            allowed = rate_bps / 8 * (departures[j] - departures[i]) + burst_bytes
            assert carried <= allowed * (1 + 1e-9) + 1e-3


@given(st.lists(st.integers(1, 100_000), min_size=1, max_size=100), st.floats(1e5, 1e9))
def test_a_saturated_bucket_is_exact(sizes: list[int], rate_bps: float) -> None:
    bucket = TokenBucket(rate_bps)
    for nbytes in sizes:
        departure = bucket.reserve(nbytes, 10.0)
    assert departure == pytest.approx(10.0 + sum(sizes) * 8 / rate_bps, rel=1e-9)


def test_a_late_caller_is_repaid_in_full() -> None:
    """The bytes were ready all along; that their owner woke up late must not cost rate."""
    bucket = TokenBucket(8_000)
    assert bucket.reserve(1_000, 0.0) == 1.0
    assert bucket.reserve(1_000, 0.0) == 2.0  # asked for whenever: ready at 0


def test_idle_time_earns_no_more_than_the_burst() -> None:
    bucket = TokenBucket(8_000, burst_bytes=500)
    bucket.reserve(1, 0.0)
    assert bucket.reserve(500, 100.0) == 100.0
    assert bucket.reserve(500, 100.0) == pytest.approx(100.5)
    plain = TokenBucket(8_000)
    plain.reserve(1, 0.0)
    assert plain.reserve(500, 100.0) == pytest.approx(100.5)


def test_unshaped_is_immediate() -> None:
    bucket = TokenBucket(None)
    assert [bucket.reserve(10**9, 1.0), bucket.reserve(10**9, 1.0), bucket.free_at] == [1.0, 1.0, 1.0]


def test_a_bucket_is_free_when_a_reservation_would_not_wait() -> None:
    bucket = TokenBucket(8_000, burst_bytes=500)
    assert bucket.reserve(1_000, 0.0) == 0.5
    assert bucket.free_at == 0.5
    assert bucket.duration(1_000) == 1.0
    assert TokenBucket(None).duration(1_000) == 0.0


@pytest.mark.parametrize(
    ("reserved", "now", "change", "departure"),
    [
        (1_000, 0.0, (8_000, 1_000), 1.0),  # the burst had been used, and no change fills it
        (1_000, 0.5, (8_000, 1_000), 1.0),  # half of it had come back by then
        (1_000, 0.5, (16_000, 1_000), 0.75),  # the other half comes back at the new rate
        (1_000, 0.5, (8_000, 200), 1.5),  # no more can be owed than the new burst
        (3_000, 0.0, (8_000, 4_000), 0.0),  # and what had not left is no longer owed
        (0, 5.0, (8_000, 1_000), 5.0),  # an unused burst is there as a whole
        (1_000, 5.0, (8_000, 1_000), 5.0),  # as is one that has come back
    ],
)
def test_what_was_used_of_the_burst_stays_used_over_a_change(
    reserved: int, now: float, change: tuple[float, int], departure: float
) -> None:
    bucket = TokenBucket(8_000, burst_bytes=1_000)
    if reserved:
        bucket.reserve(reserved, 0.0)
    bucket.reshape(*change, now)
    assert bucket.reserve(1_000, now) == pytest.approx(departure)


def test_what_had_not_left_before_a_change_is_forgotten() -> None:
    bucket = TokenBucket(8_000, burst_bytes=1_000)
    bucket.reserve(3_000, 0.0)  # the burst leaves at once, the rest would have left later
    bucket.reshape(8_000, 4_000, 0.0)
    assert bucket.reserve(4_000, 0.0) == 1.0


def test_a_bucket_that_was_unlimited_owes_nothing() -> None:
    bucket = TokenBucket(None)
    bucket.reserve(10**9, 1.0)
    bucket.reshape(8_000, 0, 1.0)
    assert bucket.reserve(1_000, 1.0) == 2.0


def test_joint_reservation_takes_the_time_of_the_slower_not_of_both() -> None:
    link, egress = TokenBucket(8_000), TokenBucket(16_000)
    assert reserve_jointly((link, egress), 1_000, 0.0) == pytest.approx(1.0)
    assert egress.free_at == pytest.approx(0.5)  # free for another link meanwhile
    assert reserve_jointly((link, egress), 1_000, 0.0) == pytest.approx(2.0)


@given(requests)
def test_joint_reservation_keeps_both_rates(steps: list[tuple[int, float]]) -> None:
    alone = TokenBucket(1e6)
    slow, fast = TokenBucket(1e6), TokenBucket(1e7)
    ready = 0.0
    for nbytes, gap_s in steps:
        ready += gap_s
        assert reserve_jointly((slow, fast), nbytes, ready) == pytest.approx(alone.reserve(nbytes, ready))


changes = st.lists(
    st.tuples(
        st.integers(1, 100_000), st.floats(0, 0.1), st.none() | st.tuples(st.floats(1e5, 1e9), st.integers(0, 200_000))
    ),
    min_size=1,
    max_size=40,
)


@given(changes, st.floats(1e5, 1e9))
def test_a_change_gives_no_credit_and_takes_no_more_than_is_owed(
    steps: list[tuple[int, float, tuple[float, int] | None]], rate_bps: float
) -> None:
    """After a change, whatever was booked before: at most the new burst at once, and never later than from empty."""
    bucket, now, burst_bytes, booked, changed_at = TokenBucket(rate_bps), 0.0, 0, 0, None
    for nbytes, gap_s, change in steps:
        now += gap_s
        if change is not None:
            rate_bps, burst_bytes = change
            bucket.reshape(rate_bps, burst_bytes, now)
            booked, changed_at = 0, now
        departure = bucket.reserve(nbytes, now)
        booked += nbytes
        assert departure >= now
        if changed_at is not None:
            earliest = changed_at + (booked - burst_bytes) * 8 / rate_bps
            assert departure >= earliest - 1e-9 * max(1.0, abs(earliest))
            latest = now + booked * 8 / rate_bps
            assert departure <= latest + 1e-9 * max(1.0, latest)
