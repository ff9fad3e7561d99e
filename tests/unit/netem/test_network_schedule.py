"""Changes laid over a profile, and when: as arithmetic, in any order, and as people write them."""

from __future__ import annotations

import math
import tomllib

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import to_builtins

from netem.changes import Change, Cut, Heal, Reset, Tune, changed, open_cuts
from netem.config import convert, dump_toml
from netem.errors import ConfigError
from netem.names import OPERATOR
from netem.network import CUT_BPS, Line, Pair, Profile
from netem.profile import NetConfig, builtin_names, resolve, resolve_schedule
from netem.schedule import Schedule, Timed, TracedLine, listed
from netem.trace import Trace

HOME = Profile(
    rate_bps=10e6,
    latency_s=0.02,
    lines=(Line("a", "up", 5e6),),
    pairs=(Pair("b", "c", has_rate=True, rate_bps=1e6, latency_s=0.5),),
)


def schedule_of(schedule: list[dict[str, object]], **more: object) -> Schedule:
    profile = {"rate": "10 Mbit/s", "latency": "20 ms", "schedule": schedule}
    return resolve_schedule(convert(NetConfig, {"profile": profile | more}, "net"))


def test_a_rate_for_all_goes_over_whatever_differed() -> None:
    after = changed(HOME, [Tune(has_rate=True, rate_bps=50e6)])
    assert {after.link(*ends).rate_bps for ends in ("ab", "ba", "bc", "cb")} == {50e6}
    assert after.link("b", "c").latency_s == 0.5
    late = changed(HOME, [Tune(latency_s=0.1)])
    assert [late.link(*ends).latency_s for ends in ("ab", "bc")] == [0.1, 0.1]
    assert [late.link(*ends).rate_bps for ends in ("ab", "bc")] == [5e6, 1e6]


def test_a_line_and_a_pair_change_alone() -> None:
    node = changed(HOME, [Tune(ends=("a",), has_rate=True, rate_bps=2e6, latency_s=0.3)])
    assert [node.link(*ends).rate_bps for ends in ("ab", "ca", "cb")] == [2e6, 2e6, 10e6]
    assert [node.link(*ends).latency_s for ends in ("ab", "ca", "cb")] == [0.3, 0.3, 0.02]
    pair = changed(HOME, [Tune(ends=("c", "b"), has_rate=True, rate_bps=None)])
    assert [pair.link(*ends).rate_bps for ends in ("bc", "cb", "ab")] == [None, None, 5e6]


@pytest.mark.parametrize("scope", ["link", "nic"])
def test_a_cut_lies_over_all_rates_until_it_is_healed(scope: str) -> None:
    home = Profile(scope=scope, rate_bps=10e6)  # type: ignore[arg-type]
    cut = [Cut(ends=("a", "b")), Tune(has_rate=True, rate_bps=50e6), Tune(ends=("a", "b"), has_rate=True, rate_bps=1e6)]
    after = changed(home, cut)
    assert [after.link(*ends).rate_bps for ends in ("ab", "ba")] == [CUT_BPS, CUT_BPS]
    assert after.pair_bps("a", "c") == 50e6
    assert changed(home, [*cut, Heal(ends=("b", "a"))]).pair_bps("a", "b") == 1e6
    assert changed(home, [*cut, Reset()]) == home


def test_whoever_heals_is_answered_through_any_cut() -> None:
    after = changed(HOME, [Cut(ends=("*", "*"))])
    assert after.link("coordinator", "a").rate_bps == CUT_BPS
    assert after.link("coordinator", f"{OPERATOR}~7").rate_bps is None


def test_figures_are_those_of_the_emulated_clock() -> None:
    slow = changed(HOME.dilated(10), [Tune(has_rate=True, rate_bps=50e6, latency_s=0.1)])
    assert (slow.link("a", "b").rate_bps, slow.link("a", "b").latency_s) == (5e6, 1.0)


