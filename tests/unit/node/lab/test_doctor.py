"""What a survey means: the network as a profile, what is wrong, and the page."""

from __future__ import annotations

import tomllib
from pathlib import Path

import msgspec
import pytest

from coordinator.messages import PROTOCOL_VERSION
from coordinator.survey.host import Guest, Survey, Way
from coordinator.survey.messages import Arrive, Facts, Link
from netem.config import convert
from netem.profile import NetConfig, ProfileConfig, resolve
from node.config import load_config
from node.lab.doctor.facts import facts_of
from node.lab.doctor.findings import findings_of
from node.lab.doctor.network import as_toml, profile_of
from node.lab.doctor.page import judge

MBIT = 1e6
GB = 10**9


def facts(**changed: object) -> Facts:
    sound = Facts(
        release="0.1.0",
        python="3.11.2",
        torch="2.9.0+cpu",
        system="Linux x86_64",
        cores=8,
        memory_bytes=32 * GB,
        free_memory_bytes=30 * GB,
        free_disk_bytes=500 * GB,
        device="cpu",
        interface="eth0, 1000 Mbit/s",
        own_address="10.0.0.1",
    )
    return msgspec.structs.replace(sound, **changed)


def guest(name: str, seen_from: str = "10.0.0.1", digest: str = "d", **changed: object) -> Guest:
    said = facts(**changed)
    address = f"tcp://{said.own_address}:7071"
    arrive = Arrive(version=PROTOCOL_VERSION, name=name, address=address, config_digest=digest, facts=said)
    return Guest(name, arrive, seen_from)


def way(target: str, rate_bps: float = 50 * MBIT, shared_bps: float | None = None, **changed: object) -> Way:
    link = Link(peer=target, sent=250, echoed=250, latency_s=0.010, jitter_s=0.001, segments=250)
    shared_bps = rate_bps if shared_bps is None else shared_bps
    return Way(msgspec.structs.replace(link, **changed), 250, rate_bps, shared_bps)


def survey(*guests: Guest, absent: int = 0, lost: tuple[str, ...] = (), **ways: Way) -> Survey:
    """`ways` are named source_target; the others are sound."""
    names = [one.name for one in guests]
    found = {(a, b): ways.get(f"{a}_{b}", way(b)) for a in names for b in names if a != b}
    return Survey(tuple(guests), found, absent, lost)


def three(**ways: Way) -> Survey:
    return survey(guest("anna"), guest("ben"), guest("cleo"), **ways)


def network(found: Survey) -> object:
    tree = tomllib.loads(as_toml(profile_of(found), found))
    return resolve(NetConfig(profile=convert(ProfileConfig, tree, "profile")))


def test_links_with_rates_of_their_own_are_a_profile_of_links() -> None:
    found = network(three(anna_cleo=way("cleo", 5 * MBIT), ben_cleo=way("cleo", latency_s=0.080, repeated=25)))
    assert found.scope == "link"
    assert found.link("node-0", "node-1").rate_bps == 50 * MBIT
    assert found.link("node-0", "node-2").rate_bps == 5 * MBIT
    assert found.link("node-2", "node-0").rate_bps == 50 * MBIT
    assert found.link("node-1", "node-2").latency_s == pytest.approx(0.080)
    assert found.link("node-1", "node-2").loss == pytest.approx(0.1)
    assert found.link("node-2", "node-1").latency_s == pytest.approx(0.010)
    assert found.link("node-2", "node-1").loss == 0
    assert found.jitter_s == pytest.approx(0.001)


def test_links_that_share_a_line_are_a_profile_of_lines() -> None:
    """anna sends 20 Mbit/s in all, the others 50; who receives from two gets what they send."""
    ways = {
        "anna_ben": way("ben", 20 * MBIT, 10 * MBIT),
        "anna_cleo": way("cleo", 20 * MBIT, 10 * MBIT),
        "ben_anna": way("anna", 50 * MBIT, 25 * MBIT),
        "ben_cleo": way("cleo", 50 * MBIT, 25 * MBIT),
        "cleo_anna": way("anna", 50 * MBIT, 25 * MBIT),
        "cleo_ben": way("ben", 50 * MBIT, 25 * MBIT),
    }
    found = network(three(**ways))
    assert found.scope == "nic"
    assert found.nic_up_bps("node-0") == 20 * MBIT
    assert found.nic_up_bps("node-1") == 50 * MBIT
    assert found.nic_down_bps("node-1") == 50 * MBIT
    assert found.pair_bps("node-0", "node-1") == 20 * MBIT


def test_ways_that_do_not_work_are_left_out_and_said() -> None:
    broken = three(anna_ben=Way(Link(peer="ben", sent=250, trouble="refused")))
    text = as_toml(profile_of(broken), broken)
    assert "# no connection from anna to ben" in text
    assert network(broken).link("node-0", "node-2").rate_bps == 50 * MBIT
    nothing = survey(guest("anna"), guest("ben"), anna_ben=Way(Link(peer="ben")), ben_anna=Way(Link(peer="anna")))
    assert profile_of(nothing) == {}


def test_sound_machines_have_nothing_wrong() -> None:
    assert findings_of(three()) == []


