"""What is promised of a transfer, how it is judged, and how that is said. Nothing is measured here."""

import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from netem.config import convert
from netem.network import Profile
from netem.profile import NetConfig, builtin_names, resolve
from netem.verify.certificate import LONGEST_S, SIZES_BYTES, estimate_s, link_kinds, measurements, steady
from netem.verify.promise import Host, Promise, Row, certify, judge_row, mending_dilation
from netem.verify.render import as_json, as_markdown, as_text
from node.cli import main

HOST = Host(loopback_bps=6e9, shaped_bps=5e9, delay_s=0.0003, busy_delay_s=0.01, cores=2)
HOME = Promise(300e6, 0.025)


def row(took_s: float, nbytes: int, promise: Promise = HOME, *, busy: bool = False, profile: str = "home") -> Row:
    delay_s = HOST.own_delay_s(busy)
    return judge_row(promise, [(took_s, nbytes)], delay_s, profile=profile, nbytes=nbytes, busy=busy)


def profile(name: str, dilation: float = 1.0) -> Profile:
    return resolve(convert(NetConfig, {"profile": name, "dilation": dilation}, "net"))


def test_a_transfer_is_promised_after_latency_and_its_bits_beyond_the_burst() -> None:
    assert Promise(8e6, 0.1).time_s(1_000_000) == pytest.approx(1.1)
    assert Promise(8e6, 0.1, burst_bytes=250_000).time_s(1_000_000) == pytest.approx(0.85)
    assert Promise(8e6, 0.1, burst_bytes=250_000).time_s(1000) == 0.1
    assert Promise(None, 0.1).time_s(10**12) == 0.1


@given(
    rate_bps=st.floats(1e6, 1e11),
    latency_s=st.floats(0, 1),
    nbytes=st.integers(1000, 10**9),
    factor=st.floats(0.2, 5),
)
def test_error_is_that_of_the_rates_and_of_the_times(
    rate_bps: float, latency_s: float, nbytes: int, factor: float
) -> None:
    promise = Promise(rate_bps, latency_s)
    found = row(promise.time_s(nbytes) * factor, nbytes, promise)
    assert found.rate_bps == rate_bps
    assert found.error == pytest.approx(1 / factor - 1, abs=1e-6)
    assert found.error == pytest.approx(found.measured_bps / rate_bps - 1, abs=1e-9)


def test_the_median_of_the_repeats_counts() -> None:
    samples = [(9.0, 1000.0), (1.0, 1000.0), (1.1, 1000.0)]
    found = judge_row(Promise(8000.0), samples, 0.0, profile="p", nbytes=1000)
    assert found.measured_s == 1.1
    assert found.error == pytest.approx(1 / 1.1 - 1)


def test_nothing_is_promised_without_a_rate() -> None:
    found = row(1.0, 1000, Promise(None))
    assert (found.rate_bps, found.error, found.judged, found.missed) == (None, None, False, False)
    assert found.measured_bps == 8000
    assert certify(HOST, [found]).verdict == "true"


def test_true_where_all_judged_rows_are_within_three_per_cent() -> None:
    on_time = row(HOME.time_s(16_000_000) * 1.02, 16_000_000)
    assert on_time.judged
    certificate = certify(HOST, [on_time])
    assert certificate.verdict == "true"
    assert "1 of 1 rows judged, at most 2.0% off" in certificate.reason


@pytest.mark.parametrize(("factor", "way"), [(1.05, "slower"), (0.95, "faster")])
def test_untrusted_where_one_is_not_in_either_direction(factor: float, way: str) -> None:
    fine = row(HOME.time_s(64_000_000), 64_000_000)
    off = row(HOME.time_s(16_000_000) * factor, 16_000_000)
    certificate = certify(HOST, [fine, off])
    assert certificate.verdict == "untrusted"
    assert "1 of 2 rows" in certificate.reason
    assert "home, 16 MB, cores idle" in certificate.reason
    assert way in certificate.reason


def test_what_is_shorter_than_the_host_can_tell_is_not_judged() -> None:
    """10 ms late of 52: the host's own delay while it is busy, and nothing about the network."""
    late = row(HOME.time_s(1_000_000) + 0.01, 1_000_000, busy=True)
    assert late.error == pytest.approx(-0.162, abs=0.01)
    assert not late.missed
    assert row(HOME.time_s(1_000_000) + 0.01, 1_000_000).missed  # idle, there is no such excuse
    assert row(HOME.time_s(1_000_000) + 0.04, 1_000_000, busy=True).missed  # more than its delay explains
    fine = row(HOME.time_s(64_000_000), 64_000_000)
    reason = certify(HOST, [fine, late]).reason
    assert "1 too short to judge: this host's own delay is 300 us idle and 10 ms busy" in reason


def test_untrusted_where_nothing_can_be_judged() -> None:
    certificate = certify(HOST, [row(HOME.time_s(1000), 1000, busy=True)])
    assert certificate.verdict == "untrusted"
    assert "no row is long enough" in certificate.reason


def test_the_kernel_does_not_judge_us() -> None:
    fine = row(HOME.time_s(64_000_000), 64_000_000)
    kernel = msgspec.structs.replace(row(9.0, 64_000_000), reference="tbf")
    assert not kernel.missed
    assert certify(HOST, [fine, kernel]).verdict == "true"