ends = st.sampled_from([("a", "b"), ("b", "c"), ("a", "*")])
rates = st.none() | st.sampled_from([1e5, 1e6, 1e9])
changes: st.SearchStrategy[Change] = st.one_of(
    st.builds(Cut, ends=ends),
    st.builds(Heal, ends=st.just(()) | ends),
    st.just(Reset()),
    st.builds(Tune, ends=st.just(()) | ends | st.just(("a",)), has_rate=st.just(True), rate_bps=rates),
)
timed = st.lists(st.tuples(st.integers(0, 20), changes), max_size=12).map(
    lambda list_: [Timed(at_s=float(at_s), change=change) for at_s, change in list_]
)
outages = Trace((0.0, 3.0), (1e6, 0.0), 7.0)
traced = st.sampled_from([(), *((TracedLine(whose, ("up", "down"), outages),) for whose in ("a", "*"))])


@settings(max_examples=50, deadline=None)
@given(timed=timed, traced=traced, scope=st.sampled_from(["link", "nic"]))
def test_a_schedule_changes_only_when_it_says_and_its_cuts_are_cut(
    timed: list[Timed], traced: tuple[TracedLine, ...], scope: str
) -> None:
    base = Profile(scope=scope, rate_bps=10e6)  # type: ignore[arg-type]
    one = Schedule(base, traced=traced).with_timed(timed)
    at_s = 0.0
    while at_s < 30:
        after_s = one.next_change_s(at_s)
        assert after_s > at_s
        middle_s = min(after_s, 30.0) / 2 + at_s / 2
        assert one.profile_at(middle_s) == one.profile_at(at_s)
        due = [entry.change for entry in one.timed if entry.at_s <= at_s]
        now = one.profile_at(at_s)
        for cut in open_cuts(due):
            source, target = (end.replace("*", "c") for end in cut.ends)
            assert now.link(source, target).rate_bps == now.link(target, source).rate_bps == CUT_BPS
        if not open_cuts(due) and not traced:
            assert CUT_BPS not in (now.link("a", "b").rate_bps, now.link("b", "c").rate_bps)
        at_s = after_s
    if timed and isinstance(one.timed[-1].change, Reset) and not traced:
        assert one.profile_at(math.inf) == base


@settings(max_examples=50, deadline=None)
@given(first=timed, second=timed)
def test_what_is_added_later_goes_over_what_was_there_at_that_time(first: list[Timed], second: list[Timed]) -> None:
    one = Schedule(HOME).with_timed(first).with_timed(second)
    assert one == Schedule(HOME).with_timed([*first, *second])
    assert [entry.at_s for entry in one.timed] == sorted(entry.at_s for entry in [*first, *second])


def test_as_people_write_it() -> None:
    entries: list[dict[str, object]] = [
        {"at": "90 s", "heal": True},
        {"at": "30 s", "rate": "50 Mbit/s"},
        {"at": "1 min", "cut": ["a", "b"]},
        {"at": "40 s", "latency": "80 ms", "pair": ["a", "c"]},
        {"at": "45 s", "rate": "2 Mbit/s", "node": "c"},
        {"at": "2 min", "reset": True},
    ]
    one = schedule_of(entries)
    assert [entry.at_s for entry in one.timed] == [30, 40, 45, 60, 90, 120]
    assert [one.profile_at(t).pair_bps("a", "b") for t in (0, 30, 60, 89.9, 90, 120)] == [10e6, 50e6, 0, 0, 50e6, 10e6]
    assert [one.profile_at(t).link("c", "a").latency_s for t in (39, 40, 120)] == [0.02, 0.08, 0.02]
    assert [one.profile_at(t).link("a", "c").rate_bps for t in (44, 45)] == [50e6, 2e6]
    assert str(one) == (
        "inline (10 Mbit/s for each link, latency 20 ms); at 30 s rate 50 Mbit/s everywhere; "
        "at 40 s latency 80 ms between a and c; at 45 s rate 2 Mbit/s for c; 3 more changes"
    )
    assert str(schedule_of(entries[:4])).endswith("; 1 more change")
    assert str(schedule_of(entries[:3])).endswith("; at 90 s all cuts healed")


