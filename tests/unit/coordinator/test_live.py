"""Changes of a run's network by command: who is told what and when, over the fake wire with its hand-turned clock."""

from __future__ import annotations

from typing import Any

import pytest
from helpers.fake_coordinator import Wire, config, plan, started
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.events import NetworkChange, Received, Send
from coordinator.live import ANSWER_S
from coordinator.messages import PROTOCOL_VERSION, Alter, Answer, Ask, Changed, Refused
from netem.changes import Change, Cut, Heal, Reset, Tune
from netem.network import CUT_BPS, Profile, Site
from netem.schedule import Schedule, Timed

HOME = Profile(name="home", rate_bps=10e6, latency_s=0.1, sites=(Site("east", ("node-0",)),))
SLOW = Tune(has_rate=True, rate_bps=1e6)
CUT = Cut(ends=("node-0", "node-1"))
ME = "(operator)~1"


def begun(schedule: Schedule = Schedule(HOME), nodes: int = 2) -> Wire:  # noqa: B008 (it is frozen)
    wire = started(nodes=nodes, steps=50, schedule=schedule)
    wire.advance(10.0)
    return wire


def ask(wire: Wire, change: Change | None, peer: str = ME, **changes: Any) -> None:
    question = Ask(**({"version": PROTOCOL_VERSION, "change": change} | changes))
    wire.event(Received(peer, question))


def answers(wire: Wire, peer: str = ME) -> list[Any]:
    return wire.answers.get(peer, [])


def refusal(wire: Wire) -> str:
    (answer,) = answers(wire)
    assert isinstance(answer, Refused)
    assert all(not isinstance(message, Alter) for heard in wire.heard.values() for message in heard)
    return answer.reason


def test_the_network_begins_with_the_roster() -> None:
    schedule = Schedule(HOME).with_timed([Timed(at_s=3.0, change=SLOW)])
    wire = Wire(config(), plan(schedule=schedule))
    wire.enter("node-0")
    wire.settle()
    assert wire.network is None
    wire.now_s = 5.0
    wire.enter("node-1")
    wire.settle()
    assert wire.network == (schedule, 5.0)
    assert {member.began_s for member in wire.members.values()} == {5.0}


def test_a_change_reaches_all_before_it_happens_and_who_asked_hears_when_all_know() -> None:
    wire = begun()
    ask(wire, SLOW)
    assert wire.network is not None
    (timed,) = wire.network.schedule.timed
    assert 10.1 < timed.at_s < 10.2  # the longest way to a node, and a little
    wire.deliver_down("node-0")
    wire.deliver_down("node-1")
    assert [member.changes for member in wire.members.values()] == [(timed,), (timed,)]
    wire.say("node-0", Changed(number=1))
    wire.settle()
    assert answers(wire) == []
    wire.say("node-1", Changed(number=1))
    wire.settle()
    (answer,) = answers(wire)
    assert isinstance(answer, Answer)
    assert (answer.confirmed, answer.silent) == (["node-0", "node-1"], [])
    assert answer.network.startswith("home (1 Mbit/s for each link")
    assert answer.past == ["at 10.12 s rate 1 Mbit/s everywhere"]


def test_who_does_not_confirm_is_named_after_a_while() -> None:
    wire = begun()
    ask(wire, CUT)
    wire.deliver_down("node-1")
    wire.say("node-1", Changed(number=1))
    wire.advance(ANSWER_S + 1)
    (answer,) = answers(wire)
    assert (answer.confirmed, answer.silent) == (["node-1"], ["node-0"])
    wire.say("node-0", Changed(number=1))  # better late than never
    wire.settle()
    assert len(answers(wire)) == 1
    assert wire.faults == []


def test_the_end_of_the_run_answers_too() -> None:
    wire = begun()
    ask(wire, SLOW)
    wire.kill("node-1")
    wire.kill("node-0")
    wire.advance(12.0)
    assert answers(wire)[0].silent == ["node-0", "node-1"]
    late = Ask(version=PROTOCOL_VERSION, change=SLOW)
    (action,) = wire.run.handle(Received("(operator)~2", late), wire.now_s)
    assert isinstance(action, Send)
    assert isinstance(action.message, Refused)
    assert action.message.reason.endswith("nothing can be changed")


