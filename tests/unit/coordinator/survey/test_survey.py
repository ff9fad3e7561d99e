"""A survey from the first arrival to the result, by its machines alone."""

from __future__ import annotations

import pytest
from helpers.surveyed import START_S, Simulated, Way

from coordinator.messages import PROTOCOL_VERSION, Refused
from coordinator.survey.guest import Answer, Guest, Say
from coordinator.survey.host import GRACE_S, Host, Phase, Send
from coordinator.survey.messages import (
    Arrive,
    Echoed,
    Facts,
    Link,
    Part,
    Probe,
    Report,
    Turn,
    Verdict,
    Waiting,
    from_guest,
    from_host,
    read_probe,
)
from coordinator.survey.turns import plan_turns, rounds
from netem.errors import ProtocolError

FOUR = ("anna", "ben", "cleo", "dan")


@pytest.mark.parametrize("count", range(2, 10))
def test_everyone_measures_each_way_alone_once(count: int) -> None:
    peers = [f"p{index}" for index in range(count)]
    alone = [plan for plan in plan_turns(peers) if plan.alone]
    ways = [(source, target) for plan in alone for source, targets in plan.targets.items() for target in targets]
    assert sorted(ways) == sorted((a, b) for a in peers for b in peers if a != b)
    for pairs in rounds(peers):
        busy = [peer for pair in pairs for peer in pair]
        assert len(busy) == len(set(busy))
    assert len(alone) <= 2 * count


def test_it_finds_rates_latencies_and_clocks() -> None:
    ways = {("anna", "cleo"): Way(rate_bps=5e6, latency_s=0.06), ("cleo", "anna"): Way(rate_bps=50e6, latency_s=0.06)}
    run = Simulated(FOUR, ways=ways, ahead_s={"dan": 7.5})
    survey = run.run()
    assert [guest.name for guest in survey.guests] == list(FOUR)
    assert survey.absent == 0
    assert survey.lost == ()
    assert len(survey.ways) == 12
    for (source, target), way in survey.ways.items():
        true = run.way(source, target)
        assert way.rate_bps == pytest.approx(true.rate_bps, rel=0.1)
        assert way.link.latency_s == pytest.approx((true.latency_s + run.way(target, source).latency_s) / 2, rel=0.1)
        assert way.link.ahead_s == pytest.approx(7.5 * ((target == "dan") - (source == "dan")), abs=0.02)
        assert way.heard
    assert all(guest.verdict for guest in run.guests.values())


def test_a_way_that_is_closed_in_one_direction_is_found_and_not_measured() -> None:
    run = Simulated(FOUR, ways={("anna", "dan"): Way(open=False)})
    survey = run.run()
    there, back = survey.ways["anna", "dan"], survey.ways["dan", "anna"]
    assert there.link.trouble == "nothing listens there"
    assert there.heard == 0
    assert there.rate_bps == 0
    assert back.heard > 0, "dan's probes arrive, only the answers do not"
    assert not back.link.echoed
    assert survey.ways["ben", "dan"].rate_bps


def test_repeated_segments_are_those_of_the_trickle() -> None:
    run = Simulated(FOUR[:2], ways={("anna", "ben"): Way(segments=(300, 12))})
    survey = run.run()
    assert (survey.ways["anna", "ben"].link.segments, survey.ways["anna", "ben"].link.repeated) == (300, 12)


def test_one_that_falls_silent_is_left_out_of_the_rest() -> None:
    run = Simulated(FOUR, silent_from_s={"ben": START_S + 3.0})
    survey = run.run()
    assert survey.lost == ("ben fell silent while it measured",)
    assert survey.ways["anna", "cleo"].rate_bps
    assert run.now_s < START_S + 3 * (GRACE_S + 10) + 60


def test_it_begins_without_those_who_do_not_come() -> None:
    run = Simulated(FOUR[:2], expected=3, wait_s=30.0)
    survey = run.run()
    assert survey.absent == 1
    assert survey.ways["anna", "ben"].rate_bps
    assert any("2 of 3" in text for text in run.told)


