"""The rendezvous: who is let in, which ranks the members get, what those outside are told."""

from __future__ import annotations

from typing import Any

import pytest
from helpers.fake_coordinator import Wire, config, join, plan, started, told

from coordinator.events import Faulted, Forget, PeerLost, Send
from coordinator.member import End, State
from coordinator.messages import (
    Failed,
    Leave,
    Ready,
    Refused,
    Roster,
    Saved,
    Stop,
    Welcome,
)
from coordinator.run import Phase, Run
from netem.errors import ConfigError


def test_a_complete_world_gets_one_roster_with_ranks_in_name_order_whoever_came_first() -> None:
    wire = Wire(config(nodes=3), plan(chunks=6, start_step=7, steps=9))
    for name in ("node-10", "node-2", "node-1"):
        assert len(wire.run.membership) < 3
        wire.enter(name)
        wire.settle()
    rosters = [told(wire, name, Roster)[0] for name in wire.members]
    assert rosters[0] == rosters[1] == rosters[2]
    assert [(entry.name, entry.rank) for entry in rosters[0].members] == [
        ("node-1", 0),
        ("node-2", 1),
        ("node-10", 2),
    ]
    assert rosters[0].generation == 3
    assert rosters[0].start_step == 7
    assert rosters[0].assignment == [[0, 1], [2, 3], [4, 5]]
    assert wire.members["node-10"].rank == 2


def test_a_wish_for_a_rank_is_honoured_and_the_others_fill_the_gaps() -> None:
    wire = Wire(config(nodes=3), plan())
    wire.enter("a")
    wire.enter("b")
    wire.enter("c", rank=0)
    wire.settle()
    assert {name: member.rank for name, member in wire.members.items()} == {"a": 1, "b": 2, "c": 0}
    assert told(wire, "c", Welcome)[0].rank == 0
    assert told(wire, "a", Welcome)[0].rank == -1


def test_a_later_roster_has_those_who_are_left_in_the_order_of_their_places() -> None:
    """Chunks are for them alone, and in the shares that they had."""
    wire = Wire(config(nodes=3, chunks_per_node=(1, 1, 4)), plan(chunks=6))
    for name, rank in (("a", 2), ("b", -1), ("c", 0)):
        wire.enter(name, rank=rank)
    wire.settle()
    wire.event(PeerLost("c", "gone"))
    wire.settle()
    roster = told(wire, "a", Roster)[-1]
    assert [(entry.name, entry.rank) for entry in roster.members] == [("b", 0), ("a", 1)]
    assert (roster.start_step, roster.assignment) == (0, [[0], [1, 2, 3, 4, 5]])
    assert roster.generation == told(wire, "b", Roster)[-1].generation > 3
    assert wire.members["a"].rank == 1


def test_the_roster_says_whether_payloads_are_relayed() -> None:
    for relay in ("never", "always"):
        wire = Wire(config(nodes=2, relay=relay), plan())
        for name in ("a", "b"):
            wire.enter(name)
        wire.settle()
        assert told(wire, "a", Roster)[-1].relays == (relay == "always")
    with pytest.raises(ConfigError, match=r'coordinator.relay = "auto": isthmus run, coordinator and plan choose'):
        Wire(config(nodes=2, relay="auto"), plan())


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"version": 99}, "protocol version 99"),
        ({"config_digest": "other"}, "configuration of node-1 differs"),
        ({"address": "same"}, "node-0 already listens at same"),
        ({"rank": 1}, "rank 1 is taken by node-0"),
        ({"rank": 2}, "rank 2 is not in a world of 2"),
        ({"run": "other", "config_digest": "other"}, "this is run 'run', node-1 asks for run 'other'"),
    ],
)
def test_a_wrong_joiner_is_told_why_and_the_place_stays_free(changes: dict[str, Any], reason: str) -> None:
    wire = Wire(config(), plan())
    wire.enter("node-0", rank=1, address="same")
    wire.enter("node-1", **changes)
    wire.settle()
    (refused,) = told(wire, "node-1", Refused)
    assert reason in refused.reason
    ending = wire.members["node-1"].ending
    assert ending is not None
    assert ending.how is End.REFUSED
    assert len(wire.run.membership) == 1
    wire.enter("node-2")
    wire.settle()
    assert wire.run.phase is Phase.BARRIER


