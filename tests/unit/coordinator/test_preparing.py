"""Nodes that join before they have their data: the others wait for them, and a run that goes on does not."""

from __future__ import annotations

from helpers.fake_coordinator import Wire, config, join, plan, started, told

from coordinator.events import Received
from coordinator.member import State
from coordinator.messages import Roster, Stop, Welcome
from coordinator.run import Phase


def has_data(wire: Wire, name: str) -> None:
    wire.say(name, join(name))
    wire.settle()


def gathering(**settings: float) -> Wire:
    """Of two nodes, the second still prepares its data."""
    wire = Wire(config(**settings), plan())
    wire.enter("node-0")
    wire.enter("node-1", preparing=True)
    wire.settle()
    return wire


def test_the_run_begins_once_the_last_node_has_its_data() -> None:
    wire = gathering()
    assert wire.run.phase is Phase.JOINING
    assert told(wire, "node-1", Welcome)
    assert not told(wire, "node-0", Roster)
    wire.advance(500.0)  # far beyond the join timeout
    assert wire.outcome is None
    has_data(wire, "node-1")
    for name in wire.members:
        assert len(told(wire, name, Roster)) == 1
        assert wire.members[name].state is State.RUNNING
    wire.play()
    assert wire.run.step == 3


def test_preparing_has_a_limit_and_the_reason_names_who_did_not_end() -> None:
    wire = gathering(join_timeout_s=60.0, progress_timeout_s=200.0)
    wire.advance(259.0)
    assert not told(wire, "node-0", Stop)
    wire.advance(2.0)
    reason = told(wire, "node-0", Stop)[0].reason
    assert reason == "after 260 s 2 of 2 nodes joined: node-0, node-1; still preparing data: node-1"


def test_who_is_missing_is_not_waited_for_longer_because_another_prepares() -> None:
    wire = Wire(config(nodes=3), plan())
    wire.enter("node-0")
    wire.enter("node-1", preparing=True)
    wire.advance(61.0)
    reason = told(wire, "node-0", Stop)[0].reason
    assert "still waiting for node-2; still preparing data: node-1" in reason


def test_one_that_dies_while_it_prepares_leaves_its_place() -> None:
    wire = gathering()
    wire.kill("node-1")
    wire.advance(12.0)
    assert len(wire.run.membership) == 1
    wire.enter("node-2")
    wire.settle()
    assert told(wire, "node-2", Roster)


def test_a_run_that_goes_on_does_not_wait_for_a_node_that_prepares() -> None:
    wire = started(nodes=2, steps=9)
    wire.kill("node-1")
    wire.advance(11.0)
    wire.play(until=2)
    wire.enter("node-2", preparing=True)
    wire.settle()
    wire.play(until=5)
    assert len(told(wire, "node-0", Roster)[-1].members) == 1
    assert wire.members["node-2"].state is State.WAITING
    has_data(wire, "node-2")
    wire.play(until=7)
    assert len(told(wire, "node-0", Roster)[-1].members) == 2
    assert wire.members["node-2"].roster is not None


def test_a_request_that_is_repeated_changes_nothing() -> None:
    wire = gathering()
    generation = wire.run.membership.generation
    for preparing, name in ((True, "node-1"), (False, "node-0"), (True, "node-0")):
        assert wire.event(Received(name, join(name, preparing=preparing))) == []
    assert wire.run.membership.generation == generation
    assert wire.run.phase is Phase.JOINING
    has_data(wire, "node-1")
    assert wire.event(Received("node-1", join("node-1", preparing=True))) == []
    assert wire.run.phase is Phase.BARRIER


def test_what_is_kept_on_disk_knows_who_prepares() -> None:
    wire = gathering()
    state = wire.run.saved()
    assert state is not None
    assert {seat.peer: seat.join.preparing for seat in state.seats} == {"node-0": False, "node-1": True}
    has_data(wire, "node-1")
    state = wire.run.saved()
    assert state is not None
    assert not any(seat.join.preparing for seat in state.seats)