def test_only_showing_changes_nothing_and_lists_what_is_to_come() -> None:
    wire = begun(Schedule(HOME).with_timed([Timed(at_s=5.0, change=CUT), Timed(at_s=99.0, change=Heal())]))
    ask(wire, None)
    (answer,) = answers(wire)
    assert (answer.past, answer.coming) == (["at 5 s node-0 and node-1 cut"], ["at 99 s all cuts healed"])
    assert (answer.step, answer.at_s, answer.confirmed, answer.silent) == (0, 10.0, [], [])
    assert all(not down for down in wire.down.values())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            Cut(ends=("node-0", "node-7")),
            "'node-7' matches no node or site in this run; there are node-0, node-1, coordinator, east",
        ),
        (Tune(ends=("west",), latency_s=1.0), "'west' matches no node or site in this run"),
        (Heal(ends=("node-0", "node-1")), "there is no cut between node-0 and node-1"),
    ],
)
def test_a_change_of_nobody_or_nothing_is_refused(change: Change, reason: str) -> None:
    wire = begun(Schedule(HOME).with_timed([Timed(at_s=99.0, change=CUT)]))
    ask(wire, change)
    assert reason in refusal(wire)


@pytest.mark.parametrize("change", [Cut(ends=("east", "node-1")), Tune(ends=("node-*",), latency_s=1.0), Reset()])
def test_patterns_and_sites_are_names_too(change: Change) -> None:
    wire = begun()
    ask(wire, change)
    assert answers(wire) == []
    assert len(wire.down["node-0"]) == 1


def test_another_version_is_told_so() -> None:
    wire = begun()
    ask(wire, SLOW, peer="(operator)~2", version=1)
    assert "speaks protocol version 1" in answers(wire, "(operator)~2")[0].reason


def test_before_the_world_is_complete_there_is_nothing_to_change() -> None:
    wire = Wire(config(), plan(schedule=Schedule(HOME)))
    wire.enter("node-0")
    wire.settle()
    ask(wire, SLOW)
    assert refusal(wire) == "the run has not begun: its nodes are joining"


def test_a_member_confirms_only_what_there_is() -> None:
    wire = begun()
    wire.say("node-0", Changed(number=1))
    wire.settle()
    assert "confirmed change 1 of the network, which does not exist" in str(wire.faults[0])


def test_records_say_what_changed_since_the_one_before_and_traces_do_not_fill_them() -> None:
    wire = begun(Schedule(HOME).with_timed([Timed(at_s=5.0, change=SLOW), Timed(at_s=99.0, change=Heal())]))
    wire.play(until=1)
    ask(wire, CUT)
    wire.now_s = 11.0
    wire.play(until=3)
    assert [record.changes for record in wire.records] == [
        (NetworkChange(5.0, "rate 1 Mbit/s everywhere"),),
        (NetworkChange(10.12, "node-0 and node-1 cut"),),
        (),
    ]


moves = st.lists(
    st.one_of(
        st.sampled_from([SLOW, CUT, Heal(), Reset(), Tune(latency_s=0.5), Tune(ends=("node-1",), latency_s=0.01)]),
        st.floats(0.0, 2.0),
    ),
    max_size=12,
)


@settings(max_examples=50, deadline=None)
@given(moves=moves)
def test_all_follow_one_schedule_whatever_is_asked_when(moves: list[Change | float]) -> None:
    wire = begun()
    asked = 0
    for move in moves:
        if isinstance(move, float):
            wire.advance(move)
        else:
            asked += 1
            ask(wire, move, peer=f"(operator)~{asked}")
    wire.settle()
    for name, member in wire.members.items():
        for number in range(len(member.changes)):
            wire.say(name, Changed(number=number + 1))
    wire.settle()
    assert wire.faults == []
    assert all(len(answers(wire, f"(operator)~{number + 1}")) == 1 for number in range(asked))
    for number in range(asked):  # the answer shows the network after the change, to the last bit of its time
        (answer,) = answers(wire, f"(operator)~{number + 1}")
        assert isinstance(answer, Answer)
        assert len(answer.past) >= min(number + 1, 8)
    here = wire.network.schedule if wire.network else Schedule(HOME)
    for member in wire.members.values():
        assert Schedule(HOME).with_timed(member.changes) == here
    assert [timed.change for timed in here.timed] == [move for move in moves if not isinstance(move, float)]
    last = here.profile_at(1e9)
    cut = [move for move in moves if isinstance(move, Cut | Heal | Reset)]
    assert (last.pair_bps("node-0", "node-1") == CUT_BPS) == (bool(cut) and isinstance(cut[-1], Cut))