CASES = [
    (three(anna_cleo=way("cleo", 5 * MBIT)), "anna → cleo carries 5 Mbit/s, and the middle of all ways 50", "between"),
    (
        three(anna_ben=way("ben", 5 * MBIT), anna_cleo=way("cleo", 5 * MBIT)),
        "anna → ben carries 5 Mbit/s",
        "line of anna",
    ),
    (
        three(anna_cleo=way("cleo", latency_s=0.2), cleo_anna=way("anna", latency_s=0.2)),
        "anna ↔ cleo: 200 ms one way",
        "relay",
    ),
    (three(ben_cleo=way("cleo", repeated=10)), "ben → cleo loses packets: TCP sent 10 of 250", "cable"),
    (three(anna_cleo=way("cleo", ahead_s=5.0)), "the clock of cleo is 5 s ahead", "NTP"),
    (
        three(anna_ben=Way(Link(peer="ben", sent=9, trouble="nothing listens there"))),
        "anna cannot reach ben: nothing listens there",
        "firewall",
    ),
    (survey(guest("anna"), guest("ben"), absent=1), "1 of 3 machines did not come", "start it on all"),
    (survey(guest("anna"), guest("ben"), lost=("cleo left: x",)), "cleo left: x", "again"),
    (
        survey(guest("anna"), guest("ben", release="0.2.0")),
        "versions of isthmus differ: anna has 0.1.0",
        "same version",
    ),
    (survey(guest("anna"), guest("ben", torch="2.8.0")), "versions of torch differ", "same version"),
    (survey(guest("anna"), guest("ben", digest="e")), "the configs differ: anna has d, ben has e", "--print-config"),
    (survey(guest("anna", device="cuda"), guest("ben")), "anna is to compute on cuda, and torch finds no GPU", "cpu"),
    (
        survey(guest("anna", device="cuda", gpu="NVIDIA RTX 4090"), guest("ben")),
        "the driver has NVIDIA RTX 4090, and torch finds no GPU",
        "CUDA build",
    ),
    (survey(guest("anna", gpu="NVIDIA RTX 4090", cuda="12.8"), guest("ben")), "computes on the CPU", "run.device cuda"),
    (survey(guest("anna", interface="wlan0, wireless"), guest("ben")), "anna is on a wireless network", "cable"),
    (survey(guest("anna", short_token=True), guest("ben")), "the token on anna is short", "openssl rand"),
]


@pytest.mark.parametrize(("found", "what", "mend"), CASES, ids=[case[1][:40] for case in CASES])
def test_what_is_wrong_is_named_with_its_mend(found: Survey, what: str, mend: str) -> None:
    findings = [one for one in findings_of(found) if what in one.what]
    assert len(findings) == 1, findings_of(found)
    assert mend in findings[0].mend
    kinds = {one.what.split(" ")[0] for one in findings_of(found)}
    assert len(kinds) == 1, "something else is said to be wrong too"


def test_a_machine_behind_nat_is_told_to_forward_a_port() -> None:
    home = guest("ben", seen_from="203.0.113.7", own_address="192.168.1.5")
    broken = Way(Link(peer="ben", sent=9, trouble="does not answer"))
    (finding,) = findings_of(survey(guest("anna"), home, anna_ben=broken))
    assert "--advertise 203.0.113.7:7071" in finding.mend
    assert "--bind tcp://192.168.1.5:7071" in finding.mend
    assert "VPN" in finding.mend


def test_a_machine_that_listens_on_its_own_loopback_is_told_so() -> None:
    alone = guest("ben", own_address="127.0.0.1")
    (finding,) = findings_of(survey(guest("anna"), alone, anna_ben=Way(Link(peer="ben", sent=9, trouble="refused"))))
    assert "its own machine only" in finding.mend


def test_only_the_direction_that_fails_is_named() -> None:
    """anna's probes arrive at ben, who cannot dial back with his answers."""
    there = Way(Link(peer="ben", sent=9, trouble="none of 9 probes was answered"), heard=9)
    back = Way(Link(peer="anna", sent=9, trouble="nothing listens there"), heard=0)
    (finding,) = findings_of(survey(guest("anna"), guest("ben"), anna_ben=there, ben_anna=back))
    assert finding.what.startswith("ben cannot reach anna")


@pytest.fixture
def config(repo_root: Path) -> object:
    return load_config(repo_root / "configs" / "tiny.toml", ["--coordinator.nodes=4"])


@pytest.fixture
def repo_root() -> Path:
    from helpers import ROOT

    return ROOT


def test_the_page_has_machines_ways_profile_and_plan(config: object) -> None:
    verdict = judge(three(anna_cleo=way("cleo", 5 * MBIT)), config)
    assert verdict.wrong == 1
    for part in (
        "| anna ",
        "anna → cleo",
        "5 Mbit/s",
        "What is wrong:\n1. anna → cleo",
        "mend: ",
        "on 3 nodes",
        "step:",
    ):
        assert part in verdict.text
    assert convert(ProfileConfig, tomllib.loads(verdict.profile), "profile")
    sound = judge(three(), None)
    assert sound.wrong == 0
    assert "Nothing is wrong" in sound.text
    assert "give the run's config" in sound.text


def test_a_config_that_these_machines_cannot_train_is_wrong(config: object) -> None:
    many = [guest(f"m{index}") for index in range(5)]
    verdict = judge(survey(*many), config)
    assert verdict.wrong == 1
    assert "cannot be trained by 5 machines" in verdict.text


def test_too_little_memory_and_disk_are_wrong(config: object) -> None:
    poor = guest("ben", free_memory_bytes=10**6, free_disk_bytes=1000)
    verdict = judge(survey(guest("anna"), poor), config)
    assert "does not fit their memory" in verdict.text
    assert "ben has 1 KB of disk free" in verdict.text


def test_this_machine_describes_itself(config: object) -> None:
    found = facts_of(config, "127.0.0.1")
    assert found.python.startswith("3.")
    assert found.torch
    assert found.cores >= 1
    assert found.memory_bytes > found.free_memory_bytes > 0
    assert found.free_disk_bytes > 0
    assert found.interface.startswith("lo")
    assert not found.short_token
    assert msgspec.msgpack.encode(found)
