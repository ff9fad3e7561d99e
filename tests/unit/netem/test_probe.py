"""What a link carries, found by probes on a link that is arithmetic."""

from __future__ import annotations

import heapq
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netem.probe import LEAST_WINDOW_BYTES, MOST_WINDOW_BYTES, Echo, Fill, Trickle


def fill(rate_bps: float, latency_s: float, duration_s: float = 3.0, step_s: float = 0.001) -> tuple[float, int, float]:
    """The rate that is found, the most bytes under way at once, and how long the link was busy after the end."""
    probe = Fill(0.0, duration_s, 2 * latency_s)
    now_s, free_s, number, under_way, most = 0.0, 0.0, 0, 0, 0
    echoes: list[tuple[float, int, int, float]] = []
    while not probe.is_over(now_s):
        assert now_s < duration_s + 60
        while echoes and echoes[0][0] <= now_s:
            back_s, index, nbytes, sent_s = heapq.heappop(echoes)
            under_way -= nbytes
            probe.echoed(Echo(index, sent_s, 0.0, 0.0, back_s))
        for nbytes in probe.due(now_s):
            free_s = max(free_s, now_s) + 8 * nbytes / rate_bps
            heapq.heappush(echoes, (free_s + 2 * latency_s, number, nbytes, now_s))
            number += 1
            under_way += nbytes
        most = max(most, under_way)
        now_s += step_s
    return probe.rate_bps(), most, free_s - duration_s


@pytest.mark.parametrize("rate_bps", [1e6, 20e6, 300e6, 2e9])
@pytest.mark.parametrize("latency_s", [0.0005, 0.02, 0.1])
def test_a_full_link_shows_its_rate(rate_bps: float, latency_s: float) -> None:
    found_bps, most, late_s = fill(rate_bps, latency_s)
    if rate_bps * (2 * latency_s + 0.2) / 8 > MOST_WINDOW_BYTES:
        pytest.skip("a window of 16 MiB does not fill this link")
    assert found_bps == pytest.approx(rate_bps, rel=0.1)
    assert most <= max(2 * rate_bps / 8 * (2 * latency_s + 0.3), 2 * LEAST_WINDOW_BYTES)
    assert late_s < 2 * (2 * latency_s + 0.3), "a link stays busy for long"


def test_an_answer_that_nobody_waits_for_changes_nothing() -> None:
    probe = Fill(0.0, 1.0, 0.01)
    assert probe.due(0.0)
    for number in (-1, 10**9, 0, 0):
        probe.echoed(Echo(number, 0.0, 0.0, 0.0, 0.5))
    assert probe.rate_bps() == 0.0
    assert not probe.is_over(2.0)


@given(
    latency_s=st.floats(1e-4, 1.0),
    ahead_s=st.floats(-1e6, 1e6),
    hold_s=st.floats(0.0, 0.5),
)
def test_latency_and_clock_do_not_depend_on_how_long_the_receiver_takes(
    latency_s: float, ahead_s: float, hold_s: float
) -> None:
    probe = Trickle(0.0, 1.0)
    assert len(probe.due(1.0)) == 50
    assert probe.all_sent
    assert probe.next_s() == math.inf
    for number in range(50):
        sent_s = 0.02 * number
        came_s = sent_s + latency_s + ahead_s
        probe.echoed(Echo(number, sent_s, came_s, came_s + hold_s, sent_s + 2 * latency_s + hold_s))
    calm = probe.figures()
    assert probe.all_back
    assert calm.echoed == 50
    assert calm.latency_s == pytest.approx(latency_s, abs=1e-8)
    assert calm.ahead_s == pytest.approx(ahead_s, abs=1e-8)
    assert calm.jitter_s < 1e-8


def test_jitter_leaves_one_probe_in_ten_out() -> None:
    probe = Trickle(0.0, 2.0)
    probe.due(2.0)
    for number in range(100):
        trip_s = 0.1 if number % 20 == 0 else 0.010 if number % 2 else 0.014
        probe.echoed(Echo(number, 0.0, 0.0, 0.0, trip_s))
    calm = probe.figures()
    assert calm.jitter_s == pytest.approx(0.002)


def test_an_answer_counts_once_and_one_to_nothing_never() -> None:
    probe = Trickle(0.0, 1.0)
    probe.due(0.0)
    for number in (0, 0, 1, 49, -1):
        probe.echoed(Echo(number, 0.0, 0.0, 0.0, 0.01))
    assert probe.figures().echoed == 1
    assert Trickle(0.0, 1.0).figures().latency_s == math.inf
