from pathlib import Path

import pytest

from netem.config import convert
from netem.errors import ConfigError
from netem.profile import NetConfig, Profile, builtin_names, resolve


def profile_of(**settings: object) -> Profile:
    return resolve(convert(NetConfig, settings, "net"))


def test_built_ins() -> None:
    assert {"internet-300mbps", "datacenter-100gbps", "unshaped"} <= set(builtin_names())
    home = profile_of()
    assert (home.name, home.rate_bps, home.latency_s, home.scope) == ("internet-300mbps", 300e6, 0.025, "link")
    assert profile_of(profile="datacenter-100gbps").nic_rate_bps == 100e9
    assert profile_of(profile="unshaped").rate_bps is None
    for name in builtin_names():
        assert profile_of(profile=name).name == name


def test_from_a_file_and_inline(tmp_path: Path) -> None:
    text = 'rate = "50 Mbit/s"\nburst = "10 KB"\n[[pairs]]\nfrom = "a"\nto = "*"\nrate = "5 Mbit/s"\n'
    path = tmp_path / "lab.toml"
    path.write_text(text)
    profile = profile_of(profile=str(path))
    assert (profile.name, profile.rate_bps, profile.burst_bytes) == ("lab", 50e6, 10_000)
    assert profile.link("a", "b").rate_bps == 5e6
    assert profile.link("b", "a").rate_bps == 50e6
    inline = profile_of(profile={"rate": "50 Mbit/s", "latency": "3 ms"})
    assert (inline.name, inline.latency_s) == ("inline", 0.003)


def test_overrides_show_in_the_name() -> None:
    profile = profile_of(rate="100 Mbit/s", scope="nic")
    assert profile.name == "internet-300mbps with rate 100 Mbit/s, scope nic"
    assert (profile.nic_rate_bps, profile.latency_s) == (100e6, 0.025)


def test_later_pairs_go_over_earlier_ones_and_the_rest_is_inherited() -> None:
    pairs = [
        {"from": "*", "to": "*", "latency": "1 ms"},
        {"from": "a", "to": "b", "latency": "80 ms"},
        {"from": "a", "to": "c", "rate": "unlimited"},
    ]
    profile = profile_of(profile={"rate": "10 Mbit/s", "latency": "9 ms", "pairs": pairs})
    assert (profile.link("a", "b").latency_s, profile.link("a", "b").rate_bps) == (0.08, 10e6)
    assert (profile.link("b", "a").latency_s, profile.link("b", "a").rate_bps) == (0.001, 10e6)
    assert (profile.link("a", "c").rate_bps, profile.link("a", "c").latency_s) == (None, 0.001)


def test_in_scope_nic_a_link_has_no_rate_but_its_pair_s() -> None:
    pairs = [{"from": "a", "to": "b", "rate": "1 Mbit/s"}]
    profile = profile_of(profile={"rate": "10 Mbit/s", "scope": "nic", "pairs": pairs})
    assert profile.link("a", "b").rate_bps == 1e6
    assert profile.link("b", "a").rate_bps is None
    assert profile.nic_rate_bps == 10e6


def test_segments_and_credit_grow_with_the_rate() -> None:
    profile = Profile(rate_bps=300e6, latency_s=0.025)
    assert profile.segment_bytes(300e6) == profile.segment_bytes(1e9) == 65_536
    assert profile.segment_bytes(1.1e9) == profile.segment_bytes(None) == 1_048_576
    round_trip_bytes = 300e6 / 8 * 0.05
    assert round_trip_bytes < profile.credit_bytes("a", "b") < 5 * round_trip_bytes
    assert Profile(rate_bps=1e6).credit_bytes("a", "b") == 1_048_576
    assert profile_of(window="2 MB").credit_bytes("a", "b") == 2_000_000
    slow_back = [{"from": "b", "to": "a", "latency": "1 s"}]
    profile = profile_of(profile={"rate": "300 Mbit/s", "pairs": slow_back})
    assert profile.credit_bytes("a", "b") > 300e6 / 8  # the acknowledgement's way counts too


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"profile": "intranet"}, "net.profile = 'intranet': no such profile; built in are .*internet-300mbps"),
        ({"profile": "gone.toml"}, "gone.toml: no such file"),
        ({"rate": "300 Mbps"}, "net.rate = '300 Mbps': 'Mbps' is not a unit"),
        ({"latency": "25"}, "net.latency = '25': the unit is missing"),
        ({"scope": "host"}, "net.scope = \"host\": expected one of 'link', 'nic'"),
        ({"window": "1 KB"}, "net.window = '1 KB'"),
        ({"rat": "1 Mbit/s"}, "net.rat = '1 Mbit/s': unknown key; did you mean rate"),
        ({"profile": {"rate": "1 Mbit/s", "latncy": "1 ms"}}, "net.profile.latncy = '1 ms': unknown key; did you mean"),
        ({"profile": {"rate": "1 Mbit/s", "pairs": [{"from": "a", "to": "b", "rte": ""}]}}, r"pairs\[0\].rte"),
        ({"profile": {"rate": "1 Mbit/s", "pairs": [{"from": "a", "to": "b", "rate": "x"}]}}, r"pairs\[0\].rate = 'x'"),
        ({"profile": {"rate": "1 Mbit/s", "pairs": [{"from": "a"}]}}, r"net.profile.pairs\[0\].*`to`"),
    ],
)
def test_mistakes_are_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        profile_of(**settings)