def test_a_second_node_of_the_same_name_is_refused_and_the_first_takes_no_notice() -> None:
    wire = Wire(config(), plan())
    wire.enter("node-0")
    wire.settle()
    (action,) = wire.inject("node-0~2", join("node-0", address="tcp://127.0.0.1:1"))
    assert isinstance(action, Send)
    assert isinstance(action.message, Refused)
    assert "already here (node-0 (pid 7 on atlas))" in action.message.reason
    assert action.peer == "node-0~2"
    wire.settle()
    assert wire.members["node-0"].state is State.WAITING
    assert told(wire, "node-0", Refused) == []


@pytest.mark.parametrize("message", [Failed(reason="x"), Leave(), Ready(step=7), Saved(step=50)])
def test_what_a_namesake_says_does_not_count_as_the_members(message: Any) -> None:
    wire = started()
    wire.inject("node-0~2", join("node-0", run="wrong"))
    assert wire.inject("node-0~2", message) == []
    assert wire.event(PeerLost("node-0~2", "gone")) == [Forget("node-0~2")]
    wire.event(Faulted("node-0~2", "nonsense"))
    wire.play()
    assert wire.outcome == (True, "")


def test_members_are_called_by_their_plain_names() -> None:
    wire = Wire(config(), plan(rounds_for=lambda step: ["weights"] if step == 1 else []))
    for peer in ("node-0~a", "node-1~b"):
        wire.enter(peer)
    wire.settle()
    (roster,) = told(wire, "node-0~a", Roster)
    assert [(entry.name, entry.peer) for entry in roster.members] == [("node-0", "node-0~a"), ("node-1", "node-1~b")]
    wire.play(until=2)
    assert [set(record.nodes) for record in wire.records] == [{"node-0", "node-1"}] * 2
    wire.settle()
    wire.work("node-1~b")
    wire.settle()
    wire.advance(112)
    assert "node-0 (pid 7 on atlas) had to go: not ready for step 3 within 100 s of node-1" in wire.said


def test_who_asks_twice_to_join_is_answered_once() -> None:
    wire = Wire(config(), plan())
    wire.enter("node-0")
    wire.settle()
    assert wire.inject("node-0", join("node-0")) == []
    assert len(wire.run.membership) == 1


@pytest.mark.parametrize(
    ("name", "peer"),
    [("node-9", "node-0"), ("coordinator", "coordinator"), ("coordinator", "coordinator~1"), ("node-0", "node-0~no!")],
)
def test_a_name_must_be_that_of_the_connection_and_not_the_coordinators(name: str, peer: str) -> None:
    wire = Wire(config(), plan())
    (action,) = wire.inject(peer, join(name))
    assert isinstance(action, Send)
    assert isinstance(action.message, Refused)
    assert len(wire.run.membership) == 0


def test_a_late_joiner_is_told_that_the_run_is_full() -> None:
    wire = started()
    wire.enter("node-2")
    wire.settle()
    assert "the run is full: it has its 2 nodes (node-0, node-1)" in told(wire, "node-2", Refused)[0].reason
    wire.play()
    assert wire.outcome is not None
    assert wire.outcome.ok


def test_an_incomplete_rendezvous_ends_with_the_names_of_both_kinds() -> None:
    wire = Wire(config(nodes=4), plan())
    wire.enter("node-0")
    wire.enter("node-2")
    wire.settle()
    wire.advance(59)
    assert wire.run.phase is Phase.JOINING
    wire.advance(2)
    reason = "after 60 s 2 of 4 nodes joined: node-0, node-2; still waiting for node-1, node-3"
    assert told(wire, "node-0", Stop) == [Stop(ok=False, reason=reason)]
    wire.play()
    assert wire.outcome == (False, reason)


def test_with_names_of_their_own_the_missing_are_counted() -> None:
    wire = Wire(config(nodes=3), plan())
    wire.enter("berlin")
    wire.settle()
    wire.advance(61)
    assert "1 of 3 nodes joined: berlin; still waiting for 2 more" in told(wire, "berlin", Stop)[0].reason


def test_who_goes_before_the_start_frees_the_place() -> None:
    wire = Wire(config(), plan())
    wire.enter("node-0")
    wire.settle()
    wire.say("node-0", Leave())
    wire.enter("node-1")
    wire.settle()
    wire.kill("node-1")
    wire.advance(11)
    assert len(wire.run.membership) == 0
    wire.enter("node-2")
    wire.enter("node-3")
    wire.settle()
    assert told(wire, "node-3", Roster)[0].generation == 6


def test_more_nodes_than_chunks_is_said_before_anybody_joins() -> None:
    with pytest.raises(ConfigError, match=r"more nodes than chunks \(4\)"):
        Run(config(nodes=5), plan(), 0.0)