@pytest.mark.parametrize(("dilation", "mend"), [(1.0, 50), (5.0, 50)])
def test_a_rate_beyond_the_host_is_named_with_the_hosts_and_the_mend(dilation: float, mend: int) -> None:
    network = profile("datacenter-100gbps", dilation)
    promise = link_kinds(network)[0].promise
    found = row(1.0, 64_000_000, promise, profile=network.name)
    certificate = certify(HOST, [found], dilation=dilation)
    assert certificate.verdict == "untrusted"
    assert f"asks for {100 / dilation:g} Gbit/s" in certificate.reason
    assert "this host carries 6 Gbit/s" in certificate.reason
    assert f"--net.dilation {mend}" in certificate.reason


@given(asked_bps=st.floats(1e3, 1e14), carried_bps=st.floats(1e6, 1e12))
def test_the_mend_leaves_half_of_the_host(asked_bps: float, carried_bps: float) -> None:
    factor = mending_dilation(asked_bps, carried_bps)
    assert asked_bps / factor <= carried_bps / 2 * (1 + 1e-6)
    assert factor == 2 or asked_bps / (factor / 2.5) > carried_bps / 2 * (1 - 1e-6)


def test_each_kind_of_link_is_measured_once() -> None:
    assert [link.promise for link in link_kinds(profile("internet-300mbps"))] == [Promise(300e6, 0.025)]
    sites = link_kinds(profile("three-sites"))
    assert len({way.promise for way in sites}) == len(sites) > 1
    cut = Profile(name="cut", rate_bps=0.0)
    assert link_kinds(cut) == []


def test_chance_is_taken_out_of_what_is_measured() -> None:
    lte = profile("lte")
    assert lte.jitter_s > 0
    calm = steady(lte)
    shape = calm.link("node-0", "node-1")
    assert (shape.jitter_s, shape.loss) == (0.0, 0.0)
    assert shape.latency_s == lte.latency_s
    home = profile("internet-300mbps")
    assert steady(home) == home


@pytest.mark.parametrize("name", builtin_names())
def test_no_transfer_is_endless_and_a_default_run_of_one_link_takes_less_than_three_minutes(name: str) -> None:
    planned = measurements(profile(name), quick=False)
    assert planned
    for one in planned:
        assert one.sizes
        assert all(one.link.promise.time_s(nbytes * flows) <= LONGEST_S for nbytes, flows in one.sizes)
        assert estimate_s([one], quick=False, with_kernel=True) < 180
        assert estimate_s([one], True, True) < estimate_s([one], False, True)


def test_all_sizes_where_the_rate_allows_them() -> None:
    (planned,) = measurements(profile("internet-300mbps"), quick=False)
    assert planned.sizes == [(nbytes, flows) for flows in (1, 4) for nbytes in SIZES_BYTES]


def test_json_is_one_object_with_the_keys_that_are_promised() -> None:
    found = row(HOME.time_s(16_000_000), 16_000_000)
    told = json.loads(as_json(certify(HOST, [found], skipped="kernel tbf needs root")))
    assert set(told) == {"host", "rows", "verdict", "reason", "skipped"}
    assert told["host"]["loopback_bps"] == 6e9
    assert set(told["rows"][0]) >= {
        *("profile", "bytes", "flows", "busy", "reference", "rate_bps", "measured_bps", "error")
    }
    assert told["rows"][0]["reference"] == "clock"
    assert told["skipped"] == "kernel tbf needs root"


def test_the_table_says_what_missed_what_is_in_brackets_and_what_was_left_out() -> None:
    rows = [
        row(HOME.time_s(16_000_000) * 1.1, 16_000_000),
        row(HOME.time_s(64_000) + 0.01, 64_000, busy=True),
        row(1.0, 1000, Promise(None)),
    ]
    text = as_text(certify(HOST, rows, skipped="kernel tbf needs root"))
    lines = text.splitlines()
    assert "This host carries 6 Gbit/s" in lines[0]
    assert [line.endswith("missed") for line in lines[3:6]] == [True, False, False]
    assert "(-27." in lines[4]
    assert "–" in lines[5]
    assert "left out: kernel tbf needs root" in text
    assert lines[-1].startswith("verdict: untrusted: ")


def test_markdown_says_how_it_was_made() -> None:
    certificate = certify(HOST, [row(HOME.time_s(16_000_000), 16_000_000)])
    text = as_markdown(certificate, "A title", "isthmus net verify --quick")
    assert text.startswith("# A title\n\n`isthmus net verify --quick`\n")
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 3
    assert len({line.count("|") for line in table}) == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--suite", "nics"], "--suite nics: expected one of kernel, fairness, nic, rings, dilation"),
        (["--suite", "nic", "--profile", "lte"], "has networks of its own"),
        (["--profile", "internet-3gbps"], "no such profile"),
        (["--net.dilation", "0.5"], "net.dilation"),
        (["--train.steps", "3"], "only settings of the network"),
        (["--markdown", "no-such-folder/table.md"], "there is no folder no-such-folder"),
    ],
)
def test_mistakes_are_one_line_before_anything_is_measured(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["net", "verify", *arguments]) == 2
    errors = capsys.readouterr().err
    assert said in errors
    assert len(errors.splitlines()) == 1
