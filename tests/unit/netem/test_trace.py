"""Traces: what is parsed, what is refused and where, and that a step function steps where it says."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import netem.profile
from netem.config import convert
from netem.errors import ConfigError
from netem.trace import PACKET_BYTES, Trace, TraceConfig, parse_csv, parse_mahimahi, trace_of

CSV = "time_s,rate_bps\n0,1e6\n1.5,0\n2,3e6\n"


def trace(folder: Path = Path(), **settings: object) -> Trace:
    return trace_of(convert(TraceConfig, settings, "trace"), "trace.", folder)


def test_rows_csv_with_units_and_csv_in_numbers_say_the_same(tmp_path: Path) -> None:
    (tmp_path / "numbers.csv").write_text(CSV)
    (tmp_path / "units.csv").write_text("time, rate\n0 s, 1 Mbit/s\n1500 ms, cut\n2 s, 3 Mbit/s\n")
    rows = trace(rows=[["0 s", "1 Mbit/s"], ["1500 ms", "cut"], ["2 s", "3 Mbit/s"]])
    assert rows == Trace((0.0, 1.5, 2.0), (1e6, 0.0, 3e6))
    assert trace(tmp_path, csv="numbers.csv") == trace(tmp_path, csv="units.csv") == rows
    assert [rows.rate_at(t) for t in (0, 1.49, 1.5, 1.99, 2, 1e9)] == [1e6, 1e6, 0, 0, 3e6, 3e6]
    assert [rows.next_change_s(t) for t in (0, 1.5, 2)] == [1.5, 2, math.inf]


def test_a_byte_order_mark_is_no_part_of_a_trace(tmp_path: Path) -> None:
    for key, text in (("csv", CSV), ("mahimahi", "5\n10\n")):
        (tmp_path / key).write_text(text)
        plain = trace(tmp_path, **{key: key})
        (tmp_path / key).write_text(text, encoding="utf-8-sig")
        assert trace(tmp_path, **{key: key}) == plain


def test_with_a_period_it_begins_again() -> None:
    rows = trace(rows=[["0 s", "1 Mbit/s"], ["2 s", "unlimited"]], period="5 s")
    assert [rows.rate_at(t) for t in (4.9, 5, 6.9, 7, 10)] == [None, 1e6, 1e6, None, 1e6]
    assert [rows.next_change_s(t) for t in (2, 5, 7)] == [5, 7, 10]
    slow = rows.dilated(10)
    assert [slow.rate_at(t) for t in (49, 50, 70)] == [None, 1e5, None]


times = st.lists(st.floats(0.001, 1e4), max_size=8, unique=True).map(lambda later: (0.0, *sorted(later)))


@settings(max_examples=50, deadline=None)
@given(times_s=times, period=st.none() | st.floats(0.01, 100), start=st.floats(0, 1e5))
def test_it_changes_only_when_it_says_and_always_gets_on(
    times_s: tuple[float, ...], period: float | None, start: float
) -> None:
    period_s = None if period is None else times_s[-1] + period
    one = Trace(times_s, tuple(float(place) for place in range(len(times_s))), period_s)
    at = start
    for _ in range(20):
        after = one.next_change_s(at)
        assert after > at
        assert one.rate_at(math.nextafter(min(after, 1e9), 0)) == one.rate_at(at)
        if after == math.inf:
            break
        assert one.rate_at(after) != one.rate_at(at)
        at = after


def test_mahimahi_opportunities_become_rates_over_windows() -> None:
    lines = ["10", "20", "100", "100", "150", "400"]
    one = parse_mahimahi("t", lines, 0.1)
    bits = PACKET_BYTES * 8
    assert one.period_s == 0.4
    assert one.rates_bps == pytest.approx([4 * bits / 0.1, bits / 0.1, 0.0, bits / 0.1])
    assert one.rate_at(0.45) == one.rate_at(0.05)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(0, 3000), min_size=1, max_size=200).filter(lambda ms: max(ms) > 0),
    st.sampled_from([0.001, 0.03, 0.1, 1.0, 60.0]),
)
def test_a_period_carries_all_its_opportunities_and_none_too_soon(times_ms: list[int], window_s: float) -> None:
    times_ms.sort()
    one = parse_mahimahi("t", [str(ms) for ms in times_ms], window_s)
    assert one.period_s is not None
    ends_s = [*one.times_s[1:], one.period_s]
    carried, capacity = 0, 0.0
    for begin_s, end_s, rate_bps in zip(one.times_s, ends_s, one.rates_bps, strict=True):
        assert rate_bps is not None
        capacity += rate_bps * (end_s - begin_s) / 8 / PACKET_BYTES
        assert round(capacity) >= carried
        carried = sum(ms / 1000 <= end_s + 1e-9 for ms in times_ms)
        assert capacity == pytest.approx(carried, abs=1e-3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "t.csv, line 1: expected the header time,rate"),
        ("time,speed\n", "t.csv, line 1: expected the header"),
        ("time_s,rate_bps\n", "t.csv, line 2: expected a time and a rate"),
        ("time_s,rate_bps\n0,1,2\n", "t.csv, line 2: '0,1,2': expected a time, a comma and a rate"),
        ("time_s,rate_bps\n0,1\n\n", "t.csv, line 3: '': expected a time"),
        ("time_s,rate_bps\n0,1\n1,fast\n", "t.csv, line 3: 'fast': expected a number"),
        ("time_s,rate_bps\n0,-1\n", "t.csv, line 2: '-1': expected a number of 0 or more"),
        ("time_s,rate_bps\n0,nan\n", "t.csv, line 2: 'nan'"),
        ("time_s,rate_bps\n1,1\n", "t.csv, line 2: 1 s: expected the first time to be 0"),
        ("time_s,rate_bps\n0,1\n2,1\n2,1\n", "t.csv, line 4: 2 s: expected more than 2 s"),
        ("time,rate\n0 s,1 Mbps\n", "t.csv, line 2 = '1 Mbps': 'Mbps' is not a unit"),
        ("time,rate\n0,1 Mbit/s\n", "t.csv, line 2 = '0': the unit is missing"),
    ],
)
def test_a_wrong_csv_names_the_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(ConfigError) as caught:
        trace(tmp_path, csv="t.csv")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "t: expected a last line of more than 0"),
        ("0\n", "t: expected a last line of more than 0"),
        ("1\n1.5\n", "t, line 2: '1.5': expected a whole number"),
        ("1\n-2\n", "t, line 2: '-2'"),
        ("1\n\n3\n", "t, line 2: ''"),
        ("5\n4\n", "t, line 2: 4: expected at least 5"),
        ("999999999999\n", "t: .* windows of 0.1 s; expected at most"),
    ],
)
def test_a_wrong_mahimahi_trace_names_the_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "t").write_text(text)
    with pytest.raises(ConfigError, match=message):
        trace(tmp_path, mahimahi="t")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "trace: expected exactly one of rows, csv and mahimahi"),
        ({"csv": "a", "mahimahi": "b"}, "trace: expected exactly one of"),
        ({"csv": "gone.csv"}, "trace.csv = 'gone.csv': there is no such file in"),
        ({"mahimahi": "gone", "period": "1 s"}, "trace.period = '1 s': goes with rows and csv"),
        ({"mahimahi": "gone", "window": "0 s"}, "trace.window = '0 s': expected more than 0"),
        ({"rows": [["0 s", "1 Mbit/s"], ["3 s", "cut"]], "period": "3 s"}, "trace.period = '3 s': expected more than"),
        ({"rows": [["0 s", "0 bit/s"]]}, r"trace.rows\[0\] = '0 bit/s'"),
        ({"rows": [["1 s", "cut"]]}, r"trace.rows\[0\]: 1 s: expected the first time to be 0"),
        ({"direction": "left"}, "trace.direction = \"left\": expected one of 'up', 'down', 'both'"),
        ({"file": "x"}, "trace.file = 'x': unknown key"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        trace(tmp_path, **settings)


def test_the_built_in_trace_is_made_from_a_seed() -> None:
    draw, wander, rates_bps = random.Random(4), 0.0, []
    for second in range(120):
        wander = 0.85 * wander + draw.gauss(0, 0.3)
        tunnel = 70 <= second < 72
        rates_bps.append(0.0 if tunnel else round(min(20e6 * math.exp(wander), 100e6), -4))
    lines = (Path(netem.profile.__file__).parent / "profiles" / "lte-drive.csv").read_text().splitlines()
    assert [rate for _, _, rate in parse_csv("lte-drive", lines)] == rates_bps
    assert sum(rates_bps) / len(rates_bps) == pytest.approx(25e6, rel=0.01)
