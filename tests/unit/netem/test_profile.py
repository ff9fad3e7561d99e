import tomllib
from importlib import resources
from pathlib import Path

import msgspec
import pytest
from msgspec import to_builtins

from netem.config import convert, dump_toml
from netem.errors import ConfigError
from netem.network import Pair
from netem.profile import NetConfig, Profile, builtin_names, resolve


def profile_of(**settings: object) -> Profile:
    return resolve(convert(NetConfig, settings, "net"))


@pytest.mark.parametrize("name", builtin_names())
def test_the_first_line_of_a_built_in_profile_says_its_scope(name: str) -> None:
    line = resources.files("netem").joinpath("profiles", f"{name}.toml").read_text(encoding="utf-8").splitlines()[0]
    assert line.startswith(f"# Scope {profile_of(profile=name).scope}")


def test_built_ins() -> None:
    named = (
        "internet-300mbps",
        "datacenter-100gbps",
        "home-300mbps",
        "home-cable",
        "lte",
        "transatlantic",
        "three-sites",
        "unshaped",
    )
    assert {*named, "paper-link", "paper-nic", "lte-drive"} == set(builtin_names())
    home = profile_of()
    assert (home.name, home.rate_bps, home.latency_s, home.scope) == ("internet-300mbps", 300e6, 0.025, "link")
    assert profile_of(profile="datacenter-100gbps").nic_up_bps("a") == 100e9
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
    assert (profile.nic_up_bps("a"), profile.nic_down_bps("b"), profile.latency_s) == (100e6, 100e6, 0.025)


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
    assert profile.nic_up_bps("a") == 10e6


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


def test_an_acknowledgement_waits_for_a_fifth_of_the_time_that_credit_lasts_beyond_a_round_trip() -> None:
    far = Profile(rate_bps=300e6, latency_s=0.3)
    assert far.ack_delay_s("a", "b") == pytest.approx(0.02)  # of 100 ms
    window = Profile(rate_bps=300e6, latency_s=0.025, window_bytes=4 * 10**6)  # 107 ms, 50 of them the round trip
    assert window.ack_delay_s("a", "b") == pytest.approx((0.10667 - 0.05) / 5, rel=1e-3)
    assert msgspec.structs.replace(window, window_bytes=10**6).ack_delay_s("a", "b") == 0.005  # no time at all
    assert Profile().ack_delay_s("a", "b") == pytest.approx(0.02)


def test_the_delay_is_that_of_the_direction_of_the_data() -> None:
    pair = Pair("a", "b", has_rate=True, rate_bps=1e9)
    profile = Profile(rate_bps=10e6, latency_s=0.01, window_bytes=5 * 10**6, pairs=(pair,))
    assert profile.ack_delay_s("a", "b") == 0.005  # credit lasts for 40 ms, 20 of them beyond the round trip
    assert profile.ack_delay_s("b", "a") == pytest.approx(0.02)


def test_up_and_down_differ_and_a_rate_on_the_command_line_goes_over_both() -> None:
    home = profile_of(profile="home-cable")
    assert (home.nic_up_bps("a"), home.nic_down_bps("a"), home.pair_bps("a", "b")) == (40e6, 300e6, 40e6)
    assert str(home) == "home-cable (40 Mbit/s up and 300 Mbit/s down for each NIC, latency 20 ms ± 2 ms)"
    link = profile_of(profile={"up": "2 Mbit/s", "down": "8 Mbit/s"})
    assert (link.link("a", "b").rate_bps, link.nic_up_bps("a")) == (2e6, None)
    same = profile_of(profile="home-cable", rate="5 Mbit/s")
    assert (same.nic_up_bps("a"), same.nic_down_bps("a")) == (5e6, 5e6)


def test_a_node_may_have_a_line_of_its_own() -> None:
    lines = [{"node": "node-[2-3]", "up": "1 Mbit/s"}, {"node": "node-3", "up": "2 Mbit/s", "down": "unlimited"}]
    profile = profile_of(profile={"rate": "10 Mbit/s", "scope": "nic", "lines": lines})
    assert [profile.nic_up_bps(f"node-{rank}~ab12") for rank in (1, 2, 3)] == [10e6, 1e6, 2e6]
    assert [profile.nic_down_bps(f"node-{rank}") for rank in (1, 2, 3)] == [10e6, 10e6, None]
    assert profile.pair_bps("node-2", "node-1") == 1e6