def test_a_change_is_there_from_the_beginning_if_it_says_so() -> None:
    assert schedule_of([{"at": "0 s", "rate": "1 Mbit/s"}]).profile_at(0.0).rate_bps == 1e6


def test_dilation_stretches_the_times_too() -> None:
    entries = [{"at": "30 s", "rate": "50 Mbit/s"}]
    settings = {"profile": {"rate": "10 Mbit/s", "schedule": entries}, "dilation": 4}
    one = resolve_schedule(convert(NetConfig, settings, "net"))
    assert one.next_change_s(0) == 120
    assert one.profile_at(120).pair_bps("a", "b") == 12.5e6
    assert "at 30 s rate 50 Mbit/s everywhere" in str(one)


def test_a_trace_is_the_lines_rate_unless_a_change_goes_over_it() -> None:
    one = resolve_schedule(NetConfig(profile="lte-drive"))
    assert one.profile_at(71).nic_down_bps("node-1") == CUT_BPS
    assert one.profile_at(71).link("coordinator", "node-1").rate_bps == CUT_BPS
    assert one.profile_at(71).nic_down_bps("coordinator") == 25e6
    assert one.profile_at(0.5) == one.profile_at(120.5) != one.profile_at(1.5)
    assert resolve(NetConfig(profile="lte-drive")).nic_down_bps("node-1") == 25e6  # what stands for it
    over = one.with_timed([Timed(at_s=5.0, change=Tune(has_rate=True, rate_bps=1e6))])
    assert over.profile_at(71).nic_down_bps("node-1") == 1e6
    steady = resolve_schedule(NetConfig(profile="lte-drive", rate="5 Mbit/s"))
    assert steady.profile_at(71).nic_down_bps("node-1") == CUT_BPS  # node-* is a line of its own


def test_profiles_without_either_never_change() -> None:
    for name in builtin_names():
        if name != "lte-drive":
            one = resolve_schedule(NetConfig(profile=name))
            assert (one.profile_at(1e9), one.next_change_s(0)) == (resolve(NetConfig(profile=name)), math.inf)


