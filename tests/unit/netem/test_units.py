import math
import re
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netem.errors import ConfigError
from netem.units import (
    format_rate,
    format_size,
    format_time,
    parse_latency,
    parse_rate,
    parse_share,
    parse_size,
    parse_time,
)


@pytest.mark.parametrize(
    ("text", "rate_bps"),
    [
        ("300 Mbit/s", 300e6),
        ("100Gbit/s", 100e9),
        ("1.5 kbit/s", 1500.0),
        (" 8000 bit/s ", 8000.0),
        ("1 kbit/s", 1e3),
        ("1000 Tbit/s", 1e15),
        ("unlimited", None),
    ],
)
def test_rates(text: str, rate_bps: float | None) -> None:
    assert parse_rate(text) == rate_bps


@pytest.mark.parametrize(("text", "seconds"), [("25 ms", 0.025), ("50 us", 50e-6), ("2 s", 2.0), ("0 ms", 0.0)])
def test_times(text: str, seconds: float) -> None:
    assert parse_time(text) == pytest.approx(seconds)


@pytest.mark.parametrize(("text", "nbytes"), [("64 KB", 64_000), ("64 KiB", 65_536), ("1 MB", 10**6), ("0 B", 0)])
def test_sizes(text: str, nbytes: int) -> None:
    assert parse_size(text) == nbytes


def test_shares() -> None:
    assert parse_share("0.1 %") == pytest.approx(0.001)
    assert parse_share("0%") == 0.0
    for text in ("0.1", "10 percent", "50 %", "-1 %"):
        with pytest.raises(ConfigError, match=f"net.loss = '{text}': "):
            parse_share(text, "net.loss")


@pytest.mark.parametrize(
    "text",
    [
        "300",
        "300 Mb",
        "0.001 bit/s",
        "1e9 Tbit/s",
        "300 Mbps",
        "300 MB/s",
        "-1 Mbit/s",
        "0 bit/s",
        "nan bit/s",
        "inf bit/s",
        "",
        "1e999 bit/s",
    ],
)
def test_a_rate_that_is_none_names_key_and_value(text: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse_rate(text, "net.rate")
    assert str(raised.value).startswith(f"net.rate = {text!r}: ")


@pytest.mark.parametrize(
    ("parse", "text", "message"),
    [
        (parse_rate, "1e9 Tbit/s", "a rate of at most '1000 Tbit/s', or 'unlimited'"),
        (parse_rate, "1e999 bit/s", "a rate of at most '1000 Tbit/s', or 'unlimited'"),
        (
            parse_rate,
            "0.001 bit/s",
            "a rate of at least '1 kbit/s'; to take a link away, leave its node out, or cut the",
        ),
        (parse_latency, "61 min", "a time of at most '60 min'"),
        (parse_time, "100001 min", "a time of at most '100000 min'"),
        (parse_size, "1e30 GB", "a size of at most '1000 GB'"),
    ],
)
def test_what_is_out_of_bounds_is_told_in_its_own_unit(
    parse: Callable[[str, str], object], text: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"net.key = {text!r}: expected {message}")):
        parse(text, "net.key")


def test_both_letters_for_micro_are_read() -> None:
    assert parse_time("25 \u03bcs") == parse_time("25 \u00b5s") == parse_time("25 us")


def test_a_wrong_unit_lists_the_right_ones() -> None:
    with pytest.raises(ConfigError, match=r"'Mbps' is not a unit here.*Mbit/s"):
        parse_rate("300 Mbps")
    with pytest.raises(ConfigError, match="the unit is missing"):
        parse_time("25")
    with pytest.raises(ConfigError, match="'KBit' is not a unit"):
        parse_size("64 KBit")


@given(st.floats(1e3, 9e14))
def test_a_formatted_rate_reads_back(rate_bps: float) -> None:
    back = parse_rate(format_rate(rate_bps))
    assert back is not None
    assert math.isclose(back, rate_bps, rel_tol=6e-3)


def test_whole_figures_stay_whole() -> None:
    assert [format_rate(300e6), format_rate(2.5e9), format_rate(None)] == ["300 Mbit/s", "2.5 Gbit/s", "unlimited"]
    assert [format_time(0.025), format_time(0.0), format_time(90.0)] == ["25 ms", "0 ns", "90 s"]
    assert [format_size(64_000), format_size(1_234_567)] == ["64 KB", "1.23 MB"]