def test_alone_it_ends_with_that() -> None:
    survey = Simulated(("anna",), expected=2, wait_s=30.0).run()
    assert survey.absent == 1
    assert survey.ways == {}


def arrive(name: str, version: int = PROTOCOL_VERSION) -> Arrive:
    return Arrive(version=version, name=name, address="tcp://10.0.0.1:7000", facts=Facts())


@pytest.mark.parametrize(
    ("peer", "message", "words"),
    [
        ("anna", arrive("anna", version=1), "install the same isthmus"),
        ("ben", arrive("anna"), "is not a name"),
        ("coordinator", arrive("coordinator"), "is not a name"),
        ("cleo~2", arrive("cleo"), "another machine is called cleo"),
    ],
)
def test_who_does_not_fit_is_refused_with_the_reason(peer: str, message: Arrive, words: str) -> None:
    host = Host(3, 60.0, "", 0.0)
    host.receive("cleo~1", arrive("cleo"), "", 0.0)
    (action,) = host.receive(peer, message, "", 1.0)
    assert isinstance(action, Send)
    assert isinstance(action.message, Refused)
    assert words in action.message.reason


def test_what_strangers_and_late_ones_say_changes_nothing() -> None:
    host = Host(2, 60.0, "", 0.0)
    host.receive("anna", arrive("anna"), "", 0.0)
    before = host.text
    assert host.receive("stranger", Report(turn=0, links=[]), "", 0.0) == []
    assert host.receive("stranger", Part(), "", 0.0) == []
    assert host.lost("stranger", "", 0.0) == []
    host.receive("ben", arrive("ben"), "", 0.0)
    assert host.phase is Phase.TURNS
    assert host.receive("anna", Report(turn=77, links=[]), "", 0.0) == []
    lies = [Link(peer="nobody", echoed=3), Link(peer="anna", echoed=3)]
    assert host.receive("anna", Report(turn=0, links=lies), "", 0.0) == []
    (refusal,) = host.receive("cleo", arrive("cleo"), "", 0.0)
    assert "has begun" in refusal.message.reason
    assert "2 of 2" in host.text
    assert before != host.text


def guest() -> Guest:
    return Guest("anna", arrive("anna"), 20.0, 0.0)


def test_a_guest_gives_up_where_nobody_answers_and_where_the_host_falls_silent() -> None:
    alone = guest()
    assert [action for action in alone.tick(0.0) if isinstance(action, Say)]
    assert alone.tick(19.0)
    alone.tick(20.1)
    assert alone.failure == "nobody answers"
    assert alone.tick(30.0) == []
    left = guest()
    left.told(Waiting(text="1 of 2"), 1.0)
    left.tick(60.0)
    assert not left.over
    left.tick(62.0)
    assert left.failure == "the host fell silent"


def test_probes_of_strangers_are_not_answered_and_their_echoes_count_for_nothing() -> None:
    one = guest()
    probe = Probe(turn=0, number=0, sent_s=0.0)
    assert one.probed("ben", probe, 0.0, 0.0) == []
    one.told(Turn(turn=0, fill=False, targets=["ben"], duration_s=1.0), 0.0)
    echo = Echoed(turn=0, number=0, sent_s=0.0, came_s=0.0, echoed_s=0.0)
    assert not [action for action in one.echoed("ben", echo, 0.1, 0.1) if isinstance(action, Answer)]
    one.told(Verdict(text="done"), 1.0)
    assert one.over


@pytest.mark.parametrize("body", [b"", b"\xc1", b"\x80", b"\x81\xa4type\xa6report", bytes(64), b"\xff" * 100])
def test_bytes_that_are_no_message_are_an_error_that_names_the_sender(body: bytes) -> None:
    for read in (from_guest, from_host, read_probe):
        with pytest.raises(ProtocolError, match="ben"):
            read(body, "ben")