def test_a_schedule_is_saved_as_it_was_given() -> None:
    entries: list[dict[str, object]] = [{"at": "1 s", "cut": ["a", "b"]}, {"at": "2 s", "heal": ["a", "b"]}]
    traces = [{"rows": [["0 s", "cut"]]}]
    config = convert(NetConfig, {"profile": {"rate": "1 Mbit/s", "schedule": entries, "traces": traces}}, "net")
    assert convert(NetConfig, tomllib.loads(dump_toml(to_builtins(config))), "net") == config


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"rate": "1 Mbit/s"}, r"net.profile.schedule\[0\].at: is missing"),
        ({"at": "30"}, r"net.profile.schedule\[0\].at = '30': the unit is missing"),
        ({"at": "1 s"}, r"net.profile.schedule\[0\]: expected either rate or latency, or one of"),
        ({"at": "1 s", "rate": "1 Mbit/s", "reset": True}, r"schedule\[0\]: expected either rate"),
        ({"at": "1 s", "rate": "fast"}, r"schedule\[0\].rate = 'fast': expected a rate"),
        ({"at": "1 s", "latency": "1"}, r"schedule\[0\].latency = '1': the unit is missing"),
        ({"at": "1 s", "rate": "1 Mbit/s", "node": "a", "pair": ["a", "b"]}, r"node = 'a': expected node or pair"),
        ({"at": "1 s", "cut": ["a", "b"], "node": "a"}, r"node = 'a': goes with rate or latency only"),
        ({"at": "1 s", "cut": ["a", "a"]}, r"cut = \['a', 'a'\]: expected two different nodes"),
        ({"at": "1 s", "cut": ["a"]}, r"schedule\[0\].cut"),
        ({"at": "1 s", "heal": ["a", "b"]}, r"heal = \['a', 'b'\]: expected two nodes that an earlier entry cuts"),
        ({"at": "1 s", "rte": "1 Mbit/s"}, r"schedule\[0\].rte = '1 Mbit/s': unknown key; did you mean rate"),
    ],
)
def test_mistakes_are_named(entry: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        schedule_of([entry])


TWO = ("node-0", "node-1", "coordinator")


@pytest.mark.parametrize(
    ("profile", "part"),
    [
        ({"pairs": [{"from": "node-0", "to": "node-7", "rate": "1 Mbit/s"}]}, "pairs"),
        ({"pairs": [{"from": "node-7", "to": "node-0", "rate": "1 Mbit/s"}]}, "pairs"),
        ({"lines": [{"node": "node-7", "up": "1 Mbit/s"}]}, "lines"),
        ({"traces": [{"node": "node-7", "rows": [["0 s", "1 Mbit/s"]]}]}, "traces"),
        ({"schedule": [{"at": "1 s", "cut": ["node-0", "node-7"]}]}, "schedule"),
        ({"schedule": [{"at": "1 s", "rate": "1 Mbit/s", "node": "node-7"}]}, "schedule"),
        ({"schedule": [{"at": "1 s", "rate": "1 Mbit/s", "pair": ["node-7", "node-0"]}]}, "schedule"),
    ],
)
def test_a_profile_that_names_no_node_of_the_run_is_told_apart(profile: dict[str, object], part: str) -> None:
    one = resolve_schedule(convert(NetConfig, {"profile": {"rate": "10 Mbit/s"} | profile}, "net"))
    assert one.unmatched(TWO) == (
        f"net.profile: [[{part}]] names 'node-7', which matches no node or site in this run; "
        "there are node-0, node-1, coordinator, and patterns of them"
    )
    assert one.unmatched([*TWO, "node-7"]) is None


def test_patterns_sites_and_changes_of_everything_match() -> None:
    profile = {
        "rate": "10 Mbit/s",
        "sites": {"east": ["node-[01]"], "west": ["node-[23]"]},
        "pairs": [{"from": "east", "to": "west", "rate": "1 Mbit/s"}],
        "lines": [{"node": "node-*", "up": "1 Mbit/s"}],
        "schedule": [
            {"at": "1 s", "cut": ["*", "west"]},
            {"at": "2 s", "rate": "1 Mbit/s"},
            {"at": "3 s", "heal": True},
            {"at": "4 s", "reset": True},
        ],
    }
    one = resolve_schedule(convert(NetConfig, {"profile": profile}, "net"))
    assert one.unmatched(TWO) is None  # though no node is in the west
    assert "[[lines]] names 'node-*'" in (one.unmatched(["berlin"]) or "")
    assert "there are berlin, east, west, and patterns" in (one.unmatched(["berlin"]) or "")


@pytest.mark.parametrize("name", builtin_names())
def test_built_in_profiles_match_any_number_of_nodes(name: str) -> None:
    assert resolve_schedule(NetConfig(profile=name)).unmatched(["node-0"]) is None


def test_a_timed_change_from_the_wire_has_no_other_fields_and_no_time_before_the_start() -> None:
    entry = to_builtins(Timed(at_s=1.0, change=Reset()))
    assert msgspec.convert(entry, Timed) == Timed(at_s=1.0, change=Reset())
    for wrong in ({"until_s": 2.0}, {"at_s": -1.0}, {"at_s": 1e15}):
        with pytest.raises(msgspec.ValidationError):
            msgspec.convert(entry | wrong, Timed)


def test_a_long_list_of_names_is_cut_short() -> None:
    assert listed([f"n{i}" for i in range(16)]).endswith("n14, n15")
    assert listed([f"n{i}" for i in range(18)]).endswith("n14, n15 and 2 more")
