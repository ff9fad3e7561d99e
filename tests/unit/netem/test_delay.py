"""Between departure and arrival: latency, jitter, and what TCP makes of loss."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netem.delay import Delay
from netem.network import Shape

PLAIN = Shape(None, 0.02, 0)
SHAKY = Shape(None, 0.02, 0, jitter_s=0.01)
LOSSY = Shape(None, 0.02, 0, loss=0.01, timeout_s=0.24)


def arrivals(shape: Shape, departures: list[float], seed: str = "0 a b", nbytes: int = 1000) -> list[float]:
    delay = Delay(shape, seed)
    return [delay.arrival(departure, nbytes) for departure in departures]


def test_latency_alone_is_exact() -> None:
    assert arrivals(PLAIN, [0.0, 1.0]) == [0.02, 1.02]


def test_jitter_is_spread_over_its_whole_range_about_the_latency() -> None:
    taken = [at - number for number, at in enumerate(arrivals(SHAKY, [float(number) for number in range(2000)]))]
    assert 0.01 <= min(taken) < 0.0105
    assert 0.0295 < max(taken) <= 0.03
    assert sum(taken) / len(taken) == pytest.approx(0.02, abs=0.0005)


@given(st.lists(st.floats(0, 0.1), max_size=50), st.sampled_from([SHAKY, LOSSY]))
def test_order_is_kept_and_nothing_is_early(gaps: list[float], shape: Shape) -> None:
    departures, now = [], 0.0
    for gap_s in gaps:
        now += gap_s
        departures.append(now)
    there = arrivals(shape, departures)
    assert all(before <= after for before, after in pairwise(there))
    assert all(at >= left + shape.latency_s - shape.jitter_s for at, left in zip(there, departures, strict=True))


def test_a_lost_packet_costs_its_timeout_and_is_as_frequent_as_said() -> None:
    extra = [at - 100.0 * number - 0.02 for number, at in enumerate(arrivals(LOSSY, [100.0 * n for n in range(5000)]))]
    times = [round(late_s / 0.24, 6) for late_s in extra]
    assert set(times) <= {0, 1, 3, 7}  # the timeout doubles while repeats are lost too
    assert sum(count > 0 for count in times) / len(times) == pytest.approx(0.01, abs=0.004)


def test_a_segment_of_many_packets_is_hit_more_often() -> None:
    there = arrivals(LOSSY, [100.0 * number for number in range(2000)], nbytes=65_536)
    hit = sum(at - 100.0 * number > 0.03 for number, at in enumerate(there)) / 2000
    assert hit == pytest.approx(1 - 0.99**46, abs=0.04)


def test_chance_is_the_seed_s_and_the_link_s() -> None:
    departures = [float(number) for number in range(50)]
    assert arrivals(SHAKY, departures) == arrivals(SHAKY, departures)
    assert arrivals(SHAKY, departures) != arrivals(SHAKY, departures, "0 b a")
    assert arrivals(SHAKY, departures) != arrivals(SHAKY, departures, "1 a b")