def test_sites_are_fast_inside_and_slow_between() -> None:
    sites = profile_of(profile="three-sites")
    near_0 = [rank for rank in range(1, 10) if sites.link("node-0", f"node-{rank}").latency_s < 0.001]
    assert near_0 == [3, 6, 9]
    inside, near, far = (sites.link("node-0", f"node-{rank}") for rank in (3, 1, 2))
    assert (inside.rate_bps, near.rate_bps, far.rate_bps) == (None, 300e6, 300e6)
    assert (inside.latency_s, near.latency_s, far.latency_s) == pytest.approx((1e-4, 0.045, 0.075))
    assert sites.link("node-2", "node-1") == sites.link("node-1", "node-2")
    assert sites.pair_bps("node-0", "node-3") == 10e9
    assert sites.link("node-0", "coordinator").rate_bps == 300e6  # at no site: a way between sites


def test_a_pair_may_be_shakier_than_the_rest_and_its_timeout_covers_both_ways() -> None:
    pairs = [{"from": "a", "to": "b", "latency": "80 ms", "jitter": "90 ms", "loss": "1 %"}]
    profile = profile_of(profile={"rate": "10 Mbit/s", "latency": "20 ms", "pairs": pairs})
    there = profile.link("a", "b")
    assert (there.jitter_s, there.loss) == (0.08, 0.01)  # never beyond the latency: nothing arrives before it left
    assert there.timeout_s == pytest.approx(0.08 + 0.02 + 0.2)
    assert profile.link("b", "a") == profile.link("c", "d")
    assert profile.round_trip_s("b", "a") > profile.round_trip_s("c", "d") + 0.2  # its acknowledgement may be repeated


def test_dilation_slows_the_clock_and_the_words_stay_those_of_the_emulated_network() -> None:
    settings = {
        "rate": "100 Gbit/s", "scope": "nic", "latency": "1 ms", "jitter": "1 ms", "loss": "1 %", "burst": "9 KB",
        "lines": [{"node": "a", "up": "10 Gbit/s"}],
        "pairs": [{"from": "a", "to": "b", "rate": "1 Gbit/s", "latency": "2 ms", "jitter": "2 ms"}],
    }  # fmt: skip
    plain, slow = profile_of(profile=settings), profile_of(profile=settings, dilation=50)
    assert slow.dilation == 50.0
    assert (slow.nic_up_bps("b"), slow.nic_up_bps("a"), slow.link("a", "b").rate_bps) == (2e9, 2e8, 2e7)
    for ends in (("a", "b"), ("b", "c")):
        quick, late = plain.link(*ends), slow.link(*ends)
        assert (late.latency_s, late.jitter_s) == pytest.approx((50 * quick.latency_s, 50 * quick.jitter_s))
        assert late.timeout_s == pytest.approx(50 * quick.timeout_s)
        assert (late.loss, late.burst_bytes) == (quick.loss, quick.burst_bytes)
    assert str(slow) == str(plain).replace(")", ", time dilated 50 times)")
    assert "latency 1 ms ± 1 ms, loss 1 %" in str(plain)


def test_an_inline_table_is_saved_as_it_was_given() -> None:
    pairs = [{"from": "a", "to": "b", "loss": "1 %"}]
    config = convert(NetConfig, {"profile": {"rate": "1 Mbit/s", "sites": {"x": ["a"]}, "pairs": pairs}}, "net")
    saved = tomllib.loads(dump_toml(to_builtins(config)))
    assert convert(NetConfig, saved, "net") == config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"profile": {"latency": "1 ms"}}, "net.profile.rate: expected a rate such as '300 Mbit/s', or both"),
        ({"profile": {"up": "1 Mbit/s"}}, "net.profile.rate: expected a rate"),
        ({"profile": {"rate": "1 Mbit/s", "jitter": "1 ms"}}, "net.profile.jitter = '1 ms': expected at most"),
        ({"profile": {"rate": "1 Mbit/s", "loss": "0.1"}}, "net.profile.loss = '0.1': the unit is missing"),
        ({"profile": {"rate": "1 Mbit/s", "loss": "60 %"}}, "net.profile.loss = '60 %': expected less than"),
        ({"profile": {"rate": "1 Mbit/s", "inside": {"rate": "2 Mbit/s"}}}, "net.profile.sites: expected"),
        ({"profile": {"rate": "1 Mbit/s", "sites": {"x": "a"}}}, "net.profile.sites"),
        ({"dilation": 0.5}, "net.dilation = 0.5"),
        ({"profile": {"rate": "1 Mbit/s", "lines": [{"node": "a", "up": "0 bit/s"}]}}, r"lines\[0\].up = '0 bit/s'"),
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
        ({"profile": {"rate": "1 Mbit/s", "pairs": [{"from": "a"}]}}, r"net.profile.pairs\[0\].to: is missing"),
    ],
)
def test_mistakes_are_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        profile_of(**settings)
